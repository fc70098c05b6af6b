"""The command line from a checkout: python main.py --config=quickstart ..."""

from jaxprog import cli

if __name__ == '__main__':
  cli.start()

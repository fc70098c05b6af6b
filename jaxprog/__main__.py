"""The command line as python -m jaxprog."""

from jaxprog import cli

if __name__ == '__main__':
  cli.start()

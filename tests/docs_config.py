"""The quickstart's stages by name, as small as a test can afford."""

from tests import tiny_config


def get_config(data_dir='data'):
  config = tiny_config.get_config(data_dir)
  config.check_steps = 1
  config.lr_find_steps = 10
  config.stages = [
    {'name': 'four', 'classes': ('0', '1', '2', '3'), 'num_epochs': 0.3},
    {'name': 'seven', 'classes': tuple('0123456'), 'num_epochs': 0.3},
    {'name': 'ten', 'num_epochs': 0.3},
  ]
  return config

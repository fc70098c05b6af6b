"""Comparisons of networks that a test can afford, on digits of 8 pixels."""

from jaxprog import start_from
from tests import tiny_config


def get_config(data_dir='data'):
  """Returns two cells of one stage, with two seeds."""
  config = start_from('compare_default')
  config.base = tiny_config.get_config(data_dir)
  config.base.stages = [
    {'name': 'ten', 'num_epochs': 2, 'schedule': 'one_cycle'}
  ]
  config.base.max_skipped_steps = 3
  config.grid = ({'stages[-1].optimizer': ('adamw', 'sgd_momentum')},)
  config.seeds = 2
  return config


def get_ladder(data_dir='data'):
  """Returns a ladder of two short stages, an operator, and the controls."""
  config = get_config(data_dir)
  config.base.stages = [
    {'name': 'three', 'classes': ('1', '3', '5'), 'num_epochs': 1},
    {'name': 'ten', 'num_epochs': 1},
  ]
  config.grid = ()
  config.operators = ({'name': 'reset', 'fields': {'reset_blocks': 1}},)
  config.controls = True
  config.seeds = 1
  return config

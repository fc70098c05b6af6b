"""Comparisons for two hosts: 24 short runs, or two that can be interrupted."""

from tests import compare_config


def get_config(argument='data'):
  """Returns six cells with four seeds; 'long:DATA' two with one."""
  kind, _, data_dir = argument.rpartition(':')
  config = compare_config.get_ladder(data_dir)
  config.controls = False
  config.operators = ()
  config.grid = ({'stages[-1].optimizer': ('adamw', 'sgd_momentum')},)
  if kind == 'long':
    config.base.stages = [{'name': 'ten', 'num_epochs': 8}]
  else:
    config.grid += ({'stages[-1].weight_decay': (0.0, 0.05, 0.5)},)
    config.seeds = 4
  return config

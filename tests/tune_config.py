"""A search that a test can afford."""

from jaxprog import start_from
from tests import tiny_config


def get_config(data_dir='data'):
  config = start_from('tune_default')
  config.base = tiny_config.get_config(data_dir)
  config.base.checkpoint_every_steps = 3
  config.base.stages = config.base.stages[:1]
  config.search = (
    {'field': 'stages[0].learning_rate', 'log': (1e-3, 1e-1)},
    {'field': 'stages[0].weight_decay', 'choice': (0.0, 0.1)},
  )
  config.pruner = 'none'
  return config

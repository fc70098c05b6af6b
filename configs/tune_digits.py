"""The learning rate and the decay of one stage on handwritten digits.

An example that takes minutes on two cores: 20 trials of four epochs.
"""

from ml_collections import config_dict

from jaxprog import start_from


def get_config() -> config_dict.ConfigDict:
  """Returns the search."""
  config = start_from('tune_default')
  config.base = start_from('quickstart')
  config.base.stages = [
    {
      'name': 'ten',
      'num_epochs': 4,
      'schedule': 'one_cycle',
    }
  ]
  config.search = (
    {'field': 'stages[0].learning_rate', 'log': (1e-4, 1e-1)},
    {'field': 'stages[0].weight_decay', 'log': (1e-5, 1.0)},
    {'field': 'stages[0].label_smoothing', 'uniform': (0.0, 0.2)},
  )
  return config

"""Optimizers and schedules at equal epochs, on one small stage.

AdamW, SGD with momentum, RMSprop and 8-bit AdamW, each with five schedules, at
the best of three learning rates. By default on the ten digits of
quickstart.py, which need no download;
`--config=compare_strategies:imagenette` takes real photographs.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from jaxprog import UserError, start_from

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
  'adamw': {
    'optimizer': 'adamw',
    'learning_rate': 0.004,
    'weight_decay': 0.02,
  },
  'sgd_momentum': {
    'optimizer': 'sgd_momentum',
    'learning_rate': 0.05,
    'weight_decay': 5e-4,
  },
  'rmsprop': {
    'optimizer': 'rmsprop',
    'learning_rate': 0.001,
    'weight_decay': 5e-4,
  },
  'adamw_8bit': {
    'optimizer': 'adamw_8bit',
    'learning_rate': 0.004,
    'weight_decay': 0.02,
  },
}
# Parts of the epochs: of the warmup, and of what comes before each step down.
WARMUP = 1 / 8
MILESTONES = (1 / 2, 3 / 4)


def get_config(dataset: str = 'digits') -> config_dict.ConfigDict:
  """Returns the twenty cells on 'digits' or 'imagenette'."""
  config = start_from('compare_default')
  match dataset:
    case 'digits':
      config.base = start_from('quickstart')
      stage = dict(config.base.stages[2])
    case 'imagenette':
      config.base = start_from('nette_tiny')
      stage = dict(config.base.stages[0])
    case _:
      raise UserError(
        f'{dataset!r} is none of digits, imagenette.',
        f'--config=compare_strategies:{dataset}',
      )
  num_epochs = stage['num_epochs'] = 8
  stage |= {'warmup_epochs': 0, 'gradient_clipping': 1.0}
  config.base.stages = [stage]

  warmup = {'warmup_epochs': WARMUP * num_epochs}
  schedules: Mapping[str, Mapping[str, Any]] = {
    'one_cycle': {'schedule': 'one_cycle'},
    'cosine': {'schedule': 'cosine_warmup', **warmup},
    'polynomial': {'schedule': 'polynomial', **warmup},
    'exponential': {
      'schedule': 'exponential_warmup',
      'end_factor': 0.001,
      **warmup,
    },
    'step': {
      'schedule': 'step',
      'milestones': tuple(num_epochs * part for part in MILESTONES),
      **warmup,
    },
  }
  config.grid = (
    {name: of_last_stage(fields) for name, fields in OPTIMIZERS.items()},
    {name: of_last_stage(fields) for name, fields in schedules.items()},
  )
  config.tuning.factors = (0.3, 1.0, 3.0)
  config.tuning.rungs = (0.5,)
  return config


def of_last_stage(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `fields` by their paths in the ladder."""
  return {f'stages[-1].{name}': value for name, value in fields.items()}

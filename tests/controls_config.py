"""A short ladder that uses what a stage can be told beyond its schedule."""

from tests import tiny_config


def get_config(data_dir='data'):
  config = tiny_config.get_config(data_dir)
  config.lr_find_steps = 40
  config.stages = [
    config.stages[0],  # The steps that tiny_config compiles.
    {
      'name': 'ten',
      'num_epochs': 8.0,
      'batch_size': 48,
      'micro_batch_size': 24,
      'phases': ({'from_epoch': 1, 'batch_size': 96},),
      'optimizer': 'rmsprop',
      'learning_rate': 0.002,
      'momentum': 0.5,
      'layer_decay': 0.9,
      'head_rate_factor': 2.0,
      'gradient_clipping': 1.0,
      'ema_decay': 0.9,
      'freeze_epochs': 0.5,
      # No evaluation gains as much as is asked for: every one is a bad one.
      'schedule': 'plateau',
      'plateau_patience': 0,
      'plateau_factor': 0.5,
      'plateau_min_delta': 100.0,
      'early_stopping_patience': 3,
      'early_stopping_min_delta': 1.0,
    },
  ]
  return config

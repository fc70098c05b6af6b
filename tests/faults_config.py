"""A ladder as short as can be that has all that a resume must bring back.

Moments, averages, a lowered rate, evaluations that gained nothing, random
augmentation, the place in the data: an interruption that loses one of them
ends with other weights.
"""

from tests import tiny_config


def get_config(data_dir='data'):
  config = tiny_config.get_config(data_dir)
  config.log_every_steps = 1
  config.tensorboard = True
  config.stage_defaults.flip = True
  config.stages = [
    {
      'name': 'three',
      'classes': ('1', '3', '5'),
      'num_epochs': 2.0,
      'batch_size': 72,
      'micro_batch_size': 24,
      'schedule': 'one_cycle',
      'erasing_probability': 0.5,
      'mixup_alpha': 0.2,
      'ema_decay': 0.9,
    },
    {
      'name': 'ten',
      'num_epochs': 5.0,
      'batch_size': 144,
      'phases': ({'from_epoch': 1, 'batch_size': 288},),
      # An evaluation that takes long enough to be interrupted.
      'eval_image_size': 96,
      'optimizer': 'sgd_momentum',
      'learning_rate': 0.05,
      'cutmix_alpha': 1.0,
      'ema_decay': 0.8,
      # No evaluation gains as much as is asked for: every one is a bad one.
      'schedule': 'plateau',
      'plateau_patience': 0,
      'plateau_factor': 0.5,
      'plateau_min_delta': 100.0,
      'early_stopping_patience': 2,
      'early_stopping_min_delta': 1.0,
    },
  ]
  return config

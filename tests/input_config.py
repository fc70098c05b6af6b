"""One stage that uses what images can be told, for the input's tests."""

from tests import tiny_config


def get_config(folder):
  config = tiny_config.get_config(f'{folder}/data')
  config.num_workers = 2
  config.log_every_steps = 1
  config.stages = [
    {
      'name': 'all',
      'dataset': f'folder:{folder}/raw',
      'num_epochs': 3.0,
      'batch_size': 16,
      'image_size': 16,
      'storage': 'jpeg:18',
      'flip': True,
      'alternating_flip': True,
      'brightness': 0.3,
      'contrast': 0.3,
      'saturation': 0.3,
      'hue': 0.1,
      'auto_augment': 'trivial_augment',
      'erasing_probability': 0.5,
      'eval_split': 'holdout:20%',
      'eval_interpolation': 'bicubic',
      'phases': (
        {'from_epoch': 1, 'image_size': 24, 'mixup_alpha': 0.2},
        {'from_epoch': 2, 'batch_size': 32, 'cutmix_alpha': 1.0},
      ),
    },
  ]
  return config

"""Four small stages on images that need no download: minutes on two cores.

The handwritten digits of scikit-learn (1,797 images of 8x8 pixels): four
classes, then seven, then ten, then ten at twice the size, where the head is
carried too because the classes stay the same.
"""

from ml_collections import config_dict

from jaxprog import start_from


def get_config() -> config_dict.ConfigDict:
  """Returns a ladder of four stages that ends with all ten digits."""
  config = start_from('default')
  config.model = 'resnet10'
  config.num_filters = 16
  config.stem_kernel = 3

  stage = config.stage_defaults
  stage.dataset = 'digits'
  stage.image_size = 16
  stage.min_crop_area = 0.7
  stage.max_crop_aspect = 1.2
  stage.flip = False  # A mirrored 2 is no digit.
  stage.eval_crop = 1.0
  stage.batch_size = 32
  stage.weight_decay = 0.01
  stage.gradient_clipping = 1.0
  stage.label_smoothing = 0.1

  config.stages = [
    {
      'name': 'four',
      'description': 'Digits 0 to 3.',
      'classes': ('0', '1', '2', '3'),
      'num_epochs': 6,
      'learning_rate': 0.004,
      'optimizer': 'adamw',
      'schedule': 'one_cycle',
    },
    {
      'name': 'seven',
      'description': 'Digits 0 to 6, a new head.',
      'classes': ('0', '1', '2', '3', '4', '5', '6'),
      'num_epochs': 6,
      'learning_rate': 0.003,
      'optimizer': 'adamw',
      'schedule': 'cosine_warmup',
      'warmup_epochs': 1,
    },
    {
      'name': 'ten',
      'description': 'All ten digits, a new head.',
      'num_classes': 10,
      'num_epochs': 8,
      'learning_rate': 0.05,
      'optimizer': 'sgd_momentum',
      'schedule': 'polynomial',
      'warmup_epochs': 1,
      'weight_decay': 1e-4,
    },
    {
      'name': 'ten_large',
      'description': 'The same ten at 32 pixels: the head is carried too.',
      'num_classes': 10,
      'image_size': 32,
      'num_epochs': 6,
      'learning_rate': 0.2,
      'optimizer': 'sgd_momentum',
      'schedule': 'exponential_warmup',
      'warmup_epochs': 1,
      'end_factor': 0.01,
      'weight_decay': 1e-4,
    },
  ]
  return config

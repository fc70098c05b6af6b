"""Imagenette, then Tiny ImageNet, sized for two CPU cores.

A ResNet-18 of half the usual width at 64 pixels.
"""

from ml_collections import config_dict

from jaxprog import start_from


def get_config() -> config_dict.ConfigDict:
  """Returns two stages on real photographs."""
  config = start_from('default')
  config.model = 'resnet18'
  config.num_filters = 32
  config.stem_kernel = 7

  stage = config.stage_defaults
  stage.image_size = 64
  stage.min_crop_area = 0.35
  stage.optimizer = 'adamw'
  stage.gradient_clipping = 1.0
  stage.label_smoothing = 0.1
  stage.weight_decay = 0.05

  config.stages = [
    {
      'name': 'imagenette',
      'description': 'Ten easy classes.',
      'dataset': 'imagenette',
      'num_classes': 10,
      'num_epochs': 24,
      'batch_size': 64,
      'learning_rate': 0.004,
      'schedule': 'one_cycle',
      'eval_crop': 0.9,
    },
    {
      'name': 'tiny_imagenet',
      'description': 'Two hundred other classes, on the same features.',
      'dataset': 'tiny_imagenet',
      'num_classes': 200,
      'num_epochs': 8,
      'batch_size': 128,
      'learning_rate': 0.004,
      'schedule': 'cosine_warmup',
      'warmup_epochs': 1,
      'eval_crop': 1.0,
    },
  ]
  return config

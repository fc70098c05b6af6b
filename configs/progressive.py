"""The ladder of the mission: Imagenette to ImageNet-1k, ResNet-50.

`--config=progressive:resnet18` takes another network. A stage of
your own is one more dict in the list.
"""

from ml_collections import config_dict

from jaxprog import start_from


def get_config(model: str = 'resnet50') -> config_dict.ConfigDict:
  """Returns the four stages, from 10 classes to 1000."""
  config = start_from('default')
  config.model = model
  config.exclude_leaks = True
  config.stage_defaults.mixed_precision = True
  config.stage_defaults.gradient_clipping = 1.0
  config.stage_defaults.label_smoothing = 0.1
  config.stages = [
    {
      'name': 'imagenette',
      'description': 'Ten easy classes at full size: edges, textures, parts.',
      'dataset': 'imagenette',
      'num_classes': 10,
      'image_size': 224,
      'num_epochs': 20,
      'batch_size': 64,
      'learning_rate': 0.002,
      'optimizer': 'adamw',
      'schedule': 'one_cycle',
      'weight_decay': 0.01,
    },
    {
      'name': 'tiny_imagenet',
      'description': 'Many classes on small, cheap images.',
      'dataset': 'tiny_imagenet',
      'num_classes': 200,
      'image_size': 64,
      'num_epochs': 30,
      'batch_size': 128,
      'learning_rate': 0.001,
      'optimizer': 'adamw',
      'schedule': 'cosine_warmup',
      'warmup_epochs': 3,
      'weight_decay': 0.01,
    },
    {
      'name': 'imagenet_mini',
      'description': 'All thousand classes, few images of each.',
      'dataset': 'imagenet_mini',
      'num_classes': 1000,
      'image_size': 224,
      'num_epochs': 40,
      'batch_size': 96,
      'learning_rate': 0.0005,
      'optimizer': 'sgd_momentum',
      'schedule': 'polynomial',
      'weight_decay': 1e-4,
    },
    {
      'name': 'imagenet',
      'description': 'The goal: all of ImageNet-1k.',
      'dataset': 'imagenet2012',
      'num_classes': 1000,
      'image_size': 224,
      'num_epochs': 60,
      'batch_size': 128,
      'learning_rate': 0.1,
      'optimizer': 'sgd_momentum',
      'schedule': 'exponential_warmup',
      'warmup_epochs': 5,
      'end_factor': 0.001,
      'weight_decay': 1e-4,
    },
  ]
  return config

"""Does the ladder pay? Two stages against the second alone, at equal cost.

Imagenette, then Tiny ImageNet, at 32 pixels with a small network, against Tiny
ImageNet alone at equal FLOPs, images and seconds; and the main ways of handing
weights over. `--config=compare_ladder:digits` is the same on digits of 8
pixels: a minute on two cores, to see how it works.
"""

from ml_collections import config_dict

from jaxprog import UserError, start_from


def get_config(dataset: str = 'photographs') -> config_dict.ConfigDict:
  """Returns the comparison on 'photographs' or 'digits'."""
  config = start_from('compare_default')
  match dataset:
    case 'photographs':
      config.base = create_photographs()
    case 'digits':
      config.base = create_digits()
    case _:
      raise UserError(
        f'{dataset!r} is none of photographs, digits.',
        f'--config=compare_ladder:{dataset}',
      )
  config.cells = ({'name': 'plain', 'overrides': {}},)
  config.operators = (
    {
      'name': 'shrink_and_perturb',
      'fields': {'transfer': 'shrink_and_perturb'},
    },
    {'name': 'dash', 'fields': {'transfer': 'dash'}},
    {'name': 'reset_last_block', 'fields': {'reset_blocks': 1}},
  )
  config.controls = True
  return config


def create_photographs() -> config_dict.ConfigDict:
  """Returns nette_tiny.py at 32 pixels, with a network of 10 layers."""
  ladder = start_from('nette_tiny')
  ladder.model = 'resnet10'
  ladder.num_filters = 8
  ladder.stem_kernel = 3
  ladder.stage_defaults.image_size = 32
  ladder.stage_defaults.storage = 'raw:48'
  imagenette, tiny = ladder.stages
  imagenette['num_epochs'] = 6
  tiny['num_epochs'] = 3
  tiny['warmup_epochs'] = 0.5
  return ladder


def create_digits() -> config_dict.ConfigDict:
  """Returns the digits 0 to 6, then all ten, at 8 pixels."""
  ladder = start_from('quickstart')
  ladder.num_filters = 8
  ladder.stage_defaults.image_size = 8
  ladder.stage_defaults.optimizer = 'adamw'
  ladder.stage_defaults.schedule = 'one_cycle'
  ladder.stage_defaults.learning_rate = 0.004
  ladder.stages = [
    {
      'name': 'seven',
      'classes': ('0', '1', '2', '3', '4', '5', '6'),
      'num_epochs': 3,
    },
    {'name': 'ten', 'num_classes': 10, 'num_epochs': 3},
  ]
  return ladder

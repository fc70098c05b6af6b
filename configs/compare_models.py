"""Four networks at equal images, on one small stage.

By default on the ten digits of quickstart.py;
`--config=compare_models:imagenette` and `:tiny_imagenet` take the
stages of nette_tiny.py. `--config.budget=flops` asks which is best for the
same arithmetic instead.
"""

from ml_collections import config_dict

from jaxprog import UserError, start_from

MODELS = ('resnet10', 'resnet18', 'resnet34', 'resnet50')


def get_config(dataset: str = 'digits') -> config_dict.ConfigDict:
  """Returns a cell for each network, at the best of three learning rates."""
  config = start_from('compare_default')
  ladders = {
    'digits': ('quickstart', 'ten'),
    'imagenette': ('nette_tiny', 'imagenette'),
    'tiny_imagenet': ('nette_tiny', 'tiny_imagenet'),
  }
  if dataset not in ladders:
    raise UserError(
      f'{dataset!r} is none of {", ".join(ladders)}.',
      f'--config=compare_models:{dataset}',
    )
  ladder, name = ladders[dataset]
  config.base = start_from(ladder)
  config.base.stages = [x for x in config.base.stages if x['name'] == name]
  config.grid = ({'model': MODELS},)
  config.budget = 'images'
  config.tuning.factors = (0.3, 1.0, 3.0)
  config.tuning.rungs = (0.5,)
  return config

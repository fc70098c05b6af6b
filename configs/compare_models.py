"""Four networks at equal images, on one small stage.

By default on the ten digits of quickstart.py;
`--config=configs/compare_models.py:imagenette` and `:tiny_imagenet` take the
stages of nette_tiny.py. `--config.budget=flops` asks which is best for the
same arithmetic instead.
"""

from ml_collections import config_dict

from configs import compare_default, nette_tiny, quickstart
from jaxprog import errors

MODELS = ('resnet10', 'resnet18', 'resnet34', 'resnet50')


def get_config(dataset: str = 'digits') -> config_dict.ConfigDict:
  """Returns a cell for each network, at the best of three learning rates."""
  config = compare_default.compare_defaults()
  ladders = {
    'digits': (quickstart.get_config, 'ten'),
    'imagenette': (nette_tiny.get_config, 'imagenette'),
    'tiny_imagenet': (nette_tiny.get_config, 'tiny_imagenet'),
  }
  if dataset not in ladders:
    raise errors.UserError(
      f'{dataset!r} is none of {", ".join(ladders)}.',
      f'--config=configs/compare_models.py:{dataset}',
    )
  create, name = ladders[dataset]
  config.base = create()
  config.base.stages = [x for x in config.base.stages if x['name'] == name]
  config.grid = ({'model': MODELS},)
  config.budget = 'images'
  config.tuning.factors = (0.3, 1.0, 3.0)
  config.tuning.rungs = (0.5,)
  return config

"""Does a warm start cost accuracy, and does shrink-and-perturb mend it?

The experiment of Ash & Adams 2020 (arXiv:1910.08475), small: a network that
has converged on half of Imagenette's images goes on with all of them, as it is
or shrunk and perturbed, beside one that sees all of them from the start. SGD
at a constant rate, no augmentation, as in their paper;
`--config=compare_warm_start:augmented` crops and flips.
"""

from ml_collections import config_dict

from jaxprog import UserError, start_from


def get_config(images: str = 'plain') -> config_dict.ConfigDict:
  """Returns the comparison on images that are 'plain' or 'augmented'."""
  if images not in ('plain', 'augmented'):
    raise UserError(
      f'{images!r} is none of plain, augmented.',
      f'--config=compare_warm_start:{images}',
    )
  config = start_from('compare_default')
  config.base = create_ladder()
  if images == 'augmented':
    config.base.stage_defaults.storage = 'raw:24'
    config.base.stage_defaults.min_crop_area = 0.5
    config.base.stage_defaults.max_crop_aspect = 4 / 3
    config.base.stage_defaults.flip = True
  config.cells = (
    {'name': 'cold', 'overrides': {}, 'stages': ('all',)},
    {'name': 'warm', 'overrides': {}},
    {
      'name': 'shrink_and_perturb',
      'overrides': {
        'stages[-1].transfer': 'shrink_and_perturb',
        'stages[-1].shrink': 0.4,
        'stages[-1].perturb': 0.1,
      },
    },
  )
  config.budget = 'own'
  config.seeds = 6
  return config


def create_ladder() -> config_dict.ConfigDict:
  """Returns half of the images, then all."""
  ladder = start_from('default')
  ladder.model = 'resnet10'
  ladder.num_filters = 8
  ladder.stem_kernel = 3
  stage = ladder.stage_defaults
  stage.dataset = 'imagenette'
  stage.image_size = 16
  stage.storage = 'raw:16'
  stage.min_crop_area = 1.0
  stage.max_crop_aspect = 1.0
  stage.flip = False
  stage.batch_size = 128
  stage.optimizer = 'sgd_momentum'
  stage.schedule = 'constant'
  stage.learning_rate = 0.05
  stage.weight_decay = 0.0
  ladder.stages = [
    {
      'name': 'half',
      'description': 'Half of the training images.',
      'eval_split': 'holdout:50%',
      'num_epochs': 40,
    },
    {
      'name': 'all',
      'description': 'All of them, with the same classes.',
      # What has been seen before must not be told by the best epoch.
      'transfer_weights': 'final',
      'num_epochs': 30,
    },
  ]
  return ladder

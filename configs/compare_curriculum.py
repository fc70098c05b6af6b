"""Does a curriculum of frequencies beat one of sizes, or none?

A stage shows whole images throughout, small ones that grow (progressive
resizing, by interpolation), or large ones whose high frequencies come last
(low-frequency crops, arXiv:2405.08768): at equal FLOPs, with the sizes and the
parts of EfficientTrain++ (96, 160 and 224 px in 20%, 40% and 40% of the
epochs), a quarter as large.
"""

from ml_collections import config_dict

from jaxprog import start_from

SIZES = (24, 40, 56)
STARTS = (0, 4, 12)
NUM_EPOCHS = 20


def get_config() -> config_dict.ConfigDict:
  """Returns the comparison."""
  config = start_from('compare_default')
  config.base = create_ladder()
  config.cells = (
    {'name': 'whole', 'overrides': {}},
    *({'name': name, 'overrides': grow(name)} for name in FIELDS),
  )
  config.budget = 'flops'
  config.seeds = 5
  return config


# What grows, by the name of the cell. The last size is that of the image.
FIELDS = {'resized': 'image_size', 'low_frequency': 'low_frequency_size'}


def grow(name: str) -> dict[str, object]:
  """Returns the first size, and the phases of the others."""
  field = FIELDS[name]
  phases = tuple(
    {'from_epoch': start, field: size}
    for start, size in zip(STARTS[1:], SIZES[1:], strict=True)
  )
  return {f'stages[-1].{field}': SIZES[0], 'stages[-1].phases': phases}


def create_ladder() -> config_dict.ConfigDict:
  """Returns one stage, whose stem is the same at all sizes."""
  ladder = start_from('default')
  ladder.model = 'resnet10'
  ladder.num_filters = 16
  ladder.stem_kernel = 3
  stage = ladder.stage_defaults
  stage.dataset = 'imagenette'
  stage.storage = 'raw:64'
  stage.image_size = SIZES[-1]
  stage.min_crop_area = 0.35
  stage.eval_crop = 1.0
  stage.batch_size = 128
  stage.optimizer = 'adamw'
  stage.weight_decay = 0.05
  stage.label_smoothing = 0.1
  stage.gradient_clipping = 1.0
  ladder.stages = [
    {
      'name': 'imagenette',
      'description': 'Ten easy classes.',
      'num_epochs': NUM_EPOCHS,
      'learning_rate': 0.004,
      'schedule': 'one_cycle',
    }
  ]
  return ladder

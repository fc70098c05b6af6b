"""What recipes and a teacher are worth on a small ladder, at equal FLOPs.

`--config=compare_recipes` goes from Imagenette to Tiny ImageNet, which share no
class: a teacher can hand features over, no logits. Beside it are parts of
recipes. `:classes` goes from the first hundred classes of Tiny ImageNet to all
of them, where a teacher's logits know half of these. A teacher's FLOPs count.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from jaxprog import UserError, start_from

# The length of the last stage before the budget, and where its images grow.
EPOCHS = 3
GROWING = (16, 24, 32)
HUNDRED = """
n01443537 n01629819 n01641577 n01644900 n01698640 n01742172 n01768244
n01770393 n01774384 n01774750 n01784675 n01855672 n01882714 n01910747
n01917289 n01944390 n01945685 n01950731 n01983481 n01984695 n02002724
n02056570 n02058221 n02074367 n02085620 n02094433 n02099601 n02099712
n02106662 n02113799 n02123045 n02123394 n02124075 n02125311 n02129165
n02132136 n02165456 n02190166 n02206856 n02226429 n02231487 n02233338
n02236044 n02268443 n02279972 n02281406 n02321529 n02364673 n02395406
n02403003 n02410509 n02415577 n02423022 n02437312 n02480495 n02481823
n02486410 n02504458 n02509815 n02666196 n02669723 n02699494 n02730930
n02769748 n02788148 n02791270 n02793495 n02795169 n02802426 n02808440
n02814533 n02814860 n02815834 n02823428 n02837789 n02841315 n02843684
n02883205 n02892201 n02906734 n02909870 n02917067 n02927161 n02948072
n02950826 n02963159 n02977058 n02988304 n02999410 n03014705 n03026506
n03042490 n03085013 n03089624 n03100240 n03126707 n03160309 n03179701
n03201208 n03250847
"""


def get_config(rungs: str = 'datasets') -> config_dict.ConfigDict:
  """Returns the comparison on rungs that are 'datasets' or 'classes'."""
  config = start_from('compare_default')
  config.seeds, config.budget, config.reference = 5, 'flops', 'plain'
  base = config.base = start_from('nette_tiny')
  base.model, base.num_filters, base.stem_kernel = 'resnet10', 16, 3
  base.stage_defaults.image_size = 32
  base.stage_defaults.storage = 'raw:48'
  first, last = base.stages
  first['num_epochs'] = 4
  last |= {'num_epochs': EPOCHS, 'warmup_epochs': 0.5}
  cells: Mapping[str, Mapping[str, Any]]
  match rungs:
    case 'datasets':
      cells = {
        'plain': {},
        'features': {
          'distill_from': 'stage:imagenette',
          'distill_weight': 0.0,
          'distill_features': 1.0,
        },
        'bce': {'loss': 'bce'},
        'drop_path': {'drop_path': 0.1},
        'low_frequency': {
          'low_frequency_size': GROWING[0],
          'phases': grow('low_frequency_size'),
        },
        'small_images': {
          'image_size': GROWING[0],
          'eval_image_size': GROWING[-1],
          'phases': grow('image_size'),
        },
      }
    case 'classes':
      classes = tuple(HUNDRED.split())
      hundred = {'name': 'hundred', 'num_classes': 100, 'classes': classes}
      base.stages = [{**last, **hundred}, last]
      cells = {
        'plain': {},
        'logits': {'distill_from': 'stage:hundred', 'distill_weight': 0.5},
        'by_class': {'transfer_head': 'by_class'},
      }
    case _:
      raise UserError(
        f'{rungs!r} is none of datasets, classes.',
        f'--config=compare_recipes:{rungs}',
      )
  config.cells = tuple(
    {
      'name': name,
      'overrides': {f'stages[-1].{k}': v for k, v in fields.items()},
    }
    for name, fields in cells.items()
  )
  return config


def grow(field: str) -> tuple[dict[str, Any], ...]:
  """Returns phases of equal length that let a field grow."""
  return tuple(
    {'from_epoch': EPOCHS * i // len(GROWING), field: size}
    for i, size in enumerate(GROWING)
    if i
  )

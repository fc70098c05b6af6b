"""Does the ladder pay? Ways up to a last stage, at equal cost.

What is compared with is the last stage alone; the others have its FLOPs for all
of their stages. `short`, `middle` (the default) and `long` are Tiny ImageNet
after Imagenette and after other first stages, with a small network, at three
budgets; `classes` is Tiny ImageNet after a hundred of its classes.
`imagenet` asks for ImageNet-1k at full size, of the whole ladder and of images
that grow; `digits` takes a minute on two cores, to see how it works.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from jaxprog import UserError, start_from

# Epochs of Tiny ImageNet alone: the budget of all cells.
BUDGETS = {'short': 2.5, 'middle': 4.5, 'long': 10.5}
# Sides of the images where they grow within the stage.
SIZES = (16, 24, 32)


def get_config(which: str = 'middle') -> config_dict.ConfigDict:
  """Returns one of the comparisons."""
  if which == 'digits':
    return create_digits()
  config = start_from('compare_default')
  config.reference, config.budget = 'alone', 'flops'
  config.seeds, config.margin = 6, 0.005
  if which == 'imagenet':
    config.base = start_from('progressive')
    config.seeds = 3
    alone = config.base.stages[-1:]
    config.cells = (
      create_cell('alone', alone),
      create_cell('ladder', config.base.stages),
      create_cell('growing', alone, create_growing(alone[0], (128, 176, 224))),
    )
    return config
  if which not in (*BUDGETS, 'classes'):
    raise UserError(
      f'{which!r} is none of {", ".join(BUDGETS)}, classes, imagenet, digits.',
      f'--config=compare_ladder:{which}',
    )
  # The same trials for every cell, scored on training images held out. So are
  # the best weights chosen; validation images are looked at once a run.
  config.tuning.factors = (0.4, 1.0, 2.5)
  config.tuning.rungs = (0.5,)
  config.base = create_photographs(BUDGETS.get(which, BUDGETS['middle']))
  config.cells = create_ways(config.base, classes=which == 'classes')
  return config


def create_photographs(num_epochs: float) -> config_dict.ConfigDict:
  """Returns four stages of 32 pixels or less; the last one is what counts."""
  ladder = start_from('compare_recipes')
  base = ladder.base
  base.stage_defaults.eval_split = 'holdout:10%'
  imagenette, tiny = base.stages
  # As long before any budget, and about as dear; a smaller image costs less.
  imagenette['num_epochs'] = 4
  small = {'name': 'tiny_16', 'image_size': 16, 'num_epochs': 6}
  hundred = start_from('compare_recipes:classes').base.stages[0]
  hundred = {'name': 'hundred', 'classes': hundred['classes'], 'num_epochs': 3}
  base.stages = [
    imagenette,
    {**tiny, **small, 'warmup_epochs': 1},
    {**tiny, **hundred, 'num_classes': 100},
    {**tiny, 'num_epochs': num_epochs, 'warmup_epochs': num_epochs / 8},
  ]
  return base


def create_ways(
  base: config_dict.ConfigDict, *, classes: bool
) -> tuple[dict[str, Any], ...]:
  """Returns the cells: the last stage alone, and what may be better."""
  imagenette, small, hundred, last = base.stages
  alone = [last]
  if classes:
    ladder = [hundred, last]
    return (
      create_cell('alone', alone),
      create_cell('ladder', ladder),
      create_cell('by_class', ladder, {'transfer_head': 'by_class'}),
      create_cell(
        'logits',
        ladder,
        {'distill_from': 'stage:hundred', 'distill_weight': 0.5},
      ),
    )
  ladder = [imagenette, last]
  features = {
    'distill_from': 'stage:imagenette',
    'distill_weight': 0.0,
    'distill_features': 1.0,
  }
  sharper = create_phases(last, 'low_frequency_size', SIZES)
  unsmoothed = create_cell('unsmoothed', ladder)
  unsmoothed['overrides']['stages[0].label_smoothing'] = 0.0
  return (
    create_cell('alone', alone),
    create_cell('ladder', ladder),
    create_cell('features', ladder, features),
    unsmoothed,
    create_cell('same_classes', [small, last]),
    create_cell('growing', alone, create_growing(last, SIZES)),
    create_cell('low_frequency', alone, sharper),
  )


def create_cell(
  name: str,
  stages: Sequence[Mapping[str, Any]],
  fields: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns a cell that trains `stages`, with `fields` of the last one."""
  return {
    'name': name,
    'stages': tuple(stage['name'] for stage in stages),
    'overrides': {f'stages[-1].{k}': v for k, v in (fields or {}).items()},
  }


def create_growing(
  stage: Mapping[str, Any], sizes: Sequence[int]
) -> dict[str, Any]:
  """Returns the fields with which images grow within the stage."""
  growing = create_phases(stage, 'image_size', sizes)
  return {**growing, 'eval_image_size': sizes[-1]}


def create_phases(
  stage: Mapping[str, Any], field: str, sizes: Sequence[int]
) -> dict[str, Any]:
  """Returns the fields with which one has each of `sizes` about as long."""
  first, *others = sizes
  part = stage['num_epochs'] / len(sizes)
  phases = (
    {'from_epoch': round(part * i), field: size}
    for i, size in enumerate(others, 1)
  )
  return {field: first, 'phases': tuple(phases)}


def create_digits() -> config_dict.ConfigDict:
  """Returns the digits 0 to 6, then all ten, at 8 pixels, with all controls."""
  config = start_from('compare_default')
  ladder = config.base = start_from('quickstart')
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

"""From a config to frozen `Stage` objects; every mistake is found here.

Nothing is imported that takes time, so that a typo costs a second.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from jaxprog import errors

DATASETS = (
  'digits',
  'imagenet2012',
  'imagenet_mini',
  'imagenette',
  'tiny_imagenet',
)
MODELS = (
  'resnet10',
  'resnet18',
  'resnet34',
  'resnet50',
  'resnet101',
  'resnet152',
)
OPTIMIZERS = ('adamw', 'sgd_momentum')
SCHEDULES = (
  'cosine',
  'cosine_warmup',
  'exponential_warmup',
  'one_cycle',
  'polynomial',
)
DTYPES = ('auto', 'bfloat16', 'float32')
PLATFORMS = ('any', 'cpu', 'gpu', 'tpu')


@dataclasses.dataclass(frozen=True)
class Stage:
  """One rung of the ladder, validated; fields as in configs/default.py."""

  name: str
  description: str
  dataset: str
  num_classes: int
  classes: tuple[str, ...]
  image_size: int
  min_crop_area: float
  max_crop_aspect: float
  flip: bool
  eval_crop: float
  num_epochs: float
  batch_size: int
  learning_rate: float
  optimizer: str
  schedule: str
  warmup_epochs: float
  warmup_fraction: float
  div_factor: float
  final_div_factor: float
  power: float
  end_factor: float
  b1: float
  b2: float
  eps: float
  momentum: float
  nesterov: bool
  weight_decay: float
  gradient_clipping: float
  label_smoothing: float
  mixed_precision: bool


@dataclasses.dataclass(frozen=True)
class Steps:
  """The lengths of one stage in optimizer steps."""

  per_epoch: int
  warmup: int
  total: int

  @property
  def num_epochs(self) -> int:
    """Epochs begun; the last one may be shorter."""
    return -(-self.total // self.per_epoch)

  def epoch_end(self, epoch: int) -> int:
    """Returns the step at which `epoch` (from 0) is over."""
    return min((epoch + 1) * self.per_epoch, self.total)


def count_steps(stage: Stage, num_train_images: int) -> Steps:
  """Turns epochs into steps; the only place that does.

  An epoch drops the images that do not fill its last batch; the order changes
  each epoch, so they are other ones each time.
  """
  per_epoch = num_train_images // stage.batch_size
  if per_epoch == 0:
    raise errors.UserError(
      f'batch_size {stage.batch_size} is larger than the {num_train_images} '
      f'training images of {stage.dataset!r}.',
      _where(stage.name),
      f'Set batch_size to at most {num_train_images}.',
    )
  total = max(1, round(stage.num_epochs * per_epoch))
  warmup = round(stage.warmup_epochs * per_epoch)
  if warmup >= total:
    raise errors.UserError(
      f'warmup_epochs {stage.warmup_epochs:g} leaves none of the '
      f'{stage.num_epochs:g} epochs to decay in.',
      _where(stage.name),
      'Set warmup_epochs below num_epochs.',
    )
  return Steps(per_epoch, warmup, total)


def complete(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Returns a copy whose stages have every field of `stage_defaults`.

  Unknown fields stay, for `create_stages` to name.
  """
  config = config_dict.ConfigDict(config)
  defaults = config.stage_defaults.to_dict()

  def complete_stage(stage):
    if not isinstance(stage, Mapping | config_dict.ConfigDict):
      return stage
    fields = {**defaults, **dict(stage)}
    for field, default in defaults.items():
      if isinstance(default, float) and type(fields[field]) is int:
        fields[field] = float(fields[field])
    return config_dict.ConfigDict(fields)

  config.stages = [complete_stage(stage) for stage in config.stages]
  return config


def create_stages(config: config_dict.ConfigDict) -> tuple[Stage, ...]:
  """Returns the validated stages of `config`, in order.

  Raises:
    UserError: for the first field that is unknown, of the wrong type, out of
      range or at odds with another, here and in the config's own fields.
  """
  check_config(config)
  if not config.stages:
    raise errors.UserError('The config has no stages.', 'config.stages')
  stages = tuple(
    _create_stage(stage, config.stage_defaults, f'config.stages[{i}]')
    for i, stage in enumerate(complete(config).stages)
  )
  names = [stage.name for stage in stages]
  for i, name in enumerate(names):
    if name in names[:i]:
      raise errors.UserError(
        f'Two stages are named {name!r}.',
        f'config.stages[{names.index(name)}] and config.stages[{i}]',
        'A name is a directory of the run: choose another.',
      )
  return stages


def select(
  stages: Sequence[Stage], only: Sequence[str] = (), skip: Sequence[str] = ()
) -> tuple[Stage, ...]:
  """Returns the stages named in `only`, in its order, without `skip`."""
  by_name = {stage.name: stage for stage in stages}
  for flag, names in (('--only', only), ('--skip', skip)):
    for name in names:
      if name not in by_name:
        raise errors.UserError(
          f'{flag} names no stage of this config: {name!r}.',
          f'{flag}={",".join(names)}',
          errors.did_you_mean(name, by_name),
        )
  chosen = [by_name[name] for name in only] if only else list(stages)
  chosen = [stage for stage in chosen if stage.name not in skip]
  if not chosen:
    raise errors.UserError('--only and --skip leave no stage to train.')
  return tuple(dict.fromkeys(chosen))


def check_devices(stages: Iterable[Stage], num_devices: int) -> None:
  """Raises UserError for a batch that the devices cannot share evenly."""
  for stage in stages:
    if stage.batch_size % num_devices:
      below = stage.batch_size // num_devices * num_devices
      near = [b for b in (below, below + num_devices) if b]
      raise errors.UserError(
        f'batch_size {stage.batch_size} is not divisible by '
        f'{num_devices} devices.',
        _where(stage.name),
        f'Set it to {" or ".join(map(str, near))}.',
      )


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises UserError for a mistake in the fields outside the stages."""
  where = 'config'
  _check_choice(config.model, MODELS, 'model', where)
  _check_choice(config.dtype, DTYPES, 'dtype', where)
  _check_choice(config.platform, PLATFORMS, 'platform', where)
  _check_choice(config.stem_kernel, (3, 7), 'stem_kernel', where)
  for field, low in (('mean_rgb', -math.inf), ('std_rgb', 0)):
    value = config[field]
    if len(value) != 3 or not all(low < x < math.inf for x in value):
      raise errors.UserError(
        f'{field} must be three numbers above {low:g}, not {value!r}.',
        f'{where}.{field}',
      )
  if not isinstance(config.stages, list | tuple):
    raise errors.UserError('stages must be a list of dicts.', 'config.stages')
  for field, minimum in (
    ('seed', 0),
    ('num_filters', 1),
    ('num_workers', 0),
    ('checkpoint_every_steps', 0),
    ('checkpoint_every_minutes', 0.0),
    ('log_every_steps', 1),
  ):
    value = _check_type(config[field], minimum, field, where)
    if not minimum <= value < math.inf:
      raise _out_of_range(field, value, f'at least {minimum:g}', where)


def _create_stage(
  fields: Any, defaults: config_dict.ConfigDict, where: str
) -> Stage:
  if not isinstance(fields, config_dict.ConfigDict):
    raise errors.UserError(
      f'A stage must be a dict, not {type(fields).__name__}.', where
    )
  name = fields.name
  where = f'{where} ({name!r})' if isinstance(name, str) and name else where
  for field in fields:
    if field not in defaults:
      raise errors.UserError(
        f'Unknown field {field!r} of a stage.',
        where,
        errors.did_you_mean(field, defaults),
      )
  values = {
    field: _check_type(fields[field], default, field, where)
    for field, default in defaults.items()
  }
  stage = Stage(**values)
  _check_names(stage, where)
  _check_ranges(stage, where)
  return stage


def _check_names(stage: Stage, where: str) -> None:
  if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*', stage.name):
    raise errors.UserError(
      f'A stage needs a name that can be a directory, not {stage.name!r}.',
      where,
      "Use letters, digits, '_', '-' and '.'.",
    )
  source, _, rest = stage.dataset.partition(':')
  if source not in ('folder', 'tfds') or not rest:
    choices = (*DATASETS, 'folder:PATH', 'tfds:NAME')
    _check_choice(stage.dataset, choices, 'dataset', where)
    if rest:
      raise errors.UserError(
        f'{stage.dataset!r} only shows how a dataset is named.', where
      )
  _check_choice(stage.optimizer, OPTIMIZERS, 'optimizer', where)
  _check_choice(stage.schedule, SCHEDULES, 'schedule', where)


# (field, lower bound, upper bound, whether the lower bound itself is allowed)
_RANGES = (
  ('num_classes', 0, math.inf, True),
  ('image_size', 8, math.inf, True),
  ('min_crop_area', 0, 1, False),
  ('max_crop_aspect', 1, math.inf, True),
  ('eval_crop', 0, 1, False),
  ('num_epochs', 0, math.inf, False),
  ('batch_size', 1, math.inf, True),
  ('learning_rate', 0, math.inf, False),
  ('warmup_epochs', 0, math.inf, True),
  ('warmup_fraction', 0, 1, False),
  ('div_factor', 1, math.inf, True),
  ('final_div_factor', 1, math.inf, True),
  ('power', 0, math.inf, False),
  ('end_factor', 0, 1, True),
  ('b1', 0, 1, True),
  ('b2', 0, 1, True),
  ('eps', 0, math.inf, False),
  ('momentum', 0, 1, True),
  ('weight_decay', 0, math.inf, True),
  ('gradient_clipping', 0, math.inf, True),
  ('label_smoothing', 0, 1, True),
)


def _check_ranges(stage: Stage, where: str) -> None:
  for field, low, high, closed in _RANGES:
    value = getattr(stage, field)
    if value < low or value > high or (value == low and not closed):
      bounds = f'{"at least" if closed else "above"} {low:g}'
      if high < math.inf:
        bounds += f' and at most {high:g}'
      raise _out_of_range(field, value, bounds, where)
  if stage.schedule == 'exponential_warmup' and stage.end_factor == 0:
    raise errors.UserError(
      'An exponential never reaches an end_factor of 0.',
      where,
      'Set end_factor to a small part of the peak, such as 0.001.',
    )
  if stage.schedule in ('one_cycle', 'cosine') and stage.warmup_epochs:
    other = {'one_cycle': 'warmup_fraction', 'cosine': 'cosine_warmup'}
    raise errors.UserError(
      f'The schedule {stage.schedule!r} does not use warmup_epochs.',
      where,
      f'Use {other[stage.schedule]!r}, or set warmup_epochs to 0.',
    )


def _check_type(value: Any, default: Any, field: str, where: str) -> Any:
  """Returns `value` as the type of `default`; ints may stand for floats."""
  if isinstance(default, tuple):
    if isinstance(value, list | tuple) and all(
      isinstance(x, str) for x in value
    ):
      return tuple(value)
    wanted = 'a tuple of strings'
  elif isinstance(default, bool):
    if isinstance(value, bool):
      return value
    wanted = 'True or False'
  elif isinstance(default, float):
    if isinstance(value, int | float) and not isinstance(value, bool):
      if not math.isfinite(value):
        raise _out_of_range(field, value, 'a finite number', where)
      return float(value)
    wanted = 'a number'
  else:
    if isinstance(value, type(default)) and not isinstance(value, bool):
      return value
    wanted = {int: 'a whole number', str: 'a string'}[type(default)]
  raise errors.UserError(
    f'{field} must be {wanted}, not {value!r}.', f'{where}.{field}'
  )


def _check_choice(
  value: Any, choices: Sequence[Any], field: str, where: str
) -> None:
  if value not in choices:
    raise errors.UserError(
      f'Unknown {field} {value!r}.',
      f'{where}.{field}',
      errors.did_you_mean(str(value), map(str, choices)),
    )


def _out_of_range(
  field: str, value: float, bounds: str, where: str
) -> errors.UserError:
  return errors.UserError(
    f'{field} is {value:g}; it must be {bounds}.', f'{where}.{field}'
  )


def _where(name: str) -> str:
  return f'stage {name!r}'

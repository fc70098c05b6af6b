"""From a config to frozen `Stage` objects; every mistake is found here.

Nothing is imported that takes time, so that a typo costs a second.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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
OPTIMIZERS = (
  'adamw',
  'adamw_8bit',
  'lamb',
  'lars',
  'muon',
  'rmsprop',
  'sgd_momentum',
  'sgd_momentum_8bit',
)
SCHEDULES = (
  'constant',
  'cosine',
  'cosine_warmup',
  'exponential_warmup',
  'linear',
  'one_cycle',
  'plateau',
  'polynomial',
  'step',
)
WEIGHT_DECAY_KINDS = ('auto', 'coupled', 'decoupled')
PLATEAU_METRICS = ('val_loss', 'val_top1')
DTYPES = ('auto', 'bfloat16', 'float32')
PLATFORMS = ('any', 'cpu', 'gpu', 'tpu')
XLA_FLAGS = ('deterministic', 'none', 'overlap')
WORKER_KINDS = ('auto', 'process', 'thread')
REMATS = ('blocks', 'none')
OPTIMIZER_STATE_DTYPES = ('bfloat16', 'float32')
AUTO_AUGMENTS = ('none', 'rand_augment', 'trivial_augment')
INTERPOLATIONS = ('bicubic', 'bilinear')
TRANSFERS = ('dash', 'none', 'plain', 'shrink_and_perturb')
TRANSFER_WEIGHTS = ('best', 'ema', 'final')
TRANSFER_HEADS = ('auto', 'by_class', 'fresh', 'zero')
TRANSFER_STATISTICS = ('carry', 'recalibrate', 'reset')
# Files of weights that run code when they are read.
_PICKLES = ('.bin', '.ckpt', '.pickle', '.pkl', '.pt', '.pth', '.tar')
HOW_TO_CONVERT = (
  'If you trust its author: safetensors.torch.save_file(torch.load(FILE, '
  "weights_only=True), 'weights.safetensors')"
)
# What may change within a stage.
PHASE_FIELDS = (
  'batch_size',
  'brightness',
  'contrast',
  'cutmix_alpha',
  'erasing_probability',
  'hue',
  'image_size',
  'label_smoothing',
  'min_crop_area',
  'mixup_alpha',
  'rand_augment_magnitude',
  'saturation',
)


class PhaseStart(NamedTuple):
  """What changes within a stage, from the beginning of an epoch."""

  from_epoch: int
  # (field, its new value), of PHASE_FIELDS.
  changes: tuple[tuple[str, Any], ...]


class Storage(NamedTuple):
  """How training images are kept; see `Stage.storage`."""

  kind: str
  # Pixels of the shorter side at most; 0: no limit.
  size: int = 0
  quality: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
  """One rung of the ladder, validated; fields as in configs/default.py."""

  name: str
  description: str
  dataset: str
  num_classes: int
  classes: tuple[str, ...]
  init_from: str
  transfer: str
  shrink: float
  perturb: float
  dash_least: float
  reset_blocks: int
  transfer_batches: int
  transfer_weights: str
  transfer_head: str
  transfer_statistics: str
  storage: str
  image_size: int
  min_crop_area: float
  max_crop_aspect: float
  flip: bool
  alternating_flip: bool
  brightness: float
  contrast: float
  saturation: float
  hue: float
  auto_augment: str
  rand_augment_layers: int
  rand_augment_magnitude: int
  erasing_probability: float
  erasing_min_area: float
  erasing_max_area: float
  mixup_alpha: float
  cutmix_alpha: float
  eval_split: str
  eval_image_size: int
  eval_crop: float
  eval_interpolation: str
  num_epochs: float
  batch_size: int
  micro_batch_size: int
  phases: tuple[PhaseStart, ...]
  learning_rate: float
  scale_learning_rate: bool
  base_batch_size: int
  optimizer: str
  schedule: str
  warmup_epochs: float
  warmup_steps: int
  warmup_fraction: float
  div_factor: float
  final_div_factor: float
  power: float
  end_factor: float
  restart_epochs: float
  restart_factor: float
  milestones: tuple[float, ...]
  step_factor: float
  plateau_metric: str
  plateau_factor: float
  plateau_patience: int
  plateau_min_delta: float
  plateau_cooldown: int
  b1: float
  b2: float
  eps: float
  momentum: float
  nesterov: bool
  optimizer_state_dtype: str
  rms_decay: float
  trust_coefficient: float
  quantization_block: int
  quantization_min_size: int
  weight_decay: float
  weight_decay_kind: str
  gradient_clipping: float
  adaptive_clipping: float
  ema_decay: float
  freeze_epochs: float
  head_rate_factor: float
  backbone_rate_factor: float
  layer_decay: float
  target_top1: float
  early_stopping_patience: int
  early_stopping_min_delta: float
  label_smoothing: float
  mixed_precision: bool

  @property
  def parts(self) -> tuple[tuple[int, 'Stage'], ...]:
    """The epoch from which, counted from 0, and the stage as it is then."""
    parts, changed = [(0, self)], self
    for phase in self.phases:
      changed = dataclasses.replace(changed, **dict(phase.changes))
      parts.append((phase.from_epoch, changed))
    return tuple(parts)

  def in_epoch(self, epoch: int) -> 'Stage':
    """Returns the stage as it is in `epoch`, counted from 0."""
    return [part for first, part in self.parts if first <= epoch][-1]

  @property
  def eval_size(self) -> int:
    """Side of evaluation images, in pixels."""
    largest = max(part.image_size for _, part in self.parts)
    return self.eval_image_size or largest

  @property
  def holdout(self) -> float:
    """Part of the training images that is for selection; 0: none."""
    kind, _, part = self.eval_split.partition(':')
    return float(part.removesuffix('%')) / 100 if kind == 'holdout' else 0.0

  @property
  def stored(self) -> Storage:
    """`storage`, parsed."""
    return parse_storage(self.storage)

  @property
  def peak_learning_rate(self) -> float:
    """`learning_rate`, scaled with the global batch if that is asked for."""
    if not self.scale_learning_rate:
      return self.learning_rate
    return self.learning_rate * self.batch_size / self.base_batch_size


def parse_storage(text: str) -> Storage:
  """Returns what 'original', 'raw', 'raw:N', 'jpeg:N' or 'jpeg:N:Q' says.

  Raises:
    ValueError: if it is none of them.
  """
  if text == 'original':
    return Storage('original')
  match = re.fullmatch(r'raw(?::(\d+))?|jpeg:(\d+)(?::(\d+))?', text)
  if not match:
    raise ValueError(text)
  raw, jpeg, quality = match.groups()
  if jpeg is None:
    storage = Storage('raw', int(raw or 0))
  else:
    storage = Storage('jpeg', int(jpeg), int(quality or 90))
  if (storage.size < 8 and (raw or jpeg)) or storage.quality > 100:
    raise ValueError(text)
  return storage


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
    sizes = [('batch_size', part.batch_size) for _, part in stage.parts]
    if stage.micro_batch_size:
      sizes.append(('micro_batch_size', stage.micro_batch_size))
    for field, size in sizes:
      if size % num_devices:
        below = size // num_devices * num_devices
        near = [b for b in (below, below + num_devices) if b]
        raise errors.UserError(
          f'{field} {size} is not divisible by {num_devices} devices.',
          f'stage {stage.name!r}',
          f'Set it to {" or ".join(map(str, near))}.',
        )


def count_norm_groups(batch_norm: str, num_devices: int) -> int:
  """Returns into how many groups BatchNorm cuts a batch on `num_devices`."""
  kind, _, size = batch_norm.partition(':')
  return 1 if kind == 'global' else max(1, num_devices // int(size or 1))


def check_batch_norm(config: config_dict.ConfigDict, num_devices: int) -> None:
  """Raises UserError if groups of devices do not fill `num_devices`."""
  kind, _, size = config.batch_norm.partition(':')
  if kind == 'groups' and num_devices % int(size):
    fitting = [k for k in range(1, num_devices + 1) if num_devices % k == 0]
    nearest = min(fitting, key=lambda k: abs(k - int(size)))
    raise errors.UserError(
      f'Groups of {size} devices do not divide {num_devices} devices.',
      'config.batch_norm',
      f"Set it to 'groups:{nearest}', 'per_device' or 'global'.",
    )


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises UserError for a mistake in the fields outside the stages."""
  where = 'config'
  _check_choice(config.model, MODELS, 'model', where)
  _check_choice(config.dtype, DTYPES, 'dtype', where)
  _check_choice(config.platform, PLATFORMS, 'platform', where)
  _check_choice(config.worker_kind, WORKER_KINDS, 'worker_kind', where)
  _check_choice(config.xla_flags, XLA_FLAGS, 'xla_flags', where)
  _check_choice(config.remat, REMATS, 'remat', where)
  batch_norm = config.batch_norm
  if not re.fullmatch(r'groups:[1-9]\d*', str(batch_norm)):
    choices = ('global', 'per_device', 'groups:2')
    _check_choice(batch_norm, choices, 'batch_norm', where)
  for field in ('blur_pool', 'donate_state', 'exclude_leaks'):
    _check_type(config[field], False, field, where)
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
    ('max_bad_images', 0),
    ('max_skipped_steps', 0),
    ('watchdog_minutes', 0.0),
    ('checkpoint_every_steps', 0),
    ('checkpoint_every_minutes', 0.0),
    ('log_every_steps', 1),
    ('profile_steps', 0),
    ('check_steps', 0),
    ('plan_utilization', 0.01),
    ('chip_hour_price', 0.0),
    ('images_per_core', 0.0),
    ('lr_find_steps', 10),
    ('lr_find_min', 1e-30),
    ('lr_find_max', 1e-30),
  ):
    value = _check_type(config[field], minimum, field, where)
    if not minimum <= value < math.inf:
      raise _out_of_range(field, value, f'at least {minimum:g}', where)
  if config.plan_utilization > 1:
    value = config.plan_utilization
    raise _out_of_range('plan_utilization', value, 'at most 1', where)
  if config.lr_find_min >= config.lr_find_max:
    raise errors.UserError(
      f'lr_find_min {config.lr_find_min:g} is not below lr_find_max '
      f'{config.lr_find_max:g}.',
      'config.lr_find_min',
    )


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
    if field not in ('milestones', 'phases')
  }
  stage = Stage(
    **values,
    milestones=_check_milestones(fields.milestones, where),
    phases=_check_phases(fields.phases, defaults, where),
  )
  _check_names(stage, where)
  for _, part in stage.parts:
    _check_ranges(part, where)
  _check_combinations(stage, where)
  return stage


_CHOICES = {
  'optimizer': OPTIMIZERS,
  'optimizer_state_dtype': OPTIMIZER_STATE_DTYPES,
  'schedule': SCHEDULES,
  'auto_augment': AUTO_AUGMENTS,
  'eval_interpolation': INTERPOLATIONS,
  'transfer': TRANSFERS,
  'transfer_weights': TRANSFER_WEIGHTS,
  'transfer_head': TRANSFER_HEADS,
  'transfer_statistics': TRANSFER_STATISTICS,
}


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
  _check_init_from(stage, where)
  plain = stage.optimizer.removesuffix('_8bit')
  if plain in OPTIMIZERS and stage.optimizer not in OPTIMIZERS:
    raise errors.UserError(
      f'{plain} has no 8-bit state here.',
      f'{where}.optimizer',
      "Use 'adamw_8bit' or 'sgd_momentum_8bit'.",
    )
  for field, allowed in _CHOICES.items():
    _check_choice(getattr(stage, field), allowed, field, where)
  try:
    parse_storage(stage.storage)
  except ValueError:
    raise errors.UserError(
      f'Unknown storage {stage.storage!r}.',
      f'{where}.storage',
      "Use 'original', 'raw', 'raw:256' or 'jpeg:512'.",
    ) from None
  percent = re.fullmatch(r'holdout:(\d+(\.\d+)?)%', stage.eval_split)
  if stage.eval_split != 'validation' and not (
    percent and 0 < float(percent[1]) < 100
  ):
    raise errors.UserError(
      f'Unknown eval_split {stage.eval_split!r}.',
      f'{where}.eval_split',
      "Use 'validation', or a part of the training images: 'holdout:2%'.",
    )


def _check_init_from(stage: Stage, where: str) -> None:
  path = stage.init_from
  if path and stage.transfer == 'none':
    raise errors.UserError(
      "transfer is 'none': nothing would start from init_from.",
      f'{where}.init_from',
      "Set transfer to 'plain', or leave init_from out.",
    )
  if not path or path.endswith('.safetensors'):
    return
  if path.endswith(_PICKLES):
    raise errors.UserError(
      f'init_from is a pickle, which can run any code when it is read: {path}',
      f'{where}.init_from',
      HOW_TO_CONVERT,
    )
  raise errors.UserError(
    f'init_from must be a .safetensors file, not {path!r}.',
    f'{where}.init_from',
  )


# (field, lower bound, upper bound, whether the lower bound itself is allowed)
_RANGES = (
  ('num_classes', 0, math.inf, True),
  ('shrink', 0, 1, True),
  ('perturb', 0, math.inf, True),
  ('dash_least', 0, 1, True),
  ('reset_blocks', 0, math.inf, True),
  ('transfer_batches', 1, math.inf, True),
  ('image_size', 8, math.inf, True),
  ('min_crop_area', 0, 1, False),
  ('max_crop_aspect', 1, math.inf, True),
  ('brightness', 0, math.inf, True),
  ('contrast', 0, math.inf, True),
  ('saturation', 0, math.inf, True),
  ('hue', 0, 0.5, True),
  ('rand_augment_layers', 1, math.inf, True),
  ('rand_augment_magnitude', 0, 30, True),
  ('erasing_probability', 0, 1, True),
  ('erasing_min_area', 0, 1, False),
  ('erasing_max_area', 0, 1, False),
  ('mixup_alpha', 0, math.inf, True),
  ('cutmix_alpha', 0, math.inf, True),
  ('eval_image_size', 0, math.inf, True),
  ('eval_crop', 0, 1, False),
  ('num_epochs', 0, math.inf, False),
  ('batch_size', 1, math.inf, True),
  ('micro_batch_size', 0, math.inf, True),
  ('learning_rate', 0, math.inf, False),
  ('base_batch_size', 1, math.inf, True),
  ('warmup_epochs', 0, math.inf, True),
  ('warmup_steps', 0, math.inf, True),
  ('warmup_fraction', 0, 1, False),
  ('div_factor', 1, math.inf, True),
  ('final_div_factor', 1, math.inf, True),
  ('power', 0, math.inf, False),
  ('end_factor', 0, 1, True),
  ('restart_epochs', 0, math.inf, True),
  ('restart_factor', 1, math.inf, True),
  ('step_factor', 0, 1, False),
  ('plateau_factor', 0, 1, False),
  ('plateau_patience', 0, math.inf, True),
  ('plateau_min_delta', 0, math.inf, True),
  ('plateau_cooldown', 0, math.inf, True),
  ('b1', 0, 1, True),
  ('b2', 0, 1, True),
  ('eps', 0, math.inf, False),
  ('momentum', 0, 1, True),
  ('rms_decay', 0, 1, True),
  ('trust_coefficient', 0, math.inf, False),
  ('quantization_block', 8, math.inf, True),
  ('quantization_min_size', 0, math.inf, True),
  ('weight_decay', 0, math.inf, True),
  ('gradient_clipping', 0, math.inf, True),
  ('adaptive_clipping', 0, math.inf, True),
  ('ema_decay', 0, 1, True),
  ('freeze_epochs', 0, math.inf, True),
  ('head_rate_factor', 0, math.inf, True),
  ('backbone_rate_factor', 0, math.inf, True),
  ('layer_decay', 0, 1, False),
  ('target_top1', 0, 1, True),
  ('early_stopping_patience', 0, math.inf, True),
  ('early_stopping_min_delta', 0, math.inf, True),
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


def _check_milestones(milestones: Any, where: str) -> tuple[float, ...]:
  if not isinstance(milestones, list | tuple):
    raise errors.UserError(
      f'milestones must be epochs, not {milestones!r}.', f'{where}.milestones'
    )
  return tuple(_check_type(x, 0.0, 'milestones', where) for x in milestones)


def _check_phases(
  phases: Any, defaults: config_dict.ConfigDict, where: str
) -> tuple[PhaseStart, ...]:
  where = f'{where}.phases'
  if not isinstance(phases, list | tuple):
    raise errors.UserError(f'phases must be dicts, not {phases!r}.', where)
  found: list[PhaseStart] = []
  for phase in phases:
    if (
      not isinstance(phase, Mapping | config_dict.ConfigDict)
      or 'from_epoch' not in phase
      or len(phase) < 2
    ):
      raise errors.UserError(
        f'A phase is not {phase!r}.',
        where,
        "Write {'from_epoch': 10, 'batch_size': 256}.",
      )
    from_epoch = _check_type(phase['from_epoch'], 1, 'from_epoch', where)
    if from_epoch <= (found[-1].from_epoch if found else 0):
      raise errors.UserError(
        f'Phases must follow one another from epoch 1 on, not {phase!r}.',
        where,
      )
    changes = []
    for field in phase:
      if field == 'from_epoch':
        continue
      _check_choice(field, PHASE_FIELDS, 'field of a phase', where)
      value = _check_type(phase[field], defaults[field], field, where)
      changes.append((field, value))
    found.append(PhaseStart(from_epoch, tuple(sorted(changes))))
  return tuple(found)


def _check_combinations(stage: Stage, where: str) -> None:
  """Refuses what would be ignored or could not work, by name."""
  mistakes = (
    *_schedule_mistakes(stage),
    *_optimizer_mistakes(stage),
    *_image_mistakes(stage),
  )
  for wrong, field, what, suggestion in mistakes:
    if wrong:
      raise errors.UserError(what, f'{where}.{field}', suggestion)


Mistake = tuple[bool, str, str, str]


def _schedule_mistakes(stage: Stage) -> Iterable[Mistake]:
  """Yields (whether it is there, field, what is wrong, a suggestion)."""
  name = stage.schedule
  warmup = bool(stage.warmup_epochs or stage.warmup_steps)
  yield (
    bool(stage.warmup_epochs and stage.warmup_steps),
    'warmup_steps',
    'warmup_epochs and warmup_steps are both set.',
    'Set one of them to 0.',
  )
  yield (
    warmup and name in ('one_cycle', 'cosine'),
    'schedule',
    f'The schedule {name!r} does not use a warmup.',
    "Use 'cosine_warmup', or warmup_fraction with 'one_cycle'.",
  )
  yield (
    name == 'exponential_warmup' and stage.end_factor == 0,
    'end_factor',
    'An exponential never reaches an end_factor of 0.',
    'Set end_factor to a small part of the peak, such as 0.001.',
  )
  yield (
    bool(stage.restart_epochs) and name not in ('cosine', 'cosine_warmup'),
    'restart_epochs',
    f'The schedule {name!r} has no warm restarts.',
    "Use 'cosine_warmup', or set restart_epochs to 0.",
  )
  yield (
    bool(stage.milestones) != (name == 'step'),
    'milestones',
    "milestones and the schedule 'step' need each other.",
    "Write 'schedule': 'step', 'milestones': (30, 60).",
  )
  yield (
    any(a >= b for a, b in itertools.pairwise((0, *stage.milestones))),
    'milestones',
    f'milestones must rise from above 0: {stage.milestones}.',
    '',
  )
  yield (
    stage.plateau_metric not in PLATEAU_METRICS,
    'plateau_metric',
    f'Unknown plateau_metric {stage.plateau_metric!r}.',
    errors.did_you_mean(stage.plateau_metric, PLATEAU_METRICS),
  )
  evaluations = math.ceil(stage.num_epochs)
  yield (
    name == 'plateau' and evaluations <= stage.plateau_patience + 1,
    'plateau_patience',
    f"The schedule 'plateau' needs more than plateau_patience + 1 = "
    f'{stage.plateau_patience + 1} evaluations; this stage has {evaluations}.',
    'Lower plateau_patience, or train for more epochs.',
  )
  yield (
    any(p.from_epoch >= stage.num_epochs for p in stage.phases),
    'phases',
    f'A phase begins after the last of {stage.num_epochs:g} epochs.',
    '',
  )


def _optimizer_mistakes(stage: Stage) -> Iterable[Mistake]:
  """Yields as `_schedule_mistakes`."""
  name = stage.optimizer
  yield (
    stage.nesterov
    and name not in ('lars', 'muon', 'sgd_momentum', 'sgd_momentum_8bit'),
    'nesterov',
    f'The optimizer {name!r} has no Nesterov momentum.',
    "Use 'sgd_momentum', or set nesterov to False.",
  )
  bfloat16 = stage.optimizer_state_dtype == 'bfloat16'
  yield (
    bfloat16 and name.endswith('_8bit'),
    'optimizer_state_dtype',
    f'{name} already keeps its state in 8 bits.',
    f'Use {name.removesuffix("_8bit")!r}, or leave optimizer_state_dtype out.',
  )
  yield (
    bfloat16
    and not stage.momentum
    and name in ('lars', 'rmsprop', 'sgd_momentum'),
    'optimizer_state_dtype',
    f'{name} without momentum has nothing to keep in bfloat16.',
    'Leave optimizer_state_dtype out.',
  )
  yield (
    stage.scale_learning_rate
    and name not in ('lars', 'sgd_momentum', 'sgd_momentum_8bit'),
    'scale_learning_rate',
    f'The linear scaling rule is about SGD, not {name!r}.',
    'Set learning_rate for this batch, and scale_learning_rate to False.',
  )
  yield (
    bool(stage.gradient_clipping and stage.adaptive_clipping),
    'adaptive_clipping',
    'gradient_clipping and adaptive_clipping are both set.',
    'Set one of them to 0.',
  )
  yield (
    stage.weight_decay_kind not in WEIGHT_DECAY_KINDS,
    'weight_decay_kind',
    f'Unknown weight_decay_kind {stage.weight_decay_kind!r}.',
    errors.did_you_mean(stage.weight_decay_kind, WEIGHT_DECAY_KINDS),
  )
  yield (
    stage.ema_decay == 1,
    'ema_decay',
    'An average with ema_decay 1 never moves.',
    'Set ema_decay to 0.999 or so.',
  )
  micro = stage.micro_batch_size
  yield (
    bool(micro) and any(part.batch_size % micro for _, part in stage.parts),
    'micro_batch_size',
    f'micro_batch_size {micro} does not divide the batch size.',
    '',
  )


def _image_mistakes(stage: Stage) -> Iterable[Mistake]:
  """Yields as `_schedule_mistakes`."""
  yield (
    stage.alternating_flip and not stage.flip,
    'alternating_flip',
    'alternating_flip is a kind of flip, and flip is False.',
    'Set both, or neither.',
  )
  yield (
    stage.erasing_min_area > stage.erasing_max_area,
    'erasing_min_area',
    f'erasing_min_area {stage.erasing_min_area:g} is above erasing_max_area '
    f'{stage.erasing_max_area:g}.',
    '',
  )
  yield (
    stage.auto_augment != 'rand_augment'
    and any(
      field == 'rand_augment_magnitude'
      for phase in stage.phases
      for field, _ in phase.changes
    ),
    'phases',
    "rand_augment_magnitude changes, but auto_augment is not 'rand_augment'.",
    '',
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

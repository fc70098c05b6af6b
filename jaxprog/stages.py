"""From a config to frozen `Stage` objects; every mistake is found here.

Nothing is imported that takes time, so that a typo costs a second.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ml_collections import config_dict

from jaxprog import errors, fields, named

# What `dataset` may be; it has no default.
_DATASET = fields.Field(
  'dataset',
  str,
  '',
  choices=(
    *named.DATASETS,
    *('folder:PATH', 'hf:NAME', 'parquet:PATH', 'tfds:NAME', 'wds:TARS'),
    'parquet:PATH?image=COLUMN&label=COLUMN',
  ),
  pattern=(
    '(folder|tfds):(?s:.+)|'
    r'(hf|parquet|wds):[^?]+(\?(image|label)=[^&=]+(&(image|label)=[^&=]+)?)?'
  ),
)
# Files of weights that run code when they are read.
_PICKLES = ('.bin', '.ckpt', '.pickle', '.pkl', '.pt', '.pth', '.tar')
HOW_TO_CONVERT = (
  'If you trust its author: safetensors.torch.save_file(torch.load(FILE, '
  "weights_only=True), 'weights.safetensors')"
)


# What `init_from` calls a file of the Hugging Face hub.
_ON_HUB = re.compile(
  r'timm:(?P<name>[\w.-]+)|hf:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<path>.+))?'
)


class Storage(NamedTuple):
  """How training images are kept; see `Stage.storage`."""

  kind: str
  # Pixels of the shorter side at most; 0: no limit.
  size: int = 0
  quality: int = 0


class HubFile(NamedTuple):
  """A file of the Hugging Face hub, and the repository that it is in."""

  repo: str
  path: str


@dataclasses.dataclass(frozen=True)
class Stage(fields.StageFields):
  """One rung of the ladder, validated."""

  @functools.cached_property
  def parts(self) -> tuple[tuple[int, 'Stage'], ...]:
    """The epoch from which, counted from 0, and the stage as it is then."""
    parts, changed = [(0, self)], self
    for phase in self.phases:
      changed = dataclasses.replace(changed, **dict(phase.changes))
      parts.append((phase.from_epoch, changed))
    return tuple(parts)

  @property
  def largest_size(self) -> int:
    """Side of the largest images that it trains on, in pixels."""
    return max(part.image_size for _, part in self.parts)

  @property
  def eval_size(self) -> int:
    """Side of evaluation images, in pixels."""
    return self.eval_image_size or self.largest_size

  @property
  def holdout_part(self) -> float:
    """Part of the training images that is for selection; 0: none."""
    kind, _, part = self.eval_split.partition(':')
    return float(part.removesuffix('%')) / 100 if kind == 'holdout' else 0.0

  @property
  def stored(self) -> Storage:
    """`storage`, parsed."""
    kind, *numbers = self.storage.split(':')
    if kind == 'jpeg' and len(numbers) == 1:
      numbers.append('90')
    return Storage(kind, *map(int, numbers))

  @property
  def teacher_stage(self) -> tuple[str, str]:
    """The stage that teaches, '' if none does, and which of its weights."""
    kind, *names = self.distill_from.split(':')
    if kind != 'stage':
      return '', ''
    name, *weights = names
    return name, ''.join(weights) or 'best'

  @property
  def hub_file(self) -> HubFile | None:
    """What `init_from` names if it names no file of this machine."""
    if not (found := _ON_HUB.fullmatch(self.init_from)):
      return None
    repo = found['repo'] or f'timm/{found["name"]}'
    return HubFile(repo, found['path'] or 'model.safetensors')

  @property
  def is_coupled(self) -> bool:
    """Whether weight decay is part of the gradient."""
    if self.weight_decay_kind == 'auto':
      return fields.OPTIMIZERS[self.optimizer].coupled
    return self.weight_decay_kind == 'coupled'

  @property
  def is_schedule_free(self) -> bool:
    """Whether the optimizer averages its steps; see `averaging`."""
    return fields.OPTIMIZERS[self.optimizer].schedule_free

  @property
  def averaging_field(self) -> str:
    """Which field says how near schedule-free gradients are to the average."""
    return 'momentum' if self.optimizer == 'schedule_free_sgd' else 'b1'

  @property
  def averaging(self) -> float:
    """How near they are to it, from 0 to 1."""
    return getattr(self, self.averaging_field)

  @property
  def peak_learning_rate(self) -> float:
    """`learning_rate`, scaled with the global batch if that is asked for."""
    if not self.scale_learning_rate:
      return self.learning_rate
    return self.learning_rate * self.batch_size / self.base_batch_size


def complete(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Returns a copy whose stages have every field, ints widened to floats.

  Unknown fields and wrong types stay, for `create_stages` to name.
  """
  config = config_dict.ConfigDict(config)
  defaults = {**fields.defaults(fields.STAGE), **config.stage_defaults}

  def widen(values, declared):
    known = {
      k: declared[k].widen(v) if k in declared else v for k, v in values.items()
    }
    return config_dict.ConfigDict(known)

  stages = [widen({**defaults, **x}, fields.STAGE) for x in config.stages]
  config = widen(config, fields.CONFIG)
  config.stages = stages
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
    _create_stage(stage, f'config.stages[{i}]')
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


def check_shape(config: config_dict.ConfigDict) -> None:
  """Raises UserError for what is not even a config with stages."""
  for group in ('stages', 'stage_defaults'):
    if group not in config:
      raise errors.UserError(
        f'The config has no {group}.',
        'config',
        "Begin with jaxprog.start_from('default').",
      )
  if not isinstance(config.stages, list | tuple):
    raise errors.UserError('stages must be a list of dicts.', 'config.stages')
  for i, stage in enumerate(config.stages):
    if not isinstance(stage, Mapping | config_dict.ConfigDict):
      raise errors.UserError(
        f'A stage must be a dict, not {type(stage).__name__}.',
        f'config.stages[{i}]',
      )


def check_config(config: config_dict.ConfigDict) -> None:
  """Raises UserError for a mistake in the fields outside the stages."""
  check_shape(config)
  own = {k: config[k] for k in config if k not in ('stage_defaults', 'stages')}
  fields.check(own, fields.CONFIG, 'config')
  fields.check(config.stage_defaults, fields.STAGE, 'config.stage_defaults')
  if config.lr_find_min >= config.lr_find_max:
    raise errors.UserError(
      f'lr_find_min {config.lr_find_min:g} is not below lr_find_max '
      f'{config.lr_find_max:g}.',
      'config.lr_find_min',
    )


def _create_stage(stage: config_dict.ConfigDict, where: str) -> Stage:
  name = stage.name
  where = f'{where} ({name!r})' if isinstance(name, str) and name else where
  created = Stage(**fields.check(stage, fields.STAGE, where))
  if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*', name):
    raise errors.UserError(
      f'A stage needs a name that can be a directory, not {name!r}.',
      where,
      "Use letters, digits, '_', '-' and '.'.",
    )
  _DATASET.check(created.dataset, where)
  # What would be ignored or could not work.
  for field, what, suggestion in (
    *_weight_mistakes(created),
    *_clashes(created),
    *_schedule_mistakes(created),
    *_optimizer_mistakes(created),
    *_schedule_free_mistakes(created),
    *_image_mistakes(created),
    *_loss_mistakes(created),
  ):
    raise errors.UserError(what, f'{where}.{field}', suggestion)
  return created


# The field, what is wrong, a suggestion.
_Mistake = tuple[str, str, str]


def _clashes(stage: Stage) -> Iterable[_Mistake]:
  for one, other in (
    ('warmup_epochs', 'warmup_steps'),
    ('gradient_clipping', 'adaptive_clipping'),
  ):
    if getattr(stage, one) and getattr(stage, other):
      yield other, f'{one} and {other} are both set.', 'Set one of them to 0.'
  if stage.class_weighting + stage.balanced_sampling > 1:
    yield (
      'class_weighting',
      f'class_weighting {stage.class_weighting:g} and balanced_sampling '
      f'{stage.balanced_sampling:g} together favour rare classes.',
      'Lower one of them: at a sum of 1 all classes count alike.',
    )


def _weight_mistakes(stage: Stage) -> Iterable[_Mistake]:
  path = stage.init_from
  if path and stage.transfer == 'none':
    yield (
      'init_from',
      "transfer is 'none': nothing would start from init_from.",
      "Set transfer to 'plain', or leave init_from out.",
    )
  file = stage.hub_file.path if stage.hub_file else path
  if path.startswith(('timm:', 'hf:')) and not stage.hub_file:
    yield (
      'init_from',
      f'init_from names no file of the hub: {path!r}.',
      "Write 'timm:resnet50.a1_in1k', 'hf:OWNER/NAME' or "
      "'hf:OWNER/NAME/FILE.safetensors'.",
    )
  elif file.endswith(_PICKLES):
    runs = 'is a pickle, which can run any code when it is read'
    yield 'init_from', f'init_from {runs}: {path}', HOW_TO_CONVERT
  elif file and not file.endswith('.safetensors'):
    what = f'init_from must be a .safetensors file, not {path!r}.'
    yield 'init_from', what, ''
  yield from _teacher_mistakes(stage)
  weights = stage.shrink or stage.perturb
  if stage.transfer == 'shrink_and_perturb' and not weights:
    yield (
      'shrink',
      'shrink and perturb are both 0: all weights would be 0.',
      "Set perturb above 0, or transfer to 'none'.",
    )


def _teacher_mistakes(stage: Stage) -> Iterable[_Mistake]:
  source = stage.distill_from
  if not source:
    return
  if source.endswith(_PICKLES):
    runs = 'is a pickle, which can run any code when it is read'
    yield 'distill_from', f'distill_from {runs}: {source}', HOW_TO_CONVERT
  of_stage = re.fullmatch(r'stage:[^:]+(:(best|ema))?', source)
  if not of_stage and not source.endswith('.safetensors'):
    yield (
      'distill_from',
      f'distill_from is no teacher: {source!r}.',
      "Write 'stage:NAME', 'stage:NAME:ema' or a .safetensors file.",
    )
  if stage.teacher_stage[0] == stage.name:
    yield 'distill_from', 'A stage does not teach itself.', ''
  if not stage.distill_weight and not stage.distill_features:
    yield (
      'distill_weight',
      'distill_weight and distill_features are both 0: nothing is taught.',
      'Set one of them above 0, or leave distill_from out.',
    )
  if stage.distill_epochs > stage.num_epochs:
    yield (
      'distill_epochs',
      f'distill_epochs {stage.distill_epochs:g} is past the last of '
      f'{stage.num_epochs:g} epochs.',
      'Set it to 0 to be taught to the end.',
    )


def _schedule_mistakes(stage: Stage) -> Iterable[_Mistake]:
  name = stage.schedule
  warmup = stage.warmup_epochs or stage.warmup_steps
  if warmup and name in ('one_cycle', 'cosine'):
    yield (
      'schedule',
      f'The schedule {name!r} does not use a warmup.',
      "Use 'cosine_warmup', or warmup_fraction with 'one_cycle'.",
    )
  if name == 'exponential_warmup' and stage.end_factor == 0:
    yield (
      'end_factor',
      'An exponential never reaches an end_factor of 0.',
      'Set end_factor to a small part of the peak, such as 0.001.',
    )
  if stage.restart_epochs and name not in ('cosine', 'cosine_warmup'):
    yield (
      'restart_epochs',
      f'The schedule {name!r} has no warm restarts.',
      "Use 'cosine_warmup', or set restart_epochs to 0.",
    )
  if bool(stage.milestones) != (name == 'step'):
    yield (
      'milestones',
      "milestones and the schedule 'step' need each other.",
      "Write 'schedule': 'step', 'milestones': (30, 60).",
    )
  if any(a >= b for a, b in itertools.pairwise((0, *stage.milestones))):
    what = f'milestones must rise from above 0: {stage.milestones}.'
    yield 'milestones', what, ''
  evaluations = math.ceil(stage.num_epochs)
  if name == 'plateau' and evaluations <= stage.plateau_patience + 1:
    yield (
      'plateau_patience',
      f"The schedule 'plateau' needs more than plateau_patience + 1 = "
      f'{stage.plateau_patience + 1} evaluations; this stage has '
      f'{evaluations}.',
      'Lower plateau_patience, or train for more epochs.',
    )
  if any(p.from_epoch >= stage.num_epochs for p in stage.phases):
    what = f'A phase begins after the last of {stage.num_epochs:g} epochs.'
    yield 'phases', what, ''


def _optimizer_mistakes(stage: Stage) -> Iterable[_Mistake]:
  name, known = stage.optimizer, fields.OPTIMIZERS[stage.optimizer]
  if stage.nesterov and not known.nesterov:
    yield (
      'nesterov',
      f'The optimizer {name!r} has no Nesterov momentum.',
      "Use 'sgd_momentum', or set nesterov to False.",
    )
  if stage.nesterov and not stage.momentum:
    yield (
      'nesterov',
      'Nesterov momentum needs a momentum, which is 0.',
      'Set momentum to 0.9 or so, or nesterov to False.',
    )
  bfloat16 = stage.optimizer_state_dtype == 'bfloat16'
  if bfloat16 and known.eight_bit:
    plain = name.removesuffix('_8bit')
    yield (
      'optimizer_state_dtype',
      f'{name} already keeps its state in 8 bits.',
      f'Use {plain!r}, or leave optimizer_state_dtype out.',
    )
  if bfloat16 and known.trace and not stage.momentum:
    yield (
      'optimizer_state_dtype',
      f'{name} without momentum has nothing to keep in bfloat16.',
      'Leave optimizer_state_dtype out.',
    )
  if stage.scale_learning_rate and not known.scales:
    yield (
      'scale_learning_rate',
      f'The linear scaling rule is about SGD, not {name!r}.',
      'Set learning_rate for this batch, and scale_learning_rate to False.',
    )
  if not (stage.head_rate_factor or stage.backbone_rate_factor):
    yield (
      'backbone_rate_factor',
      'head_rate_factor and backbone_rate_factor are both 0: nothing moves.',
      'Set one of them above 0.',
    )
  if stage.ema_warmup_power and not stage.ema_decay:
    yield (
      'ema_warmup_power',
      'There is no average to warm up: ema_decay is 0.',
      'Set ema_decay to 0.9999 or so, or ema_warmup_power to 0.',
    )
  micro = stage.micro_batch_size
  if micro and any(part.batch_size % micro for _, part in stage.parts):
    what = f'micro_batch_size {micro} does not divide the batch size.'
    yield 'micro_batch_size', what, ''


def _schedule_free_mistakes(stage: Stage) -> Iterable[_Mistake]:
  if not stage.is_schedule_free:
    return
  name = stage.optimizer
  if stage.schedule != 'constant':
    yield (
      'schedule',
      f'{name} is there to do without a schedule, not with {stage.schedule!r}.',
      "Set schedule to 'constant'; a warmup is part of the method.",
    )
  if stage.ema_decay:
    yield (
      'ema_decay',
      f'{name} evaluates and saves an average of its weights already.',
      'Set ema_decay to 0.',
    )
  if stage.freeze_epochs:
    yield (
      'freeze_epochs',
      f'{name} cannot begin anew where the backbone thaws: it is an average '
      'from the first step on.',
      'Train the head in a stage of its own, or set freeze_epochs to 0.',
    )
  if stage.optimizer_state_dtype != 'float32':
    yield (
      'optimizer_state_dtype',
      f'{name} keeps weights, which bfloat16 rounds away.',
      'Leave optimizer_state_dtype out.',
    )
  if not stage.averaging:
    field = stage.averaging_field
    yield field, f'{name} divides by {field}, which is 0.', 'Set it to 0.9.'


def _image_mistakes(stage: Stage) -> Iterable[_Mistake]:
  if stage.alternating_flip and not stage.flip:
    yield (
      'alternating_flip',
      'alternating_flip is a kind of flip, and flip is False.',
      'Set both, or neither.',
    )
  least, most = stage.erasing_min_area, stage.erasing_max_area
  if least > most:
    what = f'erasing_min_area {least:g} is above erasing_max_area {most:g}.'
    yield 'erasing_min_area', what, ''
  repeats = stage.augment_repeats
  if repeats > 1 and any(p.batch_size < 3 * repeats for _, p in stage.parts):
    yield (
      'augment_repeats',
      f'augment_repeats {repeats} leaves less than three images in a batch.',
      'Lower it to at most a third of the batch_size.',
    )
  for _, part in stage.parts:
    if part.low_frequency_size > part.image_size:
      yield (
        'low_frequency_size',
        f'low_frequency_size {part.low_frequency_size} is above image_size '
        f'{part.image_size}.',
        'Lower it, or set it to 0 for the image itself.',
      )
  changed = {field for phase in stage.phases for field, _ in phase.changes}
  magnitude = 'rand_augment_magnitude'
  if magnitude in changed and stage.auto_augment != 'rand_augment':
    what = f"{magnitude} changes, but auto_augment is not 'rand_augment'."
    yield 'phases', what, ''


def _loss_mistakes(stage: Stage) -> Iterable[_Mistake]:
  threshold = stage.bce_target_threshold
  if threshold and stage.loss != 'bce':
    yield (
      'bce_target_threshold',
      f'The loss {stage.loss!r} has no threshold of targets.',
      "Set loss to 'bce', or bce_target_threshold to 0.",
    )
  if threshold and any(part.label_smoothing for _, part in stage.parts):
    yield (
      'label_smoothing',
      'Behind a bce_target_threshold, targets are 0 or 1: none is smooth.',
      'Set label_smoothing or bce_target_threshold to 0.',
    )

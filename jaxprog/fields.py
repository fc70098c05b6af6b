"""Every field of a config: its type, default, range and unit, and its purpose.

All that asks about fields asks here: the defaults of configs/default.py, the
checks, overrides on the command line, docs/fields.md (`python docs/fields.py >
docs/fields.md`). Nothing is imported that takes time, so that a typo costs a
second.
"""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from ml_collections import config_dict

from jaxprog import errors

T = TypeVar('T')
# Pixels, at least 8.
_SIDE = r'0*([89]|[1-9]\d+)'
Declared = Mapping[str, 'Field']


@dataclasses.dataclass(frozen=True)
class Field:
  """What is known of a field.

  Attributes:
    name: as users write it.
    kind: its type.
    default: what it is where nobody says otherwise.
    unit: what it counts.
    within: where its numbers lie, such as '(0, 1]' or '0 or [8, inf)'.
    choices: all that it, or a part of a tuple, can be, or with a `pattern` what
      it may look like; (): anything of its type.
    pattern: a regular expression of what it can be besides; by default nothing.
    free: whether it may change between two starts of one run: on the same
      hardware the same bits come out.
    local: whether the hosts of one run may differ in it.
    phase: whether a phase may change it within a stage.
    traced: whether the compiled step depends on it, which no shape shows.
    number: whether compiled steps take it as an argument: with another value,
      unless one of both is 0, they are the same.
    scheduled: whether it decides when and at what rate steps are taken, and
      not what one of them computes.
    hashed: what stands for it in the config's hash, though it is free: it was
      not always, and that was its default. None: nothing does.
    younger: whether there are hashes from before it was declared: at its
      default it is no part of them.
  """

  name: str
  kind: Any
  default: Any
  unit: str = ''
  within: str = '[0, inf)'
  choices: tuple[Any, ...] = ()
  pattern: str = '(?!)'
  free: bool = False
  local: bool = False
  phase: bool = False
  traced: bool = False
  number: bool = False
  scheduled: bool = False
  hashed: float | None = None
  younger: bool = False

  def check(self, value: Any, where: str) -> Any:
    """Returns `value` as the field's type: ints widened, lists as tuples.

    Raises:
      UserError: naming `where`, if it is of another type, out of range or no
        choice.
    """
    where = f'{where}.{self.name}'
    if self.kind == tuple[PhaseStart, ...]:
      return _check_phases(value, where)
    value = self.widen(value)
    if not _fits(value, self.kind):
      raise self._wrong_type(value, where)
    for x in value if isinstance(value, tuple) else (value,):
      known = x in self.choices or re.fullmatch(self.pattern, str(x))
      if self.choices and not known:
        raise self._unknown(x, where)
      if isinstance(x, int | float):
        self._check_range(x, where)
    return value

  def parse(self, text: str, where: str) -> Any:
    """Returns what `text` on the command line says, as the field's type.

    Raises:
      UserError: naming `where`, if it says nothing of this type.
    """
    try:
      return _parse(text.strip(), self.kind)
    except (KeyError, TypeError, ValueError):
      raise self._wrong_type(text, where) from None

  def widen(self, value: Any) -> Any:
    """Returns `value` with ints where floats are meant, lists as tuples."""
    if isinstance(value, list):
      value = tuple(value)
    if isinstance(value, tuple) and float in typing.get_args(self.kind):
      return tuple(map(_widen, value))
    return _widen(value) if self.kind is float else value

  def _unknown(self, value: Any, where: str) -> errors.UserError:
    if self.pattern == Field.pattern or difflib.get_close_matches(
      str(value), self.choices, cutoff=0.8
    ):
      return unknown(value, self.choices, self.name, where)
    return errors.UserError(
      f'Unknown {self.name} {value!r}.',
      where,
      f'Write it like one of {", ".join(map(repr, self.choices))}.',
    )

  def _wrong_type(self, value: Any, where: str) -> errors.UserError:
    return errors.UserError(
      f'{self.name} must be {WANTED[self.kind]}, not {value!r}.', where
    )

  def _check_range(self, value: float, where: str) -> None:
    near, bounds = _on_devices(value), _miss(value, self.within)
    if not bounds:
      return
    shown = f'{value}'
    if near != value and (math.isinf(near) or near.is_integer()):
      shown += f' ({near:g} in float32)'
    raise errors.UserError(
      f'{self.name} is {shown}; it must be {bounds}.', where
    )


class PhaseStart(NamedTuple):
  """What changes within a stage, from the beginning of an epoch."""

  from_epoch: int
  # (field, its new value), of fields with `phase`.
  changes: tuple[tuple[str, Any], ...]


def field(default: T, **facts: Any) -> T:
  """Declares a field; `facts` as in `Field`."""
  declared: Any = dataclasses.field(default=default, metadata=facts)
  return declared


class Optimizer(NamedTuple):
  """What an optimizer can do; all that asks about one asks here."""

  # With weight_decay_kind 'auto', decay is part of the gradient.
  coupled: bool = False
  # Its first moment is plain momentum: none is kept where that is 0.
  trace: bool = False
  nesterov: bool = False
  # The linear scaling rule is about it.
  scales: bool = False
  eight_bit: bool = False
  # It averages its steps itself, in place of a schedule and of ema_decay.
  schedule_free: bool = False


_SGD = Optimizer(coupled=True, trace=True, nesterov=True, scales=True)
OPTIMIZERS = {
  'adamw': Optimizer(),
  'adamw_8bit': Optimizer(eight_bit=True),
  'lamb': Optimizer(),
  'lars': _SGD,
  'muon': Optimizer(nesterov=True),
  'rmsprop': Optimizer(coupled=True, trace=True),
  'schedule_free_adamw': Optimizer(schedule_free=True),
  'schedule_free_sgd': Optimizer(coupled=True, scales=True, schedule_free=True),
  'sgd_momentum': _SGD,
  'sgd_momentum_8bit': _SGD._replace(eight_bit=True),
}


@dataclasses.dataclass(frozen=True)
class ConfigFields:
  """The fields of a config outside its stages."""

  # Where raw datasets lie, as their sources ship them; prepared ones go to
  # data_dir/prepared.
  data_dir: str = field('data', free=True, local=True)
  # Decides initial weights, the order of examples and every augmentation.
  seed: int = 0

  # The network.
  model: str = field(
    'resnet50',
    choices=(
      'resnet10',
      'resnet18',
      'resnet34',
      'resnet50',
      'resnet101',
      'resnet152',
    ),
  )
  # Channels of the first block group; the published networks have 64.
  num_filters: int = field(64, within='[1, inf)')
  # Side of the first convolution, in pixels: 7 as published, 3 for small
  # images. It is the same in all stages, or weights would not fit.
  stem_kernel: int = field(7, unit='pixels', choices=(3, 7))
  # Blur before subsampling (Zhang 2019, arXiv:1904.11486): BlurPool.
  blur_pool: bool = False
  # Which images of a training batch BatchNorm normalises together: 'global',
  # all of them; 'per_device', those of each device; 'groups:K', those of K
  # neighbouring devices. Running statistics are the mean over the groups.
  batch_norm: str = field(
    'global',
    choices=('global', 'groups:2', 'per_device'),
    pattern=r'groups:[1-9]\d*',
  )
  # 'blocks': the backward pass computes each residual block again instead of
  # keeping what it held: less memory, a third more FLOPs. 'none': it keeps all.
  remat: str = field('none', choices=('blocks', 'none'))

  # Images are normalised with these, in [0, 1], red, green, blue: ImageNet's.
  # One value for all stages, because the backbone has to get used to it.
  mean_rgb: tuple[float, float, float] = field(
    (0.485, 0.456, 0.406), within='[0, 1]'
  )
  std_rgb: tuple[float, float, float] = field(
    (0.229, 0.224, 0.225), within='(0, 1]'
  )

  # 'bfloat16', 'float32', or 'auto': bfloat16 on TPU and GPU, float32 on CPU,
  # where bfloat16 is emulated. Stages without mixed_precision use float32.
  dtype: str = field('auto', choices=('auto', 'bfloat16', 'float32'))
  # 'tpu', 'gpu' or 'cpu' refuse to run on anything else; 'any' takes what there
  # is.
  platform: str = field('any', choices=('any', 'cpu', 'gpu', 'tpu'), free=True)

  # A step's new state takes the memory of the old one; False keeps both, for
  # looking at what a step changed.
  donate_state: bool = field(True, free=True)

  # Where compiled steps are kept for the next start, readable by their owner
  # alone, because whoever can write there can run code; '': nowhere.
  compilation_cache_dir: str = field(
    '~/.cache/jaxprog/xla', free=True, local=True
  )

  # Where this machine keeps what it reads of a data_dir in a bucket; '': in
  # $JAXPROG_CACHE_DIR, or else in ~/.cache/jaxprog.
  cache_dir: str = field('', free=True, local=True)
  # Where a run on this machine's disk is kept too, s3://BUCKET/PATH or gs://...:
  # the same command goes on from there on another machine; '': nowhere.
  mirror: str = field('', free=True, local=True)

  # XLA's flags: 'none'; 'overlap' sums gradients while others are computed;
  # 'deterministic' gives the same bits in every run on GPUs. Flags that the
  # environment sets win.
  xla_flags: str = field('none', choices=('deterministic', 'none', 'overlap'))

  # Workers that decode images in each process; 0: one a core.
  num_workers: int = field(0, free=True, local=True)
  # 'thread', 'process', or 'auto': threads up to 16 workers (2 of raw images),
  # then processes, because Python runs in one thread at a time.
  worker_kind: str = field(
    'auto', choices=('auto', 'process', 'thread'), free=True, local=True
  )
  # Train on no image that some stage evaluates on, nor on any of ILSVRC's
  # validation images.
  exclude_leaks: bool = False
  # Images that cannot be decoded are left out of the loss and named; more than
  # so many in one stage end the run.
  max_bad_images: int = field(10, unit='images', free=True)
  # Besides the end of every epoch, save every so many steps (0: never) and
  # every so many minutes (0: never).
  checkpoint_every_steps: int = field(0, unit='steps', free=True)
  checkpoint_every_minutes: float = field(10.0, unit='minutes', free=True)
  # So many steps in a row whose loss, gradient or new state is not finite (they
  # change nothing) take the stage back to its last checkpoint, with another
  # order of examples; at most twice, then the run ends. 0: they never do.
  max_skipped_steps: int = field(10, unit='steps', free=True)
  # Without a step, an evaluated batch or a save for so long, a run prints what
  # all its threads are doing and ends; 0: never.
  watchdog_minutes: float = field(30.0, unit='minutes', free=True, local=True)
  # Who is told the figures of a run (docs/loggers.md), as many as you like.
  loggers: tuple[str, ...] = field(
    ('tensorboard',),
    choices=('csv', 'mlflow', 'tensorboard', 'trackio', 'wandb'),
    free=True,
  )
  # False: as if loggers did not name 'tensorboard'; older than they are.
  tensorboard: bool = field(True, free=True)
  # Steps between two points of a training curve in what loggers write.
  log_every_steps: int = field(20, unit='steps', within='[1, inf)', free=True)
  # Steps of each stage, after the first 10, that jax.profiler traces for
  # TensorBoard's profile page.
  profile_steps: int = field(0, unit='steps', free=True)

  # --mode=check: steps of each stage that are timed, after one more; 0: none is
  # compiled.
  check_steps: int = field(3, unit='steps', free=True, local=True)

  # --mode=plan: the part of a chip's published rates that a step reaches; 0: as
  # is known of ResNet-50, 0.7 on TPUs and 0.8 on GPUs (docs/plan.md).
  plan_utilization: float = field(
    0.0, within='[0, 1]', free=True, local=True, hashed=0.7
  )
  # --mode=plan: what a chip costs an hour, in your currency; 0: unknown.
  chip_hour_price: float = field(0.0, free=True, local=True, hashed=0.0)
  # --mode=plan: training images a second that a core of the hosts makes ready;
  # 0: as measured for the stage's storage (docs/data.md).
  images_per_core: float = field(
    0.0, unit='images/s', free=True, local=True, hashed=0.0
  )

  # --mode=lr_find: so many steps, each at a higher rate.
  lr_find_steps: int = field(
    100, unit='steps', within='[10, inf)', free=True, local=True
  )
  lr_find_min: float = field(1e-6, within='[1e-30, inf)', free=True, local=True)
  lr_find_max: float = field(10.0, within='(0, inf)', free=True, local=True)


@dataclasses.dataclass(frozen=True)
class StageFields:
  """The fields of one stage."""

  # Names a directory of the run: letters, digits, '_', '-' and '.'.
  name: str = field('', scheduled=True)
  # One sentence for the report.
  description: str = field('', free=True, scheduled=True)

  # Top-1 that a recipe's source publishes, 0: none, and in what the stage
  # differs from it: --mode=check says both.
  published_top1: float = field(
    0.0, within='[0, 1]', free=True, scheduled=True, younger=True
  )
  differs: tuple[str, ...] = field((), free=True, scheduled=True, younger=True)

  # A name that README lists under Data, folder:PATH, parquet:PATH, hf:NAME,
  # wds:TARS or tfds:NAME.
  dataset: str = ''
  # Checked against the dataset; 0: whatever it has.
  num_classes: int = 0
  # Use only these classes, by WordNet id or name; (): all of them.
  classes: tuple[str, ...] = ()

  # Weights to start from in place of those of the stage before (''): a
  # .safetensors file of config.model under torchvision's or timm's names, here
  # or on the Hugging Face hub: 'timm:resnet50.a1_in1k', 'hf:OWNER/NAME' or
  # 'hf:OWNER/NAME/FILE.safetensors'.
  init_from: str = ''

  # What happens to the weights of the stage before: 'plain', they are carried
  # as they are; 'shrink_and_perturb' (arXiv:1910.08475); 'dash'
  # (arXiv:2410.23495); 'none', the stage starts afresh.
  transfer: str = field(
    'plain', choices=('dash', 'none', 'plain', 'shrink_and_perturb')
  )
  # shrink_and_perturb: carried weights are multiplied with shrink, and perturb
  # times a fresh initialisation is added.
  shrink: float = field(0.5, within='[0, 1]')
  perturb: float = 0.2
  # dash: the smallest factor.
  dash_least: float = field(0.3, within='(0, 1]')
  # Residual blocks at the end of the network that start afresh.
  reset_blocks: int = 0
  # Which weights: 'best', 'final' or 'ema'.
  transfer_weights: str = field('best', choices=('best', 'ema', 'final'))
  # 'auto': the head is kept where the classes are the same, else fresh; or
  # 'fresh', 'zero'; 'by_class': the row of each class comes from the nearest
  # earlier stage that knew it.
  transfer_head: str = field(
    'auto', choices=('auto', 'by_class', 'fresh', 'zero')
  )
  # BatchNorm's statistics: 'carry', 'reset', or 'recalibrate' on training
  # images.
  transfer_statistics: str = field(
    'carry', choices=('carry', 'recalibrate', 'reset')
  )
  # Training batches that dash and recalibrate look at, and schedule_free_*
  # before each evaluation.
  transfer_batches: int = field(10, unit='batches', within='[1, inf)')

  # A network that teaches beside the labels: 'stage:NAME', the best weights of
  # a stage before ('stage:NAME:ema': its averaged ones), or a .safetensors file
  # of one of our ResNets, smaller or larger; '': none. It sees the very images
  # that the stage does (Beyer et al. 2022, arXiv:2106.05237).
  distill_from: str = field('', younger=True)
  # Part of the loss that is the divergence between both networks' softened
  # probabilities of the classes that both know, times the temperature's square
  # (Hinton et al. 2015, arXiv:1503.02531); the labels have the rest.
  distill_weight: float = field(0.5, within='[0, 1]', younger=True, number=True)
  distill_temperature: float = field(
    2.0, within='(0, inf)', younger=True, number=True
  )
  # What the squared distance between both networks' last features counts, over
  # the square of the teacher's; through a 1x1 projection that learns with the
  # stage where their widths differ (Romero et al. 2015, arXiv:1412.6550).
  distill_features: float = field(0.0, younger=True, number=True)
  # Both fall to 0 in a line over so many epochs, and from there on nobody
  # teaches; 0: they stay as they are to the end.
  distill_epochs: float = field(0.0, unit='epochs', younger=True, number=True)

  # How training images are kept: 'original', as they came; 'jpeg:N' with the
  # shorter side at most N pixels, quality 90 ('jpeg:N:QUALITY'); 'raw' or
  # 'raw:N', decoded, three bytes a pixel.
  storage: str = field(
    'original',
    choices=('original', 'raw', 'raw:256', 'jpeg:512'),
    pattern=rf'raw:{_SIDE}|jpeg:{_SIDE}(:0*(\d\d?|100))?',
  )

  # Side of the square the network sees, in pixels.
  image_size: int = field(224, unit='pixels', within='[8, inf)', phase=True)
  # Of these the same network sees the low frequencies alone, as a square of
  # this side: the middle of the spectrum (Wang et al. 2024, arXiv:2405.08768);
  # 0: the image itself. With phases it grows with the epoch.
  low_frequency_size: int = field(
    0,
    unit='pixels',
    within='0 or [8, inf)',
    phase=True,
    traced=True,
    younger=True,
  )
  # Random resized crop: smallest part of the image's area and largest
  # width-to-height ratio (its inverse is the smallest).
  min_crop_area: float = field(0.08, within='(0, 1]', phase=True)
  max_crop_aspect: float = field(4 / 3, within='[1, inf)')
  # How its pixels are resized: 'bilinear', 'bicubic', or 'random', one of the
  # two for each image.
  crop_interpolation: str = field(
    'bilinear', choices=('bicubic', 'bilinear', 'random'), younger=True
  )
  # Mirror half of the training images, left to right.
  flip: bool = True
  # Mirror an image every other epoch instead of by chance.
  alternating_flip: bool = False
  # Random colours: each factor is uniform in [1 - x, 1 + x], the shift of the
  # hue in [-x, x] turns; in random order, as torchvision's ColorJitter.
  brightness: float = field(0.0, phase=True, traced=True, number=True)
  contrast: float = field(0.0, phase=True, traced=True, number=True)
  saturation: float = field(0.0, phase=True, traced=True, number=True)
  hue: float = field(
    0.0, within='[0, 0.5]', phase=True, traced=True, number=True
  )
  # 'none', 'rand_augment' (arXiv:1909.13719) or 'trivial_augment'
  # (arXiv:2103.10158).
  auto_augment: str = field(
    'none', choices=('none', 'rand_augment', 'trivial_augment')
  )
  # rand_augment: operations one after the other, and their strength.
  rand_augment_layers: int = field(2, within='[1, inf)')
  rand_augment_magnitude: int = field(9, within='[0, 30]', phase=True)
  # Chance to fill a random rectangle with noise, and its part of the area
  # (Zhong et al. 2017, arXiv:1708.04896).
  erasing_probability: float = field(
    0.0, within='[0, 1]', phase=True, traced=True, number=True
  )
  erasing_min_area: float = field(0.02, within='(0, 1)', number=True)
  erasing_max_area: float = field(1 / 3, within='(0, 1)', number=True)
  # Beta distribution that mixes two images or pastes a rectangle of one into
  # the other, 0: not; where both are set, each step takes one of them
  # (arXiv:1710.09412, arXiv:1905.04899).
  mixup_alpha: float = field(0.0, phase=True, traced=True, number=True)
  cutmix_alpha: float = field(0.0, phase=True, traced=True, number=True)
  # Chance that a training image skips the last residual block; it rises
  # linearly from 0 at the first one (Huang et al. 2016, arXiv:1603.09382).
  drop_path: float = field(
    0.0, within='[0, 1)', phase=True, traced=True, younger=True, number=True
  )

  # Classes with unequal numbers of training images. The loss of an image counts
  # as the number of its class's images to the power of minus class_weighting
  # (0: all alike; 1: all classes alike), on average once.
  class_weighting: float = field(
    0.0, within='[0, 1]', younger=True, number=True
  )
  # Or rare classes are drawn more often, and the others less: 0, an epoch shows
  # each image once; 1, it shows as many images, and equally many of each class.
  balanced_sampling: float = field(
    0.0, within='[0, 1]', younger=True, number=True
  )

  # What decides which weights are best: 'validation', or 'holdout:2%' of the
  # training images; then the validation images are looked at once, at the end.
  eval_split: str = field(
    'validation',
    choices=('validation', 'holdout:2%'),
    pattern=r'holdout:(?=.*[1-9])0*\d{1,2}(\.\d+)?%',
  )
  # By which score: 'val_top1', or 'val_balanced_top1', the mean of the top-1 of
  # each class.
  best_metric: str = field(
    'val_top1',
    choices=('val_balanced_top1', 'val_top1'),
    scheduled=True,
    younger=True,
  )
  # Side of evaluation images; 0: the largest the stage trains on, whose network
  # it is at any size.
  eval_image_size: int = field(0, unit='pixels', within='0 or [8, inf)')
  # Evaluation resizes the shorter side to eval_image_size / eval_crop and takes
  # the centre.
  eval_crop: float = field(0.875, within='(0, 1]')
  # 'bilinear' or 'bicubic'.
  eval_interpolation: str = field('bilinear', choices=('bicubic', 'bilinear'))
  # Evaluation takes the mean of the logits of an image and its mirror image, in
  # twice the time; predict and exports look at the image alone.
  eval_flip: bool = field(False, younger=True)

  # Passes over the training images; fractions are allowed.
  num_epochs: float = field(
    1.0, unit='epochs', within='(0, inf)', scheduled=True, number=True
  )
  # Images in one step, over all devices of all processes.
  batch_size: int = field(128, unit='images', within='[1, inf)', phase=True)
  # Copies of each image in a batch, each augmented by itself (Hoffer et al.
  # 2019, arXiv:1901.09335). An epoch shows as many images as before, and so
  # fewer different ones.
  augment_repeats: int = field(1, within='[1, inf)', younger=True)

  # Images whose gradients are computed at once, on all devices; those of a
  # whole batch are averaged before the update. 0: the whole batch.
  micro_batch_size: int = field(0, unit='images')
  # What changes within the stage, such as ({'from_epoch': 10, 'image_size':
  # 192, 'mixup_alpha': 0.2},), in order of from_epoch (whole, from 1 on,
  # counted from 0): batch_size, image_size, or how images are augmented.
  phases: tuple[PhaseStart, ...] = ()

  # Peak of the schedule, per step.
  learning_rate: float = field(
    0.001, within='(0, inf)', scheduled=True, number=True
  )
  # SGD, LARS: multiply learning_rate by batch_size / base_batch_size.
  scale_learning_rate: bool = False
  base_batch_size: int = field(
    256, unit='images', within='[1, inf)', number=True
  )
  # What makes an update of a gradient.
  optimizer: str = field('adamw', choices=tuple(OPTIMIZERS))
  # How the learning rate goes.
  schedule: str = field(
    'cosine_warmup',
    choices=(
      'constant',
      'cosine',
      'cosine_warmup',
      'exponential_warmup',
      'linear',
      'one_cycle',
      'plateau',
      'polynomial',
      'step',
    ),
    scheduled=True,
  )
  # Linear rise from 0 to the peak, in epochs or else in optimizer steps;
  # one_cycle has warmup_fraction.
  warmup_epochs: float = field(0.0, unit='epochs', scheduled=True, number=True)
  warmup_steps: int = field(0, unit='steps', scheduled=True, number=True)
  # one_cycle: the part of the steps that rises, the peak over the first rate,
  # and the first rate over the last.
  warmup_fraction: float = field(
    0.3, within='(0, 1)', scheduled=True, number=True
  )
  div_factor: float = field(
    25.0, within='[1, inf)', scheduled=True, number=True
  )
  final_div_factor: float = field(
    1e4, within='[1, inf)', scheduled=True, number=True
  )
  # polynomial: the exponent.
  power: float = field(2.0, within='(0, inf)', scheduled=True)
  # Last rate as a part of the peak, or the least one: cosine, polynomial,
  # exponential_warmup, linear, plateau.
  end_factor: float = field(0.0, within='[0, 1]', scheduled=True, number=True)
  # cosine, cosine_warmup: epochs from the peak to the first warm restart (0:
  # none), and each period over the one before.
  restart_epochs: float = field(0.0, unit='epochs', scheduled=True, number=True)
  restart_factor: float = field(
    1.0, within='[1, inf)', scheduled=True, number=True
  )
  # step: epochs at which the rate is multiplied by step_factor.
  milestones: tuple[float, ...] = field(
    (), unit='epochs', within='(0, inf)', scheduled=True, number=True
  )
  step_factor: float = field(0.1, within='(0, 1)', scheduled=True, number=True)
  # plateau: the rate is multiplied by plateau_factor when val_loss or val_top1
  # has not improved by plateau_min_delta for more than plateau_patience
  # evaluations; then plateau_cooldown evaluations do not count.
  plateau_metric: str = field(
    'val_loss', choices=('val_loss', 'val_top1'), scheduled=True
  )
  plateau_factor: float = field(0.1, within='(0, 1)', scheduled=True)
  plateau_patience: int = field(3, unit='evaluations', scheduled=True)
  plateau_min_delta: float = field(0.0, scheduled=True)
  plateau_cooldown: int = field(0, unit='evaluations', scheduled=True)

  # AdamW, LAMB: decay rates of both moments, and what keeps the division finite
  # (RMSprop too). Muon uses them for all but kernels. schedule_free_adamw: b1
  # is how near to the average gradients are asked for.
  b1: float = field(0.9, within='[0, 1)', number=True)
  b2: float = field(0.999, within='[0, 1)', number=True)
  eps: float = field(1e-8, within='(0, inf)', number=True)
  # SGD, LARS, Muon, RMSprop; schedule_free_sgd: as b1 above.
  momentum: float = field(0.9, within='[0, 1)', number=True)
  # SGD, LARS, Muon.
  nesterov: bool = False
  # Momentum, or Adam's first moment (AdamW, LAMB, Muon): 'float32', or
  # 'bfloat16' for half the bytes. Second moments stay float32.
  optimizer_state_dtype: str = field('float32', choices=('bfloat16', 'float32'))
  # RMSprop: decay rate of the mean square; PyTorch's alpha.
  rms_decay: float = field(0.99, within='[0, 1)', number=True)
  # LARS: a layer's rate is this times its weights' norm over its gradient's.
  trust_coefficient: float = field(0.001, within='(0, inf)', number=True)
  # 8-bit: numbers that share a scale, and the size of the smallest array that
  # is quantised.
  quantization_block: int = field(256, unit='numbers', within='[8, 65536]')
  quantization_min_size: int = field(4096, unit='numbers')
  # On kernels only. 'decoupled': each step takes learning_rate * weight_decay
  # of a kernel. 'coupled': it is part of the gradient. 'auto': decoupled for
  # AdamW, LAMB and Muon, coupled for SGD, LARS and RMSprop, as in PyTorch.
  weight_decay: float = field(1e-4, number=True)
  weight_decay_kind: str = field(
    'auto', choices=('auto', 'coupled', 'decoupled')
  )
  # Largest global norm of a step's gradient; 0: no limit.
  gradient_clipping: float = field(0.0, number=True)
  # Or largest norm of a unit's gradient over that of its weights (Brock et al.
  # 2021, arXiv:2102.06171); 0: no limit.
  adaptive_clipping: float = field(0.0, number=True)
  # Keep an exponential moving average of the weights, evaluated beside them;
  # how much of it stays each step, 0: none.
  ema_decay: float = field(0.0, within='[0, 1)', number=True)
  # How less of it stays at first: after n steps at most 1 - (1 + n)^-x, as in
  # timm's ModelEmaV3, whose x is 2/3; 0: at most (1 + n) / (10 + n).
  ema_warmup_power: float = field(0.0, younger=True)

  # Train only the head in the first epochs.
  freeze_epochs: float = field(0.0, unit='epochs', number=True)
  # Rates of the head and of the backbone over the schedule's.
  head_rate_factor: float = field(1.0, number=True)
  backbone_rate_factor: float = field(1.0, number=True)
  # Rate of each block of layers over that of the one after it.
  layer_decay: float = field(1.0, within='(0, 1]', number=True)

  # Stop the stage once val_top1 is this high; 0: never.
  target_top1: float = field(0.0, within='[0, 1]', scheduled=True)
  # Stop when best_metric has not improved by early_stopping_min_delta for so
  # many evaluations; 0: never.
  early_stopping_patience: int = field(0, unit='evaluations', scheduled=True)
  early_stopping_min_delta: float = field(0.0, scheduled=True)

  # What training lowers: 'softmax', the cross-entropy of the classes, or 'bce',
  # the mean over them of whether each is there: mixup and CutMix then show two
  # classes. Validation always measures 'softmax'.
  loss: str = field('softmax', choices=('bce', 'softmax'), younger=True)
  # bce: targets above it become 1, all others 0, such as 0.2 (Wightman et al.
  # 2021, arXiv:2110.00476); 0: they stay as they were mixed.
  bce_target_threshold: float = field(
    0.0, within='[0, 1)', younger=True, number=True
  )
  # Part of the target spread evenly over all classes, in training only.
  label_smoothing: float = field(
    0.0, within='[0, 1)', phase=True, traced=True, number=True
  )
  # Compute in config.dtype; False: float32 throughout.
  mixed_precision: bool = True


def _collect(cls: type) -> Declared:
  return {
    x.name: Field(x.name, x.type, x.default, **x.metadata)
    for x in dataclasses.fields(cls)
  }


CONFIG = _collect(ConfigFields)
STAGE = _collect(StageFields)


def names(declared: Declared, fact: str) -> tuple[str, ...]:
  """Returns the fields of which `fact`, such as 'free', is true."""
  return tuple(name for name, x in declared.items() if getattr(x, fact))


def defaults(declared: Declared) -> config_dict.ConfigDict:
  """Returns every field with its default."""
  return config_dict.ConfigDict({k: x.default for k, x in declared.items()})


def check(values: Any, declared: Declared, where: str) -> dict[str, Any]:
  """Returns the fields that `values`, a mapping, holds, as their own types.

  Raises:
    UserError: for a name that is no field, or what `Field.check` refuses.
  """
  for name in values:
    if name not in declared:
      raise unknown(name, declared, 'field', where)
  return {name: declared[name].check(values[name], where) for name in values}


def unknown(
  value: Any, choices: Iterable[Any], name: str, where: str
) -> errors.UserError:
  """Returns the error that names what is nearest to `value`."""
  return errors.UserError(
    f'Unknown {name} {value!r}.',
    where,
    errors.did_you_mean(str(value), map(str, choices)),
  )


# Types in words.
WANTED = {
  bool: 'True or False',
  int: 'a whole number',
  float: 'a number',
  str: 'a string',
  tuple: 'a tuple',
  tuple[str, ...]: 'a tuple of strings',
  tuple[float, ...]: 'a tuple of numbers',
  tuple[float, float, float]: 'three numbers',
  tuple[PhaseStart, ...]: 'a tuple of dicts',
}
_WORDS = {
  **dict.fromkeys(('true', 'yes', 'on', '1'), True),
  **dict.fromkeys(('false', 'no', 'off', '0'), False),
}


def _fits(value: Any, kind: Any) -> bool:
  """Returns whether `value` is of a type; booleans are no numbers."""
  if kind in (bool, int, float, str):
    return isinstance(value, kind) and isinstance(value, bool) <= (kind is bool)
  first, *others = typing.get_args(kind)
  return (
    isinstance(value, tuple)
    and (others == [...] or len(value) == 1 + len(others))
    and all(_fits(x, first) for x in value)
  )


def _widen(value: Any) -> Any:
  try:
    return float(value) if type(value) is int else value
  except OverflowError:
    return math.inf


def _parse(text: str, kind: Any) -> Any:
  """Returns `text` as a type, which raises if it is none of it."""
  if kind is bool:
    return _WORDS[text.lower()]
  if kind is str:
    return text.strip('\'"')
  if kind in (int, float):
    return kind(text)
  item = next(iter(typing.get_args(kind)), None)
  parts: Any = tuple(x.strip() for x in text.split(',') if x.strip())
  if item not in (str, float) or text.startswith(('(', '[')):
    with contextlib.suppress(ValueError, SyntaxError):
      parts = ast.literal_eval(text)
  parts = tuple(parts) if isinstance(parts, list | tuple) else (parts,)
  return tuple(map(item, parts)) if item in (str, float) else parts


def _on_devices(value: float) -> float:
  """Returns a number as float32: the least of them are 0, the largest inf.

  Whole numbers stay, up to 64 bits.
  """
  if not isinstance(value, float):
    return value if abs(value) < 2**63 else math.inf
  near = ctypes.c_float(value).value
  return 0.0 if abs(near) < 2**-126 else near


def _miss(value: float, within: str) -> str:
  """Returns '' for a number in a range, in float32 too, else what it must be.

  '[0, 1)' in words is 'at least 0 and below 1'.
  """
  near = _on_devices(value)
  if not math.isfinite(near):
    return 'a finite number'
  text = within.removeprefix('0 or ')
  low, high = map(float, text[1:-1].split(', '))
  low_in, high_in = text[0] == '[', text[-1] == ']'
  above = value >= low if low_in else near > low
  below = value <= high if high_in or high == math.inf else near < high
  if (above and below) or (text != within and value == 0):
    return ''
  words = f'{"0 or " * (text != within)}{"at least" if low_in else "above"}'
  upper = f' and {"at most" if high_in else "below"} {high:g}'
  return f'{words} {low:g}{upper * (high < math.inf)}'


def _check_phases(phases: Any, where: str) -> tuple[PhaseStart, ...]:
  if not isinstance(phases, list | tuple):
    raise errors.UserError(f'phases must be dicts, not {phases!r}.', where)
  found: list[PhaseStart] = []
  known = names(STAGE, 'phase')
  first = Field('from_epoch', int, 1, within='[1, inf)')
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
    from_epoch = first.check(phase['from_epoch'], where)
    if found and from_epoch <= found[-1].from_epoch:
      raise errors.UserError(
        f'Phases must follow one another from epoch 1 on, not {phase!r}.',
        where,
      )
    changes = []
    for name in phase:
      if name not in {*known, 'from_epoch'}:
        raise unknown(name, known, 'field of a phase', where)
    for name in sorted({*phase} - {'from_epoch'}):
      changes.append((name, STAGE[name].check(phase[name], where)))
    found.append(PhaseStart(from_epoch, tuple(changes)))
  return tuple(found)

"""What each batch holds: a pure function of (seed, epoch, step).

Nothing depends on how many workers there are or where a run was restarted.
Workers import this module and what it needs, but not JAX.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprog import errors
from jaxprog.data import balance, policies, preprocess
from jaxprog.data.records import Records
from jaxprog.epochs import Steps
from jaxprog.stages import Stage

# Host arrays of b examples: `image` uint8 (b, S, S, 3), `label` int32 (b,),
# `mask` bool (b,); in training `index` and `epoch` int32 (b,), of which
# augmentation is a function: copy c of example i of n has the index c * n + i.
HostBatch = dict[str, np.ndarray]
# Name -> shape and dtype of the arrays of a batch.
Layout = tuple[tuple[str, tuple[int, ...], str], ...]

# Streams of random numbers that must never meet.
_ORDER, _CROPS, _CLASSES = 0, 1, 2


class BadImage(NamedTuple):
  """An image that could not be decoded, and its row in the batch."""

  row: int
  name: str
  reason: str


class RecordError(RuntimeError):
  """A record that cannot be read at all; says which."""


def _start_example(
  generator: np.random.Generator,
  seed: int,
  epoch: int,
  index: int,
  stream: int = _CROPS,
) -> None:
  """Lets a Philox `generator` draw the numbers of one example in one epoch.

  Philox is a keyed hash of its counter, whose low words count the numbers
  drawn: other high words are other streams. To make a generator would take ten
  times as long.
  """
  generator.bit_generator.state = {
    'bit_generator': 'Philox',
    'state': {
      'counter': np.array((0, 0, epoch, index), np.uint64),
      'key': np.array((seed, stream), np.uint64),
    },
    'buffer': np.zeros(4, np.uint64),
    'buffer_pos': 4,
    'has_uint32': 0,
    'uinteger': 0,
  }


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns the order in which `epoch` visits the examples."""
  stream = np.random.Philox(key=[seed, _ORDER], counter=[0, 0, epoch, 0])
  return np.random.Generator(stream).permutation(num_examples)


def repeat_positions(
  start: int, count: int, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns positions in an order, and which copy of each is meant, (count,).

  They are numbers `start` to `start` + `count` of an order of which each
  element stands there `repeats` times in a row, as timm's RepeatAugSampler has
  it; then sorted by copy, so that neighbours, which mixing pairs, are different
  images, and all those of a device where there are as many devices as copies.
  """
  positions, copies = np.divmod(np.arange(start, start + count), repeats)
  by_copy = np.argsort(copies, kind='stable')
  return positions[by_copy], copies[by_copy]


def balanced_visits(
  seed: int, epoch: int, labels: np.ndarray, sampling: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns how often each example of `epoch` was drawn before, and which.

  They are as many as `labels`, class after class; `balance.count_draws` says
  how many of each. A class goes on where the epoch before has left it: none of
  its examples is drawn again before all others are.
  """
  counts = np.bincount(labels)
  draws = balance.count_draws(counts, sampling)
  members = np.split(np.argsort(labels, kind='stable'), np.cumsum(counts)[:-1])
  rng = np.random.Generator(np.random.Philox(0))
  passes, examples = [], []
  for label in map(int, np.flatnonzero(counts)):
    size, first = int(counts[label]), epoch * int(draws[label])
    visits = np.arange(first, first + draws[label])
    passes.append(visits // size)
    orders = []
    for number in range(first // size, int(visits[-1]) // size + 1):
      _start_example(rng, seed, number, label, _CLASSES)
      orders.append(rng.permutation(members[label]))
    examples.append(np.concatenate(orders)[visits - first // size * size])
  return np.concatenate(passes), np.concatenate(examples)


class TrainBatches:
  """This process's part of each training batch, by step within the stage.

  Global batch s of an epoch is positions [s * B, (s + 1) * B) of the epoch's
  order, of which process p of P has the p-th of P equal parts. What does not
  fill a last batch is left out for that epoch. With augment_repeats, the order
  has each example so often, and an epoch ends where it would without. An image
  that cannot be decoded is hidden by `mask`. With balanced sampling an image
  has epochs of its own: how often it was drawn before, so that it never looks
  twice the same.
  """

  def __init__(
    self,
    split: Records,
    stage: Stage,
    *,
    seed: int,
    steps: Steps,
    process_index: int = 0,
    process_count: int = 1,
  ):
    for phase in steps.phases:
      if phase.batch_size % process_count:
        raise ValueError(f'{phase.batch_size=} for {process_count=}.')
    self._split, self._stage = split, stage
    self._seed, self._steps = seed, steps
    self._process_index, self._process_count = process_index, process_count
    nothing = np.empty(0, np.int64)
    self._order = (-1, nothing, nothing)

  def __len__(self) -> int:
    return self._steps.total

  def layout(self, step: int) -> Layout:
    """Returns the arrays of batch `step`."""
    size = self._steps.part(self._stage, step).image_size
    count = self._steps.phase(step).batch_size // self._process_count
    return (
      ('image', (count, size, size, 3), 'uint8'),
      ('label', (count,), 'int32'),
      ('mask', (count,), 'bool'),
      ('index', (count,), 'int32'),
      ('epoch', (count,), 'int32'),
    )

  def fill(self, step: int, rows: range, batch: HostBatch) -> list[BadImage]:
    """Writes `rows` of batch `step`; returns those that it could not."""
    epochs, views = self._views(step)
    part, records = self._steps.part(self._stage, step), self._split
    rng, bad = np.random.Generator(np.random.Philox(0)), []
    crop = functools.partial(
      preprocess.random_crop,
      size=part.image_size,
      rng=rng,
      min_area=part.min_crop_area,
      max_aspect=part.max_crop_aspect,
      interpolation=part.crop_interpolation,
    )
    for row in rows:
      view, epoch = int(views[row]), int(epochs[row])
      index = view % len(records)
      batch['index'][row], batch['epoch'][row] = view, epoch
      batch['label'][row] = records.labels[index]
      out = batch['image'][row]
      _start_example(rng, self._seed, epoch, view)
      reason = _read(records, index, records.image, crop, out)
      batch['mask'][row] = not reason
      if reason:
        bad.append(BadImage(row, records.describe(index), reason))
      elif part.auto_augment == 'rand_augment':
        out[...] = policies.rand_augment(
          out, rng, part.rand_augment_layers, part.rand_augment_magnitude
        )
      elif part.auto_augment == 'trivial_augment':
        out[...] = policies.trivial_augment(out, rng)
    return bad

  def indices(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples of batch `step`, each with its own epoch first."""
    epochs, views = self._views(step)
    return epochs, views % len(self._split)

  def _views(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns epoch and `index` of each row of batch `step`."""
    epoch = self._steps.epoch(step)
    batch_size = self._steps.phase(step).batch_size
    positions, copies = repeat_positions(
      (step - self._steps.epoch_start(epoch)) * batch_size,
      batch_size,
      self._stage.augment_repeats,
    )
    local_batch_size = batch_size // self._process_count
    start = self._process_index * local_batch_size
    rows = slice(start, start + local_batch_size)
    epochs, order = self._visits(epoch)
    places = positions[rows]
    views = copies[rows] * len(self._split) + order[places]
    return epochs[places], views

  def _visits(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epochs and the examples of all that `epoch` shows."""
    # One tuple, replaced whole: threads may compute it twice, never mix it.
    known, epochs, order = self._order
    if known != epoch:
      order = epoch_order(self._seed, epoch, len(self._split))
      epochs = np.broadcast_to(epoch, len(order))
      if sampling := self._stage.balanced_sampling:
        epochs, examples = balanced_visits(
          self._seed, epoch, self._split.labels, sampling
        )
        epochs, order = epochs[order], examples[order]
      self._order = (epoch, epochs, order)
    return epochs, order


class EvalBatches:
  """This process's part of each evaluation batch: every example once.

  Every process has the same number of batches of the same size; what is
  missing is filled with black images whose mask is False. An image that cannot
  be decoded counts as wrong: its label is -1. Where several classes are right,
  a label is all of them.
  """

  def __init__(
    self,
    split: Records,
    stage: Stage,
    *,
    num_shards: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if num_shards % process_count:
      raise ValueError(f'{num_shards=} for {process_count=}.')
    self._split, self._stage = split, stage
    answers = split.answers
    self._labels = split.labels if answers is None else answers
    self._batch_size = -(-stage.batch_size // num_shards) * num_shards
    self._local_batch_size = self._batch_size // process_count
    self._offset = process_index * self._local_batch_size

  def __len__(self) -> int:
    return -(-len(self._split) // self._batch_size)

  def layout(self, step: int) -> Layout:
    """Returns the arrays of a batch; all are alike."""
    del step
    count, size = self._local_batch_size, self._stage.eval_size
    return (
      ('image', (count, size, size, 3), 'uint8'),
      ('label', (count, *self._labels.shape[1:]), 'int32'),
      ('mask', (count,), 'bool'),
    )

  def fill(self, step: int, rows: range, batch: HostBatch) -> list[BadImage]:
    """Writes `rows` of batch `step`; returns those that it could not."""
    records, stage = self._split, self._stage
    start, bad = step * self._batch_size + self._offset, []
    crop = functools.partial(
      preprocess.center_crop,
      size=stage.eval_size,
      eval_crop=stage.eval_crop,
      interpolation=stage.eval_interpolation,
    )
    for row in rows:
      index, out = start + row, batch['image'][row]
      batch['mask'][row] = index < len(self._split)
      if index >= len(self._split):
        out[...], batch['label'][row] = 0, 0
        continue
      batch['label'][row] = self._labels[index]
      if reason := _read(records, index, records.original, crop, out):
        out[...], batch['label'][row] = 0, -1
        bad.append(BadImage(row, records.describe(index), reason))
    return bad


def _read(
  records: Records,
  index: int,
  read: Callable[[int], preprocess.Encoded],
  crop: Callable[..., Any],
  out: np.ndarray,
) -> str:
  """Reads an image and crops it into `out`; returns what is wrong with it."""
  try:
    crop(read(index), out=out)
  except preprocess.BadImageError as e:
    return str(e)
  except errors.UserError:  # It names the file.
    raise
  except Exception as e:
    raise RecordError(
      f'Record {records.positions[index]} of the {records.name} split in '
      f'{records.directory} cannot be read: {type(e).__name__}: {e}'
    ) from e
  return ''


Batches = TrainBatches | EvalBatches


def read_batch(batches: Batches, step: int) -> HostBatch:
  """Returns batch `step`, read here and now."""
  batch = allocate(batches.layout(step))
  hide_bad(batch, batches.fill(step, range(len(batch['mask'])), batch))
  return batch


def allocate(layout: Layout) -> HostBatch:
  """Returns the arrays of a batch, not filled."""
  return place(layout, np.empty(count_bytes(layout), np.uint8))


def place(layout: Layout, memory: Any) -> HostBatch:
  """Returns the arrays of a batch in one piece of memory, a buffer."""
  starts = itertools.accumulate(_sizes(layout), initial=0)
  return {
    name: np.ndarray(shape, dtype, memory, start)
    for (name, shape, dtype), start in zip(layout, starts, strict=False)
  }


def count_bytes(layout: Layout) -> int:
  """Returns how much memory the arrays of a batch need."""
  return sum(_sizes(layout))


def _sizes(layout: Layout) -> list[int]:
  """Returns the bytes of each array, rounded up to a multiple of 64."""
  sizes = (math.prod(x) * np.dtype(dtype).itemsize for _, x, dtype in layout)
  return [-(-size // 64) * 64 for size in sizes]


def hide_bad(batch: HostBatch, bad: Sequence[BadImage]) -> None:
  """Shows BatchNorm and mixing another example in each bad one's place.

  The loss does not see it: its mask stays False.
  """
  good = np.flatnonzero(batch['mask'])
  for item in bad if 'index' in batch else ():
    if len(good):
      after = good[np.searchsorted(good, item.row) % len(good)]
      for name in ('image', 'label'):
        batch[name][item.row] = batch[name][after]
    else:
      batch['image'][item.row] = 0

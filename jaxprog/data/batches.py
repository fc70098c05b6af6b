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
from jaxprog.data import policies, preprocess
from jaxprog.data.records import Records
from jaxprog.epochs import Steps
from jaxprog.stages import Stage

# Host arrays of b examples: `image` uint8 (b, S, S, 3), `label` int32 (b,),
# `mask` bool (b,); in training `index` and `epoch` int32 (b,), of which
# augmentation on the device is a function.
HostBatch = dict[str, np.ndarray]
# Name -> shape and dtype of the arrays of a batch.
Layout = tuple[tuple[str, tuple[int, ...], str], ...]

# Streams of random numbers that must never meet.
_ORDER, _CROPS = 0, 1


class BadImage(NamedTuple):
  """An image that could not be decoded, and its row in the batch."""

  row: int
  name: str
  reason: str


class RecordError(RuntimeError):
  """A record that cannot be read at all; says which."""


def _start_example(
  generator: np.random.Generator, seed: int, epoch: int, index: int
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
      'key': np.array((seed, _CROPS), np.uint64),
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


class TrainBatches:
  """This process's part of each training batch, by step within the stage.

  Global batch s of an epoch is positions [s * B, (s + 1) * B) of the epoch's
  order, of which process p of P has the p-th of P equal parts. What does not
  fill a last batch is left out for that epoch. An image that cannot be decoded
  is hidden by `mask`.
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
    self._order = (-1, np.empty(0, np.int64))

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
    epoch, indices = self.indices(step)
    part, records = self._steps.part(self._stage, step), self._split
    rng, bad = np.random.Generator(np.random.Philox(0)), []
    crop = functools.partial(
      preprocess.random_crop,
      size=part.image_size,
      rng=rng,
      min_area=part.min_crop_area,
      max_aspect=part.max_crop_aspect,
    )
    for row in rows:
      index = int(indices[row])
      batch['index'][row], batch['epoch'][row] = index, epoch
      batch['label'][row] = records.labels[index]
      out = batch['image'][row]
      _start_example(rng, self._seed, epoch, index)
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

  def indices(self, step: int) -> tuple[int, np.ndarray]:
    """Returns the epoch of `step` and the examples of its batch."""
    epoch = self._steps.epoch(step)
    batch_size = self._steps.phase(step).batch_size
    local_batch_size = batch_size // self._process_count
    start = (step - self._steps.epoch_start(epoch)) * batch_size
    start += self._process_index * local_batch_size
    return epoch, self._epoch_order(epoch)[start : start + local_batch_size]

  def _epoch_order(self, epoch: int) -> np.ndarray:
    # One tuple, replaced whole: threads may compute it twice, never mix it.
    known, order = self._order
    if known != epoch:
      order = epoch_order(self._seed, epoch, len(self._split))
      self._order = (epoch, order)
    return order


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
    return str(e).removeprefix(': ')
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

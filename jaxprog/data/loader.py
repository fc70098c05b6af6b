"""Batches: a pure function of (seed, epoch, step), read ahead by threads.

Nothing depends on how many workers there are or where a run was restarted.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from jaxprog.data import preprocess, sources
from jaxprog.epochs import Steps
from jaxprog.stages import Stage

# Host arrays, `image` uint8 (b, S, S, 3), `label` int32 (b,), `mask` bool (b,).
HostBatch = dict[str, np.ndarray]

# Streams of random numbers that must never meet.
_ORDER, _CROPS = 0, 1


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
  """Returns the randomness of one example in one epoch."""
  return _rng(seed, _CROPS, epoch, index)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns the order in which `epoch` visits the examples."""
  return _rng(seed, _ORDER, epoch, 0).permutation(num_examples)


def _rng(seed: int, stream: int, epoch: int, index: int) -> np.random.Generator:
  # Philox is a keyed hash of its counter, whose low words count the numbers
  # drawn: other high words are other streams, and starting one takes 4 us.
  return np.random.Generator(
    np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, index])
  )


class TrainBatches(Sequence[HostBatch]):
  """This process's part of each training batch, by step within the stage.

  Global batch s of an epoch is positions [s * B, (s + 1) * B) of the epoch's
  order, of which process p of P has the p-th of P equal parts. What does not
  fill a last batch is left out for that epoch.
  """

  def __init__(
    self,
    split: sources.Split,
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
    self._split, self._stage, self._seed = split, stage, seed
    self._steps = steps
    self._process_index, self._process_count = process_index, process_count
    self._order = (-1, np.empty(0, np.int64))

  def __len__(self) -> int:
    return self._steps.total

  def __getitem__(self, step: int) -> HostBatch:  # type: ignore[override]
    epoch, indices = self.indices(step)
    return _stack(
      [self._example(epoch, int(i)) for i in indices],
      len(indices),
      self._stage.image_size,
    )

  def indices(self, step: int) -> tuple[int, np.ndarray]:
    """Returns the epoch of `step` and the examples of its batch."""
    epoch = self._steps.epoch(int(step))
    batch_size = self._steps.phase(int(step)).batch_size
    local_batch_size = batch_size // self._process_count
    start = (int(step) - self._steps.epoch_start(epoch)) * batch_size
    start += self._process_index * local_batch_size
    return epoch, self._epoch_order(epoch)[start : start + local_batch_size]

  def _epoch_order(self, epoch: int) -> np.ndarray:
    # One tuple, replaced whole: threads may compute it twice, never mix it.
    known, order = self._order
    if known != epoch:
      order = epoch_order(self._seed, epoch, len(self._split))
      self._order = (epoch, order)
    return order

  def _example(self, epoch: int, index: int) -> tuple[np.ndarray, int]:
    record = self._split.records[index]
    image = preprocess.random_crop(
      record['image'],
      self._stage.image_size,
      example_rng(self._seed, epoch, index),
      min_area=self._stage.min_crop_area,
      max_aspect=self._stage.max_crop_aspect,
      name=f'{record["wnid"]}/{record["file_name"]}',
    )
    return image, record['label']


class EvalBatches(Sequence[HostBatch]):
  """This process's part of each evaluation batch: every example once.

  Every process has the same number of batches of the same size; what is
  missing is filled with black images whose mask is False.
  """

  def __init__(
    self,
    split: sources.Split,
    stage: Stage,
    *,
    num_shards: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if num_shards % process_count:
      raise ValueError(f'{num_shards=} for {process_count=}.')
    self._split, self._stage = split, stage
    self._batch_size = -(-stage.batch_size // num_shards) * num_shards
    self._local_batch_size = self._batch_size // process_count
    self._offset = process_index * self._local_batch_size

  def __len__(self) -> int:
    return -(-len(self._split) // self._batch_size)

  def __getitem__(self, step: int) -> HostBatch:  # type: ignore[override]
    start = int(step) * self._batch_size + self._offset
    stop = min(start + self._local_batch_size, len(self._split))
    return _stack(
      [self._example(i) for i in range(start, stop)],
      self._local_batch_size,
      self._stage.image_size,
    )

  def _example(self, index: int) -> tuple[np.ndarray, int]:
    record = self._split.records[index]
    image = preprocess.center_crop(
      record['image'],
      self._stage.image_size,
      eval_crop=self._stage.eval_crop,
      name=f'{record["wnid"]}/{record["file_name"]}',
    )
    return image, record['label']


def train_batches(
  split: sources.Split,
  stage: Stage,
  *,
  seed: int,
  steps: Steps,
  start_step: int = 0,
  num_workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> 'grain.DatasetIterator[HostBatch]':
  """Returns the stage's batches from `start_step` on; close it after use.

  `seed` must be another one in each stage. `num_workers` threads read ahead,
  0 reads when asked; the batches are the same.
  """
  batches = TrainBatches(
    split,
    stage,
    seed=seed,
    steps=steps,
    process_index=process_index,
    process_count=process_count,
  )
  return _read_ahead(batches, start_step, num_workers)


def eval_batches(
  split: sources.Split,
  stage: Stage,
  *,
  num_shards: int = 1,
  num_workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> 'grain.DatasetIterator[HostBatch]':
  """Returns the batches of one evaluation; close it after use.

  Their size is the stage's, rounded up to a multiple of `num_shards`, the
  number of devices of all processes.
  """
  batches = EvalBatches(
    split,
    stage,
    num_shards=num_shards,
    process_index=process_index,
    process_count=process_count,
  )
  return _read_ahead(batches, 0, num_workers)


def to_device(
  batch: HostBatch, sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
  """Returns the global batch of which this process has `batch`."""
  return {
    name: jax.make_array_from_process_local_data(sharding, x)
    for name, x in batch.items()
  }


def prefetch_to_device(
  batches: Iterator[HostBatch],
  sharding: jax.sharding.Sharding,
  size: int = 2,
) -> Iterator[dict[str, jax.Array]]:
  """Yields `batches` on the devices, `size` of them under way at a time."""
  queue: collections.deque[dict[str, jax.Array]] = collections.deque()
  for batch in batches:
    queue.append(to_device(batch, sharding))
    if len(queue) >= size:
      yield queue.popleft()
  yield from queue


def _read_ahead(
  batches: Sequence[HostBatch], start: int, num_workers: int
) -> Any:
  # A thread at work, and as many batches ready: more would only be memory.
  options = grain.ReadOptions(
    num_threads=num_workers, prefetch_buffer_size=2 * num_workers
  )
  dataset = grain.MapDataset.source(batches).slice(slice(start, None))
  return iter(dataset.to_iter_dataset(options))


def _stack(
  examples: Sequence[tuple[np.ndarray, int]], batch_size: int, size: int
) -> HostBatch:
  """Returns the examples as one batch, filled up to `batch_size`."""
  batch: HostBatch = {
    'image': np.zeros((batch_size, size, size, 3), np.uint8),
    'label': np.zeros(batch_size, np.int32),
    'mask': np.arange(batch_size) < len(examples),
  }
  for i, (image, label) in enumerate(examples):
    batch['image'][i] = image
    batch['label'][i] = label
  return batch

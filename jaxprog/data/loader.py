"""Batches of a stage, on their way from the records to the devices."""

import collections
from collections.abc import Generator, Iterator

import jax
import numpy as np

from jaxprog.data import batches as batches_lib
from jaxprog.data import workers
from jaxprog.data.records import Records
from jaxprog.epochs import Steps
from jaxprog.stages import Stage

# Bytes of the largest batch that is copied on its way to the devices. On GPUs
# its transfer waits for all steps that were dispatched before: whoever waits
# for it can be no more than one quick step ahead.
_COPIED_BYTES = 4 << 20


def train_batches(
  split: Records,
  stage: Stage,
  *,
  seed: int,
  steps: Steps,
  start_step: int = 0,
  num_workers: int = 0,
  worker_kind: str = 'auto',
) -> workers.Reader:
  """Returns this process's batches from `start_step` on; close it after use.

  `seed` must be another one in each stage. `num_workers` threads or processes
  read ahead, 0 reads when asked; the batches are the same.
  """
  split.stored.fetch()
  batches = own_batches(split, stage, seed=seed, steps=steps)
  pack = split.pack
  kind = workers.choose_kind(
    worker_kind, num_workers, light=pack is not None and pack.kind == 'raw'
  )
  return workers.Reader(batches, start_step, num_workers=num_workers, kind=kind)


def own_batches(
  split: Records, stage: Stage, *, seed: int, steps: Steps
) -> batches_lib.TrainBatches:
  """Returns this process's part of each training batch."""
  return batches_lib.TrainBatches(
    split,
    stage,
    seed=seed,
    steps=steps,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def eval_batches(
  split: Records,
  stage: Stage,
  *,
  num_workers: int = 0,
  worker_kind: str = 'auto',
) -> workers.Reader:
  """Returns this process's batches of one evaluation; close it after use.

  Their size is the stage's, rounded up to a multiple of all devices.
  """
  split.source.fetch()
  batches = batches_lib.EvalBatches(
    split,
    stage,
    num_shards=jax.device_count(),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  kind = workers.choose_kind(worker_kind, num_workers)
  return workers.Reader(batches, num_workers=num_workers, kind=kind)


def to_device(
  batch: batches_lib.HostBatch, sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
  """Returns the global batch of which this process has `batch`."""
  if _is_copied(batch):
    batch = {name: np.array(x) for name, x in batch.items()}
  if jax.process_count() == 1:  # All at once takes 0.1 ms less.
    return jax.device_put(batch, sharding)
  return {
    name: jax.make_array_from_process_local_data(sharding, x)
    for name, x in batch.items()
  }


def _is_copied(batch: batches_lib.HostBatch) -> bool:
  """Returns whether the devices get a copy, and not the host's own memory.

  The CPU backend would go on reading that where it is aligned, whatever
  device_put's may_alias says, and it is used again.
  """
  size = sum(x.nbytes for x in batch.values())
  return jax.default_backend() == 'cpu' or size <= _COPIED_BYTES


def prefetch_to_device(
  batches: Iterator[batches_lib.HostBatch],
  sharding: jax.sharding.Sharding,
  size: int = 2,
) -> Generator[dict[str, jax.Array]]:
  """Yields `batches` on the devices, `size` of them under way at a time."""
  queue: collections.deque[dict[str, jax.Array]] = collections.deque()
  before = None
  for batch in batches:
    # The memory of the batch before this one is written to again when the next
    # one is asked for.
    jax.block_until_ready(before)
    placed = to_device(batch, sharding)
    before = None if _is_copied(batch) else placed
    queue.append(placed)
    if len(queue) >= size:
      yield queue.popleft()
  yield from queue

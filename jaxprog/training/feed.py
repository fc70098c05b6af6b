"""Batches of a stage on the devices, and what waiting for them costs."""

import math
import time

import jax

from jaxprog.data import loader
from jaxprog.training import setup, steps

# Waiting longer for input than this part of an epoch, and longer than this in
# seconds, is said, with its remedy.
MUCH_WAITING, NOTED_SECONDS = 0.05, 1.0


class Feed:
  """The training batches of a stage from `start_step` on; must be closed.

  Attributes:
    waited: seconds of the open epoch that were spent waiting.
  """

  def __init__(self, task: setup.Task, seed: int, start_step: int) -> None:
    self._task = task
    self._reader = task.read_batches(seed, start_step)
    self._batches = loader.prefetch_to_device(
      self._reader, task.shardings.batch
    )
    self.begin_epoch()

  @property
  def bad(self) -> dict[str, str]:
    """Name -> reason of each image so far that could not be decoded."""
    return self._reader.bad

  @property
  def restarts(self) -> int:
    """Times that dead workers were replaced."""
    return self._reader.restarts

  def begin_epoch(self) -> None:
    """Counts from here."""
    self._busy, self._images = self._reader.busy, self._reader.images
    self.waited = 0.0
    self._waited_first: float | None = None

  def next(self) -> steps.Batch:
    """Returns the next batch."""
    asked = time.monotonic()
    batch = next(self._batches)
    self.waited += time.monotonic() - asked
    if self._waited_first is None:  # Workers had nothing to be ahead with.
      self._waited_first = self.waited
    return batch

  def describe_limit(self, seconds: float, images_per_second: float) -> str:
    """Returns what would lift the limit that input is, '' if it is none.

    Args:
      seconds: that the epoch has taken.
      images_per_second: of all processes, over that time.
    """
    waited = self.waited - (self._waited_first or 0.0)
    if waited <= max(MUCH_WAITING * seconds, NOTED_SECONDS):
      return ''
    task, reader = self._task, self._reader
    cost = (reader.busy - self._busy) / (reader.images - self._images)
    wanted = images_per_second * seconds / (seconds - self.waited)
    cores = math.ceil(wanted * cost / jax.process_count())
    text = (
      f'limited by its input: {self.waited / seconds:.0%} of the time waits '
      f'for images. One takes {1e3 * cost:.2g} ms of a core and the devices '
      f'would take {wanted:,.0f} a second: '
    )
    if cores <= task.num_workers:
      text += 'workers enough, but their cores are busy with other work'
    else:
      text += f'{cores} workers would do, there are {task.num_workers}'
    if task.stage.stored.kind != 'raw':
      size = 8 * math.ceil(task.stage.eval_size / 7)
      text += f"; or storage='raw:{size}', or fewer pixels"
    return text

  def close(self) -> None:
    """Stops reading ahead."""
    self._batches.close()  # It holds a batch, whose memory is to be released.
    self._reader.close()

"""Batches of a stage on the devices, and what waiting for them costs."""

import math
import time

import jax

from jaxprog.data import loader
from jaxprog.training import setup, steps

# Waiting longer for input than this part of an epoch, and longer than this in
# seconds, is said, with its remedy.
_MUCH_WAITING, _NOTED_SECONDS = 0.05, 3.0


class Feed:
  """The training batches of a stage from `start_step` on; must be closed.

  Attributes:
    reader: what reads them; it knows of bad images and of restarts.
  """

  def __init__(self, task: setup.Task, seed: int, start_step: int) -> None:
    self._task = task
    self.reader = task.read_batches(seed, start_step)
    self._batches = loader.prefetch_to_device(self.reader, task.shardings.batch)
    self.begin_epoch()

  def begin_epoch(self) -> None:
    """Counts from here."""
    self._busy, self._images = self.reader.busy, self.reader.images
    self._began, self._waited = time.monotonic(), 0.0
    self._waited_first: float | None = None

  def next(self) -> steps.Batch:
    """Returns the next batch."""
    asked = time.monotonic()
    batch = next(self._batches)
    self._waited += time.monotonic() - asked
    if self._waited_first is None:  # Workers had nothing to be ahead with.
      self._waited_first = self._waited
    return batch

  def timing(self, num_images: int) -> dict[str, float]:
    """Returns how long the open epoch has taken so far, and for what.

    `seconds`, `images_per_second` of all processes' `num_images`, and
    `input_wait`, the part of the seconds spent waiting for batches.
    """
    seconds = time.monotonic() - self._began
    return {
      'seconds': seconds,
      'images_per_second': num_images / seconds,
      'input_wait': self._waited / seconds,
    }

  def describe_limit(self, timing: dict[str, float]) -> str:
    """Returns what would lift the limit that input is, '' if it is none."""
    seconds = timing['seconds']
    waited = self._waited - (self._waited_first or 0.0)
    if waited <= max(_MUCH_WAITING * seconds, _NOTED_SECONDS):
      return ''
    task, reader = self._task, self.reader
    cost = (reader.busy - self._busy) / (reader.images - self._images)
    wanted = timing['images_per_second'] * seconds / (seconds - self._waited)
    cores = math.ceil(wanted * cost / jax.process_count())
    text = f'limited by its input, {timing["input_wait"]:.0%} of the time: '
    if cores <= task.num_workers:
      text += 'its cores are busy with other work'
    else:
      text += f'{cores} workers would do, there are {task.num_workers}'
    if task.stage.stored.kind != 'raw':
      size = 8 * math.ceil(task.stage.eval_size / 7)
      text += f", or storage='raw:{size}'"
    return text

  def close(self) -> None:
    """Stops reading ahead."""
    self._batches.close()  # It holds a batch, whose memory is to be released.
    self.reader.close()

"""Scalars for TensorBoard, written by a thread of its own."""

import pathlib
from collections.abc import Mapping
from concurrent import futures
from typing import Any


class Writer:
  """Writes what clu's SummaryWriter writes, in order; close it.

  TensorFlow, which that is made of, takes 4 s to import. The thread does so
  while the first stage compiles; nothing waits for it but `close`.
  """

  def __init__(self, logdir: pathlib.Path | None):
    """Writes below `logdir`; None (where another process writes): nothing."""
    self._pool = futures.ThreadPoolExecutor(1, 'tensorboard')
    self._written: list[futures.Future[None]] = []
    self._writer: futures.Future[Any] | None = None
    if logdir is not None:
      self._writer = self._pool.submit(_create_writer, logdir)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes `scalars` by their tags; raises what an earlier call met."""
    if self._writer is None:
      return
    while self._written and self._written[0].done():
      self._written.pop(0).result()
    writer = self._writer

    def write() -> None:
      writer.result().write_scalars(step, scalars)
      writer.result().flush()

    self._written.append(self._pool.submit(write))

  def close(self) -> None:
    """Waits until all is written."""
    try:
      for future in self._written:
        future.result()
      if self._writer is not None:
        self._pool.submit(self._writer.result().close).result()
    finally:
      self._pool.shutdown()


def _create_writer(logdir: pathlib.Path) -> Any:
  import tensorflow as tf
  from clu import metric_writers

  tf.config.set_visible_devices([], 'GPU')  # It would take all their memory.
  return metric_writers.SummaryWriter(str(logdir))

"""What TensorBoard shows of a run, written by a thread of its own."""

import pathlib
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import numpy as np

# Tag -> an RGB picture, uint8 (height, width, 3).
Images = Mapping[str, np.ndarray]


class Writer:
  """Writes what clu's SummaryWriter writes, in order; close it.

  TensorFlow, which that is made of, takes 4 s to import where it is installed.
  The thread does so while the first stage compiles; nothing waits for it but
  `close`. Each call raises what the thread has met in an earlier one.
  """

  def __init__(self, logdir: pathlib.Path | None):
    """Writes below `logdir`; None (where another process writes): nothing."""
    self.logdir = logdir
    self._pool = futures.ThreadPoolExecutor(1, 'tensorboard')
    # The last call's; each waits for the one before, and fails as that has.
    self._written: futures.Future[Any] | None = None
    if logdir is not None:
      self._written = self._pool.submit(_create_writer, logdir)
    self._opened = self._written

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes `scalars` by their tags."""
    self._submit(lambda writer: writer.write_scalars(step, scalars))

  def write_images(self, step: int, draw: Callable[[], Images]) -> None:
    """Writes the pictures that `draw`, called in the thread, returns."""
    self._submit(lambda writer: writer.write_images(step, draw()))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes what the run was made with, once for each process."""
    self._submit(lambda writer: writer.write_hparams(hparams))

  def forget_after(self, step: int) -> None:
    """Lets TensorBoard drop what was written of steps after `step`.

    They are trained again after a resume or a rollback, and would be drawn
    twice.
    """
    self._submit(lambda writer: _write_restart(writer, step + 1))

  def close(self) -> None:
    """Waits until all is written."""
    try:
      if self._written is not None:
        self._written.result()
    finally:
      if self._opened is not None and not self._opened.exception():
        self._opened.result().close()
      self._pool.shutdown()

  def _submit(self, write: Callable[[Any], None]) -> None:
    before = self._written
    if before is None:
      return
    if before.done():
      before.result()

    def write_and_flush() -> Any:
      writer = before.result()
      write(writer)
      writer.flush()
      return writer

    self._written = self._pool.submit(write_and_flush)


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns hparams: 'seed' and so on, 'STAGE.optimizer' and so on.

  Args:
    config: complete, as in config.json; its `stage_defaults` are left out,
      because every stage has what it took from them.
  """
  plain = {k: v for k, v in config.items() if k != 'stage_defaults'}
  stages = {stage['name']: stage for stage in plain.pop('stages')}
  flat = {k: _plain(v) for k, v in plain.items()}
  for name, stage in stages.items():
    flat |= {f'{name}.{k}': _plain(v) for k, v in stage.items() if k != 'name'}
  return flat


def _plain(value: Any) -> bool | int | float | str:
  if isinstance(value, bool | int | float | str):
    return value
  return ' '.join(map(str, value))


def _create_writer(logdir: pathlib.Path) -> Any:
  """Returns clu's writer where TensorFlow is installed, else one like it."""
  from jaxprog.monitoring import events

  try:
    import tensorflow as tf
    from clu import metric_writers
  except ImportError:
    return events.Writer(logdir)

  class CluWriter(metric_writers.SummaryWriter):
    def write_event(self, event):
      # Neither clu nor tf.summary writes events other than summaries.
      resource = self._summary_writer._resource
      tf.raw_ops.ImportEvent(writer=resource, event=event.SerializeToString())

  tf.config.set_visible_devices([], 'GPU')  # It would take all their memory.
  return CluWriter(str(logdir))


def _write_restart(writer: Any, step: int) -> None:
  """Writes the mark of a restart, from which TensorBoard drops what it has.

  Its reader takes the first mark of a run for the run's start: there are two.
  """
  from tensorboard.compat.proto import event_pb2

  log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  for _ in range(2):
    writer.write_event(event_pb2.Event(step=step, session_log=log))

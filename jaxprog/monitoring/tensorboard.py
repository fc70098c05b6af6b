"""What TensorBoard shows of a run, by clu's writer or by one like it."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprog import fields

# What a tag's last part begins with is the run that its curve belongs to: train
# and val meet in one chart. The weights' scores are all that the session of
# hyper-parameters is beside, and so its metrics.
_RUNS = ('train_', 'val_', 'ema_')
_FINAL = 'weights/'


class TensorBoard:
  """Writes the runs train, val, ema and final of one folder; one thread's.

  Each appears with its first point.
  """

  def __init__(self, logdir: pathlib.Path):
    self._logdir = logdir
    self._writers: dict[str, Any] = {}
    # The first step since the start that is not to be believed.
    self._restart: float = math.inf

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes `scalars`, each into its run."""
    by_run: dict[str, dict[str, float]] = {}
    for tag, value in scalars.items():
      run, shown = _place(tag)
      by_run.setdefault(run, {})[shown] = value
    for run, values in by_run.items():
      self._writer(run).write_scalars(step, values)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes pictures, uint8 (height, width, 3), by their tags."""
    self._writer('train').write_images(step, images)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes what of a flat config is not as by default and has an effect."""
    shown = {k: v for k, v in hparams.items() if _is_own(k, v)}
    self._writer('final').write_hparams(shown)

  def forget_after(self, step: int) -> None:
    """Lets TensorBoard drop what was written of steps after `step`."""
    self._restart = min(self._restart, step + 1)
    for writer in self._writers.values():
      _write_restart(writer, step + 1)

  def flush(self) -> None:
    """Lets others see what was written."""
    for writer in self._writers.values():
      writer.flush()

  def close(self) -> None:
    """Ends the files."""
    for writer in self._writers.values():
      writer.close()

  def _writer(self, run: str) -> Any:
    if run not in self._writers:
      self._writers[run] = _create_writer(self._logdir / run)
      if self._restart < math.inf:
        _write_restart(self._writers[run], int(self._restart))
    return self._writers[run]


def find_logdir(workdir: pathlib.Path) -> pathlib.Path:
  """Returns WORKDIR/tensorboard/NAME, of the workdir, by which it is listed.

  What was written before goes on where it is, and so it does under the name
  that a workdir had.
  """
  root = workdir / 'tensorboard'
  if next(root.glob('events.out.tfevents.*'), None):
    return root
  before = sorted(root.glob('*/train/events.out.tfevents.*'))
  return before[0].parents[1] if before else root / workdir.name


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


def _is_own(name: str, value: Any) -> bool:
  """Returns whether a field of a flat config can tell runs apart."""
  _, dot, last = name.rpartition('.')
  field = (fields.STAGE if dot else fields.CONFIG).get(last)
  return field is None or not (field.free or _plain(field.default) == value)


def _place(tag: str) -> tuple[str, str]:
  """Returns the run that a tag belongs to, and its name there."""
  if tag.startswith(_FINAL):
    return 'final', tag
  group, _, name = tag.rpartition('/')
  for begin in _RUNS:
    if name.startswith(begin):
      return begin.rstrip('_'), f'{group}/{name.removeprefix(begin)}'
  return 'train', tag


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

"""Hands the figures of a run to its loggers, in a thread of its own."""

import csv
import functools
import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np
from ml_collections import config_dict

from jaxprog import errors, files
from jaxprog.monitoring import services, tensorboard

# Tag -> an RGB picture, uint8 (height, width, 3).
Images = Mapping[str, np.ndarray]


class Logger(Protocol):
  """Five methods of clu's MetricWriter, and one for steps trained again."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes `scalars` by their tags."""

  def write_images(self, step: int, images: Images) -> None:
    """Writes pictures by their tags."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes what the run was made with, a flat config."""

  def flush(self) -> None:
    """Lets others see what was written."""

  def close(self) -> None:
    """Ends what is written."""

  def forget_after(self, step: int) -> None:
    """Drops what was written of steps after `step`, if that can be."""


class Csv:
  """Writes rows of step, tag, value; pictures and the config lie elsewhere."""

  def __init__(self, path: pathlib.Path):
    """Goes on with the file at `path`."""
    self._path = path
    if not path.exists():
      files.write_bytes(path, b'step,tag,value\n')
    self._open()

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes a row for each of `scalars`."""
    self._rows.writerows((step, tag, value) for tag, value in scalars.items())

  def write_images(self, step: int, images: Images) -> None:
    """Writes nothing."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes nothing: config.json is beside it."""

  def forget_after(self, step: int) -> None:
    """Takes out the rows of later steps, and one that a kill has cut."""
    self._file.close()
    first, *lines = self._path.read_bytes().splitlines(keepends=True)
    kept = [
      x for x in lines if x.endswith(b'\n') and int(x.split(b',')[0]) <= step
    ]
    if kept != lines:
      files.write_bytes(self._path, b''.join([first, *kept]))
    self._open()

  def flush(self) -> None:
    """Lets others see what was written."""
    self._file.flush()

  def close(self) -> None:
    """Ends the file."""
    self._file.close()

  def _open(self) -> None:
    self._file = open(self._path, 'a', newline='')  # noqa: SIM115
    self._rows = csv.writer(self._file, lineterminator='\n')


class Writer:
  """Writes to all loggers, in order; close it.

  TensorFlow, which clu's writer is made of, takes 4 s to import where it is
  installed, and what talks to a server may wait for it. The thread does so
  while the first stage compiles; nothing waits for it but `close`. Each call
  raises what the thread has met in an earlier one.
  """

  def __init__(
    self,
    create: Sequence[Callable[[], Logger]] = (),
    logdir: pathlib.Path | None = None,
  ):
    """Writes to what `create` creates, called in the thread.

    `logdir` is where traces of the profiler go, None for nowhere.
    """
    self.logdir = logdir
    self._pool = futures.ThreadPoolExecutor(1, 'loggers')
    self._open: list[Logger] = []
    # The last call's; each waits for the one before, and fails as that has.
    self._written: futures.Future[None] | None = None
    if create:
      self._written = self._pool.submit(
        lambda: self._open.extend(x() for x in create)
      )

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes `scalars` by their tags."""
    self._submit(lambda logger: logger.write_scalars(step, scalars))

  def write_images(self, step: int, draw: Callable[[], Images]) -> None:
    """Writes the pictures that `draw`, called in the thread, returns."""
    drawn = functools.cache(draw)

    def write(logger: Logger) -> None:
      if not isinstance(logger, Csv):  # Which has no use for them.
        logger.write_images(step, drawn())

    self._submit(write)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes what the run was made with, once for each process."""
    self._submit(lambda logger: logger.write_hparams(hparams))

  def forget_after(self, step: int) -> None:
    """Drops what was written of steps after `step`, where that can be.

    They are trained again after a resume or a rollback, and would be drawn
    twice.
    """
    self._submit(lambda logger: logger.forget_after(step))

  def close(self, finished: bool = True) -> None:
    """Waits until all is written; services are told if a run was cut off."""
    try:
      if self._written is not None:
        self._written.result()
    finally:
      self._pool.shutdown()
      for logger in self._open:
        if isinstance(logger, services.Service):
          logger.finished = finished
        logger.close()

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    self.close(finished=kind is None)

  def _submit(self, write: Callable[[Logger], None]) -> None:
    before = self._written
    if before is None:
      return
    if before.done():
      before.result()

    def write_and_flush() -> None:
      before.result()
      for logger in self._open:
        write(logger)
        logger.flush()

    self._written = self._pool.submit(write_and_flush)


def chosen(config: config_dict.ConfigDict) -> tuple[str, ...]:
  """Returns the names of the loggers that a run of `config` has.

  Raises:
    UserError: if one of them is not installed.
  """
  unwanted = () if config.tensorboard else ('tensorboard',)
  names = tuple(x for x in dict.fromkeys(config.loggers) if x not in unwanted)
  for name in names:
    # A folder of that name, which W&B makes, can be imported too.
    spec = importlib.util.find_spec(name) if name in services.SERVICES else None
    if name in services.SERVICES and (spec is None or spec.origin is None):
      raise errors.not_installed(
        f'The logger {name!r}',
        f'config.loggers={config.loggers}',
        ImportError(f'No module named {name!r}'),
        extra=name,
      )
  return names


def open_loggers(
  names: Sequence[str],
  workdir: pathlib.Path,
  note: Callable[[str, str], object],
) -> Writer:
  """Returns a writer to those of config.loggers that have `names`.

  A service that fails is left out from then on; `note` is told its name and
  why.
  """
  logdir = tensorboard.find_logdir(workdir)
  create: dict[str, Callable[[], Logger]] = {
    'tensorboard': lambda: tensorboard.TensorBoard(logdir),
    'csv': lambda: Csv(workdir / 'metrics.csv'),
    **{
      name: functools.partial(services.Service, name, workdir, note)
      for name in services.SERVICES
    },
  }
  return Writer(
    [create[name] for name in names],
    logdir if 'tensorboard' in names else None,
  )

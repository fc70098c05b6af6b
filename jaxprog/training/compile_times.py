"""How long the compiler took the last time, to be said while it works."""

import contextlib
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator

import jax

from jaxprog import files, paths
from jaxprog.training import setup as setup_lib

# Beside what is kept compiled: where that is gone, so is this.
_FILE = 'compile_seconds.json'
_KEPT = 200


def last(task: setup_lib.Task) -> float | None:
  """Returns the seconds that compiling took the last time, None: never done."""
  return _read(task).get(_key(task))


@contextlib.contextmanager
def noted(task: setup_lib.Task) -> Iterator[None]:
  """Notes what compiling `task` takes inside."""
  began = time.monotonic()
  yield
  path = _path(task)
  if path is None:
    return
  key, known = _key(task), _read(task)
  known.pop(key, None)
  known[key] = round(time.monotonic() - began, 1)
  with contextlib.suppress(OSError):  # It is not worth a run.
    files.write_json(path, dict(list(known.items())[-_KEPT:]))


def _path(task: setup_lib.Task) -> pathlib.Path | None:
  directory = paths.cache_dir(task.config)
  return directory / _FILE if directory else None


def _read(task: setup_lib.Task) -> dict[str, float]:
  path = _path(task)
  try:
    return json.loads(path.read_bytes()) if path else {}
  except (OSError, ValueError):
    return {}


def _key(task: setup_lib.Task) -> str:
  """Returns what stands for the steps of `task` and what compiles them."""
  device = jax.devices()[0].device_kind
  parts = (
    jax.__version__,
    f'{jax.device_count()} x {device}',
    repr(task.model),
    task.stage.optimizer,
    repr(list(task.train_steps)),
  )
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]

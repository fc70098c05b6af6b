"""How long the compiler took the last time, to be said while it works."""

import contextlib
import hashlib
import pathlib
import threading
import time
from collections.abc import Iterator

import jax

from jaxprog import files, paths
from jaxprog.training import setup as setup_lib

# Beside what is kept compiled: where that is gone, so is this.
_FILE = 'compile_seconds.json'
_KEPT = 200
_writing = threading.Lock()
# How JAX says that it has not compiled, but read.
_HIT = '/jax/compilation_cache/cache_hits'


def last(task: setup_lib.Task, part: str = '') -> float | None:
  """Returns the seconds that compiling took the last time, None: never done.

  `part` names what is compiled of `task`, '' for all of it.
  """
  return _read(task).get(_key(task, part))


@contextlib.contextmanager
def noted(task: setup_lib.Task, part: str = '') -> Iterator[None]:
  """Notes what compiling `task` takes inside; JAX's cache is no news.

  Where that has had a part of it, the longer of this time and the last counts.
  """
  hits, thread = [], threading.get_ident()

  def listen(event, **about):
    if event == _HIT and threading.get_ident() == thread:
      hits.append(about)

  began = time.monotonic()
  jax.monitoring.register_event_listener(listen)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_listener(listen)
  path = _path(task)
  if path is None:
    return
  took = round(time.monotonic() - began, 1)
  with _writing, contextlib.suppress(OSError):  # It is not worth a run.
    key, known = _key(task, part), _read(task)
    before = known.pop(key, 0.0)
    known[key] = max(took, before) if hits else took
    files.write_json(path, dict(list(known.items())[-_KEPT:]))


def _path(task: setup_lib.Task) -> pathlib.Path | None:
  directory = paths.cache_dir(task.config)
  return directory / _FILE if directory else None


def _read(task: setup_lib.Task) -> dict[str, float]:
  path = _path(task)
  return (files.read_object(path) if path else None) or {}


def _key(task: setup_lib.Task, part: str) -> str:
  """Returns what stands for the steps of `task` and what compiles them."""
  device = jax.devices()[0].device_kind
  parts = (
    jax.__version__,
    f'{jax.device_count()} x {device}',
    repr(task.model),
    task.stage.optimizer,
    repr(list(task.train_steps)),
    part,
  )
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]

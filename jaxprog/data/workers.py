"""Threads or processes that fill batches ahead of the one being used."""

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import process as process_pool
from multiprocessing import shared_memory
from typing import Any

from jaxprog import errors
from jaxprog.data import batches as batches_lib

# Python runs in one thread at a time, about 0.1 ms of an image: all threads
# together prepare 10,000 images a second, which 16 decoders or 2 readers of raw
# images reach. Processes have no such limit, but take seconds to start.
_MAX_THREADS, _MAX_LIGHT_THREADS = 16, 2
# Rows that one task fills at least: handing it out takes as long as one.
_MIN_ROWS = 8
# Times that workers may die, with no batch in between, before it is an error.
_MAX_RESTARTS = 3
# How a worker ends whose start runs the user's script once more.
_UNGUARDED = 78


@dataclasses.dataclass
class _Buffer:
  """The memory of one batch."""

  layout: batches_lib.Layout
  batch: batches_lib.HostBatch
  memory: shared_memory.SharedMemory | None = None

  def release(self) -> None:
    """Gives shared memory back."""
    if self.memory is not None:
      self.batch = {}
      with contextlib.suppress(BufferError):  # Somebody still looks at it.
        self.memory.close()
      self.memory.unlink()
      self.memory = None


@dataclasses.dataclass
class _Pending:
  """A batch under way: rows -> the future that fills them."""

  step: int
  buffer: _Buffer
  tasks: dict[range, 'futures.Future[Any]']


class Reader(Iterator[batches_lib.HostBatch]):
  """The batches from `start` on, filled ahead of time; close it after use.

  A batch is valid until the second call of `next` after the one that returned
  it: its memory is used again. Bad images go to `bad`, by name.

  Attributes:
    bad: name -> reason of each image that could not be decoded.
    images: images that were read.
    busy: seconds that workers took for them, together.
    restarts: times that dead worker processes were replaced.
  """

  def __init__(
    self,
    batches: batches_lib.Batches,
    start: int = 0,
    *,
    num_workers: int = 0,
    kind: str = 'thread',
  ):
    self._batches, self._next = batches, start
    self._num_workers = num_workers
    self._kind = kind if num_workers else 'thread'
    self._pending: collections.deque[_Pending] = collections.deque()
    self._used: collections.deque[_Buffer] = collections.deque()
    self._free: list[_Buffer] = []
    self._token: pathlib.Path | None = None
    self._pool: futures.Executor | None = None
    self.bad: dict[str, str] = {}
    self.images, self.busy, self.restarts = 0, 0.0, 0
    if self._kind == 'process':
      self._token = _publish(batches)

  def __next__(self) -> batches_lib.HostBatch:
    while self._next < len(self._batches) and self._wants_more():
      self._begin(self._next)
      self._next += 1
    if not self._pending:
      raise StopIteration
    pending = self._pending[0]
    bad = self._finish(pending)
    self._pending.popleft()
    batches_lib.hide_bad(pending.buffer.batch, bad)
    self.bad.update((item.name, item.reason) for item in bad)
    self._used.append(pending.buffer)
    if len(self._used) > 1:
      self._free.append(self._used.popleft())
    return pending.buffer.batch

  def close(self) -> None:
    """Waits for what is under way and releases the memory."""
    for pending in self._pending:
      for task in pending.tasks.values():
        task.cancel()
    for pending in self._pending:
      futures.wait(pending.tasks.values())
      self._free.append(pending.buffer)
    self._next = len(self._batches)
    self._pending.clear()
    for buffer in [*self._free, *self._used]:
      buffer.release()
    self._free, self._used = [], collections.deque()
    if self._token:
      self._token.unlink(missing_ok=True)

  def __del__(self) -> None:
    with contextlib.suppress(Exception):
      self.close()

  def _wants_more(self) -> bool:
    """Returns whether each worker has not yet two tasks to do."""
    if not self._num_workers:
      return not self._pending
    tasks = sum(len(x.tasks) for x in self._pending)
    return len(self._pending) < 2 or tasks < 2 * self._num_workers

  def _begin(self, step: int) -> None:
    buffer = self._take_buffer(self._batches.layout(step))
    count = len(buffer.batch['mask'])
    rows = max(_MIN_ROWS, -(-count // max(1, self._num_workers)))
    tasks = {
      part: self._submit(step, part, buffer)
      for part in (
        range(i, min(i + rows, count)) for i in range(0, count, rows)
      )
    }
    self._pending.append(_Pending(step, buffer, tasks))

  def _submit(
    self, step: int, rows: range, buffer: _Buffer
  ) -> 'futures.Future[Any]':
    if not self._num_workers:
      future: futures.Future[Any] = futures.Future()
      future.set_result(_fill(self._batches, step, rows, buffer.batch))
      return future
    task: tuple[Any, ...] = _fill, self._batches, step, rows, buffer.batch
    if buffer.memory is not None:
      names = buffer.memory.name, buffer.layout
      task = _fill_shared, self._token, step, rows, *names
    self._pool = executor(self._kind, self._num_workers)
    try:
      return self._pool.submit(*task)
    except process_pool.BrokenProcessPool:
      self._replace_pool()
      return self._pool.submit(*task)

  def _finish(self, pending: _Pending) -> list[batches_lib.BadImage]:
    """Waits for a batch; replaces workers that died and asks them again."""
    for attempt in range(_MAX_RESTARTS + 1):
      try:
        results = [task.result() for task in pending.tasks.values()]
        break
      except process_pool.BrokenProcessPool:
        _check_guard(self._pool)
        if attempt == _MAX_RESTARTS:
          raise RuntimeError(
            f'Data workers died {_MAX_RESTARTS} times over batch '
            f'{pending.step}; is there enough memory?'
          ) from None
        self._restart()
    for _, seconds, count in results:
      self.busy += seconds
      self.images += count
    return [item for bad, _, _ in results for item in bad]

  def _restart(self) -> None:
    """Asks new workers for what the dead ones have left undone."""
    self._replace_pool()
    for pending in self._pending:
      for rows, task in pending.tasks.items():
        if not task.done() or task.exception() is not None:
          pending.tasks[rows] = self._submit(pending.step, rows, pending.buffer)

  def _replace_pool(self) -> None:
    if executor(self._kind, self._num_workers) is self._pool:
      executor.cache_clear()  # Else another reader has done it.
      self.restarts += 1
    self._pool = executor(self._kind, self._num_workers)

  def _take_buffer(self, layout: batches_lib.Layout) -> _Buffer:
    while self._free:
      buffer = self._free.pop()
      if buffer.layout == layout:
        return buffer
      buffer.release()  # A new phase: the old shapes are not needed.
    if self._token is None:
      return _Buffer(layout, batches_lib.allocate(layout))
    memory = _create_memory(layout)
    return _Buffer(layout, batches_lib.place(layout, memory.buf), memory)


def choose_kind(kind: str, num_workers: int, *, light: bool = False) -> str:
  """Returns 'thread' or 'process' for 'auto', else `kind`.

  Images are `light` if they need no decoding.
  """
  if kind != 'auto':
    return kind
  most = _MAX_LIGHT_THREADS if light else _MAX_THREADS
  return 'thread' if num_workers <= most else 'process'


@functools.cache
def executor(kind: str, num_workers: int) -> futures.Executor:
  """Returns the pool that all readers of this process share.

  It lives as long as the process: an evaluation begins at once.
  """
  if kind == 'thread':
    return futures.ThreadPoolExecutor(num_workers, 'jaxprog-loader')
  leave_if_starting()
  return futures.ProcessPoolExecutor(
    num_workers,
    mp_context=multiprocessing.get_context('spawn'),
    # Ctrl-C is the parent's: it waits for what is under way.
    initializer=signal.signal,
    initargs=(signal.SIGINT, signal.SIG_IGN),
  )


def leave_if_starting() -> None:
  """Ends a worker that is still starting; does nothing elsewhere.

  A worker imports the script that the user runs. One that trains when it is
  imported would do so in each worker, which has workers, and so on.
  """
  if getattr(multiprocessing.current_process(), '_inheriting', False):
    raise SystemExit(_UNGUARDED)


def _check_guard(pool: Any) -> None:
  """Raises UserError if workers of a broken pool left as they started."""
  workers = list((pool._processes or {}).values())
  if any(worker.exitcode == _UNGUARDED for worker in workers):
    raise errors.UserError(
      'Data workers are processes, which import the script that starts them, '
      'and it trains when it is imported.',
      str(getattr(sys.modules['__main__'], '__file__', 'this script')),
      "Put the call below if __name__ == '__main__': or set "
      "config.worker_kind = 'thread'.",
    ) from None


def _fill(
  batches: batches_lib.Batches,
  step: int,
  rows: range,
  batch: batches_lib.HostBatch,
) -> tuple[list[batches_lib.BadImage], float, int]:
  began = time.perf_counter()
  bad = batches.fill(step, rows, batch)
  return bad, time.perf_counter() - began, len(rows)


def _fill_shared(
  token: pathlib.Path,
  step: int,
  rows: range,
  name: str,
  layout: batches_lib.Layout,
) -> tuple[list[batches_lib.BadImage], float, int]:
  """Does the same in another process, which keeps nothing of the memory."""
  memory = shared_memory.SharedMemory(name)
  try:
    return _fill(
      _load(token), step, rows, batches_lib.place(layout, memory.buf)
    )
  finally:
    with contextlib.suppress(BufferError):  # A traceback still holds it.
      memory.close()


# In a worker: what it reads for each reader of its parent that is open.
_loaded: dict[pathlib.Path, batches_lib.Batches] = {}


def _load(token: pathlib.Path) -> batches_lib.Batches:
  """Returns what `_publish` was given; forgets what is no longer published."""
  if token not in _loaded:
    # Written by the parent into a directory that only its owner can write to.
    _loaded[token] = pickle.loads(token.read_bytes())
  for other in [x for x in _loaded if x != token and not x.exists()]:
    del _loaded[other]
  return _loaded[token]


def _publish(batches: batches_lib.Batches) -> pathlib.Path:
  """Returns a private file from which workers learn what to read."""
  handle, path = tempfile.mkstemp(prefix='jaxprog-loader-')
  with open(handle, 'wb') as file:
    pickle.dump(batches, file, protocol=pickle.HIGHEST_PROTOCOL)
  return pathlib.Path(path)


def _create_memory(layout: batches_lib.Layout) -> shared_memory.SharedMemory:
  size = batches_lib.count_bytes(layout)
  memory = shared_memory.SharedMemory(create=True, size=size)
  try:
    # Without this, a full /dev/shm kills the process at the first write.
    os.posix_fallocate(memory._fd, 0, size)  # type: ignore[attr-defined]
  except OSError as e:
    memory.close()
    memory.unlink()
    raise errors.UserError(
      f'There is not enough shared memory for {size:,} bytes.',
      '/dev/shm',
      'Give the container more (--shm-size), or set '
      "--config.worker_kind='thread'.",
    ) from e
  return memory

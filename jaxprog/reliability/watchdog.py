"""Ends a run that has stopped making progress, and shows where it hangs."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jaxprog.reliability import signals

# Seconds between two looks, at most.
_INTERVAL = 5.0
# A look that comes this late, in seconds, means that the whole process was
# suspended: that time does not count.
_SUSPENDED = 30.0
# Seconds for the last words; a full pipe or a dead file server takes none.
_LAST_WORDS = 10.0


class Watchdog:
  """Ends the process with exit code 1 after `minutes` without a beat.

  A hung collective or loader cannot be unwound. What was last heard and the
  stacks of all threads go to stderr, and are appended to `log`; then
  `on_timeout` is called with the text.

  A context manager; `minutes=0` turns it off. Python code that never gives
  the interpreter free (C code with a lock on it) is found after twice the
  time, without `on_timeout`.
  """

  def __init__(
    self,
    minutes: float,
    *,
    log: str | os.PathLike[str] | None = None,
    on_timeout: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    self._limit = 60 * minutes
    self._interval = min(_INTERVAL, self._limit / 4)
    self._log = None if log is None else pathlib.Path(log)
    self._on_timeout = on_timeout
    self._clock = clock
    self._last = 'the start'
    self._heard = self._looked = clock()
    self._paused = False
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name='watchdog', daemon=True
    )

  def beat(self, text: str) -> None:
    """Notes that there is progress: `text` says what has just begun."""
    self._last, self._heard = text, self._clock()

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Allows what is inside to take arbitrarily long."""
    self._paused = True
    try:
      yield
    finally:
      self._heard = self._clock()
      self._paused = False

  def is_overdue(self) -> bool:
    """Returns whether the last beat is too long ago; called at intervals."""
    now = self._clock()
    late = now - self._looked - self._interval
    self._looked = now
    if late > _SUSPENDED:
      self._heard += late
    if not self._limit or self._paused:
      return False
    return now - self._heard > self._limit

  def __enter__(self) -> 'Watchdog':
    self._heard = self._looked = self._clock()
    if self._limit:
      self._thread.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._closed.set()
    if self._limit:
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    while not self._closed.is_set():
      # A thread of C code, for when no thread of Python gets to run.
      patience = 2 * self._limit + self._interval
      faulthandler.dump_traceback_later(patience, exit=True, file=2)
      if self.is_overdue():
        self._end()
      self._closed.wait(self._interval)

  def _end(self) -> None:
    """Says what there is to say, and leaves in any case."""
    last_words = threading.Thread(
      target=self._report, name='watchdog-report', daemon=True
    )
    last_words.start()
    last_words.join(_LAST_WORDS)
    signals.leave_now('', 1)

  def _report(self) -> None:
    minutes = self._limit / 60
    text = f'Watchdog: no progress for {minutes:g} minutes, since {self._last}.'
    with contextlib.suppress(OSError):
      if self._log is not None:
        with open(self._log, 'ab') as file:
          _dump(text, file.fileno())
    with contextlib.suppress(OSError):
      _dump(text, 2)
    try:
      if self._on_timeout is not None:
        self._on_timeout(text)
    finally:
      for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _dump(text: str, file: int) -> None:
  """Writes `text` and the stacks of all threads to an open file."""
  os.write(file, f'{text}\n'.encode())
  faulthandler.dump_traceback(file=file, all_threads=True)

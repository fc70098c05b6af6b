"""Turns SIGTERM and Ctrl-C into a planned end, wherever they arrive."""

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from jaxprog import errors

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# timeout(1) and terminals signal a process and then its group: this close
# together, in seconds, two signals are one request.
_ONE_REQUEST = 0.2
# Seconds for the main thread to leave in when there is nothing to save: it may
# be in a compiler that knows no signals.
_GRACE = 1.5
# Takes away what stands at the foot of a terminal, and shows the cursor.
_CLEAR = b'\r\x1b[J\x1b[?25h'

# The one whose handlers are installed; inner ones reuse it.
_active: 'StopRequest | None' = None
# Told why, before this process leaves on a signal.
_on_leaving: Callable[[str, int], None] | None = None


class StopRequest:
  """The answer to the first SIGTERM or Ctrl-C; the second one acts at once.

  A context manager: outside of it the signals do what they did before. The
  first signal raises `Stopped` in the main thread, except within `deferred`,
  where there is something to save: it only sets `signum` there.

  With `owns_process`, as the command line has it, the process also ends where
  the main thread cannot listen: 1.5 s after the first signal outside of
  `deferred`, at once after a second one. Without it, a notebook survives: a
  second Ctrl-C raises KeyboardInterrupt.

  An inner one is the outer one again. Only the main thread may listen; in
  another one (a notebook's server, a test) it never asks to stop.

  Attributes:
    signum: the signal to stop for, None if there is none. In a run of several
      processes it is None until all stop, within `deferred`.
    agreed: whether all processes stop, because `poll` has said so to each.
  """

  def __init__(self, *, owns_process: bool = False) -> None:
    self.signum: int | None = None
    self.agreed = False
    # What came to this process, before the others know of it.
    self._received: int | None = None
    self._peers: Any = None
    self._owns_process = owns_process
    self._deferred = 0
    self._since = 0.0
    self._previous: dict[int, object] = {}
    self._resources = contextlib.ExitStack()

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Keeps signals until the caller, who asks for `signum`, has saved.

    Raises:
      Stopped: at either end, if a signal came that nobody has answered.
    """
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    self._raise_if_asked()
    self._deferred += 1
    try:
      yield
    finally:
      self._deferred -= 1
    self._raise_if_asked()

  def share(self, peers: Any) -> None:
    """Lets several processes stop at the same call of `poll`.

    Of these `peers.Peers` it needs `ask`, and `reached` for what is due.
    """
    self._peers = peers

  def poll(self, save: bool = False) -> bool:
    """Returns whether to save now, and sets `signum` if it is time to stop.

    Called after each step. `save`: the clock says so here; of several
    processes, the first one's clock decides, or they would save different
    steps.
    """
    if self._peers is None:
      return save
    if save:
      self._peers.ask('save')
    due = self._peers.reached()
    for wish in due:
      word, _, signum = wish.partition(' ')
      if word == 'stop':
        self.signum, self.agreed = int(signum), True
    return 'save' in due

  def __enter__(self) -> 'StopRequest':
    """Starts to listen; returns the outer one if there is one."""
    global _active
    if threading.current_thread() is not threading.main_thread():
      return self
    if _active is not None:
      _active._install()  # jax.distributed puts its own handler there.
      return _active
    self._previous = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    self._start_listener()
    _active = self
    self._install()
    return self

  def __exit__(self, exc_type: object, *exc_info: object) -> None:
    global _active
    if _active is not self:
      return
    answered = self._received
    self._deferred += 1  # Nothing may be raised before all is restored.
    for signum, handler in self._previous.items():
      # None: installed by C code, which Python cannot restore.
      signal.signal(signum, handler or signal.SIG_DFL)  # type: ignore[arg-type]
    self._resources.close()
    self._deferred -= 1
    _active = None
    if answered is None and exc_type is None:
      self._raise_if_asked()

  def _raise_if_asked(self) -> None:
    if self._received is not None and not self._deferred:
      self.signum = self._received
      raise errors.Stopped(self._received)

  def _install(self) -> None:
    for signum in _SIGNALS:
      signal.signal(signum, self._handle)

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    """Runs in the main thread, once that executes Python."""
    now = time.monotonic()
    if self._received is None:
      self._received, self._since = signum, now
      if self._peers is None or not self._deferred:
        self.signum = signum
      if not self._deferred:
        raise errors.Stopped(signum)
    elif now - self._since >= _ONE_REQUEST:
      self._answer_second(signum)
      signal.default_int_handler(signum, frame)

  def _answer_second(self, signum: int) -> None:
    """Leaves, but for a guest's Ctrl-C."""
    if self._owns_process or signum != signal.SIGINT:
      name = signal.Signals(signum).name
      leave_now(f'Stopped by a second signal, {name}.', 128 + signum)

  def _start_listener(self) -> None:
    """Lets a thread know of signals as they come, whatever others do."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(
      target=self._listen, args=[reader], name='signals', daemon=True
    )
    thread.start()
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # In the order opposite to this one: the thread ends when it reads nothing.
    self._resources.callback(reader.close)
    self._resources.callback(thread.join, 1.0)
    self._resources.callback(writer.close)
    self._resources.callback(signal.set_wakeup_fd, previous)

  def _listen(self, reader: socket.socket) -> None:
    first, came, left = 0, 0.0, 0.0
    while True:
      reader.settimeout(0.1 if first else None)
      try:
        data = reader.recv(1)
        if not data:
          return
      except TimeoutError:
        data = b'\0'
      now = time.monotonic()
      if data[0] in _SIGNALS:
        if not first:
          first, came, left = data[0], now, now
          if self._peers is not None and self._deferred:
            self._peers.ask(f'stop {first}')
        elif now - came >= _ONE_REQUEST:
          self._answer_second(data[0])
      if not first or self._deferred:
        left = now
      elif self._owns_process and now - left > _GRACE:
        text = f'Stopped by {signal.Signals(first).name}.'
        if _on_leaving is not None:
          _on_leaving(text, 128 + first)
        leave_now(text, 128 + first)


def hold_off() -> Callable[[], None]:
  """Lets what must end well go on after a first signal, until what it returns.

  Unlike `deferred` it raises nothing; a second signal still acts at once.
  """
  request = _active
  if request is None or (
    threading.current_thread() is not threading.main_thread()
  ):
    return lambda: None
  request._deferred += 1

  def release():
    request._deferred -= 1

  return release


def on_leaving(tell: Callable[[str, int], None] | None) -> None:
  """Has `tell` told text and exit code before a signal ends this process."""
  global _on_leaving
  _on_leaving = tell


def leave(code: int) -> None:
  """Ends the process with `code`, waiting for no thread and no child.

  Python's own exit joins threads of executors, which may compile for minutes.
  """
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  leave_now('', code)


def leave_now(text: str, code: int) -> None:
  """Ends the process like `leave`, from any thread and from a handler.

  It flushes nothing: whoever holds a stream may be what hangs.
  """
  with contextlib.suppress(Exception):
    for stream in [x for x in (1, 2) if os.isatty(x)][:1]:
      os.write(stream, _CLEAR)
    say(text)
    for child in multiprocessing.active_children():
      child.kill()
  os._exit(code)


def say(text: str) -> None:
  """Writes `text` to stderr, from any thread, past Python's streams."""
  with contextlib.suppress(OSError):
    # A pipe that nobody reads must not keep us.
    if text and select.select([], [2], [], 0)[1]:
      os.write(2, f'{text}\n'.encode())

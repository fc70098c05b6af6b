"""Turns SIGTERM and Ctrl-C into a request that the loop can answer."""

import signal
from types import FrameType


class StopRequest:
  """Remembers the first SIGTERM or SIGINT; the second one acts at once.

  A context manager: outside of it the signals do what they did before. Only
  the main thread may enter it for real; in another one (a notebook's server,
  a test) it never asks to stop.
  """

  def __init__(self) -> None:
    self.signum: int | None = None
    self._previous: dict[int, object] = {}

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    del frame
    self.signum = signum
    # Not what they did before: shells ignore Ctrl-C for background jobs.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def _restore(self) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)  # type: ignore[arg-type]
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    """Starts to listen."""
    for signum in (signal.SIGTERM, signal.SIGINT):
      try:
        self._previous[signum] = signal.signal(signum, self._handle)
      except ValueError:  # Not in the main thread.
        break
    return self

  def __exit__(self, *exc_info: object) -> None:
    """Stops listening."""
    self._restore()

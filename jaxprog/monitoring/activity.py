"""Says what is being done, so that no wait is silent.

  with activity.doing('compiling stage 2 of 4', last=70):

On a terminal the innermost of what is being done stands in the last line of
the screen, below all that is printed; in a notebook below the run's tables.
Anywhere else it is a line of `key=value`, when something new has begun and
whenever nothing was said for ten seconds. One thread sees to all of it; a bar
of a run is one more thing being done.
"""

import contextlib
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TextIO

from jaxprog import formats

_TICK_SECONDS = 0.25
# What lasts shorter has no line of its own; and the longest silence between
# two lines.
_BRIEF_SECONDS, _SILENT_SECONDS = 1.0, 8.0
# Of a bar beside a text, in characters.
_BAR_WIDTH = 24
_ERASE = '\r\x1b[J\x1b[?25h'

# How far a thing is: show(done, total), and what it is about now.
Show = Callable[..., None]


class Activity:
  """One thing that is being done, by the clock of `time.monotonic`."""

  def __init__(
    self,
    what: str,
    began: float,
    *,
    last: float | None = None,
    unit: str = '',
    draw: Callable[[], list[str]] | None = None,
  ):
    self.what, self.began, self.unit = what, began, unit
    self.last, self.draw = last, draw
    self.part, self.done, self.total = '', 0, 0
    # Whether a line has told that it has begun.
    self.is_said = False

  def show(self, done: int, total: int, part: str = '') -> None:
    """Notes that so much of `part` is done, of so much in all."""
    self.part, self.done, self.total = part, done, total

  def event(self, now: float) -> str:
    """Returns it as a line of `key=value`."""
    values: dict[str, Any] = {'what': self._name()}
    if self.total:
      values |= {'done': self.done, 'total': self.total}
    values['seconds'] = round(now - self.began)
    if self.last is not None:
      values['last_seconds'] = round(self.last)
    return event('doing', **values)

  def line(self, now: float, width: int, ascii_only: bool = False) -> str:
    """Returns it as a line of at most `width`."""
    head, tail = self._name(), self._took(now)
    room = width - len(head) - len(tail) - 2
    if self.total and room >= _BAR_WIDTH // 2:
      size = min(room, _BAR_WIDTH)
      return f'{head} {bar(self.done / self.total, size, ascii_only)} {tail}'
    return self.text(now)[:width]

  def text(self, now: float) -> str:
    """Returns it in words."""
    return f'{self._name()}: {self._took(now)}'

  def _name(self) -> str:
    return ', '.join(filter(None, (self.what, self.part)))

  def _took(self, now: float) -> str:
    took = formats.duration(now - self.began)
    if self.total:
      return f'{self._count()}  {took}'
    if self.last is not None:
      took += f', about {formats.duration(self.last)} the last time'
    return took

  def _count(self) -> str:
    match self.unit:
      case 'bytes':
        return f'{formats.size(self.done)} of {formats.size(self.total)}'
      case 'percent':
        return f'{self.done / self.total:4.0%}'
      case _:
        total = f'{self.total:,}'
        return f'{self.done:>{len(total)},}/{total}'


def bar(part: float, width: int, ascii_only: bool = False) -> str:
  """Returns a bar of `width` characters of which a `part` is full.

  What is empty is thin and dim, on any background.
  """
  full, empty = ('=', '-') if ascii_only else ('━', '─')
  count = round(width * min(max(part, 0.0), 1.0))
  return f'\x1b[32m{full * count}\x1b[0m\x1b[2m{empty * (width - count)}\x1b[0m'


def event(kind: str, **values: Any) -> str:
  """Returns a line of `key=value`, to be searched with grep."""
  return ' '.join(
    f'{k}={_format_value(v)}' for k, v in {'event': kind, **values}.items()
  )


def _format_value(value: Any) -> str:
  """Returns a value without spaces, quoted where it has some."""
  if isinstance(value, float):
    return f'{value:.6g}'
  if isinstance(value, bool) or value is None:
    return {True: 'true', False: 'false', None: '-'}[value]
  text = str(value)
  return f'"{text}"' if re.search(r'\s', text) else text


class _Above:
  """A stream whose text goes above what stands at the foot of the screen."""

  def __init__(self, stream: TextIO, display: '_Display'):
    self._stream, self._display = stream, display

  def write(self, text: str) -> int:
    return self._display.write_above(self._stream, text)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


class _Display:
  """Shows the innermost activity; of one process, whatever its threads do."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self.clock = clock
    self.stream_name = 'stderr'
    # A worker imports the user's script, and loads again what that loads.
    self.is_silent = multiprocessing.current_process().name != 'MainProcess'
    self._lock = threading.RLock()
    self._activities: list[Activity] = []
    self._thread: threading.Thread | None = None
    self._is_over = threading.Event()
    # When a line was last said, where there is no screen.
    self._said = clock()
    # Where the foot is drawn, while one may be; and whether it stands there.
    self._screen: TextIO | None = None
    self._is_drawn = self._is_in_line = False
    self._is_notebook = False

  def enter(self, activity: Activity) -> None:
    with self._lock:
      self._activities.append(activity)
      if self.is_silent:
        return
      if self._thread is None:
        self._open()
      is_first = self._said == -math.inf
      if is_first and self._screen is None and not self._is_notebook:
        self._say(activity)

  def leave(self, activity: Activity) -> None:
    with self._lock:
      if activity in self._activities:
        self._activities.remove(activity)
      thread = self._thread
      if self._activities or thread is None:
        return
      self._is_over.set()
      self._close()
    thread.join(1.0)  # It may hang in a pipe that nobody reads.

  def hear(self, at: float | None = None) -> None:
    """Notes that others have printed a line, now or at another time."""
    self._said = self.clock() if at is None else at

  def silence(self) -> None:
    with self._lock:
      self.erase()
      self.is_silent = True

  def tick(self) -> None:
    """Draws the foot anew, or says a line if one is due."""
    with self._lock:
      if not self._activities or self._thread is None or self.is_silent:
        return
      if self._screen is not None:
        self.draw()
        return
      now, inner = self.clock(), self._activities[-1]
      is_long = now - inner.began >= _BRIEF_SECONDS
      if self._is_notebook:
        if is_long:
          _notebook().say(inner.text(now))
        return
      is_new = is_long and not inner.is_said
      if is_new or now - self._said >= _SILENT_SECONDS:
        self._say(inner)

  def draw(self) -> None:
    """Draws the foot: a run's bar, and below it what is done beside it."""
    with self._lock:
      screen = self._screen
      is_free = self._activities and not self._is_in_line
      if screen is None or self.is_silent or not is_free:
        return
      inner, lines = self._activities[-1], []
      for activity in self._activities:
        if activity.draw is not None:
          lines = activity.draw()
      if inner.draw is None:
        width = shutil.get_terminal_size().columns - 1
        lines.append(inner.line(self.clock(), width, is_ascii(screen.encoding)))
      # The cursor goes back to where the next text is to be written.
      up = f'\x1b[{len(lines) - 1}A' if len(lines) > 1 else ''
      screen.write('\x1b[?25l\r\x1b[J' + '\n'.join(lines) + up + '\r')
      screen.flush()
      self._is_drawn = True

  def erase(self) -> None:
    """Takes the foot away, until it is drawn again."""
    if self._screen is not None and self._is_drawn:
      self._screen.write(_ERASE)
      self._screen.flush()
      self._is_drawn = False

  def write_above(self, stream: TextIO, text: str) -> int:
    with self._lock:
      if text:
        self.erase()
        self._is_in_line = not text.endswith('\n')
      return stream.write(text)

  def _open(self) -> None:
    """Begins to show; a terminal's streams go above the foot from here on."""
    self._is_in_line = False
    self._is_notebook = _is_notebook()
    streams = [getattr(sys, name) for name in (self.stream_name, 'stdout')]
    screens = [x for x in streams if x is not None and can_draw(x)]
    if screens and not self._is_notebook:
      self._screen = screens[0]
      for name in ('stdout', 'stderr'):
        one = getattr(sys, name)
        if one is not None and one.isatty():
          setattr(sys, name, _Above(one, self))
    self._is_over = threading.Event()
    self._thread = threading.Thread(
      target=self._work, args=(self._is_over,), name='activity', daemon=True
    )
    self._thread.start()

  def _close(self) -> None:
    self.erase()
    if self._is_notebook:
      _notebook().say('')
    self._screen = self._thread = None
    for name in ('stdout', 'stderr'):
      one = getattr(sys, name)
      if isinstance(one, _Above):
        setattr(sys, name, one._stream)

  def _work(self, is_over: threading.Event) -> None:
    while not is_over.wait(_TICK_SECONDS):
      # A stream that is gone is no reason to end a run.
      with contextlib.suppress(OSError, ValueError):
        self.tick()

  def _say(self, activity: Activity) -> None:
    """Says a line of an activity."""
    activity.is_said, self._said = True, self.clock()
    stream = getattr(sys, self.stream_name)
    if stream is not None:
      stream.write(f'{activity.event(self._said)}\n')
      stream.flush()


_display = _Display()


@contextlib.contextmanager
def doing(
  what: str,
  *,
  last: float | None = None,
  since: float | None = None,
  unit: str = '',
) -> Iterator[Show]:
  """Says for how long `what` is being done, while it is.

  `last` is how many seconds it took the last time, `since` when it began, if
  that was before. Yields show(done, total, part=''), to say how far it is, in
  `unit`: '' for a number of things, 'bytes' or 'percent'.
  """
  began = _display.clock() if since is None else since
  found = Activity(what, began, last=last, unit=unit)
  try:  # A signal may raise as soon as it has been entered.
    _display.enter(found)
    yield found.show
  finally:
    _display.leave(found)


class Bar:
  """What a run draws at the foot of a terminal; `draw` returns its lines."""

  def __init__(self, what: str, draw: Callable[[], list[str]] | None = None):
    self._activity = Activity(what, _display.clock(), draw=draw)
    self._activity.is_said = True  # Its run says more of it.
    _display.enter(self._activity)

  def show(self, done: int, total: int, part: str = '') -> None:
    """Notes how far it is, for where there is no terminal."""
    self._activity.show(done, total, part)

  def refresh(self) -> None:
    """Draws it anew."""
    _display.draw()

  def close(self) -> None:
    """Takes it away."""
    _display.leave(self._activity)


def use(stream: str) -> None:
  """Names the stream for all from now on; what comes next is said at once.

  'stderr', if nobody says otherwise, or 'stdout'.
  """
  _display.stream_name = stream
  _display.hear(at=-math.inf)


def silence() -> None:
  """Says nothing from now on: another process does."""
  _display.silence()


def hear() -> None:
  """Notes that a line has been printed just now: nobody waits in silence."""
  _display.hear()


def can_draw(stream: IO[str]) -> bool:
  """Returns whether lines of a stream can be drawn anew."""
  return (
    stream.isatty()
    and os.environ.get('TERM') not in ('dumb', 'unknown')
    and not os.environ.get('NO_COLOR')
  )


def is_ascii(encoding: str | None) -> bool:
  """Returns whether a stream of that encoding cannot show a bar's lines."""
  return not (encoding or 'utf-8').lower().startswith('utf')


def _is_notebook() -> bool:
  if 'ipykernel' not in sys.modules:  # Rich would be loaded for nothing.
    return False
  import rich.console

  return rich.console.Console().is_jupyter


def _notebook() -> Any:
  """Returns what shows it in a notebook, loaded only there."""
  from jaxprog.monitoring import notebook

  return notebook

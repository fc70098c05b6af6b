"""What people see while many runs go on at once: a line each.

On a terminal they stand at its foot and are drawn anew; a line that is printed
goes above them. Anywhere else each is a line of `key=value`, now and then.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import rich.console

from jaxprog import formats
from jaxprog.monitoring import activity, progress
from jaxprog.monitoring.standing import Running

# Between two times that all are told; in between it is said how many there are.
_LINE_SECONDS = 60.0
# Longer names are cut in the middle: what tells runs apart is at their ends.
_LONG = 32
# Lines of a terminal that are not for runs: titles, what is done beside them.
_OTHER_LINES = 4


class Seen(NamedTuple):
  """How far all is: runs that are over, of how many, and those under way.

  `running` has names; `seconds_left` are those until all is over, if known.
  """

  over: int
  total: int
  running: Sequence[tuple[str, Running]]
  seconds_left: float | None


class Fleet:
  """Shows runs that go on elsewhere; close it."""

  def __init__(
    self,
    console: rich.console.Console,
    what: str,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._console, self._what, self._clock = console, what, clock
    self._seen = Seen(0, 0, (), None)
    self._next_line = -math.inf
    self._draws = activity.can_draw(console.file)
    draw = self._draw if self._draws else None
    self._bar = activity.Bar(what, draw)

  def show(self, seen: Seen) -> None:
    """Shows how far all is from now on."""
    self._seen = seen
    self._bar.show(seen.over, seen.total, f'{len(seen.running)} under way')
    if not self._draws and self._clock() >= self._next_line:
      self._next_line = self._clock() + _LINE_SECONDS
      self._print(seen)

  def close(self) -> None:
    """Takes the lines away."""
    self._bar.close()

  def _print(self, seen: Seen) -> None:
    lines = [
      activity.event(
        'runs',
        over=seen.over,
        total=seen.total,
        running=len(seen.running),
        left=formats.duration(seen.seconds_left),
      )
    ]
    for name, run in seen.running:
      at = run.standing
      lines.append(
        activity.event(
          'run',
          run=name,
          on=run.where,
          stage=run.stage,
          epoch=run.epoch,
          step=f'{at["step"]}/{at["total_steps"]}' if at else None,
          top1=at.get('top1'),
          images_per_second=at.get('images_per_second'),
          left=formats.duration(at.get('seconds_left')),
        )
      )
    for line in lines:
      self._console.print(line, soft_wrap=True, markup=False, highlight=False)
    activity.hear()

  def _draw(self) -> list[str]:
    console = self._console
    return draw(
      self._what,
      self._seen,
      console.width,
      console.height - _OTHER_LINES,
      activity.is_ascii(console.encoding),
    )


def draw(
  what: str, seen: Seen, width: int, height: int, is_ascii: bool = False
) -> list[str]:
  """Returns a bar of all runs, titles, and as many runs as `height` allows."""
  head = f'{what} '
  left = formats.duration(seen.seconds_left)
  tail = f' {seen.over}/{seen.total}' + (
    f'   left {left}' if seen.total else ''
  )
  room = max(width - len(head) - len(tail) - 1, 4)
  bar = activity.bar(seen.over / max(seen.total, 1), room, is_ascii)
  lines = [f'\x1b[1m{head}\x1b[0m{bar}{tail}']
  if not seen.running:
    return lines
  shown = seen.running[: max(height, 1)]
  columns = progress.fit_columns(
    [
      progress.Column(
        title,
        max(len(title), *map(len, map(show, shown))),
        rank,
        show,
        left=left_aligned,
      )
      for title, rank, left_aligned, show in _COLUMNS
    ],
    width - 1,
  )
  titles = progress.join_cells(columns, [x.title for x in columns], '  ')
  lines.append(f'\x1b[2m{titles}\x1b[0m')
  lines += [
    progress.join_cells(columns, [x.show(run) for x in columns], '  ')
    for run in shown
  ]
  if rest := len(seen.running) - len(shown):
    lines.append(f'and {rest} more under way')
  return [x if '\x1b' in x else x[: width - 1] for x in lines]


_Named = tuple[str, Running]


def _value(field: str) -> Callable[[_Named], str]:
  return lambda named: formats.cell(field, named[1].standing)


def _name(named: _Named) -> str:
  name = named[0]
  return name if len(name) <= _LONG else f'{name[:19]}...{name[-10:]}'


# Title, rank (the highest goes first), whether it is text, and what stands.
_COLUMNS: tuple[tuple[str, int, bool, Callable[[_Named], str]], ...] = (
  ('run', 0, True, _name),
  ('on', 6, True, lambda x: x[1].where),
  ('stage', 5, True, lambda x: x[1].stage),
  ('epoch', 1, False, lambda x: x[1].epoch),
  ('top-1', 3, False, _value('top1')),
  ('images/s', 4, False, _value('images_per_second')),
  (
    'left',
    2,
    False,
    lambda x: formats.duration(x[1].standing.get('seconds_left')),
  ),
)

"""What a notebook shows: a run's tables and what is being done, in place."""

import dataclasses
import io
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
from markupsafe import Markup

from jaxprog import formats

_REFRESH_SECONDS = 0.5
# Fields of a row of the history, and what they are called.
_COLUMNS = {
  'train_loss': 'train loss',
  'val_loss': 'val loss',
  'train_top1': 'train top-1',
  'val_top1': 'val top-1',
  'val_top5': 'val top-5',
  'ema_top1': 'EMA top-1',
  'learning_rate': 'rate',
  'seconds': 'time',
  'images_per_second': 'images/s',
}
# What is being done another thread may say.
_lock = threading.RLock()
_NOTHING = Markup()
_TABLE = Markup('<table><thead>{}</thead><tbody>{}</tbody></table>')
_ROW = Markup('<tr>{}</tr>')
_HEAD = Markup('<th style="text-align:right">{}</th>')
_CELL = Markup('<td style="text-align:right">{}</td>')
_BEST = Markup('<td style="text-align:right"><b>{}</b></td>')
_TITLE = Markup('<p><b>{}</b> {}</p>')
_SAID = Markup('<p>{}</p>')
_STATUS = Markup('<p><progress value="{}" max="{}"></progress> {}</p>')
_MESSAGES = Markup(
  '<details><summary>{} messages</summary><pre>{}</pre></details>'
)


@dataclasses.dataclass
class _Stage:
  """A stage so far: what stands above its rows, and these."""

  title: str
  said: str
  columns: list[str]
  rows: list[Markup] = dataclasses.field(default_factory=list)

  def html(self) -> Markup:
    title = _TITLE.format(self.title, self.said)
    if not self.rows:
      return title
    names = ['epoch', *(_COLUMNS[x] for x in self.columns)]
    head = _ROW.format(_NOTHING.join(map(_HEAD.format, names)))
    return title + _TABLE.format(head, _NOTHING.join(self.rows))


class View:
  """One output of a cell, written anew as the run goes on."""

  def __init__(self, *, quiet: bool = False):
    """Shows nothing yet, and if `quiet` never anything."""
    self.cell, self.is_taken = _count_cells(), False
    self._quiet = quiet
    self._handle: Any = None
    self._next_refresh = -math.inf
    self._stages: list[_Stage] = []
    self._status = _NOTHING
    self._said = ''
    self._messages: list[str] = []

  def describe(self, stages: Sequence[Any]) -> None:
    """Shows nothing: each stage is shown as it begins."""

  def begin(self, at: Any, details: Mapping[str, Any]) -> None:
    """Begins the table of a stage."""
    title = f'stage {at.index + 1}/{at.num_stages}: {at.name}'
    said = ', '.join(f'{k}: {v}' for k, v in details.items())
    columns = [x for x in _COLUMNS if at.averages or x != 'ema_top1']
    self._stages.append(_Stage(title, said, columns))
    self._next_refresh = -math.inf

  def update(self, at: Any, now: float) -> None:
    """Shows how far it is, at most twice a second."""
    if now < self._next_refresh:
      return
    self._next_refresh = now + _REFRESH_SECONDS
    done, total = at.evaluating or at.epoch_steps
    what = 'evaluation' if at.evaluating else 'epoch'
    left = ', '.join(
      f'{formats.duration(x)} {name}' for name, x in at.left.items()
    )
    text = f'{what} {at.epoch}/{at.num_epochs}, {done}/{total}'
    self._status = _STATUS.format(
      done, total, f'{text}; left: {left}' if left else text
    )
    self._show()

  def row(self, at: Any, row: Mapping[str, Any], best: bool) -> None:
    """Adds an epoch to the table, bold if it is the best so far."""
    stage, cell = self._stages[-1], _BEST if best else _CELL
    cells = [f'{row["epoch"]}/{at.num_epochs}']
    cells += [formats.cell(x, row) for x in stage.columns]
    stage.rows.append(_ROW.format(_NOTHING.join(map(cell.format, cells))))
    self._next_refresh = -math.inf

  def end(self, at: Any, stage: Mapping[str, Any]) -> None:
    """Says how a stage ended."""
    best = stage['best'] or {'epoch': '-', 'top1': None}
    self._stages[-1].said = (
      f'{stage["status"].replace("_", " ")}, best top-1 '
      f'{formats.percent(best["top1"])} at epoch {best["epoch"]}, '
      f'{formats.duration(stage["seconds"])}'
    )
    self._status = _NOTHING
    self._show()

  def message(self, text: rich.console.RenderableType) -> None:
    """Keeps `text`, folded below the tables."""
    buffer = io.StringIO()
    console = rich.console.Console(
      file=buffer,
      width=100,
      force_jupyter=False,
      force_terminal=False,
      color_system=None,
      markup=False,
    )
    console.print(text, soft_wrap=isinstance(text, str), highlight=False)
    self._messages.append(buffer.getvalue().rstrip())
    self._show()

  def close(self) -> None:
    """Leaves what is shown, without a bar."""
    self._status = _NOTHING
    self._show()

  def say(self, text: str) -> None:
    """Writes what is being done below all else, '' for nothing."""
    if text != self._said:
      self._said = text
      self._show()

  def _show(self) -> None:
    from IPython import display

    if self._quiet:
      return
    with _lock:
      plain = 'A run of jaxprog.' if self._stages else self._said
      data = {'text/html': self._html(), 'text/plain': plain}
      if self._handle is None:
        self._handle = display.display(data, raw=True, display_id=True)
      else:
        self._handle.update(data, raw=True)

  def _html(self) -> str:
    parts = [stage.html() for stage in self._stages]
    if self._messages:
      said = '\n'.join(self._messages)
      parts.append(_MESSAGES.format(len(self._messages), said))
    doing = _SAID.format(self._said) if self._said else _NOTHING
    return str(_NOTHING.join([*parts, self._status, doing]))


# Where what is being done is said.
_current: View | None = None


def open_view(*, quiet: bool) -> View:
  """Returns what a run is shown in, below which other things are said.

  One output is enough: that of what was done in this cell before the run.
  """
  global _current
  if quiet:
    return View(quiet=True)
  with _lock:
    if (view := _view_of_cell()) is None or view.is_taken:
      view = _current = View()
    view.is_taken = True
    return view


def say(text: str) -> None:
  """Says what is being done, below the run of this cell if it has one."""
  global _current
  with _lock:
    view = _view_of_cell()
    if view is None and text:
      view = _current = View()
    if view is not None:
      view.say(text)


def _view_of_cell() -> View | None:
  return _current if _current and _current.cell == _count_cells() else None


def _count_cells() -> int:
  from IPython import get_ipython

  shell = get_ipython()
  return shell.execution_count if shell else 0

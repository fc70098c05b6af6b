"""What people see while a run goes on.

On a terminal: one table row for each finished epoch, and below the rows a bar
that is drawn anew at most eight times a second. Anywhere else, with NO_COLOR
or on a dumb terminal: lines of `key=value`, to be searched with grep; what
takes long besides is said by `activity`. In a notebook: tables in one output.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.rule
import rich.text

from jaxprog import formats
from jaxprog.monitoring import activity, notebook, standing

_REFRESH_SECONDS = 1 / 8
_LINE_SECONDS = 8.0
# The rate of the last minute or so: long enough to be steady, short enough to
# follow a machine that slows down.
_RATE_SECONDS = 60.0


class Description(NamedTuple):
  """What follows from the config and the datasets, known before training."""

  name: str
  num_train_images: int
  num_classes: int
  image_size: int
  batch_size: int
  total_steps: int
  warmup_steps: int
  peak_learning_rate: float
  final_learning_rate: float
  parameters: int

  @property
  def pixels(self) -> float:
    """All pixels the stage will see: what its time is taken to grow with."""
    return self.total_steps * self.batch_size * self.image_size**2


@dataclasses.dataclass
class _Standing:
  """Where a stage stands; `step` counts its finished steps.

  `epoch_ends` are the steps finished at the end of each epoch.
  """

  index: int
  num_stages: int
  name: str
  epoch: int
  step: int
  epoch_ends: tuple[int, ...]
  # Whether averaged weights are evaluated beside the others.
  averages: bool
  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Seconds left of the epoch, the stage and the run, as far as known.
  left: dict[str, float] = dataclasses.field(default_factory=dict)
  # Evaluation batches done, and all of them.
  evaluating: tuple[int, int] | None = None
  # Of the last evaluation.
  top1: float | None = None

  @property
  def num_epochs(self) -> int:
    """Epochs begun in the whole stage; the last one may be shorter."""
    return len(self.epoch_ends)

  @property
  def total_steps(self) -> int:
    """Steps of the whole stage."""
    return self.epoch_ends[-1]

  @property
  def epoch_steps(self) -> tuple[int, int]:
    """Steps done and to do in this epoch."""
    begin, end = (0, *self.epoch_ends)[self.epoch - 1 : self.epoch + 1]
    return self.step - begin, end - begin


class Progress:
  """Shows a run; close it, or use it in a `with` statement.

  Time left comes from the steps of the last minute. The stages still to come
  are taken to need, for each pixel of a training image, as long as this one;
  evaluation costs what it cost last time. Larger images use a device better,
  so this is a first estimate, which each stage corrects.
  """

  def __init__(
    self,
    num_stages: int,
    *,
    console: rich.console.Console | None = None,
    clock: Callable[[], float] = time.monotonic,
    workdir: pathlib.Path | None = None,
  ):
    """Tells those outside too where it stands, if there is a `workdir`."""
    self._workdir = workdir
    self._teller: standing.Teller | None = None
    self._num_stages = num_stages
    self._clock = clock
    self._remarks: list[str] = []
    self._stages: Sequence[Description] = ()
    self._at: _Standing
    self._timer: _Timer
    console = console or rich.console.Console(markup=False)
    self._view: notebook.View | _PlainView | _LiveView
    if console.is_jupyter:
      self._view = notebook.open_view(quiet=console.quiet)
    elif not activity.can_draw(console.file):
      self._view = _PlainView(console)
    else:
      self._view = _LiveView(console)

  def start_run(self, stages: Sequence[Description]) -> None:
    """Shows what will be trained: the `stages` of this run."""
    self._stages = stages
    self._view.describe(stages)

  def start_stage(
    self,
    index: int,
    name: str,
    epoch_ends: Sequence[int],
    start_step: int = 0,
    *,
    averages: bool = False,
    **details: Any,
  ) -> None:
    """Announces the stage at `index` (from 0); `details` are shown as given.

    With `averages`, rows have ema_top1 too.
    """
    self._timer = _Timer(self._clock)
    ends = tuple(epoch_ends)
    epoch = bisect.bisect_right(ends[:-1], start_step) + 1
    self._at = _Standing(
      index, self._num_stages, name, epoch, start_step, ends, averages
    )
    self._view.begin(self._at, details)
    self._show()
    if self._workdir is not None and self._teller is None:
      self._teller = standing.Teller(self._workdir, self._describe)

  def step(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows that `step` steps of the stage are done.

    Args:
      step: counts from the beginning of the stage, also after a resume.
      metrics: loss, top1, learning_rate, grad_norm, images_per_second,
        input_wait (a part of the epoch's time) and device_memory or
        process_memory (bytes), as far as known; what is left out keeps its
        last value.
    """
    at = self._at
    self._timer.train(step)
    at.epoch = bisect.bisect_left(at.epoch_ends, step) + 1
    at.step, at.evaluating = step, None
    at.metrics = {**at.metrics, **metrics}  # Another thread draws them.
    self._show()

  def evaluate(self, step: int, total: int) -> None:
    """Shows that `step` of `total` evaluation batches are done."""
    self._timer.evaluate(finished=step >= total)
    self._at.evaluating = step, total
    self._show()

  def end_epoch(self, row: Mapping[str, Any], is_best: bool) -> None:
    """Shows a row of the history, marked if it is the best so far."""
    at = self._at
    at.top1 = row['val_top1']
    self._timer.pause()
    self._view.row(at, row, is_best)
    while self._remarks:
      self._view.message(self._remarks.pop(0))
    if at.epoch < at.num_epochs:
      at.epoch, at.evaluating = at.epoch + 1, None
    self._show()

  def end_stage(self, stage: Mapping[str, Any]) -> None:
    """Shows how a stage of the history ended."""
    self._view.end(self._at, stage)

  def message(self, text: rich.console.RenderableType) -> None:
    """Prints `text`, or anything that rich can print, above the bar."""
    self._view.message(text)

  def remark(self, text: str) -> None:
    """Prints `text` below the next row: a table begins with its rows."""
    self._remarks.append(text)

  def close(self) -> None:
    """Takes the bar away; everything else stays."""
    self._view.close()
    if self._teller is not None:
      self._teller.close()
      self._teller = None

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def _describe(self) -> dict[str, Any]:
    """Returns where the run stands; see standing.Running."""
    at = self._at
    return {
      'stage': at.name,
      'index': at.index,
      'num_stages': at.num_stages,
      'epoch': at.epoch,
      'num_epochs': at.num_epochs,
      'step': at.step,
      'total_steps': at.total_steps,
      'top1': at.top1,
      'images_per_second': at.metrics.get('images_per_second'),
      'seconds_left': at.left.get('run'),
    }

  def _show(self) -> None:
    self._at.left = self._seconds_left(self._at)
    self._view.update(self._at, self._clock())

  def _seconds_left(self, at: _Standing) -> dict[str, float]:
    per_step = self._timer.seconds_per_step()
    if per_step is None:
      return {}
    evaluation = self._timer.evaluation_seconds or 0.0
    done, steps = at.epoch_steps
    batch, batches = at.evaluating or (0, 1)
    epoch = (steps - done) * per_step + evaluation * (1 - batch / batches)
    stage = (at.total_steps - at.step) * per_step
    stage += evaluation * (at.num_epochs - at.epoch + 1 - batch / batches)
    left = {'epoch': epoch, 'stage': stage}
    if at.index + 1 == self._num_stages:
      left['run'] = stage
    elif self._stages:
      whole = at.total_steps * per_step + at.num_epochs * evaluation
      ahead = sum(x.pixels for x in self._stages[at.index + 1 :])
      left['run'] = stage + whole * ahead / self._stages[at.index].pixels
    return left


class _Timer:
  """Seconds of a training step, and of an evaluation, in one stage."""

  def __init__(self, clock: Callable[[], float]):
    self._clock = clock
    self._seconds = self._steps = 0.0
    # The time and the number of the last step seen; None after a pause, and
    # before the first step, which is spent on compilation.
    self._last: tuple[float, int] | None = None
    self._evaluation_began: float | None = None
    self.evaluation_seconds: float | None = None

  def train(self, step: int) -> None:
    now = self._clock()
    if self._last is not None and step > self._last[1]:
      seconds, steps = now - self._last[0], step - self._last[1]
      decay = math.exp(-seconds / _RATE_SECONDS)
      self._seconds = self._seconds * decay + seconds
      self._steps = self._steps * decay + steps
    self._last = now, step

  def evaluate(self, finished: bool) -> None:
    last, self._last = self._last, None
    if self._evaluation_began is None:
      self._evaluation_began = last[0] if last else self._clock()
    if finished:
      self.evaluation_seconds = self._clock() - self._evaluation_began
      self._evaluation_began = None

  def pause(self) -> None:
    self._last = self._evaluation_began = None

  def seconds_per_step(self) -> float | None:
    return self._seconds / self._steps if self._steps else None


class _PlainView:
  """Lines of `key=value`; a line on steps at most every `_LINE_SECONDS`."""

  def __init__(self, console: rich.console.Console):
    self._console = console
    self._next_line, self._said_step = 0.0, -1
    self._bar: activity.Bar | None = None

  def describe(self, stages: Sequence[Description]) -> None:
    for stage in stages:
      values = stage._asdict()
      self._print('plan', stage=values.pop('name'), **values)

  def begin(self, at: _Standing, details: Mapping[str, Any]) -> None:
    self.close()
    self._bar = activity.Bar(f'training {at.name}')
    self._next_line, self._said_step = -math.inf, -1
    self._print(
      'stage',
      stage=at.name,
      index=f'{at.index + 1}/{at.num_stages}',
      total_steps=at.total_steps,
      epochs=at.num_epochs,
      start_step=at.step,
      **details,
    )

  def update(self, at: _Standing, now: float) -> None:
    if self._bar:
      part = 'evaluation of ' if at.evaluating else ''
      part += f'epoch {at.epoch} of {at.num_epochs}'
      self._bar.show(*(at.evaluating or at.epoch_steps), part)
    is_new = at.metrics and at.step != self._said_step
    if now < self._next_line or at.evaluating or not is_new:
      return
    self._next_line, self._said_step = now + _LINE_SECONDS, at.step
    self._print(
      'step',
      stage=at.name,
      epoch=f'{at.epoch}/{at.num_epochs}',
      step=f'{at.step}/{at.total_steps}',
      **at.metrics,
      **{f'{k}_left': formats.duration(v) for k, v in at.left.items()},
    )

  def row(self, at: _Standing, row: Mapping[str, Any], best: bool) -> None:
    values = {k: v for k, v in row.items() if k != 'epoch'}
    epoch = f'{row["epoch"]}/{at.num_epochs}'
    self._print('epoch', stage=at.name, epoch=epoch, **values, best=best)

  def end(self, at: _Standing, stage: Mapping[str, Any]) -> None:
    self.close()
    best = stage['best'] or {'epoch': None, 'top1': None}
    self._print(
      'stage_end',
      stage=at.name,
      status=stage['status'],
      best_top1=best['top1'],
      best_epoch=best['epoch'],
      seconds=stage['seconds'],
    )

  def message(self, text: rich.console.RenderableType) -> None:
    self._console.print(text, soft_wrap=True, markup=False, highlight=False)
    activity.hear()

  def close(self) -> None:
    if self._bar:
      self._bar.close()
      self._bar = None

  def _print(self, kind: str, **values: Any) -> None:
    self.message(activity.event(kind, **values))


class _LiveView:
  """A bar below a growing table, for a terminal of any width."""

  def __init__(self, console: rich.console.Console):
    self._console = console
    self._bar: activity.Bar | None = None
    self._next_refresh = -math.inf
    self._columns: list[Column] = []
    self._gap = ''
    self._width = 0  # That the columns were chosen for.

  def describe(self, stages: Sequence[Description]) -> None:
    columns = [
      Column(
        title,
        max(len(title), *map(len, map(show, stages))),
        rank,
        show,
        left=title == 'stage',
      )
      for title, rank, show in _STAGE_COLUMNS
    ]
    columns = fit_columns(columns, self._console.width)
    gap = find_gap(columns, self._console.width)
    self._line(join_cells(columns, [c.title for c in columns], gap), 'bold')
    for stage in stages:
      self._line(join_cells(columns, [c.show(stage) for c in columns], gap))
    self._line('')

  def begin(self, at: _Standing, details: Mapping[str, Any]) -> None:
    title = f'stage {at.index + 1}/{at.num_stages}  {at.name}'
    self._console.print(
      rich.rule.Rule(
        rich.text.Text(title), characters='-', align='left', style='dim'
      )
    )
    for line in _pack(
      [f'{k}: {v}' for k, v in details.items()],
      self._console.width,
    ):
      self._line(line, 'dim')
    self._begin_table(at)
    self.close()
    self._bar = activity.Bar(f'training {at.name}', lambda: self._draw(at))

  def update(self, at: _Standing, now: float) -> None:
    if self._bar and now >= self._next_refresh:
      self._next_refresh = now + _REFRESH_SECONDS
      self._bar.refresh()

  def row(self, at: _Standing, row: Mapping[str, Any], best: bool) -> None:
    if self._console.width != self._width:
      self._begin_table(at)
    epoch = f'{row["epoch"]}/{at.num_epochs}'
    cells = [epoch, *(c.show(row) for c in self._columns[1:])]
    line = join_cells(self._columns, cells, self._gap)
    self._line(f'{line} *' if best else line, 'green' if best else '')

  def end(self, at: _Standing, stage: Mapping[str, Any]) -> None:
    self.close()
    parts = [f'{at.name}: {stage["status"].replace("_", " ")}']
    if best := stage['best']:
      top1 = formats.percent(best['top1'])
      parts.append(f'best top-1 {top1} at epoch {best["epoch"]}')
    parts.append(f'time {formats.duration(stage["seconds"])}')
    for line in _pack(parts, self._console.width):
      self._line(line, 'bold')
    self._line('')

  def message(self, text: rich.console.RenderableType) -> None:
    self._console.print(text, markup=False, highlight=False)
    self._next_refresh = -math.inf  # It has taken the bar away.

  def close(self) -> None:
    if self._bar:
      self._bar.close()
      self._bar = None

  def _draw(self, at: _Standing) -> list[str]:
    """Returns the bar, metrics and times left, for the width of now."""
    width, height = self._console.width, self._console.height
    is_ascii = activity.is_ascii(self._console.encoding)
    lines = _fit_phrases(_phrases(at), width, height - 2)
    return [_bar_line(at, width, is_ascii), *lines]

  def _begin_table(self, at: _Standing) -> None:
    """Prints titles of as many columns as the terminal is wide for now."""
    self._width = self._console.width
    epoch_width = max(5, 2 * len(str(at.num_epochs)) + 1)
    columns = [Column('epoch', epoch_width, 0, left=True)] + [
      Column(title, width, rank, functools.partial(formats.cell, field), group)
      for title, width, rank, field, group in _ROW_COLUMNS
      if at.averages or field != 'ema_top1'
    ]
    # Two more columns are for the mark of the best row.
    self._columns = fit_columns(columns, self._width - 2)
    self._gap = find_gap(self._columns, self._width - 2)
    dash = '-' if activity.is_ascii(self._console.encoding) else '─'
    self._line(_group_line(self._columns, self._gap, dash), 'dim')
    titles = [c.title for c in self._columns]
    self._line(join_cells(self._columns, titles, self._gap), 'bold')

  def _line(self, text: str, style: str = '') -> None:
    self._console.print(
      rich.text.Text(text, style), no_wrap=True, overflow='crop', crop=True
    )


def _bar_line(at: _Standing, width: int, is_ascii: bool) -> str:
  """Returns stage, epoch, a bar and steps, of `width` in all."""
  done, total = at.evaluating or at.epoch_steps
  task = 'eval ' if at.evaluating else 'epoch'
  head = f'{task} {at.epoch}/{at.num_epochs} '
  tail = f' {done:>{len(str(total))}}/{total}'
  stage = f'stage {at.index + 1}/{at.num_stages}  '
  if len(stage + head + tail) + _MIN_BAR <= width:
    head = stage + head
  room = max(_MIN_BAR, width - len(head) - len(tail))
  bar = activity.bar(done / max(total, 1), room, is_ascii)
  return f'\x1b[1m{head}\x1b[0m{bar}{tail}'


_MIN_BAR = 4
# The group of the times left.
_LEFT = 2


class _Phrase(NamedTuple):
  """A part of the status; the highest `rank` goes first where room is short.

  Phrases of one `group` begin a line of their own, unless there is room beside
  the group before; the first that is shown of the times left says what they
  are.
  """

  text: str
  rank: int
  group: int


def _phrases(at: _Standing) -> list[_Phrase]:
  """Returns phrases of constant length, so that the lines never jump."""
  values = at.metrics
  if not values:
    return [_Phrase('waiting for the first step', 0, 0)]
  epoch, stage, run = (
    formats.duration(at.left.get(x)) for x in ('epoch', 'stage', 'run')
  )
  kind = next((k for k in values if k.endswith('_memory')), 'memory')
  label = kind.replace('_', ' ')
  return [
    _Phrase(f'loss {formats.cell("loss", values):>7}', 0, 0),
    _Phrase(f'top-1 {formats.cell("top1", values):>6}', 1, 0),
    _Phrase(f'lr {formats.cell("learning_rate", values):>8}', 5, 0),
    _Phrase(f'grad norm {formats.cell("grad_norm", values):>7}', 7, 0),
    _Phrase(f'images/s {formats.cell("images_per_second", values):>6}', 4, 1),
    _Phrase(f'input wait {formats.cell("input_wait", values):>6}', 8, 1),
    _Phrase(f'{label} {formats.cell(kind, values):>7}', 9, 1),
    _Phrase(f'{epoch:>7} epoch', 6, _LEFT),
    _Phrase(f'{stage:>7} stage', 3, _LEFT),
    _Phrase(f'{run:>7} run', 2, _LEFT),
  ]


def _fit_phrases(
  known: Sequence[_Phrase], width: int, height: int
) -> list[str]:
  """Returns at most `height` lines of at most `width`, groups kept together."""
  shown = list(known)
  while True:
    lines: list[str] = []
    for group, phrases in itertools.groupby(shown, lambda p: p.group):
      texts = [p.text for p in phrases]
      if group == _LEFT:
        texts[0] = f'left {texts[0]}'
      packed = _pack(texts, width)
      if len(packed) == 1:
        packed = _pack([*lines[-1:], *packed], width)
        del lines[-1:]
      lines += packed
    if len(lines) <= max(height, 1) or len(shown) == 1:
      return lines
    shown.remove(max(shown, key=lambda p: p.rank))


# Spaces between two columns, at most.
_MAX_GAP = 8


class Column(NamedTuple):
  """A column; the highest `rank` is the first to go when width is short.

  Texts are aligned `left`, numbers right.
  """

  title: str
  width: int
  rank: int
  show: Callable[[Any], str] = str
  group: str = ''
  left: bool = False


# Title, width, rank, field of a row, and what stands above the title.
_ROW_COLUMNS = (
  ('loss', 7, 3, 'train_loss', 'train'),
  ('top-1', 6, 2, 'train_top1', 'train'),
  ('loss', 7, 3, 'val_loss', 'val'),
  ('top-1', 6, 1, 'val_top1', 'val'),
  ('ema', 6, 4, 'ema_top1', 'val'),
  ('top-5', 6, 6, 'val_top5', 'val'),
  ('lr', 8, 7, 'learning_rate', ''),
  ('grad norm', 9, 9, 'grad_norm', ''),
  ('images/s', 8, 8, 'images_per_second', ''),
  ('input wait', 10, 10, 'input_wait', ''),
  ('time', 8, 5, 'seconds', 'm:ss'),
)

_STAGE_COLUMNS: tuple[tuple[str, int, Callable[[Description], str]], ...] = (
  ('stage', 0, lambda s: s.name),
  ('images', 2, lambda s: f'{s.num_train_images:,}'),
  ('classes', 3, lambda s: str(s.num_classes)),
  ('px', 1, lambda s: str(s.image_size)),
  ('batch', 9, lambda s: str(s.batch_size)),
  ('steps', 4, lambda s: str(s.total_steps)),
  ('warmup', 6, lambda s: str(s.warmup_steps)),
  ('peak lr', 5, lambda s: f'{s.peak_learning_rate:.3g}'),
  ('last lr', 7, lambda s: f'{s.final_learning_rate:.2g}'),
  ('params', 8, lambda s: formats.count(s.parameters)),
)


def fit_columns(columns: Sequence[Column], width: int) -> list[Column]:
  """Returns the columns that fit into `width`, two spaces between them."""
  shown = list(columns)
  while len(shown) > 1 and sum(c.width + 2 for c in shown) - 2 > width:
    shown.remove(max(shown, key=lambda c: c.rank))
  return shown


def find_gap(columns: Sequence[Column], width: int) -> str:
  """Returns what is between two columns, where they share `width`."""
  room = width - sum(c.width for c in columns)
  return ' ' * min(_MAX_GAP, max(2, room // max(len(columns) - 1, 1)))


def join_cells(
  columns: Sequence[Column], cells: Sequence[str], gap: str
) -> str:
  """Returns a line of cells."""
  return gap.join(
    cell.ljust(column.width) if column.left else cell.rjust(column.width)
    for column, cell in zip(columns, cells, strict=True)
  )


def _group_line(columns: Sequence[Column], gap: str, dash: str) -> str:
  """Returns what stands above the titles: what several have in common."""
  parts = []
  for group, found in itertools.groupby(columns, lambda c: c.group):
    width = len(gap.join(' ' * c.width for c in found))
    several = width > max(c.width for c in columns)
    parts.append(
      f' {group} '.center(width, dash)
      if group and several
      else group.rjust(width)
    )
  return gap.join(parts).rstrip()


def _pack(parts: Sequence[str], width: int) -> list[str]:
  """Returns lines of at most `width`, broken only between parts."""
  lines: list[str] = []
  for part in parts:
    if lines and len(lines[-1]) + 3 + len(part) <= width:
      lines[-1] += f'   {part}'
    else:
      lines.append(part)
  return lines


def sparkline(values: Sequence[float], width: int) -> str:
  """Returns `values` as `width` bars, from 0 to the largest."""
  top = max(values) or 1.0
  at = [round(i * (len(values) - 1) / (width - 1)) for i in range(width)]
  return ''.join('▁▂▃▄▅▆▇█'[round(7 * values[i] / top)] for i in at)

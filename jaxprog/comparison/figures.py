"""Pictures of a comparison: grids, ordered cells, curves over their cost."""

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.colors
import matplotlib.figure
import matplotlib.text
import matplotlib.ticker
import numpy as np

from jaxprog import files
from jaxprog.comparison import statistics, tables
from jaxprog.comparison.statistics import Axis, Estimate, Record

Axes = matplotlib.axes.Axes
Figure = matplotlib.figure.Figure

# Okabe and Ito's colours without the yellow, too faint for lines on white.
COLORS = (
  *('#0072b2', '#d55e00', '#009e73', '#cc79a7'),
  *('#000000', '#56b4e9', '#e69f00'),
)
# The next seven lines have the same colours and another dash.
DASHES = ('-', (0, (5, 1.5)), (0, (1, 1)))
INK, SOFT, GRID = '#333333', '#6b6b6b', '#e6e6e6'
# Even in lightness and without red against green.
MAP = 'cividis'

_TITLES: Mapping[Axis, str] = {
  'images': 'training images',
  'flops': 'training FLOPs',
  'seconds': 'seconds',
  'epochs': 'epochs',
}
_LADDER_AXES: tuple[Axis, ...] = ('images', 'flops', 'seconds')
_DPI = 130
_TITLE_SIZE, _SIZE, _SMALL = 13, 9.5, 8.5
# Points of a longer curve would run into one another.
_MAX_MARKERS = 12
# Letters that fit the width of a cell.
_CELL_WIDTH = 12
# Longer names do not fit two to a line under the curves of a grid.
_HALF_WIDTH = 20
# Stage ends of two arms closer than this part of the axis are one line.
_SAME_BOUNDARY = 0.02


class Grid(NamedTuple):
  """A comparison of two fields of the config: keys, and values as text."""

  row_key: str
  column_key: str
  rows: tuple[str, ...]
  columns: tuple[str, ...]


def plot_comparison(
  runs: Sequence[Record],
  path: str | os.PathLike[str],
  *,
  keys: tuple[str, str] | None = None,
  reference: str = '',
  axis: Axis = 'images',
  best: int = 4,
) -> None:
  """Writes the picture of cells that were compared at one budget.

  Args:
    runs: of all cells.
    path: replaced atomically.
    keys: overrides along the rows and columns of a heat map; None: the two that
      vary, if no other does and each pair of their values is a cell. Else the
      cells stand in the order of their means, with a dot for each seed.
    reference: a cell whose mean is marked; ''; none is.
    axis: the cost that the curves of the best cells are drawn over.
    best: how many curves there are.
  """
  grid = find_grid(runs, keys)
  if grid is None:
    _save(draw_forest(runs, reference), path)
  else:
    _save(draw_grid(runs, grid, axis=axis, best=best), path)


def plot_ladder(
  runs: Sequence[Record],
  path: str | os.PathLike[str],
  *,
  target: float | None = None,
) -> None:
  """Writes accuracy over images, FLOPs and seconds, for each arm.

  Args:
    runs: of all arms; costs include the stages before the one evaluated.
    path: replaced atomically.
    target: top-1 in [0, 1], drawn as a line.
  """
  _save(draw_ladder(runs, target), path)


def find_grid(
  runs: Sequence[Record], keys: tuple[str, str] | None = None
) -> Grid | None:
  """Returns the grid that the overrides of `runs` span, or None."""
  overrides = [run['overrides'] for run in runs]
  names = dict.fromkeys(key for fields in overrides for key in fields)
  values = {
    name: tuple(dict.fromkeys(_text(f.get(name)) for f in overrides))
    for name in names
  }
  if keys is None:
    varying = [name for name in names if len(values[name]) > 1]
    if len(varying) != 2:
      return None
    keys = (varying[0], varying[1])
  if not all(key in values for key in keys):
    return None
  grid = Grid(*keys, values[keys[0]], values[keys[1]])
  cells = {_place(grid, run) for run in runs}
  complete = len(cells) == len(grid.rows) * len(grid.columns)
  return grid if complete else None


def draw_grid(
  runs: Sequence[Record], grid: Grid, *, axis: Axis = 'images', best: int = 4
) -> Figure:
  """Returns a heat map of mean top-1, beside curves of the `best` cells."""
  width = max(4.2, 1.15 * len(grid.columns) + 1.6)
  height = max(4.2, 0.82 * len(grid.rows) + 1.5)
  figure = _figure(width + 5.6, height)
  heat, curves = figure.subplots(1, 2, width_ratios=(width, 5.2))
  by_place: dict[tuple[str, str], list[Record]] = {}
  for run in runs:
    by_place.setdefault(_place(grid, run), []).append(run)
  _draw_heat(heat, grid, by_place)
  ranked = _ranked(statistics.by_cell(runs))
  chosen = dict([(c, r) for c, r in ranked if statistics.done(r)][:best])
  _draw_curves(curves, chosen, axis, _styles(chosen))
  _bare(curves)
  _limit_accuracy(curves)
  curves.set_ylabel('top-1 (%)', color=INK, fontsize=_SIZE)
  title = 'Mean and 95% interval of the best cells'
  curves.set_title(title, loc='left', fontsize=_SIZE + 1, color=INK)
  if chosen:
    columns = 2 if max(map(len, chosen)) <= _HALF_WIDTH else 1
    curves.legend(
      loc='upper center', bbox_to_anchor=(0.5, -0.14), **_legend_style(columns)
    )
  _title(figure, f'{grid.row_key} and {grid.column_key}, compared')
  return figure


def draw_forest(runs: Sequence[Record], reference: str = '') -> Figure:
  """Returns the cells in the order of their means: dots and 95% intervals."""
  ranked = _ranked(statistics.by_cell(runs))
  figure = _figure(9.5, 0.42 * len(ranked) + 1.9)
  axes = figure.add_subplot()
  _bare(axes)
  axes.grid(visible=False, axis='y')
  for i, (_, cell_runs) in enumerate(ranked):
    _draw_row(axes, i, cell_runs)
  mean = _mean(dict(ranked).get(reference, ()))
  if mean is not None:
    axes.axvline(100 * mean, color=SOFT, linewidth=1, linestyle=':')
  positions = range(len(ranked))
  axes.set_yticks(positions, [_shorten(cell) for cell, _ in ranked])
  axes.set_ylim(len(ranked) - 0.5, -0.5)
  axes.set_xlabel('final top-1 (%)', color=INK, fontsize=_SIZE)
  numbers = axes.secondary_yaxis('right')
  numbers.set_yticks(positions, [_row_text(r) for _, r in ranked])
  numbers.tick_params(length=0, labelsize=_SIZE, colors=INK)
  numbers.spines['right'].set_visible(False)
  _title(figure, 'Cells by mean: each seed, mean and 95% interval')
  return figure


def draw_ladder(runs: Sequence[Record], target: float | None = None) -> Figure:
  """Returns three panels: accuracy over images, over FLOPs, over seconds."""
  cells = statistics.by_cell(runs)
  arms = dict(_ranked(cells))
  figure = _figure(14, 4.9 + 0.24 * -(-len(arms) // 3))
  alone = [arm for arm in arms if not _has_earlier_stages(arms[arm])]
  # By first appearance: an arm has one colour, whatever its rank.
  styles = _styles(cells, dashed=alone if len(alone) < len(arms) else ())
  panels = figure.subplots(1, 3, sharey=True)
  for axes, axis in zip(panels, _LADDER_AXES, strict=True):
    _draw_curves(axes, arms, axis, styles)
    _bare(axes)
    axes.set_xlim(left=0)
    _limit_accuracy(axes, target)
    if target is not None:
      axes.axhline(100 * target, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    _mark_boundaries(figure, axes, arms, axis)
  panels[0].set_ylabel('top-1 (%)', color=INK, fontsize=_SIZE)
  if target is not None:
    panels[-1].annotate(
      f'target\n{100 * target:.1f}%',
      (1.01, 100 * target),
      xycoords=('axes fraction', 'data'),
      va='center',
      color=INK,
      fontsize=_SMALL,
    )
  handles, labels = panels[0].get_legend_handles_labels()
  if handles:
    figure.legend(
      handles, labels, loc='outside lower center', **_legend_style(3)
    )
  _title(
    figure, 'Accuracy over cost, all stages counted: mean and 95% interval'
  )
  return figure


def _figure(width: float, height: float) -> Figure:
  figure = Figure(figsize=(width, height), dpi=_DPI, layout='constrained')
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  return figure


def _title(figure: Figure, text: str) -> None:
  figure.suptitle(
    text, x=0.01, ha='left', fontsize=_TITLE_SIZE, color=INK, weight='bold'
  )


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', metadata={'Software': None})
  files.write_bytes(path, buffer.getvalue())


def _bare(axes: Axes) -> None:
  """Leaves of the frame what guides the eye."""
  axes.grid(color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors=INK, length=0, labelsize=_SIZE)
  for side in ('top', 'right', 'left'):
    axes.spines[side].set_visible(False)
  axes.spines['bottom'].set_color('#bbbbbb')


def _legend_style(columns: int) -> dict[str, Any]:
  return {
    'ncols': columns,
    'frameon': False,
    'fontsize': _SIZE,
    'labelcolor': INK,
    'handlelength': 2.6,
  }


def _draw_heat(
  axes: Axes, grid: Grid, runs: Mapping[tuple[str, str], Sequence[Record]]
) -> None:
  means = np.full((len(grid.rows), len(grid.columns)), np.nan)
  for (row, column), cell_runs in runs.items():
    mean = _mean(cell_runs)
    place = grid.rows.index(row), grid.columns.index(column)
    means[place] = np.nan if mean is None else 100 * mean
  colors = matplotlib.colormaps[MAP].with_extremes(bad='#eeeeee')
  image = axes.imshow(means, cmap=colors, aspect='auto')
  for (row, column), cell_runs in runs.items():
    i, j = grid.rows.index(row), grid.columns.index(column)
    back = (
      image.cmap(image.norm(means[i, j])) if means[i, j] == means[i, j] else 'w'
    )
    axes.text(
      j,
      i,
      _cell_text(cell_runs),
      ha='center',
      va='center',
      fontsize=_SIZE,
      color=_on(back),
    )
  names = [textwrap.fill(_shorten(x), _CELL_WIDTH) for x in grid.columns]
  axes.set_xticks(range(len(grid.columns)), names)
  axes.set_yticks(range(len(grid.rows)), map(_shorten, grid.rows))
  axes.tick_params(length=0, labelsize=_SIZE, colors=INK)
  axes.set_xlabel(grid.column_key, color=INK, fontsize=_SIZE)
  axes.set_ylabel(grid.row_key, color=INK, fontsize=_SIZE)
  axes.spines[:].set_visible(False)
  title = 'Final top-1 (%): mean, ± std, runs'
  axes.set_title(title, loc='left', fontsize=_SIZE + 1, color=INK)


def _draw_curves(
  axes: Axes,
  cells: Mapping[str, Sequence[Record]],
  axis: Axis,
  styles: Mapping[str, Mapping[str, Any]],
) -> None:
  """Draws each cell's mean and interval; the accuracies stay those possible."""
  for cell, runs in cells.items():
    curve, style = statistics.mean_curve(runs, axis), styles[cell]
    if curve is None:
      _draw_single(axes, runs, axis, style)
      continue
    axes.plot(
      curve.grid,
      100 * curve.mean,
      label=f'{_shorten(cell)} (n = {len(statistics.done(runs))})',
      linewidth=1.8,
      marker='o',
      markersize=3.5 if curve.grid.size <= _MAX_MARKERS else 0,
      **style,
    )
    if curve.low is not None and curve.high is not None:
      axes.fill_between(
        curve.grid,
        100 * curve.low.clip(0, 1),
        100 * curve.high.clip(0, 1),
        color=style['color'],
        alpha=0.13,
        linewidth=0,
      )
  axes.set_xlabel(_TITLES[axis], color=INK, fontsize=_SIZE)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
  if axis == 'images':
    axes.xaxis.set_major_formatter(lambda x, _: tables.format_count(x))


def _draw_single(
  axes: Axes, runs: Sequence[Record], axis: Axis, style: Mapping[str, Any]
) -> None:
  """Draws each seed by itself: no costs are common to all of them."""
  finished = statistics.done(runs)
  for run in finished:
    x, y = statistics.points(run, axis)
    axes.plot(x, 100 * y, linewidth=0.8, alpha=0.7, **style)
  if finished:
    axes.annotate(
      'thin: single seeds, which\nhave no costs in common',
      (0.98, 0.03),
      xycoords='axes fraction',
      ha='right',
      color=SOFT,
      fontsize=_SMALL,
    )


def _limit_accuracy(axes: Axes, target: float | None = None) -> None:
  """Lets the means fill the panel; intervals of two runs may be all of it."""
  lines = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
  if not lines:
    return
  values = np.concatenate(lines)
  low, high = values.min(), max(values.max(), 100 * (target or 0))
  room = 0.2 * max(high - low, 1.0)
  axes.set_ylim(max(low - room, -1), min(high + room, 101))


def _mark_boundaries(
  figure: Figure, axes: Axes, arms: Mapping[str, Sequence[Record]], axis: Axis
) -> None:
  """Draws a line where earlier stages end, with their names above the panel.

  A name that would touch the one before it stands a line higher.
  """
  right = axes.get_xlim()[1]
  renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
  ends: list[float] = []
  for x, name in _boundaries(arms, axis, _SAME_BOUNDARY * right):
    axes.axvline(x, color=SOFT, linewidth=1, linestyle=(0, (1, 2)))
    text = axes.annotate(
      f'{_shorten(name, 20)} ends',
      (x, 1.0),
      xycoords=('data', 'axes fraction'),
      xytext=(0, 3),
      textcoords='offset points',
      ha='left',
      va='bottom',
      color=SOFT,
      fontsize=_SMALL,
    )
    # The layout is settled later, and leaves the panels about this wide.
    width = text.get_window_extent(renderer).width / (4.2 * _DPI) * right
    if x + width > right:
      text.set_horizontalalignment('right')
    begin = x - width if x + width > right else x
    level = next(
      (i for i, end in enumerate(ends) if begin > end + 0.02 * right), len(ends)
    )
    ends[level:] = [begin + width, *ends[level + 1 :]]
    text.set_position((0, 3 + 11 * level))


def _boundaries(
  arms: Mapping[str, Sequence[Record]], axis: Axis, distance: float
) -> list[tuple[float, str]]:
  """Returns where the earlier stages of all arms end, close ones as one."""
  found: dict[tuple[str, str], list[float]] = {}
  for arm, runs in arms.items():
    for run in statistics.done(runs):
      for boundary in statistics.earlier_stages(run):
        found.setdefault((arm, boundary['stage']), []).append(boundary[axis])
  merged: list[tuple[float, str]] = []
  places = sorted((float(np.mean(v)), k[1]) for k, v in found.items())
  for x, stage in places:
    same = [y for y, name in merged if name == stage and x - y < distance]
    if not same:
      merged.append((x, stage))
  return merged


def _draw_row(axes: Axes, i: int, runs: Sequence[Record]) -> None:
  scores = list(statistics.final_scores(runs).values())
  if not scores:
    return
  e = statistics.estimate(scores)
  # Seeds lie below the interval, so that neither hides the other.
  axes.plot(
    [100 * x.top1 for x in scores],
    [i + 0.22] * len(scores),
    linestyle='',
    marker='o',
    markersize=4.5,
    color=COLORS[0],
    alpha=0.55,
    markeredgewidth=0,
  )
  if e.low is not None and e.high is not None:
    axes.plot([100 * e.low, 100 * e.high], [i, i], color=INK, linewidth=1.6)
  axes.plot([100 * e.mean], [i], marker='D', markersize=5.5, color=COLORS[1])


def _row_text(runs: Sequence[Record]) -> str:
  scores = list(statistics.final_scores(runs).values())
  lost = _lost(runs)
  if not scores:
    return lost or 'no run yet'
  e = statistics.estimate(scores)
  text = f'{100 * e.mean:.1f}'
  if e.low is not None and e.high is not None:
    text += f' [{100 * e.low:.1f}, {100 * e.high:.1f}]'
  return ', '.join(filter(None, [f'{text}  n = {e.n}', lost]))


def _cell_text(runs: Sequence[Record]) -> str:
  e = _estimate(runs)
  lost = _lost(runs)
  if e is None:
    return lost or 'no run yet'
  spread = '' if e.std is None else f'\n± {100 * e.std:.1f}'
  text = f'{100 * e.mean:.1f}{spread}\nn = {e.n}'
  return f'{text}\n{lost}' if lost else text


def _lost(runs: Sequence[Record]) -> str:
  counts = [
    (sum(run['status'] == status for run in runs), status)
    for status in tables.STATUSES[1:]
  ]
  return ', '.join(f'{n} {status}' for n, status in counts if n)


def _estimate(runs: Sequence[Record]) -> Estimate | None:
  scores = statistics.final_scores(runs).values()
  return statistics.estimate(scores) if scores else None


def _mean(runs: Sequence[Record]) -> float | None:
  e = _estimate(runs)
  return None if e is None else e.mean


def _ranked(
  cells: Mapping[str, Sequence[Record]],
) -> list[tuple[str, Sequence[Record]]]:
  """Returns the cells by falling mean, those without one at the end."""

  def place(item: tuple[str, Sequence[Record]]) -> float:
    mean = _mean(item[1])
    return np.inf if mean is None else -mean

  return sorted(cells.items(), key=place)


def _has_earlier_stages(runs: Sequence[Record]) -> bool:
  return any(statistics.earlier_stages(run) for run in runs)


def _styles(
  cells: Mapping[str, Any], dashed: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
  """Returns colour and dash of each cell; those in `dashed` are not solid."""
  return {
    cell: {
      'color': COLORS[i % len(COLORS)],
      'linestyle': DASHES[(i // len(COLORS) + (cell in dashed)) % len(DASHES)],
    }
    for i, cell in enumerate(cells)
  }


def _place(grid: Grid, run: Record) -> tuple[str, str]:
  overrides = run['overrides']
  return (
    _text(overrides.get(grid.row_key)),
    _text(overrides.get(grid.column_key)),
  )


def _text(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _on(color: Any) -> str:
  """Returns black or white: what can be read on `color`."""
  red, green, blue = matplotlib.colors.to_rgb(color)
  return 'k' if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else 'w'


def _shorten(text: str, length: int = 34) -> str:
  """Returns `text` without its middle: names of cells differ at either end."""
  if len(text) <= length:
    return text
  half = (length - 3) // 2
  return f'{text[:half]}...{text[-half:]}'

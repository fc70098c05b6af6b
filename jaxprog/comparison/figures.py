"""Pictures of a comparison: grids, differences, curves over images."""

import pathlib
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from jaxprog import files
from jaxprog.comparison import statistics, tables, verdicts
from jaxprog.comparison.sequential import Rule
from jaxprog.comparison.statistics import Estimate, Record
from jaxprog.reporting import plots
from jaxprog.reporting.facts import shorten
from jaxprog.reporting.plots import Figure

# Okabe and Ito's colours without the yellow, too faint for lines on white.
_COLORS = (
  *('#0072b2', '#d55e00', '#009e73', '#cc79a7'),
  *('#000000', '#56b4e9', '#e69f00'),
)
# The next seven lines have the same colours and another dash.
_DASHES = ('-', (0, (5, 1.5)), (0, (1, 1)))
_INK, _SOFT = plots.INK, '#6b6b6b'
# A curve of one evaluation is seen by its end.
_END: dict[str, Any] = {'marker': 'o', 'markersize': 4, 'markevery': [-1]}
# Even in lightness and without red against green.
MAP = 'cividis'
_PLAIN = Rule()

_SMALL = 8.5
# How many of the best cells of a grid have a curve.
_NUM_BEST = 4
# Letters of a name, and those that fit the width of a cell.
_LONG, _CELL_WIDTH = 34, 12
# Stage ends of two arms closer than this part of the axis are one line.
_SAME_BOUNDARY = 0.02


class Grid(NamedTuple):
  """Two fields of the config, their values as text, and the runs of each."""

  row_key: str
  column_key: str
  rows: tuple[str, ...]
  columns: tuple[str, ...]
  runs: Mapping[tuple[str, str], Sequence[Record]]


def plot(
  workdir: pathlib.Path,
  runs: Sequence[Record],
  target: float,
  rule: Rule = _PLAIN,
) -> pathlib.Path:
  """Draws a comparison; returns the picture's path.

  Where a ladder hands something over or has controls, differences to the first
  cell and accuracy over images. Else a heat map of the two fields that vary, if
  no other does and each pair of their values is a cell; or differences alone.
  """
  if any(x['control'] or len(x['boundaries']) > 1 for x in runs):
    path, figure = (
      workdir / 'ladder_comparison.png',
      draw_ladder(runs, target, runs[0]['cell'], rule),
    )
  else:
    path = workdir / 'optimizer_scheduler_comparison.png'
    grid = find_grid(runs)
    if grid is None:
      figure = draw_forest(runs, runs[0]['cell'], rule)
    else:
      figure = draw_grid(runs, grid)
  files.write_bytes(path, plots.encode(figure))
  return path


def find_grid(runs: Sequence[Record]) -> Grid | None:
  """Returns the grid that the labels or overrides of `runs` span, or None."""
  changed = [run['labels'] or run['overrides'] for run in runs]
  varying = [
    name
    for name in dict.fromkeys(name for fields in changed for name in fields)
    if len({_text(fields.get(name)) for fields in changed}) > 1
  ]
  if len(varying) != 2:
    return None
  row_key, column_key = varying
  found: dict[tuple[str, str], list[Record]] = {}
  for run, fields in zip(runs, changed, strict=True):
    place = _text(fields.get(row_key)), _text(fields.get(column_key))
    found.setdefault(place, []).append(run)
  rows, columns = (tuple(dict.fromkeys(x)) for x in zip(*found, strict=True))
  if len(found) < len(rows) * len(columns):
    return None
  return Grid(row_key, column_key, rows, columns, found)


def draw_grid(runs: Sequence[Record], grid: Grid) -> Figure:
  """Returns a heat map of mean top-1, beside curves of the best cells."""
  width = max(4.2, 1.15 * len(grid.columns) + 1.6)
  height = max(4.2, 0.82 * len(grid.rows) + 1.5)
  title = f'{grid.row_key} and {grid.column_key}, compared'
  figure = _figure(width + 6.6, height, title)
  heat, curves = figure.subplots(1, 2, width_ratios=(width, 6.2))
  _draw_heat(heat, grid)
  cells = ranked(statistics.by_cell(runs)).items()
  chosen = dict([(c, r) for c, r in cells if statistics.done(r)][:_NUM_BEST])
  _draw_curves(curves, chosen, _styles(chosen), 'The best cells')
  return figure


def draw_forest(
  runs: Sequence[Record], reference: str, rule: Rule = _PLAIN
) -> Figure:
  """Returns each cell's difference to the reference, the largest first."""
  count = len(statistics.by_cell(runs))
  figure = _figure(9.5, 0.42 * count + 1.6, 'Beside the reference')
  _draw_differences(figure.add_subplot(), runs, reference, rule)
  return figure


def draw_ladder(
  runs: Sequence[Record], target: float, reference: str, rule: Rule = _PLAIN
) -> Figure:
  """Returns differences to the reference, above accuracy over images."""
  cells = statistics.by_cell(runs)
  arms = ranked(cells)
  rows = 0.36 * len(cells) + 0.8
  figure = _figure(11, rows + 4.8, f'Beside {reference}')
  forest, curves = figure.subplots(2, 1, height_ratios=(rows, 4.2))
  _draw_differences(forest, runs, reference, rule)
  alone = [x for x in arms if not any(map(statistics.earlier_stages, arms[x]))]
  # By first appearance: an arm has one colour, whatever its rank.
  styles = _styles(cells, dashed=alone if len(alone) < len(arms) else ())
  _draw_curves(curves, arms, styles)
  curves.set_xlim(left=0)
  _limit_accuracy(curves, target)
  curves.axhline(100 * target, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
  curves.annotate(
    f'target {100 * target:.1f}%',
    (0.005, 100 * target),
    xycoords=('axes fraction', 'data'),
    xytext=(0, 3),
    textcoords='offset points',
    fontsize=_SMALL,
  )
  _mark_boundaries(curves, arms)
  return figure


def _figure(width: float, height: float, title: str) -> Figure:
  figure = plots.create_figure(width, height)
  figure.set_layout_engine('constrained')
  figure.suptitle(
    title, x=0.01, ha='left', fontsize=13, color=_INK, weight='bold'
  )
  return figure


def _bare(axes: Axes, x_title: str, y_title: str = '', title: str = '') -> None:
  plots.bare(axes)
  axes.set_xlabel(x_title, color=_INK)
  axes.set_ylabel(y_title, color=_INK)
  axes.set_title(title, loc='left', fontsize=10.5, color=_INK)


def _draw_heat(axes: Axes, grid: Grid) -> None:
  means = np.array(
    [[_mean(grid.runs[row, x]) for x in grid.columns] for row in grid.rows]
  )
  colors = matplotlib.colormaps[MAP].with_extremes(bad='#eeeeee')
  image = axes.imshow(means, cmap=colors, aspect='auto')
  for (i, j), mean in np.ndenumerate(means):
    text = _cell_text(grid.runs[grid.rows[i], grid.columns[j]])
    color = _on('w' if np.isnan(mean) else colors(image.norm(mean)))
    axes.text(j, i, text, ha='center', va='center', color=color)
  names = [textwrap.fill(shorten(x, _LONG), _CELL_WIDTH) for x in grid.columns]
  axes.set_xticks(range(len(grid.columns)), names)
  axes.set_yticks(range(len(grid.rows)), [shorten(x, _LONG) for x in grid.rows])
  every = [run for runs in grid.runs.values() for run in runs]
  title = f'{statistics.whose(every).capitalize()} top-1 (%): mean, ± std, runs'
  _bare(axes, grid.column_key, grid.row_key, title)
  axes.grid(visible=False)
  axes.spines[:].set_visible(False)


def _draw_curves(
  axes: Axes,
  cells: Mapping[str, Sequence[Record]],
  styles: Mapping[str, Mapping[str, Any]],
  title: str = '',
) -> None:
  """Draws each cell's mean over images, with the interval at its end.

  Of few runs these alone. Names stand beside the ends.
  """
  every = [run for runs in cells.values() for run in runs]
  holdout = 'hold-out ' * statistics.has_holdout(every)
  _bare(axes, 'training images', f'{holdout}top-1 (%)', title)
  ends: list[tuple[float, str, str]] = []
  for cell, runs in cells.items():
    lines, interval = statistics.lines(runs, 'images')
    style = styles[cell]
    for x, y in lines:
      width = 1.8 if len(lines) == 1 else 1.0
      axes.plot(x, y, label=cell, linewidth=width, **_END, **style)
    if interval:
      axes.vlines(lines[0][0][-1], *interval, color=style['color'])
    if lines:
      said = f'{shorten(cell, _LONG)} (n = {len(statistics.done(runs))})'
      ends.append((lines[0][1][-1], said, style['color']))
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
  axes.xaxis.set_major_formatter(lambda x, _: tables.format_count(x))
  _limit_accuracy(axes)
  _name_ends(axes, ends)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
  """Writes (y, name, colour) on the right, as near to y as others allow."""
  low, high = axes.get_ylim()
  gap = 0.045 if len(ends) <= 20 else 0.9 / len(ends)
  place = -gap
  for y, text, color in sorted(ends):
    place = max((y - low) / (high - low), place + gap)
    axes.annotate(
      text,
      (1.01, place),
      xycoords='axes fraction',
      va='center',
      color=color,
      fontsize=_SMALL,
    )


def _limit_accuracy(axes: Axes, target: float = 0.0) -> None:
  """Lets the means fill the panel; intervals of two runs may be all of it."""
  lines = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
  if not lines:
    return
  values = np.concatenate(lines)
  low, high = values.min(), max(values.max(), 100 * target)
  room = 0.2 * max(high - low, 1.0)
  axes.set_ylim(max(low - room, -1), min(high + room, 101))


def _mark_boundaries(axes: Axes, arms: Mapping[str, Sequence[Record]]) -> None:
  """Draws a line where earlier stages end, with their names above the panel.

  Close ends of one stage in several arms are one. A line each: names of stages
  that end close together do not touch.
  """
  right = axes.get_xlim()[1]
  found: dict[tuple[str, str], list[float]] = {}
  for arm, runs in arms.items():
    for run in statistics.done(runs):
      for boundary in statistics.earlier_stages(run):
        found.setdefault((arm, boundary['stage']), []).append(
          boundary['images']
        )
  ends: list[tuple[float, str]] = []
  for x, name in sorted((float(np.mean(v)), k[1]) for k, v in found.items()):
    if any(name == y[1] and x - y[0] < _SAME_BOUNDARY * right for y in ends):
      continue
    axes.axvline(x, color=_SOFT, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
      f'{shorten(name, 20)} ends',
      (x, 1.0),
      xycoords=('data', 'axes fraction'),
      xytext=(0, 3 + 11 * len(ends)),
      textcoords='offset points',
      ha='left' if x < right / 2 else 'right',
      color=_SOFT,
      fontsize=_SMALL,
    )
    ends.append((x, name))


def _draw_differences(
  axes: Axes, runs: Sequence[Record], reference: str, rule: Rule
) -> None:
  """Draws how each cell's final top-1 differs, and says it on the right.

  Filled are those of p < 0.05. Cells without a run that is done come last.
  """
  found = tables.summarize(runs, reference, rule)
  others = [x for x in found if x.cell != reference]
  others.sort(key=lambda x: -x.difference.estimate.mean if x.difference else 9)
  texts = []
  for i, x in enumerate(others):
    said = statistics.count_lost(x.runs)
    if x.difference:
      e = x.difference.estimate
      if e.low is not None and e.high is not None:
        axes.plot([100 * e.low, 100 * e.high], [i, i], color=_INK)
      fill = _INK if x.is_shown else 'white'
      axes.plot(100 * e.mean, i, 'o', color=_INK, markerfacecolor=fill)
      said = [f'{verdicts.format_points(e)}, n = {e.n}', *said]
    texts.append(', '.join(said) or 'no run yet')
  axes.axvline(0, color=_SOFT, linewidth=1, linestyle=':')
  _bare(
    axes,
    f'{statistics.whose(runs)} top-1 less that of {shorten(reference, _LONG)}, '
    f'points: means, {rule.describe_intervals()}; filled: p < 0.05 (Holm)',
  )
  axes.grid(visible=False, axis='y')
  axes.set_yticks(range(len(others)), [shorten(x.cell, _LONG) for x in others])
  axes.set_ylim(max(len(others), 1) - 0.5, -0.5)
  numbers = axes.secondary_yaxis('right')
  numbers.set_yticks(range(len(others)), texts)
  numbers.tick_params(colors=_INK, length=0, labelsize=9)
  numbers.spines['right'].set_visible(False)


def _cell_text(runs: Sequence[Record]) -> str:
  e = _estimate(runs)
  lost = ', '.join(statistics.count_lost(runs))
  if e is None:
    return lost or 'no run yet'
  spread = '' if e.std is None else f'\n± {100 * e.std:.1f}'
  text = f'{100 * e.mean:.1f}{spread}\nn = {e.n}'
  return f'{text}\n{lost}' if lost else text


def _estimate(runs: Sequence[Record]) -> Estimate | None:
  scores = statistics.final_scores(runs).values()
  return statistics.estimate(scores) if scores else None


def _mean(runs: Sequence[Record]) -> float:
  """Returns the mean top-1 in percent, NaN where no run is done."""
  e = _estimate(runs)
  return np.nan if e is None else 100 * e.mean


def ranked(
  cells: Mapping[str, Sequence[Record]],
) -> dict[str, Sequence[Record]]:
  """Returns the cells by falling mean, those without one at the end."""
  order = np.argsort([-_mean(runs) for runs in cells.values()], stable=True)
  items = list(cells.items())
  return dict(items[i] for i in order)


def _styles(
  cells: Collection[str], dashed: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
  """Returns colour and dash of each cell; those in `dashed` are not solid."""
  return {
    cell: {
      'color': _COLORS[i % len(_COLORS)],
      'linestyle': _DASHES[
        (i // len(_COLORS) + (cell in dashed)) % len(_DASHES)
      ],
    }
    for i, cell in enumerate(cells)
  }


def _text(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _on(color: Any) -> str:
  """Returns black or white: what can be read on `color`."""
  red, green, blue = matplotlib.colors.to_rgb(color)
  return 'k' if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else 'w'

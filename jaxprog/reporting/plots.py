"""The picture of a run: loss, accuracy and learning rate over all stages."""

import io
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.lines
import matplotlib.text
import matplotlib.ticker
import numpy as np

from jaxprog import files
from jaxprog.reporting import facts, timeline

# Okabe and Ito's blue and vermilion: apart for colour-blind readers too.
TRAIN, VAL, TOP5 = '#0072b2', '#d55e00', '#e0a070'
GREEN = '#009e73'
RATE, INK, GRID, SHADE = '#4d4d4d', '#333333', '#e6e6e6', '#f4f4f4'
_RULE = '#bbbbbb'
# Points of a longer ladder would run into one another.
_MAX_DOTS = 60

Axes = matplotlib.axes.Axes


class Figure(matplotlib.figure.Figure):
  """A figure that notebooks show by itself."""

  def _repr_png_(self) -> bytes:
    return encode(self)


def plot_history(
  history: Mapping[str, Any], path: str | os.PathLike[str] | None = None
) -> Figure:
  """Returns training_metrics.png: all stages side by side by epochs.

  Args:
    history: as in training_history.json, finished or under way.
    path: where to write it; replaced atomically, so that it can be looked at
      during a run.
  """
  figure = create_figure(12, 8.5)
  spans = timeline.spans(history['stages'])
  loss, accuracy, rate = figure.subplots(
    3, 1, sharex=True, height_ratios=(3, 3, 2)
  )
  figure.subplots_adjust(
    left=0.07, right=0.92, bottom=0.065, top=0.9, hspace=0.09
  )
  titles = 'loss', 'accuracy (%)', 'learning rate'
  for axes, title in zip(figure.axes, titles, strict=True):
    _style(axes, title, spans)
  rate.set_xlabel('epochs, all stages', color=INK)
  if spans:
    _draw_loss(loss, spans)
    _draw_accuracy(accuracy, spans)
    _draw_rate(rate, spans)
    _name_stages(figure, loss, spans)
  else:
    figure.text(0.5, 0.5, 'no epoch finished yet', ha='center', color=INK)
  figure.text(
    0.07, 0.965, 'Training metrics', fontsize=14, color=INK, weight='bold'
  )
  running = [x['name'] for x in history['stages'] if x['status'] == 'running']
  if running:
    text = f'in training: {running[-1]}'
    figure.text(0.92, 0.965, text, fontsize=10, color=INK, ha='right')
  if path is not None:
    _save(figure, path)
  return figure


def plot_learning_rates(
  learning_rates: Mapping[str, Sequence[float]],
  num_epochs: Mapping[str, float],
  path: str | os.PathLike[str],
) -> None:
  """Writes a picture of each stage's rates, one panel a stage.

  Args:
    learning_rates: by name of a stage, those of its equal parts.
    num_epochs: by name of a stage.
    path: replaced atomically.
  """
  names = list(learning_rates)
  columns = min(len(names), 4)
  rows = -(-len(names) // columns)
  figure = create_figure(3 * columns, 2.4 * rows)
  for i, name in enumerate(names):
    axes = figure.add_subplot(rows, columns, i + 1)
    bare(axes)
    rates = learning_rates[name]
    epochs = np.linspace(0, num_epochs[name], len(rates) + 1)
    axes.step(epochs, [*rates, rates[-1]], where='post', color=RATE)
    _name(axes, epochs[np.argmax(rates)], max(rates), f'{max(rates):.3g}', RATE)
    axes.set_xlim(0, num_epochs[name])
    axes.set_ylim(0, 1.25 * max(rates))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    axes.set_title(facts.shorten(name, 28), fontsize=10, color=INK, loc='left')
    if i >= len(names) - columns:
      axes.set_xlabel('epochs', color=INK, fontsize=9)
  figure.suptitle(
    'Learning rates', x=0.02, ha='left', fontsize=12, color=INK, weight='bold'
  )
  figure.tight_layout()
  _save(figure, path)


def plot_lr_find(
  found: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
  """Writes a range test: the loss of each step over its learning rate.

  Args:
    found: its stage, rates, losses, smoothed losses and suggestions.
    path: replaced atomically.
  """
  figure = create_figure(8, 4.4)
  axes = figure.add_subplot()
  bare(axes)
  rates, losses, smooth = (
    np.array(found[x], float) for x in ('rates', 'losses', 'smooth')
  )
  axes.plot(rates, losses, color=TRAIN, linewidth=0.8, alpha=0.4, label='loss')
  axes.plot(rates, smooth, color=TRAIN, linewidth=1.8, label='smoothed')
  axes.set_xscale('log')
  axes.set_xlabel('learning rate, one step each', color=INK)
  axes.set_ylabel('training loss', color=INK)
  # From a little below the lowest of both to a little above the first ones.
  low = min(np.nanmin(losses), np.nanmin(smooth))
  first = np.nanmax(smooth[: max(len(smooth) // 10, 1)])
  room = max(first - low, 1e-3)
  axes.set_ylim(low - 0.08 * room, first + 0.3 * room)
  at = int(np.nanargmin(smooth))
  axes.plot(rates[at], smooth[at], 'o', color=TRAIN, label='minimum')
  colors = VAL, GREEN, INK
  suggestions = found['suggestions'].items()
  for (name, rate), color in zip(suggestions, colors, strict=False):
    value = np.interp(np.log(rate), np.log(rates), smooth)
    axes.axvline(rate, color=color, linewidth=0.8, linestyle=':')
    label = f'{name}: {rate:.2g}'
    axes.plot(rate, value, 'D', color=color, markersize=6, label=label)
  axes.legend(frameon=False, loc='lower left', fontsize=9)
  axes.set_title(
    f'Range test of {facts.shorten(found["stage"], 40)}',
    loc='left',
    color=INK,
    weight='bold',
  )
  figure.tight_layout()
  _save(figure, path)


def plot_sizes(
  rows: Sequence[Mapping[str, Any]],
  trained_at: Collection[int],
  title: str,
  path: str | os.PathLike[str],
) -> None:
  """Writes a picture of top-1 over the size of evaluation images.

  Args:
    rows: image_size, top1 and count of each size, rising.
    trained_at: the sizes that the network was trained at.
    title: says which network that is.
    path: replaced atomically.
  """
  figure = create_figure(8, 4.4)
  axes = figure.add_subplot()
  bare(axes)
  sizes = [x['image_size'] for x in rows]
  top1 = np.array([100 * x['top1'] for x in rows])
  between = [facts.interval(x['top1'], x['count']) for x in rows]
  low, high = 100 * np.array(between).T
  for size in trained_at:
    axes.axvline(size, color=RATE, linewidth=0.8, linestyle=':')
  axes.fill_between(sizes, low, high, color=VAL, alpha=0.12, linewidth=0)
  axes.plot(sizes, top1, 'o-', color=VAL, linewidth=1.8)
  best = int(np.argmax(top1))
  text = f'{top1[best]:.1f}% at {sizes[best]} px'
  _name(axes, sizes[best], top1[best], text, VAL)
  room = max(high.max() - low.min(), 0.1)
  axes.set_ylim(low.min() - 0.1 * room, high.max() + 0.2 * room)
  axes.set_xticks(sizes)
  axes.set_xlabel(
    'size of evaluation images in pixels; dotted: of training images', color=INK
  )
  axes.set_ylabel('top-1 (%), with 95% intervals', color=INK)
  axes.set_title(facts.shorten(title, 60), loc='left', color=INK, weight='bold')
  figure.tight_layout()
  _save(figure, path)


def create_figure(width: float, height: float) -> Figure:
  """Returns an empty figure of so many inches."""
  figure = Figure(figsize=(width, height), dpi=130)
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  return figure


def _save(
  figure: matplotlib.figure.Figure, path: str | os.PathLike[str]
) -> None:
  files.write_bytes(path, encode(figure))


def encode(figure: matplotlib.figure.Figure) -> bytes:
  """Returns the figure as a PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', metadata={'Software': None})
  return buffer.getvalue()


def _style(axes: Axes, title: str, spans: Sequence[timeline.Span]) -> None:
  axes.set_ylabel(title, color=INK)
  bare(axes)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
  if not spans:
    axes.set_xticks([])
    axes.set_yticks([])
    return
  axes.set_xlim(0, spans[-1].end * 1.01)
  for i, span in enumerate(spans):
    if i % 2:
      axes.axvspan(span.begin, span.end, color=SHADE, linewidth=0, zorder=0)
    if i:
      axes.axvline(span.begin, color=_RULE, linewidth=0.8)


def bare(axes: Axes) -> None:
  """Leaves of the frame what guides the eye."""
  axes.grid(color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors=INK, length=0, labelsize=9)
  for side in ('top', 'right', 'left'):
    axes.spines[side].set_visible(False)
  axes.spines['bottom'].set_color(_RULE)


def _draw_loss(axes: Axes, spans: Sequence[timeline.Span]) -> None:
  smooth = {x.stage.get('label_smoothing') or 0.0 for x in spans} - {0.0}
  train = 'train, on\nsmoothed\nlabels' if smooth else 'train'
  if any(x.stage.get('loss') == 'bce' for x in spans):
    train = 'train, in\npart binary\nlosses'
  lines = {'train_loss': (train, TRAIN), 'val_loss': ('val', VAL)}
  _draw_lines(axes, spans, lines)


def _draw_accuracy(axes: Axes, spans: Sequence[timeline.Span]) -> None:
  of_many = [x for x in spans if facts.shows_top5(x.stage)]
  lines = {
    'val_top5': ('val top-5', TOP5),
    'train_top1': ('train top-1', TRAIN),
    'val_top1': ('val top-1', VAL),
  }
  for span in spans:
    level = 100 * facts.chance(span.stage)
    axes.plot([span.begin, span.end], [level] * 2, color=RATE, linestyle=':')
  values = _draw_lines(axes, spans, lines, 100, {'val_top5': of_many})
  values += [100 * facts.chance(x.stage) for x in spans]
  y = timeline.fit_top1(values, max(x.stage['num_eval_images'] for x in spans))
  forward, back = (lambda x: x), (lambda x: x)
  if y.least_error:
    forward, back = _error_scale(y.least_error)
    axes.set_yscale('function', functions=(forward, back))
    axes.set_ylabel('accuracy (%),\nerrors logarithmic')
  axes.set_yticks(y.ticks(), [f'{x:.4g}' for x in y.ticks()])
  axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  low, high = (float(forward(x)) for x in (y.low, y.high))
  # With room for the labels of best epochs.
  axes.set_ylim(y.low, float(back(high + 0.12 * (high - low))))
  for span in spans:
    if best := span.stage['best']:
      at, top1 = span.begin + best['epoch'], 100 * best['top1']
      axes.plot(at, top1, 'o', color=VAL, markeredgecolor='white', markersize=7)
      near = [
        value
        for field in ('train_top1', 'val_top1')
        for x, value in span.points(field, 100)
        if value is not None and abs(x - at) < 0.04 * spans[-1].end
      ]
      _name(axes, at, max([top1, *near]), f'{top1:.1f}%', VAL)


def _error_scale(least: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns the scale of timeline.Scale.least_error and its inverse.

  It goes on above 100%, evenly: labels need room there.
  """
  top = -math.log(least)

  def forward(x):
    return -np.log(np.maximum(100 - x, least)) + np.maximum(x - 100, 0)

  def back(x):
    return np.where(x < top, 100 - np.exp(-x), 100 + x - top)

  return forward, back


def _draw_lines(
  axes: Axes,
  spans: Sequence[timeline.Span],
  lines: Mapping[str, tuple[str, str]],
  scale: float = 1.0,
  only: Mapping[str, Sequence[timeline.Span]] | None = None,
) -> list[float]:
  """Draws fields, of a name and a colour each, and names them on the right.

  Returns all values. Of a field in `only` there are those spans alone.
  """
  handles, values = [], []
  for field, (name, color) in lines.items():
    drawn = _line(axes, (only or {}).get(field, spans), field, color, scale)
    if drawn:
      values += drawn
      handles.append(matplotlib.lines.Line2D([], [], color=color, label=name))
  axes.legend(
    handles=handles,
    loc='center left',
    bbox_to_anchor=(1.0, 0.5),
    frameon=False,
    fontsize=9,
    labelcolor='linecolor',
    handlelength=0,
  )
  return values


def _draw_rate(axes: Axes, spans: Sequence[timeline.Span]) -> None:
  y = timeline.fit_rates(spans)
  for span in spans:
    x, rates = np.array(span.rates(), float).T
    axes.step(x, rates, where='post', color=RATE, linewidth=1.5)
    if (rates > 0).any():
      peak = np.nanargmax(rates)
      _name(axes, x[peak], rates[peak], f'{rates[peak]:.3g}', RATE)
  if y.log:
    axes.set_yscale('log', nonpositive='mask')
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_ylim(y.low, 3 * y.high)
  else:
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    axes.set_ylim(y.low, 1.15 * y.high)


def _line(
  axes: Axes,
  spans: Sequence[timeline.Span],
  field: str,
  color: str,
  scale: float,
) -> list[float]:
  """Returns the values of all stages.

  Draws one line a stage, with points if there are few, or where a line alone
  would not show.
  """
  drawn: list[float] = []
  few = sum(len(x.stage['epochs']) for x in spans) <= _MAX_DOTS
  for span in spans:
    x, values = np.array(span.points(field, scale), float).T
    finite = np.isfinite(values)
    neighbours = np.convolve(finite, (1, 0, 1))[1:-1] > 0
    axes.plot(
      x,
      values,
      color=color,
      linewidth=1.5,
      marker='o',
      markersize=3.5,
      markevery=list(np.flatnonzero(finite & (few | ~neighbours))),
    )
    drawn += values[finite].tolist()
  return drawn


def _name(axes: Axes, x: float, y: float, text: str, color: str) -> None:
  """Writes a value above a point."""
  axes.annotate(
    text,
    (x, y),
    xytext=(0, 5),
    textcoords='offset points',
    ha='left' if x < 0.03 * axes.get_xlim()[1] else 'center',
    color=color,
    fontsize=9.5,
    fontweight='bold',
  )


def _name_stages(
  figure: matplotlib.figure.Figure, axes: Axes, spans: Sequence[timeline.Span]
) -> None:
  """Writes each name above the beginning of its stage.

  From right to left, on the lowest line where it meets no name: so the lines
  that lead down to the stages pass by the names of later ones.
  """
  right_edge = axes.get_window_extent().x1
  white = {'color': 'white', 'pad': 0.5, 'linewidth': 0}
  taken: list[float] = []
  for span in reversed(spans):
    name, size = span.stage['name'], span.stage['image_size']
    said = f'{facts.shorten(name, 28)}  {size} px'
    text = _above(axes, span.begin, said, (2, 5), fontsize=9, bbox=white)
    box = text.get_window_extent()
    shift = min(right_edge - box.x1, 0)
    left, right = box.x0 + shift, box.x1 + shift
    line = next(
      (i for i, begin in enumerate(taken) if right + 6 < begin), len(taken)
    )
    taken[line : line + 1] = [left]
    text.set_position((2 + shift * 72 / figure.dpi, 5 + 13 * line))
    if line:
      leader = {'arrowstyle': '-', 'color': _RULE, 'shrinkA': 0, 'shrinkB': 0}
      above = 0, 5 + 13 * line
      _above(axes, span.begin, '', above, arrowprops=leader, zorder=0)
  top = 1 - (36 + 13 * len(taken)) / (72 * figure.get_figheight())
  figure.subplots_adjust(top=top)


def _above(
  axes: Axes, x: float, text: str, offset: tuple[float, float], **style: Any
) -> matplotlib.text.Annotation:
  """Returns a text `offset` points from where the panel ends at epoch `x`."""
  return axes.annotate(
    text,
    (x, 1.0),
    xycoords=('data', 'axes fraction'),
    xytext=offset,
    textcoords='offset points',
    color=INK,
    annotation_clip=False,
    **style,
  )

"""What the page of a comparison draws: differences, curves over their cost."""

import itertools
from collections.abc import Mapping, Sequence

from jaxprog import formats
from jaxprog.comparison import (
  figures,
  statistics,
  tables,
  under_way,
  verdicts,
)
from jaxprog.comparison.sequential import Rule
from jaxprog.comparison.statistics import Axis, Record
from jaxprog.reporting import timeline
from jaxprog.reporting.page import charts
from jaxprog.reporting.page.markup import Html, join, tag

# More lines cannot be told apart; these are the best.
MAX_LINES = 8
TITLES: Mapping[Axis, str] = {
  'images': 'training images',
  'flops': 'training FLOPs',
  'seconds': 'seconds',
}
_STYLES = tuple(f's{i}' for i in range(MAX_LINES))
_UNFINISHED = 'unfinished'


def differences(
  summaries: Sequence[tables.CellSummary], reference: str, rule: Rule
) -> Html | None:
  """Returns each cell's difference to the reference, in points; None of one.

  The largest comes first. Those of p < 0.05 are filled.
  """
  found = [
    (x.cell, x.difference.estimate, x.is_shown)
    for x in summaries
    if x.difference
  ]
  if not found:
    return None
  found.sort(key=lambda x: -x[1].mean)
  ends = [0.0]
  for _, e, _ in found:
    ends += [100 * x for x in (e.low, e.mean, e.high) if x is not None]
  room = 0.04 * (max(ends) - min(ends) or 1.0)
  scale = timeline.Scale(min(ends) - room, max(ends) + room)
  rows = []
  for cell, e, is_shown in found:
    said = verdicts.format_points(e)
    # One run has no interval.
    low, mean, high = (
      scale.at(100 * (e.mean if x is None else x))
      for x in (e.low, e.mean, e.high)
    )
    bar = charts.interval_bar(
      (low, mean, high), scale.at(0), is_shown, f'{cell}: {said} points'
    )
    rows.append((cell, bar, said))
  ticks = [(scale.at(x), f'{x:+g}' if x else '0') for x in scale.ticks()]
  whose = statistics.whose(run for x in summaries for run in x.runs)
  return charts.bar_rows(
    f'{whose.capitalize()} top-1 less that of {reference}, in points, '
    f'{rule.describe_intervals()}',
    [tag('span', '○ not told from 0 (Holm)', class_='entry')],
    [*rows, ('', charts.axis(ticks), '')],
  )


def curves(
  runs: Sequence[Record], target: float, unfinished: Sequence[Record] = ()
) -> Html:
  """Returns accuracy over images, FLOPs or seconds, one to be chosen.

  `unfinished` runs, whose curves lack FLOPs, are dashed and in no mean.
  """
  cells = figures.ranked(statistics.by_cell([*runs, *unfinished]))
  arms = {
    k: v
    for k, v in cells.items()
    if statistics.done(v) or any(map(_is_unfinished, v))
  }
  arms = dict(itertools.islice(arms.items(), MAX_LINES))
  parts, shown = [], []
  for axis, title in TITLES.items():
    name = f'by-{axis}'
    chosen = '' if axis == 'images' else None
    parts += [
      tag('input', type='radio', name='cost', id=name, checked=chosen),
      tag('label', f'over {title}', for_=name),
    ]
    shown.append(tag('div', _curves(arms, axis, target), class_='choice'))
  left = f', the best {len(arms)} of {len(cells)} cells'
  holdout = statistics.has_holdout(runs)
  return join(
    tag(
      'h3',
      f'{"Hold-out top-1" if holdout else "Top-1"} over what it cost, all '
      'stages counted',
      left if len(arms) < len(cells) else None,
    ),
    tag('div', *parts, *shown, class_='switch'),
  )


def _is_unfinished(run: Record) -> bool:
  return run['status'] in (under_way.RUNNING, under_way.BEGUN)


def _curves(
  arms: Mapping[str, Sequence[Record]], axis: Axis, target: float
) -> Html:
  series: list[charts.Series] = []
  labels: list[charts.Label] = []
  for (cell, runs), style in zip(arms.items(), _STYLES, strict=False):
    drawn, label = _draw_arm(cell, runs, style, axis)
    series += drawn
    labels += label
  if not series:
    return tag(
      'p',
      f'No run that is over, to be drawn over {TITLES[axis]}.',
      class_='note',
    )
  x_end = max((x for line in series for x, _ in line.points), default=1.0)
  title = 'Means with 95% intervals at their ends' if labels else 'Single runs'
  if any(_UNFINISHED in line.style for line in series):
    title += '; dashed: not finished, in no mean'
  if target:
    aim = [(0.0, 100 * target), (x_end, 100 * target)]
    series.append(charts.Series('target', 'chance', aim, stairs=True))
  values = [y for line in series for y in line.values]
  every = [run for runs in arms.values() for run in runs]
  return charts.line_chart(
    title,
    series,
    y=timeline.fit_top1(values, statistics.curve_images(every)),
    x_end=x_end,
    x_label=TITLES[axis],
    format_x=formats.flops if axis == 'flops' else tables.format_count,
    format_y='{:.4g}%'.format,
    summary='The tables have the figures.',
    height=320,
    labels=labels,
    sign='mean',
    names_at_ends=True,
  )


def _draw_arm(
  cell: str, runs: Sequence[Record], style: str, axis: Axis
) -> tuple[list[charts.Series], list[charts.Label]]:
  """Returns an arm's mean and its last interval; of few runs these alone.

  And what there is yet of runs that are not finished.
  """
  lines, interval = statistics.lines(runs, axis)
  drawn = [list(zip(x.tolist(), y, strict=True)) for x, y in lines]
  labels = []
  if interval:
    labels = [charts.Label(*drawn[0][-1], '', style, interval)]
  single = f'{style} single'
  styles = [single if len(drawn) > 1 else style] * len(drawn)
  for run in filter(_is_unfinished, runs):
    if axis in run['curve'][0]:
      x, y = statistics.points(run, axis)
      drawn.append(list(zip(x.tolist(), 100 * y, strict=True)))
      styles.append(f'{single} {_UNFINISHED}')
  name = f'{cell} (n = {len(statistics.done(runs))})'
  return [
    charts.Series('' if i else name, style, x)
    for i, (x, style) in enumerate(zip(drawn, styles, strict=True))
  ], labels

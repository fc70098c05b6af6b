"""What the page of a comparison draws: differences, curves over their cost."""

import itertools
from collections.abc import Mapping, Sequence

from jaxprog import formats
from jaxprog.comparison import figures, statistics, tables, verdicts
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


def differences(
  summaries: Sequence[tables.CellSummary], reference: str
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
  return charts.bar_rows(
    f'Final top-1 less that of {reference}, in points, 95% intervals',
    [tag('span', '○ not told from 0 (Holm)', class_='entry')],
    [*rows, ('', charts.axis(ticks), '')],
  )


def curves(runs: Sequence[Record], target: float) -> Html:
  """Returns accuracy over images, FLOPs or seconds, one to be chosen."""
  cells = figures.ranked(statistics.by_cell(runs))
  arms = {k: v for k, v in cells.items() if statistics.done(v)}
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
  return join(
    tag(
      'h3',
      'Top-1 over what it cost, all stages counted',
      left if len(arms) < len(cells) else None,
    ),
    tag('div', *parts, *shown, class_='switch'),
  )


def _curves(
  arms: Mapping[str, Sequence[Record]], axis: Axis, target: float
) -> Html:
  series: list[charts.Series] = []
  labels: list[charts.Label] = []
  for (cell, runs), style in zip(arms.items(), _STYLES, strict=False):
    drawn, label = _draw_arm(cell, runs, style, axis)
    series += drawn
    labels += label
  values = [100 * target, *(y for line in series for y in line.values)]
  x_end = max((x for line in series for x, _ in line.points), default=1.0)
  aim = [(0.0, 100 * target), (x_end, 100 * target)]
  done = [run for runs in arms.values() for run in statistics.done(runs)]
  count = min((run['num_images'] for run in done), default=1)
  return charts.line_chart(
    'Means with 95% intervals at their ends' if labels else 'Single runs',
    [*series, charts.Series('target', 'chance', aim, stairs=True)],
    y=timeline.fit_top1(values, count),
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
  """Returns an arm's mean and its last interval; of few runs these alone."""
  name, labels = f'{cell} (n = {len(statistics.done(runs))})', []
  lines, interval = statistics.lines(runs, axis)
  drawn = [list(zip(x.tolist(), y, strict=True)) for x, y in lines]
  if interval:
    labels = [charts.Label(*drawn[0][-1], '', style, interval)]
  if len(drawn) > 1:
    style = f'{style} single'
  return [
    charts.Series('' if i else name, style, x) for i, x in enumerate(drawn)
  ], labels

"""The section on where the seconds went."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.reporting import facts, timeline
from jaxprog.reporting.page import charts, curves
from jaxprog.reporting.page.markup import Html, tag
from jaxprog.reporting.parts import Column, Part, Table
from jaxprog.reporting.rundir import RunFiles

# What `facts.TimeSplit` holds, and its style.
_SPLIT = {
  'training': 't-training',
  'input wait': 't-wait',
  'evaluation': 't-eval',
  'saves': 't-save',
  'compiling': 't-compile',
  'hand-over': 't-hand',
  'rest': 't-rest',
}


def _share(i: int, row: tuple[str, facts.TimeSplit]) -> str | tuple[str, str]:
  split = row[1]
  if not split[i]:
    return '-'
  return formats.percent(split[i] / sum(split)), f'{split[i]:,.1f} s'


# Of a stage's name and its TimeSplit.
_COLUMNS = (
  Column('stage', lambda x: x[0], left=True),
  Column('time', lambda x: formats.duration(sum(x[1]))),
  *(
    Column(name, functools.partial(_share, i))
    for i, name in enumerate(
      ('training', 'input', 'eval', 'saves', 'compiling', 'hand-over')
    )
  ),
)
# Of fewer steps than that no quantile is told.
_MIN_STEPS = 20
# How much wider a bin of step_times.StepTimes is than the one before.
_BIN = 2**0.25


def time(run: RunFiles) -> Iterator[Part]:
  """Yields where the seconds went, and how fast images were trained on."""
  splits = facts.run_split(run.history)
  whole = sum(map(sum, splits.values()))
  if whole:
    yield _split_rows(splits, whole)
    yield Table(_COLUMNS, [*splits.items()], 'Where the time went')
    yield facts.time_note(run.history)
  if spans := timeline.spans(run.stages):
    yield _speed_chart(run, spans)
  yield _step_rows(run.stages)


def _split_rows(splits: Mapping[str, facts.TimeSplit], whole: float) -> Html:
  """Returns a bar a stage and one of the rest, all on one scale."""
  longest = max(map(sum, splits.values()))
  rows = []
  for name, split in splits.items():
    parts = [(*x, y) for x, y in zip(_SPLIT.items(), split, strict=True)]
    said = ', '.join(f'{x} {y:.1f} s' for x, _, y in parts if y)
    bar = charts.stacked_bar(parts, f'{name}: {said}', longest)
    rows.append((name, bar, formats.duration(sum(split))))
  key = [
    tag('span', tag('i', class_=f'key {style}'), name, class_='entry')
    for (name, style), *amounts in zip(
      _SPLIT.items(), *splits.values(), strict=True
    )
    if any(amounts)
  ]
  title = f'Where the time went, {formats.duration(whole)} in all'
  return charts.bar_rows(title, key, rows)


def _speed_chart(run: RunFiles, spans: Sequence[timeline.Span]) -> Html:
  line = curves.create_line(spans, 'images/s', 'rate', 'images_per_second')
  return curves.ladder_chart(run, spans)(
    'Images trained on per second, each epoch',
    [line],
    y=timeline.fit_scale(line.values),
    height=150,
    format_y=_thousands,
    summary=f'Up to {max(line.values, default=0):,.0f}.',
  )


def _thousands(value: float) -> str:
  return f'{value / 1000:g}k' if value >= 1000 else f'{value:g}'


def _step_rows(stages: Sequence[Mapping[str, Any]]) -> Html:
  """Returns how long steps took, a row a stage on one logarithmic axis."""
  found = {}
  for stage in stages:
    bins = [x for x in stage.get('step_seconds') or () if x[0]]
    if sum(count for _, count in bins) >= _MIN_STEPS:
      found[stage['name']] = bins
  if not found:
    return Html()
  edges = [edge for bins in found.values() for edge, _ in bins]
  # A bin begins where the one before ends; see step_times.StepTimes.
  scale = timeline.Scale(min(edges) / _BIN, max(edges), log=True)
  rows = [_step_row(name, bins, scale) for name, bins in found.items()]
  ticks = [(scale.at(x), formats.seconds(x)) for x in scale.ticks()]
  key = [
    tag('span', '| median', class_='entry'),
    tag('span', '| 95% are faster', class_='entry late'),
  ]
  return charts.bar_rows(
    'Time of a step', key, [*rows, ('', charts.axis(ticks), '')]
  )


def _step_row(
  name: str, bins: Sequence[Sequence[float]], scale: timeline.Scale
) -> tuple[str, Html, str]:
  middle, late = (quantile(bins, part) for part in (0.5, 0.95))
  figure = f'{formats.seconds(middle)}, 95%: {formats.seconds(late)}'
  parts = [
    (scale.at(edge / _BIN), scale.at(edge), count) for edge, count in bins
  ]
  said = f'{name}: median {figure} of {sum(x for _, x in bins):,.0f} steps'
  bar = charts.spread_bar(parts, scale.at(middle), scale.at(late), said)
  return name, bar, figure


def quantile(bins: Sequence[Sequence[float]], part: float) -> float:
  """Returns the seconds that `part` of the steps stay below.

  Within the bin of [upper edge, count] where that is, steps lie evenly in the
  logarithm.
  """
  left = part * sum(count for _, count in bins)
  for edge, count in bins:
    if left <= count:
      return edge * _BIN ** (left / count - 1)
    left -= count
  return bins[-1][0]

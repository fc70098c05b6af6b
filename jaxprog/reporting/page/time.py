"""The section on where the seconds went."""

import math
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
  'hand-over': 't-hand',
}
# Of a stage's name and its TimeSplit.
_COLUMNS = (
  Column('stage', lambda x: x[0], left=True),
  Column('time', lambda x: formats.duration(sum(x[1]))),
  Column('training', lambda x: _share(x[1], 0)),
  Column('input wait', lambda x: _share(x[1], 1)),
  Column('evaluation', lambda x: _share(x[1], 2)),
  Column('hand-over', lambda x: _share(x[1], 3)),
)


def time(run: RunFiles) -> Iterator[Part]:
  """Yields where the seconds went, and how fast images were trained on."""
  splits = [(x['name'], facts.time_split(x)) for x in run.stages]
  yield charts.bar_rows(
    'Where the time went, by stage',
    [
      tag('span', tag('i', class_=f'key {style}'), name, class_='entry')
      for name, style in _SPLIT.items()
    ],
    [_bar(name, split) for name, split in splits],
  )
  if splits:
    yield Table(_COLUMNS, splits, 'Where the time went')
    yield facts.time_note(run.stages)
  if spans := timeline.spans(run.stages):
    yield _speed_chart(run, spans)
  yield tag('div', *map(_step_histogram, run.stages), class_='pair')


def _share(split: facts.TimeSplit, i: int) -> tuple[str, str]:
  part = split[i] / (sum(split) or 1.0)
  return formats.percent(part), f'{split[i]:,.1f} s'


def _bar(name: str, split: facts.TimeSplit) -> tuple[str, Html, str]:
  parts = [(x, s, y) for (x, s), y in zip(_SPLIT.items(), split, strict=True)]
  said = ', '.join(f'{x} {y:.1f} s' for x, _, y in parts)
  bar = charts.stacked_bar(parts, f'{name}: {said}')
  return name, bar, formats.duration(sum(split))


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


def _step_histogram(stage: Mapping[str, Any]) -> Html | None:
  """Returns how many steps took how long, where the history says so."""
  bins = stage.get('step_seconds')
  if not bins:
    return None
  bars = [(formats.seconds(x) or 'more', count) for x, count in _fill(bins)]
  total = sum(count for _, count in bars)
  return charts.histogram(
    f'{stage["name"]}: time of a step, up to', bars, f'{total:,} steps.'
  )


def _fill(bins: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
  """Returns the bins of step_times.StepTimes with the empty ones between.

  Their upper edges are 2**(i/4); bins of other edges come back as they are.
  """
  if not all(edge for edge, _ in bins):
    return list(bins)
  places = [4 * math.log2(edge) for edge, _ in bins]
  if any(abs(x - round(x)) > 1e-3 for x in places):
    return list(bins)
  counts = {round(x): n for x, (_, n) in zip(places, bins, strict=True)}
  first, last = min(counts), max(counts)
  return [(2 ** (i / 4), counts.get(i, 0)) for i in range(first, last + 1)]

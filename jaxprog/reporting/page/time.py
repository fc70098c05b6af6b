"""The section on where the seconds went."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.reporting import facts, timeline
from jaxprog.reporting.page import charts, curves, markup
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles

_SPLIT = (
  ('training', 't-training'),
  ('waiting for input', 't-wait'),
  ('evaluation', 't-eval'),
  ('hand-over', 't-hand'),
)


def time(run: RunFiles) -> Html:
  """Returns where the seconds went, and how fast images were trained on."""
  spans = timeline.spans(run.stages)
  return join(
    _split_bars(run.stages),
    _speed_chart(run, spans) if spans else None,
    tag('div', *map(_step_histogram, run.stages), class_='pair'),
  )


def _split_bars(stages: Sequence[Mapping[str, Any]]) -> Html:
  """Returns a bar a stage of where its time went, and the seconds."""
  rows: list[list[object]] = []
  bars = []
  for stage in stages:
    split = facts.time_split(stage)
    total = sum(split)
    parts = [
      (name, style, x) for (name, style), x in zip(_SPLIT, split, strict=True)
    ]
    said = ', '.join(f'{name} {x:.1f} s' for name, _, x in parts)
    duration = formats.duration(total)
    bar = charts.stacked_bar(parts, f'{stage["name"]}: {said}')
    bars.append(charts.row(stage['name'], bar, duration))
    rows.append(
      [
        stage['name'],
        duration,
        *(f'{x:,.1f}' for x in split),
        formats.percent(split.input_wait / total if total else None),
      ]
    )
  key = [
    tag('span', tag('i', class_=f'key {style}'), name, class_='entry')
    for name, style in _SPLIT
  ]
  titles = ['stage', 'total', *(f'{name}, s' for name, _ in _SPLIT)]
  return join(
    tag(
      'figure',
      tag('figcaption', tag('b', 'Where the time went, by stage'), *key),
      tag('div', *bars, class_='rows'),
    ),
    markup.table(
      [*titles, 'input share'],
      rows,
      caption=f'Seconds. {facts.time_note(stages)}',
    ),
  )


def _speed_chart(run: RunFiles, spans: Sequence[timeline.Span]) -> Html:
  series = [
    curves.create_series(spans, 'images/s', 'rate', 'images_per_second')
  ]
  values = curves.all_values(series)
  return curves.ladder_chart(run, spans)(
    'Images trained on per second, each epoch',
    series,
    y=charts.fit_scale(values),
    height=150,
    format_y=_thousands,
    summary=f'Up to {max(values, default=0):,.0f}.',
  )


def _thousands(value: float) -> str:
  return f'{value / 1000:g}k' if value >= 1000 else f'{value:g}'


def _step_histogram(stage: Mapping[str, Any]) -> Html | None:
  """Returns how many steps took how long, where the history says so."""
  bins = stage.get('step_seconds')
  if not bins:
    return None
  bars = [(_milliseconds(edge), count) for edge, count in _fill(bins)]
  total = sum(count for _, count in bars)
  return charts.histogram(
    f'{stage["name"]}: time of a step, up to',
    bars,
    summary=f'{total:,} steps.',
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


def _milliseconds(edge: float | None) -> str:
  if not formats.is_number(edge):
    return 'more'
  return f'{edge:.3g} s' if edge >= 1 else f'{1000 * edge:.3g} ms'

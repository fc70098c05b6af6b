"""The section of loss, accuracy and rate over the whole ladder."""

import csv
import functools
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib import parse

from jaxprog import formats
from jaxprog.reporting import facts, timeline
from jaxprog.reporting.page import charts, markup
from jaxprog.reporting.page.markup import Html, tag
from jaxprog.reporting.parts import Column, Table
from jaxprog.reporting.rundir import RunFiles

Draw = Callable[..., Html]

# Marks closer than this part of the axis are drawn as one.
_MARK_DISTANCE = 1 / 150

# Of a row of the history.
_COLUMNS = (
  Column('epoch', lambda row: str(row['epoch'])),
  Column('step', lambda row: f'{row["global_step"]:,}'),
  *(
    Column(title, functools.partial(formats.cell, field))
    for title, field in (
      ('train loss', 'train_loss'),
      ('train top-1', 'train_top1'),
      ('val loss', 'val_loss'),
      ('val top-1', 'val_top1'),
      ('balanced top-1', 'val_balanced_top1'),
      ('average top-1', 'ema_top1'),
      ('val top-5', 'val_top5'),
      ('rate', 'learning_rate'),
      ('grad norm', 'grad_norm'),
      ('images/s', 'images_per_second'),
      ('input wait', 'input_wait'),
      ('time', 'seconds'),
    )
  ),
)


def curves(run: RunFiles) -> Iterator[Html]:
  """Yields loss, accuracy and rate over the whole ladder."""
  spans = timeline.spans(run.stages)
  if not spans:
    yield tag('p', 'No epoch is finished yet.')
    return
  draw = ladder_chart(run, spans)
  yield tag(
    'p',
    'Point at an epoch to read its figures.',
    tag('span', ' Drag to zoom; a double click shows all.', class_='scripted'),
    class_='note',
  )
  yield _loss_chart(draw, spans)
  yield _top1_chart(draw, spans)
  yield _rate_chart(draw, spans)
  tables = (_table(x.stage) for x in spans)
  yield tag('details', tag('summary', 'Every epoch in figures'), *tables)
  yield tag(
    'p',
    tag(
      'a',
      'Download every epoch as CSV',
      href=f'data:text/csv;charset=utf-8,{parse.quote(_csv(spans), safe=",")}',
      download=f'{run.name}.csv',
    ),
  )


def _csv(spans: Sequence[timeline.Span]) -> str:
  """Returns all rows of the history, whole numbers and not."""
  rows = [(x.stage['name'], row) for x in spans for row in x.stage['epochs']]
  fields = list(dict.fromkeys(field for _, row in rows for field in row))
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(['stage', *fields])
  writer.writerows([name, *map(row.get, fields)] for name, row in rows)
  return out.getvalue()


def _table(stage: Mapping[str, Any]) -> Html:
  """Returns the rows of a stage, without columns that say nothing."""
  rows = stage['epochs']
  said = [x for x in _columns(stage) if any(x.cell(row) != '-' for row in rows)]
  return markup.render(Table(said, rows, stage['name']))


def _columns(stage: Mapping[str, Any]) -> list[Column]:
  skipped = '' if facts.shows_top5(stage) else 'val top-5'
  return [x for x in _COLUMNS if x.title != skipped]


def ladder_chart(run: RunFiles, spans: Sequence[timeline.Span]) -> Draw:
  """Returns charts.line_chart with the ladder's stages, resumes, incidents."""
  x_end = spans[-1].end
  hints = [
    (span.begin + row['epoch'], _describe(span.stage, row))
    for span in spans
    for row in span.stage['epochs']
  ]
  return functools.partial(
    charts.line_chart,
    x_end=x_end,
    x_label='epochs, all stages',
    spans=spans,
    marks=events(run, spans, x_end),
    hints=hints,
  )


def _describe(stage: Mapping[str, Any], row: Mapping[str, Any]) -> str:
  """Returns the figures of an epoch, a line each."""
  cells = ((column.title, column.cell(row)) for column in _columns(stage))
  figures = (f'{title} {cell}' for title, cell in cells if cell != '-')
  return '\n'.join((stage['name'], *figures))


def create_line(
  spans: Sequence[timeline.Span],
  name: str,
  style: str,
  field: str,
  scale: float = 1.0,
) -> charts.Series:
  """Returns a field of all rows as a line that breaks between stages."""
  points: list[timeline.Point] = []
  for span in spans:
    points += [(span.begin, None), *span.points(field, scale)]
  return charts.Series(name, style, points)


def events(
  run: RunFiles, spans: Sequence[timeline.Span], x_end: float
) -> list[charts.Mark]:
  """Returns resumes, rollbacks and other incidents of known steps.

  Those of a kind that would touch become one mark that names all.
  """
  found: dict[tuple[str, int], tuple[float, list[str]]] = {}
  for style, x, text in sorted(_events(run, spans)):
    key = style, round(x / x_end / _MARK_DISTANCE)
    found.setdefault(key, (x, []))[1].append(text)
  return [
    charts.Mark(
      style,
      x,
      '; '.join(texts[:3]) + f'; and {len(texts) - 3} more' * (len(texts) > 3),
    )
    for (style, _), (x, texts) in found.items()
  ]


def _events(
  run: RunFiles, spans: Sequence[timeline.Span]
) -> Iterator[tuple[str, float, str]]:
  """Yields style, place and text of each; rollbacks of an old log once."""
  logged = [x for x in run.incidents or () if x.get('step') is not None]
  for span in spans:
    stage, name = span.stage, span.stage['name']
    for step in stage.get('resumed_at_steps') or ():
      text = f'{name}: resumed at global step {step:,}'
      yield 'resume', span.position(step), text
    mine = [x for x in logged if x.get('stage') == name]
    found = [
      (x['step'], str(x.get('message') or x['kind']))
      for x in mine
      if x['kind'] != 'resume'
    ]
    if not any(x['kind'] == 'rollback' for x in mine):
      found += [
        (x['at'], f'{name}: rolled back from step {x["at"]:,} to {x["to"]:,}')
        for x in stage.get('rollbacks') or ()
      ]
    for step, text in found:
      yield 'incident', span.position(span.first_step() + step), text


def _loss_chart(draw: Draw, spans: Sequence[timeline.Span]) -> Html:
  smooth = {x.stage.get('label_smoothing') or 0.0 for x in spans} - {0.0}
  said = ' and '.join(f'{x:g}' for x in sorted(smooth))
  name = f'train, includes label smoothing {said}' if smooth else 'train'
  kinds = {x.stage.get('loss') or 'softmax' for x in spans}
  if 'bce' in kinds:
    name += f', {"in part " * (len(kinds) > 1)}binary cross-entropy'
  train = create_line(spans, name, 'train', 'train_loss')
  val = create_line(spans, 'validation', 'val', 'val_loss')
  values = train.values + val.values
  # Far above most of its values it has diverged.
  middle = statistics.median_high(values) if values else 1.0
  diverged = timeline.fit_scale(values).high > timeline.LOG_RATIO * middle
  last = spans[-1].stage['epochs'][-1]
  return draw(
    'Loss',
    [train, val],
    y=timeline.fit_scale(values, log=diverged),
    format_y='{:g}'.format,
    summary=f'Ends at {formats.cell("train_loss", last)} in training, '
    f'{formats.cell("val_loss", last)} in validation.',
  )


def _top1_chart(draw: Draw, spans: Sequence[timeline.Span]) -> Html:
  lines = [
    create_line(spans, 'train', 'train', 'train_top1', 100),
    create_line(spans, 'averaged weights', 'ema', 'ema_top1', 100),
    create_line(spans, 'validation', 'val', 'val_top1', 100),
  ]
  named = [(x.stage['name'], 'val', x) for x in spans]
  return draw_top1(draw, 'Top-1 accuracy', lines, named)


def draw_top1(
  draw: Draw,
  title: str,
  lines: Sequence[charts.Series],
  spans: Sequence[tuple[str, str, timeline.Span]],
  **arguments: Any,
) -> Html:
  """Returns lines of percents over that of guessing.

  `spans` are name, style, and what has a best.
  """
  labels, reached = [], []
  for name, style, span in spans:
    if best := span.stage['best']:
      text = formats.percent(best['top1'])
      at, value = span.begin + best['epoch'], 100 * best['top1']
      between = facts.interval(best['top1'], span.stage['num_eval_images'])
      low, high = (100 * x for x in between)
      labels.append(charts.Label(at, value, text, style, (low, high)))
      reached.append(f'{name} {text}, 95% interval {low:.1f} to {high:.1f}%')
  ends = [x.interval[1] for x in labels if x.interval]
  lines = [_chance_line([span for *_, span in spans]), *lines]
  values = [*ends, *(x for line in lines for x in line.values)]
  count = max(span.stage['num_eval_images'] for *_, span in spans)
  y = timeline.fit_top1(values, count)
  return draw(
    title + (' (errors on a logarithmic axis)' if y.least_error else ''),
    lines,
    y=y,
    format_y='{:.4g}%'.format,
    labels=labels,
    summary=f'Best: {"; ".join(reached) or "none yet"}.',
    **arguments,
  )


def _chance_line(spans: Sequence[timeline.Span]) -> charts.Series:
  levels = {(x.begin, x.end, 100 * facts.chance(x.stage)): None for x in spans}
  points: list[timeline.Point] = []
  for begin, end, level in levels:
    points += [(begin, None), (begin, level), (end, level)]
  return charts.Series('chance', 'chance', points, stairs=True)


def _rate_chart(draw: Draw, spans: Sequence[timeline.Span]) -> Html:
  points: list[timeline.Point] = []
  labels = []
  for span in spans:
    rates = span.rates()
    points += [(span.begin, None), *rates]
    known = [(y, -x) for x, y in rates if y is not None]
    if known:
      peak, at = max(known)
      labels.append(charts.Label(-at, peak, f'{peak:.3g}', 'rate'))
  line = charts.Series('learning rate', 'rate', points, stairs=True)
  y = timeline.fit_rates(spans)
  return draw(
    'Learning rate',
    [line],
    y=y,
    height=150,
    format_y='{:g}'.format,
    labels=labels,
    sign='peak',
    summary=f'At most {max(line.values, default=0):.3g}'
    f'{", on a logarithmic axis" if y.log else ""}.',
  )

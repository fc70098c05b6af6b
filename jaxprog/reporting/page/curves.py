"""The section of loss, accuracy, rate and sizes over the whole ladder."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.reporting import timeline
from jaxprog.reporting.page import charts, markup
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles

Draw = Callable[..., Html]


EPOCHS_LABEL = 'epochs, all stages'


# Marks closer than this part of the axis are drawn as one.
_MARK_DISTANCE = 1 / 150


def curves(run: RunFiles) -> Html:
  """Returns loss, accuracy, rate, and sizes over the whole ladder."""
  spans = timeline.spans(run.stages)
  if not spans:
    return tag('p', 'No epoch is finished yet.')
  draw = ladder_chart(run, spans)
  return join(
    tag('p', 'Point at an epoch to read its figures.', class_='note'),
    _loss_chart(draw, spans),
    _top1_chart(draw, spans),
    _rate_chart(draw, spans),
    _sizes(spans),
    _epoch_tables(run.stages),
  )


def ladder_chart(run: RunFiles, spans: Sequence[timeline.Span]) -> Draw:
  """Returns charts.line_chart with the ladder's stages, resumes, incidents."""
  x_end = spans[-1].end
  hints = [
    (span.begin + row['epoch'], _describe_row(span.stage, row))
    for span in spans
    for row in span.stage['epochs']
  ]
  return functools.partial(
    charts.line_chart,
    x_end=x_end,
    x_label=EPOCHS_LABEL,
    bands=bands(spans),
    marks=events(run, spans, x_end),
    hints=hints,
  )


def create_series(
  spans: Sequence[timeline.Span],
  name: str,
  style: str,
  field: str,
  scale: float = 1.0,
) -> charts.Series:
  """Returns a field of all rows as a line that breaks between stages."""
  points: list[charts.Point] = []
  for span in spans:
    points += [(span.begin, None), *span.points(field, scale)]
  return charts.Series(name, style, points)


def all_values(series: Sequence[charts.Series]) -> list[float]:
  """Returns all values of `series`."""
  return [y for s in series for _, y in s.points if y is not None]


def bands(spans: Sequence[timeline.Span]) -> list[charts.Band]:
  """Returns the stages as named parts of the axis."""
  return [
    charts.Band(
      f'{x.number} {x.stage["name"]}',
      x.begin,
      x.end,
      f'{x.stage["image_size"]} px',
    )
    for x in spans
  ]


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
    charts.Mark(style, x, _few(texts, '; '))
    for (style, _), (x, texts) in found.items()
  ]


def _events(
  run: RunFiles, spans: Sequence[timeline.Span]
) -> Iterator[tuple[str, float, str]]:
  logged = [x for x in run.incidents if x.get('step') is not None]
  for span in spans:
    name = span.stage['name']
    for step in span.stage.get('resumed_at_steps') or ():
      yield (
        'resume',
        span.position(step),
        f'{name}: resumed at global step {step:,}',
      )
    mine = [x for x in logged if x.get('stage') == name]
    for x in mine:
      if x['kind'] != 'resume':
        at = span.position(span.first_step() + x['step'])
        yield 'incident', at, str(x.get('message') or x['kind'])
    if not any(x['kind'] == 'rollback' for x in mine):
      for x in span.stage.get('rollbacks') or ():
        at = span.position(span.first_step() + x['at'])
        yield (
          'incident',
          at,
          f'{name}: rolled back from step {x["at"]:,} to {x["to"]:,}',
        )


def _few(texts: Sequence[str], separator: str, limit: int = 3) -> str:
  more = f'{separator}and {len(texts) - limit} more' * (len(texts) > limit)
  return separator.join(texts[:limit]) + more


def _describe_row(stage: Mapping[str, Any], row: Mapping[str, Any]) -> str:
  """Returns the figures of an epoch, a line each."""

  def cell(field: str) -> str:
    return formats.cell(field, row)

  average = f'\naverage: top-1 {cell("ema_top1")}' if 'ema_top1' in row else ''
  return (
    f'{stage["name"]}, epoch {row["epoch"]}, step {row["global_step"]:,}\n'
    f'train: loss {cell("train_loss")}, top-1 {cell("train_top1")}\n'
    f'val: loss {cell("val_loss")}, top-1 {cell("val_top1")}{average}\n'
    f'rate {cell("learning_rate")}, {cell("images_per_second")} images/s'
  )


def _loss_chart(draw: Draw, spans: Sequence[timeline.Span]) -> Html:
  series = [
    create_series(spans, 'train', 'train', 'train_loss'),
    create_series(spans, 'validation', 'val', 'val_loss'),
  ]
  y = charts.fit_scale(all_values(series))
  if y.high > charts.LOG_RATIO * _median(
    all_values(series)
  ):  # It has diverged.
    y = charts.fit_scale(all_values(series), log=True)
  last = spans[-1].stage['epochs'][-1]
  return draw(
    'Loss',
    series,
    y=y,
    format_y='{:g}'.format,
    summary=f'Ends at {formats.cell("train_loss", last)} in training, '
    f'{formats.cell("val_loss", last)} in validation.',
  )


def _median(values: Sequence[float]) -> float:
  return sorted(values)[len(values) // 2] if values else 1.0


def _top1_chart(draw: Draw, spans: Sequence[timeline.Span]) -> Html:
  fields = (
    ('train', 'train', 'train_top1'),
    ('averaged weights', 'ema', 'ema_top1'),
    ('validation', 'val', 'val_top1'),
  )
  labels = [
    charts.Label(
      span.begin + best['epoch'],
      100 * best['top1'],
      f'{100 * best["top1"]:.1f}%',
      'val',
    )
    for span in spans
    if (best := span.stage['best'])
  ]
  reached = ', '.join(
    f'{x.stage["name"]} {formats.percent(x.stage["best"]["top1"])}'
    for x in spans
    if x.stage['best']
  )
  return draw(
    'Top-1 accuracy',
    [create_series(spans, *field, scale=100.0) for field in fields],
    y=charts.Scale(0, 104),
    y_ticks=range(0, 101, 20),
    format_y='{:g}%'.format,
    labels=labels,
    summary=f'Best: {reached or "none yet"}.',
  )


def _rate_chart(draw: Draw, spans: Sequence[timeline.Span]) -> Html:
  points: list[charts.Point] = []
  for span in spans:
    points += [(span.begin, None), *span.rates()]
  series = [charts.Series('learning rate', 'rate', points)]
  y = charts.fit_scale(all_values(series), log=True)
  return draw(
    'Learning rate',
    series,
    y=y,
    height=150,
    format_y='{:g}'.format,
    summary=f'At most {max(all_values(series), default=0):.3g}'
    f'{", on a logarithmic axis" if y.log else ""}.',
  )


def _sizes(spans: Sequence[timeline.Span]) -> Html:
  """Returns image and batch size over the ladder."""

  def row(field: str) -> list[tuple[float, float, float]]:
    return [segment for span in spans for segment in span.segments(field)]

  return join(
    tag('h3', 'Image and batch size'),
    charts.strip_chart(
      {'px': row('image_size'), 'batch': row('batch_size')}, spans[-1].end
    ),
  )


def _epoch_tables(stages: Sequence[Mapping[str, Any]]) -> Html:
  fields = {
    'epoch': 'epoch',
    'step': 'global_step',
    'train loss': 'train_loss',
    'train top-1': 'train_top1',
    'val loss': 'val_loss',
    'val top-1': 'val_top1',
    'val top-5': 'val_top5',
    'rate': 'learning_rate',
    'grad norm': 'grad_norm',
    'images/s': 'images_per_second',
    'input wait': 'input_wait',
    'time': 'seconds',
  }

  def row(values: Mapping[str, Any]) -> list[object]:
    cells = [formats.cell(x, values) for x in list(fields.values())[2:]]
    return [values['epoch'], f'{values["global_step"]:,}', *cells]

  tables = [
    markup.table(
      list(fields),
      [row(values) for values in stage['epochs']],
      caption=stage['name'],
      left=(),
    )
    for stage in stages
    if stage['epochs']
  ]
  return tag('details', tag('summary', 'Every epoch in figures'), *tables)

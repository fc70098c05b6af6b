"""Sections of the report's page, each a function of a run."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import incidents as incidents_lib
from jaxprog.reporting import baselines, report, timeline
from jaxprog.reporting.page import charts, markup
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import Run

Draw = Callable[..., Html]

EPOCHS_LABEL = 'epochs, all stages'

# Incidents that a page lists; the log has them all.
_MAX_INCIDENTS = 60
# Marks closer than this part of the axis are drawn as one.
_MARK_DISTANCE = 1 / 150

_SPLIT = (
  ('training', 't-training'),
  ('waiting for input', 't-wait'),
  ('evaluation', 't-eval'),
  ('hand-over', 't-hand'),
)


def scorecard(run: Run) -> Html:
  """Returns each stage beside the mission's ranges and published results."""
  compared = baselines.compare(run.history, run.model)
  scores = report.scorecard(run.history)
  return join(
    _ranges(scores, compared),
    _score_table(scores),
    *(
      tag('p', x, class_='note') for x in report.scorecard_remarks(run.history)
    ),
    _baseline_table(compared),
    _speed_lines(run),
  )


def curves(run: Run) -> Html:
  """Returns loss, accuracy, rate, and sizes over the whole ladder."""
  spans = timeline.spans(run.stages)
  if not spans:
    return tag('p', 'No epoch is finished yet.')
  draw = _ladder_chart(run, spans)
  return join(
    tag('p', 'Point at an epoch to read its figures.', class_='note'),
    _loss_chart(draw, spans),
    _top1_chart(draw, spans),
    _rate_chart(draw, spans),
    _sizes(spans),
    _epoch_tables(run.stages),
  )


def hand_over(run: Run) -> Html:
  """Returns what each stage took over from which, and what it was worth."""
  rows = [_hand_over_row(run, stage) for stage in run.stages]
  titles = [
    'stage',
    'from',
    'carried',
    'fresh',
    'dropped',
    'seconds',
    'before',
    'first epoch',
    'what differs',
  ]
  return join(
    markup.table(
      titles,
      rows,
      caption='Weights handed from stage to stage',
      left=(0, 1, 2, 3, 4, 8),
    ),
    tag(
      'p',
      'seconds: from the end of the stage before until the first batch is '
      'asked for, waiting for the compiler included. before: the best top-1 '
      'of the stage the weights come from, on its own data. first epoch: '
      'top-1 after one epoch, on this stage’s data. Where classes or '
      'images differ, the two are not the same question.',
      class_='note',
    ),
  )


def time(run: Run) -> Html:
  """Returns where the seconds went, and how fast images were trained on."""
  spans = timeline.spans(run.stages)
  return join(
    _split_bars(run.stages),
    _speed_chart(run, spans) if spans else None,
    tag('div', *map(_step_histogram, run.stages), class_='pair'),
  )


def notes(run: Run) -> Html:
  """Returns what a reader must know beside the figures, and the incidents."""
  found = report.notes(run.stages, run.planned)
  parts = [
    tag('ul', *(tag('li', x) for x in found), class_='notes')
    if found
    else tag('p', 'Nothing to note.')
  ]
  parts.append(tag('h3', 'Incidents'))
  if not run.incidents:
    return join(*parts, tag('p', 'None were recorded.'))
  summaries = incidents_lib.summarise(run.incidents)
  parts.append(tag('ul', *(tag('li', x) for x in summaries), class_='notes'))
  shown = list(run.incidents)[-_MAX_INCIDENTS:]
  fields = 'time', 'kind', 'stage', 'step', 'message'
  parts.append(
    markup.table(
      list(fields),
      [[_cell(incident, field) for field in fields] for incident in shown],
      caption=f'The last {len(shown)} of {len(run.incidents):,}; '
      'incidents.jsonl has all of them',
      left=(0, 1, 2, 4),
    )
  )
  return join(*parts)


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
  run: Run, spans: Sequence[timeline.Span], x_end: float
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
  run: Run, spans: Sequence[timeline.Span]
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


def _ranges(
  scores: Sequence[report.Score], compared: Sequence[baselines.Comparison]
) -> Html | None:
  """Returns a bar a stage with the run, the range and the references."""
  rows = []
  for score in scores:
    mine = [x for x in compared if x.stage == score.stage]
    expected = score.expectation.top1 if score.expectation else None
    if not expected and not mine:
      continue
    reached = formats.percent(score.top1)
    said = f', expected {formats.percents(expected)}' if expected else ''
    bar = charts.range_bar(
      expected,
      [(_name(x.baseline), x.baseline.top1[1]) for x in mine],
      score.top1,
      f'{score.stage}: top-1 {reached}{said}',
    )
    rows.append(_row(score.stage, bar, reached))
  if not rows:
    return None
  key = [
    tag('span', '● this run', class_='entry val'),
    tag('span', '■ expected', class_='entry t-training'),
    tag('span', '| published', class_='entry'),
  ]
  return tag(
    'figure',
    tag('figcaption', tag('b', 'Best top-1'), *key),
    tag('div', *rows, _row('', charts.percent_axis(), ''), class_='rows'),
  )


def _row(name: str, chart: Html, value: str) -> Html:
  """Returns three cells of a grid."""
  return join(
    tag('span', name, title=name), chart, tag('span', value, class_='num')
  )


def _name(x: baselines.Baseline) -> str:
  return f'{x.model}, {x.num_epochs} epochs, {x.image_size} px ({x.source})'


def _score_table(scores: Sequence[report.Score]) -> Html:
  if not any(score.expectation for score in scores):
    text = 'The mission states no expectation for the data of these stages.'
    return tag('p', text)
  return markup.table(
    ['stage', 'top-1', 'expected', 'is', 'time', 'expected', 'is'],
    [_score_row(score) for score in scores],
    caption='Beside what the mission expects, given without evidence',
    left=(0, 2, 3, 5, 6),
  )


def _score_row(score: report.Score) -> list[object]:
  expected = score.expectation
  star = ' *' if expected and not score.comparable else ''
  return [
    score.stage,
    formats.percent(score.top1),
    formats.percents(expected.top1) if expected else 'no expectation stated',
    score.top1_verdict + star if score.top1_verdict else '',
    formats.duration(score.minutes * 60),
    formats.minutes(expected.minutes) if expected else '',
    score.minutes_verdict + star if expected else '',
  ]


def _baseline_table(compared: Sequence[baselines.Comparison]) -> Html:
  title = tag('h3', 'Beside published results')
  if not compared:
    text = 'None is known for the data and classes of these stages.'
    return join(title, tag('p', text, class_='note'))
  rows: list[list[object]] = [
    [
      x.stage,
      formats.percent(x.top1),
      formats.percents(x.baseline.top1),
      x.baseline.model,
      str(x.baseline.image_size),
      str(x.baseline.eval_size),
      str(x.baseline.num_epochs),
      tag('span', '; '.join(x.differs) or 'nothing', class_='long'),
      x.baseline.source,
    ]
    for x in compared
  ]
  titles = ['stage', 'here', 'published', 'network', 'px', 'tested at']
  return join(
    title,
    markup.table(
      [*titles, 'epochs', 'what differs', 'source'],
      rows,
      caption='Top-1 of others on the same data and classes, at the nearest '
      'image sizes and length they give',
      left=(0, 3, 7, 8),
    ),
  )


def _speed_lines(run: Run) -> Html | None:
  devices = (run.environment or {}).get('devices') or {}
  lines = []
  for stage in run.stages:
    speed = report.median_speed(stage)
    known = baselines.compare_speed(stage, run.model, str(devices.get('kind')))
    if known and speed:
      low, high = known.images_per_second
      reached = f'{low:,.0f}' + (f'–{high:,.0f}' if high > low else '')
      lines.append(
        tag(
          'li',
          f'{stage["name"]}: {speed / devices.get("count", 1):,.0f} images/s '
          f'a device, published for {known.device}: {reached} ({known.source})',
        )
      )
  return tag('ul', *lines, class_='notes') if lines else None


def _series(
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


def _values(series: Sequence[charts.Series]) -> list[float]:
  return [y for s in series for _, y in s.points if y is not None]


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


def _ladder_chart(run: Run, spans: Sequence[timeline.Span]) -> Draw:
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


def _loss_chart(draw: Draw, spans: Sequence[timeline.Span]) -> Html:
  series = [
    _series(spans, 'train', 'train', 'train_loss'),
    _series(spans, 'validation', 'val', 'val_loss'),
  ]
  y = charts.fit_scale(_values(series))
  if y.high > charts.LOG_RATIO * _median(_values(series)):  # It has diverged.
    y = charts.fit_scale(_values(series), log=True)
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
    [_series(spans, *field, scale=100.0) for field in fields],
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
  y = charts.fit_scale(_values(series), log=True)
  return draw(
    'Learning rate',
    series,
    y=y,
    height=150,
    format_y='{:g}'.format,
    summary=f'At most {max(_values(series), default=0):.3g}'
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


def _hand_over_row(run: Run, stage: Mapping[str, Any]) -> list[object]:
  transfer = stage['transfer'] or {}
  source = history_lib.find_stage(run.history, transfer.get('from') or '')
  first = stage['epochs'][0] if stage['epochs'] else {}
  before = source['best']['top1'] if source and source['best'] else None
  seconds = stage.get('handover_seconds')
  origin: object = 'nothing: fresh weights'
  if transfer.get('from'):
    how = [f'{transfer.get("weights", "best")} weights']
    if transfer.get('operator', 'plain') != 'plain':
      how.append(str(transfer['operator']))
    origin = join(transfer['from'], tag('small', ', '.join(how)))
  return [
    stage['name'],
    origin,
    *(_modules(transfer.get(x)) for x in ('carried', 'fresh', 'dropped')),
    f'{seconds:.1f}' if formats.is_number(seconds) else '–',
    formats.percent(before),
    formats.percent(first.get('val_top1')),
    tag('span', _stage_difference(source, stage), class_='long'),
  ]


def _modules(value: Any) -> object:
  """Returns how many modules, and their names in small print."""
  if value is None or isinstance(value, str | int):
    return '–' if value is None else value
  names = list(value)
  if not names:
    return 'none'
  if len(names) == 1:
    return names[0]
  listed = tag('small', ', '.join(names), class_='names')
  return join(f'{len(names)} modules', listed)


def _stage_difference(
  source: Mapping[str, Any] | None, stage: Mapping[str, Any]
) -> str:
  """Returns why the accuracies before and after are not the same question."""
  if source is None:
    return '–'
  differs = []
  if source['dataset'] != stage['dataset']:
    differs.append(f'other images: {source["dataset"]} → {stage["dataset"]}')
  if source['num_classes'] != stage['num_classes']:
    differs.append(f'{source["num_classes"]} → {stage["num_classes"]} classes')
  elif 'head' in ((stage['transfer'] or {}).get('fresh') or ()):
    differs.append('other classes')
  if source['image_size'] != stage['image_size']:
    differs.append(f'{source["image_size"]} → {stage["image_size"]} px')
  return '; '.join(differs) or 'nothing: same data, classes and size'


def _split_bars(stages: Sequence[Mapping[str, Any]]) -> Html:
  """Returns a bar a stage of where its time went, and the seconds."""
  rows: list[list[object]] = []
  bars = []
  for stage in stages:
    split = report.time_split(stage)
    total = sum(split)
    parts = [
      (name, style, x) for (name, style), x in zip(_SPLIT, split, strict=True)
    ]
    said = ', '.join(f'{name} {x:.1f} s' for name, _, x in parts)
    duration = formats.duration(total)
    bar = charts.stacked_bar(parts, f'{stage["name"]}: {said}')
    bars.append(_row(stage['name'], bar, duration))
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
      caption=f'Seconds. {report.time_note(stages)}',
    ),
  )


def _speed_chart(run: Run, spans: Sequence[timeline.Span]) -> Html:
  series = [_series(spans, 'images/s', 'rate', 'images_per_second')]
  values = _values(series)
  return _ladder_chart(run, spans)(
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


def _cell(incident: Mapping[str, Any], field: str) -> object:
  value = incident.get(field)
  if value is None:
    return '–'
  if field == 'message':
    return tag('span', value, class_='long')
  return f'{value:,}' if isinstance(value, int) else value

"""The section that holds a run against the mission and against others."""

from collections.abc import Sequence

from jaxprog import formats
from jaxprog.reporting import baselines, facts
from jaxprog.reporting.page import charts, markup
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles


def scorecard(run: RunFiles) -> Html:
  """Returns each stage beside the mission's ranges and published results."""
  compared = baselines.compare(run.history, run.model)
  scores = facts.scorecard(run.history)
  return join(
    _ranges(scores, compared),
    _score_table(scores),
    *(tag('p', x, class_='note') for x in facts.scorecard_remarks(run.history)),
    _baseline_table(compared),
    _speed_lines(run),
  )


def _ranges(
  scores: Sequence[facts.Score], compared: Sequence[baselines.Beside]
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
    rows.append(charts.row(score.stage, bar, reached))
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
    tag('div', *rows, charts.row('', charts.percent_axis(), ''), class_='rows'),
  )


def _name(x: baselines.Baseline) -> str:
  return f'{x.model}, {x.num_epochs} epochs, {x.image_size} px ({x.source})'


def _score_table(scores: Sequence[facts.Score]) -> Html:
  if not any(score.expectation for score in scores):
    text = 'The mission states no expectation for the data of these stages.'
    return tag('p', text)
  return markup.table(
    ['stage', 'top-1', 'expected', 'is', 'time', 'expected', 'is'],
    [_score_row(score) for score in scores],
    caption='Beside what the mission expects, given without evidence',
    left=(0, 2, 3, 5, 6),
  )


def _score_row(score: facts.Score) -> list[object]:
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


def _baseline_table(compared: Sequence[baselines.Beside]) -> Html:
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


def _speed_lines(run: RunFiles) -> Html | None:
  devices = (run.environment or {}).get('devices') or {}
  lines = []
  for stage in run.stages:
    speed = facts.median_speed(stage)
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

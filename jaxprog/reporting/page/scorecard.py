"""The section that holds a run against the mission and against others."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.reporting import baselines, facts
from jaxprog.reporting.page import charts, markup
from jaxprog.reporting.page.markup import Html, tag
from jaxprog.reporting.parts import Column, Heading, Part, Table, Words
from jaxprog.reporting.rundir import RunFiles

_SCORES = (
  Column('stage', lambda x: x.stage, left=True),
  Column('top-1', lambda x: formats.percent(x.top1)),
  Column('expected', lambda x: _expected(x), left=True),
  Column('is', lambda x: _starred(x, x.top1_verdict), left=True),
  Column('time', lambda x: formats.duration(x.minutes * 60)),
  Column(
    'expected',
    lambda x: formats.minutes(x.expectation.minutes) if x.expectation else '',
    left=True,
  ),
  Column('is', lambda x: _starred(x, x.minutes_verdict), left=True),
)
_PUBLISHED = (
  Column('stage', lambda x: x.stage, left=True),
  Column('here', lambda x: formats.percent(x.top1)),
  Column('published', lambda x: formats.percents(x.baseline.top1)),
  Column('network', lambda x: x.baseline.model, left=True),
  Column('px', lambda x: str(x.baseline.image_size)),
  Column('tested at', lambda x: str(x.baseline.eval_size)),
  Column('epochs', lambda x: str(x.baseline.num_epochs)),
  Column(
    'what differs', lambda x: '; '.join(x.differs) or 'nothing', left=True
  ),
  Column('source', lambda x: x.baseline.source, left=True),
)


def scorecard(run: RunFiles) -> Iterator[Part]:
  """Yields each stage beside the mission's ranges and published results.

  Nothing where there are neither for the data of any stage.
  """
  compared = baselines.compare(run)
  scores = [facts.score(stage) for stage in run.stages]
  expected = any(score.expectation for score in scores)
  if not expected and not compared:
    return
  yield _ranges(scores, compared)
  if expected:
    yield Table(_SCORES, scores, 'Beside what the mission expects')
    yield 'Expectation of the mission, given without evidence.'
    yield from (score.remark for score in scores if score.remark)
  yield Heading('Published results')
  if compared:
    yield Words([[_describe(x) for x in compared]])
    yield markup.render(
      Table(
        _PUBLISHED,
        compared,
        'Top-1 of others on the same data and classes, at the nearest image '
        'sizes and length they give',
      )
    )
  else:
    yield 'None is known for the data and classes of these stages.'
  if speeds := [x for stage in run.stages for x in _speeds(run, stage)]:
    yield speeds


def _expected(score: facts.Score) -> str:
  expected = score.expectation
  return (
    formats.percents(expected.top1) if expected else 'no expectation stated'
  )


def _starred(score: facts.Score, verdict: str) -> str:
  return f'{verdict} *' if verdict and score.remark else verdict


def _describe(x: baselines.Beside) -> str:
  """Returns a sentence about a stage and a published result."""
  differs = f' Differs: {"; ".join(x.differs)}.' if x.differs else ''
  return (
    f'{x.stage}: {formats.percent(x.top1)} here, '
    f'{formats.percents(x.baseline.top1)} by {x.baseline.model} tested at '
    f'{x.baseline.eval_size} px ({x.baseline.source}).{differs}'
  )


def _ranges(
  scores: Sequence[facts.Score], compared: Sequence[baselines.Beside]
) -> Html:
  """Returns a bar a stage with the run, the range and the references."""
  rows = []
  for score in scores:
    references = [
      (
        f'{x.model}, {x.num_epochs} epochs, {x.image_size} px ({x.source})',
        x.top1[1],
      )
      for stage, _, x, _ in compared
      if stage == score.stage
    ]
    expected = score.expectation.top1 if score.expectation else None
    if expected or references:
      reached = formats.percent(score.top1)
      said = f', expected {formats.percents(expected)}' if expected else ''
      said = f'{score.stage}: top-1 {reached}{said}'
      bar = charts.range_bar(expected, references, score.top1, said)
      rows.append((score.stage, bar, reached))
  if not rows:
    return Html()
  key = [
    tag('span', '● this run', class_='entry val'),
    tag('span', tag('i', class_='key t-training'), 'expected', class_='entry'),
    tag('span', '| published', class_='entry'),
  ]
  ticks = charts.axis([(x / 100, f'{x}%') for x in range(0, 101, 25)])
  rows.append(('', ticks, ''))
  return charts.bar_rows('Best top-1', key, rows)


def _speeds(run: RunFiles, stage: Mapping[str, Any]) -> Iterator[str]:
  """Yields how fast a stage was, if that was published of its devices."""
  devices = (run.environment or {}).get('devices') or {}
  speed = facts.median_speed(stage)
  if not speed or (run.model, stage['image_size']) != ('resnet50', 224):
    return
  for device, (published, source) in baselines.SPEEDS.items():
    if device.lower() in str(devices.get('kind')).lower():
      yield (
        f'{stage["name"]}: {speed / devices.get("count", 1):,.0f} images/s a '
        f'device, published for {device}: {published:,} ({source})'
      )

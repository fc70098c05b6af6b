"""The section about single classes and images, stage by stage."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.reporting import facts
from jaxprog.reporting.page import charts, markup
from jaxprog.reporting.page.markup import Html, join, render, tag
from jaxprog.reporting.parts import Column, Part, Table, Words
from jaxprog.reporting.rundir import RunFiles

# So many classes are listed each; of more, the extremes are.
_MAX_LISTED = 30
_EXTREMES = 10
# So many classes make a confusion matrix that can be read.
_MAX_MATRIX = 20
_MAX_CONFUSIONS = 10

# Of label, what it was taken for, how often, and images of the label.
_CONFUSIONS = (
  Column('label', lambda x: x[0], left=True),
  Column('taken for', lambda x: x[1], left=True),
  Column('images', lambda x: f'{x[2]:,}'),
  Column('of', lambda x: f'{x[3]:,}'),
  Column('share', lambda x: formats.percent(x[2] / x[3])),
)


def classes(run: RunFiles) -> Iterator[Part]:
  """Yields what the best weights of each stage see; the last one unfolded.

  The text has the most frequent confusions alone.
  """
  seen = [stage for stage in run.stages if stage.get('diagnostics')]
  if not seen:
    yield tag('p', 'No stage is over yet: its best weights are looked at then.')
  yield Words([[x for stage in seen for x in _most_frequent(stage)]])
  yield Words([[x for stage in seen for x in _temperatures(run, stage)]])
  for stage in seen:
    yield _stage(stage, _find_fitted(run, stage), stage is seen[-1])


def _find_fitted(
  run: RunFiles, stage: Mapping[str, Any]
) -> Mapping[str, Any] | None:
  """Returns the temperature of the weights that the stage's figures are of."""
  found = run.temperatures.get(stage['name'])
  if found and found.get('epoch') == stage['diagnostics'].get('epoch'):
    return found
  return None


def _temperatures(run: RunFiles, stage: Mapping[str, Any]) -> Iterator[str]:
  if fitted := _find_fitted(run, stage):
    yield f'{stage["name"]}: {_describe_fitted(fitted)}'


def _most_frequent(stage: Mapping[str, Any]) -> Iterator[str]:
  words = [
    f'{label} taken for {taken}, {count:,} of {of:,}'
    for label, taken, count, of in facts.confusions(stage, 3)
  ]
  if words:
    yield f'{stage["name"]}: {"; ".join(words)}'


def _stage(
  stage: Mapping[str, Any], fitted: Mapping[str, Any] | None, unfolded: bool
) -> Html:
  found = stage['diagnostics']
  said = (
    f' {formats.percent(found.get("top1"))} of '
    f'{found.get("num_images", 0):,} images, weights of epoch '
    f'{found.get("epoch", "–")}'
  )
  return tag(
    'details',
    tag('summary', stage['name'], tag('small', said)),
    tag(
      'div',
      tag('div', _accuracies(found), _matrix(found)),
      tag(
        'div',
        tag('h4', 'Calibration'),
        _calibration(found),
        _fitted(fitted),
        tag('h4', 'Most frequent mistakes'),
        _confusions(stage),
      ),
      class_='pair',
    ),
    _worst(found, stage.get('bad_images') or {}),
    open='' if unfolded else None,
  )


def _accuracies(found: Mapping[str, Any]) -> Html:
  counted = [
    (name, right / count, count)
    for name, (count, right) in zip(
      found.get('classes', ()), found.get('per_class', ()), strict=False
    )
    if count
  ]
  if not counted:
    return join(tag('h4', 'Accuracy by class'), render('Not known.'))
  if len(counted) <= _MAX_LISTED:
    return _bar_list('Accuracy by class', counted)
  ordered = sorted(counted, key=lambda x: x[1])
  return join(
    _distribution([part for _, part, _ in counted]),
    _bar_list(f'The {_EXTREMES} worst', ordered[:_EXTREMES]),
    _bar_list(f'The {_EXTREMES} best', ordered[: -_EXTREMES - 1 : -1]),
  )


def _bar_list(title: str, rows: Sequence[tuple[str, float, int]]) -> Html:
  """Returns bars of (class, accuracy, images)."""
  found = []
  for name, part, count in rows:
    right = round(part * count)
    parts = [('right', 'bar', right), ('wrong', 'band', count - right)]
    bar = charts.stacked_bar(parts, f'{right:,} of {count:,} right')
    found.append((name, bar, formats.percent(part)))
  return charts.bar_rows(title, [], found)


def _distribution(parts: Sequence[float]) -> Html:
  """Returns how many classes reach which accuracy, in tenths."""
  counts = [0] * 10
  for part in parts:
    counts[min(int(10 * part), 9)] += 1
  rows = []
  for i, count in enumerate(counts):
    name = f'{10 * i}–{10 * i + 10}%'
    bar = charts.stacked_bar([('classes', 'bar', count)], name, max(counts))
    rows.append((name, bar, f'{count:,}'))
  return charts.bar_rows(
    f'Classes by their accuracy, all {len(parts):,}', [], rows
  )


def _calibration(found: Mapping[str, Any]) -> Html:
  bins = found.get('calibration')
  # The confidence of weights that are not finite is no number.
  if not bins or not all(formats.is_number(x) for bin in bins for x in bin):
    return render('Not known.')
  error = formats.percent(found.get('ece'))
  loss = formats.cell('nll', found)
  said = f'Expected calibration error {error}, mean log-loss {loss} nats'
  meaning = (
    'Bars below the dashed line: too sure. Fainter bars hold fewer images.'
  )
  return join(charts.reliability(bins, said), render(f'{said}. {meaning}'))


def _fitted(fitted: Mapping[str, Any] | None) -> Html | None:
  """Returns the calibration before and after, where one was fitted."""
  if fitted is None:
    return None
  charts_of = [
    join(
      tag('b', f'{when}, temperature {value:.3g}'),
      charts.reliability(
        fitted[when]['calibration'],
        f'{when}: expected calibration error '
        f'{formats.percent(fitted[when]["ece"])}',
      ),
    )
    for when, value in (('before', 1.0), ('after', fitted['temperature']))
  ]
  said = _describe_fitted(fitted)
  return join(*charts_of, render(f'{said[0].upper()}{said[1:]}.'))


def _describe_fitted(fitted: Mapping[str, Any]) -> str:
  before, after = (
    f'{formats.percent(x["ece"])}, {formats.cell("nll", x)} nats'
    for x in (fitted['before'], fitted['after'])
  )
  return (
    f'calibration error and log-loss {before} before and {after} after a '
    f'temperature of {fitted["temperature"]:.3g}, fitted on '
    f'{fitted["fitted_on"]} ({fitted["num_fitted"]:,}) and measured on '
    f'{fitted["measured_on"]} ({fitted["num_measured"]:,})'
  )


def _matrix(found: Mapping[str, Any]) -> Html | None:
  """Returns the confusion matrix, if it is complete and can be read."""
  names = found.get('classes', ())
  pairs = {
    (x['label'], x['predicted']): x['count']
    for x in found.get('confusions', ())
  }
  if not pairs or len(names) > _MAX_MATRIX:
    return None
  return join(
    tag('h4', 'Confusion matrix'),
    markup.scroll(charts.heat_map(names, pairs), 'Confusion matrix'),
    render('Rows: the label. Columns: what it was taken for.'),
  )


def _confusions(stage: Mapping[str, Any]) -> Html:
  mistakes = facts.confusions(stage, _MAX_CONFUSIONS)
  if not mistakes:
    return render(_describe_none(stage['diagnostics']))
  caption = 'Images of the label, how many of them were so mistaken'
  return render(Table(_CONFUSIONS, mistakes, caption))


def _describe_none(found: Mapping[str, Any]) -> str:
  """Returns what is known where no mix-up is listed."""
  per_class = found.get('per_class')
  if not per_class:
    return 'Not known.'
  count, right = map(sum, zip(*per_class, strict=True))
  if right == count:
    return 'None: no image was mistaken.'
  return (
    f'{count - right:,} of {count:,} images were not recognised; what they '
    'were taken for is not known.'
  )


def _worst(found: Mapping[str, Any], bad: Mapping[str, str]) -> Html | None:
  """Returns the worst mistakes; `bad` are the images that are undecodable."""
  mistakes = found.get('worst')
  if not mistakes:
    return None
  names = found.get('classes', ())
  return join(
    tag('h4', 'Mistakes of the highest loss'),
    tag(
      'ul',
      *(_mistake(x, names, x['name'] in bad) for x in mistakes),
      class_='worst',
    ),
  )


def _mistake(
  mistake: Mapping[str, Any], names: Sequence[str], undecodable: bool
) -> Html:
  label, taken = names[mistake['label']], names[mistake['predicted']]
  confidence = mistake['confidence']
  sure = f'{confidence:.0%}' if formats.is_number(confidence) else '-'
  short = f'taken for {taken}, {sure}'
  said = f'{label}, taken for {taken} with {sure} confidence'
  if undecodable:
    short, said = 'cannot be decoded', f'{label}, cannot be decoded'
  image = tag('span', 'no image', class_='no-image')
  if encoded := mistake.get('thumbnail'):
    image = tag('img', src=f'data:image/jpeg;base64,{encoded}', alt=said)
  title = f'{mistake["name"]}: loss {formats.cell("loss", mistake)}'
  return tag('li', image, tag('b', label), tag('br'), short, title=title)

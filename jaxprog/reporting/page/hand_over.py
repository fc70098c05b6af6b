"""The section on what each stage took over from which, and its worth."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxprog import formats
from jaxprog.monitoring import history as history_lib
from jaxprog.reporting import facts
from jaxprog.reporting.page.markup import tag
from jaxprog.reporting.parts import Column, Heading, Part, Table
from jaxprog.reporting.rundir import RunFiles

# Longer lists of names are a number, and the names are in small print.
_MAX_NAMES = 24


class _HandOver(NamedTuple):
  """A stage's record, and that of the stage its weights come from."""

  stage: Mapping[str, Any]
  source: Mapping[str, Any] | None

  @property
  def transfer(self) -> Mapping[str, Any]:
    return self.stage['transfer'] or {}


_COLUMNS = (
  Column('stage', lambda x: x.stage['name'], left=True),
  Column('from', lambda x: _origin(x.transfer), left=True),
  Column('carried', lambda x: _modules(x.transfer, 'carried'), left=True),
  Column('fresh', lambda x: _modules(x.transfer, 'fresh'), left=True),
  Column('dropped', lambda x: _modules(x.transfer, 'dropped'), left=True),
  Column(
    'takes',
    lambda x: formats.seconds(x.stage.get('handover_seconds')) or '-',
    wide=True,
  ),
  Column('before', lambda x: formats.percent(_before(x.source)), wide=True),
  Column('first epoch', lambda x: formats.percent(_after(x.stage)), wide=True),
  Column('what differs', lambda x: _difference(x), left=True, wide=True),
)

# Of what a linear classifier reads from one stage's features on the data of
# another.
PROBED = (
  Column('weights of', lambda x: x['from'], left=True),
  Column('on data of', lambda x: x['to'], left=True),
  Column('top-1', lambda x: formats.percent(x['top1'])),
  Column('95% interval', lambda x: _interval(x)),
  Column('random weights', lambda x: formats.percent(x['random_top1'])),
  Column('guessing', lambda x: formats.percent(1 / x['num_classes'])),
  Column('classes', lambda x: f'{x["num_classes"]:,}', wide=True),
  Column('of epoch', lambda x: str(x['epoch']), wide=True),
  Column('fitted on', lambda x: f'{x["num_train_images"]:,}', wide=True),
  Column('scored on', lambda x: f'{x["num_images"]:,}', wide=True),
)


def hand_over(run: RunFiles) -> Iterator[Part]:
  """Yields a table, and on the page what its figures are."""
  rows = [
    _HandOver(x, history_lib.find_stage(run.history, origin or ''))
    for x in run.stages
    for origin in [(x['transfer'] or {}).get('from')]
  ]
  yield Table(_COLUMNS, rows, 'Weights handed from stage to stage')
  yield tag(
    'p',
    'takes: from the end of the stage before until the first batch is '
    'asked for, without waiting for the compiler. before: the best top-1 '
    'of the stage the weights come from, on its own data. first epoch: '
    'top-1 after one epoch, on this stage’s data. Where classes or '
    'images differ, the two are not the same question.',
    class_='note',
  )
  if run.probed:
    yield Heading('What weights know of later data')
    yield Table(PROBED, run.probed, 'Linear probes of later data')
    yield (
      'Least squares on the features of a few training images a class (at most '
      f'{max(x["per_class"] for x in run.probed)}), before any training on '
      'them; random weights are those of a network that has seen nothing.'
    )


def _interval(row: Mapping[str, Any]) -> str:
  low, high = facts.interval(row['top1'], row['num_images'])
  return f'{100 * low:.1f} to {100 * high:.1f}%'


def _origin(transfer: Mapping[str, Any]) -> tuple[str, str]:
  if not transfer.get('from'):
    return '-', 'fresh weights'
  how = f'{transfer.get("weights", "best")} weights'
  operator = transfer.get('operator', 'plain')
  return transfer['from'], how if operator == 'plain' else f'{how}, {operator}'


def _modules(transfer: Mapping[str, Any], part: str) -> str | tuple[str, str]:
  """Returns the names of modules, or how many there are."""
  value = transfer.get(part)
  if value is None or isinstance(value, str | int):
    return '-' if value is None else str(value)
  names = ', '.join(value)
  if len(names) <= _MAX_NAMES:
    return names or 'none'
  return f'{len(value)} modules', names


def _before(source: Mapping[str, Any] | None) -> float | None:
  return source['best']['top1'] if source and source['best'] else None


def _after(stage: Mapping[str, Any]) -> float | None:
  return stage['epochs'][0]['val_top1'] if stage['epochs'] else None


def _difference(x: _HandOver) -> str:
  """Returns why the accuracies before and after are not the same question."""
  source, stage = x.source, x.stage
  if source is None:
    return '-'
  differs = []
  if source['dataset'] != stage['dataset']:
    differs.append(f'other images: {source["dataset"]} → {stage["dataset"]}')
  if source['num_classes'] != stage['num_classes']:
    differs.append(f'{source["num_classes"]} → {stage["num_classes"]} classes')
  elif 'head' in (x.transfer.get('fresh') or ()):
    differs.append('other classes')
  if source['image_size'] != stage['image_size']:
    differs.append(f'{source["image_size"]} → {stage["image_size"]} px')
  return '; '.join(differs) or 'nothing: same data, classes and size'

"""The section on what each stage took over from which."""

from collections.abc import Mapping
from typing import Any

from jaxprog import formats
from jaxprog.monitoring import history as history_lib
from jaxprog.reporting.page import markup
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles


def hand_over(run: RunFiles) -> Html:
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


def _hand_over_row(run: RunFiles, stage: Mapping[str, Any]) -> list[object]:
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

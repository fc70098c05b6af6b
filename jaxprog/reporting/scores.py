"""What an evaluation came to, as tables for a terminal."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from jaxprog import formats
from jaxprog.reporting.parts import Column
from jaxprog.reporting.report import terminal_table

# Rows at each end of the classes, from the worst one on, and of confusions.
_NUM_SHOWN = 5
# Undecodable images that are named.
_NUM_NAMED = 10

_OVERALL = (
  Column('top-1', lambda x: formats.percent(x['top1'])),
  Column('balanced top-1', lambda x: formats.percent(x.get('balanced_top1'))),
  Column('top-5', lambda x: formats.percent(x['top5'])),
  Column('loss', lambda x: f'{x["nll"]:.3f} nats'),
  Column('calibration error', lambda x: f'{x["ece"]:.3f}'),
)
# Of texts, a cell each.
_CLASSES = (
  Column('class', operator.itemgetter(0), left=True),
  Column('name', operator.itemgetter(1), left=True),
  Column('images', operator.itemgetter(2)),
  Column('right', operator.itemgetter(3)),
  Column('top-1', operator.itemgetter(4)),
)
_CONFUSIONS = (
  Column('most often mistaken', operator.itemgetter(0), left=True),
  Column('for', operator.itemgetter(1), left=True),
  Column('times', operator.itemgetter(2)),
)


def show(found: Mapping[str, Any], console: rich.console.Console) -> None:
  """Prints what tools.evaluate found: overall, classes, confusions."""
  among = f', chosen among {found["chosen_among"]:,} classes'
  console.print(
    rich.text.Text.assemble(
      (f'{found["stage"]}, {found["weights"]} weights', 'bold'),
      f' of epoch {found["epoch"]}, on {found["dataset"]}: '
      f'{found["count"]:,} images of {found["image_size"]} px'
      + ' and their mirror images' * found['flip_average']
      + among * (found['chosen_among'] != found['num_classes']),
    )
  )
  columns = [x for x in _OVERALL if x.cell(found) != '-']
  console.print(terminal_table(columns, [found]))
  console.print(_class_table(found['per_class']))
  classes = {x['class']: x for x in found['per_class']}
  # What another was taken for need not be in the data.
  confusions = [
    (
      classes[label]['name'],
      classes.get(taken, {'name': taken})['name'],
      f'{x["count"]:,} of {classes[label]["images"]:,}',
    )
    for x in found['confusions'][:_NUM_SHOWN]
    for label, taken in [(x['class'], x['predicted'])]
  ]
  if confusions:
    console.print(terminal_table(_CONFUSIONS, confusions))
  bad = found['bad_images']
  if bad:
    console.print(f'{len(bad):,} cannot be decoded and count as wrong:')
  for name in sorted(bad)[:_NUM_NAMED]:
    console.print(f'  {name}: {bad[name]}', markup=False, soft_wrap=True)


def _class_table(per_class: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  """Returns the classes from the worst one on; of many, both ends."""
  ranked = sorted(
    (x for x in per_class if x['images']), key=lambda x: (x['top1'], x['class'])
  )
  rows = [
    (
      x['class'],
      x['name'],
      f'{x["images"]:,}',
      f'{x["right"]:,}',
      formats.percent(x['top1']),
    )
    for x in ranked
  ]
  if len(rows) > 2 * _NUM_SHOWN:
    more = f'... {len(rows) - 2 * _NUM_SHOWN:,} more'
    rows[_NUM_SHOWN:-_NUM_SHOWN] = [(more, '', '', '', '')]
  named = any(x['class'] != x['name'] for x in ranked)
  return terminal_table(_CLASSES[:1] + _CLASSES[2 - named :], rows)

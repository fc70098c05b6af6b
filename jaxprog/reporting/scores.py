"""What an evaluation came to, as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

# Rows at each end of the classes, from the worst one on, and of confusions.
NUM_SHOWN = 5
# Undecodable images that are named.
NUM_NAMED = 10


def show(found: Mapping[str, Any], console: rich.console.Console) -> None:
  """Prints what tools.evaluate found: overall, classes, confusions."""
  console.print(
    rich.text.Text.assemble(
      (f'{found["stage"]}, {found["weights"]} weights', 'bold'),
      f' of epoch {found["epoch"]}, on {found["dataset"]}: '
      f'{found["count"]:,} images',
    )
  )
  console.print(overall_table(found))
  console.print(class_table(found['per_class']))
  if found['confusions']:
    console.print(confusion_table(found))
  bad = found['bad_images']
  if bad:
    console.print(f'{len(bad):,} cannot be decoded and count as wrong:')
  for name in sorted(bad)[:NUM_NAMED]:
    console.print(f'  {name}: {bad[name]}', markup=False, soft_wrap=True)


def overall_table(found: Mapping[str, Any]) -> rich.table.Table:
  """Returns the figures over all images."""
  table = _create_table('top-1', 'top-5', 'loss', 'calibration error')
  table.add_row(
    f'{found["top1"]:.1%}',
    f'{found["top5"]:.1%}',
    f'{found["nll"]:.3f} nats',
    f'{found["ece"]:.3f}',
  )
  return table


def class_table(per_class: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  """Returns the classes from the worst one on; of many, both ends."""
  ranked = sorted(
    (x for x in per_class if x['images']), key=lambda x: (x['top1'], x['class'])
  )
  named = any(x['class'] != x['name'] for x in ranked)
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for column in ('class', 'name')[: 1 + named]:
    table.add_column(column, overflow='fold')
  for column in ('images', 'right', 'top-1'):
    table.add_column(column, justify='right', no_wrap=True)
  for i, row in enumerate(ranked):
    if NUM_SHOWN <= i < len(ranked) - NUM_SHOWN:
      if i == NUM_SHOWN:
        table.add_row(f'... {len(ranked) - 2 * NUM_SHOWN:,} more')
      continue
    names = (row['class'], row['name'])[: 1 + named]
    figures = f'{row["images"]:,}', f'{row["right"]:,}', f'{row["top1"]:.1%}'
    table.add_row(*map(rich.text.Text, names), *figures)
  return table


def confusion_table(found: Mapping[str, Any]) -> rich.table.Table:
  """Returns which classes were most often taken for which."""
  names = {x['class']: x['name'] for x in found['per_class']}
  images = {x['class']: x['images'] for x in found['per_class']}
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('most often mistaken', overflow='fold')
  table.add_column('for', overflow='fold')
  table.add_column('times', justify='right', no_wrap=True)
  for pair in found['confusions'][:NUM_SHOWN]:
    label, taken = pair['class'], pair['predicted']
    table.add_row(
      rich.text.Text(names[label]),
      rich.text.Text(names.get(taken, taken)),
      f'{pair["count"]:,} of {images[label]:,}',
    )
  return table


def _create_table(*columns: str) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for column in columns:
    table.add_column(column, justify='right', no_wrap=True)
  return table

"""The report in words: training_report.txt and tables for a terminal."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import markupsafe
import rich.box
import rich.table
import rich.text

from jaxprog import formats
from jaxprog.reporting import facts
from jaxprog.reporting.page import sections
from jaxprog.reporting.parts import Column, Heading, Part, Table, Words
from jaxprog.reporting.rundir import RunFiles

_WIDTH = 80

# Of the stages of a history.
SUMMARY = (
  Column('stage', lambda x: x['name'], left=True),
  Column('px', lambda x: str(x['image_size'])),
  Column('best top-1', lambda x: formats.percent(facts.best_top1(x))),
  Column('epoch', lambda x: _best_epoch(x)),
  Column('top-5', lambda x: formats.percent(_best_top5(x))),
  Column('time', lambda x: formats.duration(x['seconds'])),
  Column('status', facts.describe_status, left=True),
)


def report(run: RunFiles) -> str:
  """Returns the report of a run as plain text, at most 80 columns wide."""
  first, *others = sections.SECTIONS
  lines = [*_title('Training report'), *_lines(first.parts(run))]
  for section in others:
    if found := _lines(section.parts(run)):
      lines += ['', *_title(section.title), *found]
  return '\n'.join(lines) + '\n'


def summary_table(history: Mapping[str, Any]) -> rich.table.Table:
  """Returns a table of the stages' results, to be printed after a run."""
  return terminal_table(SUMMARY, history['stages'])


def terminal_table(
  columns: Iterable[Column], rows: Iterable[Any], gap: int = 2
) -> rich.table.Table:
  """Returns a table for a terminal; only its texts take a second line.

  Between two columns there are `gap` letters.
  """
  table = rich.table.Table(
    box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, gap - 1)
  )
  for column in columns:
    table.add_column(
      column.title,
      justify='left' if column.left else 'right',
      no_wrap=not column.left,
      overflow='fold',
    )
  for row in rows:
    table.add_row(*(rich.text.Text(str(c.cell(row))) for c in columns))
  return table


def _best_epoch(stage: Mapping[str, Any]) -> str:
  best = stage['best']
  return f'{best["epoch"]}/{facts.planned_epochs(stage)}' if best else '-'


def _best_top5(stage: Mapping[str, Any]) -> float | None:
  """Returns the top-5 that goes with `facts.best_top1`."""
  best = stage['best'] or {}
  rows = (x for x in stage['epochs'] if x['epoch'] == best.get('epoch'))
  row = next(rows, {'val_top5': None})
  if not facts.shows_top5(stage):
    return None
  return (stage.get('validation') or {'top5': row['val_top5']}).get('top5')


def _title(text: str) -> list[str]:
  return [text, '=' * len(text)]


def _lines(parts: Iterable[Part]) -> list[str]:
  """Returns the lines of all parts, an empty one between two of them."""
  lines: list[str] = []
  heading: list[str] = []  # It needs something below it.
  for part in parts:
    found = _part_lines(part)
    if isinstance(part, Heading):
      heading = found
    elif found:
      lines += [*([''] if lines else []), *heading, *found]
      heading = []
  return lines


def _part_lines(part: Part) -> list[str]:
  match part:
    case markupsafe.Markup():
      return []
    case str():
      return _wrap(part)
    case list():
      return [line for point in part for line in _wrap(point, '- ')]
    case dict():
      return [x for k, v in part.items() for x in _wrap(v, f'{k:<10}', 10)]
    case Heading(text):
      return _title(text)
    case Words(parts):
      return _lines(parts)
    case Table():
      return _table(part)


def _table(table: Table) -> list[str]:
  """Returns aligned lines of at most `_WIDTH`; texts may lose their middle."""
  columns = [column for column in table.columns if not column.wide]
  rows = [[_text(column.cell(row)) for column in columns] for row in table.rows]
  if not rows:
    return []
  titles = [column.title for column in columns]
  widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
  texts = [i for i, column in enumerate(columns) if column.left]
  gap = 2
  while sum(widths) + gap * (len(widths) - 1) > _WIDTH:
    widths[max(texts, key=widths.__getitem__)] -= 1
  lines = []
  for row in (titles, ['-' * width for width in widths], *rows):
    cells = (
      f'{facts.shorten(cell, width):{"<" if column.left else ">"}{width}}'
      for cell, width, column in zip(row, widths, columns, strict=True)
    )
    lines.append((' ' * gap).join(cells).rstrip())
  return lines


def _text(cell: str | tuple[str, str]) -> str:
  return cell if isinstance(cell, str) else cell[0]


def _wrap(text: str, begin: str = '', indent: int = 2) -> list[str]:
  return textwrap.wrap(
    text,
    _WIDTH,
    initial_indent=begin,
    subsequent_indent=' ' * indent,
    break_on_hyphens=False,
  ) or [begin.rstrip()]

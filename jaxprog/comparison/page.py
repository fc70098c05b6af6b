"""The report of a comparison, from comparison.json alone."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxprog import errors, files
from jaxprog.comparison import charts, tables
from jaxprog.reporting.page import html, markup
from jaxprog.reporting.page.markup import Html, join, tag

# Of what comparison.json holds; see docs/compare.md.
VERSION = 2


def write_page(workdir: pathlib.Path) -> pathlib.Path:
  """Writes report.html of a comparison; returns its path.

  Raises:
    UserError: if comparison.json is damaged, or another program's.
  """
  source = workdir / 'comparison.json'
  try:
    result = json.loads(source.read_text(encoding='utf-8'))
    if not isinstance(result, dict):
      raise ValueError('it holds no object')
    if result.get('version') != VERSION:
      found = result.get('version', 'none')
      raise ValueError(f'its version is {found}, not {VERSION}')
    text = _create_page(result, workdir)
  except (AttributeError, LookupError, TypeError, ValueError) as e:
    why = f'it lacks {e}' if isinstance(e, KeyError) else e
    raise errors.UserError(
      f'The comparison is damaged: {why}.',
      str(source),
      'Repeat --mode=compare: it writes the file anew from the runs.',
    ) from e
  path = workdir / 'report.html'
  files.write_bytes(path, text.encode())
  return path


def _create_page(result: Mapping[str, Any], workdir: pathlib.Path) -> str:
  """Returns the page of what comparison.json holds."""
  name = workdir.resolve().name
  status = 'finished' if result['finished'] else 'under way'
  summaries = tables.summarize(result['runs'], result['reference'])
  accuracies, costs = tables.tabulate(summaries)
  notes = tables.notes(summaries, result['reference'])
  drawn = charts.differences(summaries, result['reference'])
  target = result.get('target_top1') or 0.0
  return html.document(
    f'{name}: comparison',
    html.create_header(
      'Comparison',
      name,
      tag('p', tag('span', status, class_='chip'), class_='chips'),
    ),
    [
      ('verdicts', 'Verdicts', join(_verdicts(result), drawn)),
      (
        'accuracy',
        'Accuracy',
        join(_table(accuracies), *(tag('p', x, class_='note') for x in notes)),
      ),
      ('curves', 'Curves', charts.curves(result['runs'], target)),
      ('costs', 'Costs', _table(costs)),
      ('cells', 'Cells', _table(_cells(result))),
      ('runs', 'Runs', _table(_runs(result))),
    ],
    'Made from comparison.json; --mode=report makes it again. Each run has a '
    'report of its own below cells/.',
  )


def _verdicts(result: Mapping[str, Any]) -> Html:
  first, *others = result['verdicts'] or ['Nothing can be said yet.']
  return join(
    tag('p', tag('strong', first)),
    tag('ul', *(tag('li', text) for text in others)) if others else None,
  )


def _table(table: tables.Table) -> Html:
  return markup.table(
    table.titles, table.rows, caption=table.caption, left=table.left
  )


def _cells(result: Mapping[str, Any]) -> tables.Table:
  rows = [
    (
      cell['name'],
      ', '.join(cell['stages']),
      ', '.join(f'{k}={v}' for k, v in cell['overrides'].items()) or '-',
      cell['equal'] or 'own length',
    )
    for cell in result['cells']
  ]
  titles = 'cell', 'stages', 'changed', 'equal'
  return tables.Table(titles, rows, (0, 1, 2, 3), 'What was trained')


def _runs(result: Mapping[str, Any]) -> tables.Table:
  rows = [
    (
      run['cell'],
      str(run['seed']),
      '-' if run['final_top1'] is None else f'{100 * run["final_top1"]:.2f}%',
      f'{run["learning_rate"]:.3g}',
      run['status'],
      str(run['resumed']),
    )
    for run in result['runs']
  ]
  titles = 'cell', 'seed', 'final top-1', 'rate', 'status', 'resumed'
  return tables.Table(titles, rows, (0, 4), 'Every run')

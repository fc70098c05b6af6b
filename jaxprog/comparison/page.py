"""The report of a comparison, from comparison.json alone."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxprog import errors, files
from jaxprog.comparison import charts, sequential, tables, verdicts
from jaxprog.reporting.page import html
from jaxprog.reporting.page.markup import Html, join, render, tag
from jaxprog.reporting.parts import Column, Table

# Of what comparison.json holds; see docs/compare.md.
VERSION = 2
_CELLS = (
  Column('cell', lambda x: x['name'], left=True),
  Column('stages', lambda x: ', '.join(x['stages']), left=True),
  Column('changed', lambda x: _changes(x) or '-', left=True),
  Column('equal', lambda x: x['equal'] or 'own length', left=True),
)
_RUNS = (
  Column('cell', lambda x: x['cell'], left=True),
  Column('seed', lambda x: str(x['seed'])),
  Column('final top-1', lambda x: _final(x['final_top1'])),
  Column('rate', lambda x: f'{x["learning_rate"]:.3g}'),
  Column('status', lambda x: x['status'], left=True),
  Column('resumed', lambda x: str(x['resumed'])),
)


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
  rule = sequential.rule_of(result)
  summaries = tables.summarize(result['runs'], result['reference'], rule)
  accuracies, costs = tables.tabulate(summaries)
  notes = tables.notes(summaries, result['reference'], rule)
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
        join(render(accuracies), *(tag('p', x, class_='note') for x in notes)),
      ),
      ('curves', 'Curves', charts.curves(result['runs'], target)),
      ('costs', 'Costs', render(costs)),
      (
        'cells',
        'Cells',
        render(Table(_CELLS, result['cells'], 'What was trained')),
      ),
      ('runs', 'Runs', render(Table(_RUNS, result['runs'], 'Every run'))),
    ],
    'Made from comparison.json; --mode=report makes it again. Each run has a '
    'report of its own below cells/.',
  )


def _verdicts(result: Mapping[str, Any]) -> Html:
  said = [*result['verdicts'], *verdicts.outlook(result)]
  first, *others = said or ['Nothing can be said yet.']
  return join(
    tag('p', tag('strong', first)),
    tag('ul', *(tag('li', text) for text in others)) if others else None,
  )


def _final(top1: float | None) -> str:
  return '-' if top1 is None else f'{top1:.2%}'


def _changes(cell: Mapping[str, Any]) -> str:
  return ', '.join(f'{k}={v}' for k, v in cell['overrides'].items())

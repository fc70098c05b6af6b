"""The report of a comparison, from comparison.json and its picture alone."""

import base64
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxprog import errors, files
from jaxprog.comparison import tables
from jaxprog.reporting.page import html, markup
from jaxprog.reporting.page.markup import Html, join, tag

# Of what comparison.json holds; see collect.write.
VERSION = 2
# What is read here of the whole, of a cell, of a run and of a point of a curve.
_LISTS = ('verdicts', 'cells', 'runs')
_CELL_FIELDS = {'name', 'stages', 'overrides', 'equal'}
_RUN_FIELDS = {
  'cell',
  'seed',
  'status',
  'learning_rate',
  'final_top1',
  'num_images',
  'outcomes',
  'curve',
  'resumed',
}

PICTURES = ('ladder_comparison.png', 'optimizer_scheduler_comparison.png')
_STYLE = 'max-width: 100%; height: auto; background: #fff'


def write_page(workdir: pathlib.Path) -> pathlib.Path:
  """Writes report.html of a comparison; returns its path.

  Raises:
    UserError: if comparison.json is damaged, or another program's.
  """
  source = workdir / 'comparison.json'
  try:
    result = json.loads(source.read_text(encoding='utf-8'))
    _check(result)
  except ValueError as e:
    raise errors.UserError(
      f'The comparison is damaged: {e}.',
      str(source),
      'Repeat --mode=compare: it writes the file anew from the runs.',
    ) from None
  path = workdir / 'report.html'
  files.write_bytes(path, create_page(result, workdir).encode())
  return path


def _check(result: Any) -> None:
  """Raises ValueError if `result` is not what collect.write has written."""
  if not isinstance(result, dict):
    raise ValueError('it holds no object')
  if result.get('version') != VERSION:
    found = result.get('version', 'none')
    raise ValueError(f'its version is {found}, not {VERSION}')
  if missing := {'finished', 'reference'} - result.keys():
    raise ValueError(f'it lacks {", ".join(sorted(missing))}')
  for name in _LISTS:
    if not isinstance(result.get(name), list):
      raise ValueError(f'{name} is no list')
  for name, wanted in (('cells', _CELL_FIELDS), ('runs', _RUN_FIELDS)):
    for entry in result[name]:
      if not isinstance(entry, dict) or wanted - entry.keys():
        raise ValueError(f'an entry of {name} is not whole')
  if result['reference'] not in [run['cell'] for run in result['runs']]:
    raise ValueError('its reference has no run')


def create_page(result: Mapping[str, Any], workdir: pathlib.Path) -> str:
  """Returns the page of what comparison.json holds."""
  name = workdir.resolve().name
  status = 'finished' if result['finished'] else 'under way'
  summaries = tables.summarize(result['runs'], result['reference'])
  return html.document(
    f'{name}: comparison',
    tag(
      'header',
      tag('p', 'Comparison', class_='eyebrow'),
      tag('h1', name),
      tag('p', tag('span', status, class_='chip'), class_='chips'),
      class_='top',
    ),
    [
      ('verdicts', 'Verdicts', _verdicts(result)),
      ('accuracy', 'Accuracy', _accuracy(summaries, result['reference'])),
      ('picture', 'Picture', _pictures(workdir)),
      ('costs', 'Costs', _costs(summaries)),
      ('cells', 'Cells', _cells(result)),
      ('runs', 'Runs', _runs(result)),
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


def _accuracy(summaries: list[tables.CellSummary], reference: str) -> Html:
  rows = [tables.accuracy_row(summary) for summary in summaries]
  notes = tables.notes(summaries, reference)
  return join(
    markup.table(
      tables.ACCURACY_TITLES, rows, caption='Final top-1 over seeds, %'
    ),
    *(tag('p', note, class_='note') for note in notes),
  )


def _costs(summaries: list[tables.CellSummary]) -> Html:
  rows = [tables.cost_row(summary) for summary in summaries]
  last = len(tables.COST_TITLES) - 1
  return markup.table(
    tables.COST_TITLES, rows, caption='Means over runs', left=(0, last)
  )


def _cells(result: Mapping[str, Any]) -> Html:
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
  return markup.table(
    titles, rows, caption='What was trained', left=(0, 1, 2, 3)
  )


def _runs(result: Mapping[str, Any]) -> Html:
  rows = [
    (
      run['cell'],
      run['seed'],
      '-' if run['final_top1'] is None else f'{100 * run["final_top1"]:.2f}%',
      f'{run["learning_rate"]:.3g}',
      run['status'],
      run['resumed'],
    )
    for run in result['runs']
  ]
  titles = 'cell', 'seed', 'final top-1', 'rate', 'status', 'resumed'
  return markup.table(titles, rows, caption='Every run', left=(0, 4))


def _pictures(workdir: pathlib.Path) -> Html:
  found = [workdir / name for name in PICTURES if (workdir / name).exists()]
  if not found:
    return tag('p', 'It is drawn when all runs are over.', class_='note')
  return join(*(tag('figure', _embed(path)) for path in found))


def _embed(path: pathlib.Path) -> Html:
  encoded = base64.b64encode(path.read_bytes()).decode()
  return tag(
    'img',
    src=f'data:image/png;base64,{encoded}',
    alt='Accuracy of the cells; the tables have the figures',
    style=_STYLE,
  )

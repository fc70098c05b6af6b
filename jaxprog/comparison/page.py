"""The report of a comparison: of comparison.json, and of what goes on yet."""

import collections
import datetime
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprog import buckets, errors, files, formats
from jaxprog.comparison import (
  charts,
  sequential,
  statistics,
  tables,
  under_way,
  verdicts,
)
from jaxprog.comparison.statistics import Record
from jaxprog.comparison.under_way import UnderWay
from jaxprog.reliability import lock
from jaxprog.reporting.page import html
from jaxprog.reporting.page.markup import Html, join, render, tag
from jaxprog.reporting.page.overview import tile
from jaxprog.reporting.parts import Column, Table

_CELLS = (
  Column('cell', lambda x: x['name'], left=True),
  Column('stages', lambda x: ', '.join(x['stages']), left=True),
  Column('changed', lambda x: _changes(x) or '-', left=True),
  Column('equal', lambda x: x['equal'] or 'own length', left=True),
)
_RUNS = (
  Column('cell', lambda x: x['cell'], left=True),
  Column('seed', lambda x: str(x['seed'])),
  Column('top-1', lambda x: _final(x['final_top1'])),
  Column('rate', lambda x: f'{x["learning_rate"]:.3g}'),
  Column('status', lambda x: x['status'], left=True),
  Column('resumed', lambda x: str(x['resumed'])),
)


# What a cell's runs are counted by; the last three where there are some.
_COUNTED = (
  'done',
  under_way.RUNNING,
  under_way.WAITING,
  under_way.BEGUN,
  'diverged',
  'failed',
)
_Section = tuple[str, str, Html]


def is_comparison(workdir: pathlib.Path) -> bool:
  """Returns whether a folder is a comparison's, once it has begun."""
  if (workdir / 'comparison.json').exists():
    return True
  return under_way.read_plan(workdir) is not None


def write_page(
  workdir: pathlib.Path, *, is_live: bool | None = None
) -> pathlib.Path:
  """Writes report.html of a comparison; returns its path.

  Args:
    workdir: of a comparison; before its first run is over there is no
      comparison.json.
    is_live: whether it goes on, so that the page renews itself; None: its lock
      says so.

  Raises:
    UserError: if comparison.json is damaged, or another program's.
  """
  source = workdir / 'comparison.json'
  if is_live is None:
    is_live = bool(lock.find_owner(workdir))
  try:
    text = _create_page(_read(source), workdir, is_live)
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


def _read(source: pathlib.Path) -> dict[str, Any]:
  """Returns what comparison.json holds; of none, that there is no run yet."""
  try:
    result = json.loads(source.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return {'finished': False, 'verdicts': [], 'runs': [], 'cells': []}
  if not isinstance(result, dict):
    raise ValueError('it holds no object')
  if result.get('version') != statistics.VERSION:
    found = result.get('version', 'none')
    raise ValueError(f'its version is {found}, not {statistics.VERSION}')
  return result


def _create_page(
  result: Mapping[str, Any], workdir: pathlib.Path, is_live: bool
) -> str:
  """Returns the page of what comparison.json holds, and of what goes on."""
  plan = None if result['finished'] else under_way.read_plan(workdir)
  state = under_way.look(plan, result['runs']) if plan else None
  return document(
    'Comparison',
    workdir,
    [*_sections(result, state)],
    'Made from comparison.json and what each run says of itself; --mode=report '
    'makes it again. Each run has a report of its own below cells/.',
    is_finished=result['finished'],
    is_live=is_live,
  )


def document(
  kind: str,
  workdir: pathlib.Path,
  sections: Sequence[_Section],
  footer: str,
  *,
  is_finished: bool,
  is_live: bool,
) -> str:
  """Returns a page on the runs of a workdir as they are now."""
  name = workdir.resolve().name
  said, is_live = 'stopped', is_live and not is_finished
  if is_finished:
    said = 'finished'
  elif is_live:
    said = 'under way'
  elif buckets.url_of(workdir):  # Its lock is with who trains.
    said = 'not finished'
  chip = tag('span', said, class_=f'chip {"good" if is_finished else "warn"}')
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  chips = html.create_chips(chip, written=now, is_live=is_live)
  return html.document(
    f'{name}: {kind.lower()}',
    html.create_header(kind, name, chips),
    sections,
    footer,
    live=html.renew(now) if is_live else None,
  )


def _sections(
  result: Mapping[str, Any], state: UnderWay | None
) -> Iterator[_Section]:
  runs, target = list(result['runs']), result.get('target_top1') or 0.0
  unfinished: list[Record] = []
  if state:
    unfinished = under_way.read_unfinished(state)
    yield 'so-far', 'So far', join(*_describe_state(state))
  if runs:
    rule = sequential.rule_of(result)
    summaries = tables.summarize(runs, result['reference'], rule)
    accuracies, costs = tables.tabulate(summaries)
    drawn = charts.differences(summaries, result['reference'], rule)
    yield 'verdicts', 'Verdicts', join(_verdicts(result), drawn)
    notes = tables.notes(summaries, result['reference'], rule)
    said = (tag('p', x, class_='note') for x in notes)
    yield 'accuracy', 'Accuracy', join(render(accuracies), *said)
  if runs or unfinished:
    drawn = charts.curves(runs, target, unfinished)
    yield 'curves', 'Curves', drawn
  if runs:
    yield 'costs', 'Costs', render(costs)
  table = Table(_CELLS, _cells(result, state), 'What is trained')
  yield 'cells', 'Cells', render(table)
  if runs:
    yield 'runs', 'Runs', render(Table(_RUNS, runs, 'Every run that is over'))


def _cells(
  result: Mapping[str, Any], state: UnderWay | None
) -> Sequence[Mapping[str, Any]]:
  """Returns what the table of cells has of each, those yet to come too."""
  if state is None:
    return result['cells']
  return [
    {
      'name': cell.name,
      'stages': state.plan.stages[cell.name],
      'overrides': cell.overrides,
      'equal': cell.equal,
    }
    for cell in state.plan.cells
  ]


def _describe_state(state: UnderWay) -> Iterator[Html]:
  """Yields how far a comparison is, what goes on, and what every cell has."""
  statuses = list(state.statuses.values())
  left = state.seconds_left
  tiles = [tile(f'{state.num_over} of {len(statuses)}', 'runs over')]
  tiles += [
    tile(str(count), status)
    for status in _COUNTED[1:]
    if (count := statuses.count(status))
  ]
  if state.running and left is not None:
    end = datetime.datetime.now(datetime.UTC)
    end += datetime.timedelta(seconds=left)
    said = f'left, until about {end:%H:%M} UTC, {end.day} {end:%B}'
    tiles.append(tile(formats.hours(left / 3600), said))
  yield tag('div', *tiles, class_='tiles', role='group', aria_label='So far')
  if state.running:
    plan = state.plan
    yield render(
      under_way.running_table(plan.workdir, state.running, plan.name)
    )
  yield render(_count_statuses(state))


def _count_statuses(state: UnderWay) -> Table:
  """Returns a table of how many runs each cell has, by status."""
  counts = {cell.name: collections.Counter[str]() for cell in state.plan.cells}
  for (cell, _), status in state.statuses.items():
    counts[cell][status] += 1
  total = collections.Counter(state.statuses.values())
  shown = [x for i, x in enumerate(_COUNTED) if i < 3 or total[x]]
  rows = [
    (cell, *(str(found[x] or '-') for x in shown))
    for cell, found in counts.items()
  ]
  return tables.create_table(('cell', *shown), rows, 'Runs of each cell')


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

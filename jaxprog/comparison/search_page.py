"""The report of a search: of trials that are over, and of those under way."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprog import errors, files, formats
from jaxprog.comparison import page, tables, under_way
from jaxprog.monitoring import fleet, standing
from jaxprog.monitoring.standing import Running
from jaxprog.reliability import lock
from jaxprog.reporting import rundir
from jaxprog.reporting.page.markup import Html, join, render, tag
from jaxprog.reporting.page.overview import tile
from jaxprog.reporting.parts import Table


def is_search(workdir: pathlib.Path) -> bool:
  """Returns whether a folder is a search's, once it has begun."""
  if (workdir / 'tune.json').exists():
    return True
  return 'search' in _read(workdir / 'config.json')


def see(workdir: pathlib.Path) -> fleet.Seen:
  """Returns how far a search is."""
  over = len(_read(workdir / 'tune.json').get('trials', ()))
  total = _read(workdir / 'config.json').get('num_trials', 0)
  runs = [(_name(x), x) for x in standing.find(workdir, 'trials/*')]
  return fleet.Seen(over, total, runs, None)


def _name(run: Running) -> str:
  return f'trial {run.workdir.name}'


def write_page(
  workdir: pathlib.Path, *, is_live: bool | None = None
) -> pathlib.Path:
  """Writes report.html of a search; returns its path.

  `is_live` is whether it goes on; None: its lock says so.

  Raises:
    UserError: if what the search has written is damaged.
  """
  config = _read(workdir / 'config.json')
  found = {'trials': [], 'best': None, **_read(workdir / 'tune.json')}
  running = list(standing.find(workdir, 'trials/*'))
  if is_live is None:
    is_live = bool(lock.find_owner(workdir))
  try:
    trials, state = found['trials'], [*_state(workdir, config, found, running)]
    fields = dict.fromkeys(k for x in trials for k in x['parameters'])
    table = render(tabulate(found, list(fields)))
  except (LookupError, TypeError, AttributeError) as e:
    raise errors.UserError(
      f'The search is damaged: {e!r}.',
      str(workdir / 'tune.json'),
      'Repeat --mode=tune: it writes the file anew.',
    ) from e
  sections = [
    ('so-far', 'So far', join(*state)),
    *([('trials', 'Trials', table)] if trials else []),
  ]
  text = page.document(
    'Search',
    workdir,
    sections,
    'Made from tune.json and what each run says of itself; --mode=report makes '
    'it again. Each trial has a report of its own below trials/.',
    is_finished=len(trials) >= config.get('num_trials', 0),
    is_live=is_live,
  )
  path = workdir / 'report.html'
  files.write_bytes(path, text.encode())
  return path


def _state(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  found: Mapping[str, Any],
  running: list[Running],
) -> Iterator[Html]:
  over, total = len(found['trials']), config.get('num_trials')
  pruned = sum(x['status'] == 'pruned' for x in found['trials'])
  tiles = [tile(f'{over} of {total}' if total else str(over), 'trials over')]
  if found['best']:
    tiles.append(tile(formats.percent(found['best']['top1']), 'best top-1'))
  for count, said in ((len(running), 'under way'), (pruned, 'pruned')):
    tiles += [tile(str(count), said)] if count else []
  yield tag('div', *tiles, class_='tiles')
  if running:
    yield render(under_way.running_table(workdir, running, _name))


def tabulate(found: Mapping[str, Any], fields: Sequence[str]) -> Table:
  """Returns a row for each trial that is over, the best one first."""
  rows = [
    (
      x['directory'],
      formats.percent(x['top1']),
      str(x['epochs']),
      x['status'],
      *(short(x['parameters'].get(field)) for field in fields),
    )
    for x in sorted(found['trials'], key=lambda x: -(x['top1'] or 0))
  ]
  titles = ('trial', 'top-1', 'epochs', 'status', *fields)
  caption = 'The best first; the best of many is partly luck'
  left = (0, *range(3, len(titles)))
  return tables.create_table(titles, rows, caption, left=left)


def short(value: Any) -> str:
  """Returns what a table says of a field's value."""
  return f'{value:.3g}' if isinstance(value, float) else str(value)


def _read(path: pathlib.Path) -> dict[str, Any]:
  return rundir.read_object(path) or {}

"""Where a comparison stands that is not over, from its files alone.

What there will be says its config, what is over outcome.json of each run, what
goes on each run's lock. Nothing is locked or changed by who looks.
"""

import datetime
import functools
import heapq
import json
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprog import config as config_lib
from jaxprog import errors, formats
from jaxprog.comparison import cells
from jaxprog.comparison.cells import Cell
from jaxprog.comparison.statistics import Record
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import standing
from jaxprog.monitoring.standing import Running
from jaxprog.reporting.page.markup import tag
from jaxprog.reporting.parts import Column, Table

RUNNING, WAITING = 'under way', 'waiting'
# Begun, and nobody is known to go on with it.
BEGUN = 'begun'
# Where runs lie: those that are compared, and what is trained before them.
_COMPARED, _BEFORE = 'cells/*/*', ('timing/*', 'tuning/*/*/*/*')

_Key = tuple[str, int]


class Plan(NamedTuple):
  """What a comparison will have trained: its cells with each of the seeds.

  `stages` are those that a cell trains, by its name.
  """

  workdir: pathlib.Path
  cells: tuple[Cell, ...]
  stages: Mapping[str, tuple[str, ...]]
  seeds: tuple[int, ...]

  def folder(self, cell: str, seed: int) -> pathlib.Path:
    """Returns where the run of a cell with a seed is."""
    return self.workdir / 'cells' / cell / f'seed-{seed}'

  def name(self, run: Running) -> str:
    """Returns what a run is called: its cell and seed, or what it is for."""
    kind, *parts = run.workdir.relative_to(self.workdir).parts
    said = {'timing': ' timed', 'tuning': ' trial'}.get(kind, '')
    named = ' '.join(x for x in parts if not x.startswith('rung-'))
    return named.replace('seed-', 'seed ') + said


class UnderWay(NamedTuple):
  """Where a comparison stands.

  `statuses` has each cell and seed: RUNNING, WAITING, BEGUN, or how a run
  has ended. `running` has trials and timings too. `seconds_left` are those
  until all is over, None while nothing can be said.
  """

  plan: Plan
  statuses: Mapping[_Key, str]
  running: Sequence[Running]
  seconds_left: float | None

  @property
  def num_over(self) -> int:
    """How many runs have ended, in whatever way."""
    begun = (RUNNING, WAITING, BEGUN)
    return sum(x not in begun for x in self.statuses.values())


def read_plan(workdir: pathlib.Path) -> Plan | None:
  """Returns what the comparison in a folder is, None if there is none.

  It is known as soon as the comparison has begun.
  """
  path = workdir / 'config.json'
  try:
    text = path.read_text(encoding='utf-8')
    if not {'base', 'grid', 'operators'} <= json.loads(text).keys():
      return None
    config = config_lib.load_config(str(path))
    chosen = cells.create_cells(config)
    ladders = [cells.create_ladder(config, x, 0) for x in chosen]
    stages = {
      cell.name: tuple(x.name for x in cells.trained_stages(ladder, cell))
      for cell, ladder in zip(chosen, ladders, strict=True)
    }
  except (
    AttributeError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    errors.UserError,
  ):  # Another program's, or one that is being written.
    return None
  return Plan(workdir, chosen, stages, cells.seeds(config))


def look(plan: Plan, records: Iterable[Record] = ()) -> UnderWay:
  """Returns where a comparison stands; `records` are of runs that are over."""
  recorded = {(x['cell'], x['seed']): x['status'] for x in records}
  compared = {x.workdir: x for x in standing.find(plan.workdir, _COMPARED)}
  statuses: dict[_Key, str] = {}
  for seed in plan.seeds:
    for cell in plan.cells:
      folder, key = plan.folder(cell.name, seed), (cell.name, seed)
      over = _read_outcome(folder) or recorded.get(key)
      begun = (folder / 'training_history.json').exists()
      statuses[key] = over or (BEGUN if begun else WAITING)
      if folder in compared:  # It may be one that failed, tried again.
        statuses[key] = RUNNING
  others = list(standing.find(plan.workdir, *_BEFORE))
  running = list(compared.values())
  left = None if others else _seconds_left(plan, statuses, running)
  return UnderWay(plan, statuses, [*others, *running], left)


def running_table(
  root: pathlib.Path, runs: Sequence[Running], name: Callable[[Running], str]
) -> Table:
  """Returns a row for each run under way below `root`, by its `name`."""

  def link(run: Running) -> str:
    path = run.workdir / 'report.html'
    if not path.exists():  # Its first epoch is not over.
      return name(run)
    return tag('a', name(run), href=path.relative_to(root).as_posix())

  def value(field: str) -> Callable[[Running], str]:
    return lambda x: formats.cell(field, x.standing)

  columns = (
    Column('run', link, left=True),
    Column('epoch', lambda x: x.epoch),
    Column('top-1', value('top1')),
    Column('left', lambda x: formats.duration(x.standing.get('seconds_left'))),
    Column('stage', lambda x: x.stage.replace(' ', '\xa0'), left=True),
    Column('images/s', value('images_per_second')),
    Column('on', lambda x: x.where.replace(' ', '\xa0'), left=True),
  )
  caption = 'Under way: top-1 of the last evaluation, time left of each run'
  return Table(columns, runs, caption)


def expect(left: Sequence[float], waiting: Iterable[float]) -> float:
  """Returns the seconds until all runs are over.

  `left` are those of runs under way; whenever one of them ends, the next of
  those that are `waiting` begins. If none is under way, they go one by one.
  """
  ends = sorted(left) or [0.0]
  for seconds in waiting:
    heapq.heapreplace(ends, ends[0] + seconds)
  return max(ends)


def _seconds_left(
  plan: Plan, statuses: Mapping[_Key, str], running: Sequence[Running]
) -> float | None:
  """Returns the seconds until all is over, if any run says how long one is.

  A cell's run takes what those that are over took, of all cells if none of it
  is; before any is over, what those under way expect.
  """
  ages = [_age(x) for x in running]
  said = [x.standing.get('seconds_left') for x in running]
  took: dict[str, list[float]] = {}
  for (cell, seed), status in statuses.items():
    if status == 'done':
      seconds = _wall_seconds(plan.folder(cell, seed))
      took.setdefault(cell, []).append(seconds)
  known = [x for seconds in took.values() for x in seconds] or [
    age + left for age, left in zip(ages, said, strict=True) if left is not None
  ]
  if not known:
    return None
  mean = statistics.fmean(known)
  means = {cell: statistics.fmean(x) for cell, x in took.items()}
  return expect(
    [
      max(mean - age, 0.0) if left is None else left
      for age, left in zip(ages, said, strict=True)
    ],
    [
      max(means.get(cell, mean) - _wall_seconds(plan.folder(cell, seed)), 0.0)
      for (cell, seed), status in statuses.items()
      if status in (WAITING, BEGUN)
    ],
  )


def _age(run: Running) -> float:
  """Returns for how many seconds a run has been under way."""
  try:
    since = datetime.datetime.fromisoformat(run.owner['since'])
    return (datetime.datetime.now(datetime.UTC) - since).total_seconds()
  except (KeyError, TypeError, ValueError):
    return 0.0


def _read_outcome(folder: pathlib.Path) -> str | None:
  """Returns how a run has ended, None if it is not over."""
  try:
    return json.loads((folder / 'outcome.json').read_bytes())['status']
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _wall_seconds(folder: pathlib.Path) -> float:
  """Returns how long a run took, 0 where it has said nothing yet."""
  path = folder / 'training_history.json'
  try:
    return _read_wall(path, path.stat().st_mtime_ns)
  except (OSError, errors.UserError):
    return 0.0


@functools.lru_cache(4096)
def _read_wall(path: pathlib.Path, written: int) -> float:
  return history_lib.load_history(path).get('wall_seconds', 0.0)


def read_unfinished(state: UnderWay) -> list[Record]:
  """Returns what there is of runs that are not over, for curves alone.

  Those whose last stage has an evaluation. Their curves have images and
  seconds, of all stages: what a hand-over computed on, and FLOPs, only the
  program knows that trains.
  """
  found = []
  for (cell, seed), status in state.statuses.items():
    if status in (RUNNING, BEGUN):
      last = state.plan.stages[cell][-1]
      curve = _read_curve(state.plan.folder(cell, seed), last)
      found.append(
        {'cell': cell, 'seed': seed, 'status': status, 'curve': curve}
      )
  return [x for x in found if x['curve']]


def _read_curve(folder: pathlib.Path, last: str) -> list[dict[str, Any]]:
  """Returns an entry for each evaluation of the `last` stage of a run."""
  try:
    history = history_lib.load_history(folder / 'training_history.json')
  except errors.UserError:
    return []
  images = seconds = 0.0
  curve: list[dict[str, Any]] = []
  for stage in history['stages']:
    seconds += stage.get('handover_seconds', 0.0)
    step = stage.get('first_step', 0)
    for row in stage['epochs']:
      images += (row['global_step'] - step) * stage['batch_size']
      seconds += (row['seconds'] or 0.0) + row.get('eval_seconds', 0.0)
      step = row['global_step']
      if stage['name'] == last and formats.is_number(row['val_top1']):
        point = {'images': images, 'seconds': seconds}
        curve.append({**point, 'top1': row['val_top1']})
  return curve

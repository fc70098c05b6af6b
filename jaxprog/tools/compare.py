"""Trains cells that cost the same with several seeds, and compares them.

WORKDIR/cells/CELL/seed-N are ordinary runs; trials of learning rates lie in
WORKDIR/tuning, epochs that were timed in WORKDIR/timing. The same command goes
on after any end: what is over is read, what was interrupted is resumed.
"""

import functools
import io
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.table
import rich.text
from ml_collections import config_dict

from jaxprog import buckets, errors, files
from jaxprog import config as config_lib
from jaxprog.comparison import (
  budgets,
  cells,
  collect,
  engines,
  figures,
  halving,
  live,
  page,
  plans,
  power,
  runs,
  sequential,
  statistics,
  tables,
  verdicts,
)
from jaxprog.comparison.cells import Cell
from jaxprog.comparison.plans import Comparison
from jaxprog.comparison.runs import Planned
from jaxprog.comparison.statistics import Record
from jaxprog.data import workers
from jaxprog.monitoring import activity, environment
from jaxprog.reliability import mirror, signals
from jaxprog.reporting.report import terminal_table
from jaxprog.training import preflight
from jaxprog.training import run as run_lib

# What is kept of a trial's record.
_OF_TRIALS = ('seed', 'learning_rate', 'num_epochs', 'status', 'workdir')


def compare(
  config: config_dict.ConfigDict | str, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Returns what WORKDIR/comparison.json holds; see docs/compare.md.

  `config` is that of a comparison, or names it: NAME[:ARG] or FILE[:ARG].

  Raises:
    UserError: for a mistake in any cell, before anything is trained.
    Stopped: after a SIGTERM or Ctrl-C, once all is saved.
  """
  workers.leave_if_starting()
  if isinstance(config, str):
    config = config_lib.load_config(config)
  config_lib.check_kind(config, 'compare')
  workdir, url = mirror.locate(workdir, config.base.mirror)
  config = config_lib.with_mirror(config)
  config = config_lib.complete(config, 'compare_default')
  chosen = cells.create_cells(config)
  engines.check(config)
  with engines.devices_elsewhere(config), signals.StopRequest():
    if jax.process_count() > 1:
      raise errors.UserError('A comparison runs in one process.')
    preflight.claim_workdir(workdir)
    console = rich.console.Console(markup=False)
    comparison = Comparison(config, workdir, chosen, console)
    comparison.say(f'comparison: {len(chosen)} cells, the costs of their steps')
    planned = _plan_all(comparison)
    console.print(_plan_table(planned))
    alike = any(cell.equal == 'seconds' for cell in chosen)
    with (
      mirror.hold(workdir, url) as comparison.owner,
      engines.start(
        config, workdir, comparison.say, alike=alike
      ) as comparison.engine,
    ):
      comparison.check_begun()
      previous = collect.read_previous(workdir)
      comparison.power = power.begin(config, planned, previous)
      comparison.say(verdicts.power_sentence(comparison.power))
      plan = sequential.go_on(previous, config.seeds, config.max_seeds)
      if warning := plan.warning(config.seeds, config.max_seeds):
        comparison.say(warning)
      files.write_json(workdir / 'config.json', config_lib.to_json(config))
      lines = config.engine != 'serial'
      with live.comparison(workdir, console, lines=lines):
        _tune(comparison)
        comparison.check_begun()  # At the rates that were chosen.
        result = _run_all(comparison, _time_cells(comparison))
      _conclude(comparison, result)
  return result


# Seconds of all that comes before the last stage of a cell, hand-overs to it
# included, and of each of its epochs.
_Timing = tuple[float, float]


def _plan_all(comparison: Comparison) -> list[Planned]:
  """Returns a run of every cell, having planned everything once.

  Every mistake in a cell, in a trial or in what is timed is found here.
  """
  config, planned = comparison.config, []
  with activity.doing('counting the costs of cells') as show:
    for cell in comparison.cells:
      planned.append(comparison.plan_run(cell, config.base.seed))
      if config.tuning.factors and plans.is_tuned(cell):
        for rung in range(len(config.tuning.rungs)):
          comparison.plan_trial(cell, config.base.seed, rung, 1.0)
      if plans.is_timed(cell):
        comparison.plan_timing(cell)
      show(len(planned), len(comparison.cells))
  return planned


def _tune(comparison: Comparison) -> None:
  """Chooses the learning rate of each cell, with as many trials in each."""
  if not comparison.config.tuning.factors:
    return
  comparison.engine.at_once(
    [
      functools.partial(_tune_cell, comparison, cell)
      for cell in filter(plans.is_tuned, comparison.cells)
    ]
  )


def _tune_cell(comparison: Comparison, cell: Cell) -> None:
  tuning, trials = comparison.config.tuning, list[Record]()
  seeds = cells.tuning_seeds(comparison.config)

  def run(rung: int, factor: float, seed: int) -> Record:
    planned = comparison.plan_trial(cell, seed, rung, factor)
    what = f'trial of {cell.name}, rate x {factor:g}, seed {seed}'
    record = comparison.run(planned, what)
    runs.forget_checkpoints(planned)
    return record

  def score(rung: int, factors: Sequence[float]) -> list[float]:
    flows = [
      functools.partial(run, rung, factor, seed)
      for factor in factors
      for seed in seeds
    ]
    trials.extend(comparison.engine.at_once(flows))
    scores = [_score_trial(trial) for trial in trials[-len(flows) :]]
    starts = range(0, len(scores), len(seeds))
    return [sum(scores[i : i + len(seeds)]) / len(seeds) for i in starts]

  choice = halving.halve(tuning.factors, len(tuning.rungs), tuning.keep, score)
  comparison.tuning[cell.name] = {
    'factor': choice.factor,
    'at_border': choice.at_border,
    'trials': [trial._asdict() for trial in choice.trials],
    'runs': [{k: trial[k] for k in _OF_TRIALS} for trial in trials],
    'cost': collect.sum_costs(trials),
  }
  border = ', at the border of the range' if choice.at_border else ''
  comparison.say(f'{cell.name}: rate x {choice.factor:g}{border}')


def _score_trial(trial: Record) -> float:
  """Returns the last top-1 on the images that choose the best weights.

  Validation images that a hold-out keeps for the end choose no rate.
  """
  top1 = trial['curve'][-1]['top1'] if trial['status'] == 'done' else None
  return -math.inf if top1 is None else top1


def _time_cells(comparison: Comparison) -> dict[str, _Timing]:
  """Returns how long cells last whose budget is told in seconds.

  Those are left out whose few timed epochs did not reach their end.
  """
  timings = {}

  def time(cell: Cell) -> None:
    planned = comparison.plan_timing(cell)
    record = comparison.run(planned, f'{cell.name}, timed')
    if record['status'] == 'done':
      timings[cell.name] = _read_timing(comparison, planned)

  timed = filter(plans.is_timed, comparison.cells[1:])
  comparison.engine.at_once([functools.partial(time, x) for x in timed])
  return timings


def _read_timing(comparison: Comparison, planned: Planned) -> _Timing:
  cell = planned.cell
  trained = run_lib.read_history(planned.workdir)['stages']
  ladder = cells.create_ladder(comparison.config, cell, planned.seed)
  *earlier, last = cells.trained_stages(ladder, cell)
  rows = {stage['name']: stage['epochs'][-1] for stage in trained}
  seconds = {k: row['seconds'] + row['eval_seconds'] for k, row in rows.items()}
  before = sum(stage.get('handover_seconds', 0.0) for stage in trained)
  before += sum(stage.num_epochs * seconds[stage.name] for stage in earlier)
  return before, seconds[last.name]


def _run_all(
  comparison: Comparison, timings: Mapping[str, _Timing]
) -> dict[str, Any]:
  """Trains every cell with each seed; all cells come before the next seed.

  Returns what comparison.json holds.
  """
  places = [
    (seed, cell)
    for seed in cells.seeds(comparison.config)
    for cell in comparison.cells
  ]
  done: dict[tuple[int, str], tuple[Planned, Record]] = {}
  result: dict[str, Any] = {}

  def run(seed: int, cell: Cell) -> None:
    nonlocal result
    first = seed, comparison.reference.name
    if cell.equal == 'seconds' and cell != comparison.reference:
      comparison.engine.wait(lambda: first in done)
    _, reference = done.get(first, (None, {}))
    timing = timings.get(cell.name)
    done[seed, cell.name] = _run_cell(comparison, cell, seed, reference, timing)
    if any(name == comparison.reference.name for _, name in done):
      known = [done.get((seed, cell.name)) for seed, cell in places]
      result = _write(comparison, [x for x in known if x])

  comparison.engine.at_once([functools.partial(run, *x) for x in places])
  return result


def _run_cell(
  comparison: Comparison,
  cell: Cell,
  seed: int,
  reference: Record,
  timing: _Timing | None,
) -> tuple[Planned, Record]:
  """Returns a run that is over, and how it ended.

  `reference` is the reference's run with this seed.
  """
  planned = comparison.plan_run(cell, seed)
  if cell.equal == 'seconds' and cell != comparison.reference:
    try:
      num_epochs = _epochs_of_seconds(cell, reference, timing)
      planned = comparison.plan_run(cell, seed, num_epochs)
    except errors.UserError as e:  # Seconds are measured: not known before.
      reason = f'{e.what} {e.where}'.strip()
      return planned, runs.failed(reason)
  return planned, comparison.run(planned, f'{cell.name}, seed {seed}')


def _epochs_of_seconds(
  cell: Cell, reference: Record, timing: _Timing | None
) -> float:
  """Returns the epochs of the last stage that take the reference's seconds.

  Raises:
    UserError: if they are not known, or leave no room.
  """
  if reference['status'] != 'done':
    raise errors.UserError(
      'The reference did not finish: its seconds are not known.'
    )
  *earlier, end = reference['boundaries']
  if cell.control:  # Its epochs last as long as those of the reference.
    seconds = end['seconds'] - earlier[-1]['seconds'] - end['handover_seconds']
    timing = 0.0, seconds / (end['epochs'] - earlier[-1]['epochs'])
  if timing is None:
    raise errors.UserError('The epochs that were to be timed did not finish.')
  where = f'cell {cell.name!r}: budget seconds'
  before, per_epoch = timing
  return budgets.fit_epochs(end['seconds'] - before, per_epoch, 1.0, where)


def _write(
  comparison: Comparison, done: Sequence[tuple[Planned, Record]]
) -> dict[str, Any]:
  """Writes what is known so far; returns what comparison.json holds."""
  config, every = comparison.config, [planned for planned, _ in done]
  handovers = collect.measure_handovers(every)
  records = [collect.read_record(*run, handovers) for run in done]
  # Without a target: what the curve of every run that is done reached.
  ends = [record['curve'][-1]['top1'] for record in statistics.done(records)]
  known = [top1 for top1 in ends if top1 is not None]
  target = config.target_top1 or min(known, default=0.0)
  # By the last run of each.
  by_cell = {planned.cell.name: planned for planned in every}
  finished = len(done) == len(comparison.cells) * config.seeds
  result: dict[str, Any] = {
    'version': statistics.VERSION,
    'reference': comparison.reference.name,
    'budget': config.budget,
    'target_top1': target,
    'finished': finished,
    **collect.conclude(
      records,
      comparison.cells,
      config,
      target,
      finished=finished,
      previous=collect.read_previous(comparison.workdir),
    ),
    'config': config_lib.to_json(config),
    'environment': environment.environment(),
    'cells': [_describe_cell(comparison, x) for x in by_cell.values()],
    'runs': records,
  }
  before, after = comparison.power, None
  if finished:
    after = power.end(before, result)
  result['power'] = {'before': before, 'after': after}
  files.write_json(comparison.workdir / 'comparison.json', result)
  rule = sequential.rule_of(result)
  tables.write(comparison.workdir, records, result['cells'], rule)
  return result


def _describe_cell(comparison: Comparison, planned: Planned) -> dict[str, Any]:
  cell, last = planned.cell, planned.costs[-1]
  images, flops = last.at(last.steps.total)
  return {
    'name': cell.name,
    'overrides': dict(cell.overrides),
    'labels': dict(cell.labels),
    'stages': list(planned.names),
    'control': cell.control,
    'equal': cell.equal,
    'learning_rate': planned.last.peak_learning_rate,
    'flops_per_image': flops / images,
    'tuning': comparison.tuning.get(plans.tuned_as(cell)),
  }


def _conclude(comparison: Comparison, result: Mapping[str, Any]) -> None:
  """Draws, prints and writes what a person reads."""
  records, workdir = result['runs'], comparison.workdir
  rule = sequential.rule_of(result)
  with activity.doing('drawing the comparison'):
    picture = figures.plot(workdir, records, result['target_top1'], rule)
    page.write_page(workdir)
  summaries = tables.summarize(records, result['reference'], rule)
  said = [*result['verdicts'], *verdicts.outlook(result)]
  parts = [
    tables.render(summaries, result['reference'], rule),
    *map(rich.text.Text, ['', *said, *_remarks(result)]),
  ]
  text = io.StringIO()
  for console in (
    comparison.console,
    rich.console.Console(file=text, width=80, no_color=True, markup=False),
  ):
    for part in parts:
      console.print(part)
  files.write_bytes(workdir / 'comparison.txt', text.getvalue().encode())
  comparison.say(
    f'Written: {buckets.shown(workdir)}/comparison.json, .txt, report.html, '
    f'{picture.name}'
  )


def _remarks(result: Mapping[str, Any]) -> Iterator[str]:
  """Yields what else has to be said: what tuning cost, what was measured."""
  # Controls have the trials of one of them.
  own = [x for x in result['cells'] if not x['control'] or not x['equal']]
  tuned = [cell for cell in own if cell['tuning']]
  if tuned:
    total = {
      kind: sum(cell['tuning']['cost'][kind] for cell in tuned)
      for kind in ('images', 'flops', 'seconds')
    }
    count = len(tuned[0]['tuning']['runs'])
    yield (
      f'Learning rates were chosen on {count} runs a cell; they took '
      f'{total["images"]:,.0f} images, {total["flops"]:.3g} FLOPs and '
      f'{total["seconds"]:,.0f} s in all, which are in no cell.'
    )
  if border := [c['name'] for c in tuned if c['tuning']['at_border']]:
    yield (
      f'Chosen at the border of the range: {", ".join(border)}; a better rate '
      'may lie beyond.'
    )
  _, *others = result['cells']
  timed = {bool(x['control']) for x in others if x['equal'] == 'seconds'}
  begin = 'Equal seconds are a measurement on this machine'
  if True in timed:
    yield (
      f'{begin}: the control has as long as the epochs of the reference with '
      'the same seed took, evaluation included.'
    )
  if False in timed:
    yield (
      f'{begin}: a few epochs of each other cell were timed beforehand, '
      'evaluation included, and set against the reference with the same seed.'
    )
  yield (
    'FLOPs are those of training steps, forward, backward and update of the '
    'step as it is traced for the compiler, and those of what a hand-over '
    "computes on training images; evaluation's are not counted."
  )


def _plan_table(planned: Sequence[Planned]) -> rich.table.Table:
  """Returns what was derived: a row for each cell."""
  rows = []
  for run in planned:
    images, flops = (
      sum(cost.total(kind) for cost in run.costs)
      for kind in ('images', 'flops')
    )
    row = (
      run.cell.name,
      run.cell.equal or '-',
      f'{run.last.num_epochs:.4g}',
      f'{images:,}',
      f'{flops:.3g}',
      f'{run.last.peak_learning_rate:.3g}',
    )
    rows.append(row)
  titles = ('cell', 'equal', 'epochs', 'images', 'FLOPs', 'rate')
  table = tables.create_table(titles, rows)
  return terminal_table(table.columns, table.rows)

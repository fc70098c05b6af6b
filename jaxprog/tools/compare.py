"""Trains cells that cost the same with several seeds, and compares them.

WORKDIR/cells/CELL/seed-N are ordinary runs; trials of learning rates lie in
WORKDIR/tuning, epochs that were timed in WORKDIR/timing. The same command goes
on after any end: what is over is read, what was interrupted is resumed.
"""

import dataclasses
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
  figures,
  halving,
  page,
  power,
  runs,
  sequential,
  statistics,
  tables,
  verdicts,
)
from jaxprog.comparison.cells import Cell
from jaxprog.comparison.runs import Planned
from jaxprog.comparison.statistics import Record
from jaxprog.data import workers
from jaxprog.monitoring import activity, environment
from jaxprog.reliability import lock, mirror, signals
from jaxprog.reporting.report import terminal_table
from jaxprog.training import preflight
from jaxprog.training import run as run_lib

# What is kept of a trial's record.
_OF_TRIALS = ('seed', 'learning_rate', 'num_epochs', 'status', 'workdir')


@dataclasses.dataclass
class Comparison:
  """A comparison on its way.

  What plans a run raises UserError, naming the cell, for a mistake in the
  config or the data.
  """

  config: config_dict.ConfigDict
  workdir: pathlib.Path
  # The reference first, then other cells, then controls.
  cells: tuple[Cell, ...]
  console: rich.console.Console
  meter: budgets.Meter = dataclasses.field(default_factory=budgets.Meter)
  # Runs that are over, in order: what they trained may serve others.
  over: list[Planned] = dataclasses.field(default_factory=list)
  # Cells whose later stages were compiled before their first run.
  compiled: set[str] = dataclasses.field(default_factory=set)
  # What was found about the learning rate of a cell, by its name.
  tuning: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  # Of the workdir, once anything is run; the locks of runs know nothing of it.
  owner: lock.Lock | None = None
  # What can be shown, as said before the first run.
  power: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def reference(self) -> Cell:
    """The cell that others are compared with."""
    return self.cells[0]

  @property
  def num_runs(self) -> int:
    """How many runs there will be, if no trial is lost."""
    tuning = self.config.tuning
    count = len(self.cells) * self.config.seeds
    count += sum(map(_is_timed, self.cells[1:]))
    if tuning.factors:
      choice = halving.halve(
        tuning.factors, len(tuning.rungs), tuning.keep, lambda *_: 0.0
      )
      tuned = sum(map(_is_tuned, self.cells))
      count += tuned * len(choice.trials) * tuning.seeds
    return count

  def plan_run(
    self, cell: Cell, seed: int, num_epochs: float | None = None
  ) -> Planned:
    """Returns a run that is compared, at its tuned learning rate.

    `num_epochs` are those of the last stage; None: what the budget gives, and
    the cell's own where that is told in seconds.
    """
    factor = self.tuning.get(_tuned_as(cell), {}).get('factor', 1.0)
    folder = f'cells/{cell.name}/seed-{seed}'
    return self._plan(cell, seed, folder, factor, num_epochs=num_epochs)

  def plan_trial(
    self, cell: Cell, seed: int, rung: int, factor: float
  ) -> Planned:
    """Returns a run of a part of the last stage, at a multiple of its rate."""
    folder = f'tuning/{cell.name}/rung-{rung}/rate-x{factor:g}/seed-{seed}'
    part = self.config.tuning.rungs[rung]
    return self._plan(cell, seed, folder, factor, part=part)

  def _plan(
    self,
    cell: Cell,
    seed: int,
    folder: str,
    factor: float,
    *,
    num_epochs: float | None = None,
    part: float | None = None,
  ) -> Planned:
    ladder = cells.create_ladder(self.config, cell, seed)
    with cells.in_cell(cell):
      *_, last = cells.trained_stages(ladder, cell)
      if num_epochs is None:
        num_epochs = self._count_epochs(cell, ladder, last.num_epochs)
      ladder = budgets.set_length(ladder, last.name, num_epochs)
      if part is not None:
        length = round(part * num_epochs, 6)
        ladder = budgets.set_length(ladder, last.name, length)
      if factor != 1:
        stage = next(s for s in ladder.stages if s.name == last.name)
        stage.learning_rate *= factor
      costs = self.meter.measure(ladder, cell.only)
    return Planned(cell, seed, ladder, costs, self.workdir / folder)

  def plan_timing(self, cell: Cell) -> Planned:
    """Returns a run of a few epochs of each stage."""
    seed = self.config.base.seed
    ladder = cells.create_ladder(self.config, cell, seed)
    with cells.in_cell(cell):
      for stage in cells.trained_stages(ladder, cell):
        count = float(self.config.timed_epochs)
        ladder = budgets.set_length(ladder, stage.name, count)
      costs = self.meter.measure(ladder, cell.only)
    return Planned(
      cell, seed, ladder, costs, self.workdir / 'timing' / cell.name
    )

  def _count_epochs(
    self, cell: Cell, ladder: config_dict.ConfigDict, own: float
  ) -> float:
    """Returns the epochs of a cell's last stage that the budget leaves."""
    kind = cell.equal
    if kind in ('', 'seconds') or cell == self.reference:
      return own
    seed = self.config.base.seed
    reference = cells.create_ladder(self.config, self.reference, seed)
    costs = self.meter.measure(reference, self.reference.only)
    return budgets.equal_epochs(
      sum(cost.total(kind) for cost in costs),
      self.meter.measure(ladder, cell.only),
      kind,
      f'budget {kind!r}',
    )

  def run(self, planned: Planned, what: str) -> Record:
    """Brings a run to its end, with a line before and after it."""
    number = f'run {len(self.over) + 1} of {self.num_runs}'
    before = runs.read_outcome(planned)
    if before is None:
      self.say(f'{number}: {what}')
      key = f'{planned.cell.name} {planned.last.num_epochs}'
      if key not in self.compiled:
        self.compiled.add(key)
        with activity.doing(f'compiling later stages of {planned.cell.name}'):
          runs.compile_ahead(planned)
    assert self.owner is not None
    outcome = before or runs.run(planned, self.over, self.owner.check)
    self.over.append(planned)
    record = collect.read_record(planned, outcome, {})
    score = record['final_top1']
    result = outcome['status'] if score is None else f'top-1 {score:.1%}'
    again = ', done before' if before else ''
    self.say(f'{number}: {what}: {result}{again}')
    return record

  def say(self, text: str) -> None:
    """Prints a line."""
    self.console.print(text, markup=False, highlight=False, soft_wrap=True)


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
  workdir, url = mirror.locate(workdir, config.base.mirror)
  config = cells.complete(config_lib.with_mirror(config))
  chosen = cells.create_cells(config)
  if jax.process_count() > 1:
    raise errors.UserError('A comparison runs in one process.')
  preflight.claim_workdir(workdir)
  with signals.StopRequest():
    console = rich.console.Console(markup=False)
    comparison = Comparison(config, workdir, chosen, console)
    comparison.say(f'comparison: {len(chosen)} cells, the costs of their steps')
    planned = _plan_all(comparison)
    console.print(_plan_table(planned))
    with mirror.hold(workdir, url) as comparison.owner:
      files.write_json(workdir / 'config.json', config_lib.to_json(config))
      previous = collect.read_previous(workdir)
      comparison.power = power.begin(config, planned, previous)
      comparison.say(verdicts.power_sentence(comparison.power))
      _tune(comparison)
      result = _run_all(comparison, _time_cells(comparison))
      _conclude(comparison, result)
  return result


def _is_tuned(cell: Cell) -> bool:
  """Returns whether a cell has trials; controls share those of one."""
  return not cell.control or cell.name == cells.CONTROL


def _is_timed(cell: Cell) -> bool:
  """Returns whether epochs of a cell are timed; those of controls are known."""
  return cell.equal == 'seconds' and not cell.control


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
      if config.tuning.factors and _is_tuned(cell):
        for rung in range(len(config.tuning.rungs)):
          comparison.plan_trial(cell, config.base.seed, rung, 1.0)
      if _is_timed(cell):
        comparison.plan_timing(cell)
      show(len(planned), len(comparison.cells))
  return planned


def _tuned_as(cell: Cell) -> str:
  return cells.CONTROL if cell.control else cell.name


def _tune(comparison: Comparison) -> None:
  """Chooses the learning rate of each cell, with as many trials in each."""
  tuning = comparison.config.tuning
  if not tuning.factors:
    return
  for cell in filter(_is_tuned, comparison.cells):
    trials: list[Record] = []

    def score(rung: int, factor: float, cell=cell, trials=trials) -> float:
      scores = []
      for seed in cells.tuning_seeds(comparison.config):
        planned = comparison.plan_trial(cell, seed, rung, factor)
        what = f'trial of {cell.name}, rate x {factor:g}, seed {seed}'
        trials.append(comparison.run(planned, what))
        runs.forget_checkpoints(planned)
        top1 = trials[-1]['final_top1']
        scores.append(-math.inf if top1 is None else top1)
      return sum(scores) / len(scores)

    choice = halving.halve(
      tuning.factors, len(tuning.rungs), tuning.keep, score
    )
    comparison.tuning[cell.name] = {
      'factor': choice.factor,
      'at_border': choice.at_border,
      'trials': [trial._asdict() for trial in choice.trials],
      'runs': [{k: trial[k] for k in _OF_TRIALS} for trial in trials],
      'cost': collect.sum_costs(trials),
    }
    border = ', at the border of the range' if choice.at_border else ''
    comparison.say(f'{cell.name}: rate x {choice.factor:g}{border}')


def _time_cells(comparison: Comparison) -> dict[str, _Timing]:
  """Returns how long cells last whose budget is told in seconds.

  Those are left out whose few timed epochs did not reach their end.
  """
  timings = {}
  for cell in filter(_is_timed, comparison.cells[1:]):
    planned = comparison.plan_timing(cell)
    record = comparison.run(planned, f'{cell.name}, timed')
    if record['status'] == 'done':
      timings[cell.name] = _read_timing(comparison, planned)
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
  done: list[tuple[Planned, Record]] = []
  result: dict[str, Any] = {}
  for seed in cells.seeds(comparison.config):
    reference: Record = {}
    for cell in comparison.cells:
      timing = timings.get(cell.name)
      done.append(_run_cell(comparison, cell, seed, reference, timing))
      reference = reference or done[-1][1]
      result = _write(comparison, done)
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
      return planned, {'status': 'failed', 'error': reason, 'shared': []}
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
  # Without a target: what every run that is done reached.
  finals = [record['final_top1'] for record in statistics.done(records)]
  target = config.target_top1 or min(finals, default=0.0)
  # By the last run of each.
  by_cell = {planned.cell.name: planned for planned in every}
  finished = len(done) == len(comparison.cells) * config.seeds
  result: dict[str, Any] = {
    'version': page.VERSION,
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
    'tuning': comparison.tuning.get(_tuned_as(cell)),
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

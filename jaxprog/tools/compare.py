"""Trains cells that cost the same with several seeds, and compares them.

WORKDIR/cells/CELL/seed-N are ordinary runs; trials of learning rates lie in
WORKDIR/tuning, epochs that were timed in WORKDIR/timing. The same command goes
on after any end: what is over is read, what was interrupted is resumed.
"""

import contextlib
import dataclasses
import io
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.table
import rich.text
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, files, paths
from jaxprog.comparison import (
  budgets,
  cells,
  collect,
  controls,
  halving,
  page,
  runs,
  tables,
)
from jaxprog.comparison.cells import Cell
from jaxprog.comparison.runs import Planned
from jaxprog.data import workers
from jaxprog.monitoring import environment
from jaxprog.reliability import lock, signals
from jaxprog.training import preflight


@dataclasses.dataclass
class Comparison:
  """A comparison on its way."""

  config: config_dict.ConfigDict
  workdir: pathlib.Path
  # The reference first, then other cells, then controls.
  cells: tuple[Cell, ...]
  meter: budgets.Meter
  console: rich.console.Console
  # How many runs there will be, if no trial is lost.
  num_runs: int
  # Runs that are over, in order: what they trained may serve others.
  over: list[Planned] = dataclasses.field(default_factory=list)
  # Cells whose later stages were compiled before their first run.
  compiled: set[str] = dataclasses.field(default_factory=set)
  # What was found about the learning rate of a cell, by its name.
  tuning: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

  @property
  def reference(self) -> Cell:
    """The cell that others are compared with."""
    return self.cells[0]

  def plan(
    self,
    cell: Cell,
    seed: int,
    workdir: pathlib.Path,
    change: Callable[[config_dict.ConfigDict, str], config_dict.ConfigDict],
  ) -> Planned:
    """Returns a run of `cell`; `change` is told the name of its last stage.

    Raises:
      UserError: naming the cell, for a mistake in the config or the data.
    """
    ladder = cells.create_ladder(self.config, cell, seed)
    try:
      name = cells.trained_stages(ladder, cell)[-1].name
      ladder = change(ladder, name)
      costs = self.meter.measure(ladder, cell.only)
    except errors.UserError as e:
      where = f'cell {cell.name!r}: {e.where}'
      raise errors.UserError(e.what, where, e.suggestion) from None
    return Planned(cell, seed, ladder, costs, workdir)

  def run(self, planned: Planned, what: str) -> runs.Outcome:
    """Brings a run to its end, with a line before and after it."""
    number = f'run {len(self.over) + 1} of {self.num_runs}'
    before = runs.read_outcome(planned)
    if before is None:
      self.say(f'{number}: {what}')
      self._compile(planned)
    outcome = before or runs.run(planned, self.over)
    self.over.append(planned)
    score = collect.read_record(planned, outcome, {})['final_top1']
    result = outcome['status'] if score is None else f'top-1 {score:.1%}'
    again = ', done before' if before else ''
    self.say(f'{number}: {what}: {result}{again}')
    return outcome

  def _compile(self, planned: Planned) -> None:
    key = f'{planned.cell.name} {planned.last.num_epochs}'
    if key not in self.compiled:
      self.compiled.add(key)
      runs.compile_ahead(planned)

  def say(self, text: str) -> None:
    """Prints a line."""
    self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def compare(
  config: config_dict.ConfigDict | str, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Returns what WORKDIR/comparison.json holds; see collect.write.

  `config` is that of a comparison, or names it: NAME[:ARG] or FILE[:ARG].

  Raises:
    UserError: for a mistake in any cell, before anything is trained.
    Stopped: after a SIGTERM or Ctrl-C, once all is saved.
  """
  workers.leave_if_starting()
  workdir = paths.workdir(workdir)
  if isinstance(config, str):
    config = config_lib.load_config(config)
  chosen = cells.create_cells(config)
  chosen += _create_controls(config, chosen)
  if jax.process_count() > 1:
    raise errors.UserError('A comparison runs in one process.')
  preflight.claim_workdir(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(signals.StopRequest())
    comparison = Comparison(
      config=config,
      workdir=workdir,
      cells=chosen,
      meter=budgets.Meter(),
      console=rich.console.Console(markup=False),
      num_runs=_count_runs(config, chosen),
    )
    comparison.say(f'comparison: {len(chosen)} cells, the costs of their steps')
    planned = _plan_all(comparison)
    comparison.console.print(_plan_table(planned))
    stack.enter_context(lock.Lock(workdir))
    files.write_json(workdir / 'config.json', config_lib.to_json(config))
    _tune(comparison)
    done = _run_all(comparison, _time_cells(comparison))
    result = _write(comparison, done)
    _conclude(comparison, result)
  return result


def _create_controls(
  config: config_dict.ConfigDict, chosen: Sequence[Cell]
) -> tuple[Cell, ...]:
  found = controls.create_controls(config, chosen[0])
  for cell in found:
    if cell.name in [x.name for x in chosen]:
      raise errors.UserError(
        f'{cell.name!r} is the name of a control.',
        'config.grid, config.cells and config.operators',
        'Choose another name for the cell.',
      )
    cells.check_cell(config, cell)
  return found


def _count_runs(config: config_dict.ConfigDict, chosen: Sequence[Cell]) -> int:
  tuning = config.tuning
  trials = sum(
    halving.count_trials(len(tuning.factors), len(tuning.rungs), tuning.keep)
  )
  tuned = sum(_is_tuned(cell) for cell in chosen)
  timed = sum(_is_timed(cell) for cell in chosen[1:])
  return len(chosen) * config.seeds + tuned * trials * tuning.seeds + timed


def _is_tuned(cell: Cell) -> bool:
  """Returns whether a cell has trials; controls share those of one."""
  return not cell.control or cell.name == controls.OWN_LENGTH


def _is_timed(cell: Cell) -> bool:
  """Returns whether epochs of a cell are timed; those of controls are known."""
  return cell.equal == 'seconds' and not cell.control


# What a run of a cell needs to know of how long its stages last: seconds of an
# epoch by stage, and of all hand-overs as 'handover'.
Timing = Mapping[str, float]


def _plan_all(comparison: Comparison) -> list[Planned]:
  """Returns a run of every cell, having planned everything once.

  Every mistake in a cell, in a trial or in what is timed is found here.
  """
  config, planned = comparison.config, []
  for cell in comparison.cells:
    planned.append(_plan_run(comparison, cell, config.base.seed))
    if config.tuning.factors and _is_tuned(cell):
      for rung in range(len(config.tuning.rungs)):
        _plan_trial(comparison, cell, rung, 1.0, config.base.seed)
    if _is_timed(cell):
      _plan_timing(comparison, cell)
  return planned


def _plan_run(
  comparison: Comparison,
  cell: Cell,
  seed: int,
  num_epochs: float | None = None,
) -> Planned:
  """Returns a run that is compared, at its tuned learning rate.

  `num_epochs` are those of the last stage; None: what the budget gives, and
  the cell's own where that is told in seconds.
  """
  factor = comparison.tuning.get(_tuned_as(cell), {}).get('factor', 1.0)
  workdir = comparison.workdir / 'cells' / cell.name / f'seed-{seed}'

  def change(ladder, name):
    if num_epochs is not None:
      ladder = budgets.set_length(ladder, name, num_epochs)
    else:
      ladder = _equalize(comparison, cell, ladder, name)
    return _multiply_rate(ladder, name, factor)

  return comparison.plan(cell, seed, workdir, change)


def _tuned_as(cell: Cell) -> str:
  return controls.OWN_LENGTH if cell.control else cell.name


def _equalize(
  comparison: Comparison,
  cell: Cell,
  ladder: config_dict.ConfigDict,
  name: str,
) -> config_dict.ConfigDict:
  """Returns `ladder` with the last stage `name` as long as the budget says."""
  reference, kind = comparison.reference, cell.equal
  if kind in ('', 'seconds') or cell == reference:
    return ladder
  seed = comparison.config.base.seed
  own = cells.create_ladder(comparison.config, reference, seed)
  costs = comparison.meter.measure(own, reference.only)
  num_epochs = budgets.equal_epochs(
    sum(cost.total(kind) for cost in costs),
    comparison.meter.measure(ladder, cell.only),
    kind,
    f'budget {kind!r}',
  )
  return budgets.set_length(ladder, name, num_epochs)


def _multiply_rate(
  ladder: config_dict.ConfigDict, name: str, factor: float
) -> config_dict.ConfigDict:
  if factor != 1:
    stage = next(s for s in ladder.stages if s.name == name)
    stage.learning_rate *= factor
  return ladder


def _plan_trial(
  comparison: Comparison, cell: Cell, rung: int, factor: float, seed: int
) -> Planned:
  """Returns a run of a part of the last stage, at a multiple of its rate."""
  tuning = comparison.config.tuning
  directory = comparison.workdir / 'tuning' / cell.name
  directory = directory / f'rung-{rung}' / f'rate-x{factor:g}' / f'seed-{seed}'

  def change(ladder, name):
    ladder = _equalize(comparison, cell, ladder, name)
    stage = next(s for s in ladder.stages if s.name == name)
    part = round(tuning.rungs[rung] * stage.num_epochs, 6)
    ladder = budgets.set_length(ladder, name, part)
    return _multiply_rate(ladder, name, factor)

  return comparison.plan(cell, seed, directory, change)


def _tune(comparison: Comparison) -> None:
  """Chooses the learning rate of each cell, with as many trials in each."""
  tuning = comparison.config.tuning
  if not tuning.factors:
    return
  for cell in filter(_is_tuned, comparison.cells):
    trials: list[tuple[Planned, runs.Outcome]] = []

    def score(rung: int, factor: float, cell=cell, trials=trials) -> float:
      scores = []
      for seed in cells.tuning_seeds(comparison.config):
        planned = _plan_trial(comparison, cell, rung, factor, seed)
        what = f'trial of {cell.name}, rate x {factor:g}, seed {seed}'
        outcome = comparison.run(planned, what)
        runs.forget_checkpoints(planned)
        trials.append((planned, outcome))
        top1 = collect.read_record(planned, outcome, {})['final_top1']
        scores.append(-math.inf if top1 is None else top1)
      return sum(scores) / len(scores)

    choice = halving.halve(
      tuning.factors, len(tuning.rungs), tuning.keep, score
    )
    found = _describe_choice(choice, trials)
    comparison.tuning[cell.name] = found
    border = ', at the border of the range' if choice.at_border else ''
    comparison.say(f'{cell.name}: rate x {choice.factor:g}{border}')


def _describe_choice(
  choice: halving.Choice, trials: Sequence[tuple[Planned, runs.Outcome]]
) -> dict[str, Any]:
  return {
    'factor': choice.factor,
    'at_border': choice.at_border,
    'trials': [trial._asdict() for trial in choice.trials],
    'runs': [
      {
        'seed': planned.seed,
        'learning_rate': planned.last.peak_learning_rate,
        'num_epochs': planned.last.num_epochs,
        'status': outcome['status'],
        'workdir': str(planned.workdir),
      }
      for planned, outcome in trials
    ],
    'cost': collect.sum_costs(*zip(*trials, strict=True)),
  }


def _plan_timing(comparison: Comparison, cell: Cell) -> Planned:
  """Returns a run of a few epochs of each stage."""
  count = float(comparison.config.timed_epochs)

  def change(ladder, name):
    for stage in cells.trained_stages(ladder, cell):
      ladder = budgets.set_length(ladder, stage.name, count)
    return ladder

  seed = comparison.config.base.seed
  workdir = comparison.workdir / 'timing' / cell.name
  return comparison.plan(cell, seed, workdir, change)


def _time_cells(comparison: Comparison) -> dict[str, Timing | None]:
  """Returns how long epochs of cells last whose budget is told in seconds.

  None: the few epochs that were to be timed did not reach their end.
  """
  timings: dict[str, Timing | None] = {}
  for cell in filter(_is_timed, comparison.cells[1:]):
    planned = _plan_timing(comparison, cell)
    outcome = comparison.run(planned, f'{cell.name}, timed')
    timings[cell.name] = None
    if outcome['status'] == 'done':
      timings[cell.name] = _read_timing(planned)
  return timings


def _read_timing(planned: Planned) -> Timing:
  history = runs.read_history(planned)
  timing = {'handover': 0.0}
  for stage in history['stages']:
    row = stage['epochs'][-1]
    timing[stage['name']] = row['seconds'] + row['eval_seconds']
    timing['handover'] += stage.get('handover_seconds', 0.0)
  return timing


def _run_all(
  comparison: Comparison, timings: Mapping[str, Timing | None]
) -> list[tuple[Planned, runs.Outcome]]:
  """Trains every cell with each seed; all cells come before the next seed."""
  seeds = cells.seeds(comparison.config)
  order = [(seed, cell) for seed in seeds for cell in comparison.cells]
  done: list[tuple[Planned, runs.Outcome]] = []
  reference: Mapping[str, Any] = {}
  for seed, cell in order:
    planned, outcome = _run_cell(
      comparison, cell, seed, reference, timings.get(cell.name)
    )
    done.append((planned, outcome))
    if cell == comparison.reference:
      reference = collect.read_record(planned, outcome, {})
    _write(comparison, done)
  return done


def _run_cell(
  comparison: Comparison,
  cell: Cell,
  seed: int,
  reference: Mapping[str, Any],
  timing: Timing | None,
) -> tuple[Planned, runs.Outcome]:
  """Returns a run that is over, and how it ended.

  `reference` is the record of the reference's run with this seed.
  """
  planned = _plan_run(comparison, cell, seed)
  if cell.equal == 'seconds' and cell != comparison.reference:
    reason = _find_untimed(cell, reference, timing)
    if reason:
      return planned, {'status': 'failed', 'error': reason, 'shared': []}
    try:
      num_epochs = _epochs_of_seconds(cell, planned, reference, timing or {})
      planned = _plan_run(comparison, cell, seed, num_epochs)
    except errors.UserError as e:  # Seconds are measured: not known before.
      reason = f'{e.what} {e.where}'
      return planned, {'status': 'failed', 'error': reason, 'shared': []}
  return planned, comparison.run(planned, f'{cell.name}, seed {seed}')


def _find_untimed(
  cell: Cell, reference: Mapping[str, Any], timing: Timing | None
) -> str:
  """Returns why no length is known that takes equal seconds, or ''."""
  if reference['status'] != 'done':
    return 'The reference did not finish: its seconds are not known.'
  if timing is None and not cell.control:
    return 'The epochs that were to be timed did not finish.'
  return ''


def _epochs_of_seconds(
  cell: Cell, planned: Planned, reference: Mapping[str, Any], timing: Timing
) -> float:
  """Returns the epochs of the last stage that take the reference's seconds."""
  where = f'cell {cell.name!r}: budget seconds'
  budget = reference['boundaries'][-1]['seconds']
  if cell.control:
    return budgets.equal_seconds(
      budget, 0.0, _last_seconds_per_epoch(reference), where
    )
  *before, last = planned.costs
  spent = sum(cost.num_epochs * timing[cost.name] for cost in before)
  spent += timing['handover']
  return budgets.equal_seconds(budget, spent, timing[last.name], where)


def _last_seconds_per_epoch(record: Mapping[str, Any]) -> float:
  """Returns seconds of an epoch of the last stage, evaluation included."""
  *_, before, end = record['boundaries']
  seconds = end['seconds'] - before['seconds'] - end['handover_seconds']
  return seconds / (end['epochs'] - before['epochs'])


def _write(
  comparison: Comparison, done: Sequence[tuple[Planned, runs.Outcome]]
) -> dict[str, Any]:
  """Writes what is known so far; returns what comparison.json holds."""
  config, every = comparison.config, [planned for planned, _ in done]
  handovers = collect.measure_handovers(every)
  records = [collect.read_record(*run, handovers) for run in done]
  by_cell = {planned.cell.name: planned for planned in every}
  target = collect.choose_target(records, config.target_top1)
  return collect.write(
    comparison.workdir,
    records,
    [
      _describe_cell(comparison, by_cell[cell.name])
      for cell in comparison.cells
      if cell.name in by_cell
    ],
    reference=comparison.reference.name,
    budget=config.budget,
    target_top1=target,
    finished=len(done) == len(comparison.cells) * config.seeds,
    verdicts=collect.find_verdicts(
      records, comparison.cells, target, config.budget
    ),
    config=config_lib.to_json(config),
    environment=environment.environment(),
  )


def _describe_cell(comparison: Comparison, planned: Planned) -> dict[str, Any]:
  cell, last = planned.cell, planned.costs[-1]
  images, flops = last.at(last.total_steps)
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
  picture = collect.plot(workdir, records, result['target_top1'])
  summaries = tables.summarize(records, result['reference'])
  parts = [
    tables.comparison_table(summaries, result['reference']),
    *map(rich.text.Text, ['', *result['verdicts'], *_remarks(result)]),
  ]
  text = io.StringIO()
  for console in (
    comparison.console,
    rich.console.Console(file=text, width=80, no_color=True, markup=False),
  ):
    for part in parts:
      console.print(part)
  files.write_bytes(workdir / 'comparison.txt', text.getvalue().encode())
  page.write_page(workdir)
  comparison.say(
    f'Written: {workdir}/comparison.json, .txt, report.html, {picture.name}'
  )


def _remarks(result: Mapping[str, Any]) -> list[str]:
  """Returns what else has to be said: what tuning cost, what was measured."""
  lines = []
  # Controls have the trials of one of them.
  tuned = [
    cell
    for cell in result['cells']
    if cell['tuning'] and (not cell['control'] or not cell['equal'])
  ]
  if tuned:
    total = {
      kind: sum(cell['tuning']['cost'][kind] for cell in tuned)
      for kind in ('images', 'flops', 'seconds')
    }
    count = len(tuned[0]['tuning']['runs'])
    lines.append(
      f'Learning rates were chosen on {count} runs a cell; they took '
      f'{total["images"]:,.0f} images, {total["flops"]:.3g} FLOPs and '
      f'{total["seconds"]:,.0f} s in all, which are in no cell.'
    )
    border = [c['name'] for c in tuned if c['tuning']['at_border']]
    if border:
      lines.append(
        f'Chosen at the border of the range: {", ".join(border)}; a better '
        'rate may lie beyond.'
      )
  lines += _seconds_remarks(result['cells'][1:])  # Without the reference.
  lines.append(
    'FLOPs are those of training steps, forward, backward and update of the '
    'step as it is traced for the compiler, and those of what a hand-over '
    "computes on training images; evaluation's are not counted."
  )
  return lines


def _seconds_remarks(described: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns where the seconds of an epoch came from, a sentence a kind."""
  timed = {bool(x['control']) for x in described if x['equal'] == 'seconds'}
  begin = 'Equal seconds are a measurement on this machine'
  lines = []
  if True in timed:
    lines.append(
      f'{begin}: the control has as long as the epochs of the reference with '
      'the same seed took, evaluation included.'
    )
  if False in timed:
    lines.append(
      f'{begin}: a few epochs of each other cell were timed beforehand, '
      'evaluation included, and set against the reference with the same seed.'
    )
  return lines


def _plan_table(planned: Sequence[Planned]) -> rich.table.Table:
  """Returns what was derived: a row for each cell."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('cell', overflow='fold')
  for title in ('equal', 'epochs', 'images', 'FLOPs', 'rate'):
    table.add_column(title, justify='right', no_wrap=True)
  for run in planned:
    images, flops = (
      sum(cost.total(kind) for cost in run.costs)
      for kind in ('images', 'flops')
    )
    last = run.last
    table.add_row(
      rich.text.Text(run.cell.name),
      run.cell.equal or '-',
      f'{last.num_epochs:.4g}',
      f'{images:,}',
      f'{flops:.3g}',
      f'{last.peak_learning_rate:.3g}',
    )
  return table

"""What a comparison has to run, and how one of its runs comes to its end."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import rich.console
from ml_collections import config_dict

from jaxprog.comparison import (
  budgets,
  cells,
  collect,
  engines,
  halving,
  runs,
  tasks,
)
from jaxprog.comparison.cells import Cell
from jaxprog.comparison.runs import Planned
from jaxprog.comparison.statistics import Record
from jaxprog.reliability import lock


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
  # Runs that have begun, in order: what they trained may serve others.
  begun: list[Planned] = dataclasses.field(default_factory=list)
  # Those of them that are under way, by their workdirs, and how many are over.
  training: dict[pathlib.Path, Planned] = dataclasses.field(
    default_factory=dict
  )
  num_over: int = 0
  # What was found about the learning rate of a cell, by its name.
  tuning: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  engine: engines.Engine = dataclasses.field(default_factory=engines.Serial)
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
    count += sum(map(is_timed, self.cells[1:]))
    if tuning.factors:
      choice = halving.halve(
        tuning.factors,
        len(tuning.rungs),
        tuning.keep,
        lambda rung, left: [0.0] * len(left),
      )
      tuned = sum(map(is_tuned, self.cells))
      count += tuned * len(choice.trials) * tuning.seeds
    return count

  def plan_run(
    self, cell: Cell, seed: int, num_epochs: float | None = None
  ) -> Planned:
    """Returns a run that is compared, at its tuned learning rate.

    `num_epochs` are those of the last stage; None: what the budget gives, and
    the cell's own where that is told in seconds.
    """
    factor = self.tuning.get(tuned_as(cell), {}).get('factor', 1.0)
    folder = _run_folder(cell, seed)
    return self._plan(cell, seed, folder, factor, num_epochs=num_epochs)

  def plan_trial(
    self, cell: Cell, seed: int, rung: int, factor: float
  ) -> Planned:
    """Returns a run of a part of the last stage, at a multiple of its rate."""
    folder = _trial_folder(cell, seed, rung, factor)
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
      costs = self._measure(ladder, cell)
    return Planned(cell, seed, ladder, costs, self.workdir / folder)

  def plan_timing(self, cell: Cell) -> Planned:
    """Returns a run of a few epochs of each stage."""
    seed = self.config.base.seed
    ladder = cells.create_ladder(self.config, cell, seed)
    with cells.in_cell(cell):
      for stage in cells.trained_stages(ladder, cell):
        count = float(self.config.timed_epochs)
        ladder = budgets.set_length(ladder, stage.name, count)
      costs = self._measure(ladder, cell)
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
    costs = self._measure(reference, self.reference)
    return budgets.fit_length(
      ladder,
      sum(cost.total(kind) for cost in costs),
      kind,
      lambda tried: self._measure(tried, cell),
      f'budget {kind!r}',
    )

  def _measure(
    self, ladder: config_dict.ConfigDict, cell: Cell
  ) -> tuple[budgets.StageCost, ...]:
    if self.config.engine != 'serial':  # The devices are elsewhere.
      ladder = config_dict.ConfigDict(ladder)
      ladder.platform = 'any'
    return self.meter.measure(ladder, cell.only)

  def check_begun(self) -> None:
    """Refuses runs that began with another config, before anything is written.

    Those of a cell differ in seeds alone, so one speaks for all. Rates that are
    not tuned yet, and lengths that seconds decide, are not known: the runs that
    have them are looked at when it is their turn.
    """
    tuning = self.config.tuning
    for cell in self.cells:
      if cell.equal == 'seconds' and cell != self.reference:
        continue
      folder: Callable[..., str] = _run_folder
      plan: Callable[..., Planned] = self.plan_run
      seeds = cells.seeds(self.config)
      if tuning.factors and tuned_as(cell) not in self.tuning:
        first = {'rung': 0, 'factor': tuning.factors[0]}
        folder = functools.partial(_trial_folder, **first)
        plan = functools.partial(self.plan_trial, **first)
        seeds = cells.tuning_seeds(self.config)
      for seed in seeds:
        history = self.workdir / folder(cell, seed) / 'training_history.json'
        if history.exists():
          runs.read_outcome(plan(cell, seed))
          break

  def run(self, planned: Planned, what: str) -> Record:
    """Brings a run to its end, with a line before it and one after it.

    Of runs side by side only the end is said.
    """
    before = runs.read_outcome(planned)
    if before is None and self.config.engine == 'serial':
      self.say(f'run {self.num_over + 1} of {self.num_runs}: {what}')
    outcome = before or self._train(planned, what)
    if before:
      self.begun.append(planned)
    self.num_over += 1
    record = collect.read_record(planned, outcome, {})
    score = record['final_top1']
    result = outcome['status'] if score is None else f'top-1 {score:.1%}'
    again = ', done before' if before else ''
    number = f'run {self.num_over} of {self.num_runs}'
    self.say(f'{number}: {what}: {result}{again}')
    return record

  def _train(self, planned: Planned, what: str) -> runs.Outcome:
    """Returns how a run ended; it waits for stages that another one trains."""
    self.engine.wait(
      lambda: not runs.must_wait(planned, self.begun, self.training.values())
    )
    assert self.owner is not None
    self.owner.check()
    guard = engines.guard(self.config, self.workdir, self.owner)
    earlier = [other for other in self.begun if planned.shares(other)]
    self.begun.append(planned)
    self.training[planned.workdir] = planned
    try:
      return self.engine.run(what, runs.run, planned, earlier, *guard)
    except tasks.LostError as e:
      return runs.failed(str(e))
    finally:
      del self.training[planned.workdir]

  def say(self, text: str) -> None:
    """Prints a line."""
    self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _run_folder(cell: Cell, seed: int) -> str:
  return f'cells/{cell.name}/seed-{seed}'


def _trial_folder(cell: Cell, seed: int, rung: int, factor: float) -> str:
  return f'tuning/{cell.name}/rung-{rung}/rate-x{factor:g}/seed-{seed}'


def is_tuned(cell: Cell) -> bool:
  """Returns whether a cell has trials; controls share those of one."""
  return not cell.control or cell.name == cells.CONTROL


def is_timed(cell: Cell) -> bool:
  """Returns whether epochs of a cell are timed; those of controls are known."""
  return cell.equal == 'seconds' and not cell.control


def tuned_as(cell: Cell) -> str:
  """Returns the cell whose trials choose the learning rate of this one."""
  return cells.CONTROL if cell.control else cell.name

"""What training costs, and how long a cell trains so that all cost the same.

Costs are optimizer steps told in images, FLOPs and epochs: known before
anything runs. Seconds are measured.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import epochs as epochs_lib
from jaxprog import errors, fields
from jaxprog import stages as stages_lib
from jaxprog.planning import costs
from jaxprog.training import setup as setup_lib

# Fields of a stage that are counted in its epochs.
_IN_EPOCHS = [x.name for x in fields.STAGE.values() if x.unit == 'epochs']

# How often a length is fitted where phases move by whole epochs.
_MAX_FITS = 6

# FLOPs of one step, forward, backward and update, a teacher's too, by the index
# of its phase, whether only the head trains and whether a teacher is asked.
_StepFlops = Mapping[tuple[int, bool, bool], float]


class HandOver(NamedTuple):
  """What is computed on training images before a stage's first step."""

  images: int = 0
  flops: float = 0.0


class StageCost(NamedTuple):
  """What the training of one stage takes; evaluation is not in it."""

  name: str
  num_epochs: float
  steps: epochs_lib.Steps
  step_flops: _StepFlops
  handover: HandOver = HandOver()
  # Those that its final accuracy is of.
  num_eval_images: int = 0

  def at(self, step: int) -> tuple[int, float]:
    """Returns the images and FLOPs of the first `step` steps."""
    images, flops = 0, 0.0
    bounds = [*self.steps.starts, self.steps.total]
    for start, end in itertools.pairwise(bounds):
      count = max(0, min(step, end) - start)
      images += count * self.steps.phase(start).batch_size
      flops += count * self.step_flops[_kind(self.steps, start)]
    return images, flops

  def steps_total(self, kind: str) -> float:
    """Returns the 'epochs', 'images' or 'flops' of all steps."""
    images, flops = self.at(self.steps.total)
    return {'epochs': self.num_epochs, 'images': images, 'flops': flops}[kind]

  def total(self, kind: str) -> float:
    """Returns those of the whole stage, the hand-over to it included."""
    fixed = self.handover._asdict().get(kind, 0.0)
    return self.steps_total(kind) + fixed


class _Measured(NamedTuple):
  """What was found of a stage; its hand-over counts if there is one."""

  num_train_images: int
  step_flops: _StepFlops
  handover: HandOver
  num_eval_images: int


class Meter:
  """Counts what ladders cost; what two have in common is traced once."""

  def __init__(self) -> None:
    self._found: dict[str, _Measured] = {}

  def measure(
    self, ladder: config_dict.ConfigDict, only: Sequence[str]
  ) -> tuple[StageCost, ...]:
    """Returns the costs of the stages that are trained, in order.

    Raises:
      UserError: for a mistake in the config, the devices or the data.
    """
    chosen = stages_lib.select(stages_lib.create_stages(ladder), only)
    missing = [x for x in chosen if not self._has(_key(ladder, x), x)]
    if missing:
      setup = setup_lib.create_setup(ladder, only=only)
      for stage in missing:
        self._found[_key(ladder, stage)] = _trace(setup, stage)
    costs = []
    for index, stage in enumerate(chosen):
      found = self._found[_key(ladder, stage)]
      steps = epochs_lib.count_steps(stage, found.num_train_images)
      cost = StageCost(stage.name, stage.num_epochs, steps, found.step_flops)
      if index or stage.init_from:
        cost = cost._replace(handover=found.handover)
      costs.append(cost._replace(num_eval_images=found.num_eval_images))
    return tuple(costs)

  def _has(self, key: str, stage: stages_lib.Stage) -> bool:
    if key not in self._found:
      return False
    found = self._found[key]
    steps = epochs_lib.count_steps(stage, found.num_train_images)
    kinds = [_kind(steps, first) for first in steps.starts]
    return all(kind in found.step_flops for kind in kinds)


def equal_epochs(
  budget: float, stage_costs: Sequence[StageCost], kind: str, where: str
) -> float:
  """Returns the epochs of the last stage for a whole ladder to cost `budget`.

  Of 'epochs', 'images' or 'flops', as `kind` says; in `stage_costs` the last
  stage is as long as it says itself.

  Raises:
    UserError: naming `where`, if the stages before take all of it.
  """
  per_length = stage_costs[-1].steps_total(kind)
  fixed = sum(cost.total(kind) for cost in stage_costs) - per_length
  own = stage_costs[-1].num_epochs
  return fit_epochs(budget - fixed, per_length, own, where)


def fit_length(
  ladder: config_dict.ConfigDict,
  budget: float,
  kind: str,
  measure: Callable[[config_dict.ConfigDict], Sequence[StageCost]],
  where: str,
) -> float:
  """Returns the epochs of the last stage for `ladder` to cost `budget`.

  As `equal_epochs`; but phases that cost unlike move by whole epochs, so that
  the cost jumps with the length. Of a few lengths, each the one before and as
  many epochs of its last phase as that missed, the nearest counts.
  """
  costs = measure(ladder)
  num_epochs = equal_epochs(budget, costs, kind, where)
  if len(costs[-1].steps.phases) == 1:
    return num_epochs
  found = []
  for _ in range(_MAX_FITS):
    costs = measure(set_length(ladder, costs[-1].name, num_epochs))
    left = budget - sum(cost.total(kind) for cost in costs)
    found.append((abs(left), num_epochs))
    num_epochs = round(num_epochs + left / _marginal_cost(costs[-1], kind), 6)
    if num_epochs <= 0:
      break
  return min(found)[1]


def _marginal_cost(cost: StageCost, kind: str) -> float:
  """Returns what another epoch at the end of a stage costs."""
  steps = cost.steps
  start = steps.starts[-1]
  before = dict(zip(('images', 'flops'), cost.at(start), strict=True))
  if kind not in before:
    return 1.0
  part = (steps.total - start) / steps.total
  return (cost.steps_total(kind) - before[kind]) / (part * cost.num_epochs)


def fit_epochs(
  left: float, cost: float, num_epochs: float, where: str
) -> float:
  """Returns the epochs that cost what is `left`, if `num_epochs` cost `cost`.

  Raises:
    UserError: naming `where`, if nothing is left.
  """
  if left <= 0:
    raise errors.UserError(
      'What comes before the last stage takes all of the budget.',
      where,
      'Shorten it, or lengthen the last stage of config.base.',
    )
  factor = left / cost
  if math.isclose(factor, 1.0, rel_tol=1e-9):
    return num_epochs
  return round(factor * num_epochs, 6)


def set_length(
  ladder: config_dict.ConfigDict, name: str, num_epochs: float
) -> config_dict.ConfigDict:
  """Returns `ladder` with a stage of `num_epochs`, stretched or shrunk.

  What counts epochs (warmup, milestones, restarts, frozen epochs, phases)
  moves with its end, so that the schedule keeps its shape.
  """
  ladder = stages_lib.complete(ladder)
  stage = next(s for s in ladder.stages if s.name == name)
  factor = num_epochs / stage.num_epochs
  if factor == 1:
    return ladder
  for field in _IN_EPOCHS:
    value = stage[field]
    many = isinstance(value, tuple)
    stage[field] = tuple(factor * x for x in value) if many else factor * value
  stage.num_epochs = num_epochs
  stage.warmup_steps = round(stage.warmup_steps * factor)
  moved: list[dict[str, Any]] = []
  for phase in stage.phases:
    # At the nearest epochs, one after the other.
    least = moved[-1]['from_epoch'] + 1 if moved else 1
    first = max(least, round(factor * phase['from_epoch']))
    moved.append({**phase, 'from_epoch': first})
  stage.phases = tuple(moved)
  return ladder


def _key(ladder: config_dict.ConfigDict, stage: stages_lib.Stage) -> str:
  """Returns what decides a stage's images and the FLOPs of its steps."""
  plain = config_lib.to_json(ladder)
  own = next(s for s in plain['stages'] if s['name'] == stage.name)
  others = plain['stages'] if ladder.exclude_leaks else []
  for field in fields.names(fields.STAGE, 'scheduled'):
    own.pop(field)
  own['phases'] = [
    {k: v for k, v in x.items() if k != 'from_epoch'} for x in own['phases']
  ]
  for field in ('distill_epochs', 'freeze_epochs'):
    own[field] = bool(own[field])
  for field in ('seed', 'stages', 'stage_defaults'):
    plain.pop(field)
  return json.dumps([plain, own, others], sort_keys=True)


def _trace(setup: setup_lib.Setup, stage: stages_lib.Stage) -> _Measured:
  """Returns on how many images a stage trains, and what its parts cost."""
  task = setup_lib.create_task(setup, stage)
  by_program = {
    program: costs.count_flops(task.trace_train_step(program).jaxpr)
    for program in task.train_steps
  }
  flops = {
    _kind(task.steps, first): by_program[task.program(first)]
    for first in task.steps.starts
  }
  handover = HandOver(*costs.count_handover(task))
  dataset = task.dataset
  return _Measured(len(dataset.train), flops, handover, len(dataset.eval))


def _kind(steps: epochs_lib.Steps, step: int) -> tuple[int, bool, bool]:
  """Returns what decides the cost of a step; see `_StepFlops`."""
  phase = steps.phases.index(steps.phase(step))
  return phase, step < steps.frozen, step < steps.taught

"""Epochs become optimizer steps here and nowhere else."""

import bisect
import dataclasses

from jaxprog import errors
from jaxprog.stages import Stage

# Devices count steps in int32.
MAX_STEP = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Phase:
  """Epochs that are alike; a step is counted from the stage's first."""

  first_epoch: int
  first_step: int
  per_epoch: int
  batch_size: int


@dataclasses.dataclass(frozen=True)
class Steps:
  """The lengths of one stage in optimizer steps.

  Attributes:
    phases: in order; the first one begins at epoch 0 and step 0.
    total: steps of the stage.
    warmup: steps in which the learning rate rises to its peak.
    restarts: where the cosine begins anew; the last of them is where the period
      would end that the stage's end may cut short. (): nowhere.
    milestones: where the `step` schedule lowers the rate.
    frozen: first steps, which train the head alone.
  """

  phases: tuple[Phase, ...]
  total: int
  warmup: int = 0
  restarts: tuple[int, ...] = ()
  milestones: tuple[int, ...] = ()
  frozen: int = 0

  @property
  def epoch_ends(self) -> tuple[int, ...]:
    """Steps done at the end of each epoch; the last may be a part of one."""
    ends: list[int] = []
    while not ends or ends[-1] < self.total:
      ends.append(min(self.epoch_start(len(ends) + 1), self.total))
    return tuple(ends)

  def epoch_start(self, epoch: int) -> int:
    """Returns the first step of `epoch`, counted from 0."""
    at = bisect.bisect_right([p.first_epoch for p in self.phases], epoch)
    phase = self.phases[at - 1]
    return phase.first_step + (epoch - phase.first_epoch) * phase.per_epoch

  def step_at(self, epochs: float) -> int:
    """Returns the step nearest to where `epochs` are over."""
    return _step_at(self.phases, epochs)

  def phase(self, step: int) -> Phase:
    """Returns the phase of `step`."""
    at = bisect.bisect_right([p.first_step for p in self.phases], step)
    return self.phases[at - 1]

  def part(self, stage: Stage, step: int) -> Stage:
    """Returns `stage` as it is at `step`."""
    return stage.parts[self.phases.index(self.phase(step))][1]

  def epoch(self, step: int) -> int:
    """Returns the epoch of `step`, counted from 0."""
    phase = self.phase(step)
    return phase.first_epoch + (step - phase.first_step) // phase.per_epoch


def count_steps(stage: Stage, num_train_images: int) -> Steps:
  """Returns the steps of `stage`.

  An epoch drops the images that do not fill its last batch; the order changes
  each epoch, so they are other ones each time.

  Raises:
    UserError: if a part of the stage is longer than the whole.
  """
  phases = _count_phases(stage, num_train_images)
  warmup = stage.warmup_steps or _step_at(phases, stage.warmup_epochs)
  steps = Steps(
    phases=phases,
    total=max(1, _step_at(phases, stage.num_epochs)),
    warmup=warmup,
    restarts=_restarts(stage, phases, warmup),
    milestones=tuple(_step_at(phases, epoch) for epoch in stage.milestones),
    frozen=_step_at(phases, stage.freeze_epochs),
  )
  _check_steps(stage, steps)
  return steps


def translate(step: int, old: Steps, new: Steps) -> int:
  """Returns the step of `new` from which a stage at `step` of `old` goes on.

  It is the same place in the same epoch, whose order of images is the same. Of
  an epoch under way no image is left out, and at least one step is left.
  """
  epoch = old.epoch(step)
  images = (step - old.epoch_start(epoch)) * old.phase(step).batch_size
  first = new.epoch_start(epoch)
  phase = new.phase(first)
  return first + min(images // phase.batch_size, phase.per_epoch - 1)


def _restarts(
  stage: Stage, phases: tuple[Phase, ...], warmup: int
) -> tuple[int, ...]:
  """Returns `Steps.restarts`; periods are epochs, counted from the peak."""
  peak = [p for p in phases if p.first_step <= warmup][-1]
  epoch = peak.first_epoch + (warmup - peak.first_step) / peak.per_epoch
  length, ends = stage.restart_epochs, [warmup]
  while length and epoch < stage.num_epochs:
    epoch += length
    length *= stage.restart_factor
    ends.append(min(_step_at(phases, epoch), MAX_STEP))
    if ends[-1] <= ends[-2]:
      raise _no_step(stage, 'restart_epochs', phases, epoch)
  return tuple(ends[1:])


def _count_phases(stage: Stage, num_train_images: int) -> tuple[Phase, ...]:
  phases: list[Phase] = []
  for first_epoch, part in stage.parts:
    batch_size = part.batch_size
    per_epoch = num_train_images // batch_size
    if per_epoch == 0:
      raise errors.UserError(
        f'batch_size {batch_size} is larger than the {num_train_images} '
        f'training images of {stage.dataset!r}.',
        f'stage {stage.name!r}',
        f'Set batch_size to at most {num_train_images}.',
      )
    first_step = 0
    if phases:
      last = phases[-1]
      num_epochs = first_epoch - last.first_epoch
      first_step = last.first_step + num_epochs * last.per_epoch
    phases.append(Phase(first_epoch, first_step, per_epoch, batch_size))
  return tuple(phases)


def _step_at(phases: tuple[Phase, ...], epochs: float) -> int:
  phase = [p for p in phases if p.first_epoch <= epochs][-1]
  part = (epochs - phase.first_epoch) * phase.per_epoch
  return phase.first_step + round(part)


def _check_steps(stage: Stage, steps: Steps) -> None:
  """Raises UserError for what rounds to no step, or fills the whole stage."""
  if steps.total > MAX_STEP:
    raise errors.UserError(
      f'The stage has {steps.total:,} steps; they are counted up to '
      f'{MAX_STEP:,}.',
      f'stage {stage.name!r}',
      'Lower num_epochs.',
    )
  warmup = 'warmup_steps' if stage.warmup_steps else 'warmup_epochs'
  for field, found, rest in (
    (warmup, (steps.warmup,), 'leaves no step to decay in'),
    ('restart_epochs', steps.restarts[:1], 'is all that follows the warmup'),
    ('freeze_epochs', (steps.frozen,), 'leaves nothing to unfreeze'),
    ('milestones', steps.milestones, 'is past the end'),
  ):
    for i, step in enumerate(found if getattr(stage, field) else ()):
      if step <= (found[i - 1] if i else 0):
        value = getattr(stage, field)
        epoch = value[i] if isinstance(value, tuple) else value
        raise _no_step(stage, field, steps.phases, epoch)
      if step >= steps.total:
        sizes = ', '.join(str(phase.per_epoch) for phase in steps.phases)
        raise errors.UserError(
          f'{field}: step {step} of {steps.total} {rest}.',
          f'stage {stage.name!r}',
          f'The stage has {stage.num_epochs:g} epochs of {sizes} steps.',
        )


def _no_step(
  stage: Stage, field: str, phases: tuple[Phase, ...], epoch: float
) -> errors.UserError:
  """Returns the error for a `field` that ends on the step that it begins on."""
  per_epoch = [p for p in phases if p.first_epoch <= epoch][-1].per_epoch
  return errors.UserError(
    f'{field} {getattr(stage, field)} has no step of its own at epoch '
    f'{epoch:.4g}: an epoch has {per_epoch} steps.',
    f'stage {stage.name!r}',
    f'Leave at least {1 / per_epoch:.2g} epochs.',
  )

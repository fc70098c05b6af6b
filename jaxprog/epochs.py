"""Epochs become optimizer steps here and nowhere else."""

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
    taught: first steps, in which a teacher is asked.
  """

  phases: tuple[Phase, ...]
  total: int
  warmup: int = 0
  restarts: tuple[int, ...] = ()
  milestones: tuple[int, ...] = ()
  frozen: int = 0
  taught: int = 0

  @property
  def epoch_ends(self) -> tuple[int, ...]:
    """Steps done at the end of each epoch; the last may be a part of one."""
    ends: list[int] = []
    while not ends or ends[-1] < self.total:
      ends.append(min(self.epoch_start(len(ends) + 1), self.total))
    return tuple(ends)

  @property
  def starts(self) -> tuple[int, ...]:
    """Steps from which on another program may run, the first one 0."""
    phases = (phase.first_step for phase in self.phases)
    found = {0, self.frozen, self.taught, *phases}
    return tuple(sorted(step for step in found if step < self.total))

  def epoch_start(self, epoch: float) -> int:
    """Returns the first step of `epoch`, counted from 0.

    Within an epoch it is the step nearest to that part of it.
    """
    phase = self.phase_of_epoch(epoch)
    part = (epoch - phase.first_epoch) * phase.per_epoch
    return phase.first_step + round(part)

  def phase_of_epoch(self, epoch: float) -> Phase:
    """Returns the phase of `epoch`."""
    return [p for p in self.phases if p.first_epoch <= epoch][-1]

  def phase(self, step: int) -> Phase:
    """Returns the phase of `step`."""
    return [p for p in self.phases if p.first_step <= step][-1]

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
  step_at = Steps(phases, 0).epoch_start
  steps = Steps(
    phases=phases,
    total=max(1, step_at(stage.num_epochs)),
    warmup=stage.warmup_steps or step_at(stage.warmup_epochs),
    milestones=tuple(map(step_at, stage.milestones)),
    frozen=step_at(stage.freeze_epochs),
  )
  if stage.distill_from:
    ends = step_at(stage.distill_epochs) if stage.distill_epochs else MAX_STEP
    steps = dataclasses.replace(steps, taught=min(ends, steps.total))
  steps = dataclasses.replace(steps, restarts=_restarts(stage, steps))
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


def _restarts(stage: Stage, steps: Steps) -> tuple[int, ...]:
  """Returns `Steps.restarts`; periods are epochs, counted from the peak."""
  peak = steps.phase(steps.warmup)
  epoch = peak.first_epoch + (steps.warmup - peak.first_step) / peak.per_epoch
  length, ends = stage.restart_epochs, [steps.warmup]
  while length and epoch < stage.num_epochs:
    epoch += length
    length *= stage.restart_factor
    ends.append(min(steps.epoch_start(epoch), MAX_STEP))
    if ends[-1] <= ends[-2]:
      raise _no_step(stage, 'restart_epochs', steps, epoch)
  return tuple(ends[1:])


def _count_phases(stage: Stage, num_train_images: int) -> tuple[Phase, ...]:
  phases: tuple[Phase, ...] = ()
  for epoch, part in stage.parts:
    per_epoch = num_train_images // part.batch_size
    if per_epoch == 0:
      raise errors.UserError(
        f'batch_size {part.batch_size} is larger than the {num_train_images} '
        f'training images of {stage.dataset!r}.',
        f'stage {stage.name!r}',
        f'Set batch_size to at most {num_train_images}.',
      )
    step = Steps(phases, 0).epoch_start(epoch) if phases else 0
    phases += (Phase(epoch, step, per_epoch, part.batch_size),)
  return phases


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
  if stage.distill_from and not steps.taught:
    raise _no_step(stage, 'distill_epochs', steps, stage.distill_epochs)
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
        raise _no_step(stage, field, steps, epoch)
      if step >= steps.total:
        sizes = ', '.join(str(phase.per_epoch) for phase in steps.phases)
        raise errors.UserError(
          f'{field}: step {step} of {steps.total} {rest}.',
          f'stage {stage.name!r}',
          f'The stage has {stage.num_epochs:g} epochs of {sizes} steps.',
        )


def _no_step(
  stage: Stage, field: str, steps: Steps, epoch: float
) -> errors.UserError:
  """Returns the error for a `field` that ends on the step that it begins on."""
  per_epoch = steps.phase_of_epoch(epoch).per_epoch
  return errors.UserError(
    f'{field} {getattr(stage, field)} has no step of its own at epoch '
    f'{epoch:.4g}: an epoch has {per_epoch} steps.',
    f'stage {stage.name!r}',
    f'Leave at least {1 / per_epoch:.2g} epochs.',
  )

"""How an interrupted stage goes on, its config as it was or changed since.

What a stage was trained with is saved beside its states. Where the config asks
for something else now, the stage goes on at the same place in the same epoch:
its own step is what it would be had the stage begun so, which is what the
schedule follows, and all else is kept.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import epochs, errors, stages
from jaxprog.reliability import checkpoints
from jaxprog.training import decisions
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib

# With another one the weights, or what chose the best of them, mean nothing.
_FIXED = (
  'best_metric',
  'blur_pool',
  'eval_crop',
  'eval_flip',
  'eval_interpolation',
  'eval_split',
  'mean_rgb',
  'model',
  'num_filters',
  'std_rgb',
  'stem_kernel',
)
# Fields of a state that may begin anew.
_RENEWABLE = ('ema', 'opt_state')
# What its record tells of a stage that was saved without its config.
_RECORDED = (
  'batch_size',
  'eval_split',
  'image_size',
  'num_epochs',
  'optimizer',
  'schedule',
)


class Change(NamedTuple):
  """Where a stage goes on with another config."""

  # What it was trained for, in epochs, and its own step before and from now on.
  epoch: float
  was: int
  now: int
  # Field -> its value before and from now on.
  fields: dict[str, list[Any]]
  # Fields of the state that do not fit any more, and begin anew.
  renewed: list[str]


class _Place(NamedTuple):
  """Where a stage was left, by the config that it was trained with."""

  stage: stages.Stage
  steps: epochs.Steps
  step: int
  # The last one that was evaluated, counted from 1; 0: none was.
  epoch: int


def check(
  task: setup_lib.Task,
  workdir: pathlib.Path,
  before: config_dict.ConfigDict | None,
) -> bool:
  """Returns whether a stage has begun; `before` is the run's config so far.

  Nothing is changed: the workdir still tells what it was trained with.

  Raises:
    UserError: if it cannot go on as its task is.
  """
  name = task.stage.name
  found = checkpoints.read_latest(workdir, name)
  if found is None:
    return False
  number, saved, meta = found
  config, record = _config_of(task, meta, before), meta['record']
  first = record.get('first_step', 0)
  step = number + first - record.get('step_offset', first)
  place = _find_place(task, config, record, step)
  for what, where, suggestion in _mistakes(task, config, meta, place):
    raise errors.UserError(what, f'stage {name!r}{where}', suggestion)
  directory = checkpoints.stage_directory(workdir, name)
  checkpoints.check_matches(saved, task.state_shapes, directory, _RENEWABLE)
  _find_step(task, place)
  return True


def _mistakes(
  task: setup_lib.Task,
  config: config_dict.ConfigDict,
  meta: checkpoints.Meta,
  place: _Place,
) -> Iterator[tuple[str, str, str]]:
  """Yields what is wrong, where, and a suggestion."""
  for field, (was, now) in _differences(task, config).items():
    if field in _FIXED:
      yield (
        f'A stage under way cannot go on with another {field}.',
        f': {field}: {was!r} -> {now!r}',
        'Use another --workdir, or the value that the stage began with.',
      )
  other_data = 'Use another --workdir, or the data that the run began with.'
  if tuple(meta['classes']) != task.dataset.classes:
    what = 'The classes of the dataset are not those of the checkpoint.'
    yield what, '', other_data
  was, now = meta['record']['num_train_images'], len(task.dataset.train)
  if was != now:
    what = f'The run began with {was:,} training images; there are {now:,} now.'
    yield what, '', other_data
  was, now = place.stage.eval_size, task.stage.eval_size
  if was != now:
    yield (
      'A stage under way cannot go on with another size of evaluation images.',
      f': {was} -> {now}',
      f'Set its eval_image_size to {was}, or use another --workdir.',
    )


def read_config(workdir: pathlib.Path) -> config_dict.ConfigDict | None:
  """Returns the config that a run has had so far, None where there is none."""
  path = workdir / 'config.json'
  return config_lib.load_config(str(path)) if path.is_file() else None


def restore(
  task: setup_lib.Task,
  saved: checkpoints.Checkpoints,
  before: config_dict.ConfigDict | None,
) -> tuple[state_lib.TrainState, dict[str, Any], Change | None] | None:
  """Returns state, record and what has changed; None if the stage is new.

  `before` is what `read_config` returned before the run wrote its own: once
  states were saved without the config that they were trained with.
  """
  restored = saved.restore_latest(task.state_shapes, _RENEWABLE)
  if restored is None:
    return None
  state, meta = restored
  config, record = _config_of(task, meta, before), meta['record']
  place = _find_place(task, config, record, int(state.step))
  if 'first_step' not in record and place.epoch:
    # Once it was not recorded.
    end = place.steps.epoch_ends[place.epoch - 1]
    record['first_step'] = record['epochs'][-1]['global_step'] - end
  fields = _differences(task, config)
  now = _find_step(task, place) if fields else place.step
  unfrozen = place.step <= place.steps.frozen and now > task.steps.frozen
  # Moments know nothing of a backbone that unfreezes, and what another
  # optimizer made of them may have the same shape.
  if 'optimizer' in fields or unfrozen:
    state = dataclasses.replace(state, opt_state=None)
  renewed = [x for x in _RENEWABLE if getattr(state, x) is None]
  if not fields and not renewed:
    return state, record, None
  if renewed:
    fresh = task.create_state(state.variables)
    new = {x: getattr(fresh, x) for x in renewed}
    state = dataclasses.replace(state, **new)
  scale = decisions.rate_scale(task.stage, record['epochs'])
  step, rate_scale = jax.device_put(
    (np.int32(now), np.float32(scale)), task.shardings.replicated
  )
  state = dataclasses.replace(state, step=step, rate_scale=rate_scale)
  change = Change(_count_epochs(place), place.step, now, fields, renewed)
  return state, record, change


def _config_of(
  task: setup_lib.Task,
  meta: checkpoints.Meta,
  before: config_dict.ConfigDict | None,
) -> config_dict.ConfigDict:
  """Returns the config that a state was trained with, as far as it is known.

  `before` is that of the run, for states that were saved without theirs.
  """
  if 'config' in meta:
    return config_lib.restore(meta['config'])
  record = meta['record']
  known = {field: record[field] for field in _RECORDED if field in record}
  if 'phases' in record:
    known['phases'] = tuple(
      {'from_epoch': epoch, **changes} for epoch, changes in record['phases']
    )
  names = [fields.name for fields in before.stages] if before else []
  config = stages.complete(before if task.stage.name in names else task.config)
  config.update({x: meta[x] for x in setup_lib.NETWORK if x in meta})
  for fields in config.stages:
    if fields.name == task.stage.name:
      fields.update(known)
  return config


def _differences(
  task: setup_lib.Task, config: config_dict.ConfigDict
) -> dict[str, list[Any]]:
  """Returns the fields that decide the stage's result and have changed."""
  name = task.stage.name
  old, new = (
    config_lib.to_json(x) for x in (config, stages.complete(task.config))
  )
  return {
    x.field.removeprefix(f'{name}.'): [x.was, x.now]
    for x in config_lib.changes(old, new, (name,))
    if not x.allowed
  }


def _find_place(
  task: setup_lib.Task,
  config: config_dict.ConfigDict,
  record: dict[str, Any],
  step: int,
) -> _Place:
  stage = setup_lib.find_stage(config, task.stage.name)
  assert stage is not None  # It was saved with its config.
  steps = epochs.count_steps(stage, record['num_train_images'])
  rows = record['epochs']
  return _Place(stage, steps, step, rows[-1]['epoch'] if rows else 0)


def _find_step(task: setup_lib.Task, place: _Place) -> int:
  """Returns the stage's own step from which it goes on.

  Raises:
    UserError: if it has been trained for longer than it is to be.
  """
  stage, steps = task.stage, task.steps
  if steps == place.steps:
    return place.step
  if place.step >= place.steps.total and stage.num_epochs == (
    place.stage.num_epochs
  ):
    return steps.total
  if place.epoch > place.steps.epoch(place.step):
    # The stage was to end within an epoch, and has: it is not opened again.
    step = steps.epoch_start(place.epoch)
  else:
    step = epochs.translate(place.step, place.steps, steps)
    epoch = place.steps.epoch(place.step)
    is_open = place.step > place.steps.epoch_start(epoch)
    if is_open and step >= steps.total:
      # It is evaluated only after a step of it, even if none would be left.
      rest = stage.num_epochs > _count_epochs(place)
      last = max(steps.total - 1, steps.epoch_start(epoch))
      step = last if rest else steps.total + 1
  if step > steps.total:
    trained = _count_epochs(place)
    raise errors.UserError(
      f'num_epochs is {stage.num_epochs:g}; {trained:.3g} epochs are trained '
      'already.',
      f'stage {stage.name!r}',
      f'Set it to {math.ceil(trained)} or more; at {math.ceil(trained)} the '
      'stage ends.',
    )
  return step


def _count_epochs(place: _Place) -> float:
  """Returns for how many epochs a stage has been trained."""
  epoch, steps = place.steps.epoch(place.step), place.steps
  done = place.step - steps.epoch_start(epoch)
  return epoch + done / steps.phase(place.step).per_epoch

"""Trains one stage: for each step in the stage, then metrics, saves."""

import collections
import contextlib
import copy
import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprog import errors
from jaxprog.data import balance, loader, preprocess, records
from jaxprog.data import batches as batches_lib
from jaxprog.monitoring import diagnostics, outcomes
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import memory as memory_lib
from jaxprog.monitoring import profile as profile_lib
from jaxprog.monitoring import step_times as step_times_lib
from jaxprog.optim import optimizers
from jaxprog.reliability import checkpoints as checkpoints_lib
from jaxprog.training import decisions, described, preview, setup, steps
from jaxprog.training import feed as feed_lib
from jaxprog.training import run as run_lib
from jaxprog.training import state as state_lib
from jaxprog.training.transfer import handover


@dataclasses.dataclass
class Course:
  """A stage on its way, and what has come of it so far."""

  run: run_lib.Run
  task: setup.Task
  # The stage's part of the history, changed in place.
  record: dict[str, Any]
  checkpoints: checkpoints_lib.Checkpoints
  # When the stage before was left, by the monotonic clock.
  left: float | None = None
  step_times: step_times_lib.StepTimes = dataclasses.field(
    default_factory=step_times_lib.StepTimes
  )
  memory: memory_lib.Sampler = dataclasses.field(
    default_factory=memory_lib.Sampler
  )
  # Steps in a row, up to the last one, that were skipped.
  skipped: int = 0
  # What the last step with a finite loss and gradient came to.
  last_finite: dict[str, float] = dataclasses.field(default_factory=dict)
  last_save: float = dataclasses.field(default_factory=time.monotonic)

  @property
  def first_step(self) -> int:
    """The global step at which the stage's own step 0 lies.

    A logger's x axis goes on over all stages of the workdir, and where the
    stage's own steps are counted anew because their size has changed.
    """
    return self.record.get('step_offset', self.record['first_step'])

  def taken(self, step: int) -> int:
    """Returns how many steps the stage has taken at its own `step`.

    It numbers checkpoints and incidents, and never falls as `step` may.
    """
    return self.first_step + step - self.record['first_step']

  @functools.cached_property
  def meta(self) -> dict[str, Any]:
    """What is stored with all weights of the stage."""
    return described.weights_meta(self.task)

  @functools.cached_property
  def measure_statistics(self) -> Callable[[dict[str, Any]], Any]:
    """Returns BatchNorm's statistics for weights of the stage."""
    return handover.create_statistics_fn(self.task)

  @functools.cached_property
  def order(self) -> outcomes.Order:
    """The order in which outcomes of the selection's images are kept."""
    return outcomes.sort_images(self.task.dataset.selection)

  @property
  def group(self) -> str:
    """What the tags of the stage begin with: stages are shown in this order."""
    names = [stage['name'] for stage in self.run.history['stages']]
    return f'{names.index(self.record["name"]) + 1} {self.record["name"]}'

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    """Lets loggers write what was found at the stage's own `step`."""
    self.run.writer.write_scalars(self.first_step + step, scalars)


# A stage is taken back so often before the run ends.
_MAX_ROLLBACKS = 2
# Examples of a bad batch that an error names.
_NAMED_EXAMPLES = 8
# Steps are dispatched this much ahead of the metrics that are read, in seconds,
# which is what a thread of Python may have to wait for others; at most so many.
_SECONDS_AHEAD, _MOST_AHEAD = 0.02, 16
# Batches under evaluation, besides those on their way to the devices.
_EVALUATED_AHEAD = 4


class _NotFiniteError(Exception):
  """Too many steps in a row changed nothing; the last one is `step`."""

  def __init__(self, step: int):
    super().__init__(step)
    self.step = step


class SkippedTooOftenError(RuntimeError):
  """Steps stayed not finite after all rollbacks."""


def train_stage(
  course: Course, state: state_lib.TrainState
) -> state_lib.TrainState:
  """Returns `state` after the rest of the stage, from its own step on.

  Raises:
    SkippedTooOftenError: naming the rate or the examples, if steps stay not
      finite after the stage was taken back to a checkpoint twice.
  """
  while True:
    try:
      return _train_from(course, state)
    except _NotFiniteError as e:
      state = _roll_back(course, e.step)


def _train_from(
  course: Course, state: state_lib.TrainState
) -> state_lib.TrainState:
  """Returns `state` after the rest of the stage, if nothing goes wrong."""
  task, record, writer = course.task, course.record, course.run.writer
  start = int(state.step)
  writer.forget_after(course.first_step + start)
  course.step_times = step_times_lib.StepTimes(record.get('step_seconds', ()))
  feed = feed_lib.Feed(task, _data_seed(task, record), start)
  profile = profile_lib.Profile(
    writer.logdir, task.config.profile_steps, task.steps.total
  )
  with contextlib.closing(feed), contextlib.closing(profile):
    while int(state.step) < task.steps.total:
      reason = decisions.reason_to_stop(task.stage, record['epochs'])
      if reason:
        record['stopped'] = reason
        break
      epoch = task.steps.epoch(int(state.step))
      state, timing = _train_epoch(course, state, feed, profile, epoch)
      state = _end_epoch(course, state, epoch, timing)
  return state


def _data_seed(task: setup.Task, record: dict[str, Any]) -> int:
  """Returns what decides the order of examples; a rollback changes it.

  It is part of the record, and so of the checkpoint.
  """
  count = len(record.get('rollbacks', ()))
  return zlib.crc32(f'{task.seed}/{count}'.encode()) if count else task.seed


def _roll_back(course: Course, step: int) -> state_lib.TrainState:
  """Returns the state of the last checkpoint, with another order to come."""
  task, record = course.task, course.record
  rollbacks = record.get('rollbacks', [])
  restored = course.checkpoints.restore_latest(task.state_shapes)
  assert restored is not None  # A stage is saved before its first step.
  state, meta = restored
  saved = int(state.step)
  batches = loader.own_batches(
    task.dataset.train,
    task.stage,
    seed=_data_seed(task, record),
    steps=task.steps,
  )
  text = (
    f'{course.skipped} steps in a row, up to step {step + 1}, were not finite'
  )
  diverged = _is_finite(task, step, state, batches)
  if diverged:
    text += (
      f', but the last is with the weights of step {saved}: it diverged. '
      f'{_describe_divergence(course.last_finite)}'
    )
  if len(rollbacks) == _MAX_ROLLBACKS:
    named = '' if diverged else _name_examples(task, step, batches)
    raise SkippedTooOftenError(
      f'Stage {task.stage.name!r}, after {_MAX_ROLLBACKS} rollbacks: {text}'
      + (f'. The last batch: {named}.' if named else '.')
    )
  text += f'; back to step {saved}, with another order of examples'
  record.clear()
  record.update(meta['record'])
  record['rollbacks'] = [
    *rollbacks,
    {'at': course.taken(step + 1), 'to': course.taken(saved)},
  ]
  course.skipped = 0
  _note(course, step + 1, 'rollback', text)
  save(course, state)
  return state


def _is_finite(
  task: setup.Task,
  step: int,
  state: state_lib.TrainState,
  batches: batches_lib.TrainBatches,
) -> bool:
  """Returns whether loss and gradient of a batch are, with those weights.

  If so, what is wrong came with later weights, and not with the images.
  """
  batch = loader.to_device(
    batches_lib.read_batch(batches, step), task.shardings.batch
  )
  state = dataclasses.replace(
    jax.tree.map(jnp.copy, state),  # The step takes its memory.
    step=jax.device_put(np.int32(step), task.shardings.replicated),
  )
  program = task.program(step)
  train_step = task.train_steps[program]
  _, metrics = train_step(state, batch, *task.arguments(program))
  values = metrics['loss'], metrics['grad_norm']
  return all(math.isfinite(float(x)) for x in values)


def _describe_divergence(last: dict[str, float]) -> str:
  """Returns what the last finite step came to, and what to try."""
  found = ', '.join(
    f'{name.replace("_", " ")} {last[name]:.3g}'
    for name in ('learning_rate', 'loss', 'grad_norm')
    if name in last
  )
  remedy = 'try a lower learning_rate, then a warmup or gradient_clipping'
  return f'Before: {found or "no finite step"}; {remedy}'


def _name_examples(
  task: setup.Task, step: int, batches: batches_lib.TrainBatches
) -> str:
  """Returns index and file of the first examples of a batch of this process."""
  _, indices = batches.indices(step)
  records = task.dataset.train
  named = [f'{i} ({records.describe(int(i))})' for i in indices]
  rest = len(named) - _NAMED_EXAMPLES
  more = [f'and {rest} more'] if rest > 0 else []
  return ', '.join(named[:_NAMED_EXAMPLES] + more)


def find_weights(course: Course, state: state_lib.TrainState) -> dict[str, Any]:
  """Returns the variables that a stage evaluates and saves.

  Those of a schedule-free optimizer are an average, whose statistics no step
  has seen: they are measured.
  """
  task = course.task
  if not task.stage.is_schedule_free:
    return state.variables
  course.run.dog.beat(f"the statistics of {task.stage.name}'s average")
  average = optimizers.averaged_params(state.params, state.opt_state)
  variables = dataclasses.replace(state, params=average).variables
  if state.batch_stats:
    variables['batch_stats'] = course.measure_statistics(variables)
  return jax.device_put(variables, task.shardings.replicated)


class Evaluation(NamedTuple):
  """What came of the n images of a split, each seen once."""

  # Means: loss, top1, top5, and balanced_top1 where that may be another one.
  scores: dict[str, float]
  # What `steps.create_eval_step` says of each image, by name, (n,) each.
  outcomes: dict[str, np.ndarray]
  # Name -> why it could not be decoded: it counts as wrong.
  bad: dict[str, str]


def evaluate(
  task: setup.Task,
  variables: dict[str, Any],
  split: records.Records,
  on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
  """Returns what came of every image of `split`, once.

  `on_batch` is told how many batches are dispatched, and of how many. A few
  are under way at a time: all of a split may not have room on the devices.

  Raises:
    AssertionError: if not every image was seen once.
  """
  sums = jax.device_put(steps.zero_eval_sums(), task.shardings.replicated)
  reader = loader.eval_batches(
    split,
    task.stage,
    num_workers=task.num_workers,
    worker_kind=task.config.worker_kind,
  )
  batches: list[steps.Outcomes] = []
  with contextlib.closing(reader):
    for batch in loader.prefetch_to_device(reader, task.shardings.batch):
      sums, outcome = task.eval_step(variables, batch, sums)
      batches.append(outcome)
      if len(batches) > _EVALUATED_AHEAD:
        jax.block_until_ready(batches[-1 - _EVALUATED_AHEAD])
      on_batch(len(batches), -(-len(split) // len(batch['label'])))
  totals = {name: float(x) for name, x in sums.items()}
  count = totals.pop('count')
  if count != len(split):
    raise AssertionError(f'Evaluated {count:g} of {len(split)} images.')
  scores = {name: x / count for name, x in totals.items()}
  found = diagnostics.join_outcomes(batches, len(split))
  asked = task.stage.best_metric == 'val_balanced_top1'
  if asked or balance.is_unequal(np.bincount(split.labels)):
    ranks = found['rank']
    scores['balanced_top1'] = diagnostics.balanced_top1(ranks, split.labels)
  return Evaluation(scores, found, reader.bad)


def _train_epoch(
  course: Course,
  state: state_lib.TrainState,
  feed: feed_lib.Feed,
  profile: profile_lib.Profile,
  epoch: int,
) -> tuple[state_lib.TrainState, dict[str, float]]:
  """Runs to the end of `epoch`; returns the state and where the time went."""
  task = course.task
  first, end = int(state.step), task.steps.epoch_ends[epoch]
  batch_size = task.steps.phase(first).batch_size
  _note_handover(course, first)
  # Steps under way, the oldest first, and what their metrics will be.
  pending: collections.deque[tuple[int, steps.Metrics]] = collections.deque()

  def report(ahead):  # Of all but the last `ahead` steps.
    while len(pending) > ahead:
      step, metrics = pending.popleft()
      timing = feed.timing((step + 1 - first) * batch_size)
      _report_step(course, step, metrics, timing)

  restarts = feed.reader.restarts
  feed.begin_epoch()
  course.step_times.pause()
  for step in range(first, end):
    batch = feed.next()
    if step == 0:
      draw = functools.partial(preview.draw_augmented, task, batch)
      course.run.writer.write_images(course.first_step + 1, draw)
    # Step n is dispatched before the metrics of those before it are read.
    ahead = _steps_ahead(feed.timing(0)['seconds'], step - first - len(pending))
    profile.begin_step(step)
    program = task.program(step)
    train_step = task.train_steps[program]
    state, metrics = train_step(state, batch, *task.arguments(program))
    profile.end_step(step, metrics)
    jax.copy_to_host_async(metrics)
    pending.append((step, metrics))
    _note_bad_images(course, feed.reader.bad)
    report(ahead)
    course.step_times.step()
    if _must_save(course, step + 1) and step + 1 < end:
      report(0)  # Whether to save depends on whether they were skipped.
      save(course, state)
      _stop_if_asked(course)
  jax.block_until_ready(state)
  timing = feed.timing((end - first) * batch_size)
  report(0)
  if feed.reader.restarts > restarts:
    _note(course, end, 'worker_restart', 'dead data workers were replaced')
  # In the first epoch workers have yet to get ahead.
  limit = feed.describe_limit(timing) if epoch else ''
  if limit and 'input_limit' not in course.record:
    course.record['input_limit'] = limit
    course.run.progress.remark(f'{task.stage.name}: {limit}')
  return state, timing


def _steps_ahead(seconds: float, count: int) -> int:
  """Returns how many steps are dispatched before the metrics of one are read.

  `count` steps have taken so many seconds. Of several processes each would
  find another number, and what one of them alone has dispatched before a
  rollback would wait for the others for ever.
  """
  if not count or jax.process_count() > 1:
    return 1
  return int(min(max(_SECONDS_AHEAD * count / seconds, 1), _MOST_AHEAD))


def _note_handover(course: Course, step: int) -> None:
  """Notes how long it took until this stage's first batch was asked for."""
  if course.left is not None:
    seconds = time.monotonic() - course.left
    course.left = None
    course.record['handover_seconds'] = seconds
    course.write_scalars(step + 1, {'perf/handover_seconds': seconds})


def _note(course: Course, step: int, kind: str, text: str) -> None:
  """Says what went wrong, and notes it in the run's log."""
  name, taken = course.task.stage.name, course.taken(step)
  course.run.note(kind, f'{name}: {text}', stage=name, step=taken)


def _note_bad_images(course: Course, bad: dict[str, str]) -> None:
  """Notes and says which images cannot be decoded.

  Raises:
    BadImageError: if they are too many.
  """
  noted = course.record.setdefault('bad_images', {})
  if bad.keys() <= noted.keys():
    return
  stage, limit = course.task.stage, course.task.config.max_bad_images
  for name in bad.keys() - noted.keys():
    noted[name] = bad[name]
    text = f'{stage.name}: cannot decode {name}: {bad[name]}'
    course.run.note('bad_image', text, stage=stage.name, name=name)
  if len(noted) > limit:
    names = ', '.join(sorted(noted)[:3])
    raise preprocess.BadImageError(
      f'{len(noted)} images of {stage.dataset!r} cannot be decoded, more than '
      f'max_bad_images = {limit}: {names}, ... --mode=verify lists them all.'
    )


def _end_epoch(
  course: Course,
  state: state_lib.TrainState,
  epoch: int,
  timing: dict[str, float],
) -> state_lib.TrainState:
  """Evaluates, records and saves; returns the state with empty sums."""
  task, record, run = course.task, course.record, course.run
  began = time.monotonic()

  def on_batch(done, total):
    run.dog.beat(f'evaluation batch {done} of {total} of {task.stage.name}')
    run.progress.evaluate(done, total)

  weights = find_weights(course, state)
  found = evaluate(task, weights, task.dataset.selection, on_batch)
  _note_bad_images(course, found.bad)
  scores = {f'val_{name}': x for name, x in found.scores.items()}
  averaged = {}
  if state.ema:
    of_ema = evaluate(task, state.ema, task.dataset.selection, on_batch)
    averaged = {f'ema_{name}': x for name, x in of_ema.scores.items()}
  row = history_lib.add_epoch(
    record,
    epoch=epoch + 1,
    global_step=course.first_step + int(state.step),
    **_summarise(task, state, scores),
    **averaged,
    **timing,
    eval_seconds=time.monotonic() - began,
  )
  best = record['best'] or {'epoch': row['epoch']}  # No finite score yet.
  is_best = best['epoch'] == row['epoch']
  _write_epoch(course, row)
  began = time.monotonic()
  if jax.process_index() == 0:
    path = outcomes.find_path(run.workdir, task.stage.name)
    right = found.outcomes['rank'] < 1
    outcomes.write(path, course.order, right, row['epoch'])
  _save_weights(course, dataclasses.replace(state, **weights), row, is_best)
  scale = decisions.rate_scale(task.stage, record['epochs'])
  metrics, rate_scale = jax.device_put(
    (state_lib.zero_metrics(), np.float32(scale)), task.shardings.replicated
  )
  state = dataclasses.replace(state, metrics=metrics, rate_scale=rate_scale)
  save(course, state)
  saved = record.get('save_seconds', 0.0) + time.monotonic() - began
  record['save_seconds'] = saved
  run.save_history()
  run.progress.end_epoch(row, is_best)
  run.on_epoch(task.stage.name, row)
  _stop_if_asked(course)
  return state


def _summarise(
  task: setup.Task, state: state_lib.TrainState, scores: dict[str, float]
) -> dict[str, float]:
  """Returns what an epoch's row says of its steps, `scores` among it."""
  sums = {name: float(x) for name, x in state.metrics.items()}

  def mean(name, count):  # NaN where every step was skipped.
    return sums[name] / sums[count] if sums[count] else math.nan

  rate = task.learning_rate_fn(int(state.step) - 1) * state.rate_scale
  return {
    'train_loss': mean('loss', 'count'),
    'train_top1': mean('top1', 'count'),
    **scores,
    'learning_rate': float(rate),
    'grad_norm': mean('grad_norm', 'steps'),
    'skipped_steps': int(sums['skipped']),
  }


def _save_weights(
  course: Course,
  state: state_lib.TrainState,
  row: dict[str, Any],
  is_best: bool,
) -> None:
  """Saves the weights and the averaged ones, each if it is the best so far."""
  began, step = time.monotonic(), int(state.step)
  metric = course.task.stage.best_metric.replace('val_', 'ema_')
  average = history_lib.best_epoch(course.record['epochs'], metric)
  saved = {'best': state.variables} if is_best else {}
  if average is not None and average['epoch'] == row['epoch']:
    saved['ema'] = state.ema
  for name, variables in saved.items():
    meta = {**course.meta, 'epoch': row}
    course.checkpoints.save_weights(name, course.taken(step), variables, meta)
  if saved:
    scalars = {'saves/weights_seconds': time.monotonic() - began}
    course.write_scalars(step, scalars)


def save(course: Course, state: state_lib.TrainState) -> None:
  """Saves everything that resuming needs, history of the stage included.

  But not while steps are skipped: what is wrong may be in the state.
  """
  course.record['step_seconds'] = course.step_times.histogram()
  run, step = course.run, int(state.step)
  if course.skipped and run.stop.signum is None:
    return
  run.owner.check()
  began = time.monotonic()
  # A copy: it is written in the background, while the record grows.
  meta = {**course.meta, 'record': copy.deepcopy(course.record)}
  course.checkpoints.save_latest(state, meta, course.taken(step))
  run.dog.beat(f'a save of {course.task.stage.name}')
  before, course.last_save = course.last_save, time.monotonic()
  if step:
    scalars = {
      # What training waited for; the rest goes on in the background.
      'saves/save_seconds': course.last_save - began,
      'saves/interval_seconds': course.last_save - before,
    }
    course.write_scalars(step, scalars)


def _must_save(course: Course, step: int) -> bool:
  """Returns whether to save in mid-epoch: it is time to, or a signal came.

  Called after each step, in mid-epoch or not: the end of one saves anyway.
  """
  config, stop = course.task.config, course.run.stop
  every_seconds = 60 * config.checkpoint_every_minutes
  late = every_seconds and time.monotonic() - course.last_save > every_seconds
  # Of many clocks, which disagree, one decides.
  due = stop.poll(save=bool(late) and jax.process_index() == 0)
  every_steps = config.checkpoint_every_steps
  due = due or (every_steps > 0 and step % every_steps == 0)
  return due or stop.signum is not None


def _stop_if_asked(course: Course) -> None:
  signum = course.run.stop.signum
  if signum is not None:
    raise errors.Stopped(signum, saved=True)


def _report_step(
  course: Course, step: int, metrics: steps.Metrics, timing: dict[str, float]
) -> None:
  """Shows one step; reading its metrics waits for it to finish.

  Raises:
    _NotFiniteError: after as many skipped steps as are allowed in a row.
  """
  task, run = course.task, course.run
  values = {name: float(x) for name, x in jax.device_get(metrics).items()}
  run.dog.beat(f'step {step + 1} of {task.stage.name}')
  course.checkpoints.check()
  skipped = not values.pop('finite')
  if math.isfinite(values['loss'] + values['grad_norm']):
    course.last_finite = values
  _count_skipped(course, step, skipped)
  used = course.memory.in_use()
  speed = {k: timing[k] for k in ('images_per_second', 'input_wait')}
  run.progress.step(step + 1, {**values, **speed, used.kind: used.bytes})
  if (step + 1) % task.config.log_every_steps == 0:
    names = ('loss', 'top1', 'learning_rate', 'grad_norm')
    scalars = {f'optimization/{name}': values[name] for name in names}
    scalars['perf/images_per_second'] = speed['images_per_second']
    scalars['perf/memory_bytes'] = used.bytes
    if (seconds := course.step_times.take_mean()) is not None:
      scalars['perf/step_seconds'] = seconds
    course.write_scalars(step + 1, scalars)


def _count_skipped(course: Course, step: int, skipped: bool) -> None:
  if not skipped:
    course.skipped = 0
    return
  course.skipped += 1
  name, taken = course.task.stage.name, course.taken(step + 1)
  text = f'{name}: step {step + 1} was not finite and changed nothing'
  course.run.incidents.add('skipped_step', text, stage=name, step=taken)
  if course.skipped == course.task.config.max_skipped_steps:
    raise _NotFiniteError(step)


def _write_epoch(course: Course, row: dict[str, Any]) -> None:
  """Lets loggers write an epoch's figures."""
  scalars = {
    f'{course.group}/{field}': value
    for field, value in row.items()
    if field.startswith(('train_', 'val_', 'ema_'))
  }
  scalars['optimization/skipped_steps'] = row['skipped_steps']
  scalars['perf/input_wait'] = row['input_wait']
  scalars['perf/eval_seconds'] = row['eval_seconds']
  course.run.writer.write_scalars(row['global_step'], scalars)

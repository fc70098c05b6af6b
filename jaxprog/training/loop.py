"""Trains one stage: for each step in the stage, then metrics, saves."""

import contextlib
import copy
import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprog import errors
from jaxprog.data import batches as batches_lib
from jaxprog.data import loader, preprocess, sources
from jaxprog.monitoring import diagnostics, tensorboard
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import memory as memory_lib
from jaxprog.monitoring import profile as profile_lib
from jaxprog.monitoring import progress as progress_lib
from jaxprog.monitoring import step_times as step_times_lib
from jaxprog.reliability import checkpoints as checkpoints_lib
from jaxprog.reliability import signals
from jaxprog.training import decisions, preview, setup, steps
from jaxprog.training import feed as feed_lib
from jaxprog.training import state as state_lib


@dataclasses.dataclass
class Outputs:
  """Where a stage's training reports to."""

  # The stage's part of the history, changed in place.
  record: dict[str, Any]
  # What is stored with all weights of the stage: classes, model and so on.
  meta: dict[str, Any]
  checkpoints: checkpoints_lib.Checkpoints
  progress: progress_lib.Progress
  writer: tensorboard.Writer
  stop: signals.StopRequest
  save_history: Callable[[], None]
  # Notes in the run's log what went wrong: incident(kind, message, **fields).
  incident: Callable[..., Any]
  # Tells the watchdog what has just been done.
  beat: Callable[[str], None]
  # Told after each epoch which images of the selection are right, bool (n,).
  keep_outcomes: Callable[[np.ndarray, float], None]
  # Raises if another run has taken this one's workdir over.
  check_owner: Callable[[], None]
  # Told the stage's name and each row; may end the run by raising.
  on_epoch: Callable[[str, dict[str, Any]], object] = lambda name, row: None
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

    TensorBoard's x axis goes on over all stages of the workdir, and where the
    stage's own steps are counted anew because their size has changed.
    """
    return self.record.get('step_offset', self.record['first_step'])

  def taken(self, step: int) -> int:
    """Returns how many steps the stage has taken at its own `step`.

    It numbers checkpoints and incidents, and never falls as `step` may.
    """
    return self.first_step + step - self.record['first_step']


# A stage is taken back so often before the run ends.
_MAX_ROLLBACKS = 2
# Examples of a bad batch that an error names.
_NAMED_EXAMPLES = 8


class NotFiniteError(Exception):
  """Too many steps in a row changed nothing; the last one is `step`."""

  def __init__(self, step: int):
    super().__init__(step)
    self.step = step


class SkippedTooOftenError(RuntimeError):
  """Steps stayed not finite after all rollbacks."""


def train_stage(
  task: setup.Task, state: state_lib.TrainState, out: Outputs
) -> state_lib.TrainState:
  """Returns `state` after the rest of the stage, from its own step on.

  Raises:
    SkippedTooOftenError: naming the rate or the examples, if steps stay not
      finite after the stage was taken back to a checkpoint twice.
  """
  while True:
    try:
      return _train_from(task, state, out)
    except NotFiniteError as e:
      state = _roll_back(task, e.step, out)


def _train_from(
  task: setup.Task, state: state_lib.TrainState, out: Outputs
) -> state_lib.TrainState:
  """Returns `state` after the rest of the stage, if nothing goes wrong."""
  start = int(state.step)
  out.writer.forget_after(out.first_step + start)
  out.step_times = step_times_lib.StepTimes(out.record.get('step_seconds', ()))
  seed = data_seed(task, out.record)
  with (
    contextlib.closing(feed_lib.Feed(task, seed, start)) as feed,
    contextlib.closing(_create_profile(task, out)) as profile,
  ):
    while int(state.step) < task.steps.total:
      reason = decisions.reason_to_stop(task.stage, out.record['epochs'])
      if reason:
        out.record['stopped'] = reason
        break
      epoch = task.steps.epoch(int(state.step))
      state, timing = _train_epoch(task, state, feed, profile, epoch, out)
      state = _end_epoch(task, state, epoch, timing, out)
  return state


def _create_profile(task: setup.Task, out: Outputs) -> profile_lib.Profile:
  logdir, num_steps = out.writer.logdir, task.config.profile_steps
  return profile_lib.Profile(logdir, num_steps, task.steps.total)


def data_seed(task: setup.Task, record: dict[str, Any]) -> int:
  """Returns what decides the order of examples; a rollback changes it.

  It is part of the record, and so of the checkpoint.
  """
  count = len(record.get('rollbacks', ()))
  return zlib.crc32(f'{task.seed}/{count}'.encode()) if count else task.seed


def _roll_back(
  task: setup.Task, step: int, out: Outputs
) -> state_lib.TrainState:
  """Returns the state of the last checkpoint, with another order to come."""
  rollbacks = out.record.get('rollbacks', [])
  restored = out.checkpoints.restore_latest(task.state_shapes)
  assert restored is not None  # A stage is saved before its first step.
  state, meta = restored
  saved = int(state.step)
  batches = _train_batches(task, out.record)
  text = f'{out.skipped} steps in a row, up to step {step + 1}, were not finite'
  diverged = _is_finite(task, step, state, batches)
  if diverged:
    text += (
      f', but the last is with the weights of step {saved}: it diverged. '
      f'{_describe_divergence(out)}'
    )
  if len(rollbacks) == _MAX_ROLLBACKS:
    named = '' if diverged else _name_examples(task, step, batches)
    raise SkippedTooOftenError(
      f'Stage {task.stage.name!r}, after {_MAX_ROLLBACKS} rollbacks: {text}'
      + (f'. The last batch: {named}.' if named else '.')
    )
  text += f'; back to step {saved}, with another order of examples'
  out.record.clear()
  out.record.update(meta['record'])
  out.record['rollbacks'] = [
    *rollbacks,
    {'at': out.taken(step + 1), 'to': out.taken(saved)},
  ]
  out.skipped = 0
  _note(task, step + 1, 'rollback', text, out)
  save(task, state, out)
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
  train_step = task.train_steps[task.program(step)]
  _, metrics = train_step(state, batch, task.step_rng)
  values = metrics['loss'], metrics['grad_norm']
  return all(math.isfinite(float(x)) for x in values)


def _describe_divergence(out: Outputs) -> str:
  """Returns what there was before, and what to try."""
  last = out.last_finite
  found = ', '.join(
    f'{name.replace("_", " ")} {last[name]:.3g}'
    for name in ('learning_rate', 'loss', 'grad_norm')
    if name in last
  )
  remedy = 'try a lower learning_rate, then a warmup or gradient_clipping'
  return f'Before: {found or "no finite step"}; {remedy}'


def _train_batches(
  task: setup.Task, record: dict[str, Any]
) -> batches_lib.TrainBatches:
  """Returns what this process has of each batch."""
  return batches_lib.TrainBatches(
    task.dataset.train,
    task.stage,
    seed=data_seed(task, record),
    steps=task.steps,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def _name_examples(
  task: setup.Task, step: int, batches: batches_lib.TrainBatches
) -> str:
  """Returns index and file of the first examples of a batch of this process."""
  _, indices = batches.indices(step)
  records = task.dataset.train.records
  named = [f'{i} ({records.describe(int(i))})' for i in indices]
  more = f', and {len(named) - _NAMED_EXAMPLES} more'
  return ', '.join(named[:_NAMED_EXAMPLES]) + (
    more if len(named) > _NAMED_EXAMPLES else ''
  )


def evaluate(
  task: setup.Task,
  variables: dict[str, Any],
  split: sources.Split,
  on_batch: Callable[[int, int], None] | None = None,
  on_bad: Callable[[dict[str, str]], None] | None = None,
  outcomes: list[steps.Outcomes] | None = None,
) -> dict[str, float]:
  """Returns mean loss, top1 and top5 over every image of `split`, once.

  `on_bad` is told which images could not be decoded, and why: they count as
  wrong. What came of each image is added to `outcomes`, in the order of
  `split`, a dict of arrays (batch_size,) a batch; the last one is padded.
  """
  sums = jax.device_put(steps.zero_eval_sums(), task.shardings.replicated)
  local_batches = loader.eval_batches(
    split,
    task.stage,
    num_shards=jax.device_count(),
    num_workers=task.num_workers,
    worker_kind=task.config.worker_kind,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with contextlib.closing(local_batches):
    for i, batch in enumerate(
      loader.prefetch_to_device(local_batches, task.shardings.batch)
    ):
      sums, outcome = task.eval_step(variables, batch, sums)
      if outcomes is not None:
        outcomes.append(outcome)
      if on_batch:
        on_batch(i + 1, -(-len(split) // len(batch['label'])))
  if on_bad and local_batches.bad:
    on_bad(local_batches.bad)
  totals = {name: float(x) for name, x in sums.items()}
  count = totals.pop('count')
  if count != len(split):
    raise AssertionError(f'Evaluated {count:g} of {len(split)} images.')
  return {name: x / count for name, x in totals.items()}


def evaluate_images(
  task: setup.Task,
  variables: dict[str, Any],
  split: sources.Split,
  on_batch: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Returns `evaluate`'s means, and the outcomes of each image, (n,) each."""
  batches: list[steps.Outcomes] = []
  scores = evaluate(task, variables, split, on_batch, outcomes=batches)
  return scores, diagnostics.join_outcomes(batches, len(split))


def _train_epoch(
  task: setup.Task,
  state: state_lib.TrainState,
  feed: feed_lib.Feed,
  profile: profile_lib.Profile,
  epoch: int,
  out: Outputs,
) -> tuple[state_lib.TrainState, dict[str, float]]:
  """Runs to the end of `epoch`; returns the state and where the time went."""
  first, end = int(state.step), task.steps.epoch_ends[epoch]
  batch_size = task.steps.phase(first).batch_size
  _note_handover(task, first, out)
  began, restarts, pending = time.monotonic(), feed.restarts, None
  feed.begin_epoch()
  out.step_times.pause()
  for step in range(first, end):
    batch = feed.next()
    if step == 0:
      write_preview(task, batch, out)
    # Step n is dispatched before the metrics of step n - 1 are read.
    profile.begin_step(step)
    train_step = task.train_steps[task.program(step)]
    state, metrics = train_step(state, batch, task.step_rng)
    profile.end_step(step, metrics)
    note_bad_images(task, feed.bad, out)
    if pending is not None:
      timing = _timing(began, (step - first) * batch_size, feed)
      report_step(task, *pending, timing, out)
    pending = step, metrics
    _answer_requests(task, state, step + 1, step + 1 == end, out)
  jax.block_until_ready(state)
  timing = _timing(began, (end - first) * batch_size, feed)
  if pending is not None:
    report_step(task, *pending, timing, out)
  if feed.restarts > restarts:
    _note(task, end, 'worker_restart', 'dead data workers were replaced', out)
  limit = feed.describe_limit(timing['seconds'], timing['images_per_second'])
  if limit and 'input_limit' not in out.record:
    out.record['input_limit'] = limit
    out.progress.message(f'{task.stage.name}: {limit}')
  return state, timing


def write_preview(task: setup.Task, batch: steps.Batch, out: Outputs) -> None:
  """Writes what the first step of a stage sees to TensorBoard."""
  draw = functools.partial(preview.draw_augmented, task, batch, 0)
  out.writer.write_images(out.first_step + 1, draw)


def _timing(
  began: float, num_images: int, feed: feed_lib.Feed
) -> dict[str, float]:
  """Returns the seconds since `began` and what they were spent on."""
  seconds = time.monotonic() - began
  return {
    'seconds': seconds,
    'images_per_second': num_images / seconds,
    'input_wait': feed.waited / seconds,
  }


def _note_handover(task: setup.Task, step: int, out: Outputs) -> None:
  """Notes how long it took until this stage's first batch was asked for."""
  if out.left is None:
    return
  seconds = time.monotonic() - out.left
  out.left = None
  out.record['handover_seconds'] = seconds
  scalars = {'perf/handover_seconds': seconds}
  out.writer.write_scalars(out.first_step + step + 1, scalars)


def _note(
  task: setup.Task, step: int, kind: str, text: str, out: Outputs
) -> None:
  """Says what went wrong, and notes it in the run's log."""
  text = f'{task.stage.name}: {text}'
  out.progress.message(text)
  out.incident(kind, text, stage=task.stage.name, step=out.taken(step))


def note_bad_images(
  task: setup.Task, bad: dict[str, str], out: Outputs
) -> None:
  """Notes and says which images cannot be decoded.

  Raises:
    BadImageError: if they are too many.
  """
  noted = out.record.setdefault('bad_images', {})
  if bad.keys() <= noted.keys():
    return
  for name in bad.keys() - noted.keys():
    noted[name] = bad[name]
    text = f'{task.stage.name}: cannot decode {name}: {bad[name]}'
    out.progress.message(text)
    out.incident('bad_image', text, stage=task.stage.name, name=name)
  if len(noted) > task.config.max_bad_images:
    names = ', '.join(sorted(noted)[:3])
    raise preprocess.BadImageError(
      f'{len(noted)} images of {task.stage.dataset!r} cannot be decoded, more '
      f'than max_bad_images = {task.config.max_bad_images}: {names}, ... '
      '--mode=verify lists them all.'
    )


def _end_epoch(
  task: setup.Task,
  state: state_lib.TrainState,
  epoch: int,
  timing: dict[str, float],
  out: Outputs,
) -> state_lib.TrainState:
  """Evaluates, records and saves; returns the state with empty sums."""
  began = time.monotonic()
  split = task.dataset.selection

  def on_bad(bad):
    note_bad_images(task, bad, out)

  def on_batch(done, total):
    out.beat(f'evaluation batch {done} of {total} of {task.stage.name}')
    out.progress.evaluate(done, total)

  batches: list[steps.Outcomes] = []
  scores = evaluate(task, state.variables, split, on_batch, on_bad, batches)
  right = diagnostics.join_outcomes(batches, len(split))['rank'] < 1
  averaged = evaluate(task, state.ema, split, on_batch) if state.ema else {}
  timing = {**timing, 'eval_seconds': time.monotonic() - began}
  state = close_epoch(task, state, epoch, scores, averaged, right, timing, out)
  _stop_if_asked(out)
  return state


def close_epoch(
  task: setup.Task,
  state: state_lib.TrainState,
  epoch: int,
  scores: dict[str, float],
  averaged: dict[str, float],
  right: np.ndarray,
  timing: dict[str, float],
  out: Outputs,
) -> state_lib.TrainState:
  """Records and saves what came of an epoch; returns it with empty sums.

  `scores` are those of the weights, `averaged` those of the averaged ones, {}
  where there are none; `right`, bool (n,), says which images the weights have
  right.
  """
  sums = {name: float(x) for name, x in state.metrics.items()}
  step = int(state.step)
  rate = float(task.learning_rate_fn(step - 1) * state.rate_scale)
  row = history_lib.add_epoch(
    out.record,
    epoch=epoch + 1,
    global_step=out.first_step + step,
    train_loss=_mean(sums['loss'], sums['count']),
    train_top1=_mean(sums['top1'], sums['count']),
    val_loss=scores['loss'],
    val_top1=scores['top1'],
    val_top5=scores['top5'],
    learning_rate=rate,
    grad_norm=_mean(sums['grad_norm'], sums['steps']),
    skipped_steps=int(sums['skipped']),
    **{f'ema_{name}': averaged[name] for name in averaged},
    **timing,
  )
  best = out.record['best'] or {'epoch': row['epoch']}  # No finite score yet.
  is_best = best['epoch'] == row['epoch']
  _write_epoch(task, row, out)
  out.keep_outcomes(right, row['epoch'])
  _save_weights(task, state, row, is_best, out)
  scale = decisions.rate_scale(task.stage, out.record['epochs'])
  metrics, rate_scale = jax.device_put(
    (state_lib.zero_metrics(), np.float32(scale)), task.shardings.replicated
  )
  state = dataclasses.replace(state, metrics=metrics, rate_scale=rate_scale)
  save(task, state, out)
  out.save_history()
  out.progress.end_epoch(row, is_best)
  out.on_epoch(task.stage.name, row)
  return state


def _save_weights(
  task: setup.Task,
  state: state_lib.TrainState,
  row: dict[str, Any],
  is_best: bool,
  out: Outputs,
) -> None:
  """Saves the weights and the averaged ones, each if it is the best so far."""
  began, step = time.monotonic(), out.taken(int(state.step))
  average = history_lib.best_epoch(out.record['epochs'], 'ema_top1')
  is_best_average = average is not None and average['epoch'] == row['epoch']
  meta = {**out.meta, 'epoch': row}
  if is_best:
    out.checkpoints.save_weights('best', step, state.variables, meta)
  if is_best_average:
    out.checkpoints.save_weights('ema', step, state.ema, meta)
  if is_best or is_best_average:
    scalars = {'ckpt/weights_seconds': time.monotonic() - began}
    out.writer.write_scalars(row['global_step'], scalars)


def _mean(total: float, count: float) -> float:
  """Returns NaN where every step was skipped."""
  return total / count if count else math.nan


def save(task: setup.Task, state: state_lib.TrainState, out: Outputs) -> None:
  """Saves everything that resuming needs, history of the stage included.

  But not while steps are skipped: what is wrong may be in the state.
  """
  out.record['step_seconds'] = out.step_times.histogram()
  if out.skipped and out.stop.signum is None:
    return
  out.check_owner()
  began = time.monotonic()
  # A copy: it is written in the background, while the record grows.
  meta = {**out.meta, 'record': copy.deepcopy(out.record)}
  out.checkpoints.save_latest(state, meta, out.taken(int(state.step)))
  out.beat(f'a save of {task.stage.name}')
  before, out.last_save = out.last_save, time.monotonic()
  if step := int(state.step):
    scalars = {
      # What training waited for; the rest goes on in the background.
      'ckpt/save_seconds': out.last_save - began,
      'ckpt/interval_seconds': out.last_save - before,
    }
    out.writer.write_scalars(out.first_step + step, scalars)


def _answer_requests(
  task: setup.Task,
  state: state_lib.TrainState,
  step: int,
  ends_epoch: bool,
  out: Outputs,
) -> None:
  """Saves in mid-epoch when it is time to, or before leaving on a signal."""
  every_steps = task.config.checkpoint_every_steps
  every_seconds = 60 * task.config.checkpoint_every_minutes
  late = every_seconds and time.monotonic() - out.last_save > every_seconds
  # Of many clocks, which disagree, one decides.
  due = out.stop.poll(save=bool(late) and jax.process_index() == 0)
  due = due or (every_steps > 0 and step % every_steps == 0)
  if ends_epoch:  # The end of an epoch saves anyway, and then leaves.
    return
  if due or out.stop.signum is not None:
    save(task, state, out)
  _stop_if_asked(out)


def _stop_if_asked(out: Outputs) -> None:
  if out.stop.signum is not None:
    raise errors.Stopped(out.stop.signum, saved=True)


def report_step(
  task: setup.Task,
  step: int,
  metrics: steps.Metrics,
  timing: dict[str, float],
  out: Outputs,
) -> None:
  """Shows one step; reading its metrics waits for it to finish.

  Raises:
    NotFiniteError: after as many skipped steps as are allowed in a row.
  """
  values = {name: float(x) for name, x in jax.device_get(metrics).items()}
  out.step_times.step()
  out.beat(f'step {step + 1} of {task.stage.name}')
  out.checkpoints.check()
  skipped = not values.pop('finite')
  if math.isfinite(values['loss'] + values['grad_norm']):
    out.last_finite = values
  _count_skipped(task, step, skipped, out)
  used = out.memory.in_use()
  speed = {k: timing[k] for k in ('images_per_second', 'input_wait')}
  out.progress.step(step + 1, {**values, **speed, used.kind: used.bytes})
  if (step + 1) % task.config.log_every_steps == 0:
    names = ('loss', 'top1', 'learning_rate', 'grad_norm')
    scalars = {f'train/{name}': values[name] for name in names}
    scalars['perf/images_per_second'] = speed['images_per_second']
    scalars['perf/memory_bytes'] = used.bytes
    if (seconds := out.step_times.take_mean()) is not None:
      scalars['perf/step_seconds'] = seconds
    out.writer.write_scalars(out.first_step + step + 1, scalars)


def _count_skipped(
  task: setup.Task, step: int, skipped: bool, out: Outputs
) -> None:
  out.skipped = out.skipped + 1 if skipped else 0
  if not skipped:
    return
  text = (
    f'{task.stage.name}: step {step + 1} was not finite and changed nothing'
  )
  taken = out.taken(step + 1)
  out.incident('skipped_step', text, stage=task.stage.name, step=taken)
  if out.skipped == task.config.max_skipped_steps:
    raise NotFiniteError(step)


def _write_epoch(task: setup.Task, row: dict[str, Any], out: Outputs) -> None:
  """Writes an epoch's figures to TensorBoard."""
  scalars = {
    f'eval/{task.stage.name}/{name}': row[f'val_{name}']
    for name in ('loss', 'top1', 'top5')
  }
  for name in ('ema_loss', 'ema_top1', 'ema_top5'):
    if name in row:
      scalars[f'eval/{task.stage.name}/{name}'] = row[name]
  scalars['train/skipped_steps'] = row['skipped_steps']
  scalars['train/epoch_loss'] = row['train_loss']
  scalars['train/epoch_top1'] = row['train_top1']
  scalars['perf/input_wait'] = row['input_wait']
  scalars['perf/eval_seconds'] = row['eval_seconds']
  out.writer.write_scalars(row['global_step'], scalars)

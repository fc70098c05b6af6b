"""Trains one stage: for each step in the stage, then metrics, saves."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxprog import errors
from jaxprog.data import loader, preprocess, sources, workers
from jaxprog.reporting import history as history_lib
from jaxprog.reporting import progress as progress_lib
from jaxprog.reporting import tensorboard
from jaxprog.training import checkpoints as checkpoints_lib
from jaxprog.training import decisions, setup, signals, steps
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
  # When the stage before was left, by the monotonic clock.
  left: float | None = None
  last_save: float = dataclasses.field(default_factory=time.monotonic)


# Waiting longer for input than this part of an epoch, and longer than this in
# seconds, is said, with its remedy.
_MUCH_WAITING, _NOTED_SECONDS = 0.05, 1.0


def train_stage(
  task: setup.Task, state: state_lib.TrainState, out: Outputs
) -> state_lib.TrainState:
  """Returns `state` after the rest of the stage, from its own step on."""
  start = int(state.step)
  local_batches = loader.train_batches(
    task.dataset.train,
    task.stage,
    seed=task.seed,
    steps=task.steps,
    start_step=start,
    num_workers=task.num_workers,
    worker_kind=task.config.worker_kind,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with contextlib.closing(local_batches):
    batches = loader.prefetch_to_device(local_batches, task.shardings.batch)
    while int(state.step) < task.steps.total:
      reason = decisions.reason_to_stop(task.stage, out.record['epochs'])
      if reason:
        out.record['stopped'] = reason
        break
      epoch = task.steps.epoch(int(state.step))
      state, timing = _train_epoch(
        task, state, batches, local_batches, epoch, out
      )
      state = _end_epoch(task, state, epoch, timing, out)
  return state


def evaluate(
  task: setup.Task,
  variables: dict[str, Any],
  split: sources.Split,
  on_batch: Callable[[int, int], None] | None = None,
  on_bad: Callable[[dict[str, str]], None] | None = None,
) -> dict[str, float]:
  """Returns mean loss, top1 and top5 over every image of `split`, once.

  `on_bad` is told which images could not be decoded, and why: they count as
  wrong.
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
      sums = task.eval_step(variables, batch, sums)
      if on_batch:
        on_batch(i + 1, -(-len(split) // len(batch['label'])))
  if on_bad and local_batches.bad:
    on_bad(local_batches.bad)
  totals = {name: float(x) for name, x in sums.items()}
  count = totals.pop('count')
  if count != len(split):
    raise AssertionError(f'Evaluated {count:g} of {len(split)} images.')
  return {name: x / count for name, x in totals.items()}


def _train_epoch(
  task: setup.Task,
  state: state_lib.TrainState,
  batches: Iterator[steps.Batch],
  reader: workers.Reader,
  epoch: int,
  out: Outputs,
) -> tuple[state_lib.TrainState, dict[str, float]]:
  """Runs to the end of `epoch`; returns the state and where the time went."""
  read_before = reader.busy, reader.images
  first, end = int(state.step), task.steps.epoch_ends[epoch]
  batch_size = task.steps.phase(first).batch_size
  began, waited, started = time.monotonic(), 0.0, 0.0
  pending = None
  for step in range(first, end):
    asked = time.monotonic()
    batch = next(batches)
    waited += time.monotonic() - asked
    if step == first:
      started = waited  # Workers had nothing to be ahead with.
    note_bad_images(task, reader.bad, out)
    # Step n is dispatched before the metrics of step n - 1 are read.
    train_step = task.train_steps[task.program(step)]
    state, metrics = train_step(state, batch, task.step_rng)
    if out.left is not None:
      out.record['handover_seconds'] = time.monotonic() - out.left
      out.left = None
    if pending is not None:
      images = (step - first) * batch_size
      _report_step(task, *pending, images / (time.monotonic() - began), out)
    pending = step, metrics
    _answer_requests(task, state, step + 1, step + 1 == end, out)
  jax.block_until_ready(state)
  seconds = time.monotonic() - began
  rate = (end - first) * batch_size / seconds
  if pending is not None:
    _report_step(task, *pending, rate, out)
  if waited - started > max(_MUCH_WAITING * seconds, _NOTED_SECONDS):
    busy, images = reader.busy - read_before[0], reader.images - read_before[1]
    wanted = rate * seconds / (seconds - waited)
    _say_input_limits(task, waited / seconds, busy / images, wanted, out)
  return state, {
    'seconds': seconds,
    'images_per_second': rate,
    'input_wait': waited / seconds,
  }


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
    out.progress.message(
      f'{task.stage.name}: cannot decode {name}: {bad[name]}'
    )
  if len(noted) > task.config.max_bad_images:
    names = ', '.join(sorted(noted)[:3])
    raise preprocess.BadImageError(
      f'{len(noted)} images of {task.stage.dataset!r} cannot be decoded, more '
      f'than max_bad_images = {task.config.max_bad_images}: {names}, ... '
      '--mode=verify lists them all.'
    )


def _say_input_limits(
  task: setup.Task,
  waited: float,
  seconds_per_image: float,
  wanted: float,
  out: Outputs,
) -> None:
  """Says once a stage that its input limits it, and what would lift that."""
  if 'input_limit' in out.record:
    return
  cores = math.ceil(wanted * seconds_per_image / jax.process_count())
  text = (
    f'limited by its input: {waited:.0%} of the time waits for images. '
    f'One takes {1e3 * seconds_per_image:.2g} ms of a core and the devices '
    f'would take {wanted:,.0f} a second: {cores} cores a process would do, '
    f'{task.num_workers} are used'
  )
  if task.stage.stored.kind != 'raw':
    size = 8 * math.ceil(task.stage.eval_size / 7)
    text += f"; or storage='raw:{size}', or fewer pixels"
  out.record['input_limit'] = text
  out.progress.message(f'{task.stage.name}: {text}')


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

  scores = evaluate(task, state.variables, split, out.progress.evaluate, on_bad)
  averaged = evaluate(task, state.ema, split) if state.ema else {}
  sums = {name: float(x) for name, x in state.metrics.items()}
  step = int(state.step)
  rate = float(task.learning_rate_fn(step - 1) * state.rate_scale)
  row = history_lib.add_epoch(
    out.record,
    epoch=epoch + 1,
    global_step=task.first_step + step,
    train_loss=_mean(sums['loss'], sums['count']),
    train_top1=_mean(sums['top1'], sums['count']),
    val_loss=scores['loss'],
    val_top1=scores['top1'],
    val_top5=scores['top5'],
    learning_rate=rate,
    grad_norm=_mean(sums['grad_norm'], sums['steps']),
    skipped_steps=int(sums['skipped']),
    eval_seconds=time.monotonic() - began,
    **{f'ema_{name}': averaged[name] for name in averaged},
    **timing,
  )
  best = out.record['best'] or {'epoch': row['epoch']}  # No finite score yet.
  is_best = best['epoch'] == row['epoch']
  _write_epoch(task, row, out)
  if is_best:
    out.checkpoints.save_weights(
      'best', step, state.variables, {**out.meta, 'epoch': row}
    )
  average = history_lib.best_epoch(out.record['epochs'], 'ema_top1')
  if average and average['epoch'] == row['epoch']:
    out.checkpoints.save_weights(
      'ema', step, state.ema, {**out.meta, 'epoch': row}
    )
  scale = decisions.rate_scale(task.stage, out.record['epochs'])
  metrics, rate_scale = jax.device_put(
    (state_lib.zero_metrics(), np.float32(scale)), task.shardings.replicated
  )
  state = dataclasses.replace(state, metrics=metrics, rate_scale=rate_scale)
  save(task, state, out)
  out.save_history()
  out.progress.end_epoch(row, is_best)
  _stop_if_asked(out)
  return state


def _mean(total: float, count: float) -> float:
  """Returns NaN where every step was skipped."""
  return total / count if count else math.nan


def save(task: setup.Task, state: state_lib.TrainState, out: Outputs) -> None:
  """Saves everything that resuming needs, history of the stage included."""
  out.checkpoints.save_latest(state, {**out.meta, 'record': out.record})
  out.last_save = time.monotonic()


def _answer_requests(
  task: setup.Task,
  state: state_lib.TrainState,
  step: int,
  ends_epoch: bool,
  out: Outputs,
) -> None:
  """Saves in mid-epoch when it is time to, or before leaving on a signal."""
  if ends_epoch:  # The end of an epoch saves anyway, and then leaves.
    return
  every_steps = task.config.checkpoint_every_steps
  every_seconds = 60 * task.config.checkpoint_every_minutes
  due = every_steps > 0 and step % every_steps == 0
  if every_seconds and jax.process_count() == 1:  # Many clocks disagree.
    due = due or time.monotonic() - out.last_save > every_seconds
  if due or out.stop.signum is not None:
    save(task, state, out)
  _stop_if_asked(out)


def _stop_if_asked(out: Outputs) -> None:
  if out.stop.signum is not None:
    raise errors.Stopped(out.stop.signum)


def _report_step(
  task: setup.Task,
  step: int,
  metrics: steps.Metrics,
  images_per_second: float,
  out: Outputs,
) -> None:
  """Shows one step; reading its metrics waits for it to finish."""
  values = {name: float(x) for name, x in jax.device_get(metrics).items()}
  values['images_per_second'] = images_per_second
  out.progress.step(step + 1, values)
  if (step + 1) % task.config.log_every_steps == 0:
    names = ('loss', 'top1', 'learning_rate', 'grad_norm')
    scalars = {f'train/{name}': values[name] for name in names}
    scalars['perf/images_per_second'] = images_per_second
    out.writer.write_scalars(task.first_step + step + 1, scalars)


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
  out.writer.write_scalars(row['global_step'], scalars)

"""For each stage: resume it or hand weights over to it, train, report."""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors
from jaxprog.data import workers
from jaxprog.monitoring import activity, diagnostics, pictures
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import outcomes as outcomes_lib
from jaxprog.reliability import checkpoints, lock, mirror, peers, signals
from jaxprog.reporting import facts, report, shown
from jaxprog.training import (
  alike,
  compile_times,
  described,
  loop,
  preflight,
  resume,
  xla_flags,
)
from jaxprog.training import run as run_lib
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib
from jaxprog.training.transfer import handover, teacher


def train(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: setup_lib.ModelFn | None = None,
  allow_config_change: bool = False,
  on_epoch: Callable[[str, dict[str, Any]], object] = lambda name, row: None,
  shorten: Callable[[setup_lib.Task], setup_lib.Task] = lambda task: task,
) -> dict[str, Any]:
  """Trains the stages of `config` and returns the run's history.

  Finished stages of `workdir` are not trained again, an interrupted one goes
  on at its exact step. `model` is called with num_classes, image_size and
  dtype in place of the config's own network; its classifier must be a module
  named head. `on_epoch(name, row)` is called after each epoch has been saved;
  what it raises ends the run. A dry run may `shorten` what each stage does.

  Raises:
    UserError: for mistakes in the config, the data or the workdir, before
      anything is trained.
    Stopped: after a SIGTERM or Ctrl-C, once all is saved.
  """
  began = time.monotonic()
  workers.leave_if_starting()
  config_lib.check_kind(config, 'train')
  xla_flags.use(config.xla_flags)
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.StopRequest())
    stack.enter_context(peers.join(stop))
    if jax.process_index() > 0:
      activity.silence()
    with activity.doing('looking for what would end the run'):
      workdir, url = mirror.locate(workdir, config.mirror)
      preflight.launch(config, workdir, only=only, skip=skip)
      owner = _hold(workdir, url, stack)
    with activity.doing('opening data'):
      setup = setup_lib.create_setup(
        config,
        only=only,
        skip=skip,
        model=model,
        holdout_rules=history_lib.holdout_rules(run_lib.read_history(workdir)),
      )
    with activity.doing('building the networks'):
      run = run_lib.open_run(
        setup,
        workdir,
        owner,
        stop,
        stack,
        began=began,
        allow_config_change=allow_config_change,
        on_epoch=on_epoch,
        shorten=shorten,
      )
      _announce(run)
    _train_stages(run)
    run.progress.message(report.summary_table(run.history))
  return shown.History(run.history)


def _hold(
  workdir: pathlib.Path, url: str, stack: contextlib.ExitStack
) -> lock.Lock:
  """Returns the lock of the workdir, which all processes are to see alike."""
  peers.wait_for_all('preflight')  # It removes folders that it made.
  closing = stack.enter_context(contextlib.ExitStack())
  owner = stack.enter_context(mirror.hold(workdir, url))
  stack.callback(
    lambda: closing.enter_context(activity.doing('closing the run'))
  )
  alike.check_workdir(workdir, url)
  return owner


def _train_stages(run: run_lib.Run) -> None:
  """Trains each stage; reports are drawn while the next one trains."""
  left = None
  try:
    for index, task in enumerate(_compile_ahead(run)):
      if index:
        _write_reports(run)
      left = _run_stage(run, index, task, left)
  except errors.Stopped as e:
    run.incidents.add('signal', str(e))
    if jax.process_index() == 0:
      run.reporter.stop()
    raise
  except Exception:
    with contextlib.suppress(Exception):  # It would hide what ended the run.
      _write_reports(run, wait=True)
    raise
  _write_reports(run, wait=True)


def _announce(run: run_lib.Run) -> None:
  """Shows the stages of the run, and each rate that the batch has scaled."""
  run.progress.start_run([described.describe(task) for task in run.tasks])
  for stage in run.setup.chosen:
    if stage.scale_learning_rate:
      run.progress.message(
        f'{stage.name}: learning rate {stage.learning_rate:g} x '
        f'{stage.batch_size} / {stage.base_batch_size} = '
        f'{stage.peak_learning_rate:g}'
      )


def _write_reports(run: run_lib.Run, *, wait: bool = False) -> None:
  """Lets what a person reads be written, on the process that writes."""
  if jax.process_index() == 0:
    written = run.reporter.write(is_last=wait)
    if wait:
      with activity.doing('drawing the reports'):
        written.result()


def _compile_ahead(run: run_lib.Run) -> Iterator[setup_lib.Task]:
  """Yields each task compiled; the next one compiles while one trains.

  On GPUs all compile before the first one trains: XLA chooses kernels by timing
  them there, training would disturb that, and what was chosen is kept. Those
  are compiled one after the other, in one order on all hosts, others side by
  side. What is done already needs no compiler. Rates are noted beside it.
  """

  def prepare(task):
    if checkpoints.is_done(run.workdir, task.stage.name):
      return task
    # What the plateau schedule will lower its own by, nobody knows yet.
    if task.stage.schedule != 'plateau':
      rates = described.sample_learning_rate(task)
      run.rates[task.stage.name] = [float(f'{x:.6g}') for x in rates]
    is_first = task is run.tasks[0] and not handover.find_source(
      run.setup, run.workdir, task.stage
    )
    draws_all = is_first or handover.needs_backbone(task.stage)
    with compile_times.noted(task):
      return setup_lib.compile_task(task, carried=not draws_all)

  def begin(tasks):
    now = time.monotonic()
    by_rule = [setup_lib.compiler_options(x.config, x.steps) for x in tasks]
    pools = [run.compilers if x else run.compiler for x in by_rule]
    submitted = zip(pools, tasks, strict=True)
    return [(pool.submit(prepare, task), now) for pool, task in submitted]

  at_once = len(run.tasks) if jax.default_backend() == 'gpu' else 1
  ahead = begin(run.tasks[:at_once])
  for index in range(len(run.tasks)):
    what, took = _describe_compiling(run.tasks, index, len(ahead))
    (_, began), *_ = ahead
    # Large networks compile for long.
    with run.dog.pause(), activity.doing(what, last=took, since=began):
      asked = time.monotonic()
      task, *_ = [x.result() for x, _ in ahead]
    run.waits[task.stage.name] = time.monotonic() - asked
    ahead = ahead[1:] + begin(run.tasks[at_once + index :][:1])
    yield task


def _describe_compiling(
  tasks: Sequence[setup_lib.Task], index: int, count: int
) -> tuple[str, float | None]:
  """Returns that `count` stages are compiled, and how long it took before."""
  what = f'stage {index + 1}' if count == 1 else f'{count} stages'
  what = f'compiling {what} of {len(tasks)}'
  in_turn, side_by_side = [0.0], [0.0]
  for task in tasks[index : index + count]:
    took = compile_times.last(task)
    if took is None:
      return what, None
    by_rule = setup_lib.compiler_options(task.config, task.steps)
    (side_by_side if by_rule else in_turn).append(took)
  return what, max(sum(in_turn), *side_by_side)


def _run_stage(
  run: run_lib.Run, index: int, task: setup_lib.Task, left: float | None
) -> float | None:
  """Trains a stage, unless the workdir says that it is done.

  `left` is when the stage before was left, and what comes back is when this
  one was, by the monotonic clock; None if nothing was trained.
  """
  name = task.stage.name
  if done := checkpoints.read_done(run.workdir, name):
    history_lib.put_stage(run.history, done['record'])
    run.save_history(trains=False)  # It may have been killed before it could.
    run.progress.message(f'{name}: done before, not trained again')
    run.save_stages()
    return None
  with run.dog.pause():  # A dataset may come for hours.
    run.fetcher.fetch(index)
    peers.wait_for_all('images')
  directory = checkpoints.stage_directory(run.workdir, name)
  with (
    run.stop.deferred(),  # Outermost: saves under way are waited for.
    checkpoints.Checkpoints(directory, run.note) as saved,
  ):
    what = f'starting stage {index + 1} of {len(run.tasks)}, {name}'
    with activity.doing(what):
      course, state = _open_stage(run, index, task, saved)
    course.left = left and left + run.waits[name]
    state = loop.train_stage(course, state)
    with activity.doing(f'saving {name}'):
      _finish_stage(course, state)
    left = time.monotonic()
  run.save_history()
  run.progress.end_stage(course.record)
  return left


def _open_stage(
  run: run_lib.Run,
  index: int,
  task: setup_lib.Task,
  saved: checkpoints.Checkpoints,
) -> tuple[loop.Course, state_lib.TrainState]:
  """Returns a stage on its way, and the state that it goes on from."""
  name = task.stage.name
  run.dog.beat(f'the start of {name}')
  state, record, is_saved = _resume(run, task, saved) or _begin(run, task)
  task = teacher.attend(run.workdir, task, record)
  waited = record.get('compile_seconds', 0.0) + run.waits.get(name, 0.0)
  record['compile_seconds'] = waited
  run.save_history()
  run.save_stages(running=name)
  run.progress.start_stage(
    index,
    name,
    task.steps.epoch_ends,
    int(state.step),
    averages=task.stage.ema_decay > 0,
    dataset=task.stage.dataset,
    start=described.start(record),
  )
  course = loop.Course(run, task, record, saved)
  if not is_saved:
    # What a rollback goes back to, and a start after an early kill.
    loop.save(course, state)
  return course, state


def _finish_stage(course: loop.Course, state: state_lib.TrainState) -> None:
  """Declares a stage done that is trained, once all is saved."""
  run, name, record = course.run, course.task.stage.name, course.record
  record['status'] = 'stopped_early' if 'stopped' in record else 'done'
  meta = {**course.meta, 'epoch': record['epochs'][-1]}
  step, saved = int(state.step), course.checkpoints
  record['last_step'] = course.first_step + step
  run.owner.check()
  weights = loop.find_weights(course, state)
  saved.save_weights('final', course.taken(step), weights, meta)
  saved.wait()
  run.dog.beat(f'the last save of {name}')
  record |= _examine(run, course.task)
  draw = functools.partial(pictures.draw_mistakes, name, record['diagnostics'])
  run.writer.write_images(record['last_step'], draw)
  scalars = {f'weights/{name} final top-1': record['epochs'][-1]['val_top1']}
  run.writer.write_scalars(record['last_step'], scalars)
  saved.mark_done({**course.meta, 'record': record})
  run.save_stages()


def _examine(run: run_lib.Run, task: setup_lib.Task) -> dict[str, Any]:
  """Returns what a stage's record says of its best weights, image by image.

  They are evaluated on the true validation images. Where a hold-out has chosen
  them, this is the one look that a stage takes.
  """
  name, split = task.stage.name, task.dataset.eval
  variables, meta = checkpoints.load_weights(run.workdir, name, 'best')
  variables = jax.device_put(variables, task.shardings.replicated)
  epoch = meta['epoch']['epoch']

  def read(index):
    return split.describe(index), split.original(index)

  with activity.doing(f'scoring the best weights of {name}') as show:

    def on_batch(done, total):
      run.dog.beat(f'validation, batch {done} of {total}')
      show(done, total)

    scores, outcomes, _ = loop.evaluate(task, variables, split, on_batch)
  of = {'weights': 'best', 'epoch': epoch, 'num_images': len(split)}
  found = {
    **of,
    **scores,
    **diagnostics.diagnose(outcomes, split.labels, task.dataset.num_classes),
    'classes': list(task.dataset.class_names),
    'worst': diagnostics.worst_mistakes(outcomes, split.labels, read),
  }
  if task.dataset.holdout is None:
    return {'diagnostics': found}
  if jax.process_index() == 0:
    order = outcomes_lib.sort_images(split)
    path = outcomes_lib.find_path(run.workdir, name, validation=True)
    outcomes_lib.write(path, order, outcomes['rank'] < 1, epoch)
  run.progress.message(
    f'{name}: validation top-1 {scores["top1"]:.1%} of the weights of epoch '
    f'{epoch}, chosen on {task.stage.eval_split}'
  )
  return {'diagnostics': found, 'validation': {**of, **scores}}


def _resume(
  run: run_lib.Run, task: setup_lib.Task, saved: checkpoints.Checkpoints
) -> tuple[state_lib.TrainState, dict[str, Any], bool] | None:
  """Returns the interrupted stage's state and record, None if it is new.

  And whether that is what was saved: a changed config changes it.
  """
  restored = resume.restore(task, saved, run.before)
  if restored is None:
    return None
  state, record, change = restored
  name, step = task.stage.name, int(state.step)
  record.setdefault('first_step', history_lib.next_step(run.history, name))
  offset = before = record.get('step_offset', record['first_step'])
  if change is not None:
    offset += change.was - change.now
    _note_change(run, task, record, change, offset + step)
  # Other stages may have been trained since, and TensorBoard drops what it has
  # of later steps.
  offset = max(offset, history_lib.next_step(run.history, name) - step)
  if offset != before:
    record['step_offset'] = offset
  record['last_step'] = offset + task.steps.total
  record['resumed_at_steps'] = [
    *record.get('resumed_at_steps', []),
    offset + step,
  ]
  taken = offset + step - record['first_step']
  run.incidents.add(
    'resume', f'{name}: resumed at step {taken}', stage=name, step=taken
  )
  history_lib.put_stage(run.history, record)
  return state, record, change is None and offset == before


def _note_change(
  run: run_lib.Run,
  task: setup_lib.Task,
  record: dict[str, Any],
  change: resume.Change,
  global_step: int,
) -> None:
  """Says what a stage goes on with, and lets its record tell that."""
  rates = run.rates.get(task.stage.name, [])
  rates = described.join_rates(task, record, rates, change.epoch)
  noted = {
    'epoch': change.epoch,
    'global_step': global_step,
    'fields': change.fields,
    'renewed': change.renewed,
  }
  record |= {
    **described.fields(task),
    'learning_rates': rates,
    'config_changes': [*record.get('config_changes', []), noted],
  }
  run.progress.message(
    f'{task.stage.name}: {facts.describe_changes(record)[-1]}'
  )


def _begin(
  run: run_lib.Run, task: setup_lib.Task
) -> tuple[state_lib.TrainState, dict[str, Any], bool]:
  """Returns the state that a stage starts from, its new record, and False."""
  variables, origin = handover.hand_over(run.setup, run.workdir, task)
  first_step = history_lib.next_step(run.history, task.stage.name)
  record = history_lib.begin_stage(
    run.history,
    **described.fields(task),
    transfer=origin,
    learning_rates=run.rates.get(task.stage.name, []),
    first_step=first_step,
    last_step=first_step + task.steps.total,
  )
  variables = jax.device_put(variables, task.shardings.replicated)
  return task.create_state(variables), record, False

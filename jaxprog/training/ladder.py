"""For each stage: resume it or hand weights over to it, train, report."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import rich.console
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, files, stages
from jaxprog.data import jpeg, workers
from jaxprog.monitoring import diagnostics, environment, pictures, tensorboard
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import incidents as incidents_lib
from jaxprog.monitoring import outcomes as outcomes_lib
from jaxprog.monitoring import progress as progress_lib
from jaxprog.reliability import checkpoints, lock, peers, signals, watchdog
from jaxprog.reporting import facts, outputs, report
from jaxprog.training import alike, loop, preflight, resume
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib
from jaxprog.training.transfer import handover


@dataclasses.dataclass(frozen=True)
class Run:
  """A ladder on its way: what it is made of and where it reports to."""

  setup: setup_lib.Setup
  tasks: tuple[setup_lib.Task, ...]
  workdir: pathlib.Path
  history: dict[str, Any]
  progress: progress_lib.Progress
  writer: tensorboard.Writer
  stop: signals.StopRequest
  incidents: incidents_lib.Incidents
  # Notes an incident and says it: on_incident(kind, message, **fields).
  on_incident: Callable[..., None]
  owner: lock.Lock
  dog: watchdog.Watchdog
  # Compiles the next stage while this one trains.
  compiler: futures.Executor
  # Told the name of a stage and each row of its history.
  on_epoch: Callable[[str, dict[str, Any]], object]
  reporter: outputs.Reporter
  # What the workdir's config was when the run began.
  before: config_dict.ConfigDict | None
  # By stage, at even distances in epochs; sampled by the compiler's thread.
  rates: dict[str, list[float]] = dataclasses.field(default_factory=dict)

  def save_history(self) -> None:
    """Writes training_history.json, on the process that writes."""
    if jax.process_index() == 0:
      path = self.workdir / 'training_history.json'
      history_lib.save_history(path, self.history)
      self.reporter.refresh()

  def save_stages(self, running: str = '') -> None:
    """Writes stages.json: which stages are pending, running and done.

    A stage is done once its last save has committed.
    """
    if jax.process_index() != 0:
      return
    rows = []
    for stage in self.setup.stages:
      done = checkpoints.read_done(self.workdir, stage.name) is not None
      status = 'running' if stage.name == running else 'pending'
      rows.append({'name': stage.name, 'status': 'done' if done else status})
    files.write_json(self.workdir / 'stages.json', {'stages': rows})


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
  workers.leave_if_starting()
  workdir = pathlib.Path(workdir)
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.StopRequest())
    stack.enter_context(peers.join(stop))
    preflight.launch(config, workdir, only=only, skip=skip)
    peers.wait_for_all('preflight')  # It removes folders that it made.
    owner = lock.Lock(workdir)
    if jax.process_index() == 0:
      stack.enter_context(owner)
    alike.check_workdir(workdir)
    setup = setup_lib.create_setup(
      config,
      only=only,
      skip=skip,
      model=model,
      holdout_rules=history_lib.holdout_rules(read_history(workdir)),
    )
    run = open_run(
      setup,
      workdir,
      owner,
      stop,
      stack,
      allow_config_change=allow_config_change,
      on_epoch=on_epoch,
      shorten=shorten,
    )
    _train_stages(run)
    run.progress.message(report.summary_table(run.history))
  return run.history


def open_run(
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  owner: lock.Lock,
  stop: signals.StopRequest,
  stack: contextlib.ExitStack,
  *,
  allow_config_change: bool = False,
  on_epoch: Callable[[str, dict[str, Any]], object] = lambda name, row: None,
  shorten: Callable[[setup_lib.Task], setup_lib.Task] = lambda task: task,
) -> Run:
  """Returns a run of `setup`, all checked; `stack` closes what it has opened.

  Raises:
    UserError: for mistakes in the data or the workdir.
  """
  config = setup.config
  progress = stack.enter_context(_create_progress(len(setup.chosen)))
  incidents = _create_incidents(workdir, owner)

  def on_incident(kind, message, **fields):
    incidents.add(kind, message, **fields)
    progress.message(message)

  checkpoints.verify_all(workdir, on_incident)
  history, changes = _load_history(config, workdir, allow_config_change)
  tasks = create_tasks(setup, workdir, shorten)
  for line in preflight.quick(tasks, workdir):
    progress.message(line)
  if changes:
    incidents.add('config_change', '; '.join(changes))
  before = resume.read_config(workdir)
  peers.wait_for_all('config')  # One of them replaces it.
  plain = _as_trained(config, workdir, before)
  history['config_hash'] = config_lib.config_hash(config_lib.restore(plain))
  _write_inputs(plain, workdir)
  run = Run(
    setup=setup,
    tasks=tasks,
    workdir=workdir,
    history=history,
    progress=progress,
    writer=stack.enter_context(
      contextlib.closing(_create_writer(config, workdir))
    ),
    stop=stop,
    incidents=incidents,
    on_incident=on_incident,
    owner=owner,
    dog=stack.enter_context(_create_watchdog(config, workdir, incidents)),
    compiler=_create_executor('compiler', stack),
    on_epoch=on_epoch,
    reporter=outputs.Reporter(
      _create_executor('reporter', stack), workdir, incidents.entries
    ),
    before=before,
  )
  run.writer.write_hparams(tensorboard.flatten_config(plain))
  return run


def create_tasks(
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  shorten: Callable[[setup_lib.Task], setup_lib.Task] = lambda task: task,
) -> tuple[setup_lib.Task, ...]:
  """Returns what each chosen stage trains with.

  Raises:
    UserError: for what a stage yet to begin in `workdir` cannot start from, or
      one under way cannot go on with.
  """
  tasks = tuple(
    shorten(setup_lib.create_task(setup, stage)) for stage in setup.chosen
  )
  handover.check(setup, tasks, workdir)
  resume.check(tasks, workdir)
  return tasks


def _train_stages(run: Run) -> None:
  """Trains each stage; reports are drawn while the next one trains."""
  announce(run.progress, run.tasks)
  left = None
  try:
    for index, task in enumerate(_compile_ahead(run)):
      if index:
        write_reports(run)
      left = _run_stage(run, index, task, left)
  except errors.Stopped as e:
    run.incidents.add('signal', str(e))
    raise  # Plots take longer than a signal allows.
  except Exception:
    with contextlib.suppress(Exception):  # It would hide what ended the run.
      write_reports(run).result()
    raise
  write_reports(run).result()


def _create_executor(
  name: str, stack: contextlib.ExitStack
) -> futures.ThreadPoolExecutor:
  """Returns one thread that nobody waits for: it may compile for minutes."""
  executor = futures.ThreadPoolExecutor(1, name)
  stack.callback(executor.shutdown, wait=False, cancel_futures=True)
  return executor


def _create_incidents(
  workdir: pathlib.Path, owner: lock.Lock
) -> incidents_lib.Incidents:
  """Returns the log of what goes wrong; only process 0 writes it."""
  writes = jax.process_index() == 0
  incidents = incidents_lib.Incidents(
    workdir / 'incidents.jsonl' if writes else None
  )
  if owner.taken_over:
    incidents.add('lock', owner.taken_over)
  return incidents


def _create_watchdog(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  incidents: incidents_lib.Incidents,
) -> watchdog.Watchdog:
  return watchdog.Watchdog(
    config.watchdog_minutes,
    log=workdir / 'watchdog.log',
    on_timeout=lambda text: incidents.add('watchdog', text),
  )


def write_reports(run: Run) -> futures.Future[None]:
  """Lets what a person reads be written, on the process that writes."""
  if jax.process_index() == 0:
    return run.reporter.write()
  nothing: futures.Future[None] = futures.Future()
  nothing.set_result(None)
  return nothing


def _compile_ahead(run: Run) -> Iterator[setup_lib.Task]:
  """Yields each task compiled; the next one compiles while one trains.

  What is done already needs no compiler.
  """

  def prepare(task):
    if checkpoints.read_done(run.workdir, task.stage.name) is not None:
      return task
    is_first = task is run.tasks[0] and not handover.find_source(
      run.setup, run.workdir, task.stage
    )
    note_rates(run, task)
    draws_all = is_first or handover.needs_backbone(task.stage)
    return setup_lib.compile_task(task, carried=not draws_all)

  ahead = run.compiler.submit(prepare, run.tasks[0])
  for following in [*run.tasks[1:], None]:
    with run.dog.pause():  # Large networks compile for long.
      task = ahead.result()
    if following is not None:
      ahead = run.compiler.submit(prepare, following)
    yield task


def note_rates(run: Run, task: setup_lib.Task) -> None:
  """Notes the learning rates of a stage for its record."""
  # What the plateau schedule will lower its own by, nobody knows yet.
  if task.stage.schedule != 'plateau':
    rates = [float(f'{x:.6g}') for x in sample_learning_rate(task)]
    run.rates[task.stage.name] = rates


def _run_stage(
  run: Run, index: int, task: setup_lib.Task, left: float | None
) -> float | None:
  """Trains a stage, unless the workdir says that it is done.

  `left` is when the stage before was left, and what comes back is when this
  one was, by the monotonic clock; None if nothing was trained.
  """
  name = task.stage.name
  if pass_over(run, task):
    return None
  directory = checkpoints.stage_directory(run.workdir, name)
  with (
    run.stop.deferred(),  # Outermost: saves under way are waited for.
    checkpoints.Checkpoints(directory, run.on_incident) as saved,
  ):
    state, out = open_stage(run, index, task, saved)
    out.left = left
    state = loop.train_stage(task, state, out)
    finish_stage(run, task, state, out)
    left = time.monotonic()
  run.save_history()
  run.progress.end_stage(out.record)
  return left


def pass_over(run: Run, task: setup_lib.Task) -> bool:
  """Returns whether a stage was done before; its record is then noted."""
  name = task.stage.name
  done = checkpoints.read_done(run.workdir, name)
  if done is None:
    return False
  _put_record(run.history, done['record'])
  run.save_history()  # It may have been killed before it could.
  run.progress.message(f'{name}: done before, not trained again')
  run.save_stages()
  return True


def open_stage(
  run: Run, index: int, task: setup_lib.Task, saved: checkpoints.Checkpoints
) -> tuple[state_lib.TrainState, loop.Outputs]:
  """Returns the state that a stage goes on from, and where it reports to."""
  name = task.stage.name
  run.dog.beat(f'the start of {name}')
  state, record, is_saved = _resume(run, task, saved) or _begin(run, task)
  run.save_history()
  run.save_stages(running=name)
  run.progress.start_stage(
    index,
    name,
    task.steps.epoch_ends,
    int(state.step),
    averages=task.stage.ema_decay > 0,
    dataset=task.stage.dataset,
    start=_describe_start(record),
  )
  out = loop.Outputs(
    record=record,
    incident=run.incidents.add,
    beat=run.dog.beat,
    keep_outcomes=_create_keeper(run, task),
    check_owner=run.owner.check,
    meta=_describe_weights(run, task),
    checkpoints=saved,
    progress=run.progress,
    writer=run.writer,
    stop=run.stop,
    save_history=run.save_history,
    on_epoch=run.on_epoch,
  )
  if not is_saved:
    # What a rollback goes back to, and a start after an early kill.
    loop.save(task, state, out)
  return state, out


def _create_keeper(
  run: Run, task: setup_lib.Task
) -> Callable[[np.ndarray, float], None]:
  """Returns what writes the outcomes of an epoch, on the process that writes.

  The last epoch's stay.
  """
  path = outcomes_lib.find_path(run.workdir, task.stage.name)
  dataset = task.dataset

  @functools.cache
  def order():
    split = dataset.selection
    names = split.records.names()
    return outcomes_lib.sort_images(names, split.labels, dataset.classes)

  def keep(right, epoch):
    if jax.process_index() == 0:
      outcomes_lib.write(path, order(), right, epoch)

  return keep


def finish_stage(
  run: Run,
  task: setup_lib.Task,
  state: state_lib.TrainState,
  out: loop.Outputs,
) -> None:
  """Declares a stage done that is trained, once all is saved."""
  record, saved = out.record, out.checkpoints
  status = 'stopped_early' if 'stopped' in record else 'done'
  history_lib.finish_stage(record, status)
  meta = {**out.meta, 'epoch': record['epochs'][-1]}
  step = int(state.step)
  record['last_step'] = out.first_step + step
  run.owner.check()
  saved.save_weights('final', out.taken(step), state.variables, meta)
  saved.wait()
  run.dog.beat(f'the last save of {task.stage.name}')
  record |= examine(run, task)
  found = record['diagnostics']
  out.writer.write_images(
    record['last_step'],
    functools.partial(pictures.draw_mistakes, task.stage.name, found),
  )
  saved.mark_done({**out.meta, 'record': record})
  run.save_stages()


def examine(run: Run, task: setup_lib.Task) -> dict[str, Any]:
  """Returns what a stage's record says of its best weights, image by image.

  They are evaluated on the true validation images. Where a hold-out has chosen
  them, this is the one look that a stage takes.
  """
  name, split = task.stage.name, task.dataset.eval
  variables, meta = checkpoints.load_weights(run.workdir, name, 'best')
  variables = jax.device_put(variables, task.shardings.replicated)
  epoch = meta['epoch']['epoch']
  scores, outcomes = loop.evaluate_images(
    task,
    variables,
    split,
    lambda done, total: run.dog.beat(f'validation, batch {done} of {total}'),
  )

  def read(index):
    return split.records.describe(index), split.records.original(index)

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
  run.progress.message(
    f'{name}: validation top-1 {scores["top1"]:.1%} of the weights of epoch '
    f'{epoch}, chosen on {task.stage.eval_split}'
  )
  return {'diagnostics': found, 'validation': {**of, **scores}}


def _resume(
  run: Run, task: setup_lib.Task, saved: checkpoints.Checkpoints
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
  _put_record(run.history, record)
  return state, record, change is None and offset == before


def _note_change(
  run: Run,
  task: setup_lib.Task,
  record: dict[str, Any],
  change: resume.Change,
  global_step: int,
) -> None:
  """Says what a stage goes on with, and lets its record tell that."""
  rates = _join_rates(task, record, run.rates.get(task.stage.name, []), change)
  noted = {
    'epoch': change.epoch,
    'global_step': global_step,
    'fields': change.fields,
    'renewed': change.renewed,
  }
  record |= _describe_stage(task)
  record['learning_rates'] = rates
  record['config_changes'] = [*record.get('config_changes', []), noted]
  for line in facts.describe_changes(record)[-1:]:
    run.progress.message(f'{task.stage.name}: {line}')


def _join_rates(
  task: setup_lib.Task,
  record: Mapping[str, Any],
  new: Sequence[float],
  change: resume.Change,
) -> list[float]:
  """Returns the rates that a stage has had, and those that it will have.

  None where either are not known beforehand.
  """
  old = record.get('learning_rates') or []
  if not old or not new:
    return []
  at = np.linspace(0, task.stage.num_epochs, len(new))
  had = np.interp(at, np.linspace(0, record['num_epochs'], len(old)), old)
  return np.where(at < change.epoch, had, new).tolist()


def _begin(
  run: Run, task: setup_lib.Task
) -> tuple[state_lib.TrainState, dict[str, Any], bool]:
  """Returns the state that a stage starts from, its new record, and False."""
  variables, origin = handover.hand_over(run.setup, run.workdir, task)
  fields = _describe_stage(task)
  rates = run.rates.get(task.stage.name, [])
  first_step = history_lib.next_step(run.history, task.stage.name)
  record = history_lib.begin_stage(
    run.history,
    **fields,
    transfer=origin,
    learning_rates=rates,
    first_step=first_step,
    last_step=first_step + task.steps.total,
  )
  variables = jax.device_put(variables, task.shardings.replicated)
  return task.create_state(variables), record, False


def _put_record(history: dict[str, Any], record: dict[str, Any]) -> None:
  """Lets what a checkpoint says of a stage replace what was noted of it."""
  before = history_lib.find_stage(history, record['name'])
  if before is None:
    history['stages'].append(record)
  else:
    history['stages'][history['stages'].index(before)] = record


def _describe_stage(task: setup_lib.Task) -> dict[str, Any]:
  """Returns the fields of a stage's record that are known beforehand."""
  stage = task.stage
  stem = getattr(task.model, 'stem', None)
  return {
    'name': stage.name,
    'description': stage.description,
    'dataset': stage.dataset,
    'num_classes': len(task.dataset.classes),
    'image_size': stage.image_size,
    'batch_size': stage.batch_size,
    'optimizer': stage.optimizer,
    'schedule': stage.schedule,
    'learning_rate': stage.peak_learning_rate,
    'num_epochs': stage.num_epochs,
    'steps_per_epoch': task.steps.phases[0].per_epoch,
    'num_train_images': len(task.dataset.train),
    'num_eval_images': len(task.dataset.selection),
    'eval_split': stage.eval_split,
    'holdout': _describe_holdout(task),
    'eval_image_size': stage.eval_size,
    'data_version': task.dataset.version,
    'decoder': jpeg.version(),
    'excluded_images': dict(task.dataset.excluded),
    'phases': [[x.from_epoch, dict(x.changes)] for x in stage.phases],
    'num_params': state_lib.count_params(task.state_shapes.params),
    'dtype': task.dtype.name,
    'stem': stem._asdict() if stem is not None else None,
  }


def _describe_holdout(task: setup_lib.Task) -> dict[str, Any] | None:
  """Returns what was set aside for selection, and by which rule."""
  dataset = task.dataset
  if dataset.holdout is None:
    return None
  return {
    'rule': dataset.holdout_rule,
    'part': task.stage.holdout,
    'images': len(dataset.holdout),
  }


def _describe_weights(run: Run, task: setup_lib.Task) -> dict[str, Any]:
  """Returns what is stored with weights, so that they can be used alone."""
  config = run.setup.config
  return {
    'stage': task.stage.name,
    'classes': list(task.dataset.classes),
    'class_names': list(task.dataset.class_names),
    'model': config.model,
    'num_filters': config.num_filters,
    'stem_kernel': config.stem_kernel,
    'blur_pool': config.blur_pool,
    'image_size': task.stage.image_size,
    'mean_rgb': list(config.mean_rgb),
    'std_rgb': list(config.std_rgb),
    # All that they were trained with, as complete as config.json.
    'config': config_lib.to_json(stages.complete(config)),
  }


def _describe_start(record: Mapping[str, Any]) -> str:
  """Returns where the weights come from, for a person."""
  origin = record['transfer']
  if record.get('resumed_at_steps'):
    return f'resumed at step {record["resumed_at_steps"][-1]}'
  if origin['from'] is None:
    return 'fresh weights'
  head = 'fresh head' if 'head' in origin['fresh'] else 'head carried'
  match origin.get('head'):
    case 'zero':
      head = 'head of zeros'
    case 'by_class':
      rows = sum(map(len, origin['head_rows'].values()))
      head = f'{rows} of {record["num_classes"]} head rows carried'
  done = [head]
  if origin['operator'] != 'plain':
    done.append(origin['operator'])
  if origin['statistics'] != 'carry':
    done.append(f'statistics {origin["statistics"]}')
  return f'from {origin["from"]}, {", ".join(done)}'


def announce(
  progress: progress_lib.Progress, tasks: Sequence[setup_lib.Task]
) -> None:
  """Shows the plan of the run, and each rate that the batch has scaled."""
  progress.start_run([plan(task) for task in tasks])
  for stage in (task.stage for task in tasks):
    if stage.scale_learning_rate:
      progress.message(
        f'{stage.name}: learning rate {stage.learning_rate:g} x '
        f'{stage.batch_size} / {stage.base_batch_size} = '
        f'{stage.peak_learning_rate:g}'
      )


def plan(task: setup_lib.Task) -> progress_lib.PlannedStage:
  """Returns what is printed of a stage before the run starts."""
  stage = task.stage
  return progress_lib.PlannedStage(
    name=stage.name,
    num_train_images=len(task.dataset.train),
    num_classes=len(task.dataset.classes),
    image_size=stage.image_size,
    batch_size=stage.batch_size,
    total_steps=task.steps.total,
    warmup_steps=task.steps.warmup,
    peak_learning_rate=stage.peak_learning_rate,
    final_learning_rate=float(task.learning_rate_fn(task.steps.total - 1)),
    parameters=state_lib.count_params(task.state_shapes.params),
  )


def sample_learning_rate(task: setup_lib.Task) -> list[float]:
  """Returns 200 rates at even distances in epochs, first to last.

  Without what the plateau schedule will lower them by: nobody knows yet.
  """
  steps = task.steps
  at = np.array(
    [
      min(steps.step_at(epoch), steps.total - 1)
      for epoch in np.linspace(0, task.stage.num_epochs, 200)
    ],
    np.int32,
  )
  return jax.vmap(task.learning_rate_fn)(at).tolist()


def read_history(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the history of `workdir`, a new one where there is none."""
  path = workdir / 'training_history.json'
  if not path.exists():
    return history_lib.new_history('')
  return history_lib.load_history(path)


def _load_history(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  allow_config_change: bool,
) -> tuple[dict[str, Any], list[str]]:
  """Returns the history of `workdir`, and what the config changes.

  Shows how the config differs from the one that the run began with.

  Raises:
    UserError: if the run there began with another config.
  """
  history = read_history(workdir)
  saved = preflight.saved_configs(config, workdir)
  if saved and jax.process_index() == 0:
    table = config_lib.difference_table(*saved)
    if table.row_count:
      rich.console.Console(markup=False).print(table)
  changes = preflight.check_changes(config, workdir, allow_config_change)
  return history, changes


def _as_trained(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  before: config_dict.ConfigDict | None,
) -> dict[str, Any]:
  """Returns `config` complete, for JSON; stages that are done as they were.

  Once `before` alone, the run's config so far, told how they were.
  """
  plain = config_lib.to_json(stages.complete(config))
  so_far = config_lib.to_json(before) if before else {}
  for i, stage in enumerate(plain['stages']):
    done = checkpoints.read_done(workdir, stage['name'])
    if done is None:
      continue
    for was in done.get('config', so_far).get('stages', ()):
      if was['name'] == stage['name']:
        plain['stages'][i] = {**stage, **was}
  return plain


def _write_inputs(plain: dict[str, Any], workdir: pathlib.Path) -> None:
  """Writes what runs and on what, before anything is compiled."""
  if jax.process_index() != 0:
    return
  try:
    for pattern in ('.*.tmp', 'checkpoints/*/.*.tmp'):  # Of killed writes.
      for path in workdir.glob(pattern):
        path.unlink(missing_ok=True)
    files.write_json(workdir / 'config.json', plain)
    files.write_json(workdir / 'environment.json', environment.environment())
  except OSError as e:
    raise errors.UserError(
      f'Cannot write to the workdir: {e.strerror}.',
      f'--workdir={workdir}',
      'Name a directory that you may write to.',
    ) from None


def _create_progress(num_stages: int) -> progress_lib.Progress:
  """Returns what people see, or nothing; only process 0 shows it."""
  quiet = jax.process_index() != 0
  console = rich.console.Console(quiet=quiet, markup=False)
  return progress_lib.Progress(num_stages, console=console)


def _create_writer(
  config: config_dict.ConfigDict, workdir: pathlib.Path
) -> tensorboard.Writer:
  """Returns TensorBoard's writer; only process 0 writes."""
  writes = config.tensorboard and jax.process_index() == 0
  return tensorboard.Writer(workdir / 'tensorboard' if writes else None)

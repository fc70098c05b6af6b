"""The run that is under way: what it is made of, where it reports to."""

import contextlib
import dataclasses
import datetime
import pathlib
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import rich.console
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import files, paths, stages
from jaxprog.monitoring import activity, environment, loggers, tensorboard
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import incidents as incidents_lib
from jaxprog.monitoring import progress as progress_lib
from jaxprog.reliability import checkpoints, lock, peers, signals, watchdog
from jaxprog.reporting import outputs
from jaxprog.training import fetching, preflight, resume
from jaxprog.training import setup as setup_lib
from jaxprog.training.transfer import handover, teacher


@dataclasses.dataclass(frozen=True)
class Run:
  """A ladder on its way: what it is made of and where it reports to."""

  setup: setup_lib.Setup
  tasks: tuple[setup_lib.Task, ...]
  workdir: pathlib.Path
  history: dict[str, Any]
  progress: progress_lib.Progress
  writer: loggers.Writer
  stop: signals.StopRequest
  incidents: incidents_lib.Incidents
  # Notes an incident and says it: note(kind, message, **fields).
  note: Callable[..., None]
  owner: lock.Lock
  dog: watchdog.Watchdog
  # Brings the images of the stages from where they are.
  fetcher: fetching.Fetcher
  # Compiles the next stage while this one trains.
  compiler: futures.Executor
  # For what needs no device to compile: side by side.
  compilers: futures.Executor
  # Told the name of a stage and each row of its history.
  on_epoch: Callable[[str, dict[str, Any]], object]
  reporter: outputs.Reporter
  # What the workdir's config was when the run began.
  before: config_dict.ConfigDict | None
  # When its clock stood at 0, earlier calls included, by the monotonic one.
  began: float
  # By stage, at even distances in epochs; sampled by the compiler's thread.
  rates: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  # Seconds that stages waited for the compiler.
  waits: dict[str, float] = dataclasses.field(default_factory=dict)

  def save_history(self, *, trains: bool = True) -> None:
    """Writes training_history.json, on the process that writes.

    What a call takes that trains nothing is no time of the run.
    """
    if jax.process_index() == 0:
      path = self.workdir / 'training_history.json'
      if trains:
        now = datetime.datetime.now(datetime.UTC)
        self.history['written'] = now.isoformat(timespec='seconds')
        self.history['wall_seconds'] = time.monotonic() - self.began
      files.write_json(path, self.history)
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


def open_run(
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  owner: lock.Lock,
  stop: signals.StopRequest,
  stack: contextlib.ExitStack,
  *,
  began: float,  # When this call did, by the monotonic clock.
  allow_config_change: bool = False,
  on_epoch: Callable[[str, dict[str, Any]], object] = lambda name, row: None,
  shorten: Callable[[setup_lib.Task], setup_lib.Task] = lambda task: task,
) -> Run:
  """Returns a run of `setup`, all checked; `stack` closes what it has opened.

  Raises:
    UserError: for mistakes in the data or the workdir.
  """
  config, writes = setup.config, jax.process_index() == 0
  console = rich.console.Console(quiet=not writes, markup=False)
  progress = progress_lib.Progress(
    len(setup.chosen), console=console, workdir=workdir if writes else None
  )
  stack.enter_context(progress)
  incidents, note = _open_incidents(workdir, owner, progress)
  with activity.doing('reading the checkpoints'):
    checkpoints.verify_all(workdir, note)
  history = read_history(workdir)
  _show_changes(config, workdir)
  changes = preflight.check_changes(config, workdir, allow_config_change)
  tasks = create_tasks(setup, workdir, shorten)
  for line in preflight.quick(tasks, workdir, owner.url):
    progress.message(line)
  if changes:
    incidents.add('config_change', '; '.join(changes))
  before, plain = _write_inputs(config, workdir)
  history['config_hash'] = config_lib.config_hash(config_lib.restore(plain))
  fetcher = fetching.Fetcher(config, [x.dataset for x in tasks])
  return Run(
    setup=setup,
    tasks=tasks,
    workdir=workdir,
    history=history,
    progress=progress,
    writer=_open_writer(config, plain, workdir, note, stack),
    stop=stop,
    incidents=incidents,
    note=note,
    owner=owner,
    dog=stack.enter_context(_create_watchdog(config, workdir, incidents)),
    fetcher=stack.enter_context(contextlib.closing(fetcher)),
    compiler=_create_executor('compiler', stack),
    compilers=_create_executor('compilers', stack, num_threads=4),
    on_epoch=on_epoch,
    reporter=outputs.Reporter(
      _create_executor('reporter', stack), workdir, incidents.entries
    ),
    before=before,
    began=began - _seconds_so_far(history),
  )


def _seconds_so_far(history: dict[str, Any]) -> float:
  """Returns what a run took; of an older program's its stages alone."""
  known = sum(stage['seconds'] for stage in history['stages'])
  return history.get('wall_seconds', known)


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


def _open_incidents(
  workdir: pathlib.Path, owner: lock.Lock, progress: progress_lib.Progress
) -> tuple[incidents_lib.Incidents, Callable[..., None]]:
  """Returns the log of incidents, and a Run's `note`; process 0 writes it."""
  writes = jax.process_index() == 0
  found = incidents_lib.Incidents(
    workdir / 'incidents.jsonl' if writes else None
  )
  if owner.taken_over:
    found.add('lock', owner.taken_over)

  def note(kind, message, **fields):
    found.add(kind, message, **fields)
    progress.message(message)

  return found, note


def _open_writer(
  config: config_dict.ConfigDict,
  plain: dict[str, Any],
  workdir: pathlib.Path,
  note: Callable[..., None],
  stack: contextlib.ExitStack,
) -> loggers.Writer:
  """Returns what writes to the config's loggers, which know its fields."""
  names = loggers.chosen(config) if jax.process_index() == 0 else ()
  writer = stack.enter_context(loggers.open_loggers(names, workdir, note))
  writer.write_hparams(tensorboard.flatten_config(plain))
  return writer


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
  config, before = resume.read_config(workdir), None
  for task in tasks:
    stage = task.stage
    if not checkpoints.is_done(workdir, stage.name):
      handover.check(setup, task, before, workdir)
      teacher.check(setup, task, workdir)
      is_begun = resume.check(task, workdir, config)
      # A stage that has begun has its weights in its own checkpoints.
      if not is_begun:
        handover.check_source(setup, task, workdir)
    before = stage
  return tasks


def read_history(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the history of `workdir`, a new one where there is none."""
  path = workdir / 'training_history.json'
  if not path.exists():
    return history_lib.new_history('')
  return history_lib.load_history(path)


def _show_changes(
  config: config_dict.ConfigDict, workdir: pathlib.Path
) -> None:
  """Shows how the config differs from the one that the run began with."""
  table = preflight.difference_table(config, workdir)
  if table and jax.process_index() == 0:
    rich.console.Console(markup=False).print(table)


def _write_inputs(
  config: config_dict.ConfigDict, workdir: pathlib.Path
) -> tuple[config_dict.ConfigDict | None, dict[str, Any]]:
  """Writes what runs and on what; returns the config so far, and that of now.

  The latter is complete, and stages that are done are as they were. Once the
  former alone told how they were.
  """
  before = resume.read_config(workdir)
  peers.wait_for_all('config')  # One of them replaces it.
  plain = config_lib.to_json(stages.complete(config))
  so_far = config_lib.to_json(before) if before else {}
  for i, stage in enumerate(plain['stages']):
    done = checkpoints.read_done(workdir, stage['name']) or {'config': {}}
    for was in done.get('config', so_far).get('stages', ()):
      if was['name'] == stage['name']:
        plain['stages'][i] = {**stage, **was}
  if jax.process_index() == 0:
    with paths.writing(workdir):
      for pattern in ('.*.tmp', 'checkpoints/*/.*.tmp'):  # Of killed writes.
        for path in workdir.glob(pattern):
          path.unlink(missing_ok=True)
      files.write_json(workdir / 'config.json', plain)
      files.write_json(workdir / 'environment.json', environment.environment())
  return before, plain


def _create_executor(
  name: str, stack: contextlib.ExitStack, num_threads: int = 1
) -> futures.ThreadPoolExecutor:
  """Returns threads that nobody waits for: they may compile for minutes."""
  executor = futures.ThreadPoolExecutor(num_threads, name)
  stack.callback(executor.shutdown, wait=False, cancel_futures=True)
  return executor

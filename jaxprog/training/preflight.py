"""What a run must find in order before it starts."""

import contextlib
import os
import pathlib
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import rich.table
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, files, formats, named, paths
from jaxprog import stages as stages_lib
from jaxprog.data import preparation, remote
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import loggers
from jaxprog.reliability import checkpoints, integrity, lock
from jaxprog.training import devices
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib

# TensorBoard's files, plots and reports of one run, in bytes.
_REPORTS = 20_000_000
# What helps where a bucket's data have no room.
MOVE = 'Free some, or name a folder on a larger disk: --config.cache_dir=DIR.'
# Beside the numbers a checkpoint holds their names and shapes; and file
# systems round up.
OVERHEAD = 1.05


def launch(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> None:
  """Raises UserError for what would fail hours later, at no cost.

  That is a workdir that cannot be written to, or is another run's, and a
  dataset or a logger that is missing.
  """
  chosen = stages_lib.select(stages_lib.create_stages(config), only, skip)
  devices.check_platform(config.platform)
  loggers.chosen(config)
  data_dir = paths.data_dir(config)
  for stage in chosen:
    if preparation.is_here(stage.dataset, data_dir):
      continue
    try:
      setup_lib.check_dataset(data_dir, stage)
    except errors.UserError as e:
      fix = mend(stage.dataset, e.suggestion)
      raise errors.UserError(e.what, e.where, fix) from None
  claim_workdir(pathlib.Path(workdir))


def claim_workdir(workdir: pathlib.Path) -> str:
  """Raises UserError if no run can begin or go on in `workdir`.

  Returns a sentence about an owner that a run would wait for, or ''.
  """
  owner = ''
  if '[' in os.path.realpath(workdir):
    raise errors.UserError(
      'Checkpoints cannot be saved below a folder with [ in its name.',
      f'--workdir={workdir}',
      'orbax takes it for a pattern: choose another --workdir.',
    )
  if jax.process_index() == 0:  # It takes the lock: it knows its host's dead.
    owner = lock.check_free(workdir)
  check_workdir(workdir)
  return owner


def quick(
  tasks: Sequence[setup_lib.Task],
  workdir: str | os.PathLike[str],
  url: str = '',
) -> list[str]:
  """Returns lines on devices, disk and what `workdir` holds already.

  `url` is that of its bucket, '' if it has none.

  Raises:
    UserError: if the disk is too small for what the run will write.
  """
  path = pathlib.Path(workdir)
  states = [(task.stage, task.state_shapes) for task in tasks]
  need, free = bytes_to_write(path, states), free_bytes(path)
  if need > free:
    where, how = paths.place(path)
    raise errors.UserError(
      f'The run needs {formats.size(need)} of disk; {formats.size(free)} are '
      'free.',
      where,
      f'Free some, or: {how}',
    )
  lines = [
    f'devices: {devices.describe()}',
    *([f'workdir: {url}, on this machine in {path}'] if url else []),
    f'disk: {formats.size(need)} to be written, {formats.size(free)} free',
  ]
  to_come = [
    task for task in tasks if not checkpoints.is_done(path, task.stage.name)
  ]
  images = {
    file
    for task in to_come
    for stored in task.dataset.stored.values()
    for file in stored.paths
  }
  if to_come and (found := to_fetch(tasks[0].config, images, path, need)):
    line, fits = found
    if not fits:
      where = f'config.data_dir={tasks[0].config.data_dir}'
      raise errors.UserError(f'There is no room for data: {line}.', where, MOVE)
    lines.append(f'data: {line}')
  return lines + describe_run(path)


def to_fetch(
  config: config_dict.ConfigDict,
  images: Iterable[str],
  workdir: pathlib.Path | None,
  results: int,
) -> tuple[str, bool] | None:
  """Returns what is said of files still in a bucket, and whether they may come.

  None if all are here. `results` are the bytes that the run will write.
  """
  data_dir, images = paths.data_dir(config), list(images)
  if not (need := remote.missing(images)):
    return None
  nearest = nearest_folder(data_dir)
  free = remote.free_bytes(nearest)
  if workdir and _disk(workdir) == _disk(data_dir):
    free = max(0, free - results)
  line = (
    f'{formats.size(need)} to be fetched from {config.data_dir}, '
    f'{formats.size(free)} free at {nearest}'
  )
  if need <= free:
    return line, True
  if remote.missing(x for x in images if not remote.reads_directly(x)) <= free:
    return f'{line}: what has no room is read there, which is slower', True
  return line, False


def check_workdir(workdir: pathlib.Path) -> None:
  """Raises UserError if a file cannot be written to `workdir` and renamed.

  Leaves nothing behind, not even folders.
  """
  probe = workdir / f'.probe.{socket.gethostname()}.{os.getpid()}'
  with paths.writing(workdir), files.folder(workdir):
    files.write_bytes(probe, b'probe')
    probe.unlink()


def bytes_to_write(
  workdir: pathlib.Path | None,
  states: Iterable[tuple[stages_lib.Stage, state_lib.TrainState]],
) -> int:
  """Returns how much the stages still write, at most, in bytes.

  All that they save stays until they are done: two states, the weights that
  either speaks of (best, and averages), and the final ones. What replaces an
  old checkpoint is there beside it for a while. Of `states` shapes will do.
  """
  total = replaced = 0
  for stage, state in states:
    if workdir and checkpoints.is_done(workdir, stage.name):
      continue
    there = _folder_bytes(workdir, stage.name) if workdir else 0
    a_state, weights = count_bytes(state), count_bytes(state.variables)
    beside = a_state + (2 if stage.ema_decay else 1) * weights
    total += max(0, 2 * beside + weights - there)
    replaced = max(replaced, beside)
  if not replaced:
    return 0
  return int(OVERHEAD * (total + replaced)) + _REPORTS


def difference_table(
  config: config_dict.ConfigDict, workdir: str | os.PathLike[str]
) -> rich.table.Table | None:
  """Returns how the run of `workdir` began otherwise, None if it did not."""
  saved = _saved_configs(config, workdir)
  table = config_lib.difference_table(*saved) if saved else None
  return table if table and table.row_count else None


def _saved_configs(
  config: config_dict.ConfigDict, workdir: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]] | None:
  """Returns what config.differences and difference_table take.

  None where no run of `workdir` has begun.
  """
  path = pathlib.Path(workdir)
  history, before = path / 'training_history.json', path / 'config.json'
  if not history.is_file() or not before.is_file():
    return None
  started = history_lib.load_history(history)['stages']
  return (
    config_lib.to_json(config_lib.load_config(str(before))),
    config_lib.to_json(stages_lib.complete(config)),
    tuple(stage['name'] for stage in started),
  )


def check_changes(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike[str],
  allow_config_change: bool,
) -> list[str]:
  """Returns what of `config` changes the meaning of the run in `workdir`.

  Raises:
    UserError: if there is any such change, and it is not allowed.
  """
  saved = _saved_configs(config, workdir)
  changes = config_lib.differences(*saved) if saved else []
  if changes and not allow_config_change:
    more = f' and {len(changes) - 3} more' if len(changes) > 3 else ''
    raise errors.UserError(
      f'The run in {workdir} began with another config.',
      '; '.join(changes[:3]) + more,
      'Use another --workdir, or --allow_config_change to go on anyway.',
    )
  return changes


def command() -> list[str]:
  """Returns how the command line was called, [] if it was not: from Python."""
  script = sys.argv[0]
  match pathlib.PurePath(script).parts[-2:]:
    case (*_, 'main.py'):
      return ['python', script]
    case ('jaxprog', '__main__.py'):
      return ['python', '-m', 'jaxprog']
    case (*_, 'jaxprog'):
      return ['jaxprog']
  return []


def prepare_command() -> str:
  """Returns what prepares the data of this very call, to be pasted."""
  start = command()
  if not start:
    return 'jaxprog.prepare(config)'
  words, kept = iter(sys.argv[1:]), []
  for word in words:
    flag, equals, value = word.lstrip('-').partition('=')
    if flag.partition('.')[0] in ('config', 'only', 'skip', 'workdir'):
      kept.append((flag, value if equals else next(words, '')))
  # Without --config, the one in the workdir serves.
  if any(flag == 'config' for flag, _ in kept):
    kept = [(flag, value) for flag, value in kept if flag != 'workdir']
  flags = [f'--{flag}={value}' for flag, value in kept]
  return shlex.join([*start, *flags, '--mode=prepare'])


def mend(dataset: str, suggestion: str) -> str:
  """Returns a dataset's suggestion with the command that it speaks of."""
  missing = suggestion.startswith('Put ')
  if missing and named.find(dataset).archive:
    return f'{prepare_command()} --download'
  if '--mode=prepare' in suggestion:
    return prepare_command()
  if missing:
    return f'{suggestion.removesuffix(".")}, then: {prepare_command()}'
  return suggestion


def describe_run(workdir: pathlib.Path) -> list[str]:
  """Returns a line on the stages that are done or interrupted, or none."""
  path = workdir / 'training_history.json'
  if not path.is_file():
    return []
  parts = []
  for stage in history_lib.load_history(path)['stages']:
    name = stage['name']
    latest = checkpoints.stage_directory(workdir, name) / 'latest'
    saved = integrity.list_finished(latest)
    if checkpoints.is_done(workdir, name):
      parts.append(f'{name} done')
    elif saved:
      parts.append(f'{name} interrupted, saved at step {max(saved)}')
    else:
      parts.append(f'{name} begun, nothing saved')
  return [f'run: {", ".join(parts)}'] if parts else []


def count_bytes(tree: Any) -> int:
  """Returns the bytes of all arrays of a pytree, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _folder_bytes(workdir: pathlib.Path, stage: str) -> int:
  """Returns the size of what a stage has saved, less what is in quarantine."""
  total = 0
  for name in ('latest', 'best', 'final', 'ema'):
    folder = checkpoints.stage_directory(workdir, stage) / name
    for path in folder.rglob('*'):
      with contextlib.suppress(OSError):  # Removed meanwhile.
        total += path.lstat().st_size if path.is_file() else 0
  return total


def free_bytes(path: pathlib.Path) -> int:
  """Returns what the disk that `path` is or will be on still takes."""
  return shutil.disk_usage(nearest_folder(path)).free


def _disk(path: pathlib.Path) -> int:
  return nearest_folder(path).stat().st_dev


def nearest_folder(path: pathlib.Path) -> pathlib.Path:
  """Returns the nearest folder that exists."""
  path = path.absolute()
  return next(x for x in (path, *path.parents) if x.is_dir())

"""One run of a cell: a directory that `ladder.train` fills, and its outcome.

RUN/outcome.json says that a run is over, and how it ended; everything else
there is what any training writes. Stages that an earlier run has trained with
the same config and seed are linked into a new one's directory instead of being
trained again.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, files, stages
from jaxprog.comparison.budgets import StageCost
from jaxprog.comparison.cells import Cell
from jaxprog.monitoring import activity
from jaxprog.reliability import checkpoints, integrity, lock
from jaxprog.training import ladder, loop, preflight
from jaxprog.training import setup as setup_lib

Outcome = dict[str, Any]

_VERSION = 1
# What a finished stage has saved for those after it.
_SHARED = {'best', 'final', 'ema', 'done.json'}

# Keys of runs whose later stages this process has compiled.
_compiled: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Planned:
  """One run, complete: what is trained, and where.

  `costs` are those of the stages that are trained, in order.
  """

  cell: Cell
  seed: int
  config: config_dict.ConfigDict
  costs: tuple[StageCost, ...]
  workdir: pathlib.Path

  @property
  def names(self) -> tuple[str, ...]:
    """The stages that are trained, in order."""
    return tuple(cost.name for cost in self.costs)

  @property
  def last(self) -> stages.Stage:
    """The last stage that is trained."""
    chosen = stages.create_stages(self.config)
    return next(s for s in chosen if s.name == self.names[-1])

  @functools.cached_property
  def keys(self) -> tuple[str, ...]:
    """What decides the result of the first stage, of the first two, ..."""
    return tuple(
      _prefix_key(self, count + 1) for count in range(len(self.costs))
    )

  def shares(self, other: 'Planned', count: int = 1) -> bool:
    """Returns whether the first stages are trained alike, before the last."""
    if self.seed != other.seed or count >= len(self.costs):
      return False
    return self.keys[count - 1 : count] == other.keys[count - 1 : count]


def read_outcome(planned: Planned) -> Outcome | None:
  """Returns how the run ended; None if it is not over, or may go on.

  One that failed may have met a full disk: it is tried again. One that diverged
  would do so again.

  Raises:
    UserError: if it was another run that began there.
  """
  path = planned.workdir / 'outcome.json'
  outcome = None
  with contextlib.suppress(FileNotFoundError, ValueError):
    outcome = json.loads(path.read_text(encoding='utf-8'))
  changes = preflight.check_changes(
    planned.config, planned.workdir, allow_config_change=True
  )
  if outcome.get('config_hash') != _hash(planned) if outcome else changes:
    what = '; '.join(changes[:3])
    raise errors.UserError(
      f'The run in {planned.workdir} was one of another config.',
      f'cell {planned.cell.name!r}, seed {planned.seed}'
      + (f': {what}' if what else ''),
      'Use another --workdir, or the config that the comparison began with.',
    )
  if outcome is None:
    return None
  return outcome if outcome['status'] != 'failed' else None


def run(
  planned: Planned,
  earlier: Sequence[Planned],
  check: Callable[[], object],
  patience_seconds: float = 0.0,
) -> Outcome:
  """Trains what is left of a run that is not over; returns how it ended.

  Stages that `earlier` runs have trained may serve this one too. What `check`
  raises, which is called before it and after each epoch, ends all. A process
  that still has the workdir is waited for with patience.

  Raises:
    UserError: for a mistake that the user can mend.
    Stopped: after a signal, once all is saved.
    SaveError: if the disk is full, as it would be for the next run.
  """
  check()

  def train():
    found = share_stages(planned, earlier)
    _compile_once(planned)
    ladder.train(
      planned.config,
      planned.workdir,
      only=planned.names,
      on_epoch=lambda name, row: check(),
    )
    return found

  status, error, shared = 'done', '', list[str]()
  try:
    shared = lock.patiently(train, patience_seconds)
  except (errors.UserError, errors.Stopped, integrity.SaveError):
    raise
  except Exception as e:
    check()
    shared = share_stages(planned, ())
    skipped = isinstance(e, loop.SkippedTooOftenError)
    status = 'diverged' if skipped else 'failed'
    error = f'{type(e).__name__}: {" ".join(str(e).split())}'
    # Where the disk is full, the run has failed all the same.
    path = planned.workdir / 'error.log'
    with contextlib.suppress(OSError), open(path, 'a') as file:
      traceback.print_exc(file=file)
  outcome = {
    'version': _VERSION,
    'status': status,
    'error': error,
    'config_hash': _hash(planned),
    'shared': shared,
  }
  files.write_json(planned.workdir / 'outcome.json', outcome)
  return outcome


def failed(error: str) -> Outcome:
  """Returns the outcome of a run that could not be, or that is lost."""
  return {'status': 'failed', 'error': error, 'shared': []}


def _compile_once(planned: Planned) -> None:
  """Compiles the later stages of a run for JAX's cache on disk.

  A short stage would end before the next one is compiled, and the hand-over
  would be measured with a wait that only the first run of a cell has.
  """
  key = program_key(planned)
  if len(planned.names) < 2 or key in _compiled:
    return
  _compiled.add(key)
  if planned.config.compilation_cache_dir:
    with activity.doing(f'compiling later stages of {planned.cell.name}'):
      setup = setup_lib.create_setup(planned.config, only=planned.names)
      for stage in setup.chosen[1:]:
        task = setup_lib.create_task(setup, stage)
        setup_lib.compile_task(task, carried=True)


def program_key(planned: Planned) -> str:
  """Returns what runs have in common that differ in seeds and rates alone."""
  config = stages.complete(planned.config)  # A copy, that of stages too.
  config.seed = 0
  for stage in config.stages:
    stage.learning_rate = 0.0
  return f'{config_lib.config_hash(config)} {planned.names}'


def must_wait(
  planned: Planned, earlier: Sequence[Planned], training: Iterable[Planned]
) -> bool:
  """Returns whether a stage that would be shared is being trained elsewhere.

  By one of the runs `training`; what `earlier` runs have trained is there.
  """
  for count, name in enumerate(planned.names[:-1], 1):
    target = checkpoints.stage_directory(planned.workdir, name)
    if not target.exists() and not _find_source(planned, count, earlier):
      return any(planned.shares(other, count) for other in training)
  return False


def share_stages(planned: Planned, earlier: Sequence[Planned]) -> list[str]:
  """Links finished stages of `earlier` runs; returns all that are shared.

  Those at the beginning of the ladder whose own config, that of all stages
  before and the seed are the same: what they would come to, bit for bit.
  """
  shared = []
  for count in range(1, len(planned.names)):
    name = planned.names[count - 1]
    target = checkpoints.stage_directory(planned.workdir, name)
    marker = planned.workdir / f'.shared-{name}'
    if not target.exists():
      source = _find_source(planned, count, earlier)
      if source is None:
        break
      with lock.Lock(planned.workdir):
        if not target.exists():
          _link(source, target, marker)
    elif not marker.exists():
      break
    shared.append(name)
  return shared


def forget_checkpoints(planned: Planned) -> None:
  """Removes what the last stage has saved; its history stays."""
  directory = checkpoints.stage_directory(planned.workdir, planned.names[-1])
  shutil.rmtree(directory, ignore_errors=True)


def _find_source(
  planned: Planned, count: int, earlier: Sequence[Planned]
) -> pathlib.Path | None:
  """Returns where the first `count` stages were trained alike, if anywhere."""
  for other in earlier:
    if planned.shares(other, count):
      name = planned.names[count - 1]
      with contextlib.suppress(integrity.DamagedError):
        if checkpoints.read_done(other.workdir, name) is not None:
          return checkpoints.stage_directory(other.workdir, name)
  return None


def _prefix_key(planned: Planned, count: int) -> str:
  """Returns what decides the result of the first `count` stages."""
  config = config_dict.ConfigDict(planned.config)
  names = planned.names[:count]
  if not config.exclude_leaks:  # Else evaluation images of all stages do.
    by_name = {stage.name: stage for stage in config.stages}
    config.stages = [by_name[name] for name in names]
  return f'{config_lib.config_hash(config)} {names}'


def _link(
  source: pathlib.Path, target: pathlib.Path, marker: pathlib.Path
) -> None:
  """Makes `target` the same stage as `source`, at once; hard links if it can.

  Nothing that is saved is changed in place.
  """
  temporary = target.parent.with_name(f'.linking-{target.name}')
  shutil.rmtree(temporary, ignore_errors=True)
  shutil.copytree(
    source,
    temporary,
    ignore=lambda folder, names: (
      set(names) - _SHARED if folder == os.fspath(source) else set()
    ),
    copy_function=_link_file,
  )
  files.write_bytes(marker, b'')
  target.parent.mkdir(exist_ok=True)
  os.replace(temporary, target)


def _link_file(
  source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> None:
  try:
    os.link(source, target)
  except OSError:  # Another file system, or one without links.
    shutil.copy2(source, target)


def _hash(planned: Planned) -> str:
  return f'{config_lib.config_hash(planned.config)} {",".join(planned.names)}'

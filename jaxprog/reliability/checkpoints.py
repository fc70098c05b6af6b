"""Saves and loads what a stage has learned, through orbax.

WORKDIR/checkpoints/STAGE/ holds latest/ (everything, to resume), best/ and
final/ (the weights, loadable alone) and done.json, the marker of a finished
stage, written only after its last save has committed. Each 'latest' has the
weights that it speaks of beside it, and a resume drops what is newer. What is
found damaged when it is needed to resume moves to quarantine/; see integrity.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxprog import buckets, errors, files
from jaxprog.reliability import integrity, peers

# A dataclass that is a pytree and has a `step`.
State = Any
Meta = dict[str, Any]

# Weights that training chooses as it goes; a 'latest' says which they are.
_CHOSEN = ('best', 'ema')

# on_incident(kind, message, **fields): the message is for people.
_OnIncident = Callable[..., object]


def ignore(kind: str, message: str, **fields: Any) -> None:
  """Does nothing with an incident."""


class Checkpoints:
  """The checkpoints of one stage; must be closed.

  Saves run in the background: orbax commits by a rename, then the files are
  hashed, then the steps that nothing needs any more go. They finish in the
  order in which they began, so that the weights that a 'latest' speaks of are
  whole before it is. What fails there is raised by the next call, as a
  SaveError.
  """

  def __init__(
    self, directory: pathlib.Path, on_incident: _OnIncident = ignore
  ) -> None:
    self._directory = directory
    self._on_incident = on_incident
    self._savers: dict[str, ocp.AsyncCheckpointer] = {}
    self._pending: dict[str, futures.Future[None]] = {}
    self._worker = futures.ThreadPoolExecutor(1, 'checkpoints')
    _on_first_process(lambda: _sweep(directory))

  def save_latest(
    self, state: State, meta: Meta, step: int | None = None
  ) -> None:
    """Saves all of `state`, with what `restore_latest` needs beside it.

    `step` numbers it among all saves of the stage; it is the state's own by
    default.
    """
    step = int(state.step) if step is None else step
    self._save('latest', step, state, meta)

  def save_weights(
    self, name: str, step: int, variables: dict[str, Any], meta: Meta
  ) -> None:
    """Saves `variables` as the 'best', 'final' or 'ema' ones of the stage."""
    self._save(name, step, variables, meta)

  def restore_latest(
    self, like: State, renewable: Collection[str] = ()
  ) -> tuple[State, Meta] | None:
    """Returns the latest intact state, placed as `like` is, None if it is new.

    Damaged steps are moved to quarantine/ on the way. Weights of later steps
    go: training decides anew which are the best. Fields of the state that are
    `renewable` are None where they do not fit.

    Raises:
      DamagedError: if there were states, and all are damaged.
      UserError: if another leaf is missing or has another shape or dtype; orbax
        itself would convert or drop it silently.
    """
    self.wait()
    stage = self._directory
    _on_first_process(lambda: _quarantine_latest(stage, self._on_incident))
    steps = integrity.list_steps(stage / 'latest')
    if not steps:
      return None
    tree, meta = _read(stage / 'latest' / str(steps[-1]))
    unfit = check_matches(tree, like, stage / 'latest', renewable)
    fitting = dataclasses.replace(like, **dict.fromkeys(unfit))
    state = _place_like(tree, fitting)
    _on_first_process(lambda: _forget_after(stage, steps[-1]))
    return state, meta

  def check(self) -> None:
    """Raises what a save has met in the background; costs next to nothing.

    Raises:
      SaveError: if a save has failed since the last call.
    """
    self._await([n for n, save in self._pending.items() if save.done()])

  def wait(self) -> None:
    """Waits until every save has committed and has its manifest."""
    self._await(self._pending)
    peers.wait_for_files('saved')  # The manifest is process 0's.

  def mark_done(self, meta: Meta) -> None:
    """Declares the stage finished, once every save has committed."""
    self.wait()

    def finish():
      path = self._directory / 'done.json'
      files.write_json(path, integrity.sign(meta))
      for name in _CHOSEN:
        _keep_newest(self._directory / name)

    _on_first_process(finish)

  def close(self) -> None:
    """Waits for saves under way and releases their threads."""
    try:
      self._await(self._pending)
    finally:
      self._worker.shutdown()
      for saver in self._savers.values():
        # Orbax raises a failed save here too; our worker has told it.
        with contextlib.suppress(Exception):
          saver.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    """Closes; a failed save hides no other error but a stop that it belies."""
    try:
      self.close()
    except integrity.SaveError as e:
      if error is None or isinstance(error, errors.Stopped):
        raise
      self._on_incident('save_failed', str(e))

  def _await(self, names: Iterable[str]) -> None:
    """Waits for this process's saves of `names` that are under way."""
    for name in [x for x in names if x in self._pending]:
      self._pending.pop(name).result()

  def _save(self, name: str, step: int, tree: Any, meta: Meta) -> None:
    if jax.process_index() != 0:  # All have the same; one of them writes.
      return
    self.check()
    self._await([name])
    directory = self._directory / name
    try:
      # A run that resumed from before `step` trains it again: that one counts.
      integrity.begin(directory, step)
      if name not in self._savers:  # One each: a saver does a save at a time.
        self._savers[name] = _create_checkpointer()
      saver = self._savers[name]
      saver.save(
        directory / str(step),
        args=ocp.args.Composite(
          tree=ocp.args.PyTreeSave(_copy_here(tree)),
          meta=ocp.args.JsonSave(meta),
        ),
      )
    except Exception as e:
      raise _save_error(directory, step, e) from e
    self._pending[name] = self._worker.submit(_finish, saver, directory, step)


def _sweep(stage: pathlib.Path) -> None:
  """Removes what interrupted saves of a stage have left."""
  for directory in _parts(stage):
    integrity.sweep(directory)


def _finish(
  saver: ocp.AsyncCheckpointer, directory: pathlib.Path, step: int
) -> None:
  """Waits for a save, hashes it and removes what nothing needs any more."""
  try:
    saver.wait_until_finished()
    integrity.finish(directory, step)
    if directory.name == 'final':
      _keep_newest(directory)
    if directory.name == 'latest':
      _keep_newest(directory, 2)
      oldest = integrity.list_steps(directory)[0]
      for name in _CHOSEN:
        _keep_newest(directory.parent / name, until=oldest)
  except Exception as e:
    raise _save_error(directory, step, e) from e


def _keep_newest(
  directory: pathlib.Path, count: int = 1, until: int | None = None
) -> None:
  """Removes all but `count` of the steps up to `until`, of all by default.

  With the step of a 'latest' that leaves the weights that it speaks of, and
  whatever came after it.
  """
  steps = integrity.list_steps(directory)
  known = [x for x in steps if until is None or x <= until]
  for old in known[:-count]:
    integrity.remove(directory, old)


def _forget_after(stage: pathlib.Path, step: int) -> None:
  """Removes weights of steps after `step`, which will be trained again."""
  for name in (*_CHOSEN, 'final'):
    for newer in integrity.list_steps(stage / name):
      if newer > step:
        integrity.remove(stage / name, newer)


def _save_error(
  directory: pathlib.Path, step: int, error: Exception
) -> integrity.SaveError:
  """Returns an error of one line: main shows 300 characters of it."""
  free = shutil.disk_usage(directory.parent).free / 1e6
  return integrity.SaveError(
    f'Step {step} of {_label(directory)} was not saved, older ones are intact. '
    f'The disk of {directory.parent} has {free:,.0f} MB left. {_reason(error)}'
  )


def _reason(error: Exception) -> str:
  """Returns why a save failed; tensorstore gives the number of the OS."""
  text = ' '.join(str(error).split())
  if found := re.search(r"os_error_code='(\d+)'", text):
    return os.strerror(int(found[1])) + '.'
  return text if len(text) <= 90 else f'{text[:30]} ... {text[-60:]}'


def _on_first_process(change: Callable[[], None]) -> None:
  """Lets one process change files, and the others see them only then."""
  if jax.process_index() == 0:
    change()
  peers.wait_for_files('checkpoints')


def _quarantine_latest(stage: pathlib.Path, on_incident: _OnIncident) -> None:
  """Moves the damaged 'latest' states of a stage to quarantine/.

  Raises:
    DamagedError: if the stage is under way and no intact one is left.
  """
  if _is_lost(stage, _tell_damage(stage / 'latest', on_incident)):
    raise lost_error(stage)


def _tell_damage(
  directory: pathlib.Path, on_incident: _OnIncident
) -> list[str]:
  """Returns the status of each step; what is damaged of 'latest' moves away."""
  statuses = []
  for found in integrity.inspect(directory):
    statuses.append(found.status)
    if found.status != 'damaged':
      continue
    what = f'{_label(directory)}: step {found.step} is damaged'
    fields = {'stage': found.stage, 'step': found.step, 'detail': found.detail}
    if directory.name == 'latest':
      path = directory / str(found.step)
      fields['path'] = str(integrity.quarantine(path, directory.parent))
      what += ', quarantined'
    kind = 'quarantine' if 'path' in fields else 'damaged'
    on_incident(kind, f'{what} ({found.detail})', **fields)
  return statuses


def find_lost(
  workdir: pathlib.Path, conditions: Iterable[integrity.Condition]
) -> list[pathlib.Path]:
  """Returns the stages under way that have no intact state.

  `conditions` are those of `check_workdir`.
  """
  statuses = collections.defaultdict(list)
  for found in conditions:
    if found.name == 'latest':
      statuses[found.stage].append(found.status)
  return [x for x in _stages(workdir) if _is_lost(x, statuses[x.name])]


def _is_lost(stage: pathlib.Path, statuses: Sequence[str]) -> bool:
  if 'intact' in statuses or _is_done(stage):
    return False
  return 'damaged' in statuses or any(stage.glob('quarantine/latest-*'))


def lost_error(stage: pathlib.Path) -> integrity.DamagedError:
  """Returns the error that stops a run at a stage without an intact state."""
  return integrity.DamagedError(
    f'Stage {stage.name!r}: all saved states are damaged. Training does not '
    f'start over silently; to start the stage anew, remove {_places(stage)}'
  )


def _places(path: pathlib.Path) -> str:
  """Returns all that has to be removed for a folder to be gone."""
  url = buckets.shown(path)
  return url if url == str(path) else f'{url} and {path}'


def verify_all(
  workdir: pathlib.Path, on_incident: _OnIncident = ignore
) -> None:
  """Verifies every checkpoint of `workdir`, before a run goes on there.

  Damaged 'latest' states and markers of a finished stage are moved to
  quarantine/: the one before, or the latest state, takes their place. Damaged
  weights are reported and left where they are; only what needs them stops.

  Raises:
    DamagedError: if a stage is under way and has no intact state left.
  """
  _on_first_process(lambda: _verify_all(workdir, on_incident))


def _verify_all(workdir: pathlib.Path, on_incident: _OnIncident) -> None:
  for stage in _stages(workdir):
    _sweep(stage)
    path = stage / 'done.json'
    if _done_damage(path):
      target = integrity.quarantine(path, stage)
      message = f'{stage.name}/done.json is damaged, quarantined'
      on_incident('quarantine', message, stage=stage.name, path=str(target))
    for part in _parts(stage):
      if part.name != 'latest':
        _tell_damage(part, on_incident)
    _quarantine_latest(stage, on_incident)


def check_workdir(workdir: pathlib.Path) -> list[integrity.Condition]:
  """Returns what became of each checkpoint in `workdir`; changes nothing."""
  conditions: list[integrity.Condition] = []
  for stage in _stages(workdir):
    for part in _parts(stage):
      conditions += integrity.inspect(part)
    path = stage / 'done.json'
    if path.exists():
      damage = _done_damage(path)
      status = 'damaged' if damage else 'intact'
      size = path.stat().st_size
      conditions.append(
        integrity.Condition(stage.name, 'done.json', -1, status, damage, size)
      )
  return conditions


def _done_damage(path: pathlib.Path) -> str:
  """Returns '' for a marker that is intact, or not there."""
  try:
    if path.exists():
      integrity.read_signed(path)
  except integrity.DamagedError:
    return 'not what was written'
  return ''


def _is_done(stage: pathlib.Path) -> bool:
  path = stage / 'done.json'
  return path.exists() and not _done_damage(path)


def _stages(workdir: pathlib.Path) -> list[pathlib.Path]:
  return _directories(workdir.resolve() / 'checkpoints')


def _parts(stage: pathlib.Path) -> list[pathlib.Path]:
  """Returns latest/, best/ and so on, those that are there."""
  return [path for path in _directories(stage) if path.name != 'quarantine']


def _directories(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in path.glob('*') if p.is_dir())


def _label(directory: pathlib.Path) -> str:
  return f'{directory.parent.name}/{directory.name}'


def stage_directory(workdir: pathlib.Path, stage: str) -> pathlib.Path:
  """Returns where the checkpoints of `stage` lie."""
  return workdir.resolve() / 'checkpoints' / stage


def read_done(workdir: pathlib.Path, stage: str) -> Meta | None:
  """Returns what `mark_done` wrote, or None for an unfinished stage.

  Raises:
    DamagedError: if it is not what was written.
  """
  path = stage_directory(workdir, stage) / 'done.json'
  return integrity.read_signed(path) if path.is_file() else None


def is_done(workdir: pathlib.Path, stage: str) -> bool:
  """Returns whether a stage is done; a damaged marker is none.

  Training sets it aside and finishes such a stage again from its last save.
  """
  return _is_done(stage_directory(workdir, stage))


def load_weights(
  workdir: pathlib.Path, stage: str, name: str
) -> tuple[dict[str, Any], Meta]:
  """Returns the 'best', 'final' or 'ema' variables of `stage`, in NumPy.

  Raises:
    UserError: if there are none.
    DamagedError: if they are not what was saved.
  """
  directory = stage_directory(workdir, stage) / name
  if not directory.is_dir():
    raise errors.UserError(
      f'Stage {stage!r} has no {name} weights.',
      str(directory),
      'Train it first, with this --workdir.',
    )
  steps = integrity.list_finished(directory)
  if not steps:
    raise errors.UserError(
      f'Stage {stage!r} has no {name} weights yet.', str(directory)
    )
  path = directory / str(steps[-1])
  if damage := integrity.find_damage(path):
    raise integrity.DamagedError(
      f'{_label(directory)}: step {steps[-1]} is damaged ({damage}). Use other '
      f'weights, or train the stage anew: remove {_places(directory.parent)}'
    )
  return _read(path)


def _create_checkpointer() -> ocp.AsyncCheckpointer:
  """Returns what reads and writes steps; it must be closed.

  Each process has its own, which waits for no other: one alone writes, and
  when the others may read is decided by us.
  """
  alone: dict[str, Any] = {}
  if jax.process_count() > 1:
    index = jax.process_index()
    alone = {'primary_host': index, 'active_processes': {index}}
  options = ocp.options.MultiprocessingOptions(**alone)
  return ocp.AsyncCheckpointer(
    ocp.CompositeCheckpointHandler(
      composite_options=ocp.CompositeOptions(multiprocessing_options=options),
      tree=ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
      meta=ocp.JsonCheckpointHandler(multiprocessing_options=options),
    ),
    multiprocessing_options=options,
  )


def _read(step: pathlib.Path) -> tuple[Any, Meta]:
  """Returns what was saved, in NumPy, in the shape that it was saved in.

  Orbax takes states of equal leaves for different ones where what holds no
  leaf differs, such as a decay of 0.
  """
  with _create_checkpointer() as reader:
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      _read_shapes(reader, step),
    )
    restored = reader.restore(
      step,
      args=ocp.args.Composite(
        tree=ocp.args.PyTreeRestore(restore_args=as_numpy),
        meta=ocp.args.JsonRestore(),
      ),
    )
  return restored.tree, restored.meta


def _read_shapes(reader: ocp.AsyncCheckpointer, step: pathlib.Path) -> Any:
  """Returns the saved tree with each leaf's shape and dtype."""
  return reader.metadata(step).item_metadata.tree.tree


def _copy_here(tree: Any) -> Any:
  """Returns `tree` with what is on devices of many processes in NumPy.

  Each device has a whole copy. It must not be a view: the next step reuses the
  memory of its state.
  """

  def copy(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return x
    return np.array(x.addressable_data(0))

  return jax.tree.map(copy, tree)


def _place_like(tree: Any, like: Any) -> Any:
  """Returns the leaves of `tree`, in NumPy, as and where those of `like` are.

  Leaves are found by their paths, and devices may be of all processes.
  """
  leaves = _leaves(tree)

  def place(path, like):
    x = leaves[_name(path)]
    return jax.make_array_from_callback(
      like.shape, like.sharding, lambda i: x[i]
    )

  return jax.tree_util.tree_map_with_path(place, like)


def read_latest(
  workdir: pathlib.Path, stage: str
) -> tuple[int, Any, Meta] | None:
  """Returns the number of the newest state, its shapes and its meta, if any."""
  directory = stage_directory(workdir, stage) / 'latest'
  steps = integrity.list_finished(directory)
  if not steps:
    return None
  path = directory / str(steps[-1])
  with _create_checkpointer() as reader:
    meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
    restored = reader.restore(path, args=meta)
    return steps[-1], _read_shapes(reader, path), restored.meta


def check_matches(
  saved: Any,
  like: Any,
  directory: pathlib.Path,
  renewable: Collection[str] = (),
) -> list[str]:
  """Returns the `renewable` fields of a saved state that do not fit `like`.

  Raises:
    UserError: if another one does not.
  """
  found, wanted = _describe_leaves(saved), _describe_leaves(like)
  unfit = [
    path
    for path in sorted({*found, *wanted})
    if found.get(path) != wanted.get(path)
  ]
  for path in unfit:
    if path.split('/')[0] not in renewable:
      raise errors.UserError(
        f'The checkpoint does not fit this config: {path} is '
        f'{found.get(path)} there and {wanted.get(path)} here.',
        str(directory),
        'Use another --workdir, or the config that the run began with.',
      )
  return sorted({path.split('/')[0] for path in unfit})


def _describe_leaves(tree: Any) -> dict[str, str]:
  """Returns 'path': 'dtype[shape]'."""
  return {
    path: f'{np.dtype(x.dtype)}{list(x.shape)}'
    for path, x in _leaves(tree).items()
  }


def _leaves(tree: Any) -> dict[str, Any]:
  """Returns each leaf by its path, paths alike for objects and for dicts."""
  return {
    _name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _name(path: Sequence[Any]) -> str:
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')

"""Saves and loads what a stage has learned, through orbax.

WORKDIR/checkpoints/STAGE/ holds latest/ (everything, to resume), best/ and
final/ (the weights, loadable alone) and done.json, the marker of a finished
stage, written only after its last save has committed.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxprog import errors, files
from jaxprog.training import state as state_lib

Meta = dict[str, Any]


class Checkpoints:
  """The checkpoints of one stage; must be closed.

  Saves run in the background and commit by a rename: whenever the process
  dies, what has been committed is whole.
  """

  def __init__(self, directory: pathlib.Path) -> None:
    self._directory = directory
    self._managers: dict[str, ocp.CheckpointManager] = {}

  def save_latest(self, state: state_lib.TrainState, meta: Meta) -> None:
    """Saves all of `state`, with what `restore_latest` needs beside it.

    The weights that `meta` speaks of are on disk before this one is.
    """
    for name, manager in self._managers.items():
      if name != 'latest':
        manager.wait_until_finished()
    self._save('latest', int(state.step), state, meta)

  def save_weights(
    self, name: str, step: int, variables: dict[str, Any], meta: Meta
  ) -> None:
    """Saves `variables` as the 'best', 'final' or 'ema' ones of the stage."""
    self._save(name, step, variables, meta)

  def restore_latest(
    self, like: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, Meta] | None:
    """Returns the latest state, placed as `like` is, or None if none is there.

    Raises:
      UserError: if a leaf is missing or has another shape or dtype; orbax
        itself would convert or drop it silently.
    """
    manager = self._manager('latest')
    manager.wait_until_finished()
    step = manager.latest_step()
    if step is None:
      return None
    _check_matches(_read_metadata(manager, step), like, manager.directory)
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        tree=ocp.args.PyTreeRestore(
          item=like,
          restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        ),
        meta=ocp.args.JsonRestore(),
      ),
    )
    return restored.tree, restored.meta

  def wait(self) -> None:
    """Waits until every save has committed."""
    for manager in self._managers.values():
      manager.wait_until_finished()

  def mark_done(self, meta: Meta) -> None:
    """Declares the stage finished, once every save has committed."""
    self.wait()
    if jax.process_index() == 0:
      files.write_json(self._directory / 'done.json', meta)

  def close(self) -> None:
    """Waits for saves under way and releases their threads."""
    for manager in self._managers.values():
      manager.close()

  def __enter__(self) -> 'Checkpoints':
    """Returns itself."""
    return self

  def __exit__(self, *exc_info: object) -> None:
    """Closes."""
    self.close()

  def _manager(self, name: str) -> ocp.CheckpointManager:
    if name not in self._managers:
      keep = 2 if name == 'latest' else 1
      self._managers[name] = _create_manager(self._directory / name, keep)
    return self._managers[name]

  def _save(self, name: str, step: int, tree: Any, meta: Meta) -> None:
    manager = self._manager(name)
    # A run that resumed from before `step` trains it again: its result counts.
    stale = [old for old in manager.all_steps() if old >= step]
    if stale:
      manager.wait_until_finished()  # It may still be on its way to the disk.
    for old in stale:
      manager.delete(old)
    manager.save(
      step,
      args=ocp.args.Composite(
        tree=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta)
      ),
      force=True,
    )


def stage_directory(workdir: pathlib.Path, stage: str) -> pathlib.Path:
  """Returns where the checkpoints of `stage` lie."""
  return workdir.resolve() / 'checkpoints' / stage


def read_done(workdir: pathlib.Path, stage: str) -> Meta | None:
  """Returns what `mark_done` wrote, or None for an unfinished stage."""
  path = stage_directory(workdir, stage) / 'done.json'
  return json.loads(path.read_text()) if path.is_file() else None


def load_weights(
  workdir: pathlib.Path, stage: str, name: str
) -> tuple[dict[str, Any], Meta]:
  """Returns the 'best', 'final' or 'ema' variables of `stage`, in NumPy.

  Raises:
    UserError: if there are none.
  """
  directory = stage_directory(workdir, stage) / name
  if not directory.is_dir():
    raise errors.UserError(
      f'Stage {stage!r} has no {name} weights.',
      str(directory),
      'Train it first, with this --workdir.',
    )
  with _create_manager(directory, keep=1) as manager:
    step = manager.latest_step()
    if step is None:
      raise errors.UserError(
        f'Stage {stage!r} has no {name} weights yet.', str(directory)
      )
    restore_args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      _read_metadata(manager, step),
    )
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        tree=ocp.args.PyTreeRestore(restore_args=restore_args),
        meta=ocp.args.JsonRestore(),
      ),
    )
  return restored.tree, restored.meta


def _create_manager(
  directory: pathlib.Path, keep: int
) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.LatestN(n=keep),
      cleanup_tmp_directories=True,
    ),
    item_handlers={
      'tree': ocp.PyTreeCheckpointHandler(),
      'meta': ocp.JsonCheckpointHandler(),
    },
  )


def _read_metadata(manager: ocp.CheckpointManager, step: int) -> Any:
  """Returns the saved tree with each leaf's shape and dtype."""
  return manager.item_metadata(step).tree.tree


def _check_matches(saved: Any, like: Any, directory: Any) -> None:
  found, wanted = _leaves(saved), _leaves(like)
  for path in sorted({*found, *wanted}):
    if found.get(path) != wanted.get(path):
      raise errors.UserError(
        f'The checkpoint does not fit this config: {path} is '
        f'{found.get(path)} there and {wanted.get(path)} here.',
        str(directory),
        'Use another --workdir, or the config that the run began with.',
      )


def _leaves(tree: Any) -> dict[str, str]:
  """Returns 'path': 'dtype[shape]', paths alike for objects and for dicts."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      f'{np.dtype(x.dtype)}{list(x.shape)}'
    )
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }

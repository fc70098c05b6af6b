"""Which trained network teaches a stage, and what it knows."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprog import errors, files
from jaxprog.reliability import checkpoints, peers
from jaxprog.training import distillation
from jaxprog.training import setup as setup_lib
from jaxprog.training.transfer import pretrained

Variables = dict[str, Any]


class _Source(NamedTuple):
  """Weights that teach; `classes` is () where they are not known."""

  variables: Variables
  classes: tuple[str, ...]

  @property
  def digest(self) -> str:
    """What tells these weights from others, 16 hex digits."""
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(self.variables)]
    return files.digest_parts(*self.classes, *leaves)[:16]


def attend(
  workdir: pathlib.Path, task: setup_lib.Task, record: dict[str, Any]
) -> setup_lib.Task:
  """Returns `task` with its teacher on the devices; notes who it is.

  Raises:
    UserError: if it is not the one that the stage began with.
  """
  stage = task.stage
  if not stage.distill_from:
    return task
  source = _load(workdir, task)
  digest = source.digest
  # A shared file system may show one host what another does not see yet.
  named = f'the teacher of {stage.name}'
  peers.compare(f'teacher/{stage.name}', {named: digest})
  _check_same(task, record, digest)
  record['teacher'] = {
    'from': stage.distill_from,
    'digest': digest,
    'classes': len({*source.classes} & {*task.dataset.classes}),
  }
  head = task.teacher['variables']['params']['head']
  teacher = _fit(source, task.dataset.classes, head)
  placed = jax.device_put(teacher, task.shardings.replicated)
  return dataclasses.replace(task, teacher=placed)


def check(
  setup: setup_lib.Setup, task: setup_lib.Task, workdir: pathlib.Path
) -> None:
  """Raises UserError for a teacher that a stage could not learn from."""
  if not task.stage.distill_from:
    return
  where = f'stage {task.stage.name!r}: distill_from={task.stage.distill_from}'
  for wrong, what, suggestion in _mistakes(setup, task, workdir):
    if wrong:
      raise errors.UserError(what, where, suggestion)


def _mistakes(
  setup: setup_lib.Setup, task: setup_lib.Task, workdir: pathlib.Path
) -> Iterator[tuple[bool, str, str]]:
  """Yields (whether it is there, what is wrong, a suggestion)."""
  stage, classes = task.stage, tuple[str, ...]()
  name, weights = stage.teacher_stage
  known = {x.name: x for x in setup.stages}
  yield (
    bool(name) and name not in known,
    f'This config has no stage {name!r}.',
    errors.did_you_mean(name, known),
  )
  called = [x.name for x in setup.chosen]
  before = called[: called.index(stage.name)]
  if name and not checkpoints.is_done(workdir, name):
    yield (
      name not in before,
      f'{name!r} is not trained before this stage.',
      'Name a stage before it, or one that is done in this --workdir.',
    )
    yield (
      weights == 'ema' and not known[name].ema_decay,
      f'{name!r} keeps no averages.',
      f"Set its ema_decay, or write 'stage:{name}'.",
    )
    classes = setup.datasets[name].classes
  else:
    source = _load(workdir, task)
    classes = source.classes
    if found := checkpoints.read_latest(workdir, stage.name):
      _check_same(task, found[2]['record'], source.digest)
  yield (
    stage.distill_weight > 0 and not {*classes} & {*task.dataset.classes},
    'The teacher shares no class with this stage: its logits say nothing.',
    'Set distill_weight to 0 and distill_features above 0.',
  )


def _check_same(
  task: setup_lib.Task, record: dict[str, Any], digest: str
) -> None:
  """Raises UserError if a stage under way began with another teacher."""
  before = record.get('teacher')
  source = task.stage.distill_from
  if before and before['from'] == source and before['digest'] != digest:
    raise errors.UserError(
      'These are not the weights that have taught this stage so far.',
      f'stage {task.stage.name!r}: distill_from={source}',
      'Put them back, or use another --workdir.',
    )


def _load(workdir: pathlib.Path, task: setup_lib.Task) -> _Source:
  stage = task.stage
  name, weights = stage.teacher_stage
  if name:
    variables, meta = checkpoints.load_weights(workdir, name, weights)
    return _Source(variables, tuple(meta['classes']))
  stage = dataclasses.replace(stage, init_from=stage.distill_from)
  # Its network is its own; it sees what the stage's does.
  seen = {k: task.config[k] for k in ('mean_rgb', 'std_rgb')}
  try:
    found = pretrained.load(
      stage, task.teacher['variables'], task.dataset.classes, seen
    )
  except errors.UserError as e:
    where = e.where.replace('init_from', 'distill_from')
    raise errors.UserError(e.what, where, e.suggestion) from None
  return _Source(found.variables, found.classes)


def _fit(
  source: _Source, classes: Sequence[str], head: Variables
) -> distillation.Teacher:
  """Returns a teacher whose head has `classes`: what it knows is moved there.

  By name, whatever the order; the rest of it is zeros. `head` has its shapes.
  """
  params = source.variables['params']
  places = {name: i for i, name in enumerate(source.classes)}
  known = np.array([name in places for name in classes])
  rows = [places[name] for name in classes if name in places]
  moved = {name: np.zeros(x.shape, x.dtype) for name, x in head.items()}
  for name, x in params.get('head', {}).items():
    moved[name][..., known] = np.asarray(x)[..., rows]
  variables = {**source.variables, 'params': {**params, 'head': moved}}
  return {'variables': variables, 'known': known}

"""Scores saved weights on a stage's evaluation images."""

import pathlib
from typing import Any

import jax
from ml_collections import config_dict

from jaxprog import errors, stages
from jaxprog.training import checkpoints, loop
from jaxprog.training import setup as setup_lib


def evaluate(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
) -> dict[str, Any]:
  """Returns stage, weights, count, loss, top1 and top5, accuracies in [0, 1].

  Every evaluation image counts once. The default stage is the last one that
  `workdir` has finished.

  Raises:
    UserError: if there are no such weights, or their classes are not the
      dataset's.
  """
  workdir = pathlib.Path(workdir)
  if weights not in ('best', 'final', 'ema'):
    raise errors.UserError(
      f'Unknown weights {weights!r}.', '--weights', 'Use best, final or ema.'
    )
  name = stage or last_done_stage(config, workdir)
  stages.select(stages.create_stages(config), only=(name,))
  variables, meta = checkpoints.load_weights(workdir, name, weights)
  setup = setup_lib.create_setup(config, only=(name,), training=False)
  task = setup_lib.create_task(setup, setup.chosen[0])
  if tuple(meta['classes']) != task.dataset.classes:
    raise errors.UserError(
      'The weights know other classes than the dataset has.',
      f'stage {name!r}',
      'Evaluate on the data that the stage was trained on.',
    )
  variables = jax.device_put(variables, setup.shardings.replicated)
  return {
    'stage': name,
    'weights': weights,
    'count': len(task.dataset.eval),
    **loop.evaluate(task, variables, task.dataset.eval),
  }


def last_done_stage(
  config: config_dict.ConfigDict, workdir: pathlib.Path
) -> str:
  """Returns the last stage of `config` that `workdir` has finished."""
  for stage in reversed(stages.create_stages(config)):
    if checkpoints.read_done(workdir, stage.name) is not None:
      return stage.name
  raise errors.UserError(
    'No stage of this workdir is finished yet.',
    f'--workdir={workdir}',
    'Train first, or name another --workdir.',
  )

"""The learning-rate range test (Smith 2017, arXiv:1506.01186)."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from jaxprog import errors, files, paths, stages
from jaxprog.monitoring import activity
from jaxprog.reliability import copies
from jaxprog.reporting import plots
from jaxprog.training import compile_times, preflight
from jaxprog.training import feed as feed_lib
from jaxprog.training import setup as setup_lib
from jaxprog.training.transfer import handover, teacher

# The test ends when the smoothed loss is this much above its least.
_DIVERGED = 4.0
_SMOOTHING = 0.9
# What it compiles of a task.
_STEP = 'first step'


@copies.in_bucket()
def lr_find(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
) -> dict[str, Any]:
  """Returns stage, rates, losses, smoothed losses and suggestion.

  Trains `stage` (by default the config's first) for config.lr_find_steps
  steps at rates that rise geometrically from lr_find_min to lr_find_max, from
  the weights it would begin with, and forgets them: a later run is not
  changed. Writes WORKDIR/lr_find/STAGE.json and .png. The suggestion is the
  steepest of `suggestions`, None where the loss never fell.

  Raises:
    UserError: for mistakes in the config or the data, or without a loss.
  """
  workdir = paths.workdir(workdir)
  known = [x.name for x in stages.create_stages(config)]
  stage = stage or known[0]
  if stage not in known:
    raise errors.UserError(
      f'This config has no stage {stage!r}.',
      f'--stage={stage}',
      errors.did_you_mean(stage, known),
    )
  preflight.check_workdir(workdir)
  with activity.doing('opening data'):
    setup = setup_lib.create_setup(config, only=(stage,))
  num_steps = config.lr_find_steps
  ratio = math.log(config.lr_find_max / config.lr_find_min) / (num_steps - 1)
  rates = config.lr_find_min * np.exp(ratio * np.arange(num_steps))
  losses = _run(setup, workdir, rates.astype(np.float32))
  if not math.isfinite(losses[0]):
    raise errors.UserError(
      f'The loss of {stage} is {losses[0]} before any rate was tried.',
      f'--stage={stage}',
      'Look at its images, and at the weights that it begins with.',
    )
  rates = rates[: len(losses)]
  smooth = smoothed(losses)
  suggestions = suggest(rates, smooth)
  result = {
    'stage': stage,
    'suggestion': suggestions.get('steepest'),
    'suggestions': suggestions,
    'rates': rates.tolist(),
    'losses': losses,
    'smooth': smooth,
  }
  if jax.process_index() == 0:
    path = workdir / 'lr_find' / f'{stage}.json'
    files.write_json(path, result)
    plots.plot_lr_find(result, path.with_suffix('.png'))
  return result


def _run(
  setup: setup_lib.Setup, workdir: pathlib.Path, rates: np.ndarray
) -> list[float]:
  """Returns the loss of each step, up to where it diverges."""
  stage = setup.chosen[0]
  steps = setup.steps[stage.name]
  # One batch size and the whole network, whatever the stage does later.
  steps = dataclasses.replace(
    steps, total=len(rates), phases=steps.phases[:1], frozen=0
  )
  task = setup_lib.create_task(
    dataclasses.replace(setup, steps={stage.name: steps}),
    stage,
    lambda step, numbers=None: jax.numpy.asarray(rates)[step],
  )
  with activity.doing(f'starting {stage.name}'):
    variables, _ = handover.hand_over(setup, workdir, task)
    task = teacher.attend(workdir, task, {})
    state = task.create_state(
      jax.device_put(variables, task.shardings.replicated)
    )
  took = compile_times.last(task, _STEP)
  with (
    activity.doing(f'compiling {stage.name}', last=took),
    compile_times.noted(task, _STEP),
  ):
    program = task.program(0)
    train_step = task.trace_train_step(program).lower().compile()
  losses: list[float] = []
  with (
    contextlib.closing(feed_lib.Feed(task, task.seed, 0)) as feed,
    activity.doing(f'trying rates on {stage.name}') as show,
  ):
    for rate in rates:
      batch = feed.next()
      state, metrics = train_step(state, batch, *task.arguments(program))
      losses.append(float(metrics['loss']))
      show(len(losses), len(rates), f'{rate:.1e}')
      smooth = smoothed(losses)
      if not smooth[-1] < _DIVERGED * min(smooth):
        break
  return losses


def smoothed(losses: Sequence[float]) -> list[float]:
  """Returns the debiased exponential moving average of `losses`."""
  average, found = 0.0, []
  for i, loss in enumerate(losses):
    average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
    found.append(average / (1 - _SMOOTHING ** (i + 1)))
  return found


def suggest(
  rates: Sequence[float], smooth: Sequence[float]
) -> dict[str, float]:
  """Returns rates by the rule that suggests them; none where no loss fell.

  `steepest`: where the loss falls fastest, over the log of rates. `valley`:
  half way down in steps, from where the loss last was highest to its minimum.
  `minimum/10`: a tenth of the rate of the lowest loss. Only what comes before
  that counts, and the first tenth of the steps does not: their average has seen
  too little.
  """
  finite = np.array([x if math.isfinite(x) else np.inf for x in smooth])
  begin, lowest = len(rates) // 10, int(np.argmin(finite))
  if lowest - begin < 2:
    return {}
  slopes = np.gradient(finite[: lowest + 1], np.log(rates[: lowest + 1]))
  steepest = begin + int(np.argmin(slopes[begin:]))
  if slopes[steepest] >= 0:
    return {}
  highest = lowest - int(np.argmax(finite[begin : lowest + 1][::-1]))
  return {
    'valley': float(rates[(highest + lowest) // 2]),
    'steepest': float(rates[steepest]),
    'minimum/10': float(rates[lowest]) / 10,
  }

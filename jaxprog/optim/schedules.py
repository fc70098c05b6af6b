"""Learning rates: factories that return a pure function of the step.

Falling curves are written in the steps that remain, a whole number: 1 + cos(x)
near x = pi has no correct digit left in float32, sin(pi - x) has them all.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprog import epochs, stages
from jaxprog.optim import arguments

# What a schedule reads beside the step: f32, int32 or arrays of it.
Numbers = Mapping[str, Any]
# Of steps since the warmup, the part of the peak; both f32 or int32, any shape.
Decay = Callable[[jax.Array, Numbers], jax.Array]


def create_learning_rate_fn(
  stage: stages.Stage, steps: epochs.Steps
) -> Callable[..., jax.Array]:
  """Returns the learning rate, f32, as a function of the step in one stage.

  Rises linearly from 0 over `steps.warmup` steps, is at the stage's peak
  there, and falls until `steps.total`. one_cycle rises its own way and cosine
  not at all; constant, plateau and step do not end at `steps.total`.

  Within a compiled step, its second argument is what `read_numbers` says.
  """
  own = read_numbers(stage, steps)
  rate_fn: Decay = _one_cycle
  if stage.schedule != 'one_cycle':
    rate_fn = _warm_up(_create_decay(stage, steps))

  def learning_rate_fn(step, numbers=own):
    return rate_fn(jnp.asarray(step), numbers)

  return learning_rate_fn


def read_numbers(stage: stages.Stage, steps: epochs.Steps) -> Numbers:
  """Returns what the rate is computed of; lengths are steps.

  What begins with `per_` is 1 over something.
  """
  peak, end = stage.peak_learning_rate, stage.end_factor
  if stage.schedule == 'one_cycle':
    return _read_one_cycle(stage, steps.total)
  warmup = 0 if stage.schedule == 'cosine' else steps.warmup
  num = max(steps.total - warmup, 1)
  starts = np.array((warmup, *steps.restarts), np.int32) - warmup
  return {
    'peak': peak,
    'warmup': warmup,
    'per_warmup': arguments.inverse(max(warmup, 1)),
    'num': num,
    'per_num': arguments.inverse(num),
    'end': end,
    'fall': 1 - end,
    'log_end': float(np.log(end)) if end else 0.0,
    'starts': starts,
    'lengths': np.diff(starts),
    'milestones': np.array(steps.milestones, np.int32) - warmup,
    'step_factor': stage.step_factor,
  }


def _warm_up(decay: Decay) -> Decay:
  """Returns the rate of a step, of all numbers."""

  def rate_fn(step, n):
    rising = step.astype(jnp.float32) * n['per_warmup']
    falling = decay(step - n['warmup'], n)
    return n['peak'] * jnp.where(step < n['warmup'], rising, falling)

  return rate_fn


def _create_decay(stage: stages.Stage, steps: epochs.Steps) -> Decay:
  """Returns what follows the warmup, 1 at its first step."""

  def remaining(step, n):
    return _remaining(step, n['num'], n['per_num'])

  match stage.schedule:
    case 'constant' | 'plateau':
      # The plateau's scale depends on evaluations; the step applies it.
      return lambda step, n: jnp.ones(step.shape, jnp.float32)
    case 'cosine' | 'cosine_warmup' if steps.restarts:
      return _warm_restarts
    case 'cosine' | 'cosine_warmup':
      return lambda step, n: _half_cosine(
        n['end'], n['fall'], remaining(step, n)
      )
    case 'exponential_warmup':
      return lambda step, n: jnp.exp(n['log_end'] * (1 - remaining(step, n)))
    case 'linear':
      return lambda step, n: n['end'] + n['fall'] * remaining(step, n)
    case 'polynomial':
      # A constant, because what is squared is no power to XLA.
      return lambda step, n: (
        n['end'] + n['fall'] * remaining(step, n) ** stage.power
      )
    case 'step':
      return lambda step, n: (
        jnp.asarray(n['step_factor'], jnp.float32)
        ** _count_passed(step, n['milestones'])
      )
    case _:
      raise ValueError(f'Unknown schedule: {stage.schedule!r}.')


def _one_cycle(step: jax.Array, n: Numbers) -> jax.Array:
  """Returns a rate of the 1cycle policy (Smith & Topin 2017, 1708.07120).

  A half cosine from peak / div_factor up to the peak, then one down to
  peak / div_factor / final_div_factor, reached at step total_steps - 1, as in
  PyTorch's OneCycleLR. optax's own starts at the peak in very short stages;
  here two steps or more always rise first.
  """
  part = jnp.clip(step.astype(jnp.float32) * n['per_up'], 0, 1)
  rising = _half_cosine(n['first'], n['rise'], part)
  part = _remaining(step, n['last'], n['per_down'])
  falling = _half_cosine(n['final'], n['fall'], part)
  return jnp.where(step < n['up'], rising, falling)


def _read_one_cycle(stage: stages.Stage, total_steps: int) -> Numbers:
  peak, last = stage.peak_learning_rate, total_steps - 1
  up = max(stage.warmup_fraction * total_steps - 1, min(1.0, last / 2))
  last = max(last, 1)  # A stage of one step has only the peak.
  first = peak / stage.div_factor
  final = first / stage.final_div_factor
  return {
    'last': last,
    'up': up,
    'per_up': arguments.inverse(max(up, 1e-9)),
    'per_down': arguments.inverse(max(last - up, 1e-9)),
    'first': first,
    'rise': peak - first,
    'final': final,
    'fall': peak - final,
  }


def _warm_restarts(step: jax.Array, n: Numbers) -> jax.Array:
  """Returns SGDR's cosines (Loshchilov & Hutter 2017, arXiv:1608.03983).

  Periods begin at 'starts' and fall from 1 to 'end' each; the stage may cut the
  last one short. Every one begins exactly at its peak; where they are whole
  steps and the batch stays, this is PyTorch's CosineAnnealingWarmRestarts.
  """
  starts = jnp.asarray(n['starts'])
  period = _count_passed(step, starts[1:-1])
  length = jnp.asarray(n['lengths'])[period]
  left = (length - (step - starts[period])).astype(jnp.float32)
  return _half_cosine(n['end'], n['fall'], jnp.clip(left / length, 0.0, 1.0))


def _count_passed(step: jax.Array, bounds: Any) -> jax.Array:
  """Returns how many of the ascending `bounds` are at most `step`, int32."""
  return jnp.sum(step[..., None] >= bounds, axis=-1, dtype=jnp.int32)


def _remaining(step, num, per_num):
  """Returns (num - step) * per_num, f32, from 1 to 0."""
  return jnp.clip((num - step).astype(jnp.float32) * per_num, 0.0, 1.0)


def _half_cosine(low, rise, part):
  """Returns `low` at part 0 and `rise` more at part 1, level at both."""
  return low + rise * jnp.sin(jnp.pi / 2 * part) ** 2

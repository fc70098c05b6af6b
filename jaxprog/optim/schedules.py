"""Learning rates: factories that return a pure function of the step.

Falling curves are written in the steps that remain, a whole number: 1 + cos(x)
near x = pi has no correct digit left in float32, sin(pi - x) has them all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprog import epochs, stages

# Of steps since the warmup, the part of the peak; both f32 or int32, any shape.
Decay = Callable[[jax.Array], jax.Array]


def create_learning_rate_fn(
  stage: stages.Stage, steps: epochs.Steps
) -> optax.Schedule:
  """Returns the learning rate, f32, as a function of the step in one stage.

  Rises linearly from 0 over `steps.warmup` steps, is at the stage's peak
  there, and falls until `steps.total`. one_cycle rises its own way and cosine
  not at all; constant, plateau and step do not end at `steps.total`.
  """
  peak = stage.peak_learning_rate
  if stage.schedule == 'one_cycle':
    return _one_cycle(stage, steps.total)
  warmup = 0 if stage.schedule == 'cosine' else steps.warmup
  decay = _create_decay(stage, steps, warmup)

  def learning_rate_fn(step):
    step = jnp.asarray(step)
    rising = step.astype(jnp.float32) / max(warmup, 1)
    return peak * jnp.where(step < warmup, rising, decay(step - warmup))

  return learning_rate_fn


def _create_decay(
  stage: stages.Stage, steps: epochs.Steps, warmup: int
) -> Decay:
  """Returns what follows the warmup, 1 at its first step."""
  end, num = stage.end_factor, steps.total - warmup
  match stage.schedule:
    case 'constant' | 'plateau':
      # The plateau's scale depends on evaluations; the step applies it.
      return lambda step: jnp.ones(step.shape, jnp.float32)
    case 'cosine' | 'cosine_warmup' if steps.restarts:
      return _warm_restarts(end, (warmup, *steps.restarts))
    case 'cosine' | 'cosine_warmup':
      return lambda step: _half_cosine(end, 1.0, _remaining(step, num))
    case 'exponential_warmup':
      log_end = np.log(end)
      return lambda step: jnp.exp(log_end * (1 - _remaining(step, num)))
    case 'linear':
      return lambda step: end + (1 - end) * _remaining(step, num)
    case 'polynomial':
      return lambda step: end + (1 - end) * _remaining(step, num) ** stage.power
    case 'step':
      milestones = np.array(steps.milestones, np.int32) - warmup
      return lambda step: (
        jnp.float32(stage.step_factor) ** _count_passed(step, milestones)
      )
    case _:
      raise ValueError(f'Unknown schedule: {stage.schedule!r}.')


def _one_cycle(stage: stages.Stage, total_steps: int) -> optax.Schedule:
  """Returns the 1cycle policy (Smith & Topin 2017, arXiv:1708.07120).

  A half cosine from peak / div_factor up to the peak, then one down to
  peak / div_factor / final_div_factor, reached at step total_steps - 1, as in
  PyTorch's OneCycleLR. optax's own starts at the peak in very short stages;
  here two steps or more always rise first.
  """
  peak, last = stage.peak_learning_rate, total_steps - 1
  up = max(stage.warmup_fraction * total_steps - 1, min(1.0, last / 2))
  first = peak / stage.div_factor
  final = first / stage.final_div_factor

  def learning_rate_fn(step):
    step = jnp.asarray(step)
    rising = _half_cosine(
      first, peak, jnp.clip(step.astype(jnp.float32) / max(up, 1e-9), 0, 1)
    )
    # A stage of one step has only the peak.
    falling = _half_cosine(
      final, peak, _remaining(step, last, last - up) if last > up else 1.0
    )
    return jnp.where(step < up, rising, falling)

  return learning_rate_fn


def _warm_restarts(end: float, bounds: tuple[int, ...]) -> Decay:
  """Returns SGDR's cosines (Loshchilov & Hutter 2017, arXiv:1608.03983).

  Periods lie between two of `bounds` and fall from 1 to `end` each; the stage
  may cut the last one short. Every one begins exactly at its peak; where they
  are whole steps and the batch stays, this is PyTorch's
  CosineAnnealingWarmRestarts.
  """
  starts = np.array(bounds, np.int32) - bounds[0]

  def decay(step):
    period = _count_passed(step, starts[1:-1])
    length = jnp.asarray(np.diff(starts))[period]
    return _half_cosine(
      end, 1.0, _remaining(step - jnp.asarray(starts)[period], length)
    )

  return decay


def _count_passed(step: jax.Array, bounds: np.ndarray) -> jax.Array:
  """Returns how many of the ascending `bounds` are at most `step`, int32."""
  return jnp.sum(step[..., None] >= bounds, axis=-1, dtype=jnp.int32)


def _remaining(step, num, length=None):
  """Returns (num - step) / length, f32, from 1 to 0; `length` is `num`."""
  left = (num - step).astype(jnp.float32)
  return jnp.clip(left / (num if length is None else length), 0.0, 1.0)


def _half_cosine(low, high, part):
  """Returns `low` at part 0 and `high` at part 1, level at both."""
  return low + (high - low) * jnp.sin(jnp.pi / 2 * part) ** 2

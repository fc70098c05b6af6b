"""Learning rates: factories that return a pure function of the step."""

import jax.numpy as jnp
import optax

from jaxprog import stages


def create_learning_rate_fn(
  stage: stages.Stage, steps: stages.Steps
) -> optax.Schedule:
  """Returns the learning rate as a function of the step within one stage.

  Rises linearly from 0 over `steps.warmup` steps (one_cycle rises its own
  way), is at `stage.learning_rate` there, and falls until `steps.total`.
  """
  peak, end = stage.learning_rate, stage.learning_rate * stage.end_factor
  decay_steps = steps.total - steps.warmup
  match stage.schedule:
    case 'one_cycle':
      return one_cycle(
        peak,
        steps.total,
        stage.warmup_fraction,
        stage.div_factor,
        stage.final_div_factor,
      )
    case 'cosine' | 'cosine_warmup':
      decay = optax.cosine_decay_schedule(peak, decay_steps, stage.end_factor)
    case 'polynomial':
      decay = optax.polynomial_schedule(peak, end, stage.power, decay_steps)
    case 'exponential_warmup':
      decay = optax.exponential_decay(peak, decay_steps, stage.end_factor)
    case _:
      raise ValueError(f'Unknown schedule: {stage.schedule!r}.')
  if steps.warmup == 0:
    return decay
  warmup = optax.linear_schedule(0.0, peak, steps.warmup)
  return optax.join_schedules([warmup, decay], [steps.warmup])


def one_cycle(
  peak: float,
  total_steps: int,
  warmup_fraction: float,
  div_factor: float,
  final_div_factor: float,
) -> optax.Schedule:
  """Returns the 1cycle policy (Smith & Topin 2017, arXiv:1708.07120).

  A half cosine from peak / div_factor up to `peak`, then one down to
  peak / div_factor / final_div_factor, reached at step total_steps - 1, as in
  PyTorch's OneCycleLR. optax's own starts at the peak in very short stages;
  here two steps or more always rise first.
  """
  last = total_steps - 1
  up = max(warmup_fraction * total_steps - 1, min(1.0, last / 2))
  first = peak / div_factor
  final = first / final_div_factor

  def learning_rate_fn(step):
    rising = _half_cosine(first, peak, step / max(up, 1e-9))
    falling = _half_cosine(peak, final, (step - up) / max(last - up, 1e-9))
    return jnp.where(step < up, rising, falling)

  return learning_rate_fn


def _half_cosine(start: float, end: float, fraction):
  fraction = jnp.clip(fraction, 0.0, 1.0)
  return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))

"""Everything a stage's training has learned or counted, as one pytree."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxprog.optim import optimizers

METRICS = ('count', 'loss', 'top1', 'grad_norm', 'steps', 'skipped')


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds; `step` and `opt_state` restart each stage.

  `metrics` are the sums of the open epoch, so that an epoch that was
  interrupted ends with the same figures as one that was not. `rate_scale` is
  what the plateau schedule has lowered the rate to, as a part. `ema` are the
  averaged variables, {} where the stage has none. `params` may hold what only
  training needs; `variables` have none of that.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  metrics: dict[str, jax.Array]
  rate_scale: jax.Array
  ema: dict[str, Any]

  @property
  def variables(self) -> dict[str, Any]:
    """What the model is applied to."""
    params = without_projection(self.params)
    return {'params': params, 'batch_stats': self.batch_stats}


def without_projection(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters of the network alone."""
  return {k: v for k, v in params.items() if k != optimizers.PROJECTION}


def init_variables(
  model: nn.Module, image_size: int, rng: jax.Array
) -> dict[str, Any]:
  """Returns fresh `params` and `batch_stats`."""
  images = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
  variables = model.init(rng, images, train=False)
  return {
    'params': variables['params'],
    'batch_stats': variables.get('batch_stats', {}),
  }


def create_state(
  variables: dict[str, Any],
  tx: optax.GradientTransformation,
  *,
  ema: bool = False,
  projection: Callable[[Any], dict[str, Any]] = lambda variables: {},
) -> TrainState:
  """Returns the state of a stage that starts from `variables`.

  `projection` draws what leads from its features to those of a teacher.
  """
  params = {**variables['params'], **projection(variables)}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables['batch_stats'],
    opt_state=tx.init(params),
    metrics=zero_metrics(),
    rate_scale=jnp.ones((), jnp.float32),
    # A copy: two leaves of a donated state may not share memory.
    ema=jax.tree.map(jnp.copy, variables) if ema else {},
  )


def zero_metrics() -> dict[str, jax.Array]:
  """Returns the sums of an epoch that has not begun."""
  return {name: jnp.zeros((), jnp.float32) for name in METRICS}


def count_params(params: Any) -> int:
  """Returns how many numbers `params` holds."""
  return sum(x.size for x in jax.tree.leaves(params))

"""Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) in groups."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import ad_checkpoint, lax

# Names what a policy of jax.checkpoint may keep.
STATISTICS = 'batch_norm_statistics'


class BatchNorm(nn.Module):
  """Flax's BatchNorm, but that parts of a batch may be normalised alone.

  A batch is cut into `groups` of neighbouring examples. Where it is divided
  among as many devices, each normalises what it has and needs nothing of the
  others, forward or backward. Parameters and running statistics have Flax's
  names, and there is one copy of them: the statistics follow the mean over the
  groups of each group's mean and (biased) variance.
  """

  use_running_average: bool
  groups: int = 1
  momentum: float = 0.99
  epsilon: float = 1e-5
  dtype: Any = None
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x):
    """Returns (N, ..., C), normalised; `groups` must divide N."""
    features = x.shape[-1:]
    ra_mean = self.variable('batch_stats', 'mean', jnp.zeros, features)
    ra_var = self.variable('batch_stats', 'var', jnp.ones, features)
    y = x
    if self.use_running_average:
      mean, var = ra_mean.value, ra_var.value
    else:
      if self.groups > 1:
        y = x.reshape(self.groups, -1, *x.shape[1:])
      mean, var = _measure(y, self.groups)
      if not self.is_initializing():
        self._follow(ra_mean, mean)
        self._follow(ra_var, var)
    axes = tuple(range(mean.ndim - 1, y.ndim - 1))
    mean, var = jnp.expand_dims(mean, axes), jnp.expand_dims(var, axes)
    last = (*(1 for _ in y.shape[1:]), *features)
    y = y - mean
    scale = self.param('scale', self.scale_init, features)
    y = y * (lax.rsqrt(var + self.epsilon) * scale.reshape(last))
    y = y + self.param('bias', self.bias_init, features).reshape(last)
    return y.reshape(x.shape).astype(self.dtype or x.dtype)

  def _follow(self, average: nn.Variable, new: jax.Array) -> None:
    if self.groups > 1:
      new = jnp.mean(new, axis=0)
    old = average.value
    average.value = self.momentum * old + (1 - self.momentum) * new


def _measure(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """Returns mean and variance in f32 at least: (C,) or (groups, C).

  Both from one pass over `x`. Rounding may take the variance below 0. Where
  activations are computed again, the named are kept: they are small, and
  devices would have to meet for them again.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  axes = tuple(range(min(groups - 1, 1), x.ndim - 1))
  mean, mean_of_squares = (
    ad_checkpoint.checkpoint_name(jnp.mean(y, axes), STATISTICS)
    for y in (x, lax.square(x))
  )
  return mean, jnp.maximum(0.0, mean_of_squares - lax.square(mean))

"""Networks with weights that nobody trained, statistics included."""

import functools

import jax
import numpy as np

from jaxprog.models import resnet
from jaxprog.training import state


def shapes(name='resnet10', num_classes=3, **kwargs):
  """Returns the shapes of the variables of `name`, by default a tiny one."""
  small = {'num_filters': 4, 'stem_kernel': 3, 'image_size': 32}
  model = resnet.create_model(
    name, num_classes=num_classes, **{**small, **kwargs}
  )
  init = functools.partial(state.init_variables, model, 32)
  return jax.eval_shape(init, jax.random.key(0))


def draw(like, seed=0):
  """Returns random variables of these shapes, none of them 0 or 1.

  Logits are of the order of 1, in deep networks too.
  """
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    name = path[-1].key
    if name == 'kernel':
      scale = np.sqrt(2 / np.prod(x.shape[:-1]))
      return rng.normal(0, scale, x.shape).astype(np.float32)
    if name in ('scale', 'var'):
      low = 0.25 if name == 'scale' else 0.5
      return rng.uniform(low, 3 * low, x.shape).astype(np.float32)
    return rng.normal(0, 0.1, x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, like)


def assert_same_bits(a, b):
  """Asserts that two trees have the same leaves, bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

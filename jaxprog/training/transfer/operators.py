"""What may be done to weights on their way to the next stage.

Pure functions of pytrees; `handover` says in which order they are used.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprog.stages import Stage

Params = dict[str, Any]
Variables = dict[str, Any]


def shrink_and_perturb(
  params: Params, fresh: Params, *, shrink: float, perturb: float
) -> Params:
  """Returns shrink * params + perturb * fresh, leaf by leaf.

  Ash & Adams 2020 (arXiv:1910.08475), section 4, with freshly initialised
  weights as the noise, so that its scale suits each layer: `perturb` counts
  in standard deviations of the initialisation. A norm's scale is pulled
  towards its first value in the same way.
  """
  return jax.tree.map(
    lambda x, noise: shrink * x + perturb * noise, params, fresh
  )


def dash(params: Params, grads: Params, *, least: float) -> Params:
  """Returns kernels, each shrunk the more the less it is still learning.

  Direction-aware shrinking (Shin et al. 2024, arXiv:2410.23495): a filter is
  multiplied with the cosine between itself and the negative gradient, or with
  `least` where that is more. A filter is what leads from one channel to
  another; of dense layers and 1x1 convolutions, where that is one number,
  what leads to one unit. All other leaves stay as they are.

  Args:
    params: kernels of shape (..., in, out).
    grads: of the loss, the same shapes.
    least: smallest factor, in [0, 1].
  """

  def shrink(path, weight, grad):
    if path[-1].key != 'kernel':
      return weight
    spatial = tuple(range(weight.ndim - 2))
    single = all(weight.shape[axis] == 1 for axis in spatial)
    axes = (*spatial, weight.ndim - 2) if single else spatial
    cosine = _cosine(weight, -grad, axes)
    return weight * jnp.clip(cosine, least, 1.0)

  return jax.tree_util.tree_map_with_path(shrink, params, grads)


def _cosine(a: jax.Array, b: jax.Array, axes: Sequence[int]) -> jax.Array:
  """Returns the cosine over `axes`, kept; 0 where a length is 0."""

  def total(x):
    return jnp.sum(x, axis=tuple(axes), keepdims=True)

  lengths = jnp.sqrt(total(a * a)) * jnp.sqrt(total(b * b))
  return jnp.where(
    lengths > 0, total(a * b) / jnp.where(lengths, lengths, 1), 0
  )


class Operator(NamedTuple):
  """What becomes of the parameters that a stage carries over."""

  # How a record names it; {0} is the stage.
  title: str
  # change(stage, params, fresh, grads) -> params, pure; leaf by leaf: what it
  # makes of a head that is not carried is dropped.
  change: Callable[[Stage, Params, Params, Params], Params]
  # Whether it looks at `fresh` weights of the whole network, else only those
  # of the head are drawn, and at `grads`, the mean gradient over the stage's
  # transfer_batches, which cost a forward and a backward pass each.
  needs_fresh: bool = False
  needs_gradient: bool = False


def _keep(stage: Stage, params: Params, fresh: Params, grads: Params) -> Params:
  del stage, fresh, grads
  return params


# By their names in config.transfer.
OPERATORS = {
  # Nothing is carried over.
  'none': Operator('none', _keep, needs_fresh=True),
  'plain': Operator('plain', _keep),
  'shrink_and_perturb': Operator(
    'shrink_and_perturb({0.shrink:g}, {0.perturb:g})',
    lambda stage, params, fresh, grads: shrink_and_perturb(
      params, fresh, shrink=stage.shrink, perturb=stage.perturb
    ),
    needs_fresh=True,
  ),
  'dash': Operator(
    'dash({0.dash_least:g}, {0.transfer_batches} batches)',
    lambda stage, params, fresh, grads: dash(
      params, grads, least=stage.dash_least
    ),
    needs_gradient=True,
  ),
}


def reset_blocks(
  variables: Variables, fresh: Variables, count: int
) -> tuple[Variables, tuple[str, ...]]:
  """Returns `variables` with the last `count` blocks of `fresh`, and names.

  Parameters and statistics alike. Blocks are the modules block{I}_{J}, in the
  order of the network; `handover.check` has counted them.
  """
  blocks = list_blocks(variables['params'])
  names = tuple(blocks[len(blocks) - count :])
  return {
    collection: {
      name: fresh[collection][name] if name in names else module
      for name, module in modules.items()
    }
    for collection, modules in variables.items()
  }, names


def list_blocks(params: Params) -> list[str]:
  """Returns the names of the residual blocks, the first one first."""
  found = (re.fullmatch(r'block(\d+)_(\d+)', name) for name in params)
  blocks = (x for x in found if x)
  return [x[0] for x in sorted(blocks, key=lambda x: (int(x[1]), int(x[2])))]


class Head(NamedTuple):
  """A classifier that an earlier stage has left: kernel (features, classes)."""

  stage: str
  classes: Sequence[str]
  params: Mapping[str, Any]


def carry_head_rows(
  fresh: Mapping[str, Any], classes: Sequence[str], heads: Sequence[Head]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
  """Returns a head that knows what earlier stages knew, and whose rows.

  The row of each class (a column of the kernel, and its bias) comes from the
  first of `heads` that has the class, else from `fresh`. Rows are found by
  name, whatever the order. Trained rows dwarf fresh ones and would win every
  comparison: those of a head are multiplied with one number that makes their
  mean norm that of the fresh rows, unless no row is fresh.

  Returns:
    The head, and a map of a stage's name to the classes that it gave.
  """
  kernel, bias = np.array(fresh['kernel']), np.array(fresh['bias'])
  given: dict[str, list[str]] = {}
  first = {name: head for head in reversed(heads) for name in head.classes}
  taken = {name: first.get(name) for name in classes}
  norm = np.linalg.norm(kernel, axis=0).mean()
  some_are_fresh = None in taken.values()
  for head in heads:
    ours = [i for i, name in enumerate(classes) if taken[name] is head]
    if not ours:
      continue
    places = {name: i for i, name in enumerate(head.classes)}
    theirs = [places[classes[i]] for i in ours]
    rows = np.asarray(head.params['kernel'])[:, theirs]
    scale = np.float32(1)
    if some_are_fresh:
      scale = norm / np.linalg.norm(rows, axis=0).mean()
    kernel[:, ours] = rows * scale
    bias[ours] = np.asarray(head.params['bias'])[theirs] * scale
    given[head.stage] = [classes[i] for i in ours]
  return {'kernel': kernel, 'bias': bias}, given


def average_statistics(statistics: Sequence[Any]) -> Any:
  """Returns what BatchNorm's statistics of single batches come to together.

  Means are averaged; to the mean of the variances comes the variance of the
  means, as in the statistics of all images at once.

  Args:
    statistics: batch_stats of equally large batches.
  """

  def is_layer(x):
    return isinstance(x, Mapping) and 'mean' in x

  def join(*layers):
    means = jnp.stack([x['mean'] for x in layers])
    variances = jnp.stack([x['var'] for x in layers])
    return {
      'mean': means.mean(axis=0),
      'var': variances.mean(axis=0) + means.var(axis=0),
    }

  return jax.tree.map(join, *statistics, is_leaf=is_layer)

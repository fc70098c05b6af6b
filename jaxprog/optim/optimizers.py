"""Optimizers: factories that return optax gradient transformations."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprog import stages


def create_optimizer(
  stage: stages.Stage, learning_rate_fn: optax.Schedule
) -> optax.GradientTransformation:
  """Returns clipping, the optimizer of `stage` and its weight decay.

  AdamW decouples the decay (Loshchilov & Hutter 2019, arXiv:1711.05101): each
  step takes learning_rate * weight_decay of a kernel. SGD couples it, as
  PyTorch does: the decay is part of the gradient and of the momentum.
  """
  match stage.optimizer:
    case 'adamw':
      update = optax.adamw(
        learning_rate_fn,
        b1=stage.b1,
        b2=stage.b2,
        eps=stage.eps,
        weight_decay=stage.weight_decay,
        mask=weight_decay_mask,
      )
    case 'sgd_momentum':
      update = optax.chain(
        optax.add_decayed_weights(stage.weight_decay, mask=weight_decay_mask),
        optax.sgd(learning_rate_fn, stage.momentum, stage.nesterov),
      )
    case _:
      raise ValueError(f'Unknown optimizer: {stage.optimizer!r}.')
  if not stage.gradient_clipping:
    return update
  return optax.chain(optax.clip_by_global_norm(stage.gradient_clipping), update)


def weight_decay_mask(params: Any) -> Any:
  """Returns True for kernels, False for biases and BatchNorm's scales."""
  return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)

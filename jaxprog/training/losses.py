"""What training lowers, of logits in f32."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprog import stages

# By name; floats, or arguments of a compiled step.
Numbers = Mapping[str, Any]
# Of logits and targets, f32 (N, classes), and numbers: each example's loss,
# (N,).
LossFn = Callable[[jax.Array, jax.Array, Numbers], jax.Array]


def read_numbers(stage: stages.Stage, num_classes: int) -> Numbers:
  """Returns what a loss is computed of beside logits and targets."""
  return {
    'kept': 1 - stage.label_smoothing,
    'spread': stage.label_smoothing / num_classes,
    'threshold': stage.bce_target_threshold,
  }


def create_loss_fn(stage: stages.Stage) -> LossFn:
  """Returns loss_fn(logits, targets, numbers) -> losses, pure.

  `targets` are the parts of an example that are of each class, which mixup and
  CutMix have made of labels; they are smoothed here.
  """

  def loss_fn(logits, targets, numbers):
    if stage.label_smoothing:
      targets = numbers['kept'] * targets + numbers['spread']
    if stage.loss == 'bce':
      by = numbers['threshold'] if stage.bce_target_threshold else None
      return binary_losses(logits, targets, by)
    return optax.softmax_cross_entropy(logits, targets)

  return loss_fn


def binary_losses(
  logits: jax.Array, targets: jax.Array, threshold: Any = None
) -> jax.Array:
  """Returns each example's mean cross-entropy of "is this class there", (N,).

  Each class is asked for by itself (Wightman et al. 2021, arXiv:2110.00476).
  With a `threshold`, it is there where its target is above it; without one, to
  that part. The mean over the classes is small where they are many: what
  follows the gradient's size, as SGD does, wants a rate as many times as high.
  """
  if threshold is not None:
    targets = (targets > threshold).astype(logits.dtype)
  losses = optax.sigmoid_binary_cross_entropy(logits, targets)
  return jnp.mean(losses, axis=-1)

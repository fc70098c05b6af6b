"""What training lowers, of logits in f32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxprog import stages

# Of logits and targets, f32 (N, classes): each example's loss, (N,).
LossFn = Callable[[jax.Array, jax.Array], jax.Array]


def create_loss_fn(stage: stages.Stage) -> LossFn:
  """Returns loss_fn(logits, targets) -> losses, pure.

  `targets` are the parts of an example that are of each class, which mixup and
  CutMix have made of labels; they are smoothed here.
  """

  def loss_fn(logits, targets):
    targets = optax.smooth_labels(targets, stage.label_smoothing)
    if stage.loss == 'bce':
      return binary_losses(logits, targets, stage.bce_target_threshold)
    return optax.softmax_cross_entropy(logits, targets)

  return loss_fn


def binary_losses(
  logits: jax.Array, targets: jax.Array, threshold: float = 0.0
) -> jax.Array:
  """Returns each example's mean cross-entropy of "is this class there", (N,).

  Each class is asked for by itself (Wightman et al. 2021, arXiv:2110.00476).
  With a `threshold`, it is there where its target is above it; without one, to
  that part. The mean over the classes is small where they are many: what
  follows the gradient's size, as SGD does, wants a rate as many times as high.
  """
  if threshold:
    targets = (targets > threshold).astype(logits.dtype)
  losses = optax.sigmoid_binary_cross_entropy(logits, targets)
  return jnp.mean(losses, axis=-1)

"""The two compiled functions: one training step, one evaluation step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxprog import stages
from jaxprog.training import augment
from jaxprog.training import state as state_lib

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def create_train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  learning_rate_fn: optax.Schedule,
  stage: stages.Stage,
  pixels: tuple[Sequence[float], Sequence[float]],
) -> Callable[..., tuple[state_lib.TrainState, Metrics]]:
  """Returns train_step(state, batch, rng) -> (state, metrics), pure.

  `batch` is the global one: uint8 image (N, H, W, 3), int32 label (N,). The
  randomness of a step depends on `rng` and `state.step` alone. `metrics` are
  this step's means; their sums go into `state.metrics`. `pixels` are the mean
  and standard deviation that images are normalised with.
  """

  def loss_fn(params, batch_stats, images, labels):
    logits, updates = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    targets = optax.smooth_labels(targets, stage.label_smoothing)
    loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
    return loss, (logits, updates.get('batch_stats', {}))

  def train_step(state, batch, rng):
    images, labels = batch['image'], batch['label']
    if stage.flip:
      images = augment.random_flip(jax.random.fold_in(rng, state.step), images)
    images = augment.normalise(images, *pixels)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, batch_stats)), grads = grad_fn(
      state.params, state.batch_stats, images, labels
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {
      'loss': loss,
      'top1': jnp.mean(jnp.argmax(logits, -1) == labels),
      'grad_norm': optax.global_norm(grads),
      'learning_rate': jnp.asarray(learning_rate_fn(state.step), jnp.float32),
    }
    sums = {
      'count': jnp.float32(labels.size),
      'loss': loss * labels.size,
      'top1': metrics['top1'] * labels.size,
      'grad_norm': metrics['grad_norm'],
      'steps': jnp.float32(1),
    }
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
      metrics=jax.tree.map(jnp.add, state.metrics, sums),
    )
    return state, metrics

  return train_step


def create_eval_step(
  model: nn.Module, pixels: tuple[Sequence[float], Sequence[float]]
) -> Callable[[Any, Batch, Metrics], Metrics]:
  """Returns eval_step(variables, batch, sums) -> sums, pure.

  Adds up what `mask` does not hide: no label smoothing, one centre crop.
  """

  def eval_step(variables, batch, sums):
    images = augment.normalise(batch['image'], *pixels)
    logits: Any = model.apply(variables, images, train=False)
    labels, mask = batch['label'], batch['mask']
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # The rank counts the classes that the label does not beat: no sort of
    # 1000 logits, and a NaN beats nothing. At equal scores the lower class
    # wins, as in argmax.
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(logits.shape[-1])
    beaten = (logits < own) | ((logits == own) & (classes > labels[:, None]))
    rank = logits.shape[-1] - 1 - jnp.sum(beaten, axis=-1)
    terms = {
      'count': jnp.ones_like(loss),
      'loss': loss,
      'top1': rank < 1,
      'top5': rank < 5,
    }
    return {
      name: sums[name] + jnp.sum(jnp.where(mask, terms[name], 0))
      for name in terms
    }

  return eval_step


def zero_eval_sums() -> Metrics:
  """Returns where an evaluation starts from."""
  return {
    name: jnp.zeros((), jnp.float32)
    for name in ('count', 'loss', 'top1', 'top5')
  }

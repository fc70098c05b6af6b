"""What a trained network teaches another one, within a training step.

It sees the very images that the other does, augmented and mixed: a consistent
teacher (Beyer et al. 2022, arXiv:2106.05237). No gradient goes to it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxprog import epochs, errors, stages
from jaxprog.optim import arguments, optimizers

Params = dict[str, Any]
# `variables`, whose head has the classes of who learns, and `known`, bool
# (classes,): which of these the teacher has learned.
Teacher = dict[str, Any]
# By name; floats, or arguments of a compiled step.
Numbers = Mapping[str, Any]
# Of a teacher, images, the stage's step and numbers, pure.
Teach = Callable[[Teacher, jax.Array, jax.Array, Numbers], 'Lesson']
# Stands for minus infinity, whose differences are not finite.
_NEVER = -1e30


class Lesson(NamedTuple):
  """What a teacher makes of images; None is what is not asked for."""

  # What is left of a lesson's weights in this step.
  share: jax.Array
  known: jax.Array
  # f32 (N, classes).
  logits: jax.Array | None
  # The last map before the mean over its positions, (N, H, W, channels).
  features: jax.Array | None


def read_numbers(stage: stages.Stage, steps: epochs.Steps) -> Numbers:
  """Returns what is asked of a lesson."""
  return {
    'weight': stage.distill_weight,
    'temperature': arguments.create_number(stage.distill_temperature),
    'features': stage.distill_features,
    'per_taught': arguments.inverse(max(steps.taught, 1)),
  }


def create_teach_fn(
  model: nn.Module, stage: stages.Stage, *, frozen: bool
) -> Teach:
  """Returns teach(teacher, images, step, numbers) -> Lesson, pure.

  A `frozen` backbone has no features to learn.
  """
  asks_features = stage.distill_features > 0 and not frozen

  def teach(teacher, images, step, numbers):
    share = jnp.ones((), jnp.float32)
    if stage.distill_epochs:
      gone = step.astype(jnp.float32) * numbers['per_taught']
      share = jnp.maximum(0, 1 - gone)
    logits, features = _apply(model, teacher['variables'], images)
    return Lesson(
      share,
      teacher['known'],
      logits if stage.distill_weight else None,
      features if asks_features else None,
    )

  return teach


def is_taught(stage: stages.Stage, *, frozen: bool) -> bool:
  """Returns whether anything of a teacher is asked for."""
  return stage.distill_weight > 0 or not frozen


def _apply(
  model: nn.Module, variables: Any, images: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Returns logits and, where the network tells them, its last features."""
  logits, seen = model.apply(
    variables, images, train=False, mutable=['intermediates']
  )
  return logits, last_features(seen)


def last_features(seen: Any) -> jax.Array | None:
  """Returns the features among the collections that a forward has changed."""
  return next(iter(seen.get('intermediates', {}).get('features', ())), None)


def join_losses(
  losses: jax.Array,
  lesson: Lesson,
  logits: jax.Array,
  features: jax.Array | None,
  params: Params,
  numbers: Numbers,
) -> jax.Array:
  """Returns the losses (N,) of labels and of a lesson together.

  (1 - w) * losses + w * T^2 * KL(teacher, logits) + f * distance, where w and
  f are the stage's weights times the share that is left of them.
  """
  if lesson.logits is not None:
    weight = lesson.share * numbers['weight']
    softened = soften_loss(
      logits, lesson.logits, lesson.known, numbers['temperature']
    )
    losses = (1 - weight) * losses + weight * softened
  if lesson.features is not None and features is not None:
    projection = params.get(optimizers.PROJECTION)
    distances = feature_distances(
      features, lesson.features, projection and projection['kernel']
    )
    losses += lesson.share * numbers['features'] * distances
  return losses


def soften_loss(
  logits: jax.Array, taught: jax.Array, known: jax.Array, temperature: Any
) -> jax.Array:
  """Returns T^2 * KL(softmax(taught / T), softmax(logits / T)), (N,).

  Both softmaxes are over the `known` classes alone (Hinton et al. 2015,
  arXiv:1503.02531, section 2; over those that both know as Li & Hoiem 2016,
  arXiv:1606.09282): of the others the teacher has no opinion.
  """

  def log_probabilities(x):
    x = jnp.where(known, x.astype(jnp.float32) / temperature, _NEVER)
    return jax.nn.log_softmax(x)

  wanted, found = log_probabilities(taught), log_probabilities(logits)
  terms = jnp.where(known, jnp.exp(wanted) * (wanted - found), 0)
  return temperature**2 * jnp.sum(terms, axis=-1)


def feature_distances(
  features: jax.Array, taught: jax.Array, projection: jax.Array | None
) -> jax.Array:
  """Returns |P features - taught|^2 / |taught|^2 of each image, f32 (N,).

  Features are (N, H, W, channels); the `projection` (channels, channels of the
  teacher) is the same at all positions, None where both are as wide.
  """
  features, taught = (x.astype(jnp.float32) for x in (features, taught))
  if projection is not None:
    features = features @ projection
  axes = tuple(range(1, taught.ndim))
  squares = jnp.sum(jnp.square(taught), axes)
  distances = jnp.sum(jnp.square(features - taught), axes)
  return distances / jnp.maximum(squares, 1e-12)


def create_projection(
  models: tuple[nn.Module, nn.Module],
  variables: tuple[Any, Any],
  image_size: int,
  rng: jax.Array,
) -> Params:
  """Returns what leads from a network's features to those of its teacher.

  That is a module of parameters, or none where they have one width. Of both
  `variables` shapes will do.

  Raises:
    UserError: if a network does not tell its features, or they are of maps
      that differ in size.
  """
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  ours, theirs = (
    jax.eval_shape(lambda v, x, m=m: _apply(m, v, x)[1], v, images)
    for m, v in zip(models, variables, strict=True)
  )
  if ours is None or theirs is None or ours.shape[:-1] != theirs.shape[:-1]:
    raise errors.UserError(
      'distill_features needs networks that tell features of one size.',
      'a network of your own',
      "Let it self.sow('intermediates', 'features', x) its last (N, H, W, C).",
    )
  if ours.shape == theirs.shape:
    return {}
  shape = ours.shape[-1], theirs.shape[-1]
  kernel = nn.initializers.lecun_normal()(rng, shape, jnp.float32)
  return {optimizers.PROJECTION: {'kernel': kernel}}

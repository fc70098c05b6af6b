"""The two compiled functions: one training step, one evaluation step."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxprog import epochs, stages
from jaxprog.optim import optimizers
from jaxprog.training import augment, distillation, losses
from jaxprog.training import state as state_lib

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Outcomes = dict[str, jax.Array]

# The rank of an image that could not be decoded: in no top k.
_UNRANKED = 2**30


def create_train_step(
  model: nn.Module,
  learning_rate_fn: Callable[..., jax.Array],
  stage: stages.Stage,
  steps: epochs.Steps,
  pixels: tuple[Sequence[float], Sequence[float]],
  *,
  num_classes: int,
  frozen: bool = False,
  teach: distillation.Teach | None = None,
) -> Callable[..., tuple[state_lib.TrainState, Metrics]]:
  """Returns train_step(state, batch, rng, numbers) -> (state, metrics), pure.

  `batch` is the global one: uint8 image (N, H, W, 3), int32 label, index and
  epoch (N,), bool mask (N,), False where the loss must not look. How an image
  is augmented, and which blocks it skips, depends on `rng`, its index and its
  epoch alone; how images are mixed, on `rng` and `state.step`. `numbers` are
  those of `numbers.read`: of what stands there, `stage` and `steps` only say
  whether it is 0. `metrics` are this step's means; their sums go into
  `state.metrics`. A step whose loss, gradient or new state is not finite
  changes nothing but `step` and is counted as skipped.

  The classifier of `model` is its module `head`. `learning_rate_fn` says the
  rate of a step by the schedule's numbers, before the plateau's scale. `stage`
  and `steps` are as in this part of it. Images are normalised with `pixels`:
  mean, standard deviation. If `frozen`, the head alone is trained: the backbone
  is a fixed function of the image, with its running statistics, and needs no
  gradient. `teach` is what a teacher says: the last argument is that teacher.
  """
  grads_of = _create_grads_fn(model, stage, frozen, teach)

  def train_step(state, batch, rng, numbers, *teacher):
    examples: tuple[jax.Array, ...] = see_batch(
      rng, state.step, batch, numbers['images'], stage, pixels, num_classes
    )
    if stage.drop_path and not frozen:
      keys = augment.example_keys(rng, batch['epoch'], batch['index'])
      examples += (augment.draw_paths(keys, numbers['path_rates']),)
    grads, batch_stats, loss, top1 = grads_of(
      state, numbers, teacher[0] if teacher else None, *examples
    )
    learning_rate = state.rate_scale * jnp.asarray(
      learning_rate_fn(state.step, numbers['schedule']), jnp.float32
    )
    metrics = {
      'loss': loss,
      'top1': top1,
      'grad_norm': optimizers.global_norm(grads),
      'learning_rate': learning_rate,
    }
    tx = optimizers.create_optimizer(stage, numbers['optimizer'])
    if steps.frozen and not frozen:
      state = _begin_anew(state, state.step == numbers['frozen'], tx)
    learned = _learn(
      state, grads, batch_stats, learning_rate, tx, stage, numbers, frozen
    )
    metrics['finite'] = _is_finite(stage, metrics, learned)
    return _go_on(state, learned, metrics, jnp.sum(examples[2])), metrics

  return train_step


def _go_on(state, learned, metrics, count):
  """Returns the state after a step on `count` images: `learned`, if finite."""
  sums = _add_metrics(state.metrics, metrics, count)
  learned = {**learned, 'metrics': sums}
  kept = {name: getattr(state, name) for name in learned}
  skipped = state.metrics['skipped'] + 1
  kept['metrics'] = {**state.metrics, 'skipped': skipped}
  return state.replace(
    step=state.step + 1, **_select(metrics['finite'], learned, kept)
  )


def _begin_anew(state, is_now, tx):
  """Returns `state`, whose optimizer starts again if `is_now`.

  Moments that saw a frozen backbone know nothing of its gradients. They go even
  if this step is then skipped.
  """
  opt_state = _select(is_now, tx.init(state.params), state.opt_state)
  return state.replace(opt_state=opt_state)


def _learn(
  state, grads, batch_stats, learning_rate, tx, stage, numbers, frozen
):
  """Returns what a step makes of the fields of the state that learn."""
  params, opt_state = optimizers.take_step(
    tx,
    stage,
    learning_rate,
    grads,
    state.opt_state,
    state.params,
    numbers['factors'],
  )
  if frozen:
    params = {**state.params, 'head': params['head']}
  return {
    'params': params,
    'batch_stats': batch_stats,
    'opt_state': opt_state,
    'ema': _average(state, params, batch_stats, stage, numbers['ema_decay']),
  }


def see_batch(
  rng: jax.Array,
  step: jax.Array | int,
  batch: Batch,
  numbers: dict[str, Any],
  stage: stages.Stage,
  pixels: tuple[Sequence[float], Sequence[float]],
  num_classes: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the images, targets and weights that a step is about.

  `numbers` are those of `numbers.read_images`.
  """
  weights = batch['mask'].astype(jnp.float32)
  images, targets = augment.mix(
    jax.random.fold_in(rng, step),
    _augment(rng, batch, numbers, stage, pixels),
    jax.nn.one_hot(batch['label'], num_classes),
    weights,
    mixup_alpha=numbers['mixup_alpha'],
    cutmix_alpha=numbers['cutmix_alpha'],
  )
  return images, targets, weights


def _augment(rng, batch, numbers, stage, pixels):
  """Returns the normalised images of a training batch, each changed alone."""
  images, epoch, index = batch['image'], batch['epoch'], batch['index']
  keys = augment.example_keys(rng, epoch, index)
  if stage.flip:
    mirrored = augment.choose_mirrored(
      rng, epoch, index, alternating=stage.alternating_flip
    )
    images = augment.mirror(images, mirrored)
  if kinds := tuple(kind for kind in augment.COLORS if getattr(stage, kind)):
    drawn = augment.draw_colors(keys, numbers['colors'])
    images = augment.adjust_colors(images, kinds, *drawn)
  images = augment.normalise(images, *pixels)
  if stage.erasing_probability:
    images = augment.random_erasing(keys, images, **numbers['erasing'])
  if stage.low_frequency_size:
    images = augment.keep_low_frequencies(images, stage.low_frequency_size)
  return images


def _create_grads_fn(
  model: nn.Module,
  stage: stages.Stage,
  frozen: bool,
  teach: distillation.Teach | None,
) -> Callable[..., Any]:
  """Returns f(state, numbers, teacher, images, targets, weights, *paths).

  `paths` say which blocks each image skips, if any does. What comes back is
  grads, batch_stats, loss and top1, the last two being means over what
  `weights` (N,), 0 or 1, let them see; top1 asks for the class that `targets`
  (N, classes) names most. With a micro_batch_size they are sums over the
  micro-batches, one after the other, each divided by what the whole batch
  shows: its means, but that BatchNorm sees each by itself.
  """
  loss_fn = _create_loss_fn(model, stage, frozen)

  def grads_of_part(state, batch_stats, count, numbers, teacher, *examples):
    lesson = teach and teach(
      teacher, examples[0], state.step, numbers['lesson']
    )
    trained, fixed = state.params, {}
    if frozen:
      trained, fixed = {'head': state.params['head']}, state.params
    grads, aux = jax.grad(loss_fn, has_aux=True)(
      trained, fixed, batch_stats, count, numbers, lesson, *examples
    )
    if frozen:
      zeros = jax.tree.map(jnp.zeros_like, state.params)
      grads = {**zeros, **grads}
    return grads, *aux

  def grads_of(state, numbers, teacher, *examples):
    images, _, weights, *_ = examples
    batch_size = len(images)
    count = jnp.maximum(jnp.sum(weights), 1)
    micro = stage.micro_batch_size or batch_size
    parts = batch_size // micro
    if parts == 1:
      return grads_of_part(
        state, state.batch_stats, count, numbers, teacher, *examples
      )

    def split(x):
      # Every parts-th example: each device keeps the examples it has.
      return jnp.moveaxis(x.reshape(micro, parts, *x.shape[1:]), 1, 0)

    def add_part(sums, part):
      grads, batch_stats, loss, top1 = grads_of_part(
        state, sums[1], count, numbers, teacher, *part
      )
      total = jax.tree.map(jnp.add, (sums[0], *sums[2:]), (grads, loss, top1))
      return (total[0], batch_stats, *total[1:]), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    start = zeros, state.batch_stats, jnp.zeros(()), jnp.zeros(())
    sums, _ = jax.lax.scan(add_part, start, tuple(map(split, examples)))
    return sums

  return grads_of


def _create_loss_fn(
  model: nn.Module,
  stage: stages.Stage,
  frozen: bool,
) -> Callable[..., Any]:
  """Returns what `_create_grads_fn` takes the gradient of, by `trained`.

  `lesson` is a teacher's, None where nobody teaches; sums are over `count`.
  What class weights are for is minimised, and is in no metric.
  """
  losses_of = losses.create_loss_fn(stage)
  told = ['batch_stats']
  if stage.distill_from and stage.distill_features:
    told.append('intermediates')

  def loss_fn(trained, fixed, batch_stats, count, numbers, lesson, *examples):
    images, targets, weights, *paths = examples
    params, features = {**fixed, **trained}, None
    variables = {'params': params, 'batch_stats': batch_stats}
    if frozen:
      logits: Any = model.apply(variables, images, train=False)
    else:
      logits, changed = model.apply(
        variables, images, *paths, train=True, mutable=told
      )
      batch_stats = changed.get('batch_stats', {})
      features = distillation.last_features(changed)
    correct = jnp.argmax(logits, -1) == jnp.argmax(targets, -1)
    found = losses_of(logits, targets, numbers['loss'])
    if lesson is not None:
      found = distillation.join_losses(
        found, lesson, logits, features, params, numbers['lesson']
      )
    # What is hidden may be anything, NaN too.
    minimised = loss = jnp.sum(jnp.where(weights > 0, found, 0)) / count
    if numbers['class_weights'] is not None:
      found *= jnp.sum(targets * numbers['class_weights'], axis=-1)
      minimised = jnp.sum(jnp.where(weights > 0, found, 0)) / count
    top1 = jnp.sum(weights * correct) / count
    return minimised, (batch_stats, loss, top1)

  return loss_fn


def _average(state, params, batch_stats, stage, decay):
  """Returns the next averaged variables, statistics included.

  Averages of weights need averages of their statistics.
  """
  if not state.ema:
    return {}
  decay = average_decay(decay, stage.ema_warmup_power, state.step)
  return jax.tree.map(
    lambda old, new: decay * old + (1 - decay) * new,
    state.ema,
    {
      'params': state_lib.without_projection(params),
      'batch_stats': batch_stats,
    },
  )


def average_decay(decay: Any, power: float, step: jax.Array) -> jax.Array:
  """Returns how much of the average stays at `step`, f32, at most `decay`.

  In the first steps less of the old is kept, so that a short stage does not
  average its start; see ema_warmup_power.
  """
  count = step.astype(jnp.float32)
  if power:
    return jnp.minimum(decay, 1 - (1 + count) ** -power)
  return jnp.minimum(decay, (1 + count) / (10 + count))


def _is_finite(stage, metrics, learned):
  """Returns whether nothing that a step has come to is NaN or infinite."""
  new = [metrics['loss'], metrics['grad_norm'], learned['batch_stats']]
  if not optimizers.is_bounded(stage):
    # A pass over all that is learned, 8% of a tiny network's step: only for
    # stages that need it.
    new += [learned['params'], learned['opt_state']]
  by_shape = collections.defaultdict(list)
  for x in jax.tree.leaves(new):
    if jnp.issubdtype(x.dtype, jnp.inexact):
      by_shape[x.shape].append(jnp.isfinite(x))
  # One reduction a shape: many small ones take longer than what they read.
  alike = [functools.reduce(jnp.logical_and, x) for x in by_shape.values()]
  return functools.reduce(jnp.logical_and, map(jnp.all, alike))


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
  """Returns the leaves of `yes` if `condition` holds, else those of `no`.

  XLA computes in one kernel what has one shape and reads the same array: so
  vectors and scalars ask for their `condition` in a vector. A ResNet has
  hundreds of them, and each alone takes a GPU longer to begin than to select.
  """
  sizes = [x.size for x in jax.tree.leaves(yes) if x.ndim < 2]
  spread = jax.lax.optimization_barrier(
    jnp.broadcast_to(condition, max(sizes, default=1))
  )

  def select(a, b):
    if a.ndim > 1:
      return jnp.where(condition, a, b)
    return jnp.where(spread[: a.size].reshape(a.shape), a, b)

  return jax.tree.map(select, yes, no)


def _add_metrics(sums, metrics, count):
  terms = {
    'count': count,
    'loss': metrics['loss'] * count,
    'top1': metrics['top1'] * count,
    'grad_norm': metrics['grad_norm'],
    'steps': jnp.float32(1),
    'skipped': jnp.float32(0),
  }
  return {name: sums[name] + terms[name] for name in terms}


def create_eval_step(
  model: nn.Module,
  pixels: tuple[Sequence[float], Sequence[float]],
  *,
  flip: bool = False,
  among: np.ndarray | None = None,
) -> Callable[[Any, Batch, Metrics], tuple[Metrics, Outcomes]]:
  """Returns eval_step(variables, batch, sums) -> (sums, outcomes), pure.

  Adds up what `mask` does not hide: no label smoothing, one centre crop. An
  image that could not be decoded has the label -1: it counts as wrong, with
  the loss of a guess. Where labels are (N, k), -1 where there are fewer, all of
  them are right: the likeliest is the label, and naming any has the loss.
  `outcomes` says of every row, hidden ones included: loss, rank (classes that
  score above its own, 0 where it is right), predicted (class) and confidence
  (its probability). With `flip` logits are the mean of those of an image and
  its mirror image, seen one after the other. Classes that are not `among`, bool
  (classes,), do not exist.
  """

  def eval_step(variables, batch, sums):
    images = augment.normalise(batch['image'], *pixels)
    logits: Any = model.apply(variables, images, train=False)
    if flip:
      mirrored: Any = model.apply(variables, images[:, :, ::-1], train=False)
      logits = (logits + mirrored) / 2
    num_classes = count = logits.shape[-1]
    if among is not None:
      logits = jnp.where(among, logits, -jnp.inf)
      count = np.count_nonzero(among)
    labels, mask = batch['label'], batch['mask']
    known, labels, loss = _find_losses(logits, labels)
    loss = jnp.where(known, loss, jnp.log(count))
    # The rank counts the classes that the label does not beat: no sort of
    # 1000 logits, and a NaN beats nothing. At equal scores the lower class
    # wins, as in argmax.
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(num_classes)
    beaten = (logits < own) | ((logits == own) & (classes > labels[:, None]))
    rank = num_classes - 1 - jnp.sum(beaten, axis=-1)
    rank = jnp.where(known, rank, _UNRANKED)
    terms = {
      'count': jnp.ones_like(loss),
      'loss': loss,
      'top1': rank < 1,
      'top5': rank < 5,
    }
    sums = {
      name: sums[name] + jnp.sum(jnp.where(mask, terms[name], 0))
      for name in terms
    }
    return sums, {
      'loss': loss,
      'rank': rank,
      'predicted': jnp.argmax(logits, axis=-1),
      'confidence': jnp.max(jax.nn.softmax(logits), axis=-1),
    }

  return eval_step


def _find_losses(
  logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns whether an image has a label, that label and its loss, (N,) each.

  Of (N, k) labels that is the likeliest, and the loss that of all together.
  """
  if labels.ndim == 1:
    known = labels >= 0
    labels = jnp.maximum(labels, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return known, labels, loss
  scores = jnp.take_along_axis(logits, jnp.maximum(labels, 0), axis=-1)
  scores = jnp.where(labels >= 0, scores, -jnp.inf)
  best = jnp.argmax(scores, axis=-1)[:, None]
  labels = jnp.take_along_axis(labels, best, axis=-1)[:, 0]
  loss = jax.nn.logsumexp(logits, -1) - jax.nn.logsumexp(scores, -1)
  return labels >= 0, jnp.maximum(labels, 0), loss


def zero_eval_sums() -> Metrics:
  """Returns where an evaluation starts from."""
  return {
    name: jnp.zeros((), jnp.float32)
    for name in ('count', 'loss', 'top1', 'top5')
  }

"""Optimizers: factories that return optax gradient transformations."""

import collections
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprog import stages
from jaxprog.optim import arguments, eight_bit

# By field; floats, or arguments of a compiled step.
Numbers = dict[str, Any]

# The module that leads to a teacher's features: it learns as the head does.
PROJECTION = 'distill_projection'
# Root mean square of Muon's updates: what AdamW's have in practice (Liu et al.
# 2025, arXiv:2502.16982, section 2.2), so that one learning rate fits both.
_MUON_RMS = 0.2
# The numbers of an optimizer; of the first ones 1 - x is asked for too.
_DECAYS = ('b1', 'b2', 'momentum', 'rms_decay')
_NUMBERS = (
  *_DECAYS,
  *('adaptive_clipping', 'eps', 'gradient_clipping'),
  *('trust_coefficient', 'weight_decay'),
)


def read_numbers(stage: stages.Stage) -> Numbers:
  """Returns what `create_optimizer` takes to have no constants."""
  numbers = {name: getattr(stage, name) for name in _NUMBERS}
  decays = {name: arguments.create_number(numbers[name]) for name in _DECAYS}
  return {**numbers, **decays}


def create_optimizer(
  stage: stages.Stage, numbers: Numbers | None = None
) -> optax.GradientTransformation:
  """Returns clipping, the optimizer of `stage` and its weight decay.

  Of `stage` it is what there is and whether a number is 0; the others are in
  `numbers`, if they are arguments of the step that this is a part of.

  There is no learning rate in it, and no sign: the training step takes
  params - rate * updates. So the rate follows the stage's own step even when
  a step is skipped, and momentum holds no rates, as in PyTorch's SGD.

  Coupled decay is part of the gradient (after clipping), and so of every
  moment; decoupled decay (Loshchilov & Hutter 2019, arXiv:1711.05101) is added
  at the end, except that LAMB's trust ratio sees it.

  What is schedule-free has the rate in it: see `take_step`.
  """
  if numbers is None:
    numbers = {name: getattr(stage, name) for name in _NUMBERS}
  none = decay = optax.identity()
  if stage.weight_decay:
    rate = numbers['weight_decay']
    decay = optax.add_decayed_weights(rate, weight_decay_mask)
  coupled, decoupled = (decay, none) if stage.is_coupled else (none, decay)
  direction = optax.chain(
    _create_clipping(stage, numbers),
    coupled,
    _create_direction(stage, numbers, decoupled),
  )
  if stage.is_schedule_free:
    return _average_steps(direction, stage, numbers)
  return direction


def take_step(
  tx: optax.GradientTransformation,
  stage: stages.Stage,
  learning_rate: jax.Array,
  grads: Any,
  opt_state: optax.OptState,
  params: Any,
  factors: Numbers | None = None,
) -> tuple[Any, optax.OptState]:
  """Returns the next parameters and state of `tx`, the optimizer of `stage`.

  `factors` are those of `read_factors`, if they are arguments.
  """
  own = rate_factors(params, stage, factors)
  if stage.is_schedule_free:
    tx = optax.with_extra_args_support(tx)
    updates, opt_state = tx.update(
      grads, opt_state, params, learning_rate=learning_rate, factors=own
    )
    return optax.apply_updates(params, updates), opt_state
  updates, opt_state = tx.update(grads, opt_state, params)
  params = jax.tree.map(
    lambda p, u, factor: p - (factor * learning_rate) * u,
    params,
    updates,
    own,
  )
  return params, opt_state


def averaged_params(params: Any, opt_state: optax.OptState) -> Any:
  """Returns the average that a schedule-free optimizer is about.

  `params` are where it asks for gradients.
  """
  return optax.contrib.schedule_free_eval_params(opt_state, params)


def is_bounded(stage: stages.Stage) -> bool:
  """Returns whether finite gradients cannot make updates that are not finite.

  A gradient whose norm is finite in f32 has no number above 2e19. From there
  the fields of a stage decide: rates whose steps overflow or whose decay grows
  the weights without end, divisions by an eps that f32 rounds to 0, moments
  that forget nothing. The limits are far above what anybody trains with.
  """
  factor = max(stage.head_rate_factor, stage.backbone_rate_factor)
  rate = stage.peak_learning_rate * factor
  kept = stage.b1, stage.b2, stage.momentum, stage.rms_decay
  return (
    rate < 1e3
    and rate * stage.weight_decay < 1
    and stage.weight_decay < 1e3
    and stage.trust_coefficient < 1e3
    and stage.eps > 1e-30
    and max(kept) < 1 - 1e-6
    and (stage.averaging > 1e-3 or not stage.is_schedule_free)
  )


def global_norm(grads: Any) -> jax.Array:
  """Returns the root of the sum of all squares of a network's gradients.

  A GPU's kernel for each array takes longer than it reads, and a network has
  many arrays of few shapes: those of one shape are added up first, and reduced
  to a sum for each output. The barrier keeps XLA from taking apart the vector
  of these sums.
  """
  by_shape = collections.defaultdict(list)
  for x in jax.tree.leaves(grads):
    by_shape[x.shape].append(jnp.square(jnp.atleast_1d(x)))
  alike = [functools.reduce(jnp.add, x) for x in by_shape.values()]
  sums = [jnp.sum(x, axis=range(x.ndim - 1)) for x in alike]
  vector = jax.lax.optimization_barrier(jnp.concatenate(sums))
  return jnp.sqrt(jnp.sum(vector))


def weight_decay_mask(params: Any) -> Any:
  """Returns True for kernels, False for biases and BatchNorm's scales."""
  return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def read_factors(params: Any, stage: stages.Stage) -> Numbers:
  """Returns the factors of the modules in `params` that are not 0 or 1."""
  factors = rate_factors(dict.fromkeys(params, 0), stage)
  return {name: x for name, x in factors.items() if x not in (0, 1)}


def rate_factors(
  params: Any, stage: stages.Stage, numbers: Numbers | None = None
) -> Any:
  """Returns what each leaf's learning rate is multiplied by.

  Those are floats, but for the modules that `numbers` names.

  The head or the backbone has its own factor. Each group of layers has
  `layer_decay` times the rate of the one after it (Clark et al. 2020,
  arXiv:2003.10555): modules named stem_* first, the others each for itself in
  natural order of their names (block2_9 before block2_10), `head` last. The
  order of the dict itself says nothing: jit sorts it.
  """
  groups = sorted({_layer_group(name) for name in params}, reverse=True)

  def factor(path, _):
    name = path[0].key
    if numbers and name in numbers:
      return numbers[name]
    head, backbone = stage.head_rate_factor, stage.backbone_rate_factor
    own = head if name in ('head', PROJECTION) else backbone
    return own * stage.layer_decay ** groups.index(_layer_group(name))

  return jax.tree_util.tree_map_with_path(factor, params)


def _layer_group(name: str) -> tuple[int, tuple[str | int, ...]]:
  """Returns a key that is the same within a group and sorts by depth."""
  if name in ('head', PROJECTION):
    return 2, ()
  if name.startswith('stem_'):
    return 0, ()
  # A split at numbers alternates text and number, so that keys compare.
  parts = re.split(r'(\d+)', name)
  return 1, tuple(int(p) if p.isdecimal() else p for p in parts)


def _create_clipping(
  stage: stages.Stage, numbers: Numbers
) -> optax.GradientTransformation:
  """Returns the limit on the global norm, or on the norm of each unit.

  Units are the outputs of a layer; the classifier is left alone (Brock et al.
  2021, arXiv:2102.06171, section 4).
  """
  if stage.gradient_clipping:
    return _clip_by_global_norm(numbers['gradient_clipping'])
  if stage.adaptive_clipping:
    return optax.masked(
      optax.adaptive_grad_clip(numbers['adaptive_clipping']),
      lambda params: {name: name != 'head' for name in params},
    )
  return optax.identity()


def _clip_by_global_norm(limit: Any) -> optax.GradientTransformation:
  """Returns optax's, with the norm that the step has computed anyway."""

  def clip(grads, _):
    norm = global_norm(grads)
    scale = jnp.where(norm < limit, 1, limit / norm)
    return jax.tree.map(lambda x: scale * x, grads)

  return optax.stateless(clip)


def _average_steps(
  direction: optax.GradientTransformation, stage: stages.Stage, numbers: Numbers
) -> optax.GradientTransformationExtraArgs:
  """Returns `direction` made schedule-free (Defazio et al. 2024, 2405.15682).

  Its steps are averaged, each as heavy as the square of the highest rate so
  far, and gradients are asked for between the last step and the average.
  """
  averaging = numbers[stage.averaging_field]

  def at(learning_rate, factors=None):
    def scale(updates, _):
      return jax.tree.map(
        lambda u, factor: -(factor * learning_rate) * u, updates, factors
      )

    step = optax.chain(direction, optax.stateless(scale))
    return optax.contrib.schedule_free(step, learning_rate, averaging)

  def update(grads, state, params=None, *, learning_rate, factors, **_):
    return at(learning_rate, factors).update(grads, state, params)

  return optax.GradientTransformationExtraArgs(at(0.0).init, update)


def _create_direction(
  stage: stages.Stage, numbers: Numbers, decay: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns the optimizer proper and the decoupled `decay`."""
  decays = numbers['b1'], numbers['b2'], numbers['eps']
  adam = _store_first_moment(optax.scale_by_adam(*decays), stage, 'mu')
  blocks = {
    'block_size': stage.quantization_block,
    'min_size': stage.quantization_min_size,
  }
  match stage.optimizer:
    case 'adamw':
      return optax.chain(adam, decay)
    case 'adamw_8bit':
      adam = eight_bit.scale_by_adam_8bit(*decays, **blocks)
      return optax.chain(adam, decay)
    case 'lamb':
      # You et al. 2020, arXiv:1904.00962, algorithm 2.
      return optax.chain(adam, decay, _scale_kernels_by_trust_ratio(1.0))
    case 'lars':
      # You et al. 2017, arXiv:1708.03888, but as in optax: the ratio's
      # denominator is the norm of gradient plus decay, not a sum of norms.
      trust_ratio = _scale_kernels_by_trust_ratio(numbers['trust_coefficient'])
      return optax.chain(trust_ratio, _create_trace(stage, numbers), decay)
    case 'muon':
      muon = _create_muon(stage, numbers)
      parts = {'muon': muon, 'adam': adam}
      return optax.chain(optax.partition(parts, _label_muon), decay)
    case 'rmsprop':
      # torch.optim.RMSprop adds eps after the root; so does this.
      rms = optax.scale_by_rms(
        numbers['rms_decay'], numbers['eps'], eps_in_sqrt=False
      )
      return optax.chain(rms, _create_trace(stage, numbers), decay)
    case 'schedule_free_adamw':
      # Adam without its first moment.
      rms = optax.scale_by_rms(
        *decays[1:], eps_in_sqrt=False, bias_correction=True
      )
      return optax.chain(rms, decay)
    case 'schedule_free_sgd':
      return decay
    case 'sgd_momentum':
      return optax.chain(_create_trace(stage, numbers), decay)
    case 'sgd_momentum_8bit':
      trace = eight_bit.trace_8bit(
        numbers['momentum'], stage.nesterov, **blocks
      )
      return optax.chain(trace, decay)
    case _:
      raise ValueError(f'Unknown optimizer: {stage.optimizer!r}.')


def _create_trace(
  stage: stages.Stage, numbers: Numbers
) -> optax.GradientTransformation:
  """Returns PyTorch's momentum without dampening: m = momentum * m + g."""
  if not stage.momentum:
    return optax.identity()
  trace = optax.trace(numbers['momentum'], stage.nesterov)
  return _store_first_moment(trace, stage, 'trace')


def _store_first_moment(
  tx: optax.GradientTransformation, stage: stages.Stage, field: str
) -> optax.GradientTransformation:
  """Returns `tx` with `field` of its state kept in `optimizer_state_dtype`.

  It is widened before the step and rounded once after it, so that the step
  itself is computed as without. optax's own mu_dtype and accumulator_dtype
  multiply the old moment with its decay in bfloat16, which rounds twice.

  Second moments stay f32: they move by 0.1% a step (b2 = 0.999), and numbers
  of bfloat16 lie 0.4% to 0.8% apart.
  """
  if stage.optimizer_state_dtype == 'float32':
    return tx

  def narrow(state):
    moment = optax.tree.cast(getattr(state, field), jnp.bfloat16)
    return state._replace(**{field: moment})

  def update(updates, state, params=None):
    moment = optax.tree.cast_like(getattr(state, field), updates)
    updates, state = tx.update(
      updates, state._replace(**{field: moment}), params
    )
    return updates, narrow(state)

  return optax.GradientTransformation(
    lambda params: narrow(tx.init(params)), update
  )


def _scale_kernels_by_trust_ratio(
  coefficient: Any,
) -> optax.GradientTransformation:
  """Multiplies a kernel's update by coefficient * |kernel| / |update|."""
  trust_ratio = optax.scale_by_trust_ratio(trust_coefficient=coefficient)
  return optax.masked(trust_ratio, weight_decay_mask)


def _create_muon(
  stage: stages.Stage, numbers: Numbers
) -> optax.GradientTransformation:
  """Returns Muon (Jordan et al. 2024) for kernels (H, W, in, out).

  A kernel is a matrix (H * W * in, out). Orthogonal, its root mean square is
  max(rows, columns) ** -0.5; that is scaled to _MUON_RMS, whatever the shape.
  """
  matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)

  def scale(update, _):
    height, width, num_in, num_out = update.shape
    return _MUON_RMS * max(height * width * num_in, num_out) ** 0.5 * update

  muon = optax.contrib.scale_by_muon(
    beta=numbers['momentum'],
    nesterov=stage.nesterov,
    weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrix, tree),
  )
  return optax.chain(
    _store_first_moment(muon, stage, 'mu'),
    optax.stateless_with_tree_map(scale),
  )


def _label_muon(params: Any) -> Any:
  """Returns 'muon' for the backbone's convolutions, 'adam' for the rest."""

  def label(path, leaf):
    of_backbone = path[0].key != 'head' and jnp.ndim(leaf) == 4
    return 'muon' if of_backbone else 'adam'

  return jax.tree_util.tree_map_with_path(label, params)

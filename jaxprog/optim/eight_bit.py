"""Optimizer moments in 8 bits: a quarter of the bytes of f32 ones.

The idea is that of Dettmers et al. 2022 (arXiv:2110.02861): divide a moment
into blocks, keep a code of 8 bits an element and one f32 scale, the largest
magnitude, a block. Codes and rounding here are others. With r = |x| / scale:

- first moment, int8: a sign and 7 bits of r + FLOOR, below.
- second moment, uint8: 8 bits of r, from 2.6e-10 to 1. What is smaller, 0 too,
  becomes 2.6e-10, so that its root is never 0 beside a gradient that is not.

Neighbouring codes differ by 6 to 13%, as floats with 3 bits of mantissa do:
one rounding makes an update at most 6% larger. Adding FLOOR makes the signed
code linear near 0, and able to say 0. FLOOR is 1.7e-5, about the root of
2.6e-10: both moments lose sight of a gradient at the same size, so that their
quotient stays bounded. The price is paid beside an outlier: while its scale
lasts, smaller entries of its block take smaller steps than in f32.

To round to the nearest code would freeze what changes by less than half a
step, as a second moment does: by 0.1% a step at b2 = 0.999. So r goes to the
upper of its neighbours as often as it lies near it, which is right on
average. Measured with 16384 elements, half of whose gradients shrank by a
factor of 100 within 3000 steps, over the last 1500: sqrt(v) was 150% too
large with the nearest code, and is 2% too small like this, with an rms error
of 14%. At worst, among all elements and steps, it was 2.2 times too small.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

_MANTISSA_SHIFT = 20  # Of the 23 bits of an f32's mantissa 3 stay.
_ONE = 0x3F800000 >> _MANTISSA_SHIFT  # The code of 1.0, before an offset.
_SIGNED_OFFSET = _ONE - 127
_SECOND_OFFSET = _ONE - 255
FLOOR = float(np.uint32(_SIGNED_OFFSET << _MANTISSA_SHIFT).view(np.float32))


class Blocks(NamedTuple):
  """One moment of one parameter, flat, its last block filled up with zeros.

  `codes` is (num_blocks, block_size): int8 if the moment is signed, uint8 if
  it is a second moment. `scales` is (num_blocks,) f32.
  """

  codes: jax.Array
  scales: jax.Array


class Trace8bitState(NamedTuple):
  """The number of updates; each parameter's momentum, whole or `Blocks`."""

  step: jax.Array
  trace: Any


def scale_by_adam_8bit(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, **blocks: int
) -> optax.GradientTransformation:
  """Returns optax.scale_by_adam, its moments kept in 8 bits between steps.

  `blocks` are block_size (256) and min_size (4096): parameters of fewer
  elements keep whole moments. The state is optax's, with `Blocks` for large
  moments.
  """
  adam = optax.scale_by_adam(b1, b2, eps)
  return _in_8_bits(adam, 'count', {'mu': jnp.int8, 'nu': jnp.uint8}, **blocks)


def trace_8bit(
  decay: float, nesterov: bool = False, **blocks: int
) -> optax.GradientTransformation:
  """Returns optax.trace, its momentum kept in 8 bits between steps."""
  trace = optax.trace(decay, nesterov)

  def init_fn(params):
    return Trace8bitState(jnp.zeros([], jnp.int32), *trace.init(params))

  def update_fn(updates, state, params=None):
    whole = optax.TraceState(state.trace)
    updates, new = trace.update(updates, whole, params)
    return updates, Trace8bitState(optax.safe_increment(state.step), *new)

  counted = optax.GradientTransformation(init_fn, update_fn)
  return _in_8_bits(counted, 'step', {'trace': jnp.int8}, **blocks)


def _in_8_bits(
  tx: optax.GradientTransformation,
  counter: str,
  dtypes: dict[str, Any],
  block_size: int = 256,
  min_size: int = 4096,
) -> optax.GradientTransformation:
  """Returns `tx`, whose moments, keys of `dtypes`, are blocks between steps.

  Each update sees its own gradient in full; what is rounded is what the next
  steps remember. `counter` is the field of the state that counts them.
  """

  def zeros(x, dtype):
    if x.size < min_size:
      return jnp.zeros(x.shape, x.dtype)
    num_blocks = -(-x.size // block_size)
    return Blocks(
      jnp.zeros((num_blocks, block_size), dtype),
      jnp.zeros(num_blocks, jnp.float32),
    )

  def init_fn(params):
    state = jax.eval_shape(tx.init, params)
    moments = {
      name: jax.tree.map(lambda x, d=dtype: zeros(x, d), getattr(state, name))
      for name, dtype in dtypes.items()
    }
    return state._replace(**moments, **{counter: jnp.zeros([], jnp.int32)})

  def update_fn(updates, state, params=None):
    kept = {name: getattr(state, name) for name in dtypes}
    whole = {
      name: jax.tree.map(lambda x, m: decode(m, x.shape), updates, moments)
      for name, moments in kept.items()
    }
    updates, state = tx.update(updates, state._replace(**whole), params)
    step = getattr(state, counter)
    rounded = {
      name: jax.tree.map(
        lambda x, m: encode(x, m, step), getattr(state, name), moments
      )
      for name, moments in kept.items()
    }
    return updates, state._replace(**rounded)

  return optax.GradientTransformation(init_fn, update_fn)


def encode(x: jax.Array, like: Any, step: jax.Array | int) -> Any:
  """Returns `x`, of any shape, as blocks if `like` is, and of its form.

  `step` and an element's index decide how it is rounded. A block in which
  something is not finite decodes to nothing finite.
  """
  if not isinstance(like, Blocks):
    return x
  x = x.astype(jnp.float32).reshape(-1)
  x = jnp.pad(x, (0, like.codes.size - x.size)).reshape(like.codes.shape)
  magnitude = jnp.abs(x)
  scales = jnp.max(magnitude, axis=1)
  # Subnormal scales would divide to inf where a device takes them for 0.
  tiny = jnp.finfo(jnp.float32).tiny
  ratio = magnitude / jnp.where(scales >= tiny, scales, 1.0)[:, None]
  if like.codes.dtype == jnp.uint8:
    codes = jnp.clip(_truncate(ratio, step) - _SECOND_OFFSET, 0, 255)
  else:
    codes = jnp.clip(_truncate(ratio + FLOOR, step) - _SIGNED_OFFSET, 0, 127)
    codes = jnp.where(x < 0, -codes, codes)
  return Blocks(codes.astype(like.codes.dtype), scales)


def decode(blocks: Any, shape: tuple[int, ...]) -> jax.Array:
  """Returns what blocks hold, f32, in the shape that was encoded.

  What is no `Blocks` is returned as it is.

  Bits are moved, not looked up: with tables of 256 entries an update takes
  1.3 (momentum) to 1.5 (Adam) times as long on a CPU, and TPUs gather slowly.
  """
  if not isinstance(blocks, Blocks):
    return blocks
  codes = blocks.codes.astype(jnp.int32)
  if blocks.codes.dtype == jnp.uint8:
    ratio = _extend(codes + _SECOND_OFFSET)
  else:
    ratio = _extend(jnp.abs(codes) + _SIGNED_OFFSET) - FLOOR
    ratio = jnp.where(codes < 0, -ratio, ratio)
  x = (ratio * blocks.scales[:, None]).reshape(-1)
  return x[: np.prod(shape, dtype=int)].reshape(shape)


def _truncate(ratio: jax.Array, step: jax.Array | int) -> jax.Array:
  """Returns the upper 12 bits of `ratio`, rounded up or down, as int32.

  A ratio is rounded up if its lower 20 bits and those drawn for it carry.
  """
  bits = lax.bitcast_convert_type(ratio, jnp.uint32)
  drawn = _dither(ratio.shape, step) >> (32 - _MANTISSA_SHIFT)
  return ((bits + drawn) >> _MANTISSA_SHIFT).astype(jnp.int32)


def _extend(upper: jax.Array) -> jax.Array:
  """Returns the f32 whose upper 12 bits are given, the others being 0."""
  return lax.bitcast_convert_type(upper << _MANTISSA_SHIFT, jnp.float32)


def _dither(shape: tuple[int, ...], step: jax.Array | int) -> jax.Array:
  """Returns uint32 of `shape`, evenly spread in each element over the steps.

  Multiples of the golden ratio, modulo 1, leave smaller gaps than random
  numbers do: sqrt(v) strays by 14% rms instead of 17. Having no key, they
  need no state, and a resumed run draws what an uninterrupted one does.
  """
  row, column = (lax.broadcasted_iota(jnp.uint32, shape, i) for i in (0, 1))
  index = row * jnp.uint32(shape[1]) + column
  time = jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
  return index * jnp.uint32(0xC13FA9A9) + time

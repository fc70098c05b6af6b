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

MANTISSA_SHIFT = 20  # Of the 23 bits of an f32's mantissa 3 stay.
ONE = 0x3F800000 >> MANTISSA_SHIFT  # The code of 1.0, before an offset.
SIGNED_OFFSET = ONE - 127
SECOND_OFFSET = ONE - 255
FLOOR = float(np.uint32(SIGNED_OFFSET << MANTISSA_SHIFT).view(np.float32))


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
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  block_size: int = 256,
  min_size: int = 4096,
) -> optax.GradientTransformation:
  """Returns optax.scale_by_adam, its moments kept in 8 bits between steps.

  Each update sees its own gradient in full; what is rounded is what the next
  steps remember. Parameters of fewer than `min_size` elements keep whole
  moments. The state is optax's, with `Blocks` for large moments.
  """
  adam = optax.scale_by_adam(b1, b2, eps)

  def init_fn(params):
    state = jax.eval_shape(adam.init, params)
    return optax.ScaleByAdamState(
      count=jnp.zeros([], jnp.int32),
      mu=_zeros(state.mu, jnp.int8, block_size, min_size),
      nu=_zeros(state.nu, jnp.uint8, block_size, min_size),
    )

  def update_fn(updates, state, params=None):
    whole = state._replace(
      mu=_decode_tree(state.mu, updates), nu=_decode_tree(state.nu, updates)
    )
    updates, new = adam.update(updates, whole, params)
    return updates, new._replace(
      mu=_encode_tree(new.mu, state.mu, new.count),
      nu=_encode_tree(new.nu, state.nu, new.count),
    )

  return optax.GradientTransformation(init_fn, update_fn)


def trace_8bit(
  decay: float,
  nesterov: bool = False,
  *,
  block_size: int = 256,
  min_size: int = 4096,
) -> optax.GradientTransformation:
  """Returns optax.trace, its momentum kept in 8 bits between steps.

  Parameters of fewer than `min_size` elements keep whole momenta.
  """
  trace = optax.trace(decay, nesterov)

  def init_fn(params):
    state = jax.eval_shape(trace.init, params)
    return Trace8bitState(
      step=jnp.zeros([], jnp.int32),
      trace=_zeros(state.trace, jnp.int8, block_size, min_size),
    )

  def update_fn(updates, state, params=None):
    whole = optax.TraceState(_decode_tree(state.trace, updates))
    updates, new = trace.update(updates, whole, params)
    step = optax.safe_increment(state.step)
    return updates, Trace8bitState(
      step, _encode_tree(new.trace, state.trace, step)
    )

  return optax.GradientTransformation(init_fn, update_fn)


def encode(x: jax.Array, like: Blocks, step: jax.Array | int) -> Blocks:
  """Returns `x`, of any shape, as blocks of the form of `like`.

  `step` and an element's index decide how it is rounded. A block in which
  something is not finite decodes to nothing finite.
  """
  x = x.astype(jnp.float32).reshape(-1)
  if x.size != like.codes.size:
    x = jnp.pad(x, (0, like.codes.size - x.size))
  x = x.reshape(like.codes.shape)
  magnitude = jnp.abs(x)
  scales = jnp.max(magnitude, axis=1)
  # Subnormal scales would divide to inf where a device takes them for 0.
  tiny = jnp.finfo(jnp.float32).tiny
  ratio = magnitude / jnp.where(scales >= tiny, scales, 1.0)[:, None]
  if like.codes.dtype == jnp.uint8:
    codes = jnp.clip(_truncate(ratio, step) - SECOND_OFFSET, 0, 255)
  else:
    codes = jnp.clip(_truncate(ratio + FLOOR, step) - SIGNED_OFFSET, 0, 127)
    codes = jnp.where(x < 0, -codes, codes)
  return Blocks(codes.astype(like.codes.dtype), scales)


def decode(blocks: Blocks, shape: tuple[int, ...]) -> jax.Array:
  """Returns what `blocks` hold, f32, in the shape that was encoded.

  Bits are moved, not looked up: with tables of 256 entries an update takes
  1.3 (momentum) to 1.5 (Adam) times as long on a CPU, and TPUs gather slowly.
  """
  codes = blocks.codes.astype(jnp.int32)
  if blocks.codes.dtype == jnp.uint8:
    ratio = _extend(codes + SECOND_OFFSET)
  else:
    ratio = _extend(jnp.abs(codes) + SIGNED_OFFSET) - FLOOR
    ratio = jnp.where(codes < 0, -ratio, ratio)
  x = (ratio * blocks.scales[:, None]).reshape(-1)
  return x[: np.prod(shape, dtype=int)].reshape(shape)


def _truncate(ratio: jax.Array, step: jax.Array | int) -> jax.Array:
  """Returns the upper 12 bits of `ratio`, rounded up or down, as int32.

  A ratio is rounded up if its lower 20 bits and those drawn for it carry.
  """
  bits = lax.bitcast_convert_type(ratio, jnp.uint32)
  drawn = _dither(ratio.shape, step) >> (32 - MANTISSA_SHIFT)
  return ((bits + drawn) >> MANTISSA_SHIFT).astype(jnp.int32)


def _extend(upper: jax.Array) -> jax.Array:
  """Returns the f32 whose upper 12 bits are given, the others being 0."""
  return lax.bitcast_convert_type(upper << MANTISSA_SHIFT, jnp.float32)


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


def _is_blocks(x: Any) -> bool:
  return isinstance(x, Blocks)


def _zeros(moments: Any, dtype: Any, block_size: int, min_size: int) -> Any:
  """Returns zeros for each of `moments`, as `Blocks` from `min_size` on."""

  def zeros(x):
    if x.size < min_size:
      return jnp.zeros(x.shape, x.dtype)
    num_blocks = -(-x.size // block_size)
    return Blocks(
      jnp.zeros((num_blocks, block_size), dtype),
      jnp.zeros(num_blocks, jnp.float32),
    )

  return jax.tree.map(zeros, moments)


def _decode_tree(moments: Any, like: Any) -> Any:
  return jax.tree.map(
    lambda x, m: decode(m, x.shape) if _is_blocks(m) else m, like, moments
  )


def _encode_tree(moments: Any, like: Any, step: jax.Array) -> Any:
  return jax.tree.map(
    lambda m, x: encode(x, m, step) if _is_blocks(m) else x,
    like,
    moments,
    is_leaf=_is_blocks,
  )

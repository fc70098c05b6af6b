"""Convolution: XLA's own on TPU and GPU, matrix products on CPU."""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import dtypes
from jax import lax
from jax.typing import DTypeLike

from jaxprog.models import winograd

# Convolutions of less work stay XLA's own on CPU too: ours take a step of the
# quickstart from 2 to 8 s of compilation and save it no time.
_LEAST_FLOP = 2e8


def lecun_normal(
  rng: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """Returns the kernel of nn.initializers.lecun_normal(), bit for bit.

  It is drawn as a vector: the random bits of four dimensions take XLA's CPU
  compiler 2 s a shape, and 0.3 s in one dimension.
  """
  size = math.prod(shape)
  # The deviation of a standard normal cut off at -2 and 2.
  scale = jnp.sqrt(jnp.array(shape[-1] / size, dtype)) / jnp.array(
    0.87962566103423978, dtype
  )
  drawn = jax.random.truncated_normal(rng, -2, 2, (size,), dtype)
  return (drawn * scale).reshape(shape)


class Conv(nn.Module):
  """`nn.Conv` without a bias, padded by half of the kernel, rounded down.

  So are PyTorch's networks; at stride 2 'SAME' shifts the image by a pixel
  from there.

  Attributes:
    features: channels of the output.
    kernel_size: side of the kernel, in pixels.
    strides: step between two outputs, in pixels, both ways.
    dtype: of the computation and the result; None: that of the operands.
  """

  features: int
  kernel_size: int
  strides: int = 1
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the convolved NHWC images."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param('kernel', lecun_normal, shape)
    # The kernel stays as wide as it is, and so does its gradient.
    dtype = dtypes.canonicalize_dtype(x, kernel, dtype=self.dtype)
    return conv(x.astype(dtype), kernel, self.strides, self.kernel_size // 2)


def conv(
  x: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> jax.Array:
  """Returns NHWC images `x` convolved with an HWIO `kernel`.

  `padding` is the number of zeros on each side. The result has the dtype of
  `x`, to which the kernel is rounded; the kernel's gradient has the kernel's
  own, so that what many devices add up was rounded by none. What the program
  is compiled for decides how it is computed, not what compiles it. Has a
  reverse-mode derivative only.
  """
  return _conv(x, kernel, stride, ((padding, padding),) * 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, stride, pads):
  operands = x, kernel.astype(x.dtype)
  return _choose(cpu_forward, xla, operands, stride, pads)


def _conv_fwd(x, kernel, stride, pads):
  return _conv(x, kernel, stride, pads), (x, kernel)


def _conv_bwd(stride, pads, operands, dy):
  x, kernel = operands
  rounded = x, kernel.astype(x.dtype), dy
  return (
    _choose(cpu_input_grad, xla_input_grad, rounded, stride, pads),
    _choose(cpu_kernel_grad, xla_kernel_grad, (*operands, dy), stride, pads),
  )


_conv.defvjp(_conv_fwd, _conv_bwd)


def _choose(cpu, default, operands, stride, pads):
  """Returns what `default` makes of (x, kernel, ...), or on CPUs `cpu`."""
  cpu, default = (
    functools.partial(f, stride=stride, pads=pads) for f in (cpu, default)
  )
  x, kernel, *_ = operands
  height, width = _output_size(x, kernel, stride, pads)
  if 2 * x.shape[0] * height * width * kernel.size < _LEAST_FLOP:
    return default(*operands)
  return lax.platform_dependent(*operands, cpu=cpu, default=default)


def xla(x, kernel, stride, pads) -> jax.Array:
  """Returns XLA's own convolution."""
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    pads,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def xla_input_grad(x, kernel, dy, stride, pads) -> jax.Array:
  """Returns the gradient of `x` as JAX derives it from `xla`."""
  return jax.vjp(lambda x: xla(x, kernel, stride, pads), x)[1](dy)[0]


def xla_kernel_grad(x, kernel, dy, stride, pads) -> jax.Array:
  """Returns the gradient of `kernel`, as wide as it is.

  What JAX derives from `xla` would be as narrow as the images.
  """
  sides = zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], pads, strict=True)
  windows = [
    (low, side + stride * (out - 1) - size - low)
    for size, out, side, (low, _) in sides
  ]

  def grad(x, dy, dtype=kernel.dtype):
    found = lax.conv_general_dilated(
      x,
      dy,
      (1, 1),
      windows,
      rhs_dilation=(stride, stride),
      dimension_numbers=('CHWN', 'IHWO', 'HWNC'),
      preferred_element_type=dtype,
    )
    return found.astype(kernel.dtype)

  if x.dtype == kernel.dtype:
    return grad(x, dy)
  # cuDNN makes of bf16 nothing wider: XLA would widen the images, and read
  # and write a third more (ResNet-50 of 224 px: 517 MB an image, not 387).
  narrow = functools.partial(grad, dtype=x.dtype)
  return lax.platform_dependent(x, dy, cuda=narrow, default=grad)


def cpu_forward(x, kernel, stride, pads) -> jax.Array:
  """Returns the convolution in the formulation that CPUs like best."""
  dtype = x.dtype
  x, kernel = _at_least_float32(x, kernel)
  return _cpu_conv(x, kernel, stride, pads).astype(dtype)


# What the CPU's rule gains, in GFLOP/s of the plain convolution, XLA -> ours
# (benchmarks/convolutions.py; batch 128, f32, JAX 0.10.2, two cores of an AMD
# EPYC with AVX-512). Wherever XLA was as good, it stayed.
#   3x3, stride 1, 32 channels or more: Winograd. 64 channels of 16x16: forward
#     102 -> 207, kernel gradient 63 -> 90. 256 of 4x4: 177 -> 326, 161 -> 272.
#     32 of 32x32 (batch 256): 83 -> 143, 46 -> 90; but 16: 106 -> 60.
#   1x1: one matrix product. 64 -> 256 channels of 16x16: forward 31 -> 65,
#     input gradient 37 -> 170, kernel gradient 15 -> 115.
#   At most 16 outputs an image: shifted products. JAX releases differ most
#     here: 175 -> 175 for 256 channels of 4x4 in this one.
#   Input gradient, stride 2: phases. 64 channels of 32x32: 26 -> 52, 128 of
#     16x16: 61 -> 81, a 1x1 of 128 -> 256: 40 -> 72.
#   Kernel gradient, stride 2, 16 channels or more: shifted products. 128 of
#     16x16: 57 -> 68, 256 of 8x8: 109 -> 142.
#   The stem stays XLA's: 7x7 of 3 channels of 64x64, 45 and 24.
def _cpu_conv(x, kernel, stride, pads, contract=2):
  """Multiplies channels with the axis `contract` of `kernel`."""
  height, width = _output_size(x, kernel, stride, pads)
  if _suits_winograd(kernel, stride):
    return winograd.conv(x, kernel, pads, contract)
  if kernel.shape[:2] == (1, 1) or height * width <= 16:
    return shifted(x, kernel, stride, pads, contract)
  if contract == 3:
    kernel = kernel.swapaxes(2, 3)
  return xla(x, kernel, stride, pads)


def cpu_input_grad(x, kernel, dy, stride, pads) -> jax.Array:
  """Returns the gradient of `x`: convolutions at stride 1, interleaved.

  Input pixels whose positions have the same remainder by `stride` see the
  same part of the kernel, and each pixel of `dy` once. XLA instead spreads
  `dy` out with zeros between, and multiplies those.
  """
  dtype = x.dtype
  kernel, dy = _at_least_float32(kernel, dy)
  _, height, width, _ = x.shape
  (top, _), (left, _) = pads
  # Every phase has the size of the longest, in order to interleave.
  size = -(-height // stride), -(-width // stride)
  phases = [
    [
      _phase(dy, kernel, stride, (i + top, j + left), size)
      for j in range(stride)
    ]
    for i in range(stride)
  ]
  dx = winograd.interleave(phases)
  return dx[:, :height, :width].astype(dtype)


def _phase(dy, kernel, stride, first, size):
  """Returns the gradient of every stride-th pixel from `first` on.

  With the padding, pixel first + stride * q lies under the kernel's pixel
  first % stride + stride * t when dy[q + first // stride - t] is computed.
  """
  kernel = kernel[first[0] % stride :: stride, first[1] % stride :: stride]
  if 0 in kernel.shape:
    return jnp.zeros((dy.shape[0], *size, kernel.shape[2]), dy.dtype)
  pads = tuple(
    (taps - 1 - start // stride, n - m + start // stride)
    for taps, start, n, m in zip(
      kernel.shape[:2], first, size, dy.shape[1:3], strict=True
    )
  )
  return _cpu_conv(dy, kernel[::-1, ::-1], 1, pads, contract=3)


def cpu_kernel_grad(x, kernel, dy, stride, pads) -> jax.Array:
  """Returns the gradient of `kernel` in the formulation CPUs like best."""
  dtype = kernel.dtype
  x, kernel, dy = _at_least_float32(x, kernel, dy)
  height, width = dy.shape[1:3]
  if _suits_winograd(kernel, stride):
    dkernel = winograd.kernel_grad(x, dy, pads)
  elif (
    kernel.shape[:2] == (1, 1)
    or height * width <= 16
    or (stride > 1 and kernel.shape[2] >= 16)
  ):
    dkernel = shifted_kernel_grad(x, kernel, dy, stride, pads)
  else:
    dkernel = xla_kernel_grad(x, kernel, dy, stride, pads)
  return dkernel.astype(dtype)


def _suits_winograd(kernel, stride):
  return (
    stride == 1 and kernel.shape[:2] == (3, 3) and min(kernel.shape[2:]) >= 32
  )


def shifted(x, kernel, stride, pads, contract=2) -> jax.Array:
  """Returns the convolution as one matrix product per pixel of the kernel."""
  products = [
    lax.dot_general(part, kernel[i, j], (((3,), (contract - 2,)), ((), ())))
    for (i, j), part in _shifts(x, kernel, stride, pads)
  ]
  return functools.reduce(jnp.add, products)


def shifted_kernel_grad(x, kernel, dy, stride, pads) -> jax.Array:
  """Returns the gradient of `kernel`, one matrix product per pixel of it."""
  products = [
    winograd.product_over_pixels(part, dy)
    for _, part in _shifts(x, kernel, stride, pads)
  ]
  return jnp.stack(products).reshape(kernel.shape)


def _shifts(x, kernel, stride, pads, fill=0.0):
  """Yields ((i, j), all that the kernel's pixel (i, j) is multiplied with)."""
  height, width = _output_size(x, kernel, stride, pads)
  none = (0, 0, 0)
  rows, columns = ((*pad, 0) for pad in pads)
  x = lax.pad(x, jnp.array(fill, x.dtype), (none, rows, columns, none))
  for i, j in itertools.product(*map(range, kernel.shape[:2])):
    yield (
      (i, j),
      x[
        :,
        i : i + stride * (height - 1) + 1 : stride,
        j : j + stride * (width - 1) + 1 : stride,
      ],
    )


def _output_size(x, kernel, stride, pads):
  return [
    (n + low + high - side) // stride + 1
    for n, (low, high), side in zip(
      x.shape[1:3], pads, kernel.shape[:2], strict=True
    )
  ]


def _at_least_float32(*xs):
  """Products of bf16 in f32 are exact; CPUs have no others."""
  return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in xs)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
  """Returns the largest of each 3x3 window of NHWC images, at stride 2.

  Of equal values the first, row by row, gets the gradient, as in XLA. The
  pixel of padding on each side never wins. Has a reverse-mode derivative only.
  """
  return _max_pool_fwd(x)[0]


def _max_pool_fwd(x):
  def scattering(x):
    y = xla_max_pool(x)
    return y, jnp.zeros(y.shape, jnp.uint8)

  y, winner = lax.platform_dependent(x, tpu=scattering, default=_find_largest)
  return y, (x, winner)


def _max_pool_bwd(residuals, dy):
  dx = lax.platform_dependent(
    *residuals,
    dy,
    tpu=lambda x, _, dy: jax.vjp(xla_max_pool, x)[1](dy)[0],
    default=_hand_to_winners,
  )
  return (dx,)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def xla_max_pool(x: jax.Array) -> jax.Array:
  """Returns XLA's own pooling."""
  return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def _find_largest(x):
  """Returns the largest of each window and its index, 3 * i + j."""
  # Only its shape is that of a convolution.
  kernel = np.empty((3, 3, 1, 1))
  shifts = _shifts(x, kernel, 2, ((1, 1), (1, 1)), -jnp.inf)
  _, best = next(shifts)
  winner = jnp.zeros(best.shape, jnp.uint8)
  for (i, j), part in shifts:
    # Not `part > best`: a NaN wins, as in XLA.
    keep = best >= part
    best = jnp.where(keep, best, part)
    winner = jnp.where(keep, winner, jnp.uint8(3 * i + j))
  return best, winner


def _hand_to_winners(x, winner, dy):
  """Returns the gradient of `x`, which goes to each window's winner.

  XLA's select-and-scatter walks the windows one by one on CPU, and on GPUs
  adds up in no fixed order.
  """
  around = ((0, 0), (1, 1), (1, 1), (0, 0))
  shape, padded, winner = dy.shape, jnp.pad(dy, around), jnp.pad(winner, around)

  def phase(*first: int) -> jax.Array:
    """As `_phase` of a convolution."""
    total = jnp.zeros(shape, dy.dtype)
    for i, j in itertools.product(*(range(a % 2, 3, 2) for a in first)):
      top, left = (1 + (a - b) // 2 for a, b in zip(first, (i, j), strict=True))
      part = np.s_[:, top : top + shape[1], left : left + shape[2]]
      total += jnp.where(winner[part] == 3 * i + j, padded[part], 0)
    return total

  dx = winograd.interleave([[phase(i, j) for j in (1, 2)] for i in (1, 2)])
  return dx[:, : x.shape[1], : x.shape[2]]

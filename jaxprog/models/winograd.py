"""3x3 convolution at stride 1 with 2.25 times fewer multiplications.

Winograd's F(2x2, 3x3), after Lavin and Gray 2015 (arXiv:1509.09308). Each 4x4
tile of the image becomes 16 numbers a channel; 16 matrix products over all
tiles stand in for the 36 products of a 2x2 output. The transforms only add
and halve, so the error stays that of f32: 1e-6 of the largest value.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
# A 4x4 nest of arrays, one for each number of a transformed tile.
_Planes = list[list[jax.Array]]

# Above some 8 MB the transformed tiles leave the cache: 64 channels of
# 128 images of 16x16 went from 57 to 139 GFLOP/s in eight bands.
_BAND_BYTES = 8 << 20


def conv(
  x: jax.Array, kernel: jax.Array, pads: Pads, contract: int = 2
) -> jax.Array:
  """Returns NHWC `x`, with zeros around it, convolved with a 3x3 `kernel`.

  The channels of `x` are those of the axis `contract` of `kernel`, 2 or 3.
  Transposing the kernel instead would cost more than the convolution.
  """
  height, width, tiles = _sizes(x, pads)
  x = _pad_axis(x, 1, pads[0][0], 2 * tiles[0] + 2)
  kernels = _apply(kernel, _kernel_1d)

  def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.dot_general(x, kernel, (((3,), (contract - 2,)), ((), ())))

  def band(first_row: jax.Array | int, rows: int) -> jax.Array:
    planes = _tiles(x, first_row, rows, pads[1][0], tiles[1])
    products = jax.tree.map(product, planes, kernels)
    return interleave(_apply(products, _output_1d))

  def write(y: jax.Array, part: jax.Array, first_row: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(y, part, 2 * first_row, axis=1)

  shape = (x.shape[0], 2 * tiles[0], 2 * tiles[1], kernel.shape[5 - contract])
  y = _in_bands(band, write, shape, x, tiles)
  return y[:, :height, :width]


def kernel_grad(x: jax.Array, dy: jax.Array, pads: Pads) -> jax.Array:
  """Returns the gradient of the 3x3 kernel from that of the output, `dy`."""
  height, width, tiles = _sizes(x, pads)
  x = _pad_axis(x, 1, pads[0][0], 2 * tiles[0] + 2)
  ends = ((0, 2 * tiles[0] - height), (0, 2 * tiles[1] - width))
  dy = jnp.pad(dy, ((0, 0), *ends, (0, 0)))

  def band(first_row: jax.Array | int, rows: int) -> jax.Array:
    planes = _tiles(x, first_row, rows, pads[1][0], tiles[1])
    grads = lax.dynamic_slice_in_dim(dy, 2 * first_row, 2 * rows, axis=1)
    phases = [[grads[:, i::2, j::2] for j in range(2)] for i in range(2)]
    spread = _apply(phases, _output_1d_transposed)
    return _stack(jax.tree.map(product_over_pixels, planes, spread))

  shape = (4, 4, x.shape[3], dy.shape[3])
  total = _in_bands(band, lambda a, b, _: a + b, shape, x, tiles)
  return _stack(_apply(total, _kernel_1d_t))


def _sizes(x, pads):
  """Returns the height and width of the output, then those in tiles."""
  height, width = (
    size + low + high - 2
    for size, (low, high) in zip(x.shape[1:3], pads, strict=True)
  )
  return height, width, (-(-height // 2), -(-width // 2))


def _pad_axis(x, axis, low, size):
  """Returns `x` with `low` zeros before it and `size` pixels along `axis`."""
  pads = [(0, 0, 0)] * x.ndim
  pads[axis] = (low, size - x.shape[axis] - low, 0)
  return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _in_bands(band, join, shape, x, tiles):
  """Returns what `band` makes of rows of tiles, joined into zeros of `shape`.

  The bands are of equal height. Rows, not images: the batch may be sharded over
  devices.
  """
  size = 16 * x.shape[0] * tiles[0] * tiles[1] * x.shape[3] * x.dtype.itemsize
  wanted = min(-(-size // _BAND_BYTES), tiles[0])
  num = next(n for n in range(wanted, tiles[0] + 1) if tiles[0] % n == 0)
  rows = tiles[0] // num
  if num == 1:
    return band(0, rows)
  return lax.fori_loop(
    0,
    num,
    lambda i, y: join(y, band(i * rows, rows), i * rows),
    jnp.zeros(shape, x.dtype),
  )


def _tiles(x, first_row, rows, low, columns) -> _Planes:
  band = lax.dynamic_slice_in_dim(x, 2 * first_row, 2 * rows + 2, axis=1)
  band = _pad_axis(band, 2, low, 2 * columns + 2)
  tiles = [
    [
      band[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
      for j in range(4)
    ]
    for i in range(4)
  ]
  return _apply(tiles, _input_1d)


def _stack(tile: _Planes) -> jax.Array:
  return jnp.stack([jnp.stack(row) for row in tile])


def _apply(tile: Any, f: Callable) -> _Planes:
  """Applies `f` to every column of `tile`, then to every row of that."""
  columns = [f(*column) for column in zip(*tile, strict=True)]
  return [list(f(*row)) for row in zip(*columns, strict=True)]


def _input_1d(a, b, c, d):
  return a - c, b + c, c - b, b - d


def _kernel_1d(a, b, c):
  return a, (a + b + c) / 2, (a - b + c) / 2, c


def _kernel_1d_t(a, b, c, d):
  return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d


def _output_1d(a, b, c, d):
  return a + b + c, b - c - d


def _output_1d_transposed(a, b):
  return a, a + b, a - b, -b


def interleave(tile: _Planes) -> jax.Array:
  """Returns an image that has tile[i][j] at rows i::n and columns j::n."""
  y = jnp.stack([jnp.stack(row, axis=3) for row in tile], axis=2)
  n, height, i, width, j, channels = y.shape
  return y.reshape(n, height * i, width * j, channels)


def product_over_pixels(x: jax.Array, dy: jax.Array) -> jax.Array:
  """Returns the sum over all pixels of the products of channels, (C, O)."""
  # With all pixels in one dimension XLA multiplies in place; with three it
  # transposes a copy first.
  x, dy = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
  return lax.dot_general(x, dy, (((0,), (0,)), ((), ())))

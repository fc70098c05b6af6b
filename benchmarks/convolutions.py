"""Measures the formulations among which `jaxprog.models.conv` chooses on CPU.

One row a convolution of a ResNet and direction; numbers are GFLOP/s of the
plain convolution, the fastest of several alternating runs, so that Winograd
may exceed what the machine multiplies. `ours` is what the rule takes.

  python benchmarks/convolutions.py --filter=3x3
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprog.models import conv, winograd


class Shape(NamedTuple):
  """One convolution; `size` is the side of the input image in pixels."""

  batch: int
  size: int
  channels: int
  features: int
  side: int
  stride: int

  @property
  def pads(self) -> winograd.Pads:
    """Half of the kernel on each side."""
    return ((self.side // 2,) * 2,) * 2

  @property
  def out_size(self) -> int:
    """The side of the output in pixels."""
    return (self.size - 1) // self.stride + 1

  @property
  def gflop(self) -> float:
    """Multiplications and additions, counting those with padding."""
    pixels = self.batch * self.out_size**2
    return 2e-9 * pixels * self.channels * self.features * self.side**2

  def __str__(self):
    return (
      f'{self.batch:3d}x{self.size}x{self.size}x{self.channels} '
      f'{self.side}x{self.side}/{self.stride} -> {self.features}'
    )


def shapes() -> Iterator[Shape]:
  """Yields the convolutions of ResNets at 8 to 224 px, and narrower ones."""
  yield Shape(128, 64, 3, 64, 7, 2)
  yield Shape(16, 224, 3, 64, 7, 2)
  yield Shape(128, 32, 3, 64, 3, 1)
  for batch, size in ((128, 16), (16, 56)):
    for i in range(4):
      n, c = size >> i, 64 << i
      yield Shape(batch, n, c, c, 3, 1)
      yield Shape(batch, 2 * n, c, c, 3, 2)
      yield Shape(batch, n, c, 4 * c, 1, 1)
      yield Shape(batch, n, 4 * c, c, 1, 1)
      yield Shape(batch, 2 * n, 2 * c, 4 * c, 1, 2)
  for channels in (16, 32):
    for batch, size in ((256, 32), (256, 8), (128, 4), (64, 2)):
      yield Shape(batch, size, channels, channels, 3, 1)
  for size in (1, 2, 4):
    yield Shape(16, size, 512, 512, 3, 1)


def candidates(shape: Shape) -> dict[str, dict[str, Callable]]:
  """Returns the formulations of each direction, of (x, kernel, dy)."""
  rest = shape.stride, shape.pads
  forward = {
    'xla': lambda x, kernel, dy: conv.xla(x, kernel, *rest),
    'ours': lambda x, kernel, dy: conv.cpu_forward(x, kernel, *rest),
  }
  input_grad = {
    'xla': lambda x, kernel, dy: conv.xla_input_grad(x, kernel, dy, *rest),
    'ours': lambda x, kernel, dy: conv.cpu_input_grad(x, kernel, dy, *rest),
  }
  kernel_grad = {
    'xla': lambda x, kernel, dy: conv.xla_kernel_grad(x, kernel, dy, *rest),
    'ours': lambda x, kernel, dy: conv.cpu_kernel_grad(x, kernel, dy, *rest),
  }
  if shape.channels > 3:
    forward['shifted'] = lambda x, kernel, dy: conv.shifted(x, kernel, *rest)
    kernel_grad['shifted'] = lambda x, kernel, dy: conv.shifted_kernel_grad(
      x, kernel, dy, *rest
    )
    if shape.side == 3 and shape.stride == 1:
      forward['winograd'] = lambda x, kernel, dy: winograd.conv(
        x, kernel, shape.pads
      )
      kernel_grad['winograd'] = lambda x, kernel, dy: winograd.kernel_grad(
        x, dy, shape.pads
      )
  return {
    'forward': forward,
    'input grad': input_grad,
    'kernel grad': kernel_grad,
  }


def measure(
  fs: dict[str, Callable], operands: tuple, rounds: int
) -> dict[str, float]:
  """Returns the seconds of the fastest run of each function."""
  compiled = {name: jax.jit(f) for name, f in fs.items()}
  best = dict.fromkeys(fs, float('inf'))
  for i in range(rounds + 1):
    for name, f in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(f(*operands))
      # The first run compiles.
      if i:
        best[name] = min(best[name], time.perf_counter() - start)
  return best


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--filter', default='', help='only rows with this text')
  parser.add_argument('--rounds', type=int, default=8)
  args = parser.parse_args()
  names = ('xla', 'shifted', 'winograd', 'ours')
  print(f'{"":44}' + ''.join(f'{name:>10}' for name in names))
  rng = np.random.default_rng(0)
  for shape in dict.fromkeys(shapes()):
    if args.filter not in str(shape):
      continue
    x, kernel, dy = (
      jnp.asarray(rng.standard_normal(s, np.float32))
      for s in (
        (shape.batch, shape.size, shape.size, shape.channels),
        (shape.side, shape.side, shape.channels, shape.features),
        (shape.batch, shape.out_size, shape.out_size, shape.features),
      )
    )
    for direction, fs in candidates(shape).items():
      if direction == 'input grad' and shape.channels == 3:
        continue  # Nobody asks for the gradient of an image.
      seconds = measure(fs, (x, kernel, dy), args.rounds)
      speeds = ''.join(
        f'{shape.gflop / seconds[name]:10.0f}' if name in seconds else 10 * ' '
        for name in names
      )
      print(f'{shape!s:32}{direction:12}{speeds}', flush=True)


if __name__ == '__main__':
  main()

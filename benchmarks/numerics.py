"""Measures what sums over devices lose: a kernel's gradient against float64.

A 3x3 convolution of bf16 images of noise whose batch is divided over virtual
CPU devices; all of them add up the kernel's gradient. Prints the root mean
square error as a part of that of the gradient itself:

  f32        as training does on CPU and TPU: nothing is rounded to bf16.
  bf16       each device rounds its own to bf16; they are added in f32, and
             the sum is rounded. As XLA's CPUs exchange bf16.
  bf16 ring  the same, but each addition is rounded, one device after another:
             what adds in bf16 does at worst.

  python benchmarks/numerics.py --devices=1,8,64
"""

import argparse
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprog.models import conv

SIDE, CHANNELS = 8, 32
PADS = ((1, 1), (1, 1))


def main() -> None:
  """Prints a row for each number of devices."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--devices', default='1,8,64', help='a,b')
  parser.add_argument('--batch_size', type=int, default=512)
  parser.add_argument('--peer', type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.peer:
    print_row(args.peer, args.batch_size)
    return
  print(f'{"devices":>7} {"f32":>10} {"bf16":>10} {"bf16 ring":>10}')
  for number in args.devices.split(','):
    flag = f'--xla_force_host_platform_device_count={number}'
    command = [sys.executable, __file__, f'--peer={number}']
    subprocess.run(
      [*command, f'--batch_size={args.batch_size}'],
      env={**os.environ, 'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'},
      check=True,
    )


def print_row(num_devices: int, batch_size: int) -> None:
  """Prints the errors of each way to add up."""
  rng = np.random.default_rng(0)
  shape = batch_size, SIDE, SIDE, CHANNELS
  x = jnp.asarray(np.maximum(rng.normal(size=shape), 0), jnp.bfloat16)
  dy = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  with jax.enable_x64(True):
    wide = (a.astype(jnp.float64) for a in (x, dy))
    exact = np.asarray(kernel_grad(jnp.float64, *wide))
  own = (np.split(np.asarray(a), num_devices) for a in (x, dy))
  parts = [kernel_grad(jnp.bfloat16, *part) for part in zip(*own, strict=True)]
  mesh = jax.make_mesh((num_devices,), ('data',), axis_types=(AxisType.Auto,))
  x, dy = jax.device_put((x, dy), NamedSharding(mesh, PartitionSpec('data')))
  found = [kernel_grad(dtype, x, dy) for dtype in (jnp.float32, jnp.bfloat16)]
  found.append(functools.reduce(jnp.add, parts))
  scale = np.sqrt(np.mean(exact**2))
  errors = [
    np.sqrt(np.mean((np.asarray(a, np.float64) - exact) ** 2)) / scale
    for a in found
  ]
  row = ' '.join(f'{error:10.2e}' for error in errors)
  print(f'{num_devices:7} {row}', flush=True)


@functools.partial(jax.jit, static_argnums=0)
def kernel_grad(dtype, x, dy) -> jax.Array:
  """Returns the gradient of a kernel of `dtype`."""
  kernel = jnp.zeros((3, 3, CHANNELS, CHANNELS), dtype)
  return conv.xla_kernel_grad(x, kernel, dy, 1, PADS)


if __name__ == '__main__':
  main()

"""Measures what saving and resuming cost, with a state of ResNet-50's size.

Parameters, momentum and batch statistics are random numbers, which do not
compress. Prints medians over the rounds: how long the training thread stands
still for a save, when the save has committed and has its manifest, and how
long it takes to verify and to restore it.

  python benchmarks/checkpoint.py --ema --directory=runs
"""

import argparse
import functools
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax

from jaxprog.models import resnet
from jaxprog.reliability import checkpoints, integrity
from jaxprog.training import state as state_lib


def main() -> None:
  """Prints seconds and bytes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet50')
  parser.add_argument('--ema', action='store_true', help='averaged weights too')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--directory', help='on the disk to measure')
  args = parser.parse_args()
  state = create_state(args.model, args.ema)
  with tempfile.TemporaryDirectory(dir=args.directory) as folder:
    directory = pathlib.Path(folder).resolve() / 'checkpoints' / 'stage'
    rows = measure(state, directory, args.rounds)
    (step, *_) = (directory / 'latest').glob('[0-9]*')
    sizes = [p.stat().st_size for p in step.rglob('*') if p.is_file()]
  in_memory = sum(x.nbytes for x in jax.tree.leaves(state))
  print(
    f'{in_memory / 1e6:.0f} MB in memory, {sum(sizes) / 1e6:.0f} MB on disk'
  )
  for name in rows[0]:
    values = [row[name] for row in rows]
    print(
      f'{name:34} {statistics.median(values):7.3f} s, '
      f'{min(values):.3f} to {max(values):.3f}, n = {len(values)}'
    )


def create_state(model: str, ema: bool) -> state_lib.TrainState:
  """Returns a state as SGD with momentum trains it, of random numbers."""
  network = resnet.create_model(
    model, num_classes=1000, image_size=224, num_filters=64
  )
  init = functools.partial(state_lib.init_variables, network, 224)
  tx = optax.sgd(0.1, momentum=0.9)
  shapes = jax.eval_shape(
    lambda rng: state_lib.create_state(init(rng), tx, ema=ema),
    jax.random.key(0),
  )
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return structure.unflatten(
    [
      jax.random.normal(key, x.shape, x.dtype)
      if jnp.issubdtype(x.dtype, jnp.floating)
      else jnp.zeros(x.shape, x.dtype)
      for key, x in zip(keys, leaves, strict=True)
    ]
  )


def measure(
  state: state_lib.TrainState, directory: pathlib.Path, rounds: int
) -> list[dict[str, float]]:
  """Returns seconds by what they were spent on; a first round is left out."""
  jax.block_until_ready(state)
  rows = []
  with checkpoints.Checkpoints(directory) as saved:
    for step in range(rounds + 1):
      began = time.monotonic()
      saved.save_latest(state.replace(step=jnp.int32(step)), {})
      blocked = time.monotonic()
      saved.wait()
      hashed = time.monotonic()
      assert not integrity.find_damage(directory / 'latest' / str(step))
      verified = time.monotonic()
      jax.block_until_ready(saved.restore_latest(state))
      restored = time.monotonic()
      rows.append(
        {
          'training thread blocked by a save': blocked - began,
          'saved, hashed and committed': hashed - began,
          'one step verified': verified - hashed,
          'all steps verified, one restored': restored - verified,
        }
      )
  return rows[1:]


if __name__ == '__main__':
  main()

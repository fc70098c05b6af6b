"""Measures the optimizer alone: time and bytes, beside the plain optax one.

New parameters and a new state from gradients of noise, f32, in the shapes of
a ResNet, compiled with params and state donated. Contestants take steps in
turn; ratios are medians over the rounds, and above 1 where slower.

  python benchmarks/update.py --model=resnet18
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprog import stages, start_from
from jaxprog.models import resnet
from jaxprog.optim import eight_bit, optimizers

# Whom each is compared with.
PEERS = {
  'scale_by_adam_8bit': 'scale_by_adam',
  'trace_8bit': 'trace',
  'jaxprog adamw': 'optax.adamw',
  'jaxprog adamw_8bit': 'optax.adamw',
  'jaxprog lamb': 'optax.lamb',
  'jaxprog sgd_momentum': 'optax.sgd',
}
RATE, DECAY = 1e-3, 1e-4


def transformations() -> dict[str, optax.GradientTransformation]:
  """Returns the contestants by name."""
  return {
    'scale_by_adam': optax.scale_by_adam(),
    'scale_by_adam_8bit': eight_bit.scale_by_adam_8bit(),
    'trace': optax.trace(0.9),
    'trace_8bit': eight_bit.trace_8bit(0.9),
    'optax.adamw': optax.adamw(
      RATE, weight_decay=DECAY, mask=optimizers.weight_decay_mask
    ),
    'jaxprog adamw': ours('adamw'),
    'jaxprog adamw_8bit': ours('adamw_8bit'),
    'optax.lamb': optax.lamb(RATE, weight_decay=DECAY),
    'jaxprog lamb': ours('lamb'),
    'optax.sgd': optax.chain(
      optax.add_decayed_weights(DECAY, optimizers.weight_decay_mask),
      optax.sgd(RATE, 0.9),
    ),
    'jaxprog sgd_momentum': ours('sgd_momentum'),
  }


def ours(name: str) -> optax.GradientTransformation:
  """Returns an optimizer as a stage has it, with the step's rate and sign."""
  config = start_from('default')
  stage = {'name': name, 'dataset': 'digits', 'optimizer': name}
  config.stages = [{**stage, 'weight_decay': DECAY}]
  direction = optimizers.create_optimizer(stages.create_stages(config)[0])
  return optax.chain(direction, optax.scale(-RATE))


def main() -> None:
  """Prints milliseconds a step, megabytes of state and ratios to the peer."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet18')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--steps', type=int, default=3, help='in a round')
  args = parser.parse_args()
  shapes = param_shapes(args.model)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  print(f'{args.model}, {count / 1e6:.1f} M parameters, {jax.devices()}')
  names = transformations()
  steps = {k: create_step(tx, shapes, args.steps) for k, tx in names.items()}
  size = {k: state_bytes(tx, shapes) for k, tx in names.items()}
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for _ in range(args.rounds):
    for name, step in steps.items():
      seconds[name].append(step())
  for name, times in seconds.items():
    row = f'{name:21}{1e3 * statistics.median(times):7.1f} ms'
    row += f' {size[name] / 1e6:7.1f} MB'
    if peer := PEERS.get(name):
      both = zip(times, seconds[peer], strict=True)
      ratio = statistics.median(a / b for a, b in both)
      row += f'   {ratio:5.2f}x the time, '
      row += f'{size[name] / size[peer]:.3f}x the bytes of {peer}'
    print(row)


def param_shapes(name: str) -> Any:
  """Returns the shapes of the parameters of a model for 1000 classes."""
  model = resnet.create_model(name, num_classes=1000, image_size=224)
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), image)['params']


def state_bytes(tx: optax.GradientTransformation, shapes: Any) -> int:
  """Returns the bytes of all arrays of a state."""
  state = jax.eval_shape(tx.init, shapes)
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)
  )


def create_step(
  tx: optax.GradientTransformation, shapes: Any, num_steps: int
) -> Callable[[], float]:
  """Compiles a step; returns a function that takes some and times one."""
  leaves, treedef = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  noise = [
    jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
  ]
  grads = jax.tree.unflatten(treedef, noise)
  params = jax.tree.map(jnp.zeros_like, grads)
  state = tx.init(params)

  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  start = time.perf_counter()
  compiled = (
    jax.jit(update, donate_argnums=(1, 2)).lower(grads, state, params).compile()
  )
  print(f'compiled in {time.perf_counter() - start:.1f} s', flush=True)

  def step() -> float:
    nonlocal params, state
    start = time.perf_counter()
    for _ in range(num_steps):
      params, state = compiled(grads, state, params)
    jax.block_until_ready(params)
    return (time.perf_counter() - start) / num_steps

  step()
  return step


if __name__ == '__main__':
  main()

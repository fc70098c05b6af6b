"""Measures a whole training step: ours, plain Flax and PyTorch, in one run.

Forward, backward and SGD with momentum on one batch of noise, on CPU.
Each contestant takes some steps in turn, so that all see the same machine,
the first of them uncounted, because the other's turn has emptied caches and
given memory back; the ratios are medians over the rounds.

  python benchmarks/step.py --model=resnet18 --image_size=64 --batch_size=128
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import numpy as np

BLOCK_SIZES = {
  'resnet10': (1, 1, 1, 1),
  'resnet18': (2, 2, 2, 2),
  'resnet50': (3, 4, 6, 3),
}
LAYOUTS = ('nchw', 'channels_last')
NUM_CLASSES = 1000


def main() -> None:
  """Prints images per second and ratios."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet18', choices=BLOCK_SIZES)
  parser.add_argument('--image_size', type=int, default=64)
  parser.add_argument('--batch_size', type=int, default=128)
  parser.add_argument('--stem', default='auto', choices=('auto', 'published'))
  parser.add_argument(
    '--dtype', default='float32', choices=('float32', 'bfloat16')
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=3, help='in a round')
  parser.add_argument('--threads', type=int, default=os.cpu_count())
  parser.add_argument('--skip_plain', action='store_true')
  parser.add_argument(
    '--torch_python', default=sys.executable, help='has PyTorch installed'
  )
  parser.add_argument('--peer', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.peer:
    run_peer(args, *map(int, args.peer))
  else:
    compare(args)


def compare(args: argparse.Namespace) -> None:
  """Takes steps in turn and prints the table."""
  steps = jax_steps(args)
  steps.update(torch_steps(args, steps.pop('stem')))
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(args.rounds):
    for name, step in steps.items():
      turn = [step() for _ in range(args.steps + 1)]
      seconds[name].append(statistics.mean(turn[1:]))
  ours = seconds['jaxprog']
  print(
    f'{args.model}, {args.image_size} px, batch {args.batch_size}, {args.dtype}'
  )
  for name, times in seconds.items():
    speed = args.batch_size / statistics.median(times)
    ratio = statistics.median(a / b for a, b in zip(times, ours, strict=True))
    print(f'{name:22} {speed:7.1f} images/s   jaxprog is {ratio:5.2f}x')


def make_batch(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  """Returns images (N, S, S, 3) f32 of noise and labels (N,)."""
  rng = np.random.default_rng(0)
  shape = (args.batch_size, args.image_size, args.image_size, 3)
  image = rng.standard_normal(shape, np.float32)
  return image, rng.integers(NUM_CLASSES, size=args.batch_size)


def jax_steps(args: argparse.Namespace) -> dict:
  """Returns functions that take one step and return its seconds."""
  from jaxprog.models import conv, resnet

  model = resnet.create_model(
    args.model,
    num_classes=NUM_CLASSES,
    image_size=args.image_size,
    dtype=args.dtype,
  )
  if args.stem == 'published':
    model = model.clone(stem=resnet.Stem(stride=2, pool=True))
  steps = {'stem': model.stem, 'jaxprog': jax_step(model, args)}
  if not args.skip_plain:

    def plain_conv(x, kernel, stride, padding):
      return conv.xla(x, kernel, stride, ((padding, padding),) * 2)

    with mock.patch.multiple(conv, conv=plain_conv, max_pool=conv.xla_max_pool):
      steps['plain Flax'] = jax_step(model, args)
  return steps


def jax_step(model, args: argparse.Namespace) -> Callable[[], float]:
  """Compiles one training step of `model`."""
  import jax
  import jax.numpy as jnp
  import optax

  image, label = map(jnp.asarray, make_batch(args))
  tx = optax.sgd(0.01, momentum=0.9)

  def loss_fn(params, batch_stats, image, label):
    logits, new = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      image,
      train=True,
      mutable=['batch_stats'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return losses.mean(), new['batch_stats']

  def train_step(state, image, label):
    params, batch_stats, opt_state = state
    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, batch_stats, image, label
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, batch_stats, opt_state), loss

  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(0), image[:1])
  params = variables['params']
  state = params, variables['batch_stats'], tx.init(params)
  start = time.perf_counter()
  compiled = (
    jax.jit(train_step, donate_argnums=0).lower(state, image, label).compile()
  )
  print(f'compiled in {time.perf_counter() - start:.1f} s', flush=True)

  def step() -> float:
    nonlocal state
    start = time.perf_counter()
    state, loss = compiled(state, image, label)
    loss.block_until_ready()
    return time.perf_counter() - start

  step()
  return step


def torch_steps(args: argparse.Namespace, stem) -> dict:
  """Returns the same for PyTorch, which runs in a process of its own."""
  command = [args.torch_python, __file__, *sys.argv[1:]]
  peer = subprocess.Popen(
    [*command, '--peer', str(stem.stride), str(int(stem.pool))],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def step(layout: str) -> float | None:
    try:
      peer.stdin.write(f'{layout}\n')
      peer.stdin.flush()
      return float(peer.stdout.readline())
    except (BrokenPipeError, ValueError):
      return None

  if step(LAYOUTS[0]) is None:
    print('PyTorch is not measured: it is not installed.')
    return {}
  return {
    f'PyTorch {layout}': functools.partial(step, layout) for layout in LAYOUTS
  }


def run_peer(args: argparse.Namespace, stride: int, pool: int) -> None:
  """Takes a step for each layout read from stdin and prints its seconds."""
  try:
    import torch
  except ImportError:
    return
  torch.set_num_threads(args.threads)
  steps = {layout: torch_step(args, layout, stride, pool) for layout in LAYOUTS}
  for line in sys.stdin:
    print(steps[line.strip()](), flush=True)


def torch_step(
  args: argparse.Namespace, layout: str, stride: int, pool: int
) -> Callable[[], float]:
  """Builds the same network in PyTorch."""
  import torch
  from torch.nn import functional

  image, label = map(torch.from_numpy, make_batch(args))
  image = image.permute(0, 3, 1, 2).contiguous()
  model = torch_resnet(args.model, stride, pool)
  if layout == 'channels_last':
    model = model.to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

  def step() -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    with torch.autocast(
      'cpu', torch.bfloat16, enabled=args.dtype == 'bfloat16'
    ):
      logits = model(image)
    loss = functional.cross_entropy(logits.float(), label)
    loss.backward()
    optimizer.step()
    loss.item()
    return time.perf_counter() - start

  step()
  return step


def torch_resnet(name: str, stride: int, pool: int):
  """Returns ResNet v1.5 as torchvision has it, with a choice of stem."""
  from torch import nn

  bottleneck = name == 'resnet50'

  def conv_norm(channels, features, side, stride=1):
    return nn.Sequential(
      nn.Conv2d(channels, features, side, stride, side // 2, bias=False),
      nn.BatchNorm2d(features),
    )

  class Block(nn.Module):
    def __init__(self, channels, filters, stride):
      super().__init__()
      features = filters * 4 if bottleneck else filters
      if bottleneck:
        self.body = nn.Sequential(
          conv_norm(channels, filters, 1),
          nn.ReLU(inplace=True),
          conv_norm(filters, filters, 3, stride),
          nn.ReLU(inplace=True),
          conv_norm(filters, features, 1),
        )
      else:
        self.body = nn.Sequential(
          conv_norm(channels, filters, 3, stride),
          nn.ReLU(inplace=True),
          conv_norm(filters, features, 3),
        )
      same = channels == features and stride == 1
      self.shortcut = (
        nn.Identity() if same else conv_norm(channels, features, 1, stride)
      )

    def forward(self, x):
      return (self.body(x) + self.shortcut(x)).relu_()

  layers = [conv_norm(3, 64, 7, stride), nn.ReLU(inplace=True)]
  if pool:
    layers.append(nn.MaxPool2d(3, 2, 1))
  channels = 64
  for i, size in enumerate(BLOCK_SIZES[name]):
    for j in range(size):
      layers.append(Block(channels, 64 * 2**i, 2 if i and not j else 1))
      channels = 64 * 2**i * (4 if bottleneck else 1)
  layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
  return nn.Sequential(*layers, nn.Linear(channels, NUM_CLASSES))


if __name__ == '__main__':
  main()

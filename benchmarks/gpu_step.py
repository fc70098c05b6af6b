"""Images/s of one training step on a GPU: ours, plain Flax's, PyTorch's.

The two programs of benchmarks/compiled_step.py on this machine's first device,
and torchvision's network as PyTorch's users train it: channels_last, autocast,
fused SGD, eager and compiled, in a process of its own. Images are noise that
lies on the device. All take turns; a turn is --steps steps, sent one after the
other, and a wait. Prints rows as benchmarks/gpu.py reads them.

  PYTHONPATH=. python benchmarks/gpu_step.py --model=resnet50 --image_size=224
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import step as step_lib
from benchmarks.gpu import say
from jaxprog import formats

NUM_CLASSES = 1000
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
# Seconds a step, and of sending it; a turn takes so many steps.
Times = tuple[float, float]
Turn = Callable[[int], Times]
Facts = dict[str, Any]


class NotInstalledError(Exception):
  """A contestant is not here."""


def main() -> None:
  """Prints a row for each contestant."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet50')
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument('--batch_size', type=int, default=256)
  parser.add_argument('--num_filters', type=int, default=64)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument(
    '--contestants', default='jaxprog,plain Flax,PyTorch,PyTorch compiled'
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=20, help='of a turn')
  parser.add_argument(
    '--seconds', type=float, default=1e9, help='then no round is begun'
  )
  parser.add_argument('--programs', help='where what is compiled is kept')
  parser.add_argument('--label', help='what the rows are called')
  parser.add_argument('--toy', action='store_true', help=argparse.SUPPRESS)
  parser.add_argument('--peer', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.peer:
    run_peer(args, *map(int, args.peer))
  else:
    if args.programs:
      from jaxprog.training import devices

      devices.keep_compiled(pathlib.Path(args.programs))
    compare(args)


def compare(args: argparse.Namespace) -> None:
  """Lets the contestants take turns and prints what came of it.

  Each is in the rounds as soon as it is ready: whatever becomes of the next
  one, there are figures.
  """
  ends = time.perf_counter() + args.seconds
  peer = Peer(args.image_size)
  turns: dict[str, Turn] = {}
  facts: dict[str, Facts] = {}
  rounds: list[dict[str, Times]] = []
  for name in args.contestants.split(','):
    try:
      turn, facts[name] = create(name, args, peer)
      turn(2)  # Warm.
      facts[name]['peak'] = read_peak()
    except NotInstalledError:
      say(name, 'not installed', {})
    except Exception as e:  # The others go on.
      message = ' '.join(f'{type(e).__name__}: {e}'.split())[:200]
      say(name, f'FAILED: {message}', {}, failed=message)
    else:
      turns[name] = turn
      take_round(args, turns, facts, rounds)
  while len(rounds) < len(turns) + args.rounds - 1:
    if time.perf_counter() > ends:
      break
    take_round(args, turns, facts, rounds)


def take_round(
  args: argparse.Namespace,
  turns: dict[str, Turn],
  facts: dict[str, Facts],
  rounds: list[dict[str, Times]],
) -> None:
  """Adds a round to `rounds` and prints what all of them say."""
  rounds.append({name: turn(args.steps) for name, turn in turns.items()})
  for name in turns:
    report(args, name, rounds, facts[name])
  if {'jaxprog', 'jaxprog f32'} <= {*turns}:
    compare_precisions(rounds, facts)


def create(
  name: str, args: argparse.Namespace, peer: 'Peer'
) -> tuple[Turn, Facts]:
  """Returns turns of a contestant, and what is known of it before them."""
  match name:
    case 'jaxprog':
      return ours(args, args.dtype)
    case 'jaxprog f32':  # As XLA multiplies it by default.
      return ours(args, 'float32')
    case 'plain Flax':
      return plain(args)
    case _:
      return torch_peer(peer, name)


def report(
  args: argparse.Namespace,
  name: str,
  rounds: list[dict[str, Times]],
  facts: Facts,
) -> None:
  """Prints a contestant's row; ratios are medians over common rounds."""
  found = [x[name] for x in rounds if name in x]
  seconds, sending = (statistics.median(x) for x in zip(*found, strict=True))
  ratio = compare_times(rounds, name, 'jaxprog')
  rate = args.batch_size / seconds
  words = [f'{rate:,.0f} images/s', f'{1e3 * seconds:.2f} ms a step']
  if ratio and name != 'jaxprog':
    words.append(f'jaxprog is {ratio:.2f}x')
  if facts.get('memory'):
    words.append(formats.size(facts['memory']))
  words += [
    f'sent in {1e3 * sending:.2f} ms',
    f'ready in {facts["ready"]:.0f} s',
    f'n = {len(found)}',
  ]
  say(
    args.label or name,
    ', '.join(words),
    {
      'images_per_second': rate,
      'seconds': [x for x, _ in found],
      'sending_seconds': sending,
      'jaxprog_is': ratio,
      'contestant': name,
      'model': args.model,
      'image_size': args.image_size,
      'batch_size': args.batch_size,
      'xla_flags': os.environ.get('XLA_FLAGS', ''),
      **facts,
    },
  )


def compare_times(
  rounds: list[dict[str, Times]], slow: str, fast: str
) -> float | None:
  """Returns how much faster `fast` is, the median over common rounds."""
  both = [x for x in rounds if slow in x and fast in x]
  return (
    statistics.median(x[slow][0] / x[fast][0] for x in both) if both else None
  )


def compare_precisions(
  rounds: list[dict[str, Times]], facts: dict[str, Facts]
) -> None:
  """Prints what bf16 saves of memory: as compiled, else as used so far."""
  faster = compare_times(rounds, 'jaxprog f32', 'jaxprog')
  bf16, f32 = facts['jaxprog'], facts['jaxprog f32']
  kind = 'memory' if bf16['memory'] and f32['memory'] else 'peak'
  less = 1 - bf16[kind] / f32[kind] if f32[kind] else None
  memory = 'memory not told' if less is None else f'{less:.0%} less memory'
  values = {'memory_less': less, 'faster': faster}
  say('bf16 beside f32', f'{memory}, {faster:.2f}x as fast', values)


def make_batch(args: argparse.Namespace) -> dict[str, np.ndarray]:
  """Returns noise as the input pipeline hands it over."""
  rng = np.random.default_rng(0)
  n, side = args.batch_size, args.image_size
  return {
    'image': rng.integers(0, 256, (n, side, side, 3), np.uint8),
    'label': rng.integers(0, NUM_CLASSES, n).astype(np.int32),
    'mask': np.ones(n, bool),
    'index': np.arange(n, dtype=np.int32),
    'epoch': np.zeros(n, np.int32),
  }


def timed(step: Callable[[], Any], wait: Callable[[Any], Any]) -> Turn:
  """Returns turns of a step."""

  def turn(count):
    began = time.perf_counter()
    for _ in range(count):
      last = step()
    sent = time.perf_counter()
    wait(last)
    return (time.perf_counter() - began) / count, (sent - began) / count

  return turn


def on_this_device():
  """Returns what compiled_step compiles for, in place of its own mesh."""
  import jax
  from jax.sharding import AxisType

  from jaxprog.planning import chips

  mesh = jax.make_mesh(
    (1,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
  )
  return mock.patch.object(chips, 'create_mesh', return_value=mesh)


def read_peak() -> int:
  """Returns the most bytes that JAX has had so far on its first device."""
  import jax

  return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)


def compile_step(lowered) -> tuple[Any, Facts]:
  """Returns the compiled step; seconds and the bytes it needs."""
  from jaxprog.planning import costs

  began = time.perf_counter()
  compiled = lowered.compile()
  ready = time.perf_counter() - began
  memory = costs.read_memory(compiled)
  return compiled, {'ready': ready, 'memory': memory and memory.total}


def ours(args: argparse.Namespace, dtype: str) -> tuple[Turn, Facts]:
  """Returns turns of the step that training compiles."""
  import jax

  from benchmarks import compiled_step
  from jaxprog.data import loader
  from jaxprog.planning import chips

  args = argparse.Namespace(**{**vars(args), 'dtype': dtype})
  with on_this_device():
    topology = chips.parse_topology('h100:1')
    task = compiled_step.create_task(args, topology)
  (program,) = task.train_steps
  compiled, facts = compile_step(task.trace_train_step(program).lower())
  state = task.create_state(task.init(task.init_rng))
  batch = loader.to_device(make_batch(args), task.shardings.batch)

  def step():
    nonlocal state
    state, metrics = compiled(state, batch, *task.arguments(program))
    return metrics

  return timed(step, jax.block_until_ready), facts


def plain(args: argparse.Namespace) -> tuple[Turn, Facts]:
  """Returns turns of the step as a JAX user writes it; images come in bf16."""
  import jax
  import jax.numpy as jnp

  from benchmarks import compiled_step
  from jaxprog.planning import chips

  with on_this_device():
    topology = chips.parse_topology('h100:1')
    traced, drawing = compiled_step.trace_plain(args, topology)
  compiled, facts = compile_step(traced.lower())
  state = drawing.lower().compile()(jax.random.key(0))
  batch = make_batch(args)
  images = (batch['image'] - np.float32(MEAN)) / np.float32(STD)
  images = jax.device_put(images.astype(jnp.dtype(args.dtype)))
  labels = jax.device_put(batch['label'])

  def step():
    nonlocal state
    state = compiled(state, images, labels)
    return state

  return timed(step, jax.block_until_ready), facts


class Peer:
  """PyTorch in a process of its own, which answers line by line."""

  def __init__(self, image_size: int) -> None:
    self._image_size = image_size

  @functools.cached_property
  def _process(self) -> subprocess.Popen:
    from jaxprog.models import resnet

    stem = resnet.choose_stem(self._image_size)
    shape = '--peer', str(stem.stride), str(int(stem.pool))
    return subprocess.Popen(
      [sys.executable, __file__, *sys.argv[1:], *shape],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, name: str, steps: int) -> dict[str, Any]:
    """Returns what `steps` steps took, 0 of them: what it took to be ready.

    Raises:
      NotInstalledError: if there is no PyTorch.
    """
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    self._process.stdin.write(f'{steps} {name}\n')
    self._process.stdin.flush()
    answer = json.loads(self._process.stdout.readline() or '{}')
    if answer.get('error') == 'not installed':
      raise NotInstalledError
    if not answer or 'error' in answer:
      raise RuntimeError(answer.get('error', 'PyTorch has ended'))
    return answer


def torch_peer(peer: Peer, name: str) -> tuple[Turn, Facts]:
  """Returns turns of PyTorch's step."""
  facts = peer.ask(name, 0)

  def turn(count):
    seconds, sending = peer.ask(name, count)['times']
    return seconds, sending

  return turn, facts


def run_peer(args: argparse.Namespace, stride: int, pool: int) -> None:
  """Answers each line on stdin: how many steps of which contestant."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # Libraries that print do not disturb.
  turns: dict[str, Turn] = {}
  for line in sys.stdin:
    steps, name = line.strip().split(maxsplit=1)
    answer: dict[str, Any] = {}
    try:
      if name not in turns:
        turns[name], answer = torch_turn(args, name, stride, pool)
      if int(steps):
        answer['times'] = turns[name](int(steps))
    except ImportError:
      answer = {'error': 'not installed'}
    except Exception as e:
      answer = {'error': ' '.join(f'{type(e).__name__}: {e}'.split())[:200]}
    print(json.dumps(answer), file=answers, flush=True)


def torch_turn(
  args: argparse.Namespace, name: str, stride: int, pool: int
) -> tuple[Turn, Facts]:
  """Returns turns of the network in PyTorch."""
  import torch

  cuda = torch.cuda.is_available()
  device = 'cuda' if cuda else 'cpu'
  torch.backends.cudnn.benchmark = True
  torch.backends.cudnn.allow_tf32 = True
  torch.backends.cuda.matmul.allow_tf32 = True
  model = step_lib.torch_resnet(args.model, stride, pool)
  model = model.to(device, memory_format=torch.channels_last)
  optimizer = torch_optimizer(model, fused=cuda)
  batch = make_batch(args)
  # In memory as it comes: (N, H, W, C).
  image = torch.from_numpy(batch['image']).to(device).permute(0, 3, 1, 2)
  label = torch.from_numpy(batch['label']).long().to(device)
  mean, std = (
    torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD)
  )
  bf16 = args.dtype == 'bfloat16'

  def forward(image, label):
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
      logits = model((image.float() - mean) / std)
    return torch.nn.functional.cross_entropy(logits.float(), label)

  if name == 'PyTorch compiled':
    # Writing C++ for a CPU takes minutes, and says nothing of a GPU.
    backend = 'aot_eager' if args.toy else 'inductor'
    forward = torch.compile(forward, backend=backend)

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss = forward(image, label)
    loss.backward()
    optimizer.step()
    return loss

  def wait(loss):
    loss.item()
    if cuda:
      torch.cuda.synchronize()

  began = time.perf_counter()
  for _ in range(3):
    wait(step())
  facts: Facts = {'ready': time.perf_counter() - began, 'memory': None}
  if cuda:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    wait(step())
    facts['memory'] = torch.cuda.max_memory_allocated()
  return timed(step, wait), facts


def torch_optimizer(model, *, fused: bool):
  """Returns SGD with momentum, decay on kernels alone."""
  import torch

  kernels = [x for x in model.parameters() if x.ndim > 1]
  others = [x for x in model.parameters() if x.ndim <= 1]
  groups = [
    {'params': kernels, 'weight_decay': 1e-4},
    {'params': others, 'weight_decay': 0.0},
  ]
  return torch.optim.SGD(groups, 0.1, momentum=0.9, fused=fused or None)


if __name__ == '__main__':
  main()

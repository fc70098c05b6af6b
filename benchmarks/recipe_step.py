r"""What a stage's fields cost a training step, in one run.

Each argument is fields of a stage that are changed together; the step is the
one that training compiles, on a batch of noise that lies on the devices. All
take turns, so that they see the same machine; a turn is one step uncounted and
--steps counted. Ratios are medians over the rounds, FLOPs those of convolutions
and matrix products, and memory what the compiler says.

  PYTHONPATH=. python benchmarks/recipe_step.py distill_from=stage:before \
    'distill_from=stage:before distill_features=1' low_frequency_size=48
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

import jaxprog
from jaxprog import fields, formats, named, stages
from jaxprog.planning import absent, costs
from jaxprog.training import setup as setup_lib


def main() -> None:
  """Prints a row for each variant."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('variants', nargs='*', help="'FIELD=VALUE FIELD=VALUE'")
  parser.add_argument('--model', default='resnet18')
  parser.add_argument('--num_filters', type=int, default=16)
  parser.add_argument('--image_size', type=int, default=64)
  parser.add_argument('--batch_size', type=int, default=128)
  parser.add_argument('--num_classes', type=int, default=200)
  parser.add_argument('--dtype', default='auto')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--steps', type=int, default=3, help='of a turn')
  args = parser.parse_args()
  turns, facts = {}, {}
  for variant in ('', *args.variants):
    turns[variant], facts[variant] = create(args, variant)
  rounds = [
    {name: turn(args.steps) for name, turn in turns.items()}
    for _ in range(args.rounds)
  ]
  device = jax.devices()[0].device_kind
  print(
    f'{args.model}, {args.num_filters} filters, {args.image_size} px, '
    f'batch {args.batch_size}, {device}, {args.rounds} rounds'
  )
  for name in turns:
    seconds = statistics.median(x[name] for x in rounds)
    ratio = statistics.median(x[name] / x[''] for x in rounds)
    print(
      f'{name or "as it is":50} {seconds * 1e3:8.1f} ms {ratio:5.2f}x  '
      f'{facts[name]}'
    )


def create(
  args: argparse.Namespace, variant: str
) -> tuple[Callable[[int], float], str]:
  """Returns what takes some steps and returns seconds a step; its costs."""
  task = create_task(args, variant)
  program = task.program(0)
  trace = task.trace_train_step(program)
  compiled = trace.lower().compile()
  variables = task.init(task.init_rng)
  if task.teacher:
    known = np.ones(args.num_classes, bool)
    task = dataclasses.replace(
      task, teacher={'variables': task.init(task.init_rng), 'known': known}
    )
  state = task.create_state(variables)
  rng = np.random.default_rng(0)
  shapes = task.batch_shapes(args.batch_size, args.image_size, training=True)
  batch = {
    name: rng.integers(0, 200, x.shape).astype(x.dtype)
    for name, x in shapes.items()
  }
  batch['mask'] = np.ones(args.batch_size, bool)
  batch = jax.device_put(batch, task.shardings.batch)

  def turn(steps):
    nonlocal state
    for step in range(steps + 1):
      if step == 1:
        jax.block_until_ready(state)
        begin = time.perf_counter()
      state, _ = compiled(state, batch, *task.arguments(program))
    jax.block_until_ready(state)
    return (time.perf_counter() - begin) / steps

  memory = costs.read_memory(compiled)
  flops = costs.count_flops(trace.jaxpr) / args.batch_size
  size = formats.size(memory.total) if memory else ''
  return turn, f'{formats.flops(flops)}/image, {size}'


def create_task(args: argparse.Namespace, variant: str) -> setup_lib.Task:
  """Returns a stage with some fields changed, of data that nobody reads."""
  config = jaxprog.start_from('default')
  config.model, config.num_filters = args.model, args.num_filters
  config.dtype = args.dtype
  changed = dict(x.split('=', 1) for x in variant.split())
  config.stages = [
    {
      'name': 'stage',
      'dataset': 'tiny_imagenet',
      'image_size': args.image_size,
      'batch_size': args.batch_size,
      **{k: fields.STAGE[k].parse(v, variant) for k, v in changed.items()},
    }
  ]
  chosen = stages.create_stages(config)
  known = named.Published(args.num_classes, 100_000, 10_000)
  datasets = {'stage': absent.count_dataset(chosen[0], known)}
  setup = setup_lib.assemble(config, chosen, chosen, datasets)
  return setup_lib.create_task(setup, chosen[0])


if __name__ == '__main__':
  main()

"""Measures the part of an epoch that is spent outside the compiled step.

The same compiled step, alternating: a bare Python loop over one batch that is
already on the device, and the program's own loop with its data, metrics and
progress, in the second of two epochs: the input reads ahead by then. Prints
medians over the rounds.

  python benchmarks/loop_overhead.py --data_dir=data
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import time
from unittest import mock

import jax
import rich.console

import jaxprog
from jaxprog.monitoring import profile
from jaxprog.monitoring import progress as progress_lib
from jaxprog.reliability import signals
from jaxprog.training import feed as feed_lib
from jaxprog.training import loop, setup


def main() -> None:
  """Prints seconds a step for both loops and their difference."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', default='configs/nette_tiny.py')
  parser.add_argument('--data_dir', default='data')
  parser.add_argument('--stage', default='imagenette')
  parser.add_argument('--steps', type=int, default=40, help='at most one epoch')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  config = jaxprog.load_config(args.config, {'data_dir': args.data_dir})
  found = measure(config, args.stage, args.steps, args.rounds)
  print(f'bare step   {1e3 * found["bare"]:7.1f} ms')
  print(f'whole loop  {1e3 * found["whole"]:7.1f} ms a step')
  print(f'outside the compiled step {100 * found["outside"]:.1f}%')
  print(f'waiting for input {100 * found["waiting"]:.1f}%')


def measure(config, stage: str, num_steps: int, rounds: int) -> dict:
  """Returns medians: seconds a step, and parts of the loop's time."""
  found = setup.create_setup(config, only=(stage,))
  task = setup.compile_task(
    setup.create_task(found, found.chosen[0]), carried=False
  )
  phase = dataclasses.replace(task.steps.phases[0], per_epoch=num_steps)
  steps = dataclasses.replace(
    task.steps, phases=(phase,), total=2 * num_steps, frozen=0
  )
  task = dataclasses.replace(task, steps=steps)
  rows = []
  for _ in range(rounds):
    bare = time_bare(task, num_steps)
    whole, wait = time_loop(task, num_steps)
    rows.append((bare, whole, 1 - bare / whole, wait))
  medians = map(statistics.median, zip(*rows, strict=True))
  return dict(
    zip(('bare', 'whole', 'outside', 'waiting'), medians, strict=True)
  )


def time_bare(task: setup.Task, num_steps: int) -> float:
  """Returns seconds a step over one batch that never changes."""
  with contextlib.closing(feed_lib.Feed(task, task.seed, 0)) as feed:
    batch = feed.next()
  state = task.create_state(task.init(task.init_rng))
  program = task.program(0)
  train_step, arguments = task.train_steps[program], task.arguments(program)
  state, _ = train_step(state, batch, *arguments)
  jax.block_until_ready(state)
  start = time.monotonic()
  for _ in range(num_steps):
    state, _ = train_step(state, batch, *arguments)
  jax.block_until_ready(state)
  return (time.monotonic() - start) / num_steps


def time_loop(task: setup.Task, num_steps: int) -> tuple[float, float]:
  """Returns seconds a step of the program's own loop, and its input wait."""
  state = task.create_state(task.init(task.init_rng))
  console = rich.console.Console(file=io.StringIO())
  with progress_lib.Progress(1, console=console) as progress:
    progress.start_stage(0, 'benchmark', [num_steps, 2 * num_steps])
    run = mock.Mock(progress=progress, stop=signals.StopRequest())
    course = loop.Course(run, task, {'first_step': 0}, mock.Mock())
    feed = feed_lib.Feed(task, task.seed, 0)
    with contextlib.closing(feed):
      idle = profile.Profile(None, 0, task.steps.total)
      for epoch in range(2):
        state, timing = loop._train_epoch(course, state, feed, idle, epoch)
  return timing['seconds'] / num_steps, timing['input_wait']


if __name__ == '__main__':
  main()

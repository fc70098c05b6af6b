"""Compiles ResNet-50's last stage for more and more TPU chips.

No TPU is needed and none runs it: what is printed is what the compiler counts
and what published rates allow. Per step of `--batch_size` images a chip: time
of compute, memory and network, each alone; and the weak-scaling efficiency,
images/s a chip over those of one chip.

  python benchmarks/scaling.py --chips=1x1,2x2,4x4,8x8,16x16
"""

import argparse
import json
import pathlib

import jax

import jaxprog
from jaxprog.planning import chips, elsewhere


def main() -> None:
  """Prints a row for each topology."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--chip', default='v5e')
  parser.add_argument('--chips', default='1x1,2x2,4x4,8x8,16x16')
  parser.add_argument('--batch_size', type=int, default=256, help='a chip')
  parser.add_argument('--batch_norm', default='global')
  parser.add_argument('--json', help='where to write the figures')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  plans = {}
  for sides in args.chips.split(','):
    topology = chips.parse_topology(f'{args.chip}:{sides}')
    plans[topology.name] = plan_last_stage(args, topology)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(plans))
  show(plans)


def plan_last_stage(args, topology):
  """Returns the plan of ImageNet-1k, at so many images a chip."""
  config = jaxprog.load_config('configs/progressive.py')
  config.batch_norm = args.batch_norm
  stage = config.stages[-1]
  stage['batch_size'] = args.batch_size * topology.num_chips
  stage['storage'] = 'raw:256'
  return jaxprog.plan(config, topology=topology.name, only=(stage['name'],))


def show(plans) -> None:
  """Prints the rows; the first one is what the others are compared with."""
  first = None
  for name, plan in plans.items():
    (stage,) = plan['stages']
    (step,) = stage['steps']
    seconds = elsewhere.Step(**step).seconds(plan['utilization'])
    rate = step['batch_size'] / seconds / plan['num_chips']
    first = first or rate
    print(
      f'{name:10} batch {step["batch_size"]:6,} '
      f'compute {1e3 * step["compute_seconds"]:6.2f} ms '
      f'memory {1e3 * step["memory_seconds"]:6.2f} ms '
      f'network {1e3 * step["network_seconds"]:6.3f} ms '
      f'({step["collectives"]} exchanges, '
      f'{step["collective_bytes"] / 1e6:.0f} MB) '
      f'{rate:7,.0f} images/s a chip, efficiency {rate / first:.3f}'
    )


if __name__ == '__main__':
  main()

"""Compares the accuracy that two optimizers reach, seed by seed.

The first stage of configs/nette_tiny.py (Imagenette), made small: ResNet-10 of
16 filters at 32 px, a few epochs. Prints final top-1 of each run and the mean
paired difference with its 95% interval (Student's t).

  python benchmarks/optimizer_accuracy.py --data_dir=data --seeds=5
"""

import argparse
import math
import pathlib
import statistics
import tempfile

import scipy.stats

import jaxprog


def main() -> None:
  """Prints a row for each seed and the interval."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir', default='data')
  parser.add_argument(
    '--optimizers', nargs=2, default=['adamw', 'adamw_8bit'], metavar='NAME'
  )
  parser.add_argument('--learning_rate', type=float, default=0.004)
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--epochs', type=float, default=6)
  args = parser.parse_args()
  rows = []
  for seed in range(args.seeds):
    rows.append([final_top1(args, name, seed) for name in args.optimizers])
    print(seed, *(f'{100 * x:.1f}%' for x in rows[-1]), flush=True)
  differences = [100 * (b - a) for a, b in rows]
  mean = statistics.mean(differences)
  error = statistics.stdev(differences) / math.sqrt(len(rows))
  half = error * scipy.stats.t.ppf(0.975, len(rows) - 1)
  for i, name in enumerate(args.optimizers):
    print(f'{name}: mean {100 * statistics.mean(r[i] for r in rows):.2f}%')
  print(
    f'difference {mean:+.2f} points [{mean - half:+.2f}, {mean + half:+.2f}], '
    f'n = {len(rows)} pairs'
  )


def final_top1(args: argparse.Namespace, optimizer: str, seed: int) -> float:
  """Returns val top-1 after the last epoch of one run."""
  config = jaxprog.load_config(
    'configs/nette_tiny.py',
    {
      'data_dir': args.data_dir,
      'seed': str(seed),
      'model': 'resnet10',
      'num_filters': '16',
      'stem_kernel': '3',
      'stages[0].image_size': '32',
      'stages[0].num_epochs': str(args.epochs),
      'stages[0].learning_rate': str(args.learning_rate),
      'stages[0].optimizer': optimizer,
    },
  )
  with tempfile.TemporaryDirectory() as name:
    history = jaxprog.train(config, pathlib.Path(name), only=('imagenette',))
  return history['stages'][0]['epochs'][-1]['val_top1']


if __name__ == '__main__':
  main()

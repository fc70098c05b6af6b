"""How often equal cells are told apart, and how often unequal ones are.

    python benchmarks/false_positives.py

Every trial draws its images and its seeds anew. An image is right with a
probability of its own, whose logit varies by DIFFICULTY among images and by
TASTE between the two cells; the seed of a run moves the logits of all images
by `seeds`. Both cells have the same expected accuracy, or one that differs by
`gain` in logits. Nothing here knows how the test works; it is asked as
`compare` asks it.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import optimize, special

from jaxprog.comparison import statistics

# Standard deviations in logits: two runs disagree on 24% of all images at an
# accuracy of 50%, on 10% at 90%; seeds differ by about 1.7, 0.7 and 0.1 points
# at 50, 90 and 99%.
DIFFICULTY, TASTE, SEEDS = 3.0, 0.5, 0.15
RUNS = 2, 3, 4, 5, 10
IMAGES = 90, 360, 2_000, 10_000
ACCURACIES = 0.01, 0.1, 0.5, 0.9, 0.99
# Outcomes that are held at once.
_CHUNK = 2_000_000
LEVEL = 1 - statistics.CONFIDENCE
# 'seeds alone' is the paired t-test over seeds.
KINDS = 'by image', 'unpaired', 'binomial', 'seeds alone'


def main() -> None:
  """Prints three tables in Markdown."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--trials', type=int, default=5_000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  rng = np.random.default_rng(args.seed)
  print_false_positives(rng, args.trials)
  print_kinds(rng, args.trials)
  print_power(rng, args.trials)


def print_false_positives(rng: np.random.Generator, trials: int) -> None:
  """Prints how often equal cells differ: runs, images and accuracy."""
  print('\n| n | images |', *(f'{a:.0%} |' for a in ACCURACIES))
  print('|---' * (2 + len(ACCURACIES)), '|', sep='')
  for runs, images in itertools.product(RUNS, IMAGES):
    cells = []
    for accuracy in ACCURACIES:
      found = simulate(rng, trials, runs, images, accuracy, kinds=KINDS[:1])
      few = '' if found['discordant'] >= 25 else ' *'
      cells.append(f'{100 * found["by image"]:.1f}{few}')
    print(f'| {runs} | {images:,} |', *(f'{x} |' for x in cells), flush=True)


def print_kinds(rng: np.random.Generator, trials: int) -> None:
  """Prints the same for other ways to compare, and other seeds' effects."""
  print('\n| seeds | n | images | accuracy |', *(f'{x} |' for x in KINDS))
  print('|---' * (4 + len(KINDS)), '|', sep='')
  for seeds, runs in itertools.product((0.0, SEEDS, 2 * SEEDS), (3, 5, 10)):
    for images, accuracy in ((360, 0.5), (2_000, 0.9)):
      found = simulate(rng, trials, runs, images, accuracy, seeds=seeds)
      print(
        f'| {seeds} | {runs} | {images:,} | {accuracy:.0%} |',
        *(f'{100 * found[x]:.1f} |' for x in KINDS),
        flush=True,
      )


def print_power(rng: np.random.Generator, trials: int) -> None:
  """Prints how often a difference is found, image by image and without."""
  kinds = 'by image', 'binomial'
  print('\n| n | images | accuracy | gain |', *(f'{x} |' for x in kinds))
  print('|---' * (4 + len(kinds)), '|', sep='')
  for runs, gain in itertools.product((3, 5, 10), (0.3, 0.6)):
    for images, accuracy in ((360, 0.5), (2_000, 0.5), (2_000, 0.9)):
      found = simulate(
        rng, trials, runs, images, accuracy, gain=gain, kinds=kinds
      )
      print(
        f'| {runs} | {images:,} | {accuracy:.0%} | '
        f'{100 * found["difference"]:.1f} |',
        *(f'{100 * found[x]:.0f} |' for x in kinds),
        flush=True,
      )


def simulate(
  rng: np.random.Generator,
  trials: int,
  runs: int,
  images: int,
  accuracy: float,
  *,
  seeds: float = SEEDS,
  gain: float = 0.0,
  kinds: Sequence[str] = KINDS,
) -> dict[str, float]:
  """Returns the part of the trials in which two cells differ, by kind of test.

  'discordant' is the mean number
  of images that two runs, one of each cell, disagree on, 'difference' the mean
  difference of the cells.
  """
  chunks = []
  for part in _parts(trials, max(1, _CHUNK // (2 * runs * images))):
    outcomes = draw(rng, part, runs, images, accuracy, seeds, gain)
    chunks.append(_tell_apart(outcomes, kinds))
  return {
    name: float(np.mean(np.concatenate([x[name] for x in chunks])))
    for name in chunks[0]
  }


def _parts(total: int, size: int) -> Iterator[int]:
  for start in range(0, total, size):
    yield min(size, total - start)


def draw(
  rng: np.random.Generator,
  trials: int,
  runs: int,
  images: int,
  accuracy: float,
  seeds: float = SEEDS,
  gain: float = 0.0,
) -> np.ndarray:
  """Returns which images are right, bool (trials, 2, runs, images)."""

  def normal(*shape):
    return rng.standard_normal((trials, *shape), dtype=np.float32)

  logits = DIFFICULTY * normal(1, 1, images) + TASTE * normal(2, 1, images)
  logits += _find_intercept(accuracy)
  logits[:, 0] += gain
  right = special.expit(logits)
  # A small change of the logit, without one exponential for each run.
  right = right + seeds * normal(2, runs, 1) * (right * (1 - right))
  return rng.random(right.shape, dtype=np.float32) < right


def _find_intercept(accuracy: float) -> float:
  """Returns the mean logit of images that are right with `accuracy`."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(80)
  spread = np.hypot(DIFFICULTY, TASTE)

  def excess(mean):
    return np.average(special.expit(mean + spread * nodes), weights=weights)

  return optimize.brentq(lambda x: excess(x) - accuracy, -60, 60)


def _tell_apart(
  outcomes: np.ndarray, kinds: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns for each trial whether the two cells differ, by kind of test."""
  runs, images = outcomes.shape[2:]
  a, b = np.moveaxis(outcomes.astype(np.float32), 1, 0)
  pairs = a - b
  scores = np.stack([a, b]).mean(-1, dtype=np.float64)
  difference = scores[0] - scores[1]
  mean = difference.mean(-1)
  paired = difference.var(-1, ddof=1) / runs, runs - 1

  def differs(spread, freedom, noise):
    error, freedom = statistics.standard_error(spread, freedom, noise)
    return 2 * special.stdtr(freedom, -abs(mean) / error) < LEVEL

  def binomial():
    each = (statistics.binomial_variance(x.mean(-1), images) for x in scores)
    return statistics.Noise(sum(each))

  def welch():
    parts = scores.var(-1, ddof=1) / runs
    squares = np.maximum((parts**2).sum(0) / (runs - 1), 1e-300)
    return parts.sum(0), np.maximum(parts.sum(0) ** 2 / squares, runs - 1)

  found: dict[str, Callable[[], np.ndarray]] = {
    'by image': lambda: differs(*paired, statistics.image_noise(pairs)),
    'unpaired': lambda: differs(*welch(), statistics.image_noise(a, -b)),
    'binomial': lambda: differs(*paired, binomial()),
    'seeds alone': lambda: differs(*paired, statistics.Noise(1e-12)),
  }
  return {
    **{kind: found[kind]() for kind in kinds},
    'discordant': abs(pairs).sum((-2, -1)) / runs,
    'difference': mean,
  }


if __name__ == '__main__':
  main()

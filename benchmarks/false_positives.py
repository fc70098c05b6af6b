"""How often equal cells are told apart, and how often unequal ones are.

    python benchmarks/false_positives.py [--only=looks]

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

from jaxprog.comparison import noise as noise_lib
from jaxprog.comparison import power, sequential
from jaxprog.comparison.noise import Error, Noise

# Standard deviations in logits: two runs disagree on 24% of all images at an
# accuracy of 50%, on 10% at 90%; seeds differ by about 1.7, 0.7 and 0.1 points
# at 50, 90 and 99%.
DIFFICULTY, TASTE, SEEDS = 3.0, 0.5, 0.15
RUNS = 2, 3, 4, 5, 10
IMAGES = 90, 360, 2_000, 10_000
ACCURACIES = 0.01, 0.1, 0.5, 0.9, 0.99
# Outcomes that are held at once.
_CHUNK = 2_000_000
LEVEL = sequential.ERROR
# 'seeds alone' is the paired t-test over seeds.
KINDS = 'by image', 'unpaired', 'binomial', 'seeds alone'
# Numbers of seeds at which a comparison of at most MAX_SEEDS is looked at.
LOOKS = (10,), (5, 10), (3, 5, 10), (3, 4, 6, 8, 10)
MAX_SEEDS = 10


def main() -> None:
  """Prints tables in Markdown."""
  tables = {
    'false_positives': print_false_positives,
    'kinds': print_kinds,
    'power': print_power,
    'levels': print_levels,
    'looks': print_looks,
    'equal': print_equal,
    'pilots': print_pilots,
  }
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--trials', type=int, default=5_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', choices=tables)
  args = parser.parse_args()
  rng = np.random.default_rng(args.seed)
  for name, print_table in tables.items():
    if args.only in (None, name):
      print_table(rng, args.trials)


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


def print_levels(rng: np.random.Generator, trials: int) -> None:
  """Prints how often equal cells differ at smaller levels, in percent."""
  levels = 0.05, 0.02, 0.01, 0.005, 0.001
  print('\n| seeds | n | images | accuracy |', *(f'{x:.1%} |' for x in levels))
  print('|---' * (4 + len(levels)), '|', sep='')
  for seeds, runs in itertools.product((0.0, SEEDS, 4 * SEEDS), (3, 5, 10)):
    for images, accuracy in ((360, 0.5), (2_000, 0.9)):
      drawn = _draw_pairs(rng, trials, runs, images, accuracy, seeds=seeds)
      p_values = np.concatenate(
        [error.p_value(mean) for mean, error in map(_test, drawn)]
      )
      print(
        f'| {seeds} | {runs} | {images:,} | {accuracy:.0%} |',
        *(f'{100 * (p_values < x).mean():.2f} |' for x in levels),
        flush=True,
      )


def print_looks(rng: np.random.Generator, trials: int) -> None:
  """Prints what looks cost: false positives, power, and seeds until one shows.

  By the rule and with intervals of 95% at each.
  """
  titles = 'images', 'accuracy', 'looks', 'gain', 'rule', '95% each', 'seeds'
  print('\n|', *(f'{x} |' for x in titles))
  print('|---' * len(titles), '|', sep='')
  seen = sorted(set(itertools.chain(*LOOKS)))
  for images, accuracy, gain in (
    (360, 0.5, 0.0),
    (2_000, 0.9, 0.0),
    (360, 0.5, 0.35),
    (2_000, 0.9, 0.28),
  ):
    p_values: dict[int, list[np.ndarray]] = {n: [] for n in seen}
    means = []
    for pairs in _draw_pairs(rng, trials, MAX_SEEDS, images, accuracy, gain):
      means.append(pairs.mean((-2, -1)))
      for n in seen:
        mean, error = _test(pairs[:, :n])
        p_values[n].append(error.p_value(mean))
    found = {n: np.concatenate(x) for n, x in p_values.items()}
    for looks in LOOKS:
      levels = sequential.levels(tuple(n / MAX_SEEDS for n in looks))
      shown = np.stack(
        [found[n] < level for n, level in zip(looks, levels, strict=True)]
      )
      first = np.where(
        shown.any(0), np.array(looks)[shown.argmax(0)], looks[-1]
      )
      without = np.any([found[n] < LEVEL for n in looks], 0)
      print(
        f'| {images:,} | {accuracy:.0%} | {", ".join(map(str, looks))} | '
        f'{100 * np.mean(np.concatenate(means)):.1f} | '
        f'{100 * shown.any(0).mean():.1f} | {100 * without.mean():.1f} | '
        f'{first.mean():.1f} |',
        flush=True,
      )


def print_equal(rng: np.random.Generator, trials: int) -> None:
  """Prints how often cells are called equal within a margin.

  Where they differ by just that, and where they do not.
  """
  titles = 'n', 'images', 'accuracy', 'margin', 'differ by it', 'equal'
  print('\n|', *(f'{x} |' for x in titles))
  print('|---' * len(titles), '|', sep='')
  for runs, (images, accuracy) in itertools.product(
    (3, 5, 10), ((360, 0.5), (2_000, 0.5), (2_000, 0.9))
  ):
    means, halves = np.empty((2, 2, trials))
    for i, gain in enumerate((0.4, 0.0)):
      drawn = _draw_pairs(rng, trials, runs, images, accuracy, gain)
      tests = [_test(pairs) for pairs in drawn]
      means[i] = np.concatenate([mean for mean, _ in tests])
      halves[i] = np.concatenate([error.half(2 * LEVEL) for _, error in tests])
    margin = means[0].mean()
    equal = abs(means) + halves < margin
    print(
      f'| {runs} | {images:,} | {accuracy:.0%} | {100 * margin:.1f} |',
      *(f'{100 * x.mean():.1f} |' for x in equal),
      flush=True,
    )


def print_pilots(rng: np.random.Generator, trials: int) -> None:
  """Prints which differences pilots of two cells say that 5 seeds can show.

  The 10%, 50% and 90% of them, in points; and how often such a one is shown.
  """
  titles = 'images', 'accuracy', 'pilot', '10%', '50%', '90%', 'shown'
  print('\n|', *(f'{x} |' for x in titles))
  print('|---' * len(titles), '|', sep='')
  for (images, accuracy), seeds in itertools.product(
    ((360, 0.5), (2_000, 0.9)), (2, 3, 5, 10)
  ):
    said = []
    for pairs in _draw_pairs(rng, 400, seeds, images, accuracy, 0.0):
      noise = noise_lib.image_noise(pairs)
      totals = pairs.mean(-1).var(-1, ddof=1)
      for total, own, shared in zip(
        totals, seeds * noise.own, noise.shared, strict=True
      ):
        spread = power.Spread(max(total - own, 0), own, shared, images)
        said.append(power.detectable(spread, 5))
    quantiles = np.quantile(said, (0.1, 0.5, 0.9))
    gain = (
      0.3
      * quantiles[1]
      / np.mean(
        [
          pairs.mean()
          for pairs in _draw_pairs(rng, 400, 5, images, accuracy, 0.3)
        ]
      )
    )
    found = simulate(
      rng, trials, 5, images, accuracy, gain=gain, kinds=KINDS[:1]
    )
    print(
      f'| {images:,} | {accuracy:.0%} | {seeds} |',
      *(f'{100 * x:.1f} |' for x in quantiles),
      f'{100 * found["by image"]:.0f} |',
      flush=True,
    )


def _draw_pairs(
  rng: np.random.Generator,
  trials: int,
  runs: int,
  images: int,
  accuracy: float,
  gain: float = 0.0,
  seeds: float = SEEDS,
) -> Iterator[np.ndarray]:
  """Yields what came of each image, first less second, some trials at once."""
  for part in _parts(trials, max(1, _CHUNK // (2 * runs * images))):
    outcomes = draw(rng, part, runs, images, accuracy, seeds, gain)
    yield outcomes[:, 0].astype(np.float32) - outcomes[:, 1]


def _test(pairs: np.ndarray) -> tuple[np.ndarray, Error]:
  """Returns the mean of each trial and its error, image by image."""
  runs = pairs.shape[1]
  scores = pairs.mean(-1, dtype=np.float64)
  spread = scores.var(-1, ddof=1) / runs
  noise = noise_lib.image_noise(pairs)
  return scores.mean(-1), noise_lib.standard_error(spread, runs - 1, noise)


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

  'discordant' is the mean number of images that two runs, one of each cell,
  disagree on, 'difference' the mean difference of the cells.
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
    error = noise_lib.standard_error(spread, freedom, noise)
    return error.p_value(mean) < LEVEL

  def binomial():
    each = (noise_lib.binomial_variance(x.mean(-1), images) for x in scores)
    return Noise(sum(each))

  def welch():
    parts = scores.var(-1, ddof=1) / runs
    squares = np.maximum((parts**2).sum(0) / (runs - 1), 1e-300)
    return parts.sum(0), np.maximum(parts.sum(0) ** 2 / squares, runs - 1)

  found: dict[str, Callable[[], np.ndarray]] = {
    'by image': lambda: differs(*paired, noise_lib.image_noise(pairs)),
    'unpaired': lambda: differs(*welch(), noise_lib.image_noise(a, -b)),
    'binomial': lambda: differs(*paired, binomial()),
    'seeds alone': lambda: differs(*paired, Noise(1e-12)),
  }
  return {
    **{kind: found[kind]() for kind in kinds},
    'discordant': abs(pairs).sum((-2, -1)) / runs,
    'difference': mean,
  }


if __name__ == '__main__':
  main()

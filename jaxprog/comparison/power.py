"""How large a difference has to be for a number of seeds to show it.

Known before anything runs, from how far apart the pairs of a pilot lie: an
earlier comparison, or what is over of the same one. Variances are those of
differences of top-1, which are parts of one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from jaxprog.comparison import statistics
from jaxprog.comparison.statistics import Noise, Record, Score

POWER = 0.8
# More seeds than this are called out of reach.
MAX_SEEDS = 1000


class Spread(NamedTuple):
  """What the differences of pairs vary by.

  Of one pair, `seeds` is the variance that its seed is the cause of, and `own`
  that by which the two runs happen to have right what others have not; all of
  them have `shared` in common, which is the images'. The last two are those of
  `num_images`. No mean of pairs varies by less than `least`: that is said where
  it is not known which images each run has right.
  """

  seeds: float
  own: float
  shared: float
  num_images: int
  least: float = 0.0

  def on(self, num_images: int) -> 'Spread':
    """Returns that of an evaluation on another number of images."""
    part = self.num_images / num_images
    return Spread(
      self.seeds,
      part * self.own,
      part * self.shared,
      num_images,
      part * self.least,
    )

  def error(self, n: int) -> tuple[float, float]:
    """Returns the error of a mean over `n` pairs, and its freedom."""
    noise = Noise(max(self.own / n, self.least), self.shared)
    spread = (self.seeds + self.own) / n
    error, freedom = statistics.standard_error(spread, n - 1, noise)
    return float(error), float(freedom)


def assume(num_images: int) -> Spread:
  """Returns what is typical of accuracies near 50%.

  That of the first table of benchmarks/false_positives.py: two runs disagree on
  24% of the images, a seed moves a run by 1.7 points.
  """
  return Spread(2 * 0.017**2, 0.23 / num_images, 0.01 / num_images, num_images)


def measure(runs: Iterable[Record], reference: str) -> Spread | None:
  """Returns the mean spread of all cells beside the reference.

  None where no cell has two seeds in common with it.
  """
  cells = statistics.by_cell(runs)
  scores = {cell: statistics.final_scores(x) for cell, x in cells.items()}
  theirs = scores.pop(reference, {})
  found = [
    _measure([ours[seed] for seed in common], [theirs[seed] for seed in common])
    for ours in scores.values()
    if len(common := sorted(ours.keys() & theirs.keys())) > 1
  ]
  if not found:
    return None
  total, own, shared, least = np.mean([x[:-1] for x in found], 0).tolist()
  num_images = found[0][-1]
  return Spread(max(total - own, 0.0), own, shared, num_images, least)


def _measure(
  a: Sequence[Score], b: Sequence[Score]
) -> tuple[float, float, float, float, int]:
  """Returns the variance of a pair, its own, the shared, the least; images."""
  n = len(a)
  pairs = [x.top1 - y.top1 for x, y in zip(a, b, strict=True)]
  noise = statistics.noise_of(a, b, paired=True)
  total, num_images = float(np.var(pairs, ddof=1)), a[0].num_images
  if math.isinf(noise.freedom):  # As if no two runs had an image in common.
    return total, 0.0, 0.0, float(noise.own), num_images
  return total, float(n * noise.own), float(noise.shared), 0.0, num_images


def detectable(
  spread: Spread, n: int, level: float = 0.05, power: float = POWER
) -> float:
  """Returns the difference that `n` pairs show with a probability of `power`.

  By the noncentral t distribution (Cohen 1988), at a two-sided `level`: that of
  the last look, over the number of cells, which is the first step of Holm's.
  Infinite below MIN_RUNS.
  """
  if n < statistics.MIN_RUNS:
    return math.inf
  error, freedom = spread.error(n)
  limit = special.stdtrit(freedom, 1 - level / 2)
  return float(special.nctdtrinc(freedom, 1 - power, limit)) * error


def required(
  spread: Spread, difference: float, level: float = 0.05, power: float = POWER
) -> int | None:
  """Returns how many pairs show `difference`; None: the images are too few."""
  for n in range(statistics.MIN_RUNS, MAX_SEEDS + 1):
    if detectable(spread, n, level, power) <= difference:
      return n
  return None


def required_images(
  spread: Spread, n: int, difference: float, level: float = 0.05
) -> int | None:
  """Returns on how many images `n` pairs show it; None: no number helps."""
  seeds = spread.on(10**12)
  if detectable(seeds, n, level) > difference:
    return None
  low, high = 1, 10**12
  while high - low > 1:
    middle = (low + high) // 2
    if detectable(spread.on(middle), n, level) <= difference:
      high = middle
    else:
      low = middle
  return high


def seconds_a_seed(runs: Iterable[Record]) -> Mapping[str, float]:
  """Returns the mean seconds of a run of each cell that has one done."""
  found: dict[str, list[float]] = {}
  for run in statistics.done(runs):
    if run['boundaries']:
      found.setdefault(run['cell'], []).append(run['boundaries'][-1]['seconds'])
  return {cell: float(np.mean(x)) for cell, x in found.items()}

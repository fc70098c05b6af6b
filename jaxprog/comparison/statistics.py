"""What a few runs with different seeds say: intervals, tests and mean curves.

Runs are the records of a comparison: cell, seed, status, final_top1,
num_images, outcomes, curve and boundaries. Accuracies are parts of one.

A mean over runs is uncertain for two reasons: other seeds, and other images to
evaluate on; see noise.py.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from scipy import special

from jaxprog.comparison import noise as noise_lib
from jaxprog.comparison import sequential
from jaxprog.comparison.noise import Error, Noise
from jaxprog.comparison.sequential import MIN_RUNS
from jaxprog.monitoring import outcomes as outcomes_lib
from jaxprog.monitoring.outcomes import Outcomes

T = TypeVar('T')
# Of comparison.json; see docs/compare.md.
VERSION = 2
# What is kept of a run, and the costs that its curve is told over.
Record = Mapping[str, Any]
Axis = Literal['images', 'flops', 'seconds', 'epochs']

# More points than this do not show in a plot's line.
_MAX_POINTS = 400
# With fewer runs each is drawn.
_MIN_MEAN = 4
# Where an interval of a difference and of an accuracy may lie.
_DIFFERENCES, _ACCURACIES = (-1.0, 1.0), (0.0, 1.0)


class Score(NamedTuple):
  """A run's top-1 on `num_images`, and which of them it has right, if known."""

  top1: float
  num_images: int
  outcomes: Outcomes | None = None


class Estimate(NamedTuple):
  """A mean and its interval, of 95% unless said otherwise.

  One value has no interval and no spread.
  """

  mean: float
  std: float | None
  low: float | None
  high: float | None
  n: int


class Difference(NamedTuple):
  """How two cells differ, first less second, or first over second.

  `counts` are the runs of each that gave a number. Paired, the estimate is of
  the seeds that both have. Below MIN_RUNS there is no `p_value`. `error` is
  that of the mean, or of its logarithm; None where there is no interval.
  """

  estimate: Estimate
  p_value: float | None
  paired: bool
  counts: tuple[int, int]
  error: Error | None = None

  def p_equal(self, margin: float) -> float | None:
    """Returns the p-value of cells that differ by `margin` or more.

    Of two tests, one on each side (Schuirmann 1987).
    """
    if self.p_value is None or self.error is None:
      return None
    inside = margin - abs(self.estimate.mean)
    one_side = float(self.error.p_value(inside)) / 2
    return one_side if inside > 0 else 1 - one_side

  def turned(self) -> 'Difference':
    """Returns second less first."""
    e = self.estimate
    low, high = (None if x is None else -x for x in (e.high, e.low))
    turned = e._replace(mean=-e.mean, low=low, high=high)
    return self._replace(estimate=turned, counts=self.counts[::-1])

  def within(self, level: float) -> float | None:
    """Returns the smallest margin whose `p_equal` is `level`.

    The further end of an interval of 1 - 2 `level`: a difference lies on one
    side only, so it is larger than that in a part `level` of all cases.
    """
    if self.p_value is None or self.error is None:
      return None
    bound = abs(self.estimate.mean) + float(self.error.half(2 * level))
    return min(bound, _DIFFERENCES[1])


class MeanCurve(NamedTuple):
  """A mean over runs, with its 95% interval where there are two or more."""

  grid: np.ndarray
  mean: np.ndarray
  low: np.ndarray | None
  high: np.ndarray | None


def estimate(scores: Iterable[Score]) -> Estimate:
  """Returns the mean top-1 of a cell, the standard deviation and the interval.

  Of one score or more.
  """
  scores = list(scores)
  x = _top1s(scores)
  found = _test(_spread(x), x.mean(), noise_of(scores), _ACCURACIES)
  return found.estimate


class _Spread(NamedTuple):
  """How far apart runs lie: the deviation of one, the variance of the mean."""

  std: Any
  variance: Any
  freedom: float
  n: int


def _spread(x: np.ndarray) -> _Spread | None:
  """Returns that of numbers or arrays, one a run; None of one run."""
  n = len(x)
  if n == 1:
    return None
  variance = x.var(0, ddof=1)
  return _Spread(np.sqrt(variance), variance / n, n - 1, n)


def _spread_of(x: np.ndarray, y: np.ndarray, *, paired: bool) -> _Spread | None:
  """Returns that of x - y, pair by pair, or of unrelated runs (Welch 1947)."""
  if paired:
    return _spread(x - y)
  a, b = _spread(x), _spread(y)
  if a is None or b is None:
    return None
  variance = a.variance + b.variance
  parts = a.variance**2 / a.freedom + b.variance**2 / b.freedom
  freedom = variance**2 / parts if parts else a.freedom + b.freedom
  return _Spread(math.hypot(a.std, b.std), variance, freedom, min(a.n, b.n))


def _interval(
  mean: Any,
  error: Error,
  limits: tuple[float, float],
  level: float = sequential.ERROR,
) -> tuple[Any, Any]:
  """Returns the ends of a mean's interval, in `limits`."""
  half = error.half(level)
  low, high = np.clip((mean - half, mean + half), *limits)
  return low, high


class _Tested(NamedTuple):
  """A mean with its interval, the p-value of 0, and its error."""

  estimate: Estimate
  p_value: float | None = None
  error: Error | None = None


def _test(
  spread: _Spread | None,
  mean: Any,
  noise: Noise,
  limits: tuple[float, float],
  level: float = sequential.ERROR,
) -> _Tested:
  """Returns what is known of a mean, its interval within `limits`."""
  mean = float(mean)
  if spread is None:
    return _Tested(Estimate(mean, None, None, None, 1))
  error = noise_lib.standard_error(spread.variance, spread.freedom, noise)
  low, high = map(float, _interval(mean, error, limits, level))
  found = Estimate(mean, float(spread.std), low, high, spread.n)
  p_value = float(error.p_value(mean)) if spread.n >= MIN_RUNS else None
  return _Tested(found, p_value, error)


def noise_of(*arms: Sequence[Score], paired: bool = False) -> Noise:
  """Returns the noise of an arm's mean, or of the first less the second."""
  every = [score for arm in arms for score in arm]
  known = [score.outcomes for score in every if score.outcomes is not None]
  if len(known) == len(every) and len({x.images for x in known}) == 1:
    signed = [
      sign * np.stack([x.outcomes.right for x in arm if x.outcomes])
      for arm, sign in zip(arms, (1.0, -1.0), strict=False)
    ]
    if paired:
      return noise_lib.image_noise(signed[0] + signed[1])
    return noise_lib.image_noise(*signed)
  return Noise(
    sum(
      noise_lib.binomial_variance(
        _top1s(arm).mean(), min(x.num_images for x in arm)
      )
      for arm in arms
    )
  )


def _top1s(scores: Iterable[Score]) -> np.ndarray:
  return np.array([score.top1 for score in scores])


def is_difference(e: Estimate, null: float = 0.0) -> bool:
  """Returns whether the interval of `e` excludes `null`.

  False without an interval, and below MIN_RUNS.
  """
  if e.low is None or e.high is None or e.n < MIN_RUNS:
    return False
  return not e.low <= null <= e.high


def told_apart(a: float, b: float, num_images: int) -> bool:
  """Returns whether two top-1s differ by more than their images may make them.

  Of one run each: what other seeds would change is not in it.
  """
  variance = sum(noise_lib.binomial_variance(x, num_images) for x in (a, b))
  limit = -special.ndtri(sequential.ERROR / 2)
  return abs(a - b) > limit * math.sqrt(variance)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Returns the p-values adjusted for their number (Holm 1979).

  Where all hypotheses hold, at most 5% of families have one below 0.05. None,
  from cells with too few runs, is no test: it stays and does not count.
  """
  tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
  adjusted: list[float | None] = [None] * len(p_values)
  highest = 0.0
  for rank, (p, i) in enumerate(tested):
    highest = max(highest, min(1.0, (len(tested) - rank) * p))
    adjusted[i] = highest
  return adjusted


def expected_maximum(count: int) -> float:
  """Returns how far the best of `count` equal cells lies above their mean.

  In standard errors of one cell's mean, for cells with normal means.
  """
  x = np.linspace(-10, 10, 4001)
  # By parts: the distribution of the best, beside that of what is always 0.
  return float(np.trapezoid(np.heaviside(x, 0.5) - special.ndtr(x) ** count, x))


def compare(
  a: Mapping[int, Score],
  b: Mapping[int, Score],
  level: float = sequential.ERROR,
) -> Difference:
  """Returns a - b: over the seeds that both have, or by Welch if under two.

  Its interval misses what is true in a part `level` of all cases.
  """
  x, y, paired = _pair(a, b)
  noise = noise_of(x, y, paired=paired)
  first, second = _top1s(x), _top1s(y)
  mean = first.mean() - second.mean()
  spread = _spread_of(first, second, paired=paired)
  e, p_value, error = _test(spread, mean, noise, _DIFFERENCES, level)
  return Difference(e, p_value, paired, (len(a), len(b)), error)


def _pair(
  a: Mapping[int, T], b: Mapping[int, T]
) -> tuple[list[T], list[T], bool]:
  """Returns what is compared, by seed, and whether seeds are enough to pair."""
  common = sorted(a.keys() & b.keys())
  paired = len(common) >= 2 or (len(common) == 1 and 1 in (len(a), len(b)))
  x, y = ([arm[seed] for seed in (common if paired else arm)] for arm in (a, b))
  return x, y, paired


def by_cell(runs: Iterable[Record]) -> dict[str, list[Record]]:
  """Returns the runs of each cell, cells as they first appear, seeds sorted."""
  cells: dict[str, list[Record]] = {}
  for run in runs:
    cells.setdefault(run['cell'], []).append(run)
  return {k: sorted(v, key=lambda run: run['seed']) for k, v in cells.items()}


def done(runs: Iterable[Record]) -> list[Record]:
  """Returns the runs that reached their end."""
  return [run for run in runs if run['status'] == 'done']


def count_lost(runs: Iterable[Record]) -> list[str]:
  """Returns '2 diverged' and '1 failed' of the runs that are in no mean."""
  counts = collections.Counter(run['status'] for run in runs)
  return [f'{counts[x]} {x}' for x in ('diverged', 'failed') if counts[x]]


def final_scores(runs: Iterable[Record]) -> dict[int, Score]:
  """Returns the top-1 of each run that is done, by seed.

  Of its last weights: the best of its epochs is chosen on the evaluation
  images, and the more evaluations there are, the higher it comes out. Of the
  best where a hold-out chose them.
  """
  return {
    run['seed']: Score(
      float(run['final_top1']),
      run['num_images'],
      outcomes_lib.from_json(run['outcomes']),
    )
    for run in done(runs)
  }


def has_holdout(runs: Iterable[Record]) -> bool:
  """Returns whether a hold-out chose weights: then curves are of it."""
  return any(run.get('holdout_images') for run in done(runs))


def whose(runs: Iterable[Record]) -> str:
  """Returns of which weights the top-1 is that cells are compared by."""
  return "best weights'" if has_holdout(runs) else 'final'


def curve_images(runs: Iterable[Record]) -> int:
  """Returns of how many images curves are, at the least."""
  counts = (x.get('holdout_images') or x['num_images'] for x in done(runs))
  return min(counts, default=1)


def points(run: Record, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
  """Returns costs along `axis` and top-1 of the run's evaluations."""
  rows = [row for row in run['curve'] if row['top1'] is not None]
  costs = np.array([row[axis] for row in rows], float)
  return costs, np.array([row['top1'] for row in rows], float)


def earlier_stages(run: Record) -> list[Mapping[str, Any]]:
  """Returns where the stages before the curve's own end, in their order."""
  if not run['curve']:
    return []
  first = run['curve'][0]['images']
  return [b for b in run['boundaries'] if b['images'] < first]


def first_reach(
  costs: Sequence[float] | np.ndarray,
  values: Sequence[float] | np.ndarray,
  target: float,
) -> float | None:
  """Returns the cost at which a curve first reaches `target`; None: it doesn't.

  On the straight line between the evaluations around it: taken at the later
  one, every crossing would be late by up to the distance of evaluations, and
  curves evaluated at different distances would differ by that alone. A curve
  that starts at or above the target has reached it at its first cost.
  """
  reached = np.flatnonzero(np.asarray(values, float) >= target)
  if not reached.size:
    return None
  i = int(reached[0])
  if i == 0:
    return float(costs[0])
  part = (target - values[i - 1]) / (values[i] - values[i - 1])
  return float(costs[i - 1] + part * (costs[i] - costs[i - 1]))


def costs_to_target(
  runs: Iterable[Record], target: float, axis: Axis
) -> dict[int, float | None]:
  """Returns what each run that is done paid to reach `target`, by seed.

  A curve starts, with none right, where the stages before it and the hand-over
  end: their cost is the ladder's, and a target passed before the first
  evaluation is not taken for one that was passed at it. None: the run ended
  below the target.
  """
  return {
    run['seed']: first_reach(*_whole_curve(run, axis), target)
    for run in done(runs)
  }


def compare_time_to_target(
  a: Sequence[Record],
  b: Sequence[Record],
  target: float,
  axis: Axis,
  level: float = sequential.ERROR,
) -> Difference | None:
  """Returns the ratio of the costs to a target, or None where it has no sense.

  Only where every run of both reached the target, above 0. The mean of those
  that did would be better the more of the slow ones are missing from it; what
  is left then is to say how many did. The ratio is the geometric mean over the
  seeds that pair, as in `compare`, and its interval that of log a - log b,
  whose ends are raised again: costs vary by factors, and a / b then says as
  much as b / a. `std` stays that of the logarithms.
  """
  found = [costs_to_target(runs, target, axis) for runs in (a, b)]
  costs = [{seed: cost for seed, cost in arm.items() if cost} for arm in found]
  reached = zip(costs, found, strict=True)
  if not target or any(not x or len(x) < len(y) for x, y in reached):
    return None
  first, second, paired = _pair(*costs)
  x, y = np.log(first), np.log(second)
  noise = Noise(sum(_target_noise(runs, target, axis) for runs in (a, b)))
  spread = _spread_of(x, y, paired=paired)
  everywhere = -math.inf, math.inf
  mean = x.mean() - y.mean()
  e, p_value, error = _test(spread, mean, noise, everywhere, level)
  low, high = (None if x is None else math.exp(x) for x in (e.low, e.high))
  ratio = Estimate(math.exp(e.mean), e.std, low, high, e.n)
  counts = len(costs[0]), len(costs[1])
  return Difference(ratio, p_value, paired, counts, error)


def _target_noise(runs: Iterable[Record], target: float, axis: Axis) -> float:
  """Returns the variance of the logarithm of an arm's mean cost to a target.

  What the images leave uncertain of an accuracy, over how fast it rises there.
  """
  finished = done(runs)
  slopes = [_slope(run, target, axis) for run in finished]
  own = noise_lib.binomial_variance(target, curve_images(finished))
  return own / float(np.median(slopes)) ** 2


def _slope(run: Record, target: float, axis: Axis) -> float:
  """Returns by how much top-1 rises with the logarithm of the cost."""
  costs, values = _whole_curve(run, axis)
  i = max(1, int(np.argmax(values >= target)))
  rise = (values[i] - values[i - 1]) / (costs[i] - costs[i - 1])
  return float(rise * (first_reach(costs, values, target) or costs[i]))


def mean_curve(runs: Sequence[Record], axis: Axis) -> MeanCurve | None:
  """Returns the mean top-1 of the runs that are done, over costs along `axis`.

  On the costs that all of them have in common, so that no run enters or leaves
  the mean within the curve; None where there are none.
  """
  curves = [points(run, axis) for run in done(runs)]
  curves = [(x, y) for x, y in curves if x.size]
  grid = _common_grid([x for x, _ in curves])
  if not grid.size:
    return None
  values = np.array([np.interp(grid, x, y) for x, y in curves])
  mean, spread = values.mean(0), _spread(values)
  if spread is None:
    return MeanCurve(grid, mean, None, None)
  own = noise_lib.binomial_variance(mean, curve_images(runs))
  error = noise_lib.standard_error(spread.variance, spread.freedom, Noise(own))
  low, high = _interval(mean, error, _ACCURACIES)
  return MeanCurve(grid, mean, low, high)


def lines(
  runs: Iterable[Record], axis: Axis
) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[float, float] | None]:
  """Returns a cell's lines in percent, and the interval at the end of its mean.

  That is the only one; of few runs, whose interval says little, each is one.
  """
  finished = done(runs)
  curve = mean_curve(finished, axis)
  if len(finished) < _MIN_MEAN or curve is None:
    drawn = [points(run, axis) for run in finished]
    return [(x, 100 * y) for x, y in drawn], None
  mean = [(curve.grid, 100 * curve.mean)]
  if curve.low is None or curve.high is None:
    return mean, None
  return mean, (100 * float(curve.low[-1]), 100 * float(curve.high[-1]))


def _common_grid(costs: Sequence[np.ndarray]) -> np.ndarray:
  """Returns where any of the curves has a point and all of them have a value.

  Many points, as of seconds that no two runs share, are thinned to even
  distances.
  """
  if not costs:
    return np.array([])
  low, high = max(x[0] for x in costs), min(x[-1] for x in costs)
  grid = np.unique(np.concatenate(costs))
  grid = grid[(grid >= low) & (grid <= high)]
  if grid.size > _MAX_POINTS:
    return np.linspace(low, high, _MAX_POINTS)
  return grid


def _whole_curve(run: Record, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
  """Returns a run's points, and before them where its first step began."""
  costs, values = points(run, axis)
  before = earlier_stages(run)
  start = before[-1].get(axis, 0.0) if before else 0.0
  if run['boundaries']:
    start += run['boundaries'][-1].get(f'handover_{axis}', 0.0)
  return np.append(start, costs), np.append(0.0, values)

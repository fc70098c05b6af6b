"""What a few runs with different seeds say: intervals, tests and mean curves.

Runs are the records of a comparison: cell, seed, status, final_top1, curve and
boundaries. Accuracies are parts of one; intervals hold 95% by Student's t,
which takes runs of one cell as normal around their mean.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

CONFIDENCE = 0.95

# A run's record, and the costs that its curve is told over.
Run = Mapping[str, Any]
Axis = Literal['images', 'flops', 'seconds', 'epochs']
# A number for each seed.
Scores = Mapping[int, float]

# More points than this do not show in a plot's line.
_MAX_POINTS = 400


class Estimate(NamedTuple):
  """A mean and its 95% interval; one value has no interval and no spread."""

  mean: float
  std: float | None
  low: float | None
  high: float | None
  n: int


class Comparison(NamedTuple):
  """How two cells differ, first less second, or first over second.

  `counts` are the runs of each that gave a number. Paired, the estimate is of
  the seeds that both have.
  """

  estimate: Estimate
  p_value: float | None
  paired: bool
  counts: tuple[int, int]


class MeanCurve(NamedTuple):
  """A mean over runs, with its 95% interval where there are two or more."""

  grid: np.ndarray
  mean: np.ndarray
  low: np.ndarray | None
  high: np.ndarray | None


def estimate(values: Iterable[float]) -> Estimate:
  """Returns the mean of `values`, their standard deviation and the interval.

  Raises:
    ValueError: if there is no value, or one is not finite.
  """
  x = _finite(values)
  mean = float(x.mean())
  if x.size == 1:
    return Estimate(mean, None, None, None, 1)
  std = float(x.std(ddof=1))
  half = _quantile(x.size - 1) * std / math.sqrt(x.size)
  return Estimate(mean, std, mean - half, mean + half, x.size)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
  """Returns the mean of a - b, by position: the same seed on both sides."""
  if len(a) != len(b):
    raise ValueError(f'Pairs need as many on both sides: {len(a)}, {len(b)}.')
  return estimate(_finite(a) - _finite(b))


def welch_difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
  """Returns the difference of two means of unrelated runs (Welch 1947).

  Its `std` is that of the difference of one run of each, its `n` the smaller
  count; one run on either side leaves it without an interval.
  """
  x, y = _finite(a), _finite(b)
  mean, n = float(x.mean() - y.mean()), min(x.size, y.size)
  if n == 1:
    return Estimate(mean, None, None, None, 1)
  error, freedom = _welch(x, y)
  half = _quantile(freedom) * error
  std = math.sqrt(x.var(ddof=1) + y.var(ddof=1))
  return Estimate(mean, std, mean - half, mean + half, n)


def is_difference(e: Estimate, null: float = 0.0) -> bool:
  """Returns whether the interval of `e` excludes `null`; without one, False."""
  if e.low is None or e.high is None:
    return False
  return not e.low <= null <= e.high


def paired_p_value(a: Sequence[float], b: Sequence[float]) -> float | None:
  """Returns how often pairs without a difference differ as much or more."""
  e = paired_difference(a, b)
  if e.std is None:
    return None
  return _p_value(e.mean, e.std / math.sqrt(e.n), e.n - 1)


def welch_p_value(a: Sequence[float], b: Sequence[float]) -> float | None:
  """Returns the same for unrelated runs; None where a side has but one."""
  x, y = _finite(a), _finite(b)
  if min(x.size, y.size) == 1:
    return None
  return _p_value(float(x.mean() - y.mean()), *_welch(x, y))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Returns the p-values adjusted for their number (Holm 1979).

  Where all hypotheses hold, at most 5% of families have one below 0.05. None,
  from cells with one run, is no test: it stays and does not count.
  """
  tested = [(p, i) for i, p in enumerate(p_values) if p is not None]
  adjusted: list[float | None] = [None] * len(p_values)
  highest = 0.0
  for rank, (p, i) in enumerate(sorted(tested)):
    highest = max(highest, min(1.0, (len(tested) - rank) * p))
    adjusted[i] = highest
  return adjusted


def expected_maximum(count: int) -> float:
  """Returns how far the best of `count` equal cells lies above their mean.

  In standard errors of one cell's mean, for cells with normal means.
  """
  x = np.linspace(-10, 10, 4001)
  normal = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
  density = count * normal * special.ndtr(x) ** (count - 1)
  return float(np.trapezoid(x * density, x))


def compare(a: Scores, b: Scores) -> Comparison:
  """Returns a - b: over the seeds that both have, or by Welch if under two."""
  common = sorted(a.keys() & b.keys())
  counts = (len(a), len(b))
  if len(common) >= 2 or (common and 1 in counts):
    x, y = [a[s] for s in common], [b[s] for s in common]
    return Comparison(
      paired_difference(x, y), paired_p_value(x, y), True, counts
    )
  x, y = list(a.values()), list(b.values())
  return Comparison(welch_difference(x, y), welch_p_value(x, y), False, counts)


def compare_costs(a: Scores, b: Scores) -> Comparison:
  """Returns the geometric mean of a / b of positive costs, paired as `compare`.

  The interval is that of log a - log b, whose ends are raised again: costs
  vary by factors, and a / b then says as much as b / a. `std` stays that of the
  logarithms.

  Raises:
    ValueError: if a cost is not positive.
  """
  found = compare(_log_scores(a), _log_scores(b))
  return found._replace(estimate=_raised(found.estimate))


def by_cell(runs: Iterable[Run]) -> dict[str, list[Run]]:
  """Returns the runs of each cell, cells as they first appear, seeds sorted."""
  cells: dict[str, list[Run]] = {}
  for run in runs:
    cells.setdefault(run['cell'], []).append(run)
  return {k: sorted(v, key=lambda run: run['seed']) for k, v in cells.items()}


def done(runs: Iterable[Run]) -> list[Run]:
  """Returns the runs that reached their end."""
  return [run for run in runs if run['status'] == 'done']


def final_scores(runs: Iterable[Run]) -> dict[int, float]:
  """Returns the final top-1 of each run that is done, by seed.

  Not the best of its epochs: that one is chosen on the evaluation images, and
  the more evaluations there are, the higher it comes out.
  """
  return {run['seed']: float(run['final_top1']) for run in done(runs)}


def points(run: Run, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
  """Returns costs along `axis` and top-1 of the run's evaluations."""
  rows = [row for row in run['curve'] if row['top1'] is not None]
  costs = np.array([row[axis] for row in rows], float)
  return costs, np.array([row['top1'] for row in rows], float)


def earlier_stages(run: Run) -> list[Mapping[str, Any]]:
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
  runs: Iterable[Run], target: float, axis: Axis
) -> dict[int, float | None]:
  """Returns what each run that is done paid to reach `target`, by seed.

  A curve starts, with none right, where the stages before it end: their cost
  is the ladder's, and a target passed before the first evaluation is not taken
  for one that was passed at it. None: the run ended below the target.
  """
  return {run['seed']: _reach(run, target, axis) for run in done(runs)}


def compare_time_to_target(
  a: Mapping[int, float | None], b: Mapping[int, float | None]
) -> Comparison | None:
  """Returns the ratio of the costs to a target, or None where it has no sense.

  Only where every run of both reached the target. The mean of those that did
  would be better the more of the slow ones are missing from it; what is left
  then is to say how many did.
  """
  x = {seed: cost for seed, cost in a.items() if cost is not None}
  y = {seed: cost for seed, cost in b.items() if cost is not None}
  if not x or not y or len(x) < len(a) or len(y) < len(b):
    return None
  if min(*x.values(), *y.values()) <= 0:
    return None
  return compare_costs(x, y)


def interpolate_curve(
  costs: npt.ArrayLike, values: npt.ArrayLike, grid: npt.ArrayLike
) -> np.ndarray:
  """Returns the curve at `grid`, straight between its points, NaN outside."""
  x, y = np.asarray(costs, float), np.asarray(values, float)
  return np.interp(np.asarray(grid, float), x, y, left=np.nan, right=np.nan)


def mean_curve(runs: Iterable[Run], axis: Axis) -> MeanCurve | None:
  """Returns the mean top-1 of the runs that are done, over costs along `axis`.

  On the costs that all of them have in common, so that no run enters or leaves
  the mean within the curve; None where there are none.
  """
  curves = [points(run, axis) for run in done(runs)]
  curves = [(x, y) for x, y in curves if x.size]
  grid = _common_grid([x for x, _ in curves])
  if not grid.size:
    return None
  values = np.array([interpolate_curve(x, y, grid) for x, y in curves])
  mean, n = values.mean(0), len(values)
  if n == 1:
    return MeanCurve(grid, mean, None, None)
  half = _quantile(n - 1) * values.std(0, ddof=1) / math.sqrt(n)
  return MeanCurve(grid, mean, mean - half, mean + half)


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


def _reach(run: Run, target: float, axis: Axis) -> float | None:
  costs, values = points(run, axis)
  before = earlier_stages(run)
  start = before[-1].get(axis, 0.0) if before else 0.0
  return first_reach([start, *costs], [0.0, *values], target)


def _welch(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
  """Returns the standard error of the difference and its degrees of freedom."""
  parts = np.array([v.var(ddof=1) / v.size for v in (x, y)])
  freedoms = np.array([x.size - 1, y.size - 1])
  total = float(parts.sum())
  if total == 0:
    return 0.0, float(freedoms.sum())
  return math.sqrt(total), total**2 / float((parts**2 / freedoms).sum())


def _quantile(freedom: float) -> float:
  return float(special.stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def _p_value(difference: float, error: float, freedom: float) -> float:
  if error == 0:
    return 1.0 if difference == 0 else 0.0
  return float(2 * special.stdtr(freedom, -abs(difference) / error))


def _raised(e: Estimate) -> Estimate:
  low = None if e.low is None else math.exp(e.low)
  high = None if e.high is None else math.exp(e.high)
  return Estimate(math.exp(e.mean), e.std, low, high, e.n)


def _log(costs: Sequence[float]) -> list[float]:
  if any(cost <= 0 for cost in costs):
    raise ValueError(f'A ratio needs positive costs, not {list(costs)}.')
  return [math.log(cost) for cost in costs]


def _log_scores(scores: Scores) -> dict[int, float]:
  return dict(zip(scores, _log(list(scores.values())), strict=True))


def _finite(values: Iterable[float]) -> np.ndarray:
  x = np.array(list(values), float)
  if not x.size or not np.isfinite(x).all():
    raise ValueError(f'Need one finite value or more, not {x.tolist()}.')
  return x

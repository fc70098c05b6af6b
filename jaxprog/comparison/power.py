"""How large a difference has to be for a number of seeds to show it.

Known before anything runs, from how far apart the pairs of a pilot lie: an
earlier comparison, or what is over of the same one. Variances are those of
differences of top-1, which are parts of one.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import config_dict
from scipy import special

from jaxprog import errors, paths
from jaxprog.comparison import collect, sequential, statistics
from jaxprog.comparison import noise as noise_lib
from jaxprog.comparison.noise import Error, Noise
from jaxprog.comparison.runs import Planned
from jaxprog.comparison.statistics import Record, Score

POWER = 0.8
# More seeds than this are called out of reach.
MAX_SEEDS = 1000


class Spread(NamedTuple):
  """What the differences of pairs vary by.

  Of one pair, `seeds` is the variance that its seed is the cause of, and `own`
  that by which the two runs happen to have right what others have not; all of
  them have `shared` in common, which is the images'. The last two are those of
  `num_images`. No mean of pairs varies by less than `least`: that is said where
  it is not known which images each run has right. `freedom` are the degrees of
  freedom by which the spread of pairs is known.
  """

  seeds: float
  own: float
  shared: float
  num_images: int
  least: float = 0.0
  freedom: float = math.inf

  def on(self, num_images: int) -> 'Spread':
    """Returns that of an evaluation on another number of images."""
    part = self.num_images / num_images
    return Spread(
      self.seeds,
      part * self.own,
      part * self.shared,
      num_images,
      part * self.least,
      self.freedom,
    )

  def bounds(self) -> tuple['Spread', 'Spread']:
    """Returns the ends between which it lies in 80% of all cases."""
    if math.isinf(self.freedom):
      return self, self
    total = self.freedom * (self.seeds + self.own)
    low, high = (
      total / special.chdtri(self.freedom, 1 - x) - self.own for x in (0.9, 0.1)
    )
    return (
      self._replace(seeds=max(float(low), 0.0)),
      self._replace(seeds=max(float(high), 0.0)),
    )

  def error(self, n: int) -> Error:
    """Returns the error of a mean over `n` pairs."""
    noise = Noise(max(self.own / n, self.least), self.shared)
    spread = (self.seeds + self.own) / n
    return noise_lib.standard_error(spread, n - 1, noise)


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
  found, counts = [], []
  for ours in scores.values():
    common = sorted(ours.keys() & theirs.keys())
    if len(common) > 1:
      found.append(_measure(*([x[k] for k in common] for x in (ours, theirs))))
      counts.append(len(common) - 1)
  if not found:
    return None
  total, own, shared, least = np.mean([x[:-1] for x in found], 0).tolist()
  num_images = found[0][-1]
  # All pairs have the reference's runs: two variances correlate by a quarter.
  freedom = sum(counts) / (1 + (len(counts) - 1) / 4)
  seeds = max(total - own, 0.0)
  return Spread(seeds, own, shared, num_images, least, freedom)


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
  Infinite below MIN_RUNS, and where accuracies cannot differ by so much.
  """
  if n < statistics.MIN_RUNS:
    return math.inf
  error = spread.error(n)
  limit = error.half(level) / error.size
  found = error.size * special.nctdtrinc(error.freedom, 1 - power, limit)
  return float(found) if found <= 1 else math.inf


def required(
  spread: Spread, difference: float, level: float = 0.05, power: float = POWER
) -> int | None:
  """Returns how many pairs show `difference`; None: the images are too few."""
  for n in range(statistics.MIN_RUNS, MAX_SEEDS + 1):
    if detectable(spread, n, level, power) <= difference:
      return n
  return None


class Asked(NamedTuple):
  """What a comparison plans.

  `level` is the error of an interval with `seeds`, `last_level` that with
  `max_seeds`; `num_cells` are compared with the reference. `flops` are those of
  one seed of all cells.
  """

  seeds: int
  max_seeds: int
  num_cells: int
  num_images: int
  level: float
  last_level: float
  margin: float
  flops: float


def begin(
  config: config_dict.ConfigDict,
  planned: Sequence[Planned],
  previous: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Returns what can be shown, before anything runs: an entry of `power`.

  By `config.pilot`, else the runs that are over, else what is typical. Where
  all runs are over, what was said before them stays.

  Args:
    config: of the comparison.
    planned: a run of each cell, the reference first.
    previous: what comparison.json holds, if there is one.

  Raises:
    UserError: if the pilot cannot be read, or has no pairs.
  """
  pilot = _read_pilot(config.pilot) if config.pilot else None
  asked = _ask(config, planned, previous)
  said = (previous or {}).get('power') or {}
  before = said.get('before', {})
  if said.get('after') and asked._asdict().items() <= before.items():
    return before
  if pilot is not None:
    return foresee(asked, pilot, f'of {config.pilot}')
  return foresee(asked, previous, 'of the seeds that are over')


def end(before: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the same entry by the runs of a comparison that is finished."""
  asked = Asked(*(before[x] for x in Asked._fields))
  return foresee(asked, result, 'of these runs')


def _ask(
  config: config_dict.ConfigDict,
  planned: Sequence[Planned],
  previous: Mapping[str, Any] | None,
) -> Asked:
  plan = sequential.go_on(previous, config.seeds, config.max_seeds)
  rule = plan.rule(config.seeds, finished=True, margin=config.margin)
  last = rule
  if not rule.silence and rule.looks[-1] < 1:
    last = rule._replace(looks=(*rule.looks, 1.0))
  costs = [cost for run in planned for cost in run.costs]
  return Asked(
    config.seeds,
    max(config.seeds, plan.max_seeds),
    max(1, len(planned) - 1),
    planned[0].costs[-1].num_eval_images,
    rule.level,
    last.level,
    config.margin,
    float(sum(cost.total('flops') for cost in costs)),
  )


def _read_pilot(path: str) -> dict[str, Any]:
  """Returns what the comparison.json of a pilot holds."""
  where = f'config.pilot={path}'
  source = paths.expand(path, where)
  source = source / 'comparison.json' if source.is_dir() else source
  try:
    found = json.loads(source.read_text(encoding='utf-8'))
    spread = measure(found['runs'], found['reference'])
  except (OSError, LookupError, TypeError, ValueError) as e:
    raise errors.UserError(
      f'The pilot is no comparison that can be read: {e}.',
      where,
      'Give the workdir of an earlier --mode=compare.',
    ) from e
  if spread is None:
    raise errors.UserError(
      'No cell of the pilot has two seeds in common with its reference.',
      where,
      'Give a pilot of two seeds or more.',
    )
  return found


def foresee(
  asked: Asked, pilot: Mapping[str, Any] | None, source: str
) -> dict[str, Any]:
  """Returns what `asked` can show, where pairs vary as those of `pilot`.

  Of a pilot without pairs, or none, nothing is known but what is typical.
  `source` says where it comes from.
  """
  spread, seconds = None, None
  if pilot is not None:
    spread = measure(pilot['runs'], pilot['reference'])
    seconds = _seconds_of(asked.flops, pilot['runs'])
  if spread is None:
    source = 'assumed: accuracies near 50%, seeds that move them by 1.7 points'
    spread = assume(asked.num_images)
  spread = spread.on(asked.num_images)
  levels = [x / asked.num_cells for x in (asked.level, asked.last_level)]
  found, last = (
    detectable(spread, n, level)
    for n, level in zip((asked.seeds, asked.max_seeds), levels, strict=True)
  )
  bounds = [detectable(x, asked.seeds, levels[0]) for x in spread.bounds()]
  goal = asked.margin or _rounder(min(found, last))
  return {
    **asked._asdict(),
    'source': source,
    'spread': {**spread._asdict(), 'freedom': _finite(spread.freedom)},
    'seconds_a_seed': seconds,
    'detectable': _finite(found),
    'detectable_between': [_finite(x) for x in bounds],
    'detectable_at_max': _finite(last),
    'goal': goal,
    'seeds_for_goal': required(spread, goal, levels[1]),
  }


def _finite(number: float) -> float | None:
  return number if math.isfinite(number) else None


def _rounder(part: float) -> float:
  """Returns a round number of points, a third smaller or more: 1, 2, 5, ..."""
  if not math.isfinite(part):
    return 0.01
  size = 10.0 ** math.floor(math.log10(part / 1.5))
  return max(k * size for k in (1, 2, 5) if k * size <= part / 1.5)


def _seconds_of(flops: float, runs: Iterable[Record]) -> float | None:
  """Returns the seconds of so many FLOPs, one run after the other.

  As those of `runs`, where stages that were trained once count once. None
  where none is done.
  """
  done = [run for run in statistics.done(runs) if run['boundaries']]
  spent = sum(run['boundaries'][-1]['flops'] for run in done)
  return collect.sum_costs(done)['seconds'] * flops / spent if spent else None

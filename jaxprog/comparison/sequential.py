"""Looks at a comparison: what each may claim, that all of them may be wrong 5%.

Who adds seeds until a difference shows finds one in the end. So the largest
number of seeds is planned before the first look, and each look gets its part of
the error: at n of N seeds, (n / N)**2 of it has been spent (Lan & DeMets 1983;
the power family of Kim & DeMets 1987). One look at all of them has the whole of
it. After the planned number nothing is left, and what is found is exploratory.

The part of the evaluation images in an error is the same at every look. Looks
then agree more than is counted here, which makes all of them together wrong in
fewer cases, not in more.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

# Of all looks together.
ERROR = 0.05
# Fewer runs on a side are called neither better nor worse, sooner nor later.
MIN_RUNS = 3
EXPLORATORY, UNDER_WAY = 'exploratory', 'under way'

_RHO = 2
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
# Total errors for which the level of a look is kept, from the largest.
_ERRORS = (1.0, 0.7, 0.4, 0.2, 0.1, *ERROR / 1.5 ** np.arange(60))


class Rule(NamedTuple):
  """What a conclusion may claim.

  `looks` are the seeds of all looks up to this one, as parts of the planned
  number. `silence` says why nothing is claimed, if so: intervals then hold 95%
  each by itself. Differences below `margin` do not matter; 0: all may.
  """

  looks: tuple[float, ...] = (1.0,)
  silence: str = ''
  margin: float = 0.0

  @property
  def level(self) -> float:
    """The error of an interval at this look, below and above it together."""
    return ERROR if self.silence else levels(self.looks)[-1]

  def describe_intervals(self) -> str:
    """Returns '95% intervals', or what those of a look hold in."""
    return f'{100 * (1 - self.level):.3g}% intervals'

  def adjust(self, p_value: float | None) -> float | None:
    """Returns the total error at which this look would just claim (p-value).

    Below ERROR where an interval of `level` excludes what the test asks about
    (the repeated p-value of Jennison & Turnbull 2000, chapter 9).
    """
    if p_value is None or self.silence:
      return None
    if self.looks == (1.0,):
      return p_value
    found = _last_levels(self.looks)
    if p_value <= found[-1]:
      return float(p_value * _ERRORS[-1] / found[-1])
    logs = np.log(found[::-1]), np.log(_ERRORS[::-1])
    return float(np.exp(np.interp(math.log(p_value), *logs)))


class Plan(NamedTuple):
  """How many seeds were planned, and the looks there were.

  A look is an entry of `looks` in docs/compare.md.
  """

  max_seeds: int
  looks: tuple[Mapping[str, Any], ...] = ()

  def rule(self, seeds: int, *, finished: bool, margin: float) -> Rule:
    """Returns what may be claimed of `seeds`; again, what was claimed then."""
    claimed = [x['seeds'] for x in self.looks if x['level'] is not None]
    earlier = [n for n in claimed if n < seeds]
    if not finished:
      return Rule(silence=UNDER_WAY, margin=margin)
    if seeds not in claimed and (claimed != earlier or seeds > self.max_seeds):
      return Rule(silence=EXPLORATORY, margin=margin)
    parts = tuple(n / self.max_seeds for n in (*earlier, seeds))
    return Rule(parts, margin=margin)

  def add(self, seeds: int, rule: Rule, verdict: str) -> 'Plan':
    """Returns the plan with a look; with as many seeds it is the same one.

    With fewer than MIN_RUNS nothing is seen.
    """
    if seeds < MIN_RUNS:
      return self
    look = {
      'seeds': seeds,
      'level': None if rule.silence else rule.level,
      'verdict': verdict,
    }
    others = [x for x in self.looks if x['seeds'] != seeds]
    looks = sorted([*others, look], key=lambda x: x['seeds'])
    return self._replace(looks=tuple(looks))

  def warning(self, seeds: int, max_seeds: int) -> str:
    """Returns what is to be known before `seeds` are trained, '' if nothing."""
    rule = self.rule(seeds, finished=True, margin=0.0)
    if not rule.silence and max_seeds in (0, self.max_seeds):
      return ''
    last = max((x['seeds'] for x in self.looks), default=0)
    text = f'{self.max_seeds} seeds were planned'
    if max_seeds not in (0, self.max_seeds):
      text += f', and max_seeds={max_seeds} comes too late'
    if rule.silence:
      text += f': with {seeds} after {last} no difference will be claimed'
    return f'{text}.'

  def note(self) -> str:
    """Returns what exploratory looks are worth, and what was shown before."""
    found = [x['level'] for x in self.looks]
    if None not in found:
      return ''
    chance = crossing(
      [x['seeds'] for x in self.looks],
      [ERROR if level is None else level for level in found],
    )
    text = (
      f'{self.max_seeds} seeds were planned: what more of them show is '
      f'exploratory. By intervals of 95% each, {100 * chance:.0f}% of equal '
      'cells would differ at one look or another; whoever may add seeds sets '
      'max_seeds before the first run.'
    )
    planned = [x for x in self.looks if x['level'] is not None]
    if planned:
      text += f' With {planned[-1]["seeds"]}: {planned[-1]["verdict"]}'
    return text


def go_on(
  previous: Mapping[str, Any] | None, seeds: int, max_seeds: int
) -> Plan:
  """Returns the plan of a comparison that is begun, or goes on.

  The plan is made before anyone can have seen a difference: until then it may
  be changed, later not.

  Args:
    previous: what comparison.json held before.
    seeds: those that are asked for now.
    max_seeds: the largest number that is asked for now; 0: `seeds`.
  """
  asked = max(seeds, max_seeds)
  if previous is None:
    return Plan(asked)
  before = previous['config']['seeds']
  looks = previous.get('looks')
  if looks is None:  # Of a version that counted none.
    looks = []
    if previous['finished']:
      verdict = next(iter(previous['verdicts']), '')
      looks = Plan(before).add(before, Rule(), verdict).looks
  planned = previous.get('max_seeds', before)
  if looks:
    return Plan(planned, tuple(looks))
  over = len({run['seed'] for run in previous['runs']})
  return Plan(max(planned, asked) if over >= MIN_RUNS else asked)


def rule_of(result: Mapping[str, Any]) -> Rule:
  """Returns what the comparison may claim that comparison.json holds."""
  config = result.get('config', {})
  margin = config.get('margin', 0.0)
  if 'max_seeds' not in result:  # Of a version that counted no looks.
    return Rule(margin=margin)
  finished = result['finished']
  return plan_of(result).rule(config['seeds'], finished=finished, margin=margin)


def plan_of(result: Mapping[str, Any]) -> Plan:
  """Returns the plan that comparison.json holds."""
  return Plan(result.get('max_seeds', 0), tuple(result.get('looks', ())))


@functools.lru_cache
def levels(looks: tuple[float, ...], error: float = ERROR) -> tuple[float, ...]:
  """Returns the error of a test at each look, that all have `error` together.

  Of tests of a normal mean; their levels serve t-tests too (Pocock 1977).

  Args:
    looks: parts of the planned number of seeds, rising, up to 1.
    error: of all looks up to the planned number.
  """
  return _spend(looks, [error * x**_RHO for x in looks])


def _spend(looks: Sequence[float], spent: Sequence[float]) -> tuple[float, ...]:
  """Returns levels with which, up to each look, so much error is `spent`."""
  found: list[float] = []
  walk = _Walk()
  for look, before, after in zip(looks, [0.0, *spent], spent, strict=False):
    low, high = 0.0, 40.0  # The limit, in standard errors.
    for _ in range(60):
      middle = (low + high) / 2
      if walk.leaving(look, middle) > after - before:
        low = middle
      else:
        high = middle
    found.append(float(2 * special.ndtr(-high)))
    walk = walk.stay(look, high)
  return tuple(found)


def crossing(looks: Sequence[float], levels: Sequence[float]) -> float:
  """Returns how often one of the looks differs, with these levels, by chance.

  `looks` are in any unit of seeds.
  """
  walk, total = _Walk(), 0.0
  for look, level in zip(looks, levels, strict=True):
    limit = float(-special.ndtri(level / 2))
    total += walk.leaving(look, limit)
    walk = walk.stay(look, limit)
  return total


class _Walk(NamedTuple):
  """A sum of normal numbers that stayed within the limits of all looks.

  Values, the probability that each stands for, and the variance so far
  (Armitage, McPherson & Rowe 1969).
  """

  values: np.ndarray = np.zeros(1)
  weights: np.ndarray = np.ones(1)
  variance: float = 0.0

  def leaving(self, look: float, limit: float) -> float:
    """Returns how often the next look is the first beyond its limit."""
    step, bound = math.sqrt(look - self.variance), limit * math.sqrt(look)
    above = special.ndtr((self.values - bound) / step)
    below = special.ndtr((-self.values - bound) / step)
    return float(self.weights @ (above + below))

  def stay(self, look: float, limit: float) -> '_Walk':
    """Returns the walk after a look within its limit."""
    step, bound = math.sqrt(look - self.variance), limit * math.sqrt(look)
    values = bound * _NODES
    z = (values[:, None] - self.values) / step
    density = np.exp(-(z**2) / 2) @ self.weights / (math.sqrt(math.tau) * step)
    return _Walk(values, bound * _WEIGHTS * density, look)


@functools.lru_cache
def _last_levels(looks: tuple[float, ...]) -> np.ndarray:
  """Returns the level of the last look for each of _ERRORS."""
  return np.array([levels(looks, error)[-1] for error in _ERRORS])

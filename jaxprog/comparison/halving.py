"""Chooses one of several factors by successive halving."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Trial(NamedTuple):
  """What one factor came to on one rung; the score is -inf if it diverged."""

  rung: int
  factor: float
  score: float


class Choice(NamedTuple):
  """The factor that was chosen, and why.

  Attributes:
    factor: 1 if every trial failed.
    at_border: whether it is the smallest or the largest of several: the best
      one may lie beyond.
    trials: in the order in which they ran; as many for any scores.
  """

  factor: float
  at_border: bool
  trials: tuple[Trial, ...]


def halve(
  factors: Sequence[float],
  num_rungs: int,
  keep: float,
  score: Callable[[int, Sequence[float]], Sequence[float]],
) -> Choice:
  """Returns the best of `factors` on the last rung that they are left for.

  Jamieson & Talwalkar 2016 (arXiv:1502.07943): all run on the first rung, the
  best part `keep` of them on each further one. Of equal scores the one whose
  factor is nearer to 1 counts as better.

  Args:
    factors: above 0.
    num_rungs: each costs more than the one before.
    keep: part that goes on, in (0, 1]; rounded up.
    score: of a rung, counted from 0, and the factors that are left; one each,
      higher is better.
  """
  left, trials, best = list(factors), [], None
  for rung in range(num_rungs):
    pairs = zip(left, score(rung, left), strict=True)
    ran = [Trial(rung, *pair) for pair in pairs]
    trials += ran
    ran.sort(key=lambda t: (-t.score, abs(math.log(t.factor)), t.factor))
    if ran[0].score == -math.inf:
      break
    best = ran[0].factor
    left = [t.factor for t in ran[: math.ceil(keep * len(ran) - 1e-9)]]
  border = len(factors) > 1 and best in (min(factors), max(factors))
  return Choice(1.0 if best is None else best, border, tuple(trials))

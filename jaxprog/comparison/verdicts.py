"""What a comparison found, in sentences that claim no more than was shown."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxprog.comparison import statistics
from jaxprog.comparison.statistics import Axis, Difference, Estimate, Record

COSTS: Mapping[Axis, str] = {
  'flops': 'FLOPs',
  'images': 'images',
  'seconds': 'seconds',
  'epochs': 'epochs',
}
PAYS, DOES_NOT_PAY, NOT_SHOWN = 'pays', 'does not pay', 'not shown'

# Digits after the point are added up to this number where an interval that
# excludes the null would be printed as one that touches it.
_MAX_DIGITS = 4


class Arm(NamedTuple):
  """One side of a comparison: its name within a sentence, and its runs."""

  name: str
  runs: Sequence[Record]


class Answer(NamedTuple):
  """Whether an arm paid under one control: 'pays', 'does not pay', 'not shown'.

  `difference` is that of the final accuracies, None if a side has no run that
  is done; `reason` says what kept a shown difference from counting.
  """

  word: str
  difference: Difference | None
  reason: str = ''


def compare_sentence(a: Arm, b: Arm, target: float, axis: Axis) -> str:
  """Returns all that is to be said of `a` against `b`, without a full stop.

  Args:
    a: of which is spoken.
    b: against which it was run.
    target: top-1 in [0, 1] that both should reach.
    axis: the cost of reaching it.
  """
  missing = [arm for arm in (a, b) if not statistics.done(arm.runs)]
  if missing:
    return f'{no_run_sentence(missing)}: nothing can be compared'
  parts = [
    target_sentence(a, b, target, axis),
    accuracy_sentence(a, b),
    *lost_runs(a, b),
  ]
  return '; '.join(parts)


def target_sentence(a: Arm, b: Arm, target: float, axis: Axis) -> str:
  """Returns what `a` paid to reach `target`, as a multiple of what `b` paid."""
  goal = f'{100 * target:.1f}% top-1'
  x = statistics.costs_to_target(a.runs, target, axis)
  y = statistics.costs_to_target(b.runs, target, axis)
  found = statistics.compare_time_to_target(a.runs, b.runs, target, axis)
  if found is None:
    return f'{goal} was reached by {_reached(a, x)} and {_reached(b, y)}'
  e = found.estimate
  cost = f'after {format_ratio(e)} of the {COSTS[axis]}'
  if e.low is None:
    return f'{a.name} reached {goal} {cost}'
  if not statistics.is_difference(e, 1.0):
    return f'{a.name} reached {goal} {cost}: {_not_shown(e)}'
  return (
    f'{a.name} reached {goal} {"sooner" if e.mean < 1 else "later"}, {cost}'
  )


def accuracy_sentence(a: Arm, b: Arm) -> str:
  """Returns how the final top-1 of `a` differs from that of `b`."""
  found = statistics.compare(
    statistics.final_scores(a.runs), statistics.final_scores(b.runs)
  )
  text = f'final accuracy {format_points(found.estimate)} points'
  if found.estimate.low is None:
    return f'{text}; {count_sentence(found)}: nothing can be said of the spread'
  return f'{text}: {_better(found.estimate)}, {count_sentence(found)}'


def count_sentence(found: Difference) -> str:
  """Returns how many runs a comparison stands on, and whether they pair."""
  x, y = found.counts
  if x == y == 1:
    return 'one run each'
  if not found.paired:
    return f'n = {x} and {y}, unpaired'
  if x == y == found.estimate.n:
    return f'n = {x}'
  pairs = f'{found.estimate.n} pair{"s"[: found.estimate.n > 1]}'
  return f'n = {pairs} of {x} and {y} runs'


def lost_runs(*arms: Arm) -> list[str]:
  """Returns a clause for each arm that has runs outside of its mean."""
  clauses = []
  for arm in arms:
    counts = [
      f'{sum(run["status"] == status for run in arm.runs)} {status}'
      for status in ('diverged', 'failed')
      if any(run['status'] == status for run in arm.runs)
    ]
    if counts:
      total = f'{len(arm.runs)} run{"s"[: len(arm.runs) > 1]}'
      clauses.append(
        f'of {total} of {arm.name} {" and ".join(counts)}, not in the mean'
      )
  return clauses


def no_run_sentence(arms: Sequence[Arm]) -> str:
  """Returns that no run of `arms` came to its end."""
  return f'no run of {" or ".join(arm.name for arm in arms)} finished'


def answer(a: Arm, b: Arm) -> Answer:
  """Returns whether `a` paid against `b`, the control of the same cost.

  By the final accuracy alone, the one outcome that is fixed beforehand:
  whichever of two outcomes came out well would pay twice as often by chance. A
  better mean does not count where runs of its own arm diverged, since those
  are not in it.
  """
  x, y = statistics.final_scores(a.runs), statistics.final_scores(b.runs)
  if not x or not y:
    return Answer(NOT_SHOWN, None, no_run_sentence([b if x else a]))
  found = statistics.compare(x, y)
  if not statistics.is_difference(found.estimate):
    return Answer(NOT_SHOWN, found)
  better, worse = (a, b) if found.estimate.mean > 0 else (b, a)
  if _diverged(better) > _diverged(worse):
    return Answer(NOT_SHOWN, found, f'runs of {better.name} diverged')
  return Answer(PAYS if better is a else DOES_NOT_PAY, found)


def overall(name: str, answers: Mapping[Axis, Answer]) -> str:
  """Returns the first line of a page: what each control of a cost answered.

  Args:
    name: of the arm, such as 'the ladder'.
    answers: by the cost that its control had in common with it.
  """
  clauses = []
  for word in (PAYS, DOES_NOT_PAY, NOT_SHOWN):
    controls = [
      f'at equal {COSTS[axis]} ({_ground(found)})'
      for axis, found in answers.items()
      if found.word == word
    ]
    if controls:
      said = 'is not shown to pay' if word == NOT_SHOWN else word
      clauses.append(f'{said} {_enumerate(controls)}')
  sentence = f'{name} {"; it ".join(clauses)}.'
  return sentence[0].upper() + sentence[1:]


def multiplicity_note(count: int) -> str:
  """Returns what `count` intervals of 95% side by side are worth."""
  if count < 2:
    return ''
  chance = 100 * (1 - statistics.CONFIDENCE**count)
  return (
    f'Each interval holds 95% by itself: of {count} independent comparisons '
    f'without any difference, at least one would show one in {chance:.0f}% of '
    'all cases.'
  )


def selection_note(cells: Sequence[Estimate]) -> str:
  """Returns how much of the best cell's lead is owed to having been chosen.

  Args:
    cells: final top-1 of each that has a run; those with one run count among
      what was chosen from, and say nothing of the spread.
  """
  if len(cells) < 2:
    return ''
  text = (
    f'The best of {len(cells)} cells is chosen on these same runs, so its '
    'mean is too high'
  )
  squares = [e.std**2 / e.n for e in cells if e.std is not None]
  if not squares:
    return f'{text}; one run each, so nothing can be said of by how much.'
  error = (sum(squares) / len(squares)) ** 0.5
  lead = 100 * error * statistics.expected_maximum(len(cells))
  return (
    f'{text}: were all cells alike, it would still come out about '
    f'{lead:.1f} points above their average. Run it again with new seeds '
    'before its number is quoted.'
  )


def format_points(e: Estimate) -> str:
  """Returns a difference of accuracies in points: '+0.2 [-0.6, 1.0]'."""
  scaled = _scaled(e, 100)
  digits = _digits(scaled, 0.0, 1)
  return f'{_round(scaled.mean, digits):+.{digits}f}{_interval(scaled, digits)}'


def format_ratio(e: Estimate) -> str:
  """Returns a ratio of costs: '0.81x [0.74, 0.90]'."""
  digits = _digits(e, 1.0, 2)
  return f'{e.mean:.{digits}f}x{_interval(e, digits)}'


def _better(e: Estimate) -> str:
  if not statistics.is_difference(e):
    return _not_shown(e)
  return 'better' if e.mean > 0 else 'worse'


def _not_shown(e: Estimate) -> str:
  few = e.n < statistics.MIN_RUNS
  return 'too few runs to tell' if few else 'no difference shown'


def _reached(arm: Arm, costs: Mapping[int, float | None]) -> str:
  """Returns how many runs of an arm reached a target: '3 of 5 runs of NAME'."""
  reached = sum(cost is not None for cost in costs.values())
  runs = f'run{"s"[: len(costs) > 1]} of {arm.name}'
  return f'{reached or "none"} of {len(costs)} {runs}'


def _ground(found: Answer) -> str:
  if found.difference is None:
    return found.reason
  e = found.difference.estimate
  parts = [f'{format_points(e)} points', count_sentence(found.difference)]
  return ', '.join([*parts, *filter(None, [found.reason])])


def _enumerate(parts: Sequence[str]) -> str:
  *most, last = parts
  return f'{", ".join(most)} and {last}' if most else last


def _diverged(arm: Arm) -> int:
  return sum(run['status'] == 'diverged' for run in arm.runs)


def _scaled(e: Estimate, scale: float) -> Estimate:
  std, low, high = (
    None if x is None else scale * x for x in (e.std, e.low, e.high)
  )
  return Estimate(scale * e.mean, std, low, high, e.n)


def _digits(e: Estimate, null: float, digits: int) -> int:
  """Returns how many digits keep a shown difference visible."""
  if not statistics.is_difference(e, null):
    return digits
  while digits < _MAX_DIGITS and null in (
    _round(e.low or 0.0, digits),
    _round(e.high or 0.0, digits),
  ):
    digits += 1
  return digits


def _round(value: float, digits: int) -> float:
  """Returns `value` rounded, without a sign where that leaves nothing."""
  return round(value, digits) + 0.0


def _interval(e: Estimate, digits: int) -> str:
  if e.low is None or e.high is None:
    return ''
  low, high = (_round(x, digits) for x in (e.low, e.high))
  return f' [{low:.{digits}f}, {high:.{digits}f}]'

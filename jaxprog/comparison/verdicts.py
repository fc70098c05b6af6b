"""What a comparison found, in sentences that claim no more than was shown."""

from collections.abc import Mapping, Sequence

from jaxprog.comparison import statistics
from jaxprog.comparison.statistics import Axis, Difference, Estimate, Record

# So many digits after the point at most; see `_format`.
_MAX_DIGITS = 4
# More cells that do not differ are counted.
_MAX_NAMED = 3

# One side of a comparison: the runs of a cell, whose name it has in a sentence.
_Arm = Sequence[Record]


def compare_sentence(a: _Arm, b: _Arm, target: float, axis: Axis) -> str:
  """Returns all that is to be said of `a` against `b`, without a full stop.

  `axis` is the cost of reaching `target`, a top-1 in [0, 1].
  """
  missing = [arm for arm in (a, b) if not statistics.done(arm)]
  if missing:
    return f'{_no_run(missing)}: nothing can be compared'
  parts = [
    target_sentence(a, b, target, axis),
    accuracy_sentence(a, b),
    *lost_runs(a, b),
  ]
  return '; '.join(parts)


def target_sentence(a: _Arm, b: _Arm, target: float, axis: Axis) -> str:
  """Returns what `a` paid to reach `target`, as a multiple of what `b` paid."""
  goal = f'{100 * target:.1f}% top-1'
  x = statistics.costs_to_target(a, target, axis)
  y = statistics.costs_to_target(b, target, axis)
  found = statistics.compare_time_to_target(a, b, target, axis)
  if found is None:
    return f'{goal} was reached by {_reached(a, x)} and {_reached(b, y)}'
  e = found.estimate
  cost = f'after {format_ratio(e)} of the {_cost(axis)}'
  if e.low is None:
    return f'{_name(a)} reached {goal} {cost}'
  if not statistics.is_difference(e, 1.0):
    return f'{_name(a)} reached {goal} {cost}: {_not_shown(e)}'
  return (
    f'{_name(a)} reached {goal} {"sooner" if e.mean < 1 else "later"}, {cost}'
  )


def accuracy_sentence(a: _Arm, b: _Arm) -> str:
  """Returns how the final top-1 of `a` differs from that of `b`."""
  found = statistics.compare(
    statistics.final_scores(a), statistics.final_scores(b)
  )
  text = f'final accuracy {format_points(found.estimate)} points'
  counts = _count(found)
  if found.estimate.low is None:
    return f'{text}; {counts}: nothing can be said of the spread'
  if not statistics.is_difference(found.estimate):
    return f'{text}: {_not_shown(found.estimate)}, {counts}'
  return f'{text}: {"better" if found.estimate.mean > 0 else "worse"}, {counts}'


def _count(found: Difference) -> str:
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


def lost_runs(*arms: _Arm) -> list[str]:
  """Returns a clause for each arm that has runs outside of its mean."""
  return [
    f'of {_runs_of(arm, len(arm))} {" and ".join(counts)}, not in the mean'
    for arm in arms
    if (counts := statistics.count_lost(arm))
  ]


def _no_run(arms: Sequence[_Arm]) -> str:
  """Returns that no run of `arms` came to its end."""
  return f'no run of {" or ".join(map(_name, arms))} finished'


def answer(a: _Arm, b: _Arm) -> tuple[str, str]:
  """Returns 'pays', 'does not pay' or 'not shown' of `a`, and on what ground.

  Against `b`, the control of the same cost. By the final accuracy alone, the
  one outcome that is fixed beforehand: whichever of two outcomes came out well
  would pay twice as often by chance. A better mean does not count where runs of
  its own arm diverged, since those are not in it.
  """
  x, y = statistics.final_scores(a), statistics.final_scores(b)
  if not x or not y:
    return 'not shown', _no_run([b if x else a])
  found = statistics.compare(x, y)
  e = found.estimate
  ground = f'{format_points(e)} points, {_count(found)}'
  if not statistics.is_difference(e):
    return 'not shown', ground
  better, worse = (a, b) if e.mean > 0 else (b, a)
  diverged, fewer = (
    sum(run['status'] == 'diverged' for run in arm) for arm in (better, worse)
  )
  if diverged > fewer:
    return 'not shown', f'{ground}, runs of {_name(better)} diverged'
  return 'pays' if better is a else 'does not pay', ground


def overall(name: str, answers: Mapping[Axis, tuple[str, str]]) -> str:
  """Returns the first line of a page: what each control answered.

  By the cost that it has in common with the arm, whose name is `name`.
  """
  clauses = []
  for word in ('pays', 'does not pay', 'not shown'):
    controls = [
      f'at equal {_cost(axis)} ({ground})'
      for axis, (found, ground) in answers.items()
      if found == word
    ]
    if controls:
      said = 'is not shown to pay' if word == 'not shown' else word
      clauses.append(f'{said} {_enumerate(controls)}')
  sentence = f'{name} {"; it ".join(clauses)}.'
  return sentence[0].upper() + sentence[1:]


def ranking(arms: Sequence[_Arm], reference: _Arm) -> str:
  """Returns the first line of a page: which arms differ from the reference.

  By the final accuracy, the largest difference first; by p-values adjusted for
  their number, since the largest of many is no single comparison.
  """
  theirs = statistics.final_scores(reference)
  found = {
    _name(arm): statistics.compare(scores, theirs)
    for arm in arms
    if theirs and (scores := statistics.final_scores(arm))
  }
  p_values = statistics.holm([x.p_value for x in found.values()])
  differ = [
    (name, x.estimate)
    for (name, x), p in zip(found.items(), p_values, strict=True)
    if p is not None and p < 1 - statistics.CONFIDENCE
  ]
  differ.sort(key=lambda x: -x[1].mean)
  clauses = []
  for word, sign in (('better', 1), ('worse', -1)):
    said = [
      f'{k} ({format_points(e)} points)' for k, e in differ if sign * e.mean > 0
    ]
    if said:
      clauses.append(f'{word} than {_name(reference)}: {_enumerate(said)}')
  left = [_name(arm) for arm in arms if _name(arm) not in dict(differ)]
  if left:
    named = _enumerate(left), 'is' if len(left) == 1 else 'are'
    if len(left) > _MAX_NAMED:
      named = f'{len(left)} of {len(arms)} cells', 'are'
    clauses.append(
      f'{" ".join(named)} not shown to differ from {_name(reference)} in final '
      'accuracy'
    )
  sentence = '; '.join(clauses)
  return f'{sentence[0].upper()}{sentence[1:]}.'


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

  Cells with one run count among what was chosen from, and say nothing of the
  spread.
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
  return _format(e, '+', '', null=0.0, digits=1, scale=100)


def format_ratio(e: Estimate) -> str:
  """Returns a ratio of costs: '0.81x [0.74, 0.90]'."""
  return _format(e, '', 'x', null=1.0, digits=2)


def _format(
  e: Estimate,
  sign: str,
  unit: str,
  *,
  null: float,
  digits: int,
  scale: float = 1.0,
) -> str:
  """Returns a mean and its interval.

  With more digits where an interval that excludes `null` would be printed as
  one that touches it; without a sign where rounding leaves nothing.
  """

  def rounded(value: float | None) -> float:
    return round(scale * (value or 0.0), digits) + 0.0

  if statistics.is_difference(e, null):
    while digits < _MAX_DIGITS and null in (rounded(e.low), rounded(e.high)):
      digits += 1
  text = f'{rounded(e.mean):{sign}.{digits}f}{unit}'
  if e.low is None:
    return text
  return f'{text} [{rounded(e.low):.{digits}f}, {rounded(e.high):.{digits}f}]'


def _not_shown(e: Estimate) -> str:
  few = e.n < statistics.MIN_RUNS
  return 'too few runs to tell' if few else 'no difference shown'


def _reached(arm: _Arm, costs: Mapping[int, float | None]) -> str:
  """Returns how many runs of an arm reached a target: '3 of 5 runs of NAME'."""
  reached = sum(cost is not None for cost in costs.values())
  return f'{reached or "none"} of {_runs_of(arm, len(costs))}'


def _runs_of(arm: _Arm, count: int) -> str:
  return f'{count} run{"s"[: count > 1]} of {_name(arm)}'


def _name(arm: _Arm) -> str:
  return arm[0]['cell']


def _cost(axis: Axis) -> str:
  return 'FLOPs' if axis == 'flops' else axis


def _enumerate(parts: Sequence[str]) -> str:
  *most, last = parts
  return f'{", ".join(most)} and {last}' if most else last

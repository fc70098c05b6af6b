"""What a comparison found, in sentences that claim no more than was shown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.comparison import claims, sequential, statistics
from jaxprog.comparison.claims import Claim
from jaxprog.comparison.sequential import Rule
from jaxprog.comparison.statistics import Axis, Difference, Estimate, Record

# So many digits after the point at most; see `_format`.
_MAX_DIGITS = 4
# More cells that do not differ are counted.
_MAX_NAMED = 3

# What a ladder does beside a control that is so much.
_ANSWERS = {'worse': 'pays', 'better': 'does not pay', 'equal': 'equal'}

_PLAIN = Rule()

# One side of a comparison: the runs of a cell, whose name it has in a sentence.
_Arm = Sequence[Record]


def compare_sentence(
  a: _Arm, b: _Arm, target: float, axis: Axis, rule: Rule = _PLAIN
) -> str:
  """Returns all that is to be said of `a` against `b`, without a full stop.

  `axis` is the cost of reaching `target`, a top-1 in [0, 1].
  """
  missing = [arm for arm in (a, b) if not statistics.done(arm)]
  if missing:
    return f'{_no_run(missing)}: nothing can be compared'
  parts = [
    target_sentence(a, b, target, axis, rule),
    accuracy_sentence(a, b, rule),
    *lost_runs(a, b),
  ]
  return '; '.join(parts)


def target_sentence(
  a: _Arm, b: _Arm, target: float, axis: Axis, rule: Rule = _PLAIN
) -> str:
  """Returns what `a` paid to reach `target`, as a multiple of what `b` paid."""
  goal = f'{100 * target:.1f}% top-1'
  if statistics.has_holdout([*a, *b]):
    goal += ' on the hold-out'
  x = statistics.costs_to_target(a, target, axis)
  y = statistics.costs_to_target(b, target, axis)
  found = statistics.compare_time_to_target(a, b, target, axis, rule.level)
  if found is None:
    return f'{goal} was reached by {_reached(a, x)} and {_reached(b, y)}'
  e = found.estimate
  cost = f'after {format_ratio(e)} of the {_cost(axis)}'
  if e.low is None:
    return f'{_name(a)} reached {goal} {cost}'
  if rule.silence or not statistics.is_difference(e, 1.0):
    return f'{_name(a)} reached {goal} {cost}: {_not_shown(e, rule)}'
  return (
    f'{_name(a)} reached {goal} {"sooner" if e.mean < 1 else "later"}, {cost}'
  )


def accuracy_sentence(a: _Arm, b: _Arm, rule: Rule = _PLAIN) -> str:
  """Returns how the final top-1 of `a` differs from that of `b`."""
  found = statistics.compare(
    statistics.final_scores(a), statistics.final_scores(b), rule.level
  )
  e, counts = found.estimate, _count(found)
  text = f'{statistics.whose([*a, *b])} accuracy {format_points(e)} points'
  if e.low is None:
    return f'{text}; {counts}: nothing can be said of the spread'
  is_equal, words = _is_equal(found, rule), []
  if not rule.silence and statistics.is_difference(e):
    words.append('better' if e.mean > 0 else 'worse')
  elif not is_equal:
    words.append(_not_shown(e, rule))
  if is_equal or not statistics.is_difference(e):
    words.append(_size(found, rule))
  return f'{text}: {", ".join([*filter(None, words), counts])}'


def _is_equal(found: Difference, rule: Rule) -> bool:
  """Returns whether two cells are shown to differ by less than the margin."""
  p_equal = found.p_equal(rule.margin)
  if rule.silence or not rule.margin or p_equal is None:
    return False
  return p_equal < rule.level


def _size(found: Difference, rule: Rule) -> str:
  """Returns within how many points two cells are shown to be equal."""
  if _is_equal(found, rule):
    return f'equal within {format_margin(rule.margin)}'
  bound = found.within(rule.level)
  if rule.silence or bound is None:
    return ''
  return f'equal within {format_bound(bound)}'


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


def answer(
  a: _Arm, b: _Arm, found: Mapping[str, Claim], rule: Rule = _PLAIN
) -> tuple[str, str]:
  """Returns what `a` does, and on what ground.

  'pays', 'does not pay', 'equal' or 'not shown'. Against `b`, the control of
  the same cost, by what is `found` of all cells beside `a`: as shown is what
  holds of all of them together. By the final accuracy alone, the one outcome
  that is fixed beforehand: whichever of two outcomes came out well would pay
  twice as often by chance.
  """
  claim = found.get(_name(b))
  if claim is None:
    return 'not shown', _no_run([b if statistics.done(a) else a])
  difference = claim.difference.turned()
  e = difference.estimate
  word = _ANSWERS.get(claim.verdict, 'not shown')
  ground = [f'{format_points(e)} points', _count(difference)]
  if word == 'not shown':
    ground.append(claim.silence or _why_not(a, b, found))
  elif word != 'equal' and claim.is_equal:
    ground.append(f'equal within {format_margin(rule.margin)}')
  return word, ', '.join(filter(None, ground))


def _why_not(a: _Arm, b: _Arm, found: Mapping[str, Claim]) -> str:
  """Returns what keeps a difference, or that there is none, from being shown.

  Or how large one can be.
  """
  claim = found[_name(b)]
  if claim.p_value is None:
    return ''
  if min(claim.p_value, claim.p_equal or 1.0) < sequential.ERROR:
    theirs, ours = claim.diverged
    return f'runs of {_name(a if ours >= theirs else b)} diverged'
  if statistics.is_difference(claim.difference.estimate):
    count = sum(x.p_value is not None for x in found.values())
    return f'p = {claim.p_value:.3f} of {count} cells together'
  if claim.within is None:
    return ''
  return f'equal within {format_bound(claim.within)}'


def overall(
  ladder: _Arm,
  arms: Mapping[str, _Arm],
  controls: Mapping[Axis, str],
  rule: Rule = _PLAIN,
) -> str:
  """Returns the first line of a page: what each control answered.

  `controls` are those of `arms` that have a cost in common with the ladder. By
  p-values adjusted for the number of arms.
  """
  name = _name(ladder)
  found = claims.find({name: ladder, **arms}, name, rule)
  answers = {
    axis: answer(ladder, arms[control], found, rule)
    for axis, control in controls.items()
  }
  said = {
    'pays': 'pays',
    'does not pay': 'does not pay',
    'equal': f'is equal within {format_margin(rule.margin)} to the control',
    'not shown': 'is not shown to pay',
  }
  clauses = []
  for word, text in said.items():
    grounds = [
      f'at equal {_cost(axis)} ({ground})'
      for axis, (answered, ground) in answers.items()
      if answered == word
    ]
    if grounds:
      clauses.append(f'{text} {_enumerate(grounds)}')
  sentence = f'{name} {"; it ".join(clauses)}.'
  return sentence[0].upper() + sentence[1:]


def ranking(arms: Sequence[_Arm], reference: _Arm, rule: Rule = _PLAIN) -> str:
  """Returns the first line of a page: which arms differ from the reference.

  By the final accuracy, the largest difference first; by p-values adjusted for
  their number, since the largest of many is no single comparison.
  """
  cells = {_name(x): x for x in (reference, *arms)}
  found = claims.find(cells, _name(reference), rule)
  differ = [(k, x) for k, x in found.items() if x.differs]
  differ.sort(key=lambda x: -x[1].difference.estimate.mean)
  clauses = []
  for word in ('better', 'worse'):
    said = [
      f'{k} ({format_points(x.difference.estimate)} points)'
      for k, x in differ
      if x.verdict == word
    ]
    if said:
      clauses.append(f'{word} than {_name(reference)}: {_enumerate(said)}')
  equal = [k for k, x in found.items() if x.verdict == 'equal']
  if equal:
    clauses.append(
      f'{_count_named(equal, arms)} equal to {_name(reference)} within '
      f'{format_margin(rule.margin)}'
    )
  settled = {*dict(differ), *equal}
  if left := [_name(arm) for arm in arms if _name(arm) not in settled]:
    bounds = [found[k].within if k in found else None for k in left]
    clauses.append(
      f'{_count_named(left, arms)} not shown to differ from '
      f'{_name(reference)} in {statistics.whose(reference)} accuracy'
      f'{_reserve(bounds, rule)}'
    )
  sentence = '; '.join(clauses)
  return f'{sentence[0].upper()}{sentence[1:]}.'


def _count_named(names: Sequence[str], arms: Sequence[_Arm]) -> str:
  """Returns 'a and b are', or how many of them."""
  if len(names) > _MAX_NAMED:
    return f'{len(names)} of {len(arms)} cells are'
  return f'{_enumerate(names)} {"is" if len(names) == 1 else "are"}'


def _reserve(bounds: Sequence[float | None], rule: Rule) -> str:
  """Returns what is said of cells that are not shown to differ."""
  if rule.silence:
    return f' ({rule.silence})'
  known = [x for x in bounds if x is not None]
  if len(known) < len(bounds):
    return ''
  return f' (equal within {format_bound(max(known))})'


def power_sentence(found: Mapping[str, Any]) -> str:
  """Returns what can be shown, by an entry of `power` in docs/compare.md."""
  seeds, images = found['seeds'], found['num_images']
  seen, goal = found['detectable'], format_margin(found['goal'])
  text = f'With {seeds} seed{"s" * (seeds > 1)} and {images:,} images '
  if seen is None:
    text += 'no difference can be shown'
  else:
    text += f'differences of {format_bound(seen)} can be seen'
    low, high = (
      'more' if x is None else format_bound(x).split()[0]
      for x in found['detectable_between']
    )
    if low != high:
      text += f' ({low} to {high}, so far as the spread is known)'
  last = found['detectable_at_max']
  if found['max_seeds'] > seeds and last is not None:
    text += f', with {found["max_seeds"]} of {format_bound(last)}'
  needed = found['seeds_for_goal']
  if needed is None:
    text += f'; for {goal} no number of seeds is enough: take more images'
  else:
    text += f'; for {goal} take {needed} seeds'
    if found['seconds_a_seed'] is not None:
      hours = needed * found['seconds_a_seed'] / 3600
      text += f' ({formats.hours(hours)})'
  cells = found['num_cells']
  many = f', {cells} cells together' if cells > 1 else ''
  return f'{text}. In 80% of all cases{many}; spread {found["source"]}.'


def outlook(result: Mapping[str, Any]) -> Iterator[str]:
  """Yields what to think of a comparison that is finished, and of more seeds.

  What was exploratory, and where a difference is not shown, what could have
  been. `result` is what comparison.json holds.
  """
  if note := sequential.plan_of(result).note():
    yield note
  after = (result.get('power') or {}).get('after')
  open_ones = [
    x for x in result.get('differences', ()) if x['verdict'] == 'not shown'
  ]
  if after and open_ones:
    yield power_sentence(after)


def multiplicity_note(count: int, rule: Rule = _PLAIN) -> str:
  """Returns what `count` intervals of differences side by side are worth."""
  text = ''
  if rule.level != sequential.ERROR:
    text = (
      f'Intervals of differences are of {100 * (1 - rule.level):.3g}% at this '
      'look: those of all looks up to the planned number of seeds hold '
      'together in 95% of all cases. '
    )
  if count > 1:
    chance = 100 * (1 - (1 - sequential.ERROR) ** count)
    text += (
      f'Each interval holds {"" if text else "95% "}by itself: of {count} '
      'independent comparisons without any difference, at least one would show '
      f'one in {chance:.0f}% of all cases.'
    )
  return text.strip()


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


def format_margin(margin: float) -> str:
  """Returns a number of points: '1 point', '0.5 points'."""
  number = f'{100 * margin:.4g}'
  return f'{number} point{"s"[: number != "1"]}'


def format_bound(bound: float) -> str:
  """Returns the same, rounded up: to a tenth, below a point to a hundredth."""
  parts = 10 if bound >= 0.01 else 100
  return format_margin(math.ceil(100 * bound * parts - 1e-9) / parts / 100)


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


def _not_shown(e: Estimate, rule: Rule) -> str:
  if e.n < statistics.MIN_RUNS:
    return 'too few runs to tell'
  return rule.silence or 'no difference shown'


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

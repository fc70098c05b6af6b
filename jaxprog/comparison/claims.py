"""What is claimed of all cells beside a reference, taken together."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxprog.comparison import sequential, statistics
from jaxprog.comparison.sequential import Rule
from jaxprog.comparison.statistics import Difference, Score


class Claim(NamedTuple):
  """How a cell differs from the reference, and what of that is shown.

  Both p-values count the looks and how many cells there are (Holm): `p_value`
  is that of no difference, `p_equal` that of one of the rule's margin or more.
  `within` is what differences lie within, those of all cells together
  (Bonferroni). None where nothing is claimed, or no margin is asked for.
  """

  difference: Difference
  p_value: float | None
  p_equal: float | None
  within: float | None
  silence: str = ''

  @property
  def differs(self) -> bool:
    """Whether a difference is shown."""
    return self.p_value is not None and self.p_value < sequential.ERROR

  @property
  def is_equal(self) -> bool:
    """Whether it is shown that a difference is smaller than the margin."""
    return self.p_equal is not None and self.p_equal < sequential.ERROR

  @property
  def verdict(self) -> str:
    """'better', 'worse', 'equal', 'not shown', or why nothing is claimed."""
    if self.p_value is None:
      return self.silence or 'too few runs'
    if self.differs:
      return 'better' if self.difference.estimate.mean > 0 else 'worse'
    return 'equal' if self.is_equal else 'not shown'


def find(
  scores: Mapping[str, Mapping[int, Score]], reference: str, rule: Rule
) -> dict[str, Claim]:
  """Returns a claim for each cell that has scores, if the reference has."""
  theirs = scores[reference]
  found = {
    cell: statistics.compare(ours, theirs, rule.level)
    for cell, ours in scores.items()
    if cell != reference and ours and theirs
  }
  p_values = [rule.adjust(x.p_value) for x in found.values()]
  p_equals = [
    rule.adjust(x.p_equal(rule.margin)) if rule.margin else None
    for x in found.values()
  ]
  level = rule.level / max(1, sum(p is not None for p in p_values))
  return {
    cell: Claim(
      x, p, p_equal, None if p is None else x.within(level), rule.silence
    )
    for (cell, x), p, p_equal in zip(
      found.items(),
      statistics.holm(p_values),
      statistics.holm(p_equals),
      strict=True,
    )
  }

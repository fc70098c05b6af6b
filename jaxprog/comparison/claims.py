"""What is claimed of all cells beside a reference, taken together."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxprog.comparison import sequential, statistics
from jaxprog.comparison.sequential import Rule
from jaxprog.comparison.statistics import Difference, Record


class Claim(NamedTuple):
  """How a cell differs from the reference, and what of that is shown.

  Both p-values count the looks and how many cells there are (Holm): `p_value`
  is that of no difference, `p_equal` that of one of the rule's margin or more.
  `within` is what differences lie within, those of all cells together
  (Bonferroni). None where nothing is claimed, or no margin is asked for.
  `diverged` are runs of the cell and of the reference that are in no mean: by
  those that are left, none is better than what lost fewer, and none are equal.
  """

  difference: Difference
  p_value: float | None
  p_equal: float | None
  within: float | None
  silence: str = ''
  diverged: tuple[int, int] = (0, 0)

  @property
  def differs(self) -> bool:
    """Whether a difference is shown."""
    if self.p_value is None or self.p_value >= sequential.ERROR:
      return False
    ours, theirs = self.diverged
    return ours <= theirs if self.is_above else theirs <= ours

  @property
  def is_equal(self) -> bool:
    """Whether it is shown that a difference is smaller than the margin."""
    return (
      self.p_equal is not None
      and self.p_equal < sequential.ERROR
      and not any(self.diverged)
    )

  @property
  def is_above(self) -> bool:
    """Whether the cell's mean is the higher one."""
    return self.difference.estimate.mean > 0

  @property
  def verdict(self) -> str:
    """'better', 'worse', 'equal', 'not shown', or why nothing is claimed."""
    if self.p_value is None:
      return self.silence or 'too few runs'
    if self.differs:
      return 'better' if self.is_above else 'worse'
    return 'equal' if self.is_equal else 'not shown'


def find(
  cells: Mapping[str, Sequence[Record]], reference: str, rule: Rule
) -> dict[str, Claim]:
  """Returns a claim for each cell of which a run is done, as of the reference.

  `cells` are all runs of each.
  """
  scores = {cell: statistics.final_scores(x) for cell, x in cells.items()}
  lost = {
    cell: sum(run['status'] == 'diverged' for run in x)
    for cell, x in cells.items()
  }
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
      x,
      p,
      p_equal,
      x.within(level)
      if p is not None and not lost[cell] + lost[reference]
      else None,
      rule.silence,
      (lost[cell], lost[reference]),
    )
    for (cell, x), p, p_equal in zip(
      found.items(),
      statistics.holm(p_values),
      statistics.holm(p_equals),
      strict=True,
    )
  }

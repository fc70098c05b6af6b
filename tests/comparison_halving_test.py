import math

import pytest

from jaxprog.comparison import halving


def halve(scores, num_rungs=3, keep=0.5):
  """Returns the choice where a factor's score is looked up by rung."""
  return halving.halve(
    list(scores),
    num_rungs,
    keep,
    lambda rung, left: [scores[x][rung] for x in left],
  )


def test_half_goes_on_and_the_best_of_the_last_rung_is_chosen():
  choice = halve(
    {
      0.25: (0.1, 0.0, 0.0),
      0.5: (0.4, 0.6, 0.7),
      1.0: (0.5, 0.5, 0.9),
      2.0: (0.6, 0.8, 0.8),
      4.0: (0.2, 0.0, 0.0),
    }
  )
  ran = [(t.rung, t.factor) for t in choice.trials]
  assert ran == [
    *((0, x) for x in (0.25, 0.5, 1.0, 2.0, 4.0)),
    *((1, x) for x in (2.0, 1.0, 0.5)),
    *((2, x) for x in (2.0, 0.5)),
  ]
  assert choice.factor == 2.0
  assert not choice.at_border


@pytest.mark.parametrize(
  ('keep', 'count'), [(0.3, 5 + 2 + 1), (0.5, 5 + 3 + 2), (1.0, 15)]
)
def test_every_cell_has_as_many_trials_whatever_its_scores(keep, count):
  factors = (0.1, 0.3, 1.0, 3.0, 10.0)
  for scores in ((0, 1, 2, 3, 4), (1, 1, 1, 1, 1), (4, -math.inf, 2, 1, 0)):
    by_factor = dict(zip(factors, scores, strict=True))
    choice = halving.halve(
      factors, 3, keep, lambda _, left, x=by_factor: [x[y] for y in left]
    )
    assert len(choice.trials) == count


def test_of_equal_scores_the_factor_nearest_to_one_wins():
  choice = halve(dict.fromkeys((0.1, 0.5, 1.5, 4.0), (0.5,)), num_rungs=1)
  assert choice.factor == 1.5


def test_a_rate_at_the_border_of_the_range_is_said():
  rising = {x: (x,) for x in (0.5, 1.0, 2.0)}
  assert halve(rising, num_rungs=1).at_border
  falling = {x: (-x,) for x in (0.5, 1.0, 2.0)}
  assert halve(falling, num_rungs=1) == (0.5, True, halve(falling, 1).trials)
  assert not halve({1.0: (0.5,)}, num_rungs=1).at_border


def test_trials_that_diverge_lose_and_where_all_do_the_own_rate_stays():
  lost = (-math.inf, -math.inf)
  choice = halve({0.5: (0.1, 0.1), 1.0: lost, 2.0: lost}, num_rungs=2)
  assert choice.factor == 0.5
  choice = halve({0.5: lost, 1.0: lost, 2.0: lost}, num_rungs=2)
  assert (choice.factor, choice.at_border) == (1.0, False)
  assert len(choice.trials) == 3
  choice = halve({0.5: (0.2, -math.inf), 2.0: (0.1, 0.9)}, num_rungs=2)
  assert choice.factor == 0.5

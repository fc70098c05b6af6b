import math

import comparison_fixture
import numpy as np
import pytest
from scipy import special

from jaxprog.comparison import noise as noise_lib
from jaxprog.comparison import sequential
from jaxprog.comparison.sequential import Plan, Rule


def limits(levels):
  return -special.ndtri(np.array(levels) / 2)


def test_limits_equal_published_ones():
  """Of five looks at equal distances, by the R package ldbounds 2.0."""
  looks = np.arange(1, 6) / 5
  half = -special.ndtri(0.05 / 4)
  obrien = 4 * special.ndtr(-half / np.sqrt(looks))
  found = sequential._spend(looks, obrien)
  published = [4.8769, 3.3570, 2.6803, 2.2898, 2.0310]
  np.testing.assert_allclose(limits(found), published, atol=1e-4)
  pocock = 0.05 * np.log(1 + (math.e - 1) * looks)
  found = sequential._spend(looks, pocock)
  published = [2.4380, 2.4268, 2.4102, 2.3966, 2.3860]
  np.testing.assert_allclose(limits(found), published, atol=1e-4)


def test_looks_without_a_rule_are_wrong_as_often_as_published():
  """Armitage, McPherson & Rowe 1969, table 2: 5%, 8.3%, 10.7%, 14.2%."""
  for count, published in ((1, 0.05), (2, 0.083), (3, 0.107), (5, 0.142)):
    found = sequential.crossing(range(1, count + 1), [0.05] * count)
    assert found == pytest.approx(published, abs=5e-4)


def test_one_look_has_the_whole_error_and_its_p_values_as_they_are():
  assert Rule().level == 0.05
  assert Rule().adjust(0.0123) == 0.0123
  assert Plan(3).rule(3, finished=True, margin=0.0) == Rule()


def test_each_look_spends_what_the_rule_gives_it():
  looks = (1 / 3, 5 / 9, 1.0)
  levels = sequential.levels(looks)
  assert levels[0] == pytest.approx(0.05 / 9)
  for k in (1, 2, 3):
    spent = sequential.crossing(looks[:k], levels[:k])
    assert spent == pytest.approx(0.05 * looks[k - 1] ** 2, rel=1e-6)
  # What comes after a look does not change it.
  assert sequential.levels(looks[:2]) == levels[:2]


def test_a_p_value_says_what_the_interval_says():
  rule = Rule((1 / 3, 5 / 9, 1.0))
  assert rule.adjust(1.0) == pytest.approx(1.0)
  assert rule.adjust(rule.level) == pytest.approx(0.05)
  for error in (0.3, 0.011, 1e-4):
    level = sequential.levels(rule.looks, error)[-1]
    assert rule.adjust(level) == pytest.approx(error, rel=0.01)
  assert rule.adjust(None) is None
  assert Rule(silence=sequential.EXPLORATORY).adjust(0.001) is None
  assert 0 < rule.adjust(1e-40) < 1e-39


def test_cells_that_are_equal_differ_at_any_of_three_looks_in_5_of_100_cases():
  trials, looks = 20_000, (3, 5, 9)
  rng = np.random.default_rng(0)
  # The images have a part in every look.
  x = rng.standard_normal((trials, 9)) + 0.4 * rng.standard_normal((trials, 1))
  noise = noise_lib.Noise(1e-12, 0.4**2)
  found = {}
  for name in ('planned', 'not'):
    wrong = np.zeros(trials, bool)
    for n in looks:
      spread = x[:, :n].var(1, ddof=1) / n
      error = noise_lib.standard_error(spread, n - 1, noise)
      p = error.p_value(x[:, :n].mean(1))
      parts = tuple(m / 9 for m in looks if m <= n)
      level = Rule(parts).level if name == 'planned' else 0.05
      wrong |= p < level
    found[name] = wrong.mean()
  assert 0.03 < found['planned'] < 0.055
  assert found['not'] > 0.08


def conclude(plan, seeds):
  rule = plan.rule(seeds, finished=True, margin=0.0)
  return rule, plan.add(seeds, rule, f'With {seeds}.')


def test_looks_follow_the_plan_that_was_made_before_the_first():
  plan = sequential.go_on(None, 3, 9)
  first, plan = conclude(plan, 3)
  second, plan = conclude(plan, 9)
  assert (first.looks, second.looks) == ((3 / 9,), (3 / 9, 1.0))
  assert plan.note() == ''
  # Again, and with fewer: what was claimed then, nothing new.
  assert conclude(plan, 3)[0] == first
  assert len(conclude(plan, 3)[1].looks) == 2
  assert conclude(plan, 5)[0].silence == sequential.EXPLORATORY
  third, plan = conclude(plan, 12)
  assert third.silence == sequential.EXPLORATORY
  assert third.level == 0.05
  note = plan.note()
  assert note.startswith('9 seeds were planned')
  assert note.endswith('With 9: With 9.')


def previous(plan, seeds, *, finished=True, over=None):
  """Returns what comparison.json holds of a comparison of two cells."""
  return {
    'config': {'seeds': seeds},
    'finished': finished,
    'verdicts': ['Said.'],
    'runs': comparison_fixture.create_cell('a', [0.5] * (over or seeds)),
    'max_seeds': plan.max_seeds,
    'looks': list(plan.looks),
  }


def test_two_seeds_are_no_look():
  _, plan = conclude(Plan(2), 2)
  assert plan.looks == ()
  assert sequential.go_on(previous(plan, 2), 3, 0) == Plan(3)


def test_a_plan_changes_only_before_anything_can_be_seen():
  _, looked = conclude(Plan(3), 3)
  assert sequential.go_on(previous(looked, 3), 9, 20) == looked
  unseen = previous(Plan(100), 100, finished=False, over=2)
  assert sequential.go_on(unseen, 3, 0) == Plan(3)
  seen = previous(Plan(10), 10, finished=False, over=5)
  assert sequential.go_on(seen, 5, 0) == Plan(10)
  assert sequential.go_on(seen, 12, 0) == Plan(12)


def test_a_comparison_of_a_version_without_looks_has_had_one():
  old = previous(Plan(3), 3)
  for field in ('max_seeds', 'looks'):
    del old[field]
  assert sequential.rule_of(old) == Rule()
  plan = sequential.go_on(old, 5, 0)
  assert plan.looks == ({'seeds': 3, 'level': 0.05, 'verdict': 'Said.'},)
  assert conclude(plan, 5)[0].silence == sequential.EXPLORATORY
  assert sequential.go_on({**old, 'finished': False}, 5, 0) == Plan(5)


def test_what_is_under_way_claims_nothing():
  result = previous(Plan(9), 9, finished=False, over=5)
  assert sequential.rule_of(result).silence == sequential.UNDER_WAY
  assert sequential.rule_of({**result, 'finished': True}) == Rule()


def test_what_comes_too_late_is_said_before_anything_is_trained():
  assert not Plan(9).warning(3, 9)
  assert not Plan(3).warning(3, 0)
  _, looked = conclude(Plan(3), 3)
  assert not looked.warning(3, 0)
  assert looked.warning(5, 0) == (
    '3 seeds were planned: with 5 after 3 no difference will be claimed.'
  )
  assert 'max_seeds=9 comes too late: with 5' in looked.warning(5, 9)

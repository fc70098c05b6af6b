import math

import comparison_fixture
import numpy as np
import pytest
import scipy.stats

from jaxprog.comparison import statistics

run = comparison_fixture.create_run


def five_sigma(probability, trials):
  return 5 * math.sqrt(probability * (1 - probability) / trials)


def by_seed(values):
  return dict(enumerate(values))


def test_an_interval_equals_that_of_three_values_by_hand():
  e = statistics.estimate([1, 2, 3])
  # t with two degrees of freedom, 97.5%: 4.302653 in every table.
  half = 4.302653 / math.sqrt(3)
  assert e[:2] == (2, 1)
  assert e[2:] == pytest.approx((2 - half, 2 + half, 3), rel=1e-6)


def test_an_interval_equals_scipys():
  values = np.random.default_rng(0).gamma(2.0, size=7)
  e = statistics.estimate(values)
  expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
  assert (e.low, e.high) == pytest.approx(tuple(expected), rel=1e-12)


def test_one_value_has_no_interval():
  assert statistics.estimate([0.4]) == (0.4, None, None, None, 1)
  assert not statistics.is_difference(statistics.estimate([0.4]))
  assert statistics.paired_p_value([1], [2]) is None
  assert statistics.welch_p_value([1, 2], [2]) is None
  assert statistics.welch_difference([1, 2], [1]) == (0.5, *[None] * 3, 1)


@pytest.mark.parametrize('values', [[], [1, math.nan], [1, math.inf]])
def test_no_value_and_no_number_are_errors(values):
  with pytest.raises(ValueError, match='finite'):
    statistics.estimate(values)


@pytest.mark.parametrize('n', [2, 3, 5, 10])
def test_intervals_cover_the_mean_in_95_of_100_cases(n):
  trials = 2000
  rng = np.random.default_rng(n)
  estimates = map(statistics.estimate, rng.normal(0.3, 0.02, (trials, n)))
  covered = sum(not statistics.is_difference(e, 0.3) for e in estimates)
  assert abs(covered / trials - 0.95) < five_sigma(0.95, trials)


def test_paired_difference_and_p_value_equal_scipys():
  a, b = np.random.default_rng(1).normal(size=(2, 6))
  e = statistics.paired_difference(a, b)
  expected = scipy.stats.ttest_rel(a, b)
  assert e.mean == pytest.approx(np.mean(a - b))
  assert (e.low, e.high) == pytest.approx(
    tuple(expected.confidence_interval(0.95))
  )
  assert statistics.paired_p_value(a, b) == pytest.approx(expected.pvalue)


def test_pairs_of_unequal_length_are_an_error():
  with pytest.raises(ValueError, match='3, 2'):
    statistics.paired_difference([1, 2, 3], [1, 2])


def test_welch_difference_and_p_value_equal_scipys():
  rng = np.random.default_rng(2)
  a, b = rng.normal(0, 1, 3), rng.normal(1, 4, 8)
  e = statistics.welch_difference(a, b)
  expected = scipy.stats.ttest_ind(a, b, equal_var=False)
  assert (e.low, e.high) == pytest.approx(
    tuple(expected.confidence_interval(0.95))
  )
  assert e.n == 3
  assert e.std == pytest.approx(math.hypot(a.std(ddof=1), b.std(ddof=1)))
  assert statistics.welch_p_value(a, b) == pytest.approx(expected.pvalue)


def test_runs_without_any_spread_are_compared_by_their_values():
  assert statistics.welch_difference([1, 1], [1, 1])[:4] == (0, 0, 0, 0)
  assert statistics.welch_p_value([1, 1], [1, 1]) == 1
  assert statistics.paired_p_value([2, 2], [1, 1]) == 0


def test_a_ratio_is_geometric_and_the_same_from_both_sides():
  a, b = [1.0, 4.0, 3.0], [2.0, 2.0, 9.0]
  x = dict(enumerate(a))
  for first_seed in (0, 10):  # In common, and so paired, or not.
    y = dict(enumerate(b, first_seed))
    e, back = (
      statistics.compare_costs(x, y).estimate,
      statistics.compare_costs(y, x).estimate,
    )
    assert e.mean == pytest.approx((12 / 36) ** (1 / 3))
    assert e.mean * back.mean == pytest.approx(1)
    assert (e.low * back.high, e.high * back.low) == pytest.approx((1, 1))
  logs = np.log(np.divide(a, b))
  expected = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
  e = statistics.compare_costs(x, dict(enumerate(b))).estimate
  assert (e.low, e.high) == pytest.approx(tuple(np.exp(expected)))


def test_a_ratio_of_costs_that_are_not_positive_is_an_error():
  with pytest.raises(ValueError, match='positive'):
    statistics.compare_costs({0: 1.0, 1: 0.0}, {0: 1.0, 1: 1.0})


def test_holm_equals_a_case_by_hand():
  # 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to the one before it), 0.5 * 1.
  adjusted = statistics.holm([0.03, 0.01, None, 0.5, 0.02])
  assert adjusted[2] is None
  assert [adjusted[i] for i in (1, 4, 0, 3)] == pytest.approx(
    [0.04, 0.06, 0.06, 0.5]
  )
  assert statistics.holm([0.6, 0.7]) == [1, 1]
  assert statistics.holm([]) == []


def test_holm_finds_any_difference_among_equal_cells_in_5_of_100_cases():
  trials, cells = 2000, 6
  rng = np.random.default_rng(3)
  found = 0
  for values in rng.normal(size=(trials, cells, 4)):
    p_values = [statistics.paired_p_value(v, np.zeros(4)) for v in values]
    found += min(statistics.holm(p_values)) < 0.05
  assert abs(found / trials - 0.05) < five_sigma(0.05, trials)


def test_the_best_of_equal_cells_leads_by_the_expected_maximum():
  assert statistics.expected_maximum(1) == pytest.approx(0, abs=1e-9)
  # Closed forms: 1 / sqrt(pi) and 3 / (2 sqrt(pi)).
  assert statistics.expected_maximum(2) == pytest.approx(math.pi**-0.5)
  assert statistics.expected_maximum(3) == pytest.approx(1.5 * math.pi**-0.5)


@pytest.mark.parametrize('n', [3, 5])
@pytest.mark.parametrize(
  ('shift', 'trials'), [(0, 2000), (100, 8000)], ids=['paired', 'unpaired']
)
def test_a_cell_against_itself_differs_in_3_to_7_of_100_cases(n, shift, trials):
  """Seeds that pair, and seeds that do not; 500 images to evaluate on.

  Welch's test is careful where runs are few: of 60,000 pairs of three runs it
  called 3.7%, too close to 3% to be told from it in 2,000.
  """
  rng = np.random.default_rng([n, shift])
  images = 500
  right = rng.normal(0.3, 0.02, (trials, 2, n)).clip(0, 1)
  scores = rng.binomial(images, right) / images
  found = 0
  for first, second in scores:
    b = {shift + seed: score for seed, score in enumerate(second)}
    comparison = statistics.compare(by_seed(first), b)
    assert comparison.paired == (shift == 0)
    found += statistics.is_difference(comparison.estimate)
  assert 0.03 <= found / trials <= 0.07


def test_a_difference_of_four_standard_deviations_is_found():
  rng = np.random.default_rng(4)
  trials = 200
  found = sum(
    statistics.is_difference(
      statistics.compare(by_seed(a + 0.08), by_seed(b)).estimate
    )
    for a, b in rng.normal(0.3, 0.02, (trials, 2, 5))
  )
  assert found > 0.95 * trials


def test_seeds_pair_whatever_their_order_and_the_rest_is_left_out():
  a, b = {0: 1.0, 1: 2.0, 2: 4.0}, {5: 9.0, 2: 3.0, 1: 0.5}
  found = statistics.compare(a, b)
  assert found.paired
  assert found.counts == (3, 3)
  assert found.estimate == statistics.estimate([1.5, 1.0])


def test_one_common_seed_is_no_pairing_unless_there_is_nothing_else():
  found = statistics.compare({0: 1.0, 1: 2.0}, {1: 1.0, 2: 4.0})
  assert not found.paired
  assert found.estimate == statistics.welch_difference([1, 2], [1, 4])
  found = statistics.compare({0: 1.0, 1: 2.0}, {1: 1.5})
  assert found.paired
  assert found.estimate == statistics.estimate([0.5])


@pytest.mark.parametrize(
  ('target', 'cost'),
  [(0.1, 10), (0.05, 10), (0.25, 25), (0.3, 30), (0.35, 45), (0.41, None)],
)
def test_a_target_is_first_reached_between_the_evaluations(target, cost):
  costs, values = [10, 20, 30, 40, 50], [0.1, 0.2, 0.3, 0.3, 0.4]
  found = statistics.first_reach(costs, values, target)
  assert found == (None if cost is None else pytest.approx(cost))


def test_a_target_that_is_lost_again_was_reached():
  found = statistics.first_reach([1, 2, 3], [0.1, 0.3, 0.1], 0.2)
  assert found == pytest.approx(1.5)
  assert statistics.first_reach([], [], 0.1) is None


def test_the_cost_of_a_target_counts_earlier_stages():
  curve = comparison_fixture.create_curve([0.2, 0.4], start=5000)
  boundaries = [
    comparison_fixture.create_boundary(2000),
    comparison_fixture.create_boundary(5000),
    # That of the curve's own stage is no earlier one.
    comparison_fixture.create_boundary(7000, 'last'),
  ]
  ladder = run('ladder', 3, curve=curve, boundaries=boundaries)
  found = statistics.costs_to_target([ladder], 0.1, 'images')
  assert found == {3: pytest.approx(5500)}
  found = statistics.costs_to_target([ladder], 0.3, 'flops')
  assert found == {3: pytest.approx(6500 * 2e9)}
  assert [b['images'] for b in statistics.earlier_stages(ladder)] == [
    2000,
    5000,
  ]


def test_times_to_a_target_are_compared_only_if_all_runs_reach_it():
  a, b = {0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}
  found = statistics.compare_time_to_target(a, b)
  assert found.estimate.mean == pytest.approx((1 / 2 * 2 / 3) ** 0.5)
  assert found.paired
  assert statistics.compare_time_to_target(a, {**b, 2: None}) is None
  assert statistics.compare_time_to_target({0: None}, b) is None
  assert statistics.compare_time_to_target(a, {}) is None


def test_runs_that_failed_or_diverged_have_no_score():
  runs = [
    run('a', 0, 0.3),
    run('a', 1, 0.1, status='diverged'),
    run('a', 2, None, status='failed'),
  ]
  assert statistics.final_scores(runs) == {0: 0.3}
  assert list(statistics.costs_to_target(runs, 0.1, 'images')) == [0]


def test_the_final_accuracy_is_not_the_best_one():
  assert statistics.final_scores([run('a', 0, 0.3, best_top1=0.9)]) == {0: 0.3}


def test_interpolated_curves_end_where_they_end():
  found = statistics.interpolate_curve([1, 3], [0.0, 1.0], [0, 1, 1.5, 3, 4])
  np.testing.assert_allclose(found, [np.nan, 0, 0.25, 1, np.nan])


def test_a_mean_curve_lies_on_the_costs_that_all_runs_have():
  curve = comparison_fixture.create_curve
  runs = [
    run('a', 0, curve=curve([0.1, 0.2, 0.3])),
    run('a', 1, curve=curve([0.3, 0.5], start=500)),
    run('a', 2, curve=curve([0.9] * 9), status='diverged'),
  ]
  found = statistics.mean_curve(runs, 'images')
  np.testing.assert_allclose(found.grid, [1500, 2000, 2500])
  np.testing.assert_allclose(found.mean, [0.225, 0.3, 0.375])
  e = statistics.estimate([0.15, 0.3])
  assert (found.low[0], found.high[0]) == pytest.approx((e.low, e.high))


def test_a_mean_curve_of_one_run_is_that_run_without_an_interval():
  found = statistics.mean_curve([run('a', 0)], 'flops')
  np.testing.assert_allclose(found.mean, [0.075, 0.15, 0.225, 0.3])
  assert found.low is found.high is None
  assert statistics.mean_curve([run('a', 0, status='failed')], 'flops') is None


def test_many_points_are_thinned():
  curve = comparison_fixture.create_curve(list(np.linspace(0, 0.5, 5000)))
  found = statistics.mean_curve([run('a', 0, curve=curve)], 'images')
  assert found.grid.size < 1000
  assert (found.mean[0], found.mean[-1]) == pytest.approx((0, 0.5))

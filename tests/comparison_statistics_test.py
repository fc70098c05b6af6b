import math

import comparison_fixture
import numpy as np
import pytest
import scipy.stats

from benchmarks import false_positives
from jaxprog.comparison import noise as noise_lib
from jaxprog.comparison import statistics
from jaxprog.monitoring.outcomes import Outcomes

run, scores = comparison_fixture.create_run, comparison_fixture.create_scores


def five_sigma(probability, trials):
  return 5 * math.sqrt(probability * (1 - probability) / trials)


def estimate(values):
  return statistics.estimate(scores(values).values())


def from_seed(first, values):
  return {first + seed: score for seed, score in scores(values).items()}


def with_images(outcomes):
  """Returns scores of runs of which it is known what they have right."""
  return {
    seed: statistics.Score(
      float(np.mean(right)), len(right), Outcomes('same', np.array(right, bool))
    )
    for seed, right in enumerate(outcomes)
  }


def test_an_interval_equals_that_of_three_values_by_hand():
  e = estimate([0.1, 0.2, 0.3])
  # t with two degrees of freedom, 97.5%: 4.302653 in every table.
  half = 0.1 * 4.302653 / math.sqrt(3)
  assert e == pytest.approx((0.2, 0.1, max(0.2 - half, 0), 0.2 + half, 3))
  e = estimate([0.49, 0.5, 0.51])
  half /= 10
  assert e == pytest.approx((0.5, 0.01, 0.5 - half, 0.5 + half, 3))


def test_an_interval_equals_scipys():
  values = np.random.default_rng(0).normal(0.5, 0.02, size=7)
  e = estimate(values)
  expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
  assert (e.low, e.high) == pytest.approx(tuple(expected), rel=1e-6)


def test_one_value_has_no_interval():
  assert estimate([0.4]) == (0.4, None, None, None, 1)
  assert not statistics.is_difference(estimate([0.4]))
  found = statistics.compare(scores([0.1]), scores([0.2]))
  assert found.p_value is None
  found = statistics.compare(scores([0.1, 0.2]), from_seed(5, [0.1]))
  assert found.estimate == pytest.approx((0.05, *[None] * 3, 1))
  assert found.p_value is None


@pytest.mark.parametrize('n', [3, 5, 10])
def test_intervals_cover_the_mean_in_95_of_100_cases(n):
  trials = 2000
  rng = np.random.default_rng(n)
  estimates = map(estimate, rng.normal(0.3, 0.02, (trials, n)))
  covered = sum(not statistics.is_difference(e, 0.3) for e in estimates)
  assert abs(covered / trials - 0.95) < five_sigma(0.95, trials)


def test_paired_difference_and_p_value_equal_scipys():
  a, b = np.random.default_rng(1).normal(0.5, 0.01, size=(2, 6))
  found = statistics.compare(scores(a), scores(b))
  expected = scipy.stats.ttest_rel(a, b)
  assert found.paired
  assert found.estimate.mean == pytest.approx(np.mean(a - b))
  assert found.estimate[2:4] == pytest.approx(
    tuple(expected.confidence_interval(0.95)), rel=1e-6
  )
  assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)


def test_welch_difference_and_p_value_equal_scipys():
  rng = np.random.default_rng(2)
  a, b = rng.normal(0.5, 0.01, 3), rng.normal(0.51, 0.04, 8)
  found = statistics.compare(scores(a), from_seed(10, b))
  expected = scipy.stats.ttest_ind(a, b, equal_var=False)
  e = found.estimate
  assert not found.paired
  assert e[2:4] == pytest.approx(
    tuple(expected.confidence_interval(0.95)), rel=1e-6
  )
  assert e.n == 3
  assert e.std == pytest.approx(math.hypot(a.std(ddof=1), b.std(ddof=1)))
  assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)


def test_equivalence_equals_statsmodels():
  """ttost_paired(a, b, -0.01, 0.01) of statsmodels 0.15.0."""
  a, b = (0.51, 0.52, 0.5, 0.515), (0.508, 0.523, 0.503, 0.51)
  for x, y in ((a, b), (b, a)):
    found = statistics.compare(scores(x), scores(y))
    assert found.p_equal(0.01) == pytest.approx(0.007956029511875021)
    bound = found.within(0.05)
    assert found.p_equal(bound) == pytest.approx(0.05)
    assert bound < max(map(abs, found.estimate[2:4]))
  assert statistics.compare(scores(a[:2]), scores(b[:2])).within(0.05) is None


def test_cells_a_margin_apart_are_called_equal_in_5_of_100_cases():
  trials = 2000
  rng = np.random.default_rng(6)
  found = sum(
    statistics.compare(scores(0.01 + x), scores([0.5] * 4)).p_equal(0.01) < 0.05
    for x in rng.normal(0.5, 0.004, (trials, 4))
  )
  assert abs(found / trials - 0.05) < five_sigma(0.05, trials)


def test_two_runs_are_never_called_better():
  """Of 360 images, each pair of seeds differs by the same nine."""
  a, b = ([x / 360 for x in counts] for counts in ((320, 325), (311, 316)))
  found = statistics.compare(scores(a, 360), scores(b, 360))
  assert found.p_value is None
  assert not statistics.is_difference(found.estimate)
  assert found.estimate.low < 0 < found.estimate.high


def test_a_spread_of_zero_leaves_what_the_images_leave_uncertain():
  a, b = ([x / 360 for x in counts] for counts in ((320, 321), (311, 312)))
  a, b = a * 2, b * 2
  found = statistics.compare(scores(a, 360), scores(b, 360))
  assert found.estimate.std == pytest.approx(0, abs=1e-12)
  error = math.sqrt(sum(p * (1 - p) / 360 for p in (320.5 / 360, 311.5 / 360)))
  half = (found.estimate.high - found.estimate.low) / 2
  assert half == pytest.approx(1.96 * error, rel=0.03)
  assert 0.2 < found.p_value < 0.4


def test_runs_that_agree_on_all_images_are_as_good_as_one_of_mcnemars():
  """The exact test of 14 images against 4 has p = 0.031."""
  a, b = np.ones(200), np.ones(200)
  a[:4], b[4:18] = 0, 0
  found = statistics.compare(with_images([a] * 5), with_images([b] * 5))
  expected = scipy.stats.binomtest(4, 18).pvalue
  assert found.p_value == pytest.approx(expected, abs=0.01)
  assert found.estimate.mean == pytest.approx(0.05)


def test_images_in_common_take_their_difficulty_out_of_a_difference():
  rng = np.random.default_rng(5)
  hard = rng.random(2000) < 0.5
  flips = rng.random((2, 4, 2000)) < [[[0.01]], [[0.04]]]
  a, b = (with_images(~hard & ~x) for x in flips)
  paired = statistics.compare(a, b)
  without = statistics.compare(
    *({k: x._replace(outcomes=None) for k, x in arm.items()} for arm in (a, b))
  )
  other = Outcomes('other', np.zeros(2000, bool))
  mixed = statistics.compare(a, {**b, 1: b[1]._replace(outcomes=other)})
  unpaired = statistics.compare(a, {9 + k: x for k, x in b.items()})
  widths = [
    x.estimate.high - x.estimate.low for x in (paired, unpaired, without)
  ]
  assert mixed.estimate == without.estimate
  assert max(widths[:2]) < widths[2] / 3
  assert statistics.is_difference(paired.estimate)
  assert not statistics.is_difference(without.estimate)


def test_an_accuracy_of_all_or_no_images_is_no_certainty():
  for right, low, high in ((1, 0.9, 1.0), (0, 0.0, 0.1)):
    for arm in (with_images([[right] * 90] * 3), scores([right] * 3, 90)):
      e = statistics.estimate(arm.values())
      assert (e.mean, e.std) == (right, 0)
      assert low < e.low < e.high <= high or low <= e.low < e.high < high
  found = statistics.compare(
    with_images([[1] * 90] * 3), with_images([[1] * 90] * 3)
  )
  assert found.p_value == 1
  assert found.estimate.low < 0 < found.estimate.high


def test_intervals_stay_where_accuracies_can_be():
  e = statistics.estimate(scores([0.9, 0.94], 360).values())
  assert 0 <= e.low < e.mean < e.high <= 1
  found = statistics.compare(scores([0.1, 0.9]), scores([0.9, 0.1]))
  assert (found.estimate.low, found.estimate.high) == (-1, 1)
  curve = comparison_fixture.create_curve
  runs = [run('a', i, curve=curve([x, x])) for i, x in enumerate((0.02, 0.9))]
  found = statistics.mean_curve(runs, 'images')
  assert (found.low.min(), found.high.max()) == (0, 1)


def test_what_the_images_alone_tell_apart():
  """Of 400 images, two runs differ by 2.8 points by chance at 20%."""
  assert not statistics.told_apart(0.2, 0.25, 400)
  assert statistics.told_apart(0.2, 0.26, 400)
  assert statistics.told_apart(0.2, 0.25, 4000)
  assert not statistics.told_apart(1.0, 0.99, 90)


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
  for values in rng.normal(0.5, 0.01, size=(trials, cells, 4)):
    cases = [
      statistics.compare(scores(v), scores([0.5] * 4)).p_value for v in values
    ]
    found += min(statistics.holm(cases)) < 0.05
  assert abs(found / trials - 0.05) < five_sigma(0.05, trials)


def test_the_best_of_equal_cells_leads_by_the_expected_maximum():
  assert statistics.expected_maximum(1) == pytest.approx(0, abs=1e-9)
  # Closed forms: 1 / sqrt(pi) and 3 / (2 sqrt(pi)).
  assert statistics.expected_maximum(2) == pytest.approx(math.pi**-0.5)
  assert statistics.expected_maximum(3) == pytest.approx(1.5 * math.pi**-0.5)


@pytest.mark.parametrize('n', [3, 5])
def test_a_cell_against_itself_differs_in_3_to_6_of_100_cases(n):
  """What benchmarks/false_positives.py counts at length.

  Seeds and images are drawn anew in each case; of 90 images 21 are discordant.
  """
  for images, trials in ((90, 4000), (1000, 1500)):
    rng = np.random.default_rng([n, images])
    found = false_positives.simulate(rng, trials, n, images, 0.5)
    for kind in ('by image', 'unpaired', 'binomial'):
      assert found[kind] < 0.06 + five_sigma(0.06, trials) / 2
    assert found['by image'] > 0.03 - five_sigma(0.03, trials) / 2
    assert found['seeds alone'] > found['binomial']


@pytest.mark.parametrize('seeds', [0.0, 1.0, 3.0])
def test_small_levels_are_no_more_often_wrong_than_they_say(seeds):
  """Three runs may lie close by chance; `seeds` beside a noise of 1."""
  trials = 40_000
  rng = np.random.default_rng(8)
  x = math.hypot(1, seeds) * rng.standard_normal((trials, 3))
  noise = noise_lib.Noise(1 / 3)
  error = noise_lib.standard_error(x.var(1, ddof=1) / 3, 2, noise)
  p_values, halves = error.p_value(x.mean(1)), {}
  for level in (0.05, 0.02, 0.005, 0.0005):
    wrong = p_values < level
    assert wrong.mean() < 1.2 * level + five_sigma(level, trials)
    halves[level] = error.half(level)
    assert np.array_equal(wrong, abs(x.mean(1)) > halves[level])
  assert (halves[0.0005] > halves[0.005]).all()


def test_a_difference_of_four_standard_deviations_is_found():
  rng = np.random.default_rng(4)
  trials = 200
  found = sum(
    statistics.is_difference(
      statistics.compare(scores(a + 0.08), scores(b)).estimate
    )
    for a, b in rng.normal(0.3, 0.02, (trials, 2, 5))
  )
  assert found > 0.95 * trials


def test_seeds_pair_whatever_their_order_and_the_rest_is_left_out():
  a, b = scores([0.1, 0.2, 0.4]), scores([0.9, 0.05, 0.3])
  b = {5: b[0], 2: b[2], 1: b[1]}
  found = statistics.compare(a, b)
  assert found.paired
  assert found.counts == (3, 3)
  expected = statistics.compare(scores([0.2, 0.4]), scores([0.05, 0.3]))
  assert found.estimate == expected.estimate


def test_one_common_seed_is_no_pairing_unless_there_is_nothing_else():
  x, y = scores([0.1, 0.2]), from_seed(1, [0.1, 0.4])
  found = statistics.compare(x, y)
  assert not found.paired
  assert found.estimate.mean == pytest.approx(-0.1)
  found = statistics.compare(x, from_seed(1, [0.15]))
  assert found.paired
  assert found.estimate == pytest.approx((0.05, *[None] * 3, 1))


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


def reaching(costs):
  """Returns runs that reach 20% on their way from `costs` images to twice that.

  None: they don't.
  """
  curve = comparison_fixture.create_curve
  return [
    run('a', i, curve=curve([0.1, 0.4 if cost else 0.1], step=cost or 1))
    for i, cost in enumerate(costs)
  ]


def compare_times(a, b):
  return statistics.compare_time_to_target(a, b, 0.2, 'images')


def test_times_to_a_target_are_compared_only_if_all_runs_reach_it():
  found = compare_times(reaching([100, 200]), reaching([200, 300]))
  assert found.estimate.mean == pytest.approx((1 / 2 * 2 / 3) ** 0.5)
  assert found.paired
  assert compare_times(reaching([1, 2]), reaching([2, 3, None])) is None
  assert compare_times(reaching([None]), reaching([2, 3])) is None
  assert compare_times(reaching([1, 2]), []) is None


def test_a_ratio_is_geometric_and_the_same_from_both_sides():
  a, b = [100, 400, 300], [200, 200, 900]
  x, y = reaching(a), reaching(b)
  for first_seed in (0, 10):  # In common, and so paired, or not.
    y = [{**r, 'seed': r['seed'] + first_seed} for r in y]
    e, back = compare_times(x, y).estimate, compare_times(y, x).estimate
    assert e.mean == pytest.approx((12 / 36) ** (1 / 3))
    assert e.mean * back.mean == pytest.approx(1)
    assert (e.low * back.high, e.high * back.low) == pytest.approx((1, 1))
  logs = np.log(np.divide(a, b))
  expected = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
  e = compare_times(x, reaching(b)).estimate
  assert (e.low, e.high) == pytest.approx(tuple(np.exp(expected)), rel=1e-6)


def test_two_runs_are_called_neither_sooner_nor_later():
  found = compare_times(reaching([93, 96]), reaching([100, 102]))
  assert not statistics.is_difference(found.estimate, 1.0)
  assert found.p_value is None


def test_a_time_to_a_target_is_as_uncertain_as_the_accuracy_over_the_slope():
  """Where all seeds take the same part of the time, to the image."""
  a, b = reaching([90, 180, 270]), reaching([100, 200, 300])
  assert statistics.is_difference(compare_times(a, b).estimate, 1.0)
  few = [[{**r, 'num_images': 400} for r in arm] for arm in (a, b)]
  e = compare_times(*few).estimate
  assert not statistics.is_difference(e, 1.0)
  # At 20% of 400 images, two points; the curve rises from 10% at c to 40% at
  # 2 c, and so by 30 points / c * 4 c / 3 a logarithm where it is at 20%.
  error = math.sqrt(2 * 0.2 * 0.8 / 400) / 0.4
  half = math.log(e.high / e.low) / 2
  assert half == pytest.approx(1.96 * error, rel=0.02)


def test_runs_that_failed_or_diverged_have_no_score():
  runs = [
    run('a', 0, 0.3),
    run('a', 1, 0.1, status='diverged'),
    run('a', 2, None, status='failed'),
  ]
  assert statistics.final_scores(runs) == scores([0.3])
  assert list(statistics.costs_to_target(runs, 0.1, 'images')) == [0]


def test_the_final_accuracy_is_not_the_best_one():
  found = statistics.final_scores([run('a', 0, 0.3, best_top1=0.9)])
  assert found[0].top1 == 0.3


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
  e = estimate([0.15, 0.3])
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

import math

import comparison_fixture
import pytest

from jaxprog.comparison import power, statistics

# Cohen's d of one mean for a power of 80%, by statsmodels 0.15.0:
# TTestPower().solve_power(nobs=n, alpha=level, power=0.8).
STATSMODELS = {
  (3, 0.05): 3.264043552819638,
  (5, 0.05): 1.6819970833232674,
  (20, 0.05): 0.6604416544380312,
  (3, 0.05 / 3): 4.292154287604989,
  (10, 0.05 / 3): 1.2234701205496286,
}


@pytest.mark.parametrize(('n', 'level'), STATSMODELS)
def test_of_seeds_alone_it_equals_statsmodels(n, level):
  spread = power.Spread(0.01**2, 0.0, 0.0, 1000)
  found = power.detectable(spread, n, level) / 0.01
  assert found == pytest.approx(STATSMODELS[n, level], rel=1e-5)
  assert power.required(spread, 1.001 * found * 0.01, level) == n
  assert power.required(spread, 0.999 * found * 0.01, level) == n + 1


def test_below_three_pairs_nothing_is_shown():
  assert power.detectable(power.assume(2000), 2) == math.inf
  assert (
    power.required(power.Spread(1e-9, 0, 0, 10), 1.0) == statistics.MIN_RUNS
  )


def test_images_in_common_bound_what_any_number_of_seeds_shows():
  spread = power.Spread(1e-6, 0.2 / 2000, 0.1 / 2000, 2000)
  # The normal distribution's: 1.960 + 0.842.
  least = 2.8016 * math.sqrt(0.1 / 2000)
  assert power.detectable(spread, 10**6) == pytest.approx(least, rel=1e-3)
  assert power.required(spread, 0.99 * least) is None
  images = power.required_images(spread, 20, 0.01)
  assert power.detectable(spread.on(images), 20) <= 0.01
  assert power.detectable(spread.on(images - 1), 20) > 0.01
  assert power.required_images(spread._replace(seeds=1.0), 20, 0.01) is None


def test_a_pilot_is_measured_by_its_pairs():
  a, b = (0.5, 0.51, 0.53), (0.5, 0.52, 0.5)
  runs = comparison_fixture.create_cell('a', a)
  assert power.measure(runs, 'a') is None
  runs += comparison_fixture.create_cell('b', b)
  found = power.measure(runs, 'a')
  # 0, 0.01 and -0.03 around their mean.
  assert found.seeds == pytest.approx(0.00043333, rel=1e-4)
  few = [{**run, 'num_images': 400} for run in runs]
  least = sum(statistics.binomial_variance(sum(x) / 3, 400) for x in (a, b))
  assert power.measure(few, 'a').least == pytest.approx(least)

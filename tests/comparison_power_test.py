import json
import math

import comparison_fixture
import numpy as np
import pytest
from ml_collections import config_dict

from benchmarks import false_positives
from jaxprog import errors
from jaxprog.comparison import noise as noise_lib
from jaxprog.comparison import power, statistics, verdicts

# Cohen's d of one mean for a power of 80%, by statsmodels 0.15.0:
# TTestPower().solve_power(nobs=n, alpha=level, power=0.8).
STATSMODELS = {
  (3, 0.05): 3.264043552819638,
  (5, 0.05): 1.6819970833232674,
  (20, 0.05): 0.6604416544380312,
  (4, 0.05 / 3): 3.12420731722727,
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
  # Nor may accuracies differ by more than all images.
  assert power.detectable(power.assume(2000), 3, 1e-4) == math.inf
  assert (
    power.required(power.Spread(1e-9, 0, 0, 10), 1.0) == statistics.MIN_RUNS
  )


def test_images_in_common_bound_what_any_number_of_seeds_shows():
  spread = power.Spread(1e-6, 0.2 / 2000, 0.1 / 2000, 2000)
  # The normal distribution's: 1.960 + 0.842.
  least = 2.8016 * math.sqrt(0.1 / 2000)
  assert power.detectable(spread, 10**6) == pytest.approx(least, rel=1e-3)
  assert power.required(spread, 0.99 * least) is None
  assert power.required(spread.on(2500), 0.99 * least) is not None


def test_a_pilot_is_measured_by_its_pairs():
  a, b = (0.5, 0.51, 0.53), (0.5, 0.52, 0.5)
  runs = comparison_fixture.create_cell('a', a)
  assert power.measure(runs, 'a') is None
  runs += comparison_fixture.create_cell('b', b)
  found = power.measure(runs, 'a')
  # 0, 0.01 and -0.03 around their mean.
  assert found.seeds == pytest.approx(0.00043333, rel=1e-4)
  # Two degrees of freedom: chi-squared has 0.2107 and 4.605 at 10% and 90%.
  low, high = (x.seeds / found.seeds for x in found.bounds())
  assert (low, high) == pytest.approx((2 / 4.605, 2 / 0.2107), rel=1e-3)
  few = [{**run, 'num_images': 400} for run in runs]
  least = sum(noise_lib.binomial_variance(sum(x) / 3, 400) for x in (a, b))
  assert power.measure(few, 'a').least == pytest.approx(least)


def asked(**fields):
  plain = power.Asked(3, 3, 2, 2000, 0.05, 0.05, 0.0, 1e15)
  return plain._replace(**fields)


def test_what_is_said_before_the_first_run():
  found = power.foresee(asked(), None, 'of nothing')
  text = verdicts.power_sentence(found)
  assert text == (
    'With 3 seeds and 2,000 images differences of 12.1 points can be seen; '
    'for 5 points take 6 seeds. In 80% of all cases, 2 cells together; spread '
    'assumed: accuracies near 50%, seeds that move them by 1.7 points.'
  )
  assert found['detectable'] == pytest.approx(
    power.detectable(power.assume(2000), 3, 0.025)
  )
  found = power.foresee(asked(max_seeds=9, margin=0.01), None, '')
  text = verdicts.power_sentence(found)
  assert 'points can be seen, with 9 of ' in text
  assert f'; for 1 point take {found["seeds_for_goal"]} seeds. ' in text
  found = power.foresee(asked(seeds=2, max_seeds=2), None, '')
  assert 'images no difference can be shown; for' in verdicts.power_sentence(
    found
  )
  found = power.foresee(asked(seeds=1, max_seeds=1), None, '')
  assert verdicts.power_sentence(found).startswith('With 1 seed and 2,000 im')
  found = power.foresee(asked(margin=0.0001), None, '')
  assert (
    'for 0.01 points no number of seeds is enough'
    in verdicts.power_sentence(found)
  )


def create_pilot():
  """Returns runs of two cells, a thousand seconds and 1e14 FLOPs each."""
  end = {'stage': 'x', 'images': 1e5, 'flops': 1e14, 'seconds': 1000.0}
  runs = []
  for cell, finals in (('a', (0.5, 0.51, 0.53)), ('b', (0.5, 0.52, 0.5))):
    runs += comparison_fixture.create_cell(
      cell, finals, boundaries=[end], shared=[]
    )
  return {'runs': runs, 'reference': 'a'}


def test_a_pilot_says_how_long_it_takes():
  found = power.foresee(asked(margin=0.05), create_pilot(), 'of pilot')
  # Ten runs' FLOPs a seed.
  assert found['seconds_a_seed'] == pytest.approx(10_000)
  hours = found['seeds_for_goal'] * 10_000 / 3600
  assert f'take {found["seeds_for_goal"]} seeds ({hours:.1f} h).' in (
    verdicts.power_sentence(found)
  )


def test_a_pilot_is_a_comparison_that_can_be_read(tmp_path):
  config = config_dict.ConfigDict(
    {'pilot': str(tmp_path), 'seeds': 3, 'max_seeds': 0, 'margin': 0.0}
  )
  with pytest.raises(errors.UserError, match='no comparison that can be read'):
    power.begin(config, [], None)
  pilot = create_pilot()
  (tmp_path / 'comparison.json').write_text(json.dumps({**pilot, 'runs': []}))
  with pytest.raises(errors.UserError, match='two seeds in common'):
    power.begin(config, [], None)


@pytest.mark.parametrize('n', [3, 5])
def test_four_of_five_differences_that_can_be_seen_are_seen(n):
  """Images and seeds as in benchmarks/false_positives.py."""
  rng = np.random.default_rng(n)
  pilot = false_positives.draw(rng, 40, 5, 1000, 0.5)
  pairs = np.subtract(*np.moveaxis(pilot.astype(np.float32), 1, 0))
  noise = noise_lib.image_noise(pairs)
  own = 5 * noise.own.mean()
  total = pairs.mean(-1).var(-1, ddof=1).mean()
  spread = power.Spread(total - own, own, noise.shared.mean(), 1000)
  gain = power.detectable(spread, n)
  points_a_logit = 0.113
  found = false_positives.simulate(
    rng, 600, n, 1000, 0.5, gain=gain / points_a_logit, kinds=['by image']
  )
  assert found['difference'] == pytest.approx(gain, rel=0.1)
  assert found['by image'] == pytest.approx(0.8, abs=0.08)

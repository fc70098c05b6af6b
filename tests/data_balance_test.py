import numpy as np
import pytest
from sklearn.utils import class_weight

from jaxprog.data import balance

COUNTS = np.array([700, 0, 90, 11, 1, 350])


def test_weights_at_one_are_scikit_learns_balanced_ones():
  labels = np.repeat(np.arange(6), COUNTS)
  present = np.flatnonzero(COUNTS)
  expected = class_weight.compute_class_weight(
    'balanced', classes=present, y=labels
  )
  weights = balance.class_weights(COUNTS, 1.0, 0.0)
  np.testing.assert_allclose(weights[present], expected, rtol=1e-6)


@pytest.mark.parametrize('sampling', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('weighting', [0.0, 0.5, 1.0])
def test_weights_are_one_on_average_and_a_power_of_the_counts(
  weighting, sampling
):
  weights = balance.class_weights(COUNTS, weighting, sampling)
  draws = balance.count_draws(COUNTS, sampling)
  # Draws are whole numbers.
  mean = np.sum(weights * draws) / draws.sum()
  np.testing.assert_allclose(mean, 1, rtol=0.05 if sampling else 1e-6)
  np.testing.assert_allclose(weights[0] / weights[2], (700 / 90) ** -weighting)


def test_an_epoch_has_as_many_draws_as_images():
  assert balance.count_draws(COUNTS, 0.0).tolist() == COUNTS.tolist()
  draws = balance.count_draws(COUNTS, 1.0)
  assert draws.sum() == COUNTS.sum()
  assert draws[1] == 0
  assert set(draws[COUNTS > 0]) == {230, 231}
  half = balance.count_draws(COUNTS, 0.5)
  assert half.sum() == COUNTS.sum()
  np.testing.assert_allclose(half[0] / half[2], (700 / 90) ** 0.5, rtol=0.02)


def test_classes_without_images_are_not_unequal():
  assert balance.is_unequal(COUNTS)
  assert not balance.is_unequal(np.array([5, 0, 5]))

import numpy as np
import pytest
from sklearn import linear_model

from jaxprog.training import linear_probe


def create_images(rng, count, size, num_classes=4):
  """Returns features that tell the classes apart, but for noise."""
  labels = rng.integers(num_classes, size=count)
  centres = np.random.default_rng(7).normal(size=(num_classes, size))
  return centres[labels] + 2 * rng.normal(size=(count, size)), labels


@pytest.mark.parametrize('count', [20, 100], ids=['wide', 'tall'])
def test_the_closed_form_is_scikit_learns_and_numpys(count):
  rng, size, penalties = np.random.default_rng(0), 50, (0.25, 64.0)
  x, y = rng.normal(3, 2, (count, size)), rng.normal(1, 1, (count, 3))
  solved = list(linear_probe.solve(x, y, penalties))
  for penalty, (weights, bias) in zip(penalties, solved, strict=True):
    ridge = linear_model.Ridge(alpha=penalty, solver='svd').fit(x, y)
    np.testing.assert_allclose(weights, ridge.coef_.T, rtol=0, atol=1e-10)
    np.testing.assert_allclose(bias, ridge.intercept_, rtol=0, atol=1e-10)
    # As rows more: the penalty asks for weights of 0, but of the ones' column.
    rows = np.block(
      [
        [x, np.ones((count, 1))],
        [np.sqrt(penalty) * np.eye(size), np.zeros((size, 1))],
      ]
    )
    asked = np.concatenate([y, np.zeros((size, 3))])
    found, *_ = np.linalg.lstsq(rows, asked)
    np.testing.assert_allclose(weights, found[:-1], rtol=0, atol=1e-10)
    np.testing.assert_allclose(bias, found[-1], rtol=0, atol=1e-10)


def test_features_of_any_scale_count_alike_and_dead_ones_not_at_all():
  rng = np.random.default_rng(1)
  x, labels = create_images(rng, 60, 8)
  x = x.astype(np.float32)
  new = rng.normal(size=(40, 8)).astype(np.float32)
  (plain,) = linear_probe.fit(x, labels, 4, [1.0])
  dead = np.full((60, 1), 0.1, np.float32)
  scaled = np.concatenate([1000 * x + 7, dead], axis=1)
  (other,) = linear_probe.fit(scaled, labels, 4, [1.0])
  np.testing.assert_allclose(other.weights[:-1], plain.weights, atol=1e-4)
  assert not other.weights[-1].any()
  moved = np.concatenate([1000 * new + 7, 1e6 * np.ones((40, 1))], axis=1)
  np.testing.assert_array_equal(other.predict(moved), plain.predict(new))


def test_the_penalty_is_the_one_that_held_images_ask_for():
  rng = np.random.default_rng(2)
  x, labels = create_images(rng, 90, 200)
  held = np.arange(90) % 3 == 2
  probe = linear_probe.choose(x, labels, held, 4)

  def score(penalty):
    """By scikit-learn, on the images that are not held."""
    mean, std = x[~held].mean(0), x[~held].std(0)
    targets = 2.0 * np.eye(4)[labels] - 1
    ridge = linear_model.Ridge(alpha=penalty)
    ridge.fit((x[~held] - mean) / std, targets[~held])
    scores = ridge.predict((x[held] - mean) / std)
    return np.mean(scores.argmax(-1) == labels[held]), penalty

  scores = [score(x) for x in linear_probe.PENALTIES]
  assert len({right for right, _ in scores}) > 3
  assert probe.penalty == max(scores)[1]
  # It has then learned of all images.
  (whole,) = linear_probe.fit(x, labels, 4, [probe.penalty])
  np.testing.assert_array_equal(probe.weights, whole.weights)

import numpy as np
import pytest
from scipy import optimize, special

from jaxprog.monitoring import temperature


def create_logits(scale, count=500, num_classes=7, seed=0):
  """Returns logits that are `scale` times too sure, and their labels."""
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(count, num_classes))
  gumbel = rng.gumbel(size=logits.shape)
  labels = (logits + gumbel).argmax(axis=-1)
  return (scale * logits).astype(np.float32), labels


@pytest.mark.parametrize('scale', [0.3, 1.0, 4.0])
def test_the_temperature_is_that_of_the_least_loss(scale):
  logits, labels = create_logits(scale)

  def loss(log_temperature):
    scaled = special.log_softmax(
      logits.astype(np.float64) / np.exp(log_temperature), axis=-1
    )
    return -scaled[np.arange(len(labels)), labels].mean()

  found = optimize.minimize_scalar(
    loss, bounds=(-3, 3), method='bounded', options={'xatol': 1e-9}
  )
  value = temperature.fit(logits, labels)
  assert value == pytest.approx(np.exp(found.x), rel=1e-5)
  # The labels were drawn from the probabilities at that temperature.
  assert value == pytest.approx(scale, rel=0.15)


def test_images_that_ask_for_none_get_an_end_of_the_range():
  labels = np.arange(6) % 3
  right = 5 * np.eye(3, dtype=np.float32)[labels]
  assert temperature.fit(right, labels) == temperature.LEAST
  assert temperature.fit(-right, labels) == temperature.MOST


def test_reliability_is_that_of_the_scaled_logits():
  # Two images at confidence 0.9, one of them right; at this temperature both
  # are at 0.7.
  logits = np.log(np.array([[9, 1], [9, 1]], np.float32))
  labels = np.array([0, 1])
  before = temperature.measure(logits, labels, 1.0)
  assert before['ece'] == pytest.approx(0.4, abs=1e-6)
  assert before['nll'] == pytest.approx(-np.log(0.9 * 0.1) / 2, abs=1e-6)
  after = temperature.measure(logits, labels, np.log(9) / np.log(7 / 3))
  assert after['ece'] == pytest.approx(0.2, abs=1e-6)
  assert after['nll'] == pytest.approx(-np.log(0.7 * 0.3) / 2, abs=1e-6)
  assert after['calibration'][10] == pytest.approx((2, 0.7, 0.5), abs=1e-6)

"""A temperature that makes a network as sure of itself as it is right.

Logits divided by it rank the classes as before (Guo et al. 2017,
arXiv:1706.04599, section 4.2).
"""

from typing import Any

import numpy as np
from scipy import optimize, special

from jaxprog.monitoring import diagnostics

# Beyond them the images ask for no finite one: all are right, or nearly all
# wrong.
LEAST, MOST = 0.05, 20.0


def fit(logits: np.ndarray, labels: np.ndarray) -> float:
  """Returns the temperature of the least mean negative log-likelihood.

  Over the inverse of the temperature that is convex: its slope, the mean logit
  that the probabilities expect less the mean one of the labels, rises, and has
  one root at most.

  Args:
    logits: (n, classes).
    labels: (n,) in [0, classes).
  """
  logits = logits.astype(np.float64)
  own = np.take_along_axis(logits, labels[:, None], axis=-1).mean()

  def slope(inverse):
    probabilities = special.softmax(inverse * logits, axis=-1)
    return np.sum(probabilities * logits, axis=-1).mean() - own

  if slope(1 / MOST) >= 0:
    return MOST
  if slope(1 / LEAST) <= 0:
    return LEAST
  return 1 / optimize.brentq(slope, 1 / MOST, 1 / LEAST)


def measure(
  logits: np.ndarray, labels: np.ndarray, temperature: float
) -> dict[str, Any]:
  """Returns nll, ece and calibration of n images; see diagnostics.diagnose."""
  scaled = special.log_softmax(logits.astype(np.float64) / temperature, axis=-1)
  own = np.take_along_axis(scaled, labels[:, None], axis=-1)
  right = logits.argmax(axis=-1) == labels
  bins = diagnostics.calibration(np.exp(scaled.max(axis=-1)), right)
  return {
    'nll': -float(own.mean()),
    'ece': diagnostics.calibration_error(bins),
    'calibration': bins,
  }

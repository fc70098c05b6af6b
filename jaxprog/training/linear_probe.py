"""A linear classifier in closed form, on features that a network gives.

Penalised least squares on few images of a class, as vision transformers were
compared while they trained (Dosovitskiy et al. 2021, arXiv:2010.11929, section
4.1): what a linear map reads from features, at no choice but the penalty.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

PENALTIES = tuple(2.0**i for i in range(-10, 21))


class Probe(NamedTuple):
  """Scores of features x are (x - mean) / scale @ weights + bias."""

  penalty: float
  mean: np.ndarray
  scale: np.ndarray
  weights: np.ndarray
  bias: np.ndarray

  def predict(self, features: np.ndarray) -> np.ndarray:
    """Returns the classes, (n,), of features (n, d)."""
    x = (features - self.mean) / self.scale
    return np.argmax(x @ self.weights + self.bias, axis=-1)


def choose(
  features: np.ndarray,
  labels: np.ndarray,
  is_held: np.ndarray,
  num_classes: int,
) -> Probe:
  """Returns the probe of all n images, with the penalty that suits them.

  It is the one with which a probe of the others has most of the held images
  right, the largest one of several.

  Args:
    features: (n, d).
    labels: (n,) in [0, num_classes).
    is_held: (n,), some True and some False.
    num_classes: of the scores.
  """
  kept = ~is_held
  rights = [
    (np.mean(x.predict(features[is_held]) == labels[is_held]), x.penalty)
    for x in fit(features[kept], labels[kept], num_classes, PENALTIES)
  ]
  _, penalty = max(rights)
  return next(fit(features, labels, num_classes, [penalty]))


def fit(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  penalties: Sequence[float],
) -> Iterator[Probe]:
  """Yields a probe for each penalty, from one decomposition.

  Features are standardised; one that is the same in all images gets no weight.
  Targets are 1 for the label and -1 for the others.
  """
  x = features.astype(np.float64)
  mean, std = x.mean(axis=0), x.std(axis=0)
  # A mean of equal numbers need not be that number to the last bit.
  differs = std > 1e-7 * np.abs(x).max(axis=0)
  mean, scale = np.where(differs, mean, x[0]), np.where(differs, std, 1.0)
  y = 2.0 * np.eye(num_classes)[labels] - 1.0
  solved = solve((x - mean) / scale, y, penalties)
  for penalty, (weights, bias) in zip(penalties, solved, strict=True):
    yield Probe(penalty, mean, scale, weights, bias)


def solve(
  x: np.ndarray, y: np.ndarray, penalties: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the W and b of the least |x W + b - y|^2 + penalty |W|^2.

  The bias b, the weight of a column of ones, is not penalised: it comes of
  means. Of x x^T and x^T x the smaller one is decomposed, once for all
  `penalties`.

  Args:
    x: (n, d), f64.
    y: (n, k), f64.
    penalties: all above 0.
  """
  mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
  x, y = x - mean_x, y - mean_y
  if len(x) < x.shape[1]:
    values, vectors = np.linalg.eigh(x @ x.T)
    left, right = x.T @ vectors, vectors.T @ y
  else:
    values, vectors = np.linalg.eigh(x.T @ x)
    left, right = vectors, vectors.T @ (x.T @ y)
  for penalty in penalties:
    weights = left @ (right / (values + penalty)[:, None])
    yield weights, mean_y - mean_x @ weights

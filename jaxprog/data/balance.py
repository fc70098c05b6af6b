"""Classes with unequal numbers of images, and what makes up for them."""

import numpy as np


def is_unequal(counts: np.ndarray) -> bool:
  """Returns whether the classes that have images have not all as many."""
  return len(np.unique(counts[counts > 0])) > 1


def class_weights(
  counts: np.ndarray, weighting: float, sampling: float
) -> np.ndarray:
  """Returns what the loss of an image is multiplied with, float32, by class.

  The number of the class's images to the power of -`weighting`, times what
  makes the mean over the images seen 1: of 'balanced' weights, as scikit-learn
  has them, at 1. How often images are seen depends on `sampling`.
  """
  weights = np.zeros(len(counts))
  present = counts > 0
  weights[present] = counts[present] ** -float(weighting)
  weights /= np.sum(weights * _shares(counts, sampling))
  return weights.astype(np.float32)


def count_draws(counts: np.ndarray, sampling: float) -> np.ndarray:
  """Returns how many images of each class an epoch shows: as many as it has.

  At `sampling` 0 those that there are, at 1 equally many of each class.
  """
  total = counts.sum()
  exact = total * _shares(counts, sampling)
  draws = exact.astype(np.int64)
  largest_rests = np.argsort(draws - exact, kind='stable')
  draws[largest_rests[: total - draws.sum()]] += 1
  return draws


def _shares(counts: np.ndarray, sampling: float) -> np.ndarray:
  """Returns the part of an epoch that each class has."""
  shares = np.where(counts > 0, counts ** (1 - float(sampling)), 0)
  return shares / shares.sum()

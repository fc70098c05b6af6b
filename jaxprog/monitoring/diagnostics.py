"""What evaluated images say: accuracy by class, mix-ups, calibration."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxprog.data import preprocess

# Enough for all mix-ups of twenty classes, and the worst ones of a thousand.
_MAX_CONFUSIONS = 400
_MAX_WORST = 24
_THUMBNAIL_SIZE = 96
_CALIBRATION_BINS = 15


def join_outcomes(
  outcomes: Sequence[Mapping[str, Any]], count: int
) -> dict[str, np.ndarray]:
  """Returns the first `count` rows of batches of outcomes, as NumPy arrays."""
  return {
    name: np.concatenate([batch[name] for batch in outcomes])[:count]
    for name in outcomes[0]
  }


def diagnose(
  outcomes: Mapping[str, np.ndarray],
  labels: np.ndarray,
  num_classes: int,
) -> dict[str, Any]:
  """Returns what JSON can hold of n evaluated images.

  Keys: nll, the mean negative log-likelihood in nats; ece, the expected
  calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3, with
  _CALIBRATION_BINS equal bins); calibration, [count, mean confidence, accuracy]
  of each bin; per_class, [count, right] of each class; confusions, how often a
  label was taken for what was predicted: the _MAX_CONFUSIONS most frequent
  mix-ups, most frequent first, then the right ones of each class.

  Args:
    outcomes: loss, rank, predicted and confidence, (n,) each, as steps.
      create_eval_step returns them.
    labels: (n,) in [0, num_classes), of undecodable images too.
    num_classes: of the dataset.
  """
  right = outcomes['rank'] < 1
  bins = calibration(outcomes['confidence'], right)
  counts = np.bincount(labels, minlength=num_classes)
  rights = np.bincount(labels[right], minlength=num_classes)
  return {
    'nll': float(np.mean(outcomes['loss'], dtype=np.float64)),
    'ece': calibration_error(bins),
    'calibration': bins,
    'per_class': np.stack([counts, rights], axis=1).tolist(),
    'confusions': _confusions(outcomes, labels, num_classes),
  }


def balanced_top1(rank: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean of the top-1 of each class that there are images of.

  Args:
    rank: (n,), 0 where an image is right.
    labels: (n,), of undecodable images too.
  """
  counts, rights = np.bincount(labels), np.bincount(labels, rank < 1)
  present = counts > 0
  return float(np.mean(rights[present] / counts[present]))


def calibration(
  confidence: np.ndarray, right: np.ndarray
) -> list[tuple[int, float, float]]:
  """Returns count, mean confidence and accuracy of equal bins of (0, 1].

  Args:
    confidence: (n,) probabilities of the predicted classes.
    right: (n,) bool, whether they are the labels.
  """
  edges = np.linspace(0, 1, _CALIBRATION_BINS + 1)[1:-1]
  place = np.digitize(confidence, edges, right=True)

  counts, confidences, rights = (
    np.bincount(place, weights, minlength=_CALIBRATION_BINS)
    for weights in (None, confidence.astype(np.float64), right)
  )
  divisor = np.maximum(counts, 1)
  bins = counts, confidences / divisor, rights / divisor
  return list(zip(*(x.tolist() for x in bins), strict=True))


def calibration_error(bins: Sequence[tuple[int, float, float]]) -> float:
  """Returns how far confidence and accuracy are apart, over all images."""
  gaps = sum(count * abs(mean - accuracy) for count, mean, accuracy in bins)
  return gaps / max(sum(count for count, _, _ in bins), 1)


def _confusions(
  outcomes: Mapping[str, np.ndarray], labels: np.ndarray, num_classes: int
) -> list[dict[str, int]]:
  """Returns the most frequent mix-ups, then how often each class was right.

  An undecodable image ranks below all classes, and was taken for nothing.
  """
  predicted, rank = outcomes['predicted'], outcomes['rank']
  wrong = (rank < num_classes) & (predicted != labels)
  pairs = labels[wrong].astype(np.int64) * num_classes + predicted[wrong]
  values, counts = np.unique(pairs, return_counts=True)
  order = np.argsort(-counts, kind='stable')[:_MAX_CONFUSIONS]
  rights = np.bincount(labels[rank < 1], minlength=num_classes)
  found = [
    (*divmod(int(values[i]), num_classes), int(counts[i])) for i in order
  ]
  found += [(i, i, int(rights[i])) for i in map(int, np.flatnonzero(rights))]
  return [{'label': a, 'predicted': b, 'count': n} for a, b, n in found]


def worst_mistakes(
  outcomes: Mapping[str, np.ndarray],
  labels: np.ndarray,
  read: Callable[[int], tuple[str, bytes]],
) -> list[dict[str, Any]]:
  """Returns the wrong images of the highest losses, the worst one first.

  Each has index, name, label, predicted, confidence, loss and thumbnail, a
  JPEG in base64, '' where it cannot be decoded. `read` returns the name and
  the encoded image at an index.
  """
  wrong = np.flatnonzero(outcomes['rank'] >= 1)
  order = np.argsort(-outcomes['loss'][wrong], kind='stable')[:_MAX_WORST]
  mistakes = []
  for index in map(int, wrong[order]):
    name, encoded = read(index)
    mistakes.append(
      {
        'index': index,
        'name': name,
        'label': int(labels[index]),
        'predicted': int(outcomes['predicted'][index]),
        'confidence': float(outcomes['confidence'][index]),
        'loss': float(outcomes['loss'][index]),
        'thumbnail': create_thumbnail(encoded),
      }
    )
  return mistakes


def create_thumbnail(encoded: bytes) -> str:
  """Returns a small JPEG of an encoded image in base64, '' if it is damaged."""
  try:
    image = Image.fromarray(preprocess.decode(encoded))
  except preprocess.BadImageError:
    return ''
  image.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
  out = io.BytesIO()
  image.save(out, 'JPEG', quality=80)
  return base64.b64encode(out.getvalue()).decode()

import base64
import io

import numpy as np
import pytest
from PIL import Image

from jaxprog.reporting import diagnostics


def create_outcomes(predicted, labels, loss=None, confidence=None):
  predicted, labels = np.array(predicted), np.array(labels)
  n = len(labels)
  return {
    'predicted': predicted,
    'rank': np.where(predicted == labels, 0, 2),
    'loss': np.array(loss if loss is not None else [1.0] * n, np.float32),
    'confidence': np.array(
      confidence if confidence is not None else [0.5] * n, np.float32
    ),
  }


def create_jpeg(color, size=(200, 100)):
  out = io.BytesIO()
  Image.new('RGB', size, color).save(out, 'JPEG')
  return out.getvalue()


def test_batches_are_joined_without_the_padding():
  batches = [{'rank': np.array([0, 1])}, {'rank': np.array([2, 9])}]
  joined = diagnostics.join_outcomes(batches, 3)
  assert joined['rank'].tolist() == [0, 1, 2]


def test_classes_and_confusions_are_counted():
  labels = [0, 0, 0, 1, 1, 3]
  found = diagnostics.diagnose(
    create_outcomes([0, 1, 1, 1, 0, 3], labels), np.array(labels), 4
  )
  assert found['per_class'] == [[3, 1], [2, 1], [0, 0], [1, 1]]
  pairs = [
    (x['label'], x['predicted'], x['count']) for x in found['confusions']
  ]
  assert pairs[0] == (0, 1, 2)
  assert set(pairs) == {(0, 1, 2), (0, 0, 1), (1, 1, 1), (1, 0, 1), (3, 3, 1)}


def test_calibration_error_against_a_hand_count():
  # Bins of 1/15: 0.50 lies in (7/15, 8/15], 0.98 in (14/15, 1].
  labels = np.zeros(4, int)
  outcomes = create_outcomes(
    [0, 1, 0, 0], labels, confidence=[0.50, 0.52, 0.98, 1.0]
  )
  found = diagnostics.diagnose(outcomes, labels, 2)
  assert found['ece'] == pytest.approx(0.5 * 0.01 + 0.5 * 0.01, abs=1e-6)
  assert sum(count for count, _, _ in found['calibration']) == 4
  assert found['calibration'][14][0] == 2


def test_no_confidence_falls_out_of_the_bins():
  confidence = np.array([0.0, 1 / 15, 1.0, 1 / 3])
  bins = diagnostics.calibration(confidence, np.ones(4, bool))
  counts = [count for count, _, _ in bins]
  assert sum(counts) == 4
  assert counts[0] == 2  # 0, and 1/15, the bin's own upper edge.


def test_the_worst_mistakes_come_first_with_their_pictures():
  labels = np.array([0, 0, 1, 1])
  outcomes = create_outcomes([0, 1, 0, 0], labels, loss=[9.0, 2.0, 5.0, 3.0])
  images = {1: create_jpeg('red'), 2: b'no image', 3: create_jpeg('blue')}
  found = diagnostics.worst_mistakes(
    outcomes, labels, lambda i: (f'n0/{i}.jpg', images[i])
  )
  assert [x['index'] for x in found] == [2, 3, 1]
  assert found[0]['thumbnail'] == ''
  thumbnail = Image.open(io.BytesIO(base64.b64decode(found[2]['thumbnail'])))
  assert thumbnail.size == (96, 48)
  assert np.asarray(thumbnail)[5, 5, 0] > 200

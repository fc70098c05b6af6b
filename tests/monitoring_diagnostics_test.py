import base64
import io
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from jaxprog.monitoring import diagnostics, pictures


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
  pairs = pairs_of(found)
  assert pairs[0] == (0, 1, 2)
  assert set(pairs) == {(0, 1, 2), (0, 0, 1), (1, 1, 1), (1, 0, 1), (3, 3, 1)}


def test_balanced_top1_is_scikit_learns_balanced_accuracy():
  rng = np.random.default_rng(0)
  labels = rng.choice(5, 200, p=(0.6, 0.0, 0.3, 0.09, 0.01))
  predicted = rng.integers(0, 5, 200)
  predicted[labels == 0] = 0
  rank = create_outcomes(predicted, labels)['rank']
  found = diagnostics.balanced_top1(rank, labels)
  with warnings.catch_warnings(action='ignore'):  # Of a class without images.
    expected = metrics.balanced_accuracy_score(labels, predicted)
  assert found == pytest.approx(expected)
  assert found < np.mean(rank < 1) - 0.2


def pairs_of(found):
  return [(x['label'], x['predicted'], x['count']) for x in found['confusions']]


def test_of_a_thousand_classes_mix_ups_are_kept_beside_the_right_ones():
  # Each class is right three times; 500 are once taken for the next one, and
  # class 700 twice.
  labels = np.concatenate([np.repeat(np.arange(1000), 3), np.arange(500)])
  labels = np.concatenate([labels, [700, 700]])
  predicted = np.concatenate(
    [np.repeat(np.arange(1000), 3), np.arange(1, 501), [3, 3]]
  )
  found = diagnostics.diagnose(create_outcomes(predicted, labels), labels, 1000)
  pairs = pairs_of(found)
  assert pairs[0] == (700, 3, 2)
  assert pairs[1:400] == [(i, i + 1, 1) for i in range(399)]
  assert pairs[400:] == [(i, i, 3) for i in range(1000)]
  # TensorBoard's matrix shows class 700 and the first ones, with mistakes.
  found |= {'classes': [str(i) for i in range(1000)], 'worst': []}
  picture = pictures.draw_confusion(found)
  side = pictures.MAX_CLASSES * pictures.CELL
  matrix = picture[-pictures.GAP - side : -pictures.GAP, -pictures.GAP - side :]
  red = (matrix[..., 0] > matrix[..., 2]).any(axis=-1)
  assert red.sum() > pictures.CELL


def test_an_undecodable_image_was_taken_for_nothing():
  labels = np.array([0, 1, 1])
  outcomes = create_outcomes([0, 0, 0], labels)
  outcomes['rank'] = np.array([0, 2**30, 1])
  found = diagnostics.diagnose(outcomes, labels, 2)
  assert found['per_class'] == [[1, 1], [2, 0]]
  assert pairs_of(found) == [(1, 0, 1), (0, 0, 1)]


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


def test_a_thumbnail_starts_no_other_program(tmp_path, monkeypatch):
  postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n'
  assert Image.open(io.BytesIO(postscript)).format == 'EPS'
  program = tmp_path / 'gs'
  program.write_text(f'#!/bin/sh\n: > {tmp_path}/started\n')
  program.chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path))
  assert diagnostics.create_thumbnail(postscript) == ''
  assert not (tmp_path / 'started').exists()

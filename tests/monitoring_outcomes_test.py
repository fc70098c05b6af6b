import types

import numpy as np
import pytest

from jaxprog.monitoring import outcomes


def sort(names, labels):
  split = types.SimpleNamespace(
    names=lambda: names, labels=labels, classes=('ant', 'bee')
  )
  return outcomes.sort_images(split)


def test_images_are_known_by_class_and_name_however_they_are_stored(tmp_path):
  """Each class numbers its own."""
  first = sort(['0', '1', '0'], [1, 0, 0])
  other = sort(['0', '0', '1'], [0, 1, 0])
  assert first.images == other.images
  changed = sort(['0', '1', '0'], [1, 0, 1])
  assert changed.images != first.images
  outcomes.write(tmp_path / 'a', first, np.array([True, False, False]), 1)
  outcomes.write(tmp_path / 'b', other, np.array([False, True, False]), 1)
  a, b = (outcomes.read(tmp_path / x, 1) for x in 'ab')
  assert a.images == b.images
  np.testing.assert_array_equal(a.right, b.right)
  np.testing.assert_array_equal(a.right, [False, False, True])


@pytest.mark.parametrize('count', [1, 8, 13])
def test_json_holds_what_came_of_each_image(tmp_path, count):
  right = np.random.default_rng(0).random(count) < 0.5
  names = [f'{i:03}.jpg' for i in range(count)]
  order = sort(names, [0] * count)
  outcomes.write(tmp_path / 'x.npz', order, right, 2.5)
  found = outcomes.read(tmp_path / 'x.npz', 2.5)
  again = outcomes.from_json(outcomes.to_json(found))
  assert again.images == found.images == order.images
  np.testing.assert_array_equal(again.right, right)
  assert outcomes.from_json(outcomes.to_json(None)) is None


def test_what_is_missing_damaged_or_of_another_epoch_is_not_known(tmp_path):
  path = tmp_path / 'x.npz'
  assert outcomes.read(path, 1) is None
  order = sort(['a'], [0])
  outcomes.write(path, order, np.array([True]), 1)
  assert outcomes.read(path, 2) is None
  whole = path.read_bytes()
  for damaged in (b'', b'PK', whole[: len(whole) // 2]):
    path.write_bytes(damaged)
    assert outcomes.read(path, 1) is None

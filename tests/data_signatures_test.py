import dataclasses
import io
import os

import numpy as np
import pytest
from data_fixtures import encode, photo, write_class_folders, write_image
from PIL import Image

from jaxprog import files
from jaxprog.data import preparation, signatures


@pytest.fixture
def records(tmp_path):
  write_class_folders(tmp_path / 'imagenette2')
  dataset = preparation.load_dataset('imagenette', tmp_path)
  return dataset.train


def count_calls(monkeypatch):
  calls = []
  sign = signatures.sign

  def counted(*arguments):
    calls.append(arguments)
    return sign(*arguments)

  monkeypatch.setattr(signatures, 'sign', counted)
  return calls


def difference(a, b):
  a, b = a['thumbnails'].astype(float), b['thumbnails'].astype(float)
  return np.abs(a - b).mean((1, 2, 3))


def test_the_digest_is_the_beginning_of_sha256():
  signature = signatures.sign(b'abc')
  assert signature['digest'].tobytes().hex() == (
    'ba7816bf8f01cfea414140de5dae2223'
  )
  assert not signature['readable']


def test_thumbnails_are_area_means_of_the_whole_and_of_the_middle():
  # Two squares side by side, dark and light.
  pixels = np.zeros((64, 128, 3), np.uint8)
  pixels[:, 64:] = (200, 100, 50)
  whole, square = signatures.sign(encode(pixels))['thumbnails']
  assert whole[:, :7].max() == 0
  np.testing.assert_array_equal(whole[5, -7:], [[200, 100, 50]] * 7)
  np.testing.assert_array_equal(whole, square)
  # The middle square does not see what lies left and right of it.
  pixels[:, :32] = 255
  whole, square = signatures.sign(encode(pixels))['thumbnails']
  assert whole[:, :3].min() == 255
  assert square[:, :6].max() == 0
  # Upright: what lies above and below.
  _, square = signatures.sign(encode(pixels.swapaxes(0, 1)))['thumbnails']
  assert square[:6].max() == 0


@pytest.mark.parametrize('size', [(500, 375), (375, 500), (1100, 900)])
def test_a_jpeg_is_decoded_small_and_looks_the_same(size):
  pixels = photo(*size, seed=3)
  small = signatures.sign(encode(pixels, 'JPEG', quality=90))
  full = signatures.sign(encode(pixels))
  assert difference(small, full).max() < 1.5
  # As opposed to another photograph.
  other = signatures.sign(encode(photo(*size, seed=4)))
  assert difference(small, other).min() > 20


@pytest.mark.parametrize('resample', ['BILINEAR', 'BICUBIC', 'BOX', 'LANCZOS'])
def test_copies_look_the_same(resample):
  original = Image.fromarray(photo(300, 200, seed=5))
  small = original.resize((64, 64), Image.Resampling[resample])
  copy = signatures.sign(encode(np.asarray(small), 'JPEG', quality=75))
  whole = difference(copy, signatures.sign(encode(np.asarray(original))))[0]
  assert whole < 3


def test_grey_looks_as_grey_in_three_channels():
  grey = np.asarray(Image.fromarray(photo(80, 64)).convert('L'))
  a = signatures.sign(encode(grey))
  b = signatures.sign(encode(np.stack([grey] * 3, axis=-1)))
  np.testing.assert_array_equal(a['thumbnails'], b['thumbnails'])
  assert a['comparable']
  assert b['comparable']


def test_small_images_are_known_by_their_bytes_alone():
  assert signatures.sign(encode(photo(32, 32)))['comparable']
  small = signatures.sign(encode(photo(40, 31)))
  assert small['readable']
  assert not small['comparable']


def test_a_damaged_image_is_no_end(tmp_path):
  root = write_class_folders(tmp_path / 'imagenette2')
  file = root / 'train' / 'n02' / 'n02_train_1.JPEG'
  write_image(file, 7, size=64)
  file.write_bytes(file.read_bytes()[:400])
  records = preparation.load_dataset('imagenette', tmp_path).train
  table = signatures.read_signatures(records)
  (bad,) = np.flatnonzero(~table['readable'])
  assert records.names()[bad] == file.name
  assert not table['comparable'][bad]
  assert not table['thumbnails'][bad].any()


def test_signatures_are_in_order_whatever_the_threads(records, monkeypatch):
  monkeypatch.setattr(os, 'cpu_count', lambda: 3)
  seen = []
  table = signatures.read_signatures(
    records, progress=lambda *x: seen.append(x)
  )
  expected = [signatures.sign(records.original(i)) for i in range(len(records))]
  np.testing.assert_array_equal(table, np.array(expected))
  assert seen[-1] == (15, 15)


def test_signatures_are_kept_for_the_whole_split(records, monkeypatch):
  calls = count_calls(monkeypatch)
  some = dataclasses.replace(
    records, positions=records.positions[3:5], labels=records.labels[3:5]
  )
  first = signatures.read_signatures(some)
  assert (len(first), len(calls)) == (15, 15)
  np.testing.assert_array_equal(signatures.read_signatures(records), first)
  assert len(calls) == 15


@pytest.mark.parametrize('content', [b'', b'not numpy', 'short', 'other'])
def test_a_file_that_does_not_fit_is_replaced(records, monkeypatch, content):
  expected = np.array(signatures.read_signatures(records))
  (file,) = records.directory.glob('signatures-train-*.npy')
  match content:
    case 'short':
      np.save(file, expected[:-1])
    case 'other':
      np.save(file, np.zeros(15, np.int32))
    case _:
      file.write_bytes(content)
  calls = count_calls(monkeypatch)
  np.testing.assert_array_equal(signatures.read_signatures(records), expected)
  assert len(calls) == 15
  signatures.read_signatures(records)
  assert len(calls) == 15


def test_no_pickle_is_loaded(records):
  signatures.read_signatures(records)
  (file,) = records.directory.glob('signatures-train-*.npy')
  buffer = io.BytesIO()
  np.save(buffer, np.array([print], object), allow_pickle=True)
  file.write_bytes(buffer.getvalue())
  assert signatures.read_signatures(records).dtype == signatures.SIGNATURE


def test_a_changed_dataset_has_new_signatures(tmp_path):
  root = write_class_folders(tmp_path / 'imagenette2')
  first = preparation.load_dataset('imagenette', tmp_path).train
  before = np.array(signatures.read_signatures(first))
  (old,) = first.directory.glob('signatures-train-*.npy')
  kept = old.read_bytes()
  # As many images as before, in a dataset prepared anew.
  write_image(root / 'train' / 'n02' / 'n02_train_1.JPEG', 77, size=50)
  preparation.prepare('imagenette', tmp_path)
  records = preparation.load_dataset('imagenette', tmp_path).train
  old.write_bytes(kept)
  after = signatures.read_signatures(records)
  assert (before['digest'] != after['digest']).any(axis=1).sum() == 1
  assert len(list(records.directory.glob('signatures-train-*.npy'))) == 1


def test_what_a_kill_leaves_is_not_computed_again(records, monkeypatch):
  expected = np.array(signatures.read_signatures(records))
  (file,) = records.directory.glob('signatures-train-*.npy')
  file.unlink()
  monkeypatch.setattr(signatures, '_PART', 4)
  monkeypatch.setattr(os, 'cpu_count', lambda: 1)

  def stop(done, total):
    if done == 8:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    signatures.read_signatures(records, progress=stop)
  assert not file.exists()
  kept = {int(x.stem): x for x in records.directory.glob('incomplete.*/*.npz')}
  assert len(kept) >= 2
  kept.pop(0).write_bytes(b'PK')  # Not whole.
  calls = count_calls(monkeypatch)
  np.testing.assert_array_equal(signatures.read_signatures(records), expected)
  assert len(calls) == 15 - sum(min(4, 15 - start) for start in kept)
  assert not list(records.directory.glob('incomplete.*'))


def test_prepared_data_may_be_read_only(records, monkeypatch):
  def refuse(path, *args):
    raise PermissionError(path)

  monkeypatch.setattr(files, 'write_bytes', refuse)
  monkeypatch.setattr(np.lib.format, 'open_memmap', refuse)
  assert len(signatures.read_signatures(records)) == 15
  assert 'signatures' not in ''.join(os.listdir(records.directory))

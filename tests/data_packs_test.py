import io
import json
import pathlib
import pickle

import numpy as np
import pytest
from data_fixtures import encode, photo, write_class_folders
from PIL import Image

from jaxprog import errors, stages
from jaxprog.data import packs, preparation, preprocess
from jaxprog.data.records import Dataset


def split(tmp_path) -> Dataset:
  raw = write_class_folders(tmp_path / 'imagenette2', train=4)
  folder = raw / 'train' / 'n02'
  (folder / 'big.JPEG').write_bytes(encode(photo(90, 60, 5), 'JPEG'))
  (folder / 'grey.png').write_bytes(encode(photo(90, 60, 6)[..., 0]))
  (folder / 'bad.JPEG').write_bytes(b'<html>')
  return preparation.load_dataset('imagenette', tmp_path)


def store(dataset, text, **options):
  stored = stages.Stage(storage=text).stored
  return preparation.store(dataset, stored, **options)


def test_raw_images_are_the_decoded_ones(tmp_path):
  dataset = split(tmp_path)
  before, after = dataset.train, store(dataset, 'raw').train
  names = before.names()
  for i, name in enumerate(names):
    if name == 'bad.JPEG':
      with pytest.raises(preprocess.BadImageError):
        preprocess.decode(after.image(i))
      continue
    pixels = preprocess.decode(before.image(i))
    assert after.image(i)[:2] == (pixels.shape[1], pixels.shape[0])
    np.testing.assert_array_equal(preprocess.decode(after.image(i)), pixels)
    np.testing.assert_array_equal(after.image(i).read_rows(3, 7), pixels[3:7])


def test_raw_images_are_made_small(tmp_path):
  dataset = split(tmp_path)
  records = store(dataset, 'raw:30').train
  names = records.names()
  sizes = {names[i]: records.image(i)[:2] for i in range(len(names) - 1)}
  i = names.index('big.JPEG')
  assert sizes['big.JPEG'] == (45, 30)
  # Images that are small already stay as they are.
  assert sizes['n02_train_0.JPEG'] == (20, 20)
  original = Image.open(io.BytesIO(dataset.train.image(i)))
  expected = original.resize((45, 30), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(
    preprocess.decode(records.image(i)), np.asarray(expected)
  )


def test_encoded_images_are_small_jpegs(tmp_path):
  dataset = split(tmp_path)
  records = store(dataset, 'jpeg:30').train
  names = records.names()
  image = Image.open(io.BytesIO(records.image(names.index('grey.png'))))
  assert (image.format, image.mode, image.size) == ('JPEG', 'RGB', (45, 30))
  # A small JPEG would only lose by being encoded again.
  i = names.index('n02_train_0.JPEG')
  assert records.image(i) == dataset.train.image(i)
  # Quality 95 takes more bytes than 90.
  i = names.index('big.JPEG')
  better = store(dataset, 'jpeg:30:95').train
  assert len(better.image(i)) > len(records.image(i))


def test_the_version_says_how_images_are_stored(tmp_path):
  dataset = split(tmp_path)
  assert dataset.version == '1.0.0'
  assert store(dataset, 'raw:30').version == '1.0.0+raw.30'
  assert store(dataset, 'jpeg:30').version == '1.0.0+jpeg.30.90'


def test_a_pack_is_written_once_and_pickles(tmp_path):
  dataset = split(tmp_path)
  seen = []
  first = store(dataset, 'raw', progress=lambda *x: seen.append(x))
  count = len(dataset.train)
  assert seen == [(i + 1, count) for i in range(count)]
  again = store(dataset, 'raw', progress=lambda *x: seen.append(x))
  assert len(seen) == count
  copy = pickle.loads(pickle.dumps(again))
  for records in (again.train, copy.train):
    for i in (0, 3):
      np.testing.assert_array_equal(
        preprocess.decode(records.image(i)),
        preprocess.decode(first.train.image(i)),
      )


def test_a_choice_of_classes_reads_its_own_images(tmp_path):
  split(tmp_path)
  dataset = preparation.load_dataset('imagenette', tmp_path, classes=('n03',))
  records = store(dataset, 'raw').train
  assert len(records) == 4
  for i in range(4):
    np.testing.assert_array_equal(
      preprocess.decode(records.image(i)),
      preprocess.decode(records.original(i)),
    )


def test_evaluation_reads_the_originals(tmp_path):
  dataset = split(tmp_path)
  stored = store(dataset, 'raw:10')
  assert stored.eval is dataset.eval


def test_an_interrupted_pack_is_written_again(tmp_path):
  dataset = split(tmp_path)

  def fail(done, total):
    if done == 5:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    store(dataset, 'raw', progress=fail)
  records = store(dataset, 'raw').train
  assert records.image(0)[:2] == (20, 20)
  folder = dataset.train.directory.parent / 'packed'
  assert [x.name for x in folder.glob('*raw*')] == ['1.0.0+raw']


def test_too_large_a_pack_is_refused(tmp_path, monkeypatch):
  dataset = split(tmp_path)
  monkeypatch.setattr(
    packs.shutil,
    'disk_usage',
    lambda _: packs.shutil._ntuple_diskusage(1, 1, 9),
  )
  with pytest.raises(errors.UserError, match="such as 'raw:256'"):
    store(dataset, 'raw')


def test_a_pack_of_a_version_that_decoded_otherwise_is_not_used(tmp_path):
  dataset = split(tmp_path)
  store(dataset, 'raw')
  (path,) = tmp_path.rglob('pack.json')
  info = json.loads(path.read_text())
  del info['decoding']
  path.write_text(json.dumps(info))
  (path.parent / 'images.bin').write_bytes(b'')
  records = store(dataset, 'raw').train
  assert 'decoding' in json.loads(path.read_text())
  assert (path.parent / 'images.bin').stat().st_size > 0
  assert records.image(0)[:2] != (0, 0)


def test_a_pack_of_other_data_is_not_used(tmp_path):
  dataset = split(tmp_path)
  store(dataset, 'raw')
  (tmp_path / 'imagenette2/train/n01/new.JPEG').write_bytes(
    encode(photo(50, 40, 9), 'JPEG')
  )
  preparation.prepare('imagenette', tmp_path)
  dataset = preparation.load_dataset('imagenette', tmp_path)
  records = store(dataset, 'raw').train
  i = records.names().index('new.JPEG')
  assert records.image(i)[:2] == (50, 40)
  # The same number of images, one of them edited.
  path = pathlib.Path(tmp_path / 'imagenette2/train/n01/new.JPEG')
  path.write_bytes(encode(photo(30, 40, 9), 'JPEG'))
  preparation.prepare('imagenette', tmp_path)
  dataset = preparation.load_dataset('imagenette', tmp_path)
  records = store(dataset, 'raw').train
  assert records.image(records.names().index('new.JPEG'))[:2] == (30, 40)


def test_a_flipped_bit_in_a_pack_is_noticed(tmp_path):
  dataset = split(tmp_path)
  store(dataset, 'raw')
  (path,) = preparation.list_packs(dataset.train.directory)
  assert packs.is_intact(path)
  content = bytearray((path / 'images.bin').read_bytes())
  content[1000] ^= 1
  (path / 'images.bin').write_bytes(content)
  assert not packs.is_intact(path)
  (path / 'pack.json').unlink()
  assert not packs.is_intact(path)

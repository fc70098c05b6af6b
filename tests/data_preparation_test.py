import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_fixtures import (
  photo,
  read_all,
  real_data,
  write_class_folders,
  write_image,
  write_tiny_imagenet,
)

from jaxprog import errors
from jaxprog.data import preparation


@pytest.fixture
def raw(tmp_path):
  return write_class_folders(tmp_path / 'imagenette2')


@pytest.mark.parametrize(
  ('name', 'folder'),
  [
    ('imagenette', 'imagenette2-160'),
    ('imagenet_mini', 'imagenet-mini'),
    ('imagenet2012', 'imagenet1k'),
  ],
)
def test_every_local_folder_has_its_name(tmp_path, name, folder):
  write_class_folders(tmp_path / folder)
  dataset = preparation.load_dataset(name, tmp_path)
  assert (len(dataset.train), len(dataset.eval)) == (15, 6)


def test_tiny_imagenet(tmp_path):
  write_tiny_imagenet(tmp_path / 'tiny-imagenet-200')
  dataset = preparation.load_dataset('tiny_imagenet', tmp_path)
  assert dataset.class_names == ('goldfish', 'n02', 'bee')
  assert (len(dataset.train), len(dataset.eval)) == (12, 6)
  for record in read_all(dataset.eval):
    number = int(record['file_name'].removesuffix('.JPEG').split('_')[1])
    assert record['label'] == 2 - number % 3


def test_any_folder(tmp_path, monkeypatch):
  write_class_folders(tmp_path / 'pets', wnids=('cat', 'dog'))
  dataset = preparation.load_dataset(
    f'folder:{tmp_path}/pets', tmp_path / 'data'
  )
  assert dataset.classes == ('cat', 'dog')
  # Relative to where the command runs; the same prepared copy.
  monkeypatch.chdir(tmp_path)
  assert preparation.check_dataset('folder:pets', 'data') == 'prepared'
  # Another folder of that name has its own.
  write_class_folders(tmp_path / 'more/pets', wnids=('cat', 'dog', 'fish'))
  assert preparation.load_dataset('folder:more/pets', 'data').num_classes == 3
  assert preparation.load_dataset('folder:pets', 'data').num_classes == 2


def test_prepared_data_may_be_used_without_the_raw_folder(raw):
  before = preparation.load_dataset('imagenette', raw.parent)
  raw.rename(raw.parent / 'gone')
  after = preparation.load_dataset('imagenette', raw.parent)
  assert after.fingerprint == before.fingerprint
  assert after.class_names == before.class_names


def test_a_touched_but_equal_folder_is_current(raw):
  preparation.prepare('imagenette', raw.parent)
  os.utime(raw / 'train' / 'n01')
  assert preparation.check_dataset('imagenette', raw.parent) == 'prepared'


@pytest.mark.parametrize('change', ['add', 'remove', 'rename', 'new class'])
def test_a_changed_folder_is_said_and_prepared_again_when_asked(raw, change):
  preparation.prepare('imagenette', raw.parent)
  image = raw / 'train' / 'n02' / 'n02_train_1.JPEG'
  match change:
    case 'add':
      write_image(image.with_name('new.JPEG'), 7)
    case 'remove':
      image.unlink()
    case 'rename':
      image.rename(image.with_name('new.JPEG'))
    case 'new class':
      for split in ('train', 'val'):
        write_image(raw / split / 'n015' / 'x.JPEG', 7)
  for _ in range(2):
    with pytest.raises(errors.UserError, match='--mode=prepare'):
      preparation.load_dataset('imagenette', raw.parent)
  preparation.prepare('imagenette', raw.parent)
  dataset = preparation.load_dataset('imagenette', raw.parent)
  names = sorted(r['file_name'] for r in read_all(dataset.train))
  assert names == sorted(x.name for x in (raw / 'train').glob('*/*'))
  assert dataset.num_classes == (4 if change == 'new class' else 3)
  for record in read_all(dataset.train):
    assert dataset.classes[record['label']] == record['wnid']


def test_an_edited_file_is_found_by_prepare(raw):
  before = preparation.load_dataset('imagenette', raw.parent)
  image = raw / 'train' / 'n02' / 'n02_train_1.JPEG'
  with open(image, 'ab') as file:
    file.write(b'  ')
  preparation.prepare('imagenette', raw.parent)
  after = preparation.load_dataset('imagenette', raw.parent)
  assert after.fingerprint != before.fingerprint
  assert image.read_bytes() in [r['image'] for r in read_all(after.train)]


def overwrite(image, data=None):
  """Writes to a file in place, as many bytes as it has."""
  old = image.read_bytes()
  new = old[:-3] + bytes([old[-3] ^ 1]) + old[-2:] if data is None else data
  image.write_bytes(new)
  # A clock may not have ticked since the file was made.
  os.utime(image, ns=(1, image.stat().st_mtime_ns + 10**6))


def test_a_file_overwritten_in_place_is_noticed(raw):
  before = preparation.load_dataset('imagenette', raw.parent)
  image = raw / 'train' / 'n02' / 'n02_train_1.JPEG'
  overwrite(image)
  for _ in range(2):
    with pytest.raises(errors.UserError, match='written to') as caught:
      preparation.check_dataset('imagenette', raw.parent)
    assert caught.value.where == f'{raw}, in train/n02'
    assert '--mode=prepare' in caught.value.suggestion
  preparation.prepare('imagenette', raw.parent)
  after = preparation.load_dataset('imagenette', raw.parent)
  # What has begun with the old images does not go on with the new.
  assert after.fingerprint != before.fingerprint
  assert image.read_bytes() in [r['image'] for r in read_all(after.train)]


def test_a_file_written_anew_but_equal_is_prepared_no_second_time(raw):
  before = preparation.load_dataset('imagenette', raw.parent)
  image = raw / 'val' / 'n03' / 'n03_val_1.JPEG'
  overwrite(image, image.read_bytes())
  with pytest.raises(errors.UserError, match='written to'):
    preparation.load_dataset('imagenette', raw.parent)
  seen = []
  preparation.prepare(
    'imagenette', raw.parent, progress=lambda *x: seen.append(x)
  )
  assert seen == []
  after = preparation.load_dataset('imagenette', raw.parent)
  assert after.fingerprint == before.fingerprint


def test_what_an_older_version_prepared_is_current(raw):
  before = preparation.load_dataset('imagenette', raw.parent)
  (looks,) = (raw.parent / 'prepared').rglob('raw_folder.json')
  looks.unlink()
  metadata = looks.with_name('metadata.json')
  known = json.loads(metadata.read_text())
  del known['contents'], known['left_out']
  metadata.write_text(json.dumps(known))
  after = preparation.load_dataset('imagenette', raw.parent)
  assert after.fingerprint != before.fingerprint
  assert preparation.load_dataset('imagenette', raw.parent).left_out == ''
  overwrite(raw / 'train' / 'n02' / 'n02_train_1.JPEG')
  with pytest.raises(errors.UserError, match='written to'):
    preparation.check_dataset('imagenette', raw.parent)


def test_a_start_looks_at_folders_only_for_a_while(raw):
  preparation.prepare('imagenette', raw.parent)
  image = raw / 'train' / 'n02' / 'n02_train_1.JPEG'
  overwrite(image)
  found = 0
  for _ in range(60):  # One folder of six each time: (5/6)^60 = 2e-5.
    try:
      preparation.check_dataset('imagenette', raw.parent, seconds=0)
    except errors.UserError:
      found += 1
  assert 0 < found < 60


@pytest.mark.parametrize(
  ('file', 'old', 'new'),
  [
    ('val/val_annotations.txt', 'val_0.JPEG\tn03', 'val_0.JPEG\tn01'),
    ('words.txt', 'goldfish', 'goldfrog'),
  ],
)
def test_a_changed_list_is_noticed(tmp_path, file, old, new):
  root = write_tiny_imagenet(tmp_path / 'tiny-imagenet-200')
  preparation.prepare('tiny_imagenet', tmp_path)
  seen = os.stat(root / file)
  text = (root / file).read_text()
  assert old in text
  (root / file).write_text(text.replace(old, new))
  os.utime(root / file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
  with pytest.raises(errors.UserError, match='has changed since'):
    preparation.check_dataset('tiny_imagenet', tmp_path)
  preparation.prepare('tiny_imagenet', tmp_path)
  dataset = preparation.load_dataset('tiny_imagenet', tmp_path)
  labels = {r['file_name']: r['wnid'] for r in read_all(dataset.eval)}
  assert labels['val_0.JPEG'] == ('n01' if 'val' in file else 'n03')
  assert (dataset.class_names[0] == 'goldfrog') == (file == 'words.txt')


def test_a_file_that_vanishes_while_it_is_prepared_is_named(raw):
  image = raw / 'val' / 'n03' / 'n03_val_1.JPEG'

  def remove(done, total):
    image.unlink(missing_ok=True)

  with pytest.raises(errors.UserError, match='cannot be read') as caught:
    preparation.prepare('imagenette', raw.parent, progress=remove)
  assert caught.value.where == str(image)
  assert not list((raw.parent / 'prepared').rglob('*.json'))


def test_a_path_that_is_not_utf8_is_named(tmp_path):
  folder = write_class_folders(tmp_path / 'caf\udce9')
  with pytest.raises(errors.UserError, match=r'caf\\xe9'):
    preparation.prepare(f'folder:{folder}', tmp_path)


def test_names_of_files_may_hold_line_breaks(raw):
  names = {'a\rb.JPEG', 'c\nd.JPEG', 'e\r\nf.JPEG'}
  for i, name in enumerate(names):
    write_image(raw / 'train' / 'n01' / name, 200 + i)
  records = preparation.load_dataset('imagenette', raw.parent).train
  first = records.names()
  assert names < set(first)
  (file,) = (raw.parent / 'prepared').rglob('names-train.txt')
  written = file.stat()
  assert (
    records.names() == first == [records[i]['file_name'] for i in range(18)]
  )
  assert file.stat() == written  # Read, not made anew.
  # As older versions wrote it.
  old = [x for x in first if x not in names]
  short = records.select(np.isin(first, old))
  file.write_text('\n'.join(x.replace('\n', ' ') for x in first))
  assert short.names() == old


def test_prepare_counts_every_file_once_and_only_once(raw):
  seen = []
  preparation.prepare(
    'imagenette', raw.parent, progress=lambda *x: seen.append(x)
  )
  assert seen == [(i + 1, 21) for i in range(21)]
  preparation.prepare(
    'imagenette', raw.parent, progress=lambda *x: seen.append(x)
  )
  assert len(seen) == 21


def test_a_failed_preparation_leaves_nothing_that_looks_finished(raw):
  def fail(done, total):
    if done == 9:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    preparation.prepare('imagenette', raw.parent, progress=fail)
  assert preparation.check_dataset('imagenette', raw.parent) == 'raw'
  assert len(preparation.load_dataset('imagenette', raw.parent).train) == 15


def test_nothing_is_left_among_temporary_files(raw, monkeypatch):
  (raw.parent / 'temporary').mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(raw.parent / 'temporary'))
  preparation.prepare('imagenette', raw.parent)
  assert not os.listdir(raw.parent / 'temporary')


SLOWLY = """
import sys, time
from jaxprog.data import preparation
def progress(done, total):
  print(done, flush=True)
  time.sleep(0.05)
preparation.prepare('imagenette', sys.argv[1], progress=progress)
"""


def start_slowly(data_dir):
  """Returns a process that prints the number of each image it prepares."""
  return subprocess.Popen(
    [sys.executable, '-c', SLOWLY, data_dir],
    stdout=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parent.parent,
  )


def test_a_killed_preparation_leaves_nothing_that_looks_finished(raw):
  process = start_slowly(raw.parent)
  for _ in range(5):
    process.stdout.readline()
  process.kill()
  process.wait()
  process.stdout.close()
  folder = raw.parent / 'prepared' / 'imagenette_folder'
  assert {x.name[:11] for x in folder.iterdir()} == {'incomplete.'}
  assert preparation.check_dataset('imagenette', raw.parent) == 'raw'
  assert len(preparation.load_dataset('imagenette', raw.parent).train) == 15
  assert [x.name for x in folder.iterdir()] == ['1.0.0']


def test_a_second_process_waits_for_the_first(raw):
  process = start_slowly(raw.parent)
  process.stdout.readline()
  seen = []
  dataset = preparation.load_dataset(
    'imagenette', raw.parent, progress=lambda *x: seen.append(x)
  )
  with process.stdout as rest:
    assert rest.read().split() == [b'%d' % i for i in range(2, 22)]
  assert process.wait() == 0
  assert seen == []
  assert len(dataset.train) == 15


@pytest.mark.parametrize(
  ('name', 'looked_for'),
  [
    ('imagenette', 'imagenette2-320'),
    ('tiny_imagenet', 'tiny-imagenet-200'),
    ('imagenet_mini', 'imagenet-mini'),
    ('imagenet2012', 'imagenet1k'),
    ('folder:/no/such', '/no/such'),
    ('tfds:mnist', 'prepared'),
  ],
)
def test_a_missing_dataset_is_three_lines(tmp_path, name, looked_for):
  for call in (preparation.check_dataset, preparation.load_dataset):
    with pytest.raises(errors.UserError) as caught:
      call(name, tmp_path)
    lines = str(caught.value).split('\n')
    assert len(lines) == 3
    assert looked_for in lines[0] + lines[1]
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['imagenette', 'tfds:mnist'])
def test_prepare_without_a_network_is_quick(tmp_path, monkeypatch, name):
  # A port that no one listens to stands for a network that is not there.
  monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
  monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
  began = time.monotonic()
  with pytest.raises(errors.UserError, match='cannot be reached') as caught:
    preparation.prepare(name, tmp_path)
  assert len(str(caught.value).split('\n')) == 3
  assert time.monotonic() - began < 30  # tfds alone takes 200 s.


def test_a_typo_in_a_tfds_name_is_named(tmp_path):
  with pytest.raises(errors.UserError, match="Did you mean 'mnist'"):
    preparation.prepare('tfds:mnistt', tmp_path)


def test_wrong_classes_are_named(data_dir):
  with pytest.raises(errors.UserError, match=r"no class 'x'\.\nstage 'a'"):
    preparation.load_dataset(
      'digits', data_dir, classes=('x',), where="stage 'a'"
    )
  with pytest.raises(errors.UserError) as caught:
    preparation.load_dataset(
      'digits', data_dir, classes=('1', '2'), num_classes=3, where="stage 'a'"
    )
  assert str(caught.value).startswith(
    "num_classes is 3, but 'digits' has 2 classes.\nstage 'a'"
  )


def test_a_missing_class_folder_is_found_by_num_classes(raw):
  with pytest.raises(errors.UserError, match='num_classes is 4, but') as caught:
    preparation.load_dataset('imagenette', raw.parent, num_classes=4)
  assert str(raw) in caught.value.where


class FakeImages(tfds.core.GeneratorBasedBuilder):
  """A classification dataset as tfds ships them: no file name, no order."""

  VERSION = tfds.core.Version('2.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 3)),
          'label': tfds.features.ClassLabel(names=['zebra', 'ant', 'cow']),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._images(9), 'test': self._images(6)}

  def _images(self, count):
    for i in range(count):
      yield i, {'image': np.full((8, 8, 3), i, np.uint8), 'label': i % 3}

  _generate_examples = _images


def test_any_tfds_dataset(tmp_path):
  # 0, 1, 2 as shipped: zebra, ant, cow.
  preparation.prepare('tfds:fake_images', tmp_path)
  dataset = preparation.load_dataset('tfds:fake_images', tmp_path)
  assert dataset.classes == ('ant', 'cow', 'zebra')
  assert (len(dataset.train), len(dataset.eval)) == (9, 6)
  from jaxprog.data import preprocess

  for record in read_all(dataset.train):
    shipped = preprocess.decode(record['image'])[0, 0, 0] % 3
    assert record['wnid'] == ('zebra', 'ant', 'cow')[shipped]
    assert record['label'] == (2, 0, 1)[shipped]
  names = [r['file_name'] for r in read_all(dataset.train)]
  assert len(set(names)) == 9
  some = preparation.load_dataset(
    'tfds:fake_images', tmp_path, classes=('zebra', 'cow')
  )
  assert sorted(some.eval.labels) == [0, 0, 1, 1]


class NoLabels(FakeImages):
  """Images without labels."""

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({'image': tfds.features.Image()}),
    )

  def _images(self, count):
    for i in range(count):
      yield i, {'image': photo(8, 8, i)}


def test_a_tfds_dataset_without_labels_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='not a classification dataset'):
    preparation.prepare('tfds:no_labels', tmp_path)


def test_local_comes_before_tfds(tmp_path):
  write_class_folders(tmp_path / 'imagenette2')
  preparation.prepare('imagenette', tmp_path)
  assert [x.name for x in (tmp_path / 'prepared').iterdir() if x.is_dir()] == [
    'imagenette_folder'
  ]


def test_an_unwritable_data_dir_is_said(tmp_path):
  (tmp_path / 'prepared').write_text('a file in the way')
  with pytest.raises(errors.UserError, match='Cannot write prepared data'):
    preparation.load_dataset('digits', tmp_path)


def test_tensorflow_is_not_imported(tmp_path):
  code = (
    'import sys; from jaxprog.data import preparation\n'
    'd = preparation.load_dataset("digits", sys.argv[1]); d.train[0]\n'
    'assert "tensorflow" not in sys.modules'
  )
  subprocess.run(
    [sys.executable, '-c', code, tmp_path],
    check=True,
    cwd=pathlib.Path(__file__).parent.parent,
  )


def test_real_folders():
  if not real_data():
    pytest.skip('JAXPROG_DATA names no folder.')
  nette = preparation.load_dataset('imagenette', real_data(), num_classes=10)
  assert nette.class_names[0] == 'tench'
  tiny = preparation.load_dataset('tiny_imagenet', real_data(), num_classes=200)
  assert np.bincount(tiny.eval.labels).tolist() == [10] * 200

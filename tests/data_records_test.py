import dataclasses
import pickle
import shutil
import time
from unittest import mock

import numpy as np
import pytest
from data_fixtures import WNIDS, encode, photo, read_all, write_class_folders

from jaxprog import errors
from jaxprog.data import preparation, records
from jaxprog.data.records import Records


@pytest.fixture
def raw(tmp_path):
  return write_class_folders(tmp_path / 'imagenette2')


def test_records_are_the_files(raw):
  dataset = preparation.load_dataset('imagenette', raw.parent)
  for split, folder in ((dataset.train, 'train'), (dataset.eval, 'val')):
    found = {}
    for i, record in enumerate(read_all(split)):
      assert WNIDS[record['label']] == record['wnid']
      assert split.labels[i] == record['label']
      found[f'{record["wnid"]}/{record["file_name"]}'] = record['image']
    files = (raw / folder).glob('*/*.JPEG')
    assert found == {
      str(file.relative_to(raw / folder)): file.read_bytes() for file in files
    }
  assert dataset.classes == WNIDS
  assert dataset.train.labels.dtype == np.int32


def test_digits_keep_their_split_in_every_choice_of_classes(data_dir):
  whole = preparation.load_dataset('digits', data_dir)
  some = preparation.load_dataset('digits', data_dir, classes=('7', '2', '3'))
  assert some.classes == ('2', '3', '7')
  for a, b in ((whole.train, some.train), (whole.eval, some.eval)):
    chosen = [r for r in read_all(a) if r['wnid'] in some.classes]
    got = read_all(b)
    assert [r['file_name'] for r in got] == [r['file_name'] for r in chosen]
    assert [some.classes[r['label']] for r in got] == [
      r['wnid'] for r in chosen
    ]
    np.testing.assert_array_equal(b.labels, [r['label'] for r in got])
  assert some.fingerprint != whole.fingerprint
  indices = [
    int(r['file_name'].removesuffix('.png').split('_')[1])
    for r in read_all(some.eval)
  ]
  assert all(i % 5 == 0 for i in indices)


def test_open_reads_no_images_and_pickles(raw):
  preparation.load_dataset('imagenette', raw.parent)
  dataset = preparation.load_dataset('imagenette', raw.parent)
  again = pickle.loads(pickle.dumps(dataset))
  assert read_all(again.train) == read_all(dataset.train)
  assert again.fingerprint == dataset.fingerprint


def test_labels_beside_the_records_are_checked_against_them(raw):
  expected = preparation.load_dataset('imagenette', raw.parent).train.labels
  (file,) = (raw.parent / 'prepared').rglob('labels-train.npy')
  for content in (b'', b'not numpy', file.read_bytes()[:-8]):
    file.write_bytes(content)
    found = preparation.load_dataset('imagenette', raw.parent).train.labels
    np.testing.assert_array_equal(found, expected)
  np.save(file, expected[:-1])
  found = preparation.load_dataset('imagenette', raw.parent).train.labels
  np.testing.assert_array_equal(found, expected)


def test_many_classes_are_chosen_in_linear_time(data_dir):
  digits = preparation.load_dataset('digits', data_dir)
  names = tuple(f'{i:05}' for i in range(20_000))
  many = dataclasses.replace(digits, classes=names, class_names=names)
  began = time.process_time()
  some = records.select_classes(many, names[::-2], '')
  assert time.process_time() - began < 1  # Else 3 s.
  assert some.classes == names[1::2]


def test_a_holdout_follows_the_names(raw):
  dataset = preparation.load_dataset('imagenette', raw.parent)
  held = records.take_holdout(dataset, 0.4, "stage 'a'")
  names = held.holdout.names()
  assert len(held.train) + len(held.holdout) == len(dataset.train)
  assert not set(names) & set(held.train.names())
  assert held.selection is held.holdout
  some = preparation.load_dataset(
    'imagenette', raw.parent, classes=('n02', 'n03')
  )
  again = records.take_holdout(some, 0.4, "stage 'b'").holdout.names()
  assert set(again) == {x for x in names if not x.startswith('n01')}
  with pytest.raises(errors.UserError, match='takes 0 of the 15'):
    records.take_holdout(dataset, 1e-9, "stage 'a'")


@pytest.fixture(scope='module')
def numbered(tmp_path_factory):
  """500 images in 20 classes that each number theirs from 000."""
  root = tmp_path_factory.mktemp('numbered')
  data = encode(photo(8, 8, 0), 'PNG')
  for i in range(500):
    path = root / f'raw/train/c{i % 20:02}/{i // 20:03}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  path = root / 'raw/val/c00/000.png'
  path.parent.mkdir(parents=True)
  path.write_bytes(data)
  for i in range(1, 20):
    shutil.copytree(path.parent, root / f'raw/val/c{i:02}')
  return preparation.load_dataset(f'folder:{root}/raw', root / 'data')


def taken(split):
  return {split.describe(i) for i in range(len(split))}


@pytest.mark.parametrize('percent', [1, 2, 5, 10, 50])
def test_a_holdout_takes_about_its_part(numbered, percent):
  held = records.take_holdout(numbered, percent / 100, "stage 'a'")
  expected = 5 * percent
  spread = (expected * (1 - percent / 100)) ** 0.5
  assert abs(len(held.holdout) - expected) < 3 * spread
  assert not taken(held.holdout) & taken(held.train)
  # An image stays where it is when others come and go.
  fewer = dataclasses.replace(
    numbered, train=numbered.train.select(numbered.train.labels % 3 > 0)
  )
  some = records.take_holdout(fewer, percent / 100, "stage 'a'")
  assert taken(some.holdout) == taken(held.holdout) & taken(fewer.train)


def test_of_a_few_images_a_holdout_takes_one(numbered):
  few = numbered.train.select(np.arange(500) < 20)
  few = dataclasses.replace(numbered, train=few)
  assert len(records.take_holdout(few, 0.03, "stage 'a'").holdout) == 1
  with pytest.raises(errors.UserError, match='takes 0 of the 20'):
    records.take_holdout(few, 0.02, "stage 'a'")


@pytest.mark.parametrize(
  ('name', 'alike'),
  [
    ('n02105855_2933.JPEG', True),
    ('ILSVRC2012_val_00000293.JPEG', True),
    ('000.png', False),
  ],
)
def test_imagenets_files_have_one_side_in_all_classes(numbered, name, alike):
  with mock.patch.object(Records, 'names', lambda x: [name] * len(x)):
    try:
      held = len(records.take_holdout(numbered, 0.5, "stage 'a'").holdout)
    except errors.UserError:
      held = 0
  assert (held == 0) == alike

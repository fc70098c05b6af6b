import hashlib
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from data_fixtures import encode, photo, write_image, write_tiny_imagenet
from image_fixtures import write_pets

from jaxprog import named
from jaxprog.data import preparation, verification


@pytest.fixture
def pets(tmp_path):
  return write_pets(tmp_path / 'pets')


def verify(root, **options):
  name = f'folder:{root}'
  return verification.verify_dataset(name, root.parent / 'data', **options)


def kinds(report, level='errors'):
  """Returns (kind, name) of what is wrong."""
  return [(x['kind'], x['name']) for x in report[level]]


def manifest(root) -> pathlib.Path:
  (path,) = (root.parent / 'data' / 'manifests').iterdir()
  return path


def test_a_dataset_in_order_is_counted_and_its_manifest_kept(pets):
  (pets / 'val' / 'n02' / 'n02_val_0.JPEG').unlink()
  seen = []
  first = verify(pets, num_classes=3, progress=lambda *x: seen.append(x))
  assert seen == [(i + 1, 20) for i in range(20)]
  assert first['errors'] == first['warnings'] == []
  assert first['manifest']['status'] == 'written'
  train, val = first['splits'].values()
  assert (train['images'], val['images']) == (15, 5)
  assert (val['smallest_class'], val['largest_class']) == (1, 2)
  assert val['by_class'] == {'n01': 2, 'n02': 1, 'n03': 2}
  second = verify(pets, num_threads=4)
  assert second['errors'] == []
  assert second['manifest']['status'] == 'matches'


def test_the_manifest_is_sha256sums(pets):
  odd_names = ('back\\slash.JPEG', 'new\nline.JPEG', 'a\rreturn\r\n.JPEG')
  for seed, odd in enumerate(odd_names, 301):
    write_image(pets / 'train' / 'n01' / odd, seed)
  (pets / 'val').rename(pets / 'validation')  # As the split is called.
  assert verify(pets)['errors'] == []
  for _ in range(2):
    result = subprocess.run(
      ['sha256sum', '--check', '--strict', '--quiet', manifest(pets)],
      cwd=pets,
      capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert verify(pets)['errors'] == []
  files = [x for x in pets.rglob('*') if x.is_file()]
  assert len(manifest(pets).read_text().split('\n')) == len(files) + 1


@pytest.mark.parametrize('prepared', [True, False])
def test_each_kind_of_change_is_listed(pets, prepared):
  verify(pets)
  image = pets / 'train' / 'n01' / 'n01_train_0.JPEG'
  flipped = bytearray(image.read_bytes())
  flipped[-100] ^= 1
  image.write_bytes(flipped)
  image.with_name('n01_train_1.JPEG').rename(image.with_name('z.JPEG'))
  if prepared:
    preparation.prepare(f'folder:{pets}', pets.parent / 'data')
  report = verify(pets)
  assert report['kind'] == ('prepared' if prepared else 'raw')
  assert kinds(report) == [
    ('changed', 'train/n01/n01_train_0.JPEG'),
    ('missing', 'train/n01/n01_train_1.JPEG'),
    ('new', 'train/n01/z.JPEG'),
  ]
  assert hashlib.sha256(flipped).hexdigest() in report['errors'][0]['detail']


DAMAGE = {
  'empty': lambda image: b'',
  'html': lambda image: b'\n <!DOCTYPE html><title>404</title>',
  'truncated': lambda image: image[:-1],
  'damaged': lambda image: b'not an image at all',
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_is_listed_and_the_rest_is_looked_at(pets, kind):
  image = pets / 'train' / 'n01' / 'n01_train_0.JPEG'
  whole = image.read_bytes()
  image.write_bytes(DAMAGE[kind](whole))
  report = verify(pets, num_threads=2)
  assert kinds(report) == [(kind, 'train/n01/n01_train_0.JPEG')]
  assert report['splits']['train']['images'] == 15
  # It must not become what later verifications compare with.
  assert report['manifest']['status'].startswith('not written')
  image.write_bytes(whole)
  assert verify(pets)['manifest']['status'] == 'written'


def test_a_png_without_its_end_is_truncated(pets):
  image = pets / 'train' / 'n01' / 'x.png'
  image.write_bytes(encode(photo(20, 20, 77))[:-12])
  assert kinds(verify(pets)) == [('truncated', 'train/n01/x.png')]


def test_an_unreadable_file_is_listed(pets):
  image = pets / 'train' / 'n01' / 'n01_train_0.JPEG'
  raw = preparation.list_raw(f'folder:{pets}', pets.parent)
  image.unlink()
  seen = [verification._look(x) for x in verification._open_raw(raw).items]
  assert len(seen) == 21
  assert [x.name for x in seen if x.kind == 'unreadable'] == [
    'train/n01/n01_train_0.JPEG'
  ]


def test_duplicates_are_told_apart(pets):
  train, val = pets / 'train', pets / 'val'
  for source, target in (
    (train / 'n01/n01_train_0.JPEG', train / 'n01/again.JPEG'),
    (train / 'n01/n01_train_1.JPEG', val / 'n01/leak.JPEG'),
    (train / 'n01/n01_train_2.JPEG', train / 'n02/other.JPEG'),
    (train / 'n01/n01_train_3.JPEG', val / 'n03/both.JPEG'),
  ):
    shutil.copy(source, target)
  report = verify(pets)
  assert report['errors'] == []
  assert [(k, n[-6]) for k, n in kinds(report, 'warnings')] == [
    ('duplicate', 'n'),
    ('duplicate, other split', '1'),
    ('duplicate, other label', '2'),
    ('duplicate, other label', '3'),
    ('duplicate, other split', '3'),
  ]
  assert report['warnings'][0] == {
    'kind': 'duplicate',
    'name': 'train/n01/again.JPEG',
    'detail': 'train/n01/n01_train_0.JPEG',
  }
  # They are no damage: from now on they are part of what is compared.
  assert report['manifest']['status'] == 'written'


def test_raw_and_prepared_images_have_the_same_manifest(tmp_path):
  write_tiny_imagenet(tmp_path / 'tiny-imagenet-200')
  raw = verification.verify_dataset('tiny_imagenet', tmp_path)
  preparation.prepare('tiny_imagenet', tmp_path)
  prepared = verification.verify_dataset('tiny_imagenet', tmp_path)
  assert (raw['kind'], prepared['kind']) == ('raw', 'prepared')
  assert prepared['manifest']['status'] == 'matches'


def test_a_subset_passes_once_the_manifest_has_it_but_no_missing_class(
  tmp_path, monkeypatch
):
  write_tiny_imagenet(tmp_path / 'tiny-imagenet-200')
  report = verification.verify_dataset('tiny_imagenet', tmp_path)
  assert report['counts'][0] == 'train, a subset: 12 of 100,000 images'
  assert [k for k, _ in kinds(report)] == [
    'classes',
    'classes',
    'count',
    'count',
  ]
  again = verification.verify_dataset('tiny_imagenet', tmp_path)
  assert [k for k, _ in kinds(again)] == ['classes', 'classes']
  assert str(tmp_path / 'tiny-imagenet-200') in again['errors'][0]['name']
  known = named.DATASETS['tiny_imagenet']._replace(
    published=named.Published(classes=3, train=11, eval=6)
  )
  monkeypatch.setitem(named.DATASETS, 'tiny_imagenet', known)
  again = verification.verify_dataset('tiny_imagenet', tmp_path)
  assert again['errors'] == []
  assert again['counts'] == ['train: 12 images, 11 published']


def test_classes_that_the_stage_counts_otherwise_are_an_error(pets):
  assert [k for k, _ in kinds(verify(pets, num_classes=4))] == ['classes'] * 2


def test_a_raw_folder_out_of_order_is_said(pets):
  shutil.rmtree(pets / 'val' / 'n02')
  report = verify(pets)
  assert kinds(report) == [('dataset', f'folder:{pets}')]
  assert 'n02' in report['errors'][0]['detail']
  assert str(pets) in report['errors'][0]['detail']


def test_a_missing_dataset_is_said(tmp_path):
  report = verification.verify_dataset('imagenet_mini', tmp_path)
  assert 'is missing' in report['errors'][0]['detail']
  assert report['splits'] == {}
  assert list(tmp_path.iterdir()) == []


def test_raw_images_that_changed_since_they_were_prepared_are_looked_at(pets):
  preparation.prepare(f'folder:{pets}', pets.parent / 'data')
  image = pets / 'train' / 'n01' / 'new.JPEG'
  image.write_bytes(b'')
  report = verify(pets)
  assert report['kind'] == 'raw'
  assert kinds(report) == [
    ('dataset', f'folder:{pets}'),
    ('empty', 'train/n01/new.JPEG'),
  ]


def prepared_file(root, pattern) -> pathlib.Path:
  preparation.prepare(f'folder:{root}', root.parent / 'data')
  (path,) = (root.parent / 'data' / 'prepared').rglob(pattern)
  return path


def test_labels_that_contradict_their_records_are_listed(pets):
  file = prepared_file(pets, 'labels-train.npy')
  labels = np.load(file)
  wrong = int(np.flatnonzero(labels == 0)[0])
  labels[wrong] = 2
  np.save(file, labels)
  report = verify(pets)
  ((kind, name),) = kinds(report)
  assert kind == 'label'
  assert name.startswith('train/n03/n01_train')
  assert report['errors'][0]['detail'] == 'read as n03, recorded as n01'


def test_damaged_records_are_listed_and_the_others_looked_at(pets):
  file = prepared_file(pets, '*train.array_record*')
  data = bytearray(file.read_bytes())
  data[5000] ^= 1
  file.write_bytes(data)
  report = verify(pets)
  ((kind, name),) = kinds(report)
  assert kind == 'unreadable'
  assert 'record ' in name
  assert report['splits']['train']['images'] == 15


def test_a_manifest_that_is_none_is_said(pets):
  verify(pets)
  manifest(pets).write_text('what?\n')
  assert kinds(verify(pets)) == [('manifest', str(manifest(pets)))]


def test_data_that_may_not_be_written_to_is_verified(pets):
  (pets.parent / 'data').write_text('a file in the way')
  report = verify(pets)
  assert report['errors'] == []
  assert report['manifest']['status'].startswith('not written')


def test_manifests_of_any_dataset_are_plain_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = ('imagenette', 'tfds:imagenette/full-size-v2', 'folder:a/b')
  paths = [verification.manifest_path(x, tmp_path) for x in names]
  assert all(x.parent == tmp_path / 'manifests' for x in paths)
  assert [x.name for x in paths[:2]] == [
    'imagenette.sha256',
    'tfds_imagenette_full-size-v2.sha256',
  ]
  absolute = verification.manifest_path(f'folder:{tmp_path}/a/b', tmp_path)
  assert absolute == paths[2]
  assert absolute != verification.manifest_path('folder:b', tmp_path)


def test_digits_need_no_folder(tmp_path):
  report = verification.verify_dataset('digits', tmp_path, num_classes=10)
  assert report['errors'] == []
  assert [x['images'] for x in report['splits'].values()] == [1437, 360]
  assert os.listdir(tmp_path) == ['manifests']

"""What raw folders hold besides images, as a user meets it."""

import os
import shutil

import pytest
import runs
from data_fixtures import (
  encode,
  photo,
  write_class_folders,
  write_image,
  write_tiny_imagenet,
)
from PIL import Image

from jaxprog.data import folders, preprocess

CONFIG = """
from jaxprog import start_from

def get_config(dataset):
  config = start_from('default')
  config.stages = [{'name': 'a', 'dataset': dataset, 'num_epochs': 1}]
  return config
"""
BYTES = encode(photo(9, 9), 'JPEG')


@pytest.fixture
def pets(tmp_path):
  return write_class_folders(tmp_path / 'data' / 'pets', train=2, val=1)


@pytest.fixture
def call(tmp_path):
  """Runs a mode on the images in pets/, or on another dataset."""
  (tmp_path / 'config.py').write_text(CONFIG)

  def call_mode(mode, dataset=f'folder:{tmp_path}/data/pets'):
    workdir = [f'--workdir={tmp_path}/run'] if mode == 'train' else []
    config = f'--config={tmp_path}/config.py:{dataset}'
    data_dir = f'--config.data_dir={tmp_path}/data'
    return runs.call_main(f'--mode={mode}', config, data_dir, *workdir)

  return call_mode


def assert_three_lines(result, *expected):
  assert result.returncode == 2
  assert len(result.stderr.strip().split('\n')) == 3
  for text in expected:
    assert text in result.stderr


@pytest.mark.parametrize('suffix', sorted(folders.SUFFIXES))
def test_every_suffix_is_one_that_is_decoded(tmp_path, suffix):
  mode = {'.pbm': '1', '.pgm': 'L'}.get(suffix, 'RGB')
  image = Image.fromarray(photo(40, 30)).convert(mode)
  image.save(tmp_path / f'a{suffix}')
  shutil.copy(tmp_path / f'a{suffix}', tmp_path / f'b{suffix.upper()}')
  assert [x.kind for x in folders.scan(tmp_path)] == [folders.IMAGE] * 2
  encoded = (tmp_path / f'a{suffix}').read_bytes()
  assert preprocess.decode(encoded).shape == (30, 40, 3)


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'AVIF', 'JPEG2000'])
def test_a_file_without_a_suffix_is_known_by_how_it_begins(tmp_path, format):
  (tmp_path / 'photo').write_bytes(encode(photo(9, 9), format))
  (tmp_path / 'text').write_text('BMW, not a bitmap.')
  found = {x.name: x.kind for x in folders.scan(tmp_path)}
  assert found == {'photo': folders.IMAGE, 'text': 'no suffix'}


def rename_class(name):
  def rename(pets):
    for split in ('train', 'val'):
      os.rename(pets / split / 'n02', pets / split / name)

  return rename


def add(path, data=BYTES):
  return lambda pets: (pets / path).write_bytes(data)


def link(path, target):
  return lambda pets: os.symlink(target, pets / path)


WRONG = {
  'a blank at the end': (rename_class('cat '), "'cat '"),
  'a blank': (rename_class(' '), "' '"),
  'a no-break space': (rename_class('cat\xa0'), r"'cat\xa0'"),
  'a line break': (rename_class('apple\npie'), r"'apple\npie'"),
  'a carriage return': (rename_class('a\rb'), r"'a\rb'"),
  'a line separator': (rename_class('a\u2028b'), r"'a\u2028b'"),
  'a tab': (rename_class('a\tb'), r"'a\tb'"),
  'a class not UTF-8': (rename_class('caf\udce9'), r"'caf\xe9'"),
  'a file not UTF-8': (add('train/n01/caf\udce9.jpg'), r'caf\xe9.jpg'),
  'a broken link': (link('train/n01/x.jpg', 'nowhere'), 'train/n01/x.jpg'),
  'a link loop': (link('train/n01/x.jpg', 'x.jpg'), 'train/n01/x.jpg'),
  'a broken class': (link('train/n09', 'nowhere'), 'train/n09'),
  'a class loop': (link('train/n09', 'n09'), 'train/n09'),
}


@pytest.mark.parametrize('case', WRONG)
def test_what_cannot_be_kept_is_named_before_anything_is_written(
  pets, call, case
):
  damage, named = WRONG[case]
  damage(pets)
  for mode in ('prepare', 'train'):
    assert_three_lines(call(mode), named)
  assert call('check').returncode == 2
  assert os.listdir(pets.parent) == ['pets']


def test_names_that_only_look_odd_are_kept(pets, call):
  rename_class('چشم‌ها 猫')(pets)  # With a zero-width non-joiner.
  add('train/n01/a\rb\nc\\d.jpg')(pets)
  assert call('prepare').returncode == 0
  assert 'manifest written' in call('verify').stdout
  assert 'manifest matches' in call('verify').stdout


LEFT_OUT = {
  'a folder like an image': (lambda x: x.mkdir(), 'x.jpg', '1 x folder'),
  'a pipe': (os.mkfifo, 'x.jpg', '1 x special file'),
  'a folder below': (
    lambda x: shutil.copytree(x.parent, x),
    'sub',
    '1 x folder',
  ),
  'another format': (lambda x: x.write_bytes(b''), 'x.heic', '1 x .heic'),
  'no format': (lambda x: x.write_bytes(b''), 'README', '1 x no suffix'),
}


@pytest.mark.parametrize('case', LEFT_OUT)
def test_what_is_no_image_is_counted_and_named(pets, call, case):
  create, name, counted = LEFT_OUT[case]
  create(pets / 'train' / 'n01' / name)
  line = f'left out: {counted} (train/n01/{name})'
  result = call('prepare')
  assert result.returncode == 0
  assert line in result.stdout
  assert line.removeprefix('left out: ') in call('verify').stdout
  assert len(list(folders.walk(pets, []))) == 9 + 2 * (name == 'sub')


def test_check_names_what_is_left_out_once(pets, call):
  add('train/x.jpg')(pets)
  add('val/n02/x.heic', b'')(pets)
  expected = '1 x .heic (val/n02/x.heic), 1 x image (train/x.jpg)'
  for _ in range(2):
    found = [x for x in call('check').stdout.split('\n') if 'left out' in x]
    assert [expected in x for x in found] == [True]
    call('prepare')


@pytest.mark.parametrize(
  ('file', 'data', 'named'),
  [
    ('wnids.txt', b'', 'wnids.txt is empty'),
    ('wnids.txt', b'n01\nn02\nn03\nn01\n', "'n01' stands twice"),
    ('words.txt', 'n01\tZährte\n'.encode('latin-1'), 'UTF-8: line 1'),
    ('val/val_annotations.txt', b'a n01\na n02\n', 'both n01 and n02'),
    ('LOC_val_solution.csv', b'ImageId,x\nv_0\n', "not 'v_0.JPEG' alone"),
  ],
)
def test_lists_that_cannot_be_right_are_named(
  tmp_path, call, file, data, named
):
  if file.startswith('LOC'):
    dataset, root = 'imagenet2012', tmp_path / 'data' / 'imagenet1k'
    write_class_folders(root, train=1, val=0)
    write_image(root / 'val' / 'v_0.JPEG', 1)
  else:
    dataset, root = 'tiny_imagenet', tmp_path / 'data' / 'tiny-imagenet-200'
    write_tiny_imagenet(root)
  (root / file).write_bytes(data)
  for mode in ('prepare', 'train'):
    assert_three_lines(call(mode, dataset), named, str(root / file))
  result = call('check', dataset)
  assert result.returncode == 2
  assert named in result.stdout


def test_what_is_overwritten_in_place_stops_a_run(pets, call):
  call('prepare')
  image = pets / 'train' / 'n02' / 'n02_train_1.JPEG'
  folder = os.stat(image.parent)
  image.write_bytes(image.read_bytes()[:-1] + b'x')
  os.utime(image, ns=(1, 1))
  assert os.stat(image.parent).st_mtime_ns == folder.st_mtime_ns
  assert_three_lines(call('train'), f'{pets}, in train/n02', '--mode=prepare')
  assert 'were written to since' in call('check').stdout
  assert call('prepare').returncode == 0
  assert 'were written to since' not in call('verify').stdout


def test_hidden_names_are_seen_nowhere(pets, call):
  for folder in (pets / 'train', pets / 'val', pets / 'train' / 'n01'):
    shutil.copytree(pets / 'val' / 'n01', folder / '.ipynb_checkpoints')
    (folder / '._x.jpg').write_bytes(BYTES)
  result = call('prepare')
  assert result.returncode == 0
  assert 'left out' not in result.stdout
  left_out = []
  assert len(list(folders.walk(pets, left_out))) == 9
  assert left_out == []

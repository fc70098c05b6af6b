import io
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import time

import numpy as np
import pytest
import scipy.io
from data_fixtures import (
  WNIDS,
  read_all,
  write_class_folders,
  write_image,
  write_tiny_imagenet,
)

from jaxprog import errors
from jaxprog.data import layouts, leaks, preparation, verification


def names(raw, split):
  return [(x.wnid, x.file_name) for x in raw.images(split)]


def test_class_folders_are_listed_in_sorted_order(tmp_path):
  raw = layouts.list_folder(write_class_folders(tmp_path))
  assert raw.classes == WNIDS
  assert raw.num_images == 3 * (5 + 2)
  assert names(raw, 'validation') == [
    (w, f'{w}_val_{j}.JPEG') for w in WNIDS for j in range(2)
  ]
  first = next(iter(raw.images('train')))
  assert first.data == tmp_path / 'train' / 'n01' / 'n01_train_0.JPEG'


def test_other_files_are_ignored(tmp_path):
  write_class_folders(tmp_path)
  before = layouts.list_folder(tmp_path)
  (tmp_path / 'train' / '.DS_Store').write_text('')
  (tmp_path / 'train' / 'readme.txt').write_text('')
  (tmp_path / 'train' / 'n01' / 'notes.txt').write_text('')
  (tmp_path / 'train' / 'n01' / '._n01_train_0.JPEG').write_text('')
  (tmp_path / 'train' / '.cache').mkdir()
  assert layouts.list_folder(tmp_path).fingerprint == before.fingerprint


@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'test'])
def test_a_folder_may_name_its_eval_split(tmp_path, name):
  write_class_folders(tmp_path, val_name=name)
  raw = layouts.list_folder(tmp_path)
  assert len(names(raw, 'validation')) == 6


def test_tiny_imagenet_takes_flat_val_labels_and_sorts_wnids(tmp_path):
  raw = layouts.list_folder(write_tiny_imagenet(tmp_path))
  assert raw.classes == ('n01', 'n02', 'n03')
  assert raw.class_names == ('goldfish', 'n02', 'bee')
  assert len(names(raw, 'train')) == 12
  # i-th wnid: files 2 - i and 5 - i.
  assert sorted(names(raw, 'validation')) == [
    ('n01', 'val_2.JPEG'),
    ('n01', 'val_5.JPEG'),
    ('n02', 'val_1.JPEG'),
    ('n02', 'val_4.JPEG'),
    ('n03', 'val_0.JPEG'),
    ('n03', 'val_3.JPEG'),
  ]


@pytest.mark.parametrize(
  ('file', 'text'),
  [
    ('val_labels.txt', 'v_2.JPEG n01\nv_0.JPEG n03\nv_1.JPEG n02\n'),
    ('imagenet_2012_validation_synset_labels.txt', 'n03\nn02\nn01\n'),
    ('ILSVRC2012_validation_synset_labels.txt', 'n03\nn02\nn01\n'),
    (
      'LOC_val_solution.csv',
      'ImageId,PredictionString\nv_1,n02 1 2 3 4\nv_0,n03 1 2 3 4\n'
      'v_2,n01 1 2 3 4 n01 5 6 7 8\n',
    ),
  ],
)
def test_imagenet_val_may_be_flat_with_a_list(tmp_path, file, text):
  write_class_folders(tmp_path, val=0)
  for i in range(3):
    write_image(tmp_path / 'val' / f'v_{i}.JPEG', i)
  (tmp_path / file).write_text(text)
  raw = layouts.list_folder(tmp_path)
  assert sorted(names(raw, 'validation')) == [
    ('n01', 'v_2.JPEG'),
    ('n02', 'v_1.JPEG'),
    ('n03', 'v_0.JPEG'),
  ]


def test_imagenet_reads_names_of_kaggle(tmp_path):
  write_class_folders(tmp_path)
  (tmp_path / 'LOC_synset_mapping.txt').write_text('n02 tench, Tinca tinca\n')
  assert layouts.list_folder(tmp_path).class_names == ('n01', 'tench', 'n03')


def remove_class(root):
  for x in sorted((root / 'val' / 'n02').iterdir()):
    x.unlink()


def empty_class(root):
  (root / 'train' / 'n00').mkdir()


def extra_class(root):
  write_image(root / 'val' / 'n09' / 'x.JPEG', 0)


def no_train(root):
  os.rename(root / 'train', root / 'training')


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (remove_class, "Class 'n02' has no images in the validation split."),
    (empty_class, "Class 'n00' has no images in the train split."),
    (extra_class, "Class 'n09' is not among the 3 of training."),
    (no_train, 'There is no folder train/.'),
  ],
)
def test_wrong_class_folders_are_named(tmp_path, damage, message):
  damage(write_class_folders(tmp_path))
  with pytest.raises(errors.UserError) as caught:
    layouts.list_folder(tmp_path)
  assert caught.value.what == message
  assert str(tmp_path) in caught.value.where


def test_wrong_flat_labels_are_named(tmp_path):
  write_tiny_imagenet(tmp_path)
  annotations = tmp_path / 'val' / 'val_annotations.txt'
  good = annotations.read_text()
  annotations.write_text(good.replace('n02', 'n07'))
  with pytest.raises(errors.UserError, match="Class 'n07' is not among"):
    layouts.list_folder(tmp_path)
  annotations.write_text(good.replace('val_4.JPEG\t', 'val_9.JPEG\t'))
  with pytest.raises(errors.UserError, match=r'val_4\.JPEG has no label'):
    layouts.list_folder(tmp_path)
  annotations.unlink()
  with pytest.raises(errors.UserError, match='cannot be read'):
    layouts.list_folder(tmp_path)


def write_flat_val(root):
  write_class_folders(root, val=0)
  for i in range(3):
    write_image(root / 'val' / f'v_{i}.JPEG', i)


CSV = 'ImageId,PredictionString\nv_0,n01 1 2 3 4\nv_1,n02 1\nv_2,n03 1\n'


@pytest.mark.parametrize(
  ('file', 'text', 'message'),
  [
    ('wnids.txt', '', 'wnids.txt is empty.'),
    ('wnids.txt', 'n01\nn02\nn03\nn02\n', "'n02' stands twice in wnids.txt."),
    ('wnids.txt', 'n01\nn02\n', "Class 'n03' is not among wnids.txt."),
    ('words.txt', 'n01\tbee\nn01\tcat\n', 'n01 is both bee and cat.'),
    ('val/val_annotations.txt', 'a n01\na n02\n', 'a is both n01 and n02.'),
    (
      'val/val_annotations.txt',
      'val_0.JPEG\n',
      "A line should name a file and a WNID, not 'val_0.JPEG' alone.",
    ),
    ('val_labels.txt', 'a n01\na n02\n', 'a is both n01 and n02.'),
    ('LOC_synset_mapping.txt', 'n1 a b\nn1 a c\n', 'n1 is both a b and a c.'),
    (
      'LOC_val_solution.csv',
      CSV + 'v_1,n03 1\n',
      'v_1.JPEG is both n02 and n03.',
    ),
    (
      'LOC_val_solution.csv',
      CSV + 'v_3\n',
      "A line should name a file and a WNID, not 'v_3.JPEG' alone.",
    ),
  ],
)
def test_lists_that_contradict_themselves_are_refused(
  tmp_path, file, text, message
):
  is_tiny = file.startswith(('w', 'val/'))
  write_tiny_imagenet(tmp_path) if is_tiny else write_flat_val(tmp_path)
  (tmp_path / file).write_text(text)
  with pytest.raises(errors.UserError) as caught:
    layouts.list_folder(tmp_path)
  assert caught.value.what == message
  assert str(tmp_path) in caught.value.where


def test_what_lists_say_twice_or_of_no_image_is_no_contradiction(tmp_path):
  write_flat_val(tmp_path)
  (tmp_path / 'LOC_val_solution.csv').write_text(CSV + 'v_2,n03 5\nv_7,n01 1')
  raw = layouts.list_folder(tmp_path)
  assert len(names(raw, 'validation')) == 3
  assert raw.left_out == (('label of no image', 'val/v_7.JPEG'),)


def test_a_csv_may_have_no_header(tmp_path):
  write_flat_val(tmp_path)
  # Nor is a spreadsheet's empty line one of it.
  lines = f',\n{CSV.split(chr(10), 1)[1]}'
  (tmp_path / 'LOC_val_solution.csv').write_text(lines)
  assert layouts.list_folder(tmp_path).num_images == 18


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('file', ['wnids.txt', 'words.txt', 'annotations'])
def test_lists_may_begin_with_a_byte_order_mark(tmp_path, encoding, file):
  raw = layouts.list_folder(write_tiny_imagenet(tmp_path))
  path = tmp_path / file
  if file == 'annotations':
    path = tmp_path / 'val' / 'val_annotations.txt'
  lines = path.read_text().replace('goldfish', 'Zährte')
  path.write_bytes(lines.replace('\n', '\r\n').encode(encoding))
  again = layouts.list_folder(tmp_path)
  assert again.fingerprint == raw.fingerprint
  first = 'Zährte' if file == 'words.txt' else 'goldfish'
  assert again.class_names == (first, 'n02', 'bee')


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16-le', 'utf-32'])
def test_other_encodings_are_named(tmp_path, encoding):
  write_tiny_imagenet(tmp_path)
  text = 'n01\ngoldfish\nn02\tZährte\n'
  (tmp_path / 'words.txt').write_bytes(text.encode(encoding))
  with pytest.raises(errors.UserError, match='is not text in UTF-8') as caught:
    layouts.list_folder(tmp_path)
  assert 'Save it in UTF-8' in caught.value.suggestion
  if encoding == 'latin-1':
    assert 'line 3' in caught.value.what


def test_a_list_that_is_a_pipe_is_not_waited_for(tmp_path):
  write_tiny_imagenet(tmp_path)
  (tmp_path / 'wnids.txt').unlink()
  os.mkfifo(tmp_path / 'wnids.txt')
  with pytest.raises(errors.UserError, match='cannot be read: it is no file'):
    layouts.list_folder(tmp_path)


@pytest.mark.parametrize('folder', ['train', 'val/images', 'train/n01/images'])
def test_tiny_imagenet_ignores_hidden_folders(tmp_path, folder):
  write_tiny_imagenet(tmp_path)
  before = layouts.list_folder(tmp_path)
  write_image(tmp_path / folder / '.ipynb_checkpoints' / 'a.JPEG', 1)
  assert layouts.list_folder(tmp_path).fingerprint == before.fingerprint


def test_a_flat_val_folder_ignores_hidden_folders(tmp_path):
  write_flat_val(tmp_path)
  (tmp_path / 'LOC_val_solution.csv').write_text(CSV)
  (tmp_path / 'val' / '.ipynb_checkpoints').mkdir()
  assert layouts.list_folder(tmp_path).num_images == 18


def test_thousands_of_classes_are_checked_in_linear_time():
  # Looked up in a list, these take 20 s.
  classes = [f'class_{i:05}' for i in range(20_000)]
  splits = {s: {x: [('a', 1)] for x in classes} for s in ('train', 'val')}
  began = time.process_time()
  layouts._check_classes(pathlib.Path(), classes, splits)
  assert time.process_time() - began < 2


def test_flat_val_without_labels_says_what_is_accepted(tmp_path):
  write_class_folders(tmp_path, val=0)
  write_image(tmp_path / 'val' / 'v_0.JPEG', 0)
  with pytest.raises(errors.UserError, match=r'val_labels\.txt'):
    layouts.list_folder(tmp_path)


def test_fingerprint_is_of_names_and_sizes_not_of_the_place(tmp_path):
  a = layouts.list_folder(write_class_folders(tmp_path / 'a'))
  b = layouts.list_folder(write_class_folders(tmp_path / 'b'))
  assert a.fingerprint == b.fingerprint
  image = tmp_path / 'b' / 'train' / 'n01' / 'n01_train_0.JPEG'
  image.write_bytes(image.read_bytes() + b' ')
  longer = layouts.list_folder(tmp_path / 'b')
  image.rename(image.with_name('other.JPEG'))
  renamed = layouts.list_folder(tmp_path / 'b')
  assert len({a.fingerprint, longer.fingerprint, renamed.fingerprint}) == 3


def write_imagenet(root):
  """Writes three classes under ImageNet's names, val by class."""
  for i, wnid in enumerate(WNIDS):
    for j in range(3):
      write_image(root / 'train' / wnid / f'{wnid}_{9 - j}.JPEG', 10 * i + j)
    for j in range(2):
      name = f'ILSVRC2012_val_{3 * j + i + 1:08d}.JPEG'
      write_image(root / 'val' / wnid / name, 50 + 10 * i + j)
  return root


# What the development kit calls n01, n02, n03; 9 is a class of classes.
NUMBERS = {'n01': 3, 'n02': 1, 'n03': 2}
TRUTH = '3\n1\n2\n3\n1\n2\n'


def flatten_val(root):
  for image in sorted((root / 'val').glob('*/*')):
    image.rename(root / 'val' / image.name)
    if not os.listdir(image.parent):
      image.parent.rmdir()


def write_meta(path):
  """Writes meta.mat as MATLAB has: a column of structs, leaves first."""
  kinds = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O')]
  rows = [
    (number, wnid, f'{wnid} first, {wnid} second')
    for wnid, number in sorted(NUMBERS.items(), key=lambda x: x[1])
  ]
  rows.append((9, 'n00', 'entity'))
  scipy.io.savemat(path, {'synsets': np.array(rows, kinds)[:, None]})


def write_kit(folder, table):
  folder.mkdir(parents=True)
  numbers = 'ILSVRC2012_validation_ground_truth.txt'
  (folder / numbers).write_text(TRUTH)
  if table == 'meta.mat':
    write_meta(folder / table)
  else:
    lines = [f'{x} {NUMBERS[x]} kit_fox' for x in WNIDS]
    (folder / table).write_text('\n'.join(lines))


def pack(archive, folder, names):
  """Packs with tar itself: its order is that of the names given."""
  subprocess.run(['tar', '-cf', archive, '-C', folder, *names], check=True)


def pack_train(root, *, whole):
  """Packs each class, and these into one, not in order."""
  train = root / 'train'
  for wnid in WNIDS:
    names = sorted(os.listdir(train / wnid), reverse=True)
    pack(train / f'{wnid}.tar', train / wnid, names)
    shutil.rmtree(train / wnid)
  if whole:
    tars = [f'{x}.tar' for x in reversed(WNIDS)]
    pack(root / 'ILSVRC2012_img_train.tar', train, tars)
    shutil.rmtree(train)


def make_tars(data):
  root = data / 'imagenet1k'
  flatten_val(root)
  pack_train(root, whole=True)
  val = root / 'val'
  pack(root / 'ILSVRC2012_img_val.tar', val, sorted(os.listdir(val)))
  shutil.rmtree(val)
  write_kit(root / 'ILSVRC2012_devkit_t12' / 'data', 'meta.mat')
  kit = 'ILSVRC2012_devkit_t12'
  command = ['tar', '-czf', root / f'{kit}.tar.gz', '-C', root, kit]
  subprocess.run(command, check=True)
  shutil.rmtree(root / kit)
  return 'imagenet2012'


def make_tars_of_classes(data):
  flatten_val(data / 'imagenet1k')
  pack_train(data / 'imagenet1k', whole=False)
  write_kit(data / 'imagenet1k' / 'devkit' / 'data', 'map_clsloc.txt')
  return 'imagenet2012'


def make_kaggle(data):
  root = data / 'imagenet1k'
  labels = {x.stem: x.parent.name for x in (root / 'val').glob('*/*')}
  flatten_val(root)
  (data / 'ILSVRC' / 'Data').mkdir(parents=True)
  root.rename(data / 'ILSVRC' / 'Data' / 'CLS-LOC')
  write_image(data / 'ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_1.JPEG', 1)
  for wnid in WNIDS:
    (data / 'ILSVRC/Annotations/CLS-LOC/train' / wnid).mkdir(parents=True)
  rows = [f'{x},{wnid} 1 2 3 4' for x, wnid in labels.items()]
  text = '\n'.join(['ImageId,PredictionString', *rows])
  (data / 'LOC_val_solution.csv').write_text(text)
  (data / 'LOC_synset_mapping.txt').write_text('n02 tench, Tinca tinca\n')
  return 'imagenet2012'


def make_kaggle_below(data):
  make_kaggle(data)
  (data / 'imagenet1k').mkdir()
  for name in ('ILSVRC', 'LOC_val_solution.csv', 'LOC_synset_mapping.txt'):
    (data / name).rename(data / 'imagenet1k' / name)
  return 'imagenet2012'


def make_archive(data):
  (data / 'archive').mkdir()
  (data / 'imagenet1k').rename(data / 'archive' / 'imagenet-mini')
  return 'imagenet_mini'


def make_doubled(data):
  (data / 'imagenet-mini' / '__MACOSX').mkdir(parents=True)
  (data / 'imagenet1k').rename(data / 'imagenet-mini' / 'imagenet-mini')
  return 'imagenet_mini'


def make_doubled_splits(data):
  root = data / 'imagenet1k'
  for split in ('train', 'val'):
    (root / split).rename(root / 'folder')
    (root / split).mkdir()
    (root / 'folder').rename(root / split / split)
  return 'imagenet2012'


@pytest.mark.parametrize(
  'make',
  [
    make_tars,
    make_tars_of_classes,
    make_kaggle,
    make_kaggle_below,
    make_archive,
    make_doubled,
    make_doubled_splits,
  ],
)
def test_the_same_records_come_of_each_imagenet(tmp_path, make):
  reference = load(f'folder:{write_imagenet(tmp_path / "plain")}', tmp_path)
  data = tmp_path / 'data'
  write_imagenet(data / 'imagenet1k')
  assert_same(make(data), data, reference)


def assert_same(name, data, reference):
  """Prepares `name` and compares, verified before and after."""
  for kind in ('raw', 'prepared'):
    found = verification.verify_dataset(name, data)
    assert found['kind'] == kind
    assert {x['kind'] for x in found['errors']} <= {'classes', 'count'}
    assert found['manifest']['status'] == (
      'written' if kind == 'raw' else 'matches'
    )
    loaded = load(name, data)
  assert loaded.classes == reference.classes
  for split in ('train', 'eval'):
    records = getattr(loaded, split), getattr(reference, split)
    found, expected = map(read_all, records)
    assert found == expected
    assert records[0].names() == records[1].names()


def load(name, data):
  return preparation.load_dataset(name, data)


def sort_by_class(root):
  labels = (root / 'val' / 'val_annotations.txt').read_text()
  for line in labels.split('\n'):
    name, wnid, *_ = line.split()
    (root / 'val' / wnid / 'images').mkdir(parents=True, exist_ok=True)
    source = root / 'val' / 'images' / name
    source.rename(root / 'val' / wnid / 'images' / name)


def leave_it(root):
  pass


def sort_and_keep_images(root):
  sort_by_class(root)  # val/images is empty, the list still there.


def sort_into_classes(root):
  sort_by_class(root)
  (root / 'val' / 'images').rmdir()
  (root / 'val' / 'val_annotations.txt').unlink()
  for split in ('train', 'val'):
    for wnid in WNIDS:
      images = root / split / wnid / 'images'
      for x in images.iterdir():
        x.rename(root / split / wnid / x.name)
      images.rmdir()


def sort_within_images(root):
  sort_into_classes(root)
  (root / 'val' / 'images').mkdir()
  for wnid in WNIDS:
    (root / 'val' / wnid).rename(root / 'val' / 'images' / wnid)


def double(root):
  (root.parent / 'inner').mkdir()
  root.rename(root.parent / 'inner' / root.name)
  (root.parent / 'inner').rename(root)


@pytest.mark.parametrize(
  'change',
  [
    leave_it,
    sort_and_keep_images,
    sort_into_classes,
    sort_within_images,
    double,
  ],
)
def test_the_same_records_come_of_each_tiny_imagenet(tmp_path, change):
  # Its images by class, as no script of ours has sorted them.
  tiny = write_tiny_imagenet(tmp_path / 'tiny')
  plain = tmp_path / 'plain'
  for wnid in WNIDS:
    shutil.copytree(tiny / 'train' / wnid / 'images', plain / 'train' / wnid)
  for line in (tiny / 'val' / 'val_annotations.txt').read_text().split('\n'):
    name, wnid, *_ = line.split()
    (plain / 'val' / wnid).mkdir(parents=True, exist_ok=True)
    shutil.copy(tiny / 'val' / 'images' / name, plain / 'val' / wnid)
  reference = load(f'folder:{plain}', tmp_path)
  change(write_tiny_imagenet(tmp_path / 'data' / 'tiny-imagenet-200'))
  assert_same('tiny_imagenet', tmp_path / 'data', reference)
  assert_same(
    f'folder:{tmp_path}/data/tiny-imagenet-200', tmp_path / 'more', reference
  )


def test_a_script_that_stopped_midway_is_noticed(tmp_path):
  root = write_tiny_imagenet(tmp_path)
  (root / 'val' / 'n01').mkdir()
  image = root / 'val' / 'images' / 'val_2.JPEG'
  image.rename(root / 'val' / 'n01' / image.name)
  with pytest.raises(errors.UserError, match='others beside it'):
    layouts.list_folder(tmp_path)
  # What was copied is there twice.
  shutil.copy(root / 'val' / 'n01' / image.name, image)
  assert layouts.list_folder(tmp_path).num_images == 18


def test_a_run_may_go_on_with_tars_or_with_what_they_unpack_to(tmp_path):
  data = tmp_path / 'data'
  root = write_imagenet(data / 'imagenet1k')
  make_tars(data)
  before = load('imagenet2012', data)
  assert before.class_names == ('n01 first', 'n02 first', 'n03 first')
  for tar in ('train', 'val'):
    (root / tar).mkdir()
    archive = root / f'ILSVRC2012_img_{tar}.tar'
    subprocess.run(['tar', '-xf', archive, '-C', root / tar], check=True)
    archive.unlink()
  for wnid in WNIDS:
    (root / 'train' / wnid).mkdir()
    tar = root / 'train' / f'{wnid}.tar'
    command = ['tar', '-xf', tar, '-C', root / 'train' / wnid]
    subprocess.run(command, check=True)
    tar.unlink()
  assert preparation.check_dataset('imagenet2012', data) == 'prepared'
  assert load('imagenet2012', data).fingerprint == before.fingerprint
  root.rename(tmp_path / 'imagenet1k')
  assert load('imagenet2012', tmp_path).fingerprint == before.fingerprint


def test_a_tar_that_was_written_to_is_noticed(tmp_path):
  write_imagenet(tmp_path / 'imagenet1k')
  make_tars(tmp_path)
  before = load('imagenet2012', tmp_path)
  tar = tmp_path / 'imagenet1k' / 'ILSVRC2012_img_train.tar'
  data = bytearray(tar.read_bytes())
  place = data.index(b'\xff\xd9\0')
  data[place - 3] ^= 1
  tar.write_bytes(data)
  os.utime(tar, ns=(1, tar.stat().st_mtime_ns + 10**6))
  with pytest.raises(errors.UserError, match='written to') as caught:
    load('imagenet2012', tmp_path)
  assert caught.value.where.endswith('in ILSVRC2012_img_train.tar')
  preparation.prepare('imagenet2012', tmp_path)
  assert load('imagenet2012', tmp_path).fingerprint != before.fingerprint


def test_leaks_are_found_in_tars(tmp_path):
  write_imagenet(tmp_path / 'imagenet1k')
  make_tars(tmp_path)
  nette = write_class_folders(tmp_path / 'imagenette2')
  name = 'ILSVRC2012_val_00000004.JPEG'
  write_image(nette / 'train' / 'n02' / name, 7)
  write_image(nette / 'train' / 'n03' / 'renamed.JPEG', 60)  # The fifth.
  stages = {x: load(x, tmp_path) for x in ('imagenette', 'imagenet2012')}
  found = leaks.find_overlap(stages).leaks
  assert {(x.train_file, x.eval_file, x.reason) for x in found} >= {
    (name, name, 'name'),
    ('renamed.JPEG', 'ILSVRC2012_val_00000002.JPEG', 'content'),
  }


@pytest.mark.parametrize('table', ['meta.mat', 'map_clsloc.txt'])
@pytest.mark.parametrize('place', ['ILSVRC2012_devkit_t12/data', 'data', ''])
def test_prepare_says_whence_the_labels_are(tmp_path, table, place):
  flatten_val(write_imagenet(tmp_path / 'raw'))
  write_kit(tmp_path / 'kit', table)
  target = tmp_path / 'raw' / place
  shutil.copytree(tmp_path / 'kit', target, dirs_exist_ok=True)
  raw = layouts.list_folder(tmp_path / 'raw')
  prefix = f'{place}/' if place else ''
  assert raw.labels_from == (
    f'{prefix}ILSVRC2012_validation_ground_truth.txt and {prefix}{table}'
  )
  assert sorted(names(raw, 'validation'))[0] == (
    'n01',
    'ILSVRC2012_val_00000001.JPEG',
  )


def test_tfds_knows_the_labels_of_ilsvrcs_names(tmp_path):
  wnids = ('n01751748', 'n09193705')  # Of its first two validation images.
  for i, wnid in enumerate(wnids):
    write_image(tmp_path / 'train' / wnid / f'{wnid}_1.JPEG', i)
    write_image(tmp_path / 'val' / f'ILSVRC2012_val_{i + 1:08d}.JPEG', 9 + i)
  raw = layouts.list_folder(tmp_path)
  assert [x for x, _ in names(raw, 'validation')] == list(wnids)
  assert 'tfds' in raw.labels_from


@pytest.mark.parametrize(
  ('file', 'text', 'message'),
  [
    ('meta.mat', 'MATLAB 5.0', r'meta\.mat cannot be read'),
    ('map_clsloc.txt', 'n01 one kit_fox', 'A line should be a WNID, a number'),
    ('map_clsloc.txt', 'n01 1 kit_fox', "has no class '3'"),
  ],
)
def test_a_wrong_table_is_named(tmp_path, file, text, message):
  flatten_val(write_imagenet(tmp_path))
  write_kit(tmp_path / 'data', file)
  (tmp_path / 'data' / file).write_text(text)
  with pytest.raises(errors.UserError, match=message) as caught:
    layouts.list_folder(tmp_path)
  assert f'{tmp_path}/data/{file}' in caught.value.where


def write_nested(root, splits=('train', 'val')):
  for split in splits:
    for i, name in enumerate(('animal/cat', 'animal/dog', 'car', 'tree/a/oak')):
      write_image(root / split / name / f'{i}.jpg', i)
  return root


def test_classes_may_be_nested(tmp_path):
  write_nested(tmp_path)
  (tmp_path / 'train' / 'animal' / 'notes.txt').write_text('')
  dataset = load(f'folder:{tmp_path}', tmp_path / 'data')
  assert dataset.classes == ('animal/cat', 'animal/dog', 'car', 'tree/a/oak')
  assert [x['wnid'] for x in read_all(dataset.eval)] == [
    dataset.classes[x] for x in dataset.eval.labels
  ]
  assert '.txt (train/animal/notes.txt)' in dataset.left_out


def test_folders_beside_the_images_of_a_class_are_no_classes(tmp_path):
  write_class_folders(tmp_path)
  write_image(tmp_path / 'train' / 'n01' / 'thumbs' / 'a.jpg', 1)
  raw = layouts.list_folder(tmp_path)
  assert raw.classes == WNIDS
  assert raw.left_out == (('folder', 'train/n01/thumbs'),)


def name_the_split(root):
  write_class_folders(root / 'pets')
  return root / 'pets' / 'train', f'Did you mean {root}/pets?'


def name_what_is_above(root):
  for name in ('cats', 'dogs'):
    write_class_folders(root / 'all' / name)
  return root / 'all', f'Did you mean {root}/all/cats or {root}/all/dogs?'


def call_it_training(root):
  (write_class_folders(root / 'pets') / 'train').rename(root / 'pets/Training')
  return root / 'pets', 'Is it Training/? Then call it train/.'


def call_it_dev(root):
  write_class_folders(root / 'pets', val_name='dev')
  return root / 'pets', 'Is it dev/? Then call it val/.'


def split_nothing(root):
  (write_class_folders(root / 'pets') / 'train').rename(root / 'all')
  return root / 'all', 'Classes such as n01/ belong into train/ and val/.'


def test_of_anyones_folder_a_list_may_name_more_classes(tmp_path):
  root = write_class_folders(tmp_path / 'some')
  (root / 'wnids.txt').write_text('n01\nn02\nn03\nn04\n')
  assert load(f'folder:{root}', tmp_path / 'data').num_classes == 3
  (root / 'wnids.txt').write_text('n01\n')
  assert load(f'folder:{root}', tmp_path / 'data').num_classes == 3


def test_an_image_beside_those_of_tiny_imagenet_is_left_out(tmp_path):
  before = layouts.list_folder(write_tiny_imagenet(tmp_path))
  write_image(tmp_path / 'train' / 'n01' / 'x.JPEG', 1)
  raw = layouts.list_folder(tmp_path)
  assert raw.fingerprint == before.fingerprint
  assert [x.path for x in raw.left_out] == ['train/n01/x.JPEG']
  (tmp_path / 'train' / 'n02' / 'images').rename(tmp_path / 'n02')
  (tmp_path / 'n02').rename(tmp_path / 'train' / 'n02' / 'other')
  (tmp_path / 'train' / 'n02' / 'images').mkdir()
  write_image(tmp_path / 'train' / 'n02' / 'y.JPEG', 1)
  images = names(layouts.list_folder(tmp_path), 'train')
  assert [y for x, y in images if x == 'n02'] == ['y.JPEG']


def test_what_was_prepared_before_more_lists_were_read_stays(tmp_path):
  root, data_dir = write_class_folders(tmp_path / 'some'), tmp_path / 'data'
  (root / 'LOC_synset_mapping.txt').write_text('n01 tench, Tinca tinca\n')
  dataset = f'folder:{root}'
  preparation.prepare(dataset, data_dir)
  folder = pathlib.Path(preparation.find_prepared(dataset, data_dir).data_dir)
  (folder / 'raw_folder.json').unlink()
  path = folder / 'metadata.json'
  noted = json.loads(path.read_text())
  assert noted.pop('labels_from') == ''
  noted['class_names'] = ['n01', 'n02', 'n03']
  path.write_text(json.dumps(noted))
  assert preparation.check_dataset(dataset, data_dir) == 'prepared'
  preparation.prepare(dataset, data_dir)
  assert load(dataset, data_dir).class_names == ('n01', 'n02', 'n03')


def misspell(root):
  write_class_folders(root / 'Pets')
  return root / 'pet', f'Did you mean {root}/Pets?'


def name_a_file(root):
  (root / 'pets.zip').write_bytes(b'PK')
  return root / 'pets.zip', 'It is a file: unpack it, or name the folder'


@pytest.mark.parametrize(
  'mistake',
  [
    name_the_split,
    name_what_is_above,
    call_it_training,
    call_it_dev,
    split_nothing,
    misspell,
    name_a_file,
  ],
)
def test_the_folder_meant_is_named(tmp_path, mistake):
  folder, advice = mistake(tmp_path)
  with pytest.raises(errors.UserError) as caught:
    load(f'folder:{folder}', tmp_path / 'data')
  assert caught.value.suggestion.startswith(advice)
  assert len(str(caught.value).split('\n')) == 3


def test_a_named_dataset_under_another_name_is_named(tmp_path):
  wnids = tuple(f'n{i}' for i in range(10))
  write_class_folders(tmp_path / 'nette', wnids, train=1, val=1)
  with pytest.raises(errors.UserError) as caught:
    load('imagenette', tmp_path)
  assert caught.value.suggestion == (
    f'Is it {tmp_path}/nette? Then let {tmp_path}/imagenette2 be a link to it.'
  )
  (tmp_path / 'imagenette2').symlink_to('nette')
  with pytest.raises(errors.UserError) as caught:
    load('imagenette', tmp_path / 'imagenette2')
  assert caught.value.suggestion == (
    f'Did you mean --config.data_dir={tmp_path}?'
  )
  assert load('imagenette', tmp_path).num_classes == 10


def cut(data):
  return data[: len(data) // 2]


def damage(data):
  place = data.index(b'ustar', 1024)
  return data[: place - 9] + b'x' + data[place - 8 :]


@pytest.mark.parametrize('change', [cut, damage])
@pytest.mark.parametrize('tar', ['train', 'val'])
def test_damaged_tars_are_refused(tmp_path, tar, change):
  root = write_imagenet(tmp_path / 'imagenet1k')
  make_tars(tmp_path)
  path = root / f'ILSVRC2012_img_{tar}.tar'
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(errors.UserError, match='archive cannot be read') as e:
    load('imagenet2012', tmp_path)
  assert e.value.where == str(path)


def test_a_tar_of_something_else_is_refused(tmp_path):
  root = write_imagenet(tmp_path / 'imagenet1k')
  pack(root / 'ILSVRC2012_img_train.tar', root / 'val', WNIDS)
  shutil.rmtree(root / 'train')
  with pytest.raises(errors.UserError, match='and no tar of a class') as caught:
    load('imagenet2012', tmp_path)
  assert 'ILSVRC2012_val_00000001.JPEG' in caught.value.what


def test_a_tar_within_a_tar_that_reaches_beyond_its_end(tmp_path):
  """Such a one would hold what follows it."""
  root = write_imagenet(tmp_path / 'imagenet1k')
  make_tars(tmp_path)
  path = root / 'ILSVRC2012_img_train.tar'
  with tarfile.open(path) as tar:
    inner = {x.name: tar.extractfile(x).read() for x in tar}
  with tarfile.open(path, 'w') as tar:
    for name, data in inner.items():
      member = tarfile.TarInfo(name)
      member.size = 1024  # The first image ends later.
      tar.addfile(member, io.BytesIO(data))
  with pytest.raises(errors.UserError, match='ends in the middle'):
    load('imagenet2012', tmp_path)

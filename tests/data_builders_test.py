import os
import pathlib
import time

import pytest
from data_fixtures import (
  WNIDS,
  write_class_folders,
  write_image,
  write_tiny_imagenet,
)
from sklearn import datasets

from jaxprog import errors
from jaxprog.data import builders


def names(raw, split):
  return [(x.wnid, x.file_name) for x in raw.images(split)]


def test_class_folders_are_listed_in_sorted_order(tmp_path):
  raw = builders.list_class_folders(write_class_folders(tmp_path))
  assert raw.classes == WNIDS
  assert raw.num_images == 3 * (5 + 2)
  assert names(raw, 'validation') == [
    (w, f'{w}_val_{j}.JPEG') for w in WNIDS for j in range(2)
  ]
  first = next(iter(raw.images('train')))
  assert first.data == tmp_path / 'train' / 'n01' / 'n01_train_0.JPEG'


def test_other_files_are_ignored(tmp_path):
  write_class_folders(tmp_path)
  before = builders.list_class_folders(tmp_path)
  (tmp_path / 'train' / '.DS_Store').write_text('')
  (tmp_path / 'train' / 'readme.txt').write_text('')
  (tmp_path / 'train' / 'n01' / 'notes.txt').write_text('')
  (tmp_path / 'train' / 'n01' / '._n01_train_0.JPEG').write_text('')
  (tmp_path / 'train' / '.cache').mkdir()
  assert builders.list_class_folders(tmp_path).fingerprint == before.fingerprint


@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'test'])
def test_a_folder_may_name_its_eval_split(tmp_path, name):
  write_class_folders(tmp_path, val_name=name)
  raw = builders.list_raw('folder:any', tmp_path)
  assert len(names(raw, 'validation')) == 6


def test_tiny_imagenet_takes_flat_val_labels_and_sorts_wnids(tmp_path):
  raw = builders.list_tiny_imagenet(write_tiny_imagenet(tmp_path))
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
  raw = builders.list_imagenet(tmp_path)
  assert sorted(names(raw, 'validation')) == [
    ('n01', 'v_2.JPEG'),
    ('n02', 'v_1.JPEG'),
    ('n03', 'v_0.JPEG'),
  ]


def test_imagenet_reads_names_of_kaggle(tmp_path):
  write_class_folders(tmp_path)
  (tmp_path / 'LOC_synset_mapping.txt').write_text('n02 tench, Tinca tinca\n')
  assert builders.list_imagenet(tmp_path).class_names == ('n01', 'tench', 'n03')


def test_every_fifth_digit_is_for_evaluation():
  raw = builders.list_digits()
  digits = datasets.load_digits()
  found = {split: list(raw.images(split)) for split in ('train', 'validation')}
  expected = [f'digit_{i:04d}.png' for i in range(0, 1797, 5)]
  assert [x.file_name for x in found['validation']] == expected
  assert len(found['train']) + len(expected) == raw.num_images
  assert [x.wnid for x in found['validation']] == [
    str(x) for x in digits.target[::5]
  ]


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
    builders.list_class_folders(tmp_path)
  assert caught.value.what == message
  assert str(tmp_path) in caught.value.where


def test_wrong_flat_labels_are_named(tmp_path):
  write_tiny_imagenet(tmp_path)
  annotations = tmp_path / 'val' / 'val_annotations.txt'
  good = annotations.read_text()
  annotations.write_text(good.replace('n02', 'n07'))
  with pytest.raises(errors.UserError, match="Class 'n07' is not among"):
    builders.list_tiny_imagenet(tmp_path)
  annotations.write_text(good.replace('val_4.JPEG\t', 'val_9.JPEG\t'))
  with pytest.raises(errors.UserError, match=r'val_4\.JPEG has no label'):
    builders.list_tiny_imagenet(tmp_path)
  annotations.unlink()
  with pytest.raises(errors.UserError, match='cannot be read'):
    builders.list_tiny_imagenet(tmp_path)


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
  name = 'tiny_imagenet' if is_tiny else 'imagenet2012'
  with pytest.raises(errors.UserError) as caught:
    builders.list_raw(name, tmp_path)
  assert caught.value.what == message
  assert str(tmp_path) in caught.value.where


def test_what_lists_say_twice_or_of_no_image_is_no_contradiction(tmp_path):
  write_flat_val(tmp_path)
  (tmp_path / 'LOC_val_solution.csv').write_text(CSV + 'v_2,n03 5\nv_7,n01 1')
  raw = builders.list_imagenet(tmp_path)
  assert len(names(raw, 'validation')) == 3
  assert raw.left_out == (('label of no image', 'val/v_7.JPEG'),)


def test_a_csv_may_have_no_header(tmp_path):
  write_flat_val(tmp_path)
  # Nor is a spreadsheet's empty line one of it.
  lines = f',\n{CSV.split(chr(10), 1)[1]}'
  (tmp_path / 'LOC_val_solution.csv').write_text(lines)
  assert builders.list_imagenet(tmp_path).num_images == 18


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('file', ['wnids.txt', 'words.txt', 'annotations'])
def test_lists_may_begin_with_a_byte_order_mark(tmp_path, encoding, file):
  raw = builders.list_tiny_imagenet(write_tiny_imagenet(tmp_path))
  path = tmp_path / file
  if file == 'annotations':
    path = tmp_path / 'val' / 'val_annotations.txt'
  lines = path.read_text().replace('goldfish', 'Zährte')
  path.write_bytes(lines.replace('\n', '\r\n').encode(encoding))
  again = builders.list_tiny_imagenet(tmp_path)
  assert again.fingerprint == raw.fingerprint
  first = 'Zährte' if file == 'words.txt' else 'goldfish'
  assert again.class_names == (first, 'n02', 'bee')


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16-le', 'utf-32'])
def test_other_encodings_are_named(tmp_path, encoding):
  write_tiny_imagenet(tmp_path)
  text = 'n01\ngoldfish\nn02\tZährte\n'
  (tmp_path / 'words.txt').write_bytes(text.encode(encoding))
  with pytest.raises(errors.UserError, match='is not text in UTF-8') as caught:
    builders.list_tiny_imagenet(tmp_path)
  assert 'Save it in UTF-8' in caught.value.suggestion
  if encoding == 'latin-1':
    assert 'line 3' in caught.value.what


def test_a_list_that_is_a_pipe_is_not_waited_for(tmp_path):
  write_tiny_imagenet(tmp_path)
  (tmp_path / 'wnids.txt').unlink()
  os.mkfifo(tmp_path / 'wnids.txt')
  with pytest.raises(errors.UserError, match='cannot be read: it is no file'):
    builders.list_tiny_imagenet(tmp_path)


@pytest.mark.parametrize('folder', ['train', 'val/images', 'train/n01/images'])
def test_tiny_imagenet_ignores_hidden_folders(tmp_path, folder):
  write_tiny_imagenet(tmp_path)
  before = builders.list_tiny_imagenet(tmp_path)
  write_image(tmp_path / folder / '.ipynb_checkpoints' / 'a.JPEG', 1)
  assert builders.list_tiny_imagenet(tmp_path).fingerprint == before.fingerprint


def test_a_flat_val_folder_ignores_hidden_folders(tmp_path):
  write_flat_val(tmp_path)
  (tmp_path / 'LOC_val_solution.csv').write_text(CSV)
  (tmp_path / 'val' / '.ipynb_checkpoints').mkdir()
  assert builders.list_imagenet(tmp_path).num_images == 18


def test_thousands_of_classes_are_checked_in_linear_time():
  # Looked up in a list, these take 20 s.
  classes = [f'class_{i:05}' for i in range(20_000)]
  splits = {s: {x: [('a', 1)] for x in classes} for s in ('train', 'val')}
  began = time.process_time()
  builders._check_classes(pathlib.Path(), classes, splits)
  assert time.process_time() - began < 2


def test_flat_val_without_labels_says_what_is_accepted(tmp_path):
  write_class_folders(tmp_path, val=0)
  write_image(tmp_path / 'val' / 'v_0.JPEG', 0)
  with pytest.raises(errors.UserError, match=r'val_labels\.txt'):
    builders.list_imagenet(tmp_path)


def test_fingerprint_is_of_names_and_sizes_not_of_the_place(tmp_path):
  a = builders.list_class_folders(write_class_folders(tmp_path / 'a'))
  b = builders.list_class_folders(write_class_folders(tmp_path / 'b'))
  assert a.fingerprint == b.fingerprint
  image = tmp_path / 'b' / 'train' / 'n01' / 'n01_train_0.JPEG'
  image.write_bytes(image.read_bytes() + b' ')
  longer = builders.list_class_folders(tmp_path / 'b')
  image.rename(image.with_name('other.JPEG'))
  renamed = builders.list_class_folders(tmp_path / 'b')
  assert len({a.fingerprint, longer.fingerprint, renamed.fingerprint}) == 3

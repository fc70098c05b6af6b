import json

import pytest
from data_fixtures import encode, photo, write_class_folders, write_image

from jaxprog import errors, start_from
from jaxprog.tools import audit

LEAK = 'n01440764/ILSVRC2012_val_00000001.JPEG'


@pytest.fixture
def config(tmp_path):
  """Two small stages without leaks, of images of 64 px."""
  config = start_from('default')
  config.data_dir = str(tmp_path)
  for stage, first in (('nette', 0), ('other', 100)):
    for i in range(8):
      split = 'train' if i < 5 else 'val'
      folder = tmp_path / ('imagenette2' if stage == 'nette' else 'other')
      path = folder / split / 'n01440764' / f'{stage}{i}.JPEG'
      write_image(path, first + i, size=64)
  config.stages = [
    {'name': 'nette', 'dataset': 'imagenette'},
    {'name': 'other', 'dataset': f'folder:{tmp_path}/other'},
  ]
  return config


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')


def plant(tmp_path):
  write_image(tmp_path / 'imagenette2' / 'train' / LEAK, 50, size=64)
  # The other stage trains on a copy of one of Imagenette's val images.
  copy = encode(photo(64, 64, 6), 'JPEG', quality=70)
  (tmp_path / 'other' / 'train' / 'n01440764' / 'copy.JPEG').write_bytes(copy)


def test_without_leaks_the_exit_code_is_0(config, capsys):
  assert audit.audit(config) == 0
  output = capsys.readouterr().out
  assert output.splitlines()[-1] == 'No training image is an evaluation image.'
  assert '->' not in output


def test_leaks_are_shown_and_written(config, tmp_path, capsys):
  plant(tmp_path)
  assert audit.audit(config, tmp_path / 'run') == 1
  lines = capsys.readouterr().out.splitlines()
  assert max(len(x) for x in lines if str(tmp_path) not in x) <= 80
  rows = {x.split()[0]: x.split()[1:] for x in lines if x.strip()}
  assert rows['nette'] == ['6', '1', '0', '0', 'imagenet2012', '(1)']
  assert rows['other'] == ['6', '0', '0', '1', 'nette', '(1)']
  assert '  nette/ILSVRC2012_val_00000001.JPEG -> imagenet2012' in lines
  assert '  other/copy.JPEG -> nette/nette6.JPEG' in lines
  assert '2 training images leak' in lines[-1]
  assert '--config.exclude_leaks=True' in lines[-1]
  written = json.loads((tmp_path / 'run' / 'audit.json').read_text())
  assert [x['excluded'] for x in written['stages']] == [1, 1]
  assert [x['reason'] for x in written['leaks']] == ['name', 'perceptual']
  assert written['leaks'][1] | {'train_index': 0, 'eval_index': 0} == {
    'train_stage': 'other',
    'train_index': 0,
    'train_file': 'copy.JPEG',
    'eval_stage': 'nette',
    'eval_index': 0,
    'eval_file': 'nette6.JPEG',
    'reason': 'perceptual',
  }


def test_leaks_that_are_kept_out_are_no_mistake(config, tmp_path, capsys):
  plant(tmp_path)
  config.exclude_leaks = True
  assert audit.audit(config) == 0
  assert (
    capsys.readouterr()
    .out.splitlines()[-1]
    .startswith('2 training images kept out')
  )


def test_only_and_skip_choose_what_is_compared(config, tmp_path, capsys):
  plant(tmp_path)
  assert audit.audit(config, only=('other',)) == 0
  assert audit.audit(config, skip=('other',)) == 1
  assert '1 training image leaks:' in capsys.readouterr().out


def test_a_missing_dataset_is_said(config, tmp_path, capsys):
  write_image(tmp_path / 'imagenette2' / 'val' / LEAK, 50, size=64)
  config.stages += [
    {'name': 'big', 'dataset': 'imagenet2012'},
    {'name': 'tiny', 'dataset': 'tiny_imagenet'},
  ]
  assert audit.audit(config, tmp_path / 'run') == 0
  lines = capsys.readouterr().out.splitlines()
  assert 'big: imagenet2012 is not here; known by name.' in lines
  assert 'tiny: tiny_imagenet is not here; left out.' in lines
  assert 'nette and big share 1 evaluation image, not excluded.' in lines
  written = json.loads((tmp_path / 'run' / 'audit.json').read_text())
  assert written['absent'] == {'big': 'imagenet2012', 'tiny': 'tiny_imagenet'}
  assert len(written['shared_evaluation']) == 1


def test_no_dataset_at_all_is_a_mistake(config, tmp_path):
  config.stages = [{'name': 'tiny', 'dataset': 'tiny_imagenet'}]
  with pytest.raises(errors.UserError, match='tiny_imagenet'):
    audit.audit(config)


def test_a_changed_dataset_is_a_mistake(config, tmp_path):
  audit.audit(config)
  (tmp_path / 'imagenette2/train/n01440764/nette1.JPEG').unlink()
  with pytest.raises(errors.UserError, match='changed'):
    audit.audit(config)


def test_damaged_images_are_counted(config, tmp_path, capsys):
  file = tmp_path / 'imagenette2/train/n01440764/nette1.JPEG'
  file.write_bytes(file.read_bytes()[:300])
  assert audit.audit(config) == 0
  assert 'nette: 1 image cannot be read' in capsys.readouterr().out


def test_examples_are_of_every_kind_and_ten_at_most(tmp_path, capsys):
  config = start_from('default')
  config.data_dir = str(tmp_path)
  # The four evaluation images of each class are training images too.
  root = write_class_folders(tmp_path / 'imagenette2', val=4)
  write_image(root / 'train' / 'n03' / 'ILSVRC2012_val_00000001.JPEG', 999)
  config.stages = [{'name': 'nette', 'dataset': 'imagenette'}]
  assert audit.audit(config) == 1
  lines = capsys.readouterr().out.splitlines()
  examples = [x for x in lines if '->' in x]
  assert len(examples) == 10
  assert '10 of 13 pairs:' in lines
  assert sum('imagenet2012' in x for x in examples) == 1

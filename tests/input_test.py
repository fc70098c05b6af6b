"""What users see of the input pipeline, in whole runs."""

import os
import pathlib
import signal

import numpy as np
import pytest
import runs
from data_fixtures import encode, write_class_folders, write_image

CONFIG = 'tests/input_config.py'


@pytest.fixture
def folder(tmp_path):
  write_class_folders(tmp_path / 'raw', train=40, val=4)
  return tmp_path


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A finished run that uses everything."""
  folder = tmp_path_factory.mktemp('input')
  write_class_folders(folder / 'raw', train=40, val=4)
  result = runs.call_main(
    f'--config={CONFIG}:{folder}', f'--workdir={folder}/run'
  )
  assert result.returncode == 0, result.stderr
  return folder, result


def only_stage(workdir):
  (stage,) = runs.read_history(workdir)['stages']
  return stage


def test_the_history_says_what_was_read_and_how(trained):
  folder, _ = trained
  stage = only_stage(folder / 'run')
  assert stage['data_version'] == '1.0.0+jpeg.18.90'
  assert stage['decoder'].startswith(('turbojpeg', 'pillow'))
  assert stage['eval_image_size'] == 24
  assert stage['phases'] == [
    [1, {'image_size': 24, 'mixup_alpha': 0.2}],
    [2, {'batch_size': 32, 'cutmix_alpha': 1.0}],
  ]
  assert len(stage['epochs']) == 3
  assert stage['epochs'][1]['global_step'] == 2 * stage['steps_per_epoch']


def test_a_holdout_selects_and_validation_is_looked_at_once(trained):
  folder, result = trained
  stage = only_stage(folder / 'run')
  assert stage['eval_split'] == 'holdout:20%'
  assert stage['num_train_images'] + stage['num_eval_images'] == 120
  assert 10 < stage['num_eval_images'] < 40
  validation = stage['validation']
  assert validation['num_images'] == 12
  assert validation['epoch'] == stage['best']['epoch']
  assert result.stdout.count('validation top-1') == 1
  report = (folder / 'run' / 'training_report.txt').read_text()
  assert 'holdout:20%' in report


def test_eval_is_of_the_true_validation_images(trained):
  folder, _ = trained
  result = runs.call_main('--mode=eval', f'--workdir={folder}/run')
  assert result.returncode == 0, result.stderr
  top1 = only_stage(folder / 'run')['validation']['top1']
  assert result.stdout.strip() == f'{100 * top1:.1f}'


def test_prepare_stores_what_training_reads(folder):
  config = f'--config={CONFIG}:{folder}'
  result = runs.call_main(config, '--mode=prepare')
  assert result.returncode == 0, result.stderr
  assert '1.0.0+jpeg.18.90' in result.stdout
  (pack,) = (folder / 'data').rglob('images.bin')
  before = pack.stat().st_mtime_ns
  result = runs.call_main(config, '--mode=prepare')
  assert pack.stat().st_mtime_ns == before


def break_images(folder, count):
  """Damages so many training images of one class; returns their names."""
  content = (b'<html>Not Found</html>', b'', b'\xff\xd8\xff\xe0')
  names = []
  for i in range(count):
    name = f'n02_train_{i}.JPEG'
    (folder / 'raw/train/n02' / name).write_bytes(content[i % 3])
    names.append(f'n02/{name}')
  return names


@pytest.mark.parametrize('storage', ['original', 'raw'])
def test_bad_images_are_counted_and_named(folder, storage):
  names = break_images(folder, 3)
  (folder / 'raw/val/n01/n01_val_0.JPEG').write_bytes(b'')
  result = runs.call_main(
    f'--config={CONFIG}:{folder}',
    f'--workdir={folder}/run',
    f'--config.stages[0].storage={storage}',
    '--config.stages[0].eval_split=validation',
    '--config.stages[0].num_epochs=1',
    '--config.stages[0].batch_size=24',
    '--config.stages[0].phases=()',
  )
  assert result.returncode == 0, result.stderr
  stage = only_stage(folder / 'run')
  assert sorted(stage['bad_images']) == sorted([*names, 'n01/n01_val_0.JPEG'])
  for name in names:
    assert f'cannot decode {name}' in result.stdout
  report = (folder / 'run' / 'training_report.txt').read_text()
  assert '4 images could not be decoded' in report


def test_too_many_bad_images_end_the_run(folder):
  names = break_images(folder, 4)
  result = runs.call_main(
    f'--config={CONFIG}:{folder}',
    f'--workdir={folder}/run',
    '--config.max_bad_images=3',
    '--config.stages[0].eval_split=validation',
    '--config.stages[0].num_epochs=1',
    '--config.stages[0].batch_size=24',
    '--config.stages[0].phases=()',
  )
  assert result.returncode == 1
  assert '4 images' in result.stderr
  assert 'max_bad_images = 3' in result.stderr
  assert any(name in result.stderr for name in names)
  assert '--mode=verify' in result.stderr


def test_leaks_are_kept_out_of_every_stage(folder):
  for i, path in enumerate(sorted(folder.glob('raw/val/*/*'))):
    write_image(path, 1000 + i)
  train = folder / 'raw/train/n01'
  leak = train / 'ILSVRC2012_val_00000001.JPEG'
  leak.write_bytes((train / 'n01_train_0.JPEG').read_bytes() + b' ')
  (train / 'copy.JPEG').write_bytes(
    (folder / 'raw/val/n02/n02_val_1.JPEG').read_bytes()
  )
  config = f'--config={CONFIG}:{folder}'
  result = runs.call_main(config, '--mode=audit')
  assert result.returncode == 1
  assert '2 training images leak' in result.stdout
  result = runs.call_main(
    config,
    '--config.exclude_leaks=True',
    f'--workdir={folder}/run',
    '--config.stages[0].num_epochs=1',
    '--config.stages[0].phases=()',
  )
  assert result.returncode == 0, result.stderr
  stage = only_stage(folder / 'run')
  assert stage['excluded_images'] == {'name': 1, 'content': 1, 'perceptual': 0}
  # 122 training images, the leaks and the hold-out left out.
  assert stage['num_train_images'] + stage['num_eval_images'] == 120
  report = (folder / 'run' / 'training_report.txt').read_text()
  assert '2 training images were left out' in report


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_images(folder):
  arguments = f'--config={CONFIG}:{folder}', f'--workdir={folder}/run'
  process = runs.start_main(*arguments, '--config.checkpoint_every_steps=1')
  runs.wait_for_step(process, folder / 'run', 'all', 2)
  process.kill()
  process.communicate()
  write_image(folder / 'raw/train/n01/more.JPEG', 7)
  write_image(folder / 'raw/train/n01/and_more.JPEG', 8)
  assert runs.call_main(arguments[0], '--mode=prepare').returncode == 0
  result = runs.call_main(*arguments)
  assert result.returncode == 2
  assert 'training images; there are' in result.stderr
  assert len(result.stderr.strip().split('\n')) == 3


@pytest.mark.slow
def test_a_run_that_waits_for_its_input_says_so(run_main, folder):
  rng = np.random.default_rng(0)
  for path in (folder / 'raw').glob('train/*/*'):
    path.write_bytes(
      encode(rng.integers(0, 256, (1000, 1200, 3), np.uint8), 'PNG')
    )
  result = run_main(
    f'--config={CONFIG}:{folder}',
    f'--workdir={folder}/run',
    '--config.num_workers=1',
    '--config.stages[0].storage=original',
    '--config.stages[0].num_epochs=2',
    '--config.stages[0].phases=()',
  )
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  (said,) = [i for i, x in enumerate(lines) if 'limited by its input' in x]
  # Below a row, and not that of the epoch in which workers begin.
  assert 'event=epoch stage=all epoch=2/2' in lines[said - 1]
  assert len(lines[said]) < 120
  stage = only_stage(folder / 'run')
  assert stage['epochs'][0]['input_wait'] > 0.05
  assert 'workers would do, there are 1' in stage['input_limit']
  assert "storage='raw:24'" in stage['input_limit']
  report = (folder / 'run' / 'training_report.txt').read_text()
  assert 'limited by its input' in report


def worker_processes(pid):
  """Returns the data workers of a run."""
  children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text()
  return [
    child
    for child in map(int, children.split())
    if b'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
  ]


@pytest.mark.slow
def test_killed_workers_do_not_change_a_run(trained, folder):
  process = runs.start_main(
    f'--config={CONFIG}:{folder}',
    f'--workdir={folder}/run',
    '--config.worker_kind=process',
    '--config.checkpoint_every_steps=1',
  )
  try:
    runs.wait_for_step(process, folder / 'run', 'all', 2)
    for pid in runs.wait_for(lambda: worker_processes(process.pid)):
      os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
  finally:
    process.kill()
  assert process.returncode == 0, output
  expected, got = (
    runs.without_times(only_stage(x / 'run')) for x in (trained[0], folder)
  )
  # The folders' names differ, and nothing else.
  assert expected.pop('dataset') != got.pop('dataset')
  assert got == expected
  assert runs.bits(folder / 'run', 'all') == runs.bits(
    trained[0] / 'run', 'all'
  )

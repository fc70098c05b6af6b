"""Checkpoints are damaged on disk; what the command line makes of it."""

import os
import pathlib
import pickle
import shutil
import subprocess
from unittest import mock

import mounts
import numpy as np
import pytest
import runs

from jaxprog.reliability import checkpoints, integrity

STAGE = 'three'
ARGUMENTS = (
  f'--only={STAGE}',
  '--config.stages[0].num_epochs=4',
  '--config.checkpoint_every_steps=3',
)


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory):
  """An uninterrupted run, and what a kill on its way would have left.

  That is a copy from where better weights are whole, and the state that knows
  of them is not, with two intact steps or more.
  """
  folder = tmp_path_factory.mktemp('trained')
  whole, killed = folder / 'whole', folder / 'killed'
  save_latest = checkpoints.Checkpoints.save_latest

  def copy_and_save(self, state, meta, *rest):
    record = meta['record']
    epochs, best = record['epochs'], record['best']
    if len(epochs) > 1 and best['epoch'] == len(epochs) and not killed.exists():
      self.wait()
      # The lock would be of a process that lives.
      left_out = shutil.ignore_patterns('run.lock', '.*.tmp')
      shutil.copytree(whole, killed, ignore=left_out)
    save_latest(self, state, meta, *rest)

  with mock.patch.object(checkpoints.Checkpoints, 'save_latest', copy_and_save):
    result = runs.call_main(config, *ARGUMENTS, f'--workdir={whole}')
  assert result.returncode == 0, result.stderr
  assert not (killed / 'checkpoints' / STAGE / 'done.json').exists()
  return whole, killed


@pytest.fixture(scope='module')
def uninterrupted(trained):
  return trained[0]


@pytest.fixture(scope='module')
def expected(uninterrupted):
  """The final weights of an uninterrupted run."""
  return runs.bits(uninterrupted, STAGE)


@pytest.fixture
def workdir(trained, tmp_path):
  return shutil.copytree(trained[1], tmp_path / 'run')


def intact_steps(workdir):
  latest = workdir / 'checkpoints' / STAGE / 'latest'
  found = integrity.inspect(latest)
  return [latest / str(f.step) for f in found if f.status == 'intact']


def data_file(step):
  files = [p for p in (step / 'tree').rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip(step):
  path = data_file(step)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)


def test_a_damaged_step_is_quarantined_and_the_one_before_used(
  config, expected, workdir
):
  *_, before, newest = intact_steps(workdir)
  flip(newest)
  verified = runs.call_main(
    '--mode=verify', '--checkpoints', f'--workdir={workdir}'
  )
  assert verified.returncode == 1, verified.stderr
  assert f'{STAGE}/latest/{newest.name}: damaged' in verified.stdout
  assert newest.is_dir()
  result = runs.call_main(config, *ARGUMENTS, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  said = ' '.join(result.stdout.split())
  assert f'step {newest.name} is damaged, quarantined' in said
  assert f'resumed at step {before.name}' in said
  assert runs.bits(workdir, STAGE) == expected
  verified = runs.call_main(
    '--mode=verify', '--checkpoints', f'--workdir={workdir}'
  )
  assert verified.returncode == 0, verified.stdout
  assert 'intact' in verified.stdout


def test_all_damaged_ends_the_run_again_and_again(config, workdir):
  for step in intact_steps(workdir):
    flip(step)
  for _ in range(2):
    result = runs.call_main(config, *ARGUMENTS, f'--workdir={workdir}')
    assert result.returncode == 1, result.stdout
    assert f"Stage '{STAGE}': all saved states are damaged" in result.stderr
    assert f'remove {workdir}/checkpoints/{STAGE}' in result.stderr
    assert not intact_steps(workdir)
  assert not (workdir / 'checkpoints' / STAGE / 'done.json').exists()


def test_a_kill_between_best_and_latest_loses_neither(
  config, uninterrupted, workdir
):
  _, _, meta = checkpoints.read_latest(workdir, STAGE)
  spoken_of = meta['record']['epochs'][meta['record']['best']['epoch'] - 1]
  best = workdir / 'checkpoints' / STAGE / 'best'
  older, newer = integrity.list_steps(best)
  assert older == spoken_of['global_step'] < newer
  result = runs.call_main(config, *ARGUMENTS, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  for weights in ('best', 'final'):
    wanted = runs.bits(uninterrupted, STAGE, weights)
    assert runs.bits(workdir, STAGE, weights) == wanted
  found, wanted = (
    runs.without_times(runs.read_history(x)) for x in (workdir, uninterrupted)
  )
  assert found == wanted
  assert len(integrity.list_steps(best)) == 1


class Payload:
  """Unpickled, it leaves a file behind."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def plant(folder, trace):
  payload = pickle.dumps(Payload(trace))
  assert b'touch' in payload
  for name in ('checkpoint.pkl', 'config.pickle', 'checkpoint', 'meta.pkl'):
    (folder / name).write_bytes(payload)
  array = np.array([Payload(trace)], dtype=object)
  np.save(folder / 'weights.npy', array, allow_pickle=True)
  code = f'import pathlib\npathlib.Path({str(trace)!r}).touch()\n'
  for name in ('config', 'conftest', 'sitecustomize', 'jaxprog', '__init__'):
    (folder / f'{name}.py').write_text(code)


@pytest.mark.slow
def test_nothing_in_a_workdir_is_executed(run_main, config, workdir, tmp_path):
  trace = tmp_path / 'executed'
  plain = tmp_path / 'plain'
  plain.mkdir()
  plant(plain, trace)
  subprocess.run(['python3', plain / 'config.py'], check=True)
  assert trace.exists()  # The payload works.
  trace.unlink()
  *_, newest = intact_steps(workdir)
  checkpoints = workdir / 'checkpoints'
  folders = (workdir, checkpoints, checkpoints / STAGE, newest, newest / 'tree')
  for folder in (*folders, newest.parent):
    plant(folder, trace)
  data_file(newest).unlink()
  verified = runs.call_main(
    '--mode=verify', '--checkpoints', f'--workdir={workdir}'
  )
  assert verified.returncode == 1, verified.stderr
  # A process of its own imports what it finds.
  result = run_main(config, *ARGUMENTS, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  assert 'damaged, quarantined' in ' '.join(result.stdout.split())
  evaluate = '--mode=eval', f'--workdir={workdir}', f'--stage={STAGE}'
  scored = runs.call_main(*evaluate)
  assert scored.returncode == 0, scored.stderr
  best = checkpoints / STAGE / 'best'
  plant(next(p for p in best.iterdir() if p.name.isdecimal()), trace)
  scored = runs.call_main(*evaluate)
  assert scored.returncode == 1
  assert 'does not belong here' in scored.stderr
  assert not trace.exists()


@pytest.fixture
def own_disk(workdir):
  """The checkpoints of `workdir` on a disk of their own, of 8 MB."""
  path = workdir / 'checkpoints'
  moved = path.rename(workdir / 'moved')
  with mounts.disk(path, 'size=8m'):
    shutil.copytree(moved, path, dirs_exist_ok=True)
    yield path


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_older_steps_stay(
  run_main, config, expected, workdir, own_disk
):
  kept = intact_steps(workdir)
  filler = own_disk / 'filler'
  filler.write_bytes(bytes(shutil.disk_usage(own_disk).free - 2 * 4096))
  result = run_main(config, *ARGUMENTS, f'--workdir={workdir}')
  assert result.returncode == 1, result.stdout
  (line,) = [x for x in result.stderr.splitlines() if 'Failed:' in x]
  assert f'The disk of {own_disk}' in line
  assert 'No space left' in line
  assert kept[-1] in intact_steps(workdir)
  filler.unlink()
  result = runs.call_main(config, *ARGUMENTS, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  assert runs.bits(workdir, STAGE) == expected
  assert os.listdir(own_disk) == [STAGE]

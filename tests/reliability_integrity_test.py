import json
import os
import shutil

import jax.numpy as jnp
import pytest

from jaxprog.reliability import checkpoints, integrity
from jaxprog.training import state

KINDS = ('flipped', 'truncated', 'emptied', 'deleted', 'added', 'replaced')


def create_state(step=0):
  return state.TrainState(
    step=jnp.int32(step),
    params={'head': {'kernel': jnp.full((64, 8), step, jnp.float32)}},
    batch_stats={'mean': jnp.arange(5, dtype=jnp.float32)},
    opt_state=(jnp.ones((64, 8)), jnp.int32(step)),
    metrics=state.zero_metrics(),
    rate_scale=jnp.ones(()),
    ema={},
  )


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A finished stage; copy it before it is damaged."""
  directory = tmp_path_factory.mktemp('run') / 'checkpoints' / 'stage'
  with checkpoints.Checkpoints(directory) as manager:
    for step in (3, 6, 9):
      manager.save_latest(create_state(step), {'step': step})
    manager.save_weights('best', 6, create_state(6).variables, {})
    manager.mark_done({'record': {'loss': float('nan'), 'rows': (1, 2)}})
  return directory


@pytest.fixture
def stage(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoints' / 'stage')


def damage(path, kind):
  data = path.read_bytes()
  match kind:
    case 'flipped':
      middle = len(data) // 2
      flipped = bytes([data[middle] ^ 4])
      path.write_bytes(data[:middle] + flipped + data[middle + 1 :])
    case 'truncated':
      path.write_bytes(data[:-1])
    case 'emptied':
      path.write_bytes(b'')
    case 'deleted':
      path.unlink()
    case 'added':
      path.with_name('more').write_bytes(data)
    case 'replaced':  # Reading it would wait for ever.
      path.unlink()
      os.mkfifo(path)


def files_of(directory):
  return sorted(p for p in directory.rglob('*') if p.is_file())


def statuses(directory):
  return {f.step: f.status for f in integrity.inspect(directory)}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_damage_to_every_file_is_found(saved, tmp_path, kind):
  names = [
    p.relative_to(saved / 'latest/9') for p in files_of(saved / 'latest/9')
  ]
  assert len(names) >= 5
  for number, name in enumerate(names):
    step = shutil.copytree(saved / 'latest/9', tmp_path / str(number))
    assert integrity.find_damage(step) == ''
    damage(step / name, kind)
    found = integrity.find_damage(step)
    assert found
    if name.name != integrity.MANIFEST or kind == 'added':
      assert ('more' if kind == 'added' else name.as_posix()) in found


def test_no_bit_of_a_manifest_can_flip_unseen(stage):
  path = stage / 'latest/9' / integrity.MANIFEST
  data = path.read_bytes()
  for index in range(0, len(data), 5):
    flipped = bytes([data[index] ^ 1 << index % 8])
    path.write_bytes(data[:index] + flipped + data[index + 1 :])
    assert integrity.find_damage(path.parent), index
  path.write_bytes(data)
  assert not integrity.find_damage(path.parent)


@pytest.mark.parametrize(
  'text', ['', '[]', '{"files": 3}', '{"files": {"a": 1}}']
)
def test_a_manifest_that_is_none_is_damage(stage, text):
  path = stage / 'latest/9' / integrity.MANIFEST
  path.write_text(text)
  assert 'manifest.json is unreadable' in integrity.find_damage(path.parent)


def test_a_manifest_names_each_file_with_its_size(saved):
  step = saved / 'latest/9'
  written = json.loads((step / integrity.MANIFEST).read_text())
  sizes = {
    p.relative_to(step).as_posix(): p.stat().st_size
    for p in files_of(step)
    if p.name != integrity.MANIFEST
  }
  assert {k: v['size'] for k, v in written['files'].items()} == sizes


def test_a_step_without_manifest_is_damaged_unless_it_was_being_saved(stage):
  latest = stage / 'latest'
  (latest / '9' / integrity.MANIFEST).unlink()
  assert statuses(latest) == {6: 'intact', 9: 'damaged'}
  (latest / '.saving-9').touch()
  assert statuses(latest) == {6: 'intact', 9: 'unfinished'}
  integrity.sweep(latest)
  assert statuses(latest) == {6: 'intact'}
  assert sorted(p.name for p in latest.iterdir()) == ['6']


def test_a_finished_step_whose_marker_was_left_stays(stage):
  latest = stage / 'latest'
  (latest / '.saving-9').touch()
  assert statuses(latest) == {6: 'intact', 9: 'intact'}
  integrity.sweep(latest)
  assert sorted(p.name for p in latest.iterdir()) == ['6', '9']


def test_what_an_interrupted_save_was_to_replace_comes_back(stage):
  latest = stage / 'latest'
  integrity.begin(latest, 6)
  assert statuses(latest) == {6: 'unfinished', 9: 'unfinished'}
  shutil.copytree(latest / '.replaced-6', latest / '6')
  (latest / '6' / integrity.MANIFEST).unlink()
  (latest / '6.orbax-checkpoint-tmp').mkdir()
  integrity.sweep(latest)
  assert statuses(latest) == {6: 'intact', 9: 'intact'}
  assert sorted(p.name for p in latest.iterdir()) == ['6', '9']


def test_what_a_finished_save_has_replaced_goes(stage):
  latest = stage / 'latest'
  integrity.begin(latest, 6)
  shutil.copytree(latest / '.replaced-9', latest / '6')
  integrity.finish(latest, 6)
  assert sorted(p.name for p in latest.iterdir()) == ['6']
  assert statuses(latest) == {6: 'intact'}


def test_quarantine_keeps_all_it_was_given(stage):
  for _ in range(2):
    shutil.copytree(stage / 'latest/6', stage / 'latest/7')
    integrity.quarantine(stage / 'latest/7', stage)
  kept = {p.name for p in (stage / 'quarantine').iterdir()}
  assert kept == {'latest-7', 'latest-7.2'}


def test_a_signed_value_comes_back_and_no_bit_can_flip_unseen(saved, tmp_path):
  found = integrity.read_signed(saved / 'done.json')
  assert found == {'record': {'loss': None, 'rows': [1, 2]}}
  data = (saved / 'done.json').read_bytes()
  path = tmp_path / 'done.json'
  seen = 0
  for index in range(len(data)):
    flipped = bytes([data[index] ^ 1 << index % 8])
    path.write_bytes(data[:index] + flipped + data[index + 1 :])
    try:
      assert integrity.read_signed(path) == found  # A flip of white space.
    except integrity.DamagedError:
      seen += 1
  assert seen > 0.7 * len(data)


def test_looking_changes_nothing(stage):
  def snapshot():
    return {p: p.stat().st_mtime_ns for p in stage.parent.parent.rglob('*')}

  damage(stage / 'best/6' / integrity.MANIFEST, 'truncated')
  (stage / 'latest/.saving-9').touch()
  before = snapshot()
  found = checkpoints.check_workdir(stage.parent.parent)
  assert snapshot() == before
  assert [(f.name, f.step, f.status) for f in found] == [
    ('best', 6, 'damaged'),
    ('latest', 6, 'intact'),
    ('latest', 9, 'intact'),
    ('done.json', -1, 'intact'),
  ]
  assert all(f.bytes > 0 for f in found)

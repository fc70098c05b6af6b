import dataclasses
import functools
import multiprocessing
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config

from jaxprog import errors, fields, stages
from jaxprog.models import resnet
from jaxprog.optim import optimizers
from jaxprog.reliability import checkpoints, integrity
from jaxprog.training import state

META = {'classes': ['a', 'b'], 'record': {'epochs': []}}


@functools.cache
def create_init(num_filters):
  model = resnet.create_model(
    'resnet10', num_classes=2, image_size=8, num_filters=num_filters
  )
  return jax.jit(functools.partial(state.init_variables, model, 8))


def create_state(seed=0, tx=None, num_filters=2):
  variables = create_init(num_filters)(jax.random.key(seed))
  return state.create_state(variables, tx or optax.adam(0.1))


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_latest_comes_back_bit_for_bit(tmp_path):
  saved = create_state().replace(step=jnp.int32(7))
  with checkpoints.Checkpoints(tmp_path) as manager:
    assert manager.restore_latest(saved) is None
    manager.save_latest(saved, META)
  with checkpoints.Checkpoints(tmp_path) as manager:
    found, meta = manager.restore_latest(create_state(1))
  assert bits(found) == bits(saved)
  assert jax.tree.structure(found) == jax.tree.structure(saved)
  assert meta == META


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    *((name, 'float32') for name in fields.STAGE['optimizer'].choices),
    ('adamw', 'bfloat16'),
    pytest.param('muon', 'bfloat16', marks=pytest.mark.slow),
    pytest.param('sgd_momentum', 'bfloat16', marks=pytest.mark.slow),
  ],
)
def test_every_optimizers_state_comes_back(name, dtype, tmp_path):
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(
    stage,
    optimizer=name,
    quantization_min_size=16,
    optimizer_state_dtype=dtype,
  )
  tx = optimizers.create_optimizer(stage)
  saved = create_state(tx=tx)
  grads = jax.tree.map(jnp.ones_like, saved.params)
  _, opt_state = optimizers.take_step(
    tx, stage, jnp.float32(0.1), grads, saved.opt_state, saved.params
  )
  saved = saved.replace(opt_state=opt_state, ema=saved.variables)
  with checkpoints.Checkpoints(tmp_path) as manager:
    manager.save_latest(saved, META)
  like = create_state(1, tx)
  like = like.replace(ema=like.variables)
  with checkpoints.Checkpoints(tmp_path) as manager:
    found, _ = manager.restore_latest(like)
  assert bits(found) == bits(saved)
  assert jax.tree.structure(found) == jax.tree.structure(saved)


@pytest.mark.parametrize(
  'changes',
  [
    {'weight_decay': 0.0},
    {'weight_decay_kind': 'coupled'},
    {'adaptive_clipping': 0.01},
  ],
)
def test_moments_come_back_to_an_optimizer_with_other_options(
  tmp_path, changes
):
  stage = stages.create_stages(tiny_config.get_config())[0]
  changed = dataclasses.replace(stage, **changes)
  saved = create_state(tx=optimizers.create_optimizer(stage))
  like = create_state(1, optimizers.create_optimizer(changed))
  with checkpoints.Checkpoints(tmp_path) as manager:
    manager.save_latest(saved, META)
    found, _ = manager.restore_latest(like, ('opt_state',))
  assert bits(found) == bits(saved)
  assert jax.tree.structure(found) == jax.tree.structure(like)


def test_two_latest_are_kept_and_the_newest_is_used(tmp_path):
  with checkpoints.Checkpoints(tmp_path) as manager:
    for step in (1, 2, 3):
      manager.save_latest(create_state().replace(step=jnp.int32(step)), META)
  kept = {p.name for p in (tmp_path / 'latest').iterdir() if p.is_dir()}
  assert kept == {'2', '3'}
  with checkpoints.Checkpoints(tmp_path) as manager:
    assert manager.restore_latest(create_state())[0].step == 3


def test_what_is_saved_is_the_state_at_that_step(tmp_path):
  """Saving goes on in the background while the step reuses the memory."""
  step = jax.jit(
    lambda s: s.replace(
      step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)
    ),
    donate_argnums=0,
  )
  current = create_state(num_filters=16)
  expected = None
  with checkpoints.Checkpoints(tmp_path) as manager:
    for i in range(20):
      if i == 10:
        expected = bits(jax.tree.map(lambda x: np.array(x), current))
        manager.save_latest(current, META)
      current = step(current)
  with checkpoints.Checkpoints(tmp_path) as manager:
    found, _ = manager.restore_latest(create_state(num_filters=16))
  assert bits(found) == expected


def test_a_step_trained_again_replaces_the_old_one(tmp_path):
  old, new = create_state(0), create_state(1)
  with checkpoints.Checkpoints(tmp_path) as manager:
    manager.save_weights('best', 5, old.variables, {'n': 1})
    manager.save_weights('best', 3, new.variables, {'n': 2})
  directory = tmp_path / 'w' / 'checkpoints' / 's'
  directory.parent.mkdir(parents=True)
  tmp_path.joinpath('best').rename(directory.parent / 'moved')
  directory.mkdir()
  (directory.parent / 'moved').rename(directory / 'best')
  found, meta = checkpoints.load_weights(tmp_path / 'w', 's', 'best')
  assert bits(found) == bits(new.variables)
  assert meta == {'n': 2}


@pytest.mark.parametrize(
  ('like', 'expected'),
  [
    (lambda: create_state(num_filters=4), r'float32\[3, 3, 3, 2\]|\['),
    (lambda: create_state(tx=optax.sgd(0.1)), 'opt_state'),
    (
      lambda: jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.ndim else x, create_state()
      ),
      'bfloat16',
    ),
  ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, like, expected):
  with checkpoints.Checkpoints(tmp_path) as manager:
    manager.save_latest(create_state(), META)
    with pytest.raises(errors.UserError, match=expected):
      manager.restore_latest(like())


def test_missing_weights_are_a_users_mistake(tmp_path):
  with pytest.raises(errors.UserError, match='no best weights'):
    checkpoints.load_weights(tmp_path, 'stage', 'best')


def test_done_is_written_after_the_last_save(tmp_path):
  directory = checkpoints.stage_directory(tmp_path, 'stage')
  assert checkpoints.read_done(tmp_path, 'stage') is None
  with checkpoints.Checkpoints(directory) as manager:
    manager.save_weights('final', 1, create_state().variables, META)
    manager.mark_done({'record': {'name': 'stage'}})
    assert (directory / 'final' / '1').is_dir()
  assert checkpoints.read_done(tmp_path, 'stage') == {
    'record': {'name': 'stage'}
  }


@pytest.mark.parametrize('name', ['best', 'ema'])
def test_the_weights_that_a_state_speaks_of_stay_beside_it(name, tmp_path):
  directory = checkpoints.stage_directory(tmp_path, 'stage')
  with checkpoints.Checkpoints(directory) as manager:
    for step in (0, 3, 6, 9):
      if step:
        weights = create_small_state(step).variables
        manager.save_weights(name, step, weights, {'step': step})
        manager.wait()
        # A kill here leaves a state that knows nothing of them.
        found = integrity.list_steps(directory / name)
        assert step == 3 or step - 3 in found
      manager.save_latest(create_small_state(step), {'step': step})
  assert integrity.list_steps(directory / name) == [6, 9]
  flip(largest_file(directory / 'latest/9'))
  assert restored_step(directory) == 6
  variables, meta = checkpoints.load_weights(tmp_path, 'stage', name)
  assert meta == {'step': 6}
  assert bits(variables) == bits(create_small_state(6).variables)
  with checkpoints.Checkpoints(directory) as manager:
    manager.save_weights(name, 9, create_small_state(9).variables, {})
    manager.mark_done({})
  assert integrity.list_steps(directory / name) == [9]


def create_small_state(step=0):
  """Returns 256 KB that do not compress."""
  kernel = np.random.default_rng(step).random((256, 256), np.float32)
  return state.TrainState(
    step=jnp.int32(step),
    params={'head': {'kernel': jnp.asarray(kernel)}},
    batch_stats={},
    opt_state={},
    metrics=state.zero_metrics(),
    rate_scale=jnp.ones(()),
    ema={},
  )


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A stage under way; copy it before it is damaged."""
  directory = tmp_path_factory.mktemp('run') / 'checkpoints' / 'stage'
  with checkpoints.Checkpoints(directory) as manager:
    for step in (3, 6):
      manager.save_latest(create_small_state(step), {'step': step})
    manager.save_weights('best', 6, create_small_state(6).variables, {})
  return directory


@pytest.fixture
def stage(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoints' / 'stage')


@pytest.fixture
def incidents():
  """What was reported: (kind, message) pairs, and a function to report to."""
  told = []

  def report(kind, message, **fields):
    told.append((kind, message))

  report.told = told
  return report


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def largest_file(directory):
  files = [p for p in directory.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def restored_step(directory, incidents=checkpoints.ignore):
  with checkpoints.Checkpoints(directory, incidents) as manager:
    found = manager.restore_latest(create_small_state())
    if found is None:
      return None
  restored, meta = found
  assert bits(restored) == bits(create_small_state(meta['step']))
  return meta['step']


@pytest.mark.parametrize(
  'damage', [flip, lambda p: p.unlink(), lambda p: p.write_bytes(b'')]
)
def test_a_damaged_step_moves_aside_and_the_one_before_is_used(
  stage, incidents, damage
):
  damage(largest_file(stage / 'latest/6'))
  assert restored_step(stage, incidents) == 3
  ((kind, message),) = incidents.told
  assert kind == 'quarantine'
  assert 'stage/latest: step 6 is damaged, quarantined' in message
  assert (stage / 'quarantine/latest-6/tree').is_dir()
  assert not (stage / 'latest/6').exists()
  with checkpoints.Checkpoints(stage) as manager:
    manager.save_latest(create_small_state(6), {'step': 6})
  assert restored_step(stage) == 6


def test_all_damaged_is_an_error_however_often_one_tries(stage, incidents):
  for step in ('3', '6'):
    flip(largest_file(stage / 'latest' / step))
  for _ in range(2):
    with pytest.raises(
      integrity.DamagedError, match=r"'stage'.*not start over silently"
    ):
      restored_step(stage, incidents)
  assert len(incidents.told) == 2
  assert largest_file(stage / 'quarantine/latest-3').stat().st_size
  with pytest.raises(integrity.DamagedError):
    checkpoints.verify_all(stage.parent.parent)
  shutil.rmtree(stage)
  assert restored_step(stage) is None


def test_damaged_weights_are_reported_and_stop_who_needs_them(stage, incidents):
  workdir = stage.parent.parent
  checkpoints.verify_all(workdir, incidents)
  assert incidents.told == []
  flip(largest_file(stage / 'best/6'))
  checkpoints.verify_all(workdir, incidents)
  assert [kind for kind, _ in incidents.told] == ['damaged']
  assert 'stage/best: step 6 is damaged' in incidents.told[0][1]
  assert restored_step(stage) == 6
  with pytest.raises(integrity.DamagedError, match='stage/best'):
    checkpoints.load_weights(workdir, 'stage', 'best')


def test_a_finished_stage_needs_no_latest(stage, incidents):
  with checkpoints.Checkpoints(stage) as manager:
    manager.mark_done({})
  for step in ('3', '6'):
    flip(largest_file(stage / 'latest' / step))
  checkpoints.verify_all(stage.parent.parent, incidents)
  assert [kind for kind, _ in incidents.told] == ['quarantine'] * 2


def test_a_damaged_marker_of_a_finished_stage_moves_aside(stage, incidents):
  workdir = stage.parent.parent
  with checkpoints.Checkpoints(stage) as manager:
    manager.mark_done({'record': {}})
  flip(stage / 'done.json')
  with pytest.raises(integrity.DamagedError):
    checkpoints.read_done(workdir, 'stage')
  checkpoints.verify_all(workdir, incidents)
  assert 'damaged, quarantined' in incidents.told[0][1]
  assert checkpoints.read_done(workdir, 'stage') is None
  assert restored_step(stage) == 6


def test_reading_weights_leaves_a_save_under_way_alone(stage):
  """Evaluation may look at the workdir of a run that goes on."""
  (stage / 'best/9.orbax-checkpoint-tmp').mkdir()
  (stage / 'best/9').mkdir()
  (stage / 'best/.saving-9').touch()
  before = sorted((stage / 'best').rglob('*'))
  found, _ = checkpoints.load_weights(stage.parent.parent, 'stage', 'best')
  assert bits(found) == bits(create_small_state(6).variables)
  assert sorted((stage / 'best').rglob('*')) == before


def save_until_killed(directory, acknowledged):
  with checkpoints.Checkpoints(directory) as manager:
    found = manager.restore_latest(create_small_state())
    step = found[1]['step'] if found else 0
    while True:
      step += 1
      manager.save_latest(create_small_state(step), {'step': step})
      if step % 2:
        manager.wait()
        acknowledged.value = step


@pytest.mark.parametrize('times', [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_during_a_save_the_step_before_loads(tmp_path, times):
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['jaxprog.reliability.checkpoints'])
  acknowledged = context.Value('i', 0)
  random = np.random.default_rng(0)
  directory = tmp_path / 'checkpoints' / 'stage'
  interrupted = 0
  for _ in range(times):
    before = acknowledged.value
    process = context.Process(
      target=save_until_killed, args=(directory, acknowledged)
    )
    process.start()
    while acknowledged.value == before and process.is_alive():
      time.sleep(0.001)
    time.sleep(random.uniform(0, 0.1))
    while not any((directory / 'latest').glob('*[!0-9]*')):
      time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    names = {p.name for p in (directory / 'latest').iterdir()}
    interrupted += any(not name.isdecimal() for name in names)
    assert restored_step(directory) >= acknowledged.value
    names = {p.name for p in (directory / 'latest').iterdir()}
    assert all(name.isdecimal() for name in names)
    assert 1 <= len(names) <= 3
  assert interrupted > times / 2
  assert not (directory / 'quarantine').exists()


def test_a_full_disk_is_said_at_once_and_older_steps_stay(small_disk):
  directory = small_disk / 'checkpoints' / 'stage'
  with pytest.raises(integrity.SaveError, match='The disk of') as info:  # noqa: PT012, SIM117
    with checkpoints.Checkpoints(directory) as manager:
      manager.save_latest(create_small_state(1), {'step': 1})
      manager.wait()
      free = shutil.disk_usage(small_disk).free
      (small_disk / 'filler').write_bytes(bytes(free - 100_000))
      manager.save_latest(create_small_state(2), {'step': 2})
      deadline = time.monotonic() + 20
      while time.monotonic() < deadline:
        manager.check()
        time.sleep(0.01)
  assert len(str(info.value)) < 300
  assert '\n' not in str(info.value)
  assert 'No space left' in str(info.value)
  (small_disk / 'filler').unlink()
  assert restored_step(directory) == 1
  with checkpoints.Checkpoints(directory) as manager:
    manager.save_latest(create_small_state(2), {'step': 2})
  assert restored_step(directory) == 2


def test_a_failed_save_cannot_be_marked_done(small_disk):
  directory = small_disk / 'checkpoints' / 'stage'
  manager = checkpoints.Checkpoints(directory)
  free = shutil.disk_usage(small_disk).free
  (small_disk / 'filler').write_bytes(bytes(free - 200_000))
  manager.save_weights('final', 1, create_small_state(1).variables, {})
  with pytest.raises(integrity.SaveError):
    manager.mark_done({})
  manager.close()
  assert checkpoints.read_done(small_disk, 'stage') is None


def test_a_failed_save_belies_a_stop_but_hides_no_other_error(small_disk):
  told = []
  for error, expected in (
    (errors.Stopped(signal.SIGTERM), integrity.SaveError),
    (ZeroDivisionError(), ZeroDivisionError),
  ):
    directory = small_disk / 'checkpoints' / type(error).__name__
    with pytest.raises(expected):  # noqa: PT012, SIM117
      with checkpoints.Checkpoints(
        directory, lambda kind, message, **_: told.append(kind)
      ) as manager:
        free = shutil.disk_usage(small_disk).free
        (small_disk / type(error).__name__).write_bytes(bytes(free - 200_000))
        manager.save_latest(create_small_state(1), {})
        raise error
    (small_disk / type(error).__name__).unlink()
  assert told == ['save_failed']

"""Teachers of real, tiny ladders: who they are, and what they know."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
import runs
import safetensors.numpy
import tiny_config

import jaxprog
from jaxprog import errors
from jaxprog.models import interchange
from jaxprog.reliability import checkpoints
from jaxprog.training import ladder, run, setup
from jaxprog.training.transfer import teacher

TAUGHT = {'name': 'ten', 'num_epochs': 0.3, 'distill_features': 0.5}


def create_config(data_dir, source='stage:three', **fields):
  config = tiny_config.get_config(data_dir)
  config.checkpoint_every_steps = 2
  config.stages = [
    {
      'name': 'three',
      'classes': ('5', '1', '3'),
      'num_epochs': 0.2,
      'ema_decay': 0.5,
    },
    {**TAUGHT, 'distill_from': source, **fields},
  ]
  return config


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
  """A workdir in which 'three' is done."""
  workdir = tmp_path_factory.mktemp('trained')
  jaxprog.train(create_config(data_dir), workdir, only=['three'])
  return workdir


@pytest.fixture(scope='module')
def wide(data_dir, tmp_path_factory):
  """A file of a wider network, which knows three classes in its own order."""
  config = create_config(data_dir)
  config.num_filters = 8
  made = setup.create_setup(config, only=['three'])
  task = setup.create_task(made, made.chosen[0])
  variables = jax.device_get(task.init(task.init_rng))
  path = tmp_path_factory.mktemp('files') / 'wide.safetensors'
  save(path, variables)
  return path


def save(path, variables, classes='["7", "1", "9"]'):
  safetensors.numpy.save_file(
    interchange.to_state_dict(variables), path, {'classes': classes}
  )


def create_task(config):
  made = setup.create_setup(config, only=['ten'])
  return made, setup.create_task(made, made.chosen[0])


def test_a_stage_teaches_what_both_know_by_name(trained, data_dir):
  _, task = create_task(create_config(data_dir))
  record = {}
  attended = teacher.attend(trained, task, record)
  best, meta = checkpoints.load_weights(trained, 'three', 'best')
  assert meta['classes'] == ['1', '3', '5']
  known = np.isin(np.arange(10), (1, 3, 5))
  np.testing.assert_array_equal(attended.teacher['known'], known)
  head = attended.teacher['variables']['params']['head']
  for name, x in best['params']['head'].items():
    np.testing.assert_array_equal(head[name][..., known], x)
    assert not np.any(head[name][..., ~known])
  assert record['teacher']['classes'] == 3
  averaged = create_config(data_dir, source='stage:three:ema')
  teacher.attend(trained, create_task(averaged)[1], other := {})
  assert other['teacher']['digest'] != record['teacher']['digest']


def test_a_file_may_be_of_a_wider_network(data_dir, wide, tmp_path):
  _, task = create_task(create_config(data_dir, source=str(wide)))
  attended = teacher.attend(tmp_path, task, {})
  assert list(np.flatnonzero(attended.teacher['known'])) == [1, 7, 9]
  tensors = safetensors.numpy.load_file(wide)
  head = attended.teacher['variables']['params']['head']
  for place, name in enumerate(('7', '1', '9')):
    np.testing.assert_array_equal(
      head['kernel'][:, int(name)], tensors['fc.weight'][place]
    )
  projection = set(task.state_shapes.params) - set(
    task.state_shapes.variables['params']
  )
  assert len(projection) == 1
  assert task.state_shapes.params[projection.pop()]['kernel'].shape == (32, 64)


def test_what_nobody_could_learn_from_is_said_before_training(
  trained, data_dir, wide, tmp_path
):
  def message(workdir=trained, only=('ten',), **fields):
    config = create_config(data_dir, **fields)
    made = setup.create_setup(config, only=only)
    with pytest.raises(errors.UserError) as caught:
      run.create_tasks(made, workdir)
    assert len(str(caught.value).split('\n')) <= 3
    return str(caught.value)

  assert "no stage 'tree'" in message(source='stage:tree')
  assert 'not trained before' in message(workdir=tmp_path)
  assert 'shares no class' in message(classes=('2', '4'))
  assert 'shares no class' in message(
    workdir=tmp_path, only=('three', 'ten'), classes=('2', '4')
  )
  assert 'no such file' in message(source=str(tmp_path / 'a.safetensors'))
  other = tmp_path / 'other.safetensors'
  safetensors.numpy.save_file({'a': np.zeros(3, np.float32)}, other)
  assert 'none of our ResNets' in message(source=str(other))
  assert 'distill_from' in message(source=str(other))
  save(damaged := tmp_path / 'nan.safetensors', _spoil(wide, data_dir))
  assert 'not finite' in message(source=str(damaged))
  assert 'knew no class' in message(
    source='', classes=('2', '4'), transfer_head='by_class'
  )
  features = {'classes': ('2', '4'), 'distill_weight': 0.0}
  config = create_config(data_dir, **features)
  run.create_tasks(setup.create_setup(config, only=['ten']), trained)


def _spoil(path, data_dir):
  """Returns the variables in a file, one of whose numbers is none."""
  _, task = create_task(create_config(data_dir, source=str(path)))
  found = teacher._load(pathlib.Path(), task).variables
  found['params']['stem_conv']['kernel'] = (
    found['params']['stem_conv']['kernel'] * np.nan
  )
  return found


@pytest.mark.slow
def test_a_taught_stage_goes_on_with_the_same_bits_and_no_other_teacher(
  data_dir, wide, tmp_path, monkeypatch
):
  source = shutil.copy(wide, tmp_path / 'teacher.safetensors')
  config = create_config(data_dir, source=str(source))
  config.stages = config.stages[1:]
  jaxprog.train(config, tmp_path / 'whole')

  def end(*_):
    raise runs.Enough

  with monkeypatch.context() as patched:
    # After the second save: in the middle of the epoch.
    patched.setattr(ladder.loop, '_stop_if_asked', end)
    with pytest.raises(runs.Enough):
      jaxprog.train(config, tmp_path / 'cut')
  kept = pathlib.Path(source).read_bytes()
  _, task = create_task(config)
  fresh = teacher._load(tmp_path, task).variables
  save(source, jax.tree.map(lambda x: x + np.float32(0.1), fresh))
  with pytest.raises(errors.UserError, match='not the weights that have'):
    jaxprog.train(config, tmp_path / 'cut')
  pathlib.Path(source).write_bytes(kept)
  jaxprog.train(config, tmp_path / 'cut')
  history = runs.read_history(tmp_path / 'cut')['stages'][0]
  assert history['resumed_at_steps']
  assert history['teacher']['classes'] == 3
  assert runs.bits(tmp_path / 'cut', 'ten') == runs.bits(
    tmp_path / 'whole', 'ten'
  )
  variables, _ = checkpoints.load_weights(tmp_path / 'cut', 'ten', 'best')
  assert set(variables['params']) == set(task.state_shapes.variables['params'])

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config

from jaxprog import errors, stages
from jaxprog.models import resnet
from jaxprog.optim import optimizers
from jaxprog.training import checkpoints, state

META = {'classes': ['a', 'b'], 'record': {'epochs': []}}


def create_state(seed=0, tx=None, num_filters=2):
  model = resnet.create_model(
    'resnet10', num_classes=2, image_size=8, num_filters=num_filters
  )
  init = functools.partial(state.init_variables, model, 8)
  variables = jax.jit(init)(jax.random.key(seed))
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


@pytest.mark.parametrize('name', stages.OPTIMIZERS)
def test_every_optimizers_state_comes_back(name, tmp_path):
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(stage, optimizer=name, quantization_min_size=16)
  tx = optimizers.create_optimizer(stage)
  saved = create_state(tx=tx)
  grads = jax.tree.map(jnp.ones_like, saved.params)
  _, opt_state = tx.update(grads, saved.opt_state, saved.params)
  saved = saved.replace(opt_state=opt_state, ema=saved.variables)
  with checkpoints.Checkpoints(tmp_path) as manager:
    manager.save_latest(saved, META)
  like = create_state(1, tx)
  like = jax.eval_shape(lambda: like.replace(ema=like.variables))
  with checkpoints.Checkpoints(tmp_path) as manager:
    found, _ = manager.restore_latest(like)
  assert bits(found) == bits(saved)
  assert jax.tree.structure(found) == jax.tree.structure(saved)


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

"""What an optimizer without a schedule is about is the average of its steps."""

import jax
import networks
import numpy as np
import pytest
import runs
import tiny_config

import jaxprog
from jaxprog.optim import optimizers
from jaxprog.reliability import checkpoints, integrity
from jaxprog.training import setup as setup_lib
from jaxprog.training.transfer import handover


def create_config(data_dir):
  config = tiny_config.get_config(data_dir)
  config.checkpoint_every_steps = 3
  config.stages = [
    {
      **config.stages[0],
      'optimizer': 'schedule_free_adamw',
      'schedule': 'constant',
      'warmup_steps': 2,
      'transfer_batches': 2,
    }
  ]
  return config


@pytest.fixture(scope='module')
def finished(data_dir, tmp_path_factory):
  """The workdir of two epochs, and the rows of its history."""
  workdir = tmp_path_factory.mktemp('free')
  history = jaxprog.train(create_config(data_dir), workdir)
  return workdir, history['stages'][0]['epochs']


def test_what_is_saved_is_the_average_with_statistics_of_its_own(
  finished, data_dir
):
  workdir, _ = finished
  setup = setup_lib.create_setup(create_config(data_dir))
  task = setup_lib.create_task(setup, setup.chosen[0])
  directory = checkpoints.stage_directory(workdir, 'three')
  with checkpoints.Checkpoints(directory) as saved:
    state, _ = saved.restore_latest(task.state_shapes)
  found, _ = checkpoints.load_weights(workdir, 'three', 'final')
  average = optimizers.averaged_params(state.params, state.opt_state)
  networks.assert_same_bits(found['params'], jax.device_get(average))
  heads = [x['params']['head']['kernel'] for x in (found, state.variables)]
  assert np.abs(np.subtract(*heads)).max() > 1e-4
  variables = {'params': average, 'batch_stats': state.batch_stats}
  measured = handover.create_statistics_fn(task)(variables)
  networks.assert_same_bits(found['batch_stats'], jax.device_get(measured))


def test_what_is_evaluated_is_what_is_saved(finished):
  workdir, rows = finished
  scores = jaxprog.evaluate(
    jaxprog.load_config(str(workdir / 'config.json')), workdir, weights='final'
  )
  assert scores['top1'] == rows[-1]['val_top1']
  assert scores['loss'] == pytest.approx(rows[-1]['val_loss'], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kept', [6, 9])
def test_interrupted_equals_uninterrupted(finished, data_dir, tmp_path, kept):
  """In the first epoch, and right after it was evaluated."""
  config, workdir = create_config(data_dir), tmp_path / 'run'
  with pytest.raises(runs.Enough):
    jaxprog.train(config, workdir, on_epoch=runs.stop_after(1))
  latest = workdir / 'checkpoints' / 'three' / 'latest'
  for step in integrity.list_steps(latest):
    if step > kept:
      integrity.remove(latest, step)
  history = jaxprog.train(config, workdir)
  whole, _ = finished
  for weights in ('best', 'final'):
    assert runs.bits(workdir, 'three', weights) == runs.bits(
      whole, 'three', weights
    )
  assert history['stages'][0]['resumed_at_steps'] == [kept]

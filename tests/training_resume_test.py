"""A stage under way goes on in the same epoch, whatever its config is now."""

import shutil

import numpy as np
import pytest
import runs
from tensorboard.backend.event_processing import plugin_event_accumulator

import jaxprog
from jaxprog.training import checkpoints, ladder

FOUR = '--config.stages[0].num_epochs=4'
BATCH = '--config.stages[0].batch_size'


class Enough(Exception):
  pass


def stop_after(epochs):
  def on_epoch(name, row):
    del name
    if row['epoch'] == epochs:
      raise Enough

  return on_epoch


@pytest.fixture(scope='module')
def arguments(data_dir):
  return (
    f'--config=tests/tiny_config.py:{data_dir}',
    '--only=three',
    FOUR,
    '--config.tensorboard=True',
    '--config.log_every_steps=1',
  )


def with_batch(arguments, batch_size):
  return *arguments, f'{BATCH}={batch_size}'


@pytest.fixture(scope='module')
def left(arguments, tmp_path_factory):
  """Two of four epochs of six steps, and then an end."""
  workdir = tmp_path_factory.mktemp('left')
  start(arguments, 72, workdir, epochs=2)
  return workdir


def start(arguments, batch_size, workdir, epochs):
  """Trains until `epochs` are over."""
  given = [x.partition('=') for x in with_batch(arguments, batch_size)]
  overrides = {
    name.removeprefix('--config.'): value
    for name, _, value in given
    if name.startswith('--config.')
  }
  config = jaxprog.load_config(given[0][2], overrides)
  with pytest.raises(Enough):
    ladder.train(config, workdir, only=['three'], on_epoch=stop_after(epochs))


@pytest.fixture
def workdir(left, tmp_path):
  return shutil.copytree(left, tmp_path / 'run')


def go_on(arguments, workdir, *changes):
  result = runs.call_main(
    *arguments, f'--workdir={workdir}', '--allow_config_change', *changes
  )
  assert result.returncode == 0, result.stderr
  (stage,) = runs.read_history(workdir)['stages']
  return stage, result


@pytest.mark.parametrize(('batch_size', 'per_epoch'), [(144, 3), (36, 12)])
def test_another_batch_goes_on_in_the_same_epoch(
  arguments, workdir, batch_size, per_epoch
):
  (before,) = runs.read_history(workdir)['stages']
  stage, _ = go_on(arguments, workdir, f'{BATCH}={batch_size}')
  assert [row['epoch'] for row in stage['epochs']] == [1, 2, 3, 4]
  assert stage['epochs'][:2] == before['epochs']
  steps = [row['global_step'] for row in stage['epochs']]
  assert steps == [6, 12, 12 + per_epoch, 12 + 2 * per_epoch]
  assert stage['resumed_at_steps'] == [12]
  assert (stage['batch_size'], stage['steps_per_epoch']) == (
    batch_size,
    per_epoch,
  )
  # The rate is that of a stage which had this batch from its beginning.
  task = create_task(arguments, batch_size)
  ends = [task.steps.epoch_ends[epoch] for epoch in (2, 3)]
  rates = [float(task.learning_rate_fn(end - 1)) for end in ends]
  found = [row['learning_rate'] for row in stage['epochs'][2:]]
  np.testing.assert_allclose(found, rates, rtol=1e-5)
  (change,) = stage['config_changes']
  assert change['epoch'] == 2
  assert change['fields'] == {'batch_size': [72, batch_size]}
  assert change['renewed'] == []
  assert read_losses(workdir) == list(range(1, steps[-1] + 1))
  report = (workdir / 'training_report.txt').read_text()
  said = f'after 2 epochs it went on with batch_size {batch_size} (before: 72)'
  assert said in ' '.join(report.split())


def create_task(arguments, batch_size):
  from jaxprog.training import setup

  config = jaxprog.load_config(
    arguments[0].partition('=')[2],
    {'stages[0].num_epochs': '4', 'stages[0].batch_size': str(batch_size)},
  )
  made = setup.create_setup(config, only=['three'])
  return setup.create_task(made, made.chosen[0])


def read_losses(workdir):
  """Returns the global steps of which TensorBoard shows a loss."""
  events = plugin_event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard')
  ).Reload()
  return [x.step for x in events.Tensors('train/loss')]

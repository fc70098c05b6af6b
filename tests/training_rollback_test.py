"""Losses that are not finite, in real runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import runs
from data_fixtures import encode, write_class_folders

# A network to which white images are poison.
FRAGILE = """
import sys
import jax.numpy as jnp
from flax import linen as nn
import jaxprog
from jaxprog import start_from

class Fragile(nn.Module):
  num_classes: int
  image_size: int
  dtype: object

  @nn.compact
  def __call__(self, x, *, train):
    poison = jnp.where(jnp.mean(x, (1, 2, 3)) > 2.2, jnp.nan, 0.0)
    x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
    x = x.reshape(len(x), -1)
    return nn.Dense(self.num_classes, name='head')(x) + poison[:, None]

folder, limit = sys.argv[1:]
config = start_from('default')
config.data_dir = f'{folder}/data'
config.max_skipped_steps = int(limit)
config.tensorboard = False
config.stages = [{
  'name': 'only', 'dataset': f'folder:{folder}/raw', 'image_size': 8,
  'num_epochs': 3, 'batch_size': 11, 'schedule': 'constant',
  'min_crop_area': 0.9,
}]
jaxprog.train(config, f'{folder}/run', model=Fragile)
"""


@pytest.fixture
def folder(tmp_path):
  """33 training images, so that every epoch has every one; one is white."""
  raw = write_class_folders(tmp_path / 'raw', train=11)
  white = np.full((20, 20, 3), 255, np.uint8)
  (raw / 'train/n02/n02_train_3.JPEG').write_bytes(encode(white, 'JPEG'))
  return tmp_path


def train(folder, limit):
  return subprocess.run(
    [sys.executable, '-c', FRAGILE, folder, str(limit)],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )


def read_incidents(workdir, kind):
  lines = (workdir / 'incidents.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, lines) if x['kind'] == kind]


def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(folder):
  result = train(folder, 2)
  assert result.returncode == 0, result.stderr
  (stage,) = runs.read_history(folder / 'run')['stages']
  assert [row['skipped_steps'] for row in stage['epochs']] == [1, 1, 1]
  assert all(np.isfinite(row['train_loss']) for row in stage['epochs'])
  assert 'rollbacks' not in stage
  skipped = read_incidents(folder / 'run', 'skipped_step')
  assert [-(-x['step'] // 3) for x in skipped] == [1, 2, 3]
  assert all(x['stage'] == 'only' for x in skipped)
  report = (folder / 'run' / 'training_report.txt').read_text()
  assert '3 steps changed nothing' in report
  assert '3 skipped steps: first' in report


def test_it_is_taken_back_twice_and_then_names_the_batch(folder):
  result = train(folder, 1)
  assert result.returncode == 1
  assert "Stage 'only', after 2 rollbacks" in result.stderr
  assert '1 steps in a row' in result.stderr
  assert 'diverged' not in result.stderr
  assert 'n02/n02_train_3.JPEG' in result.stderr or 'more' in result.stderr
  rollbacks = read_incidents(folder / 'run', 'rollback')
  assert len(rollbacks) == 2
  assert all(x['step'] <= 3 for x in rollbacks)


@pytest.mark.parametrize(
  'rate', [1e30, pytest.param(1e38, marks=pytest.mark.slow)]
)
def test_a_rate_that_blows_up_is_named(data_dir, tmp_path, rate):
  arguments = (
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={tmp_path}',
    '--only=three',
    '--config.max_skipped_steps=3',
    '--config.stages[0].optimizer=sgd_momentum',
    '--config.stages[0].schedule=constant',
  )
  result = runs.call_main(
    *arguments, f'--config.stages[0].learning_rate={rate}'
  )
  assert result.returncode == 1
  assert result.stdout.count('it diverged') == 2
  error, *_ = result.stderr.splitlines()
  assert "Stage 'three', after 2 rollbacks" in error
  assert f'learning_rate {rate:.3g}'.replace('_', ' ') in error
  for word in ('diverged', 'loss', 'grad norm', 'a lower learning_rate'):
    assert word in error
  assert error.endswith('gradient_clipping.')
  assert '3_train' not in error  # No file is to blame.
  if rate == 1e30:  # What was saved is still good.
    result = runs.call_main(*arguments, '--allow_config_change')
    assert result.returncode == 0, result.stderr

"""Losses that are not finite, in real runs."""

import json

import fragile
import numpy as np
import pytest
import runs

import jaxprog


def train(folder, limit):
  """Trains so that every epoch has each of 33 images; one is white."""
  config = fragile.create_config(
    folder,
    ['n02/n02_train_3'],
    train=11,
    num_epochs=3,
    batch_size=11,
    schedule='constant',
  )
  config.max_skipped_steps = limit
  jaxprog.train(config, folder / 'run', model=fragile.Fragile)


def read_incidents(workdir, kind):
  lines = (workdir / 'incidents.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, lines) if x['kind'] == kind]


def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(tmp_path):
  train(tmp_path, 2)
  (stage,) = runs.read_history(tmp_path / 'run')['stages']
  assert [row['skipped_steps'] for row in stage['epochs']] == [1, 1, 1]
  assert all(np.isfinite(row['train_loss']) for row in stage['epochs'])
  assert 'rollbacks' not in stage
  skipped = read_incidents(tmp_path / 'run', 'skipped_step')
  assert [-(-x['step'] // 3) for x in skipped] == [1, 2, 3]
  assert all(x['stage'] == 'only' for x in skipped)
  report = (tmp_path / 'run' / 'training_report.txt').read_text()
  assert '3 steps changed nothing' in report
  assert '3 skipped steps: first' in report


def test_it_is_taken_back_twice_and_then_names_the_batch(tmp_path):
  with pytest.raises(RuntimeError, match='after 2 rollbacks') as caught:
    train(tmp_path, 1)
  said = str(caught.value)
  assert said.startswith("Stage 'only'")
  assert '1 steps in a row' in said
  assert 'diverged' not in said
  assert 'n02/n02_train_3.JPEG' in said or 'more' in said
  rollbacks = read_incidents(tmp_path / 'run', 'rollback')
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

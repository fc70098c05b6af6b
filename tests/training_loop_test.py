"""How far the loop is ahead of its devices, and that nothing shows it."""

import dataclasses
import json
import math

import fragile
import jax
import jax.numpy as jnp
import pytest
import runs
import tiny_config

import jaxprog
from jaxprog.training import loop, setup


def train(config, workdir):
  """Returns a run's history without times, its incidents and its weights."""
  jaxprog.train(config, workdir, model=fragile.Fragile)
  lines = (workdir / 'incidents.jsonl').read_text().splitlines()
  incidents = [(x['kind'], x['step']) for x in map(json.loads, lines)]
  history = runs.without_times(runs.read_history(workdir))
  return history, incidents, runs.bits(workdir, 'only')


def test_skips_and_rollbacks_are_the_same_however_far_ahead(
  tmp_path, monkeypatch
):
  white = 'n01/n01_train_1', 'n02/n02_train_3', 'n03/n03_train_4'
  config = fragile.create_config(
    tmp_path, white, train=16, num_epochs=2, batch_size=4
  )
  config.max_skipped_steps, config.checkpoint_every_steps = 2, 3
  monkeypatch.setattr(loop, '_SECONDS_AHEAD', 0.0)
  one_step = train(config, tmp_path / 'near')
  monkeypatch.setattr(loop, '_SECONDS_AHEAD', math.inf)
  all_steps = train(config, tmp_path / 'far')
  assert ('rollback', 3) in one_step[1]
  assert all_steps == one_step


@pytest.mark.parametrize(
  ('milliseconds', 'ahead'), [(0.1, 16), (2, 10), (9, 2), (20, 1), (1000, 1)]
)
def test_quick_steps_are_dispatched_further_ahead(milliseconds, ahead):
  assert loop._steps_ahead(100 * milliseconds / 1e3, 100) == ahead
  assert loop._steps_ahead(1e-6, 0) == 1  # Nothing is known yet.


def test_an_evaluation_keeps_few_batches_on_the_devices(data_dir):
  config = tiny_config.get_config(data_dir)
  config.stage_defaults.batch_size = 8
  found = setup.create_setup(config, only=('ten',))
  task = setup.create_task(found, found.chosen[0])

  @jax.jit
  def work(batch, sums):
    # The first batch takes as long as all others, and more, need to be read.
    times = jnp.where(sums['count'] == 0, 30_000, 1)
    x = jax.lax.fori_loop(0, times, lambda _, x: x @ x, jnp.ones((64, 64)) / 64)
    count = jnp.sum(batch['mask']) * x[0, 0] * 64
    outcomes = {'loss': batch['label'], 'rank': batch['label']}
    return {**sums, 'count': sums['count'] + count}, outcomes

  dispatched, under_way = [], []

  def eval_step(variables, batch, sums):
    del variables
    under_way.append(sum(not x.is_ready() for x in dispatched))
    sums, outcomes = work(batch, sums)
    dispatched.append(outcomes['loss'])
    return sums, outcomes

  split = task.dataset.selection
  task = dataclasses.replace(task, eval_step=eval_step)
  loop.evaluate(task, {}, split)
  assert len(dispatched) == -(-len(split) // 8) > 20
  assert max(under_way) == loop._EVALUATED_AHEAD

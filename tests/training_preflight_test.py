"""What a run asks before it starts."""

import sys

import jax
import numpy as np
import pytest
import tiny_config

from jaxprog import errors
from jaxprog.reliability import checkpoints
from jaxprog.training import preflight
from jaxprog.training import setup as setup_lib

REPORTS = 20_000_000


@pytest.fixture
def config(data_dir):
  config = tiny_config.get_config(data_dir)
  config.compilation_cache_dir = ''
  return config


def test_the_disk_is_counted_with_all_that_stays(config, tmp_path):
  config.num_filters = 16
  config.stages = [{**config.stages[1], 'ema_decay': 0.9, 'name': 'a'}]
  setup = setup_lib.create_setup(config)
  task = setup_lib.create_task(setup, setup.chosen[0])
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype),
    task.state_shapes,
  )
  states = [(task.stage, state)]
  before = preflight.bytes_to_write(tmp_path, states) - REPORTS
  directory = checkpoints.stage_directory(tmp_path, 'a')
  with checkpoints.Checkpoints(directory) as saved:
    for step in (1, 2):
      saved.save_latest(state.replace(step=np.int32(step)), {})
      saved.wait()
    for name in ('best', 'final', 'ema'):
      saved.save_weights(name, 2, state.variables, {})
    saved.wait()
    written = sum(x.stat().st_size for x in directory.rglob('*') if x.is_file())
    numbers = sum(x.nbytes for x in jax.tree.leaves(state.variables))
    # Two states of weights, average and two moments; three of weights.
    assert written == pytest.approx(11 * numbers, rel=0.1)
    # In training there are best and averaged weights twice; and a state and
    # such weights are written beside those that they replace.
    assert before == pytest.approx(1.05 * 19 * numbers, rel=0.02)
    after = preflight.bytes_to_write(tmp_path, states) - REPORTS
    assert after == pytest.approx(1.05 * 8 * numbers, rel=0.1)
    saved.mark_done({'record': {}})
  assert preflight.bytes_to_write(tmp_path, states) == 0


def test_a_probe_leaves_nothing_behind(tmp_path):
  preflight.check_workdir(tmp_path / 'a' / 'b')
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'there').mkdir()
  preflight.check_workdir(tmp_path / 'there')
  assert list((tmp_path / 'there').iterdir()) == []
  (tmp_path / 'file').write_text('')
  for wrong in (tmp_path / 'file', tmp_path / 'file' / 'run'):
    with pytest.raises(errors.UserError, match='Cannot write to the workdir'):
      preflight.check_workdir(wrong)


@pytest.mark.parametrize(
  ('words', 'expected'),
  [
    (
      '--config=a.py --mode=check --workdir=w --only=a',
      '--config=a.py --only=a --mode=prepare',
    ),
    (
      '--mode check --config a.py --config.data_dir=d',
      '--config=a.py --config.data_dir=d --mode=prepare',
    ),
    ('--workdir=w --allow_config_change', '--workdir=w --mode=prepare'),
    (
      '-config=a.py --config.stages[0].num_epochs=3',
      "--config=a.py '--config.stages[0].num_epochs=3' --mode=prepare",
    ),
  ],
)
def test_the_command_that_prepares_is_this_one(monkeypatch, words, expected):
  for script, program in (
    ('main.py', 'python main.py'),
    ('/bin/jaxprog', 'jaxprog'),
    ('/lib/jaxprog/__main__.py', 'python -m jaxprog'),
  ):
    monkeypatch.setattr(sys, 'argv', [script, *words.split()])
    assert preflight.prepare_command() == f'{program} {expected}'


def test_launch_names_the_missing_dataset_of_the_last_stage(config, tmp_path):
  preflight.launch(config, tmp_path)
  config.stages[2]['dataset'] = 'tiny_imagenet'
  with pytest.raises(errors.UserError) as caught:
    preflight.launch(config, tmp_path)
  assert "stage 'ten_again'" in caught.value.where
  assert caught.value.suggestion == 'jaxprog.prepare(config) --download'
  preflight.launch(config, tmp_path, skip=('ten_again',))

import json
import os
import shutil
import signal
import threading
import time

import compare_config
import jax
import numpy as np
import pytest
import runs as run_lib

import jaxprog
from jaxprog import errors, stages
from jaxprog.comparison import cells, together
from jaxprog.models import conv
from jaxprog.tools import compare as tool
from jaxprog.training import checkpoints, feed
from jaxprog.training import setup as setup_lib

# One image of the 360 that digits are evaluated on.
ONE_IMAGE = 1 / 360


def create_config(data_dir, *, together):
  """Returns a ladder of two stages, whose second has parts of every kind.

  At these rates rounding does not grow: at 0.01, weights that are changed by
  1e-6 change the loss by 1e-2 within 20 steps.
  """
  config = compare_config.get_config(data_dir)
  config.base.tensorboard = False
  config.base.stages = [
    {
      'name': 'three',
      'classes': ('1', '3', '5'),
      'num_epochs': 1,
      'learning_rate': 5e-4,
      # Each image is changed by its own random numbers.
      'mixup_alpha': 0.2,
      'brightness': 0.3,
    },
    {
      'name': 'ten',
      'num_epochs': 2,
      'learning_rate': 5e-4,
      # The rate may fall at an evaluation.
      'schedule': 'plateau',
      'plateau_patience': 0,
      'plateau_min_delta': 10.0,
      'ema_decay': 0.9,
      'phases': ({'from_epoch': 1, 'batch_size': 96},),
    },
  ]
  config.grid = ({'stages[-1].optimizer': ('adamw',)},)
  config.seeds_together = together
  return config


def seed_directory(workdir, seed, cell='adamw'):
  return workdir / 'cells' / cell / f'seed-{seed}'


def read_stages(workdir, seed):
  return run_lib.read_history(seed_directory(workdir, seed))['stages']


def first_weights(workdir, seed, copy):
  """Returns the state that was saved before the first step of a run."""
  source = seed_directory(workdir, seed) / 'checkpoints' / 'three' / 'latest'
  target = checkpoints.stage_directory(copy, 'three') / 'latest'
  shutil.copytree(source, target)
  for path in target.iterdir():
    if path.name.isdigit() and path.name != '0':
      shutil.rmtree(path)
  tree, _ = checkpoints.load_weights(copy, 'three', 'latest')
  assert tree['step'] == 0
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree['params'])]


def shape_of(value):
  """Returns the names and kinds in `value`, without numbers and texts."""
  if isinstance(value, dict):
    return {name: shape_of(x) for name, x in value.items()}
  if isinstance(value, list):
    return [shape_of(x) for x in value]
  return type(value).__name__


@pytest.fixture(scope='module')
def alone(data_dir, tmp_path_factory):
  """Both seeds, one after the other."""
  workdir = tmp_path_factory.mktemp('alone')
  config = create_config(data_dir, together=False)
  return workdir, tool.compare(config, workdir)


@pytest.fixture(scope='module')
def joint(data_dir, tmp_path_factory):
  """Both seeds together."""
  workdir = tmp_path_factory.mktemp('together')
  config = create_config(data_dir, together=True)
  return workdir, tool.compare(config, workdir)


@pytest.mark.slow
def test_each_seed_comes_to_what_it_comes_to_alone(alone, joint):
  for seed in (0, 1):
    expected = read_stages(alone[0], seed)
    found = read_stages(joint[0], seed)
    assert [s['name'] for s in found] == ['three', 'ten']
    for stage, other in zip(found, expected, strict=True):
      assert stage['status'] == 'done'
      assert stage['transfer'] == other['transfer']
      assert len(stage['epochs']) == len(other['epochs'])
      for row, wanted in zip(stage['epochs'], other['epochs'], strict=True):
        assert row.keys() == wanted.keys()
        assert row['global_step'] == wanted['global_step']
        for name in ('train_loss', 'val_loss', 'learning_rate', 'grad_norm'):
          assert row[name] == pytest.approx(wanted[name], rel=1e-4)
        for name in ('train_top1', 'val_top1'):
          assert row[name] == pytest.approx(wanted[name], abs=ONE_IMAGE)
    assert found[-1]['epochs'][-1]['global_step'] > 40
    for name in ('ema_loss', 'ema_top1'):
      ema = [s[-1]['epochs'][-1][name] for s in (found, expected)]
      assert ema[0] == pytest.approx(ema[1], rel=1e-3)
  losses = [read_stages(joint[0], s)[0]['epochs'][0] for s in (0, 1)]
  assert abs(losses[0]['train_loss'] / losses[1]['train_loss'] - 1) > 1e-2


@pytest.mark.slow
def test_first_weights_are_those_of_the_seed_bit_for_bit(
  alone, joint, tmp_path
):
  weights = [
    first_weights(workdir, seed, tmp_path / f'{i}-{seed}')
    for i, (workdir, _) in enumerate((alone, joint))
    for seed in (0, 1)
  ]
  assert weights[:2] == weights[2:]
  assert weights[0] != weights[1]


@pytest.mark.slow
def test_what_is_written_has_the_same_form(alone, joint):
  written = []
  for workdir, result in (alone, joint):
    saved = json.loads((workdir / 'comparison.json').read_text())
    assert saved['finished']
    assert saved['runs'] == result['runs']
    for volatile in ('environment', 'verdicts'):
      del saved[volatile]
    written.append(shape_of(saved))
  assert written[0] == written[1]
  files = [
    sorted(
      str(path.relative_to(workdir))
      for path in workdir.glob('cells/adamw/seed-*/*')
    )
    for workdir, _ in (alone, joint)
  ]
  assert files[0] == files[1]
  assert 'cells/adamw/seed-1/training_metrics.png' in files[1]


@pytest.mark.slow
def test_seeds_have_equal_parts_of_the_time(joint):
  workdir, _ = joint
  first, second = (read_stages(workdir, seed)[-1] for seed in (0, 1))
  for name in ('seconds', 'eval_seconds'):
    rows = zip(first['epochs'], second['epochs'], strict=True)
    assert all(a[name] == b[name] > 0 for a, b in rows)
  # Their sum is no longer than the clock says.
  paths = seed_directory(workdir, 0), seed_directory(workdir, 1)
  began = (paths[0] / 'config.json').stat().st_mtime
  ended = (paths[1] / 'outcome.json').stat().st_mtime
  total = sum(
    stage['seconds'] for seed in (0, 1) for stage in read_stages(workdir, seed)
  )
  assert 0 < total < ended - began
  assert first['handover_seconds'] == pytest.approx(
    second['handover_seconds'], rel=1e-6
  )


@pytest.mark.slow
def test_a_finished_comparison_runs_nothing_again(data_dir, joint):
  workdir, result = joint
  before = {
    path: path.stat().st_mtime_ns
    for path in (workdir / 'cells').rglob('*')
    if path.is_file()
  }
  for at_once in (True, False):
    again = tool.compare(create_config(data_dir, together=at_once), workdir)
    assert again['runs'] == result['runs']
  assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_saved_weights_are_evaluated_as_the_history_says(joint):
  workdir = seed_directory(joint[0], 1)
  config = jaxprog.load_config(str(workdir / 'config.json'))
  found = jaxprog.evaluate(config, workdir, stage='ten', weights='final')
  row = read_stages(joint[0], 1)[-1]['epochs'][-1]
  assert found['top1'] == pytest.approx(row['val_top1'], abs=1e-9)
  assert found['loss'] == pytest.approx(row['val_loss'], rel=1e-5)


def interrupt_once_saved(workdir, step):
  """Sends SIGTERM to this process when seed 1 has saved `step` or more."""
  latest = seed_directory(workdir, 1) / 'checkpoints' / 'ten' / 'latest'

  def wait():
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
      steps = [int(p.name) for p in latest.glob('*') if p.name.isdigit()]
      if any(x >= step for x in steps):
        os.kill(os.getpid(), signal.SIGTERM)
        return
      time.sleep(0.002)

  threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
def test_interrupted_seeds_go_on_also_where_one_has_lost_steps(
  data_dir, joint, tmp_path
):
  config = create_config(data_dir, together=True)
  interrupt_once_saved(tmp_path, 29)
  with pytest.raises(errors.Stopped):
    tool.compare(config, tmp_path)
  latest = seed_directory(tmp_path, 1) / 'checkpoints' / 'ten' / 'latest'
  saved = sorted(int(p.name) for p in latest.iterdir() if p.name.isdigit())
  assert len(saved) == 2
  assert 29 <= saved[-1] < 43
  # As if it had been killed between the saves of the two.
  shutil.rmtree(latest / str(saved[-1]))
  result = tool.compare(config, tmp_path)
  assert [x['status'] for x in result['runs']] == ['done', 'done']
  for seed in (0, 1):
    stage, whole = (
      read_stages(workdir, seed)[-1] for workdir in (tmp_path, joint[0])
    )
    began = saved[-1] if seed == 0 else saved[0]
    first = read_stages(tmp_path, seed)[0]['epochs'][-1]['global_step']
    assert stage['resumed_at_steps'] == [first + began]
    rows = zip(stage['epochs'], whole['epochs'], strict=True)
    for row, wanted in rows:
      for name in ('train_loss', 'val_loss'):
        assert row[name] == pytest.approx(wanted[name], rel=1e-4)


@pytest.mark.slow
def test_seeds_that_diverge_do_so_each_by_itself(data_dir, tmp_path):
  config = create_config(data_dir, together=True)
  config.grid = ({'stages[-1].optimizer': ('sgd_momentum',)},)
  stage = {'name': 'three', 'classes': ('1', '3'), 'learning_rate': 1e30}
  config.base.stages = [{**stage, 'num_epochs': 1}]
  result = tool.compare(config, tmp_path)
  assert [x['status'] for x in result['runs']] == ['diverged', 'diverged']
  for seed in (0, 1):
    directory = seed_directory(tmp_path, seed, 'sgd_momentum')
    log = (directory / 'incidents.jsonl').read_text().splitlines()
    messages = [json.loads(x)['message'] for x in log]
    assert sum('goes on by itself' in x for x in messages) == 1
    assert sum('another order of examples' in x for x in messages) == 2


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'budget': 'seconds'}, 'no seconds of their own'),
    ({'controls': True}, 'no seconds of their own'),
    ({'seeds_together': 1}, 'seeds_together must be True or False'),
  ],
)
def test_what_seconds_decide_is_refused(data_dir, change, said):
  config = create_config(data_dir, together=True)
  for name, value in change.items():
    with config.ignore_type():
      config[name] = value
  with pytest.raises(errors.UserError, match=said):
    cells.create_cells(config)


@pytest.mark.parametrize(
  'change', [{'target_top1': 0.5}, {'early_stopping_patience': 2}]
)
def test_stages_that_one_seed_may_end_early_are_refused(data_dir, change):
  config = create_config(data_dir, together=True)
  config.base.stages[-1] |= change
  with pytest.raises(errors.UserError, match='end at different steps') as e:
    cells.create_cells(config)
  assert e.value.where == "cell 'adamw': stage 'ten'"
  config.seeds_together = False
  assert cells.create_cells(config)


@pytest.mark.slow
def test_a_step_of_all_is_each_ones_step(data_dir):
  tasks = []
  for seed in (0, 1):
    config = stages.complete(create_config(data_dir, together=True).base)
    config.seed = seed
    config.stages[0].optimizer = 'adamw_8bit'
    setup = setup_lib.create_setup(config, only=['three'])
    tasks.append(setup_lib.create_task(setup, setup.chosen[0]))
  programs, program = together.Programs(tasks[0]), tasks[0].program(0)
  feeds = [feed.Feed(task, task.seed, 0) for task in tasks]
  states = [t.create_state(t.init(t.init_rng)) for t in tasks]
  rngs = [task.step_rng for task in tasks]
  for _ in range(3):
    batches = [x.next() for x in feeds]
    after, metrics = programs.train_step(program, 2)(
      programs.stack(states),
      programs.stack_batches(batches),
      programs.stack(rngs),
    )
    for i, own in enumerate(programs.unstack(after)):
      state, expected = tasks[0].train_steps[program](
        states[i], batches[i], rngs[i]
      )
      np.testing.assert_allclose(
        metrics['loss'][i], expected['loss'], rtol=1e-6
      )
      # A rate of 5e-4 moves no weight further than that.
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        own.variables,
        state.variables,
      )
    states = programs.unstack(after)
  for x in feeds:
    x.close()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('count', 'side', 'kernel', 'stride'),
  [(12, 16, 3, 1), (72, 16, 1, 1), (40, 16, 3, 2), (160, 4, 3, 1)],
)
def test_convolutions_batch_as_each_by_itself(count, side, kernel, stride):
  rng = np.random.default_rng(0)
  shapes = (
    (2, count, side, side, 64),
    (2, kernel, kernel, 64, 96),
  )
  x, w = (rng.normal(size=s).astype(np.float32) for s in shapes)
  flop = 2 * x[0].size * w[0].size / 64 / stride**2
  assert flop > conv._LEAST_FLOP

  @jax.value_and_grad
  def loss(operands):
    y = conv.conv(*operands, stride, kernel // 2)
    return (conv.max_pool(y, 3, 2, 1) ** 2).mean()

  both = jax.jit(jax.vmap(loss))((x, w))
  for i in range(2):
    each = jax.jit(loss)((x[i], w[i]))
    for found, wanted in zip(
      jax.tree.leaves(both), jax.tree.leaves(each), strict=True
    ):
      scale = np.abs(wanted).max()
      np.testing.assert_allclose(found[i], wanted, atol=2e-5 * scale)

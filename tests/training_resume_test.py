"""A stage under way goes on in the same epoch, whatever its config is now."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import runs
from tensorboard.backend.event_processing import plugin_event_accumulator

import jaxprog
from jaxprog import files
from jaxprog.data import records
from jaxprog.reliability import checkpoints, integrity
from jaxprog.training import described, ladder, trained
from jaxprog.training import setup as setup_lib

FOUR = '--config.stages[0].num_epochs=4'
BATCH = '--config.stages[0].batch_size'


@pytest.fixture(scope='module')
def arguments(data_dir):
  return (
    f'--config=tests/tiny_config.py:{data_dir}',
    '--only=three',
    FOUR,
    '--config.log_every_steps=1',
  )


def with_batch(arguments, batch_size):
  return *arguments, f'{BATCH}={batch_size}'


@pytest.fixture(scope='module')
def left(arguments, tmp_path_factory):
  """Two of four epochs of six steps, and then an end."""
  workdir = tmp_path_factory.mktemp('left')
  start(with_batch(arguments, 72), workdir, epochs=2)
  return workdir


def start(arguments, workdir, epochs):
  """Trains until `epochs` are over."""
  config = load_config(arguments)
  with pytest.raises(runs.Enough):
    ladder.train(
      config, workdir, only=['three'], on_epoch=runs.stop_after(epochs)
    )


def load_config(arguments):
  given = [x.partition('=') for x in arguments]
  overrides = {
    name.removeprefix('--config.'): value
    for name, _, value in given
    if name.startswith('--config.')
  }
  return jaxprog.load_config(given[0][2], overrides)


@pytest.fixture
def workdir(left, tmp_path):
  return shutil.copytree(left, tmp_path / 'run')


@pytest.fixture(scope='module')
def left_early(arguments, tmp_path_factory):
  """Three of the six steps of the first epoch."""
  workdir = tmp_path_factory.mktemp('early')
  often = '--config.checkpoint_every_steps=3'
  start((*with_batch(arguments, 72), often), workdir, epochs=1)
  latest = workdir / 'checkpoints' / 'three' / 'latest'
  integrity.remove(latest, 6)
  assert integrity.list_steps(latest) == [3]
  return workdir


@pytest.fixture
def early(left_early, tmp_path):
  return shutil.copytree(left_early, tmp_path / 'early')


def go_on(arguments, workdir, *changes, batch_size=72):
  result = runs.call_main(
    *with_batch(arguments, batch_size),
    f'--workdir={workdir}',
    '--allow_config_change',
    *changes,
  )
  assert result.returncode == 0, result.stderr
  (stage,) = runs.read_history(workdir)['stages']
  return stage


@pytest.mark.parametrize(
  ('batch_size', 'per_epoch'),
  [pytest.param(144, 3, marks=pytest.mark.slow), (36, 12)],
)
def test_another_batch_goes_on_in_the_same_epoch(
  arguments, workdir, batch_size, per_epoch
):
  (before,) = runs.read_history(workdir)['stages']
  stage = go_on(arguments, workdir, batch_size=batch_size)
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
  report = (workdir / 'training_report.txt').read_text()
  said = f'after 2 epochs it went on with batch_size {batch_size} (before: 72)'
  assert said in ' '.join(report.split())


def create_task(arguments, batch_size):
  config = load_config(with_batch(arguments, batch_size))
  made = setup_lib.create_setup(config, only=['three'])
  return setup_lib.create_task(made, made.chosen[0])


def test_rates_schedule_and_length_go_on_in_the_same_epoch(arguments, workdir):
  # An older program noted no time of the run, but what its stages took.
  history = runs.read_history(workdir)
  del history['wall_seconds']
  history['stages'][0]['seconds'] = 3600.0
  files.write_json(workdir / 'training_history.json', history)
  stage = go_on(
    arguments,
    workdir,
    '--config.stages[0].num_epochs=3',
    '--config.stages[0].schedule=constant',
    '--config.stages[0].learning_rate=0.004',
    '--config.stages[0].optimizer=sgd_momentum',
    '--config.stages[0].ema_decay=0.5',
  )
  rows = stage['epochs']
  assert [row['global_step'] for row in rows] == [6, 12, 18]
  assert [row['learning_rate'] == pytest.approx(0.004) for row in rows] == [
    False,
    False,
    True,
  ]
  assert runs.read_history(workdir)['wall_seconds'] > 3600
  # The rates that it had are still there, and then come those of now.
  rates = stage['learning_rates']
  assert len(rates) == 18
  assert max(rates[:12]) > 0.009
  np.testing.assert_allclose(rates[12:], 0.004, rtol=1e-4)
  assert (stage['num_epochs'], stage['schedule']) == (3, 'constant')
  (change,) = stage['config_changes']
  assert change['fields']['num_epochs'] == [4, 3]
  assert change['fields']['optimizer'] == ['adamw', 'sgd_momentum']
  assert change['renewed'] == ['ema', 'opt_state']
  assert 'ema_top1' in rows[2]
  report = ' '.join((workdir / 'training_report.txt').read_text().split())
  assert 'the optimizer began anew' in report


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('model', 'resnet18', 'another model'),
    ('num_filters', 8, 'another num_filters'),
    ('stages[0].classes', "('1','3')", 'classes of the dataset'),
    ('stages[0].eval_split', 'holdout:20%', 'another eval_split'),
    ('stages[0].num_epochs', 1, '2 epochs are trained already'),
    ('std_rgb', '(0.5, 0.5, 0.5)', 'another std_rgb'),
    ('stages[0].eval_crop', 0.5, 'another eval_crop'),
    ('stages[0].eval_flip', True, 'another eval_flip'),
    ('stages[0].eval_interpolation', 'bicubic', 'another eval_interpolation'),
    ('stages[0].image_size', 16, 'Set its eval_image_size to 8'),
  ],
)
def test_what_cannot_go_on_is_named_and_nothing_is_lost(
  arguments, left, field, value, expected
):
  before = {
    path: path.read_bytes() for path in left.glob('*.json*') if path.is_file()
  }
  result = runs.call_main(
    *with_batch(arguments, 72),
    f'--workdir={left}',
    '--allow_config_change',
    f'--config.{field}={value}',
  )
  assert result.returncode == 2, result.stderr
  assert len(result.stderr.strip().splitlines()) <= 3
  assert expected in result.stderr
  after = {
    path: path.read_bytes() for path in left.glob('*.json*') if path.is_file()
  }
  assert after == before


def test_an_open_epoch_does_not_end_without_a_step(arguments, early):
  result = runs.call_main(
    *with_batch(arguments, 72),
    f'--workdir={early}',
    '--allow_config_change',
    '--config.stages[0].num_epochs=0.5',
  )
  assert result.returncode == 2, result.stderr
  assert '0.5 epochs are trained already' in result.stderr
  # The one step of 0.6 epochs is half an epoch, which is trained already.
  stage = go_on(
    arguments,
    early,
    '--config.stages[0].num_epochs=0.6',
    '--config.stages[0].optimizer=lamb',
    batch_size=216,
  )
  assert [row['epoch'] for row in stage['epochs']] == [1]
  (change,) = stage['config_changes']
  assert change['epoch'] == 0.5
  # Those of adamw have the same shapes.
  assert change['renewed'] == ['opt_state']


def test_the_best_weights_stay_in_use_with_another_image_size(
  arguments, workdir
):
  """Until there are better ones, trained with the new size."""
  path = workdir / 'config.json'
  config = json.loads(path.read_text())
  config['stages'][0] |= {'image_size': 16, 'eval_image_size': 8}
  path.write_text(json.dumps(config))
  found = trained.load_trained(
    jaxprog.load_config(str(path)), workdir, stage='three'
  )
  assert found.trained_stage.image_size == 8
  other = load_config((*arguments, '--config.stages[0].image_size=24'))
  with pytest.raises(jaxprog.UserError, match='trained with image_size 8'):
    trained.load_trained(other, workdir, stage='three')


def test_stages_of_separate_calls_do_not_erase_each_other(
  arguments, left, tmp_path
):
  """Not even where one goes on that was left before the other began."""
  workdir = shutil.copytree(left, tmp_path / 'run')
  shown = (
    *with_batch(arguments, 72),
    f'--workdir={workdir}',
    '--config.tensorboard=True',
    '--config.stages[2].image_size=8',
    '--allow_config_change',
  )
  for name in ('ten_again', 'three'):
    result = runs.call_main(*shown, f'--only={name}')
    assert result.returncode == 0, result.stderr
  three, again = runs.read_history(workdir)['stages']
  # Where the first one was to end the second one begins: 29 steps.
  assert (again['first_step'], again['last_step']) == (24, 53)
  rows = [row['global_step'] for row in three['epochs']]
  assert rows == [6, 12, 59, 65]
  assert three['resumed_at_steps'] == [53]
  events = plugin_event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard' / 'run' / 'train')
  ).Reload()
  steps = [x.step for x in events.Tensors('optimization/loss')]
  assert steps == list(range(25, 66))
  pictures = [x.step for x in events.Tensors('images/ten_again/augmented')]
  assert pictures == [25]


def test_a_stage_of_an_earlier_version_goes_on(arguments, tmp_path):
  """One that held out by names alone, and saved no config beside states."""
  describe = described.weights_meta
  arguments = (
    *with_batch(arguments, 72),
    '--config.stages[0].eval_split=holdout:20%',
    '--config.stages[0].num_epochs=2',
  )

  def describe_less(task):
    return {k: v for k, v in describe(task).items() if k != 'config'}

  with (
    mock.patch.object(records, 'HOLDOUT_RULE', 1),
    mock.patch.object(described, 'weights_meta', describe_less),
  ):
    start(arguments, tmp_path, epochs=1)
  path = tmp_path / 'training_history.json'
  history = runs.read_history(tmp_path)
  del history['stages'][0]['holdout']
  path.write_text(json.dumps(history))
  check = '--mode=check', '--config.check_steps=0', f'--workdir={tmp_path}'
  looked = runs.call_main(*arguments, *check)
  assert looked.returncode == 0, looked.stdout
  looked = runs.call_main(
    *arguments, *check, '--allow_config_change', '--config.blur_pool=True'
  )
  assert 'another blur_pool' in looked.stdout
  changes = (
    '--config.stages[0].label_smoothing=0.1',
    '--config.stages[0].ema_decay=0.5',
  )
  stage = go_on(
    arguments[:-3], tmp_path, *arguments[-2:], *changes, batch_size=36
  )
  (change,) = stage['config_changes']
  assert change['fields'] == {
    'batch_size': [72, 36],
    'ema_decay': [0.0, 0.5],
    'label_smoothing': [0.0, 0.1],
  }
  assert change['renewed'] == ['ema']
  per_epoch = stage['num_train_images'] // 72
  rows = [row['global_step'] for row in stage['epochs']]
  assert rows[1] - rows[0] in (2 * per_epoch, 2 * per_epoch + 1)
  assert stage['holdout'] == {
    'rule': 1,
    'part': 0.2,
    'images': stage['num_eval_images'],
  }


def test_what_an_earlier_version_left_keeps_its_place_and_its_config(
  arguments, early
):
  """Neither its states nor its marker tell a config or a first step."""
  stage_directory = early / 'checkpoints' / 'three'
  saved = stage_directory / 'latest' / '3'
  path = saved / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  del meta['config'], meta['record']['first_step'], meta['record']['last_step']
  path.write_text(json.dumps(meta))
  integrity.write_manifest(saved)
  history = runs.read_history(early)
  (before,) = history['stages']
  del before['last_step']
  history['stages'].insert(0, {**before, 'name': 'ten'})
  (early / 'training_history.json').write_text(json.dumps(history))
  shown = *with_batch(arguments, 72), f'--workdir={early}'
  shown += '--config.stages[0].num_epochs=1', '--allow_config_change'
  result = runs.call_main(*shown)
  assert result.returncode == 0, result.stderr
  stage = runs.read_history(early)['stages'][1]
  assert stage['resumed_at_steps'] == [9]
  assert [row['global_step'] for row in stage['epochs']] == [12]

  done = checkpoints.read_done(early, 'three')
  del done['config']
  (stage_directory / 'done.json').write_text(json.dumps(integrity.sign(done)))
  result = runs.call_main(*shown, '--config.stages[0].label_smoothing=0.1')
  assert result.returncode == 0, result.stderr
  config = json.loads((early / 'config.json').read_text())
  assert config['stages'][0]['label_smoothing'] == 0.0


def test_damage_that_training_sets_aside_hides_no_plan(arguments, workdir):
  latest = workdir / 'checkpoints' / 'three' / 'latest'
  newest = max((x for x in latest.iterdir() if x.name.isdigit()), key=by_step)
  for path in (newest / 'meta').iterdir():
    path.write_text('{')
  (workdir / 'checkpoints' / 'ten').mkdir()
  (workdir / 'checkpoints' / 'ten' / 'done.json').write_text('{}')
  looked = runs.call_main(
    *with_batch(arguments, 72),
    '--mode=check',
    '--config.check_steps=0',
    f'--workdir={workdir}',
  )
  assert looked.returncode == 0, looked.stdout + looked.stderr
  assert f'step {newest.name} is damaged' in looked.stdout
  assert 'ten/done.json is damaged' in looked.stdout
  assert '\nstage  ' in looked.stdout


def by_step(path):
  return int(path.name)

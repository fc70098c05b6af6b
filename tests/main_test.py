"""What users do: the command line, in a process of its own."""

import json
import shutil
import signal

import pytest
import runs

CONFIG = 'tests/tiny_config.py'


@pytest.fixture(scope='module')
def config(data_dir):
  return f'--config={CONFIG}:{data_dir}'


@pytest.fixture(scope='module')
def trained(run_main, config, tmp_path_factory):
  """A finished run, uninterrupted."""
  workdir = tmp_path_factory.mktemp('trained')
  result = run_main(config, f'--workdir={workdir}', '--config.tensorboard=true')
  assert result.returncode == 0, result.stderr
  return workdir, result


def test_a_run_writes_what_the_design_says(trained):
  workdir, _ = trained
  for name in (
    'config.json',
    'environment.json',
    'training_history.json',
    'training_report.txt',
    'training_metrics.png',
  ):
    assert (workdir / name).stat().st_size > 0
  assert list((workdir / 'tensorboard').glob('events.out.tfevents.*'))
  for stage in ('three', 'ten', 'ten_again'):
    for kind in ('latest', 'best', 'final'):
      assert any((workdir / 'checkpoints' / stage / kind).iterdir())
  assert not (workdir / 'error.log').exists()


def test_the_history_tells_the_ladder(trained):
  history = runs.read_history(trained[0])
  assert history['version'] == 1
  three, ten, again = history['stages']
  assert [s['status'] for s in history['stages']] == ['done'] * 3
  assert [len(s['epochs']) for s in history['stages']] == [2, 2, 1]
  assert (three['num_classes'], ten['num_classes']) == (3, 10)
  assert ten['num_train_images'] == 1437
  assert ten['num_eval_images'] == 360
  assert three['transfer']['from'] is None
  assert ten['transfer']['from'] == 'three'
  assert ten['transfer']['fresh'] == ['head']
  assert again['transfer']['from'] == 'ten'
  assert again['transfer']['fresh'] == []
  # 1.5 epochs of 1437 // 48 = 29 steps, after two of the first stage.
  per_epoch = three['steps_per_epoch']
  assert ten['epochs'][-1]['global_step'] == 2 * per_epoch + round(1.5 * 29)
  assert 0 <= ten['epochs'][0]['val_top1'] <= ten['epochs'][0]['val_top5'] <= 1


def test_tensorboard_has_the_figures_of_the_history(trained):
  from tensorboard.backend.event_processing import event_accumulator

  workdir, _ = trained
  events = event_accumulator.EventAccumulator(str(workdir / 'tensorboard'))
  events.Reload()
  tags = set(events.Tags()['tensors']) | set(events.Tags()['scalars'])
  assert {'eval/ten/top1', 'train/loss', 'perf/images_per_second'} <= tags


def test_a_finished_run_is_not_trained_again(trained, config):
  workdir, _ = trained
  before = runs.read_history(workdir)
  result = runs.call_main(config, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('done before') == 3
  assert runs.read_history(workdir) == before


@pytest.mark.parametrize('devices', [1, 3, 8])
def test_eval_counts_every_image_once_on_any_devices(
  run_main, trained, devices
):
  workdir, _ = trained
  result = run_main('--mode=eval', f'--workdir={workdir}', devices=devices)
  assert result.returncode == 0, result.stderr
  best = runs.read_history(workdir)['stages'][-1]['best']['top1']
  assert result.stdout.strip() == f'{100 * best:.1f}'


def test_eval_of_another_stage(trained):
  workdir, _ = trained
  result = runs.call_main(
    '--mode=eval', f'--workdir={workdir}', '--stage=three', '--weights=final'
  )
  final = runs.read_history(workdir)['stages'][0]['epochs'][-1]['val_top1']
  assert result.stdout.strip() == f'{100 * final:.1f}'


@pytest.mark.parametrize(
  'signum',
  [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_interrupted_equals_uninterrupted(
  run_main, trained, config, tmp_path, signum
):
  often = '--config.checkpoint_every_steps=5'
  arguments = (config, often, f'--workdir={tmp_path}')
  process = runs.start_main(*arguments)
  runs.wait_for_step(process, tmp_path, 'ten', 10)
  process.send_signal(signum)
  output = process.communicate(timeout=60)[0]
  expected = -signum if signum == signal.SIGKILL else 143
  assert process.returncode == expected, output
  result = run_main(*arguments)
  assert result.returncode == 0, result.stderr
  assert 'three: done before' in result.stdout
  resumed = runs.read_history(tmp_path)
  assert resumed['stages'][1]['resumed_at_steps']
  assert runs.without_times(resumed) == runs.without_times(
    runs.read_history(trained[0])
  )
  for stage in ('ten', 'ten_again'):
    assert runs.bits(tmp_path, stage) == runs.bits(trained[0], stage)


@pytest.mark.slow
def test_eight_devices_train_like_one(run_main, trained, config, tmp_path):
  result = run_main(config, f'--workdir={tmp_path}', devices=8)
  assert result.returncode == 0, result.stderr
  # Sums over the batch are added in another order: f32 rounding, which the 10
  # steps of the first stage leave alone and the next 70 amplify.
  for one, eight, rel in zip(
    runs.read_history(trained[0])['stages'],
    runs.read_history(tmp_path)['stages'],
    (1e-5, 5e-3, 1e-2),
    strict=True,
  ):
    for a, b in zip(one['epochs'], eight['epochs'], strict=True):
      assert b['train_loss'] == pytest.approx(a['train_loss'], rel=rel)
      assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=5 * rel)


def test_only_and_skip(config, tmp_path):
  arguments = (config, f'--workdir={tmp_path}')
  first = runs.call_main(*arguments, '--only=three')
  assert first.returncode == 0, first.stderr
  second = runs.call_main(*arguments, '--skip=three,ten')
  assert second.returncode == 0, second.stderr
  stages = runs.read_history(tmp_path)['stages']
  assert [s['name'] for s in stages] == ['three', 'ten_again']
  assert stages[1]['transfer']['from'] == 'three'
  assert 'from three' in second.stdout


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--config.stages[0].num_epoch=3'], "Did you mean 'num_epochs'"),
    (['--config.stages[0].learning_rate=nan'], 'learning_rate'),
    (['--config.stages[7].num_epochs=3'], 'out of range'),
    (['--config.seed'], 'needs a value'),
    (['--config.stages[1].num_classes=11'], '11'),
    (['--config.stages[2].dataset=imagenet_mini'], 'ten_again'),
    (['--only=tree'], "Did you mean 'three'"),
    (['--mode=trian'], "Did you mean 'train'"),
    (['--workdri=x'], "Did you mean 'workdir'"),
    (['train'], 'belongs to no flag'),
    (['--config.platform=tpu'], 'tpu'),
    (['--mode=eval'], 'No stage'),
  ],
)
def test_mistakes_get_three_lines(config, tmp_path, arguments, expected):
  result = runs.call_main(config, f'--workdir={tmp_path}/run', *arguments)
  assert result.returncode == 2, result.stderr
  lines = result.stderr.strip().split('\n')
  assert len(lines) <= 3
  assert expected in result.stderr
  assert 'Traceback' not in result.stderr
  written = [p.name for p in tmp_path.rglob('*') if p.is_file()]
  assert written in ([], ['error.log'])


def test_no_config_and_no_workdir(run_main, config):
  for run, *arguments in (
    (run_main, '--config=configs/nothing.py'),
    (runs.call_main,),
    (runs.call_main, config),
  ):
    result = run(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().split('\n')) <= 3


def test_a_batch_that_devices_cannot_share(run_main, config, tmp_path):
  result = run_main(config, f'--workdir={tmp_path}', devices=5)
  assert result.returncode == 2
  assert 'batch_size 48 is not divisible by 5' in result.stderr


def test_another_config_in_the_same_workdir(trained, config):
  workdir, _ = trained
  change = '--config.stages[1].batch_size=24'
  result = runs.call_main(config, f'--workdir={workdir}', change)
  assert result.returncode == 2
  assert 'ten.batch_size: 48 -> 24' in result.stderr


def test_what_is_done_stays_as_it_was_in_config_json(trained, config, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  before = json.loads((workdir / 'config.json').read_text())
  changes = '--config.stages[1].batch_size=24', '--allow_config_change'
  result = runs.call_main(config, f'--workdir={workdir}', *changes)
  assert result.returncode == 0, result.stderr
  after = json.loads((workdir / 'config.json').read_text())
  assert after['stages'] == before['stages']


def test_an_unwritable_workdir(config, tmp_path):
  (tmp_path / 'file').write_text('')
  result = runs.call_main(config, f'--workdir={tmp_path}/file/run')
  assert result.returncode == 2
  assert 'Cannot write to the workdir' in result.stderr


def test_prepare(run_main, tmp_path):
  result = run_main('--mode=prepare', f'--config={CONFIG}:{tmp_path}')
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('digits: prepared') == 1
  assert (tmp_path / 'prepared').is_dir()

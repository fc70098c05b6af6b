"""What users do: the command line, in a process of its own."""

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import history_fixture
import pytest
import runs

from jaxprog import cli, files, version
from jaxprog.reliability import lock

CONFIG = 'tests/tiny_config.py'


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory):
  """A finished run, uninterrupted."""
  workdir = tmp_path_factory.mktemp('trained')
  result = runs.call_main(config, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  return workdir


def test_a_run_writes_what_the_design_says(trained):
  for name in (
    'config.json',
    'environment.json',
    'training_history.json',
    'training_report.txt',
    'training_metrics.png',
  ):
    assert (trained / name).stat().st_size > 0
  for stage in ('three', 'ten', 'ten_again'):
    for kind in ('latest', 'best', 'final'):
      assert any((trained / 'checkpoints' / stage / kind).iterdir())
  assert not (trained / 'error.log').exists()


def test_the_history_tells_the_ladder(trained):
  history = runs.read_history(trained)
  assert history['version'] == 1
  for stage in history['stages']:
    assert set(history_fixture.STAGE_FIELDS) <= set(stage)
    for row in stage['epochs']:
      assert set(history_fixture.create_row(1)) <= set(row)
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
  # The digits are nearly, but not quite, equally many.
  best = ten['epochs'][ten['best']['epoch'] - 1]
  assert ten['best']['balanced_top1'] == best['val_balanced_top1']
  assert 0 < abs(best['val_balanced_top1'] - best['val_top1']) < 0.1
  assert 0 <= ten['epochs'][0]['val_top1'] <= ten['epochs'][0]['val_top5'] <= 1


def test_a_finished_run_is_not_trained_again(trained, config):
  before = runs.read_history(trained)
  result = runs.call_main(config, f'--workdir={trained}')
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('done before') == 3
  assert runs.read_history(trained) == before


@pytest.mark.parametrize(
  'devices', [3, pytest.param(8, marks=pytest.mark.slow)]
)
def test_eval_counts_every_image_once_on_any_devices(
  run_main, trained, devices
):
  result = run_main('--mode=eval', f'--workdir={trained}', devices=devices)
  assert result.returncode == 0, result.stderr
  best = runs.read_history(trained)['stages'][-1]['best']['top1']
  assert result.stdout.strip() == f'{100 * best:.1f}'


def test_eval_of_another_stage(trained):
  result = runs.call_main(
    '--mode=eval', f'--workdir={trained}', '--stage=three', '--weights=final'
  )
  final = runs.read_history(trained)['stages'][0]['epochs'][-1]['val_top1']
  assert result.stdout.strip() == f'{100 * final:.1f}'


@pytest.mark.parametrize(
  'signum',
  [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_interrupted_equals_uninterrupted(trained, config, tmp_path, signum):
  often = '--config.checkpoint_every_steps=10'
  arguments = (config, often, f'--workdir={tmp_path}', '--only=three,ten')
  process = runs.start_main(*arguments)
  runs.wait_for_step(process, tmp_path, 'ten', 10)
  process.send_signal(signum)
  output = process.communicate(timeout=60)[0]
  expected = -signum if signum == signal.SIGKILL else 143
  assert process.returncode == expected, output
  result = runs.call_main(*arguments)
  assert result.returncode == 0, result.stderr
  assert 'three: done before' in result.stdout
  resumed = runs.read_history(tmp_path)['stages']
  assert resumed[1]['resumed_at_steps']
  expected = runs.read_history(trained)['stages'][:2]
  assert runs.without_times(resumed) == runs.without_times(expected)
  assert runs.bits(tmp_path, 'ten') == runs.bits(trained, 'ten')


@pytest.mark.slow
def test_eight_devices_train_like_one(run_main, trained, config, tmp_path):
  result = run_main(config, f'--workdir={tmp_path}', devices=8)
  assert result.returncode == 0, result.stderr
  # Sums over the batch are added in another order: f32 rounding, which the 10
  # steps of the first stage leave alone and the next 70 amplify.
  for one, eight, rel in zip(
    runs.read_history(trained)['stages'],
    runs.read_history(tmp_path)['stages'],
    (1e-5, 5e-3, 1e-2),
    strict=True,
  ):
    for a, b in zip(one['epochs'], eight['epochs'], strict=True):
      assert b['train_loss'] == pytest.approx(a['train_loss'], rel=rel)
      assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=5 * rel)


def test_only_and_skip(config, tmp_path):
  arguments = (
    config,
    f'--workdir={tmp_path}',
    '--config.stages[0].num_epochs=1',
  )
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
    (['--mode=trian', '--help'], "Did you mean 'train'"),
    (['--workdri=x'], "Did you mean 'workdir'"),
    (['train'], 'belongs to no flag'),
    (['--only=three', 'ten'], 'Commas separate names: --only=three,ten.'),
    (['--skip', 'three', 'ten', '--mode=check'], '--skip=three,ten.'),
    (['--batch_size=3'], 'Write --config.stages[0].batch_size=3.'),
    (['--seed', '1'], 'Write --config.seed=VALUE.'),
    (['--mode=tune', '--seed=1'], 'Write --config.base.seed=1.'),
    (['--config.platform=tpu'], 'tpu'),
    (['--process_id=x'], '--process_id takes a whole number'),
    (['--connect_seconds=-1'], 'at least 1'),
    (['--mode=prepare', '--download=maybe'], 'takes true or false'),
    (['--topology=v5e:2x2'], '--mode=train takes no --topology'),
    (['--mode=check', '--process_id=0'], 'it is for --mode=train, eval.'),
    (['--coordinator=here:99999'], 'is not HOST:PORT'),
    (['--mode=eval', '--only=three'], '--mode=eval takes no --only'),
    (['--mode=eval', '--download'], 'it is for --mode=prepare.'),
    (['--mode=verify', '--checkpoints', '--only=three'], 'takes no --only'),
    (['--mode=eval', '--checkpoints'], '--mode=eval takes no --checkpoints'),
    (['--mode=eval', '--probe', '--flip_average'], 'it out, or --probe.'),
    (['--mode=eval'], 'There is no run in'),
    (['--mode=export', '--weights=ema'], 'There is no run in'),
    (['--mode=prepare', '--sha256=zz'], "'zz' is no SHA-256"),
    (['--mode=plan', '--topology='], 'There is no --topology'),
    (['--mode=lr_find', '--only=three,ten'], 'for one stage'),
    (['--mode=lr_find', '--stage=tree'], "Did you mean 'three'"),
    (['--mode=compare'], 'of one run'),
    (['--mode=tune'], 'of one run'),
    (['--config=README.md'], 'a .py or a .json file'),
    (['--config=quikstart'], "Did you mean 'quickstart'"),
    (['--config=configs/tune_digits.py'], 'Use --mode=tune'),
    (['--workdir=~nosuchuser/run'], 'home directory ~nosuchuser'),
    (['--workdir='], 'There is no --workdir'),
    (['--workdir=\udcff'], 'is not UTF-8'),
    (['--workdir=runs/[a]'], 'a folder with [ in its name'),
    (['--config.data_dir=\udcff'], 'is not UTF-8'),
    (['--config.data_dir=abc://bucket/data'], 'Nothing here reads abc://'),
    (['--config.compilation_cache_dir=/proc/none'], 'compilation cache'),
    (['--config.stages[0].init_from=no.safetensors'], 'no such file'),
    (['--config.stages[0].eval_split=holdout:0.001%'], 'hold-out'),
  ],
)
def test_mistakes_get_three_lines_and_leave_nothing(
  config, tmp_path, arguments, expected
):
  result = runs.call_main(config, f'--workdir={tmp_path}/new/run', *arguments)
  assert result.returncode == 2, result.stderr
  assert len(result.stderr.strip().split('\n')) <= 3
  assert expected in result.stderr
  assert 'Traceback' not in result.stderr
  assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_had_leaves_no_folder(tmp_path):
  for dataset in ('imagenet_mini', 'imagenet2012', 'tfds:nosuch', 'folder:x'):
    result = runs.call_main(
      '--mode=prepare',
      f'--config={CONFIG}:{tmp_path}/data',
      f'--config.stages[0].dataset={dataset}',
      '--only=three',
    )
    assert result.returncode == 2, result.stderr
    assert list(tmp_path.iterdir()) == []
  result = runs.call_main(
    '--mode=verify',
    f'--config={CONFIG}:{tmp_path}/data',
    '--config.stages[0].dataset=imagenet_mini',
    '--only=three',
  )
  assert result.returncode == 1, result.stderr
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('mode', ['', *cli.MODES])
def test_help_tells_all(mode):
  asked = (f'--mode={mode}', '--help') if mode else ('-h',)
  result = runs.call_main(*asked)
  assert (result.returncode, result.stderr) == (0, '')
  lines = result.stdout.splitlines()
  assert len(lines) <= 40
  assert max(map(len, lines)) <= 80
  told = cli.MODES[mode].flags if mode else ('config=', 'workdir=', 'version')
  for flag in told:
    assert f'--{flag}' in result.stdout
  for name, row in cli.MODES.items():
    assert (row.what in result.stdout) == (mode in ('', name))


def test_the_examples_of_help_are_taken():
  for name, mode in cli.MODES.items():
    asked = cli.create_flags()
    cli.parse_flags(asked, ['jaxprog', f'--mode={name}', *mode.example.split()])
    cli.check_flags(asked)


def test_the_command_line_is_a_script_a_package_and_a_module(tmp_path):
  env = {**os.environ, 'PYTHONPATH': str(runs.ROOT)}
  for command in ([str(runs.ROOT / 'main.py')], ['-m', 'jaxprog']):
    result = subprocess.run(
      [sys.executable, *command, '--version'],
      cwd=tmp_path,
      env=env,
      capture_output=True,
      text=True,
    )
    assert result.stdout == f'jaxprog {version.VERSION}\n', result.stderr


def test_the_first_line_comes_before_jax_is_loaded(tmp_path):
  os.mkfifo(tmp_path / 'fifo')
  (tmp_path / 'jax').mkdir()
  # In the place of JAX: what is loaded only once a line has come.
  held = f'open({str(tmp_path / "fifo")!r}).read()\nraise SystemExit(3)\n'
  (tmp_path / 'jax' / '__init__.py').write_text(held)
  for mode, name in (('train', 'stdout'), ('eval', 'stderr')):
    process = subprocess.Popen(
      [sys.executable, 'main.py', f'--mode={mode}', f'--config={CONFIG}:none'],
      cwd=runs.ROOT,
      env={**os.environ, 'PYTHONPATH': str(tmp_path)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    stream = getattr(process, name)
    assert select.select([stream], [], [], 60)[0]
    what = f'"jaxprog {version.VERSION}, {mode}"'
    assert stream.readline() == f'event=doing what={what} seconds=0\n'
    (tmp_path / 'fifo').write_text('')
    process.communicate(timeout=60)
    assert process.returncode == 3


@pytest.mark.faults
@pytest.mark.slow
def test_a_run_from_nothing_is_never_silent_for_ten_seconds(tmp_path):
  env = {**os.environ}
  env.pop('JAX_COMPILATION_CACHE_DIR')
  began = time.monotonic()
  process = subprocess.Popen(
    [
      sys.executable,
      'main.py',
      '--config=quickstart',
      f'--workdir={tmp_path}/run',
      f'--config.data_dir={tmp_path}/data',
      f'--config.compilation_cache_dir={tmp_path}/cache',
    ],
    cwd=runs.ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  lines = [(0.0, '')]
  lines += [(time.monotonic() - began, line) for line in process.stdout]
  assert process.wait() == 0
  lines.append((time.monotonic() - began, 'the end'))
  gaps = [
    (now - before, line)
    for (before, _), (now, line) in itertools.pairwise(lines)
  ]
  print(''.join(f'{at:7.2f}  {line}' for at, line in lines))
  assert max(gaps)[0] < 10.0, max(gaps)
  text = ''.join(line for _, line in lines)
  assert f'report   {tmp_path}/run/report.html' in text
  assert f'main.py --mode=eval --workdir={tmp_path}/run' in text


def test_every_flag_is_for_some_mode():
  known = {'config', 'workdir', 'mode', 'help', 'h', 'version'}
  for mode in cli.MODES.values():
    known |= {*mode.flags}
  assert {*cli.create_flags()} == known


@pytest.mark.parametrize(
  'mode',
  ['train', 'verify --checkpoints', 'predict --input=docs/digit.png']
  + [x for x in cli.MODES if x not in ('train', 'predict', 'compare', 'tune')],
)
def test_a_run_that_is_not_there_is_said_with_what_is_near(tmp_path, mode):
  files.write_json(tmp_path / 'first' / 'config.json', {})
  words = f'--mode={mode}'.split(), f'--workdir={tmp_path}/fist'
  result = runs.call_main(*words[0], words[1])
  assert result.returncode == 2
  assert result.stderr.strip().split('\n') == [
    f'There is no run in {tmp_path}/fist.',
    f'--workdir={tmp_path}/fist',
    f"Did you mean '{tmp_path}/first'?",
  ]
  assert [x.name for x in tmp_path.iterdir()] == ['first']
  above = runs.call_main(*words[0], f'--workdir={tmp_path}')
  assert f'Known: {tmp_path}/first.' in above.stderr


@pytest.mark.parametrize('mode', ['train', 'compare', 'tune'])
def test_a_refused_second_process_writes_nothing(data_dir, tmp_path, mode):
  kind = {'train': 'tiny'}.get(mode, mode)
  with lock.Lock(tmp_path / 'run'):
    before = runs.snapshot(tmp_path)
    result = runs.call_main(
      f'--mode={mode}',
      f'--config=tests/{kind}_config.py:{data_dir}',
      f'--workdir={tmp_path}/run',
    )
    assert runs.snapshot(tmp_path) == before
  assert result.returncode == 2
  assert 'has been using this workdir since' in result.stderr


def test_what_fails_unexpectedly_makes_no_workdir_for_its_traceback(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(cli, 'run', lambda *given: 1 / 0)
  arguments = config, f'--workdir={tmp_path}/run'
  result = runs.call_main(*arguments)
  assert result.returncode == 1
  assert result.stderr.startswith('Failed: ZeroDivisionError')
  assert 'in <lambda>' in result.stderr
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'run').mkdir()
  result = runs.call_main(*arguments)
  assert result.stderr.strip().endswith(f'Traceback: {tmp_path}/run/error.log')
  assert 'in <lambda>' in (tmp_path / 'run' / 'error.log').read_text()


def test_scripts_that_always_name_a_config_can_ask_for_a_report(
  trained, config
):
  arguments = config, f'--workdir={trained}', '--config.platform=tpu'
  result = runs.call_main(*arguments, '--mode=verify', '--checkpoints')
  assert result.returncode == 0, result.stderr
  assert '--mode=verify --checkpoints reads no config.' in result.stderr


def test_names_may_hold_what_means_something_elsewhere(data_dir, tmp_path):
  odd = tmp_path / 'a b é?#%41=1:2'
  (odd / '[/data]').mkdir(parents=True)
  (odd / '[/data]' / 'prepared').symlink_to(data_dir / 'prepared')
  (odd / 'c.py').write_text('from tests.tiny_config import get_config\n')
  common = f'--config={odd}/c.py:{odd}/[/data]', '--only=three'
  prepared = runs.call_main('--mode=prepare', *common)
  shown = prepared.stdout.replace('\n', '')
  assert f'prepared in {odd}/[/data]/prepared' in shown
  checked = runs.call_main(
    '--mode=check', *common, f'--workdir={odd}/run', '--config.check_steps=0'
  )
  assert checked.returncode == 0, checked.stdout + checked.stderr
  assert f'{odd}/run/plan.json' in checked.stdout


def test_no_config_and_no_workdir(run_main, config):
  for run, *arguments in (
    (run_main, '--config=configs/nothing.py'),
    (runs.call_main,),
    (runs.call_main, config),
  ):
    result = run(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().split('\n')) <= 3


def test_another_config_in_the_same_workdir(trained, config):
  change = '--config.stages[1].batch_size=24'
  result = runs.call_main(config, f'--workdir={trained}', change)
  assert result.returncode == 2
  assert 'ten.batch_size: 48 -> 24' in result.stderr


def test_what_is_done_stays_as_it_was_in_config_json(trained, config, tmp_path):
  workdir = shutil.copytree(trained, tmp_path / 'run')
  before = json.loads((workdir / 'config.json').read_text())
  changes = '--config.stages[1].batch_size=24', '--allow_config_change'
  result = runs.call_main(config, f'--workdir={workdir}', *changes)
  assert result.returncode == 0, result.stderr
  after = json.loads((workdir / 'config.json').read_text())
  assert after['stages'] == before['stages']


@pytest.mark.parametrize(
  'mode', ['train', 'lr_find', 'audit', 'plan --topology=h100:8', 'tune']
)
def test_an_unwritable_workdir_is_said_first(data_dir, tmp_path, mode):
  (tmp_path / 'file').write_text('')
  kind = 'tune' if mode == 'tune' else 'tiny'
  result = runs.call_main(
    *f'--mode={mode}'.split(),
    f'--config=tests/{kind}_config.py:{data_dir}',
    f'--workdir={tmp_path}/file/run',
  )
  assert result.returncode == 2
  assert 'Cannot write to the workdir' in result.stderr
  assert result.stdout == ''


@pytest.mark.parametrize('mode', ['prepare', 'train'])
def test_a_new_data_dir_is_said_once(tmp_path, mode):
  arguments = f'--mode={mode}', f'--config={CONFIG}:{tmp_path}/data'
  if mode == 'train':
    arguments += (f'--workdir={tmp_path}/run', '--only=three')
  said = f'data_dir is new: {tmp_path}/data'
  for times in (1, 0):
    result = runs.call_main(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(said) == times
  if mode == 'prepare':
    assert result.stdout.count('digits: prepared') == 1
  assert (tmp_path / 'data' / 'prepared').is_dir()

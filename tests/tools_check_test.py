"""What is in the way of a run, as a user is told."""

import itertools
import json
import os
import shlex
import subprocess
import sys

import data_fixtures
import history_fixture
import mounts
import pytest
import runs
from conftest import ROOT

from jaxprog import config as config_lib
from jaxprog import files, stages
from jaxprog.data import leaks, preparation
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import incidents
from jaxprog.planning import inspection, timing
from jaxprog.tools import check as check_lib

CONFIG = 'tests/tiny_config.py'


def assert_three_lines(result, *expected):
  assert result.returncode == 2, result.stdout + result.stderr
  assert len(result.stderr.strip().split('\n')) <= 3
  for text in expected:
    assert text in result.stderr


def begin_run(workdir, data_dir):
  """Writes what a run has written that was killed in its first step."""
  config = config_lib.load_config(f'{CONFIG}:{data_dir}')
  config.stages[0].num_epochs = 1.0
  files.write_json(workdir / 'config.json', config_lib.to_json(config))
  history = history_lib.new_history(config_lib.config_hash(config))
  fields = dict.fromkeys(history_fixture.STAGE_FIELDS, 1)
  history_lib.begin_stage(history, **{**fields, 'name': 'three'})
  files.write_json(workdir / 'training_history.json', history)


def test_all_problems_are_listed_at_once(run_main, config, tmp_path):
  (tmp_path / 'file').write_text('')
  result = run_main(
    config,
    '--mode=check',
    f'--workdir={tmp_path}/file/run',
    '--config.platform=tpu',
    '--config.stages[0].num_classes=4',
    '--config.stages[1].batch_size=50',
    '--config.stages[2].dataset=imagenet_mini',
    devices=8,
  )
  assert result.returncode == 2
  assert all(x.startswith('event=doing ') for x in result.stderr.splitlines())
  lines = result.stdout.split('\n')
  crossed = '\n'.join(x for x in lines if x.startswith('✗ '))
  for text in (
    "asks for 'tpu', JAX found 'cpu': 8 x cpu",
    'batch_size 50 is not divisible by 8',
    'num_classes is 4, but',
    "stage 'ten_again': The dataset 'imagenet_mini' is missing",
    'Cannot write to the workdir',
  ):
    assert text in crossed
  assert crossed.count('✗') == 5
  assert any(x.startswith("✓ stage 'ten': digits is prepared") for x in lines)
  assert '5 to mend.' in result.stdout
  assert 'event=plan' not in result.stdout
  assert [x.name for x in tmp_path.iterdir()] == ['file']


def test_absent_data_is_said_once_and_planned_as_it_is_published(tmp_path):
  words = [
    f'--config.stages[{i}].{field}'
    for i in (0, 1)
    for field in ('dataset=imagenette', 'classes=()', 'num_classes=10')
  ]
  result = runs.call_main(
    f'--config={CONFIG}:{tmp_path}',
    '--mode=check',
    '--only=three,ten',
    '--config.check_steps=0',
    '--config.stages[0].published_top1=0.804',
    '--config.stages[0].differs=fewer colours,longer',
    *words,
  )
  assert result.returncode == 2, result.stderr
  findings, plan = result.stdout.split('1 to mend.')
  recipe = plan[plan.index('what the source of a recipe has reached') :]
  assert recipe.splitlines()[1].startswith(
    '  three: 80.4% top-1 after 2 epochs'
  )
  assert '    differs: fewer colours\n    differs: longer\n' in recipe
  assert '  ten: ' not in recipe
  assert (
    "✗ stages 'three', 'ten': The dataset 'imagenette' is missing" in findings
  )
  assert findings.count('is missing') == 1
  assert 'learning rates, first step to last' in plan
  assert 'num_train_images=9469' in plan
  assert '9,469 training and 3,925 evaluation images' in plan
  assert "the mission's range" in plan


def test_the_findings_come_first_in_signs_that_any_pipe_can_carry(
  config, tmp_path
):
  result = subprocess.run(
    [
      sys.executable,
      'main.py',
      config,
      '--mode=check',
      '--skip=ten_again',
      f'--workdir={tmp_path}/é',
    ],
    cwd=ROOT,
    env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert result.stdout.isascii()
  assert result.stdout.startswith('+ config: three, ten; 1 left out\n')
  findings, plan = result.stdout.split('0 to mend.')
  assert "\n+ stage 'ten': digits is prepared" in findings
  assert 'event=plan stage=ten' in plan
  assert (tmp_path / 'é' / 'learning_rates.png').is_file()


def test_a_dataset_missing_in_the_last_stage_is_said_at_launch(
  config, tmp_path
):
  arguments = (
    config,
    f'--config.data_dir={tmp_path}/data',
    '--config.stages[2].dataset=tiny_imagenet',
  )
  result = runs.call_main(*arguments, f'--workdir={tmp_path}/run')
  assert_three_lines(result, "stage 'ten_again'", 'tiny-imagenet-200')
  # Not even the first stage's data was prepared.
  assert not (tmp_path / 'data').exists()
  command = shlex.split(result.stderr.strip().split('\n')[2])
  assert command[-2:] == ['--mode=prepare', '--download']
  data_fixtures.write_tiny_imagenet(tmp_path / 'data' / 'tiny-imagenet-200')
  subprocess.run(
    [sys.executable, *command[1:]], cwd=ROOT, check=True, capture_output=True
  )
  assert preparation.find_prepared('tiny_imagenet', tmp_path / 'data')


def test_a_workdir_that_is_read_only(config, tmp_path):
  with mounts.disk(tmp_path / 'disk', 'ro') as workdir:
    result = runs.call_main(config, f'--workdir={workdir}/run')
  assert_three_lines(
    result, 'Cannot write to the workdir: Read-only file system.'
  )
  assert 'event=' not in result.stdout


def test_a_disk_that_is_too_small(config, small_disk):
  workdir = small_disk / 'run'
  result = runs.call_main(config, f'--workdir={workdir}')
  assert_three_lines(result, 'needs 22 MB of disk; 4 MB are free', '--workdir')
  assert 'event=' not in result.stdout
  assert not (workdir / 'checkpoints').exists()
  result = runs.call_main(config, f'--workdir={workdir}', '--mode=check')
  assert result.returncode == 2
  assert '✗ disk: 22 MB of results to be written, 4 MB free' in result.stdout


def test_a_changed_config_is_shown_as_a_table_and_refused(
  config, data_dir, tmp_path
):
  arguments = (config, f'--workdir={tmp_path}', '--only=three')
  begin_run(tmp_path, data_dir)
  saved = (tmp_path / 'config.json').read_text()
  changed = (
    *arguments,
    '--config.stages[0].num_epochs=1',
    '--config.stages[0].batch_size=24',
    '--config.stages[0].learning_rate=0.5',
    '--config.stages[0].classes=1,3,7',
    '--config.num_workers=2',
  )
  refused = runs.call_main(*changed)
  assert_three_lines(refused, 'began with another config')
  rows = [x.split() for x in refused.stdout.split('\n')]
  assert ['three.batch_size', '48', '24', 'changes'] in rows
  assert ['three.learning_rate', '0.01', '0.5', 'changes'] in rows
  assert ['num_workers', '0', '2', 'allowed'] in rows
  assert max(map(len, refused.stdout.split('\n'))) <= 80
  assert (tmp_path / 'config.json').read_text() == saved
  process = runs.start_main(*changed, '--allow_config_change')
  lines = list(
    itertools.takewhile(lambda x: 'event=plan' not in x, process.stdout)
  )
  process.kill()
  process.communicate()
  assert any('three.batch_size' in x for x in lines), lines
  (incident,) = incidents.read(tmp_path / 'incidents.jsonl')
  assert incident['kind'] == 'config_change'
  assert 'three.batch_size: 48 -> 24' in incident['message']
  assert json.loads((tmp_path / 'config.json').read_text())['num_workers'] == 2


def hold_lock(workdir, data_dir):
  owner = {'host': 'elsewhere', 'pid': 7, 'since': 'now', 'token': 'another'}
  files.write_json(workdir / 'run.lock', owner)
  # For as long as it is not closed.
  files.lock(os.open(workdir / 'run.lock', os.O_RDWR))


def damage_history(workdir, data_dir):
  files.write_bytes(workdir / 'training_history.json', b'{')


def lose_states(workdir, data_dir):
  (workdir / 'checkpoints' / 'three' / 'quarantine' / 'latest-5').mkdir(
    parents=True
  )


def begin_nothing(workdir, data_dir):
  pass


@pytest.mark.parametrize(
  ('before', 'argument', 'code'),
  [
    (hold_lock, '', 2),
    (begin_run, '--config.stages[0].batch_size=24', 2),
    (damage_history, '', 2),
    (lose_states, '', 1),
    *(
      (begin_nothing, argument, 2)
      for argument in (
        '--only=tree',
        '--workdir=README.md/run',
        '--config.batch_norm=groups:3',
        '--config.compilation_cache_dir=/proc/none',
        '--config.data_dir=abc://bucket/data',
        '--config.platform=tpu',
        '--config.stages[0].classes=1,nosuch',
        '--config.stages[0].dataset=imagenet_mini',
        '--config.stages[0].eval_split=holdout:0.001%',
        '--config.stages[0].freeze_epochs=1',
        '--config.stages[0].init_from=no.safetensors',
        '--config.stages[0].learning_rate=-1',
        '--config.stages[0].num_classes=4',
        '--config.stages[0].reset_blocks=9',
      )
    ),
  ],
)
def test_what_train_refuses_is_what_check_finds(
  config, data_dir, tmp_path, before, argument, code
):
  workdir = tmp_path / 'run'
  before(workdir, data_dir)
  written = {x: x.read_bytes() for x in workdir.rglob('*') if x.is_file()}
  arguments = [config, f'--workdir={workdir}', '--only=three', argument]
  arguments = [x for x in (*arguments, '--config.check_steps=0') if x]
  trained = runs.call_main(*arguments)
  assert trained.returncode == code, trained.stderr
  checked = runs.call_main(*arguments, '--mode=check')
  assert checked.returncode == 2, checked.stdout + checked.stderr
  why = trained.stderr.split('\n')[0].removeprefix('Failed: DamagedError: ')
  crosses = [x for x in checked.stdout.split('\n') if x.startswith('✗')]
  assert any(why.removesuffix('.') in x for x in crosses), (why, crosses)
  # Data that is not here yet has a plan all the same.
  for name in ('error.log', 'plan.json', 'learning_rates.png'):
    (workdir / name).unlink(missing_ok=True)
  left = {x: x.read_bytes() for x in workdir.rglob('*') if x.is_file()}
  assert left == written


def test_an_owner_that_a_run_would_wait_for_is_a_warning(config, tmp_path):
  owner = {'host': 'elsewhere', 'pid': 7, 'since': 'now', 'token': 'another'}
  files.write_json(tmp_path / 'run.lock', owner)
  result = runs.call_main(
    config,
    '--mode=check',
    f'--workdir={tmp_path}',
    '--only=three',
    '--config.check_steps=0',
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert '! Process 7 on elsewhere may be using' in result.stdout


def test_an_allowed_change_of_the_config_is_a_warning(
  config, data_dir, tmp_path
):
  begin_run(tmp_path, data_dir)
  result = runs.call_main(
    config,
    '--mode=check',
    f'--workdir={tmp_path}',
    '--only=three',
    '--config.stages[0].batch_size=24',
    '--config.check_steps=0',
    '--allow_config_change',
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert '! run: goes on with another config: three.batch' in result.stdout


def rows(text):
  """Returns the cells of the plan's tables by their rows' names."""
  lines = text.split('\nstage  ', 1)[1].split('\n')
  return {line[:12].strip(): line[12:].split() for line in reversed(lines)}


def test_the_plan_says_what_each_stage_costs(config, tmp_path):
  result = runs.call_main(config, '--mode=check', f'--workdir={tmp_path}')
  assert result.returncode == 0, result.stdout + result.stderr
  found = rows(result.stdout)
  assert found['images'] == ['432', '1,437', '1,437']
  assert found['px'] == ['8', '8', '16']
  assert found['batch'] == ['48', '48', '48']
  assert found['optimizer'] == ['adamw', 'adamw', 'sgd', 'momentum']
  assert found['fits'] == ['yes'] * 3
  for name in ('memory', 'step', 'input', 'evaluation', 'compile'):
    assert len(found[name]) >= 3
    assert '-' not in found[name]
  assert 'The ladder will take about ' in result.stdout
  assert 'mission' not in result.stdout  # It expects nothing of digits.
  assert 'block4 x 1 2 x 2 x 32 ' in ' '.join(result.stdout.split())
  table = result.stdout.split('\nstage  ', 1)[1].split('\n\n')[0]
  assert max(map(len, table.split('\n'))) <= 80
  plan = json.loads((tmp_path / 'plan.json').read_text())
  assert [x['name'] for x in plan['stages']] == ['three', 'ten', 'ten_again']
  for stage in plan['stages']:
    assert stage['step_measured']
    assert stage['memory_compiled']
    assert stage['seconds'] > stage['total_steps'] * stage['step_seconds'] > 0
  assert plan['seconds'] == pytest.approx(
    sum(x['seconds'] for x in plan['stages'])
  )
  # Four times the pixels are about four times the work.
  flops = [x['flops_per_image'] for x in plan['stages']]
  assert flops[2] == pytest.approx(4 * flops[1], rel=0.1)


def test_a_stage_that_does_not_fit_does_not_hide_the_others(config, tmp_path):
  result = runs.call_main(
    config,
    '--mode=check',
    f'--workdir={tmp_path}',
    '--only=three,ten',
    '--config.stages[0].image_size=32768',
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert rows(result.stdout)['fits'] == ['NO', 'yes']
  assert 'three: does not fit: a step needs ~' in result.stdout
  assert 'three: not timed: it would not fit' in result.stdout
  large, small = json.loads((tmp_path / 'plan.json').read_text())['stages']
  assert not large['fits']
  assert not large['step_measured']
  assert small['fits']
  assert small['step_measured']
  pictures = [x.name for x in tmp_path.glob('augmented_*')]
  assert pictures == ['augmented_ten.png']


def test_without_steps_nothing_is_compiled(config):
  result = runs.call_main(
    config, '--mode=check', '--only=ten', '--config.check_steps=0'
  )
  assert result.returncode == 0, result.stdout + result.stderr
  found = rows(result.stdout)
  assert len(found['FLOPs/image']) == 2
  assert not {'memory', 'fits', 'step', 'stage takes'} & set(found)
  assert 'Nothing was compiled or timed: check_steps is 0.' in result.stdout
  assert 'The ladder will take' not in result.stdout


def test_a_wrong_number_of_steps_is_the_users_mistake(data_dir, capsys):
  overrides = {'check_steps': '-1'}
  config = config_lib.load_config(f'{ROOT}/{CONFIG}:{data_dir}', overrides)
  assert check_lib.check(config) == 2
  assert 'check_steps is -1; it must be at least 0' in capsys.readouterr().out


def test_what_goes_wrong_in_one_stage_is_a_note_of_it(
  data_dir, capsys, monkeypatch
):
  config = config_lib.load_config(f'{ROOT}/{CONFIG}:{data_dir}')

  def refuse(task, *_):
    if task.stage.name == 'three':
      raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')
    return measure(task, *_)

  measure = timing._measure
  monkeypatch.setattr(timing, '_measure', refuse)
  assert check_lib.check(config, only=['three', 'ten']) == 0
  out = capsys.readouterr().out
  assert 'three: not measured: RuntimeError: RESOURCE_EXHAUSTED' in out
  assert rows(out)['fits'] == ['-', 'yes']


def test_shortcuts_of_the_plan_are_said_until_the_data_is_ready(
  tmp_path, capsys
):
  overrides = {
    'exclude_leaks': 'True',
    'check_steps': '1',
    'stages[1].storage': 'raw:8',
  }
  config = config_lib.load_config(f'{ROOT}/{CONFIG}:{tmp_path}', overrides)
  dataset = preparation.load_dataset('digits', tmp_path)
  assert check_lib.check(config, only=['ten']) == 0
  out = capsys.readouterr().out
  assert 'ten: input timed on originals; training reads raw:8' in out
  assert 'ten: leaks were not looked for yet' in out
  assert not preparation.list_packs(dataset.train.directory)
  # What a run does first.
  leaks.find_overlap({'ten': dataset})
  preparation.store(dataset, stages.Storage('raw', 8))
  cheap = check_lib._cheap(inspection.inspect(config, only=['ten']))
  assert cheap.stages[1].storage == 'raw:8'
  assert cheap.exclude_leaks
  assert check_lib.check(config, only=['ten']) == 0
  out = capsys.readouterr().out
  assert 'input timed on originals' not in out
  assert 'not looked for yet' not in out

import csv
import json
import pickle
import signal
import sqlite3
import subprocess
import sys

import pytest
import runs
from optuna.trial import TrialState

from jaxprog import errors, start_from
from jaxprog.comparison import studies
from jaxprog.monitoring import environment
from jaxprog.reliability import owners
from jaxprog.tools import tune
from tests import tiny_config

RATE = {'field': 'stages[0].learning_rate', 'log': (1e-3, 1e-1)}


def create_config(data_dir='data', **fields):
  config = start_from('tune_default')
  config.base = tiny_config.get_config(data_dir)
  config.base.stages = config.base.stages[:1]
  config.search = (
    RATE,
    {'field': 'stages[0].weight_decay', 'choice': (0.0, 0.1)},
  )
  for field, value in fields.items():
    config[field] = value
  return config


@pytest.mark.parametrize(
  ('fields', 'what'),
  [
    ({'search': ()}, 'nothing to search'),
    ({'search': ({'field': 'seed'},)}, "has 'field' and one of"),
    ({'search': ({**RATE, 'log': (0.1, 0.01)},)}, 'lower one first'),
    ({'search': ({**RATE, 'log': (0, 1)},)}, 'above 0'),
    (
      {'search': ({**RATE, 'field': 'stages[0].learning_rat'},)},
      'learning_rat',
    ),
    ({'search': ({**RATE, 'log': (1e-3, 'a')},)}, 'needs two numbers'),
    ({'search': (RATE, RATE)}, 'searched twice'),
    (
      {'search': (RATE, {**RATE, 'field': 'stages.three.learning_rate'})},
      'searched twice',
    ),
    (
      {'search': ({'field': 'stages[0].batch_size', 'integer': (8, 9.5)},)},
      'two whole numbers',
    ),
    (
      {
        'search': (
          {
            'field': 'stages[0].optimizer',
            'choice': ('adamw', 'adamx', 'lamb'),
          },
        )
      },
      'adamx',
    ),
    ({'search': ('lr',)}, "is not 'lr'"),
    ({'search': ({**RATE, 'field': 3},)}, 'An entry of the search is not'),
    (
      {'search': ({'field': 'stage_defaults.b1', 'uniform': (0.8, 0.9)},)},
      'their defaults change nothing',
    ),
    ({'sampler': 'grid'}, "Unknown sampler 'grid'"),
    ({'sampler_seed': -1}, 'sampler_seed is -1'),
    ({'pruner_startup_trials': -1}, 'pruner_startup_trials is -1'),
    ({'pruner_warmup_epochs': -1}, 'pruner_warmup_epochs is -1'),
    ({'num_trials': 0}, 'num_trials is 0; it must be at least 1'),
    ({'timeout_minutes': -1}, 'must be at least 0'),
    ({'only': ('four',)}, "Unknown stage 'four'"),
    ({'engine': 'slurm'}, "Unknown engine 'slurm'"),
    ({'storage': 'files'}, 'no URL of a database'),
    (
      {'search': ({'field': 'stages[0].momentum', 'uniform': (0.5, 1.5)},)},
      'momentum',
    ),
  ],
)
def test_mistakes_are_found_before_anything_runs(fields, what, tmp_path):
  with pytest.raises(errors.UserError, match=what):
    tune.tune(create_config(**fields), tmp_path / 'tune')
  assert not (tmp_path / 'tune').exists()


def stop_in_trial(trial, signum, arguments, workdir):
  process = runs.start_main(*arguments)
  runs.wait_for_step(process, workdir / 'trials' / trial, 'three', 3)
  process.send_signal(signum)
  process.communicate()
  return process.returncode


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped(run_main, data_dir, tmp_path):
  workdir = tmp_path / 'tune'
  arguments = (
    '--mode=tune',
    f'--config=tests/tune_config.py:{data_dir}',
    f'--workdir={workdir}',
    '--config.num_trials=3',
  )
  kill = signal.SIGKILL
  assert stop_in_trial('0000', kill, arguments, workdir) == -kill
  assert stop_in_trial('0002', signal.SIGTERM, arguments, workdir) == 143
  finished = run_main(*arguments)
  assert finished.returncode == 0, finished.stderr + finished.stdout
  found = json.loads((workdir / 'tune.json').read_text())
  assert len(found['trials']) == 3
  directories = sorted(x['directory'] for x in found['trials'])
  assert len(set(directories)) == 3
  tried = [tuple(x['parameters'].values()) for x in found['trials']]
  assert len(set(tried)) == 3
  for trial in directories[:2]:
    history = runs.read_history(workdir / 'trials' / trial)
    assert history['stages'][0]['resumed_at_steps']
  whole = [x for x in found['trials'] if x['status'] == 'complete']
  assert found['best']['top1'] == max(x['top1'] for x in whole)
  for trial in whole:
    stage = runs.read_history(workdir / 'trials' / trial['directory'])[
      'stages'
    ][0]
    assert stage['best']['top1'] == trial['top1']
    assert stage['learning_rate'] == pytest.approx(
      trial['parameters']['stages[0].learning_rate']
    )
  best = json.loads((workdir / 'best_config.json').read_text())
  assert (
    best['stages'][0]['learning_rate']
    == (found['best']['parameters']['stages[0].learning_rate'])
  )
  rows = list(csv.DictReader((workdir / 'tune.csv').open()))
  assert len(rows) == 3
  with sqlite3.connect(workdir / 'tune.db') as database:
    count = database.execute('select count(*) from trials').fetchone()[0]
  assert count == 5  # Those stopped, and those that went on with them.


@pytest.mark.slow
def test_a_trial_that_is_worse_than_the_others_is_pruned(
  data_dir, tmp_path, capsys
):
  config = create_config(
    data_dir,
    num_trials=3,
    pruner_startup_trials=1,
    pruner_warmup_epochs=0,
    search=({'field': 'stages[0].learning_rate', 'choice': (0.01, 1e-8)},),
    sampler='random',
    sampler_seed=6,
  )
  found = tune.tune(config, tmp_path)
  by_rate = {
    x['parameters']['stages[0].learning_rate']: x for x in found['trials']
  }
  assert found['best']['parameters'] == {'stages[0].learning_rate': 0.01}
  assert set(by_rate) == {0.01, 1e-8}
  assert any(x['status'] == 'pruned' for x in found['trials'])
  (whole,) = {x['top1'] for x in found['trials'] if x['status'] == 'complete'}
  assert found['best']['top1'] == whole
  # The same rate twice comes to the same: no image tells them apart.
  best = found['best']['directory']
  alike = {x['directory'] for x in found['trials'] if x['top1'] == whole}
  assert set(found['alike']) == alike - {best}
  shown = capsys.readouterr().out
  count, images = len(found['alike']), found['num_images']
  assert images == 115
  assert f'{images} evaluation images do not tell {count} from' in shown
  assert tune.tune(config, tmp_path) == found
  config.base.stages[0]['batch_size'] = 24
  with pytest.raises(errors.UserError, match='began with another ladder'):
    tune.tune(config, tmp_path)


def test_a_search_that_another_has_taken_over_ends_and_goes_on(
  data_dir, tmp_path
):
  config = create_config(data_dir, num_trials=1, storage='journal')
  runs.take_over_later(tmp_path, first := tmp_path / 'trials' / '0000')
  with pytest.raises(RuntimeError, match='1 on elsewhere has taken over'):
    tune.tune(config, tmp_path)
  assert len(runs.read_history(first)['stages'][0]['epochs']) == 1
  assert not (tmp_path / 'tune.json').exists()
  (tmp_path / 'run.lock').unlink()
  with open(tmp_path / 'tune.journal', 'a') as file:
    file.write('{"op_code":')  # As a full disk leaves it.
  (trial,) = tune.tune(config, tmp_path)['trials']
  assert (trial['directory'], trial['number']) == ('0000', 1)
  stage = runs.read_history(first)['stages'][0]
  assert len(stage['resumed_at_steps']) == 1
  assert trial['epochs'] == len(stage['epochs']) == 2


def draw(config, workdir, count=12):
  """Returns what a study is asked for that has no use for the answers."""
  workdir.mkdir()
  study = studies.open_study(config, workdir)
  space = tune.create_space(config)
  for index in range(count):
    study.tell(study.ask(space), (7 * index % 5) / 5)
  return [trial.params for trial in study.get_trials()]


def test_trials_are_the_same_wherever_they_are_kept(data_dir, tmp_path):
  database, journal = (
    draw(create_config(data_dir, storage=x), tmp_path / f'in {x}')
    for x in ('', 'journal')
  )
  assert database == journal
  assert len({str(x) for x in journal}) == 12


@pytest.mark.parametrize('storage', ['', 'journal'])
def test_a_search_among_tuples_goes_on(storage, tmp_path):
  means = ((0.5, 0.5, 0.5), (0.4, 0.4, 0.4))
  search = ({'field': 'mean_rgb', 'choice': means},)
  config = create_config(search=search, storage=storage)
  for _ in range(2):
    study = studies.open_study(config, tmp_path)
    studies.enqueue_unfinished(study)
    for _ in range(4):
      study.tell(study.ask(tune.create_space(config)), 0.5)
    study.ask(tune.create_space(config))
  assert [x.params['mean_rgb'] in map(list, means) for x in study.trials] == [
    True
  ] * 10


def test_a_search_stays_where_it_began(tmp_path):
  for storage, there in (
    ('', 'tune.db'),
    ('journal', 'tune.journal'),
    (f'sqlite:///{tmp_path}/x.db', 'a database'),
  ):
    workdir = tmp_path / there
    workdir.mkdir()
    config = create_config(storage=storage)
    name = studies.open_study(config, workdir).study_name
    assert studies.open_study(config, workdir).study_name == name
    others = {'', 'journal', f'sqlite:///{tmp_path}/y.db'} - {storage}
    for other in others - ({''} if storage == 'journal' else set()):
      with pytest.raises(errors.UserError, match=f'kept in {there}|no study'):
        studies.open_study(create_config(storage=other), workdir)
  many = create_config(engine='ray')
  with pytest.raises(errors.UserError, match='which is for one process'):
    studies.open_study(many, tmp_path / 'tune.db')
  many.storage = f'sqlite:///{tmp_path}/x.db'
  with pytest.raises(errors.UserError, match='SQLite is not for many'):
    studies.check_storage(many)


def test_a_trial_may_be_elsewhere(tmp_path):
  config = create_config(pruner_startup_trials=1, pruner_warmup_epochs=0)
  config.storage = 'journal'
  study = studies.open_study(config, tmp_path, slots=2)
  trials = [study.ask(tune.create_space(config)) for _ in range(2)]
  for trial, value in zip(trials, (0.9, 0.1), strict=True):
    elsewhere = pickle.loads(pickle.dumps(trial))
    elsewhere.report(value, 1)
    assert elsewhere.should_prune() == (value < 0.5)
    state = TrialState.PRUNED if value < 0.5 else None
    study.tell(trial, None if state else value, state)
  assert [x.value for x in study.get_trials()] == [0.9, 0.1]


def test_no_password_is_shown(data_dir, tmp_path, monkeypatch):
  url = 'oracle://me:hunter2@127.0.0.1/searches'
  arguments = (
    '--mode=tune',
    f'--config=tests/tune_config.py:{data_dir}',
    f'--workdir={tmp_path / "tune"}',
    f'--config.storage={url}',
  )
  told = runs.call_main(*arguments)
  assert told.returncode == 2
  assert 'a driver that is not installed' in told.stderr
  assert 'oracle://me:***@127.0.0.1/searches' in told.stderr
  assert 'hunter2' not in told.stdout + told.stderr
  monkeypatch.setattr(sys, 'orig_argv', ['jaxprog', *arguments])
  for found in (environment.environment(), owners.describe_process()):
    assert 'me:***@127.0.0.1' in found['command']
    assert 'hunter2' not in found['command']


def test_a_workdir_may_have_any_name(tmp_path):
  workdir = tmp_path / 'a b?c#d%41'
  workdir.mkdir()
  studies.open_study(create_config(), workdir)
  assert [x.name for x in workdir.iterdir()] == ['tune.db']
  assert [x.name for x in tmp_path.iterdir()] == [workdir.name]


def test_a_search_without_optuna_names_the_extra(tmp_path):
  code = (
    'import sys; sys.modules["optuna"] = None; from jaxprog import *; '
    'from jaxprog import cli; '
    'sys.exit(cli.main(sys.argv))'
  )
  command = [sys.executable, '-c', code, '--mode=tune', '--config=tune_digits']
  told = subprocess.run(
    [*command, f'--workdir={tmp_path}'],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
  )
  assert told.returncode == 2
  # Before them may stand that libraries are being loaded.
  what, where, how = told.stderr.splitlines()[-3:]
  assert 'needs a package that is not installed' in what
  assert where == '--mode=tune'
  assert how == "pip install 'jaxprog[tune]'"

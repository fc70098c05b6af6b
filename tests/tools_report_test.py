import contextlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from concurrent import futures
from unittest import mock

import history_fixture
import pytest
import runs
import tiny_config

import jaxprog
from jaxprog import files
from jaxprog.monitoring import history as history_lib
from jaxprog.reliability import lock
from jaxprog.reporting import facts, outputs, rundir
from jaxprog.reporting.page import side_by_side
from jaxprog.tools import report

REPORTS = 'training_report.txt', 'training_metrics.png', 'report.html'


def create_workdir(path, epochs=(3, 2), seed=0, config=None):
  history = history_fixture.create_history(epochs, seed)
  files.write_json(path / 'training_history.json', history)
  if config is not None:
    files.write_json(path / 'config.json', config)
  return path


def create_config(**stage_fields):
  stages = [
    {'name': x, 'batch_size': 64, 'flip': True, **stage_fields}
    for x in ('imagenette', 'tiny_imagenet')
  ]
  return {'seed': 0, 'model': 'resnet50', 'stages': stages}


@pytest.fixture(scope='module')
def watched(data_dir, tmp_path_factory):
  """Trains two epochs; returns the workdir and the page after the first."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  pages, deadline = [''], time.monotonic() + 120

  def wait_for_page(name, row):
    del name
    while row['epoch'] == 1 and '1 of 2 epochs' not in pages[0]:
      assert time.monotonic() < deadline
      time.sleep(0.02)
      with contextlib.suppress(FileNotFoundError):
        pages[0] = (workdir / 'report.html').read_text()

  config = tiny_config.get_config(data_dir)
  # However long a page takes here, the next one is written at once.
  with mock.patch.object(outputs, '_QUICK', math.inf):
    jaxprog.train(config, workdir, only=('three',), on_epoch=wait_for_page)
  return workdir, pages[0]


@pytest.fixture(scope='module')
def trained(watched):
  return watched[0]


def test_the_page_grows_with_the_run(watched):
  workdir, page = watched
  assert 'not finished, 1 of 2 epochs' in page
  assert 'not finished' not in (workdir / 'report.html').read_text()


def test_the_command_line_leaves_what_training_has_left(trained, tmp_path):
  kept = {name: (trained / name).read_bytes() for name in REPORTS}
  workdir = tmp_path / 'run'
  workdir.mkdir()
  # No checkpoints, no data: the history and what was written beside it.
  for name in ('training_history.json', 'config.json', 'environment.json'):
    shutil.copy(trained / name, workdir / name)
  process = runs.call_main('--mode=report', f'--workdir={workdir}')
  assert process.returncode == 0, process.stderr
  assert process.stdout.splitlines() == [str(workdir / x) for x in REPORTS]
  for name in REPORTS:
    assert (workdir / name).read_bytes() == kept[name]
  text = kept['training_report.txt'].decode()
  assert "Not run, of this config's stages: ten, ten_again." in text


def test_neither_jax_nor_tensorflow_is_needed(tmp_path):
  workdir = create_workdir(tmp_path)
  program = (
    'import sys, jaxprog; jaxprog.write_report([sys.argv[1]]);'
    'assert not {"jax", "tensorflow", "cv2"} & sys.modules.keys()'
  )
  subprocess.run([sys.executable, '-c', program, workdir], check=True)


def test_the_history_says_how_the_rate_went_within_epochs(trained):
  history = history_lib.load_history(trained / 'training_history.json')
  stage = history['stages'][0]
  rates = stage['learning_rates']
  # Of so few steps each has its own.
  assert len(rates) == stage['last_step']
  # one_cycle, as jaxprog.optim.schedules has it: 0.01 / 25 at first.
  assert rates[0] == pytest.approx(0.01 / 25)
  assert max(rates) == pytest.approx(0.01, rel=0.02)
  assert rates[-1] == pytest.approx(stage['epochs'][-1]['learning_rate'])


def test_the_history_says_where_the_time_of_the_run_went(trained):
  history = history_lib.load_history(trained / 'training_history.json')
  splits = facts.run_split(history)
  assert sum(map(sum, splits.values())) == pytest.approx(
    history['wall_seconds']
  )
  (stage,) = history['stages']
  assert splits[stage['name']].compiling > 0
  assert splits[stage['name']].saves > 0


def test_at_most_one_page_waits(tmp_path):
  submitted = []

  class Counting(futures.ThreadPoolExecutor):
    def submit(self, function, *arguments):
      submitted.append(function)
      return super().submit(function, *arguments)

  create_workdir(tmp_path)
  gate = threading.Event()
  with Counting(1) as executor:
    executor.submit(gate.wait)
    reporter = outputs.Reporter(executor, tmp_path, list, cost=lambda: 0.0)
    for _ in range(5):
      reporter.refresh()
    assert submitted.count(reporter._write_page) == 1
    assert not (tmp_path / 'report.html').exists()
    gate.set()
    reporter.write(is_last=True).result()
    text = (tmp_path / 'report.html').read_text()
    assert 'imagenette' in text
    assert 'data-live' not in text
    reporter.refresh()
    assert submitted.count(reporter._write_page) == 2
  assert 'data-live' in (tmp_path / 'report.html').read_text()


def test_a_page_that_takes_long_is_written_rarely(tmp_path):
  create_workdir(tmp_path)
  path, ticks = tmp_path / 'report.html', itertools.count(1)
  written = []
  with futures.ThreadPoolExecutor(1) as executor:
    # Each look at the clock takes a second, and so does a page.
    reporter = outputs.Reporter(
      executor,
      tmp_path,
      list,
      clock=lambda: next(ticks),
      cost=itertools.count().__next__,
    )
    for _ in range(22):
      reporter.refresh()
      executor.submit(time.sleep, 0).result()  # What was submitted is over.
      written.append(path.exists())
      path.unlink(missing_ok=True)
  # The first one ended at 2, and twenty seconds later comes the next.
  assert [i for i, x in enumerate(written) if x] == [0, 20]


@pytest.mark.parametrize(('seconds', 'is_live'), [(0.0, False), (1.0, True)])
def test_a_run_that_a_signal_ends_says_so_where_that_is_quick(
  tmp_path, seconds, is_live
):
  create_workdir(tmp_path)
  cost = itertools.count(0.0, seconds).__next__
  with futures.ThreadPoolExecutor(1) as executor:
    reporter = outputs.Reporter(executor, tmp_path, list, cost=cost)
    reporter.refresh()
    executor.submit(time.sleep, 0).result()  # The page is written.
    reporter.stop()
  text = (tmp_path / 'report.html').read_text()
  assert ('data-live' in text) == is_live


def test_reports_of_a_run_without_a_history_are_left_out(tmp_path):
  with futures.ThreadPoolExecutor(1) as executor:
    reporter = outputs.Reporter(executor, tmp_path, list)
    reporter.write(is_last=False).result()
  assert list(tmp_path.iterdir()) == []


def test_a_missing_history_is_named_and_nothing_written(tmp_path):
  there = create_workdir(tmp_path / 'a')
  with pytest.raises(jaxprog.UserError, match='no run in') as e:
    report.write_report([there, tmp_path / 'b'])
  assert str(tmp_path / 'b') in str(e.value)
  assert [x.name for x in there.iterdir()] == ['training_history.json']
  files.write_json(tmp_path / 'b' / 'config.json', {})
  with pytest.raises(jaxprog.UserError, match='no training history'):
    report.write_report([there, tmp_path / 'b'])


def test_a_comma_may_be_part_of_a_workdirs_name(tmp_path):
  for name in ('a', 'b', 'a,b'):
    create_workdir(tmp_path / name, (2,))
  several = f'--workdir={tmp_path}/a,{tmp_path}/b'
  whole = f'--workdir={tmp_path}/a,b'
  assert runs.call_main('--mode=report', several).returncode == 0
  assert (tmp_path / 'a' / 'comparison.html').exists()
  assert not (tmp_path / 'a,b' / 'report.html').exists()
  assert runs.call_main('--mode=report', whole).returncode == 0
  assert (tmp_path / 'a,b' / 'report.html').exists()


def test_damaged_files_beside_the_history_count_as_missing(tmp_path):
  workdir = create_workdir(tmp_path)
  (workdir / 'config.json').write_text('{"stages": [')
  (workdir / 'environment.json').write_text('[]')
  (workdir / 'incidents.jsonl').write_text('{"kind": "sig')
  run = rundir.read_run(workdir)
  assert (run.config, run.environment, run.incidents) == (None, None, [])
  report.write_report([workdir])
  assert 'no config.json' in (workdir / 'report.html').read_text()


def test_several_runs_stand_side_by_side(tmp_path, capsys):
  first = create_workdir(
    tmp_path / 'first', config=create_config(learning_rate=0.1)
  )
  second = create_workdir(
    tmp_path / 'second',
    (4, 2),
    seed=1,
    config=create_config(learning_rate=0.2),
  )
  third = create_workdir(tmp_path / 'third', (2,))
  report.write_report([first, second, third])
  printed = capsys.readouterr().out.split()
  assert printed[-1] == str(first / 'comparison.html')
  assert len(printed) == 10
  page = (first / 'comparison.html').read_text()
  for workdir in (first, second, third):
    assert (workdir / 'report.html').exists()
    history = json.loads((workdir / 'training_history.json').read_text())
    assert f'{history["stages"][0]["best"]["top1"]:.1%}' in page
  assert 'n = 1' in page
  # What one of them has not run is no result of all.
  assert 'Not in every run: tiny_imagenet.' in page
  assert page.index('id="results"') < page.index('id="config"')
  assert 'Without a config.json: third.' in page


def test_a_holdout_is_named_beside_a_run_on_validation():
  history = history_fixture.create_history((2,))
  held = history_fixture.create_history((2,))
  held['stages'][0]['eval_split'] = 'holdout:5%'
  both = [rundir.RunFiles('one', history), rundir.RunFiles('held', held)]
  page = runs.words(side_by_side.side_by_side(both))
  assert page.count('on 3,925 images held out') == 1
  held['stages'][0]['validation'] = {
    'top1': 0.1234,
    'top5': 0.5,
    'epoch': 2,
    'num_images': 3925,
  }
  page = runs.words(side_by_side.side_by_side(both))
  assert page.index(f'{history["stages"][0]["best"]["top1"]:.1%}') < page.index(
    '12.3%'
  )
  assert 'held out' not in page


def test_others_see_how_far_a_search_is(tmp_path):
  config = {'base': {}, 'search': [], 'num_trials': 4}
  files.write_json(tmp_path / 'config.json', config)

  def see():
    report.write_report(tmp_path)
    return runs.words((tmp_path / 'report.html').read_text())

  assert 'stopped as of' in see()
  trials = [
    {
      'directory': f'000{i}',
      'status': status,
      'top1': top1,
      'epochs': 2,
      'parameters': {'stages[0].learning_rate': 0.1234 * (i + 1)},
    }
    for i, (status, top1) in enumerate((('pruned', 0.5), ('complete', 0.75)))
  ]
  found = {'trials': trials, 'best': trials[1]}
  files.write_json(tmp_path / 'tune.json', found)
  with lock.Lock(tmp_path), lock.Lock(tmp_path / 'trials' / '0002'):
    said = see()
  assert 'under way renewed every 15 seconds' in said
  assert '2 of 4 trials over 75.0% best top-1 1 under way 1 pruned' in said
  assert 'trial 0002 – – – starting' in said
  rows = '0001 75.0% 2 complete 0.247', '0000 50.0% 2 pruned 0.123'
  assert said.index(rows[0]) < said.index(rows[1])
  files.write_json(tmp_path / 'tune.json', {'trials': trials * 2, 'best': None})
  assert 'finished as of' in see()
  files.write_json(tmp_path / 'tune.json', {'trials': [{}]})
  with pytest.raises(jaxprog.UserError, match='search is damaged'):
    see()


def test_only_what_differs_between_configs_is_shown(tmp_path):
  one, other = create_config(learning_rate=0.1), create_config()
  other['stages'][1]['flip'] = False
  history = history_fixture.create_history((2, 2))
  page = runs.words(
    side_by_side.side_by_side(
      [
        rundir.RunFiles('one', history, one),
        rundir.RunFiles('other', history, other),
      ]
    )
  )
  # The same in all stages: once; else by stage.
  assert '*.learning_rate 0.1 not set' in page
  assert 'tiny_imagenet.flip yes no' in page
  assert 'imagenette.flip' not in page.replace('tiny_imagenet.flip', '')
  assert 'batch_size' not in page
  same = side_by_side.side_by_side(
    [rundir.RunFiles('a', history, one), rundir.RunFiles('a', history, one)]
  )
  assert 'Config differences None.' in runs.words(same)
  assert 'a (1)' in same
  assert 'a (2)' in same

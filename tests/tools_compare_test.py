import csv
import io
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import time

import compare_config
import numpy as np
import pytest
import rich.console
import runs as run_lib

from jaxprog import config as config_lib
from jaxprog import errors, files, stages
from jaxprog.comparison import cells, collect, live, runs
from jaxprog.monitoring import outcomes
from jaxprog.reliability import checkpoints, lock
from jaxprog.tools import compare as tool
from jaxprog.tools import report

# When a comparison is killed: once a run has saved this step of 58.
KILLS = (
  ('adamw', 0, 0),
  ('adamw', 0, 29),
  ('sgd_momentum', 0, 0),
  ('adamw', 1, 29),
  ('sgd_momentum', 1, 0),
)


def read_cells(workdir):
  """Returns comparison_cells.csv, without what depends on the clock."""
  with open(workdir / 'comparison_cells.csv', newline='') as file:
    return [
      {k: v for k, v in row.items() if k != 'seconds'}
      for row in csv.DictReader(file)
    ]


def find(result, cell, seed=0):
  return next(
    x for x in result['runs'] if (x['cell'], x['seed']) == (cell, seed)
  )


@pytest.fixture(scope='module')
def strategies(data_dir, tmp_path_factory):
  """A cell that works and one whose rate cannot, two seeds."""
  workdir = tmp_path_factory.mktemp('strategies')
  config = compare_config.get_config(data_dir)
  config.base.stages[0]['num_epochs'] = 1.0
  config.grid = ({'stages[-1].optimizer': ('adamw',)},)
  config.cells = (
    {
      'name': 'broken',
      'overrides': {
        'stages[-1].optimizer': 'sgd_momentum',
        'stages[-1].learning_rate': 1e30,
      },
    },
  )
  return config, workdir, tool.compare(config, workdir)


@pytest.fixture(scope='module')
def ladder(data_dir, tmp_path_factory):
  """A ladder, an operator and the controls, one seed."""
  workdir = tmp_path_factory.mktemp('ladder')
  config = compare_config.get_ladder(data_dir)
  return config, workdir, tool.compare(config, workdir)


def test_every_cell_is_a_run_with_each_seed(strategies):
  _, workdir, result = strategies
  assert result['finished']
  assert [(x['cell'], x['seed'], x['status']) for x in result['runs']] == [
    ('adamw', 0, 'done'),
    ('broken', 0, 'diverged'),
    ('adamw', 1, 'done'),
    ('broken', 1, 'diverged'),
  ]
  for seed in (0, 1):
    record = find(result, 'adamw', seed)
    directory = workdir / 'cells' / 'adamw' / f'seed-{seed}'
    (stage,) = run_lib.read_history(directory)['stages']
    assert record['final_top1'] == stage['epochs'][-1]['val_top1']
    assert record['best_top1'] == stage['best']['top1']
    found = outcomes.from_json(record['outcomes'])
    assert len(found.right) == record['num_images'] == stage['num_eval_images']
    assert np.mean(found.right) == pytest.approx(record['final_top1'])
  finals = [find(result, 'adamw', seed)['final_top1'] for seed in (0, 1)]
  assert finals[0] != finals[1]
  first, second = (find(result, 'adamw', x)['outcomes'] for x in (0, 1))
  assert first['images'] == second['images']


def test_a_hold_out_chooses_and_validation_images_are_compared(
  data_dir, tmp_path
):
  config = compare_config.get_config(data_dir)
  config.base.stages[0].update(num_epochs=1, eval_split='holdout:20%')
  config.grid = ({'stages[-1].optimizer': ('adamw',)},)
  config.seeds, config.tuning.factors, config.tuning.rungs = 1, (1.0,), (1.0,)
  result = tool.compare(config, tmp_path)
  record = find(result, 'adamw')
  folder = pathlib.Path(record['workdir'])
  (stage,) = run_lib.read_history(folder)['stages']
  validation = stage['validation']
  assert record['final_top1'] == validation['top1']
  assert record['num_images'] == validation['num_images'] == 360
  assert record['num_images'] != stage['num_eval_images']
  assert record['holdout_images'] == stage['num_eval_images']
  right = outcomes.from_json(record['outcomes']).right
  assert len(right) == 360
  assert np.mean(right) == pytest.approx(validation['top1'])
  assert record['curve'][-1]['top1'] == stage['epochs'][-1]['val_top1']
  # A rate is chosen on the hold-out alone.
  tuning = result['cells'][0]['tuning']
  (trial,) = tuning['trials']
  folder = pathlib.Path(tuning['runs'][0]['workdir'])
  (stage,) = run_lib.read_history(folder)['stages']
  assert trial['score'] == stage['epochs'][-1]['val_top1']


def test_seeds_and_rates_leave_a_program_as_it_is(data_dir):
  base = stages.complete(compare_config.get_ladder(data_dir).base)

  def key(seed=0, **fields):
    config = stages.complete(base)
    config.seed = seed
    config.stages[1].update(fields)
    before = config.to_yaml()
    cell = cells.Cell('same', {})
    found = runs.program_key(runs.Planned(cell, seed, config, (), data_dir))
    assert config.to_yaml() == before
    return found

  assert key() == key(seed=1, learning_rate=0.5)
  assert len({key(), key(optimizer='lamb'), key(num_epochs=2.0)}) == 3


def test_a_comparison_that_another_has_taken_over_ends(data_dir, tmp_path):
  first = tmp_path / 'cells' / 'adamw' / 'seed-0'
  run_lib.take_over_later(tmp_path, first)
  config = compare_config.get_config(data_dir)
  config.grid = ({'stages[-1].optimizer': ('adamw',)},)
  with pytest.raises(RuntimeError, match='1 on elsewhere has taken over'):
    tool.compare(config, tmp_path)
  assert len(run_lib.read_history(first)['stages'][0]['epochs']) == 1
  assert not (first / 'outcome.json').exists()


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(strategies):
  _, workdir, result = strategies
  record = find(result, 'broken')
  assert (record['final_top1'], record['best_top1']) == (None, None)
  assert 'were not finite' in record['error']
  row = read_cells(workdir)[1]
  assert (row['cell'], row['done'], row['diverged']) == ('broken', '0', '2')
  text = (workdir / 'comparison.txt').read_text()
  assert 'no run of broken finished' in text


def test_all_that_is_written_says_the_same(strategies):
  _, workdir, result = strategies
  saved = json.loads((workdir / 'comparison.json').read_text())
  assert [x['final_top1'] for x in saved['runs']] == [
    x['final_top1'] for x in result['runs']
  ]
  assert (workdir / 'optimizer_scheduler_comparison.png').stat().st_size > 9000
  finals = [find(result, 'adamw', seed)['final_top1'] for seed in (0, 1)]
  row = read_cells(workdir)[0]
  assert float(row['top1_mean']) == pytest.approx(sum(finals) / 2)
  with open(workdir / 'comparison_runs.csv', newline='') as file:
    assert len(list(csv.DictReader(file))) == 4


def test_what_can_be_shown_is_said_before_the_first_run(strategies):
  _, _, result = strategies
  before, after = (result['power'][x] for x in ('before', 'after'))
  assert before['source'].startswith('assumed')
  assert before['num_images'] == find(result, 'adamw')['num_images']
  assert (before['seeds'], before['detectable']) == (2, None)
  assert after['source'] == before['source']  # The other cell diverged.
  assert after['seconds_a_seed'] > 0
  assert result['looks'] == []  # Two seeds show nothing.


def test_runs_that_are_over_are_not_trained_again(strategies):
  config, workdir, result = strategies
  before = {
    path: path.stat().st_mtime_ns
    for path in (workdir / 'cells').rglob('training_history.json')
  }
  again = tool.compare(config, workdir)
  assert again['runs'] == result['runs']
  after = {path: path.stat().st_mtime_ns for path in before}
  assert after == before


def test_more_seeds_leave_the_first_ones_as_they_are(strategies):
  config, workdir, result = strategies
  more = config.copy_and_resolve_references()
  more.base.stages = config.base.stages
  more.cells = ()
  more.seeds = 3
  grown = tool.compare(more, workdir)
  assert find(grown, 'adamw') == find(result, 'adamw')
  assert [x['seed'] for x in grown['runs']] == [0, 1, 2]
  (look,) = grown['looks']
  assert (grown['max_seeds'], look['seeds'], look['level']) == (3, 3, 0.05)


def test_another_config_in_the_same_workdir_is_a_mistake(strategies):
  config, workdir, _ = strategies
  other = config.copy_and_resolve_references()
  other.base.num_filters = 8
  with pytest.raises(errors.UserError, match='another config') as caught:
    tool.compare(other, workdir)
  assert caught.value.where == ("cell 'adamw', seed 0: num_filters: 4 -> 8")


def test_what_is_refused_leaves_the_results_as_they_are(strategies):
  config, workdir, _ = strategies
  names = ('config.json', 'comparison.json', 'comparison_runs.csv')
  before = [(workdir / name).read_bytes() for name in names]
  other = config.copy_and_resolve_references()
  other.base.stages, (broken,) = config.base.stages, config.cells
  rate = {'stages[-1].learning_rate': 1e29}
  other.cells = ({**broken, 'overrides': {**broken['overrides'], **rate}},)
  with pytest.raises(errors.UserError, match='another config') as caught:
    tool.compare(other, workdir)
  assert caught.value.where.endswith('ten.learning_rate: 1e+30 -> 1e+29')
  other.cells, other.pilot = config.cells, 'nowhere'
  with pytest.raises(errors.UserError, match='pilot'):
    tool.compare(other, workdir)
  assert [(workdir / name).read_bytes() for name in names] == before


@pytest.mark.slow
def test_a_ladders_curve_counts_all_of_its_stages(ladder):
  _, workdir, result = ladder
  record = find(result, 'ladder')
  history = run_lib.read_history(workdir / 'cells' / 'ladder' / 'seed-0')
  first, last = history['stages']
  assert [b['stage'] for b in record['boundaries']] == ['three', 'ten']
  images = [
    s['batch_size'] * s['steps_per_epoch'] * s['num_epochs']
    for s in (first, last)
  ]
  before, end = record['boundaries']
  assert (before['images'], end['images']) == (images[0], sum(images))
  assert (before['epochs'], end['epochs']) == (1, 2)
  (point,) = record['curve']
  assert point['top1'] == last['epochs'][-1]['val_top1']
  assert point['images'] == sum(images)
  assert end['flops'] > before['flops'] > 0
  expected = first['seconds'] + last['seconds'] + last['handover_seconds']
  assert end['seconds'] == pytest.approx(expected)


@pytest.mark.slow
def test_a_stage_that_cells_have_in_common_is_trained_once(ladder):
  _, workdir, result = ladder
  plain, reset = find(result, 'ladder'), find(result, 'reset')
  assert (plain['shared'], reset['shared']) == ([], ['three'])
  assert reset['boundaries'][0] == plain['boundaries'][0]
  assert reset['boundaries'][1]['flops'] == plain['boundaries'][1]['flops']
  paths = [workdir / 'cells' / cell / 'seed-0' for cell in ('ladder', 'reset')]
  assert run_lib.bits(paths[0], 'three') == run_lib.bits(paths[1], 'three')
  assert run_lib.bits(paths[0], 'ten') != run_lib.bits(paths[1], 'ten')
  histories = [run_lib.read_history(path)['stages'] for path in paths]
  assert histories[0][0] == histories[1][0]


@pytest.mark.slow
def test_controls_cost_what_the_ladder_does(ladder):
  _, _, result = ladder
  plain = find(result, 'ladder')['boundaries'][-1]
  for kind in ('images', 'flops'):
    record = find(result, f'last_alone_equal_{kind}')
    assert len(record['boundaries']) == 1
    # To half of the last stage's 29 steps an epoch.
    assert record['boundaries'][0][kind] == pytest.approx(
      plain[kind], rel=1 / 58
    )
  own = find(result, 'last_alone')
  assert own['num_epochs'] == 1
  seconds = find(result, 'last_alone_equal_seconds')
  before, end = find(result, 'ladder')['boundaries']
  handed = run_lib.read_history(
    tool.pathlib.Path(find(result, 'ladder')['workdir'])
  )['stages'][1]
  assert end['seconds'] - before['seconds'] == pytest.approx(
    handed['seconds'] + handed['handover_seconds']
  )
  assert seconds['num_epochs'] == pytest.approx(
    end['seconds'] / handed['seconds'], rel=1e-4
  )


@pytest.mark.slow
def test_a_ladders_verdict_names_each_control(ladder):
  _, workdir, result = ladder
  text = (workdir / 'comparison.txt').read_text()
  for kind in ('FLOPs', 'images', 'seconds'):
    assert f'at equal {kind}' in ' '.join(result['verdicts'][0].split())
  assert 'a measurement on this machine' in ' '.join(text.split())
  assert (workdir / 'ladder_comparison.png').exists()


@pytest.mark.slow
def test_rates_are_tuned_by_runs_that_are_counted_apart(data_dir, tmp_path):
  config = compare_config.get_config(data_dir)
  config.grid = ({'stages[-1].optimizer': ('adamw',)},)
  config.seeds = 1
  config.tuning.factors = (1e-6, 1.0)
  config.tuning.rungs = (0.5,)
  result = tool.compare(config, tmp_path)
  (cell,) = result['cells']
  tuning = cell['tuning']
  assert (tuning['factor'], tuning['at_border']) == (1.0, True)
  assert [t['factor'] for t in tuning['trials']] == [1e-6, 1.0]
  assert [r['seed'] for r in tuning['runs']] == [1000, 1000]
  assert [r['num_epochs'] for r in tuning['runs']] == [1.0, 1.0]
  # Two trials of half of the epochs of the one run.
  whole = result['runs'][0]['boundaries'][-1]
  for kind in ('images', 'flops'):
    assert tuning['cost'][kind] == pytest.approx(whole[kind])
  assert 'at the border of the range: adamw' in ' '.join(
    (tmp_path / 'comparison.txt').read_text().split()
  )
  trial = tool.pathlib.Path(tuning['runs'][0]['workdir'])
  assert not checkpoints.stage_directory(trial, 'ten').exists()


@pytest.mark.slow
def test_cells_that_must_not_take_longer_are_timed_first(data_dir, tmp_path):
  config = compare_config.get_config(data_dir)
  config.base.stages[0]['num_epochs'] = 1.0
  config.grid = ({'num_filters': (4, 8)},)
  config.budget = 'seconds'
  config.seeds = 1
  config.timed_epochs = 1
  result = tool.compare(config, tmp_path)
  reference = find(result, 'num_filters_4')
  other = find(result, 'num_filters_8')
  (stage,) = run_lib.read_history(tmp_path / 'timing' / 'num_filters_8')[
    'stages'
  ]
  assert other['num_epochs'] == pytest.approx(
    reference['boundaries'][0]['seconds'] / stage['seconds'], rel=1e-4
  )


def test_seconds_that_leave_no_room_fail_one_run_and_not_the_comparison(
  data_dir, tmp_path
):
  config = compare_config.get_config(data_dir)
  config.grid = ({'num_filters': (4, 8)},)
  config.budget = 'seconds'
  first, other = cells.create_cells(config)
  comparison = tool.Comparison(config, tmp_path, (first, other), None)
  reference = {'status': 'done', 'boundaries': [{'seconds': 1.0}]}
  # Handing over takes all there is; then a length of less than one step.
  for timing in ((2.0, 1.0), (0.0, 1e9)):
    planned, outcome = tool._run_cell(comparison, other, 0, reference, timing)
    assert (outcome['status'], outcome['shared']) == ('failed', [])
    assert "cell 'num_filters_8'" in outcome['error']
    assert collect.read_record(planned, outcome, {})['status'] == 'failed'


def test_it_is_said_whose_epochs_were_timed():
  def say(*others):
    described = [
      {'tuning': None, 'control': control, 'equal': equal}
      for control, equal in ((False, 'seconds'), *others)
    ]
    return ' '.join(tool._remarks({'cells': described}))

  beforehand, own = 'were timed beforehand', 'as the epochs of the reference'
  control = say((True, 'seconds'), (False, ''))
  assert own in control
  assert beforehand not in control
  cell = say((False, 'seconds'))
  assert beforehand in cell
  assert own not in cell
  assert 'Equal seconds' not in say((True, 'images'))


def test_mistakes_in_any_cell_stop_it_before_anything_is_written(
  data_dir, tmp_path
):
  workdir = tmp_path / 'never'
  config = compare_config.get_config(data_dir)
  config.cells = (
    {'name': 'huge', 'overrides': {'stages[-1].batch_size': 4000}},
  )
  with pytest.raises(errors.UserError, match='is larger than') as caught:
    tool.compare(config, workdir)
  assert "cell 'huge'" in caught.value.where
  config.cells = ({'name': 'absent', 'overrides': {'data_dir': 'nowhere'}},)
  config.base.stages[0]['dataset'] = 'imagenette'
  with pytest.raises(errors.UserError, match='imagenette'):
    tool.compare(config, workdir)
  config = compare_config.get_ladder(data_dir)
  config.cells = ({'name': 'last_alone', 'overrides': {}},)
  with pytest.raises(errors.UserError, match='name of a control'):
    tool.compare(config, workdir)
  assert not workdir.exists()


def plan(config, workdir, cell, seed=0):
  found = {c.name: c for c in cells.create_cells(config)}[cell]
  comparison = tool.Comparison(config, workdir, (found,), None)
  return comparison.plan_run(found, seed)


def test_an_operator_that_computes_pays_for_it(data_dir, tmp_path):
  """In FLOPs and images; DASH takes gradients of ten batches."""
  config = compare_config.get_ladder(data_dir)
  config.operators = ({'name': 'dash', 'fields': {'transfer': 'dash'}},)
  config.controls = False
  chosen = cells.create_cells(config)
  comparison = tool.Comparison(config, tmp_path, chosen, None)
  costs = {}
  for kind in ('flops', 'own'):
    config.budget = kind
    plain, dash = (
      comparison.plan_run(cell, 0) for cell in cells.create_cells(config)
    )
    costs[kind] = [
      sum(cost.total('flops') for cost in run.costs) for run in (plain, dash)
    ]
    three, ten = dash.costs
    assert plain.costs[1].handover == three.handover == (0, 0)
    assert ten.handover.images == 10 * 48
    assert (ten.num_epochs < 1) == (kind == 'flops')
  assert costs['flops'][1] == pytest.approx(costs['flops'][0], rel=1 / 58)
  assert costs['own'][1] == costs['own'][0] + ten.handover.flops

  def stage(cost, first_step):
    row = {
      'epoch': cost.num_epochs,
      'global_step': first_step + cost.steps.total,
      'seconds': 1.0,
      'val_top1': 0.5,
    }
    fields = {'name': cost.name, 'num_epochs': cost.num_epochs, 'epochs': [row]}
    return {**fields, 'num_eval_images': 360, 'best': {'top1': 0.5}}

  history = {
    'version': 1,
    'stages': [stage(three, 0), stage(ten, three.steps.total)],
  }
  files.write_json(dash.workdir / 'training_history.json', history)
  outcome = {'status': 'done', 'error': '', 'shared': []}
  record = collect.read_record(dash, outcome, {})
  end = record['boundaries'][-1]
  assert end['handover_flops'] == ten.handover.flops
  for kind in ('flops', 'images'):
    whole = three.total(kind) + ten.total(kind)
    assert end[kind] == record['curve'][-1][kind] == whole


@pytest.mark.slow
def test_stages_are_shared_only_between_runs_that_train_them_alike(ladder):
  config, workdir, _ = ladder
  donor = plan(config, workdir, 'ladder')
  for i, (change, shared) in enumerate(
    (
      ({}, ['three']),
      ({'stages[-1].batch_size': 24}, ['three']),
      ({'stages[0].batch_size': 24}, []),
      ({'num_filters': 8}, []),
    )
  ):
    config.cells = ({'name': 'changed', 'overrides': change},)
    run = plan(config, workdir / 'others' / str(i), 'changed')
    assert runs.share_stages(run, [donor]) == shared
    assert runs.share_stages(run, []) == shared  # As it was.
  config.cells = ({'name': 'changed', 'overrides': {}},)
  run = plan(config, workdir / 'others' / 'seed', 'changed', seed=1)
  assert runs.share_stages(run, [donor]) == []


def test_a_run_that_failed_is_tried_again_and_one_that_diverged_is_not(
  strategies,
):
  config, workdir, _ = strategies
  planned = plan(config, workdir, 'broken')
  assert runs.read_outcome(planned)['status'] == 'diverged'
  path = planned.workdir / 'outcome.json'
  before = json.loads(path.read_text())
  files.write_json(path, {**before, 'status': 'failed'})
  assert runs.read_outcome(planned) is None
  files.write_json(path, before)


def test_a_run_that_never_began_has_a_record_too(strategies):
  config, workdir, _ = strategies
  planned = plan(config, workdir / 'none', 'adamw')
  outcome = {'status': 'failed', 'error': 'x', 'shared': []}
  record = collect.read_record(planned, outcome, {})
  assert (record['curve'], record['boundaries']) == ([], [])
  assert (record['status'], record['final_top1']) == ('failed', None)


def test_others_see_how_far_a_comparison_is(strategies, tmp_path, monkeypatch):
  """Of nothing but its config, then of a run that goes on, then of a kill."""
  monkeypatch.setattr(live, '_LOOK_SECONDS', 0.01)
  config, whole, _result = strategies
  config = config_lib.complete(config, 'compare_default')
  workdir = tmp_path / 'copy'
  workdir.mkdir()

  def see():
    report.write_report(workdir)
    page = (workdir / 'report.html').read_text()
    return run_lib.words(page), page

  files.write_json(workdir / 'config.json', config_lib.to_json(config))
  said, _ = see()
  assert 'stopped as of' in said
  assert '0 of 4 runs over 4 waiting' in said
  shutil.copytree(whole / 'cells' / 'broken', workdir / 'cells' / 'broken')
  shutil.copytree(whole / 'cells' / 'adamw', workdir / 'cells' / 'adamw')
  first = workdir / 'cells' / 'adamw' / 'seed-0'
  (first / 'outcome.json').unlink()
  with lock.Lock(workdir), lock.Lock(first):
    before = run_lib.snapshot(workdir / 'cells')
    said, page = see()
    assert run_lib.snapshot(workdir / 'cells') == before
  assert 'under way renewed every 15 seconds as of' in said
  assert '3 of 4 runs over 1 under way 2 diverged' in said
  assert f'adamw seed 0 – – – starting – {platform.node()}' in said
  assert 'adamw 1 1 – – broken – – – 2' in said
  # Its curve over images and over seconds, and in no mean.
  assert page.count('<path class="line s0 single unfinished"') == 2
  assert 'adamw (n = 0)' in said
  with lock.Lock(workdir), lock.Lock(first):
    written, out = workdir / 'report.html', io.StringIO()
    written.unlink()
    console = rich.console.Console(file=out)
    with live.comparison(workdir, console, lines=True):
      run_lib.wait_for(written.exists)
    assert 'event=runs over=3 total=4 running=1 left=0:' in out.getvalue()
    assert 'data-live' not in written.read_text()
  said, page = see()
  assert 'stopped as of' in said
  assert '1 begun' in said
  assert 'data-live' not in page


def start(config_path, workdir, data_dir):
  return run_lib.start_main(
    '--mode=compare',
    f'--config={config_path}:{data_dir}',
    f'--workdir={workdir}',
  )


@pytest.mark.slow
def test_a_comparison_killed_five_times_ends_with_the_same_table(
  data_dir, tmp_path
):
  path = 'tests/compare_config.py'
  process = start(path, tmp_path / 'whole', data_dir)
  output = process.communicate(timeout=600)[0]
  assert process.returncode == 0, output
  rng = random.Random(int(os.environ.get('FAULTS_SEED', '0')))
  for cell, seed, step in KILLS:
    process = start(path, tmp_path / 'killed', data_dir)
    run = tmp_path / 'killed' / 'cells' / cell / f'seed-{seed}'
    run_lib.wait_for_step(process, run, 'ten', step)
    time.sleep(rng.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  process = start(path, tmp_path / 'killed', data_dir)
  output = process.communicate(timeout=600)[0]
  assert process.returncode == 0, output
  assert read_cells(tmp_path / 'killed') == read_cells(tmp_path / 'whole')
  for cell in ('adamw', 'sgd_momentum'):
    for seed in (0, 1):
      part = f'cells/{cell}/seed-{seed}'
      assert run_lib.bits(tmp_path / 'killed' / part, 'ten') == run_lib.bits(
        tmp_path / 'whole' / part, 'ten'
      )

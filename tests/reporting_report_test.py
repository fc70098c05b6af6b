import io
import itertools
import math

import history_fixture
import pytest
import rich.console

from jaxprog.reporting import facts, rundir
from jaxprog.reporting import report as report_lib

ENVIRONMENT = {
  'time': '2026-11-24T12:00:00+00:00',
  'host': 'machine',
  'platform': 'Linux',
  'python': '3.12.1',
  'versions': {'jax': '0.10.2', 'flax': '0.12.0'},
  'devices': {'kind': 'TPU v5e', 'count': 8, 'process_count': 2},
  'git': {'commit': 'c0ffee', 'dirty': True},
  'command': 'python main.py ' + '--config=' + 'x' * 70,
}
CONFIG = {'model': 'resnet50', 'stages': []}


def create_stage(**fields):
  """Returns a finished imagenette stage as the mission has it."""
  stage = history_fixture.create_history((None,))['stages'][0]
  return {**stage, 'seconds': 1800.0, **fields}


def score(**fields):
  return facts.score(create_stage(**fields))


def report(history, **fields):
  return report_lib.report(rundir.RunFiles('run', history, **fields))


def in_words(*stages, **fields):
  """Returns the report with its lines joined, so that no break matters."""
  text = report({'config_hash': 'hash', 'stages': list(stages)}, **fields)
  assert max(map(len, text.splitlines())) <= 80
  assert text.isascii()
  return ' '.join(text.split())


@pytest.mark.parametrize(
  ('top1', 'verdict'),
  [
    (0.8494, 'below'),
    (0.8496, 'within'),  # Printed as 85.0%.
    (0.95, 'within'),
    (0.9504, 'within'),
    (0.9506, 'above'),
  ],
)
def test_top1_verdict_agrees_with_the_printed_number(top1, verdict):
  assert score(best={'epoch': 3, 'top1': top1}).top1_verdict == verdict


@pytest.mark.parametrize(
  ('seconds', 'verdict'),
  [(1700, 'below'), (1800, 'within'), (1825, 'within'), (1900, 'above')],
)
def test_time_verdict_is_in_minutes(seconds, verdict):
  assert score(seconds=seconds).minutes_verdict == verdict


def test_expectations_are_the_missions():
  ranges = {name: (e.top1, e.minutes) for name, e in facts.EXPECTATIONS.items()}
  assert ranges == {
    'imagenette': ((0.85, 0.95), (30, 30)),
    'tiny_imagenet': ((0.60, 0.70), (60, 120)),
    'imagenet_mini': ((0.45, 0.55), (120, 180)),
    'imagenet2012': ((0.70, 0.80), (300, 420)),
  }


def test_expectations_belong_to_datasets_not_to_names():
  assert score(name='mine').expectation.top1 == (0.85, 0.95)
  other = score(name='imagenette', dataset='digits')
  assert (other.expectation, other.top1_verdict) == (None, '')
  # Nobody who trains on data of their own reads of a mission.
  words = in_words(create_stage(dataset='digits'))
  for word in ('expectation', 'mission', 'Scorecard', 'without evidence'):
    assert word not in words
  beside = in_words(create_stage(), create_stage(dataset='digits'))
  assert 'no expectation stated' in beside


def test_says_when_data_or_epochs_are_not_the_missions():
  assert not score().remark
  whole = in_words(create_stage())
  assert 'given without evidence' in whole
  assert 'the expectation speaks of' not in whole
  assert score(num_train_images=100).remark
  fewer = create_stage(epochs=create_stage()['epochs'][:3])
  assert (
    'the expectation speaks of 9,469 training images and 20 epochs; here it '
    'was 9,469 and 3 epochs'
  ) in in_words(fewer)


def test_complete_ladder_fits_and_shortens_no_name():
  history = history_fixture.create_history()
  text = report(history, environment=ENVIRONMENT)
  assert max(map(len, text.splitlines())) <= 80
  assert '..' not in text
  for stage in history['stages']:
    assert f'{stage["best"]["top1"]:.1%}' in text
    # Stages, results, weights, time, scorecard.
    begins = [x for x in text.splitlines() if x.startswith(stage['name'] + ' ')]
    assert len(begins) == 5


def test_columns_are_aligned():
  history = history_fixture.create_history()
  lines = report(history).splitlines()
  begin = lines.index('Results') + 2
  titles, dashes, *rows = lines[begin : begin + 6]
  ends = [
    i
    for i, (a, b) in enumerate(itertools.pairwise(f'{dashes} '))
    if a == '-' and b == ' '
  ]
  assert len(ends) == len(dashes.split())
  for row in rows:
    for end in ends[1:-1]:
      assert row[end] != ' ', row
      assert row[end + 1] == ' ', row
  assert titles.split()[-1] == 'status'


def test_header_says_what_ran_on_what():
  words = in_words(create_stage(), environment=ENVIRONMENT)
  assert '8 x TPU v5e, 2 processes' in words
  assert 'c0ffee with uncommitted changes' in words
  assert 'jax 0.10.2, flax 0.12.0' in words


def test_overfitting_is_flagged_only_when_wide_and_growing():
  def stage(*gaps):
    rows = [
      history_fixture.create_row(i + 1, train_top1=0.5 + g, val_top1=0.5)
      for i, g in enumerate(gaps)
    ]
    return create_stage(epochs=rows)

  words = in_words(stage(-0.02, 0.05, 0.151))
  assert (
    'train top-1 ends 15.1 points above validation top-1 (-2.0 in epoch 1)'
  ) in words
  assert 'running average on augmented images' in words
  assert 'overfitting' not in in_words(stage(-0.02, 0.05, 0.099))
  assert 'overfitting' not in in_words(stage(0.2, 0.15, 0.15))


def test_says_what_was_cut_resumed_or_not_run():
  stopped = create_stage(status='stopped_early')
  stopped['epochs'] = stopped['epochs'][:12]
  words = in_words(stopped)
  assert 'stopped early, after 12 of 20 epochs' in words
  assert '(one_cycle) never reached its last learning rates' in words
  stopped.update(stopped='out of patience', schedule='plateau')
  words = in_words(stopped)
  assert 'after 12 of 20 epochs (out of patience).' in words
  assert 'never reached' not in words
  running = create_stage(status='running', resumed_at_steps=[1480, 2000])
  planned = {'stages': [{'name': 'imagenette'}, {'name': 'pets'}]}
  words = in_words(running, config=planned)
  assert 'not finished, 20 of 20 epochs' in words
  assert 'resumed 2 times, at global step 1,480, 2,000' in words
  assert "Not run, of this config's stages: pets." in words
  unseen = 'imagenette, tiny_imagenet, imagenet_mini, imagenet2012'
  assert f"of the mission's datasets: {unseen}" in words
  ladder = history_fixture.create_history()['stages']
  assert "of the mission's datasets" not in in_words(*ladder)


def test_says_what_averages_reach_and_what_was_skipped():
  stage = create_stage()
  assert 'averaged' not in in_words(stage)
  assert 'changed nothing' not in in_words(stage)
  for i, row in enumerate(stage['epochs']):
    row.update(ema_top1=0.5 + 0.01 * (i == 3), skipped_steps=i == 5)
  stage['epochs'][7]['ema_top1'] = math.nan
  words = in_words(stage)
  assert 'averaged weights reach 51.0% at epoch 4.' in words
  assert '1 steps changed nothing' in words


def test_copes_with_nothing_and_with_nulls():
  assert 'none' not in in_words()
  rows = [
    history_fixture.create_row(
      e, train_loss=loss, train_top1=None, val_top1=None, images_per_second=None
    )
    for e, loss in enumerate((1.0, None, math.nan, 2.0, None), 1)
  ]
  broken = create_stage(epochs=rows, best=None, transfer=None)
  words = in_words(broken, create_stage(name='empty', epochs=[], best=None))
  assert 'the loss was not finite in epochs 2-3, 5.' in words


def test_long_names_lose_their_middle_and_numbers_nothing():
  stage = create_stage(dataset='folder:/' + 'deep/' * 30 + 'pets')
  text = report({'config_hash': '', 'stages': [stage]})
  assert max(map(len, text.splitlines())) <= 80
  assert '/pets ' in text
  assert '9,469' in text


def test_summary_table_fits_80_columns():
  history = history_fixture.create_history((None, 2))
  history['stages'][1]['status'] = 'stopped_early'
  console = rich.console.Console(file=io.StringIO(), width=80)
  console.print(report_lib.summary_table(history))
  text = console.file.getvalue()
  best = history['stages'][0]['best']
  row = next(x for x in text.splitlines() if 'imagenette' in x).split()
  assert row[:4] == [
    'imagenette',
    '224',
    f'{best["top1"]:.1%}',
    f'{best["epoch"]}/20',
  ]
  assert 'stopped early' in text


def test_says_where_the_time_went():
  rows = [
    history_fixture.create_row(
      e, seconds=8.0, input_wait=0.25, eval_seconds=3.0
    )
    for e in (1, 2)
  ]
  stage = create_stage(epochs=rows, handover_seconds=2.0)
  assert facts.time_split(stage) == (12.0, 4.0, 6.0, 0.0, 0.0, 2.0, 0.0)
  words = in_words(stage)
  assert 'imagenette 0:24 50.0% 16.7% 25.0% - - 8.3%' in words
  assert 'before saves and compilation were timed' in words
  partly = 'resumed in its middle counts only the time since'
  assert partly not in words
  assert partly in in_words({**stage, 'resumed_at_steps': [1480]})


def test_the_parts_of_a_run_add_up_to_its_time():
  history = history_fixture.create_history((2, 3))
  first, second = history['stages']
  first |= {'compile_seconds': 9.0, 'save_seconds': 0.5}
  second |= {'compile_seconds': 0.5, 'handover_seconds': 2.0}
  for row in first['epochs']:
    row['eval_seconds'] = 3.0
  history['wall_seconds'] = 1000.0
  splits = facts.run_split(history)
  assert [*splits] == ['imagenette', 'tiny_imagenet', 'the rest']
  assert sum(map(sum, splits.values())) == pytest.approx(1000)
  assert splits['imagenette'].compiling == 9
  assert splits['imagenette'].saves == 0.5
  assert splits['imagenette'].rest == splits['the rest'].training == 0


@pytest.mark.parametrize(
  ('right', 'count', 'low', 'high'),
  # Newcombe 1998, table I: Wilson's score method without correction.
  [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ],
)
def test_an_interval_of_accuracy_is_wilsons(right, count, low, high):
  found = facts.interval(right / count, count)
  assert found == pytest.approx((low, high), abs=5e-5)


def test_a_holdout_is_not_passed_off_as_validation():
  stage = create_stage(
    eval_split='holdout:10%', best={'epoch': 20, 'top1': 0.97}
  )
  words = in_words(stage, config=CONFIG)
  assert 'On training images held out instead: imagenette; see' in words
  assert 'imagenette: 97.0% here' in words
  assert 'validation images, here on a hold-out' in words
  assert 'and top-1 is on a hold-out' in words
  assert score(**stage).remark
  stage['validation'] = {
    'top1': 0.9,
    'top5': 0.99,
    'epoch': 20,
    'num_images': 3_925,
  }
  words = in_words(stage, config=CONFIG)
  assert 'imagenette: 90.0% here' in words
  assert 'on a hold-out' not in words
  found = score(**stage)
  assert (found.top1, found.top1_verdict) == (0.9, 'within')
  console = rich.console.Console(file=io.StringIO(), width=80)
  history = {'config_hash': '', 'stages': [stage]}
  stage['num_classes'] = 200  # Of ten, five are nearly all.
  console.print(report_lib.summary_table(history))
  assert {'90.0%', '99.0%'} <= set(console.file.getvalue().split())


def test_says_what_others_reach_and_what_is_mistaken_for_what():
  stage = create_stage()
  stage['diagnostics'] = {
    'classes': ['tench', 'radio', 'horn'],
    'per_class': [[10, 5], [8, 8], [9, 8]],
    'confusions': [
      {'label': 1, 'predicted': 1, 'count': 8},
      {'label': 0, 'predicted': 2, 'count': 5},
      {'label': 2, 'predicted': 1, 'count': 1},
    ],
  }
  words = in_words(stage, config=CONFIG)
  assert 'tench taken for horn, 5 of 10; horn taken for radio, 1 of 9' in words
  assert (
    '93.5% by xresnext50 tested at 256 px (fastai/imagenette, README, '
    'leaderboard). Differs: xresnext50, here resnet50; 256 px, here 224 px; '
    'tested at 256 px, here at 224 px.'
  ) in words
  plain = in_words(create_stage(dataset='digits'))
  assert 'Published results' not in plain
  assert 'Classes and mistakes' not in plain


@pytest.mark.parametrize(
  ('largest', 'metric', 'noted'),
  [
    (110, 'val_top1', False),
    (150, 'val_top1', True),
    (110, 'val_balanced_top1', True),
  ],
)
def test_classes_that_are_nearly_equal_are_no_news(largest, metric, noted):
  stage = {
    'best': {'balanced_top1': 0.5},
    'best_metric': metric,
    'class_sizes': (100, largest),
  }
  assert bool([*facts._class_notes(stage)]) == noted

"""Plateau, early stopping, freezing, averages, phases: as users run them."""

import json
import signal

import pytest
import runs

CONFIG = 'tests/controls_config.py'


@pytest.fixture(scope='module')
def config(data_dir):
  return f'--config={CONFIG}:{data_dir}'


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('controls')
  result = runs.call_main(config, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  return workdir


def test_plateau_and_early_stop_decide_as_told(trained):
  ten = runs.read_history(trained)['stages'][1]
  rates = [row['learning_rate'] for row in ten['epochs']]
  assert rates == pytest.approx([0.002, 0.002, 0.001, 0.0005])
  assert ten['status'] == 'stopped_early'
  assert ten['stopped'] == 'val_top1 did not improve for 3 evaluations'
  assert [row['skipped_steps'] for row in ten['epochs']] == [0] * 4
  report = (trained / 'training_report.txt').read_text()
  assert 'ten: stopped early, after 4 of 8 epochs' in ' '.join(report.split())


def test_batches_grow_where_the_config_says(trained):
  three, ten = runs.read_history(trained)['stages']
  begin = three['epochs'][-1]['global_step']
  steps = [row['global_step'] - begin for row in ten['epochs']]
  assert steps == [29, 29 + 14, 29 + 28, 29 + 42]


@pytest.mark.slow
def test_killed_and_resumed_decides_as_uninterrupted(
  run_main, trained, config, tmp_path
):
  often = '--config.checkpoint_every_steps=7'
  arguments = (config, often, f'--workdir={tmp_path}')
  process = runs.start_main(*arguments)
  runs.wait_for_step(process, tmp_path, 'ten', 49)
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=60)
  result = run_main(*arguments)
  assert result.returncode == 0, result.stderr
  resumed = runs.read_history(tmp_path)
  assert resumed['stages'][1]['resumed_at_steps']
  expected = runs.read_history(trained)
  assert runs.without_times(resumed) == runs.without_times(expected)
  for weights in ('final', 'ema'):
    found = runs.bits(tmp_path, 'ten', weights)
    assert found == runs.bits(trained, 'ten', weights)


def test_averaged_weights_are_evaluated_beside_the_raw_ones(trained):
  ten = runs.read_history(trained)['stages'][1]
  best = max(row['ema_top1'] for row in ten['epochs'])
  assert best > 0.1
  result = runs.call_main(
    '--mode=eval', f'--workdir={trained}', '--weights=ema'
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == f'{100 * best:.1f}'
  result = runs.call_main(
    '--mode=eval', f'--workdir={trained}', '--weights=ema', '--stage=three'
  )
  assert result.returncode == 2
  assert 'no ema weights' in result.stderr


def test_a_frozen_backbone_needs_one(config, tmp_path):
  result = runs.call_main(config, f'--workdir={tmp_path}/run', '--only=ten')
  assert result.returncode == 2
  assert 'freeze_epochs' in result.stderr
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.slow
def test_lr_find_changes_nothing(run_main, trained, config, tmp_path):
  result = run_main(config, f'--workdir={tmp_path}', '--mode=lr_find')
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith('three: the loss')
  path = tmp_path / 'lr_find' / 'three.json'
  found = json.loads(path.read_text())
  assert 10 < len(found['losses']) <= 40
  assert found['rates'][0] == pytest.approx(1e-6)
  assert path.with_suffix('.png').stat().st_size > 0
  assert sorted(p.name for p in tmp_path.iterdir()) == ['lr_find']
  result = run_main(config, f'--workdir={tmp_path}', '--only=three')
  assert result.returncode == 0, result.stderr
  found = runs.bits(tmp_path, 'three', 'final')
  assert found == runs.bits(trained, 'three', 'final')


def test_lr_find_of_a_later_stage_begins_with_what_is_handed_over(
  trained, config
):
  before = runs.read_history(trained)
  result = runs.call_main(
    config, f'--workdir={trained}', '--mode=lr_find', '--only=ten'
  )
  assert result.returncode == 0, result.stderr
  assert (trained / 'lr_find' / 'ten.json').is_file()
  assert runs.read_history(trained) == before


@pytest.mark.slow
def test_check_shows_the_rates_before_anything_is_trained(
  run_main, config, tmp_path
):
  result = run_main(
    config,
    f'--workdir={tmp_path}',
    '--mode=check',
    '--config.stages[0].optimizer=sgd_momentum',
    '--config.stages[0].scale_learning_rate=true',
    '--config.stages[0].base_batch_size=96',
  )
  assert result.returncode == 0, result.stderr
  assert 'three: learning rate 0.01 x 48 / 96 = 0.005' in result.stdout
  assert 'event=plan stage=ten' in result.stdout
  assert '  ten    █' in result.stdout
  assert 'plateau' in result.stdout
  written = {p.name for p in tmp_path.iterdir()}
  pictures = {'augmented_three.png', 'augmented_ten.png'}
  assert written == {'learning_rates.png', 'plan.json'} | pictures

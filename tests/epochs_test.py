import dataclasses

import pytest
import runs
import tiny_config

from jaxprog import epochs, errors, fields, stages


def count(num_images, **fields):
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(stage, **fields)
  return epochs.count_steps(stage, num_images)


def test_fractional_epochs():
  steps = count(48 * 10 + 47, num_epochs=2.5, warmup_epochs=0.25)
  assert steps == epochs.Steps(
    phases=(epochs.Phase(0, 0, 10, 48),), total=25, warmup=2
  )
  assert steps.epoch_ends == (10, 20, 25)
  assert [steps.epoch(i) for i in (0, 9, 10, 24)] == [0, 0, 1, 2]


def test_batches_that_grow_within_a_stage():
  steps = count(
    48 * 12,
    num_epochs=4.5,
    phases=(
      fields.PhaseStart(1, (('batch_size', 96),)),
      fields.PhaseStart(3, (('batch_size', 192),)),
    ),
    milestones=(2.5, 3.5),
    freeze_epochs=1.5,
    schedule='step',
  )
  assert steps.epoch_ends == (12, 18, 24, 27, 28)
  assert [steps.phase(i).batch_size for i in (0, 11, 12, 23, 24)] == [
    48,
    48,
    96,
    96,
    192,
  ]
  assert [steps.epoch(i) for i in (11, 12, 17, 18, 24, 27)] == [
    0,
    1,
    1,
    2,
    3,
    4,
  ]
  assert steps.milestones == (21, 26)
  assert steps.frozen == 15


def test_every_image_at_most_once_in_an_epoch():
  steps = count(1000, num_epochs=3.0)
  ends = (0, *steps.epoch_ends)
  for epoch in range(3):
    assert (ends[epoch + 1] - ends[epoch]) * 48 <= 1000


def test_warmup_in_steps():
  assert count(480, warmup_steps=7).warmup == 7


@pytest.mark.parametrize(
  ('batch_sizes', 'factor', 'expected'),
  [
    ((48, 48), 1, (20, 40, 60, 80)),
    # 30 steps an epoch from epoch 2 on, or 5: still epochs 2, 4, 6 and 8.
    ((48, 16), 1, (20, 80, 140, 200)),
    ((48, 96), 1, (20, 30, 40, 50)),
    ((48, 96), 2, (20, 40, 80)),
  ],
)
def test_restarts_count_epochs_whatever_the_batch(
  batch_sizes, factor, expected
):
  first, second = batch_sizes
  cosine = {'schedule': 'cosine', 'num_epochs': 8.0, 'batch_size': first}
  phases = (fields.PhaseStart(2, (('batch_size', second),)),)
  options = {'phases': phases, 'restart_factor': factor, 'restart_epochs': 2.0}
  assert count(480, **cosine, **options).restarts == expected
  # From the peak on, and with a period that no device could count.
  late = count(480, **cosine, restart_epochs=3.0, warmup_steps=5)
  assert late.restarts == (35, 65, 95)
  endless = count(480, **cosine, restart_epochs=3.0, restart_factor=1e30)
  assert endless.restarts == (30, epochs.MAX_STEP)
  # It was refused: 3 epochs of the first phase are more than all steps.
  options['restart_epochs'] = 7.0
  assert count(480, **cosine, **options).restarts[0] < 8 * 30


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('warmup_epochs', 0.04),
    ('freeze_epochs', 0.05),
    ('restart_epochs', 0.05),
    ('milestones', (0.01,)),
    ('milestones', (0.5, 0.51, 0.52)),
  ],
)
def test_what_rounds_to_no_step_is_said(field, value):
  with pytest.raises(errors.UserError) as caught:
    count(480, num_epochs=2.0, **{field: value})
  assert field in caught.value.what
  assert 'an epoch has 10 steps' in caught.value.what
  assert 'at least 0.1 epochs' in caught.value.suggestion


def test_a_restart_that_fits_the_first_phase_alone_is_said():
  phases = (fields.PhaseStart(1, (('batch_size', 480),)),)
  with pytest.raises(errors.UserError, match='an epoch has 1 steps'):
    count(480, num_epochs=8.0, restart_epochs=0.25, phases=phases)


def test_the_command_line_says_what_rounds_to_no_step(data_dir, tmp_path):
  result = runs.call_main(
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={tmp_path}/run',
    '--config.stages.ten.freeze_epochs=0.001',
  )
  assert result.returncode == 2
  assert 'freeze_epochs 0.001 has no step of its own' in result.stderr
  assert len(result.stderr.strip().splitlines()) == 3


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'batch_size': 481}, 'larger than the 480'),
    ({'num_epochs': 1.0, 'warmup_epochs': 1.0}, 'no step to decay in'),
    ({'num_epochs': 1.0, 'warmup_steps': 11}, 'no step to decay in'),
    ({'num_epochs': 1.0, 'restart_epochs': 1.0}, 'all that follows'),
    ({'num_epochs': 1.0, 'freeze_epochs': 2.0}, 'nothing to unfreeze'),
    ({'num_epochs': 1.0, 'milestones': (0.5, 1.0)}, 'past the end'),
  ],
)
def test_parts_longer_than_the_whole(fields, expected):
  with pytest.raises(errors.UserError, match=expected) as caught:
    count(480, **fields)
  assert len(str(caught.value).split('\n')) == 3


@pytest.mark.parametrize(
  ('step', 'batch_size', 'expected'),
  [
    (12, 50, 6),  # The end of an epoch stays one.
    (8, 50, 4),  # 50 images of the second epoch are done.
    (9, 50, 4),  # 75 are, of which 25 come again.
    (9, 10, 22),
    (11, 75, 3),
    (11, 150, 1),  # Of an epoch under way one step is always left.
    (0, 10, 0),
  ],
)
def test_a_stage_goes_on_in_the_same_epoch(step, batch_size, expected):
  old = count(150, batch_size=25, num_epochs=4)
  new = count(150, batch_size=batch_size, num_epochs=4)
  assert epochs.translate(step, old, new) == expected


def test_with_growing_batches_it_goes_on_in_the_same_phase():
  phases = (fields.PhaseStart(2, (('batch_size', 50),)),)
  old = count(150, batch_size=25, num_epochs=4, phases=phases)
  new = count(150, batch_size=75, num_epochs=4)
  assert [epochs.translate(x, old, new) for x in (6, 12, 14)] == [2, 4, 5]
  assert [epochs.translate(x, new, old) for x in (2, 4, 5)] == [6, 12, 13]


def test_more_steps_than_can_be_counted_are_refused():
  with pytest.raises(errors.UserError, match='counted up to 2,147,483,647'):
    count(720, num_epochs=1e9)

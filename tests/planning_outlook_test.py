"""What is told of stages beforehand, as people read it."""

import dataclasses

import pytest
import rich.console
from conftest import ROOT

from jaxprog import config as config_lib
from jaxprog import fields, stages
from jaxprog.monitoring import progress
from jaxprog.planning import outlook


def look_ahead(stage, num_train_images=9_469, total_steps=1000, **changes):
  found = outlook.Outlook(
    stage=stage,
    known=progress.Description(
      name=stage.name,
      num_train_images=num_train_images,
      num_classes=10,
      image_size=stage.image_size,
      batch_size=stage.batch_size,
      total_steps=total_steps,
      warmup_steps=0,
      peak_learning_rate=stage.peak_learning_rate,
      final_learning_rate=1e-5,
      parameters=23_528_522,
    ),
    num_eval_images=3_925,
    num_evaluations=21,
    flops_per_image=24.3e9,
    memory_bytes=11_300_000_000,
    memory_compiled=True,
    device_bytes=16_000_000_000,
    compile_seconds=75.0,
    step_seconds=0.5,
    step_measured=True,
    input_seconds=0.1,
    fed_step_seconds=0.6,
    evaluation_seconds=10.0,
  )
  return dataclasses.replace(found, notes=[], **changes)


@pytest.fixture(scope='module')
def ladder():
  path = f'{ROOT}/configs/progressive.py'
  return stages.create_stages(config_lib.load_config(path))


def render(*tables, width=80):
  console = rich.console.Console(width=width, no_color=True)
  with console.capture() as capture:
    for table in tables:
      console.print(table)
  return capture.get()


def tables(outlooks, width):
  return list(outlook.stage_tables([x.figures() for x in outlooks], width))


def total_seconds(outlooks):
  return outlook.total([x.figures() for x in outlooks], 'seconds')


def rows(text):
  return {line[:12].strip(): line[12:].split() for line in text.split('\n')}


def test_four_stages_stand_side_by_side_in_80_columns(ladder):
  plans = [look_ahead(stage) for stage in ladder]
  (table,) = tables(plans, 80)
  text = render(table)
  assert text.isascii()
  assert max(map(len, text.split('\n'))) <= 80
  found = rows(text)
  assert found['stage'] == [stage.name for stage in ladder]
  assert found['batch'] == ['64', '128', '96', '128']
  assert found['px'] == ['224', '64', '224', '224']
  assert found['peak rate'] == ['0.002', '0.001', '0.0005', '0.1']
  assert found['FLOPs/image'] == ['24.3', 'G'] * 4
  assert found['memory'] == ['11.3', 'GB'] * 4
  assert found['fits'] == ['yes'] * 4
  assert 'phases' not in found  # There are none.
  assert len(tables(plans, 40)) == 4


@pytest.mark.parametrize(('batches', 'seen'), [(6, 6), (60, 50)])
def test_an_average_is_shown_training_batches_before_each_evaluation(
  ladder, batches, seen
):
  """Forward only, and no more than an epoch has: 1000 steps are 20 epochs."""
  stage = dataclasses.replace(
    ladder[0],
    num_epochs=20.0,
    transfer_batches=batches,
    optimizer='schedule_free_sgd',
    schedule='constant',
  )
  plain = dataclasses.replace(stage, optimizer='sgd_momentum')
  more = look_ahead(stage).seconds - look_ahead(plain).seconds
  assert more == pytest.approx(21 * seen * 0.6 / 3)


def test_a_stage_takes_its_fed_steps_and_its_evaluations(ladder):
  plan = look_ahead(ladder[0])
  assert plan.seconds == 1000 * 0.6 + 21 * 10
  plans = [plan, look_ahead(ladder[1])]
  assert total_seconds(plans) == 2 * plan.seconds
  plans[1].step_seconds = plans[1].fed_step_seconds = None
  assert total_seconds(plans) is None
  (table,) = tables(plans, 80)
  assert rows(render(table))['stage takes'] == ['13:30', '-']


def test_what_only_was_estimated_is_marked(ladder):
  plan = look_ahead(ladder[0], step_measured=False, memory_compiled=False)
  (table,) = tables([plan], 80)
  found = rows(render(table))
  assert found['memory'] == ['~11.3', 'GB']
  assert found['fits'] == ['probably']
  assert found['step'] == ['~500', 'ms']
  assert found['stage takes'] == ['~13:30']


def test_a_stage_that_does_not_fit_is_said_with_its_remedy(ladder):
  small = look_ahead(ladder[1])
  large = look_ahead(ladder[0], memory_bytes=16_500_000_000)
  assert (small.fits, large.fits) == (True, False)
  assert look_ahead(ladder[0], device_bytes=None).fits is None
  (note,) = outlook.notes([large, small])
  assert note.startswith('imagenette: does not fit: a step needs 16.5 GB, ')
  assert "there are 16.0 GB. Set remat='blocks' or micro_batch_size" in note
  (table,) = tables([large, small], 80)
  assert rows(render(table))['fits'] == ['NO', 'yes']


def test_the_scorecard_compares_what_the_mission_speaks_of(ladder):
  exact = look_ahead(ladder[0])
  fewer = look_ahead(ladder[1], num_train_images=5_000)
  other = look_ahead(dataclasses.replace(ladder[0], dataset='digits'))
  found = [x.figures()['comparable'] for x in (exact, fewer, other)]
  assert found == [True, False, None]
  longer = dataclasses.replace(ladder[0], num_epochs=21)
  assert look_ahead(longer).figures()['comparable'] is False
  text = render(
    outlook.expectation_table(x.figures() for x in (exact, fewer, other)),
    width=200,
  )
  lines = [' '.join(line.split()) for line in text.split('\n')]
  assert 'imagenette 85%-95% 30 14 yes' in lines
  assert (
    'tiny_imagenet 60%-70% 60-120 14 no: stated for 100,000 images, 30 epochs; '
    'here 5,000, 30'
  ) in lines
  assert 'imagenette - - - no range is stated for digits' in lines


def test_augmentation_is_said_in_words(ladder):
  stage = dataclasses.replace(
    ladder[0],
    min_crop_area=0.35,
    auto_augment='rand_augment',
    hue=0.1,
    erasing_probability=0.25,
    mixup_alpha=0.2,
    phases=(fields.PhaseStart(10, (('image_size', 160),)),),
  )
  assert look_ahead(stage).figures()['augmentation'] == (
    'crop 35%-100%, mirror, hue 0.1, RandAugment 2 x 9, erase 25%, mixup 0.2, '
    'labels smoothed 0.1'
  )
  (table,) = tables([look_ahead(stage)], 80)
  assert 'from epoch 11: image_size' in ' '.join(render(table).split())
  plain = dataclasses.replace(ladder[0], flip=False, label_smoothing=0.0)
  assert look_ahead(plain).figures()['augmentation'] == 'crop 8%-100%'


def test_a_network_is_a_row_a_group_and_their_sum(ladder):
  layers = [
    {'name': 'stem', 'modules': 2, 'parameters': 100, 'output': (8, 8, 4)},
    {'name': 'block1', 'modules': 3, 'parameters': 300, 'output': (4, 4, 8)},
  ]
  layers[0]['flops'], layers[1]['flops'] = 1e6, 3e6
  text = render(outlook.model_table(layers))
  lines = [' '.join(line.split()) for line in text.split('\n')]
  assert 'stem 8 x 8 x 4 100 25.0% 1 M 25.0%' in lines
  assert 'block1 x 3 4 x 4 x 8 300 75.0% 3 M 75.0%' in lines
  assert 'total 400 100.0% 4 M 100.0%' in lines


def test_figures_are_plain_values(ladder):
  figures = look_ahead(ladder[0]).figures()
  assert figures['name'] == 'imagenette'
  assert figures['memory_bytes'] == 11_300_000_000
  assert figures['fits'] is True
  assert figures['seconds'] == 810.0
  assert 'stage' not in figures

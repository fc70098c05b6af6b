"""Times, limits and costs of a plan against hand calculations."""

import dataclasses
import io

import pytest
import rich.console

from jaxprog.planning import elsewhere

STEP = elsewhere.Step(
  batch_size=1024,
  image_size=224,
  steps=1000,
  flops=1024 * 24e9,
  traffic_bytes=80e9,
  memory_bytes=10_000_000_000,
  activation_bytes=8_000_000_000,
  collectives=107,
  collective_bytes=100_000_000,
  compute_seconds=0.03,
  memory_seconds=0.1,
  network_seconds=0.002,
  compile_seconds=180.0,
)
PLAN = elsewhere.StagePlan(
  name='imagenet',
  dataset='imagenet2012',
  dtype='bfloat16',
  storage='jpeg:256',
  num_train_images=1_024_000,
  num_eval_images=3000,
  num_epochs=1,
  num_evaluations=2,
  num_chips=4,
  chip_bytes=16e9,
  utilization=0.5,
  images_per_core=1000,
  cores_per_chip=28,
  chip_hour_price=1.2,
  steps=(STEP,),
)


def test_a_step_takes_the_slower_of_compute_and_memory_and_the_network():
  assert STEP.seconds(0.5) == pytest.approx(0.1 / 0.5 + 0.002)
  assert PLAN.chip_rate == pytest.approx(1024 / 0.202 / 4)


def test_hours_count_evaluations_at_a_third_of_the_work():
  images = 1000 * 1024 + 2 * 3000 / 3
  assert PLAN.hours == pytest.approx(images * 0.202 / 1024 / 3600)
  assert PLAN.cost == pytest.approx(PLAN.hours * 4 * 1.2)


def test_means_are_of_an_image():
  assert PLAN.flops_per_image == pytest.approx(24e9)
  assert PLAN.traffic_per_image == pytest.approx(80e9 * 4 / 1024)


def test_steps_of_several_kinds_count_as_often_as_they_are_taken():
  small = dataclasses.replace(STEP, steps=3000, flops=1024 * 12e9)
  both = dataclasses.replace(PLAN, steps=(STEP, small))
  assert both.flops_per_image == pytest.approx((24e9 + 3 * 12e9) / 4)


def test_the_largest_batch_fills_what_does_not_grow_with_it():
  # 2 GB stay; 8 GB are of 256 images a chip; there is room for 14 GB.
  assert PLAN.largest_batch == 4 * 448
  full = dataclasses.replace(PLAN, chip_bytes=1e9)
  assert not full.fits
  assert full.largest_batch == 0


def test_what_bounds_a_stage_is_what_takes_longest():
  assert PLAN.bound_by == 'memory'
  faster = dataclasses.replace(STEP, memory_seconds=0.01)
  assert dataclasses.replace(PLAN, steps=(faster,)).bound_by == 'compute'
  far = dataclasses.replace(STEP, network_seconds=1.0)
  assert dataclasses.replace(PLAN, steps=(far,)).bound_by == 'network'


def test_too_few_cores_bound_the_rate_and_say_what_would_lift_it():
  starved = dataclasses.replace(PLAN, images_per_core=10)
  assert starved.bound_by == 'input'
  assert starved.images_per_second == 280
  assert starved.cores_needed == pytest.approx(PLAN.chip_rate / 10)
  (note,) = elsewhere.notes([starved])
  assert 'raw:256' in note


def test_a_step_that_does_not_fit_says_what_would_help():
  (note,) = elsewhere.notes([dataclasses.replace(PLAN, chip_bytes=8e9)])
  assert '10.0 GB of 8.0 GB' in note
  assert "remat='blocks'" in note


def test_the_tables_name_memory_flops_and_whether_it_fits():
  file = io.StringIO()
  console = rich.console.Console(file=file, width=80)
  for table in elsewhere.tables([PLAN]):
    console.print(table)
  text = file.getvalue()
  for word in ('HBM', 'fits', 'FLOPs', '10.0 GB', '24 G', '312 MB', '~1,792'):
    assert word in text, word
  assert max(map(len, text.splitlines())) <= 80

"""Times, limits and costs of chips elsewhere against hand calculations."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import pytest
import rich.console
from conftest import ROOT
from ml_collections import config_dict
from planning_outlook_test import look_ahead

from jaxprog import config as config_lib
from jaxprog import stages
from jaxprog.models import conv
from jaxprog.planning import chips, elsewhere, outlook
from jaxprog.reporting.page import planned
from jaxprog.training import devices, xla_flags

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
  kernel_seconds=0.0,
  network_seconds=0.002,
  compile_seconds=180.0,
)
CHIP_RATE = 1024 / 0.202 / 4


def fill_in(
  *steps,
  memory=16e9,
  images_per_core=1000,
  utilization=0.5,
  topology='v5e:2x2',
):
  """Returns the outlook of two evaluations of 3000 images on four v5e."""
  stage, *_ = stages.create_stages(
    config_lib.load_config(f'{ROOT}/configs/progressive.py')
  )
  steps = steps or (STEP,)
  found = look_ahead(
    dataclasses.replace(stage, storage='jpeg:256'),
    num_eval_images=3000,
    num_evaluations=2,
    total_steps=sum(step.steps for step in steps),
  )
  asked = chips.parse_topology(topology)
  asked = asked._replace(chip=asked.chip._replace(memory_bytes=memory))
  config = config_dict.ConfigDict(
    {
      'plan_utilization': utilization,
      'images_per_core': images_per_core,
      'chip_hour_price': 1.2,
    }
  )
  elsewhere.fill_in(found, steps, asked, config)
  return found


def test_a_step_takes_the_slower_of_compute_and_memory_and_the_network():
  assert STEP.seconds(0.5) == pytest.approx(0.1 / 0.5 + 0.002)
  assert fill_in().step_seconds == pytest.approx(0.202)
  assert fill_in().chips['images_per_second'] == pytest.approx(CHIP_RATE)


@pytest.mark.parametrize(
  ('topology', 'reached'), [('v5e:2x2', 0.7), ('h100:4', 0.8)]
)
def test_a_step_reaches_what_is_known_of_the_platform(topology, reached):
  found = fill_in(utilization=0.0, topology=topology)
  assert found.chips['utilization'] == reached
  assert found.step_seconds == pytest.approx(0.1 / reached + 0.002)


@pytest.mark.parametrize(
  ('megabytes', 'batch_size', 'kernels', 'measured'),
  [
    (367.4, 256, 988, 0.0412),
    (391.0, 256, 1060, 0.0451),
    (26.9, 128, 374, 0.0036),
    (26.6, 128, 384, 0.0033),
  ],
  ids=['resnet50', 'plain resnet50', 'resnet18', 'plain resnet18'],
)
def test_a_step_on_an_h100_takes_what_was_measured(
  megabytes, batch_size, kernels, measured
):
  chip = chips.parse_topology('h100:1').chip
  step = dataclasses.replace(
    STEP,
    compute_seconds=0.0,
    memory_seconds=megabytes * 1e6 * batch_size / chip.memory_rate,
    kernel_seconds=kernels * chips.KERNEL_SECONDS['cuda'],
    network_seconds=0.0,
  )
  assert step.seconds(chips.UTILIZATION['cuda']) == pytest.approx(
    measured, rel=0.12
  )


def test_hours_count_evaluations_at_a_third_of_the_work():
  figures = fill_in().figures()
  images = 1000 * 1024 + 2 * 3000 / 3
  assert figures['hours'] == pytest.approx(images * 0.202 / 1024 / 3600)
  assert figures['seconds'] == pytest.approx(3600 * figures['hours'])
  assert figures['cost'] == pytest.approx(figures['hours'] * 4 * 1.2)


def test_means_are_of_an_image():
  figures = fill_in().figures()
  assert figures['flops_per_image'] == pytest.approx(24e9)
  assert figures['traffic_per_image'] == pytest.approx(80e9 * 4 / 1024)


def test_steps_of_several_kinds_count_as_often_as_they_are_taken():
  small = dataclasses.replace(STEP, steps=3000, flops=1024 * 12e9)
  both = fill_in(STEP, small)
  assert both.flops_per_image == pytest.approx((24e9 + 3 * 12e9) / 4)


def test_the_largest_batch_fills_what_does_not_grow_with_it():
  # 2 GB stay; 8 GB are of 256 images a chip; there is room for 14 GB.
  assert fill_in().chips['largest_batch'] == 4 * 448
  full = fill_in(memory=1e9)
  assert not full.fits
  assert full.chips['largest_batch'] == 0


def test_what_bounds_a_stage_is_what_takes_longest():
  assert fill_in().chips['bound_by'] == 'memory'
  faster = dataclasses.replace(STEP, memory_seconds=0.01)
  assert fill_in(faster).chips['bound_by'] == 'compute'
  # At half of its rates the memory takes 0.2 s.
  few = dataclasses.replace(STEP, kernel_seconds=0.15)
  assert fill_in(few).chips['bound_by'] == 'memory'
  many = dataclasses.replace(STEP, kernel_seconds=0.25)
  assert fill_in(many).chips['bound_by'] == 'kernels'
  far = dataclasses.replace(STEP, network_seconds=1.0)
  assert fill_in(far).chips['bound_by'] == 'network'


def test_too_few_cores_bound_the_rate_and_say_what_would_lift_it():
  starved = fill_in(images_per_core=10)
  assert starved.chips['bound_by'] == 'input'
  assert starved.chips['images_per_second'] == 280
  assert starved.chips['cores_needed'] == pytest.approx(CHIP_RATE / 10)
  assert starved.seconds == pytest.approx(
    (1000 * 1024 + 2 * 3000 / 3) / 280 / 4
  )
  (note,) = outlook.notes([starved])
  assert 'raw:256' in note


def test_a_step_that_does_not_fit_says_what_would_help():
  (note,) = outlook.notes([fill_in(memory=8e9)])
  assert 'needs 10.0 GB, there are 8.0 GB' in note
  assert "remat='blocks'" in note


def test_the_tables_name_memory_flops_and_whether_it_fits():
  file = io.StringIO()
  console = rich.console.Console(file=file, width=80)
  for columns in (planned.NEEDS, planned.TAKES):
    row = [x.cell(fill_in().figures()) for x in columns]
    titles = [x.title for x in columns]
    console.print(outlook.create_table(titles, [row]))
  text = file.getvalue()
  for word in ('HBM', 'fits', 'FLOPs', '10.0 GB', '24 G', '312 MB', '~1,792'):
    assert word in text, word
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize('preset', xla_flags.PRESETS)
def test_every_set_of_flags_compiles_for_a_gpu_that_is_not_here(preset):
  pytest.importorskip('jax_plugins.xla_cuda13')
  asked = chips.parse_topology('h100:1')
  replicated, _ = devices.create_shardings(chips.create_mesh(asked))

  def loss(x, kernel):
    return jnp.sum((jnp.mean(conv.max_pool(x), axis=(1, 2)) @ kernel) ** 2)

  x, kernel = (
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated)
    for shape in ((256, 28, 28, 2048), (2048, 1000))
  )
  lowered = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel).lower()
  options = elsewhere.compiler_options(preset, asked)
  program = lowered.compile(compiler_options=options).as_text()
  assert 'scatter' not in program
  assert 'sort(' not in program

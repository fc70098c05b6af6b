"""Plans for TPUs, compiled by the real compiler; none is needed to run."""

import dataclasses
import importlib.util
import json
import re

import jax
import pytest
import runs
from conftest import ROOT

import jaxprog
from jaxprog import errors
from jaxprog.planning import chips, costs, elsewhere
from jaxprog.tools import plan
from jaxprog.training import setup as setup_lib

REASON = 'make test PARITY=1 installs libtpu beside torch'
needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason=REASON
)
STAGES = 'three,ten_again'


def load(data_dir, cache, **overrides):
  overrides = {'compilation_cache_dir': str(cache), **overrides}
  return jaxprog.load_config(
    f'{ROOT}/tests/tiny_config.py:{data_dir}', overrides
  )


@pytest.fixture(scope='module')
def planned(data_dir, tmp_path_factory):
  """A plan of two stages by the command line, and the same once more."""
  folder = tmp_path_factory.mktemp('plan')

  def run():
    return runs.call_main(
      '--mode=plan',
      f'--config=tests/tiny_config.py:{data_dir}',
      '--topology=v5e:2x2',
      f'--only={STAGES}',
      f'--config.compilation_cache_dir={folder}/cache',
      '--config.chip_hour_price=1.2',
      f'--workdir={folder}/run',
    )

  return folder, run(), run()


@needs_compiler
def test_a_plan_says_what_each_stage_needs_and_takes(planned):
  folder, first, _ = planned
  assert first.returncode == 0, first.stderr
  assert all(x.startswith('event=doing ') for x in first.stderr.splitlines())
  for word in ('HBM', 'FLOPs', 'fits', 'three', 'ten_again', 'cost', 'hours'):
    assert word in first.stdout, word
  figures = json.loads((folder / 'run' / plan.FILE).read_text())
  assert figures['topology'] == 'v5e:2x2'
  assert [x['name'] for x in figures['stages']] == STAGES.split(',')
  assert all(x['fits'] and x['hours'] > 0 for x in figures['stages'])
  assert figures['cost'] == pytest.approx(
    sum(x['hours'] for x in figures['stages']) * 4 * 1.2
  )


@needs_compiler
def test_the_second_time_nothing_is_compiled(planned):
  _, first, second = planned
  (compiling, tables), (answered, same) = (
    done.stdout.split('(compiled, not run)') for done in (first, second)
  )
  assert compiling.count('compiled in') == 2
  assert 'ompil' not in answered
  assert same == tables


@needs_compiler
def test_memory_is_that_of_the_step_that_training_compiles(planned, data_dir):
  folder, _, _ = planned
  config = load(data_dir, folder / 'cache')
  topology = chips.parse_topology('v5e:2x2')
  setup = elsewhere.create_setup(config, topology, ('three',), ())
  task = setup_lib.create_task(setup, setup.chosen[0])
  (program,) = task.train_steps
  step = task.train_steps[program]
  batch = task.batch_shapes(48, 8, training=True)
  compiled = step.lower(
    task.state_shapes, batch, *task.arguments(program)
  ).compile()
  found = json.loads((folder / 'run' / plan.FILE).read_text())['stages'][0]
  (planned_step,) = found['steps']
  memory = compiled.memory_analysis()
  assert planned_step['activation_bytes'] == memory.temp_size_in_bytes
  assert planned_step['memory_bytes'] == costs.read_memory(compiled).total
  assert planned_step['collectives'] == len(
    re.findall(r' all-reduce(?:-start)?\(', compiled.as_text())
  )


@needs_compiler
def test_the_step_is_bfloat16_with_losses_in_float32(data_dir, tmp_path):
  config = load(data_dir, tmp_path)
  topology = chips.parse_topology('v5e:1x1')
  setup = elsewhere.create_setup(config, topology, ('three',), ())
  task = setup_lib.create_task(setup, setup.chosen[0])
  assert task.dtype == 'bfloat16'  # 'auto', for the target and not for here.
  (program,) = task.train_steps
  text = task.trace_train_step(program).lower().as_text()
  convolutions = re.findall(
    r'stablehlo.convolution.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\) -> '
    r'tensor<\S*x(\w+)>',
    text,
  )
  # Kernels' gradients come out wider: many devices add them up.
  assert {x[:2] for x in convolutions} == {('bf16', 'bf16')}
  assert {x[2] for x in convolutions} == {'bf16', 'f32'}
  _, metrics = jax.eval_shape(
    task.train_steps[program],
    task.state_shapes,
    task.batch_shapes(48, 8, training=True),
    *task.arguments(program),
  )
  assert metrics['loss'].dtype == 'float32'


@needs_compiler
def test_a_damaged_cache_is_compiled_anew(planned, data_dir):
  folder, _, _ = planned
  for path in (folder / 'cache' / 'plans').iterdir():
    path.write_text(path.read_text()[:-20])
  config = load(data_dir, folder / 'cache')
  figures = plan.plan(config, topology='v5e:2x2', only=('three',))
  assert figures['stages'][0]['fits']


def test_a_dataset_that_is_not_here_counts_as_published(tmp_path):
  config = jaxprog.load_config(f'{ROOT}/configs/progressive.py')
  config.data_dir = str(tmp_path)
  stages = setup_lib.stages_lib.create_stages(config)
  counts = [elsewhere._count_dataset(config, stage) for stage in stages]
  assert [len(x.train) for x in counts] == [9469, 100_000, 34_745, 1_281_167]
  assert [len(x.eval) for x in counts] == [3925, 10_000, 3923, 50_000]
  assert [x.num_classes for x in counts] == [10, 200, 1000, 1000]


def test_a_holdout_is_taken_from_the_published_count(tmp_path):
  config = jaxprog.load_config(f'{ROOT}/configs/progressive.py')
  config.data_dir = str(tmp_path)
  config.stages[3]['eval_split'] = 'holdout:2%'
  stage = setup_lib.stages_lib.create_stages(config)[3]
  found = elsewhere._count_dataset(config, stage)
  assert len(found.train) + len(found.holdout) == 1_281_167
  assert len(found.selection) == round(0.02 * 1_281_167)


def test_a_batch_that_the_chips_cannot_share_is_refused(data_dir, tmp_path):
  config = load(data_dir, tmp_path)
  with pytest.raises(errors.UserError, match='not divisible by 32 devices'):
    plan.plan(config, topology='v5e:4x8')


def test_the_command_line_wants_a_topology(data_dir):
  config = f'--config=tests/tiny_config.py:{data_dir}'
  done = runs.call_main('--mode=plan', config)
  assert done.returncode == 2
  assert len(done.stderr.strip().splitlines()) == 3
  assert 'There is no --topology' in done.stderr
  assert 'v5e:2x2' in done.stderr


def test_more_than_all_of_a_chip_is_refused(data_dir, tmp_path):
  config = load(data_dir, tmp_path, plan_utilization='1.5')
  with pytest.raises(errors.UserError, match='plan_utilization is 1'):
    plan.plan(config, topology='v5e:2x2')


def test_raw_images_cost_by_their_pixels(tmp_path):
  config = jaxprog.load_config(f'{ROOT}/configs/progressive.py')
  config.stages[3]['storage'] = 'raw:256'
  config.stages[1]['storage'] = 'raw'
  stages = setup_lib.stages_lib.create_stages(config)
  at = {x.name: elsewhere._images_per_core(x) for x in stages}
  assert at['imagenet'] == 4317
  assert at['imagenette'] == 540
  assert at['tiny_imagenet'] == 18_500  # The least that any image takes.
  half = dataclasses.replace(stages[0], crop_interpolation='random')
  found = elsewhere._images_per_core(half)
  assert found == pytest.approx(540 / (1 + 0.65 / 2))

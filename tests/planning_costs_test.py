"""FLOPs against hand counts, memory against the step that training compiles."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from flax import linen as nn

from jaxprog import config as config_lib
from jaxprog.models import conv
from jaxprog.planning import costs
from jaxprog.training import setup as setup_lib


def create_task(data_dir, stage='three', **overrides):
  config = config_lib.load_config(
    f'{ROOT}/tests/tiny_config.py:{data_dir}',
    {k.replace('stage_', 'stages[0].'): v for k, v in overrides.items()},
  )
  setup = setup_lib.create_setup(config, only=[stage])
  return setup_lib.create_task(setup, setup.chosen[0])


@pytest.fixture(scope='module')
def task(data_dir):
  return create_task(data_dir)


class TwoLayers(nn.Module):
  """A 3x3 convolution at stride 2, a 1x1, and a classifier of 7 classes."""

  @nn.compact
  def __call__(self, x, *, train):
    x = conv.Conv(8, 3, 2, name='stem_conv')(x)
    x = conv.Conv(16, 1, name='block1_1')(x)
    return nn.Dense(7, name='head')(jnp.mean(x, (1, 2)))


# Multiply-adds of one 10 px image: outputs times what each is a sum over.
STEM, BLOCK, HEAD = 5 * 5 * 8 * (9 * 3), 5 * 5 * 16 * 8, 7 * 16


def trace_gradient(of_images):
  """Returns the trace of a loss's gradients, for 4 images."""
  model = TwoLayers()
  images = jax.ShapeDtypeStruct((4, 10, 10, 3), jnp.float32)
  init = functools.partial(model.init, train=False)
  params = jax.eval_shape(init, jax.random.key(0), images)

  def loss(params, images):
    return jnp.sum(model.apply(params, images, train=True) ** 2)

  argnums = (0, 1) if of_images else 0
  return jax.make_jaxpr(jax.grad(loss, argnums))(params, images)


def test_flops_are_two_for_each_multiply_add_of_the_hand_count():
  # Forward, kernels' gradients and inputs' gradients: the same each time.
  everything = 2 * 3 * (STEM + BLOCK + HEAD)
  assert costs.count_flops(trace_gradient(of_images=True)) == 4 * everything
  # Nobody asks for the images' own gradient in training.
  assert costs.count_flops(trace_gradient(of_images=False)) == 4 * (
    everything - 2 * STEM
  )


def test_a_summary_has_each_group_with_its_own_figures():
  model = TwoLayers()
  variables = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 10, 10, 3)), train=False),
    jax.random.key(0),
  )
  found = costs.summarise_layers(model, variables, 10)
  assert [tuple(x.values()) for x in found] == [
    ('stem', 1, 9 * 3 * 8, (5, 5, 8), 2 * STEM),
    ('block1', 1, 8 * 16, (5, 5, 16), 2 * BLOCK),
    ('head', 1, 16 * 7 + 7, (7,), 2 * HEAD),
  ]


def test_loops_count_as_often_as_they_run():
  def powers(x):
    return jax.lax.fori_loop(0, 5, lambda i, y: y @ x, x)

  trace = jax.make_jaxpr(powers)(jnp.zeros((6, 6)))
  assert costs.count_flops(trace) == 5 * 2 * 6**3


@pytest.mark.slow
def test_a_resnet50_takes_three_times_the_flops_that_papers_state(data_dir):
  # Counted: convolutions (zeros around the image included) and the classifier;
  # forward, gradients of the kernels and of what each layer sees. He et al.
  # and torchvision: 4.09 GMAC forward at 224 px with 1000 classes.
  task = create_task(
    data_dir,
    model='resnet50',
    num_filters='64',
    stem_kernel='7',
    stage_image_size='224',
    stage_batch_size='8',
  )
  trace = task.trace_train_step(task.program(0))
  flops = costs.count_flops(trace.jaxpr) / 8
  forward = 2 * 4.09e9
  assert flops == pytest.approx(3 * forward, rel=0.03)
  layers = costs.summarise_layers(task.model, task.state_shapes.variables, 224)
  assert sum(x['flops'] for x in layers) == pytest.approx(forward, rel=0.005)
  # XLA's count of the same step as TPUs would get it: without the zeros, with
  # everything else that a step does.
  lowered = trace.lower(lowering_platforms=('tpu',))
  assert lowered.cost_analysis()['flops'] / 8 == pytest.approx(flops, rel=0.03)


def test_micro_batches_do_not_change_the_flops(data_dir, task):
  parts = create_task(data_dir, stage_micro_batch_size='16')
  whole, split = (
    costs.count_flops(x.trace_train_step(x.program(0)).jaxpr)
    for x in (task, parts)
  )
  assert split == whole > 0


def test_a_frozen_backbone_takes_a_third_of_the_flops(data_dir):
  task = create_task(data_dir, stage_freeze_epochs='1')
  frozen, later = (task.program(x) for x in (0, task.steps.frozen))
  assert frozen.frozen
  assert not later.frozen
  flops = [
    costs.count_flops(task.trace_train_step(x).jaxpr) for x in (frozen, later)
  ]
  assert 0.3 < flops[0] / flops[1] < 0.4
  counts = costs.steps_by_program(task)
  assert counts[frozen] == task.steps.frozen
  assert sum(counts.values()) == task.steps.total


def test_steps_are_counted_by_the_program_that_takes_them(data_dir):
  phases = "({'from_epoch': 1, 'batch_size': 24},)"
  task = create_task(data_dir, stage_phases=phases)
  expected = {}
  for step in range(task.steps.total):
    program = task.program(step)
    expected[program] = expected.get(program, 0) + 1
  assert len(expected) == 2
  assert costs.steps_by_program(task) == expected


def test_memory_is_that_of_the_step_which_training_compiles(task):
  program = task.program(0)
  compiled = setup_lib.compile_task(task, carried=False)
  theirs = compiled.train_steps[program].memory_analysis()
  ours = costs.read_memory(task.trace_train_step(program).lower().compile())
  assert ours.temporaries == theirs.temp_size_in_bytes
  state = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(task.state_shapes)
  )
  batch = 48 * (8 * 8 * 3 + 4 * 3 + 1)
  # The donated state is not there twice.
  lasting = ours.total - ours.temporaries
  assert lasting == pytest.approx(state + batch, rel=0.05)
  evaluation = task.trace_eval_step().lower().compile()
  theirs = compiled.eval_step.memory_analysis()
  assert costs.read_memory(evaluation).temporaries == theirs.temp_size_in_bytes


def test_the_estimate_is_the_most_that_lives_at_once():
  x = jax.ShapeDtypeStruct((1000,), jnp.float32)

  def chain(x):
    for _ in range(5):
      x = jnp.sin(x)
    return jnp.sum(x)

  # Each sine and the one before it.
  assert costs.estimate_bytes(jax.make_jaxpr(chain)(x)) == 2 * 4000
  # Backwards each cosine waits for its turn.
  gradient = jax.make_jaxpr(jax.grad(chain))(x)
  assert costs.estimate_bytes(gradient) >= 6 * 4000


# A program as XLA writes it: one fusion, one exchange that begins and ends
# apart, one library call with room to work in.
HLO = """
%fused (p: f32[8,4]) -> f32[8] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %inside = f32[8]{0} reduce(%p, %p), dimensions={1}
}

ENTRY %main (a: f32[8,4], b: bf16[4]) -> (f32[8]) {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %view = f32[32]{0} bitcast(%a)
  %sum.1 = f32[8]{0} fusion(%view, %b), kind=kLoop, calls=%fused
  %call = (f32[8]{0}, u8[1000]{0}) custom-call(%sum.1), target="conv"
  %part = f32[8]{0} get-tuple-element(%call), index=0
  %start = (f32[8]{0}, f32[]) all-reduce-start(%part, %part), channel_id=1
  %done = (f32[8]{0}, f32[]) all-reduce-done(%start)
  ROOT %out = (f32[8]{0}) tuple(%part)
}
"""


def test_traffic_is_what_operations_between_fusions_read_and_write():
  fusion = 8 * 4 * 4 + 4 * 2 + 8 * 4
  call = 8 * 4 + 8 * 4
  exchange = 8 * 4 + 8 * 4 + (8 * 4 + 4)
  traffic = sum(x.num_bytes for x in costs.read_operations(HLO))
  assert traffic == fusion + call + exchange
  operations = costs.read_operations(HLO)
  assert [(x.name, x.kind, x.num_bytes) for x in operations] == [
    ('%sum.1', 'fusion', fusion),
    ('%call', 'custom-call', call),
    ('%start', 'all-reduce-start', exchange),
  ]
  assert [x.name for x in operations if 'target="conv"' in x.line] == ['%call']


def test_exchanges_are_counted_where_they_begin():
  assert costs.read_collectives(HLO) == [8 * 4 + 4]
  begins = (
    '  %a = ((bf16[64]{0}), bf16[64]{0}) all-reduce-start(%x), channel_id=1'
  )
  assert costs.read_collectives(begins) == [64 * 2]

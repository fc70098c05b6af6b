"""What a teacher says of images, and what a step makes of it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from flax import linen as nn

from jaxprog import epochs, errors, stages
from jaxprog.models import resnet
from jaxprog.optim import optimizers
from jaxprog.planning import costs
from jaxprog.training import distillation, numbers, state, steps
from jaxprog.training import setup as setup_lib
from tests import parity

KNOWN = np.array([True, False, True, True, False])
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_softened_losses_are_those_of_pytorch_on_the_known_classes(temperature):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  ours, taught = 3 * draw(6, 5), 3 * draw(6, 5, seed=1)

  def log_softmax(x):
    return torch.log_softmax(torch.tensor(x[:, KNOWN]) / temperature, dim=1)

  loss = torch.nn.KLDivLoss(reduction='none', log_target=True)
  theirs = loss(log_softmax(ours), log_softmax(taught)).sum(dim=1)
  found = distillation.soften_loss(ours, taught, KNOWN, temperature)
  np.testing.assert_allclose(found, temperature**2 * theirs, rtol=1e-5)
  gradient = jax.grad(
    lambda x: distillation.soften_loss(x, taught, KNOWN, temperature).sum()
  )(ours)
  assert not gradient[:, ~KNOWN].any()
  same = distillation.soften_loss(taught, taught, KNOWN, temperature)
  np.testing.assert_allclose(same, 0, atol=1e-6)


def test_distances_of_features_are_those_after_a_1x1_convolution():
  torch = pytest.importorskip('torch', reason=parity.REASON)
  ours, taught, matrix = draw(3, 4, 4, 6), draw(3, 4, 4, 5, seed=1), draw(6, 5)
  projected = torch.nn.functional.conv2d(
    torch.tensor(ours).permute(0, 3, 1, 2),
    torch.tensor(matrix.T[..., None, None]),
  )
  theirs = projected.permute(0, 2, 3, 1).numpy() - taught
  expected = (theirs**2).sum((1, 2, 3)) / (taught**2).sum((1, 2, 3))
  found = distillation.feature_distances(ours, taught, matrix)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  plain = distillation.feature_distances(2 * taught, taught, None)
  np.testing.assert_allclose(plain, 1, rtol=1e-6)


class Linear(nn.Module):
  """One matrix, whose features are the images: all can be written down."""

  num_classes: int = 4
  width: int = 3

  @nn.compact
  def __call__(self, x, *, train):
    """Returns logits."""
    del train
    self.sow('intermediates', 'features', x[..., : self.width])
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(self.num_classes, name='head')(x)


def create(teacher_width=3, **fields):
  """Returns a state, a step without an optimizer, and a teacher."""
  stage = stages.create_stages(tiny_config.get_config())[0]
  plain = {'optimizer': 'sgd_momentum', 'momentum': 0.0, 'weight_decay': 0.0}
  taught = {'distill_from': 'stage:a', 'label_smoothing': 0.0, 'flip': False}
  stage = dataclasses.replace(stage, **plain, **taught, **fields)
  lengths = epochs.Steps((epochs.Phase(0, 0, 10, 6),), 10, taught=4)
  model, other = Linear(), Linear(width=teacher_width)
  tx = optimizers.create_optimizer(stage)
  variables, theirs = (
    state.init_variables(x, 2, jax.random.key(i))
    for i, x in enumerate((model, other))
  )
  train_step = steps.create_train_step(
    model,
    lambda step, _: 0.5,
    stage,
    lengths,
    PIXELS,
    num_classes=4,
    teach=distillation.create_teach_fn(other, stage, frozen=False),
  )

  def projection(variables):
    if not stage.distill_features:
      return {}
    both = (model, other), (variables, theirs)
    return distillation.create_projection(*both, 2, jax.random.key(2))

  first = state.create_state(variables, tx, ema=True, projection=projection)
  teacher = {'variables': theirs, 'known': np.array([True, True, False, True])}
  found = numbers.read(stage, lengths, model, first.params, num_classes=4)
  jitted = jax.jit(train_step)

  def take_step(state, batch, rng, teacher):
    return jitted(state, batch, rng, found, teacher)

  return first, take_step, teacher


def batch():
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (6, 2, 2, 3)).astype(np.uint8),
    'label': rng.integers(0, 4, 6).astype(np.int32),
    'mask': np.ones(6, bool),
    'index': np.arange(6, dtype=np.int32),
    'epoch': np.zeros(6, np.int32),
  }


def softmax(x):
  e = np.exp(x - x.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize('micro', [0, 3])
def test_a_taught_step_is_the_gradient_written_down(micro):
  weight, temperature = 0.75, 2.0
  before, train_step, teacher = create(
    distill_weight=weight,
    distill_temperature=temperature,
    distill_epochs=0.4,
    micro_batch_size=micro,
  )
  data, known = batch(), teacher['known']
  x = ((data['image'] / 255 - PIXELS[0]) / PIXELS[1]).reshape(6, -1)

  def logits(head):
    return x @ np.asarray(head['kernel']) + np.asarray(head['bias'])

  for step in (0, 1, 4):
    head = before.params['head']
    ours, taught = logits(head), logits(teacher['variables']['params']['head'])
    share = weight * max(0, 1 - step / 4)
    errors_ = np.zeros_like(ours)
    # T^2 times the gradient of a softmax of logits over T.
    errors_[:, known] = temperature * (
      softmax(ours[:, known] / temperature)
      - softmax(taught[:, known] / temperature)
    )
    labels = softmax(ours) - np.eye(4)[data['label']]
    gradient = x.T @ ((1 - share) * labels + share * errors_) / 6
    at = dataclasses.replace(before, step=jnp.int32(step))
    after, _ = train_step(at, data, jax.random.key(1), teacher)
    kernel = np.asarray(head['kernel']) - 0.5 * gradient
    np.testing.assert_allclose(
      after.params['head']['kernel'], kernel, atol=1e-5
    )


def test_a_projection_learns_and_is_not_part_of_the_weights():
  name = optimizers.PROJECTION
  before, train_step, teacher = create(
    teacher_width=2, distill_weight=0.0, distill_features=0.3
  )
  assert before.params[name]['kernel'].shape == (3, 2)
  data = batch()
  x = (data['image'] / 255 - PIXELS[0]) / PIXELS[1]
  after, metrics = train_step(before, data, jax.random.key(1), teacher)
  kernel = np.asarray(before.params[name]['kernel'])
  missed, squares = x @ kernel - x[..., :2], (x[..., :2] ** 2).sum((1, 2, 3))
  scaled = missed / squares[:, None, None, None]
  gradient = 0.3 * 2 * np.einsum('nhwi,nhwo->io', x, scaled) / 6
  np.testing.assert_allclose(
    after.params[name]['kernel'], kernel - 0.5 * gradient, atol=1e-5
  )
  assert name not in after.variables['params']
  assert name not in after.ema['params']
  assert math.isfinite(metrics['loss'])
  # Where both are as wide nothing is projected.
  assert name not in create(distill_features=0.3)[0].params


def test_networks_that_tell_no_features_have_none_to_learn():
  class Silent(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      del train
      return nn.Dense(2, name='head')(x.mean((1, 2)))

  variables = state.init_variables(Silent(), 2, jax.random.key(0))
  with pytest.raises(errors.UserError, match='tell features'):
    distillation.create_projection(
      (Silent(), Silent()), (variables, variables), 2, jax.random.key(0)
    )


def create_task(data_dir, **fields):
  config = tiny_config.get_config(data_dir)
  config.stages[1].update(distill_from='stage:three', **fields)
  made = setup_lib.create_setup(config, only=['ten'])
  return setup_lib.create_task(made, made.chosen[0])


def test_a_teacher_costs_a_forward_pass_as_long_as_it_teaches(data_dir):
  task = create_task(
    data_dir, distill_epochs=1.0, distill_features=0.5, freeze_epochs=0.5
  )
  programs = [task.program(step) for step in range(task.steps.total)]
  last = task.steps.epoch_ends[0]
  assert [x.taught for x in programs] == [i < last for i in range(44)]
  alone, taught = programs[-1], programs[last - 1]
  flops = [
    costs.count_flops(task.trace_train_step(x).jaxpr) for x in (alone, taught)
  ]
  layers = costs.summarise_layers(
    task.model, task.state_shapes.variables, task.stage.image_size
  )
  forward = 48 * sum(x['flops'] for x in layers)
  assert flops[1] - flops[0] == pytest.approx(forward)
  # Its weights are arguments.
  counts = [
    len(task.trace_train_step(x).jaxpr.in_avals) for x in (alone, taught)
  ]
  assert counts[1] - counts[0] == len(jax.tree.leaves(task.teacher))


def test_a_teacher_computes_in_the_dtype_of_the_stage():
  model = resnet.create_model(
    'resnet10', num_classes=3, image_size=8, num_filters=4, dtype=jnp.bfloat16
  )
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(stage, distill_from='stage:a')
  teach = distillation.create_teach_fn(model, stage, frozen=False)
  asked = distillation.read_numbers(stage, epochs.Steps((), 10))
  variables = jax.eval_shape(
    lambda: state.init_variables(model, 8, jax.random.key(0))
  )
  teacher = {'variables': variables, 'known': np.ones(3, bool)}
  images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  trace = jax.jit(teach).trace(teacher, images, np.int32(0), asked)
  text = trace.lower(lowering_platforms=('tpu',)).as_text()
  convolutions = [x for x in text.splitlines() if 'stablehlo.convolution' in x]
  assert convolutions
  assert all('bf16' in x for x in convolutions)

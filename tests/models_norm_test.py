import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from flax import linen as nn
from jax.sharding import AxisType

from jaxprog import epochs, errors, stages
from jaxprog.models import conv, norm, resnet
from jaxprog.optim import optimizers
from jaxprog.reliability import checkpoints
from jaxprog.training import devices, numbers, setup, state, steps

PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
NUM_CLASSES = 4


def random_variables(module, x, **kwargs):
  """Returns variables of `module` none of which is 0 or 1."""
  rng = np.random.default_rng(0)
  init = functools.partial(module.init, **kwargs)
  return jax.tree.map(
    lambda v: jnp.float32(rng.uniform(0.5, 1.5, v.shape)),
    jax.eval_shape(init, jax.random.key(0), x),
  )


def small_variables():
  return random_variables(Small(), jnp.zeros((1, 2, 2, 3)), train=False)


def outputs_and_gradients(module, variables, x, seed=3):
  """Returns y, the next statistics, and the gradients of a sum over y."""
  weights = jax.random.normal(jax.random.key(seed), x.shape)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def run(variables, x):
    y, changed = module.apply(variables, x, mutable=['batch_stats'])
    return jnp.sum(weights * y), (y, changed['batch_stats'])

  grads, (y, statistics) = run(variables, x)
  return y, statistics, grads[0]['params'], grads[1]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('running', [False, True])
def test_one_group_is_flax(dtype, running):
  """Forward bit for bit; the gradient's sums are other ones, rounded apart."""
  fields = {'use_running_average': running, 'momentum': 0.9, 'dtype': dtype}
  x = 3 + jax.random.normal(jax.random.key(0), (8, 5, 5, 7)).astype(dtype)
  theirs, ours = nn.BatchNorm(**fields), norm.BatchNorm(**fields)
  variables = random_variables(ours, x)
  assert jax.tree.structure(variables) == jax.tree.structure(
    jax.eval_shape(theirs.init, jax.random.key(0), x)
  )
  found, expected = (
    outputs_and_gradients(module, variables, x) for module in (ours, theirs)
  )
  jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])
  assert found[0].dtype == dtype
  rtol = 1e-5 if dtype == jnp.float32 else 2**-7
  close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5)
  jax.tree.map(close, found[2:], expected[2:])


def test_each_way_takes_two_sums_over_all_pixels():
  module = norm.BatchNorm(use_running_average=False)
  x = jnp.zeros((8, 5, 5, 7))

  def both_ways(params, x, dy):
    def forward(params, x):
      return module.apply({**variables, 'params': params}, x, mutable=True)[0]

    y, pull = jax.vjp(forward, params, x)
    return y, pull(dy)

  variables = random_variables(module, x)
  text = jax.jit(both_ways).lower(variables['params'], x, x).as_text()
  assert len(re.findall(r'stablehlo\.reduce\(.*<8x5x5x7', text)) == 4


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('groups', [2, 4])
def test_groups_are_what_flax_makes_of_each_part(groups, dtype):
  fields = {'use_running_average': False, 'momentum': 0.9, 'dtype': dtype}
  x = jax.random.normal(jax.random.key(0), (8, 5, 5, 7))
  # No two parts are alike.
  x = (x + jnp.arange(8.0)[:, None, None, None]).astype(dtype)
  ours = norm.BatchNorm(**fields, groups=groups)
  variables = random_variables(ours, x)

  class Parts(nn.Module):
    """One BatchNorm of Flax for each part, with the same parameters."""

    @nn.compact
    def __call__(self, x):
      layer = nn.BatchNorm(**fields)
      return jnp.concatenate([layer(part) for part in jnp.split(x, groups)])

  def apart(variables, part):
    return nn.BatchNorm(**fields).apply(
      variables, part, mutable=['batch_stats']
    )[1]['batch_stats']

  y, statistics, grads, dx = outputs_and_gradients(ours, variables, x)
  wrapped = {k: {'BatchNorm_0': v} for k, v in variables.items()}
  wanted_y, _, wanted_grads, wanted_dx = outputs_and_gradients(
    Parts(), wrapped, x
  )
  parts = [apart(variables, part) for part in jnp.split(x, groups)]
  wanted_statistics = jax.tree.map(lambda *v: np.mean(v, axis=0), *parts)
  tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
  for found, expected in (
    (y, wanted_y),
    (dx, wanted_dx),
    (grads, wanted_grads['BatchNorm_0']),
    (statistics, wanted_statistics),
  ):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        jnp.float32(a), jnp.float32(b), rtol=tolerance, atol=tolerance
      ),
      found,
      expected,
    )


@pytest.mark.parametrize('running', [False, True])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_pooling_before_normalising_is_pooling_after(dtype, groups, running):
  module = norm.BatchNorm(
    use_running_average=running, groups=groups, momentum=0.9, dtype=dtype
  )
  x = jax.random.normal(jax.random.key(0), (4, 9, 9, 6)).astype(dtype)
  variables = random_variables(module, x)
  # Half of the channels turn the smallest into the largest.
  signs = jnp.array([1.0, -1, 1, -1, -1, 1])
  variables['params']['scale'] *= signs
  weights = jax.random.normal(jax.random.key(1), (4, 5, 5, 6))

  def run(variables, x, before):
    y, changed = module.apply(
      variables, x, conv.max_pool if before else None, mutable=['batch_stats']
    )
    y = nn.relu(y if before else conv.max_pool(nn.relu(y)))
    return jnp.sum(weights * y), (y, changed['batch_stats'])

  run = jax.jit(jax.grad(run, (0, 1), has_aux=True), static_argnums=2)
  (early, late) = (run(variables, x, before) for before in (True, False))
  # A compiler joins other operations in each.
  rtol = 1e-6 if dtype == jnp.float32 else 2**-7
  close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6)
  jax.tree.map(close, early[1], late[1])
  if dtype == jnp.float32:  # Rounding to bf16 makes equals of some.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, early[0], late[0])


def test_constant_images_have_no_negative_variance():
  # In one of three channels, rounding puts the mean of squares below.
  x = jnp.broadcast_to(jnp.linspace(1.0, 1e4, 999), (4, 3, 3, 999))
  module = norm.BatchNorm(use_running_average=False, groups=2, momentum=0.0)
  variables = module.init(jax.random.key(0), x)
  y, changed = module.apply(variables, x, mutable=['batch_stats'])
  assert np.isfinite(y).all()
  assert (changed['batch_stats']['var'] >= 0).all()


def test_evaluation_and_initialisation_know_no_groups():
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 5))
  one, many = (
    norm.BatchNorm(use_running_average=True, groups=g) for g in (1, 8)
  )
  variables = many.init(jax.random.key(0), x)
  np.testing.assert_array_equal(variables['batch_stats']['mean'], 0)
  np.testing.assert_array_equal(
    one.apply(variables, x), many.apply(variables, x)
  )


class Small(nn.Module):
  """A matrix at each pixel, BatchNorm, and a head: its gradient is known."""

  groups: int = 1

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Dense(5, use_bias=False, name='conv')(x)
    x = norm.BatchNorm(
      use_running_average=not train,
      groups=self.groups,
      momentum=0.9,
      name='norm',
    )(x)
    x = jnp.mean(nn.relu(x), axis=(1, 2))
    return nn.Dense(NUM_CLASSES, name='head')(x)


def batch(n):
  rng = np.random.default_rng(0)
  # Later images are brighter, so that each device has its own statistics.
  rise = np.arange(n)[:, None, None, None] * 4
  return {
    'image': (rng.integers(0, 128, (n, 2, 2, 3)) + rise).astype(np.uint8),
    'label': rng.integers(0, NUM_CLASSES, n).astype(np.int32),
    'mask': np.arange(n) % 5 > 0,
    'index': np.arange(n, dtype=np.int32),
    'epoch': np.zeros(n, np.int32),
  }


def step_by_numpy(variables, data, groups, parts):
  """Returns loss, gradients and next statistics, in float64.

  BatchNorm's backward pass is the formula of Ioffe & Szegedy, section 3.
  """
  variables = jax.tree.map(np.float64, variables)
  params, stats = variables['params'], dict(variables['batch_stats']['norm'])
  images = (data['image'] / 255 - PIXELS[0]) / PIXELS[1]
  targets = np.eye(NUM_CLASSES)[data['label']]
  total, grads = 0.0, jax.tree.map(np.zeros_like, params)
  count = data['mask'].sum()
  for i in range(parts):
    x, target, mask = (
      images[i::parts],
      targets[i::parts],
      data['mask'][i::parts],
    )
    z = (x @ params['conv']['kernel']).reshape(groups, -1, 5)
    mean, var = z.mean(1, keepdims=True), z.var(1, keepdims=True)
    root = np.sqrt(var + 1e-5)
    hat = (z - mean) / root
    y = params['norm']['scale'] * hat + params['norm']['bias']
    features = np.maximum(y, 0).reshape(len(x), 4, 5).mean(1)
    logits = features @ params['head']['kernel'] + params['head']['bias']
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    total -= (mask * np.log((p * target).sum(1))).sum() / count
    d = mask[:, None] * (p - target) / count
    dy = np.repeat(d @ params['head']['kernel'].T / 4, 4, 0)
    dy = dy.reshape(y.shape) * (y > 0)
    dhat = dy * params['norm']['scale']
    average = functools.partial(np.mean, axis=1, keepdims=True)
    dz = (dhat - average(dhat) - hat * average(dhat * hat)) / root
    grads['conv']['kernel'] += x.reshape(-1, 3).T @ dz.reshape(-1, 5)
    grads['norm']['scale'] += (dy * hat).sum((0, 1))
    grads['norm']['bias'] += dy.sum((0, 1))
    grads['head']['kernel'] += features.T @ d
    grads['head']['bias'] += d.sum(0)
    for name, value in (('mean', mean), ('var', var)):
      stats[name] = 0.9 * stats[name] + 0.1 * value.mean((0, 1))
  return total, grads, {'norm': stats}


def jit_step(model, mesh, n, **fields):
  """Returns the program's step and the tree it starts from, on `mesh`."""
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(
    stage,
    **{'optimizer': 'sgd_momentum', 'momentum': 0.0, 'weight_decay': 0.0},
    **fields,
  )
  tx = optimizers.create_optimizer(stage)
  lengths = epochs.Steps((epochs.Phase(0, 0, 10, n),), 10)
  found = numbers.read(stage, lengths, model, {}, num_classes=NUM_CLASSES)
  train_step = steps.create_train_step(
    model,
    lambda step, _: 1.0,
    stage,
    lengths,
    PIXELS,
    num_classes=NUM_CLASSES,
  )
  replicated, divided = devices.create_shardings(mesh)
  jitted = jax.jit(
    lambda *args: train_step(*args, found),
    in_shardings=(replicated, divided, replicated),
    out_shardings=replicated,
  )
  return jitted, functools.partial(state.create_state, tx=tx)


def create_mesh(num_devices):
  return jax.make_mesh(
    (num_devices,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )


def differences(num_devices, batch_norm, parts, n=32):
  """Returns how far a step is from NumPy's: loss, gradients, statistics."""
  groups = stages.count_norm_groups(batch_norm, num_devices)
  model = Small(groups)
  step, create_state = jit_step(
    model, create_mesh(num_devices), n, micro_batch_size=n // parts
  )
  variables = small_variables()
  before = create_state(variables)
  after, metrics = step(before, batch(n), jax.random.key(1))
  loss, grads, statistics = step_by_numpy(variables, batch(n), groups, parts)
  found = jax.tree.map(lambda a, b: a - b, before.params, after.params)
  pairs = ((metrics['loss'], loss), (found, grads))
  pairs = (*pairs, (after.batch_stats, statistics))
  return [
    max(
      float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
      for a, b in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    for a, b in pairs
  ]


# Devices, mode, micro-batches.
CASES = [
  (1, 'global', 2),
  (2, 'global', 1),
  (2, 'per_device', 1),
  (4, 'global', 2),
  (4, 'per_device', 2),
  (4, 'groups:2', 1),
  (8, 'per_device', 1),
  (8, 'per_device', 2),
  (8, 'groups:4', 2),
]


def print_all(data_dir):
  """Prints as JSON what only a process with eight devices can find."""
  found = {
    'differences': [differences(*case) for case in CASES],
    'collectives': [collectives(*case) for case in COLLECTIVES],
    'groups': find_groups(data_dir),
  }
  print(json.dumps(found))


@pytest.fixture(scope='module')
def found(data_dir):
  """What `print_all` prints where there are eight devices."""
  folder = pathlib.Path(__file__).parent
  code = f'import models_norm_test as t; t.print_all({str(data_dir)!r})'
  found = subprocess.run(
    [sys.executable, '-c', code],
    cwd=folder,
    env={
      **os.environ,
      'PYTHONPATH': f'{folder}{os.pathsep}{folder.parent}',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 0, found.stderr
  return json.loads(found.stdout)


@pytest.mark.parametrize('case', CASES)
def test_a_step_is_numpys_in_every_mode_on_any_number_of_devices(case, found):
  loss, grads, statistics = found['differences'][CASES.index(case)]
  assert loss < 1e-6
  assert grads < 1e-5
  assert statistics < 1e-6


def test_modes_differ_where_devices_see_other_images():
  by_mode = [
    step_by_numpy(small_variables(), batch(32), groups, 1)[0]
    for groups in (1, 2, 8)
  ]
  assert min(np.abs(np.diff(by_mode))) > 1e-2


def collectives(batch_norm, parts=1, remat_blocks=False):
  """Returns the names of the collectives of a ResNet's step on all devices."""
  num_devices = jax.device_count()
  model = resnet.ResNet(
    block_sizes=(1, 1),
    block=resnet.BasicBlock,
    num_classes=NUM_CLASSES,
    num_filters=4,
    stem=resnet.Stem(stride=1, pool=False),
    stem_kernel=3,
    norm_groups=stages.count_norm_groups(batch_norm, num_devices),
    remat_blocks=remat_blocks,
  )
  n = 2 * num_devices
  step, create_state = jit_step(
    model, create_mesh(num_devices), n, micro_batch_size=n // parts
  )
  init = functools.partial(state.init_variables, model, 2)
  before = jax.eval_shape(
    lambda rng: create_state(init(rng)), jax.random.key(0)
  )
  program = step.lower(before, batch(n), jax.random.key(1)).compile().as_text()
  return re.findall(
    r' (all-[a-z-]+|reduce-scatter|collective-[a-z-]+)\(', program
  )


# Mode, micro-batches, whether blocks are computed again.
COLLECTIVES = (
  ('global',),
  ('global', 1, True),
  ('per_device',),
  ('per_device', 2),
)


def test_devices_by_themselves_meet_once_for_gradients_and_statistics(found):
  together, recomputed, apart, in_parts = found['collectives']
  # Six layers, and the loss divides by the number of images it sees.
  assert len(together) > 6
  # Blocks that are computed again keep their statistics.
  assert len(recomputed) == len(together)
  assert len(apart) <= 3
  assert len(in_parts) <= 4
  assert {*together, *apart, *in_parts} == {'all-reduce'}


def find_groups(data_dir):
  """Returns the groups of each mode, where a run makes them."""
  found = {}
  for batch_norm in ('global', 'per_device', 'groups:2'):
    config = tiny_config.get_config(data_dir)
    config.batch_norm = batch_norm
    made = setup.create_setup(config, only=['three'])
    found[batch_norm] = setup.create_task(
      made, made.chosen[0]
    ).model.norm_groups
  return found


def test_a_run_makes_groups_of_the_devices_it_has(found):
  expected = {'global': 1, 'per_device': 8, 'groups:2': 4}
  assert found['groups'] == expected


def test_groups_must_divide_the_devices():
  config = tiny_config.get_config()
  config.batch_norm = 'groups:3'
  stages.check_config(config)
  stages.check_batch_norm(config, 6)
  with pytest.raises(errors.UserError, match='of 3 devices') as caught:
    stages.check_batch_norm(config, 8)
  assert "'groups:2'" in str(caught.value)


@pytest.mark.parametrize('name', ['groups', 'groups:0', 'per-device'])
def test_unknown_batch_norms_are_named(name):
  config = tiny_config.get_config()
  with config.ignore_type():
    config.batch_norm = name
  with pytest.raises(errors.UserError, match='Unknown batch_norm'):
    stages.create_stages(config)


@pytest.mark.parametrize(
  ('field', 'value'), [('batch_norm', 'per_device'), ('remat', 'blocks')]
)
def test_a_users_own_network_has_its_own_norms(field, value, data_dir):
  config = tiny_config.get_config(data_dir)
  config[field] = value
  with pytest.raises(errors.UserError, match=f'{field} is for the networks'):
    setup.create_setup(config, model=Small)


def test_a_users_own_network_skips_no_blocks(data_dir):
  config = tiny_config.get_config(data_dir)
  config.stages[1]['phases'] = ({'from_epoch': 1, 'drop_path': 0.1},)
  setup.create_setup(config, model=Small, only=['three'])
  with pytest.raises(errors.UserError, match='drop_path is for the networks'):
    setup.create_setup(config, model=Small)


def test_weights_of_one_mode_load_in_another(tmp_path):
  config = tiny_config.get_config()
  models = []
  for config.batch_norm in ('per_device', 'global'):
    models.append(
      setup.create_model_fn(config, 4)(
        num_classes=NUM_CLASSES, image_size=8, dtype=jnp.float32
      )
    )
  saved = random_variables(models[0], jnp.zeros((1, 8, 8, 3)), train=False)
  with checkpoints.Checkpoints(tmp_path / 'checkpoints' / 'stage') as manager:
    manager.save_weights('best', 1, saved, {})
  loaded, _ = checkpoints.load_weights(tmp_path, 'stage', 'best')
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  first, second = (
    jax.jit(functools.partial(model.apply, train=False))(variables, images)
    for model, variables in zip(models, (saved, loaded), strict=True)
  )
  np.testing.assert_array_equal(first, second)

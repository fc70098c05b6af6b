import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprog.models import resnet
from jaxprog.optim import eight_bit
from jaxprog.reliability import checkpoints
from jaxprog.training import state

ADAM = optax.scale_by_adam(0.9, 0.999, 1e-8)
ADAM_8BIT = eight_bit.scale_by_adam_8bit(0.9, 0.999, 1e-8, min_size=1)
TRACE_8BIT = eight_bit.trace_8bit(0.9, True, min_size=1)


def blocks(dtype, num_blocks=1, block_size=256):
  return eight_bit.Blocks(
    np.zeros((num_blocks, block_size), dtype), np.zeros(num_blocks, np.float32)
  )


@functools.partial(jax.jit, static_argnums=0)
def round_trip(dtype, x, step):
  num_blocks = -(-x.size // 256)
  encoded = eight_bit.encode(x, blocks(dtype, num_blocks), step)
  return eight_bit.decode(encoded, x.shape)


def code_points(dtype):
  """What a code can say of a block whose largest magnitude is 1."""
  octaves = 2.0 ** np.arange(-32, 0)
  points = np.outer(octaves, 1 + np.arange(8) / 8).ravel()
  if dtype == np.uint8:
    return np.append(points, 1.0)[-256:]
  points = np.append(points, 1.0)[-128:]
  points = points - points[0]
  return np.concatenate([-points[:0:-1], points])


def update_all(tx, grads):
  """Returns the updates of all `grads` in turn, stacked."""

  def step(opt_state, g):
    updates, opt_state = tx.update(g, opt_state)
    return opt_state, updates

  first = jax.tree.map(lambda g: g[0], grads)
  return jax.jit(lambda g: jax.lax.scan(step, tx.init(first), g)[1])(grads)


@pytest.mark.parametrize('dtype', [np.int8, np.uint8])
@pytest.mark.parametrize('step', [1, 2, 1000, 2**31 - 1])
def test_a_round_trip_ends_at_one_of_two_neighbours(dtype, step):
  rng = np.random.default_rng(0)
  x = 10 ** np.linspace(-12, 0, 4096).reshape(16, 256)
  x[:, 1:] = rng.permuted(x[:, 1:], axis=1)
  x[0] = rng.permutation(10 ** np.linspace(-12, 0, 256))
  if dtype == np.int8:
    x *= rng.choice([-1, 1], x.shape)
  x = np.float32(7e-5 * x)
  largest = np.abs(x).max(axis=1, keepdims=True)
  ratio = x / largest
  found = round_trip(dtype, x, step) / largest
  points = code_points(dtype)
  above = np.searchsorted(points, ratio).clip(1, len(points) - 1)
  slack = 1e-6 * np.abs(ratio) + 1e-11
  assert np.all(found <= points[above] + slack)
  if dtype == np.int8:
    assert np.all(found >= points[above - 1] - slack)
    bound = 0.125 * (np.abs(ratio) + eight_bit.FLOOR)
  else:
    lost = ratio <= points[0]
    assert lost.any()
    np.testing.assert_allclose(found[lost], points[0], rtol=1e-6)
    assert np.all(found >= points[above - 1] - 1e-6 * ratio)
    bound = np.where(lost, points[0], 0.125 * ratio)
  assert np.all(np.abs(found - ratio) <= bound + slack)


@pytest.mark.parametrize('dtype', [np.int8, np.uint8])
def test_rounding_is_right_on_average(dtype):
  x = np.float32(np.linspace(1e-6, 1, 256))
  steps = jnp.arange(987)
  found = jax.vmap(lambda step: round_trip(dtype, x, step))(steps)
  assert np.std(found, axis=0).max() > 0.03  # Nearest would give 0.
  np.testing.assert_allclose(found.mean(axis=0), x, rtol=1e-3, atol=3e-8)


@pytest.mark.parametrize('dtype', [np.int8, np.uint8])
@pytest.mark.parametrize('value', [0.0, 1e-40])
def test_blocks_of_zeros_and_subnormals_have_the_lowest_code(dtype, value):
  x = np.full(256, value, np.float32)
  encoded = jax.jit(eight_bit.encode)(x, blocks(dtype), 1)
  np.testing.assert_array_equal(encoded.codes, 0)
  assert np.all(eight_bit.decode(encoded, x.shape) <= value)


def test_shapes_that_do_not_fill_their_blocks():
  x = np.random.default_rng(0).normal(size=(3, 100, 7)).astype(np.float32)
  opt_state = TRACE_8BIT.init(x)
  assert opt_state.trace.codes.shape == (9, 256)
  assert opt_state.trace.scales.shape == (9,)
  encoded = eight_bit.encode(x, opt_state.trace, 1)
  np.testing.assert_array_equal(encoded.codes.reshape(-1)[2100:], 0)
  found = eight_bit.decode(encoded, x.shape)
  np.testing.assert_allclose(found, x, rtol=0.13, atol=1e-5)


@pytest.mark.parametrize('nesterov', [False, True])
def test_small_parameters_get_the_updates_of_optax(nesterov):
  grads = {
    'kernel': jax.random.normal(jax.random.key(0), (10, 64, 64)),
    'bias': jax.random.normal(jax.random.key(1), (10, 64)),
  }
  for ours, theirs in (
    (eight_bit.scale_by_adam_8bit(), optax.scale_by_adam()),
    (eight_bit.trace_8bit(0.9, nesterov), optax.trace(0.9, nesterov)),
  ):
    found, expected = update_all(ours, grads), update_all(theirs, grads)
    # The same bits with jax 0.10; 0.12 fuses the two otherwise.
    np.testing.assert_allclose(found['bias'], expected['bias'], 0, 1e-6)
    assert not np.array_equal(found['kernel'], expected['kernel'])
    # The first update comes before anything has been rounded.
    np.testing.assert_allclose(
      found['kernel'][0], expected['kernel'][0], rtol=1e-6
    )


def test_updates_stay_near_those_of_optax():
  """Gradients of one block differ 1000 times; half of them shrink 100 times.

  With the nearest code instead, their updates would be .4 of optax's.
  """
  steps, size = 600, 4096
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(steps, size)) * 10 ** rng.uniform(-3, 0, size)
  grads[:, ::2] *= 100 ** -np.linspace(0, 1, steps)[:, None]
  grads = jnp.asarray(grads, jnp.float32)
  found = update_all(
    eight_bit.scale_by_adam_8bit(0.9, 0.99, min_size=1), grads
  )[300:]
  expected = update_all(optax.scale_by_adam(0.9, 0.99), grads)[300:]
  norm = np.linalg.norm
  for half in (0, 1):
    ratio = norm(found[:, half::2]) / norm(expected[:, half::2])
    assert ratio == pytest.approx(1, abs=0.1)
  assert norm(found - expected) < 0.15 * norm(expected)
  assert np.abs(found).max() < 2 * np.abs(expected).max()


def test_momentum_reaches_the_sum_of_steady_gradients():
  """With the nearest code it would stop up to 5% below or above it."""
  steady = 10 ** np.random.default_rng(0).uniform(-3, 0, 4096)
  grads = jnp.broadcast_to(jnp.float32(steady), (300, 4096))
  found = update_all(eight_bit.trace_8bit(0.9, min_size=1), grads)[100:]
  np.testing.assert_allclose(found.mean(axis=0), 10 * steady, rtol=0.03)
  np.testing.assert_allclose(found / (10 * steady), 1, atol=0.2)


@pytest.mark.parametrize(
  ('ours', 'theirs', 'rate'),
  [
    (ADAM_8BIT, ADAM, 0.01),
    (TRACE_8BIT, optax.trace(0.9, True), 0.1),
  ],
)
def test_logistic_regression_learns_as_in_f32(ours, theirs, rate):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(512, 100)) * 10 ** rng.uniform(-1.5, 0.5, 100)
  labels = np.argmax(x @ rng.normal(size=(100, 10)), axis=1)
  x = jnp.asarray(x, jnp.float32)

  def loss_fn(kernel, index):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      x[index] @ kernel, labels[index]
    )
    return losses.mean()

  def final_loss(tx):
    tx = optax.chain(tx, optax.scale(-rate))

    def step(carry, key):
      kernel, opt_state = carry
      index = jax.random.randint(key, (64,), 0, 512)
      grads = jax.grad(loss_fn)(kernel, index)
      updates, opt_state = tx.update(grads, opt_state, kernel)
      return (optax.apply_updates(kernel, updates), opt_state), None

    kernel = jnp.zeros((100, 10))
    keys = jax.random.split(jax.random.key(0), 200)
    (kernel, _), _ = jax.lax.scan(step, (kernel, tx.init(kernel)), keys)
    return float(loss_fn(kernel, jnp.arange(512)))

  labels = jnp.asarray(labels)
  expected = final_loss(theirs)
  assert expected < 0.2 * math.log(10)
  assert final_loss(ours) == pytest.approx(expected, rel=0.03)


def test_a_linear_code_explodes_on_gradients_that_ours_survives():
  rng = np.random.default_rng(0)
  size = np.where(np.arange(256) % 2, 1.0, 1e-3)  # Interleaved channels.
  grads = rng.normal(size=(50, 256)) * size
  grads[rng.uniform(size=grads.shape) < 0.2] = 0  # A dead ReLU, say.
  grads = jnp.asarray(grads, jnp.float32)

  def linear_update(updates, opt_state, params=None):
    updates, opt_state = ADAM.update(updates, opt_state, params)
    scale = opt_state.nu.max()
    nu = jnp.round(opt_state.nu / scale * 255) / 255 * scale
    return updates, opt_state._replace(nu=nu)

  linear = optax.GradientTransformation(ADAM.init, linear_update)
  expected = np.abs(update_all(ADAM, grads)).max()
  assert np.abs(update_all(linear, grads)).max() > 1000 * expected
  assert np.abs(update_all(ADAM_8BIT, grads)).max() < 1.2 * expected


@pytest.mark.parametrize('case', ['zero', 'zero_block', 'outlier', 'tiny'])
@pytest.mark.parametrize('tx', [ADAM_8BIT, TRACE_8BIT])
def test_extreme_gradients_give_finite_updates(tx, case):
  grads = np.random.default_rng(0).normal(size=(30, 512)).astype(np.float32)
  if case == 'zero':
    grads[:] = 0
  elif case == 'zero_block':
    grads[:, :256] = 0
  elif case == 'outlier':
    grads[3, 7] = 1e6
  elif case == 'tiny':
    grads *= 1e-20
    grads[:, 256:] *= 1e-20  # Subnormal.
  updates = update_all(tx, jnp.asarray(grads))
  assert np.isfinite(updates).all()
  if tx is ADAM_8BIT:
    assert np.abs(updates).max() < 4
  if case == 'zero':
    np.testing.assert_array_equal(updates, 0)
  if case == 'zero_block':
    np.testing.assert_array_equal(updates[:, :256], 0)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('tx', [ADAM_8BIT, TRACE_8BIT])
def test_what_is_not_finite_is_not_hidden(tx, bad):
  grads = np.ones((2, 512), np.float32)
  grads[0, 7] = bad
  updates = update_all(tx, jnp.asarray(grads))
  assert not np.isfinite(updates[1, 7])
  np.testing.assert_allclose(updates[1, 256:], updates[1, 300], rtol=0.2)


def problem():
  params = {'kernel': jnp.ones((3, 3, 16, 40)), 'bias': jnp.ones(40)}
  grads = jax.tree.map(
    lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params
  )
  return params, grads


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
  'tx', [eight_bit.scale_by_adam_8bit(), eight_bit.trace_8bit(0.9)]
)
def test_donated_states_and_checkpoints(tx, tmp_path):
  params, grads = problem()
  kept, donated = (jax.jit(tx.update, donate_argnums=i) for i in ((), (1,)))
  expected = found = tx.init(params)
  _, expected = kept(grads, expected)
  updates, expected = kept(grads, expected)
  _, found = donated(grads, found)
  before = found
  found_updates, found = donated(grads, found)
  assert all(x.is_deleted() for x in jax.tree.leaves(before))
  assert bits((found_updates, found)) == bits((updates, expected))

  create = functools.partial(
    state.create_state, {'params': params, 'batch_stats': {}}, tx
  )
  with checkpoints.Checkpoints(tmp_path) as manager:
    manager.save_latest(create().replace(opt_state=found), {})
    restored, _ = manager.restore_latest(create())
  assert jax.tree.structure(restored.opt_state) == jax.tree.structure(found)
  assert bits(restored.opt_state) == bits(found)
  assert {x.dtype.name for x in jax.tree.leaves(restored.opt_state)} <= {
    'int32',
    'int8',
    'uint8',
    'float32',
  }


_REPLICATED = """
import jax, jax.numpy as jnp, numpy as np
from jaxprog.optim import eight_bit
from jaxprog.training import devices
from optim_eight_bit_test import bits, problem
assert jax.device_count() == 8
copied = devices.create_shardings().replicated
for tx in (eight_bit.scale_by_adam_8bit(), eight_bit.trace_8bit(0.9, True)):
  results = []
  for place in (jax.devices()[0], copied):
    params, grads = jax.device_put(problem(), place)
    opt_state = jax.device_put(tx.init(params), place)
    step = jax.jit(tx.update, donate_argnums=1)
    for _ in range(3):
      updates, opt_state = step(grads, opt_state)
    results.append((updates, opt_state))
  assert all(x.is_fully_replicated for x in jax.tree.leaves(results[1]))
  assert bits(results[0]) == bits(results[1])
  shards = [
    [x.addressable_shards[i].data for x in jax.tree.leaves(results[1])]
    for i in (0, 7)
  ]
  assert bits(shards[0]) == bits(shards[1])
print('fine')
"""


def test_eight_devices_get_the_bits_of_one():
  path = os.pathsep.join(p for p in sys.path if p)
  flags = '--xla_force_host_platform_device_count=8'
  result = subprocess.run(
    [sys.executable, '-c', _REPLICATED],
    env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
  )
  assert result.stdout.strip() == 'fine', result.stderr[-3000:]


def state_bytes(tx, shapes):
  leaves = jax.tree.leaves(jax.eval_shape(tx.init, shapes))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def test_states_take_a_quarter_of_the_bytes():
  model = resnet.create_model('resnet50', num_classes=1000, image_size=224)
  init = functools.partial(state.init_variables, model, 224)
  params = jax.eval_shape(init, jax.random.key(0))['params']
  adam = state_bytes(optax.scale_by_adam(), params)
  assert adam > 200e6
  assert state_bytes(eight_bit.scale_by_adam_8bit(), params) <= 0.27 * adam
  trace = state_bytes(optax.trace(0.9), params)
  assert state_bytes(eight_bit.trace_8bit(0.9), params) <= 0.27 * trace


def test_tpus_are_spared_gathers():
  params, grads = problem()
  tx = eight_bit.scale_by_adam_8bit()
  update = jax.jit(tx.update).trace(grads, tx.init(params))
  text = update.lower(lowering_platforms=('tpu',)).as_text()
  assert 'ui8' in text
  assert 'gather' not in text

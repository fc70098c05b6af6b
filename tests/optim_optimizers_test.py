import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
import runs
import tiny_config

from jaxprog import errors, fields, stages
from jaxprog.models import resnet
from jaxprog.optim import optimizers

# The rate is what they are subtracted with.
PLAIN = [k for k, x in fields.OPTIMIZERS.items() if not x.schedule_free]
# They change, so that a momentum that holds rates differs from one that does
# not.
RATES = 0.1 * 0.7 ** np.arange(10)
SHAPES = {
  'conv': {'kernel': (3, 3, 4, 5)},
  'norm': {'scale': (5,), 'bias': (5,)},
  'head': {'kernel': (5, 3), 'bias': (3,)},
}


def create_stage(**fields):
  stage = stages.create_stages(tiny_config.get_config())[0]
  return dataclasses.replace(stage, **fields)


def create_optimizer(optimizer, **fields):
  return optimizers.create_optimizer(
    create_stage(optimizer=optimizer, **fields)
  )


def random_like_params(rng, scale=1.0):
  return jax.tree.map(
    lambda shape: scale * rng.normal(size=shape),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def problem():
  """Returns float64 parameters and the gradients of ten steps."""
  rng = np.random.default_rng(0)
  return random_like_params(rng), [random_like_params(rng) for _ in RATES]


def run(tx, params, grads):
  """Returns the parameters after a step for each of `grads`, in float64."""
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, params)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for rate, g in zip(RATES, grads, strict=False):
      updates, opt_state = update(g, opt_state, params)
      params = jax.tree.map(lambda p, u, r=rate: p - r * u, params, updates)
    return jax.tree.map(np.asarray, params)


def run_torch(create, params, grads, weight_decay):
  torch = pytest.importorskip('torch')
  leaves, treedef = jax.tree.flatten(params)
  tensors = [torch.tensor(leaf) for leaf in leaves]
  kernels = [t for t in tensors if t.ndim > 1]
  vectors = [t for t in tensors if t.ndim == 1]
  groups = [
    {'params': kernels, 'weight_decay': weight_decay},
    {'params': vectors, 'weight_decay': 0.0},
  ]
  optimizer = create(torch.optim, groups)
  for rate, g in zip(RATES, grads, strict=True):
    for group in optimizer.param_groups:
      group['lr'] = rate
    for tensor, leaf in zip(tensors, jax.tree.leaves(g), strict=True):
      tensor.grad = torch.tensor(leaf)
    optimizer.step()
  return jax.tree.unflatten(treedef, [t.numpy() for t in tensors])


def run_numpy(direction, params, grads):
  """Steps with direction(is_kernel, param, grad, step, memory of the leaf)."""
  leaves, treedef = jax.tree.flatten(params)
  memories = [{} for _ in leaves]
  for step, (rate, g) in enumerate(zip(RATES, grads, strict=True), start=1):
    leaves = [
      p - rate * direction(p.ndim > 1, p, g, step, memory)
      for p, g, memory in zip(leaves, jax.tree.leaves(g), memories, strict=True)
    ]
  return jax.tree.unflatten(treedef, leaves)


def close(found, expected, rtol=1e-6):
  jax.tree.map(
    lambda f, e: np.testing.assert_allclose(f, e, rtol=rtol), found, expected
  )


# Our fields, PyTorch's class and arguments.
PEERS = [
  (
    {'optimizer': 'adamw', 'b1': 0.8, 'b2': 0.95},
    'AdamW',
    {'betas': (0.8, 0.95)},
  ),
  ({'optimizer': 'adamw', 'eps': 0.1}, 'AdamW', {'eps': 0.1}),
  ({'optimizer': 'adamw', 'weight_decay_kind': 'coupled'}, 'Adam', {}),
  ({'optimizer': 'sgd_momentum', 'momentum': 0.8}, 'SGD', {'momentum': 0.8}),
  ({'optimizer': 'sgd_momentum', 'momentum': 0.0}, 'SGD', {}),
  (
    {'optimizer': 'sgd_momentum', 'nesterov': True},
    'SGD',
    {'momentum': 0.9, 'nesterov': True},
  ),
  (
    {'optimizer': 'rmsprop', 'rms_decay': 0.95, 'eps': 0.01},
    'RMSprop',
    {'alpha': 0.95, 'eps': 0.01, 'momentum': 0.9},
  ),
  ({'optimizer': 'rmsprop', 'momentum': 0.0}, 'RMSprop', {}),
]


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
@pytest.mark.parametrize(('fields', 'peer', 'arguments'), PEERS)
def test_equals_pytorch(fields, peer, arguments, weight_decay):
  params, grads = problem()
  tx = create_optimizer(**fields, weight_decay=weight_decay)
  expected = run_torch(
    lambda lib, groups: getattr(lib, peer)(groups, lr=1.0, **arguments),
    params,
    grads,
    weight_decay,
  )
  close(run(tx, params, grads), expected)


def adam_direction(grad, step, memory, b1=0.9, b2=0.999, eps=1e-8):
  memory['m'] = b1 * memory.get('m', 0) + (1 - b1) * grad
  memory['v'] = b2 * memory.get('v', 0) + (1 - b2) * grad**2
  m = memory['m'] / (1 - b1**step)
  return m / (np.sqrt(memory['v'] / (1 - b2**step)) + eps)


@pytest.mark.parametrize('kind', ['auto', 'coupled', 'decoupled'])
def test_lamb_equals_its_formula(kind):
  def direction(is_kernel, param, grad, step, memory):
    if not is_kernel:
      return adam_direction(grad, step, memory)
    if kind == 'coupled':
      update = adam_direction(grad + 0.3 * param, step, memory)
    else:
      update = adam_direction(grad, step, memory) + 0.3 * param
    return update * np.linalg.norm(param) / np.linalg.norm(update)

  params, grads = problem()
  tx = create_optimizer('lamb', weight_decay=0.3, weight_decay_kind=kind)
  close(run(tx, params, grads), run_numpy(direction, params, grads))


def test_lamb_is_timms():
  """With its clipping; vectors have neither decay nor a trust ratio."""
  lamb = parity.import_module('timm.optim').Lamb
  params, grads = problem()
  tx = create_optimizer('lamb', eps=1e-6, weight_decay=0.3, gradient_clipping=1)
  expected = run_torch(
    lambda _, groups: lamb(groups, lr=1.0), params, grads, 0.3
  )
  close(run(tx, params, grads), expected)


@pytest.mark.parametrize('kind', ['auto', 'coupled', 'decoupled'])
@pytest.mark.parametrize('nesterov', [False, True])
def test_lars_equals_its_formula(nesterov, kind):
  def direction(is_kernel, param, grad, _, memory):
    update, decay = grad, 0
    if is_kernel:
      if kind == 'decoupled':
        decay = 0.3 * param
      else:
        update = grad + 0.3 * param
      update = update * 0.02 * np.linalg.norm(param) / np.linalg.norm(update)
    memory['m'] = 0.8 * memory.get('m', 0) + update
    return (update + 0.8 * memory['m'] if nesterov else memory['m']) + decay

  params, grads = problem()
  tx = create_optimizer(
    'lars',
    momentum=0.8,
    nesterov=nesterov,
    trust_coefficient=0.02,
    weight_decay=0.3,
    weight_decay_kind=kind,
  )
  close(run(tx, params, grads), run_numpy(direction, params, grads))


def muon_direction(grad, step, memory, nesterov, beta=0.8):
  memory['m'] = m = beta * memory.get('m', 0) + (1 - beta) * grad
  if nesterov:  # Dozat 2016, as in NAdam.
    x = beta * m / (1 - beta ** (step + 1)) + (1 - beta) * grad / (
      1 - beta**step
    )
  else:
    x = m
  x = x.reshape(-1, x.shape[-1])
  x = x / np.linalg.norm(x)
  for _ in range(5):
    a = x.T @ x
    x = 3.4445 * x + x @ (-4.7750 * a + 2.0315 * a @ a)
  return 0.2 * max(x.shape) ** 0.5 * x.reshape(grad.shape)


@pytest.mark.parametrize('kind', ['auto', 'coupled'])
@pytest.mark.parametrize('nesterov', [False, True])
def test_muon_equals_its_formula(nesterov, kind):
  def direction(is_kernel, param, grad, step, memory):
    decay = 0.3 * param if is_kernel else 0
    if kind == 'coupled':
      grad, decay = grad + decay, 0
    if param.ndim == 4:
      return muon_direction(grad, step, memory, nesterov) + decay
    return adam_direction(grad, step, memory) + decay

  params, grads = problem()
  tx = create_optimizer(
    'muon',
    momentum=0.8,
    nesterov=nesterov,
    weight_decay=0.3,
    weight_decay_kind=kind,
  )
  close(run(tx, params, grads), run_numpy(direction, params, grads))


def sgd_direction(grad, _, memory, nesterov=False):
  memory['m'] = 0.8 * memory.get('m', 0) + grad
  return grad + 0.8 * memory['m'] if nesterov else memory['m']


def rmsprop_direction(grad, step, memory):
  memory['v'] = 0.99 * memory.get('v', 0) + 0.01 * grad**2
  return sgd_direction(grad / (np.sqrt(memory['v']) + 1e-8), step, memory)


def by_trust(is_kernel, param, update):
  ratio = np.linalg.norm(param) / np.linalg.norm(update)
  return update * ratio if is_kernel else update


# (fields, the direction of a leaf, bytes a number of the state before, after)
BFLOAT16 = {
  'adamw': (
    {},
    lambda _, p, g, step, memory: adam_direction(g, step, memory),
    (8, 6),
  ),
  'lamb': (
    {},
    lambda is_kernel, p, g, step, memory: by_trust(
      is_kernel, p, adam_direction(g, step, memory)
    ),
    (8, 6),
  ),
  'lars': (
    {'trust_coefficient': 1.0},
    lambda is_kernel, p, g, step, memory: sgd_direction(
      by_trust(is_kernel, p, g), step, memory
    ),
    (4, 2),
  ),
  'muon': (
    {},
    lambda _, p, g, step, memory: (
      muon_direction(g, step, memory, nesterov=False)
      if p.ndim == 4
      else adam_direction(g, step, memory)
    ),
    None,
  ),
  'rmsprop': (
    {},
    lambda _, p, g, step, memory: rmsprop_direction(g, step, memory),
    (8, 6),
  ),
  'sgd_momentum': (
    {},
    lambda _, p, g, step, memory: sgd_direction(g, step, memory),
    (4, 2),
  ),
  'nesterov': (
    {'optimizer': 'sgd_momentum', 'nesterov': True},
    lambda _, p, g, step, memory: sgd_direction(g, step, memory, True),
    (4, 2),
  ),
}


def create_bfloat16(case, dtype='bfloat16'):
  fields = {
    'optimizer': case,
    'momentum': 0.8,
    'weight_decay': 0.0,
    'optimizer_state_dtype': dtype,
  }
  return create_optimizer(**{**fields, **BFLOAT16[case][0]})


@pytest.mark.parametrize('case', BFLOAT16)
def test_a_bfloat16_state_is_rounded_once_after_each_step(case):
  direction = BFLOAT16[case][1]

  def rounded(is_kernel, param, grad, step, memory):
    update = direction(is_kernel, param, grad, step, memory)
    memory['m'] = np.float64(memory['m'].astype(jnp.bfloat16))
    return update

  params, grads = problem()
  found = run(create_bfloat16(case), params, grads)
  close(found, run_numpy(rounded, params, grads))
  # It is another state than that of float32, or nothing was tested.
  exact = run_numpy(direction, params, grads)
  with pytest.raises(AssertionError):
    close(found, exact)


@pytest.mark.parametrize('case', BFLOAT16)
def test_a_bfloat16_state_has_half_a_first_moment_and_float32_updates(case):
  params, grads = problem()
  params, grads = jax.tree.map(jnp.float32, (params, grads[0]))
  size = sum(x.size for x in jax.tree.leaves(params))
  found = []
  for dtype in ('float32', 'bfloat16'):
    tx = create_bfloat16(case, dtype)
    updates, opt_state = tx.update(grads, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {np.dtype('float32')}
    found.append(sum(x.nbytes for x in jax.tree.leaves(opt_state) if x.ndim))
    same = jax.tree.map(lambda x: x.dtype, (tx.init(params), opt_state))
    assert same[0] == same[1]
  assert found[0] - found[1] == 2 * size
  if BFLOAT16[case][2]:
    assert [x / size for x in found] == list(BFLOAT16[case][2])


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'optimizer': 'adamw_8bit'}, "Use 'adamw'"),
    ({'optimizer': 'sgd_momentum_8bit'}, "Use 'sgd_momentum'"),
    ({'optimizer': 'sgd_momentum', 'momentum': 0.0}, 'without momentum'),
    ({'optimizer_state_dtype': 'bf16'}, 'Unknown optimizer_state_dtype'),
  ],
)
def test_a_state_dtype_that_would_be_ignored_is_refused(fields, expected):
  config = tiny_config.get_config()
  config.stages[0].update({'optimizer_state_dtype': 'bfloat16', **fields})
  with pytest.raises(errors.UserError, match=expected):
    stages.create_stages(config)


@pytest.mark.parametrize('shape', [(7, 7, 3, 16), (1, 1, 8, 64), (3, 3, 32, 8)])
def test_muon_updates_have_one_size_for_every_shape(shape):
  rng = np.random.default_rng(0)
  params = {'conv': jnp.zeros(shape), 'head': jnp.zeros((8, 4))}
  grads = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape)), params)
  tx = create_optimizer('muon', weight_decay=0.0)
  updates, _ = tx.update(grads, tx.init(params), params)
  size = np.sqrt(np.mean(updates['conv'] ** 2))
  # Newton-Schulz leaves singular values of 0.7 to 1.2.
  assert 0.2 * 0.7 < size < 0.2 * 1.2


def test_muon_leaves_a_convolutional_head_to_adam():
  params = {'head': {'kernel': jnp.ones((1, 1, 4, 3))}}
  tx = create_optimizer('muon', weight_decay=0.0)
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(updates['head']['kernel'], 1.0, rtol=1e-4)


@pytest.mark.parametrize('name', ['adamw', 'sgd_momentum'])
@pytest.mark.parametrize('kind', ['auto', 'coupled', 'decoupled'])
def test_8bit_leaves_small_arrays_in_float32(name, kind):
  rng = np.random.default_rng(0)
  params, grads = problem()
  params = jax.tree.map(jnp.float32, params)
  # Taken for one another, these two would quantise the convolution.
  fields = {
    'quantization_block': 8,
    'quantization_min_size': 181,
    'weight_decay': 0.3,
    'weight_decay_kind': kind,
    'nesterov': name == 'sgd_momentum',
    'b1': 0.8,
    'b2': 0.9,
    'eps': 0.1,
    'momentum': 0.8,
  }
  found, expected = (
    create_optimizer(name + suffix, **fields) for suffix in ('_8bit', '')
  )
  states = [found.init(params), expected.init(params)]
  for g in grads[:4]:
    g = jax.tree.map(jnp.float32, g)
    updates, states[0] = found.update(g, states[0], params)
    others, states[1] = expected.update(g, states[1], params)
    jax.tree.map(
      lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6),
      updates,
      others,
    )
    params = jax.tree.map(
      lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params
    )


@pytest.mark.parametrize('name', ['adamw_8bit', 'sgd_momentum_8bit'])
def test_8bit_shares_scales_within_blocks(name):
  tx = create_optimizer(name, quantization_block=64, quantization_min_size=1024)
  leaves = jax.tree.leaves(tx.init({'kernel': jnp.zeros((32, 32))}))
  codes = [x for x in leaves if x.dtype.itemsize == 1]
  scales = [x for x in leaves if x.dtype == jnp.float32]
  moments = 2 if name == 'adamw_8bit' else 1
  assert [x.size for x in codes] == [1024] * moments
  assert [x.size for x in scales] == [16] * moments


@pytest.mark.parametrize('name', PLAIN)
def test_every_optimizer_descends_in_float32(name):
  # More momentum or a larger rate would overshoot.
  tx = create_optimizer(
    name, weight_decay=0.0, momentum=0.5, trust_coefficient=0.5
  )
  params, _ = problem()
  params = jax.tree.map(jnp.float32, params)

  @jax.jit
  def step(carry, rate):
    params, opt_state = carry
    loss = 0.5 * optax.tree.norm(params, squared=True)
    updates, opt_state = tx.update(params, opt_state, params)
    # A scan also refuses a state that changes its types.
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return (params, opt_state), loss

  init = (params, tx.init(params))
  _, losses = jax.lax.scan(step, init, jnp.full(20, 0.01, jnp.float32))
  assert np.all(np.diff(losses) < 0)
  assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize('name', PLAIN)
def test_decoupled_decay_spares_vectors(name):
  params, _ = problem()
  zero = jax.tree.map(np.zeros_like, params)
  tx = create_optimizer(name, weight_decay=0.3, weight_decay_kind='decoupled')
  found = run(tx, params, [zero])
  # LAMB's trust ratio makes any update as long as the weights.
  part = RATES[0] * (1.0 if name == 'lamb' else 0.3)
  expected = jax.tree.map(lambda p: p * (1 - part) if p.ndim > 1 else p, params)
  close(found, expected, rtol=1e-12)


@pytest.mark.parametrize('name', PLAIN)
def test_auto_decay_is_pytorchs(name):
  params, grads = problem()
  kind = 'coupled'
  if name in ('adamw', 'adamw_8bit', 'lamb', 'muon'):
    kind = 'decoupled'
  found, expected = (
    run(
      create_optimizer(name, weight_decay=0.3, weight_decay_kind=kind),
      params,
      grads[:2],
    )
    for kind in ('auto', kind)
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_documentation_says_what_each_can_do():
  page = (runs.ROOT / 'docs' / 'optimization.md').read_text()
  rows = dict(re.findall(r'^\| `(\w+)` \| (.*)', page, re.MULTILINE))
  told = fields.OPTIMIZERS.keys() & rows.keys()
  assert len(told) >= 6
  for name in told:
    known = fields.OPTIMIZERS[name]
    assert ('decoupled' not in rows[name]) == known.coupled
    assert ('`nesterov`' in rows[name]) == known.nesterov


def test_the_norm_is_that_of_all_numbers():
  rng = np.random.default_rng(0)
  shapes = [(), (7,), (7,), (300, 200), (3, 3, 64, 64), (3, 3, 64, 64), (2, 5)]
  grads = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
  expected = np.linalg.norm(np.concatenate([x.ravel() for x in grads]))
  found = optimizers.global_norm(dict(enumerate(map(jnp.asarray, grads))))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_norm_reduces_once_a_shape():
  params = resnet_params('resnet50', num_filters=64)
  shapes = {x.shape for x in jax.tree.leaves(params)}
  text = jax.jit(optimizers.global_norm).lower(params).as_text()
  assert text.count('stablehlo.reduce(') == len(shapes) + 1


@pytest.mark.parametrize('limit', [0.25, 4.0])
def test_global_clipping_comes_before_decay_and_update(limit):
  params, grads = problem()
  norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads[0])))
  tx = create_optimizer(
    'sgd_momentum', weight_decay=0.3, gradient_clipping=limit * norm
  )
  found = run(tx, params, grads[:1])
  expected = jax.tree.map(
    lambda p, g: p - RATES[0] * (min(1, limit) * g + 0.3 * p * (p.ndim > 1)),
    params,
    grads[0],
  )
  close(found, expected)


def step_free(params, grads, rates, **fields):
  """Returns where gradients are asked for, and the average, in float64."""
  stage = create_stage(schedule='constant', **fields)
  tx = optimizers.create_optimizer(stage)
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, params)
    opt_state = tx.init(params)
    step = jax.jit(functools.partial(optimizers.take_step, tx, stage))
    for rate, g in zip(rates, grads, strict=True):
      params, opt_state = step(jnp.asarray(rate), g, opt_state, params)
    average = optimizers.averaged_params(params, opt_state)
    return jax.tree.map(np.asarray, (params, average))


# A warmup from 0, and a rate that falls below its peak again.
FREE_RATES = (0.0, 0.05, 0.1, 0.2, 0.2, 0.1)
FREE = [
  ({'optimizer': 'schedule_free_adamw', 'b1': 0.8, 'b2': 0.95}, 0.8),
  ({'optimizer': 'schedule_free_sgd', 'momentum': 0.7}, 0.7),
]


@pytest.mark.parametrize(('fields', 'beta'), FREE)
def test_schedule_free_equals_its_formulas(fields, beta):
  """Defazio et al. 2024, arXiv:2405.15682, algorithm 1, x, y and z all kept."""
  params, grads = problem()
  found = step_free(
    params,
    grads[: len(FREE_RATES)],
    FREE_RATES,
    **fields,
    weight_decay=0.3,
    head_rate_factor=2.0,
  )

  def follow(path, leaf, *leaf_grads):
    y = x = z = leaf
    v = weights = 0
    factor = 2 if path[0].key == 'head' else 1
    for t, (rate, g) in enumerate(zip(FREE_RATES, leaf_grads, strict=True)):
      if 'adamw' in fields['optimizer']:
        v = 0.95 * v + 0.05 * g**2
        g = g / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8)
      z = z - factor * rate * (g + (0.3 * y if leaf.ndim > 1 else 0))
      weight = max(FREE_RATES[: t + 1]) ** 2
      weights += weight
      part = weight / weights if weights else 0
      x = (1 - part) * x + part * z
      y = (1 - beta) * z + beta * x
    return y, x

  used = grads[: len(FREE_RATES)]
  both = jax.tree_util.tree_map_with_path(follow, params, *used)
  expected = jax.tree.transpose(
    jax.tree.structure(params), jax.tree.structure((0, 0)), both
  )
  # f32 counts steps; the rest is f64.
  close(found, expected)


@pytest.mark.parametrize(('fields', 'beta'), FREE)
def test_schedule_free_equals_its_authors(fields, beta):
  peers = pytest.importorskip('schedulefree', reason=parity.REASON)
  torch = pytest.importorskip('torch', reason=parity.REASON)
  params, grads = problem()
  found = step_free(params, grads, RATES, **fields, weight_decay=0.3)
  made = []

  def create(_, groups):
    if 'adamw' in fields['optimizer']:
      made.append(
        peers.AdamWScheduleFree(groups, lr=1.0, betas=(beta, fields['b2']))
      )
    else:
      made.append(peers.SGDScheduleFree(groups, lr=1.0, momentum=beta))
    made[0].train()
    return made[0]

  expected = run_torch(create, params, grads, 0.3)
  close(found[0], jax.tree.map(np.copy, expected))
  with torch.no_grad():
    made[0].eval()  # In place.
  close(found[1], expected)


def test_schedule_free_gets_there_where_a_constant_rate_does_not():
  """Its average comes near what the last step only strays about."""
  rng = np.random.default_rng(0)
  start = {'head': {'kernel': jnp.zeros((8, 8))}}
  noise = jnp.asarray(rng.normal(size=(2000, 8, 8)), jnp.float32)

  def distance(optimizer, which):
    stage = create_stage(optimizer=optimizer, momentum=0.9, weight_decay=0.0)
    tx = optimizers.create_optimizer(stage)

    def step(carry, n):
      params, opt_state = carry
      grads = jax.tree.map(lambda p: p - 1 + n, params)
      rate = jnp.float32(0.05)
      return optimizers.take_step(tx, stage, rate, grads, opt_state, params), 0

    (params, opt_state), _ = jax.lax.scan(step, (start, tx.init(start)), noise)
    found = which(params, opt_state)['head']['kernel']
    return np.sqrt(np.mean((found - 1) ** 2))

  last = distance('sgd_momentum', lambda params, _: params)
  average = distance('schedule_free_sgd', optimizers.averaged_params)
  assert average < 0.1 < 0.3 < last


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'schedule': 'cosine'}, 'without a schedule'),
    ({'schedule': 'plateau', 'num_epochs': 9}, 'without a schedule'),
    ({'ema_decay': 0.9}, 'an average of its weights already'),
    ({'freeze_epochs': 1.0}, 'where the backbone thaws'),
    ({'optimizer_state_dtype': 'bfloat16'}, 'bfloat16 rounds away'),
    ({'nesterov': True}, 'no Nesterov momentum'),
    ({'b1': 0.0}, 'divides by b1'),
    ({'optimizer': 'schedule_free_sgd', 'momentum': 0.0}, 'by momentum'),
    ({'optimizer': 'schedule_free_adamw_8bit'}, 'Unknown optimizer'),
    ({'warmup_epochs': 0.5}, ''),
  ],
)
def test_what_schedule_free_replaces_is_refused(fields, expected):
  config = tiny_config.get_config()
  config.stages[0].update(
    {'optimizer': 'schedule_free_adamw', 'schedule': 'constant', **fields}
  )
  if not expected:
    stages.create_stages(config)
    return
  with pytest.raises(errors.UserError, match=expected) as e:
    stages.create_stages(config)
  assert len(str(e.value).splitlines()) <= 3


def clip_units(param, grad, axes, limit):
  """Brock et al. 2021, equation 3, with eps = 1e-3."""
  param_norm = np.sqrt(np.sum(param**2, axes, keepdims=True))
  grad_norm = np.sqrt(np.sum(grad**2, axes, keepdims=True))
  largest = limit * np.maximum(param_norm, 1e-3)
  return np.where(grad_norm > largest, largest / grad_norm, 1.0)


def test_adaptive_clipping_equals_its_formula():
  params, grads = problem()
  grads = grads[0]
  params['dense'] = {'kernel': params['head']['kernel'].copy()}
  grads['dense'] = {'kernel': grads['head']['kernel'].copy()}
  params['norm']['scale'] = np.zeros(5)
  factors = {
    'conv': {'kernel': (0, 1, 2)},
    'dense': {'kernel': (0,)},
    'norm': {'scale': (0,), 'bias': (0,)},
  }
  for module, axes in factors.items():
    for name, axis in axes.items():
      axes[name] = clip_units(
        params[module][name], grads[module][name], axis, 1.0
      )
  # Both outcomes occur, unit by unit, and a scale of zero still moves.
  for kernel in (factors['conv']['kernel'], factors['dense']['kernel']):
    assert 0 < np.sum(kernel == 1) < kernel.size
  assert factors['norm']['scale'] > 0
  factors['head'] = {'kernel': 1.0, 'bias': 1.0}

  tx = create_optimizer(
    'sgd_momentum', weight_decay=0.0, momentum=0.0, adaptive_clipping=1.0
  )
  with jax.enable_x64(True):
    found, _ = tx.update(grads, tx.init(params), params)
  close(found, jax.tree.map(lambda g, factor: g * factor, grads, factors))


def resnet_params(name, num_filters=8):
  model = resnet.create_model(
    name, num_classes=7, image_size=32, num_filters=num_filters
  )
  images = jnp.zeros((1, 32, 32, 3))
  return jax.eval_shape(
    lambda rng: model.init(rng, images, train=False)['params'],
    jax.random.key(0),
  )


def test_weight_decay_is_for_kernels():
  mask = optimizers.weight_decay_mask(resnet_params('resnet50'))
  leaves = jax.tree_util.tree_leaves_with_path(mask)
  decayed = [path[-1].key == 'kernel' for path, _ in leaves]
  assert [value for _, value in leaves] == decayed
  assert sum(decayed) == 54


def test_rate_factors_fall_towards_the_stem():
  params = resnet_params('resnet10')
  stage = create_stage(
    layer_decay=0.5, head_rate_factor=10.0, backbone_rate_factor=3.0
  )
  factors = optimizers.rate_factors(params, stage)
  assert jax.tree.structure(factors) == jax.tree.structure(params)
  assert {type(x) for x in jax.tree.leaves(factors)} == {float}
  found = {
    name: sorted(set(jax.tree.leaves(module)))
    for name, module in factors.items()
  }
  assert found == {
    'stem_conv': [3 / 32],
    'stem_norm': [3 / 32],
    'block1_1': [3 / 16],
    'block2_1': [3 / 8],
    'block3_1': [3 / 4],
    'block4_1': [3 / 2],
    'head': [10.0],
  }


def test_rate_factors_know_that_10_follows_9():
  names = ['block3_10', 'block3_9', 'block12_1', 'head', 'stem_conv']
  params = {name: {'kernel': 0.0} for name in names}
  stage = create_stage(layer_decay=0.1)
  found = optimizers.rate_factors(params, stage)
  order = ['head', 'block12_1', 'block3_10', 'block3_9', 'stem_conv']
  for i, name in enumerate(order):
    assert found[name]['kernel'] == pytest.approx(0.1**i)


def test_rate_factors_do_not_depend_on_the_order_of_a_dict():
  params = dict.fromkeys(('Dense_10', 'head', 'Dense_2', 'Conv_0'), 0.0)
  stage = create_stage(layer_decay=0.5)
  expected = {'Conv_0': 0.125, 'Dense_2': 0.25, 'Dense_10': 0.5, 'head': 1.0}
  assert optimizers.rate_factors(params, stage) == expected
  # What jit and checkpoints return is sorted.
  params = dict(sorted(params.items()))
  assert optimizers.rate_factors(params, stage) == expected


def test_rate_factors_are_one_by_default():
  factors = optimizers.rate_factors(resnet_params('resnet18'), create_stage())
  assert set(jax.tree.leaves(factors)) == {1.0}

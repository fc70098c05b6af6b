import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config

from jaxprog import stages
from jaxprog.optim import optimizers

RATE = 0.1


def create_optimizer(**fields):
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(stage, **fields)
  return optimizers.create_optimizer(stage, lambda step: RATE)


def problem():
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}
  grads = [
    {k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(10)
  ]
  return params, grads


def run(tx, params, grads):
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, params)
    opt_state = tx.init(params)
    for g in grads:
      updates, opt_state = tx.update(g, opt_state, params)
      params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def run_torch(create, params, grads, weight_decay):
  torch = pytest.importorskip('torch')
  tensors = {k: torch.tensor(v) for k, v in params.items()}
  groups = [
    {'params': [tensors['kernel']], 'weight_decay': weight_decay},
    {'params': [tensors['bias']], 'weight_decay': 0.0},
  ]
  optimizer = create(torch, groups)
  for g in grads:
    for name, tensor in tensors.items():
      tensor.grad = torch.tensor(g[name])
    optimizer.step()
  return {k: v.numpy() for k, v in tensors.items()}


def test_adamw_equals_pytorch():
  params, grads = problem()
  found = run(
    create_optimizer(optimizer='adamw', weight_decay=0.3), params, grads
  )
  expected = run_torch(
    lambda torch, groups: torch.optim.AdamW(groups, lr=RATE),
    params,
    grads,
    0.3,
  )
  for name in params:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_equals_pytorch(nesterov):
  params, grads = problem()
  tx = create_optimizer(
    optimizer='sgd_momentum', nesterov=nesterov, weight_decay=0.3
  )
  found = run(tx, params, grads)
  expected = run_torch(
    lambda torch, groups: torch.optim.SGD(
      groups, lr=RATE, momentum=0.9, nesterov=nesterov
    ),
    params,
    grads,
    0.3,
  )
  for name in params:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_weight_decay_spares_vectors():
  params, _ = problem()
  zero = jax.tree.map(np.zeros_like, params)
  found = run(
    create_optimizer(optimizer='adamw', weight_decay=0.3), params, [zero]
  )
  np.testing.assert_array_equal(found['bias'], params['bias'])
  expected = params['kernel'] * (1 - RATE * 0.3)
  np.testing.assert_allclose(found['kernel'], expected, rtol=1e-12)


def test_clipping_comes_before_the_update():
  params, grads = problem()
  norm = np.sqrt(sum(np.sum(g**2) for g in grads[0].values()))
  tx = create_optimizer(
    optimizer='sgd_momentum', weight_decay=0.0, gradient_clipping=norm / 4
  )
  found = run(tx, params, grads[:1])
  for name in params:
    expected = params[name] - RATE * grads[0][name] / 4
    np.testing.assert_allclose(found[name], expected, rtol=1e-6)

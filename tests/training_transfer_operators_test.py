import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprog import fields
from jaxprog.models import resnet
from jaxprog.training.transfer import operators


def normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32)


@pytest.fixture(scope='module')
def network():
  model = resnet.create_model(
    'resnet10', num_classes=3, image_size=16, num_filters=4
  )
  init = jax.jit(
    lambda rng: model.init(rng, jnp.zeros((1, 16, 16, 3)), train=False)
  )
  return init(jax.random.key(0)), init(jax.random.key(1))


def test_each_name_of_the_config_has_its_operator():
  assert sorted(operators.OPERATORS) == sorted(fields.STAGE['transfer'].choices)


def test_shrink_and_perturb_is_its_formula(network):
  trained, fresh = network
  result = operators.shrink_and_perturb(
    trained['params'], fresh['params'], shrink=0.4, perturb=0.1
  )
  for new, old, noise in zip(
    *map(jax.tree.leaves, (result, trained['params'], fresh['params'])),
    strict=True,
  ):
    expected = 0.4 * np.float64(old) + 0.1 * np.float64(noise)
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-8)
  whole = operators.shrink_and_perturb(
    trained['params'], fresh['params'], shrink=1.0, perturb=0.0
  )
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), whole, trained['params'])
  )


def cosine(a, b):
  return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_dash_shrinks_each_filter_by_its_cosine():
  kernel, grad = normal(0, 3, 3, 2, 4), normal(1, 3, 3, 2, 4)
  result = operators.dash(
    {'conv': {'kernel': kernel}}, {'conv': {'kernel': grad}}, least=0.05
  )['conv']['kernel']
  for i in range(2):
    for o in range(4):
      weight = kernel[:, :, i, o]
      factor = max(0.05, cosine(weight.ravel(), -grad[:, :, i, o].ravel()))
      np.testing.assert_allclose(
        result[:, :, i, o], weight * factor, rtol=1e-5, atol=1e-7
      )


@pytest.mark.parametrize('shape', [(6, 4), (1, 1, 6, 4)])
def test_dash_shrinks_units_where_a_filter_is_one_number(shape):
  kernel, grad = normal(0, *shape), normal(1, *shape)
  result = operators.dash({'kernel': kernel}, {'kernel': grad}, least=0.0)
  for o in range(4):
    weight = kernel[..., o].ravel()
    factor = max(0.0, cosine(weight, -grad[..., o].ravel()))
    np.testing.assert_allclose(
      result['kernel'][..., o].ravel(), weight * factor, rtol=1e-5, atol=1e-7
    )


def test_dash_keeps_what_still_learns_and_all_but_kernels():
  params = {'kernel': normal(0, 3, 3, 2, 2), 'bias': normal(1, 2)}
  grads = {'kernel': -2 * params['kernel'], 'bias': normal(2, 2)}
  result = operators.dash(params, grads, least=0.3)
  np.testing.assert_allclose(result['kernel'], params['kernel'], rtol=1e-6)
  assert (result['bias'] == params['bias']).all()
  no_grads = jax.tree.map(np.zeros_like, grads)
  result = operators.dash(params, no_grads, least=0.3)
  np.testing.assert_allclose(
    result['kernel'], 0.3 * params['kernel'], rtol=1e-6
  )


def test_the_last_blocks_are_fresh_with_their_statistics(network):
  trained, fresh = network
  trained = {
    **trained,
    'batch_stats': jax.tree.map(lambda x: x + 1, trained['batch_stats']),
  }
  result, names = operators.reset_blocks(trained, fresh, 2)
  assert names == ('block3_1', 'block4_1')
  for collection in ('params', 'batch_stats'):
    for name, module in result[collection].items():
      source = fresh if name in names else trained
      assert module is source[collection][name]


def test_blocks_are_in_the_order_of_the_network():
  names = ['block3_2', 'head', 'block3_10', 'block1_1', 'stem_conv']
  names += ['block', 'block_0', 'blocks_1_2', 'block1_1_1']  # Of another net.
  assert operators.list_blocks(dict.fromkeys(names)) == [
    'block1_1',
    'block3_2',
    'block3_10',
  ]


def head(seed, classes, scale=1.0):
  return operators.Head(
    f'stage{seed}',
    classes,
    {
      'kernel': scale * normal(seed, 5, len(classes)),
      'bias': scale * normal(10 + seed, len(classes)),
    },
  )


def test_head_rows_are_found_by_name_in_any_order():
  fresh = head(0, 'abcde').params
  near, far = head(1, 'ca', scale=9.0), head(2, 'xbc', scale=7.0)
  result, given = operators.carry_head_rows(fresh, 'abcde', [near, far])
  assert given == {'stage1': ['a', 'c'], 'stage2': ['b']}
  norm = np.linalg.norm(fresh['kernel'], axis=0).mean()
  near_rows = near.params['kernel'][:, [1, 0]]
  scale = norm / np.linalg.norm(near_rows, axis=0).mean()
  np.testing.assert_allclose(
    result['kernel'][:, [0, 2]], near_rows * scale, rtol=1e-6
  )
  np.testing.assert_allclose(
    result['bias'][[0, 2]], near.params['bias'][[1, 0]] * scale, rtol=1e-6
  )
  assert np.linalg.norm(result['kernel'][:, 1]) == pytest.approx(norm, rel=1e-5)
  for i in (3, 4):
    assert (result['kernel'][:, i] == fresh['kernel'][:, i]).all()
    assert result['bias'][i] == fresh['bias'][i]


def test_a_head_that_is_known_whole_keeps_its_bits():
  fresh, known = head(0, 'abc').params, head(1, 'cab', scale=9.0)
  result, given = operators.carry_head_rows(fresh, 'abc', [known])
  assert given == {'stage1': ['a', 'b', 'c']}
  assert (result['kernel'] == known.params['kernel'][:, [1, 2, 0]]).all()
  assert (result['bias'] == known.params['bias'][[1, 2, 0]]).all()


def test_statistics_of_batches_are_those_of_all_images():
  batches = normal(0, 4, 50, 6) * 3 + normal(1, 4, 1, 6)
  parts = [
    {'norm': {'mean': x.mean(axis=0), 'var': x.var(axis=0)}} for x in batches
  ]
  joined = operators.average_statistics(parts)['norm']
  rows = batches.reshape(-1, 6)
  np.testing.assert_allclose(
    joined['mean'], rows.mean(axis=0), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(joined['var'], rows.var(axis=0), rtol=1e-4)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprog import errors
from jaxprog.models import resnet
from jaxprog.training import state
from jaxprog.training.transfer import carry


def variables(seed, num_classes, image_size=16, **kwargs):
  model = resnet.create_model(
    'resnet10',
    num_classes=num_classes,
    image_size=image_size,
    num_filters=4,
    **kwargs,
  )
  init = functools.partial(state.init_variables, model, image_size)
  fresh = jax.jit(init)(jax.random.key(seed))
  statistics = jax.tree.map(lambda x: x + seed, fresh['batch_stats'])
  return {**fresh, 'batch_stats': statistics}


def same(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_everything_but_the_head_is_carried_bit_for_bit():
  trained, fresh = variables(1, 3), variables(2, 5, image_size=64)
  result = carry.transfer(trained, fresh, 'abc', 'abcde')
  params = dict(result.variables['params'])
  assert same(params.pop('head'), fresh['params']['head'])
  carried = {k: v for k, v in trained['params'].items() if k != 'head'}
  assert same(params, carried)
  assert same(result.variables['batch_stats'], trained['batch_stats'])
  assert result.fresh == result.dropped == ('head',)
  assert set(result.carried) == set(carried)


def test_the_head_is_kept_where_the_classes_are_the_same():
  trained, fresh = variables(1, 3), variables(2, 3)
  result = carry.transfer(trained, fresh, ['a', 'b', 'c'], ('a', 'b', 'c'))
  assert same(result.variables, trained)
  assert result.fresh == result.dropped == ()
  assert 'head' in result.carried


def test_equal_counts_are_not_equal_classes():
  trained, fresh = variables(1, 3), variables(2, 3)
  for other in ('abd', 'acb'):
    result = carry.transfer(trained, fresh, 'abc', other)
    assert same(result.variables['params']['head'], fresh['params']['head'])


@pytest.mark.parametrize('kwargs', [{'stem_kernel': 3}])
def test_another_shape_is_refused(kwargs):
  trained, fresh = variables(1, 3), variables(2, 5, **kwargs)
  with pytest.raises(errors.UserError, match='stem_conv'):
    carry.transfer(trained, fresh, 'abc', 'abcde')


def test_a_missing_module_and_another_dtype_are_refused():
  fresh = variables(2, 5)
  trained = variables(1, 3)
  del trained['batch_stats']['block1_1']
  with pytest.raises(errors.UserError, match='block1_1'):
    carry.transfer(trained, fresh, 'abc', 'abcde')
  trained = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables(1, 3))
  with pytest.raises(errors.UserError, match='bfloat16'):
    carry.transfer(trained, fresh, 'abc', 'abcde')


def test_numpy_weights_are_as_good_as_jax_ones():
  trained = jax.tree.map(np.asarray, variables(1, 3))
  result = carry.transfer(trained, variables(2, 5), 'abc', 'abcde')
  assert same(result.variables['batch_stats'], trained['batch_stats'])

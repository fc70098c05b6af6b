import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler

from jaxprog import errors
from jaxprog.training import devices


@pytest.mark.parametrize(
  ('dtype', 'mixed_precision', 'platform', 'expected'),
  [
    ('auto', True, 'cpu', jnp.float32),
    ('auto', True, 'tpu', jnp.bfloat16),
    ('auto', True, 'gpu', jnp.bfloat16),
    ('auto', False, 'tpu', jnp.float32),
    ('bfloat16', True, 'cpu', jnp.bfloat16),
    ('bfloat16', False, 'cpu', jnp.float32),
    ('float32', True, 'tpu', jnp.float32),
  ],
)
def test_dtype(dtype, mixed_precision, platform, expected):
  assert devices.resolve_dtype(dtype, mixed_precision, platform) == expected


def test_a_silent_fall_back_to_cpu_is_refused():
  devices.check_platform('any')
  devices.check_platform('cpu')
  with pytest.raises(errors.UserError, match="asks for 'tpu', JAX found 'cpu'"):
    devices.check_platform('tpu')


def test_the_compilation_cache_is_private(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  try:
    devices.keep_compiled(tmp_path / 'cache')
    assert (tmp_path / 'cache').stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'cache')
    # Beside it lies which kernels a GPU was quickest with.
    options = compiler.get_compile_options(1, 1).executable_build_options
    kernels = options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
    assert kernels.startswith(f'{tmp_path}/cache/')
    (tmp_path / 'cache').chmod(0o777)
    with pytest.raises(errors.UserError, match='run code here'):
      devices.keep_compiled(tmp_path / 'cache')
    (tmp_path / 'file').write_text('')
    with pytest.raises(errors.UserError, match='no compilation cache'):
      devices.keep_compiled(tmp_path / 'file' / 'cache')
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


def test_no_cache_leaves_jax_as_it_was():
  before = jax.config.jax_compilation_cache_dir
  devices.keep_compiled(None)
  assert jax.config.jax_compilation_cache_dir == before


def test_batches_are_divided_and_states_are_copied():
  shardings = devices.create_shardings()
  n = jax.device_count()
  batch = jax.device_put(jnp.zeros((4 * n, 2)), shardings.batch)
  assert batch.addressable_shards[0].data.shape == (4, 2)
  state = jax.device_put(jnp.zeros((4, 2)), shardings.replicated)
  assert state.addressable_shards[0].data.shape == (4, 2)

import time
import types

import jax
import jax.numpy as jnp
import pytest

from jaxprog.training import compile_times


def create_task(folder, optimizer='adamw'):
  """Returns what compile_times looks at."""
  return types.SimpleNamespace(
    config=types.SimpleNamespace(compilation_cache_dir=str(folder)),
    stage=types.SimpleNamespace(optimizer=optimizer),
    model='network',
    train_steps={'step': None},
  )


def test_what_was_compiled_before_is_known_until_the_cache_is_gone(tmp_path):
  task, other = create_task(tmp_path), create_task(tmp_path, 'lamb')
  assert compile_times.last(task) is None
  with compile_times.noted(task):
    pass
  assert compile_times.last(create_task(tmp_path)) == pytest.approx(0, abs=1)
  assert compile_times.last(other) is None
  (path,) = tmp_path.iterdir()
  path.write_bytes(b'{')
  assert compile_times.last(task) is None
  with compile_times.noted(other):
    pass
  assert compile_times.last(other) is not None


def test_without_a_cache_nothing_is_kept():
  task = create_task('')
  with compile_times.noted(task):
    pass
  assert compile_times.last(task) is None


def test_what_was_read_and_not_compiled_is_no_news(tmp_path):
  def compile_step():
    jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((8, 8))).compile()

  compile_step()  # From here on JAX's cache has it.
  task = create_task(tmp_path)
  with compile_times.noted(task):
    time.sleep(1.0)
  with compile_times.noted(task):
    compile_step()
  assert compile_times.last(task) >= 1.0
  with compile_times.noted(task):
    pass
  assert compile_times.last(task) < 1.0

"""Presets of XLA's flags: set once, beside a user's own."""

import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

from jaxprog import fields, start_from
from jaxprog.training import xla_flags

VARIABLES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')


@pytest.fixture
def environment(monkeypatch):
  for variable in VARIABLES:
    monkeypatch.setenv(variable, '')
  return os.environ


def test_each_platform_hears_of_its_own_flags(environment):
  xla_flags.use('overlap')
  assert (
    '--xla_gpu_enable_latency_hiding_scheduler=true'
    in (environment['XLA_FLAGS'])
  )
  assert 'tpu' not in environment['XLA_FLAGS']
  assert '--xla_enable_async_all_reduce=true' in environment['LIBTPU_INIT_ARGS']


def test_twice_is_once(environment):
  xla_flags.use('deterministic')
  before = environment['XLA_FLAGS']
  xla_flags.use('deterministic')
  assert (
    environment['XLA_FLAGS'] == before == '--xla_gpu_deterministic_ops=true'
  )


def test_a_users_own_flag_wins(environment):
  environment['XLA_FLAGS'] = '--xla_gpu_deterministic_ops=false --other=1'
  xla_flags.use('deterministic')
  assert environment['XLA_FLAGS'] == (
    '--xla_gpu_deterministic_ops=false --other=1'
  )


def test_without_a_preset_nothing_is_set(environment):
  xla_flags.use('none')
  assert not any(environment[x] for x in VARIABLES)


@pytest.mark.parametrize('preset', xla_flags.PRESETS)
def test_xla_knows_every_flag_of_its_own(preset):
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  options = xla_flags.compiler_options(preset, 'gpu')
  assert lowered.compile(compiler_options=options)(1.0) == 2.0


def test_the_config_offers_every_preset():
  assert set(fields.CONFIG['xla_flags'].choices) == set(xla_flags.PRESETS)
  assert start_from('default').xla_flags in xla_flags.PRESETS


def test_short_stages_on_cuda_take_kernels_by_rule(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  cuda, rule = 'PJRT C API\ncuda 13000', {'xla_gpu_autotune_level': 0}
  assert xla_flags.step_options('none', cuda, 499) == rule
  assert xla_flags.step_options('none', cuda.upper(), 499) == rule
  assert xla_flags.step_options('none', cuda, 500) == {}
  assert xla_flags.step_options('none', 'cpu', 499) == {}
  # Triton's deterministic kernels have no rule.
  assert xla_flags.step_options('deterministic', cuda, 499) == {}
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_autotune_level=4')
  assert xla_flags.step_options('none', cuda, 499) == {}


STARTS = """
import os, sys
import jax
import jaxprog

config = jaxprog.load_config('quickstart', {'data_dir': sys.argv[1]})
config.xla_flags = 'deterministic'
config.platform = 'tpu'
try:
  jaxprog.train(config, sys.argv[2])
except jaxprog.UserError as e:
  assert 'JAX found' in str(e), e  # It has looked for devices.
jax.numpy.ones(3) + 1
print(os.environ['XLA_CLIENT_MEM_FRACTION'])
"""


def test_they_are_set_before_jax_starts(tmp_path):
  # What XLA goes by is in what it dumps.
  dump = tmp_path / 'dump'
  env = {**os.environ, 'XLA_FLAGS': f'--xla_dump_to={dump}'}
  found = subprocess.run(
    [sys.executable, '-c', STARTS, tmp_path / 'data', tmp_path / 'run'],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert found.stdout == '0.9\n', found.stderr
  texts = [x.read_text() for x in dump.glob('*debug_options')]
  assert texts
  assert all('xla_gpu_deterministic_ops: true' in x for x in texts)

import os
import pathlib
import subprocess
import sys

import mounts
import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Before jax is imported. Compiled steps are kept between tests, processes and
# test runs.
CACHE = pathlib.Path.home() / '.cache' / 'jaxprog' / 'xla'
CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


# What takes longest comes first, so that workers that each take the next file
# end together.
LONGEST = (
  'tools_compare_test',
  'main_test',
  'training_resume_test',
  'faults_checkpoints_test',
  'reliability_peers_test',
  'tools_check_test',
  'training_transfer_handover_test',
  'training_transfer_hub_test',
  'tools_plan_test',
  'reliability_checkpoints_test',
  'tools_evaluate_test',
  'tools_tune_test',
  'training_rollback_test',
  'tools_prepare_test',
  'training_transfer_pretrained_test',
  'tools_export_test',
  'input_test',
  'controls_test',
  'reliability_lease_test',
  'data_loader_test',
  'models_resnet_test',
  'models_norm_test',
  'tools_dry_run_test',
  'main_bucket_test',
  'tools_probe_test',
  'training_schedule_free_test',
  'training_transfer_teacher_test',
  'training_loop_test',
  'data_shards_test',
  'data_preparation_test',
  'data_hub_test',
  'tools_predict_test',
  'tools_verify_test',
  'configs_test',
  'reliability_watchdog_test',
)


def pytest_configure(config):
  """Keeps pytest-xdist from taking the files with the most tests first."""
  config.option.loadscopereorder = False
  # What takes long is said in a process of its own; here, output is compared.
  from jaxprog.monitoring import activity

  activity.silence()


def pytest_collection_modifyitems(items):
  places = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """A data_dir in which `digits` has been prepared once for all tests."""
  from jaxprog.data import preparation

  path = tmp_path_factory.mktemp('data')
  preparation.load_dataset('digits', path)
  return path


@pytest.fixture(scope='session')
def config(data_dir):
  """The flag for the ladder that most runs of the command line are of."""
  return f'--config=tests/tiny_config.py:{data_dir}'


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 4 MB."""
  with mounts.disk(tmp_path / 'disk') as path:
    yield path


@pytest.fixture(scope='session')
def run_main():
  """Runs the command line as a user does; returns the finished process."""

  def run(*arguments, devices=1, timeout=300):
    env = {
      **os.environ,
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'COLUMNS': '80',
    }
    return subprocess.run(
      [sys.executable, 'main.py', *map(str, arguments)],
      cwd=ROOT,
      env=env,
      capture_output=True,
      text=True,
      timeout=timeout,
    )

  return run


@pytest.fixture(scope='module')
def say(request):
  """Prints at once, whatever pytest captures."""
  capture = request.config.pluginmanager.getplugin('capturemanager')

  def print_now(text):
    with capture.global_and_fixture_disabled():
      print(text, flush=True)

  return print_now


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Lets `make test PARITY=1` fail where a comparison would be skipped."""
  report = yield
  if report.skipped and os.environ.get('JAXPROG_PARITY'):
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ''
    if 'torch' in reason.lower() or 'timm' in reason:
      report.outcome = 'failed'
  return report

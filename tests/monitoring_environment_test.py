import json
import os
import shutil
import subprocess
import sys

import flax
import jax
import numpy as np
import pytest

from jaxprog.monitoring import environment


def test_describes_this_process():
  found = environment.environment()
  assert found['versions']['jax'] == jax.__version__
  assert found['versions']['flax'] == flax.__version__
  assert found['versions']['numpy'] == np.__version__
  assert found['devices']['count'] == len(jax.devices())
  assert found['devices']['platform'] == jax.devices()[0].platform
  assert found['devices']['process_count'] == 1
  assert found['cpu_count'] == os.cpu_count()
  assert found['time'].endswith('+00:00')
  assert json.loads(json.dumps(found)) == found


def describe(root, **variables):
  """Returns what a fresh process finds, from the copy of the program there."""
  code = (
    'import json, sys; from jaxprog.monitoring import environment; '
    'found = environment.environment(); '
    "print(json.dumps([found, 'jax' in sys.modules]))"
  )
  result = subprocess.run(
    (sys.executable, '-c', code),
    cwd=root,
    env={
      **os.environ,
      'PYTHONPATH': str(root),
      'PYTHONDONTWRITEBYTECODE': '1',
      **variables,
    },
    check=True,
    capture_output=True,
    text=True,
  )
  return json.loads(result.stdout)


@pytest.fixture
def copy(tmp_path):
  """The module where no checkout is."""
  package = tmp_path / 'jaxprog' / 'monitoring'
  package.mkdir(parents=True)
  (tmp_path / 'jaxprog' / '__init__.py').touch()
  (package / '__init__.py').touch()
  shutil.copy(environment.__file__, package)
  return tmp_path


def test_asks_no_devices_where_jax_is_not_imported(copy):
  found, imported = describe(copy)
  assert not imported
  assert found['devices'] is None
  assert '-c' in found['command']


def test_names_the_commit_of_its_own_checkout_only(copy):
  def git(*arguments):
    identity = ('-c', 'user.name=n', '-c', 'user.email=e@example.org')
    return subprocess.run(
      ('git', *identity, *arguments),
      cwd=copy,
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()

  if shutil.which('git') is None:
    pytest.skip('git is not installed')
  assert describe(copy, GIT_CEILING_DIRECTORIES='/')[0]['git'] is None
  git('init', '-q')
  # A foreign checkout in which the program happens to lie, untracked.
  git('commit', '-q', '--allow-empty', '-m', 'first')
  assert describe(copy)[0]['git'] is None
  git('add', '.')
  git('commit', '-q', '-m', 'second')
  commit = git('rev-parse', 'HEAD')
  assert describe(copy)[0]['git'] == {'commit': commit, 'dirty': False}
  (copy / 'jaxprog' / '__init__.py').write_text('# changed\n')
  assert describe(copy)[0]['git']['dirty']


def test_lives_without_git(copy):
  assert describe(copy, PATH='/nowhere')[0]['git'] is None

"""What launch/ and the Dockerfile start are command lines of this program."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
import runs
import yaml

from jaxprog import cli, fields

LAUNCH = runs.ROOT / 'launch'
DOCKERFILE = runs.ROOT / 'Dockerfile'
URLS = {'DATA': 'gs://bucket/data', 'WORKDIR': 'gs://bucket/a run'}
# What each needs beside them.
SCRIPTS = {
  'tpu_vm.sh': {},
  'gpus.sh': {},
  'slurm.sbatch': {'SRUN': 'env'},
  'tpu_pod.sh': {'TPU': 'slice', 'ZONE': 'zone'},
  'gke_xpk.sh': {'CLUSTER': 'a', 'TPU_TYPE': 'v5litepod-16', 'IMAGE': 'b'},
}
FLAGS = re.MULTILINE | re.DOTALL
# In place of Python: its arguments, a line each.
PYTHON = 'printf "%s\\n" "$@"'
# In place of gcloud and xpk, which run their last argument on other hosts.
THERE = 'exec bash -c "${!##--command=}"'


def script(path, text):
  path.write_text(f'#!/usr/bin/env bash\n{text}\n')
  path.chmod(0o755)
  return str(path)


def environment(folder, **variables):
  tool = script(folder / 'tool', THERE)
  own = {'GCLOUD': tool, 'XPK': tool, 'REPO': str(runs.ROOT)}
  python = script(folder / 'python', PYTHON)
  return {**os.environ, 'PYTHON': python, **own, **variables}


def read_command(command, env, folder=runs.ROOT):
  """Returns the flags and the overrides that `command` starts jaxprog with."""
  said = subprocess.run(
    command, cwd=folder, env=env, capture_output=True, text=True, check=True
  ).stdout
  arguments = said.rstrip('\n').split('\n')
  assert arguments[:2] == ['-m', 'jaxprog']
  asked = cli.create_flags()
  overrides = cli.parse_flags(asked, arguments[1:])
  cli.check_flags(asked)
  assert {*overrides} <= {*fields.CONFIG}
  return asked, overrides


def extras():
  project = tomllib.loads((runs.ROOT / 'pyproject.toml').read_text())['project']
  return {*project['optional-dependencies']}


def test_launch_scripts_are_bash():
  assert {x.name for x in LAUNCH.iterdir()} == {*SCRIPTS, 'skypilot.yaml'}
  for name in SCRIPTS:
    subprocess.run(['bash', '-n', LAUNCH / name], check=True)


@pytest.mark.parametrize('name', SCRIPTS)
def test_what_a_launch_script_runs_on_each_host(name, tmp_path):
  env = environment(tmp_path, **URLS, **SCRIPTS[name])
  command = ['bash', f'launch/{name}', '--only=a', '--config.seed=3']
  asked, overrides = read_command(command, env)
  assert asked.workdir == URLS['WORKDIR']
  assert asked.only == ['a']
  platform = 'gpu' if name in ('gpus.sh', 'slurm.sbatch') else 'tpu'
  assert overrides == {
    'data_dir': URLS['DATA'],
    'platform': platform,
    'seed': '3',
  }


def test_a_launch_script_says_what_it_needs():
  result = subprocess.run(
    ['bash', 'launch/gpus.sh'],
    cwd=runs.ROOT,
    env={k: v for k, v in os.environ.items() if k not in ('DATA', 'WORKDIR')},
    capture_output=True,
    text=True,
  )
  assert result.returncode != 0
  assert 'a folder with the datasets' in result.stderr


def test_a_signal_to_a_pod_reaches_the_run(tmp_path):
  """The shell that xpk starts in a pod tells its child alone."""
  waits = """trap 'echo saved; exit 143' TERM
echo up
for i in {1..50}; do sleep .1; done
"""
  shell = """exec bash -c "trap 'kill -TERM \\$!' TERM
(${!##--command=}) & wait; wait \\$!"
"""
  process = subprocess.Popen(
    ['bash', 'launch/gke_xpk.sh'],
    cwd=runs.ROOT,
    env=environment(tmp_path, **URLS, **SCRIPTS['gke_xpk.sh'])
    | {'PYTHON': script(tmp_path / 'run', waits)}
    | {'XPK': script(tmp_path / 'xpk', shell)},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'up\n'
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=30)[0] == 'saved\n'
  assert process.returncode == 143


def test_the_skypilot_task_keeps_its_run_in_a_bucket(tmp_path):
  task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
  needed = [name for name, value in task['envs'].items() if value is None]
  assert needed == ['BUCKET']  # SkyPilot refuses to start without it.
  for part in ('setup', 'run'):
    subprocess.run(['bash', '-n'], input=task[part], text=True, check=True)
  named = re.search(r"'\.\[(.*)\]'", task['setup'])[1].split(',')
  assert {*named} <= extras()

  for name in ('configs', 'launch'):
    (tmp_path / name).symlink_to(runs.ROOT / name)
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  script(tmp_path / '.venv' / 'bin' / 'python', PYTHON)
  env = {**os.environ, **task['envs'], 'BUCKET': 's3://bucket/a'}
  asked, overrides = read_command(['bash', '-c', task['run']], env, tmp_path)
  assert asked.config == 'quickstart'
  assert overrides['mirror'] == 's3://bucket/a'
  assert overrides['data_dir'] == task['envs']['DATA']


def test_the_image_has_all_that_the_program_needs(tmp_path):
  ignored = (runs.ROOT / '.dockerignore').read_text()
  for name in re.findall('^!(.+)$', ignored, re.MULTILINE):
    copy = shutil.copytree if (runs.ROOT / name).is_dir() else shutil.copy
    copy(runs.ROOT / name, tmp_path / name)
  said = subprocess.run(
    [sys.executable, '-m', 'jaxprog', '--version'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert said.startswith('jaxprog ')
  project = tomllib.loads((tmp_path / 'pyproject.toml').read_text())['project']
  assert (tmp_path / project['readme']).is_file()
  entry = re.search('^ENTRYPOINT (.+)$', DOCKERFILE.read_text(), re.MULTILINE)
  assert {*json.loads(entry[1])} <= {*project['scripts']}


@pytest.mark.parametrize(
  ('extra', 'code'), [('cpu', 0), ('cuda', 0), ('tpu', 0), ('gpu', 2)]
)
def test_what_the_image_installs(extra, code):
  """Its RUN instruction, with other commands in the place of root's."""
  steps = re.search(r'^RUN .*?\n(.*?[^\\]\n)', DOCKERFILE.read_text(), FLAGS)[1]
  quiet = ''.join(f'{x}() {{ :; }}\n' for x in ('useradd', 'mkdir', 'chown'))
  result = subprocess.run(
    ['sh', '-c', f'pip() {{ echo "$3"; }}\n{quiet}{steps}'],
    env={**os.environ, 'EXTRA': extra},
    capture_output=True,
    text=True,
  )
  assert result.returncode == code
  if code == 0:
    named = {*result.stdout.strip()[2:-1].split(',')}
    assert named - {'cpu'} <= extras()
    assert {'gcs', 's3', 'tune', extra} - {'cpu'} == named

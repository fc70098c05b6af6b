"""Comparisons on a Ray cluster, whose hosts are lost, stopped and woken up."""

import csv
import json
import os
import signal
import subprocess
import sys
import sysconfig
import venv

import pytest
import ray_cluster
import runs

from jaxprog import files
from jaxprog.reliability import lock

pytest.importorskip('ray')
pytestmark = [pytest.mark.faults, pytest.mark.slow]

CONFIG = 'tests/cluster_config.py'


@pytest.fixture(scope='module')
def cluster():
  found = ray_cluster.Cluster()
  yield found
  found.close()


def start(config, workdir, *arguments, cluster=None, cores=None):
  """Starts a comparison: on a cluster, or on some cores of this process."""
  if cluster:
    address = f'--config.ray.address={cluster.address}'
    arguments = '--config.engine=ray', address, *arguments
  return subprocess.Popen(
    [
      *(sys.executable, 'main.py', '--mode=compare'),
      f'--config={config}',
      f'--workdir={workdir}',
      *arguments,
    ],
    cwd=runs.ROOT,
    env=cluster and cluster.environ,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    preexec_fn=cores and (lambda: os.sched_setaffinity(0, cores)),
  )


def finish(process, code=0):
  output = process.communicate(timeout=900)[0]
  assert process.returncode == code, output
  return output


def read_table(workdir, name='comparison_cells'):
  with open(workdir / f'{name}.csv', newline='') as file:
    return [
      {k: v for k, v in row.items() if k not in ('seconds', 'workdir', 'host')}
      for row in csv.DictReader(file)
    ]


def read_runs(workdir):
  """Returns what a comparison holds of its runs, but for the clock."""
  found = json.loads((workdir / 'comparison.json').read_text())['runs']
  for run in found:
    for point in (*run['curve'], *run['boundaries']):
      for key in [x for x in point if x.endswith('seconds')]:
        del point[key]
    for key in ('workdir', 'host', 'shared', 'resumed'):
      del run[key]
  return found


def list_runs(workdir):
  return sorted(x.parent for x in workdir.glob('cells/*/*/config.json'))


def assert_same_bits(workdir, other):
  for run in list_runs(workdir):
    twin = other / run.relative_to(workdir)
    assert runs.bits(run, 'ten') == runs.bits(twin, 'ten')
    assert runs.without_times(runs.read_history(run)) == runs.without_times(
      runs.read_history(twin)
    )


def find_owners(workdir):
  """Returns the runs that a process has, and which process that is."""
  found = {}
  for path in workdir.glob('cells/*/*/run.lock'):
    try:
      owner = json.loads(path.read_text())
    except (OSError, ValueError):
      continue
    with open(path) as file:
      try:
        files.lock(file.fileno(), wait=False)
      except BlockingIOError:
        found[path.parent] = owner['pid']
  return found


def count_epochs(run):
  try:
    return len(runs.read_history(run)['stages'][0]['epochs'])
  except (OSError, ValueError, LookupError):
    return 0


def wait_for_epochs(process, workdir, count):
  """Returns the owners of both runs as soon as both have had some epochs.

  Who is ahead sleeps until the other one is there.
  """
  asleep = {}

  def look():
    for run, pid in find_owners(workdir).items():
      if run not in asleep and count_epochs(run) >= count:
        os.kill(pid, signal.SIGSTOP)
        asleep[run] = pid
    return len(asleep) == 2

  ray_cluster.wait_until(look, process)
  for pid in asleep.values():
    os.kill(pid, signal.SIGCONT)
  return asleep


@pytest.fixture(scope='module')
def long(data_dir, tmp_path_factory):
  """Two runs that were never interrupted, on one core."""
  workdir = tmp_path_factory.mktemp('long')
  finish(start(f'{CONFIG}:long:{data_dir}', workdir, cores={0}))
  return workdir


def test_runs_side_by_side_end_with_the_table_of_one_after_the_other(
  cluster, data_dir, tmp_path
):
  config = f'{CONFIG}:{data_dir}'
  output = finish(start(config, tmp_path / 'ray', cluster=cluster))
  finish(start(config, tmp_path / 'serial', cores={0}))
  both = [tmp_path / x for x in ('serial', 'ray')]
  assert 'run 24 of 24' in output
  for name in ('comparison_cells', 'comparison_runs'):
    tables = [read_table(workdir, name) for workdir in both]
    assert tables[0] == tables[1]
  assert len(read_runs(both[0])) == 24
  assert read_runs(both[0]) == read_runs(both[1])
  assert_same_bits(*both)
  found = json.loads((both[1] / 'comparison.json').read_text())['runs']
  for seed in range(4):  # The first stage of all cells.
    own = [x for x in found if x['seed'] == seed and not x['shared']]
    assert len(own) == 1


def test_a_host_that_is_lost_costs_no_bit(cluster, data_dir, long, tmp_path):
  process = start(f'{CONFIG}:long:{data_dir}', tmp_path, cluster=cluster)
  owners = wait_for_epochs(process, tmp_path, 2)
  host = cluster.hosts.pop()
  lost = [x for x in owners if owners[x] in ray_cluster.list_tree(host)]
  ray_cluster.signal_tree(host, signal.SIGKILL)
  cluster.hosts.append(cluster.add_host({}))
  output = finish(process)
  assert len(lost) == 1
  assert 'its process or host died' in output
  stage = runs.read_history(lost[0])['stages'][0]
  assert len(stage['resumed_at_steps']) == 1
  assert_same_bits(tmp_path, long)


def test_a_host_that_wakes_up_writes_nothing_beside_its_successor(
  cluster, data_dir, long, tmp_path
):
  process = start(f'{CONFIG}:long:{data_dir}', tmp_path, cluster=cluster)
  owners = wait_for_epochs(process, tmp_path, 2)
  host = cluster.hosts.pop()
  (asleep,) = [x for x in owners if owners[x] in ray_cluster.list_tree(host)]
  ray_cluster.signal_tree(host, signal.SIGSTOP)
  cluster.hosts.append(cluster.add_host({}))
  output = ''
  while 'its process or host died' not in output:
    line = process.stdout.readline()
    assert line, output
    output += line
  other = next(x for x in owners if x != asleep)
  ray_cluster.wait_until((other / 'outcome.json').exists, process)
  # It still has its run, and whoever is to go on with it waits.
  assert find_owners(tmp_path) == {asleep: owners[asleep]}
  ray_cluster.signal_tree(host, signal.SIGCONT)
  finish(process)
  assert_same_bits(tmp_path, long)


def test_a_run_that_another_process_has_is_waited_for(
  cluster, data_dir, long, tmp_path
):
  run, other = (
    tmp_path / 'cells' / cell / 'seed-0' for cell in ('adamw', 'sgd_momentum')
  )
  with lock.Lock(run):
    process = start(f'{CONFIG}:long:{data_dir}', tmp_path, cluster=cluster)
    ray_cluster.wait_until((other / 'outcome.json').exists, process)
    assert not (run / 'config.json').exists()
  finish(process)
  assert_same_bits(tmp_path, long)


def test_a_driver_that_is_stopped_or_killed_leaves_no_run_behind(
  cluster, data_dir, long, tmp_path
):
  command = f'{CONFIG}:long:{data_dir}', tmp_path
  process = start(*command, cluster=cluster)
  wait_for_epochs(process, tmp_path, 2)
  process.send_signal(signal.SIGTERM)
  finish(process, 128 + signal.SIGTERM)
  assert not find_owners(tmp_path)
  assert not list(tmp_path.glob('cells/*/*/outcome.json'))
  process = start(*command, cluster=cluster)
  wait_for_epochs(process, tmp_path, 4)
  process.kill()
  process.communicate()
  ray_cluster.wait_until(lambda: not find_owners(tmp_path))
  assert not list(tmp_path.glob('cells/*/*/outcome.json'))
  finish(start(*command, cluster=cluster))
  assert_same_bits(tmp_path, long)


def test_a_client_of_a_cluster_compares_as_a_host_of_it(
  cluster, data_dir, long, tmp_path
):
  address = f'--config.ray.address={cluster.client_address}'
  config = f'{CONFIG}:long:{data_dir}'
  finish(start(config, tmp_path, address, cluster=cluster))
  assert_same_bits(tmp_path, long)


def create_python(folder, package, version):
  """Returns a Python with all that this one has, one package by its name."""
  venv.create(folder, with_pip=False)
  (site,) = folder.glob('lib/python*/site-packages')
  (site / 'others.pth').write_text(f'{sysconfig.get_path("purelib")}\n')
  info = site / f'{package}-{version}.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text(f'Name: {package}\nVersion: {version}\n')
  return folder / 'bin' / 'python'


def test_hosts_that_are_unlike_are_refused(data_dir, tmp_path):
  kinds = [{'chip': 1, f'accelerator_type:{x}': 1} for x in ('A100', 'H100')]
  cluster = ray_cluster.Cluster(resources=kinds)
  try:
    command = f'{CONFIG}:long:{data_dir}', tmp_path / 'new'
    chip = '--config.ray.resources=chip=1'
    seconds = '--config.budget=seconds'
    output = finish(start(*command, chip, seconds, cluster=cluster), 2)
    assert 'only equal on equal devices' in output
    assert all(x in output for x in ('A100 (', 'H100 ('))
    chip = '--config.ray.resources=chip=2'
    output = finish(start(*command, chip, cluster=cluster), 2)
    assert 'No host of the cluster has what a run takes' in output
    python = create_python(tmp_path / 'python', 'optax', '0.0.1')
    cluster.add_host({}, python)
    output = finish(start(*command, cluster=cluster), 2)
    assert 'has optax 0.0.1, this one' in output
    assert not (tmp_path / 'new').exists()
  finally:
    cluster.close()

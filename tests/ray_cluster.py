"""A Ray cluster of several hosts on this machine, any of which can be lost."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import runs

# A host of which nothing is heard for about two seconds counts as lost.
_HEALTH = {
  'RAY_health_check_initial_delay_ms': '500',
  'RAY_health_check_period_ms': '500',
  'RAY_health_check_timeout_ms': '500',
  'RAY_health_check_failure_threshold': '4',
}
_LIMIT_SECONDS = 600


class Cluster:
  """A head without cores, and hosts of one core each that are added to it."""

  def __init__(self, resources=({}, {})):
    self._folder = tempfile.mkdtemp(prefix='ray-')
    port, client_port = _free_port(), _free_port()
    self.address = f'127.0.0.1:{port}'
    self.client_address = f'ray://127.0.0.1:{client_port}'
    # What a process has that knows this cluster's token.
    self.environ = {
      **os.environ,
      'RAY_AUTH_MODE': 'token',
      'RAY_AUTH_TOKEN': secrets.token_hex(32),
    }
    self._stack = contextlib.ExitStack()
    self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
    try:
      self._start(
        '--head',
        f'--port={port}',
        f'--ray-client-server-port={client_port}',
        '--include-dashboard=false',
        f'--temp-dir={self._folder}',
        '--num-cpus=0',
      )
      self.hosts = [self.add_host(x) for x in resources]
    except BaseException:
      self.close()
      raise

  def add_host(self, resources, python=sys.executable):
    return self._start(
      f'--address={self.address}',
      '--num-cpus=1',
      '--min-worker-port=0',
      '--max-worker-port=0',
      f'--resources={json.dumps(resources)}',
      python=python,
    )

  def close(self):
    self._stack.close()

  def _start(self, *arguments, python=sys.executable):
    ray = python, '-m', 'ray.scripts.scripts'
    process = subprocess.Popen(
      [*ray, 'start', '--block', '--disable-usage-stats', *arguments],
      env={**self.environ, **_HEALTH, 'PYTHONPATH': str(runs.ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
    self._stack.callback(signal_tree, process.pid, signal.SIGKILL)
    output = ''
    while 'Ray runtime started' not in output:
      line = process.stdout.readline()
      assert line, output
      output += line
    return process.pid


def _free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def list_tree(pid):
  """Returns a process and all that it has begun."""
  parents = {}
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):
      fields = path.read_text().rpartition(')')[2].split()
      parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
  found = [pid]
  for parent in found:
    found += parents.get(parent, [])
  return found


def signal_tree(pid, signum):
  """Signals a host: its Ray, and all runs on it."""
  for found in list_tree(pid):
    with contextlib.suppress(ProcessLookupError):
      os.kill(found, signum)


def wait_until(condition, process=None):
  """Waits until `condition` returns what is true, and returns that."""
  deadline = time.monotonic() + _LIMIT_SECONDS
  while time.monotonic() < deadline:
    if found := condition():
      return found
    if process is not None and process.poll() is not None:
      raise AssertionError(process.communicate()[0])
    time.sleep(0.01)
  raise AssertionError('It never came.')

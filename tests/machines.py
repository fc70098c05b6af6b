"""Machines that share nothing but a bucket.

    python tests/machines.py HOST SECONDS ARGUMENTS

starts the command line as on HOST. A lease of which nothing is seen is taken
over after SECONDS, and a bucket follows in a tenth of that.
"""

import os
import pathlib
import platform
import subprocess
import sys
import time

import runs

from jaxprog import buckets
from jaxprog.reliability import copies

SECONDS = 6
_LIMIT_SECONDS = 300


class Machine:
  """A host that has a disk of its own, below `folder`."""

  def __init__(self, folder: pathlib.Path, host: str) -> None:
    self.host, self.cache = host, folder / host

  @property
  def environ(self) -> dict[str, str]:
    # Not the program that is installed.
    return {'JAXPROG_CACHE_DIR': str(self.cache), 'PYTHONPATH': str(runs.ROOT)}

  @property
  def program(self) -> tuple[str, ...]:
    return 'tests/machines.py', self.host, str(SECONDS)

  def copy(self, url: str) -> pathlib.Path:
    return buckets.copy_of(url, self.cache)

  def start(self, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
      [sys.executable, *self.program, *map(str, arguments)],
      cwd=runs.ROOT,
      env={**os.environ, **self.environ, 'COLUMNS': '80'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def call(self, *arguments: object) -> subprocess.CompletedProcess:
    with self.start(*arguments) as process:
      try:
        out, err = process.communicate(timeout=_LIMIT_SECONDS)
      finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns the files of a run that belong into a bucket."""
  return {name: (folder / name).read_bytes() for name in copies.scan(folder)}


def objects(server, url: str) -> dict[str, bytes]:
  """Returns the objects of a run but its leases."""
  bucket, _, path = url.removeprefix('gs://').partition('/')
  prefix = f'{path}/' if path else ''
  return {
    name.removeprefix(prefix): data
    for name, data in server.objects(bucket).items()
    if name.startswith(prefix) and not name.startswith(f'{prefix}lease/')
  }


def until(condition, seconds: float = 60.0) -> float:
  """Returns after how many seconds a condition was true."""
  began = time.monotonic()
  while not condition():
    assert time.monotonic() < began + seconds, 'It does not come.'
    time.sleep(0.02)
  return time.monotonic() - began


def main() -> None:
  _, host, seconds, *arguments = sys.argv
  sys.argv[1:] = arguments
  platform.node = lambda: host
  from jaxprog import cli
  from jaxprog.reliability import lock, mirror

  patience = float(seconds)
  mirror._LOOK_SECONDS = patience / 10
  times = {'beat_seconds': patience / 3, 'patience_seconds': patience}
  lock.Lock.__init__.__kwdefaults__.update(times)
  cli.start()


if __name__ == '__main__':
  main()

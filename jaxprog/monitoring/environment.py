"""What a run ran on."""

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

from jaxprog import errors

_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'clu',
  'opencv-python-headless',
  'ml_collections',
  'numpy',
  'tensorflow',
  'tensorflow-cpu',
  'tensorflow-datasets',
)


def environment() -> dict[str, Any]:
  """Returns what environment.json holds: time, machine, versions, devices.

  Never fails for something that is missing: a package that is not installed
  is left out, and 'git' and 'devices' are None where there are none. Devices
  are listed only if JAX was imported before: asking starts its backend.
  """
  now = datetime.datetime.now(datetime.UTC)
  return {
    'time': now.isoformat(timespec='seconds'),
    'host': platform.node(),
    'platform': platform.platform(),
    'cpu_count': os.cpu_count(),
    'cpu': processor(),
    'memory_bytes': _memory(),
    'python': platform.python_version(),
    'versions': versions(),
    'devices': _devices(),
    'git': _git(pathlib.Path(__file__).parent),
    'command': errors.without_passwords(shlex.join(sys.orig_argv)),
  }


def processor() -> str:
  """Returns the model of the processor, its architecture where none is said."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      name, _, value = line.partition(':')
      if name.strip() == 'model name':
        return value.strip()
  return platform.processor() or platform.machine()


def _memory() -> int | None:
  """Returns the bytes of the machine's memory, None where none is said."""
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (OSError, ValueError):
    return None


def versions() -> dict[str, str]:
  """Returns the versions of the packages that a run computes with."""
  found = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def _devices() -> dict[str, Any] | None:
  jax = sys.modules.get('jax')
  if jax is None:
    return None
  stats = jax.local_devices()[0].memory_stats() or {}
  return {
    'platform': jax.default_backend(),
    'kind': jax.devices()[0].device_kind,
    'memory_bytes': stats.get('bytes_limit'),
    'count': jax.device_count(),
    'process_count': jax.process_count(),
  }


def _git(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the commit of this program's checkout, None outside of one.

  Only where this file is tracked: a copy installed below some other project's
  checkout must not carry that project's commit.
  """
  try:
    _run_git(folder, 'ls-files', '--error-unmatch', '__init__.py')
    commit = _run_git(folder, 'rev-parse', 'HEAD')
    dirty = bool(_run_git(folder, 'status', '--porcelain'))
  except (OSError, subprocess.SubprocessError):
    return None
  return {'commit': commit, 'dirty': dirty}


def _run_git(folder: pathlib.Path, *arguments: str) -> str:
  return subprocess.run(
    ('git', '-C', str(folder), *arguments),
    check=True,
    capture_output=True,
    text=True,
    timeout=10,
  ).stdout.strip()

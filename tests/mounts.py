"""File systems that are mounted while a test lasts, where one may."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def mounted(path, *options):
  """Mounts at `path`, once with each of the `options`; yields it."""
  path.mkdir(exist_ok=True)
  for arguments in options:
    done = subprocess.run(['mount', *arguments, path], capture_output=True)
    if done.returncode:
      pytest.skip(f'Cannot mount: {done.stderr.decode()}')
  try:
    yield path
  finally:
    # Lazily: readers may not have let go of their files.
    subprocess.run(['umount', '--lazy', path], check=True)


def disk(path, options='size=4m'):
  """Mounts a disk in memory."""
  return mounted(path, ('-t', 'tmpfs', '-o', options, 'tmpfs'))


@contextlib.contextmanager
def read_only(folder):
  """Lets nobody write to a folder, not even root."""
  with mounted(folder, ('--bind', folder), ('-o', 'remount,bind,ro')):
    with pytest.raises(OSError, match='Read-only'):
      (folder / 'x').touch()
    yield

"""Tells whole checkpoints from damaged and from unfinished ones.

A step's directory ends with a manifest: the SHA-256 and the size of each of
its files. Before a save begins, a marker `.saving-STEP` is laid beside where
the step will be; it goes once the manifest is there. So a step without a
manifest is unfinished if it has a marker, and damaged if it has none.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxprog import files

MANIFEST = 'manifest.json'
_MARKER, _REPLACED, _REMOVED = '.saving-', '.replaced-', '.removed-'
_ORBAX = '.orbax-checkpoint-tmp'


class DamagedError(RuntimeError):
  """A checkpoint that is needed is not what was saved."""


class SaveError(RuntimeError):
  """A checkpoint could not be written."""


class Condition(NamedTuple):
  """What became of one checkpoint; `status` is intact, damaged, unfinished."""

  stage: str
  name: str
  step: int
  status: str
  detail: str
  bytes: int


def write_manifest(directory: pathlib.Path) -> None:
  """Writes the manifest of a committed step, once its files are on disk.

  A file system that writes late says only now that it is full.
  """
  for path in _files(directory):
    with open(path, 'rb') as file:
      os.fsync(file.fileno())
  files.write_bytes(directory / MANIFEST, _describe(directory))


def find_damage(directory: pathlib.Path) -> str:
  """Returns how a step differs from its manifest, '' if it does not."""
  if not (directory / MANIFEST).is_file():
    return f'no {MANIFEST}'
  try:
    written = (directory / MANIFEST).read_bytes()
    found = _describe(directory)
  except OSError as e:
    return f'unreadable: {e}'
  return '' if written == found else _differences(written, found)


def list_steps(directory: pathlib.Path) -> list[int]:
  """Returns the steps that lie in `directory`, finished or not, ascending."""
  if not directory.is_dir():
    return []
  names = [path.name for path in directory.iterdir() if path.is_dir()]
  return sorted(int(x) for x in names if x.isdecimal() and x == str(int(x)))


def list_finished(directory: pathlib.Path) -> list[int]:
  """Returns the steps of which nobody is still writing, ascending."""
  steps = list_steps(directory)
  return [step for step in steps if not _is_unfinished(directory, step)]


def begin(directory: pathlib.Path, step: int) -> None:
  """Lays the marker of a save that is about to begin.

  Steps that it makes obsolete, from `step` on, step aside until it is whole.
  """
  files.write_bytes(_marker(directory, step), b'')
  for old in list_steps(directory):
    if old >= step:
      os.replace(directory / str(old), directory / f'{_REPLACED}{old}')


def finish(directory: pathlib.Path, step: int) -> None:
  """Completes a committed save: the manifest, then off with the marker."""
  write_manifest(directory / str(step))
  _marker(directory, step).unlink(missing_ok=True)
  for path in directory.glob(f'{_REPLACED}*'):
    shutil.rmtree(path)


def _is_unfinished(directory: pathlib.Path, step: int) -> bool:
  """Returns whether the save of `step`, or its hashing, was cut short."""
  written = (directory / str(step) / MANIFEST).exists()
  return not written and _marker(directory, step).exists()


def inspect(directory: pathlib.Path) -> Iterator[Condition]:
  """Yields what became of each step in STAGE/NAME; nothing is changed."""
  stage, name = directory.parent.name, directory.name
  for step in list_steps(directory):
    path = directory / str(step)
    if _is_unfinished(directory, step):
      status, detail = 'unfinished', 'its save was interrupted'
    else:
      detail = find_damage(path)
      status = 'damaged' if detail else 'intact'
    if path.is_dir():  # A run may have removed it meanwhile.
      yield Condition(stage, name, step, status, detail, _size(path))
  for path in _leftovers(directory):
    detail = f'left behind: {path.name}'
    step = int(''.join(re.findall(r'\d+', path.name)[:1]) or -1)
    yield Condition(stage, name, step, 'unfinished', detail, _size(path))


def sweep(directory: pathlib.Path) -> None:
  """Removes what an interrupted save has left; what it replaced comes back."""
  markers = list(directory.glob(f'{_MARKER}*'))
  names = [path.name.removeprefix(_MARKER) for path in markers]
  steps = [int(name) for name in names if name.isdecimal()]
  interrupted = [step for step in steps if _is_unfinished(directory, step)]
  for step in interrupted:
    remove(directory, step)
  if interrupted:
    for path in directory.glob(f'{_REPLACED}*'):
      os.replace(path, directory / path.name.removeprefix(_REPLACED))
  for path in _leftovers(directory):
    shutil.rmtree(path)
  for path in [*markers, *directory.glob(f'.{_MARKER}*.tmp')]:
    path.unlink()


def remove(directory: pathlib.Path, step: int) -> None:
  """Removes a step; whoever looks sees all of it or nothing."""
  gone = directory / f'{_REMOVED}{step}'
  shutil.rmtree(gone, ignore_errors=True)
  with contextlib.suppress(FileNotFoundError):
    os.replace(directory / str(step), gone)
    shutil.rmtree(gone)


def quarantine(path: pathlib.Path, stage: pathlib.Path) -> pathlib.Path:
  """Moves a damaged step or file of `stage` aside; returns where it is now."""
  base = stage / 'quarantine' / '-'.join(path.relative_to(stage).parts)
  base.parent.mkdir(exist_ok=True)
  target, number = base, 1
  while os.path.lexists(target):
    number += 1
    target = base.with_name(f'{base.name}.{number}')
  os.rename(path, target)
  return target


def sign(value: dict[str, Any]) -> dict[str, Any]:
  """Returns `value` as JSON will give it back, with its own 'sha256'."""
  plain = files.plain(value)
  return {**plain, 'sha256': _digest(plain)}


def read_signed(path: pathlib.Path) -> dict[str, Any]:
  """Returns what was given to `sign`.

  Raises:
    DamagedError: if the file holds anything else.
  """
  try:
    value = json.loads(path.read_bytes())
    digest = value.pop('sha256')
  except (ValueError, KeyError, AttributeError, TypeError):
    value, digest = {}, ''
  if digest != _digest(value):
    raise DamagedError(f'{path} is damaged.')
  return value


def _digest(value: dict[str, Any]) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _marker(directory: pathlib.Path, step: int) -> pathlib.Path:
  return directory / f'{_MARKER}{step}'


def _leftovers(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns what orbax was writing and we were replacing or removing."""
  if not directory.is_dir():
    return []
  return sorted(
    path
    for path in directory.iterdir()
    if _ORBAX in path.name or path.name.startswith((_REMOVED, _REPLACED))
  )


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns everything below `directory` but directories and the manifest."""
  return [
    path
    for path in sorted(directory.rglob('*'))
    if (path.is_symlink() or not path.is_dir()) and path != directory / MANIFEST
  ]


def _describe(directory: pathlib.Path) -> bytes:
  """Returns the manifest of the files that are there."""
  described = {}
  for path in _files(directory):
    found = {'sha256': 'not a file', 'size': 0}
    if path.is_file():  # Reading from a pipe would never end.
      found = {'sha256': files.digest(path), 'size': path.stat().st_size}
    described[path.relative_to(directory).as_posix()] = found
  text = json.dumps({'version': 1, 'files': described}, indent=1)
  return f'{text}\n'.encode()


def _differences(written: bytes, described: bytes) -> str:
  """Returns the first file that differs, and how many others do."""
  found = json.loads(described)['files']
  try:
    expected = json.loads(written)['files']
    if not all(isinstance(expected[name]['size'], int) for name in expected):
      raise TypeError
  except (ValueError, KeyError, TypeError):
    return f'{MANIFEST} is unreadable'
  texts = [
    f'{name}: {_difference(expected.get(name), found.get(name))}'
    for name in sorted({*expected, *found})
    if expected.get(name) != found.get(name)
  ]
  more = f', and {len(texts) - 1} more' if len(texts) > 1 else ''
  return texts[0] + more if texts else f'{MANIFEST} is not as it was written'


def _difference(
  expected: dict[str, Any] | None, found: dict[str, Any] | None
) -> str:
  if expected is None or found is None:
    return 'missing' if found is None else 'does not belong here'
  if expected['size'] != found['size']:
    return f'{found["size"]:,} bytes of {expected["size"]:,}'
  return 'its SHA-256 is another'


def _size(directory: pathlib.Path) -> int:
  total = 0
  for path in directory.rglob('*'):
    with contextlib.suppress(FileNotFoundError):
      total += 0 if path.is_dir() else path.lstat().st_size
  return total

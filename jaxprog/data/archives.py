"""Archives of raw datasets: fetched, compared with their sums, unpacked.

An archive is a stranger's list of paths: everything about it is checked before
anything is written.
"""

import contextlib
import fcntl
import hashlib
import http.client
import lzma
import os
import pathlib
import re
import shutil
import stat
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from jaxprog import errors

# Called with what is done and all there is: bytes, or members of an archive.
Progress = Callable[[int, int], None]

BLOCK = 1 << 20
# What the readers of damaged archives raise.
_READ_ERRORS = (
  EOFError,
  NotImplementedError,
  OSError,
  RuntimeError,
  lzma.LZMAError,
  tarfile.TarError,
  zipfile.BadZipFile,
  zlib.error,
)


class Archive(NamedTuple):
  """A published archive."""

  url: str
  sha256: str


# Imagenette's sum is the one that tfds 4.9 registers; Tiny ImageNet's authors
# publish none: this is the sum on which public users of their 248,100,043
# bytes agree.
KNOWN = {
  'imagenette': Archive(
    'https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz',
    '6cbfac238434d89fe99e651496f0812ebc7a10fa62bd42d6874042bf01de4efd',
  ),
  'tiny_imagenet': Archive(
    'http://cs231n.stanford.edu/tiny-imagenet-200.zip',
    '6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821',
  ),
}


class _Member(NamedTuple):
  """What an archive says of one of its members."""

  name: str
  size: int
  # '' for a file or a folder, else what it is instead.
  refused: str


def sha256_file(
  path: str | os.PathLike[str], progress: Progress | None = None
) -> str:
  """Returns the SHA-256 of a file as 64 hexadecimal digits.

  Raises:
    UserError: if it cannot be read.
  """
  path = pathlib.Path(path)
  digest, done = hashlib.sha256(), 0
  try:
    total = path.stat().st_size
    with open(path, 'rb') as file:
      while block := file.read(BLOCK):
        digest.update(block)
        done += len(block)
        if progress:
          progress(done, total)
  except OSError as e:
    raise errors.UserError(
      f'The archive cannot be read: {e.strerror}.', str(path)
    ) from e
  return digest.hexdigest()


def download(
  url: str,
  path: str | os.PathLike[str],
  sha256: str,
  progress: Progress | None = None,
) -> None:
  """Fetches `url` to `path`, which is there only with the right SHA-256.

  Until then it is PATH.part. A file that is there already is kept if its sum
  is right.

  Raises:
    UserError: if it cannot be fetched or its sum is another; then nothing is
      left of it.
  """
  path = pathlib.Path(path)
  if path.is_file() and sha256_file(path, progress) == sha256:
    return
  part = path.with_name(f'{path.name}.part')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _fetch(url, part, progress)
    _compare(url, sha256, sha256_file(part, progress))
    part.rename(path)
  except (OSError, http.client.HTTPException) as e:
    raise errors.UserError(
      f'The download failed: {e}.',
      f'{url} to {path}',
      'Try again where there is a network and room.',
    ) from e
  finally:
    part.unlink(missing_ok=True)


def extract(
  archive: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  *,
  sha256: str,
  expected: Collection[str] = (),
  progress: Progress | None = None,
) -> tuple[pathlib.Path, ...]:
  """Returns what a .tar, .tar.gz or .zip holds at its top, now in `folder`.

  It unpacks beside them and is renamed when complete, so that an interrupted
  call leaves nothing that looks finished. Unless `expected` is empty, one of
  these names must be at its top.

  Raises:
    UserError: if its sum is another, it holds what could be written elsewhere
      (absolute paths, '..', links, devices), there is no room, or what it
      holds is there already. Nothing has been written then.
  """
  archive, folder = pathlib.Path(archive), pathlib.Path(folder)
  _compare(archive, sha256, sha256_file(archive, progress))
  with _reading(archive):
    members = _list_members(archive)
  tops = _check_members(archive, members, expected)
  existed = folder.is_dir()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
      _check_target(archive, folder, tops, sum(x.size for x in members))
      return _unpack(archive, folder, tops, len(members), progress)
  except OSError as e:
    raise errors.UserError(
      f'Cannot unpack: {e.strerror or e}.', f'{archive} to {folder}'
    ) from e
  finally:
    if not existed:
      with contextlib.suppress(OSError):
        folder.rmdir()  # Only if it is empty.


def _compare(path: str | os.PathLike[str], expected: str, found: str) -> None:
  if found != expected.strip().lower():
    raise errors.UserError(
      f'The SHA-256 of {os.fspath(path)} is wrong.',
      f'expected {expected}, found {found}',
      'It is damaged or another version: fetch it again. It was not used.',
    )


def _fetch(url: str, part: pathlib.Path, progress: Progress | None) -> None:
  with urllib.request.urlopen(url, timeout=30) as response:
    total, done = int(response.headers.get('Content-Length') or 0), 0
    with open(part, 'wb') as file:
      while block := response.read(BLOCK):
        file.write(block)
        done += len(block)
        if progress:
          progress(done, max(total, done))


@contextlib.contextmanager
def _reading(archive: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except _READ_ERRORS as e:
    if isinstance(e, OSError) and e.errno is not None:
      raise  # The disk's fault, not the archive's.
    raise errors.UserError(
      f'The archive cannot be read: {" ".join(str(e).split())}.',
      str(archive),
      'A .tar, .tar.gz, .tgz or .zip without a password is expected.',
    ) from e


def _list_members(archive: pathlib.Path) -> list[_Member]:
  if zipfile.is_zipfile(archive):
    with zipfile.ZipFile(archive) as zipped:
      return [
        _Member(x.orig_filename, x.file_size, _zip_refusal(x))
        for x in zipped.infolist()
      ]
  with tarfile.open(archive) as tar:
    return [_Member(x.name, x.size, _tar_refusal(x)) for x in tar]


def _tar_refusal(member: tarfile.TarInfo) -> str:
  if member.issym() or member.islnk():
    return f'a link to {member.linkname!r}'
  return '' if member.isfile() or member.isdir() else 'a device'


def _zip_refusal(member: zipfile.ZipInfo) -> str:
  kind = stat.S_IFMT(member.external_attr >> 16)
  if kind == stat.S_IFLNK:
    return 'a link'
  return '' if kind in (0, stat.S_IFREG, stat.S_IFDIR) else 'a device'


def _path_refusal(name: str) -> str:
  """Returns what is wrong with a member's path, '' if nothing is."""
  if re.match(r'[/\\]|[A-Za-z]:', name):
    return 'an absolute path'
  if '..' in re.split(r'[/\\]', name):
    return "a path with '..'"
  return 'no name' if not name.strip('./') or '\0' in name else ''


def _check_members(
  archive: pathlib.Path, members: list[_Member], expected: Collection[str]
) -> tuple[str, ...]:
  """Returns the names at the top of the archive.

  Raises:
    UserError: naming the first members that are refused.
  """
  members = [x for x in members if x.name.rstrip('/') != '.']
  wrong = [
    f'{x.name!r} is {reason}'
    for x in members
    if (reason := x.refused or _path_refusal(x.name))
  ]
  if wrong:
    more = f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise errors.UserError(
      f'The archive is refused: {"; ".join(wrong[:3])}{more}.',
      str(archive),
      'Nothing was unpacked. Get it from its publisher.',
    )
  tops = dict.fromkeys(pathlib.PurePosixPath(x.name).parts[0] for x in members)
  if not tops or (expected and not set(expected) & set(tops)):
    raise errors.UserError(
      f'The archive holds {_some(tops) or "nothing"}.',
      str(archive),
      f'One with {" or ".join(expected)}/ at its top is expected.'
      if expected
      else '',
    )
  return tuple(tops)


def _some(names: Collection[str]) -> str:
  shown = ', '.join(list(names)[:3])
  return f'{shown}, …' if len(names) > 3 else shown


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
  """Lets one process at a time unpack into `folder`; the kernel frees it."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


def _check_target(
  archive: pathlib.Path, folder: pathlib.Path, tops: Collection[str], size: int
) -> None:
  for name in tops:
    if (folder / name).exists():
      raise errors.UserError(
        f'{name} is there already.',
        str(folder / name),
        f'Move it away to unpack {archive.name}.',
      )
  free = shutil.disk_usage(folder).free
  if size > free:
    raise errors.UserError(
      f'The archive unpacks to {size / 1e9:,.1f} GB; {free / 1e9:,.1f} GB are '
      'free.',
      str(folder),
      'Make room, or set config.data_dir to where there is some.',
    )


def _unpack(
  archive: pathlib.Path,
  folder: pathlib.Path,
  tops: Collection[str],
  count: int,
  progress: Progress | None,
) -> tuple[pathlib.Path, ...]:
  # Below `folder`, because only within one file system a rename is atomic. One
  # name: what a killed process left there is removed by the next.
  temporary = folder / '.unpacking'
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir()
  try:
    with _reading(archive):
      _unpack_members(archive, temporary, count, progress)
    for name in tops:
      (temporary / name).rename(folder / name)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return tuple(folder / name for name in tops)


def _unpack_members(
  archive: pathlib.Path,
  folder: pathlib.Path,
  count: int,
  progress: Progress | None,
) -> None:
  def counted(members):
    for done, member in enumerate(members, 1):
      yield member
      if progress:
        progress(done, count)

  if zipfile.is_zipfile(archive):
    with zipfile.ZipFile(archive) as zipped:
      zipped.extractall(folder, counted(zipped.infolist()))
  else:
    with tarfile.open(archive) as tar:
      tar.extractall(folder, counted(tar), filter='data')

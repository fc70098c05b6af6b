"""Archives of raw datasets: fetched, compared with their sums, unpacked.

An archive is a stranger's list of paths: everything about it is checked before
anything is written.
"""

import contextlib
import errno
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
import uuid
import zipfile
import zlib
from collections.abc import Collection, Iterator
from typing import IO, NamedTuple

from jaxprog import errors, files
from jaxprog.data import parts

BLOCK = 1 << 20
_ZSTD = b'\x28\xb5\x2f\xfd'
# No file is larger, and no place in one further.
_MAX_BYTES = 2**62
# A tar's header that says more than that about the next member is damaged.
_MAX_HEADER_BYTES = 1 << 20
_HEADERS = (
  tarfile.GNUTYPE_LONGLINK,
  tarfile.GNUTYPE_LONGNAME,
  tarfile.SOLARIS_XHDTYPE,
  tarfile.XGLTYPE,
  tarfile.XHDTYPE,
)
# What the readers of damaged archives raise.
_READ_ERRORS = (
  EOFError,
  OSError,
  OverflowError,
  RuntimeError,
  lzma.LZMAError,
  tarfile.TarError,
  zipfile.BadZipFile,
  zlib.error,
)


class _Member(NamedTuple):
  """What an archive says of one of its members."""

  name: str
  size: int
  # '' for a file or a folder, else what it is instead.
  refused: str


class Place(NamedTuple):
  """Where a file lies within a tar that is not compressed."""

  archive: pathlib.Path
  offset: int
  size: int

  def read_bytes(self) -> bytes:
    """Returns the contents of the file.

    Raises:
      OSError: if they cannot be read, or the tar has become shorter.
    """
    with open(self.archive, 'rb', buffering=0) as archive:
      data = os.pread(archive.fileno(), self.size, self.offset)
    if len(data) < self.size:
      raise OSError(errno.EIO, 'it ends in the middle')
    return data


class _TarInfo(tarfile.TarInfo):
  """A member of a tar whose headers are all whole.

  Python's own reader takes a damaged header for the end of the archive.
  """

  @classmethod
  def frombuf(
    cls, buf: bytes | bytearray, encoding: str, errors: str
  ) -> '_TarInfo':
    try:
      member = super().frombuf(buf, encoding, errors)
    except tarfile.HeaderError as e:
      if buf and not any(buf):
        raise  # The mark of the end.
      raise tarfile.ReadError(
        'a header is damaged' if buf else 'it ends in the middle'
      ) from e
    limit = _MAX_HEADER_BYTES if member.type in _HEADERS else _MAX_BYTES
    if not 0 <= member.size <= limit:
      raise tarfile.ReadError('a header is damaged')
    return member


def sha256_file(
  path: str | os.PathLike[str], progress: parts.Progress | None = None
) -> str:
  """Returns the SHA-256 of a file as 64 hexadecimal digits.

  Raises:
    UserError: if it cannot be read.
  """
  path = pathlib.Path(path)
  digest = hashlib.sha256()
  try:
    with open(path, 'rb') as file:
      for block in _read_blocks(file, path.stat().st_size, progress):
        digest.update(block)
  except OSError as e:
    raise errors.UserError(
      f'The archive cannot be read: {e.strerror}.', str(path)
    ) from e
  return digest.hexdigest()


def download(
  url: str,
  path: str | os.PathLike[str],
  sha256: str,
  progress: parts.Progress | None = None,
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
  progress: parts.Progress | None = None,
) -> tuple[pathlib.Path, ...]:
  """Returns what a .tar, .tar.gz, .tar.zst or .zip holds, now in `folder`.

  That is what is at its top. It unpacks beside them and is renamed when
  complete, so that an interrupted call leaves nothing that looks finished.
  Unless `expected` is empty, one of these names must be at its top.

  Raises:
    UserError: if its sum is another, it holds what could be written elsewhere
      (absolute paths, '..', links, devices), there is no room, or what it
      holds is there already. Nothing has been written then.
  """
  archive, folder = pathlib.Path(archive), pathlib.Path(folder)
  _compare(archive, sha256, sha256_file(archive, progress))
  with _reading(archive):
    members = [x for x in _list_members(archive) if _is_wanted(x.name)]
  tops = _check_members(archive, members, expected)
  try:
    with files.folder(folder), _lock(folder) as is_locked:
      _check_target(archive, folder, tops, sum(x.size for x in members))
      if is_locked:  # What a killed process left is nobody's now.
        for leftover in folder.glob('.unpacking.*'):
          shutil.rmtree(leftover, ignore_errors=True)
      return _unpack(archive, folder, tops, len(members), progress)
  except OSError as e:
    raise errors.UserError(
      f'Cannot unpack: {e.strerror or e}.', f'{archive} to {folder}'
    ) from e


def list_files(
  archive: pathlib.Path, within: Place | None = None
) -> list[tuple[str, Place]]:
  """Returns the files in a tar, or in the tar `within` one: names and places.

  Raises:
    UserError: if it is compressed, damaged or cut off, or holds links.
  """
  found = []
  with _reading(archive), open(archive, 'rb', buffering=0) as file:
    end = archive.stat().st_size
    if within is not None:
      end = within.offset + within.size
      file.seek(within.offset)
    with tarfile.TarFile(fileobj=file, tarinfo=_TarInfo) as tar:
      for x in tar:
        if refused := _tar_refusal(x):
          raise tarfile.ReadError(f'{x.name} is {refused}')
        if x.offset_data + x.size > end:
          raise tarfile.ReadError('it ends in the middle')
        if x.isfile():
          found.append((x.name, Place(archive, x.offset_data, x.size)))
  return found


def read_files(
  archive: pathlib.Path, names: Collection[str]
) -> dict[str, bytes]:
  """Returns path -> contents of the files in a tar that have these names."""
  with _reading(archive), tarfile.open(archive, tarinfo=_TarInfo) as tar:
    return {
      x.name: file.read()
      for x in tar
      if pathlib.PurePosixPath(x.name).name in names
      and x.isfile()
      and (file := tar.extractfile(x))
    }


def _compare(path: str | os.PathLike[str], expected: str, found: str) -> None:
  if found != expected.strip().lower():
    raise errors.UserError(
      f'The SHA-256 of {os.fspath(path)} is wrong.',
      f'expected {expected}, found {found}',
      'It is damaged or another version: fetch it again. It was not used.',
    )


def _fetch(
  url: str, part: pathlib.Path, progress: parts.Progress | None
) -> None:
  with urllib.request.urlopen(url, timeout=30) as response:
    total = int(response.headers.get('Content-Length') or 0)
    with open(part, 'wb') as file:
      for block in _read_blocks(response, total, progress):
        file.write(block)


def _read_blocks(
  file: IO[bytes], total: int, progress: parts.Progress | None
) -> Iterator[bytes]:
  blocks = iter(lambda: file.read(BLOCK), b'')
  return parts.told(blocks, total, progress, len)


@contextlib.contextmanager
def _reading(archive: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except _READ_ERRORS as e:
    # EINVAL: a place that no file reaches, which a damaged header names.
    if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
      raise  # The disk's fault, not the archive's.
    raise errors.UserError(
      f'The archive cannot be read: {" ".join(str(e).split())[:200]}.',
      str(archive),
      'Is it whole, and a .tar, .tar.gz, .tar.zst or .zip without a password?',
    ) from e


def _list_members(archive: pathlib.Path) -> list[_Member]:
  """Returns all members, once it is known that there are no others."""
  if _is_zip(archive):
    with zipfile.ZipFile(archive) as zipped:
      members = zipped.infolist()
    # A wrong length lets one entry of the directory swallow the next.
    if any(b'PK\1\2' in x.comment + x.extra for x in members):
      raise zipfile.BadZipFile('its directory is damaged')
    return [
      _Member(x.orig_filename, x.file_size, _zip_refusal(x)) for x in members
    ]
  with _open_tar(archive) as tar:
    found = []
    for x in tar:
      if not 0 <= x.size <= _MAX_BYTES:  # By what a header before its own says.
        raise tarfile.ReadError('a header is damaged')
      found.append(_Member(x.name, x.size, _tar_refusal(x)))
    assert tar.fileobj is not None
    # To the end: a compressed archive has its sum there.
    while block := tar.fileobj.read(BLOCK):
      if block.strip(b'\0'):
        raise tarfile.ReadError('more follows after its end')
  return found


@contextlib.contextmanager
def _open_tar(archive: pathlib.Path) -> Iterator[tarfile.TarFile]:
  """Opens a tar, packed or not, to be read once and in order."""
  if _begin(archive) != _ZSTD:
    with tarfile.open(archive, tarinfo=_TarInfo) as tar:
      yield tar
    return
  import pyarrow as pa  # Before 3.14 Python knows no zstd; tfds needs this.

  with (
    pa.CompressedInputStream(str(archive), 'zstd') as unpacked,
    tarfile.open(fileobj=unpacked, mode='r|', tarinfo=_TarInfo) as tar,
  ):
    yield tar


def _is_zip(archive: pathlib.Path) -> bool:
  # Not zipfile's answer: a tar whose last member is a .zip is none.
  return _begin(archive) in (b'PK\3\4', b'PK\5\6')


def _begin(archive: pathlib.Path) -> bytes:
  with open(archive, 'rb') as file:
    return file.read(4)


def _is_wanted(name: str) -> bool:
  """Returns whether a member is more than '.' and what macOS adds."""
  names = pathlib.PurePosixPath(name).parts
  if not names:
    return name.rstrip('/') != '.'
  added = names[-1] == '.DS_Store' or names[-1].startswith('._')
  return not added and '__MACOSX' not in names


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
    more = ', …' if len(tops) > 3 else ''
    raise errors.UserError(
      f'The archive holds {", ".join(list(tops)[:3]) or "nothing"}{more}.',
      str(archive),
      f'One with {" or ".join(expected)}/ at its top is expected.'
      if expected
      else '',
    )
  return tuple(tops)


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[bool]:
  """Lets one process at a time unpack into `folder`; False: no locks there."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    yield files.lock(descriptor)
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
  progress: parts.Progress | None,
) -> tuple[pathlib.Path, ...]:
  # Below `folder`, because only within one file system a rename is atomic.
  temporary = folder / f'.unpacking.{uuid.uuid4().hex}'
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
  progress: parts.Progress | None,
) -> None:
  def wanted(members, name):
    found = (x for x in members if _is_wanted(getattr(x, name)))
    return parts.told(found, count, progress)

  if _is_zip(archive):
    with zipfile.ZipFile(archive) as zipped:
      zipped.extractall(folder, wanted(zipped.infolist(), 'orig_filename'))
  else:
    with _open_tar(archive) as tar:
      tar.extractall(folder, wanted(tar, 'name'), filter='data')

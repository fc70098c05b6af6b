"""Folders of object storage, such as gs://BUCKET/runs/a, through fsspec.

An object is written whole or not at all; there is no rename, no append and no
lock, but of many who create the same one a single one succeeds. What the
program works on lies on a disk: the copy of gs://BUCKET/PATH at
CACHE/gs:/BUCKET/PATH, so that either name tells the other.
"""

import base64
import concurrent.futures
import contextlib
import hashlib
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxprog import errors

_URL = re.compile(r'([a-z][a-z0-9]*):/+(.+)', re.DOTALL)
# Schemes whose paths begin with a slash.
_ABSOLUTE = ('file', 'local', 'memory')
# Of the local file system, as the copy of a bucket lies in it.
_COPY = re.compile(r'.*/(([a-z][a-z0-9]*):/.+)', re.DOTALL)
# Packages that fsspec reads a scheme with, by the extra of ours that has them.
_EXTRAS = {'gs': 'gcs', 'gcs': 'gcs', 's3': 's3'}
_CREDENTIALS = {
  'gs': 'gcloud auth application-default login, or a service account',
  's3': 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials',
}
# At once; each is one connection.
_TRANSFERS = 8
# Bytes of one request: what a broken connection loses.
_PART = 32 << 20
# Seconds before a request is tried again, after what the library itself tries.
_PAUSES = (1.0, 4.0)


class ForbiddenError(errors.UserError):
  """One may not do that in this bucket, or it asks who one is."""


class Entry(NamedTuple):
  """An object: its size in bytes and its MD5 in hex, '' if nobody tells."""

  size: int
  md5: str


def is_url(path: str | os.PathLike[str]) -> bool:
  """Returns whether `path` names object storage; pathlib makes gs:/ of it."""
  return _URL.fullmatch(os.fspath(path)) is not None


def normalise(url: str | os.PathLike[str]) -> str:
  """Returns a URL as its scheme writes it, without a slash at its end."""
  found = _URL.fullmatch(os.fspath(url))
  assert found is not None
  scheme, rest = found.groups()
  slashes = ':///' if scheme in _ABSOLUTE else '://'
  return f'{scheme}{slashes}{rest.rstrip("/")}'


def copy_of(url: str, cache: pathlib.Path) -> pathlib.Path:
  """Returns where below `cache` what lies at `url` is kept."""
  scheme, _, rest = normalise(url).partition('://')
  return cache / f'{scheme}:' / rest.lstrip('/')


def url_of(path: str | os.PathLike[str]) -> str | None:
  """Returns the URL of which `path` is in a copy, None for other paths."""
  found = _COPY.fullmatch(os.fspath(path))
  return normalise(found[1]) if found else None


def shown(path: str | os.PathLike[str]) -> str:
  """Returns `path` as people know it: the URL where it is in a copy."""
  return url_of(path) or os.fspath(path)


class Bucket:
  """What lies below a URL; thread-safe.

  Names are relative to it, with slashes. What cannot pass by itself is raised
  as a UserError: no such bucket, no permission, no credentials, no network.
  """

  def __init__(self, url: str | os.PathLike[str], where: str = '') -> None:
    """Connects to nothing yet.

    `where` is what errors show as the place, the URL by default.

    Raises:
      UserError: if nothing here can read such a URL.
    """
    self.url = normalise(url)
    self._scheme, _, rest = self.url.partition('://')
    self._where = where or self.url
    self.name = rest.lstrip('/').partition('/')[0]
    self._files = self._open()
    self._root = str(self._files._strip_protocol(self.url)).rstrip('/')

  def below(self, name: str) -> 'Bucket':
    """Returns the folder `name` of this one."""
    return Bucket(f'{self.url}/{name}', self._where)

  def list(self, under: str = '') -> dict[str, Entry]:
    """Returns all objects whose names begin with the folder `under`.

    Raises:
      UserError: if there is no such bucket.
    """
    path = self._path(under) if under else self._root
    try:
      found = self._try(self._files.find, path, detail=True)
    except FileNotFoundError:
      found = {}
    if not found and not under:
      self._check_bucket()
    start = len(self._root) + 1
    return {
      name[start:]: Entry(int(info['size'] or 0), _md5(info))
      for name, info in found.items()
      if info['type'] == 'file' and not name.endswith('/')
    }

  def holds(self, name: str) -> bool:
    """Returns whether there is an object or a folder of that name."""
    try:
      return bool(self._try(self._files.ls, self._path(name), detail=False))
    except FileNotFoundError:
      return False

  def read(self, name: str) -> bytes | None:
    """Returns an object's bytes, None where there is none."""
    try:
      return self._try(self._files.cat_file, self._path(name))
    except FileNotFoundError:
      return None

  def write(self, name: str, data: bytes) -> None:
    """Writes an object, in the place of what was there."""
    path = self._path(name)
    self._write(path, self._files.pipe_file, path, data)

  def create(self, name: str, data: bytes) -> bool:
    """Writes an object that is not there yet; False: it is, by another.

    `data` must be unlike what others write: an answer may be lost on its way.
    """
    path = self._path(name)
    try:
      self._write(path, self._files.pipe_file, path, data, mode='create')
    except FileExistsError:
      return self.read(name) == data
    return True

  def upload(self, path: pathlib.Path, name: str) -> None:
    """Writes the file at `path`.

    Raises:
      FileNotFoundError: if it is gone.
    """
    path.stat()
    target = self._path(name)
    self._write(target, self._files.put_file, str(path), target)

  def download(
    self,
    name: str,
    entry: Entry,
    path: pathlib.Path,
    on_bytes: Callable[[int], object] = lambda count: None,
  ) -> None:
    """Writes an object to `path`, which is whole or not there.

    What a broken download has left is gone on with. `on_bytes` is told how
    many came, several times.

    Raises:
      FileNotFoundError: if there is no such object.
      UserError: if what comes is not what `entry` says, twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path, entry)
    for _ in range(2):
      with open(part, 'ab') as file:
        on_bytes(file.tell())
        while file.tell() < entry.size:
          start = file.tell()
          end = min(start + _PART, entry.size)
          data = self._try(
            self._files.cat_file, self._path(name), start=start, end=end
          )
          if not data:
            break
          file.write(data)
          on_bytes(len(data))
      if is_same(part, entry):
        os.replace(part, path)
        return
      on_bytes(-part.stat().st_size)
      part.unlink()
    raise errors.UserError(
      'An object is not what its bucket says that it is.',
      f'{self.url}/{name}',
      'If it is being written now, try again.',
    )

  def remove(self, names: Iterable[str]) -> None:
    """Removes objects; those that are gone already do not matter."""

    def remove(name):
      with contextlib.suppress(FileNotFoundError):
        self._try(self._files.rm_file, self._path(name))

    at_once(remove, names)

  def _path(self, name: str) -> str:
    return f'{self._root}/{name}'

  def _open(self) -> Any:
    """Returns fsspec's file system of the scheme."""
    # What it asks beside would need other rights, and another protocol.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    import fsspec

    for name in ('gcsfs', 's3fs', 'fsspec', 'aiobotocore', 'botocore'):
      # They log with tracebacks what they raise.
      logging.getLogger(name).setLevel(logging.CRITICAL)
    options = {'consistency': 'md5'} if self._scheme in ('gs', 'gcs') else {}
    try:
      return fsspec.filesystem(
        self._scheme, use_listings_cache=False, **options
      )
    except ValueError:
      what = f'Nothing here reads {self._scheme}://.'
      suggestion = 'Name a folder, gs://BUCKET/PATH or s3://BUCKET/PATH.'
    except ImportError as e:
      what = f'{self._scheme}:// needs a package that is not installed: {e}.'
      extra = _EXTRAS.get(self._scheme)
      suggestion = f"pip install 'jaxprog[{extra}]'" if extra else ''
    raise errors.UserError(what, self._where, suggestion) from None

  def _check_bucket(self) -> None:
    """Raises UserError if there is no such bucket.

    Who may not ask that finds out at the first object.
    """
    if self._scheme in _ABSOLUTE:
      return
    try:
      self._try(self._files.ls, self.name)
    except FileNotFoundError:
      raise self._no_bucket() from None

  def _write(
    self, path: str, call: Callable[..., Any], *args: Any, **options: Any
  ) -> None:
    """Calls what writes the object at `path`."""
    if self._scheme in _ABSOLUTE:
      self._files.makedirs(os.path.dirname(path), exist_ok=True)
    try:
      self._try(call, *args, **options)
    except FileNotFoundError:
      raise self._no_bucket() from None

  def _no_bucket(self) -> errors.UserError:
    return errors.UserError(
      f'There is no bucket {self.name!r}.',
      self._where,
      'Create it first, or mend its name.',
    )

  def _try(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns what `call` does, tried again where that may help.

    Raises:
      FileNotFoundError: if there is no such object.
      FileExistsError: if there is one that must not be.
      UserError: for all else.
    """
    for pause in (*_PAUSES, None):
      try:
        return call(*args, **options)
      except (FileNotFoundError, FileExistsError):
        raise
      except Exception as e:
        error = self._explain(e)
        if pause is None or not error.what.endswith('be reached.'):
          raise error from e
      time.sleep(pause)
    raise AssertionError

  def _explain(self, error: Exception) -> errors.UserError:
    """Returns what people are told of a library's error."""
    text = ' '.join(str(error).split())
    code = str(getattr(error, 'code', ''))
    kind = type(error).__name__
    how = _CREDENTIALS.get(self._scheme, 'See the documentation of fsspec.')
    if code == '401' or 'Credentials' in kind:
      return ForbiddenError(
        f'{self._scheme}://{self.name} asks who you are.', self._where, how
      )
    forbidden = isinstance(error, PermissionError) or code == '403'
    if forbidden or text.startswith('Forbidden'):
      return ForbiddenError(
        f'You may not do that in {self._scheme}://{self.name}: {text[:120]}',
        self._where,
        f'Ask for the permission, or be someone else: {how}.',
      )
    return errors.UserError(
      f'{self._scheme}://{self.name} cannot be reached.',
      self._where,
      f'{kind}: {text[:160]}',
    )


def at_once(call: Callable[[Any], Any], items: Iterable[Any]) -> None:
  """Calls `call` for all `items`, several at a time; raises the first error.

  What has not begun by then is left.
  """
  with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
    waiting = [pool.submit(call, item) for item in items]
    try:
      for x in waiting:
        x.result()
    finally:
      for x in waiting:
        x.cancel()


def part_of(path: pathlib.Path, entry: Entry) -> pathlib.Path:
  """Returns where a broken download of an object leaves what has come."""
  return path.with_name(f'.{path.name}.{entry.md5 or entry.size}.part')


def is_same(path: pathlib.Path, entry: Entry) -> bool:
  """Returns whether a file holds the object, as far as can be told."""
  try:
    if path.stat().st_size != entry.size:
      return False
    with open(path, 'rb') as file:
      found = hashlib.file_digest(file, 'md5').hexdigest()
  except FileNotFoundError:
    return False
  return not entry.md5 or found == entry.md5


def _md5(info: Mapping[str, Any]) -> str:
  """Returns the MD5 that a listing tells, '' if it tells none."""
  if 'md5Hash' in info:  # Google Cloud Storage.
    return base64.b64decode(info['md5Hash']).hex()
  # S3, where an object came in one piece and without a key of its own.
  etag = str(info.get('ETag', '')).strip('"')
  return etag if re.fullmatch('[0-9a-f]{32}', etag) else ''

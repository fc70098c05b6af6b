"""Folders of object storage, such as gs://BUCKET/runs/a, through fsspec.

An object is written whole or not at all; there is no rename, no append and no
lock, but of many who create the same one a single one succeeds. What the
program works on lies on a disk: the copy of gs://BUCKET/PATH at
CACHE/bucket@gs/BUCKET/PATH, so that either name tells the other.
"""

import base64
import collections
import contextlib
import hashlib
import io
import logging
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

from jaxprog import errors, files

# Not folder:PATH or its like, the name of a dataset, nor a drive of one letter.
_URL = re.compile(
  r'(?!(?:folder|parquet|wds):)([a-z][a-z0-9]+):/+(.+)', re.DOTALL | re.I
)
# Schemes whose paths begin with a slash.
_LOCAL = ('file', 'local')
_ABSOLUTE = (*_LOCAL, 'memory')
# Of the local file system, as the copy of a bucket lies in it. epath changes
# gs:/ wherever it finds it.
_COPY = re.compile(r'.*?/bucket@([a-z][a-z0-9]+)/(.+)', re.DOTALL)
_IN_TEXT = re.compile(r'[^\s\'"=]*/bucket@([a-z][a-z0-9]+)/(?=[^\s/])')
# Packages that fsspec reads a scheme with, by the extra of ours that has them.
_EXTRAS = {'gs': 'gcs', 'gcs': 'gcs', 's3': 's3'}
_GOOGLE = ('gs', 'gcs')
_LIBRARIES = (
  'aiobotocore',
  'botocore',
  'fsspec',
  'gcsfs',
  'google.auth',
  's3fs',
)
_CREDENTIALS = {
  'gs': 'gcloud auth application-default login, or a service account',
  's3': 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials',
}
# At once; each is one connection.
_TRANSFERS = 8
# Bytes of one request: what a broken connection loses.
_PART = 32 << 20
# Of what is written in pieces, where the MD5 does not depend on them.
_CHUNK = 16 << 20
# What S3 takes in one piece; of several it tells no MD5.
_PIECE = 5 << 30
# Seconds before a request is tried again, after what the library itself tries,
# where the bucket was reached before and this took no longer than patience.
_PAUSES = (1.0, 4.0)
_PATIENCE = 60.0
# Of the statuses 4xx: a slow request, a conflict with another, too many.
_PASSING = (408, 409, 429)
# Seconds for a connection, without a byte of an answer, and for a request: a
# chunk on the slowest line.
_TIMEOUTS = {'sock_connect': 10.0, 'sock_read': 30.0, 'total': 600.0}


class ForbiddenError(errors.UserError):
  """One may not do that in this bucket, or it asks who one is."""


class ChangedError(errors.UserError):
  """An object is not what a listing has said: it is time for another one."""


# What stands before a sum that is no MD5.
_CRC32C = 'crc32c-'


class Entry(NamedTuple):
  """An object: its size in bytes and its MD5 in hex, '' if nobody tells.

  In the place of an MD5 may stand crc32c- and that sum.
  """

  size: int
  md5: str


def is_url(path: str | os.PathLike[str]) -> bool:
  """Returns whether `path` names object storage; pathlib makes gs:/ of it."""
  return _URL.fullmatch(os.fspath(path)) is not None


def normalise(url: str | os.PathLike[str], where: str = '') -> str:
  """Returns a URL as its scheme writes it, without a slash at its end.

  Raises:
    UserError: naming `where`, if it is no URL, or none that a copy can tell.
  """
  text = os.fspath(url)
  how = 'Write s3://BUCKET/PATH, gs://BUCKET/PATH or another that fsspec knows.'
  found = _URL.fullmatch(text)
  if found is None:
    raise errors.UserError(f'{text!r} is no URL.', where or text, how)
  scheme, rest = found[1].lower(), found[2].rstrip('/')
  if not {'', '.', '..'}.isdisjoint(rest.split('/')):
    what = f'A part of {text!r} is empty, . or ..: no folder has that name.'
    raise errors.UserError(what, where or text, how)
  return f'{scheme}{":///" if scheme in _ABSOLUTE else "://"}{rest}'


def copy_of(url: str, cache: pathlib.Path) -> pathlib.Path:
  """Returns where below `cache` what lies at `url` is kept."""
  scheme, _, rest = normalise(url).partition('://')
  return cache / f'bucket@{scheme}' / rest.lstrip('/')


def url_of(path: str | os.PathLike[str]) -> str | None:
  """Returns the URL of which `path` is in a copy, None for other paths."""
  found = _COPY.fullmatch(os.fspath(path))
  return normalise(f'{found[1]}://{found[2]}') if found else None


def shown(text: str | os.PathLike[str]) -> str:
  """Returns a path or a text with URLs in place of the paths of copies."""

  def name(found):
    return f'{found[1]}:{"///" if found[1] in _ABSOLUTE else "//"}'

  return _IN_TEXT.sub(name, os.fspath(text))


class Bucket:
  """What lies below a URL; thread-safe.

  Names are relative to it, with slashes. What cannot pass by itself is raised
  as a UserError: no such bucket, no permission, no credentials, no network.
  """

  def __init__(self, url: str | os.PathLike[str], where: str = '') -> None:
    """Connects to nothing yet.

    `where` is what errors show as the place, the URL by default.

    Raises:
      UserError: if it is no URL, or nothing here can read it.
    """
    self.url = normalise(url, where)
    self._scheme, _, rest = self.url.partition('://')
    self._where = where or self.url
    self.name = rest.lstrip('/').partition('/')[0]
    self._reached = False
    self._has_sums: bool | None = None
    self._files = self._open()
    self._root = str(self._files._strip_protocol(self.url)).rstrip('/')

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
    entries = {
      name[start:]: Entry(int(info['size'] or 0), _md5(info))
      for name, info in found.items()
      if info['type'] == 'file' and name[start:] and not name.endswith('/')
    }
    if entries and not self._tells_sums(next(iter(entries))):
      return {k: x._replace(md5='') for k, x in entries.items()}
    return entries

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
    options = {}
    if self._scheme in _GOOGLE and data.endswith(b'\r'):
      # In one piece gcsfs sends it with \n behind it, and both would go.
      options['chunksize'] = len(data)
    self._write(name, lambda to: self._files.pipe_file(to, data, **options))

  def create(self, name: str, data: bytes) -> bool:
    """Writes an object that is not there yet; False: it is, by another.

    `data` must be unlike what others write: an answer may be lost on its way.
    """

    def create(path: str) -> None:
      if self._scheme in _LOCAL:  # Where fsspec looks first and then writes.
        _create_file(path, data)
      else:
        self._files.pipe_file(path, data, mode='create')

    try:
      self._write(name, create, in_place=True)
    except FileExistsError:
      return self.read(name) == data
    return True

  def upload(self, path: pathlib.Path, name: str) -> None:
    """Writes the file at `path`.

    Raises:
      FileNotFoundError: if it is gone.
    """
    size = path.stat().st_size
    if size <= _CHUNK:
      self.write(name, path.read_bytes())
      return
    options = {}
    if self._scheme in _GOOGLE:
      options['chunksize'] = _CHUNK
    elif self._scheme == 's3' and size < _PIECE:
      options['chunksize'] = _PIECE

    def put(source: str) -> None:
      self._write(name, lambda to: self._files.put_file(source, to, **options))

    try:
      put(str(path))
    except errors.UserError:
      if path.stat().st_size == size:
        raise
      # It has grown on the way; a copy does not.
      with tempfile.TemporaryDirectory() as folder:
        put(shutil.copy(path, folder))

  def download(
    self,
    name: str,
    entry: Entry,
    path: pathlib.Path,
    on_bytes: Callable[[int], object] = lambda count: None,
  ) -> None:
    """Writes an object to `path`, which is whole or not there.

    What a broken download has left is gone on with, where an MD5 tells that it
    is of the same object. `on_bytes` is told how many came, several times.

    Raises:
      FileNotFoundError: if there is no such object.
      ChangedError: if what comes is not what `entry` says, twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, before = part_of(path, entry), _look(path)
    tries = 0
    while tries < 2:
      with open(part, 'ab') as file:
        files.lock(file.fileno())
        if not files.is_at(
          file.fileno(), part
        ):  # It was another's, who is through with it.
          continue
        is_new = _look(path) != before  # Another process was faster.
        if (entry.md5 or is_new) and is_same(path, entry):
          part.unlink(missing_ok=True)
          on_bytes(entry.size)
          return
        if not entry.md5:
          file.seek(0)
          file.truncate()
        self._download(name, entry, file, on_bytes)
        if is_same(part, entry):
          os.replace(part, path)
          return
        on_bytes(-file.tell())
        part.unlink(missing_ok=True)
        tries += 1
    raise ChangedError(
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

  def _download(
    self,
    name: str,
    entry: Entry,
    file: BinaryIO,
    on_bytes: Callable[[int], object],
  ) -> None:
    """Appends what `file` has not yet of an object."""
    on_bytes(file.tell())
    # A byte more tells one that has grown, where no sum does.
    size = entry.size if entry.md5 else entry.size + 1
    with contextlib.suppress(EOFError):  # It ends, or is another one by now.
      while (start := file.tell()) < size:
        end = min(start + _PART, size)
        data = self._try(
          self._files.cat_file, self._path(name), start=start, end=end
        )
        file.write(data)
        on_bytes(len(data))
        if len(data) < end - start:
          break
    file.flush()

  def _tells_sums(self, name: str) -> bool:
    """Returns whether what a listing has as an MD5 is one, by one object.

    S3 has other sums, which look alike, of what is encrypted by a key of KMS.
    """
    if self._scheme == 's3' and self._has_sums is None:
      with contextlib.suppress(FileNotFoundError):
        bucket, _, key = self._path(name).partition('/')
        about = self._try(
          self._files.call_s3, 'head_object', Bucket=bucket, Key=key
        )
        kind = about.get('ServerSideEncryption', '')
        self._has_sums = not kind.startswith('aws:kms')
    return self._has_sums is not False

  def _path(self, name: str) -> str:
    return f'{self._root}/{name}'

  def _open(self) -> Any:
    """Returns fsspec's file system of the scheme."""
    # What it asks beside would need other rights, and another protocol.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    import fsspec

    for name in _LIBRARIES:
      # They log with tracebacks what they raise.
      logging.getLogger(name).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {}
    try:
      if self._scheme in _GOOGLE:
        import aiohttp

        options['consistency'] = 'md5'
        options['requests_timeout'] = aiohttp.ClientTimeout(**_TIMEOUTS)
      return fsspec.filesystem(
        self._scheme, use_listings_cache=False, **options
      )
    except ValueError:
      raise errors.UserError(
        f'Nothing here reads {self._scheme}://.',
        self._where,
        'Name a folder, gs://BUCKET/PATH or s3://BUCKET/PATH.',
      ) from None
    except ImportError as e:
      what, extra = f'{self._scheme}://', _EXTRAS.get(self._scheme, '')
      raise errors.not_installed(what, self._where, e, extra) from None

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
    self, name: str, put: Callable[[str], object], in_place: bool = False
  ) -> None:
    """Has `put` write an object to a path, or beside it if it is seen there."""
    path = target = self._path(name)
    if self._scheme in _ABSOLUTE:
      self._try(self._files.makedirs, os.path.dirname(path), exist_ok=True)
    if self._scheme in _LOCAL and not in_place:
      target = f'{path}.{os.getpid()}-{threading.get_ident()}.part'
    try:
      self._try(put, target)
    except FileNotFoundError as e:
      if e.filename:  # A file of this machine.
        raise
      raise self._no_bucket() from None
    if target != path:
      os.replace(target, path)

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
      EOFError: if it ends before what was asked for.
      UserError: for all else.
    """
    began = time.monotonic()
    for pause in (*_PAUSES, None):
      try:
        result = call(*args, **options)
      except (FileNotFoundError, FileExistsError):
        self._reached = True
        raise
      except Exception as e:
        if _status(e) == 412:
          raise FileExistsError(*args[:1]) from e
        if _status(e) == 416:
          raise EOFError(*args[:1]) from e
        error, may_pass = self._explain(e)
        is_late = time.monotonic() - began > _PATIENCE
        if pause is None or is_late or not (may_pass and self._reached):
          raise error from e
      else:
        self._reached = True
        return result
      time.sleep(pause)
    raise AssertionError

  def _explain(self, error: Exception) -> tuple[errors.UserError, bool]:
    """Returns what people are told of a library's error, and if it may pass."""
    text = ' '.join(str(error).split())[:160]
    kind, status = type(error).__name__, _status(error)
    bucket = f'{self._scheme}://{self.name}'
    how = _CREDENTIALS.get(self._scheme, 'See the documentation of fsspec.')

    def tell(what: str, suggestion: str) -> errors.UserError:
      return errors.UserError(what, self._where, suggestion)

    if status == 401 or 'Credentials' in kind:
      what = f'{bucket} asks who you are.'
      return ForbiddenError(what, self._where, how), False
    forbidden = isinstance(error, PermissionError) or status == 403
    if forbidden or text.startswith('Forbidden'):
      what = f'You may not do that in {bucket}: {text}'
      how = f'Ask for the permission, or be someone else: {how}.'
      return ForbiddenError(what, self._where, how), False
    if 400 <= status < 500 and status not in _PASSING:
      return tell(f'{bucket} refuses that.', f'{kind}: {text}'), False
    reason = text or 'no answer in time'
    return tell(f'{bucket} cannot be reached.', f'{kind}: {reason}'), True


def at_once(call: Callable[[Any], Any], items: Iterable[Any]) -> None:
  """Calls `call` for all `items`, several at a time; raises the first error.

  What has not begun by then is left. Nothing of it holds up the program's end,
  as the threads of a pool would, with all that waits for them.
  """
  left, failed, ended = collections.deque(items), [], threading.Event()

  def work():
    while not ended.is_set():
      try:
        item = left.popleft()
      except IndexError:
        return
      try:
        call(item)
      except BaseException as e:
        failed.append(e)
        ended.set()

  count = min(_TRANSFERS, len(left))
  threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
  try:
    for x in threads:
      x.start()
    for x in threads:
      x.join()
  finally:
    ended.set()
  if failed:
    raise failed[0]


def part_of(path: pathlib.Path, entry: Entry) -> pathlib.Path:
  """Returns where a broken download of an object leaves what has come."""
  return path.with_name(f'.{path.name}.{entry.md5 or entry.size}.part')


def is_same(path: pathlib.Path, entry: Entry) -> bool:
  """Returns whether a file holds the object, as far as can be told."""
  try:
    if path.stat().st_size != entry.size:
      return False
    with open(path, 'rb') as file:
      found = _sum(file, entry.md5)
  except FileNotFoundError:
    return False
  return not entry.md5 or found == entry.md5


def _create_file(path: str, data: bytes) -> None:
  """Writes a file that is not there yet; a reader sees all of it or none.

  Raises:
    FileExistsError: if it is there.
  """
  part = f'{path}.{os.getpid()}-{threading.get_ident()}.part'
  try:
    pathlib.Path(part).write_bytes(data)
    try:
      os.link(part, path)
    except FileExistsError:
      raise
    except OSError:  # A file system without links: it is seen half-written.
      with open(path, 'xb') as file:
        file.write(data)
  finally:
    pathlib.Path(part).unlink(missing_ok=True)


def _look(path: pathlib.Path) -> tuple[int, int] | None:
  """Returns what is another as soon as a file is, None where there is none."""
  try:
    stat = path.stat()
  except FileNotFoundError:
    return None
  return stat.st_ino, stat.st_mtime_ns


def _status(error: Exception) -> int:
  """Returns the HTTP status that a library's error tells, 0 if none."""
  of_s3 = getattr(error.__cause__, 'response', {}).get('ResponseMetadata', {})
  found = getattr(error, 'code', None) or of_s3.get('HTTPStatusCode')
  return int(found) if str(found).isdigit() else 0


def _sum(file: io.BufferedReader, like: str) -> str:
  """Returns the sum of a file, of the kind that `like` is."""
  if not like.startswith(_CRC32C):
    return hashlib.file_digest(file, 'md5').hexdigest()
  import google_crc32c  # It comes with gcsfs.

  checksum = google_crc32c.Checksum()
  collections.deque(checksum.consume(file, 1 << 20), maxlen=0)
  return _CRC32C + checksum.digest().hex()


def _md5(info: Mapping[str, Any]) -> str:
  """Returns the sum that a listing tells, '' if it tells none."""
  if info.get('md5Hash'):  # Google Cloud Storage.
    return base64.b64decode(info['md5Hash']).hex()
  if info.get('crc32c'):  # Of what was put together of parts, as gcloud does.
    return _CRC32C + base64.b64decode(info['crc32c']).hex()
  # S3, where an object came in one piece and without a key of its own.
  etag = str(info.get('ETag', '')).strip('"')
  return etag if re.fullmatch('[0-9a-f]{32}', etag) else ''

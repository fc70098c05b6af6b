"""Datasets of a bucket: what of them is on this machine, and the way back.

The copy of gs://BUCKET/data has from the start what a dataset is known by, and
its images once somebody is about to read them: what a path of the copy lacks,
its own name tells where to find. Other paths are left alone.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxprog import buckets, errors, files, formats
from jaxprog.data import parts

# In DATA_DIR/prepared and DATA_DIR/manifests of a copy: what the bucket has
# there, name -> Entry.
_LIST = '.objects.json'
# In a raw folder that came from the bucket.
_FETCHED = '.fetched'
# It comes last of its folder: who finds it finds all.
_MARKERS = ('dataset_info.json', 'pack.json')
# They tell of images by their sums: where one differs, so does all else.
_IDENTITY = (*_MARKERS, 'metadata.json')
# What only those need who read images or compare them.
_LARGE = re.compile(
  r'.+\.array_record.*|images\.bin|offsets\.npy|sizes\.npy|signatures-.+'
)
# How a raw folder looks on one machine says nothing on another; and what is
# under way.
_OURS = re.compile(r'raw_folder\.json|\..*|incomplete\..*')
# What can be read where it is, by position.
_DIRECT = re.compile(r'gs://.+\.array_record.*')
# A list is believed for so many seconds.
_FRESH = 60.0
# Bytes of the largest file that is hashed after it was uploaded.
_HASHED = 64 << 20
# Where else copies may lie.
_ELSEWHERE = '--config.cache_dir=DIR, or for folder:URL $JAXPROG_CACHE_DIR'
# Bytes that stay free, for what else comes to that disk.
_MARGIN = 1 << 30

# When the small files of each dataset were brought, by the monotonic clock.
_brought: dict[pathlib.Path, float] = {}
_lock = threading.Lock()


class _Object(NamedTuple):
  """What a bucket, of which `root` is the copy, has under a name."""

  root: pathlib.Path
  name: str
  entry: buckets.Entry

  @property
  def path(self) -> pathlib.Path:
    return self.root / self.name


def bring(root: pathlib.Path, name: str) -> None:
  """Brings what a dataset is known by into the copy.

  It is in the folder `name` of `root`, DATA_DIR/prepared; '' brings all of it.
  What came from the bucket becomes or goes as it does there; what differs from
  all that came was made here, and stays.

  Raises:
    UserError: if the bucket cannot be read.
  """
  if buckets.url_of(root) is None:
    return
  folder = root / name
  with _lock:
    if time.monotonic() - _brought.get(folder, -_FRESH) < _FRESH:
      return
    bucket = _bucket(root, root.parent)
    new = _list_objects(bucket, root)
    new = _tell_sums(bucket, [x for x in new if folder in x.path.parents])
    with _writing(root), _locked(root / _LIST):
      known = _read_list(root)
      old = [_Object(root, *x) for x in known.items()]
      old = [x for x in old if folder in x.path.parents]
      ours = _made_here(old, new)
      for x in old:  # What is told of others is of what came of them.
        del known[x.name]
      known |= {x.name: x.entry for x in new}
      old, new = (
        [x for x in y if x.path.parent not in ours] for y in (old, new)
      )
      _clear(old, new)
      # After what goes and before what comes: what a kill leaves of it is then
      # known to be the bucket's.
      files.write_json(root / _LIST, known)
      _put_in_step(bucket, new)
    _brought[folder] = time.monotonic()


def _made_here(
  old: Sequence[_Object], new: Sequence[_Object]
) -> set[pathlib.Path]:
  """Returns the folders whose dataset is neither that which came nor the new.

  What tells of it is compared together: another dataset may have one file of it
  in common, and an upload may have broken off in between.
  """
  folders = {x.path.parent for x in (*old, *new) if x.path.name in _IDENTITY}

  def is_of(folder: pathlib.Path, objects: Sequence[_Object]) -> bool:
    told = [x for x in objects if x.path.name in _IDENTITY]
    same = {x.path for x in told if x.path.parent == folder and _is_same(x)}
    return {y for x in _IDENTITY if (y := folder / x).exists()} <= same

  return {
    x
    for x in folders
    if any((x / y).exists() for y in _MARKERS)
    and not is_of(x, old)
    and not is_of(x, new)
  }


def _clear(old: Iterable[_Object], new: Sequence[_Object]) -> None:
  """Removes what came from a bucket that has another by now, or none."""
  for x in new:
    if x.path.name in _IDENTITY and x.path.exists() and not _is_same(x):
      remove(x.path.parent)
    elif _LARGE.fullmatch(x.path.name) and not _has_size(x):
      x.path.unlink(missing_ok=True)
  names = {x.name for x in new}
  for x in old:
    if x.name not in names and _is_small(x.path) and _is_same(x):
      x.path.unlink()
      if x.path.name in _MARKERS:
        remove(x.path.parent)


def _put_in_step(bucket: buckets.Bucket, objects: Iterable[_Object]) -> None:
  """Makes the small files of a dataset those of the bucket."""

  def download(x: _Object) -> None:
    if not _is_same(x):
      _download(bucket, x)

  small = [x for x in objects if _is_small(x.path)]
  buckets.at_once(download, [x for x in small if x.path.name not in _MARKERS])
  buckets.at_once(download, [x for x in small if x.path.name in _MARKERS])


def _is_small(path: pathlib.Path) -> bool:
  """Returns whether a file tells of images and is the same on all machines."""
  return not (_OURS.fullmatch(path.name) or _LARGE.fullmatch(path.name))


def _is_same(x: _Object) -> bool:
  return buckets.is_same(x.path, x.entry)


def remove(folder: pathlib.Path) -> None:
  """Removes what was prepared; half removed, it is none."""
  old = folder.with_name(f'incomplete.{uuid.uuid4().hex}')
  with contextlib.suppress(FileNotFoundError):
    folder.rename(old)
  shutil.rmtree(old, ignore_errors=True)


def is_known(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file is here or in the bucket."""
  return os.path.isfile(path) or _find(path) is not None


def size(path: str | os.PathLike[str]) -> int:
  """Returns the bytes of a file that is here or in the bucket.

  Raises:
    UserError: if it is in neither.
  """
  try:
    return os.stat(path).st_size
  except FileNotFoundError:
    if found := _find(path):
      return found.entry.size
  raise lost(path)


def missing(paths: Iterable[str | os.PathLike[str]]) -> int:
  """Returns how many bytes of `paths` are still in the bucket alone.

  Raises:
    UserError: if some of them are nowhere.
  """
  return _bytes_to_come(_find_missing(paths))


def free_bytes(path: pathlib.Path) -> int:
  """Returns how much may be fetched to the disk of `path`, which exists."""
  return max(0, shutil.disk_usage(path).free - _MARGIN)


def reads_directly(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file of a copy can be read in the bucket as well."""
  return _DIRECT.fullmatch(buckets.shown(path)) is not None


def fetch(
  paths: Iterable[str | os.PathLike[str]],
  progress: parts.Progress | None = None,
) -> dict[str, str]:
  """Brings files that are in the bucket alone; returns where to read each.

  That is its path, or its URL where the disk has no room for all of them and
  they can be read where they are. `progress` is told of bytes. What another
  process is fetching is waited for.

  Raises:
    UserError: if there is no room, or the bucket has not what it had.
  """
  names = [os.fspath(x) for x in paths]
  places = dict(zip(names, names, strict=True))
  objects = _find_missing(names)
  if not objects:
    return places
  root, need = objects[0].root, _bytes_to_come(objects)
  folder = os.path.commonpath([x.path.parent for x in objects])
  if need <= free_bytes(root):
    _fetch(_bucket(root, root.parent), objects, folder, progress)
    return places
  if not all(reads_directly(x.path) for x in objects):
    raise _no_room(folder, need)
  _say(
    f'{formats.size(need)} of {buckets.shown(folder)} have no room in {root}: '
    'they are read from the bucket, which is slower'
  )
  return places | {str(x.path): buckets.shown(x.path) for x in objects}


def upload(
  folder: pathlib.Path, progress: parts.Progress | None = None
) -> bool:
  """Brings a prepared dataset or a pack of a copy to its bucket.

  What is there already stays; last comes the file that says that it is whole.
  `progress` is told of bytes. Returns whether anything was to be brought.

  Raises:
    UserError: if the bucket cannot be written to, or another machine does so.
  """
  root = _root(folder)
  marker = next((x for x in _MARKERS if (folder / x).is_file()), '')
  if root is None or not marker:
    return False
  start = folder.relative_to(root).as_posix() + '/'
  known = {
    name.removeprefix(start): entry
    for name, entry in _read_list(root).items()
    if name.startswith(start)
  }
  before, _ = _compare(folder, marker, known)
  if not before:
    return False
  bucket = _bucket(folder, root.parent)
  there = _look(bucket, folder)  # Another machine may have been as fast.
  todo, stale = _compare(folder, marker, there)
  if marker in todo and marker not in before:
    return False  # It has been prepared anew; what is here came from there.
  if marker in todo and marker in there:
    if any(known.get(x) != there.get(x) for x in _IDENTITY):
      raise _overtaken(folder)
    bucket.remove([marker])  # Or it would speak of what is half replaced.
  sizes = {x: (folder / x).stat().st_size for x in todo}
  tell = _counter(sum(sizes.values()), progress)

  def put(name: str) -> None:
    bucket.upload(folder / name, name)
    tell(sizes[name])

  content = [x for x in todo if x != marker]
  buckets.at_once(put, content)
  bucket.remove(stale)
  if not todo:
    return False
  there = _look(bucket, folder)
  if marker in todo:
    if not all(x in there and _is_put(folder / x, there[x]) for x in content):
      raise _overtaken(folder)
    put(marker)
    there[marker] = _entry((folder / marker).read_bytes())
  _note(root, {start + k: x for k, x in there.items()}, start)
  return True


def _look(
  bucket: buckets.Bucket, folder: pathlib.Path
) -> dict[str, buckets.Entry]:
  """Returns what is in a bucket, with the sums of all that tells of images."""
  objects = _tell_sums(bucket, _list_objects(bucket, folder))
  return {x.name: x.entry for x in objects}


def _is_put(path: pathlib.Path, entry: buckets.Entry) -> bool:
  if entry.size > _HASHED:
    return path.stat().st_size == entry.size
  return buckets.is_same(path, entry)


def _counter(
  total: int, progress: parts.Progress | None
) -> Callable[[int], None]:
  """Returns what threads tell how many bytes came; it tells `progress` all."""
  done, lock = 0, threading.Lock()

  def tell(count: int) -> None:
    nonlocal done
    with lock:
      done += count
      if progress:
        progress(done, total)

  return tell


def _overtaken(folder: pathlib.Path) -> errors.UserError:
  return errors.UserError(
    'Another machine has uploaded another dataset there meanwhile.',
    buckets.shown(folder),
    'To put this one in its place prepare it again, on one machine.',
  )


def _note(
  root: pathlib.Path, entries: dict[str, buckets.Entry], start: str
) -> None:
  """Notes what the bucket has of names that begin with `start`."""
  with _writing(root), _locked(root / _LIST):
    others = _read_list(root)
    others = {k: x for k, x in others.items() if not k.startswith(start)}
    files.write_json(root / _LIST, others | entries)


def send(path: pathlib.Path) -> None:
  """Brings a file of what `bring` was told of to its bucket, if it may.

  Raises:
    UserError: if the bucket cannot be reached.
  """
  if (root := _root(path)) is not None:
    with contextlib.suppress(buckets.ForbiddenError):
      name = path.relative_to(root).as_posix()
      _bucket(root, root.parent).upload(path, name)
      _note(root, {name: _entry(path.read_bytes())}, name)


def _compare(
  folder: pathlib.Path, marker: str, there: Mapping[str, buckets.Entry]
) -> tuple[list[str], list[str]]:
  """Returns what the bucket lacks of `folder`, and what it has beyond it.

  Where the images are the same, only sizes are compared of what is large: to
  hash ImageNet takes minutes. And what is beyond it may be another machine's.
  """
  here = [
    x.relative_to(folder) for x in sorted(folder.rglob('*')) if x.is_file()
  ]
  names = [x.as_posix() for x in here if not any(map(_OURS.fullmatch, x.parts))]
  same = all(
    x in there and buckets.is_same(folder / x, there[x])
    for x in names
    if x in _IDENTITY
  )

  def is_there(name: str) -> bool:
    if name not in there:
      return False
    if same and _LARGE.fullmatch(name):
      return (folder / name).stat().st_size == there[name].size
    if name == marker and not same:
      return False
    if not there[name].md5:
      return False  # What is as large may be another's.
    return buckets.is_same(folder / name, there[name])

  stale = [] if same else sorted(set(there) - set(names))
  return [x for x in names if not is_there(x)], stale


def fetch_folder(
  path: pathlib.Path, progress: parts.Progress | None = None
) -> bool:
  """Brings a folder of raw files into a copy; it is whole or not there.

  Returns False if there is nothing to bring. `progress` is told of bytes.

  Raises:
    UserError: if there is no room, or the bucket cannot be read.
  """
  if buckets.url_of(path) is None or path.exists():
    return False
  bucket = buckets.Bucket(buckets.shown(path))
  part = path.with_name(f'.{path.name}.part')
  objects = _list_objects(bucket, part)
  if not objects:
    return False
  with _writing(path.parent), _locked(path):
    if path.exists():  # Another process was as fast.
      return True
    lacking = [x for x in objects if not _has_size(x)]
    _fetch_raw(bucket, lacking, path, progress)
    (part / _FETCHED).touch()
    part.rename(path)
  return True


def fetch_files(
  path: pathlib.Path, progress: parts.Progress | None = None
) -> None:
  """Brings what a folder of a copy lacks; what it has is left as it is.

  `progress` is told of bytes.

  Raises:
    UserError: if there is no room, or the bucket cannot be read.
  """
  if buckets.url_of(path) is None:
    return
  bucket = buckets.Bucket(buckets.shown(path))
  if objects := _list_objects(bucket, path):
    with _writing(path.parent), _locked(path):
      lacking = [x for x in objects if not x.path.exists()]
      _fetch_raw(bucket, lacking, path, progress)


def _fetch_raw(
  bucket: buckets.Bucket,
  objects: Sequence[_Object],
  path: pathlib.Path,
  progress: parts.Progress | None,
) -> None:
  """Brings objects of the folder `path`, if there is room for all."""
  if (need := _bytes_to_come(objects)) > free_bytes(path.parent):
    raise _no_room(str(path), need)
  if objects:
    _fetch(bucket, objects, str(path), progress)


def is_fetched(path: pathlib.Path) -> bool:
  """Returns whether `fetch_folder` has made a folder, and could again."""
  return (path / _FETCHED).exists() and holds(path)


def holds(path: pathlib.Path) -> bool:
  """Returns whether the bucket has that of which `path` is the copy."""
  if buckets.url_of(path) is None:
    return False
  return buckets.Bucket(buckets.shown(path.parent)).holds(path.name)


def lost(path: str | os.PathLike[str]) -> errors.UserError:
  """Returns what is said of records that are not where they were prepared."""
  return errors.UserError(
    'Prepared records are gone.',
    buckets.shown(path),
    'Put them back, or remove the dataset from prepared/ and prepare it again.',
  )


@contextlib.contextmanager
def unchanged(
  folder: str | os.PathLike[str], is_same: Callable[[], bool]
) -> Iterator[None]:
  """Raises UserError if a copy holds other images, before or after.

  What is open by then goes on to be what it was.
  """

  def check() -> None:
    if buckets.url_of(folder) is not None and not is_same():
      raise changed(folder)

  check()
  yield
  check()


def changed(folder: str | os.PathLike[str]) -> errors.UserError:
  """Returns what is said of a copy with other images than were looked for."""
  return errors.UserError(
    'A dataset has changed since it was opened here.',
    buckets.shown(folder),
    'Start again, with what its bucket has now.',
  )


def _fetch(
  bucket: buckets.Bucket,
  objects: Sequence[_Object],
  folder: str,
  progress: parts.Progress | None,
) -> None:
  """Brings all `objects`; says what it does."""
  tell = _counter(sum(x.entry.size for x in objects), progress)
  count = f'{len(objects):,} file{"s" * (len(objects) > 1)}'
  _say(
    f'fetching {formats.size(_bytes_to_come(objects))} in {count} from '
    f'{buckets.shown(folder)}'
  )
  with _writing(objects[0].root):
    buckets.at_once(lambda x: _download(bucket, x, tell), objects)


def _download(
  bucket: buckets.Bucket,
  x: _Object,
  on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
  try:
    bucket.download(x.name, x.entry, x.path, on_bytes)
  except FileNotFoundError:
    raise lost(x.path) from None


def _read_list(root: pathlib.Path) -> dict[str, buckets.Entry]:
  try:
    found = json.loads((root / _LIST).read_text())
  except FileNotFoundError:
    return {}
  return {name: buckets.Entry(*x) for name, x in found.items()}


def _find_missing(paths: Iterable[str | os.PathLike[str]]) -> list[_Object]:
  """Returns the objects of those `paths` that are not here.

  Raises:
    UserError: if there is none.
  """
  found, read = [], functools.cache(_read_list)
  for path in dict.fromkeys(paths):
    if not os.path.exists(path) and _root(pathlib.Path(path)):
      if (x := _find(path, read)) is None:
        raise lost(path)
      found.append(x)
  return found


def _find(
  path: str | os.PathLike[str],
  read: Callable[[pathlib.Path], Mapping[str, buckets.Entry]] = _read_list,
) -> _Object | None:
  """Returns the object of a path in a copy, None where there is none."""
  path = pathlib.Path(path)
  if (root := _root(path)) is None:
    return None
  name = path.relative_to(root).as_posix()
  entry = read(root).get(name)
  return entry and _Object(root, name, entry)


def _root(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder with the list that tells of a path in a copy."""
  if buckets.url_of(path) is None:
    return None
  return next((x for x in path.parents if (x / _LIST).is_file()), None)


def _list_objects(bucket: buckets.Bucket, root: pathlib.Path) -> list[_Object]:
  """Returns all that is in `bucket`, of which `root` becomes the copy."""
  return [
    _Object(root, name, entry)
    for name, entry in bucket.list().items()
    # They would be written elsewhere.
    if not {'', '.', '..'} & set(name.split('/'))
  ]


def _tell_sums(
  bucket: buckets.Bucket, objects: Iterable[_Object]
) -> list[_Object]:
  """Returns `objects` with the sum of small ones of which the bucket has none.

  They are read for it: another dataset's may be as large.
  """
  found = {x.name: x for x in objects}

  def read(x: _Object) -> None:
    if (data := bucket.read(x.name)) is None:
      del found[x.name]  # It has just been removed.
      return
    found[x.name] = x._replace(entry=_entry(data))

  untold = [x for x in found.values() if not x.entry.md5 and _is_small(x.path)]
  buckets.at_once(read, untold)
  return list(found.values())


def _entry(data: bytes) -> buckets.Entry:
  return buckets.Entry(len(data), hashlib.md5(data).hexdigest())


def _has_size(x: _Object) -> bool:
  with contextlib.suppress(FileNotFoundError):
    return x.path.stat().st_size == x.entry.size
  return False


def _bytes_to_come(objects: Iterable[_Object]) -> int:
  """Returns the bytes of objects, less those of broken downloads."""
  total = 0
  for x in objects:
    total += x.entry.size
    with contextlib.suppress(FileNotFoundError):
      total -= buckets.part_of(x.path, x.entry).stat().st_size
  return total


def _no_room(folder: str, need: int) -> errors.UserError:
  return errors.UserError(
    f'{formats.size(need)} of {buckets.shown(folder)} have no room here.',
    f'{folder}; {formats.size(_MARGIN)} stay free there',
    f'Make room, or name a folder on another disk: {_ELSEWHERE}.',
  )


@contextlib.contextmanager
def _writing(root: pathlib.Path) -> Iterator[None]:
  """Raises UserError where the disk does not take the copy."""
  try:
    yield
  except OSError as e:
    raise errors.UserError(
      f'Cannot write the copy of {buckets.shown(root)}: {e.strerror}.',
      str(root),
      f'Name a folder that you may write to, with room: {_ELSEWHERE}.',
    ) from e


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Lets one thread of one process at a time see to `path`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path.with_name(f'.{path.name}.lock'), 'w') as file:
    files.lock(file.fileno())
    yield


def _bucket(path: pathlib.Path, data_dir: pathlib.Path) -> buckets.Bucket:
  """Returns what `path` is the copy of."""
  where = f'config.data_dir={buckets.shown(data_dir)}'
  return buckets.Bucket(buckets.shown(path), where)


def _say(text: str) -> None:
  print(text, file=sys.stderr)

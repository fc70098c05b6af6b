"""Parquet files of images, as the Hugging Face Hub has them.

A column of structs holds the bytes and the path of each image, or one of
binaries its bytes alone; a column of numbers or names its label. The schema's
metadata say what the numbers stand for.
"""

import collections
import contextlib
import functools
import json
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet as pq

from jaxprog import errors
from jaxprog.data import builders, parts, sources

# Images that are read at once from a file.
_BATCH = 16
# What a clone without Git LFS leaves.
_POINTER = b'version https://git-lfs'


def list_raw(
  dataset: str, root: pathlib.Path, image: str = '', label: str = ''
) -> builders.Raw:
  """Returns the images in the Parquet files below a folder, checked.

  `image` and `label` name their columns, '' where that is to be found out.

  Raises:
    UserError: if files are missing, damaged, or not of images and labels.
  """
  files = sources.find_files(root, '.parquet')
  splits, left_out = sources.list_splits(root, files, dataset)
  used = [x for y in splits.values() for x in y]
  sources.check_complete(used)
  looks = sources.look(root, used)
  listed = parts.in_order(functools.partial(_list_file, image, label), used)
  found = dict(zip(used, listed, strict=True))
  return sources.create_raw(
    root,
    {k: {x: found[x] for x in y} for k, y in splits.items()},
    looks,
    left_out=left_out,
  )


def _list_file(image: str, label: str, file: pathlib.Path) -> sources.Listed:
  """Returns the names and labels of a file's images; their bytes stay there."""
  with _reading(file), pq.ParquetFile(file) as opened:
    schema = opened.schema_arrow
    features = _read_features(schema)
    image = _choose('image', image, schema, features, file)
    label = _choose('label', label, schema, features, file)
    kind = schema.field(image).type
    children = [x.name for x in kind] if pa.types.is_struct(kind) else []
    data = f'{image}.bytes' if children else image
    path = [f'{image}.path'] if 'path' in children else []
    table = opened.read([label, *path])
    groups = list(_list_groups(opened.metadata, data))
  names = table[image].to_pylist() if path else [None] * len(table)
  return sources.Listed(
    names=[(x or {}).get('path') or '' for x in names],
    labels=['' if x is None else x for x in table[label].to_pylist()],
    class_names=tuple(features.get(label, {}).get('names') or ()),
    images=functools.partial(_iterate, file, data, groups),
  )


def _read_features(schema: pa.Schema) -> dict[str, Any]:
  """Returns what the Hub's libraries note of the columns, {} if nothing."""
  try:
    text = (schema.metadata or {}).get(b'huggingface', b'{}')
    return json.loads(text)['info']['features']
  except (ValueError, KeyError, TypeError):
    return {}


def _choose(
  what: str,
  name: str,
  schema: pa.Schema,
  features: dict[str, Any],
  file: pathlib.Path,
) -> str:
  """Returns the column of images or of labels: as named, or the only one."""
  fits, noted = _KINDS[what]
  known = [x.name for x in schema if fits(x.type)]
  if name in known:
    return name
  told = [x for x in known if features.get(x, {}).get('_type') == noted]
  if not name:
    for found in ([what] if what in known else [], told):
      if len(found) == 1:
        return found[0]
  columns = ', '.join(f'{x.name} ({x.type})'[:60] for x in schema)
  other = f' called {name}' if name else ''
  raise errors.UserError(
    f'There is no one column of {what}s{other}: {columns}.',
    str(file),
    f'Name it: ?{what}={known[0] if known else "COLUMN"}',
  )


def _holds_images(kind: pa.DataType) -> bool:
  if pa.types.is_struct(kind):
    index = kind.get_field_index('bytes')
    return index >= 0 and _holds_images(kind.field(index).type)
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  tests = pa.types.is_integer, pa.types.is_string, pa.types.is_large_string
  return any(x(kind) for x in tests)


# What a column must be, and what the Hub's libraries call it.
_KINDS = {
  'image': (_holds_images, 'Image'),
  'label': (_holds_labels, 'ClassLabel'),
}


def _list_groups(
  metadata: pq.FileMetaData, column: str
) -> Iterator[tuple[int, int]]:
  """Yields the rows of each group, and the mean bytes of one."""
  for i in range(metadata.num_row_groups):
    group = metadata.row_group(i)
    columns = map(group.column, range(group.num_columns))
    size = sum(
      x.total_uncompressed_size for x in columns if x.path_in_schema == column
    )
    yield group.num_rows, size // max(group.num_rows, 1)


class _Batch:
  """A few images that are read at once, and then held for as long as needed."""

  def __init__(self, stream: '_Stream', start: int, count: int):
    self.stream, self.start, self.count = stream, start, count
    self.values: Any = None


class _Row(NamedTuple):
  batch: _Batch
  position: int
  size: int

  @property
  def archive(self) -> pathlib.Path:
    """The file."""
    return self.batch.stream.file

  def read_bytes(self) -> bytes:
    """Returns its bytes, or raises OSError."""
    self.batch.stream.load(self.batch)
    value = self.batch.values[self.position].as_py()
    data = value['bytes'] if isinstance(value, dict) else value
    if data is None:
      raise OSError(0, f'row {self.batch.start + self.position} has no bytes')
    return data


class _Stream:
  """Reads a column of a file once, from its start, as its rows are asked for.

  A group of rows may be larger than the memory: of what is not held by anybody
  nothing stays.
  """

  def __init__(self, file: pathlib.Path, column: str):
    self.file = file
    self._column = column
    self._lock = threading.Lock()
    self._expected: collections.deque[_Batch] = collections.deque()
    self._found = self._read()

  def expect(self, start: int, count: int) -> _Batch:
    """Returns the batch that comes after those that are expected."""
    batch = _Batch(self, start, count)
    with self._lock:
      self._expected.append(batch)
    return batch

  def load(self, batch: _Batch) -> None:
    """Reads up to a batch, or raises OSError."""
    with self._lock:
      while batch.values is None:
        try:
          found = next(self._found, None)
        except pa.ArrowException as e:
          raise OSError(0, ' '.join(str(e).split())[:200]) from e
        if found is None or not self._expected:
          raise OSError(0, 'it is not what it was')
        first = self._expected.popleft()
        if len(found) != first.count:
          raise OSError(0, 'it is not what it was')
        first.values = found.column(0)

  def _read(self) -> Iterator[pa.RecordBatch]:
    # With a buffer, or all of a group would be read at once.
    with pq.ParquetFile(
      self.file, buffer_size=1 << 20, page_checksum_verification=True
    ) as opened:
      for group in range(opened.num_row_groups):
        yield from opened.iter_batches(_BATCH, [group], [self._column])


def _iterate(
  file: pathlib.Path, column: str, groups: Sequence[tuple[int, int]]
) -> Iterator[_Row]:
  stream, start = _Stream(file, column), 0
  for count, size in groups:
    for first in range(start, start + count, _BATCH):
      batch = stream.expect(first, min(_BATCH, start + count - first))
      for i in range(batch.count):
        yield _Row(batch, i, size)
    start += count


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (OSError, pa.ArrowException) as e:
    text, advice = ' '.join(str(e).split())[:200], 'Is the download complete?'
    with contextlib.suppress(OSError), open(file, 'rb') as opened:
      if opened.read(len(_POINTER)) == _POINTER:
        text, advice = 'it stands for a file in Git LFS', 'git lfs pull'
    what = f'{file.name} cannot be read: {text}.'
    raise errors.UserError(what, str(file), advice) from e

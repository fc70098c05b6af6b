"""Parquet files of images, as the Hugging Face Hub has them.

A column of structs holds the bytes and the path of each image, or one of
binaries its bytes alone; a column of numbers or names its label. The schema's
metadata say what the numbers stand for.
"""

import bisect
import contextlib
import functools
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet as pq

from jaxprog import errors
from jaxprog.data import builders, parts, sources

# Images that are read at once from a file, and such that may be held: threads
# that read in order are so far apart.
_BATCH = 16
_HELD = 8 + 8 * (os.cpu_count() or 1)
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


class _Row(NamedTuple):
  column: '_Column'
  number: int
  size: int

  @property
  def archive(self) -> pathlib.Path:
    """The file."""
    return self.column.file

  def read_bytes(self) -> bytes:
    """Returns its bytes, or raises OSError."""
    return self.column.read(self.number)


class _Column:
  """Images of a file, which is read from its start if they are asked for so.

  A group of rows may be larger than the memory: what was read stays until it
  is asked for, and at most as much of it as threads may be apart.
  """

  def __init__(self, file: pathlib.Path, name: str, counts: Sequence[int]):
    self.file = file
    self._name = name
    # Where each group of rows begins.
    self._starts = list(itertools.accumulate(counts, initial=0))
    self._lock = threading.Lock()
    # The first row of a batch -> its values, and how many were not asked for.
    self._held: dict[int, tuple[Any, int]] = {}
    # What comes next, and from which row on.
    self._coming: Iterator[pa.RecordBatch] = iter(())
    self._next = -1

  def read(self, row: int) -> bytes:
    """Returns the bytes of an image, or raises OSError."""
    group = bisect.bisect_right(self._starts, row) - 1
    begin = self._starts[group]
    first = row - (row - begin) % _BATCH
    with self._lock:
      try:
        if first not in self._held:
          self._held[first] = self._load(first, group)
      except pa.ArrowException as e:
        raise OSError(0, ' '.join(str(e).split())[:200]) from e
      values, left = self._held.pop(first)
      if left > 1:
        self._held[first] = values, left - 1
    value = values[row - first].as_py()
    data = value['bytes'] if isinstance(value, dict) else value
    if data is None:
      raise OSError(0, f'row {row} has no bytes')
    return data

  def _load(self, first: int, group: int) -> tuple[Any, int]:
    """Returns the batch that begins with a row; those before it are held."""
    if not self._starts[group] <= self._next <= first:
      self._coming, self._next = self._open(group), self._starts[group]
    while True:
      begin, self._next = self._next, -1  # Unless it comes.
      batch = next(self._coming, None)
      if batch is None or not len(batch):
        raise OSError(0, 'it is not what it was')
      self._next = begin + len(batch)
      if begin == first:
        return batch.column(0), len(batch)
      self._held[begin] = batch.column(0), len(batch)
      if len(self._held) > _HELD:
        del self._held[next(iter(self._held))]

  def _open(self, group: int) -> Iterator[pa.RecordBatch]:
    # Else a whole group would be in memory before its first row is.
    with pq.ParquetFile(
      self.file,
      buffer_size=1 << 20,
      pre_buffer=False,
      page_checksum_verification=True,
    ) as opened:
      for i in range(group, opened.num_row_groups):
        yield from opened.iter_batches(_BATCH, [i], [self._name])


def _iterate(
  file: pathlib.Path, name: str, groups: Sequence[tuple[int, int]]
) -> Iterator[_Row]:
  column = _Column(file, name, [count for count, _ in groups])
  sizes = (y for count, size in groups for y in itertools.repeat(size, count))
  for number, size in enumerate(sizes):
    yield _Row(column, number, size)


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

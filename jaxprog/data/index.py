"""The label and the file name of every record, kept beside the records.

They are noted while records are written; those of records that came otherwise
are read from them, once.
"""

import contextlib
import io
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from jaxprog import files
from jaxprog.data import parts, shards

# Records of one part of the reading: of ImageNet 0.5 GB.
_PART = 4096


def read_labels(
  source: shards.Shards,
  directory: pathlib.Path,
  split: str,
  progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """Returns every record's label as prepared, int32 (n,)."""
  try:
    labels = np.load(directory / f'labels-{split}.npy', allow_pickle=False)
    if labels.shape == (len(source),) and labels.dtype == np.int32:
      return labels
  except (OSError, ValueError, EOFError):
    pass  # Not there yet, or not whole.
  return _read_all(source, directory, split, progress)[0]


def read_names(
  source: shards.Shards, directory: pathlib.Path, split: str
) -> list[str]:
  """Returns every record's file name; some of tfds' own have numbers."""
  try:
    text = (directory / f'names-{split}.txt').read_bytes()
    # A name may hold a line break; lists of older versions are lines.
    names = text.split(b'\0' if b'\0' in text else b'\n')
    if len(names) == len(source):
      return [x.decode() for x in names]
  except (OSError, ValueError):
    pass  # Not there yet, or not whole.
  return [x.decode() for x in _read_all(source, directory, split)[1]]


def _read_all(
  source: shards.Shards,
  directory: pathlib.Path,
  split: str,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, list[bytes]]:
  """Returns labels and file names as all records say; keeps both."""

  def read(part: range) -> parts.Arrays:
    found = [_read(source[i], split, i) for i in part]
    labels, names = zip(*found, strict=True)
    text = np.frombuffer(b'\0'.join(names), np.uint8)
    return {'labels': np.array(labels, np.int32), 'names': text}

  source.fetch()
  folder = directory / f'incomplete.index-{split}'
  found = list(parts.read_parts(folder, len(source), _PART, read, progress))
  labels = np.concatenate(
    [x['labels'] for x in found] or [np.empty(0, np.int32)]
  )
  names = [y for x in found for y in x['names'].tobytes().split(b'\0')]
  save(directory, split, labels, names)
  shutil.rmtree(folder, ignore_errors=True)
  return labels, names


def _read(record: bytes, split: str, position: int) -> tuple[int, bytes]:
  """Returns a record's label, and its file name or what stands for it."""
  feature = shards.parse_record(record)
  name = shards.file_name(feature, split, position)
  return feature['label'].int64_list.value[0], name


def save(
  directory: pathlib.Path, split: str, labels: np.ndarray, names: list[bytes]
) -> None:
  """Keeps labels and file names of all records of a split, in order."""
  buffer = io.BytesIO()
  np.save(buffer, labels)
  with contextlib.suppress(OSError):  # Prepared data may be read-only.
    files.write_bytes(directory / f'labels-{split}.npy', buffer.getvalue())
    files.write_bytes(directory / f'names-{split}.txt', b'\0'.join(names))

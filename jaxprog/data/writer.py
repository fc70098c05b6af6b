"""Writes the images of a split as records, in the order that tfds gives them.

That is the order of the hashes of their names, which are known before any image
is read; of files of many it is that in which they lie there. So each is read
once, by all cores, and written once. What files were finished before a kill is
gone on with.
"""

import contextlib
import hashlib
import io
import itertools
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from array_record.python import array_record_module
from tensorflow_datasets.core import hashing
from tensorflow_datasets.proto import tf_feature_pb2

from jaxprog import errors, files
from jaxprog.data import parts, shards

# Encoded images do not become smaller, and zstd would take longer for them than
# all else.
OPTIONS = 'group_size:1,uncompressed'
# Images that are read one after the other: to hand each on alone would cost as
# much as to read it.
_CHUNK = 16


class Image(Protocol):
  """What becomes a record."""

  @property
  def file_name(self) -> str:
    """Its name, of which a class has one."""

  @property
  def wnid(self) -> str:
    """Its class."""

  def read(self) -> bytes:
    """Returns the encoded bytes; from any thread."""


class Shard(NamedTuple):
  """A file of records."""

  path: pathlib.Path
  # Bytes of the records.
  num_bytes: int
  # SHA-256 of each image, uint8 (n, 32).
  digests: np.ndarray


class Written(NamedTuple):
  """What was written of n images."""

  # In the order of the records.
  shards: list[Shard]
  # Which image each record holds, (n,).
  order: np.ndarray

  @property
  def digests(self) -> np.ndarray:
    """SHA-256 of each image, in the order in which they were given."""
    digests = np.empty((len(self.order), 32), np.uint8)
    digests[self.order] = np.concatenate([x.digests for x in self.shards])
    return digests


def write_split(
  folder: pathlib.Path,
  split: str,
  images: Sequence[Image],
  classes: Sequence[str],
  progress: Callable[[int], None] = lambda done: None,
  *,
  in_order: bool = False,
) -> Written:
  """Returns what became of `images`, now in `folder`.

  The label of an image is the position of its class in `classes`. `progress` is
  told how many are done. If `in_order`, so are the records. What a call for the
  same images had finished in `folder` before it was interrupted is not written
  again.

  Raises:
    UserError: if an image cannot be read, or two have one name.
  """
  order = np.arange(len(images)) if in_order else _sort(split, images)
  found = list(_find_shards(folder, split))
  if done := sum(len(x.digests) for x in found):
    progress(done)
  labels = {wnid: i for i, wnid in enumerate(classes)}
  chunks = (order[i : i + _CHUNK] for i in range(done, len(order), _CHUNK))

  def encode(chunk: np.ndarray) -> list[tuple[bytes, bytes]]:
    return [_encode(images[i], labels) for i in chunk]

  with contextlib.closing(parts.in_order(encode, chunks)) as encoded:
    records = itertools.chain.from_iterable(encoded)
    while done < len(order):
      told = _told(records, done, progress)
      found.append(_write_shard(folder, f'{split}-{len(found)}', told))
      done += len(found[-1].digests)
  return Written(found, order)


def _sort(split: str, images: Sequence[Image]) -> np.ndarray:
  """Returns the positions of `images` in the order of their records."""
  hasher = hashing.Hasher(split)
  keys = [f'{x.wnid}/{x.file_name}' for x in images]
  hashes = [hasher.hash_key(x) for x in keys]
  order = sorted(range(len(keys)), key=hashes.__getitem__)
  for a, b in itertools.pairwise(order):
    if hashes[a] == hashes[b]:
      raise errors.UserError(
        f'Two images of the {split} split are called {keys[a]!r}.',
        '',
        'Rename one of them.',
      )
  return np.array(order, np.int64)


def _told(
  records: Iterator[tuple[bytes, bytes]],
  done: int,
  progress: Callable[[int], None],
) -> Iterator[tuple[bytes, bytes]]:
  for i, record in enumerate(records, 1):
    progress(done + i)
    yield record


def _encode(image: Image, labels: Mapping[str, int]) -> tuple[bytes, bytes]:
  """Returns the record of an image, a tf.train.Example, and its SHA-256.

  Around the image are written by hand the lengths of the five messages that it
  is in: to let protobuf do that takes ten times as long, for it copies it each
  time.
  """
  data = image.read()
  features = tf_feature_pb2.Features()
  features.feature['label'].int64_list.value.append(labels[image.wnid])
  for name in ('file_name', 'wnid'):
    value = getattr(image, name).encode()
    features.feature[name].bytes_list.value.append(value)
  rest = features.SerializeToString()
  heads, size = [], len(data)
  for before in (b'\x0a', b'\x0a', b'\x0a\x05image\x12', b'\x0a'):
    heads.append(before + _varint(size))
    size += len(heads[-1])
  heads.append(b'\x0a' + _varint(size + len(rest)))
  record = b''.join((*reversed(heads), data, rest))
  return record, hashlib.sha256(data).digest()


def _varint(number: int) -> bytes:
  """Returns a length as protobuf has it: seven bits a byte, low ones first."""
  found = bytearray()
  while number > 0x7F:
    found.append(number & 0x7F | 0x80)
    number >>= 7
  found.append(number)
  return bytes(found)


def write_records(
  path: str | os.PathLike[str], records: Iterable[bytes]
) -> None:
  """Writes one file of records."""
  writer = array_record_module.ArrayRecordWriter(os.fspath(path), OPTIONS)
  for record in records:
    writer.write(record)
  writer.close()


def _write_shard(
  folder: pathlib.Path, name: str, records: Iterator[tuple[bytes, bytes]]
) -> Shard:
  """Writes the next of `records`, as many as a file may hold."""
  folder.mkdir(parents=True, exist_ok=True)
  digests, num_bytes = [], 0

  def take() -> Iterator[bytes]:
    nonlocal num_bytes
    for record, digest in records:
      digests.append(digest)
      num_bytes += len(record)
      yield record
      if num_bytes >= shards.MAX_BYTES:
        return

  path, kept = folder / f'{name}.array_record', folder / f'{name}.npz'
  kept.unlink(missing_ok=True)
  write_records(path, take())
  with open(path, 'rb') as file:
    os.fsync(file.fileno())
  sums = np.frombuffer(b''.join(digests), np.uint8).reshape(-1, 32)
  out = io.BytesIO()
  np.savez(out, digests=sums, sizes=np.array((num_bytes, path.stat().st_size)))
  files.write_bytes(kept, out.getvalue())
  return Shard(path, num_bytes, sums)


def drop_unfinished(folder: pathlib.Path) -> None:
  """Removes what was begun and not finished; a kill leaves that."""
  for path in folder.glob('*.array_record'):
    if not path.with_suffix('.npz').exists():
      path.unlink()
  with contextlib.suppress(OSError):
    folder.rmdir()


def _find_shards(folder: pathlib.Path, split: str) -> Iterator[Shard]:
  """Yields the files that were finished before."""
  for i in itertools.count():
    path = folder / f'{split}-{i}.array_record'
    try:
      with np.load(path.with_suffix('.npz'), allow_pickle=False) as kept:
        num_bytes, size = map(int, kept['sizes'])
        if path.stat().st_size != size:
          return
        yield Shard(path, num_bytes, kept['digests'])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      return

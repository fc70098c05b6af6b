"""The files that records lie in: how large, and how many may be open."""

import bisect
import contextlib
import itertools
import os
import pathlib
import resource
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import file_adapters, shuffle
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.proto import tf_example_pb2

from jaxprog import buckets, errors
from jaxprog.data import parts, remote

# Of one file. Reading by index keeps each of them open, and tfds would make
# 1,024 of ImageNet's 138 GB: all that a login shell may open.
MAX_BYTES = 4 << 30
# Files open beside records: 14 in training on CPUs, and 11 for each worker
# process. So many are asked for, and so many must be had.
_OTHERS, _FEWEST = 1024, 64
# Files in which tfds sorts what it prepares, if that is more than 1 GB.
SORTED = shuffle.BUCKETS_NUMBER

# Directory, split and time of preparation -> what reads it in this process.
_Key = tuple[str, str, int]
_shared: weakref.WeakValueDictionary[_Key, 'Shards'] = (
  weakref.WeakValueDictionary()
)
_lock = threading.Lock()


class _Config(shard_utils.ShardConfig):
  """As few files as MAX_BYTES allows."""

  @classmethod
  def calculate_number_shards(
    cls, total_size: int, num_examples: int, uses_precise_sharding: bool = True
  ) -> int:
    """Returns in how many files a split of `total_size` bytes is written."""
    del uses_precise_sharding
    return min(-(-total_size // MAX_BYTES), num_examples)


class DownloadConfig(tfds.download.DownloadConfig):
  """How tfds is to prepare a dataset."""

  def get_shard_config(self) -> shard_utils.ShardConfig:
    """Returns ours: tfds itself heeds only num_shards, not sizes."""
    return _Config()


class Shards:
  """The records of one split by position; can be pickled.

  All who read a split in this process share one. A file is opened when it is
  first read and stays open for as long as somebody has the Shards; reading is
  thread-safe.
  """

  def __init__(
    self,
    key: _Key,
    paths: Sequence[str],
    counts: Sequence[int],
    places: Mapping[str, str],
  ):
    self._key, self.paths, self._counts = key, tuple(paths), tuple(counts)
    # Path -> where it is read; only of what was fetched.
    self._places = dict(places)
    self._ends = tuple(itertools.accumulate(counts))
    self._readers: list[Any] = [None] * len(paths)
    # Another process may replace what a bucket replaces.
    self._is_copy = buckets.url_of(key[0]) is not None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, position: int) -> bytes:
    if not 0 <= position < len(self):
      raise IndexError(position)
    i = bisect.bisect_right(self._ends, position)
    position -= self._ends[i] - self._counts[i]
    # A list of positions would take 2 ns for each record of the file.
    (record,) = self._reader(i).read(position, position + 1)
    return record

  def __reduce__(self) -> tuple[Any, ...]:
    return _share, (self._key, self.paths, self._counts, self._places)

  def fetch(self, progress: parts.Progress | None = None) -> None:
    """Brings what is in a bucket alone; else each file comes when it is read.

    What the disk has no room for is read in the bucket from now on.

    Raises:
      UserError: if that cannot be, or other images have taken their place.
    """
    if absent := [x for x in self.paths if x not in self._places]:
      with self._unchanged():
        self._places |= remote.fetch(absent, progress)

  def _reader(self, i: int) -> Any:
    if self._readers[i] is None:
      with self._lock:
        if self._readers[i] is None:
          self._readers[i] = self._open(i)
    return self._readers[i]

  def _open(self, i: int) -> Any:
    path = self.paths[i]
    with self._unchanged():
      if path not in self._places:
        self._places |= remote.fetch([path])
      place = self._places[path]
      reader = array_record_module.ArrayRecordReader(
        place,
        options='readahead_buffer_size:0',
        file_reader_buffer_size=32768,
      )
    # Of what is not there it says that it has none.
    if not reader.num_records() and not os.path.exists(place):
      raise remote.lost(path)
    if self._is_copy and reader.num_records() != self._counts[i]:
      raise remote.changed(path)
    return reader

  def _unchanged(self) -> contextlib.AbstractContextManager[None]:
    directory, _, prepared = self._key
    return remote.unchanged(directory, lambda: _prepared(directory) == prepared)


def open_shards(builder: tfds.core.DatasetBuilder, split: str) -> Shards:
  """Returns the records of a split of a prepared dataset.

  Raises:
    UserError: if they cannot be read by position, or this process may not
      open as many files.
  """
  info = builder.info
  if file_adapters.FileFormat.ARRAY_RECORD not in info.available_file_formats():
    raise errors.UserError(
      'The prepared dataset is not in ArrayRecord files.',
      str(builder.data_dir),
      'Remove it and run --mode=prepare.',
    )
  info.set_file_format(
    file_adapters.FileFormat.ARRAY_RECORD,
    override=True,
    override_if_initialized=True,
  )
  directory = str(pathlib.Path(builder.data_dir))
  found = info.splits[split]
  return _share(
    (directory, split, _prepared(directory)),
    tuple(os.fspath(x) for x in found.filepaths),
    tuple(found.shard_lengths),
    {},
  )


def _prepared(directory: str) -> int:
  """Returns when a dataset was prepared, 0 if it is not."""
  try:
    return os.stat(f'{directory}/dataset_info.json').st_mtime_ns
  except FileNotFoundError:
    return 0


def _share(
  key: _Key,
  paths: tuple[str, ...],
  counts: tuple[int, ...],
  places: Mapping[str, str],
) -> Shards:
  """Returns what reads a split in this process, with room for its files."""
  with _lock:
    shards = _shared.get(key)
    if shards is None:
      shards = Shards(key, paths, counts, places)
      count = sum(len(x.paths) for x in (shards, *_shared.values()))
      if not allow(count):
        raise too_many(count, key[0])
      _shared[key] = shards
    return shards


def too_many(count: int, directory: str) -> errors.UserError:
  """Returns what to say where `count` files cannot be open at once."""
  hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
  return errors.UserError(
    f'{count:,} files of records must be open at once, and {_FEWEST} others; '
    f'the hard limit is {hard:,}.',
    directory,
    'Raise it (see ulimit -Hn, LimitNOFILE, docker --ulimit). Records that are '
    'prepared anew lie in few files.',
  )


def allow(count: int) -> bool:
  """Raises the soft limit of open files for `count` and those of a run.

  Each process that reads does so, however it was started. Returns whether so
  many may now be open.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  # No limit is -1.
  most = float('inf') if hard == resource.RLIM_INFINITY else hard
  wanted = min(count + _OTHERS, most)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted), hard))
  return most >= count + _FEWEST


def parse_record(record: bytes) -> Any:
  """Returns the features of a serialized tf.train.Example."""
  return tf_example_pb2.Example.FromString(record).features.feature


def file_name(feature: Any, split: str, position: int) -> bytes:
  """Returns the file name in a record, or what stands for it."""
  names = feature['file_name'].bytes_list.value
  return names[0] if names else f'{split}-{position}'.encode()

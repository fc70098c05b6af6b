"""Records as tfds itself writes them, but once and by all cores."""

import hashlib

import data_fixtures
import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxprog import errors
from jaxprog.data import builders, layouts, shards, writer

CLASSES = ('n01', 'n02')


def images(count=40):
  """Returns images of names and sizes of all kinds."""
  rng = np.random.default_rng(0)
  return [
    builders.RawImage(
      '\u00e9' * (i % 3) + f'{i}.JPEG', CLASSES[i % 2], rng.bytes(i**3)
    )
    for i in range(count)
  ]


def read_parsed(builder, split):
  """Returns the features of each record, and the files that they lie in."""
  found = shards.open_shards(builder, split)
  records = [shards.parse_record(found[i]) for i in range(len(found))]
  return [{k: str(v) for k, v in x.items()} for x in records], found.paths


def test_records_and_notes_are_tfds_own(tmp_path):
  raw = layouts.list_folder(
    data_fixtures.write_class_folders(tmp_path / 'raw', train=9)
  )
  built = []
  for kind in (builders.Images, data_fixtures.TfdsImages):
    builder = kind('imagenette', raw, tmp_path / kind.__name__)
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    built.append(builder)
  ours, theirs = built
  sums = [
    hashlib.sha256(x.read()).digest()
    for split in (builders.TRAIN, builders.EVAL)
    for x in raw.images(split)
  ]
  contents = hashlib.sha256(b''.join(sums)).hexdigest()
  noted = {**theirs.info.metadata, 'contents': contents}
  assert dict(ours.info.metadata) == noted
  for split in ('train', 'validation'):
    mine, other = (x.info.splits[split] for x in built)
    assert mine.shard_lengths == other.shard_lengths
    assert mine.num_bytes == other.num_bytes
    assert read_parsed(ours, split)[0] == read_parsed(theirs, split)[0]


def test_an_interrupted_split_goes_on_with_its_finished_files(
  tmp_path, monkeypatch
):
  expected = writer.write_split(tmp_path / 'whole', 'train', images(), CLASSES)
  monkeypatch.setattr(shards, 'MAX_BYTES', 100_000)
  read = []

  class Counted(builders.RawImage):
    def read(self):
      read.append(self.file_name)
      return self.data

  counted = [Counted(*x) for x in images()]

  def stop(done):
    if done == 25:
      raise KeyboardInterrupt

  folder = tmp_path / 'kept'
  with pytest.raises(KeyboardInterrupt):
    writer.write_split(folder, 'train', counted, CLASSES, stop)
  writer.drop_unfinished(folder)
  finished = [len(x.digests) for x in writer._find_shards(folder, 'train')]
  assert len(finished) >= 2
  read.clear()
  told = []
  found = writer.write_split(folder, 'train', counted, CLASSES, told.append)
  assert len(read) == len(set(read)) == 40 - sum(finished)
  assert told == [sum(finished), *range(sum(finished) + 1, 41)]
  np.testing.assert_array_equal(found.digests, expected.digests)
  np.testing.assert_array_equal(found.order, expected.order)
  sums = [hashlib.sha256(x.data).digest() for x in images()]
  assert [x.tobytes() for x in found.digests] == sums
  # What a crash of the machine has cut off is written again, and what follows.
  with open(found.shards[1].path, 'r+b') as file:
    file.truncate(100)
  read.clear()
  writer.write_split(folder, 'train', counted, CLASSES)
  assert len(read) == 40 - finished[0]


def test_two_images_of_one_name_are_refused(tmp_path):
  twice = [*images(), images()[7]]
  with pytest.raises(errors.UserError, match=r"called 'n02/.*7\.JPEG'"):
    writer.write_split(tmp_path, 'train', twice, CLASSES)

import numpy as np
import pytest

from jaxprog.data import index, preparation, shards


@pytest.fixture
def data_dir(tmp_path):
  preparation.prepare('digits', tmp_path)
  return tmp_path


def read(records):
  """Returns labels and names as the records themselves say."""
  features = [
    shards.parse_record(x)
    for x in map(records.source.__getitem__, range(len(records)))
  ]
  return (
    [x['label'].int64_list.value[0] for x in features],
    [x['file_name'].bytes_list.value[0].decode() for x in features],
  )


def remove_index(data_dir):
  for pattern in ('labels-*', 'names-*'):
    for file in data_dir.rglob(pattern):
      file.unlink()


def test_prepare_notes_what_it_writes(data_dir, monkeypatch):
  monkeypatch.setattr(index, '_read_all', None)
  dataset = preparation.load_dataset('digits', data_dir)
  for split in (dataset.train, dataset.eval):
    labels, names = read(split)
    np.testing.assert_array_equal(split.labels, labels)
    assert split.names() == names


def test_of_others_all_records_are_read_once(data_dir, monkeypatch):
  remove_index(data_dir)
  monkeypatch.setattr(index, '_PART', 500)
  seen = []
  dataset = preparation.load_dataset(
    'digits', data_dir, progress=lambda *x: seen.append(x)
  )
  assert seen == [(500, 1437), (1000, 1437), (1437, 1437), (360, 360)]
  labels, names = read(dataset.train)
  np.testing.assert_array_equal(dataset.train.labels, labels)
  assert dataset.train.names() == names
  again = preparation.load_dataset(
    'digits', data_dir, progress=lambda *x: seen.append(x)
  )
  assert again.fingerprint == dataset.fingerprint
  assert len(seen) == 4
  assert not list(data_dir.rglob('incomplete.*'))


def test_what_a_kill_leaves_is_not_read_again(data_dir, monkeypatch):
  expected = preparation.load_dataset('digits', data_dir).train.labels
  remove_index(data_dir)
  monkeypatch.setattr(index, '_PART', 100)

  def stop(done, total):
    if done == 800:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    preparation.load_dataset('digits', data_dir, progress=stop)
  calls, real = [], index._read

  def count(*arguments):
    calls.append(arguments)
    return real(*arguments)

  monkeypatch.setattr(index, '_read', count)
  labels = preparation.load_dataset('digits', data_dir).train.labels
  np.testing.assert_array_equal(labels, expected)
  assert len(calls) <= 1437 - 800 + 360

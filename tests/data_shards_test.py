"""Records in more files than a process may open."""

import json
import os
import resource
import subprocess
import sys
from concurrent import futures

import numpy as np
import pytest
import runs
import tensorflow_datasets as tfds
from conftest import ROOT
from data_fixtures import TfdsImages

from jaxprog.data import builders, preparation, shards

NUM_FILES = 130  # In each split of two.

# Runs main() as a user does, one call after the other, with limits of its own.
CALLS = """
import json, os, resource, sys
if __name__ == '__main__':
  limits, calls = json.loads(sys.argv[1])
  resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  sys.path.insert(0, 'tests')
  import runs
  found = [runs.call_main(*x) for x in calls]
  print(json.dumps([[x.returncode, x.stdout, x.stderr] for x in found]))
"""


@pytest.fixture(scope='module')
def many_files(tmp_path_factory):
  """A data_dir whose digits lie in 2 x NUM_FILES files."""
  path = tmp_path_factory.mktemp('many')
  builder = TfdsImages('digits', builders.list_digits(), path)
  tfds.disable_progress_bar()
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(num_shards=NUM_FILES)
  )
  return path


def call(tmp_path, limits, *calls):
  script = tmp_path / 'calls.py'
  script.write_text(CALLS)
  result = subprocess.run(
    [sys.executable, script, json.dumps([limits, calls])],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return json.loads(result.stdout)


@pytest.mark.slow
def test_a_soft_limit_is_raised_to_what_is_needed(many_files, tmp_path):
  config = f'--config=tests/tiny_config.py:{many_files}'
  arguments = (
    config,
    f'--workdir={tmp_path}/run',
    '--only=three',
    '--config.stages[0].num_epochs=1',
    '--config.num_workers=1',
    '--config.worker_kind=process',
  )
  hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
  found = call(
    tmp_path,
    (256, hard),
    (f'--config=tests/tiny_config.py:{tmp_path}/new', '--mode=prepare'),
    arguments,
  )
  assert [code for code, _, _ in found] == [0, 0], found


def test_a_low_hard_limit_is_three_lines(many_files, tmp_path):
  config = f'--config=tests/tiny_config.py:{many_files}'
  found = call(
    tmp_path,
    (256, 256),
    (config, f'--workdir={tmp_path}/run'),
    (config, '--mode=prepare'),
    (config, '--mode=check', '--config.check_steps=0'),
    (f'--config=tests/tiny_config.py:{tmp_path}/new', '--mode=prepare'),
  )
  # What is prepared here needs no more.
  assert [code for code, _, _ in found] == [2, 2, 2, 0]
  for _, _, err in found[:2]:
    lines = runs.without_activity(err)
    assert len(lines) == 3
    assert 'the hard limit is 256' in lines[0]
    assert 'ulimit -Hn' in lines[2]
  assert str(many_files) in found[0][2]
  assert 'the hard limit is 256' in found[2][1]
  assert 'ulimit -Hn' in found[2][1]


def test_readers_of_a_split_share_its_files(many_files):
  def count():
    folder = str(many_files)
    links = (f'/proc/self/fd/{x}' for x in os.listdir('/proc/self/fd'))
    found = (os.readlink(x) for x in links if os.path.islink(x))
    return sum(x.startswith(folder) and '-train.' in x for x in found)

  datasets = [preparation.load_dataset('digits', many_files) for _ in range(3)]
  for dataset in datasets:
    for i in range(len(dataset.train)):
      dataset.train.original(i)
  assert count() == NUM_FILES
  del dataset, datasets
  assert count() == 0


def test_threads_read_each_its_own(many_files):
  records = preparation.load_dataset('digits', many_files).train
  names = records.names()
  positions = np.random.default_rng(0).integers(0, len(records), 2000).tolist()
  with futures.ThreadPoolExecutor(8) as pool:
    found = pool.map(lambda i: records[i]['file_name'], positions)
    assert list(found) == [names[i] for i in positions]
  with pytest.raises(IndexError):
    records.source[len(records)]
  with pytest.raises(IndexError):
    records.source[-1]


def test_prepared_anew_is_read_anew(tmp_path):
  from data_fixtures import write_class_folders, write_image

  raw = write_class_folders(tmp_path / 'imagenette2')
  before = preparation.load_dataset('imagenette', tmp_path)
  write_image(raw / 'train' / 'n02' / 'new.JPEG', 7)
  preparation.prepare('imagenette', tmp_path)
  after = preparation.load_dataset('imagenette', tmp_path)
  assert len(before.train.source) == 15
  assert 'new.JPEG' in after.train.names()


@pytest.mark.parametrize(
  ('megabytes', 'count'), [(0.1, 1), (3_000, 1), (6_700, 2), (138_000, 33)]
)
def test_few_files_are_written(megabytes, count):
  config = shards.DownloadConfig().get_shard_config()
  assert config.get_number_shards(int(megabytes * 1e6), 50_000) == count


def test_prepare_writes_them_so(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, 'MAX_BYTES', 100_000)
  preparation.prepare('digits', tmp_path)
  found = [x.name for x in tmp_path.rglob('*.array_record*')]
  assert sum('train' in x for x in found) == 3
  assert len(preparation.load_dataset('digits', tmp_path).train) == 1437

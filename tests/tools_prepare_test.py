"""What stands in the way of prepared data: disks, locks and names."""

import contextlib
import ctypes
import os
import platform
import resource
import struct
import subprocess
import sys

import mounts
import numpy as np
import pytest
import runs
from conftest import ROOT
from data_archives_test import files_below
from data_fixtures import encode
from image_fixtures import write_pets

from jaxprog import errors
from jaxprog.data import preparation

CONFIG = """
from jaxprog import start_from

def get_config(asked):
  what, _, root = asked.rpartition('@')
  config = start_from('default')
  config.data_dir = f'{root}/data'
  config.model = 'resnet10'
  config.num_filters = 4
  config.tensorboard = False
  config.exclude_leaks = True
  config.stages = [
    {'name': 'pets', 'dataset': f'folder:{root}/pets', 'image_size': 16,
     'batch_size': 4, 'num_epochs': 1, 'storage': 'raw'},
  ]
  if not what:
    return config
  of_runs = start_from(f'{what}_default')
  of_runs.base = config
  if what == 'compare':
    of_runs.grid = ({'stages[0].learning_rate': (0.1, 0.2)},)
    of_runs.seeds = 1
  else:
    of_runs.search = (
      {'field': 'stages[0].weight_decay', 'choice': (0.0, 0.1)},
    )
    of_runs.num_trials = 2
  return of_runs
"""


@pytest.fixture
def config(tmp_path):
  """A config of ROOT/pets, stored raw in ROOT/data."""
  write_pets(tmp_path / 'pets')
  (tmp_path / 'pets_config.py').write_text(CONFIG)
  return f'--config={tmp_path}/pets_config.py:{tmp_path}'


def add_noise(root, count):
  """Adds PNGs of 30 kB that no writer can make smaller."""
  rng = np.random.default_rng(0)
  for i in range(count):
    noise = encode(rng.integers(0, 256, (100, 100, 3), np.uint8))
    (root / 'pets' / 'train' / 'n01' / f'noise_{i}.png').write_bytes(noise)


@contextlib.contextmanager
def largest_file(size):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_three_lines(result, *expected):
  assert result.returncode == 2, result.stdout + result.stderr
  assert len(result.stderr.strip().split('\n')) == 3
  for text in expected:
    assert text in result.stderr


@pytest.mark.parametrize(
  ('how', 'what'), [('disk', 'records'), ('file', 'records'), ('file', 'pack')]
)
def test_a_full_disk_is_said(config, tmp_path, how, what):
  add_noise(tmp_path, 20)
  data = tmp_path / 'data'
  if what == 'pack':
    preparation.prepare(f'folder:{tmp_path}/pets', data)
  data.mkdir(exist_ok=True)  # Or its being new would be said, too.
  before = files_below(data)
  if how == 'disk':
    full = mounts.disk(data, 'size=300k')
    reason = 'No space left on device'
  else:
    full, reason = largest_file(100_000), 'File too large'
  with full:
    result = runs.call_main(config, '--mode=prepare')
    assert_three_lines(result, f'Cannot write prepared data: {reason}')
    left = {x for x in files_below(data) if not x.endswith('.lock')}
  assert left <= before.keys()
  assert not list(data.rglob('incomplete*'))
  assert runs.call_main(config, '--mode=prepare').returncode == 0


def test_prepared_data_that_one_may_only_read_is_enough(config, tmp_path):
  data = tmp_path / 'data'
  assert runs.call_main(config, '--mode=prepare').returncode == 0
  before = files_below(data)
  with mounts.read_only(data):
    result = runs.call_main(config, '--mode=prepare')
    assert result.returncode == 0, result.stderr
    assert runs.call_main(config, '--mode=audit').returncode == 0
    result = runs.call_main(config, f'--workdir={tmp_path}/run')
    assert result.returncode == 0, result.stderr
    # What is not there cannot be made.
    (tmp_path / 'pets' / 'train' / 'n01' / 'n01_train_0.JPEG').unlink()
    result = runs.call_main(config, '--mode=prepare')
    assert_three_lines(result, 'Read-only file system')
  assert files_below(data) == before


@pytest.mark.slow
def test_every_mode_works_where_data_may_only_be_read(config, tmp_path):
  data = tmp_path / 'data'
  assert runs.call_main(config, '--mode=prepare').returncode == 0
  for kept in data.rglob('*'):  # What was noted is found out again.
    if kept.name.startswith(('labels', 'names', 'matches', 'signatures')):
      kept.unlink()
  before = files_below(data)
  modes = {
    'predict': [f'--input={tmp_path}/pets/val'],
    'plan': ['--topology=v5e:1x1'],
    'compare': [config.replace(':', ':compare@'), f'--workdir={tmp_path}/c'],
    'tune': [config.replace(':', ':tune@'), f'--workdir={tmp_path}/t'],
  }
  modes |= {x: [] for x in ('check', 'verify', 'audit', 'prepare', 'lr_find')}
  with mounts.read_only(data):
    for mode in ('train', 'eval', 'report', 'export', *modes):
      place = config, f'--workdir={tmp_path}/run', f'--mode={mode}'
      # Of flags that are given twice the last holds.
      result = runs.call_main(*place, *modes.get(mode, []))
      assert result.returncode == 0, (mode, result.stderr)
  assert files_below(data) == before


def test_a_copy_whose_times_are_lost_may_be_read_only(
  config, tmp_path, monkeypatch
):
  monkeypatch.setenv('JAXPROG_CACHE_DIR', str(tmp_path / 'cache'))
  assert runs.call_main(config, '--mode=prepare').returncode == 0
  for image in (tmp_path / 'pets').rglob('*.JPEG'):
    os.utime(image, ns=(1, 1))
  name, data = f'folder:{tmp_path}/pets', tmp_path / 'data'
  with mounts.read_only(data):
    with pytest.raises(errors.UserError, match='were written to since'):
      preparation.check_dataset(name, data)
    assert runs.call_main(config, '--mode=prepare').returncode == 0
    assert preparation.check_dataset(name, data) == 'prepared'
    # The note is of these images, not of any.
    os.utime(tmp_path / 'pets/train/n01/n01_train_0.JPEG', ns=(2, 2))
    with pytest.raises(errors.UserError, match='were written to since'):
      preparation.check_dataset(name, data)


def test_where_no_cache_can_be_the_note_beside_the_records_serves(
  tmp_path, monkeypatch
):
  name = f'folder:{write_pets(tmp_path / "pets")}'
  preparation.prepare(name, tmp_path / 'data')
  monkeypatch.setenv('JAXPROG_CACHE_DIR', '~nobody-here/cache')
  assert preparation.check_dataset(name, tmp_path / 'data') == 'prepared'
  os.utime(tmp_path / 'pets/train/n01/n01_train_0.JPEG', ns=(2, 2))
  with pytest.raises(errors.UserError, match='were written to since'):
    preparation.check_dataset(name, tmp_path / 'data')


def test_what_is_missing_where_one_may_only_read_is_said(config, tmp_path):
  data = tmp_path / 'data'
  write_pets(data / 'imagenette2')
  with mounts.read_only(data):
    with pytest.raises(errors.UserError, match='Read-only') as caught:
      preparation.load_dataset('imagenette', data)
    assert 'links to raw folders' in caught.value.suggestion
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / 'imagenette2').symlink_to(data / 'imagenette2')
    own = preparation.load_dataset('imagenette', tmp_path / 'own')
    assert own.num_classes == 3
  preparation.prepare(f'folder:{tmp_path}/pets', data)
  with mounts.read_only(data):
    result = runs.call_main(config, f'--workdir={tmp_path}/run')
    assert_three_lines(result, 'Read-only', "set storage='original'")


# Begins when it is told to; prints a line an image that it prepares.
BESIDE = """
import sys
from jaxprog import errors
from jaxprog.data import preparation
print('ready', flush=True)
sys.stdin.readline()
found = preparation.load_dataset(
  *sys.argv[1:], progress=lambda *_: print('image', flush=True)
)
print(len(found.train), found.fingerprint)
"""


@pytest.mark.slow
def test_of_several_processes_one_prepares(tmp_path):
  name = f'folder:{write_pets(tmp_path / "pets")}'
  command = [sys.executable, '-c', BESIDE, name, tmp_path / 'data']
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
  processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(3)]
  for process in processes:
    assert process.stdout.readline() == 'ready\n'
  for process in processes:
    process.stdin.write('\n')
    process.stdin.flush()
  said = [process.communicate()[0].splitlines() for process in processes]
  assert sorted(x.count('image') for x in said) == [0, 0, 21]
  assert len({x[-1] for x in said}) == 1


# In its process the kernel answers flock with ENOLCK.
WITHOUT_FLOCK = """
import sys
sys.path[:0] = ['tests', '.']
import tools_prepare_test
tools_prepare_test.refuse_flock()
tools_prepare_test.prepare_twice(sys.argv[1])
"""


def refuse_flock():
  """Lets flock fail with ENOLCK in this process, for good."""
  number = {'x86_64': 73, 'aarch64': 32}[platform.machine()]
  program = b''.join(
    struct.pack('<HBBI', *x)
    for x in (
      (0x20, 0, 0, 0),  # Load the number of the system call.
      (0x15, 0, 1, number),
      (0x06, 0, 0, 0x00050000 | 37),  # ENOLCK
      (0x06, 0, 0, 0x7FFF0000),
    )
  )
  memory = ctypes.create_string_buffer(program)
  filter = struct.pack('HxxxxxxP', 4, ctypes.addressof(memory))
  libc = ctypes.CDLL(None, use_errno=True)
  assert libc.prctl(38, 1, 0, 0, 0) == 0  # No new privileges.
  assert libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()


def prepare_twice(root):
  """Prepares, stores and unpacks; a second call of each overtakes the first."""
  import hashlib
  import pathlib

  from jaxprog import files, stages
  from jaxprog.data import archives

  root = pathlib.Path(root)
  name, data = f'folder:{root}/pets', root / 'data'
  overtaken = []

  def overtake(call):
    def progress(*_):
      if call not in overtaken:
        overtaken.append(call)
        call(progress)

    call(progress)

  overtake(lambda show: preparation.prepare(name, data, progress=show))
  dataset = preparation.load_dataset(name, data)
  raw = stages.Storage('raw')
  overtake(lambda show: preparation.store(dataset, raw, progress=show))
  assert len(overtaken) == 2
  stored = preparation.store(preparation.load_dataset(name, data), raw).train
  assert stored.image(14)[:2] == (20, 20)
  archive = root / 'pets.tar'
  subprocess.run(['tar', '-cf', archive, 'pets'], cwd=root, check=True)
  digest = hashlib.sha256(archive.read_bytes()).hexdigest()
  archives.extract(archive, root / 'unpacked', sha256=digest)
  with open(archive) as file:
    assert not files.lock(file.fileno())


@pytest.mark.skipif(
  platform.machine() not in ('x86_64', 'aarch64'), reason='Another number.'
)
def test_without_flock_what_is_finished_first_stays(config, tmp_path):
  del config
  result = subprocess.run(
    [sys.executable, '-c', WITHOUT_FLOCK, tmp_path],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  assert len(list((tmp_path / 'unpacked').rglob('*.JPEG'))) == 21
  assert not list(tmp_path.rglob('incomplete*'))


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('tfds:nosuch', 'are known, such as '),
    ('tfds:mnist/nosuch', 'BuilderConfig nosuch not found'),
    ('tfds:mnist:9.9.9', 'cannot be loaded at version 9.9.9'),
    ('tfds:a b', "refuses 'tfds:a b'"),
  ],
)
def test_what_tfds_does_not_have_is_said_in_three_lines(
  config, tmp_path, name, expected
):
  result = runs.call_main(
    config, '--mode=prepare', f'--config.stages[0].dataset={name}'
  )
  assert_three_lines(result, expected)
  assert max(map(len, result.stderr.split('\n'))) < 400
  assert not (tmp_path / 'data').exists()

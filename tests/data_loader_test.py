import contextlib
import hashlib
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import parity
import pytest
from data_fixtures import encode, photo, stage, write_class_folders
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprog import epochs
from jaxprog.data import batches as batches_lib
from jaxprog.data import loader, preparation, preprocess, workers

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def dataset(data_dir):
  return preparation.load_dataset('digits', data_dir)


def digest(batch) -> str:
  return hashlib.sha256(
    b''.join(batch[k].tobytes() for k in sorted(batch))
  ).hexdigest()


def digests(dataset, count=12, seed=3, sampling=0.0, **options):
  # 5 batches an epoch.
  a_stage = stage(
    batch_size=len(dataset.train) // 5,
    num_epochs=40,
    balanced_sampling=sampling,
  )
  steps = epochs.count_steps(a_stage, len(dataset.train))
  batches = loader.train_batches(
    dataset.train, a_stage, seed=seed, steps=steps, **options
  )
  with contextlib.closing(batches):
    return [digest(next(batches)) for _ in range(count)]


def test_batches_are_the_same_with_any_workers_and_after_a_restart(data_dir):
  dataset = preparation.load_dataset('digits', data_dir, classes=('3', '8'))
  expected = digests(dataset, 60)
  assert len(set(expected)) == 60
  for options in (
    {'num_workers': 1},
    {'num_workers': 2},
    {'num_workers': 4},
    {'num_workers': 2, 'worker_kind': 'process'},
  ):
    assert digests(dataset, 60, **options) == expected
    # In the middle of an epoch and at its end.
    for start in (37, 55):
      got = digests(dataset, 60 - start, start_step=start, **options)
      assert got == expected[start:]


def test_balanced_batches_are_the_same_after_a_restart(data_dir):
  dataset = preparation.load_dataset('digits', data_dir, classes=('3', '8'))
  expected = digests(dataset, sampling=0.5)
  for start in (3, 5):
    got = digests(dataset, 12 - start, start_step=start, sampling=0.5)
    assert got == expected[start:]


def test_seeds_give_other_batches(data_dir):
  dataset = preparation.load_dataset('digits', data_dir, classes=('3', '8'))
  assert not set(digests(dataset, seed=3)) & set(digests(dataset, seed=4))


@pytest.mark.parametrize('sampling', [0.0, 1.0])
def test_processes_share_a_global_batch(dataset, sampling):
  a_stage = stage(batch_size=64, balanced_sampling=sampling)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  options = {'seed': 5, 'steps': steps}
  for step in range(0, steps.total, 3):
    whole = batches_lib.read_batch(
      batches_lib.TrainBatches(dataset.train, a_stage, **options), step
    )
    parts = [
      batches_lib.read_batch(
        batches_lib.TrainBatches(
          dataset.train, a_stage, **options, process_index=i, process_count=4
        ),
        step,
      )
      for i in range(4)
    ]
    for name in whole:
      together = np.concatenate([part[name] for part in parts])
      np.testing.assert_array_equal(together, whole[name])


def test_an_epoch_visits_every_example_at_most_once(dataset):
  a_stage = stage(batch_size=100, num_epochs=3)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  batches = batches_lib.TrainBatches(
    dataset.train, a_stage, seed=0, steps=steps
  )
  assert len(batches) == 3 * 14
  seen = []
  for epoch in range(3):
    found = [batches.indices(14 * epoch + i) for i in range(14)]
    assert {*np.concatenate([x for x, _ in found])} == {epoch}
    indices = np.concatenate([x for _, x in found])
    assert len(set(indices.tolist())) == 1400
    assert indices.min() >= 0
    assert indices.max() < 1437
    seen.append(indices)
  assert (seen[0] != seen[1]).mean() > 0.9
  # What one epoch leaves out, another has.
  assert len(set(np.concatenate(seen).tolist())) > 1430


@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_copies_of_an_image_fill_a_batch(dataset, process_count):
  a_stage = stage(batch_size=60, num_epochs=2, augment_repeats=3)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  assert steps.total == 2 * (1437 // 60)  # As many as without.

  def read(step, index, count):
    batches = batches_lib.TrainBatches(
      dataset.train,
      a_stage,
      seed=0,
      steps=steps,
      process_index=index,
      process_count=count,
    )
    return batches_lib.read_batch(batches, step), batches.indices(step)[1]

  order = batches_lib.epoch_order(0, 1, 1437)
  for step in (23, 25):
    whole, _ = read(step, 0, 1)
    parts = [read(step, i, process_count) for i in range(process_count)]
    for name in whole:
      together = np.concatenate([part[name] for part, _ in parts])
      np.testing.assert_array_equal(together, whole[name])
    examples = np.concatenate([x for _, x in parts])
    first = 20 * (step - 23)
    assert sorted(examples) == sorted([*order[first : first + 20]] * 3)
    np.testing.assert_array_equal(whole['index'] % 1437, examples)
    assert len(set(whole['index'])) == 60
    copies = whole['image'].reshape(3, 20, -1)
    assert (copies[0] != copies[1]).any(axis=-1).mean() > 0.5
    # What mixing pairs, the last with the first too, are different images.
    assert (examples != np.roll(examples, 1)).all()
    for _, found in parts if process_count > 2 else ():
      assert len(set(found)) == 15  # Each host has other copies.


@pytest.mark.parametrize(
  ('count', 'repeats'), [(10, 1), (10, 2), (10, 3), (11, 3), (15, 5), (16, 5)]
)
def test_neighbours_are_never_copies(count, repeats):
  for start in range(0, 5 * count, count):
    found = batches_lib.repeat_positions(start, count, repeats)
    expected = np.arange(start, start + count)
    np.testing.assert_array_equal(
      np.sort(found[0] * repeats + found[1]), expected
    )
    assert (found[0] != np.roll(found[0], 1)).all()
    if repeats == 1:
      np.testing.assert_array_equal(found[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_batches_of_copies_are_those_of_timms_sampler(hosts):
  peer = parity.import_module('timm.data.distributed_sampler')
  samplers = [
    list(peer.RepeatAugSampler(range(1024), hosts, rank, shuffle=False))
    for rank in range(hosts)
  ]
  for step in range(1024 // 64):
    part = slice(step * 64 // hosts, (step + 1) * 64 // hosts)
    theirs = [x for sampler in samplers for x in sampler[part]]
    found, _ = batches_lib.repeat_positions(step * 64, 64, 3)
    assert sorted(found) == sorted(theirs)
  assert sum(map(len, samplers)) == 1024  # An epoch is images seen.


def test_balanced_sampling_shows_all_of_a_class_before_any_again(dataset):
  keep = np.arange(len(dataset.train)) < 0
  for label, count in ((0, 130), (4, 33), (9, 7)):
    keep[np.flatnonzero(dataset.train.labels == label)[:count]] = True
  records = dataset.train.select(keep)
  a_stage = stage(batch_size=17, num_epochs=6, balanced_sampling=1.0)
  steps = epochs.count_steps(a_stage, len(records))
  assert steps.phases[0].per_epoch == 10  # Of 170 images.
  batches = batches_lib.TrainBatches(records, a_stage, seed=1, steps=steps)
  shown = []
  for epoch in range(6):
    found = [batches.indices(10 * epoch + i) for i in range(10)]
    passes, indices = (np.concatenate(x) for x in zip(*found, strict=True))
    labels = records.labels[indices]
    counts = np.bincount(labels)[[0, 4, 9]].tolist()
    assert sorted(counts) == [56, 57, 57]
    assert len(set(labels[:17].tolist())) == 3  # They are shuffled.
    shown += zip(indices.tolist(), passes.tolist(), strict=True)
  # An image is augmented otherwise each time, and seen as often as the others
  # of its class.
  assert len(set(shown)) == len(shown) == 6 * 170
  times = np.bincount([i for i, _ in shown])
  for label in (0, 4, 9):
    of_class = times[records.labels == label]
    assert of_class.max() - of_class.min() <= 1


def test_an_order_is_uniform():
  orders = np.array([batches_lib.epoch_order(1, e, 10) for e in range(5000)])
  counts = np.array(
    [np.bincount(orders[:, i], minlength=10) for i in range(10)]
  )
  # 100 cells of mean 500: chi-squared with 81 degrees of freedom, 99.9%: 126.
  assert ((counts - 500) ** 2 / 500).sum() < 126


def example_rng(seed, epoch, index):
  stream = np.random.Philox(key=[seed, 1], counter=[0, 0, epoch, index])
  return np.random.Generator(stream)


def test_random_streams_never_meet():
  streams = [
    example_rng(seed, epoch, index).random(50)
    for seed in (0, 1)
    for epoch in (0, 1)
    for index in (0, 1)
  ]
  assert len(set(np.concatenate(streams).tolist())) == 8 * 50
  order = batches_lib.epoch_order(0, 0, 100)
  assert (order != example_rng(0, 0, 0).permutation(100)).any()


def test_labels_belong_to_their_images(dataset):
  # One crop of the whole picture: what comes out is what was stored.
  a_stage = stage(
    image_size=8, batch_size=50, min_crop_area=1.0, max_crop_aspect=1.0
  )
  steps = epochs.count_steps(a_stage, len(dataset.train))
  batches = batches_lib.TrainBatches(
    dataset.train, a_stage, seed=9, steps=steps
  )
  batch = batches_lib.read_batch(batches, 3)
  _, indices = batches.indices(3)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].dtype == np.int32
  assert batch['mask'].all()
  for image, label, i in zip(
    batch['image'], batch['label'], indices, strict=True
  ):
    record = dataset.train[int(i)]
    np.testing.assert_array_equal(image, preprocess.decode(record['image']))
    assert label == record['label']


@pytest.mark.parametrize(
  ('batch_size', 'num_shards'), [(32, 1), (100, 3), (64, 8), (500, 8)]
)
def test_evaluation_has_every_example_once(dataset, batch_size, num_shards):
  a_stage = stage(batch_size=batch_size, image_size=8)
  batches = workers.Reader(
    batches_lib.EvalBatches(dataset.eval, a_stage, num_shards=num_shards),
    num_workers=2,
    kind='thread',
  )
  images, labels = [], []
  with contextlib.closing(batches):
    for batch in batches:
      assert len(batch['mask']) % num_shards == 0
      assert 0 <= len(batch['mask']) - batch_size < num_shards
      images += list(batch['image'][batch['mask']])
      labels += list(batch['label'][batch['mask']])
  expected = [
    preprocess.decode(dataset.eval[i]['image'])
    for i in range(len(dataset.eval))
  ]
  np.testing.assert_array_equal(images, expected)
  np.testing.assert_array_equal(labels, dataset.eval.labels)


def test_processes_evaluate_as_many_batches_of_one_size(dataset):
  # 360 examples: the second process has none in the last batch.
  a_stage = stage(batch_size=128, image_size=8)
  found = []
  for i in range(2):
    batches = batches_lib.EvalBatches(
      dataset.eval, a_stage, num_shards=4, process_index=i, process_count=2
    )
    read = [batches_lib.read_batch(batches, j) for j in range(len(batches))]
    rows = [(x['image'].shape, int(x['mask'].sum())) for x in read]
    assert [shape for shape, _ in rows] == [(64, 8, 8, 3)] * 3
    found.append([count for _, count in rows])
  assert found == [[64, 64, 64], [64, 64, 40]]


def damaged_split(tmp_path):
  raw = write_class_folders(tmp_path / 'imagenette2', train=8)
  bad = raw / 'train' / 'n02' / 'n02_train_3.JPEG'
  bad.write_bytes(b'<html>Not Found</html>')
  (raw / 'val' / 'n01' / 'n01_val_0.JPEG').write_bytes(b'')
  return preparation.load_dataset('imagenette', tmp_path)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_bad_image_is_hidden_and_named(tmp_path, num_workers):
  split = damaged_split(tmp_path).train
  a_stage = stage(batch_size=8)
  steps = epochs.count_steps(a_stage, len(split))
  batches = loader.train_batches(
    split, a_stage, seed=0, steps=steps, num_workers=num_workers
  )
  hidden = 0
  with contextlib.closing(batches):
    for batch in batches:
      for row in np.flatnonzero(~batch['mask']):
        hidden += 1
        # BatchNorm sees another example there, once more.
        same = (batch['image'] == batch['image'][row]).all((1, 2, 3))
        assert same.sum() == 2
        assert (batch['label'][same] == batch['label'][row]).all()
  assert hidden == 1
  assert list(batches.bad) == ['n02/n02_train_3.JPEG']
  assert 'no image' in batches.bad['n02/n02_train_3.JPEG']


def test_a_bad_image_is_wrong_in_evaluation(tmp_path):
  split = damaged_split(tmp_path).eval
  reader = loader.eval_batches(split, stage(batch_size=8))
  with contextlib.closing(reader):
    (batch,) = list(reader)
  assert batch['mask'].tolist() == [True] * 6 + [False] * 2
  assert sorted(batch['label'][:6]) == [-1, 0, 1, 1, 2, 2]
  assert list(reader.bad) == ['n01/n01_val_0.JPEG']


@pytest.mark.parametrize('kind', ['thread', 'process'])
def test_a_batch_is_valid_until_the_second_next(dataset, kind):
  a_stage = stage(batch_size=64, num_epochs=1)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  expected = batches_lib.TrainBatches(
    dataset.train, a_stage, seed=0, steps=steps
  )
  reader = loader.train_batches(
    dataset.train,
    a_stage,
    seed=0,
    steps=steps,
    num_workers=2,
    worker_kind=kind,
  )
  with contextlib.closing(reader):
    before = next(reader)
    for step in range(1, 12):
      batch = next(reader)
      assert digest(before) == digest(
        batches_lib.read_batch(expected, step - 1)
      )
      before = batch
    memory = {x.__array_interface__['data'][0] for x in (before['image'],)}
    for _ in range(8):
      memory.add(next(reader)['image'].__array_interface__['data'][0])
  assert len(memory) <= 6  # Used again and again.


def test_images_may_grow_within_a_stage(dataset):
  a_stage = stage(
    batch_size=64,
    num_epochs=3,
    phases=(
      {'from_epoch': 1, 'image_size': 24},
      {'from_epoch': 2, 'image_size': 32, 'batch_size': 32},
    ),
  )
  steps = epochs.count_steps(a_stage, len(dataset.train))
  for kind in ('thread', 'process'):
    reader = loader.train_batches(
      dataset.train,
      a_stage,
      seed=0,
      steps=steps,
      num_workers=2,
      worker_kind=kind,
    )
    with contextlib.closing(reader):
      shapes = [x['image'].shape[:2] for x in reader]
    assert shapes == [(64, 16)] * 22 + [(64, 24)] * 22 + [(32, 32)] * 44


def children(of: int) -> list[int]:
  path = pathlib.Path(f'/proc/{of}/task/{of}/children')
  return [int(x) for x in path.read_text().split()]


def held_by_workers():
  """Returns the shared memory and the open files of all our workers."""
  memory, files = 0, 0
  for pid in children(os.getpid()):
    process = pathlib.Path(f'/proc/{pid}')
    if b'spawn_main' in (process / 'cmdline').read_bytes():
      memory += (process / 'maps').read_text().count('/dev/shm/psm_')
      files += len(list((process / 'fd').iterdir()))
  return memory, files


def test_workers_keep_nothing_of_readers_that_are_closed(dataset):
  a_stage = stage(batch_size=64, image_size=32)
  held, own = [], []
  for _ in range(9):
    reader = loader.eval_batches(
      dataset.eval, a_stage, num_workers=2, worker_kind='process'
    )
    with contextlib.closing(reader):
      assert sum(len(batch['mask']) for batch in reader) >= 360
    held.append(held_by_workers())
    own.append(len(list(pathlib.Path('/proc/self/fd').iterdir())))
  assert [memory for memory, _ in held] == [0] * 9
  # The first ones start and open what stays open.
  assert max(files for _, files in held[4:]) <= max(x for _, x in held[:4])
  assert max(own[4:]) <= max(own[:4])


UNGUARDED = """
import jaxprog
from tests import tiny_config
config = tiny_config.get_config({data_dir!r})
config.worker_kind = 'process'
config.num_workers = 1
config.stages = config.stages[:1]
try:
  jaxprog.train(config, {workdir!r})
except jaxprog.UserError as e:
  print(e)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_what_to_write(data_dir, tmp_path):
  script = tmp_path / 'mine.py'
  script.write_text(
    UNGUARDED.format(data_dir=str(data_dir), workdir=str(tmp_path / 'run'))
  )
  result = subprocess.run(
    [sys.executable, script],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=200,
  )
  *_, what, where, suggestion = result.stdout.splitlines()
  assert 'it trains when it is imported' in what
  assert where == str(script)
  assert "if __name__ == '__main__':" in suggestion
  assert 'Traceback' not in result.stderr


def test_killed_workers_are_replaced_and_the_batches_are_the_same(data_dir):
  dataset = preparation.load_dataset('digits', data_dir, classes=('3', '8'))
  expected = digests(dataset)
  a_stage = stage(batch_size=len(dataset.train) // 5, num_epochs=40)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  reader = loader.train_batches(
    dataset.train,
    a_stage,
    seed=3,
    steps=steps,
    num_workers=2,
    worker_kind='process',
  )
  with contextlib.closing(reader):
    found = [digest(next(reader)) for _ in range(3)]
    found_workers = [
      pid
      for pid in children(os.getpid())
      if b'spawn_main' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
    ]
    assert len(found_workers) >= 2
    for pid in found_workers:
      os.kill(pid, signal.SIGKILL)
    found += [digest(next(reader)) for _ in range(9)]
  assert found == expected
  assert reader.restarts == 1


# Reads on until it is stopped, never closing anything.
ENDLESS = """
import signal, sys
# A job that a shell put in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = ['tests', '.']
import data_fixtures
from jaxprog import epochs
from jaxprog.data import loader, preparation
split = preparation.load_dataset('digits', sys.argv[1]).train
stage = data_fixtures.stage(batch_size=32, num_epochs=100_000)
steps = epochs.count_steps(stage, len(split))
batches = loader.train_batches(
  split, stage, seed=0, steps=steps, num_workers=2)
next(batches)
print('ready', flush=True)
if sys.argv[2] == 'read':
  for _ in batches: pass
"""


@pytest.mark.parametrize(('mode', 'code'), [('leave', 0), ('read', -2)])
def test_the_interpreter_ends_with_a_loader_open(data_dir, mode, code):
  process = subprocess.Popen(
    [sys.executable, '-c', ENDLESS, data_dir, mode],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    cwd=ROOT,
  )
  assert process.stdout.readline() == b'ready\n'
  if mode == 'read':
    process.send_signal(signal.SIGINT)
  try:
    assert process.wait(timeout=30) == code
  finally:
    process.kill()
    process.stdout.close()


def sharding():
  mesh = jax.make_mesh(
    (jax.device_count(),), ('data',), axis_types=(AxisType.Auto,)
  )
  return NamedSharding(mesh, PartitionSpec('data'))


def test_batches_arrive_on_the_device_in_order_and_all():
  batches = [
    {'image': np.full((8, 2, 2, 3), i, np.uint8), 'mask': np.arange(8) < i}
    for i in range(5)
  ]
  for size in (1, 2, 9):
    got = list(loader.prefetch_to_device(iter(batches), sharding(), size))
    assert len(got) == 5
    for a, b in zip(got, batches, strict=True):
      assert isinstance(a['image'], jax.Array)
      np.testing.assert_array_equal(a['image'], b['image'])
      np.testing.assert_array_equal(a['mask'], b['mask'])


def test_what_is_on_the_device_does_not_change_with_the_host():
  for offset in (0, 16):  # Aligned memory is what JAX would borrow.
    memory = np.zeros(4096 + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    x = memory[first : first + 4096]
    on_device = loader.to_device({'image': x}, sharding())
    jax.block_until_ready(on_device)
    x[:] = 7
    assert not np.asarray(on_device['image']).any()


def test_two_batches_are_under_way():
  taken = []

  def batches():
    for i in range(5):
      taken.append(i)
      yield {'label': np.full(8, i, np.int32)}

  on_device = loader.prefetch_to_device(batches(), sharding())
  next(on_device)
  assert taken == [0, 1]


def test_greyscale_and_transparent_files_fit_one_batch(tmp_path):
  raw = write_class_folders(tmp_path / 'imagenette2', wnids=('n01',), train=1)
  folder = raw / 'train' / 'n01'
  (folder / 'grey.JPEG').write_bytes(encode(photo(30, 40)[..., 0], 'JPEG'))
  (folder / 'png.JPEG').write_bytes(encode(photo(30, 40)))
  (folder / 'one.png').write_bytes(encode(photo(1, 1)))
  split = preparation.load_dataset('imagenette', tmp_path).train
  a_stage = stage(batch_size=4)
  steps = epochs.count_steps(a_stage, len(split))
  batches = batches_lib.TrainBatches(split, a_stage, seed=0, steps=steps)
  batch = batches_lib.read_batch(batches, 0)
  assert batch['image'].shape == (4, 16, 16, 3)


def test_workers_are_threads_until_python_itself_limits_them():
  assert workers.choose_kind('auto', 16) == 'thread'
  assert workers.choose_kind('auto', 17) == 'process'
  assert workers.choose_kind('auto', 2, light=True) == 'thread'
  assert workers.choose_kind('auto', 3, light=True) == 'process'
  assert workers.choose_kind('process', 1) == 'process'


def test_starting_an_example_is_its_own_generator():
  generator = np.random.Generator(np.random.Philox(5))
  for seed, epoch, index in ((0, 0, 0), (2**32 - 1, 3, 7), (1, 2, 10**6)):
    generator.random(3)
    generator.integers(2, dtype=np.uint32)
    batches_lib._start_example(generator, seed, epoch, index)
    expected = example_rng(seed, epoch, index)
    np.testing.assert_array_equal(generator.random(9), expected.random(9))


def test_a_record_that_cannot_be_read_is_named(tmp_path):
  raw = write_class_folders(tmp_path / 'imagenette2', train=8)
  del raw
  preparation.prepare('imagenette', tmp_path)
  split = preparation.load_dataset('imagenette', tmp_path).train
  (file,) = split.directory.glob('*train.array_record*')
  file.write_bytes(bytes(len(file.read_bytes())))
  a_stage = stage(batch_size=8)
  steps = epochs.count_steps(a_stage, len(split))
  batches = batches_lib.TrainBatches(split, a_stage, seed=0, steps=steps)
  with pytest.raises(batches_lib.RecordError, match=r'Record \d+ of the train'):
    batches_lib.read_batch(batches, 0)

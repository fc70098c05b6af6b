import contextlib
import hashlib
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from data_fixtures import encode, photo, stage, write_class_folders
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprog import epochs
from jaxprog.data import loader, preprocess, sources

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def dataset(data_dir):
  return sources.load_dataset('digits', data_dir)


def digest(batch) -> str:
  return hashlib.sha256(
    b''.join(batch[k].tobytes() for k in sorted(batch))
  ).hexdigest()


def digests(dataset, count=12, seed=3, **options):
  # 5 batches an epoch.
  a_stage = stage(batch_size=len(dataset.train) // 5, num_epochs=4)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  batches = loader.train_batches(
    dataset.train, a_stage, seed=seed, steps=steps, **options
  )
  with contextlib.closing(batches):
    return [digest(next(batches)) for _ in range(count)]


def test_batches_are_the_same_with_any_workers_and_after_a_restart(data_dir):
  dataset = sources.load_dataset('digits', data_dir, classes=('3', '8'))
  expected = digests(dataset)
  assert len(set(expected)) == 12
  for num_workers in (1, 2, 4):
    assert digests(dataset, num_workers=num_workers) == expected
    # In the second epoch and at its end.
    for start in (7, 10):
      got = digests(
        dataset, 12 - start, start_step=start, num_workers=num_workers
      )
      assert got == expected[start:]


def test_seeds_give_other_batches(data_dir):
  dataset = sources.load_dataset('digits', data_dir, classes=('3', '8'))
  assert not set(digests(dataset, seed=3)) & set(digests(dataset, seed=4))


def test_processes_share_a_global_batch(dataset):
  a_stage = stage(batch_size=64)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  options = {'seed': 5, 'steps': steps}
  for step in (0, 30):
    whole = loader.TrainBatches(dataset.train, a_stage, **options)[step]
    parts = [
      loader.TrainBatches(
        dataset.train, a_stage, **options, process_index=i, process_count=4
      )[step]
      for i in range(4)
    ]
    for name in whole:
      together = np.concatenate([part[name] for part in parts])
      np.testing.assert_array_equal(together, whole[name])


def test_an_epoch_visits_every_example_at_most_once(dataset):
  a_stage = stage(batch_size=100, num_epochs=3)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  batches = loader.TrainBatches(dataset.train, a_stage, seed=0, steps=steps)
  assert len(batches) == 3 * 14
  seen = []
  for epoch in range(3):
    found = [batches.indices(14 * epoch + i) for i in range(14)]
    assert [x for x, _ in found] == [epoch] * 14
    indices = np.concatenate([x for _, x in found])
    assert len(set(indices.tolist())) == 1400
    assert indices.min() >= 0
    assert indices.max() < 1437
    seen.append(indices)
  assert (seen[0] != seen[1]).mean() > 0.9
  # What one epoch leaves out, another has.
  assert len(set(np.concatenate(seen).tolist())) > 1430


def test_an_order_is_uniform():
  orders = np.array([loader.epoch_order(1, e, 10) for e in range(5000)])
  counts = np.array(
    [np.bincount(orders[:, i], minlength=10) for i in range(10)]
  )
  # 100 cells of mean 500: chi-squared with 81 degrees of freedom, 99.9%: 126.
  assert ((counts - 500) ** 2 / 500).sum() < 126


def test_random_streams_never_meet():
  streams = [
    loader.example_rng(seed, epoch, index).random(50)
    for seed in (0, 1)
    for epoch in (0, 1)
    for index in (0, 1)
  ]
  assert len(set(np.concatenate(streams).tolist())) == 8 * 50
  order = loader.epoch_order(0, 0, 100)
  assert (order != loader.example_rng(0, 0, 0).permutation(100)).any()


def test_labels_belong_to_their_images(dataset):
  # One crop of the whole picture: what comes out is what was stored.
  a_stage = stage(
    image_size=8, batch_size=50, min_crop_area=1.0, max_crop_aspect=1.0
  )
  steps = epochs.count_steps(a_stage, len(dataset.train))
  batches = loader.TrainBatches(dataset.train, a_stage, seed=9, steps=steps)
  batch, (_, indices) = batches[3], batches.indices(3)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].dtype == np.int32
  assert batch['mask'].all()
  for image, label, i in zip(
    batch['image'], batch['label'], indices, strict=True
  ):
    record = dataset.train.records[int(i)]
    np.testing.assert_array_equal(image, preprocess.decode(record['image']))
    assert label == record['label']


@pytest.mark.parametrize(
  ('batch_size', 'num_shards'), [(32, 1), (100, 3), (64, 8), (500, 8)]
)
def test_evaluation_has_every_example_once(dataset, batch_size, num_shards):
  a_stage = stage(batch_size=batch_size, image_size=8)
  batches = loader.eval_batches(
    dataset.eval, a_stage, num_shards=num_shards, num_workers=2
  )
  images, labels = [], []
  with contextlib.closing(batches):
    for batch in batches:
      assert len(batch['mask']) % num_shards == 0
      assert 0 <= len(batch['mask']) - batch_size < num_shards
      images += list(batch['image'][batch['mask']])
      labels += list(batch['label'][batch['mask']])
  expected = [
    preprocess.decode(dataset.eval.records[i]['image'])
    for i in range(len(dataset.eval))
  ]
  np.testing.assert_array_equal(images, expected)
  np.testing.assert_array_equal(labels, dataset.eval.labels)


def test_processes_evaluate_as_many_batches_of_one_size(dataset):
  # 360 examples: the second process has none in the last batch.
  a_stage = stage(batch_size=128, image_size=8)
  found = []
  for i in range(2):
    batches = list(
      loader.eval_batches(
        dataset.eval, a_stage, num_shards=4, process_index=i, process_count=2
      )
    )
    assert [x['image'].shape for x in batches] == [(64, 8, 8, 3)] * 3
    found.append([int(x['mask'].sum()) for x in batches])
  assert found == [[64, 64, 64], [64, 64, 40]]


def test_a_bad_record_stops_with_its_name(tmp_path):
  raw = write_class_folders(tmp_path / 'imagenette2', train=8)
  bad = raw / 'train' / 'n02' / 'n02_train_3.JPEG'
  bad.write_bytes(b'<html>Not Found</html>')
  split = sources.load_dataset('imagenette', tmp_path).train
  a_stage = stage(batch_size=8)
  steps = epochs.count_steps(a_stage, len(split))
  for num_workers in (0, 2):
    batches = loader.train_batches(
      split, a_stage, seed=0, steps=steps, num_workers=num_workers
    )
    name = r'n02/n02_train_3\.JPEG'
    bad_image = pytest.raises(preprocess.BadImageError, match=name)
    with contextlib.closing(batches), bad_image:
      list(batches)


def count_threads(wanted: int) -> int:
  """Returns how many threads read ahead, once `wanted` or after 20 s."""
  deadline = time.monotonic() + 20
  while True:
    count = sum('grain' in x.name for x in threading.enumerate())
    if count == wanted or time.monotonic() > deadline:
      return count
    time.sleep(0.01)


def test_closing_releases_the_threads(dataset):
  a_stage = stage(batch_size=8)
  steps = epochs.count_steps(a_stage, len(dataset.train))
  assert count_threads(0) == 0
  batches = [
    loader.train_batches(
      dataset.train, a_stage, seed=0, steps=steps, num_workers=2
    )
    for _ in range(2)
  ]
  for x in batches:
    next(x)
  assert count_threads(4) == 4
  for x in batches:
    x.close()
  assert count_threads(0) == 0


# Reads on until it is stopped, never closing anything.
ENDLESS = """
import signal, sys
# A job that a shell put in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = ['tests', '.']
import data_fixtures
from jaxprog import epochs
from jaxprog.data import loader, sources
split = sources.load_dataset('digits', sys.argv[1]).train
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
  split = sources.load_dataset('imagenette', tmp_path).train
  a_stage = stage(batch_size=4)
  steps = epochs.count_steps(a_stage, len(split))
  batch = loader.TrainBatches(split, a_stage, seed=0, steps=steps)[0]
  assert batch['image'].shape == (4, 16, 16, 3)

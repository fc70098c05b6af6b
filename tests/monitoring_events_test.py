"""TensorBoard's files without TensorFlow, beside those that clu writes."""

import contextlib
import io
import subprocess
import sys
import time

import numpy as np
import parity
import pytest
import runs
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.util import tensor_util

from jaxprog import files
from jaxprog.monitoring import events, loggers, tensorboard

# `platform` is free: it cannot tell runs apart. `ema` is no field.
HPARAMS = {
  'seed': 1,
  'ema': 0.5,
  'platform': 'cpu',
  'ten.optimizer': 'adamw',
  'ten.batch_size': 7,
}
# A resume and a rollback draw nothing twice.
STEPS = {
  'train': {
    '1 ten/loss': [1, 2, 3, 4, 5],
    'a b/ü': [1, 2, 3],
    'images/a': [1, 2, 3, 5],
    'images/b': [],
    'perf/memory_bytes': [5],
  },
  'val': {'1 ten/loss': [1, 2, 3, 5]},
  'final': {metadata.SESSION_START_INFO_TAG: [0, 0], 'weights/ten': [5]},
}
CLU = tensorboard._create_writer


def write_run(logdir, first=events.Writer, second=events.Writer):
  """Writes all there is, then of another process that rolls back once."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (2, 20, 30, 3), np.uint8)
  with open_writer(logdir, first) as writer:
    writer.write_hparams(HPARAMS)
    for step in range(1, 7):
      losses = {'1 ten/train_loss': 1 / 3, '1 ten/val_loss': 1 / 4}
      writer.write_scalars(step, {**losses, 'a b/ü': 10**step})
      writer.write_images(step, lambda: {'images/a': pixels[0]})
    writer.write_images(6, lambda: {'images/b': pixels[0]})
    writer.write_scalars(6, {'weights/ten': 0.5})
  if second is CLU:  # TensorFlow's names are in order by whole seconds alone.
    began = int(time.time())
    runs.wait_for(lambda: int(time.time()) > began)
  with open_writer(logdir, second) as writer:
    writer.write_hparams(HPARAMS)
    writer.forget_after(3)
    writer.write_scalars(4, {'1 ten/train_loss': float('nan')})
    writer.write_scalars(5, {'1 ten/train_loss': 2.0})
    writer.forget_after(4)
    writer.write_scalars(5, {'1 ten/train_loss': 3, 'perf/memory_bytes': 2**40})
    writer.write_images(5, lambda: {'images/a': pixels[1]})
    writer.write_scalars(5, {'weights/ten': 0.75, '1 ten/val_loss': 0.5})


@contextlib.contextmanager
def open_writer(logdir, create):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tensorboard, '_create_writer', create)
    with loggers.open_loggers(['tensorboard'], logdir, print) as writer:
      yield writer


def read_run(workdir):
  """Returns what TensorBoard's reader in Python has, by run and tag."""
  logdir = tensorboard.find_logdir(workdir)
  return {path.name: read_values(path) for path in sorted(logdir.iterdir())}


def read_values(logdir):
  found = plugin_event_accumulator.EventAccumulator(str(logdir))
  found.Reload()
  values = {}
  for tag in found.Tags()[plugin_event_accumulator.TENSORS]:
    summary = found.SummaryMetadata(tag)
    if tag == metadata.SESSION_START_INFO_TAG:
      start = metadata.parse_session_start_info_plugin_data(
        summary.plugin_data.content
      )
      start.ClearField('start_time_secs')
      summary = start
    points = [(x.step, read_value(x.tensor_proto)) for x in found.Tensors(tag)]
    values[tag] = str(summary), points
  return values


def read_value(proto):
  value = tensor_util.make_ndarray(proto)
  if value.dtype != object:
    return value.dtype.name, value.tolist()
  width, height, *images = value
  pixels = [np.asarray(Image.open(io.BytesIO(x))) for x in images]
  return int(width), int(height), files.digest_parts(*map(bytes, pixels))


def test_the_reader_has_what_was_written(tmp_path):
  write_run(tmp_path)
  found = read_run(tmp_path)
  steps = {
    run: {tag: [x[0] for x in points] for tag, (_, points) in tags.items()}
    for run, tags in found.items()
  }
  assert steps == STEPS
  assert found['train']['1 ten/loss'][1][-1] == (5, ('float32', 3.0))
  assert found['val']['1 ten/loss'][1][-1] == (5, ('float32', 0.5))
  session = found['final'][metadata.SESSION_START_INFO_TAG][0]
  for name, value in HPARAMS.items():
    assert (name in session) == (value not in ('cpu', 'adamw'))


def test_a_run_of_before_goes_on_where_it_was(tmp_path):
  (tmp_path / 'old/tensorboard').mkdir(parents=True)
  (tmp_path / 'old/tensorboard/events.out.tfevents.1.host').touch()
  write_run(tmp_path / 'old')
  assert (tmp_path / 'old/tensorboard/train').is_dir()
  write_run(tmp_path / 'a')
  assert (tmp_path / 'a/tensorboard/a/train').is_dir()
  (tmp_path / 'a').rename(tmp_path / 'b')
  write_run(tmp_path / 'b')
  assert [x.name for x in (tmp_path / 'b/tensorboard').iterdir()] == ['a']


def test_the_reader_finds_no_difference_to_clus(tmp_path):
  pytest.importorskip('tensorflow', reason=parity.REASON)
  write_run(tmp_path / 'ours')
  write_run(tmp_path / 'clu', CLU, CLU)
  write_run(tmp_path / 'both', events.Writer, CLU)
  names = [x.name for x in tmp_path.glob('clu/tensorboard/clu/train/*')]
  assert len(names) == 2
  assert all(x.endswith('.v2') for x in names)  # As TensorFlow names its files.
  # NaN is not NaN.
  ours, clus, both = (
    str(read_run(tmp_path / name)) for name in ('ours', 'clu', 'both')
  )
  assert ours == clus == both


def test_tensorflow_is_not_imported():
  code = (
    'import sys; from jaxprog.monitoring import events; '
    'assert not {"tensorflow", "jax"} & sys.modules.keys()'
  )
  subprocess.run([sys.executable, '-c', code], check=True)

"""What TensorBoard's own server shows of a run."""

import contextlib
import io
import threading

import jax
import numpy as np
import pytest
import tensorboard_server
from PIL import Image

import jaxprog
from jaxprog.monitoring import loggers, pictures, tensorboard
from jaxprog.monitoring import profile as profile_lib
from jaxprog.training import preview
from tests import tiny_config

# Its server, and TensorFlow where there is one, take a minute to start.
pytestmark = pytest.mark.slow

# By run, beside those of each stage.
SCALARS = {
  'train': {
    'optimization/loss',
    'optimization/top1',
    'optimization/learning_rate',
    'optimization/grad_norm',
    'optimization/skipped_steps',
    'perf/images_per_second',
    'perf/input_wait',
    'perf/step_seconds',
    'perf/memory_bytes',
    'perf/eval_seconds',
    'perf/handover_seconds',
    'saves/save_seconds',
    'saves/interval_seconds',
    'saves/weights_seconds',
  },
  'final': {f'weights/{stage} final top-1' for stage in ('three', 'ten')},
}


def create_config(data_dir):
  """Returns two stages: averages and mixed images, then neither."""
  config = tiny_config.get_config(data_dir)
  config.tensorboard = True
  config.log_every_steps = 4
  config.profile_steps = 3
  config.stages = [
    {
      'name': 'three',
      'classes': ('1', '3', '5'),
      'num_epochs': 2,
      'ema_decay': 0.9,
      'mixup_alpha': 0.4,
      'brightness': 0.4,
    },
    {'name': 'ten', 'num_epochs': 1},
  ]
  return config


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
  """Returns the config, the workdir and the history of a finished run."""
  workdir = tmp_path_factory.mktemp('trained')
  config = create_config(data_dir)
  return config, workdir, jaxprog.train(config, workdir)


@pytest.fixture(scope='module')
def server(trained):
  logdir = tensorboard.find_logdir(trained[1])
  with contextlib.closing(tensorboard_server.Server(logdir)) as running:
    running.wait_for_tag('images/ten/confusion')
    yield running


def test_the_server_lists_every_scalar(server):
  found = server.get_json('data/plugin/scalars/tags')
  expected = {'val': set(), 'ema': set(), **SCALARS}
  for stage in ('1 three', '2 ten'):
    expected['train'] |= {f'{stage}/{name}' for name in ('loss', 'top1')}
    expected['val'] |= {f'{stage}/{name}' for name in ('loss', 'top1', 'top5')}
  expected['ema'] = {f'1 three/{name}' for name in ('loss', 'top1', 'top5')}
  assert {run: set(tags) for run, tags in found.items()} == expected


def test_scalars_are_those_of_the_history_on_a_step_over_all_stages(
  server, trained
):
  def points(run, tag):
    found = server.get_json('data/plugin/scalars/scalars', run=run, tag=tag)
    return [(step, value) for _, step, value in found]

  three, ten = trained[2]['stages']
  rows = [*three['epochs'], *ten['epochs']]
  for run, tag, field, some in (
    ('train', '1 three/loss', 'train_loss', three['epochs']),
    ('ema', '1 three/top1', 'ema_top1', three['epochs']),
    ('val', '2 ten/top1', 'val_top1', ten['epochs']),
    ('final', 'weights/ten final top-1', 'val_top1', ten['epochs'][-1:]),
    ('train', 'perf/eval_seconds', 'eval_seconds', rows),
  ):
    assert points(run, tag) == [
      (row['global_step'], pytest.approx(row[field], rel=1e-6)) for row in some
    ]
  first = three['epochs'][-1]['global_step']
  handover = pytest.approx(ten['handover_seconds'], rel=1e-6)
  assert points('train', 'perf/handover_seconds') == [(first + 1, handover)]
  steps = [step for step, _ in points('train', 'optimization/loss')]
  assert steps == sorted(set(steps))
  assert steps[-1] > first
  sizes = points('train', 'perf/memory_bytes')
  assert all(1e6 < size < 1e12 for _, size in sizes)


def test_hparams_are_what_is_not_as_by_default_beside_the_final_top1(
  server, trained
):
  group = server.get_session_group()
  hparams = group['hparams']
  assert hparams['num_filters'] == 4
  assert hparams['three.mixup_alpha'] == 0.4
  assert hparams['three.classes'] == '1 3 5'
  assert not hparams.keys() & {'seed', 'data_dir', 'ten.optimizer'}
  final = {
    f'weights/{stage["name"]} final top-1': stage['epochs'][-1]['val_top1']
    for stage in trained[2]['stages']
  }
  found = {x['name']['tag']: x['value'] for x in group['metricValues']}
  assert found == pytest.approx(final, rel=1e-6)


@pytest.mark.parametrize('stage', ['three', 'ten'])
def test_the_server_shows_the_pictures_of_a_stage(server, trained, stage):
  record = next(s for s in trained[2]['stages'] if s['name'] == stage)
  found = record['diagnostics']
  rows = -(-preview._MAX_IMAGES // pictures.COLUMNS)
  lines = 2 if stage == 'three' else 1  # Both classes of a mixed image.
  step = pictures.TILE + pictures.GAP
  height = rows * (step + lines * pictures.LINE) + pictures.GAP
  expected = {
    'augmented': (height, pictures.COLUMNS * step + pictures.GAP),
    'worst': pictures.draw_worst(found).shape[:2],
    'confusion': pictures.draw_confusion(found).shape[:2],
  }
  for name, shape in expected.items():
    tag = f'images/{stage}/{name}'
    encoded = server.get_picture(tag)
    image = Image.open(io.BytesIO(encoded))
    assert (image.height, image.width) == shape
    drawn = (
      jaxprog.show_batch(trained[0], stage)
      if name == 'augmented'
      else pictures.draw_mistakes(stage, found)[tag]
    )
    np.testing.assert_array_equal(np.asarray(image), np.asarray(drawn))


def test_each_stage_is_traced(trained):
  root = tensorboard.find_logdir(trained[1]) / 'plugins' / 'profile'
  traces = list(root.glob('*/*.xplane.pb'))
  assert len({path.parent for path in traces}) == 2
  assert all(path.stat().st_size > 1000 for path in traces)


def test_step_times_are_counted_once_an_interval(trained):
  for stage in trained[2]['stages']:
    edges, counts = zip(*stage['step_seconds'], strict=True)
    steps = stage['steps_per_epoch'] * stage['num_epochs']
    assert sum(counts) == steps - stage['num_epochs']
    assert list(edges) == sorted(edges)
    # Nothing took longer than all of it.
    assert edges[-1] < 2**0.25 * stage['seconds']


def test_pictures_are_drawn_in_another_thread_whose_errors_come_back(tmp_path):
  threads = []

  def draw():
    threads.append(threading.current_thread())
    raise ValueError('no picture')

  writer = loggers.open_loggers(['tensorboard'], tmp_path, print)
  writer.write_images(1, draw)
  with pytest.raises(ValueError, match='no picture'):
    writer.close()
  assert threads != [threading.current_thread()]


@pytest.mark.parametrize(
  ('total_steps', 'traced'), [(100, (10, 13)), (12, (9, 12)), (2, (0, 2))]
)
def test_a_short_stage_has_its_last_steps_traced(tmp_path, total_steps, traced):
  profile = profile_lib.Profile(tmp_path, 3, total_steps)
  assert (profile.first, profile.end) == traced


def test_a_trace_ends_with_what_went_wrong(tmp_path):
  def fail():
    profile = profile_lib.Profile(tmp_path, 3, 100)
    with contextlib.closing(profile):
      for step in range(12):
        profile.begin_step(step)
        profile.end_step(step, jax.numpy.ones(3) + step)
      raise RuntimeError('out of luck')

  for _ in range(2):  # A trace still under way would refuse the second one.
    with pytest.raises(RuntimeError, match='out of luck'):
      fail()
  assert list(tmp_path.glob('plugins/profile/*/*.xplane.pb'))


def test_nothing_is_traced_unless_asked_for(tmp_path):
  for logdir, num_steps in ((tmp_path, 0), (None, 3)):
    profile = profile_lib.Profile(logdir, num_steps, 100)
    for step in range(100):
      profile.begin_step(step)
      profile.end_step(step, None)
  assert not list(tmp_path.iterdir())

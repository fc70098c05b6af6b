"""Bad images, archives and labels, as a user meets them."""

import functools
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import runs
from conftest import ROOT
from data_archives_test import (
  files_below,
  tar_member,
  write_tar,
  write_zip,
  zip_link,
)
from data_fixtures import encode, photo, write_class_folders
from image_fixtures import GOLDEN, create, describe, huge_png, write_pets

from jaxprog import named
from jaxprog.data import preparation, preprocess

CONFIG = """
from jaxprog import start_from

def get_config(data_dir):
  config = start_from('default')
  config.data_dir = data_dir
  config.model = 'resnet10'
  config.num_filters = 4
  config.stages = [
    {'name': 'pets', 'dataset': f'folder:{data_dir}/pets', 'image_size': 16,
     'batch_size': 4, 'num_epochs': 1},
    {'name': 'tiny', 'dataset': 'tiny_imagenet', 'image_size': 16,
     'num_epochs': 1},
  ]
  return config
"""


@pytest.fixture
def data(tmp_path):
  """A data_dir with raw images of three classes in pets/."""
  write_pets(tmp_path / 'data' / 'pets')
  return tmp_path / 'data'


@pytest.fixture
def config(tmp_path):
  (tmp_path / 'pets_config.py').write_text(CONFIG)
  return f'--config={tmp_path}/pets_config.py:{tmp_path}/data'


def assert_three_lines(result, *expected):
  """The user's mistake: what is wrong, where, and what to do."""
  assert result.returncode == 2, result.stdout + result.stderr
  assert len(runs.without_activity(result.stderr)) <= 3
  for text in expected:
    assert str(text) in result.stderr


def run_measured(*arguments):
  """Returns a finished process and its peak of memory, in bytes.

  Not wait4's figure: that includes what the parent had before the exec.
  """
  with open(os.devnull, 'wb') as nowhere:
    process = subprocess.Popen(
      [sys.executable, 'main.py', *arguments],
      cwd=ROOT,
      stdout=nowhere,
      # Without huge pages: memory is what is used, not what is set aside.
      env={**os.environ, 'GLIBC_TUNABLES': ''},
    )
    peak, status = 0, pathlib.Path(f'/proc/{process.pid}/status')
    while process.poll() is None:
      found = re.search(r'VmHWM:\s+(\d+) kB', status.read_text())
      peak = int(found[1]) if found else peak
      time.sleep(0.01)
  return process, 1024 * peak


def test_damaged_images_are_listed(config, data, tmp_path):
  arguments = (config, '--mode=verify', '--only=pets')
  result = runs.call_main(*arguments)
  assert result.returncode == 0, result.stdout + result.stderr
  assert max(map(len, result.stdout.split('\n')[1:5])) <= 80
  assert 'images/s/core' in result.stdout
  saved = json.loads((data / 'manifests' / 'verify.json').read_text())
  assert saved['ok'] is True
  assert saved['images'] == 21

  folder = data / 'pets' / 'train' / 'n02'
  truncated, empty, html, flipped, huge = sorted(folder.iterdir())
  truncated.write_bytes(truncated.read_bytes()[:-50])
  empty.write_bytes(b'')
  html.write_text('<html><body>404 Not Found</body></html>')
  image = bytearray(flipped.read_bytes())
  image[-60] ^= 4
  preprocess.decode(bytes(image))  # Nothing but the manifest can know.
  flipped.write_bytes(image)
  huge.write_bytes(huge_png())
  process, peak = run_measured(*arguments, f'--workdir={tmp_path}/run')
  assert process.returncode == 1
  assert 2e7 < peak < 1e9
  saved = json.loads((tmp_path / 'run' / 'verify.json').read_text())
  assert saved['ok'] is False
  assert saved['images'] == 21
  found = saved['datasets'][0]['errors']
  listed = {x['kind']: x['name'] for x in found if x['kind'] != 'changed'}
  assert listed == {
    'truncated': f'train/n02/{truncated.name}',
    'empty': f'train/n02/{empty.name}',
    'html': f'train/n02/{html.name}',
    'damaged': f'train/n02/{huge.name}',
  }
  assert any('400000000 pixels' in x['detail'] for x in found)
  changed = [x['name'] for x in found if x['kind'] == 'changed']
  assert f'train/n02/{flipped.name}' in changed
  assert len(changed) == 5


def spoil(image):
  image.write_bytes(image.read_bytes()[:-50])


def edit(image):
  image.write_bytes(encode(photo(20, 20, 900), 'JPEG'))


@pytest.mark.parametrize('change', [None, spoil, edit, pathlib.Path.unlink])
def test_what_the_publisher_ships_is_a_warning_and_damage_an_error(
  config, data, change
):
  train, val = data / 'pets' / 'train', data / 'pets' / 'val'
  shutil.copy(train / 'n01/n01_train_0.JPEG', train / 'n02/other.JPEG')
  shutil.copy(train / 'n01/n01_train_1.JPEG', val / 'n01/leak.JPEG')
  shutil.copy(train / 'n01/n01_train_2.JPEG', val / 'n03/both.JPEG')
  arguments = (config, '--mode=verify', '--only=pets')
  result = runs.call_main(*arguments)
  assert result.returncode == 0, result.stdout
  assert '0 errors, 4 warnings' in result.stdout
  assert 'warning: duplicate, other label (2)' in result.stdout
  assert 'warning: duplicate, other split (2)' in result.stdout
  assert '--config.exclude_leaks=True keeps the training' in result.stdout
  if change is None:
    # As it says; those in training with two labels stay.
    assert runs.call_main(config, '--mode=audit', '--only=pets').returncode == 1
    result = runs.call_main(
      config, '--mode=audit', '--only=pets', '--config.exclude_leaks=True'
    )
    assert result.returncode == 0
    assert '2 training images kept out of training' in result.stdout
    return
  change(train / 'n03' / 'n03_train_0.JPEG')
  result = runs.call_main(*arguments)
  assert result.returncode == 1, result.stdout


def test_many_problems_are_cut_short_in_print_alone(config, data):
  for i in range(12):
    (data / 'pets' / 'train' / 'n01' / f'empty_{i:02}.JPEG').touch()
  result = runs.call_main(config, '--mode=verify', '--only=pets')
  assert result.returncode == 1
  assert 'error: empty (12)' in result.stdout
  assert result.stdout.count('empty_') == 10
  assert 'and 2 more' in result.stdout
  saved = json.loads((data / 'manifests' / 'verify.json').read_text())
  assert len(saved['datasets'][0]['errors']) == 12


def test_other_modes_are_images_too(config, data):
  for name, (image, _) in create().items():
    (data / 'pets' / 'train' / 'n01' / name).write_bytes(image)
  result = runs.call_main(config, '--mode=verify', '--only=pets')
  assert result.returncode == 0, result.stdout
  train = json.loads((data / 'manifests' / 'verify.json').read_text())[
    'datasets'
  ][0]['splits']['train']
  assert train['images'] == 15 + len(create())


@pytest.mark.parametrize('name', create())
def test_other_modes_have_their_golden_means(name):
  golden = json.loads(GOLDEN.read_text())[name]
  pixels = preprocess.decode(create()[name][0])
  assert pixels.dtype == np.uint8
  found = describe(pixels)
  # The rounding of JPEG and LAB; the means themselves are 10 to 120 levels.
  tolerance = 0.3 if name.endswith(('.JPEG', 'lab.tif')) else 0.001
  assert found['shape'] == golden['shape']
  assert found['mean'] == pytest.approx(golden['mean'], abs=tolerance)
  assert found['quarter'] == pytest.approx(golden['quarter'], abs=tolerance)
  # The crops that the network sees, of the whole image as a square.
  rng = np.random.default_rng(0)
  image = create()[name][0]
  for crop in (
    preprocess.center_crop(image, 16, eval_crop=1.0),
    preprocess.random_crop(image, 16, rng, min_area=1.0, max_aspect=1.5),
  ):
    assert crop.shape == (16, 16, 3)
    # The centre of ramps has their mean.
    assert crop.mean((0, 1)) == pytest.approx(golden['mean'], abs=4)


def test_the_golden_means_are_what_the_script_writes():
  made = {name: describe(pixels) for name, (_, pixels) in create().items()}
  assert json.loads(GOLDEN.read_text()) == made


def test_the_rest_is_verified_when_a_dataset_is_missing(config, data):
  result = runs.call_main(config, '--mode=verify')
  assert result.returncode == 1
  assert "'tiny_imagenet' is missing" in result.stdout
  assert '21 images, 1 errors' in result.stdout
  assert (data / 'manifests').is_dir()


def with_sum(path):
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return f'--input={path}', f'--sha256={digest}'


@pytest.mark.parametrize(
  ('write', 'member', 'name'),
  [
    (write_tar, tar_member('../escaped'), '../escaped'),
    (write_zip, ('/tmp/jaxprog_escaped', b'x'), '/tmp/jaxprog_escaped'),
    (write_zip, zip_link('pets/symlink', '/etc'), 'pets/symlink'),
    (write_tar, tar_member('pets/hardlink', b'1', '/etc/passwd'), 'pets/hardl'),
  ],
)
def test_an_archive_that_could_write_elsewhere_is_refused(
  config, tmp_path, write, member, name
):
  path = write(tmp_path / 'archive', members=[member])
  before = set(files_below(tmp_path))
  result = runs.call_main(
    config, '--mode=prepare', '--only=pets', *with_sum(path)
  )
  assert_three_lines(result, name, path)
  assert set(files_below(tmp_path)) == before
  assert not os.path.exists('/tmp/jaxprog_escaped')


def test_an_archive_is_used_with_the_right_sum_alone(config, data, tmp_path):
  archive = tmp_path / 'pets.tar'
  subprocess.run(['tar', '-cf', archive, 'pets'], cwd=data, check=True)
  expected = files_below(data)
  shutil.rmtree(data)
  arguments = (config, '--mode=prepare', '--only=pets')
  right = hashlib.sha256(archive.read_bytes()).hexdigest()
  result = runs.call_main(
    *arguments, f'--input={archive}', f'--sha256={"0" * 64}'
  )
  assert_three_lines(result, '0' * 64, right, archive)
  result = runs.call_main(*arguments, f'--input={archive}')
  assert_three_lines(result, right, '--sha256')
  assert not data.exists()
  result = runs.call_main(*arguments, f'--input={archive}', f'--sha256={right}')
  assert result.returncode == 0, result.stderr
  assert files_below(data / 'pets').keys() == {
    x.removeprefix('pets/') for x in expected
  }
  assert len(preparation.load_dataset(f'folder:{data}/pets', data).train) == 15


def test_a_wrong_download_is_not_used(run_main, config, tmp_path, monkeypatch):
  # A proxy stands for the publisher, and answers with something else.
  (tmp_path / 'served' / 'tiny').mkdir(parents=True)
  sent = b'<html>moved</html>'

  class Publisher(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_response(200)
      self.end_headers()
      self.wfile.write(sent)

    def log_message(self, *_):
      pass

  server = http.server.HTTPServer(('127.0.0.1', 0), Publisher)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv('http_proxy', f'http://127.0.0.1:{server.server_port}')
  monkeypatch.delenv('no_proxy', raising=False)
  run = functools.partial(
    run_main, config, '--mode=prepare', '--only=tiny', '--download'
  )
  result = run()
  server.shutdown()
  server.server_close()
  found = hashlib.sha256(sent).hexdigest()
  known = named.DATASETS['tiny_imagenet'].archive
  assert_three_lines(result, known.url, known.sha256, found)
  assert_three_lines(run(), known.url, 'download failed')
  assert files_below(tmp_path / 'data') == {}


def remove_class(root):
  shutil.rmtree(root / 'train' / 'n02')
  shutil.rmtree(root / 'val' / 'n02')
  return ('--config.stages[0].num_classes=3',), root


def add_unknown_class(root):
  write_class_folders(root, wnids=('n015',), train=0, val=1)
  return (), root


def put_label_out_of_range(root):
  """Two class names where the records have three labels."""
  preparation.prepare(f'folder:{root}', root.parent)
  (names,) = (root.parent / 'prepared').rglob('label.labels.txt')
  names.write_text('n01\nn02\n')
  return (), names.parent


@pytest.mark.parametrize(
  ('spoil', 'expected'),
  [
    (remove_class, 'num_classes is 3, but'),
    (add_unknown_class, "Class 'n015'"),
    (put_label_out_of_range, 'labels outside 0..1'),
  ],
)
def test_wrong_classes_stop_a_run_before_its_first_step(
  config, data, tmp_path, spoil, expected
):
  options, folder = spoil(data / 'pets')
  run = f'--workdir={tmp_path}/run'
  result = runs.call_main(config, '--only=pets', run, *options)
  assert_three_lines(result, expected, folder)
  assert not (tmp_path / 'run' / 'checkpoints').exists()
  assert not (tmp_path / 'run' / 'training_history.json').exists()

"""What stands in the way of a run, as a list of findings."""

import os
import shlex
import subprocess
import sys

import data_fixtures
import history_fixture
import jax
import numpy as np
import pytest
import runs
import tiny_config

from jaxprog import config as config_lib
from jaxprog import files, stages
from jaxprog.data import preparation
from jaxprog.monitoring import history as history_lib
from jaxprog.planning import inspection
from jaxprog.reliability import checkpoints, integrity
from jaxprog.training import preflight
from jaxprog.training import setup as setup_lib


@pytest.fixture
def config(data_dir):
  config = tiny_config.get_config(data_dir)
  config.compilation_cache_dir = ''
  return config


def inspect(*arguments, **options):
  return inspection.inspect(*arguments, **options).findings


def crossed(findings):
  return [x for x in findings if x.ok is False]


def find(findings, word):
  return [x for x in findings if word in x.what]


def test_nothing_is_in_the_way_of_a_run_that_can_begin(config, tmp_path):
  findings = inspect(config, tmp_path / 'run')
  assert {x.ok for x in findings} == {True}
  text = '\n'.join(x.what for x in findings)
  assert "stage 'three': digits is prepared, 3 classes, 432 + 115" in text
  both = "stages 'ten', 'ten_again': digits is prepared, 10 classes, 1,437"
  assert both in text
  assert f'devices: {jax.device_count()} x cpu' in text
  assert 'MB of results to be written' in text
  assert inspection.summary(findings).endswith('0 warnings, 0 to mend.')
  assert list(tmp_path.iterdir()) == []


def test_no_problem_hides_another(config, tmp_path):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'cache').mkdir()
  (tmp_path / 'cache').chmod(0o777)
  config.compilation_cache_dir = str(tmp_path / 'cache')
  config.platform = 'tpu'
  config.stages[1]['num_classes'] = 11
  config.stages[2]['dataset'] = 'imagenet_mini'
  findings = inspect(config, tmp_path / 'file' / 'run')
  texts = [x.what for x in crossed(findings)]
  for word in (
    "asks for 'tpu'",
    'compilation cache',
    'num_classes is 11',
    "'imagenet_mini' is missing",
    'Cannot write to the workdir',
  ):
    assert len([x for x in texts if word in x]) == 1, texts
  assert len(texts) == 5
  assert all(x.fix for x in crossed(findings))
  assert find(findings, 'batch sizes')
  assert find(findings, "stage 'three'")[0].ok


def test_a_mirror_that_is_no_url_is_named(config, tmp_path):
  config.mirror = 'foo'
  for workdir in (None, tmp_path / 'run'):
    (finding,) = crossed(inspect(config, workdir))
    assert finding.what == "'foo' is no URL (config.mirror=foo)"
    assert finding.fix.startswith('Write s3://BUCKET/PATH')


@pytest.mark.parametrize('is_free', [True, False])
def test_a_bucket_is_written_to_where_nobody_may_own_it(
  config, tmp_path, is_free
):
  owner = {'host': 'elsewhere', 'pid': 1, 'released': is_free}
  (folder := tmp_path / 'bucket' / 'lease').mkdir(parents=True)
  files.write_json(folder / '000001.json', owner)
  before = runs.snapshot(folder.parent)
  config.mirror = f'file://{folder.parent}'
  findings = inspect(config, tmp_path / 'run')
  assert bool(find(findings, f'{config.mirror} can be written')) == is_free
  assert bool(find(findings, 'elsewhere')) != is_free
  after = runs.snapshot(folder.parent)
  assert after.keys() == before.keys()
  assert (after != before) == is_free  # The folder's time tells.


def test_a_wrong_config_leaves_the_machine_to_look_at(config, tmp_path):
  config.stages[0]['learning_rate'] = -1.0
  findings = inspect(config, tmp_path)
  assert [x.what.split()[0] for x in crossed(findings)] == ['learning_rate']
  assert find(findings, 'devices')[0].ok
  assert find(findings, 'Python')[0].ok
  assert not find(findings, 'stage ')


def test_batches_that_devices_cannot_share_are_named_stage_by_stage(config):
  command = (
    'import tiny_config\n'
    'from jaxprog.planning import inspection\n'
    f'config = tiny_config.get_config({config.data_dir!r})\n'
    'for x in inspection.inspect(config).findings: print(x.ok, x.what)'
  )
  output = subprocess.run(
    [sys.executable, '-c', command],
    env={
      **os.environ,
      'XLA_FLAGS': '--xla_force_host_platform_device_count=5',
      'PYTHONPATH': '.:tests',
    },
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  wrong = 'False batch_size 48 is not divisible by 5 devices'
  assert output.count(wrong) == 3
  assert 'True devices: 5 x cpu' in output


def test_raw_images_are_counted(config, tmp_path):
  root = data_fixtures.write_class_folders(tmp_path / 'pets')
  config.data_dir = str(tmp_path)
  config.stages = [
    {'name': 'pets', 'dataset': f'folder:{root}', 'num_epochs': 1},
  ]
  findings = inspect(config)
  (finding,) = find(findings, 'is raw')
  assert finding.ok is None
  assert '3 classes; 21 images will be prepared first' in finding.what
  assert finding.fix == 'jaxprog.prepare(config)'
  assert find(findings, 'of prepared data')
  config.stages[0]['num_classes'] = 4
  (finding,) = crossed(inspect(config))
  assert 'num_classes is 4, but' in finding.what
  preparation.prepare(f'folder:{root}', tmp_path)
  data_fixtures.write_image(root / 'train' / 'n01' / 'more.JPEG', 7)
  (finding,) = crossed(inspect(config))
  assert 'has changed since it was prepared' in finding.what


def test_unequal_classes_are_told_until_something_is_done(config, tmp_path):
  folder = data_fixtures.write_class_folders(tmp_path / 'few', train=2)
  for i in range(22):
    data_fixtures.write_image(folder / 'train' / 'n02' / f'{i}.JPEG', i)
  config.stages = [config.stages[0]]
  config.stages[0].update(classes=(), dataset=f'folder:{folder}')
  config.data_dir = str(tmp_path / 'data')
  for is_prepared in (False, True):
    if is_prepared:
      preparation.load_dataset(f'folder:{folder}', tmp_path / 'data')
    config.stages[0]['class_weighting'] = 0.0
    (found,) = find(inspect(config), 'classes of')
    assert found.what == (
      "stage 'three': classes of 2 to 24 training images (12 times as many)"
    )
    assert found.ok is None
    config.stages[0]['class_weighting'] = 0.5
    (found,) = find(inspect(config), 'classes of')
    assert found.ok


def test_what_is_written_before_training_is_a_warning(config, tmp_path):
  config.data_dir = str(tmp_path)
  config.stages = [{**config.stages[0], 'storage': 'raw:8'}]
  config.exclude_leaks = True
  preparation.prepare('digits', tmp_path)
  first = inspect(config)
  assert find(first, 'will be stored as raw:8')[0].ok is None
  (stage,) = stages.create_stages(config)
  dataset = preparation.load_dataset('digits', config.data_dir)
  preparation.store(dataset, stage.stored)
  second = inspect(config)
  assert find(second, 'are stored as raw:8')[0].ok
  assert find(second, 'leaks: every image will be compared first')
  setup_lib.create_setup(config)
  assert find(inspect(config), 'leaks: looked for before')


def test_versions_out_of_bounds_are_named(tmp_path):
  (tmp_path / 'pyproject.toml').write_text(
    '[project]\nrequires-python = ">=3.9,<3.10"\n'
    '[project.optional-dependencies]\n'
    'tune = ["absent_as_well>=1", "pytest>=99"]\nlint = ["ruff>=99"]\n'
  )
  (tmp_path / 'requirements.txt').write_text(
    '# A comment.\nnumpy>=99\njax>=0.1\nno_such_package>=1,<2\n'
    'absent_too>=1; sys_platform == "plan9"\n'
  )
  python, numpy, missing, extra = inspection._check_versions(root=tmp_path)
  assert python.ok is None
  assert 'is not >=3.9,<3.10' in python.what
  assert numpy.ok is None
  assert f'numpy {np.__version__} is not >=99' in numpy.what
  assert missing.ok is False
  assert shlex.split(missing.fix)[-1] in (
    'no_such_package>=1,<2',
    'no_such_package<2,>=1',
  )
  assert extra.ok is None
  assert f'pytest {pytest.__version__} is not >=99' in extra.what


def test_what_a_wheel_says_of_extras(tmp_path, monkeypatch):
  folder = tmp_path / 'jaxprog-9.dist-info'
  folder.mkdir()
  (folder / 'METADATA').write_text(
    'Metadata-Version: 2.4\nName: jaxprog\nVersion: 9\n'
    'Requires-Python: >=3.9\nRequires-Dist: numpy>=1\n'
    'Requires-Dist: absent>=1; extra == "tune"\n'
    'Requires-Dist: pytest>=99; extra == "s3"\n'
    'Requires-Dist: ruff>=99; extra == "lint"\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  (found,) = inspection._check_versions(root=tmp_path)
  assert found.ok is None
  assert f'pytest {pytest.__version__} is not >=99' in found.what


def test_the_disk_is_the_same_before_and_after_data_is_loaded(config, tmp_path):
  setup = setup_lib.create_setup(config)
  tasks = [setup_lib.create_task(setup, stage) for stage in setup.chosen]
  lines = preflight.quick(tasks, tmp_path / 'run')
  assert [x.split(':')[0] for x in lines] == ['devices', 'disk']
  need = lines[1].split(' to be')[0].removeprefix('disk: ')
  (finding,) = find(inspect(config, tmp_path / 'run'), 'disk: ')
  assert finding.what.startswith(f'disk: {need} of results')


def test_what_a_workdir_holds_is_told_with_what_has_changed(config, tmp_path):
  complete = stages.complete(config)
  files.write_json(tmp_path / 'config.json', config_lib.to_json(complete))
  history = history_lib.new_history('')
  for name in ('three', 'ten', 'ten_again'):
    fields = dict.fromkeys(history_fixture.STAGE_FIELDS, 1)
    history_lib.begin_stage(history, **{**fields, 'name': name})
  files.write_json(tmp_path / 'training_history.json', history)
  folder = checkpoints.stage_directory(tmp_path, 'three')
  with checkpoints.Checkpoints(folder) as saved:
    saved.mark_done({'record': {}})
  latest = checkpoints.stage_directory(tmp_path, 'ten') / 'latest'
  for step in (9, 10, 11):
    (latest / str(step)).mkdir(parents=True)
    if step < 11:
      integrity.write_manifest(latest / str(step))
  # The save of step 11 was cut short.
  (latest / '.saving-11').write_text('')
  findings = find(inspect(config, tmp_path), 'run: ')
  assert [x.what for x in findings] == [
    'run: three done, ten interrupted, saved at step 10, ten_again begun, '
    'nothing saved'
  ]
  config.seed = 5
  (finding,) = crossed(inspect(config, tmp_path))
  assert finding.what.endswith('with another config (seed: 0 -> 5)')
  assert '--allow_config_change' in finding.fix
  allowed = inspect(config, tmp_path, allow_config_change=True)
  assert not crossed(allowed)
  assert find(allowed, 'another config: seed: 0 -> 5')[0].ok is None


def test_a_damaged_marker_is_a_warning_and_hides_nothing(config, tmp_path):
  folder = checkpoints.stage_directory(tmp_path, 'three')
  with checkpoints.Checkpoints(folder) as saved:
    saved.mark_done({'record': {}})
  marker = folder / 'done.json'
  marker.write_bytes(marker.read_bytes().replace(b'record', b'recorD'))
  found = inspect(config, tmp_path)
  (warning,) = [x for x in found if x.ok is None]
  assert warning.what.startswith('run: three/done.json is damaged')
  assert not crossed(found)
  assert find(found, 'disk: ')

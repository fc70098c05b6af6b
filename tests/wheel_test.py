"""What is installed: one package, which carries its configs."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import runs
import tensorboard_server
from PIL import Image
from runs import ROOT

pytest.importorskip('setuptools', minversion='77')
# A config of one's own, over others of one's own in a folder named configs.
OWN = """
from configs import default
from jaxprog import start_from

def get_config():
  config = start_from('quickstart')
  config.stages[0]['name'] = default.NAME
  return config
"""


def test_every_package_is_within_one():
  code = (
    'import distutils.core as c; d = c.run_setup("setup.py", ["-q"], "init")'
  )
  code += '; print(*d.packages)'
  result = subprocess.run(
    [sys.executable, '-c', f'import setuptools; {code}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  rooms = {x.parent.name for x in ROOT.glob('jaxprog/*/__init__.py')}
  found = {*result.stdout.split()}
  assert {f'jaxprog.{room}' for room in rooms} < found
  assert {x.partition('.')[0] for x in found} == {'jaxprog'}


@pytest.mark.slow
def test_a_wheel_works_beside_configs_of_ones_own(data_dir, tmp_path):
  source = copy_source(tmp_path / 'source')
  run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-q',
       '--no-build-isolation', '-w', tmp_path, source], tmp_path)  # fmt: skip
  (wheel,) = tmp_path.glob('*.whl')
  names = {x.partition('/')[0] for x in zipfile.ZipFile(wheel).namelist()}
  assert {x for x in names if 'dist-info' not in x} == {'jaxprog'}

  run([sys.executable, '-m', 'venv', tmp_path / 'new'], tmp_path)
  python = tmp_path / 'new' / 'bin' / 'python'
  # What it needs is installed here.
  place = run(
    [python, '-c', 'import sysconfig as s; print(s.get_path("purelib"))'],
    tmp_path,
  )
  with open(f'{place.strip()}/here.pth', 'w') as file:
    file.write(sysconfig.get_path('purelib'))
  run([python, '-m', 'pip', 'install', '-q', '--no-deps', wheel], tmp_path)

  mine = tmp_path / 'mine'
  (mine / 'configs').mkdir(parents=True)
  (mine / 'configs' / 'default.py').write_text("NAME = 'mine'\n")
  (mine / 'mine.py').write_text(OWN)
  given = f'--config.data_dir={data_dir}', '--config.check_steps=0'
  for config, stage in (('quickstart', 'four'), ('mine.py', 'mine')):
    command = [python.with_name('jaxprog'), f'--config={config}', *given]
    told = run([*command, '--mode=check', f'--only={stage}'], mine)
    assert '0 to mend' in told
  assert 'jaxprog 0.1.0' in run([python, '-m', 'jaxprog', '--version'], mine)
  code = 'import configs, jaxprog; print(configs.__path__, jaxprog.__file__)'
  told = run([python, '-c', code], mine)
  assert str(ROOT) not in told
  assert 'site-packages' in told


@pytest.mark.slow
def test_the_ladder_needs_no_extra(tmp_path):
  run([sys.executable, '-m', 'venv', tmp_path / 'new'], tmp_path)
  python = tmp_path / 'new' / 'bin' / 'python'
  source = copy_source(tmp_path / 'source')
  run([python, '-m', 'pip', 'install', '-q', '--editable', source], tmp_path)
  for name in ('tensorflow', 'optuna'):
    found = run([python, '-m', 'pip', 'list'], tmp_path).lower().split()
    assert not {name, f'{name}-cpu', f'{name}_cpu'} & {*found}

  def jaxprog(*arguments):
    command = [python.with_name('jaxprog'), '--workdir=run', *arguments]
    return run(command, tmp_path)

  config = '--config=quickstart', '--config.stages[*].num_epochs=2'
  assert '0 to mend' in jaxprog(*config, '--mode=check')
  jaxprog(*config)
  jaxprog('--mode=eval')
  jaxprog('--mode=predict', f'--input={ROOT / "docs" / "digit.png"}')
  jaxprog('--mode=export')
  jaxprog('--mode=report')
  checked = jaxprog('--mode=check')
  assert '0 warnings, 0 to mend' in checked, checked

  server = tensorboard_server.Server(tmp_path / 'run/tensorboard/run', python)
  with contextlib.closing(server):
    server.wait_for_tag('images/ten_large/confusion')
    found = server.get_json(
      'data/plugin/scalars/scalars', run='train', tag='1 four/loss'
    )
    picture = Image.open(io.BytesIO(server.get_picture('images/ten/worst')))
    hparams = server.get_session_group()['hparams']
  epochs = runs.read_history(tmp_path / 'run')['stages'][0]['epochs']
  assert [(step, value) for _, step, value in found] == [
    (row['global_step'], pytest.approx(row['train_loss'], rel=1e-6))
    for row in epochs
  ]
  assert picture.mode == 'RGB'
  assert hparams['ten.num_epochs'] == 2

  search = '--config=tune_digits', '--mode=tune', '--workdir=search'
  told = subprocess.run(
    [python.with_name('jaxprog'), *search], cwd=tmp_path, capture_output=True
  )
  assert told.returncode == 2
  assert told.stderr.decode().splitlines() == [
    "A search needs a package that is not installed: No module named 'optuna'.",
    '--mode=tune',
    "pip install 'jaxprog[tune]'",
  ]


def copy_source(folder):
  """Returns `folder`, with what a checkout installs."""
  for name in ('configs', 'jaxprog'):
    shutil.copytree(ROOT / name, folder / name)
  for name in ('README.md', 'pyproject.toml', 'requirements.txt', 'setup.py'):
    shutil.copy(ROOT / name, folder)
  return folder


def run(command, folder):
  """Returns what a command prints, which must go well."""
  env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  result = subprocess.run(
    list(map(str, command)),
    cwd=folder,
    env={**env, 'COLUMNS': '100'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout

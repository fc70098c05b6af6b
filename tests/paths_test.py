import pathlib

import pytest
import runs
import tiny_config

import jaxprog
from jaxprog import errors, paths

JAXPROG = pathlib.Path(jaxprog.__file__).parent


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  return tmp_path


def test_a_home_is_where_it_stands_first(home):
  assert paths.expand('~/runs/a') == home / 'runs' / 'a'
  assert paths.expand('~') == home
  assert paths.expand('runs/~') == pathlib.Path('runs/~')
  assert paths.expand('./~') == pathlib.Path('~')
  assert paths.dataset_folder('folder:~/pets') == home / 'pets'
  assert paths.dataset_folder('digits') is None
  with pytest.raises(errors.UserError, match='home directory ~nosuchuser'):
    paths.expand('~nosuchuser/a')


def test_nobody_else_looks_for_a_home():
  found = [
    x.name for x in JAXPROG.rglob('*.py') if 'expanduser(' in x.read_text()
  ]
  assert found == ['paths.py']


def test_the_command_line_finds_what_it_has_written(home):
  (home / 'x.py').write_text('from tests.tiny_config import get_config\n')
  common = '--config=~/x.py', '--config.data_dir=~/data'
  prepared = runs.call_main('--mode=prepare', *common)
  assert prepared.returncode == 0, prepared.stderr
  assert (home / 'data' / 'prepared').is_dir()
  checked = runs.call_main(
    '--mode=check',
    *common,
    '--workdir=~/runs/a',
    '--only=three',
    '--config.check_steps=0',
    '--config.compilation_cache_dir=~/cache',
  )
  assert checked.returncode == 0, checked.stdout + checked.stderr
  assert "stage 'three': digits is prepared" in checked.stdout
  assert (home / 'runs' / 'a' / 'plan.json').is_file()
  assert (home / 'cache').is_dir()
  assert not (runs.ROOT / '~').exists()


def test_a_config_keeps_what_was_written(home, data_dir):
  """It may be read by somebody else, whose home is another one."""
  (home / 'data').symlink_to(data_dir)
  config = tiny_config.get_config('~/data')
  assert jaxprog.load_datasets(config, ['three'])
  assert config.data_dir == '~/data'


@pytest.mark.parametrize(
  'call',
  [
    jaxprog.evaluate,
    jaxprog.export,
    lambda config, workdir: jaxprog.predict(config, workdir, '~/photo.png'),
    lambda config, workdir: jaxprog.verify_checkpoints(workdir),
    lambda config, workdir: jaxprog.write_report(workdir),
    lambda config, workdir: jaxprog.write_report([workdir]),
  ],
)
def test_calls_know_homes_too(home, call):
  (home / 'photo.png').write_bytes(b'\x89PNG\r\n\x1a\n')
  with pytest.raises(errors.UserError, match=f'no run in {home}/runs/a'):
    call(tiny_config.get_config(), '~/runs/a')
  with pytest.raises(errors.UserError, match='no --workdir'):
    call(tiny_config.get_config(), '')

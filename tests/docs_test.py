"""Every command that the documentation shows is run, on small data.

A command that needs more says so in a comment: `# needs a TPU`. Those of
several hosts are run by reliability_peers_test, those with a $BUCKET nowhere;
their flags are read.
"""

import pathlib
import re
import runpy
import shlex
import shutil

import pytest
from PIL import Image

from jaxprog import cli, fields, start_from

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ('README.md', *sorted(f'docs/{p.name}' for p in ROOT.glob('docs/*.md')))
ELSEWHERE = ('# needs ', '--coordinator=', '$')


def find_commands(page):
  """Returns the lines of code blocks that call jaxprog, joined."""
  text = (ROOT / page).read_text().replace('\\\n', ' ')
  lines = re.findall(r'^ {4,}(jaxprog .*)$', text, re.MULTILINE)
  return [re.sub(r'\s+', ' ', line) for line in lines]


def adapt(command, data_dir, root):
  """Returns the arguments, for small stages and below `root`."""
  small = {
    '=quickstart': f'=tests/docs_config.py:{data_dir}',
    '=progressive': f'=tests/docs_config.py:{data_dir}',
    '=tune_digits': f'=tests/tune_config.py:{data_dir}',
    '=compare_strategies': f'=tests/compare_config.py:{data_dir}',
    'runs/': f'{root}/runs/',
    'photos': f'{root}/photos',
    'data/scans': f'{root}/scans',
    'weights.safetensors': f'{root}/runs/first/export/ten.safetensors',
    '--config.data_dir=/data': f'--config.data_dir={data_dir}',
  }
  arguments = shlex.split(command, comments=True)
  for old, new in small.items():
    arguments = [x.replace(old, new) for x in arguments]
  if '--mode=tune' in arguments:
    arguments.append('--config.num_trials=1')
  if '--mode=compare' in arguments:
    arguments += ['--config.seeds=2', '--config.base.stages[0].num_epochs=0.3']
  return arguments


@pytest.fixture(scope='module')
def root(data_dir, tmp_path_factory):
  """A place with a finished run, a second one, photographs and scans."""
  root = tmp_path_factory.mktemp('docs')
  config = f'--config=tests/docs_config.py:{data_dir}'
  workdir = f'--workdir={root}/runs/first'
  assert cli.main(['main.py', config, workdir]) == 0
  shutil.copytree(root / 'runs' / 'first', root / 'runs' / 'second')
  assert cli.main(['main.py', '--mode=export', workdir]) == 0
  for path in ('photos/a.png', *(f'scans/val/{x}/a.png' for x in range(10))):
    (root / path).parent.mkdir(parents=True)
    Image.new('RGB', (32, 24), 'gray').save(root / path)
  (root / 'scans' / 'train').symlink_to(root / 'scans' / 'val')
  return root


def unique_commands():
  """Returns each command once, with the page that shows it first."""
  found = {}
  for page in PAGES:
    for command in find_commands(page):
      found.setdefault(command, page)
  return [(page, command) for command, page in found.items()]


@pytest.mark.slow
@pytest.mark.parametrize(('page', 'command'), unique_commands())
def test_the_command_works(page, command, data_dir, root, monkeypatch):
  if any(mark in command for mark in ELSEWHERE):
    pytest.skip(f'run elsewhere, or for hardware: {command}')
  monkeypatch.chdir(ROOT)
  assert cli.main(adapt(command, data_dir, root)) == 0


@pytest.mark.parametrize(
  ('page', 'command'),
  [x for x in unique_commands() if any(mark in x[1] for mark in ELSEWHERE)],
)
def test_the_flags_of_other_commands_are_some(page, command):
  words = shlex.split(command.replace('$i', '0').rstrip(' &'), comments=True)
  asked = cli.create_flags()
  overrides = cli.parse_flags(asked, words)
  cli.check_flags(asked)
  names = {re.split(r'[.[]', path)[0] for path in overrides}
  known = {*fields.CONFIG, 'stages', 'stage_defaults'}
  assert names <= known | {*start_from('compare_default')}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
  text = (ROOT / page).read_text()
  for target in re.findall(r'\]\(([^)#]+)[^)]*\)', text):
    if not target.startswith('http'):
      assert (ROOT / page).parent.joinpath(target).exists(), target


def test_modes_are_all_documented():
  text = ''.join((ROOT / page).read_text() for page in PAGES)
  for mode in cli.MODES:
    assert f'--mode={mode}' in text or mode == 'train'


def test_a_picture_of_a_terminal_has_what_was_written_last():
  made = runpy.run_path(str(ROOT / 'docs' / 'make_pictures.py'))
  again = '\r\x1b[2K\x1b[1A\x1b[2K'  # Up a line, both erased.
  text = f'one\r\ntwo{again}\x1b[32mONE\x1b[0m\r\nTWO 1\r\x1b[2KTWO 2\r\n'
  assert made['screen'](text) == '\x1b[32mONE\x1b[0m\nTWO 2'
  # What stands at the foot is taken away, and drawn again below a new row.
  foot = '\x1b[?25l\r\x1b[J{}\r\n{}\x1b[1A\r'
  text = 'a\r\n' + foot.format(1, 2) + '\r\x1b[Jb\r\n' + foot.format(3, 4)
  assert made['screen'](text) == 'a\nb\n3\n4'

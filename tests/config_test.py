import dataclasses
import io
import json

import pytest
import rich.console

from jaxprog import config as config_lib
from jaxprog import errors, fields, stages

FILE = 'configs/quickstart.py'


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)


def test_overrides_take_the_type_of_what_they_replace():
  config = config_lib.load_config(
    FILE,
    {
      'seed': '7',
      'stages[0].num_epochs': '3',
      'stages[-1].nesterov': 'true',
      'stages[1].classes': '0,1',
      'stages[2].name': 'renamed',
    },
  )
  assert config.seed == 7
  assert config.stages[0].num_epochs == 3.0
  assert isinstance(config.stages[0].num_epochs, float)
  assert config.stages[3].nesterov is True
  assert config.stages[1].classes == ('0', '1')
  assert config.stages[2].name == 'renamed'


def test_a_default_reaches_every_stage_that_does_not_say_otherwise():
  config = config_lib.load_config(FILE, {'stage_defaults.weight_decay': '0.5'})
  decays = [stage.weight_decay for stage in config.stages]
  assert decays == [0.5, 0.5, 1e-4, 1e-4]


def test_a_default_that_reaches_no_stage_is_refused(tmp_path, capsys):
  config_lib.load_config(FILE, {'stage_defaults.weight_decay': '0.5'})
  assert 'ten, ten_large keep their own weight_decay' in capsys.readouterr().err
  with pytest.raises(
    errors.UserError, match='four, seven, ten, ten_large keep'
  ):
    config_lib.load_config(FILE, {'stage_defaults.learning_rate': '1'})
  # Stages of a saved config are complete.
  path = tmp_path / 'config.json'
  saved = config_lib.load_config(FILE)
  path.write_text(json.dumps(config_lib.to_json(saved)))
  with pytest.raises(errors.UserError) as caught:
    config_lib.load_config(str(path), {'stage_defaults.batch_size': '64'})
  assert 'Use --config.stages[*].batch_size' in caught.value.suggestion
  config_lib.load_config(str(path), {'stage_defaults.batch_size': '32'})
  assert not capsys.readouterr().err


def test_stages_are_named_by_index_by_name_and_all_at_once():
  overrides = {
    'stages[*].num_epochs': '1',
    'stages.ten_large.num_epochs': '2',
    'stages.seven.name': 'a.b',
    'stages.a.b.num_epochs': '3',
  }
  config = config_lib.load_config(FILE, overrides)
  assert [x.num_epochs for x in config.stages] == [1, 3, 1, 2]
  comparison = config_lib.load_config(
    'configs/compare_ladder.py:digits',
    {'base.stages[*].batch_size': '16', 'base.stages.ten.flip': 'on'},
  )
  assert [x.batch_size for x in comparison.base.stages] == [16, 16]
  assert [x.flip for x in comparison.base.stages] == [False, True]


def test_an_argument_reaches_get_config():
  config = config_lib.load_config('configs/progressive.py:resnet18')
  assert config.model == 'resnet18'


@pytest.mark.parametrize(
  'spec', ['progressive:resnet18', 'configs/progressive.py:resnet18']
)
def test_shipped_configs_are_found_by_name_anywhere(
  spec, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert config_lib.load_config(spec).model == 'resnet18'
  with pytest.raises(errors.UserError, match="Did you mean 'progressive'"):
    config_lib.load_config(spec.replace('essive', 'esive'))


def test_what_is_at_a_path_wins_over_what_is_shipped(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'default.py').write_text(
    'from jaxprog import start_from\n'
    'def get_config():\n'
    "  config = start_from('default')\n"
    '  config.seed = 7\n'
    '  return config\n'
  )
  assert config_lib.load_config('configs/default.py').seed == 7
  assert config_lib.load_config('default').seed == 0


def test_what_is_started_from_takes_over_later_defaults():
  config = config_lib.start_from('quickstart')
  config.stage_defaults.image_size = 8
  sizes = [x.image_size for x in stages.create_stages(config)]
  assert sizes == [8, 8, 8, 32]


@pytest.mark.parametrize(
  ('field', 'text', 'expected'),
  [
    ('sed', '1', "Did you mean 'seed'"),
    ('stages[0].num_epoch', '1', "Did you mean 'num_epochs'"),
    ('stages[4].num_epochs', '1', 'Use 0 to 3'),
    ('stages', '1', 'names a group'),
    ('seed.x', '1', 'no field of a value'),
    ('seed[0]', '1', 'does not index a list'),
    ('mean_rgb[0]', '1', 'part of a value'),
    ('stages.fuor.num_epochs', '1', "Did you mean 'four'"),
    ('stages[*].num_epoch', '1', "Did you mean 'num_epochs'"),
  ],
)
def test_overrides_that_name_nothing(field, text, expected):
  with pytest.raises(errors.UserError, match=expected) as caught:
    config_lib.load_config(FILE, {field: text})
  assert f'--config.{field}={text}' in str(caught.value)


def test_config_files_that_fail(tmp_path):
  with pytest.raises(errors.UserError, match=r'configs/quickstart\.py'):
    config_lib.load_config('configs/quickstrat.py')
  (tmp_path / 'a.py').write_text('def get_config(): return 1 / 0')
  with pytest.raises(errors.UserError, match='division by zero'):
    config_lib.load_config(str(tmp_path / 'a.py'))
  (tmp_path / 'b.py').write_text('def get_config(): return {}')
  with pytest.raises(errors.UserError, match='not a ConfigDict'):
    config_lib.load_config(str(tmp_path / 'b.py'))
  (tmp_path / 'c.json').write_text('{')
  with pytest.raises(errors.UserError, match='not JSON'):
    config_lib.load_config(str(tmp_path / 'c.json'))


def test_json_round_trip_keeps_the_hash(tmp_path):
  config = config_lib.load_config(FILE)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(config_lib.to_json(config)))
  again = config_lib.load_config(str(path))
  assert config_lib.config_hash(again) == config_lib.config_hash(config)
  assert stages.create_stages(again) == stages.create_stages(config)


def test_hash_changes_with_what_changes_the_result():
  config = config_lib.load_config(FILE)
  other_place = config_lib.load_config(FILE, {'data_dir': '/elsewhere'})
  other_rate = config_lib.load_config(FILE, {'stages[3].learning_rate': '1'})
  assert config_lib.config_hash(other_place) == config_lib.config_hash(config)
  assert config_lib.config_hash(other_rate) != config_lib.config_hash(config)


def test_another_default_of_what_is_free_changes_no_hash(monkeypatch):
  before = config_lib.config_hash(config_lib.load_config(FILE))
  for name in fields.names(fields.CONFIG, 'free'):
    changed = dataclasses.replace(fields.CONFIG[name], default='another')
    monkeypatch.setitem(fields.CONFIG, name, changed)
  assert config_lib.config_hash(config_lib.load_config(FILE)) == before


def test_a_younger_field_at_its_default_is_no_part_of_the_hash():
  config = config_lib.load_config(FILE)
  before = config_lib.config_hash(config)
  older = config_lib.load_config(FILE)
  for name in fields.names(fields.STAGE, 'younger'):
    for stage in older.stages:
      del stage[name]
  assert config_lib.config_hash(older) == before
  config.stages[0].drop_path = 0.1
  assert config_lib.config_hash(config) != before


@pytest.mark.parametrize('field', fields.names(fields.CONFIG, 'free'))
def test_what_is_free_forbids_no_resume(field):
  old = config_lib.load_config(FILE)
  new = config_lib.load_config(FILE)
  with new.ignore_type():
    new[field] = 'another'
  plain = config_lib.to_json(old), config_lib.to_json(new)
  assert config_lib.differences(*plain, ('four',)) == []
  assert config_lib.config_hash(old) == config_lib.config_hash(new)


def test_differences_count_only_started_stages():
  old = config_lib.to_json(config_lib.load_config(FILE))
  new = config_lib.to_json(
    config_lib.load_config(
      FILE,
      {'seed': '1', 'stages[0].batch_size': '8', 'stages[3].power': '3'},
    )
  )
  assert config_lib.differences(old, new, ('four', 'seven')) == [
    'seed: 0 -> 1',
    'four.batch_size: 32 -> 8',
  ]


def _compare(overrides, started, **options):
  old = config_lib.to_json(config_lib.load_config(FILE))
  new = config_lib.to_json(config_lib.load_config(FILE, overrides))
  file = io.StringIO()
  console = rich.console.Console(file=file, **{'width': 80, **options})
  console.print(config_lib.difference_table(old, new, started))
  return file.getvalue()


def test_the_table_tells_what_changes_a_run_from_what_may_change():
  text = _compare(
    {
      'num_workers': '3',
      'stages[0].batch_size': '8',
      'stages[1].description': 'x',
      'stages[2].power': '3',
      'stages[3].name': 'last',
    },
    ('four', 'seven'),
  )
  rows = [x.split() for x in text.splitlines()[3:]]
  assert rows[0] == ['four.batch_size', '32', '8', 'changes']
  assert rows[1] == ['num_workers', '0', '3', 'allowed']
  results = [(row[0], row[-1]) for row in rows if 'allowed' in row]
  assert [field for field, _ in results[1:]] == [
    'seven.description',
    'ten.power',
    'stages',
  ]
  assert text.count('changes') == 1


def test_only_what_is_allowed_is_dimmed():
  text = _compare({'num_workers': '3', 'seed': '1'}, (), force_terminal=True)
  seed, workers = text.splitlines()[3:5]
  assert 'seed' in seed
  assert '\x1b[2m' not in seed
  assert '\x1b[2m' in workers


def test_equal_configs_have_no_differences():
  config = config_lib.to_json(config_lib.load_config(FILE))
  assert config_lib.changes(config, config, ('four',)) == []
  assert config_lib.difference_table(config, config, ()).row_count == 0


def test_a_field_that_one_config_lacks_is_not_set():
  new = config_lib.to_json(config_lib.load_config(FILE))
  old = {k: v for k, v in new.items() if k != 'blur_pool'}
  assert config_lib.differences(old, new, ()) == ['blur_pool: not set -> False']


def test_long_values_are_shown_from_where_they_differ():
  classes = [f'n{i:08}' for i in range(1000)]
  old, new = (
    {'stages': [{'name': 'a', 'classes': x}]} for x in (classes, classes[:-1])
  )
  file = io.StringIO()
  console = rich.console.Console(file=file, width=80)
  console.print(config_lib.difference_table(old, new, ('a',)))
  lines = file.getvalue().splitlines()
  assert len(lines) < 10
  assert max(map(len, lines)) <= 80
  # Folded within the column 'was'.
  assert 'n00000999' in ''.join(x[11:38].strip() for x in lines)


def test_a_narrow_terminal_folds_and_drops_nothing():
  text = _compare(
    {
      'stages[0].dataset': 'folder:/' + 28 * 'x',
      'stages[0].name': 'four' + 30 * 'z',
      'stages[1].dataset': 'folder:/' + 28 * 'x',
    },
    ('four', 'seven'),
    width=60,
  )
  assert max(map(len, text.splitlines())) <= 60
  assert text.count('x') == 28
  assert text.count('changes') == 1


def test_fields_younger_than_a_saved_config_have_their_defaults(tmp_path):
  config = config_lib.load_config(FILE)
  plain = config_lib.to_json(config)
  del plain['watchdog_minutes']
  del plain['stage_defaults']['transfer']
  for stage in plain['stages']:
    del stage['transfer']
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(plain))
  loaded = config_lib.load_config(str(path))
  assert config_lib.config_hash(loaded) == config_lib.config_hash(config)
  assert loaded.watchdog_minutes == config.watchdog_minutes


@pytest.mark.parametrize('name', ['compare_default', 'tune_default'])
def test_fields_younger_than_a_saved_comparison_have_theirs(tmp_path, name):
  config = config_lib.load_config(name)
  plain = config_lib.to_json(config)
  younger = [x for x in plain if x not in ('base', 'grid', 'search')]
  for field in younger:
    del plain[field]
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(plain))
  loaded = config_lib.load_config(str(path))
  assert config_lib.to_json(loaded) == config_lib.to_json(config)


def test_the_path_of_a_saved_config_may_hold_colons(tmp_path):
  folder = tmp_path / 'x.py:12:30'
  folder.mkdir()
  config = config_lib.load_config(FILE)
  path = folder / 'config.json'
  path.write_text(json.dumps(config_lib.to_json(config)))
  loaded = config_lib.load_config(str(path))
  assert config_lib.config_hash(loaded) == config_lib.config_hash(config)


@pytest.mark.parametrize('text', ['[]', '3', 'null', '{"stages": 1}'])
def test_json_that_is_no_config_is_said(tmp_path, text):
  path = tmp_path / 'config.json'
  path.write_text(text)
  with pytest.raises(errors.UserError, match='not a config'):
    config_lib.load_config(str(path))


@pytest.mark.parametrize(
  ('spec', 'argument'),
  [('a:b/c.py', ''), ('a:b/c.py:x:y.py', 'x:y.py'), ('a:b/c:d', '')],
)
def test_the_path_of_a_config_may_hold_colons(tmp_path, spec, argument):
  path = tmp_path / spec.removesuffix(f':{argument}')
  path.parent.mkdir()
  code = (
    'from jaxprog import start_from\n'
    "def get_config(data_dir='here'):\n"
    "  config = start_from('default')\n"
    '  config.data_dir = data_dir\n'
    '  return config\n'
  )
  path.write_text(code)
  if path.suffix == '.py':
    config = config_lib.load_config(f'{tmp_path}/{spec}')
    assert config.data_dir == (argument or 'here')
  else:
    with pytest.raises(errors.UserError, match=r'a \.py or a'):
      config_lib.load_config(f'{tmp_path}/{spec}')


def test_what_fails_in_a_config_file_is_named_with_its_line(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text('def get_config():\n  return {}[3]\n')
  with pytest.raises(errors.UserError, match='KeyError: 3') as e:
    config_lib.load_config(str(path))
  assert e.value.where == f'--config={path}, line 2'
  path.write_text('def get_config():\n  return len(3)\n')
  with pytest.raises(errors.UserError, match='TypeError') as e:
    config_lib.load_config(str(path))
  assert (e.value.where, e.value.suggestion) == (f'--config={path}, line 2', '')
  with pytest.raises(errors.UserError, match='TypeError') as e:
    config_lib.load_config(f'{path}:x')
  assert 'which may take one string' in e.value.suggestion
  (tmp_path / 'c.json').write_text('{}')
  with pytest.raises(errors.UserError, match='takes no argument'):
    config_lib.load_config(f'{tmp_path}/c.json:x')

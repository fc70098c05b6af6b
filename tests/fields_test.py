import json
import math
import runpy

import pytest
import runs
import tiny_config

from jaxprog import config as config_lib
from jaxprog import errors, fields, stages, start_from
from jaxprog.comparison import cells
from jaxprog.tools import tune

TINY = '--config=tests/tiny_config.py'
# Values of other types, and what the command line may say in their place.
WRONG = {
  bool: ('no', 1, None),
  int: (64.0, '64', True, None),
  float: ('0.1', True, None, math.nan, math.inf, 1e39, 10**400),
  str: (1, True, None),
  tuple[str, ...]: ('abc', 3, (1, 2), None),
  tuple[float, ...]: (3, ('a',), (None,), (math.nan,), None),
  tuple[float, float, float]: ((0.5, 0.5), 'abc', 0.5, (127, 127, 127), None),
  tuple[fields.PhaseStart, ...]: (3, 'abc', ({},), None),
}
WRONG_TEXT = {
  bool: ('maybe', ''),
  int: ('64.0', 'x', 'None', ''),
  float: ('x', 'nan', 'inf', '1e400', 'None', ''),
  tuple[float, ...]: ('a', '(1,', '(None,)'),
  tuple[float, float, float]: ('a,b,c', '0.5', '127,127,127'),
  tuple[fields.PhaseStart, ...]: ('3', 'abc'),
}


def mistake(config):
  with pytest.raises(errors.UserError) as caught:
    stages.create_stages(config)
  assert len(str(caught.value).splitlines()) <= 3
  return str(caught.value)


@pytest.mark.parametrize('field', [*fields.CONFIG, *fields.STAGE])
def test_every_field_refuses_other_types_wherever_they_come_from(field):
  declared = {**fields.CONFIG, **fields.STAGE}[field]
  first, *others = WRONG[declared.kind]
  for value in others:
    with pytest.raises(errors.UserError, match=field) as caught:
      declared.check(value, 'config')
    assert len(str(caught.value).splitlines()) <= 3
  config = tiny_config.get_config()
  of_stages = field in fields.STAGE
  group = config.stage_defaults if of_stages else config
  with group.ignore_type():
    group[field] = first
  assert field in mistake(config)
  if of_stages:
    config = tiny_config.get_config()
    config.stages[0][field] = first
    assert field in mistake(config)


@pytest.mark.parametrize('field', [*fields.CONFIG, *fields.STAGE])
def test_every_field_refuses_text_that_is_none_of_it(field):
  declared = {**fields.CONFIG, **fields.STAGE}[field]
  for text in WRONG_TEXT.get(declared.kind, ()):
    with pytest.raises(errors.UserError, match=field) as caught:
      declared.check(declared.parse(text, '--config'), 'config')
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
  'override',
  [
    'stage_defaults.flip=perhaps',
    'stage_defaults.warmup_steps=1.5',
    'stage_defaults.batch_size=64.0',
    'stage_defaults.learning_rate=None',
    'stages[0].mixed_precision=2',
    'tensorboard=never',
    'mean_rgb=a,b,c',
    'mean_rgb=127,127,127',
    'std_rgb=0,0,0',
    'stage_defaults.b1=1',
    "stages.ten.phases=({'from_epoch': 1, 'batch_size': 24.0},)",
  ],
)
def test_a_wrong_override_is_three_lines_on_the_command_line(override):
  result = runs.call_main(TINY, '--mode=prepare', f'--config.{override}')
  assert result.returncode == 2
  assert len(result.stderr.strip().splitlines()) <= 3
  assert override.partition('=')[0].rpartition('.')[2] in result.stderr


def test_booleans_are_said_in_words():
  for text, value in {
    'no': False,
    'Off': False,
    '1': True,
    'yes': True,
  }.items():
    config = config_lib.load_config(
      'tests/tiny_config.py',
      {'stage_defaults.flip': text, 'tensorboard': text},
    )
    assert config.tensorboard is value
    assert {stage.flip for stage in stages.create_stages(config)} == {value}


def test_names_of_classes_stay_text():
  for text in ('007,1e3,n01440764', "('007', '1e3', 'n01440764')"):
    config = config_lib.load_config(
      'tests/tiny_config.py', {'stages[0].classes': text}
    )
    assert config.stages[0].classes == ('007', '1e3', 'n01440764')


def test_comparisons_and_searches_ask_the_same_declaration(tmp_path):
  comparison = start_from('compare_default')
  comparison.base = tiny_config.get_config()
  overrides = {'stages.ten.flip': 'no'}
  comparison.cells = ({'name': 'wrong', 'overrides': overrides},)
  with pytest.raises(errors.UserError, match='flip must be True or False'):
    cells.create_cells(comparison)
  search = start_from('tune_default')
  search.base = tiny_config.get_config()
  # What is drawn between them is no whole number.
  search.search = ({'field': 'stages[0].batch_size', 'uniform': (32, 64)},)
  with pytest.raises(errors.UserError, match='must be a whole number'):
    tune.create_space(search)
  path = tmp_path / 'config.json'
  saved = config_lib.to_json(stages.complete(tiny_config.get_config()))
  saved['stages'][0]['batch_size'] = '64'
  path.write_text(json.dumps(saved))
  assert 'must be a whole number' in mistake(config_lib.load_config(str(path)))


@pytest.mark.parametrize(
  ('field', 'value', 'bounds'),
  [
    *((x, 1.0, 'below 1') for x in ('b1', 'b2', 'momentum', 'rms_decay')),
    # 1 and 0 to a device.
    ('b2', 1 - 1e-9, 'in float32'),
    ('eps', 1e-50, 'above 0'),
    ('label_smoothing', 1.0, 'below 1'),
    ('warmup_fraction', 1.0, 'below 1'),
    ('step_factor', 1.0, 'below 1'),
    ('plateau_factor', 1.0, 'below 1'),
    ('dash_least', 0.0, 'above 0'),
    ('erasing_max_area', 1.0, 'below 1'),
    ('eval_image_size', 7, '0 or at least 8'),
    ('eval_image_size', 8, ''),
    ('quantization_block', 10**9, 'at most 65536'),
    ('b1', 0.0, ''),
    ('target_top1', 1.0, ''),
    ('layer_decay', 1.0, ''),
    ('layer_decay', 0.0, 'above 0'),
  ],
)
def test_ends_of_ranges_that_cannot_work_are_outside(field, value, bounds):
  config = tiny_config.get_config()
  config.stages[0][field] = value
  if bounds:
    assert bounds in mistake(config)
  else:
    stages.create_stages(config)


def test_unknown_fields_are_named_wherever_they_stand():
  config = tiny_config.get_config()
  config.sede = 1
  assert "mean 'seed'" in mistake(config)
  config = tiny_config.get_config()
  config.stage_defaults.batchsize = 1
  assert "mean 'batch_size'" in mistake(config)


def test_defaults_are_right_by_their_own_declaration():
  config = start_from('default')
  stages.check_config(config)
  for field, declared in fields.STAGE.items():
    assert declared.check(config.stage_defaults[field], '') == declared.default


def test_the_page_of_fields_is_made_from_their_declarations():
  page = (runs.ROOT / 'docs' / 'fields.md').read_text()
  made = runpy.run_path(str(runs.ROOT / 'docs' / 'fields.py'))['to_markdown']()
  assert page == made, 'python docs/fields.py > docs/fields.md'
  # Each is told, if only with the one above it.
  assert all(f'| `{x}` |' in page for x in fields.STAGE)

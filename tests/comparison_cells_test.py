import os
import pathlib
import socket
import subprocess
import sys

import compare_config
import pytest

import jaxprog
from jaxprog import config as config_lib
from jaxprog import errors, files, stages, start_from
from jaxprog.comparison import cells, engines

CONFIGS = [
  f'configs/{name}.py{argument}'
  for name, arguments in {
    'compare_strategies': ('', ':imagenette'),
    'compare_models': ('', ':imagenette', ':tiny_imagenet'),
    'compare_ladder': ('', ':short', ':classes', ':imagenet', ':digits'),
    'compare_recipes': ('', ':classes'),
    'compare_warm_start': ('', ':augmented'),
  }.items()
  for argument in arguments
]


def create(**fields):
  config = compare_config.get_config()
  with config.ignore_type():
    for field, value in fields.items():
      config[field] = value
  return config


ALONE = {'name': 'alone', 'stages': ('ten',)}


def taught():
  base = compare_config.get_ladder().base
  base.stages[1]['distill_from'] = 'stage:three'
  return base


def names(config):
  return [cell.name for cell in cells.create_cells(config)]


def mistake(config):
  with pytest.raises(errors.UserError) as caught:
    cells.create_cells(config)
  return caught.value


def test_a_grid_is_every_combination_of_its_axes():
  config = create(
    grid=(
      {'stages[-1].batch_size': (32, 64)},
      {
        'step': {'stages[-1].schedule': 'step', 'stages[-1].milestones': (1,)},
        'line': {'stages[-1].schedule': 'linear'},
      },
    )
  )
  found = {cell.name: cell for cell in cells.create_cells(config)}
  assert list(found) == [
    'batch_size_32-step',
    'batch_size_32-line',
    'batch_size_64-step',
    'batch_size_64-line',
  ]
  cell = found['batch_size_64-step']
  assert cell.labels == {'batch_size': 'batch_size_64', 'schedule': 'step'}
  (stage,) = stages.create_stages(cells.create_ladder(config, cell, 7))
  assert (stage.batch_size, stage.schedule) == (64, 'step')
  assert stage.milestones == (1.0,)
  assert cells.create_ladder(config, cell, 7).seed == 7
  assert config.base.stages[0]['schedule'] == 'one_cycle'


def test_the_reference_comes_first_wherever_it_was_named():
  assert names(create()) == ['adamw', 'sgd_momentum']
  assert names(create(reference='sgd_momentum')) == ['sgd_momentum', 'adamw']


def test_with_no_budget_in_common_cells_have_their_own_length():
  longer = {'name': 'longer', 'overrides': {'stages[-1].num_epochs': 3.0}}
  config = create(budget='own', cells=(longer,), grid=())
  (cell,) = cells.create_cells(config)
  assert cell.equal == ''
  assert cells.create_ladder(config, cell, 0).stages[0].num_epochs == 3.0


def test_explicit_cells_may_train_some_stages_only():
  config = compare_config.get_ladder()
  config.cells = (
    {'name': 'both', 'overrides': {}},
    {'name': 'last', 'overrides': {'num_filters': 8}, 'stages': ('ten',)},
  )
  both, last, reset, *_ = cells.create_cells(config)
  assert (both.only, last.only, reset.only) == ((), ('ten',), ())
  ladder = cells.create_ladder(config, last, 0)
  assert ladder.num_filters == 8
  assert [s.name for s in cells.trained_stages(ladder, last)] == ['ten']
  ladder = cells.create_ladder(config, reset, 0)
  first, second = stages.create_stages(ladder)
  assert (first.reset_blocks, second.reset_blocks) == (0, 1)


def test_operators_alone_are_compared_with_the_ladder_itself():
  assert names(compare_config.get_ladder())[:2] == ['ladder', 'reset']


def test_controls_are_the_last_stage_alone_with_all_that_can_be_equal():
  config = compare_config.get_ladder()
  config.base.stages[1]['freeze_epochs'] = 0.5
  found = [cell for cell in cells.create_cells(config) if cell.control]
  assert [(c.equal, c.only, c.control) for c in found] == [
    ('', ('ten',), True),
    ('flops', ('ten',), True),
    ('images', ('ten',), True),
    ('seconds', ('ten',), True),
  ]
  ladder = cells.create_ladder(config, found[0], 0)
  assert cells.trained_stages(ladder, found[0])[0].freeze_epochs == 0
  config.controls = False
  assert not any(cell.control for cell in cells.create_cells(config))


@pytest.mark.parametrize(
  ('fields', 'what', 'where'),
  [
    ({'grid': ()}, 'no cells', 'config.grid'),
    ({'grid': ({'model': ()},)}, 'is empty', 'config.grid[0]'),
    ({'grid': ({'model': 'resnet10'},)}, 'one field', 'config.grid[0]'),
    (
      {'grid': ({'model': ('resnet10',)}, {'model': ('resnet18',)})},
      "Two axes of the grid change 'model'",
      'config.grid',
    ),
    (
      {'grid': ({'stages[*].b1': (0.8,)}, {'stages.ten.b1': (0.9,)})},
      "Two axes of the grid change 'stages[0].b1'",
      'config.grid',
    ),
    ({'cells': ({'name': 'x', 'override': {}},)}, "'override'", 'config.cells'),
    ({'cells': ({'name': 'a/b', 'overrides': {}},)}, 'a/b', 'config.cells'),
    (
      {'cells': ({'name': 'adamw', 'overrides': {}},)},
      "Two cells are named 'adamw'",
      'config.grid',
    ),
    (
      {'cells': ({'name': 'x', 'overrides': {}, 'stages': 'ten'},)},
      "must be a tuple of strings, not 'ten'",
      "cell 'x'.stages",
    ),
    (
      {'cells': ({'name': 'x', 'overrides': {}, 'stages': ('tenn',)},)},
      "Unknown stage 'tenn'",
      "cell 'x'.stages",
    ),
    ({'cells': ({'name': 'x', 'overrides': {3: 4}},)}, '{3: 4}', 'config'),
    ({'grid': ({'x': {3: 4}},)}, '{3: 4}', 'config.grid[0]'),
    ({'grid': ({'model': ('r' * 300,)},)}, 'too long', 'config.grid'),
    ({'reference': 'adam'}, "no cell: 'adam'", 'config.reference'),
    ({'seeds': 0}, 'seeds is 0; it must be at least 1', 'config.seeds'),
    ({'seeds': 1.5}, 'whole number', 'config.seeds'),
    ({'budget': 'flop'}, "Unknown budget 'flop'", 'config.budget'),
    ({'target_top1': 60.0}, 'target_top1 is 60', 'config.target_top1'),
    ({'seeds': 5, 'max_seeds': 3}, 'max_seeds is 3', 'config'),
    ({'margin': 1.0}, 'margin is 1', 'config'),
    ({'controls': True}, 'ladder of one', 'config.controls'),
    (
      {'base': taught(), 'cells': ({**ALONE, 'overrides': {}},)},
      "'three' teaches, and is not trained before",
      "cell 'alone': stage 'ten'",
    ),
    (
      {'operators': ({'name': 'x', 'fields': {'reset_blocks': 1}},)},
      'hands nothing over',
      'config.operators',
    ),
  ],
)
def test_mistakes_are_found_before_anything_runs(fields, what, where):
  config = create(**fields)
  with pytest.raises(errors.UserError) as caught:
    cells.create_cells(config)
  assert what in caught.value.what
  assert caught.value.where.startswith(where)


@pytest.mark.parametrize(
  ('field', 'value', 'what'),
  [
    ('stages[-1].optimiser', 'adamw', "Unknown field 'optimiser'"),
    ('stages[3].optimizer', 'adamw', 'out of range'),
    ('stages[-1].optimizer', 'adam', "Unknown optimizer 'adam'"),
    ('stages[-1].batch_size', 'large', 'must be a whole number'),
    ('stages[-1]', 'x', 'names a group'),
    ('stages[-1].num_epochs', 3, 'cannot set num_epochs'),
    ('stages[*].num_epochs', 3, 'cannot set num_epochs'),
    ('stages.ten.name', 'other', 'cannot set name'),
    ('stages[0].name', 'other', 'cannot set name'),
    ('stage_defaults.optimizer', 'adamw', 'their defaults'),
    ('seed', 3, 'seeds of the comparison'),
  ],
)
def test_a_mistake_in_a_cell_names_the_cell(field, value, what):
  config = create(
    cells=({'name': 'wrong', 'overrides': {field: value}},), grid=()
  )
  found = mistake(config)
  assert what in found.what
  assert "cell 'wrong'" in found.where


def test_a_mistake_in_the_base_is_named_as_the_command_line_has_it():
  config = create()
  config.base.stages[0]['optimizer'] = 'adam'
  found = mistake(config)
  assert found.what == "Unknown optimizer 'adam'."
  assert found.where.startswith('config.base.stages[0]')


def test_tuning_has_its_own_seeds_and_rungs_that_rise():
  config = create()
  config.base.seed = 5
  config.tuning.factors = (0.5, 1.0)
  assert cells.seeds(config) == (5, 6)
  assert cells.tuning_seeds(config) == (1005,)
  config.tuning.rungs = (0.5, 0.25)
  assert 'must rise' in mistake(config).what
  config.tuning.rungs = (0.5, 1.5)
  assert 'tuning.rungs is 1.5' in mistake(config).what
  config.tuning.rungs = (0.5,)
  config.tuning.first_seed = 1  # Would be one of the seeds compared.
  assert 'tuning.first_seed is 1' in mistake(config).what


def test_overrides_reach_the_comparison_and_its_base():
  config = jaxprog.load_config(
    'configs/compare_ladder.py:digits',
    {
      'seeds': '5',
      'base.seed': '7',
      'tuning.factors': '0.5,1.0',
      'base.stage_defaults.batch_size': '16',
      'base.stages[1].num_epochs': '4',
    },
  )
  assert (config.seeds, config.base.seed) == (5, 7)
  assert [s.batch_size for s in config.base.stages] == [16, 16]
  assert config.base.stages[1].num_epochs == 4
  with pytest.raises(errors.UserError, match='Unknown field'):
    jaxprog.load_config('configs/compare_ladder.py', {'base.stages[0].x': '1'})


@pytest.mark.parametrize('spec', CONFIGS)
def test_every_comparison_config_is_valid_and_survives_json(spec, tmp_path):
  config = jaxprog.load_config(spec)
  path = tmp_path / 'config.json'
  files.write_json(path, config_lib.to_json(config))
  again = jaxprog.load_config(str(path))
  assert [c.name for c in cells.create_cells(again)] == [
    c.name for c in cells.create_cells(config)
  ]
  for before, after in zip(
    cells.create_cells(config), cells.create_cells(again), strict=True
  ):
    ladders = (
      cells.create_ladder(config, before, 0),
      cells.create_ladder(again, after, 0),
    )
    assert config_lib.config_hash(ladders[0]) == config_lib.config_hash(
      ladders[1]
    )


def test_every_config_of_a_comparison_is_tried_here():
  there = {p.stem for p in pathlib.Path('configs').glob('compare_*.py')}
  tried = {pathlib.Path(spec.partition(':')[0]).stem for spec in CONFIGS}
  assert there - {'compare_default'} == tried


@pytest.mark.parametrize(
  ('field', 'value', 'what'),
  [
    ('engine', 'rai', "Did you mean 'ray'?"),
    ('ray.num_cpus', 0.0, 'must be above 0'),
    ('ray.num_gpus', 1.5, 'whole numbers, not GPU 1.5'),
    ('ray.resources', 'TPU', 'is NAME=AMOUNT, not TPU'),
    ('ray.resources', 'CPU=2', 'besides num_cpus'),
    ('ray.max_retries', -1, 'max_retries is -1'),
  ],
)
def test_a_mistake_in_an_engine_is_said(field, value, what):
  config = start_from('compare_default')
  config.engine = 'ray'
  config.update_from_flattened_dict({field: value})
  with pytest.raises(errors.UserError) as caught:
    engines.check(config)
  assert what in str(caught.value)


def test_an_address_where_nobody_answers_is_said_at_once(tmp_path):
  pytest.importorskip('ray')
  config = start_from('compare_default')
  config.engine = 'ray'
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))  # And listens to nobody.
    config.ray.address = f'127.0.0.1:{taken.getsockname()[1]}'
    with (
      pytest.raises(errors.UserError, match='refused'),
      engines.start(config, tmp_path, print),
    ):
      pass


def test_without_ray_it_is_said_what_to_install():
  program = (
    'import sys; sys.modules["ray"] = None\n'
    'from jaxprog import start_from\n'
    'from jaxprog.comparison import engines\n'
    'config = start_from("compare_default")\n'
    'engines.check(config)\n'
    'config.engine = "ray"\n'
    'engines.check(config)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True
  )
  *_, what, where, mend = done.stderr.strip().splitlines()
  assert 'A cluster needs a package that is not installed' in what
  assert (where, mend) == ('config.engine', "pip install 'jaxprog[ray]'")


def test_a_config_of_an_older_version_has_the_younger_fields():
  config = create(seeds=4)
  for field in ('max_seeds', 'margin', 'pilot'):
    del config[field]
  found = config_lib.complete(config, 'compare_default')
  assert (found.seeds, found.max_seeds, found.margin) == (4, 0, 0.0)
  assert config_lib.to_json(found) == config_lib.to_json(create(seeds=4))
  search = start_from('tune_default')
  before = config_lib.to_json(search)
  for field in ('storage', 'engine', 'ray'):
    del search[field]
  found = config_lib.complete(search, 'tune_default')
  assert config_lib.to_json(found) == before


def test_a_process_that_only_plans_has_its_devices_back():
  program = (
    'import jax\n'
    'from jaxprog import start_from\n'
    'from jaxprog.comparison import engines\n'
    'config = start_from("compare_default")\n'
    'for config.engine in "serial", "ray":\n'
    '  with engines.devices_elsewhere(config):\n'
    '    during = jax.config.jax_platforms\n'
    '    client = during and jax.devices()[0].client\n'
    '  print(during, jax.config.jax_platforms)\n'
    'jax.config.update("jax_platforms", "cpu")\n'
    'print(jax.devices()[0].client is client)\n'
  )
  environ = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  done = subprocess.run(
    [sys.executable, '-c', program],
    env=environ,
    check=True,
    capture_output=True,
    text=True,
  )
  assert done.stdout.splitlines() == ['None None', 'cpu None', 'False']

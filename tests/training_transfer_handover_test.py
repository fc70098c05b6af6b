"""Hand-overs of real, tiny ladders, leaf by leaf."""

import pathlib

import jax
import numpy as np
import pytest
import runs

import jaxprog
from jaxprog import errors
from jaxprog.reliability import checkpoints
from jaxprog.training import setup
from jaxprog.training.transfer import handover, operators
from tests import tiny_config

LAST = {'name': 'ten', 'num_epochs': 0.1, 'schedule': 'constant'}


def create_config(data_dir, **fields):
  config = tiny_config.get_config(data_dir)
  config.stages = [
    {
      'name': 'three',
      'classes': ('5', '1', '3'),
      'num_epochs': 0.2,
      'ema_decay': 0.5,
    },
    {'name': 'two', 'classes': ('3', '8'), 'num_epochs': 0.2},
    {**LAST, **fields},
  ]
  return config


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
  """A workdir in which all stages but the last one are done."""
  workdir = tmp_path_factory.mktemp('trained')
  jaxprog.train(create_config(data_dir), workdir, only=('three', 'two'))
  return workdir


def create_task(data_dir, **fields):
  chosen = setup.create_setup(create_config(data_dir, **fields), only=('ten',))
  return chosen, setup.create_task(chosen, chosen.chosen[0])


@pytest.fixture(scope='module')
def fresh(data_dir):
  """Fresh variables of 'ten', whatever is handed over to it."""
  _, task = create_task(data_dir)
  return task.init(task.init_rng)


@pytest.fixture
def begin(trained, data_dir, fresh):
  """Returns source, fresh and first variables of 'ten', and their record."""

  def begin(weights='best', **fields):
    chosen, task = create_task(data_dir, **fields)
    variables, origin = handover.hand_over(chosen, trained, task)
    source, _ = checkpoints.load_weights(trained, 'two', weights)
    return source, fresh, variables, origin, task

  return begin


def same(a, b):
  return jax.tree.all(
    jax.tree.map(
      lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b
    )
  )


def backbone(variables):
  return {k: v for k, v in variables['params'].items() if k != 'head'}


def test_plain_carries_everything_but_the_head(begin):
  source, fresh, first, origin, _ = begin()
  assert same(backbone(first), backbone(source))
  assert same(first['batch_stats'], source['batch_stats'])
  assert same(first['params']['head'], fresh['params']['head'])
  assert (origin['from'], origin['operator']) == ('two', 'plain')
  assert origin['fresh'] == ['head']


def test_none_starts_afresh(begin):
  _, fresh, first, origin, _ = begin(transfer='none')
  assert same(first, fresh)
  assert origin['from'] is None


def test_shrink_and_perturb_of_the_backbone_alone(begin):
  source, fresh, first, origin, _ = begin(
    transfer='shrink_and_perturb', shrink=0.4, perturb=0.1
  )
  for new, old, noise in zip(
    *(jax.tree.leaves(backbone(x)) for x in (first, source, fresh)), strict=True
  ):
    expected = 0.4 * np.float64(old) + 0.1 * np.float64(noise)
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7)
  assert same(first['params']['head'], fresh['params']['head'])
  assert same(first['batch_stats'], source['batch_stats'])
  assert origin['operator'] == 'shrink_and_perturb(0.4, 0.1)'


def test_dash_shrinks_kernels_between_its_bounds(begin):
  source, _, first, origin, _ = begin(transfer='dash', dash_least=0.3)
  changed = 0
  for (path, new), old in zip(
    jax.tree_util.tree_leaves_with_path(backbone(first)),
    jax.tree.leaves(backbone(source)),
    strict=True,
  ):
    if path[-1].key != 'kernel':
      assert same(new, old)
      continue
    factor = np.asarray(new)[old != 0] / old[old != 0]
    assert factor.min() > 0.3 - 1e-5
    assert factor.max() < 1 + 1e-5
    changed += (factor < 0.99).any()
  assert changed > 5
  assert origin['operator'] == 'dash(0.3, 10 batches)'


def test_a_batch_that_shows_nothing_has_no_part_in_the_gradient(
  begin, monkeypatch
):
  *_, variables, _, task = begin()
  first, *_ = handover._batches(task)
  hidden = {**first, 'mask': np.zeros(len(first['mask']), bool)}
  monkeypatch.setattr(handover, '_batches', lambda _: iter([first, hidden]))
  gradient = handover._mean_gradient(task, variables)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  assert np.any(gradient['head']['kernel'])


def test_the_last_block_starts_afresh(begin):
  source, fresh, first, origin, _ = begin(reset_blocks=1)
  for collection in ('params', 'batch_stats'):
    for name in first[collection]:
      new = name in ('head', 'block4_1')
      assert same(
        first[collection][name], (fresh if new else source)[collection][name]
      )
  assert origin['fresh'] == ['block4_1', 'head']
  assert 'block4_1' not in origin['carried']


def test_head_rows_come_from_the_nearest_stage_that_knew_the_class(
  begin, trained
):
  _, fresh, first, origin, _ = begin(transfer_head='by_class')
  assert origin['head_rows'] == {'two': ['3', '8'], 'three': ['1', '5']}
  heads = {
    name: checkpoints.load_weights(trained, name, 'best')
    for name in ('two', 'three')
  }
  kernel = np.asarray(first['params']['head']['kernel'])
  norm = np.linalg.norm(fresh['params']['head']['kernel'], axis=0).mean()
  for name, classes in origin['head_rows'].items():
    variables, meta = heads[name]
    rows = np.asarray(variables['params']['head']['kernel'])
    rows = rows[:, [meta['classes'].index(x) for x in classes]]
    scale = norm / np.linalg.norm(rows, axis=0).mean()
    np.testing.assert_allclose(
      kernel[:, list(map(int, classes))], rows * scale, rtol=1e-5
    )
  others = [0, 2, 4, 6, 7, 9]
  expected = np.asarray(fresh['params']['head']['kernel'])[:, others]
  assert (kernel[:, others] == expected).all()


def test_rows_fit_the_backbone_that_they_were_trained_on(
  trained, data_dir, tmp_path
):
  config = create_config(data_dir)
  files = jaxprog.export(config, trained, stage='three')
  source = next(str(x) for x in files.values() if x.suffix == '.safetensors')
  chosen, task = create_task(
    data_dir, transfer_head='by_class', init_from=source
  )
  _, origin = handover.hand_over(chosen, trained, task)
  assert origin['head_rows'] == {source: ['1', '3', '5']}  # None of 'two'.


def test_final_weights_bring_their_own_rows(begin, trained):
  source, fresh, first, *_ = begin(
    weights='final', transfer_weights='final', transfer_head='by_class'
  )
  rows = np.asarray(source['params']['head']['kernel'])
  norm = np.linalg.norm(fresh['params']['head']['kernel'], axis=0).mean()
  rows = rows * norm / np.linalg.norm(rows, axis=0).mean()
  kernel = np.asarray(first['params']['head']['kernel'])[:, [3, 8]]
  np.testing.assert_allclose(kernel, rows, rtol=1e-5)


def test_micro_batches_have_the_statistics_of_their_batches(begin):
  *_, whole, _, _ = begin(transfer_statistics='recalibrate')
  *_, parts, _, task = begin(
    transfer_statistics='recalibrate', micro_batch_size=12
  )
  assert len(next(handover._batches(task))['label']) == 12
  one, other = (x['batch_stats']['stem_norm'] for x in (whole, parts))
  for name in ('mean', 'var'):
    np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-5)


def test_a_head_of_zeros(begin):
  *_, first, origin, _ = begin(transfer_head='zero')
  assert not any(np.any(x) for x in jax.tree.leaves(first['params']['head']))
  assert origin['head'] == 'zero'


def test_reset_statistics_are_those_of_a_fresh_network(begin):
  _, fresh, first, _, _ = begin(transfer_statistics='reset')
  assert same(first['batch_stats'], fresh['batch_stats'])


def test_recalibrated_statistics_are_those_of_the_training_images(begin):
  source, _, first, _, task = begin(transfer_statistics='recalibrate')
  assert same(backbone(first), backbone(source))
  outputs = []
  for batch in list(handover._batches(task)):
    pixels = np.float32(task.config.mean_rgb), np.float32(task.config.std_rgb)
    images = (
      np.asarray(batch['image']) / np.float32(255) - pixels[0]
    ) / pixels[1]
    _, seen = task.model.apply(
      first,
      images,
      train=True,
      mutable=['batch_stats', 'intermediates'],
      capture_intermediates=lambda module, _: module.name == 'stem_conv',
    )
    outputs.append(seen['intermediates']['stem_conv']['__call__'][0])
  rows = np.concatenate(outputs).reshape(-1, outputs[0].shape[-1])
  stem = first['batch_stats']['stem_norm']
  np.testing.assert_allclose(stem['mean'], rows.mean(axis=0), atol=1e-4)
  np.testing.assert_allclose(stem['var'], rows.var(axis=0), rtol=1e-3)


def test_final_weights_may_be_handed_over(begin):
  source, _, first, origin, _ = begin(weights='final', transfer_weights='final')
  assert same(backbone(first), backbone(source))
  assert origin['weights'] == 'final'


def test_what_cannot_be_handed_over_is_said_before_training(data_dir, tmp_path):
  config = create_config(data_dir, reset_blocks=5)
  with pytest.raises(errors.UserError, match='network has 4 blocks'):
    jaxprog.train(config, tmp_path / 'a')
  config = create_config(data_dir, transfer='none', freeze_epochs=0.05)
  with pytest.raises(errors.UserError, match='backbone of fresh weights'):
    jaxprog.train(config, tmp_path / 'c')
  config = create_config(data_dir, transfer_weights='ema')
  with pytest.raises(errors.UserError, match="'two' keeps no averages"):
    jaxprog.train(config, tmp_path / 'b')
  assert not list(pathlib.Path(tmp_path).glob('*/checkpoints/*/latest'))


@pytest.mark.slow
def test_a_ladder_of_operators_through_the_command_line(data_dir, tmp_path):
  finished = runs.call_main(
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={tmp_path}',
    '--only=three,ten',
    '--config.stages[0].num_epochs=1',
    '--config.stages[1].num_epochs=1',
    '--config.stages[1].transfer=shrink_and_perturb',
    '--config.stages[1].transfer_head=by_class',
    '--config.stages[1].transfer_statistics=recalibrate',
  )
  assert finished.returncode == 0, finished.stderr
  assert '3 of 10 head rows carried' in finished.stdout
  origin = runs.read_history(tmp_path)['stages'][1]['transfer']
  assert origin['head_rows'] == {'three': ['1', '3', '5']}
  assert origin['statistics'] == 'recalibrate'
  assert operators.list_blocks(dict.fromkeys(origin['carried']))

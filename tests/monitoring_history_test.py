import json
import math

import history_fixture
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprog import errors, files
from jaxprog.monitoring import history as history_lib


def begin(history, name='a', **fields):
  values = dict.fromkeys(history_fixture.STAGE_FIELDS, 1)
  return history_lib.begin_stage(history, **{**values, 'name': name, **fields})


def test_stage_has_the_documented_fields_and_keeps_others():
  history = history_lib.new_history('hash')
  stage = begin(history, stem='7x7/2')
  history_lib.add_epoch(stage, **history_fixture.create_row(1))
  assert set(history) == {'version', 'config_hash', 'stages'}
  assert history['version'] == 1
  assert history['config_hash'] == 'hash'
  assert set(stage) == {
    *history_fixture.STAGE_FIELDS,
    'status',
    'seconds',
    'best',
    'epochs',
    'stem',
  }
  assert history_lib.find_stage(history, 'a') is stage
  assert history_lib.find_stage(history, 'b') is None


def test_stage_begun_again_stands_in_the_same_place_without_rows():
  history = history_lib.new_history('')
  history_lib.add_epoch(begin(history), **history_fixture.create_row(1))
  begin(history, 'b')
  again = begin(history, image_size=64)
  assert [s['name'] for s in history['stages']] == ['a', 'b']
  assert history['stages'][0] is again
  assert again['epochs'] == []
  assert again['image_size'] == 64


def test_resumed_history_equals_the_uninterrupted_one():
  straight, resumed = (begin(history_lib.new_history('')) for _ in range(2))
  rows = [
    history_fixture.create_row(e, val_top1=t)
    for e, t in ((1, 0.3), (2, 0.5), (3, 0.4))
  ]
  for row in rows:
    history_lib.add_epoch(straight, **row)
  lost = history_fixture.create_row(2, val_top1=0.9, seconds=99.0)
  for row in (rows[0], lost, rows[2], rows[1]):
    history_lib.add_epoch(resumed, **row)
  assert resumed == straight
  assert straight['seconds'] == pytest.approx(3 * 41.0)


@pytest.mark.parametrize(
  ('top1', 'best'),
  [
    ([0.1, 0.7, 0.7], {'epoch': 2, 'top1': 0.7}),
    ([None, 0.2, math.nan], {'epoch': 2, 'top1': 0.2}),
    ([math.nan, 0.0], {'epoch': 2, 'top1': 0.0}),
    ([None, math.nan], None),
    ([], None),
  ],
)
def test_best_is_the_first_of_equals_and_ignores_missing(top1, best):
  stage = begin(history_lib.new_history(''))
  for i, value in enumerate(top1):
    row = history_fixture.create_row(i + 1, val_top1=value)
    history_lib.add_epoch(stage, **row)
  assert stage['best'] == best


def test_saved_history_comes_back_and_is_strict_json(tmp_path):
  history = history_fixture.create_history((2, 1))
  path = tmp_path / 'new' / 'training_history.json'
  files.write_json(path, history)
  assert history_lib.load_history(path) == history

  row = history['stages'][0]['epochs'][0]
  row.update(
    train_loss=math.nan,
    val_loss=-math.inf,
    grad_norm=np.float32(0.5),
    val_top1=jnp.float32(0.25),
  )
  files.write_json(path, history)

  def refuse(constant):
    raise AssertionError(constant)

  text = path.read_text()
  saved = json.loads(text, parse_constant=refuse)['stages'][0]['epochs'][0]
  assert saved['train_loss'] is None
  assert saved['val_loss'] is None
  assert saved['grad_norm'] == 0.5
  assert saved['val_top1'] == 0.25
  assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
  ('text', 'what'),
  [
    (None, 'no training history'),
    ('{"version": 1, "stag', 'damaged'),
    ('\ufffd', 'damaged'),
    ('[1]', 'not a training history'),
    ('{"version": 2, "stages": []}', 'version 2'),
  ],
)
def test_unreadable_history_is_the_users_to_fix(tmp_path, text, what):
  path = tmp_path / 'training_history.json'
  if text is not None:
    path.write_text(text, encoding='utf-8')
  with pytest.raises(errors.UserError, match=what) as caught:
    history_lib.load_history(path)
  assert caught.value.where == str(path)
  assert len(str(caught.value).splitlines()) <= 3


def test_balanced_top1_decides_where_it_is_asked_to():
  stage = begin(history_lib.new_history(''))
  stage['best_metric'] = 'val_balanced_top1'
  for epoch, top1, balanced in ((1, 0.8, 0.3), (2, 0.7, 0.5)):
    row = history_fixture.create_row(epoch, val_top1=top1)
    history_lib.add_epoch(stage, **row, val_balanced_top1=balanced)
  assert stage['best'] == {'epoch': 2, 'top1': 0.7, 'balanced_top1': 0.5}

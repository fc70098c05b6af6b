"""The calls of a notebook."""

import copy
import inspect
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from flax import linen as nn
from ml_collections import config_dict

import jaxprog
from jaxprog.monitoring import pictures
from jaxprog.reporting import shown


class Plain(nn.Module):
  """A network of the user's: no BatchNorm, no stem."""

  num_classes: int
  image_size: int
  dtype: type = jnp.float32

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.relu(nn.Dense(16, name='body')(x.mean(axis=(1,))))
    return nn.Dense(self.num_classes, name='head')(x.mean(axis=1))


def test_importing_takes_no_framework():
  code = (
    'import sys, jaxprog; '
    'print([m for m in ("jax", "flax", "tensorflow", "tensorflow_datasets", '
    '"matplotlib", "rich") if m in sys.modules])'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == '[]'


def test_every_name_is_the_tools_own_with_its_arguments():
  assert {*jaxprog.__all__} <= {*dir(jaxprog)}
  for name in jaxprog.__all__:
    assert getattr(jaxprog, name).__doc__
  assert 'allow_config_change' in inspect.signature(jaxprog.train).parameters
  with pytest.raises(AttributeError, match='trian'):
    _ = jaxprog.trian


def test_datasets_by_stage(data_dir):
  config = tiny_config.get_config(data_dir)
  found = jaxprog.load_datasets(config)
  assert list(found) == ['three', 'ten', 'ten_again']
  assert found['three'].classes == ('1', '3', '5')
  assert len(found['ten'].train) + len(found['ten'].eval) == 1797
  assert list(jaxprog.load_datasets(config, ['ten'])) == ['ten']


def test_a_model_and_a_stage_of_ones_own(data_dir, tmp_path):
  config = tiny_config.get_config(data_dir)
  config.stages.append(
    {'name': 'two', 'classes': ('0', '8'), 'num_epochs': 1, 'image_size': 8}
  )
  history = jaxprog.train(
    config, tmp_path / 'run', only=('three', 'two'), model=Plain
  )
  three, two = history['stages']
  assert two['transfer']['carried'] == ['body']
  assert two['transfer']['fresh'] == ['head']
  assert three['stem'] is None
  assert 'two' in jaxprog.report(history)
  report = jaxprog.report(history)
  assert isinstance(report, str)
  assert '&lt;!DOCTYPE' in copy.copy(report)._repr_html_()
  assert isinstance(history, dict)
  assert history._repr_html_().count('<tr>') == 3
  figure = jaxprog.plot_history(history)
  assert not list(tmp_path.glob('*.png'))
  jaxprog.plot_history(history, tmp_path / 'picture.png')
  written = (tmp_path / 'picture.png').read_bytes()
  assert written == figure._repr_png_()


def test_what_is_not_as_by_default_is_shown_of_a_config(data_dir):
  config = tiny_config.get_config(data_dir)
  html = shown.config_html(config)
  for name, value in {'num_filters': '4', 'batch_size': '48'}.items():
    row = html.partition(f'<code>{name}</code>')[2].partition('</tr>')[0]
    assert f'<b class="changed">{value}</b>' in row
  assert '<code>seed</code>' not in html
  assert shown.config_html(config.stage_defaults) is None
  assert shown.config_html(config_dict.ConfigDict({'base': 1})) is None


def test_images_are_shown_before_anything_is_trained(data_dir):
  config = tiny_config.get_config(data_dir)
  picture = jaxprog.show_batch(config, 'three')
  step = pictures.TILE + pictures.GAP
  assert picture.width == pictures.COLUMNS * step + pictures.GAP
  # Digits are white on black.
  tile = np.asarray(picture)[pictures.GAP : step, pictures.GAP : step, 0]
  assert tile.min() < 50
  assert tile.max() > 150
  with pytest.raises(jaxprog.UserError, match='thre'):
    jaxprog.show_batch(config, 'thre')


def test_a_stage_that_was_not_trained_cannot_be_evaluated(data_dir, tmp_path):
  config = tiny_config.get_config(data_dir)
  with pytest.raises(jaxprog.UserError, match='no run in'):
    jaxprog.evaluate(config, tmp_path, stage='ten')
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(jaxprog.UserError, match='no best weights'):
    jaxprog.evaluate(config, tmp_path, stage='ten')
  with pytest.raises(jaxprog.UserError, match='Unknown weights'):
    jaxprog.evaluate(config, tmp_path, stage='ten', weights='latest')


def test_a_network_of_ones_own_is_checked_as_it_is_trained(
  data_dir, tmp_path, capsys
):
  config = tiny_config.get_config(data_dir)
  config.check_steps = 0
  given = {'only': ('three',), 'model': Plain}
  assert jaxprog.check(config, tmp_path / 'run', **given) == 0
  assert '0 to mend' in capsys.readouterr().out
  config.batch_norm = 'per_device'
  with pytest.raises(jaxprog.UserError, match='yours came as model') as refused:
    jaxprog.train(config, tmp_path / 'other', **given)
  assert jaxprog.check(config, tmp_path / 'other', **given) == 2
  assert refused.value.what.rstrip('.') in capsys.readouterr().out
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(
  ('name', 'config', 'what'),
  [
    ('compare', 'quickstart', 'is of one run'),
    ('compare', 'tune_digits', 'is none for --mode=compare'),
    ('tune', 'quickstart', 'is of one run'),
    ('tune', 'compare_ladder:digits', 'is none for --mode=tune'),
    ('train', 'compare_ladder:digits', 'is not of one run'),
  ],
)
def test_a_config_of_another_kind_is_refused(name, config, what, tmp_path):
  with pytest.raises(jaxprog.UserError, match=what):
    getattr(jaxprog, name)(jaxprog.load_config(config), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()

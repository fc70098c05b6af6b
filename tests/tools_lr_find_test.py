import math

import numpy as np
import pytest

import jaxprog
from jaxprog.tools import lr_find

RATES = np.geomspace(1e-6, 10, 200)


def test_suggests_where_the_loss_falls_fastest():
  x = np.log10(RATES)
  # Falls around 10 ** -3, explodes from 1 on.
  losses = 2.3 - 1.5 / (1 + np.exp(-3 * (x + 3))) + np.exp(4 * (x - 0.5))
  found = lr_find.suggest(RATES, losses)
  assert found['steepest'] == pytest.approx(1e-3, rel=0.2)


def test_suggests_nothing_where_it_only_rises():
  assert lr_find.suggest(RATES, np.linspace(2.3, 9, 200)) == {}


def test_what_is_not_finite_is_no_minimum():
  losses = [*np.linspace(2.3, 1.0, 150), *[float('nan')] * 50]
  found = lr_find.suggest(RATES, losses)['steepest']
  assert RATES[20] <= found <= RATES[149]


def test_smoothing_is_unbiased_from_the_first_step():
  np.testing.assert_allclose(lr_find.smoothed([3.0] * 5), 3.0)
  assert lr_find.smoothed([1.0, 2.0]) == pytest.approx([1.0, 29 / 19])


def test_without_a_loss_nothing_is_written(data_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(lr_find, '_run', lambda *_: [math.nan])
  config = jaxprog.load_config(f'tests/tiny_config.py:{data_dir}')
  with pytest.raises(jaxprog.UserError, match='three is nan before any rate'):
    lr_find.lr_find(config, tmp_path)
  assert list(tmp_path.iterdir()) == []

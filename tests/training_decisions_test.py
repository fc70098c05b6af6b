import dataclasses

import numpy as np
import pytest
import tiny_config

from jaxprog import stages
from jaxprog.training import decisions


def stage(**fields):
  first = stages.create_stages(tiny_config.get_config())[0]
  return dataclasses.replace(first, **fields)


def rows(values, name='val_loss'):
  return [{'val_loss': 1.0, 'val_top1': 0.0, name: x} for x in values]


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('cooldown', [0, 2])
@pytest.mark.parametrize('metric', ['val_loss', 'val_top1'])
def test_rate_scale_equals_pytorch_at_every_evaluation(metric, cooldown, seed):
  torch = pytest.importorskip('torch')
  values = np.random.default_rng(seed).uniform(size=40).round(2).tolist()
  optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
  scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
    optimizer,
    mode='min' if metric == 'val_loss' else 'max',
    factor=0.5,
    patience=2,
    threshold=0.05,
    threshold_mode='abs',
    cooldown=cooldown,
    min_lr=0.01,
    eps=0.0,
  )
  ours = stage(
    schedule='plateau',
    plateau_metric=metric,
    plateau_factor=0.5,
    plateau_patience=2,
    plateau_min_delta=0.05,
    plateau_cooldown=cooldown,
    end_factor=0.01,
  )
  found, expected = [], []
  for i, value in enumerate(values):
    scheduler.step(value)
    expected.append(optimizer.param_groups[0]['lr'])
    found.append(decisions.rate_scale(ours, rows(values[: i + 1], metric)))
  assert expected[-1] < 0.1  # It did something.
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_loss_that_is_not_finite_is_no_gain():
  ours = stage(schedule='plateau', plateau_patience=1)
  values = [1.0, float('nan'), float('inf')]
  assert decisions.rate_scale(ours, rows(values)) == 0.1
  assert decisions.rate_scale(ours, rows([None, None])) == 0.1


def test_other_schedules_have_no_scale():
  assert decisions.rate_scale(stage(), rows([1.0] * 50)) == 1.0


def reason(values, **fields):
  return decisions.reason_to_stop(stage(**fields), rows(values, 'val_top1'))


def test_stops_at_the_target():
  assert not reason([0.5, 0.79], target_top1=0.8)
  assert '80.0%' in reason([0.5, 0.8], target_top1=0.8)
  assert not reason([0.5, 0.8])


def test_stops_when_patience_is_over():
  scores = [0.1, 0.3, 0.2, 0.3, 0.29]
  assert not reason(scores, early_stopping_patience=4)
  assert '3 evaluations' in reason(scores, early_stopping_patience=3)
  assert not reason([*scores, 0.31], early_stopping_patience=3)
  assert reason(
    [*scores, 0.31], early_stopping_patience=3, early_stopping_min_delta=0.02
  )


def test_what_decides_the_best_decides_when_to_stop():
  ours = stage(
    early_stopping_patience=1, best_metric='val_balanced_top1', num_epochs=9
  )
  falling = rows([0.5, 0.4], 'val_balanced_top1')
  assert 'val_balanced_top1' in decisions.reason_to_stop(ours, falling)
  rising = rows([0.4, 0.5], 'val_balanced_top1')
  assert decisions.reason_to_stop(ours, rising) == ''


def test_nothing_is_decided_before_the_first_evaluation():
  assert not reason([], target_top1=0.1, early_stopping_patience=1)

import dataclasses
import math

import numpy as np
import pytest
import tiny_config

from jaxprog import stages
from jaxprog.optim import schedules

PEAK = 0.3


def learning_rates(schedule, total, warmup=0, **fields):
  stage = dataclasses.replace(
    stages.create_stages(tiny_config.get_config())[0],
    schedule=schedule,
    learning_rate=PEAK,
    **fields,
  )
  steps = stages.Steps(per_epoch=10, warmup=warmup, total=total)
  learning_rate_fn = schedules.create_learning_rate_fn(stage, steps)
  return np.array([float(learning_rate_fn(i)) for i in range(total)])


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-9)


def linear_then(decay, total, warmup):
  rising = [PEAK * i / warmup for i in range(warmup)]
  n = total - warmup
  return rising + [PEAK * decay(i / n) for i in range(n)]


@pytest.mark.parametrize(('total', 'warmup'), [(40, 0), (40, 7), (3, 1)])
def test_cosine(total, warmup):
  name = 'cosine_warmup' if warmup else 'cosine'
  expected = linear_then(
    lambda f: 0.1 + 0.9 * (1 + math.cos(math.pi * f)) / 2, total, warmup
  )
  close(learning_rates(name, total, warmup, end_factor=0.1), expected)


@pytest.mark.parametrize(('total', 'warmup'), [(40, 0), (40, 7), (3, 1)])
def test_polynomial(total, warmup):
  expected = linear_then(lambda f: (1 - f) ** 2.5, total, warmup)
  close(learning_rates('polynomial', total, warmup, power=2.5), expected)


@pytest.mark.parametrize(('total', 'warmup'), [(40, 0), (40, 7), (3, 1)])
def test_exponential_warmup(total, warmup):
  expected = linear_then(lambda f: 0.001**f, total, warmup)
  found = learning_rates('exponential_warmup', total, warmup, end_factor=0.001)
  close(found, expected)


def one_cycle_formula(total, up):
  first, last = PEAK / 25, PEAK / 25 / 1e4

  def half_cosine(start, end, f):
    return end + (start - end) * (1 + math.cos(math.pi * f)) / 2

  return [
    half_cosine(first, PEAK, i / up)
    if i < up
    else half_cosine(PEAK, last, (i - up) / (total - 1 - up))
    for i in range(total)
  ]


def test_one_cycle():
  found = learning_rates('one_cycle', 50)
  close(found, one_cycle_formula(50, up=0.3 * 50 - 1))
  close(found[[0, 14, 49]], [PEAK / 25, PEAK, PEAK / 25 / 1e4])


def test_one_cycle_of_few_steps_still_rises():
  close(learning_rates('one_cycle', 3), [PEAK / 25, PEAK, PEAK / 250000])
  close(learning_rates('one_cycle', 1), [PEAK])


@pytest.mark.parametrize('total', [10, 50, 137])
def test_one_cycle_equals_pytorch(total):
  torch = pytest.importorskip('torch')
  optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
  scheduler = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=PEAK, total_steps=total
  )
  expected = []
  for _ in range(total):
    expected.append(scheduler.get_last_lr()[0])
    optimizer.step()
    if len(expected) < total:
      scheduler.step()
  found = learning_rates('one_cycle', total)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)

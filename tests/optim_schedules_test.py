import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_config

from jaxprog import epochs, fields, stages
from jaxprog.optim import schedules

PEAK = 0.3
PHASES = (epochs.Phase(0, 0, 10, 32),)
LONG = 2_000_000


def create_stage(schedule, **fields):
  stage = stages.create_stages(tiny_config.get_config())[0]
  fields = {'learning_rate': PEAK, 'schedule': schedule, **fields}
  return dataclasses.replace(stage, **fields)


def learning_rates(
  schedule, total, warmup=0, *, restart=0, milestones=(), at=None, **fields
):
  """Returns float64 of the rates of all steps, or of those in `at`."""
  if restart:
    fields |= {'num_epochs': total / 10, 'restart_epochs': restart / 10}
    stage = create_stage(schedule, batch_size=32, warmup_steps=warmup, **fields)
    steps = epochs.count_steps(stage, 320)
  else:
    steps = epochs.Steps(PHASES, total, warmup=warmup, milestones=milestones)
  stage = create_stage(schedule, **fields)
  fn = schedules.create_learning_rate_fn(stage, steps)
  found = jax.jit(jax.vmap(fn))(jnp.arange(total) if at is None else at)
  assert found.dtype == jnp.float32
  return np.asarray(found, np.float64)


def close(found, expected, rtol=1e-6):
  # The smallest rate of all is 1e-16: atol only forgives cos(pi / 2).
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-30)


def linear_then(decay, total, warmup, at=None):
  """Returns float64 rates: up to PEAK, then PEAK * decay(part of the rest)."""
  at = np.arange(total) if at is None else np.asarray(at)
  n = total - warmup
  part = np.clip((at - warmup) / n, 0, 1)
  return PEAK * np.where(at < warmup, at / max(warmup, 1), decay(part))


def cosine(part):
  # Not (1 + cos) / 2, which has 4 digits left at the end of a long stage.
  return np.cos(np.pi / 2 * part) ** 2


# Schedule, other fields, the part of the peak after the warmup.
CURVES = {
  'constant': ({}, lambda f: 1 + 0 * f),
  'cosine': ({'end_factor': 0.1}, lambda f: 0.1 + 0.9 * cosine(f)),
  'cosine_warmup': ({}, cosine),
  'exponential_warmup': ({'end_factor': 1e-3}, lambda f: 1e-3**f),
  'linear': ({'end_factor': 0.01}, lambda f: 1 - 0.99 * f),
  'plateau': ({'end_factor': 0.1}, lambda f: 1 + 0 * f),
  'polynomial': ({'power': 2.5}, lambda f: (1 - f) ** 2.5),
}
LENGTHS = [(40, 0), (40, 7), (3, 1), (3, 2), (3, 0), (1, 0)]


@pytest.mark.parametrize(('total', 'warmup'), LENGTHS)
@pytest.mark.parametrize('schedule', CURVES)
def test_curve(schedule, total, warmup):
  fields, decay = CURVES[schedule]
  at = jnp.arange(total + 5)
  found = learning_rates(schedule, total, warmup, at=at, **fields)
  if schedule == 'cosine':
    warmup = 0
  close(found, linear_then(decay, total, warmup, at))
  close(found[warmup], PEAK)
  if warmup:
    assert found[0] == 0


@pytest.mark.parametrize('schedule', CURVES)
def test_curve_of_a_long_stage(schedule):
  fields, decay = CURVES[schedule]
  warmup = 0 if schedule == 'cosine' else 10_000
  rng = np.random.default_rng(0)
  at = np.concatenate(
    [
      np.arange(2000),
      np.arange(9_000, 11_000),
      rng.integers(0, LONG, 2000),
      np.arange(LONG - 2000, LONG),
    ]
  )
  found = learning_rates(schedule, LONG, warmup, at=jnp.array(at), **fields)
  # The last of these rates is 6e-13 of the peak, or less.
  close(found, linear_then(decay, LONG, warmup, at), rtol=1e-5)


def test_fractional_epochs_and_a_scaled_peak():
  stage = create_stage(
    'linear',
    num_epochs=1.5,
    warmup_epochs=0.5,
    batch_size=32,
    scale_learning_rate=True,
    base_batch_size=16,
  )
  steps = epochs.count_steps(stage, 32 * 10 + 31)
  fn = schedules.create_learning_rate_fn(stage, steps)
  found = [float(fn(step)) for step in (0, 1, 5, 6, 14, 15)]
  close(found, 2 * PEAK * np.array([0, 0.2, 1, 0.9, 0.1, 0]))


def test_linear_equals_ffcv():
  found = learning_rates('linear', 50, 8)
  close(found, np.interp(np.arange(50), [0, 8, 50], [0, PEAK, 0]))


def test_step_lowers_at_milestones():
  found = learning_rates(
    'step', 40, 5, milestones=(12, 13, 30), step_factor=0.2
  )
  expected = linear_then(lambda f: 1 + 0 * f, 40, 5)
  for milestone in (12, 13, 30):
    expected[milestone:] *= 0.2
  close(found, expected)


def test_fractional_periods_start_at_whole_steps():
  # 5, 7.5, 11.25 and 16.875 steps; the last period is cut short by the end.
  starts = [0, 5, 13, 24, 41]
  found = learning_rates(
    'cosine_warmup', 33, 3, restart=5, restart_factor=1.5, end_factor=0.1
  )
  expected = [
    PEAK * (0.1 + 0.9 * cosine(i / (end - start)))
    for start, end in itertools.pairwise(starts)
    for i in range(end - start)
  ]
  close(found, [*(PEAK * np.arange(3) / 3), *expected[:30]])


@pytest.mark.parametrize('factor', [1.0, 1.01, 1.5, 2.0])
def test_every_period_falls_from_the_peak_to_the_end(factor):
  found = learning_rates(
    'cosine',
    LONG,
    restart=1001,
    restart_factor=factor,
    end_factor=0.01,
    at=jnp.arange(100_000),
  )
  rises = np.flatnonzero(np.diff(found) > 0)
  close(found[rises + 1], PEAK)
  close(found[rises], 0.01 * PEAK, rtol=3e-4)
  lengths = np.diff([-1, *rises])
  np.testing.assert_allclose(
    lengths, 1001 * factor ** np.arange(len(lengths)), atol=1
  )
  # Constant: 99 of them; 1.01: 69; 1.5: 9; 2: 6.
  assert len(lengths) == {1.0: 99, 1.01: 69, 1.5: 9, 2.0: 6}[factor]


def test_every_restart_is_at_the_peak_when_the_batch_changes():
  phases = (fields.PhaseStart(2, (('batch_size', 21),)),)
  stage = create_stage(
    'cosine', num_epochs=8.0, restart_epochs=2.0, batch_size=63, phases=phases
  )
  steps = epochs.count_steps(stage, 63 * 10)
  fn = schedules.create_learning_rate_fn(stage, steps)
  rates = np.asarray(fn(np.arange(steps.total)))
  peaks = [steps.epoch_start(epoch) for epoch in (0, 2, 4, 6)]
  np.testing.assert_array_equal(np.flatnonzero(rates == rates.max()), peaks)


@pytest.mark.parametrize('factor', [1.0, 2.0])
def test_last_period_ends_low(factor):
  fields = {'restart': 5, 'restart_factor': factor, 'end_factor': 0.1}
  found = learning_rates('cosine', 15, at=jnp.array([14, 15, 16]), **fields)
  assert found[0] > 0.11 * PEAK
  close(found[1:], 0.1 * PEAK)


def one_cycle_formula(total, up, at):
  first, last = PEAK / 25, PEAK / 25 / 1e4
  rising = first + (PEAK - first) * cosine(1 - at / up)
  falling = last + (PEAK - last) * cosine((at - up) / (total - 1 - up))
  return np.where(at < up, rising, falling)


def test_one_cycle():
  found = learning_rates('one_cycle', 50)
  close(found, one_cycle_formula(50, up=0.3 * 50 - 1, at=np.arange(50)))
  close(found[[0, 14, 49]], [PEAK / 25, PEAK, PEAK / 25 / 1e4])


def test_one_cycle_of_a_long_stage():
  at = np.concatenate([np.arange(0, LONG, 997), np.arange(LONG - 5000, LONG)])
  found = learning_rates('one_cycle', LONG, at=jnp.array(at))
  close(found, one_cycle_formula(LONG, 0.3 * LONG - 1, at), rtol=1e-5)


def test_one_cycle_of_few_steps_still_rises():
  close(learning_rates('one_cycle', 3), [PEAK / 25, PEAK, PEAK / 250000])
  close(learning_rates('one_cycle', 1), [PEAK])


def torch_rates(total, create):
  torch = pytest.importorskip('torch')
  optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
  scheduler = create(torch.optim.lr_scheduler, optimizer)
  expected = []
  for _ in range(total):
    expected.append(scheduler.get_last_lr()[0])
    optimizer.step()
    if len(expected) < total:
      scheduler.step()
  return expected


@pytest.mark.parametrize('total', [10, 50, 137])
def test_one_cycle_equals_pytorch(total):
  expected = torch_rates(
    total, lambda lib, opt: lib.OneCycleLR(opt, PEAK, total_steps=total)
  )
  close(learning_rates('one_cycle', total), expected, rtol=2e-6)


# Schedule, our fields, PyTorch's class and arguments for 60 steps.
PEERS = [
  (
    'polynomial',
    {'power': 2.5},
    'PolynomialLR',
    {'total_iters': 60, 'power': 2.5},
  ),
  (
    'exponential_warmup',
    {'end_factor': 1e-3},
    'ExponentialLR',
    {'gamma': 1e-3 ** (1 / 60)},
  ),
  (
    'step',
    {'milestones': (20, 45), 'step_factor': 0.3},
    'MultiStepLR',
    {'milestones': [20, 45], 'gamma': 0.3},
  ),
  (
    'linear',
    {'end_factor': 0.05},
    'LinearLR',
    {'start_factor': 1.0, 'end_factor': 0.05, 'total_iters': 60},
  ),
  (
    'cosine_warmup',
    {'end_factor': 0.1},
    'CosineAnnealingLR',
    {'T_max': 60, 'eta_min': 0.1 * PEAK},
  ),
  (
    'cosine_warmup',
    {'restart': 7, 'restart_factor': 1.0},
    'CosineAnnealingWarmRestarts',
    {'T_0': 7},
  ),
  (
    'cosine_warmup',
    {'restart': 5, 'restart_factor': 2.0, 'end_factor': 0.1},
    'CosineAnnealingWarmRestarts',
    {'T_0': 5, 'T_mult': 2, 'eta_min': 0.1 * PEAK},
  ),
  (
    'cosine_warmup',
    {'restart': 3, 'restart_factor': 3.0},
    'CosineAnnealingWarmRestarts',
    {'T_0': 3, 'T_mult': 3},
  ),
]


@pytest.mark.parametrize('warmup', [0, 4])
@pytest.mark.parametrize(('schedule', 'fields', 'peer', 'arguments'), PEERS)
def test_equals_pytorch(schedule, fields, peer, arguments, warmup):
  expected = torch_rates(
    60, lambda lib, opt: getattr(lib, peer)(opt, **arguments)
  )
  if 'milestones' in fields:
    milestones = tuple(warmup + m for m in fields['milestones'])
    fields = {**fields, 'milestones': milestones}
  found = learning_rates(schedule, 60 + warmup, warmup, **fields)
  close(found[warmup:], expected, rtol=2e-6)


@pytest.mark.parametrize('schedule', fields.STAGE['schedule'].choices)
def test_takes_ints_traced_and_not(schedule):
  stage = create_stage(schedule, end_factor=0.1)
  milestones = (5, 7) if schedule == 'step' else ()
  steps = epochs.Steps(PHASES, 12, warmup=3, milestones=milestones)
  fn = schedules.create_learning_rate_fn(stage, steps)
  found = [fn(step) for step in range(12)]
  assert {(x.shape, x.dtype) for x in found} == {((), jnp.dtype('float32'))}
  close(jax.jit(jax.vmap(fn))(jnp.arange(12)), np.array(found))


@pytest.mark.parametrize('warmup', [0, 7])
def test_cosine_to_a_floor_is_timms(warmup):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  scheduler = parity.import_module('timm.scheduler')
  sgd = torch.optim.SGD([torch.zeros(1)], PEAK)
  peer = scheduler.CosineLRScheduler(
    sgd,
    t_initial=40 - warmup,
    lr_min=0.01 * PEAK,
    warmup_t=warmup,
    warmup_prefix=True,
  )
  expected = [peer._get_lr(t)[0] for t in range(45)]
  found = learning_rates(
    'cosine_warmup', 40, warmup, at=jnp.arange(45), end_factor=0.01
  )
  close(found, expected, rtol=2e-6)

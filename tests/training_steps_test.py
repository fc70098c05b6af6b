import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_config
from flax import linen as nn

from jaxprog import stages
from jaxprog.training import augment, state, steps

PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Linear(nn.Module):
  """One matrix: its gradient can be written down."""

  num_classes: int

  @nn.compact
  def __call__(self, x, *, train):
    del train
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(self.num_classes, name='head')(x)


def create(num_classes=4, rate=0.5, **fields):
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(stage, **fields)
  model, tx = Linear(num_classes), optax.sgd(rate)
  variables = state.init_variables(model, 2, jax.random.key(0))
  train_step = steps.create_train_step(
    model, tx, lambda step: rate * (step + 1), stage, PIXELS
  )
  return model, state.create_state(variables, tx), jax.jit(train_step)


def batch(n=6, num_classes=4):
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (n, 2, 2, 3)).astype(np.uint8),
    'label': rng.integers(0, num_classes, n).astype(np.int32),
    'mask': np.ones(n, bool),
  }


def softmax(x):
  e = np.exp(x - x.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def test_a_step_is_the_gradient_written_down():
  _, before, train_step = create(label_smoothing=0.2)
  data = batch()
  after, metrics = train_step(before, data, jax.random.key(1))

  x = ((data['image'] / 255 - PIXELS[0]) / PIXELS[1]).reshape(6, -1)
  head = before.params['head']
  p = softmax(x @ head['kernel'] + head['bias'])
  target = 0.8 * np.eye(4)[data['label']] + 0.2 / 4
  grad = x.T @ (p - target) / 6
  bias_grad = (p - target).mean(axis=0)
  loss = -(target * np.log(p)).sum(axis=1).mean()
  norm = np.sqrt((grad**2).sum() + (bias_grad**2).sum())

  kernel = head['kernel'] - 0.5 * grad
  np.testing.assert_allclose(after.params['head']['kernel'], kernel, atol=1e-5)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  hits = (p.argmax(axis=1) == data['label']).mean()
  np.testing.assert_allclose(metrics['top1'], hits, rtol=1e-6)
  assert metrics['learning_rate'] == 0.5
  assert after.step == 1


def test_sums_of_an_epoch_are_weighted_by_images():
  _, current, train_step = create()
  losses = []
  for n in (6, 6, 6):
    current, metrics = train_step(current, batch(n), jax.random.key(1))
    losses.append(float(metrics['loss']))
  assert current.metrics['count'] == 18
  assert current.metrics['steps'] == 3
  np.testing.assert_allclose(
    current.metrics['loss'], 6 * sum(losses), rtol=1e-6
  )


def test_a_step_depends_on_the_step_and_the_rng_alone():
  _, current, train_step = create(flip=True)
  data = batch(64)
  first, _ = train_step(current, data, jax.random.key(1))
  again, _ = train_step(current, data, jax.random.key(1))
  other, _ = train_step(current, data, jax.random.key(2))
  later, _ = train_step(current.replace(step=5), data, jax.random.key(1))
  kernel = first.params['head']['kernel']
  assert (kernel == again.params['head']['kernel']).all()
  assert not (kernel == other.params['head']['kernel']).all()
  assert not (kernel == later.params['head']['kernel']).all()


def test_flip_mirrors_about_half_of_the_images():
  images = jnp.arange(1000 * 2 * 3 * 1).reshape(1000, 2, 3, 1)
  flipped = augment.random_flip(jax.random.key(0), images)
  as_is = (flipped == images).all(axis=(1, 2, 3))
  mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
  assert (as_is ^ mirrored).all()
  assert 440 < mirrored.sum() < 560


def evaluate(logits, labels, mask=None):
  class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      return jnp.asarray(logits, jnp.float32)

  data = {
    'image': np.zeros((len(labels), 2, 2, 3), np.uint8),
    'label': np.array(labels, np.int32),
    'mask': np.ones(len(labels), bool) if mask is None else np.array(mask),
  }
  eval_step = jax.jit(steps.create_eval_step(Fixed(), PIXELS))
  return eval_step({}, data, steps.zero_eval_sums())


def test_evaluation_counts_like_numpy():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(50, 9)), rng.integers(0, 9, 50)
  mask = np.arange(50) < 43
  sums = evaluate(logits, labels, mask)
  order = np.argsort(-logits, axis=1)
  top1 = (order[:, 0] == labels)[:43].sum()
  top5 = (order[:, :5] == labels[:, None]).any(axis=1)[:43].sum()
  loss = -np.log(softmax(logits)[np.arange(50), labels])[:43].sum()
  assert (sums['count'], sums['top1'], sums['top5']) == (43, top1, top5)
  np.testing.assert_allclose(sums['loss'], loss, rtol=1e-5)


def test_evaluation_breaks_ties_like_argmax():
  assert evaluate(np.zeros((3, 8)), [0, 1, 7])['top1'] == 1
  assert evaluate(np.zeros((3, 8)), [0, 4, 5])['top5'] == 2


def test_a_model_that_says_nan_is_never_right():
  sums = evaluate(np.full((4, 8), np.nan), [0, 1, 2, 7])
  assert (sums['top1'], sums['top5'], sums['count']) == (0, 0, 4)


def test_masked_nan_does_not_spoil_the_sums():
  logits = np.zeros((2, 8))
  logits[1] = np.nan
  assert np.isfinite(evaluate(logits, [0, 0], [True, False])['loss'])

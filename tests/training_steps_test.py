import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_config
from flax import linen as nn

from jaxprog import epochs, stages
from jaxprog.models import resnet
from jaxprog.optim import optimizers
from jaxprog.planning import chips
from jaxprog.training import augment, devices, numbers, state, steps

# The update is the gradient.
PLAIN = {
  'optimizer': 'sgd_momentum',
  'momentum': 0.0,
  'weight_decay': 0.0,
  'gradient_clipping': 0.0,
  'label_smoothing': 0.0,
  'flip': False,
}
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Linear(nn.Module):
  """One matrix: its gradient can be written down."""

  num_classes: int

  @nn.compact
  def __call__(self, x, *, train):
    del train
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(self.num_classes, name='head')(x)


def create(
  num_classes=4, rate=0.5, frozen=0, model=None, class_weights=None, **fields
):
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(stage, **{**PLAIN, **fields})
  lengths = epochs.Steps((epochs.Phase(0, 0, 10, 6),), 10, frozen=frozen)
  model, tx = model or Linear(num_classes), optimizers.create_optimizer(stage)
  variables = state.init_variables(model, 2, jax.random.key(0))
  found = numbers.read(
    stage,
    lengths,
    model,
    variables['params'],
    num_classes=num_classes,
    class_weights=class_weights,
  )

  def create_step(only_head):
    train_step = jax.jit(
      steps.create_train_step(
        model,
        lambda step, _: rate * (step + 1),
        stage,
        lengths,
        PIXELS,
        num_classes=num_classes,
        frozen=only_head,
      )
    )
    return lambda *args: train_step(*args, found)

  train_steps = create_step(False), create_step(True)
  current = state.create_state(variables, tx, ema=stage.ema_decay > 0)
  return model, current, train_steps[0], train_steps[1]


def batch(n=6, num_classes=4):
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (n, 2, 2, 3)).astype(np.uint8),
    'label': rng.integers(0, num_classes, n).astype(np.int32),
    'mask': np.ones(n, bool),
    'index': np.arange(n, dtype=np.int32),
    'epoch': np.zeros(n, np.int32),
  }


def softmax(x):
  e = np.exp(x - x.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def test_a_step_is_the_gradient_written_down():
  _, before, train_step, _ = create(label_smoothing=0.2)
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


@pytest.mark.parametrize('micro_batch_size', [0, 3])
def test_class_weights_are_in_the_gradient_and_in_no_metric(micro_batch_size):
  weights = np.array([0.1, 3.0, 0.7, 1.2], np.float32)
  fields = {'label_smoothing': 0.2, 'micro_batch_size': micro_batch_size}
  _, before, train_step, _ = create(class_weights=weights, **fields)
  data = batch()
  data['mask'][1] = False
  after, metrics = train_step(before, data, jax.random.key(1))

  x = ((data['image'] / 255 - PIXELS[0]) / PIXELS[1]).reshape(6, -1)
  head = before.params['head']
  p = softmax(x @ head['kernel'] + head['bias'])
  target = 0.8 * np.eye(4)[data['label']] + 0.2 / 4
  shown = data['mask'][:, None]
  grad = x.T @ (weights[data['label']][:, None] * shown * (p - target)) / 5
  loss = -(shown * target * np.log(p)).sum() / 5
  kernel = head['kernel'] - 0.5 * grad
  np.testing.assert_allclose(after.params['head']['kernel'], kernel, atol=1e-5)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)


def test_sums_of_an_epoch_are_weighted_by_images():
  _, current, train_step, _ = create()
  losses = []
  for n in (6, 6, 6):
    current, metrics = train_step(current, batch(n), jax.random.key(1))
    losses.append(float(metrics['loss']))
  assert current.metrics['count'] == 18
  assert current.metrics['steps'] == 3
  np.testing.assert_allclose(
    current.metrics['loss'], 6 * sum(losses), rtol=1e-6
  )


def kernel_after(train_step, current, data, rng=1):
  after, _ = train_step(current, data, jax.random.key(rng))
  return after.params['head']['kernel']


def test_augmentation_depends_on_rng_epoch_and_index_alone():
  _, current, train_step, _ = create(flip=True)
  data = batch(64)
  kernel = kernel_after(train_step, current, data)
  assert (kernel == kernel_after(train_step, current, data)).all()
  assert not (kernel == kernel_after(train_step, current, data, 2)).all()
  for name in ('epoch', 'index'):
    other = {**data, name: data[name] + 100}
    assert not (kernel == kernel_after(train_step, current, other)).all()
  # The rate is another one, but not the images.
  later = kernel_after(train_step, current.replace(step=1), data)
  moved = kernel - current.params['head']['kernel']
  np.testing.assert_allclose(
    later - current.params['head']['kernel'], 2 * moved, atol=1e-6
  )


def test_mixing_depends_on_the_step():
  _, current, train_step, _ = create(mixup_alpha=1.0, cutmix_alpha=1.0)
  data = batch(64)
  start = current.params['head']['kernel']
  moved = kernel_after(train_step, current, data) - start
  later = kernel_after(train_step, current.replace(step=1), data) - start
  assert np.abs(later - 2 * moved).max() > 1e-3


def test_every_augmentation_reaches_the_images():
  data = batch(8)
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(stage, **PLAIN)

  def see(stage):
    told = numbers.read_images(stage), stage, PIXELS, 4
    return steps.see_batch(jax.random.key(0), 0, data, *told)[0]

  plain = see(stage)
  np.testing.assert_array_equal(
    plain, augment.normalise(data['image'], *PIXELS)
  )
  for fields in (
    {'flip': True},
    {'brightness': 0.4},
    {'contrast': 0.4},
    {'saturation': 0.4},
    {'hue': 0.4},
    {'erasing_probability': 1.0, 'erasing_max_area': 0.8},
  ):
    changed = dataclasses.replace(stage, **fields)
    images = see(changed)
    assert np.isfinite(images).all()
    assert not np.array_equal(images, plain), fields


def test_the_loss_does_not_see_what_the_mask_hides():
  _, current, train_step, _ = create()
  data = batch(6)
  hidden = {**data, 'mask': np.arange(6) < 4}
  other = {**hidden, 'image': hidden['image'].copy()}
  other['image'][4:] += 77
  shown = {name: x[:4] for name, x in data.items()}
  expected = kernel_after(train_step, current, shown)
  for seen in (hidden, other):
    after, metrics = train_step(current, seen, jax.random.key(1))
    np.testing.assert_allclose(
      after.params['head']['kernel'], expected, atol=1e-6
    )
    assert after.metrics['count'] == 4
  assert np.isfinite(metrics['loss'])


def small_resnet():
  return resnet.create_model(
    'resnet10', num_classes=4, image_size=16, num_filters=4, stem_kernel=3
  )


def equal(a, b):
  return all(
    jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
  )


def test_micro_batches_add_up_to_the_batch():
  _, whole, step, _ = create(optimizer='adamw', gradient_clipping=0.1)
  _, parts, step_in_parts, _ = create(
    optimizer='adamw', gradient_clipping=0.1, micro_batch_size=2
  )
  for _ in range(3):
    whole, expected = step(whole, batch(12), jax.random.key(1))
    parts, metrics = step_in_parts(parts, batch(12), jax.random.key(1))
  for name in expected:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-6)
  np.testing.assert_allclose(
    parts.params['head']['kernel'],
    whole.params['head']['kernel'],
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize('mixup_alpha', [0.0, 1.0])
def test_micro_batches_share_the_count_of_the_batch(mixup_alpha):
  fields = {
    'label_smoothing': 0.2,
    'gradient_clipping': 0.1,
    'mixup_alpha': mixup_alpha,
  }
  _, current, step, _ = create(**fields)
  _, _, step_in_parts, _ = create(micro_batch_size=2, **fields)
  # Parts are every fourth example: of [1, 5] the second shows nothing.
  for hidden in ([1], [1, 6, 7], [1, 5], range(8)):
    data = batch(8)
    data['mask'][hidden] = False
    whole, expected = step(current, data, jax.random.key(1))
    parts, metrics = step_in_parts(current, data, jax.random.key(1))
    for found, wanted in (
      (metrics, expected),
      (parts.metrics, whole.metrics),
      (parts.params['head'], whole.params['head']),
    ):
      for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], 2e-6, 1e-7)


def shown_residuals(current):
  """Returns a state whose blocks do something: at first they are shortcuts."""
  params = {
    name: {**block, 'norm2': {**block['norm2'], 'scale': jnp.ones(width)}}
    for name, block in current.params.items()
    if name.startswith('block')
    for width in block['norm2']['scale'].shape
  }
  return current.replace(params={**current.params, **params})


def test_batch_norm_sees_each_micro_batch_by_itself():
  fields = {'drop_path': 0.5, 'loss': 'bce'}
  _, current, step_in_parts, _ = create(
    model=small_resnet(), micro_batch_size=2, **fields
  )
  current = shown_residuals(current)
  after, _ = step_in_parts(current, batch(4), jax.random.key(1))
  _, _, step, _ = create(model=small_resnet(), **fields)
  data = batch(4)
  expected = current
  for part in (slice(0, 4, 2), slice(1, 4, 2)):
    data_part = {name: x[part] for name, x in data.items()}
    # Each part moves the statistics, none the weights.
    moved, _ = step(expected, data_part, jax.random.key(1))
    expected = expected.replace(batch_stats=moved.batch_stats)
  for found, wanted in zip(
    jax.tree.leaves(after.batch_stats),
    jax.tree.leaves(expected.batch_stats),
    strict=True,
  ):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_an_image_skips_the_same_blocks_wherever_it_stands():
  data, order = batch(12), np.random.default_rng(0).permutation(12)
  moved = {name: x[order] for name, x in data.items()}
  later = {**data, 'epoch': data['epoch'] + 1}
  _, current, step, _ = create(model=small_resnet(), drop_path=0.5)
  current = shown_residuals(current)
  _, expected = step(current, data, jax.random.key(1))
  _, again = step(current, moved, jax.random.key(1))
  np.testing.assert_allclose(again['grad_norm'], expected['grad_norm'], 1e-4)
  for others in (
    step(current, later, jax.random.key(1)),
    step(current, data, jax.random.key(2)),
  ):
    assert abs(others[1]['grad_norm'] / expected['grad_norm'] - 1) > 1e-2


def test_a_step_that_is_not_finite_is_skipped_and_counted():
  _, before, train_step, _ = create(model=small_resnet(), ema_decay=0.9)
  poisoned = jax.tree.map(jnp.copy, before)
  poisoned.params['head']['bias'] = jnp.full(4, jnp.nan)
  after, metrics = train_step(poisoned, batch(), jax.random.key(1))
  assert not np.isfinite(metrics['loss'])
  for name in ('batch_stats', 'opt_state', 'ema'):
    assert equal(getattr(after, name), getattr(before, name)), name
  assert equal(after.params['stem_conv'], before.params['stem_conv'])
  assert after.step == 1
  assert after.metrics['skipped'] == 1
  assert after.metrics['count'] == after.metrics['loss'] == 0
  healthy, _ = train_step(before, batch(), jax.random.key(1))
  assert healthy.metrics['skipped'] == 0
  assert not equal(healthy.batch_stats, before.batch_stats)


@pytest.mark.parametrize(
  ('rate', 'fields'),
  [
    (3e38, {'head_rate_factor': 1e5}),
    (1.0, {'optimizer': 'rmsprop', 'eps': 1e-50}),
    (1.0, {'optimizer': 'adamw', 'eps': 1e-50}),
    (1.0, {'weight_decay': 1e38, 'optimizer': 'sgd_momentum'}),
    (1.0, {'weight_decay': 1e30, 'optimizer': 'rmsprop'}),
  ],
)
def test_a_step_whose_update_is_not_finite_changes_nothing(rate, fields):
  fields = {'learning_rate': rate, 'ema_decay': 0.9, **fields}
  _, before, train_step, _ = create(rate=rate, **fields)
  before = before.replace(params=jax.tree.map(lambda x: 50 * x, before.params))
  data = {**batch(), 'mask': np.zeros(6, bool)}  # Gradients of 0.
  after, metrics = train_step(before, data, jax.random.key(1))
  assert metrics['loss'] == metrics['grad_norm'] == 0
  assert not metrics['finite']
  for name in ('params', 'opt_state', 'ema'):
    assert equal(getattr(after, name), getattr(before, name)), name
  assert after.metrics['skipped'] == after.step == 1


@pytest.mark.slow
def test_a_gpu_guards_the_arrays_of_one_shape_together():
  pytest.importorskip('jax_plugins.xla_cuda13')
  mesh = chips.create_mesh(chips.parse_topology('h100:1'))
  copied, _ = devices.create_shardings(mesh)
  _, current, train_step, _ = create(model=small_resnet(), momentum=0.9)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=copied),
    (current, batch(), jax.random.key(1)),
  )
  text = train_step.trace(*arguments).lower().compile().as_text()
  leaves = jax.tree.leaves((current.variables, current.opt_state))
  vectors = [x.shape for x in leaves if x.ndim == 1]
  kernels = re.findall(r'^  %\S*select_fusion\S* = ', text, re.M)
  assert len(vectors) > 60
  # One a shape of vectors, and one for each convolution.
  assert 2 * len(kernels) < len(vectors)


class Overflowing(nn.Module):
  """Its statistics are of squares that f32 cannot hold."""

  @nn.compact
  def __call__(self, x, *, train):
    variance = self.variable('batch_stats', 'var', jnp.ones, ())
    if train:
      variance.value = jnp.mean(jnp.square(1e25 * x))
    return nn.Dense(4, name='head')(x.reshape(len(x), -1))


def test_a_step_whose_statistics_are_not_finite_changes_nothing():
  _, before, train_step, _ = create(model=Overflowing())
  after, metrics = train_step(before, batch(), jax.random.key(1))
  assert np.isfinite(metrics['loss'])
  assert np.isfinite(metrics['grad_norm'])
  assert not metrics['finite']
  assert equal(after.batch_stats, before.batch_stats)
  assert equal(after.params, before.params)


def test_a_frozen_backbone_stays_bit_for_bit_and_then_starts_anew():
  _, state0, step, frozen_step = create(
    model=small_resnet(), frozen=2, optimizer='adamw', weight_decay=0.1
  )
  current = state0
  for _ in range(2):
    current, _ = frozen_step(current, batch(), jax.random.key(1))
  backbone = {k: v for k, v in current.params.items() if k != 'head'}
  assert equal(backbone, {k: state0.params[k] for k in backbone})
  assert equal(current.batch_stats, state0.batch_stats)
  assert not equal(current.params['head'], state0.params['head'])
  after, _ = step(current, batch(), jax.random.key(1))
  assert not equal(after.params['stem_conv'], state0.params['stem_conv'])
  # What it would be if the optimizer had never seen the frozen steps.
  _, fresh, _, _ = create(
    model=small_resnet(), optimizer='adamw', weight_decay=0.1
  )
  fresh = current.replace(opt_state=fresh.opt_state)
  expected, _ = step(fresh, batch(), jax.random.key(1))
  assert equal(after.params, expected.params)
  # A first step that is skipped forgets the frozen ones all the same.
  nan = jax.tree.map(lambda x: x * jnp.nan, current.params)
  skipped, _ = step(current.replace(params=nan), batch(), jax.random.key(1))
  assert skipped.metrics['skipped'] == current.metrics['skipped'] + 1
  assert equal(skipped.opt_state, fresh.opt_state)


def test_a_frozen_step_trains_the_head_on_the_running_statistics():
  model, current, _, frozen_step = create(
    model=small_resnet(), frozen=9, drop_path=0.5
  )
  current, data = shown_residuals(current), batch()
  x = augment.normalise(data['image'], *PIXELS)
  after, metrics = frozen_step(current, data, jax.random.key(1))
  logits = np.asarray(model.apply(current.variables, x, train=False))
  loss = -np.log(softmax(logits)[np.arange(6), data['label']]).mean()
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  grad = (softmax(logits) - np.eye(4)[data['label']]).mean(axis=0)
  bias = current.params['head']['bias'] - 0.5 * grad
  np.testing.assert_allclose(after.params['head']['bias'], bias, atol=1e-6)


def test_the_average_follows_weights_and_statistics():
  _, current, train_step, _ = create(model=small_resnet(), ema_decay=0.15)
  assert equal(current.ema, current.variables)
  expected = current.ema
  for i in range(3):
    current, _ = train_step(current, batch(), jax.random.key(1))
    decay = min(0.15, (1 + i) / (10 + i))
    expected = jax.tree.map(
      lambda a, b, d=decay: d * a + (1 - d) * b, expected, current.variables
    )
  for found, wanted in zip(
    jax.tree.leaves(current.ema), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_an_average_warms_up_as_in_timm():
  torch = pytest.importorskip('torch', reason=parity.REASON)
  utils = parity.import_module('timm.utils')
  peer = utils.ModelEmaV3(torch.nn.Linear(1, 1), 0.99, use_warmup=True)
  at = np.array([0, 1, 2, 10, 500, 999, 1000, 5000])
  # Its steps are counted after the update that they follow.
  expected = [peer.get_decay(int(step) + 1) for step in at]
  assert expected[0] == 0 < expected[3] < expected[-1] == 0.99
  np.testing.assert_allclose(
    steps.average_decay(0.99, 2 / 3, at), expected, rtol=1e-6
  )


def test_the_plateau_scales_the_rate():
  _, current, train_step, _ = create()
  whole, _ = train_step(current, batch(), jax.random.key(1))
  current = current.replace(rate_scale=jnp.float32(0.25))
  quarter, metrics = train_step(current, batch(), jax.random.key(1))
  assert metrics['learning_rate'] == 0.125

  def moved(after):
    return after.params['head']['kernel'] - current.params['head']['kernel']

  np.testing.assert_allclose(4 * moved(quarter), moved(whole), atol=1e-6)


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
  return eval_step({}, data, steps.zero_eval_sums())[0]


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


class Left(nn.Module):
  """Has the reds of the left column for logits."""

  @nn.compact
  def __call__(self, x, *, train):
    return x[:, :, 0, 0]


def test_flip_averaging_scores_the_mean_logits_of_both_mirror_images():
  images = np.random.default_rng(0).integers(0, 256, (40, 7, 5, 3), np.uint8)
  labels = np.arange(40) % 7
  batch = {'image': images, 'label': labels, 'mask': np.ones(40, bool)}
  found = {}
  for flip in (False, True):
    step = jax.jit(steps.create_eval_step(Left(), PIXELS, flip=flip))
    found[flip] = step({}, batch, steps.zero_eval_sums())
  mean, std = PIXELS[0][0], PIXELS[1][0]
  left, right = (
    (images[:, :, column, 0] / 255 - mean) / std for column in (0, -1)
  )
  for flip, logits in ((False, left), (True, (left + right) / 2)):
    sums, outcomes = found[flip]
    chosen = np.argmax(logits, axis=1)
    np.testing.assert_array_equal(outcomes['predicted'], chosen)
    assert sums['top1'] == (chosen == labels).sum()
    loss = -np.log(softmax(logits)[np.arange(40), labels]).sum()
    np.testing.assert_allclose(sums['loss'], loss, rtol=1e-5)
  assert (found[True][1]['predicted'] != found[False][1]['predicted']).any()


def test_an_image_that_could_not_be_decoded_counts_as_wrong():
  sums = evaluate([[9.0, 0, 0, 0], [0, 0, 0, 9.0]], [0, -1])
  assert (sums['count'], sums['top1'], sums['top5']) == (2, 1, 1)
  own = -np.log(softmax(np.array([[9.0, 0, 0, 0]]))[0, 0])
  np.testing.assert_allclose(sums['loss'], own + np.log(4), rtol=1e-5)


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

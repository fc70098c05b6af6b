"""Every config in configs/: stages, model shapes and learning rates."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprog
from jaxprog import epochs, errors, stages
from jaxprog.models import resnet
from jaxprog.optim import optimizers, schedules
from jaxprog.training import state

# Every file, and the arguments that it takes.
ARGUMENTS = {
  'fast': (
    *('16', '24', '32', '40', '56', '88'),
    *('resnet18-16', 'resnet18-88', 'resnet50-16'),
  ),
  'progressive': ('resnet18',),
  'standard': ('resnet18',),
}
CONFIGS = [
  f'configs/{path.name}' + (argument and f':{argument}')
  for path in sorted(pathlib.Path('configs').resolve().glob('*.py'))
  if path.stem not in ('__init__', 'default')
  and not path.stem.startswith(('compare_', 'tune_'))  # They hold ladders.
  for argument in ('', *ARGUMENTS.get(path.stem, ()))
]
# Training images as published; digits: those not held out.
NUM_IMAGES = {
  'digits': 1437,
  'imagenette': 9_469,
  'tiny_imagenet': 100_000,
  'imagenet_mini': 34_745,
  'imagenet2012': 1_281_167,
}


def load(spec):
  """Returns a config and its stages, validated."""
  config = jaxprog.load_config(spec)
  return config, stages.create_stages(config)


@functools.cache
def trace(name, num_classes, image_size, **kwargs):
  """Returns the logits of two images and the variables, as shapes."""
  model = resnet.create_model(
    name, num_classes=num_classes, image_size=image_size, **kwargs
  )
  images = jnp.zeros((2, image_size, image_size, 3))
  return jax.eval_shape(
    lambda rng: model.init_with_output(rng, images, train=False),
    jax.random.key(0),
  )


@pytest.mark.parametrize('spec', CONFIGS)
def test_one_set_of_weights_fits_all_that_a_config_trains_and_evaluates(spec):
  config, ladder = load(spec)
  shapes = None
  for stage in ladder:
    num_classes = stage.num_classes or len(stage.classes)
    sizes = {part.image_size for _, part in stage.parts} | {stage.eval_size}
    for size in sorted(sizes):
      logits, variables = trace(
        config.model,
        num_classes,
        size,
        num_filters=config.num_filters,
        stem_kernel=config.stem_kernel,
        blur_pool=config.blur_pool,
      )
      assert logits.shape == (2, num_classes)
      backbone = dict(variables['params'])
      assert backbone.pop('head')['kernel'].shape[-1] == num_classes
      assert shapes is None or backbone == shapes
      shapes = backbone
    create = functools.partial(
      state.create_state, tx=optimizers.create_optimizer(stage)
    )
    assert jax.eval_shape(create, variables).params == variables['params']


@pytest.mark.parametrize('spec', CONFIGS)
def test_learning_rates_start_peak_and_end_where_they_should(spec):
  _, ladder = load(spec)
  for stage in ladder:
    steps = epochs.count_steps(stage, NUM_IMAGES[stage.dataset])
    learning_rate_fn = schedules.create_learning_rate_fn(stage, steps)
    peak = stage.peak_learning_rate
    every = np.arange(0, steps.total, max(1, steps.total // 97))
    first, risen, last = map(
      float, learning_rate_fn(np.array([0, steps.warmup, steps.total - 1]))
    )
    rates = learning_rate_fn(every)
    assert np.isfinite(rates).all()
    assert np.max(rates) == pytest.approx(peak, rel=0.05)
    if steps.warmup:
      assert first == 0
      assert risen == pytest.approx(peak)
    if stage.schedule == 'step':
      fallen = stage.step_factor ** len(stage.milestones)
      assert last == pytest.approx(peak * fallen)
    assert last < peak / 50


@pytest.mark.parametrize('spec', CONFIGS)
def test_what_is_stored_is_large_enough_for_every_crop(spec):
  for stage in load(spec)[1]:
    kind, size, _ = stage.stored
    assert kind in ('original', 'raw', 'jpeg')
    largest = max(part.image_size for _, part in stage.parts)
    assert size == 0 or size >= largest


# libffcv/ffcv-imagenet, rn50_configs/rn50_16_epochs.yaml and so on: epochs,
# start_ramp, end_ramp; those of ResNet-18 are the same.
PUBLISHED = (
  (16, 11, 13),
  (24, 17, 20),
  (32, 23, 27),
  (40, 29, 34),
  (56, 41, 48),
  (88, 65, 76),
)


@pytest.mark.parametrize(('num_epochs', 'start', 'end'), PUBLISHED)
def test_fast_grows_images_when_the_published_recipe_does(
  num_epochs, start, end
):
  _, (stage,) = load(f'configs/fast.py:{num_epochs}')
  every = np.arange(num_epochs)
  pixels = np.interp(every, [start, end], [160, 192])
  expected = np.round(pixels / 32) * 32
  steps = epochs.count_steps(stage, NUM_IMAGES['imagenet2012'])
  firsts = map(steps.epoch_start, every)
  found = [steps.part(stage, step).image_size for step in firsts]
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ('model', 'batch_size', 'peak', 'weight_decay'),
  [('resnet50', 4096, 1.7, 1e-4), ('resnet18', 1024, 0.5, 5e-5)],
)
@pytest.mark.parametrize('num_epochs', [16, 88])
def test_fast_is_the_published_recipe(
  model, batch_size, peak, weight_decay, num_epochs
):
  config, (stage,) = load(f'configs/fast.py:{model}-{num_epochs}')
  assert (config.model, config.blur_pool) == (model, True)
  assert stage.num_epochs == num_epochs
  assert stage.batch_size == batch_size
  assert stage.weight_decay == weight_decay
  assert stage.stored == stages.Storage('jpeg', 512, 90)
  assert (stage.optimizer, stage.momentum) == ('sgd_momentum', 0.9)
  assert not stage.nesterov
  assert stage.label_smoothing == 0.1
  assert (stage.min_crop_area, stage.max_crop_aspect) == (0.08, 4 / 3)
  assert (stage.eval_size, stage.eval_crop) == (256, 224 / 256)
  assert (stage.ema_decay, stage.gradient_clipping) == (0, 0)
  steps = epochs.count_steps(stage, NUM_IMAGES['imagenet2012'])
  step = np.arange(0, steps.total, 50)
  expected = np.interp(
    step / steps.phases[0].per_epoch, [0, 2, num_epochs], [0, peak, 0]
  )
  rates = schedules.create_learning_rate_fn(stage, steps)(step)
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_fast_scales_its_rate_with_a_smaller_batch():
  config = jaxprog.load_config(
    'configs/fast.py', {'stages[0].batch_size': '1024'}
  )
  (stage,) = stages.create_stages(config)
  assert stage.peak_learning_rate == pytest.approx(1.7 / 4)


@pytest.mark.parametrize('budget', ['17', '16.0', 'resnet34-16', 'resnet50-'])
def test_fast_names_the_budgets_that_there_are(budget):
  with pytest.raises(errors.UserError) as caught:
    jaxprog.load_config(f'configs/fast.py:{budget}')
  assert f'{budget!r} is none of 16, 24, 32, 40, 56, 88' in caught.value.what
  assert f'configs/fast.py:{budget}' in caught.value.where


# arXiv:2110.00476, table 2: train res, epochs, LR, weight decay, label
# smoothing, stoch. depth, repeated aug, Rand Augment, mixup alpha, top-1.
PROCEDURES = {
  'a1': (224, 600, 5e-3, 0.01, 0.1, 0.05, 3, 7, 0.2, 0.804),
  'a2': (224, 300, 5e-3, 0.02, 0.0, 0.05, 3, 7, 0.1, 0.798),
  'a3': (160, 100, 8e-3, 0.02, 0.0, 0.0, 1, 6, 0.1, 0.781),
}


@pytest.mark.parametrize(('name', 'row'), PROCEDURES.items())
def test_timm_is_the_published_table(name, row):
  config, (stage,) = load(f'configs/timm_{name}.py')
  assert row == (
    stage.image_size,
    stage.num_epochs,
    stage.learning_rate,
    stage.weight_decay,
    stage.label_smoothing,
    stage.drop_path,
    stage.augment_repeats,
    stage.rand_augment_magnitude / 3,
    stage.mixup_alpha,
    stage.published_top1,
  )
  assert (config.model, stage.loss, stage.optimizer) == (
    *('resnet50', 'bce', 'lamb'),
  )
  assert (stage.batch_size, stage.warmup_epochs) == (2048, 5)
  assert (stage.cutmix_alpha, stage.erasing_probability) == (1, 0)
  assert (stage.eval_size, stage.eval_crop) == (224, 0.95)
  steps = epochs.count_steps(stage, NUM_IMAGES['imagenet2012'])
  # Table 2, # of forward pass: 375k, 188k, 63k.
  assert steps.total == 625 * stage.num_epochs
  last = schedules.create_learning_rate_fn(stage, steps)(steps.total)
  assert last == pytest.approx(1e-6)


def test_torchvision_forgets_as_its_average_does():
  _, (stage,) = load('configs/torchvision_v2.py')
  # utils.ExponentialMovingAverage, after 600 epochs.
  adjust = 1024 * 32 / 600
  updates = 600 * 1251 // 32
  expected = (1 - min(1, 2e-5 * adjust)) ** updates
  found = stage.ema_decay ** (32 * updates)
  assert found == pytest.approx(expected, rel=1e-9)
  assert (stage.batch_size, stage.num_epochs) == (1024, 600)


def test_stages_of_another_config_may_stand_before_the_fast_one():
  config, (alone,) = load('configs/fast.py')
  other, ladder = load('configs/progressive.py')
  config.stages = [*other.stages[:3], *config.stages]
  *before, last = stages.create_stages(config)
  assert tuple(before) == ladder[:3]
  assert last == alone


def test_standard_is_the_same_ladder_without_extras():
  _, ladder = load('configs/progressive.py')
  _, standard = load('configs/standard.py')
  plain = {
    'warmup_epochs': 0.0,
    'end_factor': 0.0,
    'gradient_clipping': 0.0,
    'label_smoothing': 0.0,
    'mixed_precision': False,
  }
  rules = [
    ('adamw', 'cosine', ()),
    ('adamw', 'cosine', ()),
    ('sgd_momentum', 'step', (20, 30)),
    ('sgd_momentum', 'step', (20, 40, pytest.approx(160 / 3))),
  ]
  for theirs, ours, rule in zip(ladder, standard, rules, strict=True):
    assert (ours.optimizer, ours.schedule, ours.milestones) == rule
    expected = dataclasses.replace(
      theirs,
      **plain,
      optimizer=ours.optimizer,
      schedule=ours.schedule,
      milestones=ours.milestones,
    )
    assert ours == expected


def test_progressive_is_the_missions_table():
  config = jaxprog.load_config('configs/progressive.py')
  assert config.model == 'resnet50'
  rows = [
    (
      s.name,
      s.dataset,
      s.num_classes,
      s.image_size,
      s.num_epochs,
      s.batch_size,
      s.learning_rate,
      s.optimizer,
      s.schedule,
    )
    for s in stages.create_stages(config)
  ]
  assert rows == [
    (
      'imagenette', 'imagenette', 10, 224, 20, 64, 0.002,
      'adamw', 'one_cycle',
    ),
    (
      'tiny_imagenet', 'tiny_imagenet', 200, 64, 30, 128, 0.001,
      'adamw', 'cosine_warmup',
    ),
    (
      'imagenet_mini', 'imagenet_mini', 1000, 224, 40, 96, 0.0005,
      'sgd_momentum', 'polynomial',
    ),
    (
      'imagenet', 'imagenet2012', 1000, 224, 60, 128, 0.1,
      'sgd_momentum', 'exponential_warmup',
    ),
  ]  # fmt: skip
  for stage in stages.create_stages(config):
    assert stage.mixed_precision
    assert stage.gradient_clipping == 1.0
    assert stage.label_smoothing == 0.1

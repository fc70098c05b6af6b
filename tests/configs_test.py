"""Every config in configs/: stages, model shapes and learning rates."""

import pathlib

import jax
import numpy as np
import pytest

import jaxprog
from jaxprog import epochs, stages
from jaxprog.models import resnet
from jaxprog.optim import optimizers, schedules
from jaxprog.training import state

CONFIGS = sorted(
  path
  for path in pathlib.Path('configs').resolve().glob('*.py')
  if path.stem not in ('__init__', 'default')
)
# Training images as published; digits: those not held out.
NUM_IMAGES = {
  'digits': 1437,
  'imagenette': 9_469,
  'tiny_imagenet': 100_000,
  'imagenet_mini': 34_745,
  'imagenet2012': 1_281_167,
}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config(path):
  config = jaxprog.load_config(str(path))
  shapes = None
  for stage in stages.create_stages(config):
    num_classes = stage.num_classes or len(stage.classes)
    model = resnet.create_model(
      config.model,
      num_classes=num_classes,
      image_size=stage.image_size,
      num_filters=config.num_filters,
      stem_kernel=config.stem_kernel,
    )
    steps = epochs.count_steps(stage, NUM_IMAGES[stage.dataset])
    learning_rate_fn = schedules.create_learning_rate_fn(stage, steps)
    tx = optimizers.create_optimizer(stage)

    def create(rng, model=model, size=stage.image_size, tx=tx):
      variables = state.init_variables(model, size, rng)
      return state.create_state(variables, tx)

    params = dict(jax.eval_shape(create, jax.random.key(0)).params)
    head = params.pop('head')
    assert head['kernel'].shape[-1] == num_classes
    assert shapes is None or params == shapes  # Weights fit across stages.
    shapes = params

    rates = [
      float(learning_rate_fn(i))
      for i in range(steps.total)[:: max(1, steps.total // 97)]
    ]
    first, last = (float(learning_rate_fn(i)) for i in (0, steps.total - 1))
    assert np.isfinite(rates).all()
    assert max(rates) == pytest.approx(stage.peak_learning_rate, rel=0.05)
    assert first < stage.learning_rate or stage.warmup_epochs == 0
    assert last < stage.learning_rate / 50


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

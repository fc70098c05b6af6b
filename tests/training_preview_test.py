"""The picture of augmented images against the training step itself."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxprog.monitoring import pictures
from jaxprog.optim import optimizers
from jaxprog.training import feed, preview, setup, steps
from jaxprog.training import state as state_lib
from tests import tiny_config


class Recorder(nn.Module):
  """Keeps the images that it is shown, as if they were statistics."""

  num_classes: int

  @nn.compact
  def __call__(self, images, *, train):
    seen = self.variable('batch_stats', 'seen', jnp.zeros, images.shape)
    if train:
      seen.value = images
    return nn.Dense(self.num_classes, name='head')(images.mean((1, 2)))


def create_task(data_dir, **fields):
  config = tiny_config.get_config(data_dir)
  config.stages = [{'name': 'ten', 'flip': True, **fields}]
  made = setup.create_setup(config)
  return setup.create_task(made, made.chosen[0])


def see(task, batch):
  """Returns what a step feeds the network, as uint8."""
  model = Recorder(task.dataset.num_classes)
  tx = optimizers.create_optimizer(task.stage)
  pixels = task.config.mean_rgb, task.config.std_rgb
  train_step = steps.create_train_step(
    model,
    task.learning_rate_fn,
    task.stage,
    task.steps,
    pixels,
    num_classes=task.dataset.num_classes,
  )
  variables = state_lib.init_variables(model, 8, jax.random.key(0))
  state = state_lib.create_state(variables, tx)
  arguments = task.arguments(task.program(0))
  state, _ = jax.jit(train_step)(state, batch, *arguments)
  mean, std = (255 * np.array(x, np.float32) for x in pixels)
  seen = np.asarray(state.batch_stats['seen']) * std + mean
  return np.clip(np.round(seen), 0, 255).astype(np.uint8)


@pytest.mark.parametrize('mixed', [False, True])
def test_the_picture_is_what_the_first_step_feeds_the_network(data_dir, mixed):
  fields = {'mixup_alpha': 2.0, 'cutmix_alpha': 2.0, 'brightness': 0.4}
  task = create_task(data_dir, **(fields if mixed else {}))
  with contextlib.closing(feed.Feed(task, task.seed, 0)) as batches:
    batch = batches.next()
  before = {name: np.array(x) for name, x in batch.items()}
  (grid,) = preview.draw_augmented(task, batch).values()
  scale = pictures.TILE // 8
  step_y = pictures.TILE + pictures.GAP + pictures.LINE * (2 if mixed else 1)
  for i, image in enumerate(see(task, batch)[: preview._MAX_IMAGES]):
    row, column = divmod(i, pictures.COLUMNS)
    y = pictures.GAP + row * step_y
    x = pictures.GAP + column * (pictures.TILE + pictures.GAP)
    tile = grid[y : y + pictures.TILE, x : x + pictures.TILE][::scale, ::scale]
    # One grey level: two compiled programs may round differently.
    np.testing.assert_allclose(tile.astype(int), image.astype(int), atol=1)
  for name, x in batch.items():
    np.testing.assert_array_equal(x, before[name])


def test_mixed_images_are_named_by_both_classes():
  names = ['cat', 'dog', 'eel']
  assert preview._name_target(np.array([0, 1, 0]), names) == ['dog']
  mixed = preview._name_target(np.array([0.25, 0, 0.75]), names)
  assert mixed == ['75% eel', '25% cat']
  assert preview._name_target(np.array([0, 0, 0]), names) == []

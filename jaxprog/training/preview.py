"""Training images as the network sees them, for a person to look at."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict
from PIL import Image

from jaxprog import stages
from jaxprog.data import batches as batches_lib
from jaxprog.data import loader
from jaxprog.monitoring import pictures
from jaxprog.training import numbers as numbers_lib
from jaxprog.training import setup, steps

_MAX_IMAGES = 16


def show_batch(
  config: config_dict.ConfigDict,
  stage: str,
  *,
  model: setup.ModelFn | None = None,
) -> Image.Image:
  """Returns a picture of the first images that `stage` will be trained on.

  With their classes, augmented and mixed as they will be; nothing is trained.

  Raises:
    UserError: for mistakes in the config or the data.
  """
  prepared = setup.create_setup(config, only=(stage,), model=model)
  return draw_first(setup.create_task(prepared, prepared.chosen[0]))


def draw_first(task: setup.Task) -> Image.Image:
  """Returns what TensorBoard will have as images/STAGE/augmented."""
  batches = loader.own_batches(
    task.dataset.train, task.stage, seed=task.seed, steps=task.steps
  )
  batch = loader.to_device(
    batches_lib.read_batch(batches, 0), task.shardings.batch
  )
  (grid,) = draw_augmented(task, batch).values()
  return Image.fromarray(grid)


def draw_augmented(
  task: setup.Task, batch: steps.Batch
) -> dict[str, np.ndarray]:
  """Returns images/STAGE/augmented: the first images of a batch, with names.

  They are augmented and mixed as a stage's first step does it, on one device,
  without touching what trains. A mixed image is named by both classes and
  their shares.
  """
  rows = _first_rows(batch, _MAX_IMAGES)
  stage = task.steps.part(task.stage, 0)
  images, targets = _see(
    np.asarray(jax.random.key_data(task.step_rng)),
    rows,
    numbers_lib.read_images(stage),
    stage=stage,
    pixels=(tuple(task.config.mean_rgb), tuple(task.config.std_rgb)),
    num_classes=task.dataset.num_classes,
  )
  names = list(map(pictures.short_name, task.dataset.class_names))
  captions = [_name_target(target, names) for target in np.asarray(targets)[1:]]
  grid = pictures.draw_grid(list(np.asarray(images)[1:]), captions)
  return {f'images/{task.stage.name}/augmented': grid}


@functools.partial(jax.jit, static_argnames=('stage', 'pixels', 'num_classes'))
def _see(
  key_data: jax.Array,
  batch: steps.Batch,
  numbers: numbers_lib.Numbers,
  *,
  stage: stages.Stage,
  pixels: tuple[Sequence[float], Sequence[float]],
  num_classes: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns uint8 images and the targets that they are trained with."""
  rng = jax.random.wrap_key_data(key_data)
  images, targets, _ = steps.see_batch(
    rng, 0, batch, numbers, stage, pixels, num_classes
  )
  mean, std = (255 * jnp.asarray(x, jnp.float32) for x in pixels)
  images = jnp.clip(jnp.round(images * std + mean), 0, 255)
  return images.astype(jnp.uint8), targets


def _first_rows(batch: steps.Batch, count: int) -> dict[str, np.ndarray]:
  """Returns the last row of this process, then the first ones.

  Mixing pairs each image with the one before it, the first with the last.
  With many processes that last one is another's: one image differs.
  """

  def rows(x):
    shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
    parts = [np.asarray(shards[-1].data)[-1:]]
    for shard in shards:
      if sum(map(len, parts)) <= count:
        parts.append(np.asarray(shard.data))
    return np.concatenate(parts)[: count + 1]

  return {name: rows(x) for name, x in batch.items()}


def _name_target(target: np.ndarray, names: Sequence[str]) -> list[str]:
  """Returns lines: the class, or both of a mixed image with their shares."""
  order = np.argsort(-target, kind='stable')[:2]
  parts = [i for i in order if target[i] > 0]
  if len(parts) == 1:
    return [names[parts[0]]]
  return [f'{target[i]:.0%} {names[i]}' for i in parts]

"""A network to which white images are poison."""

import jax.numpy as jnp
import numpy as np
from data_fixtures import encode, write_class_folders
from flax import linen as nn

from tests import tiny_config


class Fragile(nn.Module):
  """Its loss is not finite where an image is white."""

  num_classes: int
  image_size: int
  dtype: object

  @nn.compact
  def __call__(self, x, *, train):
    poison = jnp.where(jnp.mean(x, (1, 2, 3)) > 2.2, jnp.nan, 0.0)
    x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
    x = x.reshape(len(x), -1)
    return nn.Dense(self.num_classes, name='head')(x) + poison[:, None]


def create_config(folder, white, train, **fields):
  """Writes three classes of `train` images, of which some are `white`."""
  raw = write_class_folders(folder / 'raw', train=train)
  data = encode(np.full((20, 20, 3), 255, np.uint8), 'JPEG')
  for name in white:
    (raw / 'train' / f'{name}.JPEG').write_bytes(data)
  config = tiny_config.get_config(folder / 'data')
  stage = {'name': 'only', 'dataset': f'folder:{raw}', 'min_crop_area': 0.9}
  config.stages = [{**stage, **fields}]
  return config

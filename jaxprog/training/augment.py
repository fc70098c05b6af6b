"""Images on the device: uint8 in, normalised f32 out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalise(
  images: jax.Array, mean_rgb: Sequence[float], std_rgb: Sequence[float]
) -> jax.Array:
  """Returns (images / 255 - mean) / std as f32, channel by channel."""
  mean = 255 * jnp.asarray(mean_rgb, jnp.float32)
  std = 255 * jnp.asarray(std_rgb, jnp.float32)
  return (images.astype(jnp.float32) - mean) / std


def random_flip(rng: jax.Array, images: jax.Array) -> jax.Array:
  """Returns `images` (N, H, W, C), each mirrored with probability 1/2."""
  flip = jax.random.bernoulli(rng, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)

"""Random operations on one uint8 image: RandAugment and TrivialAugment.

The operations, strengths and pixels of torchvision's transforms on Pillow
images: nearest interpolation, and black where an image has moved away. They
run on the host, because a device would have to compute all of them for every
image and keep one.
"""

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_NUM_BINS = 31

# An operation's name -> its strength in each bin, none if it has no strength,
# and whether a coin decides its sign.
_Space = Mapping[str, tuple[tuple[float, ...], bool]]


def rand_augment(
  image: np.ndarray,
  rng: np.random.Generator,
  num_layers: int,
  magnitude: int,
) -> np.ndarray:
  """Returns `image` after `num_layers` random operations, one after another.

  RandAugment (Cubuk et al. 2019, arXiv:1909.13719): all of the same
  `magnitude`, 0..30, and any of them again and again.

  Args:
    image: uint8 (height, width, 3).
    rng: decides; two numbers are drawn for each layer.
    num_layers: operations to apply.
    magnitude: bin of their strengths.
  """
  height, width, _ = image.shape
  space = rand_augment_space(height, width)
  pixels = Image.fromarray(image)
  for _ in range(num_layers):
    name, strength = choose(space, rng, magnitude)
    pixels = OPERATIONS[name](pixels, strength)
  return np.asarray(pixels)


def trivial_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns `image` after one random operation of a random strength.

  TrivialAugment in its wide form (Müller & Hutter 2021, arXiv:2103.10158).
  `image` is uint8 (height, width, 3); three numbers are drawn from `rng`.
  """
  magnitude = int(rng.integers(_NUM_BINS))
  name, strength = choose(trivial_augment_space(), rng, magnitude)
  return np.asarray(OPERATIONS[name](Image.fromarray(image), strength))


def choose(
  space: _Space, rng: np.random.Generator, magnitude: int
) -> tuple[str, float]:
  """Returns an operation, each as likely as any, and its signed strength."""
  name = tuple(space)[rng.integers(len(space))]
  negative = bool(rng.integers(2))
  strengths, signed = space[name]
  strength = strengths[magnitude] if strengths else 0.0
  return name, -strength if signed and negative else strength


@functools.lru_cache
def rand_augment_space(height: int, width: int) -> _Space:
  """Returns RandAugment's operations for images of this size."""
  return {
    **_space(shear=0.3, rotate=30, factor=0.9, lost_bits=4),
    'TranslateX': (_strengths(150 / 331 * width), True),
    'TranslateY': (_strengths(150 / 331 * height), True),
  }


@functools.cache
def trivial_augment_space() -> _Space:
  """Returns TrivialAugment's operations, of any image."""
  return _space(shear=0.99, rotate=135, factor=0.99, lost_bits=6)


def _space(
  shear: float, rotate: float, factor: float, lost_bits: int
) -> dict[str, tuple[tuple[float, ...], bool]]:
  """Returns a space by the largest strength of each kind of operation."""
  lost = np.round(np.arange(_NUM_BINS) * lost_bits / (_NUM_BINS - 1))
  return {
    'Identity': ((), False),
    'ShearX': (_strengths(shear), True),
    'ShearY': (_strengths(shear), True),
    'TranslateX': (_strengths(32), True),
    'TranslateY': (_strengths(32), True),
    'Rotate': (_strengths(rotate), True),
    'Brightness': (_strengths(factor), True),
    'Color': (_strengths(factor), True),
    'Contrast': (_strengths(factor), True),
    'Sharpness': (_strengths(factor), True),
    'Posterize': (tuple((8 - lost).tolist()), False),
    'Solarize': (_strengths(255)[::-1], False),
    'AutoContrast': ((), False),
    'Equalize': ((), False),
  }


def _strengths(largest: float) -> tuple[float, ...]:
  """Returns evenly spaced strengths from 0 to `largest`.

  A float32 step, from both ends and rounded once, as PyTorch computes them:
  its 15.999999 pixels are 15, where 16.0 would be 16.
  """
  step = float(np.float32(largest) / np.float32(_NUM_BINS - 1))
  bins = np.arange(_NUM_BINS)
  down = float(np.float32(largest)) - (_NUM_BINS - 1 - bins) * step
  strengths = np.where(bins < _NUM_BINS // 2, bins * step, down)
  return tuple(strengths.astype(np.float32).tolist())


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
  """Returns the image whose pixel (x, y) is the old one at matrix @ (x, y)."""
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
  )


# Functions of an RGB image and a strength. For Brightness to Sharpness it is
# what the factor differs from 1 by, for Posterize the bits that are kept, for
# Solarize the grey level from which on pixels are inverted.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
  'Identity': lambda image, _: image,
  'ShearX': lambda image, slope: _affine(image, 1, slope, 0, 0, 1, 0),
  'ShearY': lambda image, slope: _affine(image, 1, 0, 0, slope, 1, 0),
  'TranslateX': lambda image, x: _affine(image, 1, 0, -int(x), 0, 1, 0),
  'TranslateY': lambda image, y: _affine(image, 1, 0, 0, 0, 1, -int(y)),
  'Rotate': lambda image, x: image.rotate(x, Image.Resampling.NEAREST),
  'Brightness': lambda image, x: ImageEnhance.Brightness(image).enhance(1 + x),
  'Color': lambda image, x: ImageEnhance.Color(image).enhance(1 + x),
  'Contrast': lambda image, x: ImageEnhance.Contrast(image).enhance(1 + x),
  'Sharpness': lambda image, x: ImageEnhance.Sharpness(image).enhance(1 + x),
  'Posterize': lambda image, bits: ImageOps.posterize(image, int(bits)),
  # Of whole numbers, those below a level are those below the next whole one.
  'Solarize': lambda image, x: ImageOps.solarize(image, math.ceil(x)),
  'AutoContrast': lambda image, _: ImageOps.autocontrast(image),
  'Equalize': lambda image, _: ImageOps.equalize(image),
}

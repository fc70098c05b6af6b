"""One image: from encoded bytes to a uint8 square of RGB pixels.

Flips and colours are left to the device. EXIF orientation is ignored, as
torchvision's and TensorFlow's training pipelines do; alpha is dropped.
"""

import io
import math

import numpy as np
from PIL import Image

# From a header alone, before any pixel is decoded: 178,956,970 pixels are
# 512 MiB of RGB, and twice what Pillow starts to warn about.
MAX_PIXELS = 178_956_970
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'PPM', 'TIFF')
# A JPEG is decoded small if the crop is still this many times larger than
# wanted. On photographs no crop then differs by more than 1.6 grey levels, on
# average over its pixels, from one resized from the full scale; at 1: 6.6.
DRAFT_RATIO = 2
# torchvision's number of crops to try before it settles for a centre one.
CROP_TRIES = 10

Box = tuple[int, int, int, int]


class BadImageError(ValueError):
  """An image that cannot be decoded; says which."""


def decode(image: bytes, name: str = '') -> np.ndarray:
  """Returns the whole image as uint8 (height, width, 3).

  Raises:
    BadImageError: naming `name`, if it is damaged, no image or too large.
  """
  opened = _open(image, name)
  return np.asarray(_to_rgb(opened, name))


def random_crop(
  image: bytes,
  size: int,
  rng: np.random.Generator,
  *,
  min_area: float,
  max_aspect: float,
  name: str = '',
) -> np.ndarray:
  """Returns a random crop, resized, as uint8 (size, size, 3).

  JPEGs are decoded at the scale that the crop needs; the rest of the way is
  an antialiased bilinear resize.
  """
  opened = _open(image, name)
  box = sample_box(*opened.size, rng, min_area, max_aspect)
  return _resize_box(opened, box, size, name)


def center_crop(
  image: bytes, size: int, *, eval_crop: float, name: str = ''
) -> np.ndarray:
  """Returns the middle of the image as uint8 (size, size, 3).

  The pixels of torchvision's Resize(round(size / eval_crop)) and
  CenterCrop(size), in one antialiased bilinear resize.
  """
  opened = _open(image, name)
  box = center_box(*opened.size, size, eval_crop)
  return _resize_box(opened, box, size, name)


def sample_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  min_area: float,
  max_aspect: float,
) -> Box:
  """Returns left, top, right, bottom of a random crop, as torchvision does.

  Its area is uniform in [min_area, 1] of the image's, the logarithm of its
  aspect uniform between those of 1 / max_aspect and max_aspect. Where ten
  tries do not fit, the largest centre crop of an allowed aspect is taken
  (Inception crop, Szegedy et al., 2015).
  """
  limit = math.log(max_aspect)
  for area, aspect, x, y in rng.random((CROP_TRIES, 4)).tolist():
    area = width * height * (min_area + (1 - min_area) * area)
    aspect = math.exp((2 * aspect - 1) * limit)
    crop_width = round(math.sqrt(area * aspect))
    crop_height = round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      left = int(x * (width - crop_width + 1))
      top = int(y * (height - crop_height + 1))
      return left, top, left + crop_width, top + crop_height
  crop_width = min(width, max(1, round(height * max_aspect)))
  crop_height = min(height, max(1, round(width * max_aspect)))
  left, top = (width - crop_width) // 2, (height - crop_height) // 2
  return left, top, left + crop_width, top + crop_height


def center_box(
  width: int, height: int, size: int, eval_crop: float
) -> tuple[float, float, float, float]:
  """Returns the left, top, right, bottom that `center_crop` keeps.

  The shorter side becomes round(size / eval_crop), the longer one is cut to
  whole pixels; the crop starts at a whole pixel of the resized image.
  """
  short, resized = min(width, height), round(size / eval_crop)
  edges = []
  for length in (width, height):
    resized_length = resized * length // short
    start = round((resized_length - size) / 2)
    scale = length / resized_length
    edges.append((start * scale, (start + size) * scale))
  (left, right), (top, bottom) = edges
  return left, top, right, bottom


def _open(image: bytes, name: str) -> Image.Image:
  """Returns an image whose header is read and whose size is sane."""
  try:
    opened = Image.open(io.BytesIO(image), formats=FORMATS)
  except Exception as e:  # Pillow's decoders raise what they like.
    raise BadImageError(f'{name}: {_reason(e)}') from e
  width, height = opened.size
  if not 0 < width * height <= MAX_PIXELS:
    raise BadImageError(
      f'{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}'
    )
  return opened


def _resize_box(
  image: Image.Image,
  box: tuple[float, float, float, float],
  size: int,
  name: str,
) -> np.ndarray:
  """Returns the pixels in `box`, antialiased, as uint8 (size, size, 3)."""
  full_width, full_height = image.size
  # A JPEG's smallest of 1, 1/2, 1/4, 1/8 that leaves enough to resize.
  drafted = image.draft(
    image.mode,
    (
      math.ceil(DRAFT_RATIO * size * full_width / (box[2] - box[0])),
      math.ceil(DRAFT_RATIO * size * full_height / (box[3] - box[1])),
    ),
  )
  scale = full_width / drafted[1][2] if drafted else 1
  pixels = _to_rgb(image, name, keep_grey=True)
  left, top, right, bottom = (x / scale for x in box)
  width, height = pixels.size
  resized = pixels.resize(
    (size, size),
    Image.Resampling.BILINEAR,
    (left, top, min(right, width), min(bottom, height)),
  )
  return np.asarray(resized.convert('RGB'))


def _to_rgb(
  image: Image.Image, name: str, keep_grey: bool = False
) -> Image.Image:
  """Returns the decoded image in mode RGB, or L if `keep_grey` allows it."""
  try:
    image.load()
    if image.mode.startswith('I'):  # 16 bits a pixel.
      high_byte = np.clip(np.asarray(image, np.int64) >> 8, 0, 255)
      image = Image.fromarray(high_byte.astype(np.uint8))
    if image.mode == 'RGB' or (keep_grey and image.mode == 'L'):
      return image
    return image.convert('RGB')
  except Exception as e:  # Pillow's decoders raise what they like.
    raise BadImageError(f'{name}: {_reason(e)}') from e


def _reason(error: Exception) -> str:
  text = ' '.join(str(error).split())[:200]
  return f'{type(error).__name__}: {text}'

"""One image: from encoded bytes to a uint8 square of RGB pixels.

Flips and colours are left to the device. EXIF orientation is ignored, as
torchvision's and TensorFlow's training pipelines do; alpha is dropped.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxprog.data import jpeg

# Workers are threads already.
cv2.setNumThreads(0)

# From a header alone, before any pixel is decoded: 178,956,970 pixels are
# 512 MiB of RGB, and twice what Pillow starts to warn about.
MAX_PIXELS = 178_956_970
# Each scan of a progressive JPEG takes as long as all pixels do, and few bytes.
# Encoders write 10, some up to 20; libtiff allows as many.
MAX_SCANS = 100
FORMATS = (
  *('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'PPM', 'TIFF'),
  *('AVIF', 'JPEG2000'),
)
# A JPEG is decoded small if the crop is still this many times larger than
# wanted. On photographs no crop then differs by more than 1.6 grey levels, on
# average over its pixels, from one resized from the full scale; at 1: 6.6.
_DRAFT_RATIO = 2
# Above it a shrinking resize takes Pillow's filter instead of three taps, whose
# outer ones are (s^2 - 1) / 12 for a shrink of s, and a third at most.
_LITTLE = 5**0.5
# torchvision's number of crops to try before it settles for a centre one.
_CROP_TRIES = 10
# Tags of a TIFF and what they are where they are missing.
_BITS, _KIND, _PHOTOMETRIC = (258, (16,)), (339, (1,)), (262, 1)
_SIGNED = 2

# Left, top, right, bottom; in pixels of the whole image.
Box = tuple[float, float, float, float]


class Pixels(NamedTuple):
  """A decoded image, read by rows.

  `read_rows(top, bottom)` returns uint8 (bottom - top, width, 3).
  """

  width: int
  height: int
  read_rows: Callable[[int, int], np.ndarray]


Encoded = bytes | Pixels


class BadImageError(ValueError):
  """An image that cannot be decoded; says why."""


class Opened(NamedTuple):
  """An image whose header is read and whose size is sane."""

  width: int
  height: int
  # read(box, denominator) returns at least the pixels in `box`, uint8
  # (h, w, 3) at 1 / denominator of the scale or as near to it as the format
  # allows, the box in their coordinates, and the scale: 1, 1/2, 1/4 or 1/8.
  read: Callable[[Box, int], tuple[np.ndarray, Box, float]]


def decode(image: Encoded) -> np.ndarray:
  """Returns the whole image as uint8 (height, width, 3).

  Raises:
    BadImageError: if it is damaged, no image or too large.
  """
  if isinstance(image, Pixels):
    return image.read_rows(0, image.height)
  opened = open_image(image)
  whole = (0.0, 0.0, float(opened.width), float(opened.height))
  # Its memory is used again.
  return opened.read(whole, 1)[0].copy()


def random_crop(
  image: Encoded,
  size: int,
  rng: np.random.Generator,
  *,
  min_area: float,
  max_aspect: float,
  interpolation: str = 'bilinear',
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Returns a random crop, resized, as uint8 (size, size, 3).

  Of JPEGs only the crop is decoded, at the scale that it needs; the rest of
  the way is an antialiased resize: bilinear, bicubic, or one of them at random.
  `out` is filled if it is given.
  """
  opened = open_image(image)
  box = sample_box(opened.width, opened.height, rng, min_area, max_aspect)
  if interpolation == 'random':
    interpolation = 'bicubic' if rng.random() < 0.5 else 'bilinear'
  shrink = min(box[2] - box[0], box[3] - box[1]) / size
  denominator = 1
  while denominator < 8 and shrink >= 2 * denominator * _DRAFT_RATIO:
    denominator *= 2
  pixels, inside, scale = opened.read(box, denominator)
  little = max(box[2] - box[0], box[3] - box[1]) <= _LITTLE * size
  if scale == 1 and little and interpolation == 'bilinear':
    left, top, right, bottom = map(int, inside)
    return _resize_little(pixels[top:bottom, left:right], size, out)
  return _resize(pixels, inside, size, interpolation, out)


def center_crop(
  image: Encoded,
  size: int,
  *,
  eval_crop: float,
  interpolation: str = 'bilinear',
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Returns the middle of the image as uint8 (size, size, 3).

  The pixels of torchvision's Resize(round(size / eval_crop), antialias=True)
  and CenterCrop(size), in one resize from the full scale. `out` is filled if
  it is given.
  """
  opened = open_image(image)
  box = _center_box(opened.width, opened.height, size, eval_crop)
  # The filter looks beyond the box by its own width.
  reach = 2 * max(1.0, (box[2] - box[0]) / size, (box[3] - box[1]) / size) + 1
  around = (
    max(0.0, box[0] - reach),
    max(0.0, box[1] - reach),
    min(float(opened.width), box[2] + reach),
    min(float(opened.height), box[3] + reach),
  )
  pixels, inside, _ = opened.read(around, 1)
  left, top = box[0] - around[0] + inside[0], box[1] - around[1] + inside[1]
  inside = (left, top, left + box[2] - box[0], top + box[3] - box[1])
  return _resize(pixels, inside, size, interpolation, out)


def _resize_little(
  pixels: np.ndarray, size: int, out: np.ndarray | None = None
) -> np.ndarray:
  """Returns `pixels`, uint8 (h, w, 3), as a square; h, w <= _LITTLE * size.

  Antialiased: where an axis shrinks by s, three taps before the linear
  interpolation bring its mean variance, 1/6 of a squared pixel, to that of a
  triangle as wide as s, s^2 / 6. On photographs the result is 0.7 grey levels
  from Pillow's bilinear resize, which takes four times as long.
  """
  height, width = pixels.shape[:2]
  across, down = _taps(width / size), _taps(height / size)
  if across[0] or down[0]:
    pixels = np.asarray(
      cv2.sepFilter2D(pixels, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    )
  return np.asarray(
    cv2.resize(pixels, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
  )


def _taps(shrink: float) -> np.ndarray:
  tap = (shrink * shrink - 1) / 12
  tap = tap if tap > 1 / 256 else 0.0  # Less is no grey level.
  return np.array((tap, 1 - 2 * tap, tap), np.float32)


def sample_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  min_area: float,
  max_aspect: float,
) -> tuple[int, int, int, int]:
  """Returns left, top, right, bottom of a random crop, as torchvision does.

  Its area is uniform in [min_area, 1] of the image's, the logarithm of its
  aspect uniform between those of 1 / max_aspect and max_aspect. Where ten
  tries do not fit, the largest centre crop of an allowed aspect is taken
  (Inception crop, Szegedy et al., 2015).
  """
  limit = math.log(max_aspect)
  for area, aspect, x, y in rng.random((_CROP_TRIES, 4)).tolist():
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


def _center_box(width: int, height: int, size: int, eval_crop: float) -> Box:
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


def open_image(image: Encoded) -> Opened:
  """Returns an image whose header is read.

  Raises:
    BadImageError: if it is no image or too large.
  """
  if isinstance(image, Pixels):
    return _open_pixels(image)
  # Before any decoder sees it: the slow one would take what the fast refuses.
  if jpeg.has_more_scans(image, MAX_SCANS):
    raise BadImageError(f'more than {MAX_SCANS} scans')
  header = jpeg.read_header(image)
  if header is None:
    return _open_with_pillow(image)
  _check_size(header.width, header.height)

  def read(box, denominator):
    region = jpeg.decode_region(image, header, box, denominator)
    if region is None:  # Pillow may be more patient, or knows what is wrong.
      return _open_with_pillow(image).read(box, denominator)
    corner, scale = (region.left, region.top) * 2, 1 / denominator
    inside = tuple(x * scale - y for x, y in zip(box, corner, strict=True))
    return region.pixels, inside, scale

  return Opened(header.width, header.height, read)


def _open_pixels(image: Pixels) -> Opened:
  def read(box, _):
    left, top, right, bottom = box
    first, last = int(top), math.ceil(bottom)
    rows = image.read_rows(first, last)
    return rows, (left, top - first, right, bottom - first), 1.0

  return Opened(image.width, image.height, read)


def _open_with_pillow(image: bytes) -> Opened:
  try:
    opened = Image.open(io.BytesIO(image), formats=FORMATS)
  except Exception as e:  # Pillow's decoders raise what they like.
    raise BadImageError(_reason(e)) from e
  width, height = opened.size
  _check_size(width, height)

  def read(box, denominator):
    # A JPEG's scale is the smallest that is at least as large as this.
    small = (width // denominator, height // denominator)
    drafted = opened.draft(opened.mode, small) if denominator > 1 else None
    scale = drafted[1][2] / width if drafted else 1.0
    pixels = np.asarray(_to_rgb(opened))
    left, top, right, bottom = (x * scale for x in box)
    return pixels, (left, top, right, bottom), scale

  return Opened(width, height, read)


def _check_size(width: int, height: int) -> None:
  if not 0 < width * height <= MAX_PIXELS:
    raise BadImageError(f'{width} x {height} pixels, more than {MAX_PIXELS:,}')


def _resize(
  pixels: np.ndarray,
  box: Box,
  size: int,
  interpolation: str,
  out: np.ndarray | None,
) -> np.ndarray:
  """Returns the pixels in `box`, antialiased, as uint8 (size, size, 3)."""
  height, width = pixels.shape[:2]
  left, top, right, bottom = box
  resized = Image.fromarray(pixels).resize(
    (size, size),
    Image.Resampling[interpolation.upper()],
    (max(left, 0), max(top, 0), min(right, width), min(bottom, height)),
  )
  if out is None:
    return np.asarray(resized)
  out[...] = resized
  return out


def _to_rgb(image: Image.Image) -> Image.Image:
  try:
    image.load()
    if image.mode[0] in 'IF':
      image = Image.fromarray(_to_bytes(image))
    elif image.mode == 'La':  # Pillow takes two steps from there.
      image = image.convert('LA')
    return image.convert('RGB')
  except Exception as e:  # Pillow's decoders raise what they like.
    raise BadImageError(_reason(e)) from e


def _to_bytes(image: Image.Image) -> np.ndarray:
  """Returns grey pixels of more than 8 bits, or of floats, as uint8.

  A file of at most 16 bits says by them what is white. Of 32 bits nobody has
  agreed on it: white is the smallest of 1 (floats alone), 255, 65,535 and all
  bits that no pixel exceeds.
  """
  tags = getattr(image, 'tag_v2', {})  # Of a TIFF; others have 16 bits.
  values = np.asarray(image)
  if values.dtype.kind == 'f':
    white = np.nanmax(values, initial=0)
    white = next((x for x in (1, 255, 65_535) if white <= x), white)
    grey = np.nan_to_num(np.rint(np.clip(values / white, 0, 1) * 255))
  else:
    (bits, *_), (kind, *_) = (tags.get(*x) for x in (_BITS, _KIND))
    if bits == 32 and kind != _SIGNED:
      values = values.view(np.uint32)
    depth = bits - (kind == _SIGNED)
    if depth > 16:
      depth = next((x for x in (8, 16) if values.max() < 2**x), depth)
    grey = np.clip(values.astype(np.int64) >> (depth - 8), 0, 255)
  inverted = tags.get(*_PHOTOMETRIC) == 0
  return (255 - grey if inverted else grey).astype(np.uint8)


def _reason(error: Exception) -> str:
  if isinstance(error, UnidentifiedImageError):  # It names our buffer.
    return 'this is no image'
  text = ' '.join(str(error).split())[:200]
  return f'{type(error).__name__}: {text}'

import contextlib
import io
import math
import struct
import zlib

import numpy as np
import parity
import pytest
from data_fixtures import encode, photo, real_data
from PIL import Image

from jaxprog.data import jpeg, preprocess
from jaxprog.monitoring import diagnostics


def crop(image, size=16, seed=0, **options):
  options = {'min_area': 0.35, 'max_aspect': 4 / 3, **options}
  rng = np.random.default_rng(seed)
  return preprocess.random_crop(image, size, rng, **options)


def antialiased(image: bytes, box, size: int) -> np.ndarray:
  """Returns the same crop decoded at full scale."""
  whole = Image.open(io.BytesIO(image)).convert('RGB')
  return np.asarray(
    whole.crop(box).resize((size, size), Image.Resampling.BILINEAR)
  )


def difference(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_boxes_have_the_area_and_aspect_asked_for():
  rng = np.random.default_rng(0)
  boxes = np.array(
    [preprocess.sample_box(300, 200, rng, 0.25, 4 / 3) for _ in range(20_000)]
  )
  width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  assert boxes.min() >= 0
  assert boxes[:, 2].max() == 300
  assert boxes[:, 3].max() == 200
  area, aspect = width * height / 60_000, width / height
  assert 0.245 < area.min() < 0.26
  assert 0.74 < aspect.min() < aspect.max() < 1.35
  # Boxes that do not fit are drawn again, which cuts off at wide aspects.
  fits = rng.random((400_000, 2))
  drawn_area = 0.25 + 0.75 * fits[:, 0]
  drawn_aspect = np.exp((2 * fits[:, 1] - 1) * math.log(4 / 3))
  kept = np.sqrt(drawn_area * 60_000 / drawn_aspect) <= 200
  kept &= np.sqrt(drawn_area * 60_000 * drawn_aspect) <= 300
  # 20,000 draws: three standard errors are 0.005 and 0.004.
  assert abs(area.mean() - drawn_area[kept].mean()) < 0.005
  log_aspect = np.log(aspect).mean()
  assert abs(log_aspect - np.log(drawn_aspect[kept]).mean()) < 0.004


def test_a_box_that_never_fits_becomes_the_largest_centre_crop():
  rng = np.random.default_rng(0)
  box = preprocess.sample_box(1000, 10, rng, 0.9, 2.0)
  assert box == (490, 0, 510, 10)
  box = preprocess.sample_box(10, 1000, rng, 0.9, 2.0)
  assert box == (0, 490, 10, 510)


def test_random_crop_follows_its_rng():
  image = encode(photo(40, 40), 'JPEG')
  np.testing.assert_array_equal(crop(image, seed=1), crop(image, seed=1))
  assert difference(crop(image, seed=1), crop(image, seed=2)) > 1


def texture(width: int, height: int) -> np.ndarray:
  """Returns spots 4 pixels wide, harder to scale than most photographs."""
  rng = np.random.default_rng(0)
  spots = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
  return np.asarray(Image.fromarray(spots).resize((width, height)))


@pytest.mark.parametrize('size', [16, 33, 64])
def test_random_crop_is_that_of_the_full_scale(size):
  # Sizes at which the JPEG is decoded at 1/4, 1/2 and 1.
  image = encode(texture(301, 223), 'JPEG', quality=95)
  found = []
  for seed in range(10):
    rng = np.random.default_rng(seed)
    box = preprocess.sample_box(301, 223, rng, 0.35, 4 / 3)
    expected = antialiased(image, box, size)
    found.append(difference(crop(image, size, seed), expected))
  assert np.mean(found) <= 2
  assert max(found) <= 3


def test_random_crop_of_photographs_is_that_of_the_full_scale():
  if not real_data():
    pytest.skip('JAXPROG_DATA names no folder.')
  files = sorted((real_data() / 'imagenette2').glob('val/*/*.JPEG'))[::75]
  for i, file in enumerate(files):
    image = file.read_bytes()
    for size in (32, 64):
      opened = Image.open(io.BytesIO(image))
      rng = np.random.default_rng(i)
      box = preprocess.sample_box(*opened.size, rng, 0.35, 4 / 3)
      assert difference(crop(image, size, i), antialiased(image, box, size)) < 2


@pytest.mark.parametrize('size', [(50, 40), (40, 51), (64, 64), (31, 97)])
@pytest.mark.parametrize('eval_crop', [0.875, 1.0])
def test_center_crop_is_resize_then_crop(size, eval_crop):
  pixels = photo(*size)
  side = round(28 / eval_crop)
  short = min(size)
  resized = Image.fromarray(pixels).resize(
    tuple(side * x // short for x in size), Image.Resampling.BILINEAR
  )
  left, top = (round((x - 28) / 2) for x in resized.size)
  expected = np.asarray(resized)[top : top + 28, left : left + 28]
  got = preprocess.center_crop(encode(pixels), 28, eval_crop=eval_crop)
  assert difference(got, expected) < 0.3


def test_center_crop_leaves_a_square_of_its_size_alone():
  pixels = photo(32, 32)
  got = preprocess.center_crop(encode(pixels), 32, eval_crop=1.0)
  np.testing.assert_array_equal(got, pixels)


def cmyk_jpeg(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).convert('CMYK').save(file, 'JPEG', quality=95)
  return file.getvalue()


def palette_png(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  # Four levels a channel: 64 colours, which a palette keeps exactly.
  image = Image.fromarray(pixels // 64 * 64).quantize(256)
  image.save(file, 'PNG', transparency=0)
  return file.getvalue()


def rgba_png(pixels: np.ndarray) -> bytes:
  alpha = np.full((*pixels.shape[:2], 1), 90, np.uint8)
  return encode(np.concatenate([pixels, alpha], -1))


def exif_jpeg(pixels: np.ndarray) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: rotated by 90 degrees.
  return encode(pixels, 'JPEG', quality=95, subsampling=0, exif=exif)


@pytest.mark.parametrize(
  ('make', 'tolerance'),
  [(cmyk_jpeg, 2), (palette_png, 0), (rgba_png, 0), (exif_jpeg, 4)],
)
def test_other_modes_become_rgb(make, tolerance):
  pixels = photo(48, 48) // 64 * 64
  got = preprocess.decode(make(pixels))
  assert got.shape == (48, 48, 3)
  assert got.dtype == np.uint8
  assert difference(got, pixels) <= tolerance
  assert crop(make(pixels)).shape == (16, 16, 3)


@pytest.mark.parametrize('format', ['JPEG', 'PNG'])
def test_grey_images_get_three_equal_channels(format):
  grey = photo(48, 48)[..., 0]
  for got in (
    preprocess.decode(encode(grey, format)),
    crop(encode(grey, format)),
    preprocess.center_crop(encode(grey, format), 16, eval_crop=1.0),
  ):
    assert got.shape[-1] == 3
    assert difference(got[..., :1], got) == 0
  assert difference(preprocess.decode(encode(grey, format))[..., 0], grey) < 2


def test_sixteen_bits_keep_their_high_byte():
  values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
  got = preprocess.decode(encode(values))
  np.testing.assert_array_equal(got[..., 0], values >> 8)
  np.testing.assert_array_equal(got[..., 0], got[..., 2])


@pytest.mark.parametrize('mode', ['La', 'RGBa', 'HSV', 'RGBX', 'YCbCr'])
def test_modes_that_few_files_have_become_rgb(mode):
  base = {'La': 'LA', 'RGBa': 'RGBA'}.get(mode, 'RGB')
  image = Image.new('RGB', (2, 2), (90, 90, 90)).convert(base).convert(mode)
  got = preprocess._to_rgb(image)
  assert got.mode == 'RGB'
  assert got.getpixel((1, 1)) == (90, 90, 90)


def repeat_scans(image: bytes, count: int) -> bytes:
  """Returns a JPEG whose last scan comes `count` times."""
  start = image.rindex(b'\xff\xda')
  return image[:start] + image[start:-2] * count + image[-2:]


def test_a_jpeg_of_many_scans_is_refused_by_every_reader():
  image = encode(photo(64, 64), 'JPEG', progressive=True)
  scans = image.count(b'\xff\xda')
  assert preprocess.decode(image).shape == (64, 64, 3)
  most = repeat_scans(image, preprocess.MAX_SCANS - scans + 1)
  assert preprocess.decode(most).shape == (64, 64, 3)
  # What comes after the end, or within a segment, is none.
  thumbnail = b'\xff\xe1\x01\x00' + b'\xff\xda' * 127
  for more in (most + image, most[:2] + thumbnail + most[2:]):
    assert preprocess.decode(more).shape == (64, 64, 3)
  too_many = repeat_scans(image, 600)
  for read in (
    preprocess.decode,
    crop,
    lambda x: preprocess.center_crop(x, 16, eval_crop=1.0),
    preprocess.open_image,
  ):
    with pytest.raises(preprocess.BadImageError, match='more than 100 scans'):
      read(too_many)
  assert diagnostics.create_thumbnail(too_many) == ''


def test_with_and_without_the_fast_decoder_the_same_is_damaged(monkeypatch):
  image = encode(photo(64, 64), 'JPEG', quality=90)
  middle, rng = len(image) * 3 // 4, np.random.default_rng(0)
  spoilt = [
    image,
    image[:-1],
    image[:-2],
    image[:middle],
    image[:middle] + image[-2:],
    image[:-2] + b'more' + image[-2:],  # Before the marker of the end.
    image + bytes(2000),
    image[:middle] + b'\xff\xd9' + image[middle:],
  ]
  for _ in range(300):
    flipped = bytearray(image)
    flipped[rng.integers(len(image))] ^= 1 << rng.integers(8)
    spoilt.append(bytes(flipped))

  def read(image):
    try:
      return preprocess.decode(image).tobytes()
    except preprocess.BadImageError:
      return None

  fast = [read(x) for x in spoilt]
  monkeypatch.setattr(jpeg, 'read_header', lambda _: None)
  assert [i for i, x in enumerate(spoilt) if read(x) != fast[i]] == []
  assert None in fast


@pytest.mark.parametrize(
  'format', ['BMP', 'GIF', 'PNG', 'TIFF', 'WEBP', 'JPEG']
)
def test_a_size_is_refused_in_every_format(format, monkeypatch):
  monkeypatch.setattr(preprocess, 'MAX_PIXELS', 40 * 30 - 1)
  image = encode(photo(40, 30), format)
  for read in (preprocess.decode, crop, preprocess.open_image):
    with pytest.raises(preprocess.BadImageError, match='40 x 30'):
      read(image)
  assert diagnostics.create_thumbnail(image) == ''


def test_one_pixel_fills_the_crop():
  image = encode(np.full((1, 1, 3), (10, 20, 30), np.uint8))
  for got in (
    crop(image),
    preprocess.center_crop(image, 16, eval_crop=0.875),
  ):
    np.testing.assert_array_equal(got, np.full((16, 16, 3), (10, 20, 30)))


def huge_png(width: int, height: int) -> bytes:
  """Returns a PNG whose header promises what its data does not hold."""

  def chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return (
      struct.pack('>I', len(data)) + kind + data + struct.pack('>I', checksum)
    )

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  data = chunk(b'IDAT', zlib.compress(b''))
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + data


def damaged():
  photograph = encode(photo(200, 200), 'JPEG')
  png = encode(photo(200, 200))
  return {
    'empty': b'',
    'html': b'<html><body>404 Not Found</body></html>',
    'truncated JPEG': photograph[: len(photograph) // 2],
    'truncated PNG': png[: len(png) // 2],
    'header only': photograph[:30],
    'huge': huge_png(20_000, 20_000),
  }


@pytest.mark.parametrize('kind', damaged())
def test_what_is_no_image_is_refused(kind):
  image = damaged()[kind]
  for read in (
    preprocess.decode,
    crop,
    lambda x: preprocess.center_crop(x, 16, eval_crop=1.0),
  ):
    with pytest.raises(preprocess.BadImageError):
      read(image)


def test_a_size_is_refused_before_memory_is_taken(monkeypatch):
  # Whatever Pillow's own limit was set to.
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
  with pytest.raises(preprocess.BadImageError, match='20000 x 20000'):
    preprocess.decode(huge_png(20_000, 20_000))


def test_a_bit_flipped_file_is_pixels_or_refused():
  image = bytearray(encode(photo(64, 64), 'JPEG'))
  rng = np.random.default_rng(0)
  for _ in range(200):
    flipped = bytearray(image)
    flipped[rng.integers(len(image))] ^= 1 << rng.integers(8)
    with contextlib.suppress(preprocess.BadImageError):
      assert crop(bytes(flipped)).shape == (16, 16, 3)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('eval_crop', [0.875, 1.0])
def test_center_crop_is_torchvisions(interpolation, eval_crop):
  transforms = parity.import_module('torchvision.transforms')
  mode = transforms.InterpolationMode(interpolation)
  for size in ((301, 223), (223, 301), (90, 64), (1000, 700)):
    image = encode(texture(*size), 'JPEG', quality=92)
    for side in (32, 64):
      recipe = transforms.Compose(
        [
          transforms.Resize(round(side / eval_crop), mode),
          transforms.CenterCrop(side),
        ]
      )
      expected = np.asarray(recipe(Image.open(io.BytesIO(image))))
      got = preprocess.center_crop(
        image, side, eval_crop=eval_crop, interpolation=interpolation
      )
      # At most 1 is asked for; the one resize differs by its rounding alone.
      assert difference(got, expected) < 0.3


@pytest.mark.parametrize('size', [(90, 64), (700, 500)])
def test_a_bicubic_crop_is_torchvisions(size):
  functional = parity.import_module('torchvision.transforms.functional')
  pixels = texture(*size)
  options = {'min_area': 0.3, 'max_aspect': 4 / 3}
  for seed in range(5):
    rng = np.random.default_rng(seed)
    got = preprocess.random_crop(
      encode(pixels), 32, rng, interpolation='bicubic', **options
    )
    left, top, right, bottom = preprocess.sample_box(
      *size, np.random.default_rng(seed), *options.values()
    )
    expected = functional.resized_crop(
      Image.fromarray(pixels),
      *(top, left, bottom - top, right - left),
      (32, 32),
      functional.InterpolationMode.BICUBIC,
    )
    # Theirs does not see what is beside the crop.
    inner = slice(2, -2), slice(2, -2)
    np.testing.assert_array_equal(got[inner], np.asarray(expected)[inner])


def test_a_random_crop_is_resized_one_way_or_the_other():
  image, names = encode(texture(90, 64)), ('bilinear', 'bicubic')
  options = {'min_area': 0.3, 'max_aspect': 4 / 3}

  def crop_each(name):
    return [
      preprocess.random_crop(
        image, 32, np.random.default_rng(i), interpolation=name, **options
      )
      for i in range(60)
    ]

  chosen, bilinear, bicubic = map(crop_each, ('random', *names))
  cubic = [np.array_equal(a, b) for a, b in zip(chosen, bicubic, strict=True)]
  linear = [np.array_equal(a, b) for a, b in zip(chosen, bilinear, strict=True)]
  assert [not x for x in cubic] == linear
  assert 15 < sum(cubic) < 45

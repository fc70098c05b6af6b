import io
import threading

import numpy as np
import pytest
from data_fixtures import encode, photo
from PIL import Image

from jaxprog.data import jpeg

pytestmark = pytest.mark.skipif(
  jpeg.version() == 'pillow', reason='There is no libjpeg-turbo here.'
)
SIZE = 203, 151


def photograph(subsampling: int = 2, grey: bool = False, **options) -> bytes:
  pixels = photo(*SIZE)
  noise = np.random.default_rng(0).integers(-20, 20, pixels.shape)
  pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
  if grey:
    return encode(pixels[..., 0], 'JPEG', quality=90, **options)
  return encode(pixels, 'JPEG', quality=90, subsampling=subsampling, **options)


def whole(image: bytes, denominator: int) -> np.ndarray:
  """Returns all pixels at that scale, as Pillow decodes them."""
  opened = Image.open(io.BytesIO(image))
  opened.draft(opened.mode, tuple(x // denominator for x in SIZE))
  assert opened.size == tuple(-(-x // denominator) for x in SIZE)
  return np.asarray(opened.convert('RGB'))


@pytest.mark.parametrize('denominator', [1, 2, 4, 8])
@pytest.mark.parametrize(
  'options',
  [
    {'subsampling': 0},
    {'subsampling': 1},
    {'subsampling': 2},
    {'grey': True},
    {'progressive': True},
  ],
)
def test_a_region_is_that_of_the_whole_bit_for_bit(options, denominator):
  image = photograph(**options)
  header = jpeg.read_header(image)
  assert header[:2] == SIZE
  expected = whole(image, denominator)
  rng = np.random.default_rng(1)
  for _ in range(10):
    left, right = np.sort(rng.choice(SIZE[0] + 1, 2, replace=False))
    top, bottom = np.sort(rng.choice(SIZE[1] + 1, 2, replace=False))
    region = jpeg.decode_region(
      image, header, (left, top, right, bottom), denominator
    )
    left, top = left // denominator, top // denominator
    right, bottom = -(-right // denominator), -(-bottom // denominator)
    got = region.pixels[
      top - region.top : bottom - region.top,
      left - region.left : right - region.left,
    ]
    np.testing.assert_array_equal(got, expected[top:bottom, left:right])


def test_less_than_the_whole_is_decoded():
  image = photograph()
  header = jpeg.read_header(image)
  region = jpeg.decode_region(image, header, (100, 80, 120, 100))
  assert region.pixels.shape[0] <= 20 + 2 * 2
  assert region.pixels.shape[1] <= 20 + 2 * 2 + 16


@pytest.mark.parametrize(
  'image',
  [
    encode(photo(9, 9), 'PNG'),
    b'',
    b'<html>',
    photograph()[:2000],  # Ends too early.
    photograph().replace(b'\xff\xc0', b'\xff\xc3', 1),  # Lossless.
  ],
)
def test_what_it_cannot_decode_is_left_to_others(image):
  assert jpeg.read_header(image) is None


def test_cmyk_is_left_to_others():
  file = io.BytesIO()
  Image.fromarray(photo(20, 20)).convert('CMYK').save(file, 'JPEG')
  assert jpeg.read_header(file.getvalue()) is None


def test_damage_within_is_noticed():
  image = bytearray(photograph())
  # A marker in the middle of the pixels: the rest of them is missing.
  middle = len(image) // 2
  image[middle : middle + 2] = b'\xff\xd9'
  header = jpeg.read_header(bytes(image))
  assert jpeg.decode_region(bytes(image), header, (0, 0, *SIZE)) is None


def test_damage_is_forgotten_with_the_next_image():
  image = photograph()
  rng = np.random.default_rng(0)
  for _ in range(300):
    damaged = bytearray(image)
    damaged[rng.integers(2, 700)] ^= 1 << rng.integers(8)
    header = jpeg.read_header(bytes(damaged))
    if header and header.width * header.height < 10**6:
      jpeg.decode_region(bytes(damaged), header, (0, 0, 9, 9))
    assert jpeg.read_header(image)[:2] == SIZE


def test_threads_do_not_disturb_each_other():
  images = [photograph(i % 3) for i in range(3)]
  headers = [jpeg.read_header(x) for x in images]
  expected = [whole(x, 1) for x in images]
  wrong = []

  def work(i):
    for _ in range(50):
      region = jpeg.decode_region(images[i], headers[i], (0, 0, *SIZE))
      if not np.array_equal(region.pixels, expected[i]):
        wrong.append(i)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert wrong == []

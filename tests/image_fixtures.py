"""Images of the kinds that real datasets hold, and the pixels they stand for.

`python tests/image_fixtures.py` rewrites golden_images.json: the shape and the
channel means of each, of the whole and of its top left quarter. They come from
NumPy, from the pixels that went into the file, and not from a decoder.
"""

import io
import json
import pathlib
import struct
import zlib

import numpy as np
from data_fixtures import write_class_folders, write_image
from PIL import Image, ImageCms

GOLDEN = pathlib.Path(__file__).parent / 'golden_images.json'
# Wider than high, and unlike in every quarter: a turned image is another one.
WIDTH, HEIGHT = 48, 32


def ramps() -> np.ndarray:
  """Returns red to the right, green downwards, blue half; smooth, uint8."""
  x = np.linspace(0, 240, WIDTH)[None, :].repeat(HEIGHT, 0)
  y = np.linspace(20, 200, HEIGHT)[:, None].repeat(WIDTH, 1)
  return np.stack([x, y, (x + y) / 3], -1).round().astype(np.uint8)


def create() -> dict[str, tuple[bytes, np.ndarray]]:
  """Returns file name -> its bytes, and the RGB pixels it should become."""
  rgb = ramps()
  grey = rgb[..., 0]
  three = np.stack([grey] * 3, -1)
  levels = rgb // 64 * 64  # 64 colours at most, which a palette keeps.
  pixel = np.full((1, 1, 3), (10, 20, 30), np.uint8)
  alpha = np.full((HEIGHT, WIDTH, 1), 90, np.uint8)
  grey16 = grey.astype(np.uint16)
  floats = grey.astype(np.float32)
  holed = np.where(np.arange(WIDTH) < 1, np.nan, floats / 255)  # Black there.
  turned = Image.Exif()
  turned[0x0112] = 6  # Orientation: to be shown turned by 90 degrees.
  return {
    'rgb.JPEG': (_encode(rgb, 'JPEG'), rgb),
    'grey.JPEG': (_encode(grey, 'JPEG'), three),
    'grey.png': (_encode(grey, 'PNG'), three),
    'cmyk.JPEG': (_encode(rgb, 'JPEG', mode='CMYK'), rgb),
    'rgba.png': (_encode(np.concatenate([rgb, alpha], -1), 'PNG'), rgb),
    'sixteen_bits.png': (_encode(grey.astype(np.uint16) * 257, 'PNG'), three),
    'png_named.JPEG': (_encode(rgb, 'PNG'), rgb),
    'palette.png': (_palette(levels), levels),
    'one_pixel.png': (_encode(pixel, 'PNG'), pixel),
    'one_bit.png': (
      _encode(grey > 119, 'PNG'),
      ((three > 119) * 255).astype(np.uint8),
    ),
    'cmyk.tif': (_encode(rgb, 'TIFF', mode='CMYK'), rgb),
    'alpha.tif': (_encode(rgb, 'TIFF', mode='RGBA'), rgb),
    'grey_alpha.png': (_encode(grey, 'PNG', mode='LA'), three),
    'palette_alpha.tif': (_encode(grey, 'TIFF', mode='PA'), three),
    'sixteen_bits.ppm': (_encode(grey16 * 257, 'PPM'), three),
    'two_bits.tif': (_tiff(_packed(grey // 64, 2), 2), three // 64 * 85),
    'twelve_bits.tif': (_tiff(_packed(grey16 * 16, 12), 12), three),
    'sixteen_bits.tif': (_tiff(grey16 * 257, 16), three),
    'big_endian.tif': (_tiff((grey16 * 257).astype('>u2'), 16), three),
    'signed_sixteen_bits.tif': (_tiff(grey16 << 7, 16, kind=2), three),
    'white_is_zero.tif': (_tiff(65_535 - grey16 * 257, 16, zero=0), three),
    'uint32_of_8_bits.tif': (_tiff(grey.astype('<u4'), 32), three),
    'uint32_of_16_bits.tif': (_tiff(grey.astype('<u4') * 257, 32), three),
    'uint32.tif': (_tiff(grey.astype('<u4') << 24, 32), three),
    'int32_of_8_bits.tif': (_tiff(grey.astype('<i4'), 32, kind=2), three),
    'int32.tif': (_tiff(grey.astype('<i4') << 23, 32, kind=2), three),
    'float_of_1.tif': (_tiff(holed.astype('<f4'), 32, kind=3), three),
    'float_of_8_bits.tif': (_tiff(floats, 32, kind=3), three),
    'float_of_16_bits.tif': (_tiff(floats * 257, 32, kind=3), three),
    'lab.tif': (_lab(rgb), rgb),
    # Ignored on purpose, as torchvision and TensorFlow do when they train.
    'exif_turned.JPEG': (_encode(rgb, 'JPEG', exif=turned), rgb),
  }


def huge_png() -> bytes:
  """Returns 20,000 x 20,000 pixels, all there, in 50 kB; 1.6 GB once RGB."""
  side = 20_000

  def chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return (
      struct.pack('>I', len(data)) + kind + data + struct.pack('>I', checksum)
    )

  header = struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)  # One bit, grey.
  rows = zlib.compress(bytes(side * (1 + side // 8)), 9)
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    (chunk(b'IHDR', header), chunk(b'IDAT', rows), chunk(b'IEND', b''))
  )


def write_pets(root: pathlib.Path) -> pathlib.Path:
  """Writes three classes of 5 and 2 images, no two of them alike."""
  write_class_folders(root)
  for seed, path in enumerate(sorted((root / 'val').glob('*/*')), 1000):
    write_image(path, seed)
  return root


def describe(pixels: np.ndarray) -> dict[str, list]:
  """Returns the shape, the channel means, and those of the first quarter."""
  height, width = (-(-x // 2) for x in pixels.shape[:2])
  return {
    'shape': list(pixels.shape),
    'mean': pixels.mean((0, 1)).round(3).tolist(),
    'quarter': pixels[:height, :width].mean((0, 1)).round(3).tolist(),
  }


def _encode(pixels: np.ndarray, format: str, *, mode: str = '', **options):
  image = Image.fromarray(pixels)
  if mode:
    image = image.convert(mode)
  if format == 'JPEG':
    options |= {'quality': 95, 'subsampling': 0}
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def _tiff(pixels: np.ndarray, bits: int, *, kind: int = 1, zero: int = 1):
  """Returns an uncompressed grey TIFF; `kind` 1: unsigned, 2: signed, 3: float.

  `zero` 1 says that 0 is black, 0 that it is white.
  """
  order = '>' if pixels.dtype.byteorder == '>' else '<'
  data = pixels.tobytes()
  tags = {
    256: WIDTH,
    257: HEIGHT,
    258: bits,
    259: 1,  # Not compressed.
    262: zero,
    273: 8,  # Where the pixels begin.
    277: 1,
    278: HEIGHT,
    279: len(data),
    339: kind,
  }
  entries = b''.join(
    struct.pack(f'{order}HHII', tag, 4, 1, value) for tag, value in tags.items()
  )
  start = {'<': b'II', '>': b'MM'}[order]
  return (
    start
    + struct.pack(f'{order}HI', 42, 8 + len(data))
    + data
    + struct.pack(f'{order}H', len(tags))
    + entries
    + bytes(4)
  )


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
  """Returns values of few bits without gaps, the highest bit first."""
  places = np.arange(bits)[::-1]
  return np.packbits((values[..., None] >> places & 1).astype(np.uint8), None)


def _lab(pixels: np.ndarray) -> bytes:
  profiles = map(ImageCms.createProfile, ('sRGB', 'LAB'))
  image = ImageCms.applyTransform(
    Image.fromarray(pixels), ImageCms.buildTransform(*profiles, 'RGB', 'LAB')
  )
  file = io.BytesIO()
  image.save(file, 'TIFF')
  return file.getvalue()


def _palette(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).quantize(256).save(file, 'PNG', transparency=0)
  return file.getvalue()


if __name__ == '__main__':
  found = {name: describe(pixels) for name, (_, pixels) in create().items()}
  GOLDEN.write_text(json.dumps(found, indent=2) + '\n')

"""What an image is known by: its bytes, and how it looks from afar.

Looks survive another size, another quality of JPEG and another name. They are
those of the whole image as a square, its aspect ignored, and of the square in
its middle, because small copies of datasets are made either way.
"""

import contextlib
import hashlib
import math
import os
import pathlib
import shutil
import uuid

import numpy as np
from PIL import Image

from jaxprog.data import parts, preprocess, remote
from jaxprog.data.records import Records

# Side of a thumbnail, in pixels: a quarter of the smallest copies, so that
# their filters and their JPEG blocks hardly show.
SIDE = 16
# Smaller images show too little to tell two of them apart: the nearest two of
# scikit-learn's 8x8 digits are as near as a photograph and its copy.
_MIN_SIDE = 32
# JPEGs are decoded at the smallest scale that leaves this side.
_DECODED_SIDE = 64
# Of SHA-256. Among 10^12 pairs of images, 128 bits agree by chance once in
# 10^26 times.
_DIGEST_BYTES = 16
# Raised whenever signatures of the same image would differ.
VERSION = 2

SIGNATURE = np.dtype(
  [
    ('digest', np.uint8, (_DIGEST_BYTES,)),
    # Whole image, middle square; red, green, blue.
    ('thumbnails', np.uint8, (2, SIDE, SIDE, 3)),
    # False: damaged, or not of any format that training reads.
    ('readable', np.bool_),
    # Whether the thumbnails say something.
    ('comparable', np.bool_),
  ]
)
# Images of one part of the work: 3 MB of signatures.
_PART = 2048


def read_signatures(
  records: Records, *, progress: parts.Progress | None = None
) -> np.ndarray:
  """Returns the SIGNATURE of every image that `records` are taken from.

  (n,), to be indexed with `records.positions`; perhaps mapped from the file
  beside the prepared dataset in which they are kept. They are computed by as
  many threads as cores; what a kill leaves is not computed again. A damaged
  image is not readable and has only a digest. `progress` is called with the
  images done and in all.
  """
  file = _cache_file(records)
  if remote.is_known(file):
    remote.fetch([file])
  table = _load(file, len(records.source))
  return _compute(records, file, progress) if table is None else table


def sign(image: bytes) -> np.ndarray:
  """Returns the SIGNATURE of one encoded image, ()."""
  signature = np.zeros((), SIGNATURE)
  digest = hashlib.sha256(image).digest()[:_DIGEST_BYTES]
  signature['digest'] = np.frombuffer(digest, np.uint8)
  try:
    width, height, pixels, box = _decode_small(image)
  except preprocess.BadImageError:
    return signature
  signature['readable'] = True
  if min(width, height) >= _MIN_SIDE:
    signature['comparable'] = True
    whole = _shrink(pixels, box)
    square = whole if width == height else _shrink_middle(pixels, box)
    signature['thumbnails'] = whole, square
  return signature


def _decode_small(
  image: bytes,
) -> tuple[int, int, Image.Image, preprocess.Box]:
  """Returns width and height, a small decoding, and where the image lies."""
  opened = preprocess.open_image(image)
  width, height = opened.width, opened.height
  denominator = 8
  while denominator > 1 and min(width, height) < denominator * _DECODED_SIDE:
    denominator //= 2
  pixels, inside, _ = opened.read((0, 0, width, height), denominator)
  box = (
    max(inside[0], 0),
    max(inside[1], 0),
    min(inside[2], pixels.shape[1]),
    min(inside[3], pixels.shape[0]),
  )
  return width, height, Image.fromarray(pixels), box


def _shrink_middle(pixels: Image.Image, box: preprocess.Box) -> np.ndarray:
  """Returns `_shrink` of the largest square in the middle of `box`."""
  left, top, right, bottom = box
  x = max(0, (right - left) - (bottom - top)) / 2
  y = max(0, (bottom - top) - (right - left)) / 2
  left, top, right, bottom = left + x, top + y, right - x, bottom - y
  # Cut out first, or the filter would see what lies around it.
  x, y = math.floor(left), math.floor(top)
  square = pixels.crop((x, y, math.ceil(right), math.ceil(bottom)))
  return _shrink(square, (left - x, top - y, right - x, bottom - y))


def _shrink(pixels: Image.Image, box: preprocess.Box) -> np.ndarray:
  """Returns what is in `box` as uint8 (SIDE, SIDE, 3), antialiased."""
  return np.asarray(pixels.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))


def _compute(
  records: Records, file: pathlib.Path, progress: parts.Progress | None
) -> np.ndarray:
  """Returns all that `read_signatures` does, which is then kept in `file`.

  ImageNet's are 2 GB, of which a few parts at a time are in memory.
  """

  def read(part: range) -> parts.Arrays:
    found = [sign(records.at(position)) for position in part]
    return {'signatures': np.array(found, SIGNATURE)}

  records.source.fetch()
  folder = file.with_name(f'incomplete.{file.stem}')
  whole = file.with_name(f'{folder.name}.{uuid.uuid4().hex}.npy')
  count, start = len(records.source), 0
  table = _allocate(whole, count)
  for part in parts.read_parts(folder, count, _PART, read, progress):
    found = part['signatures']
    table[start : start + len(found)] = found
    start += len(found)
  if isinstance(table, np.memmap):
    table.flush()
    with contextlib.suppress(OSError):  # Another process was as fast.
      whole.rename(file)
    _remove_others(file)
  return table


def _allocate(file: pathlib.Path, count: int) -> np.ndarray:
  """Returns room for signatures, in memory where the disk has none."""
  with contextlib.suppress(OSError):  # Prepared data may be read-only.
    table = np.lib.format.open_memmap(file, 'w+', SIGNATURE, (count,))
    try:
      # Without this, a full disk kills the process at the first write.
      with open(file, 'rb+') as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError:
      file.unlink()
      raise
    return table
  return np.empty(count, SIGNATURE)


def _remove_others(file: pathlib.Path) -> None:
  """Removes what led to `file`, and those of the images as they were before."""
  prefix = file.name.rpartition('-')[0]
  found = (f'{prefix}-*.npy', f'incomplete.{prefix}-*')
  for old in {y for x in found for y in file.parent.glob(x)} - {file}:
    if old.is_dir():
      shutil.rmtree(old, ignore_errors=True)
    else:
      old.unlink(missing_ok=True)


def is_kept(records: Records) -> bool:
  """Returns whether these images were described before."""
  return remote.is_known(_cache_file(records))


def _cache_file(records: Records) -> pathlib.Path:
  """Returns where signatures are kept; another name for other images.

  What tfds says of the dataset holds the fingerprint of the raw images, and
  the sizes of the files change with any image's.
  """
  digest = hashlib.sha256(f'{VERSION}'.encode())
  for name in ('dataset_info.json', 'metadata.json'):
    with contextlib.suppress(OSError):
      digest.update((records.directory / name).read_bytes())
  for path in sorted(records.source.paths):
    name = os.path.basename(path)
    digest.update(f'{name}\0{remote.size(path)}\0'.encode())
  key = digest.hexdigest()[:16]
  return records.directory / f'signatures-{records.name}-{key}.npy'


def _load(file: pathlib.Path, count: int) -> np.ndarray | None:
  try:
    table = np.load(file, mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError, EOFError):
    return None  # Not there yet, or not whole.
  fits = table.shape == (count,) and table.dtype == SIGNATURE
  return table if fits else None

"""Decodes a part of a JPEG, at a fraction of its scale, with libjpeg-turbo.

Of a random crop's image a quarter need not be transformed, interpolated or
converted. No Python library offers that, so this calls the C interface,
TurboJPEG 3. It holds no lock of Python's while it works.
"""

import ctypes
import ctypes.util
import functools
import importlib.metadata
import math
import re
import threading
from typing import Any, NamedTuple

import numpy as np

# Of turbojpeg.h: what an instance does, its parameters, a pixel format.
_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLORSPACE = 4, 5, 6, 7, 8
_LOSSLESS = 15
_RGB = 0
_CMYK, _YCCK = 3, 4
# Pixels across one block of all components, by kind of subsampling.
_BLOCK_WIDTHS = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}
# What interpolation between colour samples looks at beyond a region.
_MARGIN = 2
_START_OF_IMAGE = b'\xff\xd8'
_END_OF_IMAGE = b'\xff\xd9'
_SCAN = b'\xff\xda'
# A marker; not what stands for a byte of pixels, or restarts their decoding.
_MARKER = re.compile(rb'\xff+([^\x00\x01\xd0-\xd7\xff])')


class Header(NamedTuple):
  """What a JPEG says of itself."""

  width: int
  height: int
  # Pixels across one block of all components, at full scale.
  block_width: int


class Region(NamedTuple):
  """Decoded pixels, uint8 (h, w, 3), and where they lie in the image.

  `left` and `top` are in pixels of the decoded scale. The array is valid until
  the same thread decodes again.
  """

  pixels: np.ndarray
  left: int
  top: int


class _Scale(ctypes.Structure):
  _fields_ = (('numerator', ctypes.c_int), ('denominator', ctypes.c_int))


class _Rectangle(ctypes.Structure):
  _fields_ = tuple((x, ctypes.c_int) for x in ('x', 'y', 'width', 'height'))


class _Decoder:
  """One instance of the library, and memory for what it decodes."""

  def __init__(self, library: ctypes.CDLL) -> None:
    self.library = library
    self.handle = library.tj3Init(_DECOMPRESS)
    if not self.handle:
      raise MemoryError('TurboJPEG cannot start.')
    # What its header was last read of.
    self.data = b''
    self.memory = np.empty(0, np.uint8)

  def __del__(self) -> None:
    self.library.tj3Destroy(self.handle)

  def read_header(self, data: bytes) -> bool:
    if data is not self.data:
      self.data = b''
      if self.library.tj3DecompressHeader(self.handle, data, len(data)):
        return False
      self.data = data
    return True

  def get(self, parameter: int) -> int:
    return self.library.tj3Get(self.handle, parameter)

  def reserve(self, size: int) -> np.ndarray:
    if self.memory.size < size:
      self.memory = np.empty(size, np.uint8)
    return self.memory[:size]


_threads = threading.local()


def version() -> str:
  """Returns what decodes JPEGs here, for the record of a run."""
  if _library() is None:
    return 'pillow'
  try:
    return f'turbojpeg {importlib.metadata.version("turbojpeg")}'
  except importlib.metadata.PackageNotFoundError:
    return 'turbojpeg'


def has_more_scans(data: bytes, limit: int) -> bool:
  """Returns whether it is a JPEG whose pixels are gone through more often."""
  if not data.startswith(_START_OF_IMAGE):
    return False
  # Most have fewer even with what is no marker; bytes.count takes five times as
  # long.
  values = np.frombuffer(data, np.uint8)
  found = (values[:-1] == _SCAN[0]) & (values[1:] == _SCAN[1])
  if np.count_nonzero(found) <= limit:
    return False
  count, position = 0, 2
  while marker := _MARKER.search(data, position):
    position = marker.end()
    if marker[1] == _END_OF_IMAGE[1:]:
      break
    count += marker[1] == _SCAN[1:]
    # What a segment holds are no markers: thumbnails have their own scans.
    position += int.from_bytes(data[position : position + 2])
  return count > limit


def read_header(data: bytes) -> Header | None:
  """Returns the header of a JPEG that `decode_region` can decode.

  None for what it cannot: other formats, CMYK, 12 bits, damaged headers, files
  that end before their image does, or where there is no libjpeg-turbo.
  """
  decoder = _decoder()
  if decoder is None or _END_OF_IMAGE not in data[-1024:]:
    return None
  block_width = None
  if decoder.read_header(data):
    block_width = _BLOCK_WIDTHS.get(decoder.get(_SUBSAMPLING))
  if (
    block_width is None
    or decoder.get(_PRECISION) != 8
    or decoder.get(_LOSSLESS)
    or decoder.get(_COLORSPACE) in (_CMYK, _YCCK)
  ):
    _forget()
    return None
  return Header(decoder.get(_WIDTH), decoder.get(_HEIGHT), block_width)


def decode_region(
  data: bytes,
  header: Header,
  box: tuple[float, float, float, float],
  denominator: int = 1,
) -> Region | None:
  """Returns at least the pixels in `box`, at 1 / `denominator` of the scale.

  They are those of the whole image's decoding, bit for bit. `box` is left,
  top, right, bottom in pixels of the full scale, `denominator` 1, 2, 4 or 8.
  None if the decoder has anything to complain about.
  """
  decoder = _decoder()
  if decoder is None:
    return None
  library, handle = decoder.library, decoder.handle
  width = -(-header.width // denominator)
  height = -(-header.height // denominator)
  # A region begins at a whole block.
  block_width = max(1, header.block_width // denominator)
  left = max(0, int(box[0] / denominator) - _MARGIN)
  left -= left % block_width
  top = max(0, int(box[1] / denominator) - _MARGIN)
  right = min(width, -(-math.ceil(box[2]) // denominator) + _MARGIN)
  bottom = min(height, -(-math.ceil(box[3]) // denominator) + _MARGIN)
  whole = _Rectangle(0, 0, 0, 0)
  part = _Rectangle(left, top, right - left, bottom - top)
  memory = decoder.reserve(part.width * part.height * 3)
  failed = (
    library.tj3SetCroppingRegion(handle, whole)
    or not decoder.read_header(data)
    or library.tj3SetScalingFactor(handle, _Scale(1, denominator))
    or library.tj3SetCroppingRegion(handle, part)
    or library.tj3Decompress8(
      handle, data, len(data), memory.ctypes.data, 0, _RGB
    )
  )
  if failed:
    _forget()
    return None
  return Region(memory.reshape(part.height, part.width, 3), left, top)


def _decoder() -> _Decoder | None:
  """Returns this thread's own decoder."""
  try:
    return _threads.decoder
  except AttributeError:
    library = _library()
    _threads.decoder = _Decoder(library) if library else None
    return _threads.decoder


def _forget() -> None:
  """Lets the next image begin with a new decoder.

  After some damaged headers it would refuse whatever follows.
  """
  del _threads.decoder


@functools.cache
def _library() -> Any:
  """Returns the TurboJPEG 3 of the wheel or of the system, None if none is."""
  paths = []
  try:
    for file in importlib.metadata.files('turbojpeg') or ():
      if file.name.startswith(('libturbojpeg', 'turbojpeg.dll')):
        paths.append(str(file.locate()))
  except importlib.metadata.PackageNotFoundError:
    pass
  paths += [x for x in (ctypes.util.find_library('turbojpeg'),) if x]
  for path in paths:
    try:
      return _declare(ctypes.CDLL(path))
    except (OSError, AttributeError):  # Not loadable, or older than 3.
      continue
  return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
  pointer, number = ctypes.c_void_p, ctypes.c_int
  bytes_, size = ctypes.c_char_p, ctypes.c_size_t
  for name, result, *arguments in (
    ('tj3Init', pointer, number),
    ('tj3Destroy', None, pointer),
    ('tj3Get', number, pointer, number),
    ('tj3DecompressHeader', number, pointer, bytes_, size),
    ('tj3SetScalingFactor', number, pointer, _Scale),
    ('tj3SetCroppingRegion', number, pointer, _Rectangle),
    (
      'tj3Decompress8', number, pointer, bytes_, size, pointer, number, number,
    ),
  ):  # fmt: skip
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
  return library

"""Images in one file, decoded or encoded anew, so that training reads fast.

A pack holds the images of a split by position: `images.bin`, where each begins
in it (`offsets.npy`) and how large it is (`sizes.npy`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from jaxprog import errors, files
from jaxprog.data import jpeg, parts, preprocess, remote
from jaxprog.stages import Storage

# Of which the size of a pack is guessed before it is written.
_SAMPLE = 64
# Raised whenever some image would be decoded otherwise.
_DECODING = 2


@dataclasses.dataclass(frozen=True)
class Pack:
  """The images of a split; reading is thread-safe. Can be pickled.

  A file that could not be decoded when the pack was written is empty here.
  """

  path: pathlib.Path
  kind: str
  # Of all images, as pack.json has it.
  sha256: str

  @property
  def name(self) -> str:
    """What it adds to the version of the dataset: raw.256."""
    return self.path.name.partition('+')[2]

  @property
  def paths(self) -> tuple[str, ...]:
    """What is read of it."""
    names = 'images.bin', 'offsets.npy', 'sizes.npy'
    return tuple(str(self.path / x) for x in names)

  def fetch(self, progress: parts.Progress | None = None) -> None:
    """Brings what is in a bucket alone; it must come before it is read.

    Raises:
      UserError: if that cannot be, or another pack has taken its place.
    """
    with self._unchanged():
      remote.fetch(self.paths, progress)

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """Where each image begins, int64, and the end of the last."""
    return self._load('offsets.npy')

  @functools.cached_property
  def sizes(self) -> np.ndarray:
    """Width and height of each image, int32."""
    return self._load('sizes.npy')

  @functools.cached_property
  def _file(self) -> int:
    with self._unchanged():
      return os.open(self.path / 'images.bin', os.O_RDONLY | os.O_CLOEXEC)

  def _load(self, name: str) -> np.ndarray:
    with self._unchanged():
      return np.load(self.path / name, allow_pickle=False)

  def _unchanged(self) -> contextlib.AbstractContextManager[None]:
    def is_same() -> bool:
      return _read_info(self.path).get('sha256') == self.sha256

    return remote.unchanged(self.path, is_same)

  def __getitem__(self, position: int) -> preprocess.Encoded:
    start, stop = self.offsets[position : position + 2].tolist()
    if self.kind != 'raw' or start == stop:
      return os.pread(self._file, stop - start, start)
    width, height = self.sizes[position].tolist()

    def read_rows(top: int, bottom: int) -> np.ndarray:
      # Not mapped: a page fault would hold the interpreter's lock.
      row = 3 * width
      rows = os.pread(self._file, (bottom - top) * row, start + top * row)
      return np.frombuffer(rows, np.uint8).reshape(bottom - top, width, 3)

    return preprocess.Pixels(width, height, read_rows)

  def __getstate__(self) -> dict[str, object]:
    """Leaves out what is open."""
    return {'path': self.path, 'kind': self.kind, 'sha256': self.sha256}


def open_pack(path: pathlib.Path, fingerprint: str) -> Pack | None:
  """Returns the pack at `path`, None if there is none of that dataset."""
  info = _read_info(path)
  made_of = info.get('fingerprint'), info.get('decoding')
  if made_of != (fingerprint, _DECODING):
    return None
  return Pack(path, info['kind'], info.get('sha256', ''))


def _read_info(path: pathlib.Path) -> dict[str, Any]:
  return files.read_object(path / 'pack.json') or {}


def is_intact(path: pathlib.Path) -> bool:
  """Returns whether the images are those that were written, to the bit."""
  info = _read_info(path)
  try:
    Pack(path, info['kind'], info['sha256']).fetch()
    return files.digest(path / 'images.bin') == info['sha256']
  except (OSError, KeyError):
    return False


def write_pack(
  path: pathlib.Path,
  read: Callable[[int], bytes],
  count: int,
  storage: Storage,
  *,
  fingerprint: str = '',
  progress: Callable[[int, int], None] | None = None,
) -> None:
  """Writes the images `read(0)` to `read(count - 1)` as a pack at `path`.

  What is interrupted leaves nothing that looks finished. One that another
  process has written meanwhile stays.

  Raises:
    UserError: if they need more room than there is.
  """
  temporary = path.with_name(f'incomplete.{uuid.uuid4().hex}')
  temporary.mkdir(parents=True)
  convert = functools.partial(_convert, read, storage)
  try:
    _check_room(path, convert, count)
    digest = _write_images(temporary, convert, count, progress)
    files.write_json(
      temporary / 'pack.json',
      {
        **storage._asdict(),
        'count': count,
        'fingerprint': fingerprint,
        'decoding': _DECODING,
        'sha256': digest,
      },
    )
    temporary.rename(path)
  except OSError:
    if not path.is_dir():
      raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write_images(
  folder: pathlib.Path,
  convert: Callable[[int], tuple[tuple[int, int], bytes]],
  count: int,
  progress: Callable[[int, int], None] | None,
) -> str:
  """Writes the images and where each one is; returns their SHA-256."""
  offsets = np.zeros(count + 1, np.int64)
  sizes = np.zeros((count, 2), np.int32)
  digest = hashlib.sha256()
  with open(folder / 'images.bin', 'wb') as file:
    found = parts.told(parts.in_order(convert, range(count)), count, progress)
    for i, (size, data) in enumerate(found):
      file.write(data)
      digest.update(data)
      sizes[i], offsets[i + 1] = size, offsets[i] + len(data)
    file.flush()
    os.fsync(file.fileno())
  np.save(folder / 'offsets.npy', offsets)
  np.save(folder / 'sizes.npy', sizes)
  return digest.hexdigest()


def _convert(
  read: Callable[[int], bytes], storage: Storage, position: int
) -> tuple[tuple[int, int], bytes]:
  """Returns an image's width, height and bytes; none if it is damaged."""
  original = read(position)
  try:
    image = Image.fromarray(preprocess.decode(original))
  except preprocess.BadImageError:
    return (0, 0), b''
  short = min(image.size)
  small = storage.kind == 'jpeg' and short <= storage.size
  if small and jpeg.read_header(original):
    return image.size, original  # To encode it again would only cost.
  if storage.size and short > storage.size:
    scaled = [round(x * storage.size / short) for x in image.size]
    image = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
  if storage.kind == 'raw':
    return image.size, image.tobytes()
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=storage.quality)
  return image.size, file.getvalue()


def _check_room(
  path: pathlib.Path,
  convert: Callable[[int], tuple[tuple[int, int], bytes]],
  count: int,
) -> None:
  sample = range(0, count, max(1, count // _SAMPLE))
  mean = sum(len(convert(i)[1]) for i in sample) / max(1, len(sample))
  need, free = int(1.05 * mean * count), shutil.disk_usage(path.parent).free
  if need > free:
    raise errors.UserError(
      f'{path.name} needs {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.',
      str(path.parent),
      "Choose a smaller storage, such as 'raw:256' or 'jpeg:512'.",
    )

"""What lies in a folder: images, folders, and what is neither.

Of names that begin with a dot nothing is seen, anywhere: macOS leaves
._NAME.jpg beside NAME.jpg, Jupyter .ipynb_checkpoints.
"""

import collections
import hashlib
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Those of preprocess.FORMATS, but for .pfm: its floats have no known range.
SUFFIXES = frozenset(
  (
    *('.jpeg', '.jpg', '.jpe', '.jfif', '.avif', '.avifs', '.webp'),
    *('.jp2', '.j2c', '.j2k', '.jpc', '.jpf', '.jpx'),
    *('.png', '.apng', '.gif', '.bmp', '.tif', '.tiff'),
    *('.pbm', '.pgm', '.pnm', '.ppm'),
  )
)
# Files without such a suffix are images if they begin so; the text that may
# begin like a BMP or a PPM is none.
_MAGIC = (
  b'\xff\xd8\xff',
  b'\x89PNG\r\n\x1a\n',
  b'GIF87a',
  b'GIF89a',
  b'II*\0',
  b'MM\0*',
  b'\0\0\0\x0cjP  \r\n\x87\n',
  b'\xff\x4f\xff\x51',
)
_MAGIC_AT_4 = (b'ftypavif', b'ftypavis')
# Kinds of entries; others are named by their suffix.
IMAGE, FOLDER, LOST, SPECIAL = 'image', 'folder', 'broken link', 'special file'
# Kinds, and names of each, that are shown.
_SHOWN_KINDS, _SHOWN_NAMES = 6, 3


class Entry(NamedTuple):
  """What stands under one name."""

  name: str
  # IMAGE, FOLDER, LOST, SPECIAL, or what suffix it has.
  kind: str
  size: int = 0
  # When it was last written to, in ns.
  time: int = 0
  is_link: bool = False


class LeftOut(NamedTuple):
  """Something that was not taken for an image, and where it lies."""

  kind: str
  path: str


def scan(folder: str | os.PathLike[str]) -> list[Entry]:
  """Returns what lies in a folder, sorted by name.

  Raises:
    OSError: if the folder cannot be listed.
  """
  with os.scandir(folder) as found:
    entries = [_look(x) for x in found if not x.name.startswith('.')]
  return sorted(entries)


def _look(found: os.DirEntry[str]) -> Entry:
  is_link = found.is_symlink()
  try:
    seen = found.stat()
  except OSError:  # A link to nothing, or to itself.
    return Entry(found.name, LOST, is_link=is_link)
  if stat.S_ISDIR(seen.st_mode):
    kind = FOLDER
  elif not stat.S_ISREG(seen.st_mode):  # A pipe would be waited for.
    kind = SPECIAL
  else:
    suffix = os.path.splitext(found.name)[1].lower()
    known = suffix in SUFFIXES or _begins_as_image(found.path)
    kind = IMAGE if known else suffix or 'no suffix'
  return Entry(found.name, kind, seen.st_size, seen.st_mtime_ns, is_link)


def _begins_as_image(path: str) -> bool:
  try:
    with open(path, 'rb') as file:
      start = file.read(12)
  except OSError:
    return False
  return (
    start.startswith(_MAGIC)
    or start[4:].startswith(_MAGIC_AT_4)
    or (start.startswith(b'RIFF') and start.endswith(b'WEBP'))
  )


def walk(root: pathlib.Path, left_out: list[LeftOut]) -> Iterator[pathlib.Path]:
  """Yields the images of a folder and of those below it, links not followed.

  Adds what is none, and the folders that cannot be listed, to `left_out`.
  """
  below = [root]
  while below:
    folder = below.pop()
    try:
      entries = scan(folder)
    except OSError as e:
      left_out.append(LeftOut(e.strerror or str(e), str(folder)))
      continue
    for entry in entries:
      path = folder / entry.name
      if entry.kind == IMAGE:
        yield path
      elif entry.kind == FOLDER and not entry.is_link:
        below.append(path)
      else:
        left_out.append(LeftOut(entry.kind, str(path.relative_to(root))))


def is_utf8(name: str) -> bool:
  """Returns whether a name can be written as text."""
  try:
    name.encode()
  except UnicodeEncodeError:
    return False
  return True


def is_storable(name: str) -> bool:
  """Returns whether a class is the same after it was written and read.

  tfds keeps a name a line and strips what it reads; our own lists have a tab
  between names, and other programs break lines where `splitlines` does.
  """
  if not is_utf8(name) or '\t' in name:
    return False
  return [x.strip() for x in name.splitlines() if x.strip()] == [name]


def summarise(entries: Iterable[Entry]) -> str:
  """Returns a hash of the names, sizes and times of the images."""
  images = [(x.name, x.size, x.time) for x in entries if x.kind == IMAGE]
  return hashlib.sha256(repr(images).encode()).hexdigest()[:16]


def look(path: str | os.PathLike[str]) -> str:
  """Returns `summarise` of a folder, or of a file that holds images.

  Raises:
    OSError: if there is neither.
  """
  if os.path.isdir(path):
    return summarise(scan(path))
  seen = os.stat(path)
  name = os.path.basename(path)
  return summarise([Entry(name, IMAGE, seen.st_size, seen.st_mtime_ns)])


def describe(left_out: Iterable[LeftOut]) -> str:
  """Returns how many of which kind were left out, with the first of each."""
  by_kind = collections.defaultdict(list)
  for kind, path in left_out:
    by_kind[kind].append(path)
  kinds = sorted(by_kind.items(), key=lambda x: (-len(x[1]), x[0]))
  parts = [
    f'{len(paths):,} x {kind} ({", ".join(sorted(paths)[:_SHOWN_NAMES])}'
    f'{", ..." * (len(paths) > _SHOWN_NAMES)})'
    for kind, paths in kinds[:_SHOWN_KINDS]
  ]
  rest = sum(len(paths) for _, paths in kinds[_SHOWN_KINDS:])
  return ', '.join(parts) + (f', and {rest:,} of other kinds' if rest else '')

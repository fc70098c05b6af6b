"""Lists beside raw images, as their publishers write them: classes, labels.

Text is UTF-8, or UTF-16 with a byte order mark. A list that says two things of
one file or class is refused.
"""

import codecs
import collections
import hashlib
import importlib.resources
import io
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from jaxprog import errors
from jaxprog.data import archives, builders

# Tiny ImageNet's classes.
CLASSES = 'wnids.txt'
# Where ILSVRC's development kit, or what of it is needed, lies.
_KITS = ('ILSVRC2012_devkit_t12/data', 'devkit/data', 'data', '')
_KIT_ARCHIVE = 'ILSVRC2012_devkit_t12.tar.gz'
# It numbers classes; the table of later years is text.
_NUMBERS = 'ILSVRC2012_validation_ground_truth.txt'
_TABLES = ('meta.mat', 'map_clsloc.txt')
# A WNID a line, in the order of the names, as TensorFlow publishes it.
_ORDERS = (
  'imagenet_2012_validation_synset_labels.txt',
  'ILSVRC2012_validation_synset_labels.txt',
)
# The same in tfds.
_TFDS = ('tensorflow_datasets', 'datasets/imagenet2012/validation_labels.txt')
_ILSVRC_NAME = re.compile(r'ILSVRC2012_val_\d{8}\.JPEG', re.ASCII)
# Kaggle's folder of ImageNet lies in ILSVRC/, its lists beside that.
KAGGLE = pathlib.PurePath('Data/CLS-LOC')


class Lists:
  """Reads the lists of a raw folder, and remembers what they said.

  Paths are relative to the raw folder. What cannot be read or understood
  raises UserError.
  """

  def __init__(self, root: pathlib.Path):
    self._root = root
    # SHA-256 of each list that was read.
    self.sums: dict[str, str] = {}
    # That which has named the classes of flat images, '' if none had to.
    self.labels_from = ''
    # WNID -> name, of the development kit if that was read.
    self.kit_names: dict[str, str] = {}
    is_kaggle = any(
      x.parts[-2:] == KAGGLE.parts for x in (root.absolute(), root.resolve())
    )
    self._places = ('', '../../../') if is_kaggle else ('',)

  def read_classes(self) -> list[str] | None:
    """Returns the classes of wnids.txt, sorted, None if there is none."""
    if self._find(CLASSES) is None:
      return None
    where, lines = str(self._root / CLASSES), self._read_lines(CLASSES)
    if not lines:
      raise errors.UserError(f'{CLASSES} is empty.', where, builders.AGAIN)
    line, count = collections.Counter(lines).most_common(1)[0]
    if count > 1:
      raise errors.UserError(
        f'{line!r} stands twice in {CLASSES}.',
        where,
        'One of the two must go, or is another class.',
      )
    return sorted(lines)

  def read_names(self) -> dict[str, str]:
    """Returns wnid -> its first name for people, where a list has them."""
    is_tiny = self._find(CLASSES) is not None
    name = self._find('words.txt' if is_tiny else 'LOC_synset_mapping.txt')
    if name is None:
      return {}
    # WNID NAME, OTHER NAME
    rows = (line.split(None, 1) for line in self._read_lines(name))
    return self._read_pairs(
      name, ((x[0], _first(x[1])) for x in rows if len(x) == 2)
    )

  def read_labels(self, folder: str, names: Sequence[str]) -> Mapping[str, str]:
    """Returns file name -> wnid of the flat images in `folder`.

    `names` are theirs, sorted. The first list that is there is taken: FILE WNID
    (Tiny ImageNet's, or val_labels.txt), Kaggle's solution, a WNID a line in
    the order of the names, or the development kit's numbers with a table of
    them. Of ILSVRC's own names tfds knows the classes, too.
    """
    annotations = f'{os.path.dirname(folder) or folder}/val_annotations.txt'
    is_tiny = self._find(CLASSES) is not None
    for name in (annotations, 'val_labels.txt'):
      if self._find(name) or (is_tiny and name == annotations):
        return self._named(name, self._read_files(name))
    if solution := self._find('LOC_val_solution.csv'):
      return self._named(solution, self._read_solution(solution))
    for order in filter(self._find, _ORDERS):
      wnids = self._read_lines(order)
      if len(names) != len(wnids):
        raise errors.UserError(
          f'{len(wnids)} labels for {len(names)} images.',
          f'{self._root / order}, {self._root / folder}',
        )
      return self._named(order, dict(zip(names, wnids, strict=True)))
    wnids = self._read_kit()
    if not wnids and all(map(_ILSVRC_NAME.fullmatch, names)):
      wnids = self._read_tfds()
    if not wnids:
      raise errors.UserError(
        f'The {folder} folder has neither class folders nor a list of labels.',
        str(self._root / folder),
        f'Put {_KIT_ARCHIVE}, LOC_val_solution.csv, val_labels.txt (lines: '
        f'FILE WNID) or {_ORDERS[0]} into {self._root}.',
      )
    files = (f'ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, len(wnids) + 1))
    return dict(zip(files, wnids, strict=True))

  def _named(self, name: str, labels: dict[str, str]) -> dict[str, str]:
    self.labels_from = os.path.basename(name)
    return labels

  def _read_files(self, name: str) -> dict[str, str]:
    return self._read_pairs(name, (x.split() for x in self._read_lines(name)))

  def _read_solution(self, name: str) -> dict[str, str]:
    """Returns what Kaggle says: ImageId,PredictionString: the wnid, boxes."""
    # Spreadsheets write lines of commas.
    lines = (x.replace(',', ' ', 1).split() for x in self._read_lines(name))
    rows = [x for x in lines if x]
    if rows and rows[0][0] == 'ImageId':
      rows = rows[1:]
    return self._read_pairs(name, ([f'{x[0]}.JPEG', *x[1:]] for x in rows))

  def _read_kit(self) -> list[str]:
    """Returns the wnid of each image as the development kit has it, in order.

    Empty if it is not there.
    """
    kit = self._find_kit()
    table = next((x for x in _TABLES if x in kit), None)
    if _NUMBERS not in kit or table is None:
      return []
    (numbers_name, numbers), (name, data) = kit[_NUMBERS], kit[table]
    is_text = table != 'meta.mat'
    synsets = (_read_map if is_text else _read_meta)(data, self._root / name)
    lines = _decode(numbers, self._root / numbers_name).split()
    for line in lines:
      if not line.isdecimal() or int(line) not in synsets:
        raise errors.UserError(
          f'{os.path.basename(name)} has no class {line!r}.',
          f'{self._root / name}, {self._root / numbers_name}',
          'Are both of one development kit?',
        )
    self.labels_from = f'{numbers_name} and {name}'
    self.kit_names = {x: _first(words) for x, words in synsets.values()}
    return [synsets[int(line)][0] for line in lines]

  def _find_kit(self) -> dict[str, tuple[str, bytes]]:
    """Returns the kit's files that are there: name -> path and what it says."""
    wanted = (_NUMBERS, *_TABLES)
    found: dict[str, tuple[str, bytes]] = {}
    for folder in _KITS:
      for name in wanted:
        path = os.path.join(folder, name)
        if name not in found and self._find(path):
          found[name] = path, self._read(path)
    if _NUMBERS not in found and self._find(_KIT_ARCHIVE):
      self._read(_KIT_ARCHIVE)
      archive = self._root / _KIT_ARCHIVE
      for member, data in archives.read_files(archive, wanted).items():
        name = os.path.basename(member)
        found.setdefault(name, (f'{_KIT_ARCHIVE}/{member}', data))
    return found

  def _read_tfds(self) -> list[str]:
    """Returns the same as tfds has it, where it has."""
    package, name = _TFDS
    file = importlib.resources.files(package) / name
    if not file.is_file():
      return []
    self.labels_from = f"tfds's {name}"
    return file.read_text().split()

  def _find(self, name: str) -> str | None:
    paths = (x + name for x in self._places)
    return next((x for x in paths if os.path.lexists(self._root / x)), None)

  def _read_pairs(
    self, name: str, rows: Iterable[Sequence[str]]
  ) -> dict[str, str]:
    """Returns the first word of each row -> its second."""
    pairs: dict[str, str] = {}
    where = str(self._root / name)
    for row in rows:
      if len(row) < 2:
        what = f'A line should name a file and a WNID, not {row[0]!r} alone.'
        advice = 'Complete the line, or remove it.'
        raise errors.UserError(what, where, advice)
      if pairs.setdefault(row[0], row[1]) != row[1]:
        what = f'{row[0]} is both {pairs[row[0]]} and {row[1]}.'
        raise errors.UserError(what, where, 'Remove the wrong line.')
    return pairs

  def _read_lines(self, name: str) -> list[str]:
    """Returns the lines of a text that are not blank, stripped."""
    lines = _decode(self._read(name), self._root / name).split('\n')
    return [line.strip() for line in lines if line.strip()]

  def _read(self, name: str) -> bytes:
    file = self._root / name
    try:
      if file.exists() and not file.is_file():  # A pipe would be waited for.
        raise OSError(0, 'it is no file')
      data = file.read_bytes()
    except OSError as e:
      raise builders.unreadable(file, e) from e
    self.sums[name] = hashlib.sha256(data).hexdigest()
    return data


def _first(words: str) -> str:
  return words.split(',')[0]


def _read_meta(data: bytes, where: pathlib.Path) -> dict[int, tuple[str, str]]:
  """Returns number -> wnid and names, of the development kit's meta.mat."""
  from scipy import io as scipy_io  # Takes a while.

  try:
    synsets = scipy_io.loadmat(io.BytesIO(data), squeeze_me=True)['synsets']
    return {
      int(x['ILSVRC2012_ID']): (str(x['WNID']), str(x['words']))
      for x in synsets.ravel()
    }
  except Exception as e:  # scipy raises whatever it stumbles over.
    raise errors.UserError(
      f'{where.name} cannot be read: {type(e).__name__}.',
      str(where),
      builders.AGAIN,
    ) from e


def _read_map(data: bytes, where: pathlib.Path) -> dict[int, tuple[str, str]]:
  """Returns number -> wnid and name, from lines 'WNID NUMBER NAME'."""
  rows = [x.split() for x in _decode(data, where).split('\n') if x.strip()]
  for row in rows:
    if len(row) != 3 or not row[1].isdecimal():
      raise errors.UserError(
        f'A line should be a WNID, a number and a name, not {" ".join(row)!r}.',
        str(where),
        builders.AGAIN,
      )
  return {int(x[1]): (x[0], x[2].replace('_', ' ')) for x in rows}


def _decode(data: bytes, file: pathlib.Path) -> str:
  is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  try:
    text = data.decode('utf-16' if is_utf16 else 'utf-8-sig')
    line = text.count('\n', 0, text.find('\0')) if '\0' in text else -1
  except UnicodeDecodeError as e:
    line = data.count(b'\n', 0, e.start)
  if line < 0:
    return text
  raise errors.UserError(
    f'{file.name} is not text in UTF-8: line {line + 1}.',
    str(file),
    'Save it in UTF-8, or in UTF-16 with a byte order mark.',
  )

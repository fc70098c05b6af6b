"""Raw folders as their sources ship them, and the tfds builder over them.

A layout function lists the images of a raw folder and checks its classes; the
builder writes what it lists into ArrayRecord. Nothing here imports TensorFlow.
"""

import codecs
import collections
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import tensorflow_datasets as tfds

from jaxprog import errors, named
from jaxprog.data import folders, index, parts

AGAIN = 'Is the folder complete? Unpack or copy it again.'
# The splits' names in every prepared dataset that comes from here.
TRAIN, EVAL = 'train', 'validation'


class Held(Protocol):
  """An image in a file of many, as `archives.Place` is; any thread reads it."""

  @property
  def archive(self) -> pathlib.Path:
    """The file."""

  @property
  def size(self) -> int:
    """Its bytes; where only reading tells them, the mean of some."""

  def read_bytes(self) -> bytes:
    """Returns its bytes, or raises OSError."""


class RawImage(NamedTuple):
  """One image before it is prepared."""

  file_name: str
  wnid: str
  # The encoded bytes themselves, or what holds them.
  data: bytes | pathlib.Path | Held

  def read(self) -> bytes:
    """Returns the encoded bytes.

    Raises:
      UserError: if the file cannot be read.
    """
    if isinstance(self.data, bytes):
      return self.data
    data = self.data
    try:
      return data.read_bytes()
    except OSError as e:
      path = data if isinstance(data, pathlib.Path) else data.archive
      raise unreadable(path, e) from e

  @property
  def size(self) -> int:
    """The number of encoded bytes."""
    match self.data:
      case bytes():
        return len(self.data)
      case pathlib.Path():
        return self.data.stat().st_size
    return self.data.size

  @property
  def container(self) -> pathlib.Path | None:
    """The folder or archive that holds it, if one does."""
    match self.data:
      case bytes():
        return None
      case pathlib.Path():
        return self.data.parent
    return self.data.archive


class Looks(NamedTuple):
  """How a raw folder looked when it was listed; paths are below it."""

  # When each folder or tar was last written to, in ns.
  times: dict[str, int]
  # SHA-256 of each list of classes, labels or names.
  lists: dict[str, str]
  # Hash of the names, sizes and times of each folder's images, or of a tar.
  images: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Raw:
  """The images of one raw dataset; listed, not read."""

  root: str
  # Sorted; the label of an image is the position of its wnid.
  classes: tuple[str, ...]
  class_names: tuple[str, ...]
  num_images: int
  # Changes with any image's path or size, not with where the folder lies.
  fingerprint: str
  images: Callable[[str], Iterable[RawImage]]
  looks: Looks
  # What else lies there.
  left_out: tuple[folders.LeftOut, ...]
  # Whether the images can only be read in the order in which they are listed.
  in_order: bool = False


class _Info(tfds.core.DatasetInfo):
  def initialize_from_bucket(self) -> None:
    """Looks for nothing: tfds would leave an empty temporary folder."""


class Images(tfds.core.GeneratorBasedBuilder):
  """Writes a `Raw` as records of image, label, file_name and wnid."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self,
    dataset: str,
    raw: Raw,
    data_dir: pathlib.Path,
    config: str = '',
    progress: parts.Progress | None = None,
  ):
    self.name = prepared_name(dataset)
    self._raw, self._progress, self._done = raw, progress, 0
    self._contents = hashlib.sha256()
    super().__init__(
      data_dir=data_dir / 'prepared',
      config=tfds.core.BuilderConfig(name=config) if config else None,
      file_format='array_record',
    )
    # What was written, record by record.
    self.index = index.Writer(self.info.file_format)

  def _info(self) -> tfds.core.DatasetInfo:
    raw = self._raw
    return _Info(
      builder=self,
      description=f'{raw.num_images:,} images in {len(raw.classes):,} classes',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(),
          'label': tfds.features.ClassLabel(names=raw.classes),
          'file_name': tfds.features.Text(),
          'wnid': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
      metadata=tfds.core.MetadataDict(
        fingerprint=raw.fingerprint,
        class_names=list(raw.class_names),
        left_out=folders.describe(raw.left_out),
      ),
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in (TRAIN, EVAL)}

  def _example_writer(self) -> index.Writer:
    return self.index

  def _log_download_bytes(self) -> None:
    """Says nothing: `progress` does."""

  def _log_download_done(self) -> None:
    """Says nothing: `progress` does."""

  def _generate_examples(
    self, split: str
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for image in self._raw.images(split):
      encoded = image.read()
      self._contents.update(hashlib.sha256(encoded).digest())
      yield (
        f'{image.wnid}/{image.file_name}',
        {
          'image': io.BytesIO(encoded),
          'label': image.wnid,
          'file_name': image.file_name,
          'wnid': image.wnid,
        },
      )
      self._done += 1
      if self._progress:
        self._progress(self._done, self._raw.num_images)
    if self._raw.looks.images:  # Not what this Pillow makes of digits.
      self.info.metadata['contents'] = self._contents.hexdigest()


def prepared_name(dataset: str) -> str:
  """Returns what the folder of a dataset below prepared/ is called."""
  return named.find(dataset).prepared or f'{dataset}_folder'


def list_raw(dataset: str, root: pathlib.Path) -> Raw:
  """Returns the images of the raw folder of a dataset, checked.

  Raises:
    UserError: if the folder is not in order.
  """
  known = named.find(dataset)
  return LAYOUTS[known.layout](root, known.class_names)


def list_class_folders(
  root: pathlib.Path,
  names: Mapping[str, str] = {},
  eval_folders: Sequence[str] = ('val',),
) -> Raw:
  """Returns the images of ROOT/{train,one of eval_folders}/CLASS/*.

  Raises:
    UserError: if a split or a class has no images, or a class of one split is
      not in the other.
  """
  found = _Listing(root)
  evaluation = next((x for x in eval_folders if (root / x).is_dir()), None)
  if evaluation is None:
    found.require(eval_folders[0], also=eval_folders[1:])
    evaluation = eval_folders[0]
  splits = {TRAIN: found.classes('train'), EVAL: found.classes(evaluation)}
  return found.create_raw(sorted(splits[TRAIN]), splits, names)


def list_tiny_imagenet(
  root: pathlib.Path, names: Mapping[str, str] = {}
) -> Raw:
  """Returns the images of a folder laid out like tiny-imagenet-200/.

  The classes are those of wnids.txt, sorted, for that file is not; val/images
  is flat and its labels stand in val/val_annotations.txt. The test images
  have no labels and are left out.
  """
  found = _Listing(root)
  classes = sorted(found.read_list('wnids.txt'))
  train = {wnid: found.images(f'train/{wnid}/images') for wnid in classes}
  for wnid in found.class_folders('train'):
    if wnid not in train:
      raise _unknown_class(wnid, root / 'train', 'wnids.txt')
  labels = found.read_labels('val/val_annotations.txt')
  splits = {TRAIN: train, EVAL: found.group('val/images', labels)}
  names = found.read_names('words.txt') or names
  return found.create_raw(classes, splits, names)


def list_imagenet(root: pathlib.Path, names: Mapping[str, str] = {}) -> Raw:
  """Returns the images of an ImageNet folder; val by class or flat.

  A flat one, as ILSVRC2012_img_val.tar unpacks, needs a list beside it; see
  `_Listing.read_flat_labels`. The devkit's own numbers are no WNIDs and not
  accepted. Class names are read from Kaggle's LOC_synset_mapping.txt, if it is
  there.
  """
  found = _Listing(root)
  names = found.read_names('LOC_synset_mapping.txt') or names
  train = found.classes('train')
  if any(x.kind == folders.FOLDER for x in found.scan('val')):
    val = found.classes('val')
  else:
    val = found.group('val', found.read_flat_labels('val'))
  return found.create_raw(sorted(train), {TRAIN: train, EVAL: val}, names)


def list_digits() -> Raw:
  """Returns scikit-learn's 1,797 handwritten digits, scaled to 0..255, as PNG.

  From the UCI optical recognition test set, 8x8 pixels. The images whose index
  is a multiple of five are for evaluation, whatever classes a stage takes.
  """
  classes = tuple(str(i) for i in range(10))
  return Raw(
    root='scikit-learn',
    classes=classes,
    class_names=classes,
    num_images=1797,
    fingerprint='scikit-learn-digits-1',
    images=_read_digits,
    looks=Looks({}, {}, {}),
    left_out=(),
  )


def _read_digits(split: str) -> Iterator[RawImage]:
  from PIL import Image
  from sklearn import datasets

  digits = datasets.load_digits()
  for i, label in enumerate(digits.target):
    if (i % 5 == 0) == (split == EVAL):
      pixels = (digits.images[i] * (255 / 16)).round().astype('uint8')
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, 'png')
      yield RawImage(f'digit_{i:04d}.png', str(label), file.getvalue())


# By the `layout` of a named dataset.
LAYOUTS: dict[str, Callable[[pathlib.Path, Mapping[str, str]], Raw]] = {
  'any_folder': functools.partial(
    list_class_folders, eval_folders=('val', 'valid', 'validation', 'test')
  ),
  'class_folders': list_class_folders,
  'imagenet': list_imagenet,
  'tiny_imagenet': list_tiny_imagenet,
}

# Class -> (path relative to the raw folder, bytes) of its images.
_Split = dict[str, list[tuple[str, int]]]


class _Listing:
  """Lists what lies in a raw folder, and remembers how that looked.

  Paths are relative to the raw folder. What cannot be listed, read or
  understood raises UserError.
  """

  def __init__(self, root: pathlib.Path):
    self._root = root
    self._looks = Looks({}, {}, {})
    self._left_out: set[folders.LeftOut] = set()

  def create_raw(
    self,
    classes: Sequence[str],
    splits: Mapping[str, _Split],
    names: Mapping[str, str],
  ) -> Raw:
    """Returns what was listed, once it is known to be in order."""
    _check_classes(self._root, classes, splits)
    digest = hashlib.sha256()
    for split, listing in splits.items():
      for wnid in classes:
        for path, size in listing[wnid]:
          digest.update(f'{split}\0{wnid}\0{path}\0{size}\n'.encode())
    return Raw(
      root=str(self._root),
      classes=tuple(classes),
      class_names=tuple(names.get(wnid, wnid) for wnid in classes),
      num_images=sum(len(x) for y in splits.values() for x in y.values()),
      fingerprint=digest.hexdigest(),
      images=functools.partial(_read_listing, self._root, splits),
      looks=self._looks,
      left_out=tuple(sorted(self._left_out)),
    )

  def scan(self, folder: str) -> list[folders.Entry]:
    """Returns what lies in a folder, sorted by name."""
    self.require(folder)
    try:
      # Before it is listed: what is written to meanwhile is looked at again.
      above = folder
      while above not in self._looks.times:
        self._looks.times[above] = (self._root / above).stat().st_mtime_ns
        above = os.path.dirname(above) or '.'
      entries = folders.scan(self._root / folder)
    except OSError as e:
      raise unreadable(self._root / folder, e) from e
    for entry in entries:
      if entry.kind == folders.LOST:
        raise errors.UserError(
          f'{entry.name} is a link to what is not there.',
          str(self._root / folder / entry.name),
          'Is the folder complete? Copy what it links to, or remove the link.',
        )
    return entries

  def class_folders(self, folder: str) -> list[str]:
    """Returns the names of the folders in one that should hold no others."""
    return [x.name for x in self._take(folder, folders.FOLDER)]

  def images(self, folder: str) -> list[tuple[str, int]]:
    """Returns path and size of the images in a folder, sorted."""
    images = self._take(folder, folders.IMAGE)
    self._looks.images[folder] = folders.summarise(images)
    for x in images:
      if not folders.is_utf8(x.name):
        raise errors.UserError(
          f'The name of {x.name} is not UTF-8.',
          str(self._root / folder),
          'Rename it, or all of them: convmv -r -f latin1 -t utf8 --notest .',
        )
    return [(f'{folder}/{x.name}', x.size) for x in images]

  def classes(self, folder: str) -> _Split:
    """Returns the images of each class folder in a folder."""
    return {x: self.images(f'{folder}/{x}') for x in self.class_folders(folder)}

  def group(self, folder: str, labels: Mapping[str, str]) -> _Split:
    """Returns the images of a flat folder by the class that `labels` gives."""
    split: _Split = {}
    names = set()
    for path, size in self.images(folder):
      name = os.path.basename(path)
      names.add(name)
      if name not in labels:
        raise errors.UserError(
          f'{name} has no label.',
          str(self._root / folder),
          'Is the list of labels complete?',
        )
      split.setdefault(labels[name], []).append((path, size))
    self._left_out.update(
      folders.LeftOut('label of no image', f'{folder}/{x}')
      for x in labels
      if x not in names
    )
    return split

  def require(self, folder: str, also: Sequence[str] = ()) -> None:
    """Raises UserError unless a folder is there."""
    if not os.path.isdir(self._root / folder):
      other = f' ({", ".join(also)} would do too)' if also else ''
      what = f'There is no folder {folder}/{other}.'
      raise errors.UserError(what, str(self._root), AGAIN)

  def read_list(self, name: str) -> list[str]:
    """Returns the lines of a list in which each stands once."""
    where, lines = str(self._root / name), self._read_lines(name)
    if not lines:
      raise errors.UserError(f'{name} is empty.', where, AGAIN)
    line, count = collections.Counter(lines).most_common(1)[0]
    if count > 1:
      raise errors.UserError(
        f'{line!r} stands twice in {name}.',
        where,
        'One of the two must go, or is another class.',
      )
    return lines

  def read_labels(self, name: str) -> dict[str, str]:
    """Returns file name -> wnid, from lines 'FILE WNID'."""
    return self._read_pairs(name, (x.split() for x in self._read_lines(name)))

  def read_flat_labels(self, folder: str) -> Mapping[str, str]:
    """Returns file name -> wnid of a flat ImageNet val folder.

    From val_labels.txt, Kaggle's LOC_val_solution.csv, or a synset a line in
    the order of the names, as TensorFlow publishes it.
    """
    if self._has('val_labels.txt'):
      return self.read_labels('val_labels.txt')
    if self._has(solution := 'LOC_val_solution.csv'):
      # ImageId,PredictionString: the wnid, then boxes.
      lines = self._read_lines(solution)
      # Spreadsheets write lines of commas.
      rows = [y for x in lines if (y := x.replace(',', ' ', 1).split())]
      if rows and rows[0][0] == 'ImageId':
        rows = rows[1:]
      return self._read_pairs(
        solution, ([f'{x[0]}.JPEG', *x[1:]] for x in rows)
      )
    orders = (
      'imagenet_2012_validation_synset_labels.txt',
      'ILSVRC2012_validation_synset_labels.txt',
    )
    for order in filter(self._has, orders):
      names = [os.path.basename(path) for path, _ in self.images(folder)]
      wnids = self._read_lines(order)
      if len(names) != len(wnids):
        raise errors.UserError(
          f'{len(wnids)} labels for {len(names)} images.',
          f'{self._root / order}, {self._root / folder}',
        )
      return dict(zip(names, wnids, strict=True))
    raise errors.UserError(
      'The val folder has neither class folders nor a list of labels.',
      str(self._root / folder),
      f'Put val_labels.txt (lines: FILE WNID) or {orders[0]} into '
      f'{self._root}.',
    )

  def read_names(self, name: str) -> dict[str, str]:
    """Returns wnid -> its first name, from lines 'WNID NAME, OTHER NAME'."""
    if not self._has(name):
      return {}
    rows = (line.split(None, 1) for line in self._read_lines(name))
    return self._read_pairs(
      name, ((x[0], x[1].split(',')[0]) for x in rows if len(x) == 2)
    )

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

  def _has(self, name: str) -> bool:
    return os.path.lexists(self._root / name)

  def _read_lines(self, name: str) -> list[str]:
    """Returns the lines of a text that are not blank, stripped."""
    file = self._root / name
    try:
      if file.exists() and not file.is_file():  # A pipe would be waited for.
        raise OSError(0, 'it is no file')
      data = file.read_bytes()
    except OSError as e:
      raise unreadable(file, e) from e
    self._looks.lists[name] = hashlib.sha256(data).hexdigest()
    lines = _decode(data, file).split('\n')
    return [line.strip() for line in lines if line.strip()]

  def _take(self, folder: str, kind: str) -> list[folders.Entry]:
    """Returns what is of one kind in a folder; notes the rest as left out."""
    entries = self.scan(folder)
    self._left_out.update(
      folders.LeftOut(x.kind, f'{folder}/{x.name}')
      for x in entries
      if x.kind != kind
    )
    return [x for x in entries if x.kind == kind]


def _read_listing(
  root: pathlib.Path, splits: Mapping[str, _Split], split: str
) -> Iterator[RawImage]:
  for wnid, images in splits[split].items():
    for path, _ in images:
      yield RawImage(os.path.basename(path), wnid, root / path)


def _check_classes(
  root: pathlib.Path, classes: Sequence[str], splits: Mapping[str, _Split]
) -> None:
  known = set(classes)
  for split, listing in splits.items():
    for wnid in listing:
      if wnid not in known:
        raise _unknown_class(wnid, root, f'the {len(classes)} of training')
    for wnid in classes:
      if not folders.is_storable(wnid):
        raise errors.UserError(
          f"Class '{wnid}' has a name that a text file cannot hold.",
          str(root / 'train' / wnid),
          'Rename the folder: UTF-8, no blank at an end, no tab or line break.',
        )
      if not listing.get(wnid):
        what = f'Class {wnid!r} has no images in the {split} split.'
        raise errors.UserError(what, str(root), AGAIN)
  if not classes:
    raise errors.UserError('There are no class folders.', str(root / 'train'))


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


def unreadable(path: pathlib.Path, error: OSError) -> errors.UserError:
  """Returns what to say of what cannot be read."""
  what = f'{path.name} cannot be read: {error.strerror}.'
  return errors.UserError(what, str(path), AGAIN)


def _unknown_class(
  wnid: str, folder: pathlib.Path, known: str
) -> errors.UserError:
  return errors.UserError(
    f'Class {wnid!r} is not among {known}.',
    str(folder),
    'Remove it, or add its images to both splits.',
  )

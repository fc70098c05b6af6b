"""Raw folders as their sources ship them, and the tfds builders over them.

A layout function lists the images of a raw folder and checks its classes; a
builder writes what it lists into ArrayRecord. Nothing here imports TensorFlow.
"""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from jaxprog import errors
from jaxprog.data import index

# The splits' names in every prepared dataset that comes from here.
TRAIN, EVAL = 'train', 'validation'

# Other files in a class folder are ignored.
IMAGE_SUFFIXES = frozenset(
  ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
)

IMAGENETTE_NAMES = {
  'n01440764': 'tench',
  'n02102040': 'English springer',
  'n02979186': 'cassette player',
  'n03000684': 'chain saw',
  'n03028079': 'church',
  'n03394916': 'French horn',
  'n03417042': 'garbage truck',
  'n03425413': 'gas pump',
  'n03445777': 'golf ball',
  'n03888257': 'parachute',
}


class RawImage(NamedTuple):
  """One image before it is prepared."""

  file_name: str
  wnid: str
  # The encoded bytes themselves, or the file that holds them.
  data: bytes | pathlib.Path


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
  # All below root that hold images, and those that hold these.
  folders: tuple[str, ...]
  images: Callable[[str], Iterable[RawImage]]


class Images(tfds.core.GeneratorBasedBuilder):
  """Writes a `Raw` as records of image, label, file_name and wnid."""

  VERSION = tfds.core.Version('1.0.0')
  # Below data_dir; the first that exists is taken.
  FOLDERS: tuple[str, ...]

  @staticmethod
  def list_raw(root: pathlib.Path) -> Raw:
    """Returns the images of the raw folder `root`, checked."""
    raise NotImplementedError

  def __init__(
    self,
    raw: Raw,
    *,
    data_dir: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
  ):
    self._raw, self._progress, self._done = raw, progress, 0
    super().__init__(
      data_dir=os.fspath(data_dir), file_format='array_record', **kwargs
    )
    # What was written, record by record.
    self.index = index.Writer(self.info.file_format)

  def _info(self) -> tfds.core.DatasetInfo:
    raw = self._raw
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
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
        fingerprint=raw.fingerprint, class_names=list(raw.class_names)
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
      data = image.data
      encoded = data if isinstance(data, bytes) else data.read_bytes()
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


class ImagenetteFolder(Images):
  """Imagenette from imagenette2/, imagenette2-320/ or imagenette2-160/.

  Each holds {train,val}/WNID/*.JPEG, as its archive unpacks.
  """

  FOLDERS = ('imagenette2', 'imagenette2-320', 'imagenette2-160')

  @staticmethod
  def list_raw(root: pathlib.Path) -> Raw:
    """Returns the images below `root`."""
    return list_class_folders(root, names=IMAGENETTE_NAMES)


class TinyImagenetFolder(Images):
  """Tiny ImageNet from tiny-imagenet-200/, as its archive unpacks.

  The classes are those of wnids.txt, sorted, for that file is not; val/images
  is flat and its labels stand in val/val_annotations.txt. The test images
  have no labels and are left out.
  """

  FOLDERS = ('tiny-imagenet-200',)

  @staticmethod
  def list_raw(root: pathlib.Path) -> Raw:
    """Returns the images below `root`."""
    return list_tiny_imagenet(root)


class ImagenetMiniFolder(Images):
  """ImageNet-Mini from imagenet-mini/, laid out as imagenet1k/."""

  FOLDERS = ('imagenet-mini',)

  @staticmethod
  def list_raw(root: pathlib.Path) -> Raw:
    """Returns the images below `root`."""
    return list_imagenet(root)


class Imagenet2012Folder(Images):
  """ImageNet-1k from imagenet1k/{train,val}/WNID/*.JPEG.

  val/ may also be flat, as ILSVRC2012_img_val.tar unpacks, if one of these
  lies in imagenet1k/: val_labels.txt with lines FILE WNID, Kaggle's
  LOC_val_solution.csv, or a list of one WNID a line in the order of the file
  names, as TensorFlow publishes it: imagenet_2012_validation_synset_labels.txt
  or ILSVRC2012_validation_synset_labels.txt. The devkit's own numbers are no
  WNIDs and not accepted.
  """

  FOLDERS = ('imagenet1k',)

  @staticmethod
  def list_raw(root: pathlib.Path) -> Raw:
    """Returns the images below `root`."""
    return list_imagenet(root)


class ImageClassFolder(Images):
  """Any PATH/{train,val}/CLASS/*; val may be called valid, validation, test."""

  FOLDERS = ()

  @staticmethod
  def list_raw(root: pathlib.Path) -> Raw:
    """Returns the images below `root`."""
    return list_class_folders(root, ('val', 'valid', 'validation', 'test'))


class ScikitLearnDigits(Images):
  """The 1,797 handwritten digits inside scikit-learn, 8x8 pixels, as PNG.

  From the UCI optical recognition test set. The images whose index is a
  multiple of five are for evaluation, whatever classes a stage takes.
  """

  FOLDERS = ()

  @staticmethod
  def list_raw(root: pathlib.Path) -> Raw:
    """Returns the digits; they lie in no folder."""
    del root
    return list_digits()


def list_class_folders(
  root: pathlib.Path,
  eval_folders: Sequence[str] = ('val',),
  names: Mapping[str, str] | None = None,
) -> Raw:
  """Returns the images of ROOT/{train,one of eval_folders}/CLASS/*.

  Raises:
    UserError: if a split or a class has no images, or a class of one split is
      not in the other.
  """
  train = _require_folder(root, 'train')
  evaluation = next(
    (root / x for x in eval_folders if (root / x).is_dir()), None
  ) or _require_folder(root, eval_folders[0], also=eval_folders[1:])
  splits = {TRAIN: _list_classes(train), EVAL: _list_classes(evaluation)}
  return _create_raw(root, sorted(splits[TRAIN]), splits, names)


def list_tiny_imagenet(root: pathlib.Path) -> Raw:
  """Returns the images of a folder laid out like tiny-imagenet-200/."""
  classes = sorted(_read_lines(root / 'wnids.txt'))
  train = {
    wnid: _list_images(_require_folder(root, f'train/{wnid}/images'), root)
    for wnid in classes
  }
  for folder in sorted(os.listdir(root / 'train')):
    if folder not in train and (root / 'train' / folder).is_dir():
      raise _unknown_class(folder, root / 'train', 'wnids.txt')
  annotations = root / 'val' / 'val_annotations.txt'
  labels = dict(_split_line(x, annotations) for x in _read_lines(annotations))
  flat = _group_flat(_require_folder(root, 'val/images'), labels, root)
  names = _read_names(root / 'words.txt')
  return _create_raw(root, classes, {TRAIN: train, EVAL: flat}, names)


def list_imagenet(root: pathlib.Path) -> Raw:
  """Returns the images of an ImageNet folder; val by class or flat.

  Class names are read from Kaggle's LOC_synset_mapping.txt, if it is there.
  """
  names = _read_names(root / 'LOC_synset_mapping.txt')
  val = _require_folder(root, 'val')
  if any(x.is_dir() for x in os.scandir(val)):
    return list_class_folders(root, names=names)
  train = _list_classes(_require_folder(root, 'train'))
  flat = _group_flat(val, _read_flat_labels(root, val), root)
  return _create_raw(root, sorted(train), {TRAIN: train, EVAL: flat}, names)


def list_digits() -> Raw:
  """Returns scikit-learn's digits, scaled from 0..16 to 0..255."""
  classes = tuple(str(i) for i in range(10))
  return Raw(
    root='scikit-learn',
    classes=classes,
    class_names=classes,
    num_images=1797,
    fingerprint='scikit-learn-digits-1',
    folders=(),
    images=_read_digits,
  )


def _read_digits(split: str) -> Iterator[RawImage]:
  from PIL import Image
  from sklearn import datasets

  digits = datasets.load_digits()
  for i, (image, label) in enumerate(
    zip(digits.images, digits.target, strict=True)
  ):
    if (i % 5 == 0) == (split == EVAL):
      pixels = (image * (255 / 16)).round().astype('uint8')
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, 'png')
      yield RawImage(f'digit_{i:04d}.png', str(label), file.getvalue())


# Class -> (path relative to the raw folder, bytes) of its images.
_Listing = dict[str, list[tuple[str, int]]]


def _create_raw(
  root: pathlib.Path,
  classes: Sequence[str],
  splits: Mapping[str, _Listing],
  names: Mapping[str, str] | None,
) -> Raw:
  _check_classes(root, classes, splits)
  names = names or {}
  digest = hashlib.sha256()
  folders: set[pathlib.PurePath] = set()
  count = 0
  for split, listing in splits.items():
    for wnid in classes:
      for path, size in listing[wnid]:
        digest.update(f'{split}\0{wnid}\0{path}\0{size}\n'.encode())
        count += 1
      folders.update(pathlib.PurePath(listing[wnid][0][0]).parents)
  return Raw(
    root=str(root),
    classes=tuple(classes),
    class_names=tuple(names.get(wnid, wnid) for wnid in classes),
    num_images=count,
    fingerprint=digest.hexdigest(),
    folders=tuple(sorted(map(str, folders))),
    images=functools.partial(_read_listing, root, splits),
  )


def _read_listing(
  root: pathlib.Path, splits: Mapping[str, _Listing], split: str
) -> Iterator[RawImage]:
  for wnid, images in splits[split].items():
    for path, _ in images:
      yield RawImage(os.path.basename(path), wnid, root / path)


def _check_classes(
  root: pathlib.Path, classes: Sequence[str], splits: Mapping[str, _Listing]
) -> None:
  for split, listing in splits.items():
    for wnid in listing:
      if wnid not in classes:
        raise _unknown_class(wnid, root, f'the {len(classes)} of training')
    for wnid in classes:
      if not listing.get(wnid):
        raise errors.UserError(
          f'Class {wnid!r} has no images in the {split} split.',
          str(root),
          'Is the folder complete? Unpack or copy it again.',
        )
  if not classes:
    raise errors.UserError('There are no class folders.', str(root / 'train'))


def _list_classes(folder: pathlib.Path) -> _Listing:
  wnids = sorted(x.name for x in os.scandir(folder) if _is_class(x))
  return {x: _list_images(folder / x, folder.parent) for x in wnids}


def _is_class(entry: os.DirEntry[str]) -> bool:
  return entry.is_dir() and not entry.name.startswith('.')


def _list_images(
  folder: pathlib.Path, root: pathlib.Path
) -> list[tuple[str, int]]:
  """Returns (path below `root`, size) of the images in `folder`, sorted."""
  parent = os.path.relpath(folder, root)
  return sorted(
    (f'{parent}/{x.name}', x.stat().st_size)
    for x in os.scandir(folder)
    if _is_image(x.name)
  )


def _is_image(name: str) -> bool:
  # macOS leaves ._NAME.jpg beside NAME.jpg; they hold no image.
  suffix = os.path.splitext(name)[1].lower()
  return suffix in IMAGE_SUFFIXES and not name.startswith('.')


def _group_flat(
  folder: pathlib.Path, labels: Mapping[str, str], root: pathlib.Path
) -> _Listing:
  """Returns the images of a flat folder by the class that `labels` gives."""
  listing: _Listing = {}
  for path, size in _list_images(folder, root):
    name = os.path.basename(path)
    if name not in labels:
      raise errors.UserError(
        f'{name} has no label.', str(folder), 'Is the list of labels complete?'
      )
    listing.setdefault(labels[name], []).append((path, size))
  return listing


def _read_flat_labels(
  root: pathlib.Path, val: pathlib.Path
) -> Mapping[str, str]:
  """Returns file name -> wnid of a flat ImageNet val folder."""
  if (file := root / 'val_labels.txt').is_file():
    return dict(_split_line(line, file) for line in _read_lines(file))
  if (file := root / 'LOC_val_solution.csv').is_file():
    # ImageId,PredictionString: the wnid, then boxes.
    rows = [re.split('[, ]', x) for x in _read_lines(file)[1:]]
    return {f'{row[0]}.JPEG': row[1] for row in rows}
  orders = (
    'imagenet_2012_validation_synset_labels.txt',
    'ILSVRC2012_validation_synset_labels.txt',
  )
  for file in (root / name for name in orders):
    if file.is_file():
      names = sorted(x.name for x in os.scandir(val) if _is_image(x.name))
      wnids = _read_lines(file)
      if len(names) != len(wnids):
        raise errors.UserError(
          f'{len(wnids)} labels for {len(names)} images.', f'{file}, {val}'
        )
      return dict(zip(names, wnids, strict=True))
  raise errors.UserError(
    'The val folder has neither class folders nor a list of labels.',
    str(val),
    f'Put val_labels.txt (lines: FILE WNID) or {orders[0]} into {root}.',
  )


def _split_line(line: str, file: pathlib.Path) -> tuple[str, str]:
  words = line.split()
  if len(words) < 2:
    raise errors.UserError(
      f'A line should start with FILE and WNID, not {line!r}.', str(file)
    )
  return words[0], words[1]


def _read_names(file: pathlib.Path) -> dict[str, str]:
  """Returns wnid -> its first name, from lines 'WNID NAME, OTHER NAME'."""
  if not file.is_file():
    return {}
  rows = (line.split(None, 1) for line in _read_lines(file))
  return {row[0]: row[1].split(',')[0] for row in rows if len(row) == 2}


def _read_lines(file: pathlib.Path) -> list[str]:
  try:
    lines = file.read_text('utf-8').splitlines()
  except OSError as e:
    raise errors.UserError(
      f'{file.name} cannot be read: {e.strerror}.',
      str(file),
      'Is the folder complete? Unpack or copy it again.',
    ) from e
  return [line.strip() for line in lines if line.strip()]


def _require_folder(
  root: pathlib.Path, name: str, also: Sequence[str] = ()
) -> pathlib.Path:
  folder = root / name
  if not folder.is_dir():
    other = f' ({", ".join(also)} would do too)' if also else ''
    raise errors.UserError(
      f'There is no folder {name}/{other}.',
      str(root),
      'Is the folder complete? Unpack or copy it again.',
    )
  return folder


def _unknown_class(
  wnid: str, folder: pathlib.Path, known: str
) -> errors.UserError:
  return errors.UserError(
    f'Class {wnid!r} is not among {known}.',
    str(folder),
    'Remove it, or add its images to both splits.',
  )

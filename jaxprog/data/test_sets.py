"""Published test sets, read as they unpack: nobody trains on them.

All are about ImageNet's classes. What a network is scored on are the images of
the classes that it knows.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from jaxprog import buckets, errors, files, named
from jaxprog.data import folders, parts, preparation, preprocess, remote, shards
from jaxprog.data.records import Dataset, Records

_AGAIN = 'Is it complete? Unpack the archive again.'
# Pixels at each side of ObjectNet's images that are its red border's, by its
# authors' own loader.
_BORDER = 2
_REAL_NAME = re.compile(r'ILSVRC2012_val_(\d{8})\.\w+', re.ASCII)

# File -> the classes that are right for it.
_Answers = dict[pathlib.Path, Sequence[str]]


class Loaded(NamedTuple):
  """What weights are scored on."""

  # Its labels are positions among the classes of the weights; `eval` holds the
  # images, and its `answers` all that is right where that is more than one.
  dataset: Dataset
  # Bool (classes,), what the network chooses among; None: all that it knows.
  among: np.ndarray | None
  # What there is to say of it.
  notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FileRecords(Records):
  """Images that lie in files of their own; `source` holds none of them."""

  files: tuple[str, ...] = ()
  # Pixels that are cut off at each side.
  border: int = 0

  def original(self, index: int) -> bytes:
    """Returns the encoded image, without its border.

    Raises:
      UserError: if the file cannot be read.
    """
    path = pathlib.Path(self.files[self.positions[index]])
    try:
      encoded = path.read_bytes()
    except OSError as e:
      raise _unreadable(path, e.strerror or str(e)) from e
    return _cut_border(encoded, self.border) if self.border else encoded

  def describe(self, index: int) -> str:
    """Returns folder/file name."""
    return '/'.join(self.files[self.positions[index]].split('/')[-2:])


def load(
  name: str,
  data_dir: pathlib.Path,
  classes: Sequence[str],
  class_names: Sequence[str],
  progress: parts.Progress | None = None,
) -> Loaded:
  """Returns the test set of that name for a network that knows `classes`.

  `progress` is told of images of ImageNet that are prepared for it.

  Raises:
    UserError: if it is not in `data_dir`, not in order, or about other classes.
  """
  known = named.TESTS[name]
  place = _find(name, data_dir)
  records, answers = READERS[known.layout](place, data_dir, progress)
  position = {x: i for i, x in enumerate(classes)}
  right = [[position[x] for x in y if x in position] for y in answers]
  chosen = np.array([bool(x) for x in right], bool)
  if not chosen.any():
    raise errors.UserError(
      f'The weights know no class of {name!r}.',
      f'they know {len(classes):,}: {", ".join(map(repr, classes[:5]))}'
      + (', ...' if len(classes) > 5 else ''),
      'It is about the WordNet ids of ImageNet.',
    )
  table = _to_table([sorted(x) for x in right])
  records = dataclasses.replace(
    records,
    labels=np.array([x[0] if x else -1 for x in right], np.int32),
    classes=tuple(classes),
    answers=table if table.shape[1] > 1 else None,
  ).select(chosen)
  among = None
  if known.masked:
    among = np.isin(np.arange(len(classes)), table[table >= 0])
  fingerprint = files.digest_parts(name, *map(repr, answers))
  dataset = Dataset(
    name=name,
    classes=tuple(classes),
    class_names=tuple(class_names),
    train=records,
    eval=records,
    fingerprint=fingerprint,
  )
  return Loaded(dataset, among, tuple(_notes(name, chosen)))


def _notes(name: str, chosen: np.ndarray) -> list[str]:
  """Returns in what the images differ from those of the published figures."""
  found, published = [], named.TESTS[name].published
  if len(chosen) != published:
    found.append(
      f'{name} has {len(chosen):,} images here; published figures are of '
      f'{published:,}.'
    )
  if left_out := np.count_nonzero(~chosen):
    found.append(
      f'{left_out:,} images of classes that the weights do not know are left '
      'out: published figures are not of such networks.'
    )
  return found


def _find(name: str, data_dir: pathlib.Path) -> pathlib.Path:
  """Returns where a test set lies, brought from a bucket if it is there.

  Raises:
    UserError: saying what is to be downloaded and where to put it.
  """
  known = named.TESTS[name]
  places = [data_dir / x for x in known.places]
  is_file = known.layout == 'real'
  for place in places:
    if not is_file:
      remote.fetch_folder(place)
    elif remote.is_known(place):
      remote.fetch([place])
    if place.exists():
      return place
  raise errors.UserError(
    f'The test set {name!r} is not here.',
    f'looked for {", ".join(map(buckets.shown, places))}',
    f'Download {known.source} and {"put" if is_file else "unpack"} it there.',
  )


def _to_table(right: Sequence[Sequence[int]]) -> np.ndarray:
  """Returns lists of unequal lengths as int32 (n, k), filled up with -1."""
  table = np.full((len(right), max(map(len, right))), -1, np.int32)
  for row, labels in zip(table, right, strict=True):
    row[: len(labels)] = labels
  return table


def read_imagenet_classes() -> list[str]:
  """Returns the 1,000 WordNet ids in the order of their numbers: sorted."""
  path = tfds.core.tfds_path('datasets/imagenet2012/labels.txt')
  return path.read_text().split()


def _list_class_folders(
  root: pathlib.Path, data_dir: pathlib.Path, progress: parts.Progress | None
) -> tuple[Records, list[Sequence[str]]]:
  """Reads ROOT/CLASS/*; a class is its WordNet id or its number.

  Numbers are numbers: in the order of their names 10 would come before 2.
  """
  del data_dir, progress
  classes = read_imagenet_classes()
  found: _Answers = {}
  for entry in _scan(root):
    if entry.kind != folders.FOLDER:
      continue
    wnid = entry.name
    if re.fullmatch(r'\d{1,4}', wnid, re.ASCII) and int(wnid) < len(classes):
      wnid = classes[int(wnid)]
    if wnid not in classes:
      raise errors.UserError(
        f'{entry.name!r} is no class of ImageNet.',
        str(root / entry.name),
        'Folders are WordNet ids, or numbers from 0 to 999 in their order.',
      )
    found |= dict.fromkeys(_list_images(root / entry.name), (wnid,))
  return _to_records(root, found)


def _list_objectnet(
  root: pathlib.Path, data_dir: pathlib.Path, progress: parts.Progress | None
) -> tuple[Records, list[Sequence[str]]]:
  """Reads the images of the ObjectNet classes that ImageNet has, too.

  Its own mappings say which: of a folder's label, names of ImageNet's classes;
  of a name, the line on which it stands, counted from 0; of a line, the place
  among the sorted WordNet ids.
  """
  del data_dir, progress
  mappings = root / 'mappings'
  try:
    labels = _read_json(mappings / 'folder_to_objectnet_label.json')
    to_names = _read_json(mappings / 'objectnet_to_imagenet_1k.json')
    numbers = _read_json(mappings / 'pytorch_to_imagenet_2012_id.json')
    lines = (mappings / 'imagenet_to_label_2012_v2').read_text().splitlines()
    classes = read_imagenet_classes()
    of_line = {line: classes[int(i)] for i, line in numbers.items()}
    wnids = {x.strip(): of_line[i] for i, x in enumerate(lines) if i in of_line}
    right = {
      folder: [wnids[x] for x in to_names[label].split('; ')]
      for folder, label in labels.items()
      if label in to_names
    }
  except OSError as e:
    raise _unreadable(mappings, e.strerror or str(e)) from e
  except (ValueError, KeyError, IndexError, AttributeError, TypeError) as e:
    what = f'The mappings of ObjectNet are not as published: {e!r}.'
    raise errors.UserError(what, str(mappings), _AGAIN) from e
  found: _Answers = {}
  for folder, answers in right.items():
    images = _list_images(root / 'images' / folder)
    found |= dict.fromkeys(images, answers)
  records, all_answers = _to_records(root, found)
  return dataclasses.replace(records, border=_BORDER), all_answers


def _list_real(
  path: pathlib.Path, data_dir: pathlib.Path, progress: parts.Progress | None
) -> tuple[Records, list[Sequence[str]]]:
  """Reads ImageNet's validation images with the labels of ReaL.

  The i-th list of numbers is of ILSVRC2012_val_i, whatever the order of the
  records; images whose list is empty are left out.
  """
  lists, wnids = _read_json(path), read_imagenet_classes()
  records = preparation.load_dataset(
    'imagenet2012', data_dir, progress=progress
  ).eval
  answers: list[Sequence[str]] = []
  for name, label in zip(records.names(), records.labels, strict=True):
    match, own = _REAL_NAME.fullmatch(name), records.classes[label]
    try:
      # Of number 0 there is no list, and not the last one.
      number = int(match[1]) if match else 0
      right = [wnids[i] for i in lists[:number][number - 1]]
    except (LookupError, TypeError) as e:
      raise errors.UserError(
        f'{path.name} says nothing of {name}.',
        str(path),
        'Its lists are of ILSVRC2012_val_00000001.JPEG and so on, in order.',
      ) from e
    # The class that it is shown under comes first.
    answers.append(sorted(right, key=lambda x: x != own))
  chosen = np.array([bool(x) for x in answers], bool)
  return records.select(chosen), [x for x in answers if x]


# By the `layout` of a test set, what lists it: the images, whose labels mean
# nothing yet, and the WordNet ids that are right for each.
READERS: dict[str, Callable[..., tuple[Records, list[Sequence[str]]]]] = {
  'class_folders': _list_class_folders,
  'objectnet': _list_objectnet,
  'real': _list_real,
}


def _list_images(folder: pathlib.Path) -> list[pathlib.Path]:
  return [folder / x.name for x in _scan(folder) if x.kind == folders.IMAGE]


def _scan(folder: pathlib.Path) -> list[folders.Entry]:
  try:
    return folders.scan(folder)
  except OSError as e:
    raise _unreadable(folder, e.strerror or str(e)) from e


def _to_records(
  root: pathlib.Path, found: _Answers
) -> tuple[FileRecords, list[Sequence[str]]]:
  """Returns the images of a folder, without labels."""
  if not found:
    what = f'There are no images in {root.name}.'
    raise errors.UserError(what, str(root), _AGAIN)
  records = FileRecords(
    name='test',
    directory=root,
    source=shards.Shards((str(root), 'test', 0), (), (), {}),
    positions=np.arange(len(found)),
    labels=np.zeros(len(found), np.int32),
    classes=(),
    files=tuple(map(str, found)),
  )
  return records, list(found.values())


def _cut_border(encoded: bytes, border: int) -> bytes:
  """Returns an image without its border, as a PPM: nothing is lost."""
  pixels = preprocess.decode(encoded)[border:-border, border:-border]
  height, width = pixels.shape[:2]
  if not height or not width:
    raise preprocess.BadImageError('there is nothing within its border')
  return b'P6 %d %d 255\n' % (width, height) + pixels.tobytes()


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_bytes())
  except (OSError, ValueError) as e:
    raise _unreadable(path, str(e)) from e


def _unreadable(path: pathlib.Path, reason: str) -> errors.UserError:
  return errors.UserError(
    f'{path.name} cannot be read: {reason}.', str(path), _AGAIN
  )

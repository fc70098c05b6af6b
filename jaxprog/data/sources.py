"""Datasets in files that hold many images: Parquet, and WebDataset's tars.

Which file is of which split says its name, or else that of its folder, as on
the Hugging Face Hub; what an image is called and of which class it is, say
the files.
"""

import collections
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxprog import errors
from jaxprog.data import builders, folders

# Splits, and what says so in the name of a file or a folder; the first that is
# there of those after training is for evaluation.
_SPLITS = {
  builders.TRAIN: 'train|training',
  'validation': 'validation|valid|val|dev',
  'test': 'test|testing|eval|evaluation',
}
# The Hub calls ImageNet's files NAME_WNID.JPEG, and few say more than NAME.
_IMAGENET_NAME = re.compile(
  r'(?P<name>(?P<own>n\d{8})_\d+|ILSVRC2012_(?:val|test)_\d{8})'
  r'(?:_(?P<wnid>n\d{8}))?\.JPEG',
  re.ASCII,
)


class Listed(NamedTuple):
  """What one file holds, in its order."""

  # The name of each image, '' for none.
  names: Sequence[str]
  # Of each image: its number, or the name of its class; '' for none.
  labels: Sequence[int | str]
  # What the numbers stand for, where the file says so.
  class_names: tuple[str, ...]
  images: Callable[[], Iterable[builders.Held]]
  left_out: tuple[folders.LeftOut, ...] = ()


def find_files(
  root: pathlib.Path, suffix: str | tuple[str, ...]
) -> list[pathlib.Path]:
  """Returns the files below a folder that end so, sorted; none is hidden."""
  found = []
  for folder, below, names in os.walk(root, followlinks=True):
    below[:] = sorted(x for x in below if not x.startswith('.'))
    found += [
      pathlib.Path(folder, x)
      for x in names
      if x.lower().endswith(suffix) and not x.startswith('.')
    ]
  return sorted(found)


def list_splits(
  root: pathlib.Path, files: Sequence[pathlib.Path], dataset: str
) -> tuple[dict[str, list[pathlib.Path]], list[folders.LeftOut]]:
  """Returns the files of the two splits, and those of neither.

  Raises:
    UserError: if there are not two, or several datasets.
  """
  found: dict[str, list[pathlib.Path]] = {}
  left_out, others = [], set()
  for file in files:
    path = pathlib.PurePath(os.path.relpath(file, root))
    split = next(filter(None, map(_split_of, reversed(path.parts))), None)
    if split is None:
      left_out.append(folders.LeftOut('of no split', str(path)))
      continue
    found.setdefault(split, []).append(file)
    others.add('/'.join(x for x in path.parent.parts if not _split_of(x)))
  if len(others) > 1:
    first, *_ = names = sorted(x or '.' for x in others)
    raise errors.UserError(
      f'There are {len(names)} datasets: {", ".join(names[:5])}.',
      str(root),
      f'Name the folder of one, such as {first if first != "." else names[1]}.',
    )
  evaluation = next((x for x in list(_SPLITS)[1:] if x in found), None)
  if builders.TRAIN not in found or evaluation is None:
    raise errors.UserError(
      f'{dataset!r} needs files for training and for evaluation; there are '
      f'{", ".join(f"{len(x)} of {k}" for k, x in found.items()) or "none"}.',
      str(root),
      'A file or its folder says train, and validation, val or test.'
      if files
      else _say_what_is_there(root),
    )
  for split in found.keys() - {builders.TRAIN, evaluation}:
    left_out += [folders.LeftOut(f'of {split}', x.name) for x in found[split]]
  splits = {builders.TRAIN: found[builders.TRAIN]}
  return splits | {builders.EVAL: found[evaluation]}, left_out


def _say_what_is_there(root: pathlib.Path) -> str:
  """Returns what another kind of dataset a folder may be."""
  for kind, suffix in (('parquet', '.parquet'), ('wds', '.tar')):
    if find_files(root, suffix):
      return f'It holds {suffix} files: did you mean {kind}:{root}?'
  is_folder = (root / 'train').is_dir()
  meant = f'folder:{root}' if is_folder else 'another folder'
  return f'It holds none of these files: did you mean {meant}?'


def _split_of(name: str) -> str | None:
  for split, words in _SPLITS.items():
    if re.search(rf'(?<![a-z])({words})(?![a-z])', name.lower()):
      return split
  return None


def check_complete(files: Iterable[pathlib.Path]) -> None:
  """Raises UserError where of NAME-00000-of-00005.parquet some are missing."""
  groups = collections.defaultdict(set)
  for file in files:
    if found := re.fullmatch(r'(.*)-(\d+)-of-(\d+)\D*', file.name):
      groups[file.parent, found[1], int(found[3])].add(int(found[2]))
  for (folder, start, count), numbers in groups.items():
    if missing := sorted(set(range(count)) - numbers):
      raise errors.UserError(
        f'{len(missing)} of {count} files {start}-… are missing.',
        f'{folder}, the first is number {missing[0]}',
        'Is the download complete? Fetch them again.',
      )


# Split -> file -> what it holds.
_Splits = Mapping[str, Mapping[pathlib.Path, Listed]]


def create_raw(
  root: pathlib.Path,
  splits: _Splits,
  looks: builders.Looks,
  names: Sequence[str] = (),
  left_out: Iterable[folders.LeftOut] = (),
) -> builders.Raw:
  """Returns what files hold, once it is known to be in order.

  `names` is what their numbers stand for, if not the files themselves say it.
  Classes are called so or, where the name of each training image has
  ImageNet's form, by their WordNet ids.

  Raises:
    UserError: if a label is missing or not what it should be, or a class has
      no images in a split.
  """
  names = names or _class_names(splits)
  for listed in splits.values():
    for file, x in listed.items():
      _check_labels(file, x.labels, len(names))
  counts = {
    split: collections.Counter(y for x in listed.values() for y in x.labels)
    for split, listed in splits.items()
  }
  shown = _name_labels(set().union(*counts.values()), names, root)
  wnids = _find_wnids(splits[builders.TRAIN])
  classes = wnids if wnids.keys() == shown.keys() else shown
  if len(set(names)) < len(names) and classes is shown:
    digits = len(str(len(names) - 1))
    classes = {k: f'{k:0{digits}}' for k in shown}
  found = {
    split: {classes[x]: n for x, n in count.items()}
    for split, count in counts.items()
  }
  _check_classes(root, found)
  splits = {k: _name_images(x) for k, x in splits.items()}
  known = {classes[k]: x for k, x in shown.items()}
  more = [y for z in splits.values() for x in z.values() for y in x.left_out]
  return builders.Raw(
    root=str(root),
    classes=tuple(sorted(known)),
    class_names=tuple(known[x] for x in sorted(known)),
    num_images=sum(map(collections.Counter.total, counts.values())),
    fingerprint=_digest(root, splits, classes),
    images=functools.partial(_read, splits, classes),
    looks=looks,
    left_out=tuple(sorted((*left_out, *more))),
    in_order=True,
  )


def _class_names(splits: _Splits) -> tuple[str, ...]:
  """Returns what numbers stand for, which each file says alike."""
  known: dict[tuple[str, ...], pathlib.Path] = {}
  for listed in splits.values():
    for file, x in listed.items():
      known.setdefault(x.class_names, file)
  if len(known) > 1:
    raise errors.UserError(
      'The files name different classes.',
      ', '.join(map(str, list(known.values())[:2])),
      'They are of two datasets, or of two versions of one.',
    )
  return next(iter(known), ())


def _check_labels(
  file: pathlib.Path, labels: Sequence[int | str], count: int
) -> None:
  for i, x in enumerate(labels):
    if x == '' or (isinstance(x, int) and x < 0):
      what = f'Image {i} has no label.'
    elif count and isinstance(x, int) and x >= count:
      what = f'Image {i} is of class {x}; there are {count}.'
    else:
      continue
    advice = 'Is it a file for tests, or ?label=NAME another? Move it away.'
    raise errors.UserError(what, str(file), advice)


def _name_labels(
  labels: set[int | str], names: Sequence[str], root: pathlib.Path
) -> dict[int | str, str]:
  """Returns what each label is called, so that numbers sort as numbers do."""
  numbers = [x for x in labels if isinstance(x, int)]
  if numbers and len(numbers) < len(labels):
    other = next(x for x in labels if isinstance(x, str))
    what = f'Some labels are numbers, some are names: {numbers[0]}, {other!r}.'
    raise errors.UserError(what, str(root), 'Name another with ?label=NAME.')
  digits = len(str(max(numbers, default=0)))
  return {
    x: x if isinstance(x, str) else names[x] if names else f'{x:0{digits}}'
    for x in labels
  }


def _check_classes(
  root: pathlib.Path, splits: Mapping[str, Mapping[str, int]]
) -> None:
  (_, train), (other, evaluation) = splits.items()
  for name in sorted(train.keys() | evaluation.keys()):
    if not folders.is_storable(name):
      what = f'Class {name!r} has a name that a text file cannot hold.'
      advice = 'No blank at an end, no tab, no line break.'
      raise errors.UserError(what, str(root), advice)
    if not (train.get(name) and evaluation.get(name)):
      split = other if train.get(name) else builders.TRAIN
      what = f'Class {name!r} has no images in the {split} split.'
      raise errors.UserError(what, str(root), builders.AGAIN)


def _find_wnids(
  listed: Mapping[pathlib.Path, Listed],
) -> dict[int | str, str]:
  """Returns label -> WordNet id, {} unless all names of images agree on it."""
  found: dict[int | str, str] = {}
  for x in listed.values():
    for name, label in zip(x.names, x.labels, strict=True):
      match = _IMAGENET_NAME.fullmatch(os.path.basename(name))
      wnid = match and (match['wnid'] or match['own'])
      if not wnid or found.setdefault(label, wnid) != wnid:
        return {}
  return found if len(set(found.values())) == len(found) else {}


def _name_images(
  listed: Mapping[pathlib.Path, Listed],
) -> dict[pathlib.Path, Listed]:
  """Returns the files of a split with a name for each image, none twice."""
  named = {
    file: x._replace(names=[_base_name(name) for name in x.names])
    for file, x in listed.items()
  }
  counts = collections.Counter(
    pair for x in named.values() for pair in zip(x.labels, x.names, strict=True)
  )
  return {
    file: x._replace(
      names=[
        name
        if name and counts[label, name] == 1
        else '-'.join(filter(None, (file.stem, str(i), name)))
        for i, (label, name) in enumerate(zip(x.labels, x.names, strict=True))
      ]
    )
    for file, x in named.items()
  }


def _base_name(name: str) -> str:
  """Returns the name of an image, of ImageNet's files that which they had."""
  name = os.path.basename(name)
  match = _IMAGENET_NAME.fullmatch(name)
  return f'{match["name"]}.JPEG' if match else name


def _digest(
  root: pathlib.Path,
  splits: _Splits,
  classes: Mapping[int | str, str],
) -> str:
  digest = hashlib.sha256()
  for split, listed in splits.items():
    for file, x in listed.items():
      place = os.path.relpath(file, root)
      digest.update(f'{split}\0{place}\0{file.stat().st_size}\n'.encode())
      for name, label in zip(x.names, x.labels, strict=True):
        digest.update(f'{classes[label]}\0{name}\n'.encode())
  return digest.hexdigest()


def _read(
  splits: _Splits, classes: Mapping[int | str, str], split: str
) -> Iterator[builders.RawImage]:
  for x in splits[split].values():
    images = zip(x.names, x.labels, x.images(), strict=True)
    for name, label, held in images:
      yield builders.RawImage(name, classes[label], held)


def look(
  root: pathlib.Path,
  files: Iterable[pathlib.Path],
  lists: Iterable[pathlib.Path] = (),
) -> builders.Looks:
  """Returns how files look, with the folders that they are in and above.

  Raises:
    UserError: if one cannot be read.
  """
  files = list(files)
  folders_ = {root, *(x.parent for x in files)}
  folders_ |= {y for x in folders_ for y in x.parents if root in y.parents}

  def below(path: pathlib.Path) -> str:
    return os.path.relpath(path, root)

  try:
    return builders.Looks(
      times={below(x): x.stat().st_mtime_ns for x in sorted(folders_)},
      lists={
        below(x): hashlib.sha256(x.read_bytes()).hexdigest() for x in lists
      },
      images={below(x): folders.look(x) for x in files},
    )
  except OSError as e:
    raise errors.UserError(
      f'A file cannot be read: {e.strerror}.', str(e.filename)
    ) from e

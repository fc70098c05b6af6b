"""Raw folders as people have them: what lies there, listed and checked.

A layout is recognised by what is there. All give the same classes and names of
files, so that the same records come of them.
"""

import difflib
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxprog import errors, named
from jaxprog.data import archives, builders, folders, lists
from jaxprog.data.builders import EVAL, TRAIN, Looks, Raw, RawImage

# Folders whose images are evaluated on. Nobody has labels of a flat test/.
_EVALS = ('val', 'valid', 'validation', 'test')
# ILSVRC's own archives: a tar of a tar for each class, and a flat one.
_TRAIN_TAR = 'ILSVRC2012_img_train.tar'
_VAL_TAR = 'ILSVRC2012_img_val.tar'
# Folders in each other that are looked into for the splits.
_DEPTH = 4
# Names that a message gives, and folders that are looked into for them.
_SHOWN, _SEARCHED = 3, 200


class _File(NamedTuple):
  """An image: its path below the raw folder, its bytes, its place in a tar."""

  path: str
  size: int
  place: archives.Place | None = None


# The images of each class.
_Split = dict[str, list[_File]]


def locate(root: pathlib.Path) -> pathlib.Path:
  """Returns the folder at or below `root` that holds the splits.

  Kaggle's is ILSVRC/Data/CLS-LOC, and who unpacks an archive into a folder of
  its name has one within the other. Where there is none it is `root` itself.
  """
  folder = root
  for _ in range(_DEPTH):
    kaggle = (folder / lists.KAGGLE, folder / 'ILSVRC' / lists.KAGGLE)
    for place in (folder, *kaggle):
      if _has_splits(place):
        return place
    below = _folders_in(folder)
    if len(below) != 1:
      break
    folder = below[0]
  return root


def list_folder(
  root: pathlib.Path,
  names: Mapping[str, str] = {},
  *,
  is_anyones: bool = False,
) -> Raw:
  """Returns the images of the raw folder that holds the splits, checked.

  Those of training lie in train/CLASS/, those of evaluation in val/CLASS/, or
  flat with a list of labels; either may be ILSVRC's own tar. A wnids.txt says
  which classes there are, unless the folder `is_anyones`, who may have kept
  some of them; their order is that of their names. `names` are those for people
  where no list there has them.

  Raises:
    UserError: if the folder is not in order: a split or a class has no images,
      or a class of one split is not in the other.
  """
  found = _Listing(root, is_anyones)
  train, classes = found.train(), found.classes
  if classes is not None:
    for wnid in sorted(train.keys() - set(classes)):
      raise _unknown_class(wnid, root / 'train', lists.CLASSES)
  else:
    classes = sorted(train)
  words = found.lists.read_names()
  splits = {TRAIN: train, EVAL: found.evaluation(classes)}
  names = words or found.lists.kit_names or names
  return found.create_raw(classes, splits, names)


def find_meant(root: pathlib.Path) -> str:
  """Returns which folder was probably meant by one that lacks a split, or ''.

  That is the one it lies in, or one of those in it.
  """
  below = _folders_in(root)
  if root.name in ('train', *_EVALS) and _has_splits(root.absolute().parent):
    return f'Did you mean {root.absolute().parent}?'
  if meant := [x for y in below[:_SEARCHED] if _has_splits(x := locate(y))]:
    return f'Did you mean {" or ".join(map(str, meant[:_SHOWN]))}?'
  for split, starts in ((TRAIN, ('train',)), ('val', (*_EVALS, 'eval', 'dev'))):
    alike = [x for x in below if x.name.lower().startswith(starts)]
    if alike and not any(x.name in (TRAIN, *_EVALS) for x in alike):
      return f'Is it {alike[0].name}/? Then call it {split}/.'
  if below and _holds_images(below[0]) and not _has_splits(root):
    return f'Classes such as {below[0].name}/ belong into train/ and val/.'
  return ''


def find_misplaced(data_dir: pathlib.Path, known: named.Named) -> str:
  """Returns where else a dataset that is not found in data_dir may lie, or ''.

  What has as many classes, or ImageNet's tar, is not named as others are.
  """
  taken = {y for x in named.DATASETS.values() for y in x.folders}
  name = known.folders[0] if known.folders else ''
  data_dir = data_dir.absolute()
  for folder in (data_dir, *_folders_in(data_dir)):
    root = folder if folder == data_dir else locate(folder)
    count = len(_folders_in(root / 'train'))
    is_alike = bool(known.manual) and (root / known.manual).is_file()
    if known.published:
      is_alike |= count == known.published.classes
    if not is_alike or (folder.name in taken and name != folder.name):
      continue
    if folder.name == name:
      return f'Did you mean --config.data_dir={folder.parent}?'
    return f'Is it {folder}? Then let {data_dir / name} be a link to it.'
  return ''


def find_alike(folder: pathlib.Path) -> str:
  """Returns which folder was probably meant by one that is not there, or ''."""
  if folder.is_file():
    return 'It is a file: unpack it, or name the folder that it lies in.'
  names = {x.name.lower(): x for x in _folders_in(folder.absolute().parent)}
  near = difflib.get_close_matches(folder.name.lower(), names, 1)
  return f'Did you mean {names[near[0]]}?' if near else ''


def _has_splits(folder: pathlib.Path) -> bool:
  return (folder / 'train').is_dir() or (folder / _TRAIN_TAR).is_file()


def _folders_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders in one, sorted; none if it cannot be listed."""
  try:
    with os.scandir(folder) as found:
      names = [x.name for x in found if x.name[0] != '.' and x.is_dir()]
  except OSError:
    return []
  return [folder / x for x in sorted(names) if x != '__MACOSX']


def _holds_images(folder: pathlib.Path) -> bool:
  try:
    return any(x.kind == folders.IMAGE for x in folders.scan(folder))
  except OSError:
    return False


class _Listing:
  """Lists what lies in a raw folder, and remembers how that looked.

  Paths are relative to the raw folder. What cannot be listed, read or
  understood raises UserError.
  """

  def __init__(self, root: pathlib.Path, is_anyones: bool):
    self._root = root
    self.lists = lists.Lists(root)
    # Tiny ImageNet's.
    self.classes = None if is_anyones else self.lists.read_classes()
    self._looks = Looks({}, self.lists.sums, {})
    self._left_out: set[folders.LeftOut] = set()
    # The folder that was looked at last.
    self._scanned: tuple[str, list[folders.Entry]] = ('', [])

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
        for image in listing[wnid]:
          line = f'{split}\0{wnid}\0{image.path}\0{image.size}\n'
          digest.update(line.encode())
    return Raw(
      root=str(self._root),
      classes=tuple(classes),
      class_names=tuple(names.get(wnid, wnid) for wnid in classes),
      num_images=sum(len(x) for y in splits.values() for x in y.values()),
      fingerprint=digest.hexdigest(),
      images=functools.partial(_read_listing, self._root, splits),
      looks=self._looks,
      left_out=tuple(sorted(self._left_out)),
      labels_from=self.lists.labels_from,
    )

  def train(self) -> _Split:
    """Returns the training images by class."""
    if self._is_dir('train') or not (self._root / _TRAIN_TAR).is_file():
      return self._classes(self._undoubled('train'))
    split: _Split = {}
    others = []
    for name, place in self._files_of(_TRAIN_TAR):
      wnid, suffix = os.path.splitext(os.path.basename(name))
      if suffix == '.tar':
        split[wnid] = self._tar_images(_TRAIN_TAR, f'train/{wnid}', place)
      else:
        others.append(name)
    if not split:
      raise errors.UserError(
        f'It holds {", ".join(others[:_SHOWN]) or "nothing"}, and no tar of a '
        'class.',
        str(self._root / _TRAIN_TAR),
        f'Is it {_TRAIN_TAR} as published? Others are to be unpacked.',
      )
    return dict(sorted(split.items()))

  def evaluation(self, classes: Sequence[str]) -> _Split:
    """Returns the evaluation images by class."""
    folder = next(filter(self._is_dir, _EVALS), None)
    if folder == 'test' and not self._has_classes(folder, classes):
      folder = None
    if folder is None and (self._root / _VAL_TAR).is_file():
      return self._group('val', self._tar_images(_VAL_TAR, 'val'))
    if folder is None:
      raise self._lacks('val', also=_EVALS[1:])
    folder = self._undoubled(folder)
    within = self._folders(folder)
    if not within:
      return self._group(folder, self._images(folder))
    if 'images' not in within or 'images' in classes:
      return self._classes(folder)
    # Tiny ImageNet's, or what a script has left of that.
    images = f'{folder}/images'
    if self._folders(images):
      return self._classes(images)
    flat = self._images(images)
    if not flat and len(within) > 1:
      return self._classes(folder, without='images')
    return self._group(images, flat, is_alone=len(within) == 1)

  def _lacks(self, folder: str, also: Sequence[str] = ()) -> errors.UserError:
    """Returns what to say where a folder is missing."""
    other = f' ({", ".join(also)} would do too)' if also else ''
    what = f'There is no folder {folder}/{other}.'
    advice = find_meant(self._root) or builders.AGAIN
    return errors.UserError(what, str(self._root), advice)

  def _has_classes(self, folder: str, classes: Sequence[str]) -> bool:
    known = {x.partition('/')[0] for x in classes}
    return not known.isdisjoint(self._folders(folder))

  def _is_dir(self, folder: str) -> bool:
    return os.path.isdir(self._root / folder)

  def _scan(self, folder: str) -> list[folders.Entry]:
    """Returns what lies in a folder, sorted by name."""
    if folder == self._scanned[0]:
      return self._scanned[1]
    if not self._is_dir(folder):
      raise self._lacks(folder)
    try:
      # Before it is listed: what is written to meanwhile is looked at again.
      self._note_time(folder)
      entries = folders.scan(self._root / folder)
    except OSError as e:
      raise builders.unreadable(self._root / folder, e) from e
    for entry in entries:
      if entry.kind == folders.LOST:
        raise errors.UserError(
          f'{entry.name} is a link to what is not there.',
          str(self._root / folder / entry.name),
          'Is the folder complete? Copy what it links to, or remove the link.',
        )
    self._scanned = folder, entries
    return entries

  def _note_time(self, above: str) -> None:
    """Notes when a folder or a tar, and what it lies in, was written to."""
    while above not in self._looks.times:
      self._looks.times[above] = (self._root / above).stat().st_mtime_ns
      above = os.path.dirname(above) or '.'

  def _folders(self, folder: str) -> list[str]:
    return [x.name for x in self._scan(folder) if x.kind == folders.FOLDER]

  def _undoubled(self, folder: str) -> str:
    """Returns the folder within one that holds another of its name alone."""
    within = f'{folder}/{os.path.basename(folder)}'
    is_double = self._folders(folder) == [os.path.basename(folder)]
    return within if is_double and self._folders(within) else folder

  def _classes(self, folder: str, without: str = '') -> _Split:
    """Returns the images of each class folder, or tar, in a folder."""
    names = self._folders(folder)
    split: _Split = {}
    if not names:  # Tars, as ILSVRC's unpacks.
      for tar in self._take(folder, '.tar'):
        wnid = os.path.splitext(tar)[0]
        path = f'{folder}/{wnid}'
        split[wnid] = self._tar_images(f'{folder}/{tar}', path)
    for name in self._take(folder, folders.FOLDER) if names else ():
      if name != without:
        split |= self._class(f'{folder}/{name}', name)
    return split

  def _class(self, folder: str, name: str) -> _Split:
    """Returns the images of a class folder, or of those in it if it has none.

    Tiny ImageNet's lie one folder deeper; other folders are classes NAME/INNER.
    """
    within = self._folders(folder)
    strays = [x.name for x in self._scan(folder) if x.kind == folders.IMAGE]
    if 'images' in within and (self.classes or not (strays or within[1:])):
      images = self._images(f'{folder}/images')
      if images or not strays:
        self._left_out.update(
          folders.LeftOut('image beside images/', f'{folder}/{x}')
          for x in strays
        )
        return {name: images}
    if strays or not within:
      return {name: self._images(folder)}
    split: _Split = {}
    for inner in self._take(folder, folders.FOLDER):
      split |= self._class(f'{folder}/{inner}', f'{name}/{inner}')
    return split

  def _images(self, folder: str) -> list[_File]:
    """Returns the images in a folder, sorted."""
    images = [x for x in self._scan(folder) if x.kind == folders.IMAGE]
    self._looks.images[folder] = folders.summarise(images)
    for name in self._take(folder, folders.IMAGE):
      self._check_name(name, folder)
    return [_File(f'{folder}/{x.name}', x.size) for x in images]

  def _files_of(
    self, tar: str, within: archives.Place | None = None
  ) -> list[tuple[str, archives.Place]]:
    """Returns the files in a tar, or in one `within` that."""
    path = self._root / tar
    try:
      self._note_time(tar)
      self._looks.images[tar] = folders.look(path)
      return archives.list_files(path, within)
    except OSError as e:
      raise builders.unreadable(path, e) from e

  def _tar_images(
    self, tar: str, folder: str, within: archives.Place | None = None
  ) -> list[_File]:
    """Returns the images in a tar as if they lay in `folder`, sorted."""
    images: dict[str, _File] = {}
    for path, place in self._files_of(tar, within):
      name = os.path.basename(path)
      suffix = os.path.splitext(name)[1].lower()
      if name.startswith('.'):
        continue
      if suffix not in folders.SUFFIXES:
        left_out = folders.LeftOut(suffix or 'no suffix', f'{folder}/{name}')
        self._left_out.add(left_out)
        continue
      self._check_name(name, tar)
      if name in images:
        what = f'{name} is there twice, in {folder}.'
        raise errors.UserError(what, str(self._root / tar), builders.AGAIN)
      images[name] = _File(f'{folder}/{name}', place.size, place)
    return [images[x] for x in sorted(images)]

  def _check_name(self, name: str, folder: str) -> None:
    if not folders.is_utf8(name):
      raise errors.UserError(
        f'The name of {name} is not UTF-8.',
        str(self._root / folder),
        'Rename it, or all of them: convmv -r -f latin1 -t utf8 --notest .',
      )

  def _group(
    self, folder: str, images: Sequence[_File], *, is_alone: bool = True
  ) -> _Split:
    """Returns the images of a flat folder by class.

    If it `is_alone` no script can have moved some to where others lie.
    """
    files = [os.path.basename(x.path) for x in images]
    labels = self.lists.read_labels(folder, files)
    split: _Split = {}
    for name, image in zip(files, images, strict=True):
      if name not in labels:
        raise errors.UserError(
          f'{name} has no label.',
          str(self._root / folder),
          'Is the list of labels complete?',
        )
      split.setdefault(labels[name], []).append(image)
    names = set(files)
    lost = [x for x in labels if x not in names]
    if lost and not is_alone:
      raise errors.UserError(
        f'{len(names):,} images lie in {folder}/ and others beside it.',
        str(self._root / os.path.dirname(folder)),
        'A script has stopped midway: let it sort the rest, or unpack anew.',
      )
    self._left_out.update(
      folders.LeftOut('label of no image', f'{folder}/{x}') for x in lost
    )
    return split

  def _take(self, folder: str, kind: str) -> list[str]:
    """Returns what is of one kind in a folder; notes the rest as left out."""
    entries = self._scan(folder)
    self._left_out.update(
      folders.LeftOut(x.kind, f'{folder}/{x.name}')
      for x in entries
      if x.kind != kind
    )
    return [x.name for x in entries if x.kind == kind]


def _read_listing(
  root: pathlib.Path, splits: Mapping[str, _Split], split: str
) -> Iterator[RawImage]:
  for wnid, images in splits[split].items():
    for path, _, place in images:
      yield RawImage(os.path.basename(path), wnid, place or root / path)


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
        raise errors.UserError(what, str(root), builders.AGAIN)
  if not classes:
    raise errors.UserError('There are no class folders.', str(root / 'train'))


def _unknown_class(
  wnid: str, folder: pathlib.Path, known: str
) -> errors.UserError:
  return errors.UserError(
    f'Class {wnid!r} is not among {known}.',
    str(folder),
    'Remove it, or add its images to both splits.',
  )

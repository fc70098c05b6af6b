"""A prepared dataset: its splits, whose records are read by index."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxprog import errors, files, named
from jaxprog.data import index, packs, parts, preprocess, shards

# By which an image is set aside; a stage that has begun keeps its own.
HOLDOUT_RULE = 2
# Such a name is the image's own, in whatever dataset it lies.
_IMAGENET_NAME = re.compile(r'n\d{8}_\d+\.JPEG|ILSVRC2012_.*', re.ASCII)
# The evaluation split of a tfds dataset is the first of these that it has.
_EVAL_SPLITS = ('validation', 'test')


@dataclasses.dataclass(frozen=True)
class Records:
  """Random access to the records of one split; can be pickled.

  Reading is thread-safe and holds no lock while the file is read.
  """

  name: str
  # Where the prepared dataset lies.
  directory: pathlib.Path
  source: shards.Shards
  # Position in `source`, label and wnid of each record.
  positions: np.ndarray
  labels: np.ndarray
  classes: tuple[str, ...]
  # Of the whole dataset; see Dataset.fingerprint.
  fingerprint: str = ''
  # Images in another form, by position.
  pack: packs.Pack | None = None
  # (n, k), the classes that are right for each, -1 where there are fewer; None:
  # the label alone is.
  answers: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.positions)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns image (encoded bytes), label, file_name and wnid."""
    feature = self.parse(index)
    position, label = self.positions[index], self.labels[index]
    return {
      'image': feature['image'].bytes_list.value[0],
      'label': label,
      'file_name': shards.file_name(feature, self.name, position).decode(),
      'wnid': self.classes[label],
    }

  def parse(self, index: int) -> Any:
    """Returns the features of a record as they were written."""
    return shards.parse_record(self.source[int(self.positions[index])])

  def image(self, index: int) -> preprocess.Encoded:
    """Returns the image as it is stored for training."""
    if self.pack is None:
      return self.original(index)
    return self.pack[int(self.positions[index])]

  def original(self, index: int) -> bytes:
    """Returns the encoded image as it came."""
    return self.at(int(self.positions[index]))

  def at(self, position: int) -> bytes:
    """Returns the encoded image at a position of `source`."""
    record = shards.parse_record(self.source[position])
    return record['image'].bytes_list.value[0]

  def describe(self, index: int) -> str:
    """Returns wnid/file name."""
    record = self[index]
    return f'{record["wnid"]}/{record["file_name"]}'

  @property
  def stored(self) -> shards.Shards | packs.Pack:
    """The files that `image` reads, and what brings them from a bucket."""
    return self.pack or self.source

  def names(self) -> list[str]:
    """Returns the file name of every record; kept beside them."""
    names = index.read_names(self.source, self.directory, self.name)
    return [names[position] for position in self.positions]

  def select(self, chosen: np.ndarray) -> 'Records':
    """Returns those whose entry of `chosen`, bool (n,), is True."""
    answers = None if self.answers is None else self.answers[chosen]
    return dataclasses.replace(
      self,
      positions=self.positions[chosen],
      labels=self.labels[chosen],
      answers=answers,
    )


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared dataset, or some of its classes."""

  name: str
  # Sorted wnids, or class names where there are none; a label is a position.
  classes: tuple[str, ...]
  # The same for people, where known.
  class_names: tuple[str, ...]
  train: Records
  eval: Records
  # Part of the training images that decides which weights are best.
  holdout: Records | None = None
  holdout_rule: int = 0
  # Training images left out because they leak, by reason.
  excluded: Mapping[str, int] = dataclasses.field(default_factory=dict)
  # The same on every machine that has the same images.
  fingerprint: str = ''
  # What else the raw folder held when it was prepared, in words.
  left_out: str = ''

  @property
  def selection(self) -> Records:
    """What is evaluated while a stage trains."""
    return self.holdout or self.eval

  @property
  def stored(self) -> dict[str, shards.Shards | packs.Pack]:
    """What training and evaluation read, by a name of the split."""
    # The room there is goes to what is read most, and to what needs it.
    splits = {self.train.name: self.train, self.eval.name: self.eval}
    if self.holdout:
      splits['hold-out'] = self.holdout
    return {name: split.stored for name, split in splits.items()}

  @property
  def version(self) -> str:
    """What is read in training: of the records, and how they are stored."""
    version = self.train.directory.name
    pack = self.train.pack
    return f'{version}+{pack.name}' if pack else version

  @property
  def num_classes(self) -> int:
    """The number of classes, which is that of the logits."""
    return len(self.classes)


def open_dataset(
  name: str,
  builder: tfds.core.DatasetBuilder,
  progress: parts.Progress | None = None,
) -> Dataset:
  """Returns a prepared dataset with all its classes.

  The first time, labels that nobody has noted are read from the records;
  `progress` is told of that.
  """
  names, eval_name = _check_features(name, builder)
  classes = tuple(sorted(names))
  position = {x: i for i, x in enumerate(classes)}
  rank = np.array([position[x] for x in names], np.int32)
  train, evaluation = (
    _open_split(builder, split, rank, classes, progress)
    for split in ('train', eval_name)
  )
  metadata = builder.info.metadata or {}
  fingerprint = files.digest_parts(
    builder.info.full_name,
    metadata.get('fingerprint', '') + metadata.get('contents', ''),
    *(split.labels.tobytes() for split in (train, evaluation)),
  )
  train, evaluation = (
    dataclasses.replace(x, fingerprint=fingerprint) for x in (train, evaluation)
  )
  known = dict(zip(classes, metadata.get('class_names', ()), strict=False))
  known = known or named.IMAGENETTE_NAMES
  return Dataset(
    name=name,
    classes=classes,
    class_names=tuple(known.get(x, x) for x in classes),
    train=train,
    eval=evaluation,
    fingerprint=fingerprint,
    left_out=metadata.get('left_out', ''),
  )


def _check_features(
  name: str, builder: tfds.core.DatasetBuilder
) -> tuple[list[str], str]:
  """Returns the class names and the evaluation split of a dataset."""
  features = dict(builder.info.features)
  label = features.get('label')
  image = features.get('image')
  if not isinstance(label, tfds.features.ClassLabel) or not isinstance(
    image, tfds.features.Image
  ):
    raise errors.UserError(
      f'{name!r} is not a classification dataset: its records hold '
      f'{", ".join(features)}.',
      builder.data_dir,
      'Choose one with the features image and label.',
    )
  splits = builder.info.splits
  found = [x for x in _EVAL_SPLITS if x in splits]
  if 'train' not in splits or not found:
    raise errors.UserError(
      f'{name!r} has no train split or none to evaluate on.',
      f'{builder.data_dir} has {", ".join(splits) or "none"}',
      'Choose one with train and validation or test.',
    )
  return label.names, found[0]


def _open_split(
  builder: tfds.core.DatasetBuilder,
  split: str,
  rank: np.ndarray,
  classes: tuple[str, ...],
  progress: parts.Progress | None,
) -> Records:
  source = shards.open_shards(builder, split)
  labels = index.read_labels(
    source, pathlib.Path(builder.data_dir), split, progress
  )
  if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(rank):
    raise errors.UserError(
      f'The {split} split has labels outside 0..{len(rank) - 1}.',
      str(builder.data_dir),
    )
  return Records(
    name=split,
    directory=pathlib.Path(builder.data_dir),
    source=source,
    positions=np.arange(len(labels)),
    labels=rank[labels],
    classes=classes,
  )


def take_holdout(
  dataset: Dataset, part: float, where: str, rule: int = HOLDOUT_RULE
) -> Dataset:
  """Returns `dataset` with `part` of its training images set aside.

  Class and name decide, so that an image stays on its side when others come
  and go, and so that a stage never selects on an image that an earlier one has
  trained on: of ImageNet's files, which the datasets of the ladder share, the
  name alone does. By rule 1 it did for all, however often classes repeat it.
  Where there should be one and none is below, the lowest is taken: others that
  come may send it back to training, never the other way.

  Raises:
    UserError: if nothing would be left on one side.
  """
  records = dataset.train
  keys = [
    name
    if rule == 1 or _IMAGENET_NAME.fullmatch(name)
    else f'{records.classes[label]}/{name}'
    for name, label in zip(records.names(), records.labels, strict=True)
  ]
  places = np.array(
    [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) for key in keys],
    np.uint64,
  )
  chosen = places < np.uint64(int(part * 2**64))
  if rule > 1 and not chosen.any() and round(part * len(places)):
    chosen[np.argmin(places)] = True
  if chosen.all() or not chosen.any():
    raise errors.UserError(
      f'A hold-out of {part:.1%} takes {chosen.sum()} of the '
      f'{len(chosen)} training images of {dataset.name!r}.',
      f'{where}.eval_split',
    )
  return dataclasses.replace(
    dataset,
    train=dataset.train.select(~chosen),
    holdout=dataset.train.select(chosen),
    holdout_rule=rule,
  )


def select_classes(
  dataset: Dataset, classes: Sequence[str], where: str
) -> Dataset:
  """Returns `dataset` with these classes only, labelled 0, 1, … in order."""
  position = {x: i for i, x in enumerate(dataset.classes)}
  for name in classes:
    if name not in position:
      raise errors.UserError(
        f'{dataset.name!r} has no class {name!r}.',
        f'{where}.classes' if where else '',
        errors.did_you_mean(name, dataset.classes),
      )
  kept = tuple(sorted(set(classes)))
  old = np.array([position[x] for x in kept])
  new_label = np.full(dataset.num_classes, -1, np.int32)
  new_label[old] = np.arange(len(kept))

  def select(split: Records) -> Records:
    labels = new_label[split.labels]
    records = dataclasses.replace(split, labels=labels, classes=kept)
    return records.select(labels >= 0)

  return dataclasses.replace(
    dataset,
    classes=kept,
    class_names=tuple(dataset.class_names[i] for i in old),
    train=select(dataset.train),
    eval=select(dataset.eval),
    fingerprint=files.digest_parts(dataset.fingerprint, *kept),
  )

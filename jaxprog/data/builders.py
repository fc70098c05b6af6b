"""Raw images, and the tfds builder that writes them into ArrayRecord.

Nothing here imports TensorFlow.
"""

import dataclasses
import functools
import hashlib
import io
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow_datasets as tfds

from jaxprog import errors, named
from jaxprog.data import folders, index, parts, writer

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
  # Whether images are read in the order in which they are listed: another would
  # take much longer.
  in_order: bool = False
  # The list that says which class each image of a flat split has, if one does.
  labels_from: str = ''


class _Info(tfds.core.DatasetInfo):
  def initialize_from_bucket(self) -> None:
    """Looks for nothing: tfds would leave an empty temporary folder."""


class Images(tfds.core.GeneratorBasedBuilder):
  """Writes a `Raw` as records of image, label, file_name and wnid."""

  VERSION = tfds.core.Version('1.0.0')
  # What tfds itself would ask for.
  _split_generators = _generate_examples = None

  def __init__(
    self,
    dataset: str,
    raw: Raw,
    data_dir: pathlib.Path,
    config: str = '',
    progress: parts.Progress | None = None,
  ):
    self.name = prepared_name(dataset)
    self._raw, self._progress = raw, progress
    super().__init__(
      data_dir=data_dir / 'prepared',
      config=tfds.core.BuilderConfig(name=config) if config else None,
      file_format='array_record',
    )
    # Where a preparation that is interrupted keeps what it has finished.
    self.kept: pathlib.Path | None = None

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
        labels_from=raw.labels_from,
      ),
    )

  def _generate_splits(
    self,
    dl_manager: tfds.download.DownloadManager,
    download_config: tfds.download.DownloadConfig,
  ) -> Sequence[Any]:
    """Returns what was written of each split.

    tfds itself would write all images twice, to sort them, from one core.
    """
    raw, directory = self._raw, pathlib.Path(self.data_dir)
    folder = self.kept or directory / 'incomplete'
    images, written, done = {}, {}, 0
    try:
      for split in (TRAIN, EVAL):
        images[split] = tuple(raw.images(split))
        told = functools.partial(self._tell, done)
        done += len(images[split])
        written[split] = writer.write_split(
          folder,
          split,
          images[split],
          raw.classes,
          told,
          in_order=raw.in_order,
        )
    except BaseException:
      writer.drop_unfinished(folder)
      raise
    found, contents = [], hashlib.sha256()
    labels = {wnid: i for i, wnid in enumerate(raw.classes)}
    for split, its in written.items():
      found.append(self._place(split, its.shards))
      contents.update(its.digests.tobytes())
      ordered = [images[split][i] for i in its.order]
      index.save(
        directory,
        split,
        np.array([labels[x.wnid] for x in ordered], np.int32),
        [x.file_name.encode() for x in ordered],
      )
    shutil.rmtree(folder)
    if raw.looks.images:  # Not what this Pillow makes of digits.
      self.info.metadata['contents'] = contents.hexdigest()
    return found

  def _tell(self, before: int, done: int) -> None:
    if self._progress:
      self._progress(before + done, self._raw.num_images)

  def _place(self, split: str, shards: Sequence[writer.Shard]) -> Any:
    """Returns what tfds notes of a split, its files in their place."""
    template = self._get_filename_template(split_name=split)
    for i, shard in enumerate(shards):
      path = template.sharded_filepath(shard_index=i, num_shards=len(shards))
      shard.path.rename(path)
    return tfds.core.SplitInfo(
      name=split,
      shard_lengths=[len(x.digests) for x in shards],
      num_bytes=sum(x.num_bytes for x in shards),
      filename_template=template,
    )

  def _log_download_bytes(self) -> None:
    """Says nothing: `progress` does."""

  def _log_download_done(self) -> None:
    """Says nothing: `progress` does."""


def prepared_name(dataset: str) -> str:
  """Returns what the folder of a dataset below prepared/ is called."""
  return named.find(dataset).prepared or f'{dataset}_folder'


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


def unreadable(path: pathlib.Path, error: OSError) -> errors.UserError:
  """Returns what to say of what cannot be read."""
  what = f'{path.name} cannot be read: {error.strerror}.'
  return errors.UserError(what, str(path), AGAIN)

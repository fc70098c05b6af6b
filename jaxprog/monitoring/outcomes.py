"""Which evaluation images a stage has right, a bit for each.

WORKDIR/outcomes/STAGE.npz is of the stage's last evaluation; where a hold-out
chooses the best weights, STAGE.validation.npz is of these on the validation
images. Two runs that were evaluated on the same images can then be compared
image by image.
"""

import base64
import hashlib
import io
import pathlib
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxprog import files

if TYPE_CHECKING:  # Reports are made without what reads images.
  from jaxprog.data.records import Records


class Outcomes(NamedTuple):
  """What came of n images, in the order of their names, class before file.

  `images` is the SHA-256 of the names: equal ones stand for the same images in
  the same order, however the dataset was stored. `right` is bool, (n,).
  """

  images: str
  right: np.ndarray


class Order(NamedTuple):
  """Where the records of a split stand among their names, and these' sum."""

  positions: np.ndarray
  images: str


def sort_images(split: 'Records') -> Order:
  """Returns the order of a split's images by class and file name."""
  pairs = zip(split.labels, split.names(), strict=True)
  names = [f'{split.classes[label]}/{name}' for label, name in pairs]
  positions = sorted(range(len(names)), key=names.__getitem__)
  text = '\n'.join(names[i] for i in positions)
  digest = hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()
  return Order(np.array(positions, np.int64), digest)


def find_path(
  workdir: pathlib.Path, stage: str, *, validation: bool = False
) -> pathlib.Path:
  """Returns where the outcomes of a stage are kept."""
  name = f'{stage}.validation.npz' if validation else f'{stage}.npz'
  return workdir / 'outcomes' / name


def write(
  path: pathlib.Path, order: Order, right: np.ndarray, epoch: float
) -> None:
  """Writes what came of each image, bool (n,) as the split has them."""
  data = io.BytesIO()
  np.savez(
    data,
    images=np.array(order.images),
    num_images=np.array(len(right)),
    right=np.packbits(right[order.positions]),
    epoch=np.array(epoch),
  )
  files.write_bytes(path, data.getvalue())


def read(path: pathlib.Path, epoch: float) -> Outcomes | None:
  """Returns what came of each image after `epoch`, None if it is not known."""
  try:
    with np.load(path, allow_pickle=False) as found:
      if float(found['epoch']) != epoch:
        return None
      count = int(found['num_images'])
      right = np.unpackbits(found['right'], count=count).astype(bool)
      return Outcomes(str(found['images']), right)
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None  # Of a run before there were any, or damaged.


def to_json(outcomes: Outcomes | None) -> dict[str, Any] | None:
  """Returns what JSON can hold: images, num_images, and right in base64."""
  if outcomes is None:
    return None
  packed = np.packbits(outcomes.right).tobytes()
  return {
    'images': outcomes.images,
    'num_images': len(outcomes.right),
    'right': base64.b64encode(packed).decode(),
  }


def from_json(fields: Mapping[str, Any] | None) -> Outcomes | None:
  """Returns what `to_json` was given."""
  if fields is None:
    return None
  packed = np.frombuffer(base64.b64decode(fields['right']), np.uint8)
  right = np.unpackbits(packed, count=fields['num_images']).astype(bool)
  return Outcomes(fields['images'], right)

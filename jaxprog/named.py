"""Datasets that have a name: where each lies, whence it comes, what it holds.

Whatever asks about a dataset by its name asks here. Nothing is imported that
takes time, so that a wrong name is said at once.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Archive(NamedTuple):
  """A published archive."""

  url: str
  sha256: str


class Published(NamedTuple):
  """What the published dataset holds: classes, and images of either split."""

  classes: int
  train: int
  eval: int


class Named(NamedTuple):
  """What is known of a dataset; see `DATASETS`."""

  # Raw folders below data_dir; the first that exists is taken.
  folders: tuple[str, ...] = ()
  published: Published | None = None
  # Class -> its name for people, where the raw folder says nothing of it.
  class_names: Mapping[str, str] = {}
  # What `prepare --download` fetches.
  archive: Archive | None = None
  # What tfds calls it, where tfds can make it too, and the file that tfds wants
  # in downloads/manual for that.
  tfds: str = ''
  manual: str = ''
  # Whether equal names of its and ImageNet's files mean equal images.
  keeps_names: bool = False
  # Its folder below prepared/, unless that is NAME_folder.
  prepared: str = ''


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

DATASETS = {
  'digits': Named(prepared='scikit_learn_digits'),
  'imagenet2012': Named(
    ('imagenet1k', 'ILSVRC'),
    Published(1000, 1_281_167, 50_000),
    tfds='imagenet2012',
    manual='ILSVRC2012_img_train.tar',
    keeps_names=True,
  ),
  'imagenet_mini': Named(
    ('imagenet-mini', 'archive/imagenet-mini'),
    Published(1000, 34_745, 3_923),
    keeps_names=True,
  ),
  'imagenette': Named(
    ('imagenette2', 'imagenette2-320', 'imagenette2-160'),
    Published(10, 9_469, 3_925),
    IMAGENETTE_NAMES,
    # The sum is the one that tfds 4.9 registers.
    Archive(
      'https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz',
      '6cbfac238434d89fe99e651496f0812ebc7a10fa62bd42d6874042bf01de4efd',
    ),
    tfds='imagenette/full-size-v2',
    keeps_names=True,
  ),
  # Its images only look like ImageNet's: it counts them anew.
  'tiny_imagenet': Named(
    ('tiny-imagenet-200', 'archive/tiny-imagenet-200'),
    Published(200, 100_000, 10_000),
    # Its authors publish no sum: this is the one on which public users of
    # their 248,100,043 bytes agree.
    archive=Archive(
      'http://cs231n.stanford.edu/tiny-imagenet-200.zip',
      '6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821',
    ),
  ),
}


class NamedTest(NamedTuple):
  """Images that weights are scored on and nobody trains on; see `TESTS`."""

  # Which of data/test_sets.READERS lists them.
  layout: str
  # What its archive unpacks to, below data_dir; the first that exists is taken.
  places: tuple[str, ...]
  # What is to be downloaded.
  source: str
  # Images that the published figures are of.
  published: int
  # Whether the network chooses among the classes of the set alone.
  masked: bool = False


_V2 = 'https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/'
_BERKELEY = 'https://people.eecs.berkeley.edu/~hendrycks/'

# All are about ImageNet's classes; docs/evaluation.md has their papers.
TESTS = {
  **{
    name: NamedTest(
      'class_folders',
      (f'{folder}-format-val', folder),
      f'{_V2}{folder}.tar.gz',
      10_000,
    )
    for name, folder in (
      ('imagenet_v2', 'imagenetv2-matched-frequency'),
      ('imagenet_v2_threshold', 'imagenetv2-threshold0.7'),
      ('imagenet_v2_top', 'imagenetv2-top-images'),
    )
  },
  # The validation images of imagenet2012; 46,837 of them have labels.
  'imagenet_real': NamedTest(
    'real',
    ('real.json',),
    'https://raw.githubusercontent.com/google-research/reassessed-imagenet/'
    'master/real.json',
    46_837,
  ),
  'imagenet_r': NamedTest(
    'class_folders',
    ('imagenet-r',),
    f'{_BERKELEY}imagenet-r.tar',
    30_000,
    masked=True,
  ),
  'imagenet_a': NamedTest(
    'class_folders',
    ('imagenet-a',),
    f'{_BERKELEY}imagenet-a.tar',
    7_500,
    masked=True,
  ),
  'imagenet_sketch': NamedTest(
    'class_folders',
    ('sketch', 'ImageNet-Sketch'),
    'ImageNet-Sketch.zip, to which https://github.com/HaohanWang/'
    'ImageNet-Sketch links,',
    50_889,
  ),
  # Of 50,273 images of 313 classes those of the 113 that ImageNet has.
  'objectnet': NamedTest(
    'objectnet',
    ('objectnet-1.0',),
    'objectnet-1.0.zip from https://objectnet.dev',
    18_574,
  ),
}


def find(dataset: str) -> Named:
  """Returns what is known of a dataset; little of folder:PATH and tfds:NAME."""
  source, _, rest = dataset.partition(':')
  spec = rest if source == 'tfds' else ''
  other = Named(tfds=spec, prepared='image_class_folder')
  return DATASETS.get(dataset, other)

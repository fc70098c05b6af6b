"""Small raw datasets, laid out as their sources ship them."""

import io
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxprog import stages, start_from
from jaxprog.data import builders
from jaxprog.data.records import Records


class TfdsImages(builders.Images):
  """Sorts and writes as tfds does."""

  _generate_splits = tfds.core.GeneratorBasedBuilder._generate_splits

  def _split_generators(self, dl_manager):
    del dl_manager
    splits = (builders.TRAIN, builders.EVAL)
    return {x: self._generate_examples(x) for x in splits}

  def _generate_examples(self, split):
    for image in self._raw.images(split):
      names = {'file_name': image.file_name, 'wnid': image.wnid}
      features = {'image': io.BytesIO(image.read()), 'label': image.wnid}
      yield f'{image.wnid}/{image.file_name}', features | names


WNIDS = ('n01', 'n02', 'n03')


def real_data() -> pathlib.Path | None:
  """Returns the folder of unpacked real datasets, if there is one."""
  folder = os.environ.get('JAXPROG_DATA')
  return pathlib.Path(folder) if folder else None


def encode(pixels: np.ndarray, format: str = 'PNG', **options) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format, **options)
  return file.getvalue()


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
  """Returns smooth random colours, as photographs have, uint8 RGB."""
  rng = np.random.default_rng(seed)
  noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
  return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))


def write_image(path: pathlib.Path, seed: int, size: int = 20) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(encode(photo(size, size, seed), 'JPEG', quality=95))


def write_class_folders(
  root: pathlib.Path,
  wnids=WNIDS,
  train: int = 5,
  val: int = 2,
  val_name: str = 'val',
) -> pathlib.Path:
  for split, count in (('train', train), (val_name, val)):
    for i, wnid in enumerate(wnids):
      for j in range(count):
        name = f'{wnid}_{split}_{j}.JPEG'
        write_image(root / split / wnid / name, 100 * i + j)
  return root


def write_tiny_imagenet(root: pathlib.Path) -> pathlib.Path:
  """Writes three classes; wnids.txt is not sorted, val is flat."""
  lines = []
  for i, wnid in enumerate(WNIDS):
    for j in range(4):
      folder = root / 'train' / wnid
      write_image(folder / 'images' / f'{wnid}_{j}.JPEG', 10 * i + j)
    (folder / f'{wnid}_boxes.txt').write_text(f'{wnid}_0.JPEG\t0\t0\t9\t9\n')
    for j in range(2):
      name = f'val_{(2 - i) + 3 * j}.JPEG'
      write_image(root / 'val' / 'images' / name, 50 + 10 * i + j)
      lines.append(f'{name}\t{wnid}\t0\t0\t9\t9')
  write_image(root / 'test' / 'images' / 'test_0.JPEG', 99)
  (root / 'val' / 'val_annotations.txt').write_text('\n'.join(lines))
  (root / 'wnids.txt').write_text('n03\nn01\nn02\n')
  (root / 'words.txt').write_text('n00\tentity\nn01\tgoldfish, carp\nn03\tbee')
  return root


def stage(**fields) -> stages.Stage:
  """Returns a stage of digits at 16 px with `fields` changed."""
  config = start_from('quickstart')
  config.stages = [{'name': 'a', 'num_epochs': 1, 'batch_size': 32, **fields}]
  return stages.create_stages(config)[0]


def read_all(split: Records) -> list[dict]:
  return [split[i] for i in range(len(split))]

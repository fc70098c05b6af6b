"""How many planted copies the audit finds, and what it finds falsely.

    python benchmarks/leaks.py --data=FOLDER

FOLDER holds imagenette2/ and tiny-imagenet-200/.
Copies of Imagenette's validation images are put among the training images of
Tiny ImageNet: at 64 pixels by several filters and at full size, encoded anew
with a random quality, renamed like Tiny ImageNet's own files.
"""

import argparse
import pathlib
import random
import shutil
import tempfile
import time

import cv2
import numpy as np
from PIL import Image

from jaxprog.data import leaks, preparation

FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
  'box': Image.Resampling.BOX,
  'Lanczos': Image.Resampling.LANCZOS,
}
KINDS = (*FILTERS, 'linear, aliased', 'full size')


def main() -> None:
  """Plants, looks and counts."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', type=pathlib.Path, required=True)
  parser.add_argument('--count', type=int, default=300, help='of each kind')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    (root / 'imagenette2').symlink_to((args.data / 'imagenette2').resolve())
    tiny = shutil.copytree(
      args.data / 'tiny-imagenet-200',
      root / 'tiny-imagenet-200',
      copy_function=shutil.copyfile,
    )
    planted = plant(args.data, tiny, args.count, random.Random(args.seed))
    datasets = {
      name: preparation.load_dataset(name, root)
      for name in ('imagenette', 'tiny_imagenet')
    }
    began = time.monotonic()
    found = leaks.find_overlap(datasets)
    report(planted, found, time.monotonic() - began)


def plant(
  data: pathlib.Path, tiny: pathlib.Path, count: int, rng: random.Random
) -> dict[str, tuple[str, str]]:
  """Returns each copy's name -> its kind and the name of its original."""
  originals = sorted((data / 'imagenette2' / 'val').glob('*/*'))
  folders = sorted((tiny / 'train').iterdir())
  planted = {}
  for kind in KINDS:
    for original in rng.sample(originals, count):
      folder = folders[len(planted) % len(folders)]
      name = f'{folder.name}_{10_000 + len(planted)}.JPEG'
      image = Image.open(original).convert('RGB')
      shrink(image, kind).save(
        folder / 'images' / name, quality=rng.randint(75, 95)
      )
      planted[name] = (kind, original.name)
  return planted


def shrink(image: Image.Image, kind: str) -> Image.Image:
  """Returns a copy at 64 pixels, or at full size."""
  if kind in FILTERS:
    return image.resize((64, 64), FILTERS[kind])
  if kind == 'full size':
    return image
  return Image.fromarray(cv2.resize(np.asarray(image), (64, 64)))


def report(
  planted: dict[str, tuple[str, str]], found: leaks.Overlap, seconds: float
) -> None:
  """Prints recall by kind, and what was found that nobody planted."""
  pairs = {
    leak.train_file: leak
    for leak in found.leaks
    if leak.train_stage == 'tiny_imagenet'
  }
  print(f'{"copies":18}{"planted":>9}{"found":>7}{"recall":>8}')
  for kind in KINDS:
    names = [name for name, (x, _) in planted.items() if x == kind]
    right = [
      name
      for name in names
      if name in pairs and pairs[name].eval_file == planted[name][1]
    ]
    recall = len(right) / len(names)
    print(f'{kind:18}{len(names):9}{len(right):7}{recall:8.1%}')
  false = [x for x in pairs if x not in planted]
  print(f'precision {1 - len(false) / max(1, len(pairs)):.1%}: {false[:5]}')
  by_reason = found.counts['imagenette']
  print(f"Imagenette's own: {by_reason}; {seconds:.1f} s in all")


if __name__ == '__main__':
  main()

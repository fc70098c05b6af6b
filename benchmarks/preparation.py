"""Images a second of preparing a folder, beside tfds's own builder and cp.

    python benchmarks/preparation.py --photos=imagenet-samples.tar

A raw folder of --images JPEGs, copies of --photos (110 KB each) under names of
their own, else drawn ones, is prepared again and again by processes that take
turns, each on as many cores as it is given, and none of it stays. tfds's is a
GeneratorBasedBuilder that yields a path, a label and two texts, as its guide
has them; cp copies the folder. Times include the last sync to the disk, and
files come from the page cache where they fit in it.
"""

import argparse
import hashlib
import io
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

CLASSES = 100
# ImageNet-1k, and a disk that reads and writes so much a second in all.
IMAGES, DISK = 1_281_167, 500e6


def main() -> None:
  """Lets the contestants take turns, and prints medians and ratios."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--photos', type=pathlib.Path)
  parser.add_argument('--images', type=int, default=12_000)
  parser.add_argument('--cores', type=int, nargs='+', default=[1, 2])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument(
    '--work', type=pathlib.Path, default=tempfile.gettempdir()
  )
  parser.add_argument('--contestant', choices=CONTESTANTS)
  args = parser.parse_args()
  if args.contestant:
    CONTESTANTS[args.contestant](args.work / 'raw', args.work / 'out')
    return
  with tempfile.TemporaryDirectory(dir=args.work) as folder:
    work = pathlib.Path(folder)
    size = lay_out(args, work / 'raw')
    print(
      f'{args.images:,} images of {size / args.images / 1e3:.0f} KB, '
      f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at first'
    )
    show_parts(work / 'raw')
    for cores in args.cores:
      compare(work, args, size, cores)


def lay_out(args: argparse.Namespace, raw: pathlib.Path) -> int:
  """Writes train/ and val/ folders of classes; returns their bytes."""
  photos = list(read_photos(args.photos) if args.photos else draw_photos())
  for i, photo in zip(range(args.images), itertools.cycle(photos)):
    split = 'val' if i // CLASSES % 25 == 0 else 'train'
    folder = raw / split / f'n{i % CLASSES:08}'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{folder.name}_{i}.JPEG').write_bytes(photo)
  os.sync()
  return sum(x.stat().st_size for x in raw.rglob('*.JPEG'))


def read_photos(archive: pathlib.Path) -> Iterator[bytes]:
  """Yields the files in a tar."""
  with tarfile.open(archive) as opened:
    for member in opened:
      if file := opened.extractfile(member):
        yield file.read()


def draw_photos() -> Iterator[bytes]:
  """Yields JPEGs of smooth noise, 110 KB each."""
  from PIL import Image

  rng = np.random.default_rng(0)
  for _ in range(20):
    noise = Image.fromarray(rng.integers(0, 256, (220, 290, 3), np.uint8))
    out = io.BytesIO()
    noise.resize((500, 375)).save(out, 'JPEG', quality=91)
    yield out.getvalue()


def prepare(raw: pathlib.Path, out: pathlib.Path) -> None:
  """Prepares a folder as the program does."""
  from jaxprog.data import preparation

  preparation.prepare(f'folder:{raw}', out)


def build_by_tfds(raw: pathlib.Path, out: pathlib.Path) -> None:
  """Prepares it by a builder as tfds's guide has them."""
  import tensorflow_datasets as tfds

  class Folder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = {
        'image': tfds.features.Image(),
        'label': tfds.features.ClassLabel(
          names=sorted(x.name for x in (raw / 'train').iterdir())
        ),
        'file_name': tfds.features.Text(),
        'wnid': tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {x: self._generate_examples(raw / x) for x in ('train', 'val')}

    def _generate_examples(self, folder):
      for path in folder.glob('*/*'):
        wnid = path.parent.name
        names = {'label': wnid, 'wnid': wnid, 'file_name': path.name}
        yield f'{wnid}/{path.name}', {'image': path, **names}

  tfds.disable_progress_bar()
  builder = Folder(data_dir=out, file_format='array_record')
  builder.download_and_prepare()


def copy(raw: pathlib.Path, out: pathlib.Path) -> None:
  """Copies it."""
  subprocess.run(['cp', '-r', raw, out], check=True)


CONTESTANTS: dict[str, Callable[[pathlib.Path, pathlib.Path], None]] = {
  'jaxprog': prepare,
  'tfds': build_by_tfds,
  'cp': copy,
}


def run(work: pathlib.Path, name: str, cores: int) -> np.ndarray:
  """Returns the seconds that a contestant took, and those of a core."""
  shutil.rmtree(work / 'out', ignore_errors=True)
  os.sync()
  chosen = ','.join(map(str, sorted(os.sched_getaffinity(0))[-cores:]))
  command = (sys.executable, __file__, f'--contestant={name}', f'--work={work}')
  before, began = os.times(), time.perf_counter()
  subprocess.run(
    ['taskset', '-c', chosen, *command], check=True, capture_output=True
  )
  os.sync()
  seconds, after = time.perf_counter() - began, os.times()
  spent = after.children_user - before.children_user
  spent += after.children_system - before.children_system
  return np.array((seconds, spent))


def compare(
  work: pathlib.Path, args: argparse.Namespace, size: int, cores: int
) -> None:
  """Prints images/s and the time of a core an image, beside ours."""
  # What a process takes before its first image is none of an image's.
  few, count = lay_out_few(work)
  count = args.images - count
  starts = {x: run(few, x, cores) for x in CONTESTANTS}
  found: dict[str, list[np.ndarray]] = {x: [] for x in CONTESTANTS}
  for _ in range(args.rounds):
    for name in found:
      starts[name] = np.minimum(starts[name], run(few, name, cores))
      found[name].append(run(work, name, cores))
  print(f'\n{cores} cores, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}')
  for name, runs in found.items():
    times = np.array(runs) - starts[name]
    seconds, spent = np.median(times, axis=0) / count
    ratios = (
      times[:, 0] / (np.array(found['jaxprog']) - starts['jaxprog'])[:, 0]
    )
    print(
      f'  {name:8} {1 / seconds:7,.0f} images/s, {1e6 * spent:5.0f} us of a '
      f'core an image, {np.median(ratios):.2f}x our time '
      f'({ratios.min():.2f} to {ratios.max():.2f})'
    )
  times = np.array(found['jaxprog']) - starts['jaxprog']
  spent = np.median(times, axis=0)[1] / count
  # Every image is read once and written once.
  binds = DISK / (2 * size / args.images)
  print(
    f'  calculated: a disk of {DISK / 1e6:.0f} MB/s lets {binds:,.0f} images/s '
    f'pass, read and written: {binds * spent:.2f} cores; {IMAGES:,} images in '
    f'{IMAGES / binds / 60:.0f} minutes'
  )


def lay_out_few(work: pathlib.Path) -> tuple[pathlib.Path, int]:
  """Returns a folder of two images a class, and how many these are."""
  paths = [
    x
    for x in (work / 'raw').rglob('*.JPEG')
    if int(x.stem.split('_')[1]) < 2 * CLASSES
  ]
  for path in paths:
    new = work / 'few' / path.relative_to(work)
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, new)
  return work / 'few', len(paths)


def show_parts(raw: pathlib.Path) -> None:
  """Prints the time of a core that each part of an image's way takes."""
  from array_record.python import array_record_module

  from jaxprog.data import builders, writer

  images = [
    builders.RawImage(x.name, x.parent.name, x)
    for x in sorted(raw.rglob('*.JPEG'))[:1000]
  ]
  labels = {x.wnid: 0 for x in images}
  held = [x._replace(data=x.read()) for x in images]
  records = [writer._encode(x, labels)[0] for x in held]

  def write(options: str) -> float:
    path = str(raw.parent / 'part')
    out = array_record_module.ArrayRecordWriter(path, options)
    spent = take_time(out.write, records)
    return spent + take_time(lambda x: x.close(), [out])

  found: dict[str, Callable[[], float]] = {
    'reading': lambda: take_time(lambda x: x.read(), images),
    'SHA-256': lambda: take_time(lambda x: hashlib.sha256(x.data), held),
    'SHA-256 and record': lambda: take_time(
      lambda x: writer._encode(x, labels), held
    ),
    'hash and sort': lambda: take_time(
      lambda x: writer._sort('train', x), [images]
    ),
    'writing': lambda: write(writer.OPTIONS),
    'writing with zstd': lambda: write('group_size:1'),
  }
  print('us of a core an image, best of 5:')
  for name, call in found.items():
    spent = min(call() for _ in range(5)) / len(images)
    print(f'  {name:20} {1e6 * spent:6.1f}')


def take_time(function: Callable[[Any], object], items: Iterable[Any]) -> float:
  """Returns the seconds of a core that it takes; what comes back is dropped."""
  began = time.process_time()
  for item in items:
    function(item)
  return time.process_time() - began


if __name__ == '__main__':
  main()

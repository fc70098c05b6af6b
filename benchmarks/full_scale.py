"""What ImageNet's number of images costs before and around the first step.

    python benchmarks/full_scale.py --folder=/tmp/full_scale

Writes raw folders in the layouts and with the numbers of images of all four
datasets of configs/progressive.py; the images are 32 px, of noise that is as
smooth as photographs, and a function of the file's name. All is kept in
--folder (some 12 GB): a second call goes on where the first one was killed.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent import futures

import cv2
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE = 32
IMAGENETTE = (
  *('n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03028079'),
  *('n03394916', 'n03417042', 'n03425413', 'n03445777', 'n03888257'),
)
# In ImageNet's number; which ones does not matter here.
WNIDS = tuple(sorted({*IMAGENETTE, *(f'n{i:08}' for i in range(990))}))
# Of each dataset: folder, classes, training and evaluation images.
DATASETS = {
  'imagenette': ('imagenette2', IMAGENETTE, 9_469, 3_925),
  'tiny_imagenet': ('tiny-imagenet-200', WNIDS[:200], 100_000, 10_000),
  'imagenet_mini': ('imagenet-mini', WNIDS, 34_745, 3_923),
  'imagenet2012': ('imagenet1k', WNIDS, 1_281_167, 50_000),
}


def list_files(dataset: str) -> Iterator[tuple[str, list[str], str]]:
  """Yields folder, file names and class of the images of a raw dataset."""
  _, wnids, train, evaluation = DATASETS[dataset]
  tiny, flat = dataset == 'tiny_imagenet', dataset == 'imagenet2012'
  for wnid, part in zip(wnids, divide(train, len(wnids)), strict=True):
    names = [f'{wnid}_{i}.JPEG' for i in range(len(part))]
    yield f'train/{wnid}/images' if tiny else f'train/{wnid}', names, wnid
  for wnid, part in zip(wnids, divide(evaluation, len(wnids)), strict=True):
    if tiny:
      yield 'val/images', [f'val_{i}.JPEG' for i in part], wnid
    elif dataset == 'imagenette':  # ImageNet trains on them.
      names = [f'{wnid}_{1000 + i}.JPEG' for i in range(len(part))]
      yield f'val/{wnid}', names, wnid
    else:
      names = [f'ILSVRC2012_val_{i + 1:08}.JPEG' for i in part]
      yield 'val' if flat else f'val/{wnid}', names, wnid


def divide(count: int, parts: int) -> list[range]:
  """Returns range(count) in parts of nearly the same size."""
  ends = [count * i // parts for i in range(parts + 1)]
  return [range(a, b) for a, b in itertools.pairwise(ends)]


def draw(name: str) -> bytes:
  """Returns the JPEG of that name: noise of three scales."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  image = np.full((SIZE, SIZE, 3), rng.uniform(60, 190), np.float32)
  for side, strength in ((2, 40), (4, 25), (8, 15)):
    noise = rng.standard_normal((side, side, 3), np.float32)
    # Channels of photographs are nearly alike.
    noise = strength * (0.8 * noise[..., :1] + 0.4 * noise)
    image += cv2.resize(noise, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
  pixels = np.clip(image, 0, 255).astype(np.uint8)
  return cv2.imencode('.jpg', pixels)[1].tobytes()


def write_folder(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Writes the images `names` unless they are there."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    path = folder / name
    if not path.exists():
      temporary = path.with_suffix('.tmp')
      temporary.write_bytes(draw(name))
      temporary.rename(path)


def lay_out(folder: pathlib.Path) -> None:
  """Writes the four raw datasets below `folder`, and lists of labels."""
  with futures.ProcessPoolExecutor(os.cpu_count()) as pool:
    for dataset, (name, wnids, *_) in DATASETS.items():
      root = folder / name
      if (root / 'complete').exists():
        continue
      files = list(list_files(dataset))
      tasks = [
        pool.submit(write_folder, root / place, names)
        for place, names, _ in files
      ]
      for task in tasks:
        task.result()
      labels = [
        f'{x}\t{wnid}\n'
        for place, names, wnid in files
        for x in names
        if place.startswith('val')
      ]
      if dataset == 'tiny_imagenet':
        (root / 'wnids.txt').write_text('\n'.join(wnids))
        (root / 'val' / 'val_annotations.txt').write_text(''.join(labels))
      elif dataset == 'imagenet2012':
        (root / 'val_labels.txt').write_text(''.join(labels))
      (root / 'complete').touch()


def reshard(folder: pathlib.Path) -> None:
  """Lets the prepared ImageNet lie in files as tfds writes it: 1,024 + 64."""
  from array_record.python import array_record_module

  from jaxprog.data import preparation

  dataset = preparation.open_prepared('imagenet2012', folder)
  assert dataset is not None
  old = dataset.train.directory
  new = folder / 'many' / old.relative_to(folder)
  shutil.rmtree(new, ignore_errors=True)
  new.mkdir(parents=True)
  info = json.loads((old / 'dataset_info.json').read_text())
  for split, count in (('train', 1024), ('validation', 64)):
    records = dataset.train if split == 'train' else dataset.eval
    parts = divide(len(records), count)
    for i, part in enumerate(parts):
      name = f'{old.parent.name}-{split}.array_record-{i:05}-of-{count:05}'
      writer = array_record_module.ArrayRecordWriter(
        str(new / name), 'group_size:1'
      )
      for position in part:
        writer.write(records.source[position])
      writer.close()
    (row,) = (x for x in info['splits'] if x['name'] == split)
    row['shardLengths'] = [str(len(part)) for part in parts]
  shutil.copy(old / 'features.json', new)
  shutil.copy(old / 'label.labels.txt', new)
  (new / 'dataset_info.json').write_text(json.dumps(info))


def start(folder: pathlib.Path) -> dict[str, float]:
  """Returns seconds until ImageNet is open, until the first batch, ...."""
  from jaxprog import epochs, stages, start_from
  from jaxprog.data import batches, loader, preparation

  config = start_from('default')
  config.stages = [
    {
      'name': 'imagenet',
      'dataset': 'imagenet2012',
      'batch_size': 256,
      'image_size': SIZE,
      'num_epochs': 1,
    }
  ]
  (stage,) = stages.create_stages(config)
  seconds = {}
  with clock(seconds, 'open'):
    dataset = preparation.load_dataset('imagenet2012', folder)
  with clock(seconds, 'order of an epoch'):
    batches.epoch_order(0, 0, len(dataset.train))
  steps = epochs.count_steps(stage, len(dataset.train))
  reader = loader.train_batches(
    dataset.train, stage, seed=0, steps=steps, num_workers=2
  )
  with contextlib.closing(reader):
    with clock(seconds, 'first batch'):
      next(reader)
    with clock(seconds, '100 batches'):
      for _ in range(100):
        next(reader)
  return seconds


def look(folder: pathlib.Path) -> dict[str, float]:
  """Returns seconds of signing ImageNet's images, and of comparing them."""
  from jaxprog.data import leaks, preparation, signatures

  dataset = preparation.load_dataset('imagenet2012', folder)
  seconds: dict[str, float] = {}
  with clock(seconds, 'signatures'):
    tables = [
      signatures.read_signatures(x) for x in (dataset.train, dataset.eval)
    ]
  with clock(seconds, 'looks'):
    leaks.match_looks(*tables)
  return seconds


@contextlib.contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
  """Notes in `seconds` what the body takes."""
  began = time.perf_counter()
  yield
  seconds[name] = time.perf_counter() - began


def measure(command: Sequence[str], soft_limit: int = 1024) -> dict:
  """Returns seconds, memory and open files of a command, and what it prints.

  It begins with a login shell's limit of open files.
  """

  def limit():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard))

  began, used = time.perf_counter(), cpu_seconds()
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    preexec_fn=limit,
  )
  assert process.stdout is not None
  output: list[str] = []
  reading = threading.Thread(target=lambda: output.extend(process.stdout))
  reading.start()
  peak = {'files': 0, 'VmRSS': 0, 'RssAnon': 0}
  while process.poll() is None:
    with contextlib.suppress(OSError, KeyError):  # It has just ended.
      status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
      rows = dict(x.split(':', 1) for x in status.splitlines())
      for name in ('VmRSS', 'RssAnon'):
        peak[name] = max(peak[name], int(rows[name].split()[0]) * 1024)
      files = len(os.listdir(f'/proc/{process.pid}/fd'))
      peak['files'] = max(peak['files'], files)
    time.sleep(0.05)
  reading.join()
  if process.returncode:
    sys.exit(''.join(output))
  return {
    'seconds': time.perf_counter() - began,
    'cpu': cpu_seconds() - used,
    'memory': peak['VmRSS'],
    # Without what is mapped from files, which the kernel may take back.
    'own_memory': peak['RssAnon'],
    'files': peak['files'],
    'output': ''.join(output),
  }


def cpu_seconds() -> float:
  """Returns what processes that have ended took of all cores."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def list_commands(folder: pathlib.Path) -> dict[str, list[str]]:
  """Returns what is measured, one process each, in order."""
  this = [sys.executable, str(pathlib.Path(__file__).resolve())]
  program = [sys.executable, 'main.py', '--config=configs/progressive.py']
  few, many = (f'--folder={x}' for x in (folder, folder / 'many'))
  return {
    'prepare': [
      *program,
      '--mode=prepare',
      f'--config.data_dir={folder}',
      '--only=imagenet',
      '--config.exclude_leaks=false',
    ],
    'start': [*this, few, '--step=start'],
    'look': [*this, few, '--step=look'],
    'reshard': [*this, few, '--step=reshard'],
    'start, labels not known': [*this, many, '--step=start'],
    'start, 1,088 files': [*this, many, '--step=start'],
    'prepare the ladder': [
      *program,
      '--mode=prepare',
      f'--config.data_dir={folder}',
    ],
    'dry_run': [
      *program,
      '--dry_run',
      f'--config.data_dir={folder}',
      f'--workdir={folder}/run',
      '--config.model=resnet18',
      '--config.num_filters=16',
      *(f'--config.stages[{i}].image_size={SIZE}' for i in range(4)),
    ],
  }


def main() -> None:
  """Measures what was not measured yet, and prints all of it."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--step', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  folder = args.folder.resolve()
  if args.step:
    steps = {'start': start, 'look': look, 'reshard': reshard}
    print(json.dumps(steps[args.step](folder)))
    return
  lay_out(folder)
  path = folder / 'results.json'
  results = json.loads(path.read_text()) if path.exists() else {}
  for name, command in list_commands(folder).items():
    if name not in results:
      results[name] = measure(command)
      path.write_text(json.dumps(results, indent=2))
    row = results[name]
    print(
      f'{name}: {row["seconds"]:.1f} s ({row["cpu"]:.1f} s of a core), '
      f'{row["memory"] / 1e6:,.0f} MB '
      f'({row["own_memory"] / 1e6:,.0f} its own), {row["files"]:,} files\n'
      f'{row["output"]}'
    )


if __name__ == '__main__':
  main()

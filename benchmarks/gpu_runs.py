"""The parts of benchmarks/gpu.py that are runs of the program.

    PYTHONPATH=. python benchmarks/gpu_runs.py quickstart --work=/tmp/gpu

Prints rows as benchmarks/gpu.py reads them.
"""

import argparse
import hashlib
import importlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import cv2
import numpy as np

from benchmarks.gpu import say
from jaxprog import formats, start_from
from jaxprog.monitoring import environment

# A save in every so many steps, so that a run is killed in mid-epoch.
SAVE_STEPS = 7
# What makes the quickstart a toy.
TOY = (
  '--config.num_filters=4',
  '--config.stage_defaults.image_size=8',
  '--config.stages[*].num_epochs=2',
)
CLASSES = 200


def main() -> None:
  """Runs one part."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('part', choices=PARTS)
  parser.add_argument('--work', type=pathlib.Path, required=True)
  parser.add_argument('--flags', default='none', help='a set of XLA flags')
  parser.add_argument('--storage', default='original')
  parser.add_argument('--photos', type=pathlib.Path)
  parser.add_argument('--toy', action='store_true')
  args = parser.parse_args()
  PARTS[args.part](args)


def describe_machine(args: argparse.Namespace) -> None:
  """Says what this is measured on, and with what."""
  import jax

  found = environment.environment()
  devices, cores = found['devices'], len(os.sched_getaffinity(0))
  device = f'{devices["count"]} x {devices["kind"]}'
  if limit := devices['memory_bytes']:
    device += f', {formats.size(limit)} for JAX'
  device += f', {cores} cores of {found["cpu"]}'
  versions = {'Python': found['python']}
  for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch'):
    try:
      versions[name] = importlib.import_module(name).__version__
    except ImportError:
      versions[name] = 'not installed'
  values = {
    'platform': jax.default_backend(),
    'device': device,
    'driver': read_driver(),
    'versions': versions,
  }
  figure = f'{device}, driver {values["driver"]}'
  say('device', figure, values, toy=args.toy)
  say('versions', ', '.join(f'{k} {v}' for k, v in versions.items()), versions)


def read_driver() -> str:
  """Returns the version of NVIDIA's driver."""
  query = '--query-gpu=driver_version', '--format=csv,noheader'
  try:
    found = subprocess.run(
      ['nvidia-smi', *query], capture_output=True, text=True, timeout=20
    )
  except (OSError, subprocess.TimeoutExpired):
    return 'not told'
  lines = found.stdout.split() or ['not told']
  return lines[0]


def start_main(
  args: argparse.Namespace, workdir: pathlib.Path, *arguments: str
) -> subprocess.Popen:
  """Starts the quickstart; data and programs are kept beside `workdir`.

  A rehearsal takes programs that other runs have kept.
  """
  folder = workdir.parent
  kept = f'--config.compilation_cache_dir={folder / "programs"}'
  command = [
    *(sys.executable, 'main.py', '--config=configs/quickstart.py'),
    *(f'--workdir={workdir}', f'--config.data_dir={folder / "data"}'),
    *(TOY if args.toy else (kept,)),
    *arguments,
  ]
  return subprocess.Popen(command)


def wait_for(process: subprocess.Popen) -> None:
  """Waits for a run, which must end well."""
  if code := process.wait():
    raise SystemExit(f'The run ended with code {code}.')


def run_quickstart(args: argparse.Namespace) -> None:
  """Trains the four stages on an empty machine: no data, no programs."""
  shutil.rmtree(args.work / 'quickstart', ignore_errors=True)
  workdir = args.work / 'quickstart' / 'run'
  only = ('--only=four,seven',) if args.toy else ()
  began = time.monotonic()
  wait_for(start_main(args, workdir, *only))
  seconds = time.monotonic() - began
  stages = read_stages(workdir)
  say(
    'four stages',
    f'{seconds:.1f} s, data and compilation included (n = 1)',
    {'seconds': seconds, 'stages': len(stages)},
  )
  gaps = [x['handover_seconds'] for x in stages if 'handover_seconds' in x]
  words = ', '.join(f'{x:.2f}' for x in gaps)
  slowest = max(gaps)
  say('slowest hand-over', f'{slowest:.2f} s of {words}', {'seconds': slowest})
  for stage in stages:
    last = stage['epochs'][-1]
    rate = last['images_per_second']
    top1 = stage['best']['top1']
    say(
      f'stage {stage["name"]}',
      f'best top-1 {top1:.1%}, {rate:,.0f} images/s in the last epoch',
      {'top1': top1, 'images_per_second': rate},
    )


def read_stages(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the stages of a run's history."""
  history = json.loads((workdir / 'training_history.json').read_text())
  return history['stages']


def compare_bits(args: argparse.Namespace) -> None:
  """Trains twice, and once killed in each stage: are these the same bits?"""
  folder = args.work / f'bits_{args.flags}'
  shutil.rmtree(folder, ignore_errors=True)
  stages = ('four',) if args.toy else ('seven', 'ten')
  flags = (f'--config.xla_flags={args.flags}', f'--only={",".join(stages)}')

  def train_killed() -> int:
    kills = 0
    saving = *flags, f'--config.checkpoint_every_steps={SAVE_STEPS}'
    for i, stage in enumerate(stages):
      process = start_main(args, folder / 'killed', *saving)
      latest = folder / 'killed' / 'checkpoints' / stage / 'latest'
      kills += kill_once_saved(process, latest, SAVE_STEPS * (1 + 2 * i))
    wait_for(start_main(args, folder / 'killed', *saving))
    return kills

  # The first alone: it prepares the data and compiles for the others.
  wait_for(start_main(args, folder / 'first', *flags))
  with futures.ThreadPoolExecutor() as pool:
    again = pool.submit(
      lambda: wait_for(start_main(args, folder / 'second', *flags))
    )
    kills = pool.submit(train_killed)
    again.result()
  expected = read_outcome(folder / 'first', stages)
  report_bits('twice', expected, read_outcome(folder / 'second', stages))
  found = read_outcome(folder / 'killed', stages)
  report_bits('kill -9, gone on', expected, found, kills.result())


def kill_once_saved(
  process: subprocess.Popen, latest: pathlib.Path, step: int
) -> bool:
  """Kills a run whose save of `step`, or of a later one, has committed."""
  while process.poll() is None:
    saved = [x.name for x in latest.glob('*') if x.name.isdecimal()]
    if any(int(x) >= step for x in saved):
      process.kill()
      return process.wait() < 0
    time.sleep(0.01)
  return False


def read_outcome(
  workdir: pathlib.Path, stages: tuple[str, ...]
) -> tuple[str, list[list[float]]]:
  """Returns the sum of all last weights, and what each epoch came to."""
  import jax

  from jaxprog.reliability import checkpoints

  digest = hashlib.sha256()
  for stage in stages:
    variables, _ = checkpoints.load_weights(workdir, stage, 'final')
    for leaf in jax.tree.leaves(variables):
      digest.update(np.asarray(leaf).tobytes())
  names = ('train_loss', 'grad_norm', 'val_loss', 'val_top1')
  rows = [
    [epoch[name] for name in names]
    for stage in read_stages(workdir)
    for epoch in stage['epochs']
  ]
  return digest.hexdigest(), rows


def report_bits(
  what: str,
  expected: tuple[str, list[list[float]]],
  found: tuple[str, list[list[float]]],
  kills: int | None = None,
) -> None:
  """Prints whether two runs are the same, and by how much they are not.

  A run that was over before it could be killed shows nothing.
  """
  (bits, rows), (other_bits, other_rows) = expected, found
  equal = bits == other_bits and rows == other_rows
  worst = max(
    abs(a - b) / max(abs(a), 1e-9)
    for row, other in zip(rows, other_rows, strict=True)
    for a, b in zip(row, other, strict=True)
  )
  words = 'the same bits' if equal else f'OTHER BITS, worst figure {worst:.1e}'
  if kills is not None:
    words += f', killed {kills} times'
  say(
    what,
    f'{words}, {len(rows)} epochs',
    {'equal': None if kills == 0 else int(equal), 'worst': worst},
  )


def lay_out_photographs(args: argparse.Namespace) -> pathlib.Path:
  """Returns a folder of photographs for training, made once.

  Each stands there so often that an epoch has batches enough.
  """
  folder = args.work / 'photographs'
  if (folder / 'complete').exists():
    return folder
  shutil.rmtree(folder, ignore_errors=True)
  source = args.photos or draw_photographs(
    args.work / 'drawn', 20 if args.toy else CLASSES
  )
  if source.is_file():
    with tarfile.open(source) as archive:
      archive.extractall(args.work / 'unpacked', filter='data')
    (source,) = (args.work / 'unpacked').iterdir()
  paths = sorted(source.glob('*/*.JPEG'))
  copies = 2 if args.toy else -(-6400 // len(paths))
  for path in paths:
    for split, count in (('train', copies), ('val', 1)):
      target = folder / split / path.parent.name
      target.mkdir(parents=True, exist_ok=True)
      for i in range(count):
        shutil.copyfile(path, target / f'{i}_{path.name}')
  (folder / 'complete').touch()
  return folder


def draw_photographs(folder: pathlib.Path, classes: int) -> pathlib.Path:
  """Writes a JPEG a class, as large as ImageNet's: 500x375 px, 110 KB."""
  for index in range(classes):
    name = f'n{index:08}'
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    image = np.full((375, 500, 3), 120, np.float32)
    for side, strength in ((4, 40), (16, 25), (64, 20), (256, 14)):
      noise = rng.standard_normal((side, side, 3), np.float32)
      # Channels of photographs are nearly alike.
      noise = strength * (0.8 * noise[..., :1] + 0.3 * noise)
      image += cv2.resize(noise, (500, 375), interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / name / f'{name}_0.JPEG'
    path.write_bytes(cv2.imencode('.jpg', pixels, quality)[1].tobytes())
  return folder


def say_photographs(args: argparse.Namespace) -> None:
  """Makes the photographs ready and says how many there are."""
  paths = list(lay_out_photographs(args).glob('train/*/*'))
  size = statistics.mean(x.stat().st_size for x in paths)
  kind = 'given' if args.photos else 'drawn'
  say(
    'images',
    f'{len(paths):,} {kind}, {formats.size(size)} each',
    {'images': len(paths), 'bytes': size},
  )


def measure_loop(args: argparse.Namespace) -> None:
  """Says what the loop and its input add to the step, on photographs."""
  from benchmarks import loop_overhead

  folder = lay_out_photographs(args)
  config = start_from('default')
  config.data_dir = str(args.work / 'data')
  if not args.toy:
    config.compilation_cache_dir = str(args.work / 'programs')
  config.model, batch_size, size, steps = 'resnet50', 256, 224, 25
  if args.toy:
    config.model, config.num_filters, batch_size, size = 'resnet10', 4, 8, 16
    steps = 5
  config.stages = [
    {
      'name': 'photographs',
      'dataset': f'folder:{folder}',
      'image_size': size,
      'batch_size': batch_size,
      'storage': args.storage,
      'optimizer': 'sgd_momentum',
      'schedule': 'cosine_warmup',
      'learning_rate': 0.05,
      'num_epochs': 3,
    }
  ]
  rounds = 2 if args.toy else 5
  found = loop_overhead.measure(config, 'photographs', steps, rounds)
  rate = batch_size / found['whole']
  say(
    'loop and input',
    f'{found["outside"]:.1%} of {1e3 * found["whole"]:.1f} ms a step, '
    f'{rate:,.0f} images/s, input wait {found["waiting"]:.1%}, '
    f'{len(os.sched_getaffinity(0))} cores (n = {rounds})',
    {**found, 'images_per_second': rate, 'storage': args.storage},
  )


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
  'machine': describe_machine,
  'quickstart': run_quickstart,
  'bits': compare_bits,
  'photographs': say_photographs,
  'loop': measure_loop,
}


if __name__ == '__main__':
  main()

"""Images a second of the input pipeline, beside those of tf.data and PyTorch.

    python benchmarks/input.py --images=imagenet-samples.tar

Reads full-size JPEGs, takes random resized crops of 224 pixels and batches
them. Every contestant lives in a process of its own on as many cores as it is
given, and all take turns: a round is --seconds of each. Ours and PyTorch's
batches are uint8; tf.data's are flipped, normalised and bfloat16, as JAX
programs write that pipeline. Nothing is trained meanwhile. The others are what
`pip install 'jaxprog[parity]'` brings.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator

BATCH = 64
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Name -> storage, image size and perhaps the interpolation, of ours.
OURS = {
  'jpeg': ('original', SIZE),
  'jpeg, bicubic': ('original', SIZE, 'bicubic'),
  'jpeg:256': ('jpeg:256', SIZE),
  'raw:256': ('raw:256', SIZE),
  'raw:64 at 64 px': ('raw:64', 64),
}
PEERS = ('tf.data', 'torchvision')


def main() -> None:
  """Lets the contestants take turns and prints medians and ratios."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--images', required=True, help='a .tar or a folder')
  parser.add_argument('--cores', type=int, nargs='+', default=[1, 2])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=3.0)
  parser.add_argument('--contestant', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.contestant:
    serve(args.contestant, args.images, args.cores[0], args.seconds)
    return
  with tempfile.TemporaryDirectory() as folder:
    data = lay_out(pathlib.Path(args.images), pathlib.Path(folder))
    for cores in args.cores:
      rates = compare(str(data), cores, args.rounds, args.seconds)
      show(rates, cores)


def lay_out(images: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder with train/CLASS/*.JPEG and the same below val."""
  if images.is_file():
    with tarfile.open(images) as archive:
      archive.extractall(folder / 'unpacked', filter='data')
    (images,) = (folder / 'unpacked').iterdir()
  data = folder / 'data'
  data.mkdir()
  for split in ('train', 'val'):
    (data / split).symlink_to(images.resolve())
  return data


def compare(
  data: str, cores: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
  """Returns each contestant's images/s, round by round."""
  names = [*OURS, 'evaluation', *PEERS]
  with contextlib.ExitStack() as stack:
    turns = {
      name: stack.enter_context(start(name, data, cores, seconds))
      for name in names
    }
    for turn in turns.values():
      turn()  # Warm: files are cached, threads run.
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
      for name, turn in turns.items():
        rates[name].append(turn())
  return {name: found for name, found in rates.items() if found[0] > 0}


@contextlib.contextmanager
def start(
  name: str, data: str, cores: int, seconds: float
) -> Iterator[Callable[[], float]]:
  """Yields a function that lets a contestant run for its time."""
  process = subprocess.Popen(
    [
      *(sys.executable, __file__, f'--contestant={name}', f'--images={data}'),
      *(f'--cores={cores}', f'--seconds={seconds}'),
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdin is not None
  assert process.stdout is not None

  def turn() -> float:
    time.sleep(1)  # The one before may still read ahead.
    process.stdin.write('go\n')
    process.stdin.flush()
    return json.loads(process.stdout.readline())

  try:
    yield turn
  finally:
    process.kill()
    process.wait()


def serve(name: str, data: str, cores: int, seconds: float) -> None:
  """Answers each line on stdin with images/s, 0 if it cannot run here."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
  answer = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # Libraries that print do not disturb.
  try:
    batches = create_batches(name, data, cores)
  except ImportError:
    batches = None
  for _ in sys.stdin:
    rate, began, images = 0.0, time.perf_counter(), 0
    while batches is not None and (
      time.perf_counter() - began < seconds or not images
    ):
      images += len(next(batches))
      rate = images / (time.perf_counter() - began)
    print(rate, file=answer, flush=True)


def create_batches(name: str, data: str, cores: int) -> Iterator:
  """Returns an endless iterator over batches of images."""
  match name:
    case 'tf.data':
      return tf_data(data, cores)
    case 'torchvision':
      return torchvision_loader(data, cores)
    case 'evaluation':
      return ours(data, cores, 'original', SIZE, training=False)
    case _:
      return ours(data, cores, *OURS[name])


def ours(
  data: str,
  cores: int,
  storage: str,
  size: int,
  interpolation: str = 'bilinear',
  *,
  training: bool = True,
) -> Iterator:
  """Yields this program's batches."""
  sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
  from jaxprog import epochs, stages, start_from
  from jaxprog.data import loader, preparation

  config = start_from('default')
  config.stages = [
    {
      'name': 'input',
      'dataset': f'folder:{data}',
      'image_size': size,
      'batch_size': BATCH,
      'storage': storage,
      'crop_interpolation': interpolation,
      'num_epochs': 1e5,
    }
  ]
  (stage,) = stages.create_stages(config)
  dataset = preparation.load_dataset(stage.dataset, pathlib.Path(data).parent)
  dataset = preparation.store(dataset, stage.stored)
  steps = epochs.count_steps(stage, len(dataset.train))
  while True:
    if training:
      reader = loader.train_batches(
        dataset.train, stage, seed=0, steps=steps, num_workers=cores
      )
    else:
      reader = loader.eval_batches(dataset.eval, stage, num_workers=cores)
    with contextlib.closing(reader):
      for batch in reader:
        yield batch['image'][batch['mask']]


def tf_data(data: str, cores: int) -> Iterator:
  """Yields batches as the JAX programs that use tf.data make them."""
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
  os.environ['CUDA_VISIBLE_DEVICES'] = ''
  import tensorflow as tf

  tf.config.threading.set_intra_op_parallelism_threads(cores)
  tf.config.threading.set_inter_op_parallelism_threads(cores)
  files = [str(x) for x in sorted(pathlib.Path(data).glob('train/*/*'))]

  def load(path):
    encoded = tf.io.read_file(path)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.image.extract_jpeg_shape(encoded),
      bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
      min_object_covered=0.1,
      aspect_ratio_range=(3 / 4, 4 / 3),
      area_range=(0.08, 1.0),
      max_attempts=10,
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], axis=0)
    image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
    image = tf.image.resize(image, (SIZE, SIZE), 'bicubic')
    image = tf.image.random_flip_left_right(image)
    image = (image - 255 * tf.constant(MEAN)) / (255 * tf.constant(STD))
    return tf.cast(image, tf.bfloat16)

  dataset = tf.data.Dataset.from_tensor_slices(files).repeat()
  dataset = dataset.shuffle(len(files)).map(load, num_parallel_calls=cores)
  options = tf.data.Options()
  options.threading.private_threadpool_size = cores
  dataset = dataset.batch(BATCH, drop_remainder=True).with_options(options)
  yield from dataset.prefetch(2).as_numpy_iterator()


def torchvision_loader(data: str, cores: int) -> Iterator:
  """Yields batches of PyTorch's DataLoader, decoded and cropped by Pillow."""
  import torch
  from PIL import Image

  library = torch.library.Library('torchvision', 'FRAGMENT')
  for name in ('nms', 'qnms'):
    # Wheels for CUDA import beside PyTorch's for CPUs only if these are known.
    if not hasattr(torch.ops.torchvision, name):
      library.define(f'{name}(Tensor a, Tensor b, float c) -> Tensor')
  from torchvision.transforms import v2

  torch.set_num_threads(1)
  transform = v2.Compose(
    [
      v2.RandomResizedCrop(SIZE, antialias=True),
      v2.RandomHorizontalFlip(),
      v2.PILToTensor(),
    ]
  )
  files = sorted(pathlib.Path(data).glob('train/*/*'))

  class Images(torch.utils.data.Dataset):
    """Every file of the folder."""

    def __len__(self):
      return len(files)

    def __getitem__(self, index):
      encoded = files[index].read_bytes()
      return transform(Image.open(io.BytesIO(encoded)).convert('RGB'))

  dataset = Images()
  sampler = torch.utils.data.RandomSampler(
    dataset, replacement=True, num_samples=10**7
  )
  yield from torch.utils.data.DataLoader(
    dataset, BATCH, sampler=sampler, num_workers=cores, drop_last=True
  )


def show(rates: dict[str, list[float]], cores: int) -> None:
  """Prints a table: images/s, images/s/core, ratios of the same rounds."""
  peers = [name for name in PEERS if name in rates]
  rounds = len(next(iter(rates.values())))
  print(f'\n{cores} core(s), {rounds} rounds, batch {BATCH}, medians')
  header = f'{"":18}{"images/s":>10}{"/core":>8}{"least":>8}{"most":>8}'
  print(header + ''.join(f'{"/ " + name:>15}' for name in peers))
  for name, found in rates.items():
    median = statistics.median(found)
    line = f'{name:18}{median:10,.0f}{median / cores:8,.0f}'
    line += f'{min(found):8,.0f}{max(found):8,.0f}'
    for peer in peers:
      ratio = statistics.median(
        a / b for a, b in zip(found, rates[peer], strict=True)
      )
      line += f'{ratio:14.2f}x'
    print(line)


if __name__ == '__main__':
  main()

"""Says what images show: classes and probabilities of saved weights."""

import collections
import csv
import io
import itertools
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.progress
from ml_collections import config_dict
from PIL import Image, UnidentifiedImageError

from jaxprog import errors, files
from jaxprog import paths as paths_lib
from jaxprog.data import folders, preprocess
from jaxprog.reporting import contact_sheet
from jaxprog.training import augment, devices, preflight
from jaxprog.training import setup as setup_lib
from jaxprog.training import trained as trained_lib

# Images of a batch, but for one image alone; more gain nothing, because
# decoding takes longer.
BATCH_SIZE = 32
NUM_CLASSES = 5
NUM_ROWS = 20
# No photograph is larger than that, in bytes.
MAX_BYTES = 2**30
_ORIENTATION = 0x0112  # Of EXIF; 1: as stored.

Prediction = dict[str, Any]


class Found(NamedTuple):
  """Image files, sorted, below `root`; and what else was there."""

  root: pathlib.Path
  images: list[pathlib.Path]
  left_out: list[folders.LeftOut]


class _Read(NamedTuple):
  """Pixels uint8 (S, S, 3), None with the reason for it in `error`."""

  pixels: np.ndarray | None
  error: str
  # Whether EXIF asks for it to be shown turned.
  turned: bool


def predict(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  input: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
  model: setup_lib.ModelFn | None = None,
) -> list[Prediction]:
  """Returns what each image shows, in the order of their names.

  Keys: file; then class (WordNet id or name), name (for people), probability
  and top5 [(class, probability)], or error, where it cannot be read. Images
  are cropped as in evaluation; EXIF orientation is ignored, as in training.
  The first rows are printed, all are written to WORKDIR/predictions/NAME.csv,
  and the first images are drawn in NAME.png; NAME is that of `input`.

  Args:
    config: the run's own.
    workdir: of the run. The data that it was trained on is not needed.
    input: an image, or a folder of them and of folders.
    stage: whose weights; '': the last one that `workdir` has finished.
    weights: best, final or ema.
    model: what `train` was given in place of the config's network.

  Raises:
    UserError: if there are no such weights or no images.
  """
  found = find_images(input)
  trained = trained_lib.load_trained(
    config, workdir, stage=stage, weights=weights, model=model
  )
  preflight.check_workdir(pathlib.Path(workdir))
  console = rich.console.Console(stderr=True, highlight=False, markup=False)
  predictions: list[Prediction] = []
  turned = 0
  for prediction, is_turned in rich.progress.track(
    classify(trained, found.images),
    total=len(found.images),
    description='images',
    console=console,
    transient=True,
    disable=not console.is_terminal,
  ):
    predictions.append(prediction)
    turned += is_turned
  if not found.root.is_dir() and 'error' in predictions[0]:
    raise errors.UserError(
      f'{found.root} cannot be read: {predictions[0]["error"]}',
      '--input',
      f'Images are {", ".join(preprocess.FORMATS)}.',
    )
  paths = _write(pathlib.Path(workdir), trained, found, predictions)
  _show(found, predictions, paths)
  _show_notes(found, predictions, turned, console)
  return predictions


def _write(
  workdir: pathlib.Path,
  trained: trained_lib.Trained,
  found: Found,
  predictions: Sequence[Prediction],
) -> list[pathlib.Path]:
  """Writes the CSV and the contact sheet; returns their paths."""
  base = workdir / 'predictions' / _name(found.root)
  paths = [base.with_name(base.name + x) for x in ('.csv', '.png')]
  write_csv(paths[0], predictions, min(NUM_CLASSES, len(trained.classes)))
  tiles = _tiles(found, predictions)
  first = f'the first {len(tiles)} of ' * (len(tiles) < len(predictions))
  heading = (
    f'{found.root.resolve().name}: {first}{_count(predictions, "image")}, '
    f'{trained.stage.name}, {trained.weights} weights'
  )
  sheet = contact_sheet.draw(tiles, errors.printable(heading))
  files.write_bytes(paths[1], contact_sheet.encode(sheet))
  return paths


def find_images(input: str | pathlib.Path) -> Found:
  """Returns the image files of a folder and those below it, or the one file.

  Files are images by their suffix or by how they begin. Hidden files and
  folders are left out, links to folders are not followed.

  Raises:
    UserError: if there is nothing, or no image.
  """
  if not str(input):
    raise errors.UserError(
      'There is no --input.',
      '--mode=predict',
      'Name an image or a folder of them: --input=photos.',
    )
  root = paths_lib.expand(input, f'--input={input}')
  if os.path.isfile(root):  # It raises nothing, whatever the name.
    return Found(root, [root], [])
  if not os.path.isdir(root):
    raise errors.UserError(
      f"There is no image or folder '{input}'.",
      f'looked in {pathlib.Path.cwd()}',
      'Check the path given with --input.',
    )
  left_out: list[folders.LeftOut] = []
  paths = sorted(folders.walk(root, left_out))
  if not paths:
    formats = ', '.join(preprocess.FORMATS)
    raise errors.UserError(
      f"There is no image in '{input}': "
      f'{folders.describe(left_out) or "it is empty"}.',
      '--input',
      f'Images are {formats}; hidden files are left out.',
    )
  return Found(root, paths, left_out)


def classify(
  trained: trained_lib.Trained, paths: Sequence[pathlib.Path]
) -> Iterator[tuple[Prediction, bool]]:
  """Yields the prediction of each file, and whether EXIF would turn it.

  A few batches are in memory at a time, however many files there are.
  """
  shardings = devices.create_shardings(devices.create_mesh())
  variables = jax.device_put(trained.variables, shardings.replicated)
  count = 1 if len(paths) == 1 else BATCH_SIZE
  count = -(-count // jax.device_count()) * jax.device_count()
  step = jax.jit(
    create_predict_step(trained),
    in_shardings=(shardings.replicated, shardings.batch),
    out_shardings=shardings.replicated,
  )
  ahead = None
  for part, read in _read_ahead(trained, paths, count):
    batch = np.zeros((count, *[trained.stage.eval_size] * 2, 3), np.uint8)
    for row, image in enumerate(read):
      if image.pixels is not None:
        batch[row] = image.pixels
    # Batch n is dispatched before what came of batch n - 1 is read.
    pending = part, read, step(variables, batch)
    if ahead is not None:
      yield from _describe(trained, *ahead)
    ahead = pending
  if ahead is not None:
    yield from _describe(trained, *ahead)


def create_predict_step(trained: trained_lib.Trained) -> Any:
  """Returns f(variables, images) -> the top probabilities and classes.

  Images are uint8 (N, S, S, 3); what comes back is f32 and int32 (N, k), the
  most probable class first, k at most NUM_CLASSES. At equal scores the lower
  class comes first, as in evaluation.
  """
  net = trained.create_model()
  pixels = trained.config.mean_rgb, trained.config.std_rgb
  k = min(NUM_CLASSES, len(trained.classes))

  def predict_step(variables, images):
    images = augment.normalise(images, *pixels)
    logits: Any = net.apply(variables, images, train=False)
    _, classes = jax.lax.top_k(logits, k)
    probabilities = jax.nn.softmax(logits)
    return jax.numpy.take_along_axis(probabilities, classes, -1), classes

  return predict_step


def _read_ahead(
  trained: trained_lib.Trained, paths: Sequence[pathlib.Path], count: int
) -> Iterator[tuple[Sequence[pathlib.Path], list[_Read]]]:
  """Yields `count` files at a time and what is in them, two batches ahead."""
  workers = trained.config.num_workers or len(os.sched_getaffinity(0))
  queue: collections.deque = collections.deque()

  def take():
    part, jobs = queue.popleft()
    return part, [job.result() for job in jobs]

  with futures.ThreadPoolExecutor(workers, 'images') as pool:
    try:
      for start in range(0, len(paths), count):
        part = paths[start : start + count]
        queue.append((part, [pool.submit(_read, trained, x) for x in part]))
        if len(queue) > 2:
          yield take()
      while queue:
        yield take()
    finally:
      pool.shutdown(cancel_futures=True)


def _read(trained: trained_lib.Trained, path: pathlib.Path) -> _Read:
  """Returns the crop that evaluation would see of an image file."""
  stage = trained.stage
  try:
    size = path.stat().st_size
    if size > MAX_BYTES:
      return _Read(None, f'{size:,} bytes, more than {MAX_BYTES:,}', False)
    encoded = path.read_bytes()
    pixels = preprocess.center_crop(
      encoded,
      stage.eval_size,
      eval_crop=stage.eval_crop,
      interpolation=stage.eval_interpolation,
    )
  except OSError as e:
    return _Read(None, e.strerror or str(e), False)
  except preprocess.BadImageError as e:
    return _Read(None, _reason(e), False)
  return _Read(pixels, '', _is_turned(encoded))


def _reason(error: preprocess.BadImageError) -> str:
  if isinstance(error.__cause__, UnidentifiedImageError):
    return 'it is no image'
  return str(error).removeprefix(': ')


def _is_turned(encoded: bytes) -> bool:
  """Returns whether EXIF asks for an image to be turned or mirrored."""
  try:
    image = Image.open(io.BytesIO(encoded), formats=preprocess.FORMATS)
    return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
  except Exception:  # Pillow's parsers raise what they like.
    return False


def _describe(
  trained: trained_lib.Trained,
  paths: Sequence[pathlib.Path],
  read: Sequence[_Read],
  outputs: tuple[jax.Array, jax.Array],
) -> Iterator[tuple[Prediction, bool]]:
  probabilities, classes = (np.asarray(x).tolist() for x in outputs)
  for row, (path, image) in enumerate(zip(paths, read, strict=True)):
    if image.pixels is None:
      yield {'file': str(path), 'error': image.error}, False
      continue
    top = [trained.classes[i] for i in classes[row]]
    prediction = {
      'file': str(path),
      'class': top[0],
      'name': trained.class_names[classes[row][0]],
      'probability': probabilities[row][0],
      'top5': list(zip(top, probabilities[row], strict=True)),
    }
    yield prediction, image.turned


def write_csv(
  path: pathlib.Path, predictions: Iterable[Prediction], num_classes: int
) -> None:
  """Writes a row for each file: its class and name, then the next classes."""
  following = range(2, num_classes + 1)
  fields = ['file', 'class', 'name', 'probability']
  fields += [f'{x}_{i}' for i in following for x in ('class', 'probability')]
  out = io.StringIO()
  rows = csv.writer(out, lineterminator='\n')
  rows.writerow([*fields, 'error'])
  for x in predictions:
    file = errors.printable(x['file'])
    if 'error' in x:
      rows.writerow([file, *[''] * (len(fields) - 1), x['error']])
      continue
    rest = [
      text for name, p in x['top5'][1:] for text in (name, _probability(p))
    ]
    first = x['class'], x['name'], _probability(x['probability'])
    rows.writerow([file, *first, *rest, ''])
  files.write_bytes(path, out.getvalue().encode())


def _probability(value: float) -> str:
  return f'{value:.6f}'


def _count(items: Sized, what: str) -> str:
  return f'{len(items):,} {what}{"s" * (len(items) != 1)}'


def _name(root: pathlib.Path) -> str:
  resolved = root.resolve()
  name = resolved.stem if resolved.is_file() else resolved.name
  return errors.printable(name) or 'images'


def _tiles(
  found: Found, predictions: Sequence[Prediction]
) -> list[contact_sheet.Tile]:
  """Returns the first images, each with its class and probability."""
  tiles = []
  first = itertools.islice(
    zip(found.images, predictions, strict=True), contact_sheet.MAX_TILES
  )
  for path, x in first:
    if 'error' in x:
      tiles.append(
        contact_sheet.Tile(None, 'cannot be read', errors.printable(path.name))
      )
    else:
      percent = f'{x["probability"]:.1%}'
      tiles.append(
        contact_sheet.Tile(path, errors.printable(x['name']), percent)
      )
  return tiles


def _show(
  found: Found, predictions: Sequence[Prediction], paths: Sequence[pathlib.Path]
) -> None:
  """Prints the first predictions in columns, and where all of them are."""
  base = found.root if found.root.is_dir() else found.root.parent
  rows = [
    _row(x, errors.printable(str(path.relative_to(base))))
    for x, path in zip(predictions[:NUM_ROWS], found.images, strict=False)
  ]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for file, percent, name, error in rows:
    columns = f'{file:<{widths[0]}}  {percent:>{widths[1]}}  {name}{error}'
    _print(columns.rstrip())
  rest = len(predictions) - len(rows)
  if rest:
    _print(f'... and {rest:,} more in {paths[0]}')
  _print(f'CSV: {paths[0]}')
  _print(f'Contact sheet: {paths[1]}')


def _row(x: Mapping[str, Any], file: str) -> tuple[str, str, str, str]:
  if 'error' in x:
    return file, '-', '', f'cannot be read: {x["error"]}'
  name = x['class'] if x['class'] == x['name'] else f'{x["class"]} {x["name"]}'
  return file, f'{x["probability"]:.1%}', name, ''


def _print(line: str) -> None:
  encoding = sys.stdout.encoding or 'utf-8'
  print(line.encode(encoding, 'replace').decode(encoding))


def _show_notes(
  found: Found,
  predictions: Sequence[Prediction],
  turned: int,
  console: rich.console.Console,
) -> None:
  """Says on stderr what was left out, damaged or turned."""
  notes = []
  if found.left_out:
    notes.append(
      errors.printable(f'Left out: {folders.describe(found.left_out)}')
    )
  damaged = sum('error' in x for x in predictions)
  if damaged:
    notes.append(f'{damaged:,} cannot be read; the CSV says why.')
  if turned:
    notes.append(
      f'{turned:,} have an EXIF orientation, which is ignored, as in training.'
    )
  for note in notes:
    console.print(note, markup=False, soft_wrap=True)

"""Says what images show: classes and probabilities of saved weights."""

import csv
import functools
import io
import itertools
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
from ml_collections import config_dict
from PIL import Image, UnidentifiedImageError

from jaxprog import buckets, errors, files, formats
from jaxprog import paths as paths_lib
from jaxprog.data import builders, folders, parts, preparation, preprocess
from jaxprog.monitoring import activity
from jaxprog.reliability import copies
from jaxprog.reporting import contact_sheet
from jaxprog.training import devices
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


class _Found(NamedTuple):
  """Images, sorted, below `root`; and what else was there.

  Those that are no files of their own are in `held` by what they are called,
  FOLDER/CLASS/NAME.
  """

  root: pathlib.Path
  images: list[pathlib.Path]
  left_out: list[folders.LeftOut]
  held: Mapping[pathlib.Path, builders.RawImage]


class _Read(NamedTuple):
  """Pixels uint8 (S, S, 3), None with the reason for it in `error`."""

  pixels: np.ndarray | None
  error: str = ''
  # Whether EXIF asks for it to be shown turned.
  turned: bool = False


@copies.in_bucket(chosen=True)
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
  and the first images are drawn in NAME.png; NAME is that of `input`. Where
  `calibrate` has fitted a temperature, probabilities are at that.

  `input` is an image, or a folder of them and of folders; or parquet:PATH,
  wds:TARS or hf:NAME, of which the evaluation images are taken. The data that
  the run was trained on is not needed. `stage`, `weights` and `model` are those
  of `trained.load_trained`.

  Raises:
    UserError: if there are no such weights or no images.
  """
  workdir = paths_lib.workdir(workdir)
  found = _find_held(str(input), config) or _find_images(input)
  trained = trained_lib.load_trained(
    config, workdir, stage=stage, weights=weights, model=model
  )
  console = rich.console.Console(stderr=True, highlight=False, markup=False)
  predictions: list[Prediction] = []
  turned = 0
  with activity.doing('classifying images') as show:
    for prediction, is_turned in classify(trained, found.images, found.held):
      predictions.append(prediction)
      turned += is_turned
      show(len(predictions), len(found.images))
  if not found.root.is_dir() and 'error' in predictions[0]:
    raise errors.UserError(
      f'{found.root} cannot be read: {predictions[0]["error"]}',
      '--input',
      f'Images are {", ".join(preprocess.FORMATS)}.',
    )
  with activity.doing('drawing the contact sheet'):
    paths = _write(workdir, trained, found, predictions)
  _show(found.root, predictions, paths)
  _show_notes(found, predictions, turned, console)
  if trained.temperature != 1:
    console.print(
      f'Probabilities are at a temperature of {trained.temperature:.3g}.'
    )
  return predictions


def _write(
  workdir: pathlib.Path,
  trained: trained_lib.Trained,
  found: _Found,
  predictions: Sequence[Prediction],
) -> list[pathlib.Path]:
  """Writes the CSV and the contact sheet; returns their paths."""
  resolved = found.root.resolve()
  name = resolved.stem if resolved.is_file() else resolved.name
  base = workdir / 'predictions' / (errors.printable(name) or 'images')
  paths = [base.with_name(base.name + x) for x in ('.csv', '.png')]
  _write_csv(paths[0], predictions, min(NUM_CLASSES, len(trained.classes)))
  shown = predictions[: contact_sheet.MAX_TILES]
  tiles = [_tile(x, trained, found.held) for x in shown]
  count = len(predictions)
  first = f'the first {len(tiles)} of ' * (len(tiles) < count)
  heading = (
    f'{resolved.name}: {first}{count:,} image{"s" * (count != 1)}, '
    f'{trained.stage.name}, {trained.weights} weights'
  )
  sheet = contact_sheet.draw(tiles, errors.printable(heading))
  files.write_bytes(paths[1], contact_sheet.encode(sheet))
  return paths


def _find_held(input: str, config: config_dict.ConfigDict) -> _Found | None:
  """Returns the evaluation images of a dataset in files of many, else None."""
  if paths_lib.dataset_source(input).kind not in paths_lib.OF_MANY:
    return None
  raw = preparation.list_raw(input, paths_lib.data_dir(config))
  if raw is None:
    raise errors.UserError(
      f'There is nothing at {input!r}.',
      f'looked in {pathlib.Path.cwd()}',
      'Check what is given with --input; prepare fetches what is in the Hub.',
    )
  root = pathlib.Path(raw.root)
  held = {root / x.wnid / x.file_name: x for x in raw.images(builders.EVAL)}
  return _Found(root, list(held), list(raw.left_out), held)


def _find_images(input: str | pathlib.Path) -> _Found:
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
    return _Found(root, [root], [], {})
  if not os.path.isdir(root):
    raise errors.UserError(
      f"There is no image or folder '{input}'.",
      f'looked in {pathlib.Path.cwd()}',
      'Check the path given with --input.',
    )
  left_out: list[folders.LeftOut] = []
  paths = sorted(folders.walk(root, left_out))
  if not paths:
    known = ', '.join(preprocess.FORMATS)
    raise errors.UserError(
      f"There is no image in '{input}': "
      f'{folders.describe(left_out) or "it is empty"}.',
      '--input',
      f'Images are {known}; hidden files are left out.',
    )
  return _Found(root, paths, left_out, {})


def classify(
  trained: trained_lib.Trained,
  paths: Sequence[pathlib.Path],
  held: Mapping[pathlib.Path, builders.RawImage] = {},
) -> Iterator[tuple[Prediction, bool]]:
  """Yields the prediction of each file, and whether EXIF would turn it.

  A few batches are in memory at a time, however many files there are.
  """
  shardings = devices.create_shardings()
  variables = jax.device_put(trained.variables, shardings.replicated)
  count = 1 if len(paths) == 1 else BATCH_SIZE
  count = -(-count // jax.device_count()) * jax.device_count()
  step = jax.jit(
    _create_predict_step(trained),
    in_shardings=(shardings.replicated, shardings.batch),
    out_shardings=shardings.replicated,
  )
  workers = trained.config.num_workers or len(os.sched_getaffinity(0))
  images = parts.in_order(
    functools.partial(_read, trained, held), paths, workers
  )
  ahead = None
  for start in range(0, len(paths), count):
    part = paths[start : start + count]
    read = list(itertools.islice(images, len(part)))
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


def _create_predict_step(trained: trained_lib.Trained) -> Any:
  """Returns f(variables, images) -> the top probabilities and classes.

  Images are uint8 (N, S, S, 3); what comes back is f32 and int32 (N, k), the
  most probable class first, k at most NUM_CLASSES. At equal scores the lower
  class comes first, as in evaluation.
  """
  apply, k = trained.create_apply(), min(NUM_CLASSES, len(trained.classes))

  def predict_step(variables, images):
    logits = apply(variables, images)
    _, classes = jax.lax.top_k(logits, k)
    probabilities = jax.nn.softmax(logits / trained.temperature)
    return jax.numpy.take_along_axis(probabilities, classes, -1), classes

  return predict_step


def _read(
  trained: trained_lib.Trained,
  held: Mapping[pathlib.Path, builders.RawImage],
  path: pathlib.Path,
) -> _Read:
  """Returns the crop that evaluation would see of an image."""
  stage = trained.stage
  try:
    if path in held:
      encoded = held[path].read()
    else:
      size = path.stat().st_size
      if size > MAX_BYTES:
        return _Read(None, f'{size:,} bytes, more than {MAX_BYTES:,}')
      encoded = path.read_bytes()
    pixels = preprocess.center_crop(
      encoded,
      stage.eval_size,
      eval_crop=stage.eval_crop,
      interpolation=stage.eval_interpolation,
    )
  except OSError as e:
    return _Read(None, e.strerror or str(e))
  except errors.UserError as e:  # Of what is in a file of many.
    return _Read(None, e.what)
  except preprocess.BadImageError as e:
    is_none = isinstance(e.__cause__, UnidentifiedImageError)
    reason = 'it is no image' if is_none else str(e)
    return _Read(None, reason)
  return _Read(pixels, turned=_is_turned(encoded))


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


def _write_csv(
  path: pathlib.Path, predictions: Iterable[Prediction], num_classes: int
) -> None:
  """Writes a row for each file: its class and name, then the next classes."""
  following = range(2, num_classes + 1)
  fields = ['file', 'class', 'name', 'probability']
  fields += [f'{x}_{i}' for i in following for x in ('class', 'probability')]
  out = io.StringIO()
  rows = csv.DictWriter(out, [*fields, 'error'], lineterminator='\n')
  rows.writeheader()
  for x in predictions:
    row = {'file': errors.printable(x['file'])}
    if 'error' in x:
      row['error'] = x['error']
    else:
      row |= {'class': x['class'], 'name': x['name']}
      row['probability'] = f'{x["probability"]:.6f}'
      for i, (name, p) in enumerate(x['top5'][1:], 2):
        row |= {f'class_{i}': name, f'probability_{i}': f'{p:.6f}'}
    rows.writerow(row)
  files.write_bytes(path, out.getvalue().encode())


def _tile(
  x: Prediction,
  trained: trained_lib.Trained,
  held: Mapping[pathlib.Path, builders.RawImage] = {},
) -> contact_sheet.Tile:
  """Returns an image with its class and probability.

  And whether that is right, if its folder has the name of a class.
  """
  path = pathlib.Path(x['file'])
  if 'error' in x:
    file = errors.printable(path.name)
    return contact_sheet.Tile(None, 'cannot be read', file)
  name, percent = errors.printable(x['name']), formats.percent(x['probability'])
  folder, image = path.parent.name, held.get(path, path)
  # Some classes of ImageNet share a name.
  labels = {
    label: said
    for label, said in zip(trained.classes, trained.class_names, strict=True)
    if folder in (label, said)
  }
  if not labels:
    return contact_sheet.Tile(image, name, percent)
  if x['class'] in labels:
    return contact_sheet.Tile(image, f'✓ {name}', percent, True)
  detail = f'{percent}, is {errors.printable(next(iter(labels.values())))}'
  return contact_sheet.Tile(image, f'✗ {name}', detail, False)


def _show(
  root: pathlib.Path,
  predictions: Sequence[Prediction],
  paths: Sequence[pathlib.Path],
) -> None:
  """Prints the first predictions in columns, and where all of them are."""
  base = root if root.is_dir() else root.parent
  rows = [_row(x, base) for x in predictions[:NUM_ROWS]]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for file, percent, rest in rows:
    _print(f'{file:<{widths[0]}}  {percent:>{widths[1]}}  {rest}'.rstrip())
  more = len(predictions) - len(rows)
  if more:
    _print(f'... and {more:,} more in {buckets.shown(paths[0])}')
  _print(f'CSV: {buckets.shown(paths[0])}')
  _print(f'Contact sheet: {buckets.shown(paths[1])}')


def _row(x: Prediction, base: pathlib.Path) -> tuple[str, str, str]:
  file = errors.printable(str(pathlib.Path(x['file']).relative_to(base)))
  if 'error' in x:
    return file, '-', f'cannot be read: {x["error"]}'
  name = x['class'] if x['class'] == x['name'] else f'{x["class"]} {x["name"]}'
  return file, formats.percent(x['probability']), name


def _print(line: str) -> None:
  encoding = sys.stdout.encoding or 'utf-8'
  print(line.encode(encoding, 'replace').decode(encoding))


def _show_notes(
  found: _Found,
  predictions: Sequence[Prediction],
  turned: int,
  console: rich.console.Console,
) -> None:
  """Says on stderr what was left out, damaged or turned."""
  damaged = sum('error' in x for x in predictions)
  for is_so, note in (
    (found.left_out, f'Left out: {folders.describe(found.left_out)}'),
    (damaged, f'{damaged:,} cannot be read; the CSV says why.'),
    (
      turned,
      f'{turned:,} have an EXIF orientation, which is ignored, as in training.',
    ),
  ):
    if is_so:
      console.print(errors.printable(note), soft_wrap=True)

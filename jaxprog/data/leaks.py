"""Which training images some stage is evaluated on.

A score counts only if the weights have seen none of its images, in no stage.
So there is one list for the whole ladder: what any stage is evaluated on, no
stage trains on.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import threadpoolctl

from jaxprog import files, named
from jaxprog.data import parts, signatures
from jaxprog.data.records import Dataset, Records

# The strongest first.
_REASONS = ('name', 'content', 'perceptual')

# Of those that keep the names of ImageNet's files.
_TRAIN_NAME = re.compile(r'n\d{8}_\d+\.JPEG', re.ASCII)
_EVAL_NAME = re.compile(r'ILSVRC2012_val_\d{8}(\.\w+)?', re.ASCII)

# Thumbnails are centred, channel by channel, and scaled to length 1; their
# distance is 1 - cosine. Copies of 1,500 photographs at 64 px (bilinear,
# bicubic, box, Lanczos) and JPEG quality 75-95 are at most 0.018 away; of 49
# million pairs of other photographs the nearest is 0.036, the next 0.050.
MAX_DISTANCE = 0.04
# Mean absolute difference of two thumbnails: of the copies at most 3.4, of the
# other pairs nearer than 0.2 at least 12.3.
MAX_GREY_LEVELS = 8.0
# Pairs to compare so are found by thumbnails of this side. Copies are at most
# 0.007 away; 204 of the other pairs are nearer than this.
_COARSE_SIDE = 4
MAX_COARSE_DISTANCE = 0.03
# Standard deviation, in grey levels, below which a coarse thumbnail is noise;
# the flattest of 17,500 photographs has 3.5.
_MIN_CONTRAST = 2.0
# Training images that are looked at together, evaluation images of one matrix
# product, and pairs compared at once.
_IMAGES = 32768
_BLOCK = 2048
_PAIRS = 4096
_NOTHING = np.empty((0, 3 * _COARSE_SIDE**2), np.float32)

# Images done, images in all, and what is being read.
Progress = Callable[[int, int, str], None]


class Leak(NamedTuple):
  """A training image that is an evaluation image, or a copy of one.

  Where the evaluation's dataset is not here, `eval_index` is -1.
  """

  train_stage: str
  train_index: int
  train_file: str
  eval_stage: str
  eval_index: int
  eval_file: str
  reason: str


class Shared(NamedTuple):
  """An image that two stages are evaluated on; `other_index` may be -1."""

  stage: str
  eval_index: int
  eval_file: str
  other_stage: str
  other_index: int
  other_file: str
  reason: str


class Overlap(NamedTuple):
  """What must not be trained on; the dicts are by the name of the stage."""

  # bool (n,) over the training records.
  excluded: dict[str, np.ndarray]
  # Excluded images by their strongest reason, each of _REASONS.
  counts: dict[str, dict[str, int]]
  # Excluded images by the evaluation that they contaminate: a stage's, or
  # ImageNet's, which is no stage then: 'imagenet2012'.
  contaminates: dict[str, dict[str, int]]
  # One for each training image and evaluation.
  leaks: list[Leak]
  # Listed, not excluded.
  shared: list[Shared]
  # Training and evaluation images that cannot be read.
  damaged: dict[str, int]


class Images(NamedTuple):
  """The images of one split that are compared with others."""

  names: list[str]
  # SIGNATURE (n,).
  table: np.ndarray
  # Whether equal names mean equal images.
  keeps_names: bool
  # What they are taken from, and which of it: directory, split, fingerprint.
  split: tuple[str, str, str] = ('', '', '')
  positions: bytes = b''


# Index of a training image, of an evaluation image, and one of _REASONS.
Match = tuple[int, int, str]


def is_ilsvrc_validation(file_name: str) -> bool:
  """Returns whether ImageNet-1k's validation images have such names."""
  return _EVAL_NAME.fullmatch(file_name) is not None


def evaluates_on_ilsvrc(dataset: str) -> bool:
  """Returns whether its evaluation images are ImageNet-1k's, or some."""
  return dataset.removeprefix('tfds:').startswith(
    ('imagenet2012', 'imagenet_mini', 'imagenet_resized')
  )


def find_overlap(
  datasets: Mapping[str, Dataset],
  *,
  absent: Mapping[str, str] | None = None,
  progress: Progress | None = None,
) -> Overlap:
  """Returns the training images that no stage may train on, and why.

  Both mappings are by stage; `absent` has the names of datasets that are not
  here. ImageNet's validation images are known by name, here or not.
  """
  train, evaluation = _read(datasets, progress)
  absent_ilsvrc = [
    stage
    for stage, dataset in (absent or {}).items()
    if evaluates_on_ilsvrc(dataset)
  ]
  matches: dict[tuple, list[Match]] = {}
  result = Overlap({}, {}, {}, [], [], {})
  for stage, images in train.items():
    found = [
      Leak(stage, i, images.names[i], other, j, others.names[j], reason)
      for other, others in evaluation.items()
      for i, j, reason in _match_once(images, others, matches)
    ]
    found += _named_leaks(stage, images.names, absent_ilsvrc, found)
    rank = np.full(len(images.names), len(_REASONS))
    for leak in found:
      i = leak.train_index
      rank[i] = min(rank[i], _REASONS.index(leak.reason))
    result.excluded[stage] = rank < len(_REASONS)
    result.counts[stage] = {
      x: int((rank == i).sum()) for i, x in enumerate(_REASONS)
    }
    result.contaminates[stage] = dict(Counter(x.eval_stage for x in found))
    result.damaged[stage] = _damaged(images) + _damaged(evaluation[stage])
    result.leaks.extend(found)
  result.shared.extend(_find_shared(evaluation, absent_ilsvrc, matches))
  return result


def match(train: Images, evaluation: Images) -> list[Match]:
  """Returns the images of `train` that are also in `evaluation`.

  Each once, with one evaluation image: of the same name, else of the same
  bytes, else the one that looks most alike.
  """
  partners = np.stack(
    [
      _match_names(train, evaluation),
      _look_up(_digests(train.table), _digests(evaluation.table)),
      match_looks(train.table, evaluation.table),
    ]
  )
  indices = np.flatnonzero((partners >= 0).any(axis=0))
  reasons = (partners[:, indices] >= 0).argmax(axis=0)
  return [
    (int(i), int(partners[reason, i]), _REASONS[reason])
    for i, reason in zip(indices, reasons, strict=True)
  ]


def match_looks(train: np.ndarray, evaluation: np.ndarray) -> np.ndarray:
  """Returns the position of the evaluation image most alike, int64 (n,).

  -1 where there is none that differs by at most MAX_DISTANCE and
  MAX_GREY_LEVELS; of several that are as near, the first. Takes SIGNATURE
  arrays, and little memory beside them.
  """
  # Both views of square images are the same.
  views = (0,) if _are_square(train) and _are_square(evaluation) else (0, 1)
  places = {view: _Places(evaluation, view) for view in views}
  # In products as small as these, BLAS's own threads wait for each other: that
  # takes ten times as long.
  with threadpoolctl.threadpool_limits(1, 'blas'):
    found = parts.in_order(
      lambda block: _match_block(block, evaluation, places),
      _blocks(train),
      num_workers=min(os.cpu_count() or 1, 16),
    )
    return np.concatenate([np.empty(0, np.int64), *found])


def _match_block(
  block: np.ndarray, evaluation: np.ndarray, places: Mapping[int, '_Places']
) -> np.ndarray:
  """Returns `match_looks` of a few training images."""
  best = np.full(len(block), -1)
  levels = np.full(len(block), np.inf, np.float32)
  for view, among in places.items():
    for i, j in among.near(block):
      difference = _compare(
        block['thumbnails'][i, view], evaluation['thumbnails'][j, view]
      )
      # Where an image comes twice, the last is kept: the nearest.
      order = np.lexsort((-j, -difference))
      i, j, difference = i[order], j[order], difference[order]
      better = (difference < levels[i]) | (
        (difference == levels[i]) & np.isfinite(difference) & (j < best[i])
      )
      i, j = i[better], j[better]
      levels[i], best[i] = difference[better], j
  return best


class _Places:
  """Images by brightness, left to right, top to bottom, all in grey levels.

  Thumbnails that differ by MAX_GREY_LEVELS in the mean do so at most by as
  much in the mean brightness, and in that of one half less that of the other.
  So a copy is in a cell of that size near its original's, and of ImageNet's
  64,000 million pairs a fiftieth is looked at.
  """

  def __init__(self, table: np.ndarray, view: int):
    self._view = view
    blocks = [_coarse(block, view) for block in _blocks(table)]
    described = np.concatenate([_NOTHING, *(x for x, _ in blocks)])
    cells = np.concatenate([np.empty((0, 3), int), *(x for _, x in blocks)])
    indices = np.flatnonzero(described.any(axis=1))
    self._cells = _group(cells, indices)
    self._described = described

  def near(self, block: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields indices of pairs, in `block` and here, that may be copies."""
    described, cells = _coarse(block, self._view)
    found = _group(cells, np.flatnonzero(described.any(axis=1)))
    for cell, rows in found.items():
      columns = np.concatenate(
        [np.empty(0, int)]
        + [
          self._cells[x]
          for x in itertools.product(*((c - 1, c, c + 1) for c in cell))
          if x in self._cells
        ]
      )
      for start in range(0, len(columns), _BLOCK):
        among = columns[start : start + _BLOCK]
        cosine = described[rows] @ self._described[among].T
        i, j = np.nonzero(cosine >= 1 - MAX_COARSE_DISTANCE)
        for k in range(0, len(i), _PAIRS):
          yield rows[i[k : k + _PAIRS]], among[j[k : k + _PAIRS]]


def _group(
  cells: np.ndarray, indices: np.ndarray
) -> dict[tuple[int, ...], np.ndarray]:
  """Returns cell -> those of `indices` whose `cells`, (n, 3), are that one."""
  if not len(indices):
    return {}
  order = indices[np.lexsort(cells[indices].T)]
  starts = np.flatnonzero(np.diff(cells[order], axis=0).any(axis=1)) + 1
  groups = np.split(order, starts)
  return {tuple(cells[x[0]].tolist()): x for x in groups}


def _blocks(table: np.ndarray) -> Iterator[np.ndarray]:
  for start in range(0, len(table), _IMAGES):
    yield table[start : start + _IMAGES]


def _are_square(table: np.ndarray) -> bool:
  return all(
    np.array_equal(x['thumbnails'][:, 0], x['thumbnails'][:, 1])
    for x in _blocks(table)
  )


def _compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns the grey levels between thumbnails; infinity: other images."""
  levels = np.abs(a.astype(np.int16) - b).mean((1, 2, 3), dtype=np.float32)
  cosine = (_describe(a)[0] * _describe(b)[0]).sum(1)
  same = (levels <= MAX_GREY_LEVELS) & (cosine >= 1 - MAX_DISTANCE)
  return np.where(same, levels, np.float32(np.inf))


def _coarse(table: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns descriptions by which pairs are found, and cells, int (n, 3).

  The description of what says nothing is 0.
  """
  size = signatures.SIDE // _COARSE_SIDE
  sums = (
    table['thumbnails'][:, view]
    .reshape(-1, _COARSE_SIDE, size, _COARSE_SIDE, size, 3)
    .sum((2, 4), dtype=np.int32)
  )
  described, contrast = _describe(sums.astype(np.float32) / size**2)
  described[(contrast < _MIN_CONTRAST) | ~table['comparable']] = 0
  grey = sums.sum(3)
  half = _COARSE_SIDE // 2
  halves = [
    grey.sum((1, 2)),
    grey[:, :, :half].sum((1, 2)) - grey[:, :, half:].sum((1, 2)),
    grey[:, :half].sum((1, 2)) - grey[:, half:].sum((1, 2)),
  ]
  cell = int(MAX_GREY_LEVELS * 3 * signatures.SIDE**2)
  return described, np.stack(halves, axis=1) // cell


def _describe(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32 vectors of length 1, and standard deviations."""
  pixels = thumbnails.astype(np.float32)
  pixels -= pixels.mean((1, 2), keepdims=True)
  pixels = pixels.reshape(len(pixels), -1)
  contrast = np.sqrt(np.square(pixels).mean(1))
  length = np.maximum(contrast, 1e-6) * np.sqrt(pixels.shape[1])
  return pixels / length[:, None].astype(np.float32), contrast


def _digests(table: np.ndarray) -> list[bytes | None]:
  """Returns the digests; None for damaged images: empty files are no copies."""
  return [
    digest.tobytes() if readable else None
    for digest, readable in zip(table['digest'], table['readable'], strict=True)
  ]


def _match_names(train: Images, evaluation: Images) -> np.ndarray:
  both = train.keeps_names and evaluation.keeps_names
  splits = train.names, evaluation.names
  return _look_up(*([_imagenet_name(x, both) for x in y] for y in splits))


def _imagenet_name(name: str, keeps_names: bool) -> str | None:
  """Returns what of `name` says which of ImageNet's images it is."""
  if is_ilsvrc_validation(name):
    return name.partition('.')[0]
  return name if keeps_names and _TRAIN_NAME.fullmatch(name) else None


def _look_up(keys: list, among: list) -> np.ndarray:
  """Returns where each key first is in `among`; -1: nowhere, or None."""
  known = {x: len(among) - 1 - i for i, x in enumerate(reversed(among))}
  known[None] = -1
  return np.array([known.get(x, -1) for x in keys], np.int64)


def _read(
  datasets: Mapping[str, Dataset], progress: Progress | None
) -> tuple[dict[str, Images], dict[str, Images]]:
  """Returns the training and the evaluation images of each stage."""
  tables: dict[tuple[str, str, str], np.ndarray] = {}

  def read(dataset: Dataset, records: Records) -> Images:
    split = (str(records.directory), records.name, records.fingerprint)
    if split not in tables:

      def show(done: int, total: int) -> None:
        if progress:
          progress(done, total, f'{dataset.name} {records.name}')

      tables[split] = signatures.read_signatures(records, progress=show)
    table = tables[split]
    # A copy of ImageNet's would take 2 GB.
    if not np.array_equal(records.positions, np.arange(len(table))):
      table = table[records.positions]
    names = records.names()
    keeps_names = named.find(dataset.name).keeps_names
    positions = records.positions.tobytes()
    return Images(names, table, keeps_names, split, positions)

  train = {x: read(y, y.train) for x, y in datasets.items()}
  return train, {x: read(y, y.eval) for x, y in datasets.items()}


def _match_once(
  images: Images, others: Images, known: dict[tuple, list[Match]]
) -> list[Match]:
  """Returns `match`, from `known` if the same splits were compared before."""
  key = (images.split, images.positions, others.split, others.positions)
  if key not in known:
    file = _matches_file(images, others)
    found = _load_matches(file)
    if found is None:
      found = match(images, others)
      rows = [(i, j, _REASONS.index(reason)) for i, j, reason in found]
      with contextlib.suppress(OSError):  # Prepared data may be read-only.
        files.write_json(file, rows)
    known[key] = found
  return known[key]


def _matches_file(images: Images, others: Images) -> pathlib.Path:
  """Returns where the matches of these images are kept.

  To compare 1.3 million images with 50,000 takes minutes, at every start.
  """
  rules = MAX_DISTANCE, MAX_GREY_LEVELS, MAX_COARSE_DISTANCE, _MIN_CONTRAST
  digest = hashlib.sha256(repr((signatures.VERSION, rules)).encode())
  for x in (images, others):
    digest.update(repr((x.split[1:], x.keeps_names)).encode() + x.positions)
  return (
    pathlib.Path(images.split[0]) / f'matches-{digest.hexdigest()[:16]}.json'
  )


def _load_matches(file: pathlib.Path) -> list[Match] | None:
  try:
    return [(i, j, _REASONS[k]) for i, j, k in json.loads(file.read_text())]
  except (OSError, ValueError, TypeError, LookupError):
    return None  # Not there yet, or not whole.


def _named_leaks(
  stage: str, names: list[str], absent_ilsvrc: list[str], found: list[Leak]
) -> list[Leak]:
  """Returns leaks of ImageNet's validation images that are not `found`."""
  known = {leak.train_index for leak in found}
  return [
    Leak(stage, i, name, other, -1, name, 'name')
    for i, name in enumerate(names)
    if is_ilsvrc_validation(name)
    for other in absent_ilsvrc or (['imagenet2012'] if i not in known else [])
  ]


def _find_shared(
  evaluation: Mapping[str, Images],
  absent_ilsvrc: list[str],
  known: dict[tuple, list[Match]],
) -> Iterator[Shared]:
  stages = list(evaluation)
  for a, stage in enumerate(stages):
    images = evaluation[stage]
    for other in stages[a + 1 :]:
      others = evaluation[other]
      if images.split == others.split:
        continue  # The same by intent.
      for i, j, reason in _match_once(images, others, known):
        names = images.names[i], others.names[j]
        yield Shared(stage, i, names[0], other, j, names[1], reason)
    for other in absent_ilsvrc:
      for i, name in enumerate(images.names):
        if is_ilsvrc_validation(name):
          yield Shared(stage, i, name, other, -1, name, 'name')


def _damaged(images: Images) -> int:
  return int((~images.table['readable']).sum())

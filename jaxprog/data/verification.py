"""Whether the images of a dataset are all there, whole and in their class.

A damaged JPEG often decodes: of one with a flipped bit only the manifest, a
list of SHA-256 sums from when all was well, can tell. So the first
verification that finds every image readable writes it, and later ones compare.
"""

import collections
import functools
import hashlib
import math
import os
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprog import buckets, errors, files, named
from jaxprog.data import (
  builders,
  folders,
  packs,
  parts,
  preparation,
  preprocess,
  remote,
  shards,
)
from jaxprog.data import records as records_lib
from jaxprog.data.records import Records

# What to do about what the publisher's own copy has as well.
ADVICE = {
  'duplicate, other label': (
    'One label is wrong. Nothing leaves such training images out; remove the '
    'wrong one from the raw folder, or live with it.'
  ),
  'duplicate, other split': (
    '--config.exclude_leaks=True keeps the training image out of training, '
    'whatever its label; --mode=audit shows what it finds.'
  ),
}

Problem = dict[str, str]


class _Item(NamedTuple):
  """One image of a dataset, not read yet."""

  split: str
  wnid: str
  # What to call it if it cannot be read.
  file_name: str
  # Returns its file name, the classes that its record gives, and its bytes.
  read: Callable[[], tuple[str, set[str], bytes]]


class Images(NamedTuple):
  """What there is to look at."""

  # 'prepared' or 'raw'.
  kind: str
  path: str
  classes: tuple[str, ...]
  num_images: int
  items: Iterable[_Item]
  # What lies beside them, in words.
  left_out: str


class Seen(NamedTuple):
  """What was found of one image."""

  split: str
  wnid: str
  name: str
  # Empty if it could not be read.
  sha256: str
  # '' if there is nothing wrong with it.
  kind: str
  detail: str


def verify_dataset(
  dataset: str,
  data_dir: str | os.PathLike[str],
  *,
  num_classes: int = 0,
  num_threads: int = 1,
  progress: parts.Progress | None = None,
) -> dict[str, Any]:
  """Returns what was found out about a dataset, ready to be written as JSON.

  `errors` and `warnings` are lists of {kind, name, detail}: errors are what is
  damaged, missing or changed, warnings what a publisher's own copy may have
  too. All images are looked at, whatever is wrong with some. A number of images
  that differs from the published one is an error until a manifest with exactly
  these images is there; a missing class always is.
  """
  data_dir = pathlib.Path(data_dir)
  images, problems = _open_images(dataset, data_dir)
  report: dict[str, Any] = {
    'dataset': dataset,
    'errors': problems,
    'warnings': [],
    'splits': {},
  }
  if images is None:
    return report
  start = time.perf_counter()
  # Of what Pillow warns about, nothing here is news: it decodes or it doesn't.
  with warnings.catch_warnings(action='ignore'):
    found = parts.in_order(_look, images.items, num_threads)
    seen = list(parts.told(found, images.num_images, progress))
  report |= {
    'kind': images.kind,
    'path': images.path,
    'num_classes': len(images.classes),
    'seconds': time.perf_counter() - start,
    'splits': _count(seen, images.classes, named.find(dataset).published),
  }
  problems += [_problem(x.kind, x.name, x.detail) for x in seen if x.kind]
  problems += _find_damaged_packs(images)
  problems += _find_missing_classes(images.path, report['splits'], num_classes)
  report['warnings'] = _find_duplicates(seen)
  if images.left_out:
    report['warnings'].append(
      _problem('left out', images.path, images.left_out)
    )
  path = manifest_path(dataset, data_dir)
  remote.bring(path.parent, '')
  manifest, changes = _hold_against_manifest(path, seen)
  if manifest['status'] == 'written':
    remote.send(path)
  report['manifest'] = manifest
  problems += changes
  report['counts'] = _check_counts(report['splits'])
  if manifest['status'] != 'matches':
    problems += [_problem('count', images.path, x) for x in report['counts']]
  return report


def manifest_path(dataset: str, data_dir: pathlib.Path) -> pathlib.Path:
  """Returns where the SHA-256 sums of a dataset are kept."""
  # Two paths may differ in what is no file name.
  if config := preparation.folder_config(dataset):
    dataset = f'{dataset.partition(":")[0]}_{config}'
  name = re.sub(r'[^\w.-]', '_', dataset)
  return data_dir / 'manifests' / f'{name}.sha256'


def _open_images(
  dataset: str, data_dir: pathlib.Path
) -> tuple[Images | None, list[Problem]]:
  """Returns the prepared images, or else the raw ones, and what is wrong."""
  problems = []
  try:
    kind = preparation.check_dataset(dataset, data_dir, seconds=math.inf)
    if kind == 'prepared':
      return _open_prepared(dataset, data_dir), []
  except Exception as e:  # Damaged metadata or records may raise anything.
    is_ours = isinstance(e, errors.UserError)
    detail = str(e).replace('\n', ' ') if is_ours else _reason(e)
    problems = [_problem('dataset', dataset, detail)]
  try:
    raw = preparation.list_raw(dataset, data_dir)
  except errors.UserError:
    raw = None
  return _open_raw(raw) if raw else None, problems


def _open_prepared(dataset: str, data_dir: pathlib.Path) -> Images:
  builder = preparation.find_prepared(dataset, data_dir)
  assert builder is not None
  opened = records_lib.open_dataset(dataset, builder)
  for records in (opened.train, opened.eval):
    records.source.fetch()
  names = builder.info.features['label'].names
  return Images(
    kind='prepared',
    path=str(builder.data_dir),
    classes=opened.classes,
    num_images=len(opened.train) + len(opened.eval),
    items=(
      _Item(
        records.name,
        opened.classes[label],
        f'record {i}',
        functools.partial(_read_record, records, names, i),
      )
      for records in (opened.train, opened.eval)
      for i, label in enumerate(records.labels)
    ),
    left_out=opened.left_out,
  )


def _read_record(
  records: Records, names: Sequence[str], index: int
) -> tuple[str, set[str], bytes]:
  feature, position = records.parse(index), records.positions[index]
  wnids = {x.decode() for x in feature['wnid'].bytes_list.value}
  wnids.add(names[feature['label'].int64_list.value[0]])
  name = shards.file_name(feature, records.name, position).decode()
  return name, wnids, feature['image'].bytes_list.value[0]


def _open_raw(raw: builders.Raw) -> Images:
  return Images(
    kind='raw',
    path=raw.root,
    classes=raw.classes,
    num_images=raw.num_images,
    items=(
      _Item(split, x.wnid, x.file_name, functools.partial(_read_raw, x))
      for split in (builders.TRAIN, builders.EVAL)
      for x in raw.images(split)
    ),
    left_out=folders.describe(raw.left_out),
  )


def _read_raw(image: builders.RawImage) -> tuple[str, set[str], bytes]:
  return image.file_name, {image.wnid}, image.read()


def _look(item: _Item) -> Seen:
  """Returns what is found of one image, whatever is wrong with it."""
  name = f'{item.split}/{item.wnid}/{item.file_name}'
  try:
    file_name, wnids, encoded = item.read()
  except Exception as e:  # A damaged record may raise anything.
    return Seen(item.split, item.wnid, name, '', 'unreadable', _reason(e))
  name = f'{item.split}/{item.wnid}/{file_name}'
  digest = hashlib.sha256(encoded).hexdigest()
  kind, detail = _find_damage(encoded)
  if not kind and wnids != {item.wnid}:
    kind = 'label'
    detail = f'read as {item.wnid}, recorded as {", ".join(sorted(wnids))}'
  return Seen(item.split, item.wnid, name, digest, kind, detail)


def _find_damage(encoded: bytes) -> tuple[str, str]:
  """Returns the kind of damage and more about it, or two empty strings."""
  if not encoded:
    return 'empty', 'a file of 0 bytes'
  if re.match(rb'(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)', encoded, re.I):
    return 'html', 'a web page, not an image'
  try:
    preprocess.decode(encoded)
  except preprocess.BadImageError as e:
    detail = str(e)
    return 'truncated' if 'truncated' in detail else 'damaged', detail
  # Pillow is content with a PNG whose pixels are all there.
  if encoded.startswith(b'\x89PNG') and b'IEND' not in encoded:
    return 'truncated', 'a PNG without its end'
  return '', ''


def _find_damaged_packs(images: Images) -> list[Problem]:
  """Returns stored training images that are not what was written."""
  if images.kind != 'prepared':
    return []
  problems = []
  for path in preparation.list_packs(pathlib.Path(images.path)):
    detail = 'not what was written; remove it'
    try:
      if packs.is_intact(path):
        continue
    except errors.UserError as e:  # It is in a bucket, and cannot come.
      detail = str(e).replace('\n', ' ')
    problems.append(_problem('pack', str(path), detail))
  return problems


def _count(
  seen: Iterable[Seen], classes: Sequence[str], known: named.Published | None
) -> dict[str, dict[str, Any]]:
  """Returns, by split, the number of images, in all and by class."""
  counts: dict[str, dict[str, int]] = {}
  for x in seen:
    split = counts.setdefault(x.split, dict.fromkeys(classes, 0))
    split[x.wnid] += 1
  return {
    split: {
      'images': sum(by_class.values()),
      'expected': known and (known.train if split == 'train' else known.eval),
      'classes': sum(map(bool, by_class.values())),
      'expected_classes': known and known.classes,
      'smallest_class': min(by_class.values()),
      'largest_class': max(by_class.values()),
      'by_class': by_class,
    }
    for split, by_class in counts.items()
  }


def _find_missing_classes(
  path: str, splits: Mapping[str, Mapping[str, Any]], num_classes: int
) -> list[Problem]:
  problems = []
  for split, counts in splits.items():
    expected = counts['expected_classes'] or num_classes
    if expected and counts['classes'] != expected:
      detail = f'{counts["classes"]} classes have images, not {expected}'
      problems.append(_problem('classes', f'{path}, {split}', detail))
    problems += [
      _problem('classes', f'{split}/{wnid}', 'a class without images')
      for wnid, count in counts['by_class'].items()
      if not count
    ]
  return problems


def _find_duplicates(seen: Iterable[Seen]) -> list[Problem]:
  """Returns warnings about images that are equal byte for byte."""
  groups = collections.defaultdict(list)
  for x in seen:
    if x.sha256 and x.kind != 'empty':
      groups[x.sha256].append(x)
  found = []
  for group in groups.values():
    if len(group) == 1:
      continue
    names = ' = '.join(x.name for x in group[1:])
    splits = {x.split for x in group}
    if len({x.wnid for x in group}) > 1:
      found.append(_problem('duplicate, other label', group[0].name, names))
    if len(splits) > 1:
      found.append(_problem('duplicate, other split', group[0].name, names))
    if len(splits) == len({x.wnid for x in group}) == 1:
      found.append(_problem('duplicate', group[0].name, names))
  return found


def _hold_against_manifest(
  path: pathlib.Path, seen: Sequence[Seen]
) -> tuple[dict[str, str], list[Problem]]:
  """Returns the manifest's path and status, and what differs from it."""
  found = {_escape(x.name): x.sha256 for x in seen if x.sha256}
  shown = buckets.shown(path)
  try:
    known = _read_manifest(path)
  except (FileNotFoundError, NotADirectoryError):
    return {'path': shown, 'status': _write_manifest(path, seen)}, []
  except (OSError, ValueError) as e:
    problem = _problem('manifest', shown, _reason(e))
    return {'path': shown, 'status': 'unreadable'}, [problem]
  changes = [
    _problem('changed', x, f'{known[x]} is now {found[x]}')
    for x in sorted(known.keys() & found.keys())
    if known[x] != found[x]
  ]
  for kind, names, detail in (
    ('missing', known.keys() - found.keys(), 'in the manifest only'),
    ('new', found.keys() - known.keys(), 'not in the manifest'),
  ):
    changes += [_problem(kind, x, detail) for x in sorted(names)]
  status = 'differs' if changes else 'matches'
  return {'path': shown, 'status': status}, changes


def _write_manifest(path: pathlib.Path, seen: Sequence[Seen]) -> str:
  """Writes the sums of all images in sha256sum's format; returns a status."""
  # What is damaged now must not be what it is held against later.
  if any(x.kind for x in seen):
    return 'not written, because of what is wrong with some images'
  lines = []
  for x in sorted(seen, key=lambda x: x.name):
    name = _escape(x.name)
    escaped = '\\' if name != x.name else ''
    lines.append(f'{escaped}{x.sha256}  {name}\n')
  try:
    files.write_bytes(path, ''.join(lines).encode('utf-8', 'surrogateescape'))
  except OSError as e:
    return f'not written: {e.strerror}'
  return 'written'


def _read_manifest(path: pathlib.Path) -> dict[str, str]:
  """Returns name -> SHA-256.

  Raises:
    ValueError: naming the first line that is not in sha256sum's format.
  """
  known = {}
  text = path.read_bytes().decode('utf-8', 'surrogateescape')
  for number, line in enumerate(text.split('\n'), 1):
    match = re.fullmatch(r'\\?([0-9a-f]{64}) [ *](.+)', line)
    if match:
      known[match[2]] = match[1]
    elif line:
      raise ValueError(f'line {number} is not "SHA256  NAME"')
  return known


def _escape(name: str) -> str:
  """Returns `name` on one line, as sha256sum writes it."""
  name = name.replace('\\', '\\\\')
  return name.replace('\n', '\\n').replace('\r', '\\r')


def _check_counts(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Returns a sentence on each split that is not as large as published."""
  sentences = []
  for split, counts in splits.items():
    found, expected = counts['images'], counts['expected']
    if expected and found < expected:
      sentences.append(f'{split}, a subset: {found:,} of {expected:,} images')
    elif expected and found > expected:
      sentences.append(f'{split}: {found:,} images, {expected:,} published')
  return sentences


def _problem(kind: str, name: str, detail: str) -> Problem:
  return {'kind': kind, 'name': name, 'detail': detail}


def _reason(error: Exception) -> str:
  text = ' '.join(str(error).split())[:200]
  return f'{type(error).__name__}: {text}'

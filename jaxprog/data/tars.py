"""WebDataset's tars: what is called alike but for the suffix is one example."""

import functools
import glob
import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping

from jaxprog import errors, paths
from jaxprog.data import archives, builders, folders, parts, sources

_SUFFIXES = ('.tar', '.tgz', '.tar.gz', '.tar.bz2', '.tar.xz', '.tar.zst')
_IMAGES = ('jpg', 'jpeg', 'png', 'webp')
_LABELS = ('cls', 'label')
# What a .json calls the label.
_FIELDS = ('label', 'cls', 'class')
# Beside the tars or above: what numbers stand for, a line each.
_NAMES = 'classnames.txt'
# Beside the tars: how many examples each has.
_SIZES = 'sizes.json'


def list_raw(
  dataset: str,
  root: pathlib.Path,
  place: str = '',
  image: str = '',
  label: str = '',
) -> builders.Raw:
  """Returns the images in the tars that `place` names, checked.

  `root` is their folder, and '' all of it. `image` is the suffix of the images,
  `label` that of the labels or what a .json calls them, '' where that is to be
  found out.

  Raises:
    UserError: if a tar is missing, damaged, or not of images and labels.
  """
  files = _find_tars(root, place)
  splits, left_out = sources.list_splits(root, files, dataset)
  used = [x for y in splits.values() for x in y]
  sources.check_complete(used)
  places = dict.fromkeys((*(x.parent for x in used), root, root.parent))
  lists = [y for x in places if (y := x / _NAMES).is_file()][:1]
  sizes = {x for x in (y.parent / _SIZES for y in used) if x.is_file()}
  looks = sources.look(root, used, [*lists, *sorted(sizes)])
  listed = parts.in_order(functools.partial(_list_tar, image, label), used)
  found = dict(zip(used, listed, strict=True))
  for path in sizes:
    _check_sizes(path, found)
  return sources.create_raw(
    root,
    {k: {x: found[x] for x in y} for k, y in splits.items()},
    looks,
    lists[0].read_text('utf-8-sig', 'replace').splitlines() if lists else (),
    left_out,
  )


def _find_tars(root: pathlib.Path, place: str) -> list[pathlib.Path]:
  """Returns the tars that `place` names; each is there."""
  start = paths.tars_folder(place)
  if start == place:
    return sources.find_files(root, _SUFFIXES)
  files: list[pathlib.Path] = []
  missing = []
  for path in itertools.chain(*map(expand, place.split('::'))):
    below = path.removeprefix(f'{start}/')
    found = [str(paths.expand(path) if below == path else root / below)]
    if '*' in path:  # No other sign varies; folders may have brackets.
      found = glob.glob(re.sub(r'[\[?]', r'[\g<0>]', found[0]))
    if not (found and all(map(os.path.isfile, found))):
      missing.append(path)
    files += map(pathlib.Path, found)
  if missing:
    count = sum(map(os.path.isfile, files))
    raise errors.UserError(
      f'{len(missing):,} tars are missing, {count:,} are there.',
      ', '.join(missing[:3]) + ', …' * (len(missing) > 3),
      'Is the download complete? {000..146} are 147 files.',
    )
  return sorted(set(files))


def expand(pattern: str) -> list[str]:
  """Returns what a pattern with braces stands for.

  {000..146} is each number, of as many digits; {train,val} is either. Braces
  may be within braces.
  """
  start, depth = pattern.find('{'), 0
  cuts = [start]
  for end in range(max(start, 0), len(pattern)):
    depth += (pattern[end] == '{') - (pattern[end] == '}')
    if depth == 0 or (depth == 1 and pattern[end] == ','):
      cuts.append(end)
    if depth == 0:
      break
  if start < 0 or depth:
    return [pattern]
  inner = [pattern[a + 1 : b] for a, b in itertools.pairwise(cuts)]
  if ends := re.fullmatch(r'(\d+)\.\.(\d+)', pattern[start + 1 : end]):
    is_padded = any(x[0] == '0' and len(x) > 1 for x in ends.groups())
    width = max(map(len, ends.groups())) if is_padded else 0
    inner = [f'{x:0{width}}' for x in range(int(ends[1]), int(ends[2]) + 1)]
  else:
    inner = [y for x in inner for y in expand(x)]
  after = expand(pattern[end + 1 :])
  return [pattern[:start] + x + y for x in inner for y in after]


def _list_tar(image: str, label: str, tar: pathlib.Path) -> sources.Listed:
  """Returns names, labels and places of the images in a tar."""
  if tar.suffix != '.tar':
    raise errors.UserError(
      f'{tar.name} is compressed.',
      str(tar),
      'Unpack it to a .tar: its images are read where they lie in it.',
    )
  names, labels, images, left_out = [], [], [], []
  members = ((*_split(name), place) for name, place in archives.list_files(tar))
  for key, group in itertools.groupby(members, lambda x: x[0]):
    found = {suffix: place for _, suffix, place in group}
    kind = next((x for x in ([image] if image else _IMAGES) if x in found), '')
    if not kind:
      left_out.append(folders.LeftOut('without an image', f'{tar.name}/{key}'))
      continue
    names.append(f'{os.path.basename(key)}.{kind}')
    labels.append(_read_label(found, label))
    images.append(found[kind])
  return sources.Listed(names, labels, (), lambda: images, tuple(left_out))


def _split(name: str) -> tuple[str, str]:
  """Returns the key of an example and the suffix, as WebDataset has them."""
  found = re.fullmatch(r'((?:.*/|)[^./]+)\.([^/]*)', name)
  return (found[1], found[2].lower()) if found else (name, '')


def _read_label(found: Mapping[str, archives.Place], label: str) -> int | str:
  """Returns the label of an example, '' if it has none."""
  for suffix in [label] if label else _LABELS:
    if suffix in found:
      text = found[suffix].read_bytes().decode(errors='replace').strip()
      return int(text) if re.fullmatch(r'-?[0-9]+', text) else text
  try:
    said = json.loads(found['json'].read_bytes()) if 'json' in found else {}
    values = [said[x] for x in ([label] if label else _FIELDS) if x in said]
  except (ValueError, TypeError):
    return ''
  is_label = values and type(values[0]) in (int, str)
  return values[0] if is_label else ''


def _check_sizes(
  path: pathlib.Path, found: Mapping[pathlib.Path, sources.Listed]
) -> None:
  """Raises UserError where a tar has not the examples that a list says."""
  try:
    sizes = json.loads(path.read_bytes())
    known = {path.parent / k: int(x) for k, x in sizes.items()}
  except (ValueError, AttributeError, TypeError) as e:
    raise errors.UserError(f'{path.name} is damaged: {e}.', str(path)) from e
  for tar, listed in found.items():
    count = len(listed.names) + len(listed.left_out)
    if known.get(tar, count) != count:
      raise errors.UserError(
        f'{tar.name} has {count:,} examples; {path.name} says {known[tar]:,}.',
        str(tar),
        'Is the download complete?',
      )

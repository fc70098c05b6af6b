"""Paths as people write them: ~ is a home, gs://BUCKET/PATH a copy of it here.

A config keeps what was written, because it may be read on another machine and
by somebody else; whoever opens a path asks here.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import config_dict

from jaxprog import buckets, errors

# Kinds of datasets whose images are in files that hold many.
OF_MANY = ('hf', 'parquet', 'wds')


def expand(path: str | os.PathLike[str], where: str = '') -> pathlib.Path:
  """Returns `path` with the home that ~ or ~USER at its start stands for.

  Raises:
    UserError: naming `where`, if nobody knows that home.
  """
  expanded = os.path.expanduser(path)
  if os.fspath(expanded).startswith('~'):
    home = os.fspath(path).partition('/')[0]
    raise errors.UserError(
      f'Nobody knows the home directory {home}.',
      where or os.fspath(path),
      f'Write the path in full, or ./{home} for a folder of that name.',
    )
  return pathlib.Path(expanded)


def workdir(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the directory of a run; of one in a bucket, that of its copy.

  Raises:
    UserError: if it has no name, or one that cannot be.
  """
  if not os.fspath(path):
    raise errors.UserError(
      'There is no --workdir.',
      "workdir=''",
      'Name a directory for what the run writes: --workdir=runs/first.',
    )
  where = f'--workdir={path}'
  if buckets.is_url(path):
    return copy(path, where=where)
  return _readable(path, where)


def data_dir(config: config_dict.ConfigDict) -> pathlib.Path:
  """Returns where the config has its datasets; of a bucket, their copy."""
  path, where = config.data_dir, f'config.data_dir={config.data_dir}'
  if buckets.is_url(path):
    return copy(path, config.cache_dir, where=where)
  return _readable(path, where)


def copy(
  url: str | os.PathLike[str],
  cache: str = '',
  part: str = '',
  where: str = '',
) -> pathlib.Path:
  """Returns where what lies at `url` is kept on this machine, or its `part`.

  Raises:
    UserError: naming `where`, if nothing can lie at such a URL.
  """
  url = buckets.normalise(url, where)
  home = expand(cache) if cache else cache_home()
  return buckets.copy_of(url, home / part)


def cache_home() -> pathlib.Path:
  """Returns where this user's copies and notes are kept on this machine."""
  return expand(os.environ.get('JAXPROG_CACHE_DIR') or '~/.cache/jaxprog')


def cache_dir(config: config_dict.ConfigDict) -> pathlib.Path | None:
  """Returns where compiled steps are kept, None for nowhere."""
  path = config.compilation_cache_dir
  return expand(path, f'config.compilation_cache_dir={path}') if path else None


class Source(NamedTuple):
  """What KIND:PLACE?image=NAME&label=NAME says of where a dataset lies."""

  kind: str
  # A folder, tars or a name of the Hub.
  place: str
  # The columns or keys that hold images and labels; '': what they are is found.
  image: str
  label: str


def dataset_source(dataset: str) -> Source:
  """Returns where a dataset lies that is called by that; a name is a kind."""
  kind, _, rest = dataset.partition(':')
  if kind not in OF_MANY:
    return Source(kind, rest, '', '')
  place, _, options = rest.partition('?')
  named = dict(x.partition('=')[::2] for x in options.split('&'))
  return Source(kind, place, named.get('image', ''), named.get('label', ''))


def dataset_folder(dataset: str) -> pathlib.Path | None:
  """Returns the folder of folder:PATH, parquet:PATH or wds:TARS, else None.

  Of one in a bucket it is the copy.
  """
  kind, place, _, _ = dataset_source(dataset)
  if kind not in ('folder', 'parquet', 'wds'):
    return None
  if kind == 'wds':
    place = tars_folder(place)
  where = f'dataset {dataset!r}'
  if buckets.is_url(place):
    return copy(place, where=where)
  return expand(place, where)


def tars_folder(place: str) -> str:
  """Returns the folder of tars: what comes before that which varies."""
  start = re.split(r'[*{]|::', place)[0]
  is_folder = start == place and not re.search(r'\.t(ar|gz)\b[^/]*$', place)
  return place if is_folder else os.path.dirname(start) or '.'


def _readable(path: str | os.PathLike[str], where: str) -> pathlib.Path:
  """Returns `path` expanded; what is written there takes text alone for it."""
  expanded = expand(path, where)
  try:
    str(expanded).encode()
  except UnicodeEncodeError:
    raise errors.UserError(
      'The name of a folder is not UTF-8.',
      where.encode(errors='backslashreplace').decode(),
      'Choose a name that is.',
    ) from None
  return expanded


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
  """Raises UserError where a file within cannot be written to `workdir`."""
  try:
    yield
  except OSError as e:
    raise errors.UserError(
      f'Cannot write to the workdir: {e.strerror}.', *place(workdir)
    ) from None


def place(workdir: pathlib.Path) -> tuple[str, str]:
  """Returns what has put a workdir where it is, and how to have another."""
  url = buckets.url_of(workdir)
  if url is None:
    return f'--workdir={workdir}', 'Name a directory that you may write to.'
  copy = buckets.copy_of(url, pathlib.Path())
  cache = workdir.parents[len(copy.parts) - 1]
  return (
    f'JAXPROG_CACHE_DIR={cache}, where the copy of {url} is',
    'Let it name a folder on another disk, which you may write to.',
  )

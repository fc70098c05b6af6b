"""The copy of a workdir in a bucket: what belongs to it, and how it comes.

Those who only look at a run, or add a report to it, `read` it. A run itself
holds it; see mirror.
"""

import contextlib
import functools
import inspect
import json
import os
import pathlib
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

from jaxprog import buckets, errors, files, formats, paths
from jaxprog.reliability import integrity, lease, lock

# From so many bytes on it is said that they are being fetched.
_MANY_BYTES = 10_000_000
_STATE, _FETCHING = '.mirror.json', '.fetch.lock'
_STEP = re.compile(r'((?:.*/)?checkpoints/[^/]+/([^/]+)/\d+)/.+', re.DOTALL)
# What the program writes into a workdir: other things lie there too, where that
# is a bucket itself, or the folder that one stands in.
FOLDERS = (
  'cells',
  'checkpoints',
  'eval',
  'export',
  'lr_find',
  'outcomes',
  'predictions',
  'tensorboard',
  'timing',
  'trials',
  'tuning',
)
_OF_RUN = re.compile(
  rf'(?:{"|".join(FOLDERS)})/.*|'
  r'[^/]+\.(?:csv|db|html|json|jsonl|log|png|txt)',
  re.DOTALL,
)
# Of this machine alone, or not whole.
_LEFT_OUT = re.compile(
  r'(?:.*/)?\..*|(?:.*/)?run\.lock|.*\.orbax-checkpoint-tmp.*|.*\.part',
  re.DOTALL,
)

# Size in bytes and time of writing in ns.
Look = tuple[int, int]
Listing = Mapping[str, buckets.Entry]
_Params = ParamSpec('_Params')
_Result = TypeVar('_Result')


def in_bucket(
  *, weights: bool = True
) -> Callable[[Callable[_Params, _Result]], Callable[_Params, _Result]]:
  """Lets a function whose `workdir` is a URL find the run in a folder.

  What the function writes there is uploaded when it returns. Without `weights`
  it asks for no checkpoint.
  """

  def decorate(
    function: Callable[_Params, _Result],
  ) -> Callable[_Params, _Result]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def inner(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
      bound = signature.bind(*args, **kwargs)
      given = bound.arguments.get('workdir')
      if given is None:
        return function(*bound.args, **bound.kwargs)
      with read(given, weights=weights) as bound.arguments['workdir']:
        return function(*bound.args, **bound.kwargs)

    return inner

  return decorate


@contextlib.contextmanager
def read(
  workdir: str | os.PathLike[str], *, weights: bool = True
) -> Iterator[pathlib.Path]:
  """Yields the folder of a run; see `in_bucket`.

  Raises:
    UserError: if the bucket cannot be read.
  """
  folder = paths.workdir(workdir)
  if not buckets.is_url(workdir):
    yield folder
    return
  bucket = buckets.Bucket(workdir, f'--workdir={workdir}')
  if not _is_ahead(folder, bucket):
    fetch(folder, bucket, weights=weights, all_goes=False)
  before = scan(folder)
  yield folder
  after = scan(folder)
  try:
    for name in sort(after)[1]:
      if before.get(name) != after[name]:
        bucket.write(name, read_file(folder / name))
  except errors.UserError as e:
    text = f'{describe(e)} What was written is in {folder} alone.'
    print(text, file=sys.stderr)


def fetch_config(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns where the config of a run in a bucket is, or would be, here."""
  bucket = buckets.Bucket(workdir, f'--workdir={workdir}')
  path = paths.workdir(workdir) / '.config.json'
  data = bucket.read('config.json')
  if data is not None:
    files.write_bytes(path, data)
  elif not bucket.list():
    raise errors.UserError(
      f'There is no run in {bucket.url}.',
      f'--workdir={workdir}',
      'Name the --workdir that a run was trained with.',
    )
  return path


def _is_ahead(folder: pathlib.Path, bucket: buckets.Bucket) -> bool:
  """Returns whether the folder has all that the bucket has, or more."""
  try:
    lock.check_free(folder)
  except errors.UserError:  # A run is under way there.
    return True
  token = read_token(folder, bucket)
  return bool(token) and token == (lease.read_newest(bucket) or {}).get('token')


def fetch(
  folder: pathlib.Path,
  bucket: buckets.Bucket,
  *,
  weights: bool = True,
  all_goes: bool = True,
) -> Listing:
  """Makes `folder` what the bucket holds, and returns that.

  Of checkpoints what the bucket does not have goes, of other files too if
  `all_goes`; without `weights` no checkpoint is looked at. What others change
  meanwhile is listed again.

  Raises:
    UserError: if the bucket cannot be read.
  """
  found = _list(bucket, weights=weights)
  if not found and not folder.is_dir():
    return found
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / _FETCHING, 'w') as file:
    files.lock(file.fileno())  # Of this machine's processes, one at a time.
    for _ in range(5):
      for name in scan(folder, unfinished=True):
        goes = weights if _STEP.fullmatch(name) else all_goes
        if name not in found and goes:
          (folder / name).unlink(missing_ok=True)
      with contextlib.suppress(FileNotFoundError):
        _download(folder, bucket, found)
        _prune(folder)
        return found
      found = _list(bucket, weights=weights)
  raise RuntimeError(f'{bucket.url} changes faster than it can be fetched.')


def _list(bucket: buckets.Bucket, *, weights: bool = True) -> Listing:
  """Returns the objects of a run, without those of unfinished uploads."""
  found = {k: v for k, v in bucket.list().items() if is_of_run(k)}
  if not weights:
    return {k: v for k, v in found.items() if not _STEP.fullmatch(k)}
  return _finished(found)


def _finished(found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `found` without the files of checkpoints that have no manifest."""
  steps = {name: _STEP.fullmatch(name) for name in found}
  return {
    name: found[name]
    for name, step in steps.items()
    if not step or f'{step[1]}/{integrity.MANIFEST}' in found
  }


def _download(
  folder: pathlib.Path, bucket: buckets.Bucket, found: Listing
) -> None:
  """Fetches what differs; FileNotFoundError: some of it has just gone."""
  missing = [x for x in found if not is_here(folder / x, found[x])]
  size = sum(found[x].size for x in missing)
  if size > _MANY_BYTES:
    text = f'fetching {formats.size(size)} of {bucket.url}'
    print(text, file=sys.stderr)

  def download(name):
    bucket.download(name, found[name], folder / name)

  steps, others = sort(dict.fromkeys(missing, (0, 0)))
  for content, manifest in steps:
    buckets.at_once(download, content)
    buckets.at_once(download, manifest)
  buckets.at_once(download, others)


def is_of_run(name: str) -> bool:
  """Returns whether a file or an object belongs to what a run has written."""
  return bool(_OF_RUN.fullmatch(name)) and not _LEFT_OUT.fullmatch(name)


def is_here(path: pathlib.Path, entry: buckets.Entry) -> bool:
  """Returns whether a file is known to be what an object is."""
  return bool(entry.md5) and buckets.is_same(path, entry)


def _prune(folder: pathlib.Path) -> None:
  """Removes the folders within that hold nothing."""
  for path, _, _ in os.walk(folder, topdown=False):
    if path != os.fspath(folder):
      with contextlib.suppress(OSError):
        os.rmdir(path)


def scan(folder: pathlib.Path, *, unfinished: bool = False) -> dict[str, Look]:
  """Returns how each file looks that belongs into the bucket.

  The newest states are looked for before the weights that they speak of, which
  are there by then. Checkpoints that are being written are left out, but for
  `unfinished`.
  """
  found: dict[str, Look] = {}
  for of_states in (True, False):
    for path, _, names in os.walk(folder):
      if of_states == ('/latest/' in path):
        for name in (os.path.join(path, x) for x in names):
          with contextlib.suppress(FileNotFoundError):
            stat = os.stat(name)
            found[os.path.relpath(name, folder)] = (
              stat.st_size,
              stat.st_mtime_ns,
            )
  found = {k: v for k, v in found.items() if is_of_run(k)}
  return found if unfinished else _finished(found)


def sort(
  found: Mapping[str, Look],
) -> tuple[list[tuple[list[str], list[str]]], list[str]]:
  """Returns the files of each checkpoint, and all others, in order.

  The order is that in which they may be seen: of a checkpoint first the content
  and then the manifest, of all of them the newest states last.
  """
  steps: dict[str, tuple[list[str], list[str]]] = {}
  others = []
  for name in sorted(found, key=lambda name: found[name][1]):
    if step := _STEP.fullmatch(name):
      is_manifest = name == f'{step[1]}/{integrity.MANIFEST}'
      steps.setdefault(step[1], ([], []))[is_manifest].append(name)
    else:
      others.append(name)
  order = sorted(steps, key=lambda step: step.split('/')[-2] == 'latest')
  return [steps[x] for x in order], others


def read_file(path: pathlib.Path) -> bytes:
  """Returns a file's bytes of one moment; Optuna's storage is written to."""
  if path.suffix != '.db':
    return path.read_bytes()
  with contextlib.closing(sqlite3.connect(path)) as database:
    return database.serialize()


def read_token(folder: pathlib.Path, bucket: buckets.Bucket) -> str | None:
  """Returns under which lease of the bucket a folder was written.

  '' is for one that was being fetched, None for one of something else.
  """
  with contextlib.suppress(OSError, ValueError, KeyError):
    state = json.loads((folder / _STATE).read_bytes())
    return str(state['token']) if state['url'] == bucket.url else None
  return None


def write_token(
  folder: pathlib.Path, bucket: buckets.Bucket, token: str
) -> None:
  """Notes that a folder holds all that was written under a lease."""
  files.write_json(folder / _STATE, {'url': bucket.url, 'token': token})


def forget(folder: pathlib.Path) -> None:
  """Removes what a folder knows of a bucket that holds no run."""
  for name in (_STATE, _FETCHING):
    (folder / name).unlink(missing_ok=True)


def describe(error: Exception) -> str:
  """Returns what went wrong in a line."""
  return '; '.join(x.rstrip('.') for x in str(error).split('\n')) + '.'

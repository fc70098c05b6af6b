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
from typing import Any, NamedTuple, ParamSpec, TypeVar

from jaxprog import buckets, errors, files, formats, paths
from jaxprog.reliability import integrity, lock

# How often what changes meanwhile is listed again.
_ROUNDS = 5
# From so many bytes on it is said that they are being fetched.
_MANY_BYTES = 10_000_000
_STATE, _FETCHING = '.mirror.json', '.fetch.lock'
# The object with the token of who wrote last.
_WRITER = 'lease/writer'
_CHECKPOINT = re.compile(r'(?:.*/)?checkpoints/.+', re.DOTALL)
_STEP = re.compile(r'((?:.*/)?checkpoints/[^/]+/([^/]+)/\d+)/.+', re.DOTALL)
# What the program writes into a workdir: other things lie there too, where that
# is a bucket itself, or the folder that one stands in.
FOLDERS = (
  'calibration',
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
  'wandb',
)
_OF_RUN = re.compile(
  rf'(?:{"|".join(FOLDERS)})/.*|'
  r'[^/]+\.(?:csv|db|html|journal|json|jsonl|log|png|txt)',
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


class State(NamedTuple):
  """What a folder knows of its bucket; kept in .mirror.json."""

  # Tokens of owners: what each of them has uploaded, the folder holds.
  holds: tuple[str, ...] = ()
  # How files looked as the bucket had the same ones.
  known: dict[str, Look] = {}  # noqa: RUF012, nobody changes it.


_Params = ParamSpec('_Params')
_Result = TypeVar('_Result')


def in_bucket(
  *, weights: bool | str = True, chosen: bool = False
) -> Callable[[Callable[_Params, _Result]], Callable[_Params, _Result]]:
  """Lets a function whose `workdir` is a URL find the run in a folder.

  What the function writes there is uploaded when it returns. Without `weights`
  it asks for no checkpoint; a kind of them asks for that one, and `chosen` for
  the kind that the function's own argument `weights` names.
  """

  def decorate(
    function: Callable[_Params, _Result],
  ) -> Callable[_Params, _Result]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def inner(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
      bound = signature.bind(*args, **kwargs)
      bound.apply_defaults()
      given = bound.arguments['workdir']
      if given is None:
        return function(*bound.args, **bound.kwargs)
      kind = bound.arguments['weights'] if chosen else weights
      with read(given, weights=kind) as bound.arguments['workdir']:
        return function(*bound.args, **bound.kwargs)

    return inner

  return decorate


@contextlib.contextmanager
def read(
  workdir: str | os.PathLike[str], *, weights: bool | str = True
) -> Iterator[pathlib.Path]:
  """Yields the folder of a run, with all `weights`, none or those of a kind.

  Raises:
    UserError: if the bucket cannot be read.
  """
  folder = paths.workdir(workdir)
  if not buckets.is_url(workdir):
    yield folder
    return
  bucket = buckets.Bucket(workdir, f'--workdir={workdir}')
  if _is_held(folder):
    yield folder
    return
  with alone(folder):
    if not _is_ahead(folder, bucket):
      fetch(folder, bucket, weights=weights)
  before = scan(folder)
  yield folder
  if _is_held(folder):  # The run that has begun uploads that too.
    return
  after = scan(folder)
  try:
    for name in sort(after)[1]:
      if before.get(name) != after[name]:
        bucket.write(name, read_file(folder / name))
  except errors.UserError as e:
    text = f'{describe(e)} What was written is in {folder} alone.'
    print(text, file=sys.stderr)


def send(workdir: str | os.PathLike[str], path: pathlib.Path) -> None:
  """Uploads a file of a run that nobody has taken over since.

  Raises:
    UserError: if the bucket cannot be written to.
  """
  bucket = buckets.Bucket(workdir)
  if _is_ahead(path.parent, bucket):
    bucket.upload(path, path.name)


def fetch_config(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns where the config of a run in a bucket is, or would be, here."""
  bucket = buckets.Bucket(workdir, f'--workdir={workdir}')
  path = paths.workdir(workdir) / '.config.json'
  data = bucket.read('config.json')
  if data is not None:
    with paths.writing(path.parent):
      files.write_bytes(path, data)
  elif not bucket.list():
    raise errors.UserError(
      f'There is no run in {bucket.url}.',
      f'--workdir={workdir}',
      'Name the --workdir that a run was trained with.',
    )
  return path


def _is_held(folder: pathlib.Path) -> bool:
  """Returns whether a run is under way in a folder."""
  try:
    lock.check_free(folder)
  except errors.UserError:
    return True
  return False


def _is_ahead(folder: pathlib.Path, bucket: buckets.Bucket) -> bool:
  """Returns whether the folder has all that the bucket has, or more."""
  state = read_state(folder, bucket)
  return state is not None and read_writer(bucket) in state.holds


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """Lets one process of this machine at a time fetch into `folder`.

  Raises:
    UserError: if one may not write there, or the disk is full.
  """
  with paths.writing(folder), files.folder(folder):
    with open(folder / _FETCHING, 'w') as file:
      files.lock(file.fileno())
      yield
    if not (folder / _STATE).exists():
      (folder / _FETCHING).unlink(missing_ok=True)


def fetch(
  folder: pathlib.Path,
  bucket: buckets.Bucket,
  *,
  weights: bool | str = True,
) -> State:
  """Makes `folder` what the bucket holds, and returns what is known then.

  Of checkpoints what the bucket does not have goes, of other files what it
  once had; checkpoints that are not asked for are not looked at. What others
  change meanwhile is listed again. Called within `alone`.

  Raises:
    UserError: if the bucket cannot be read.
  """
  state = read_state(folder, bucket) or State()
  for _ in range(_ROUNDS):
    writer, found = read_writer(bucket), _list(bucket, weights)
    if not found and not state.known and not scan(folder, unfinished=True):
      return State()
    write_state(folder, bucket, State((), state.known))
    for name in scan(folder, unfinished=True):
      is_ours = name in state.known or _CHECKPOINT.fullmatch(name)
      if name not in found and is_ours and _is_asked(name, weights):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError, buckets.ChangedError):
      _download(folder, bucket, found)
      _prune(folder)
      known = {k: v for k, v in scan(folder).items() if k in found}
      is_whole = weights is True
      holds = (writer,) if writer and is_whole else ()
      state = State(holds, known if is_whole else {**state.known, **known})
      write_state(folder, bucket, state)
      return state
  raise RuntimeError(f'{bucket.url} changes faster than it can be fetched.')


def refresh(folder: pathlib.Path, bucket: buckets.Bucket) -> None:
  """Makes `folder`, of a process that does not write, what the bucket holds.

  Raises:
    RuntimeError: if the bucket cannot be read; hours later it is no mistake.
  """
  try:
    with alone(folder):
      fetch(folder, bucket)
  except errors.UserError as e:
    raise RuntimeError(describe(e)) from e


def _list(bucket: buckets.Bucket, weights: bool | str) -> Listing:
  """Returns the objects of a run, without those of unfinished uploads."""
  found = {k: v for k, v in bucket.list().items() if is_of_run(k)}
  return _finished({k: v for k, v in found.items() if _is_asked(k, weights)})


def _is_asked(name: str, weights: bool | str) -> bool:
  step = _STEP.fullmatch(name)
  return weights is True or not step or step[2] == weights


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


def is_checkpoint(name: str) -> bool:
  """Returns whether a file of a run is of its checkpoints."""
  return _CHECKPOINT.fullmatch(name) is not None


def _prune(folder: pathlib.Path) -> None:
  """Removes the run's folders within that hold nothing."""
  for name in FOLDERS:
    for path, _, _ in os.walk(folder / name, topdown=False):
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
    for path in _walk(folder):
      if of_states == ('/latest/' in path):
        with contextlib.suppress(OSError):  # It has just gone.
          stat = os.stat(path)
          name = os.path.relpath(path, folder)
          found[name] = stat.st_size, stat.st_mtime_ns
  found = {k: v for k, v in found.items() if is_of_run(k)}
  return found if unfinished else _finished(found)


def _walk(folder: pathlib.Path) -> Iterator[str]:
  """Yields the files in a workdir where a run's can be."""
  with contextlib.suppress(OSError):
    yield from (x.path for x in os.scandir(folder) if x.is_file())
  for name in FOLDERS:
    for path, _, names in os.walk(folder / name):
      yield from (os.path.join(path, x) for x in names)


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
  """Returns a file's bytes of one moment; Optuna's storage is written to.

  Raises:
    FileNotFoundError: if it is gone.
  """
  if path.name == 'tune.journal':
    data = path.read_bytes()
    return data[: data.rfind(b'\n') + 1]  # The rest is being written.
  if path.name != 'tune.db':
    return path.read_bytes()
  path.stat()
  uri = f'{path.absolute().as_uri()}?mode=ro'
  with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
    return database.serialize()


def read_writer(bucket: buckets.Bucket) -> str:
  """Returns the token of who wrote to the bucket last, '' if nobody has."""
  return (bucket.read(_WRITER) or b'').decode(errors='replace')


def write_writer(bucket: buckets.Bucket, token: str) -> None:
  """Tells all other folders that they are not the newest any more."""
  bucket.write(_WRITER, token.encode())


def read_state(folder: pathlib.Path, bucket: buckets.Bucket) -> State | None:
  """Returns what a folder knows of this very bucket, None if nothing."""
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    state = json.loads((folder / _STATE).read_bytes())
    if state['url'] == bucket.url:
      known = {
        name: (size, time) for name, (size, time) in state['known'].items()
      }
      return State(tuple(state['holds']), known)
  return None


def write_state(
  folder: pathlib.Path, bucket: buckets.Bucket, state: State
) -> None:
  """Keeps what a folder knows of a bucket."""
  files.write_json(folder / _STATE, {'url': bucket.url, **state._asdict()})


def forget(folder: pathlib.Path, bucket: buckets.Bucket) -> None:
  """Removes what a folder and a bucket of no run know of each other."""
  bucket.remove([_WRITER])
  for name in (_STATE, _FETCHING):
    (folder / name).unlink(missing_ok=True)


def describe(error: Exception) -> str:
  """Returns what went wrong in a line."""
  return '; '.join(x.rstrip('.') for x in str(error).split('\n')) + '.'

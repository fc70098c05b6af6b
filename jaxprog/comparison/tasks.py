"""A run as a task on some host of a cluster: where it computes, how it ends."""

import contextlib
import fcntl
import math
import os
import pathlib
import platform
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from ml_collections import config_dict

from jaxprog import errors
from jaxprog.monitoring import environment
from jaxprog.training import xla_flags

_T = TypeVar('_T')


class Place(NamedTuple):
  """What a run has of its host.

  Attributes:
    folder: from which relative paths count.
    num_cpus: cores, of which parts count as whole ones.
    num_gpus: a part of one is as much of its memory.
  """

  folder: str
  num_cpus: float
  num_gpus: float = 0.0


class LostError(RuntimeError):
  """A run's process or host died, more often than it is begun again."""


class Stopped(NamedTuple):
  """What is returned for a run that was asked to stop, and has saved."""


def count_needs(asked: config_dict.ConfigDict) -> dict[str, float]:
  """Returns what a run takes, by Ray's names.

  Raises:
    UserError: for what Ray could not give.
  """
  others = _parse_resources(asked.resources)
  needs = {'CPU': asked.num_cpus, 'GPU': asked.num_gpus, **others}
  for name, amount in needs.items():
    if amount > 1 and amount != int(amount):
      raise errors.UserError(
        f'Above 1 Ray gives whole numbers, not {name} {amount:g}.', 'config.ray'
      )
  return needs


def _parse_resources(text: str) -> dict[str, float]:
  """Returns what 'TPU=4,big=0.5' says.

  Raises:
    UserError: if that is none.
  """
  found = {}
  for part in filter(None, text.split(',')):
    name, _, amount = map(str.strip, part.partition('='))
    if name in ('CPU', 'GPU') or not re.fullmatch(r'\d*\.?\d+', amount):
      raise errors.UserError(
        f'A resource besides num_cpus and num_gpus is NAME=AMOUNT, not {part}.',
        f'config.ray.resources={text}',
        "Write 'TPU=4', or several with a comma between.",
      )
    found[name] = float(amount)
  return found


def work(
  place: Place, call: Callable[..., _T], arguments: tuple[Any, ...]
) -> _T | Stopped:
  """Returns what `call` does with `arguments`, at its place."""
  os.chdir(place.folder)
  if 0 < place.num_gpus < 1:
    xla_flags.share_memory(place.num_gpus)
  with _pinned(math.ceil(place.num_cpus)):
    try:
      return call(*arguments)
    except errors.Stopped:
      return Stopped()


class Host(NamedTuple):
  """What a host is, what it computes with, and what it finds in a file."""

  name: str
  processor: str
  versions: Mapping[str, str]
  found: bytes


def look(folder: str, path: pathlib.Path) -> Host:
  """Returns what this host is and finds at `path`, b'' for nothing.

  Raises:
    OSError: if there is no such folder.
  """
  os.chdir(folder)
  try:
    found = path.read_bytes()
  except OSError:
    found = b''
  return Host(
    platform.node(), environment.processor(), environment.versions(), found
  )


@contextlib.contextmanager
def _pinned(count: int) -> Iterator[None]:
  """Has this process compute on `count` cores that no other run here has.

  XLA starts as many threads as it sees cores, and what they add up depends on
  how many they are. Where Ray was told of more cores than there are, runs share
  some.
  """
  every = os.sched_getaffinity(0)
  with contextlib.ExitStack() as stack:
    mine: list[int] = []
    for core in sorted(every):
      if len(mine) < count and _claim(core, stack):
        mine.append(core)
    mine += sorted(every.difference(mine))[: count - len(mine)]
    _use_cores(mine)
    stack.callback(_use_cores, every)
    yield


def _claim(core: int, stack: contextlib.ExitStack) -> bool:
  """Returns whether a core is ours, until `stack` closes or we are killed."""
  folder = pathlib.Path(tempfile.gettempdir(), f'jaxprog-cores-{os.getuid()}')
  folder.mkdir(mode=0o700, exist_ok=True)
  file = os.open(
    folder / str(core), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
  )
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    os.close(file)
    return False
  stack.callback(os.close, file)
  return True


def _use_cores(cores: Collection[int]) -> None:
  """Moves every thread of this process; new ones and children follow."""
  for thread in os.listdir('/proc/self/task'):
    with contextlib.suppress(ProcessLookupError):
      os.sched_setaffinity(int(thread), cores)

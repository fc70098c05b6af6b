"""Where the runs of a comparison or a search take place.

One after the other in this process, or as tasks of a Ray cluster, as many at
once as it has room for. Whoever has many runs writes a *flow* for each thing
that goes on by itself, a cell with a seed or a worker of a search: a function
that plans a run, calls `Engine.run` and reads what came of it. Flows take
turns: only while one waits in a method of its engine another one computes, so
that they may share what they like.
"""

import contextlib
import functools
import importlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import jax
from jax.extend import backend
from ml_collections import config_dict

from jaxprog import errors
from jaxprog.comparison import tasks
from jaxprog.fields import Field
from jaxprog.reliability import lock

_T = TypeVar('_T')

# For a run whose workdir a process still has that is about to die, or thought
# dead: longer than a file server remembers its locks.
_PATIENCE_SECONDS = 300.0


class Engine(Protocol):
  """Runs, and flows that have them.

  Attributes:
    slots: how many runs there can be at once.
  """

  slots: int

  def run(self, name: str, call: Callable[..., _T], *arguments: Any) -> _T:
    """Returns or raises what `call` does, a function of a module.

    Elsewhere it is given copies, and begun again if its host is lost: it must
    go on from what it finds on the disk.

    Raises:
      LostError: if it was lost too often.
    """

  def at_once(self, flows: Sequence[Callable[[], _T]]) -> list[_T]:
    """Returns what `flows` return, begun in their order.

    What one of them raises ends all others, which save what they have.
    """

  def wait(self, condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds, which other flows bring about."""


class Serial:
  """Runs in this process, one after the other."""

  slots = 1

  def run(self, name: str, call: Callable[..., _T], *arguments: Any) -> _T:
    """See `Engine`."""
    del name
    return call(*arguments)

  def at_once(self, flows: Sequence[Callable[[], _T]]) -> list[_T]:
    """See `Engine`."""
    return [flow() for flow in flows]

  def wait(self, condition: Callable[[], bool]) -> None:
    """See `Engine`."""
    assert condition(), 'What comes before has been run.'


def check(config: config_dict.ConfigDict) -> None:
  """Raises UserError for a mistake in the fields of an engine."""
  Field('engine', str, None, choices=('serial', 'ray')).check(
    config.engine, 'config'
  )
  if config.engine == 'serial':
    return
  for field in (
    Field('ray.address', str, None),
    Field('ray.num_cpus', float, None, within='(0, inf)'),
    Field('ray.num_gpus', float, None, within='[0, inf)'),
    Field('ray.resources', str, None),
    Field('ray.max_retries', int, None, within='[0, inf)'),
  ):
    field.check(config.ray[field.name.removeprefix('ray.')], 'config')
  tasks.count_needs(config.ray)
  try:
    importlib.import_module('ray')
  except ImportError as e:
    raise errors.not_installed('A cluster', 'config.engine', e, 'ray') from None


@contextlib.contextmanager
def devices_elsewhere(config: config_dict.ConfigDict) -> Iterator[None]:
  """Has JAX leave accelerators to runs that are not in this process.

  Afterwards it finds them again: a notebook goes on to train.
  """
  before = jax.config.jax_platforms  # type: ignore[attr-defined]
  if config.engine == 'serial' or before == 'cpu':
    yield
    return
  jax.config.update('jax_platforms', 'cpu')
  try:
    yield
  finally:
    is_hidden = jax.default_backend() == 'cpu'  # Else it had them before.
    jax.config.update('jax_platforms', before)
    if is_hidden:
      backend.clear_backends()


def guard(
  config: config_dict.ConfigDict, workdir: pathlib.Path, owner: lock.Lock
) -> tuple[Callable[[], object], float]:
  """Returns what a run calls, which raises once another has `workdir`.

  And for how many seconds it is to wait for its own directory.
  """
  if config.engine == 'serial':
    return owner.check, 0.0
  check = functools.partial(lock.check_owner, workdir, owner.token)
  return check, _PATIENCE_SECONDS


@contextlib.contextmanager
def start(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  say: Callable[[str], None],
  *,
  alike: bool = False,
) -> Iterator[Engine]:
  """Yields what `config.engine` names, for runs in a workdir that is locked.

  `say` is told of runs that are lost.

  Raises:
    UserError: if there is no cluster, none of its hosts has room for a run, one
      does not see the workdir or, with `alike`, their devices differ.
  """
  if config.engine == 'serial':
    yield Serial()
    return
  # What is not asked for need not be installed, nor take time.
  from jaxprog.comparison import cluster

  with cluster.join(config, workdir, say, alike) as engine:
    yield engine

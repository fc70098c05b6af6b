"""Where the runs of a comparison or a search take place.

One after the other in this process, or as tasks of a Ray cluster, as many at
once as it has room for. Whoever has many runs writes a *flow* for each thing
that goes on by itself, a cell with a seed or a worker of a search: a function
that plans a run, calls `Engine.run` and reads what came of it. Flows take
turns: only while one waits in a method of its engine another one computes, so
that they may share what they like.
"""

import contextlib
import importlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from ml_collections import config_dict

from jaxprog import errors
from jaxprog.comparison import tasks
from jaxprog.fields import Field

_T = TypeVar('_T')


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
  try:
    importlib.import_module('ray')
  except ImportError as e:
    raise errors.not_installed('A cluster', 'config.engine', e, 'ray') from None
  for field in (
    Field('ray.address', str, None),
    Field('ray.num_cpus', float, None, within='(0, inf)'),
    Field('ray.num_gpus', float, None, within='[0, inf)'),
    Field('ray.resources', str, None),
    Field('ray.max_retries', int, None, within='[0, inf)'),
  ):
    field.check(config.ray[field.name.removeprefix('ray.')], 'config')
  tasks.count_needs(config.ray)


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

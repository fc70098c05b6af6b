"""Runs as tasks of a Ray cluster, as many at once as it has room for."""

import contextlib
import logging
import math
import os
import pathlib
import re
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import ray
from ml_collections import config_dict
from ray.util import scheduling_strategies

from jaxprog import buckets, errors
from jaxprog.comparison import tasks
from jaxprog.monitoring import activity
from jaxprog.reliability import signals

_T = TypeVar('_T')

# How names begin of what runs see of this process's environment.
_PASSED_ON = ('JAX', 'XLA_', 'LIBTPU_', 'TF_')
# How long the address of a cluster is asked whether anybody is there.
_ANSWER_SECONDS = 20
# Between two looks at what a flow waits for.
_POLL_SECONDS = 0.5
# How Ray names what a host computes on.
_ACCELERATOR = 'accelerator_type:'


class _EndedError(Exception):
  """Another flow has failed, or a signal came: this one ends too."""


class Cluster:
  """See `engines.Engine`."""

  def __init__(
    self, asked: config_dict.ConfigDict, slots: int, say: Callable[[str], None]
  ) -> None:
    self.slots = slots
    self._say = say
    self._num_tries = 1 + asked.max_retries
    needs = tasks.count_needs(asked)
    self._place = tasks.Place(os.getcwd(), asked.num_cpus, asked.num_gpus)
    # JAX keeps the accelerators that it has once seen: its process ends with
    # the run. On cores alone the next run saves the imports.
    is_fresh = any(v for k, v in needs.items() if k != 'CPU')
    self._task: Any = ray.remote(
      num_cpus=needs.pop('CPU'),
      num_gpus=needs.pop('GPU'),
      resources=needs,
      max_retries=0,
      max_calls=int(is_fresh),
      runtime_env={'env_vars': _environment()},
    )(tasks.work)
    self._home = threading.current_thread()
    # Whoever has it computes; who began the first flows waits for them.
    self._turn = threading.Lock()
    self._submitting = threading.Lock()
    self._under_way: set[Any] = set()
    self._ending = threading.Event()

  def run(self, name: str, call: Callable[..., _T], *arguments: Any) -> _T:
    """See `engines.Engine`."""
    for _ in range(self._num_tries):
      reference = self._submit(name, call, arguments)
      try:
        with self._others_turn():
          found = ray.get(reference)
        if not isinstance(found, tasks.Stopped):
          return found
        error = f'{name}: was told to stop on its host'
      except ray.exceptions.TaskCancelledError:
        raise _EndedError from None
      except ray.exceptions.RayTaskError as e:
        raise (e.cause if isinstance(e.cause, Exception) else e) from e
      except (
        ray.exceptions.LocalRayletDiedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.WorkerCrashedError,
      ) as e:
        error = f'{name}: its process or host died ({type(e).__name__})'
      finally:
        self._under_way.discard(reference)
      if self._ending.is_set():
        raise _EndedError
      self._say(f'{error}.')
    raise tasks.LostError(f'{error}; that was try {self._num_tries}')

  def at_once(self, flows: Sequence[Callable[[], _T]]) -> list[_T]:
    """See `engines.Engine`."""
    pool = futures.ThreadPoolExecutor(max(1, len(flows)), 'flow')
    begun: list[futures.Future[_T]] = []
    try:
      for flow in flows:
        has_turn = threading.Event()
        begun.append(pool.submit(self._take_turn, flow, has_turn))
        with self._others_turn():
          has_turn.wait()
      with self._others_turn():
        futures.wait(begun, return_when=futures.FIRST_EXCEPTION)
    finally:
      release = signals.hold_off()  # A signal may be why: all save first.
      failed = any(x.done() and x.exception() for x in begun)
      if failed or not all(x.done() for x in begun):
        self._end()
      with self._others_turn():
        pool.shutdown()
      release()
    found = [x.exception() for x in begun]
    for error in sorted(found, key=lambda x: isinstance(x, _EndedError)):
      if error is not None:
        raise error
    return [x.result() for x in begun]

  def wait(self, condition: Callable[[], bool]) -> None:
    """See `engines.Engine`."""
    while not condition():
      with self._others_turn():
        ended = self._ending.wait(_POLL_SECONDS)
      if ended:
        raise _EndedError

  def _take_turn(self, flow: Callable[[], _T], has_turn: threading.Event) -> _T:
    with self._turn:
      has_turn.set()
      return flow()

  @contextlib.contextmanager
  def _others_turn(self) -> Iterator[None]:
    """Lets other flows compute; who began the first of them has no turn."""
    if threading.current_thread() is self._home:
      yield
      return
    self._turn.release()
    try:
      yield
    finally:
      self._turn.acquire()

  def _submit(
    self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]
  ) -> Any:
    with self._submitting:
      if self._ending.is_set():
        raise _EndedError
      task = self._task.options(name=name)
      reference = task.remote(self._place, call, arguments)
      self._under_way.add(reference)
      return reference

  def _end(self) -> None:
    """Has all that is under way save and leave, as Ctrl-C does."""
    with self._submitting:
      self._ending.set()
      for reference in list(self._under_way):
        ray.cancel(reference)


@contextlib.contextmanager
def join(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  say: Callable[[str], None],
  alike: bool,
) -> Iterator[Cluster]:
  """Yields the engine that `engines.start` does."""
  needs = tasks.count_needs(config.ray)
  began = not ray.is_initialized()
  if began:
    _connect(config.ray.address)
  try:
    with signals.StopRequest():  # Ray has put its own handler there.
      nodes = _find_nodes(needs)
      _check_hosts(nodes, needs, workdir, alike)
      _check_accelerators(nodes, needs, config.base.platform)
      slots = sum(_count_runs(node, needs) for node in nodes)
      yield Cluster(config.ray, slots, say)
  finally:
    if began:
      ray.shutdown()


def _environment() -> dict[str, str]:
  """Returns what a run's process has of this one's environment.

  Modules are found where this process finds them; those that are installed
  each host has itself.
  """
  installed = f'{sys.prefix}{os.sep}', f'{sys.base_prefix}{os.sep}'
  paths = [os.path.abspath(x) for x in sys.path]
  own = [x for x in paths if not x.startswith(installed)]
  kept = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
  return {**kept, 'PYTHONPATH': os.pathsep.join(own)}


def _connect(address: str) -> None:
  """Joins a cluster; without an address Ray's own rules name one."""
  named = address or os.environ.get('RAY_ADDRESS', '')
  try:
    if found := re.fullmatch(r'([\w.-]+):(\d+)', named):
      # Ray would ask for minutes where nobody answers.
      host, port = found.groups()
      socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    with activity.doing('joining the Ray cluster'), warnings.catch_warnings():
      # JAX's, of processes that are forked and call nothing of it.
      warnings.filterwarnings('ignore', message='os.fork', module='subprocess')
      ray.init(
        address=address or None,
        log_to_driver=False,
        logging_level=logging.ERROR,
      )
  except (
    OSError,
    OverflowError,  # Of a port.
    RuntimeError,
    ValueError,
    ray.exceptions.RayError,
  ) as e:
    raise errors.UserError(
      f'There is no Ray cluster: {" ".join(str(e).split())[:300]}',
      f'config.ray.address={named}',
      "Begin one with 'ray start --head'; with '' there is one of this host.",
    ) from None


def _find_nodes(needs: Mapping[str, float]) -> list[Mapping[str, Any]]:
  """Returns the hosts that have room for a run.

  Raises:
    UserError: if none has.
  """
  nodes = [node for node in ray.nodes() if node['Alive']]
  found = [node for node in nodes if _count_runs(node, needs)]
  wanted = ', '.join(f'{k} {v:g}' for k, v in needs.items() if v)
  if not found:
    most = ', '.join(
      f'{k} {max(node["Resources"].get(k, 0) for node in nodes):g}'
      for k, v in needs.items()
      if v
    )
    raise errors.UserError(
      f'No host of the cluster has what a run takes: {wanted}.',
      'config.ray',
      f'The most that one has: {most}.',
    )
  return found


def _count_runs(node: Mapping[str, Any], needs: Mapping[str, float]) -> int:
  """Returns for how many runs at once a host has room."""
  has = node['Resources']
  return min(
    math.floor(has.get(k, 0.0) / v + 1e-6) for k, v in needs.items() if v
  )


def _check_hosts(
  nodes: Sequence[Mapping[str, Any]],
  needs: Mapping[str, float],
  workdir: pathlib.Path,
  alike: bool,
) -> None:
  """Asks every host that may have runs what it sees, and what it is.

  Raises:
    UserError: as `start`.
  """
  path = (workdir / 'run.lock').absolute()
  look = ray.remote(num_cpus=0, runtime_env={'env_vars': _environment()})(
    tasks.look
  )
  asked = [
    look.options(
      scheduling_strategy=scheduling_strategies.NodeAffinitySchedulingStrategy(
        node['NodeID'], soft=False
      )
    ).remote(os.getcwd(), path)
    for node in nodes
  ]
  try:
    seen = ray.get(asked)
  except ray.exceptions.RayError as e:
    *_, reason = str(e).strip().splitlines()
    raise errors.UserError(
      f'A host of the cluster cannot have runs: {reason}',
      'config.ray',
      'It needs jaxprog, and the folder in which this command runs.',
    ) from None
  kinds, here = {}, tasks.look(os.getcwd(), path)
  for node, host in zip(nodes, seen, strict=True):
    _check_host(host, here, workdir)
    devices = [x for x in node['Resources'] if x.startswith(_ACCELERATOR)]
    uses_others = any(v for k, v in needs.items() if k != 'CPU')
    kind = ', '.join(sorted(devices)) if uses_others else host.processor
    kinds[kind.replace(_ACCELERATOR, '')] = host.name
  if alike and len(kinds) > 1:
    raise errors.UserError(
      'Seconds are only equal on equal devices; the cluster has '
      f'{" and ".join(f"{kind} ({host})" for kind, host in kinds.items())}.',
      'config.budget and config.controls',
      'Use another budget, or name one kind in config.ray.resources.',
    )


def _check_host(
  host: tasks.Host, here: tasks.Host, workdir: pathlib.Path
) -> None:
  """Raises UserError if a host does not have what this one has.

  Versions: what runs come to depends on them. TensorFlow only reads datasets,
  and a host may have it under another name.
  """
  if host.found != here.found:
    raise errors.UserError(
      f'Host {host.name} of the cluster does not see the workdir.',
      f'--workdir={buckets.shown(workdir)}',
      'Name a folder on a file system that all hosts share.',
    )
  names = sorted({*host.versions, *here.versions})
  for name in (x for x in names if not x.startswith('tensorflow')):
    theirs, ours = (x.versions.get(name, 'none') for x in (host, here))
    if theirs != ours:
      raise errors.UserError(
        f'Host {host.name} of the cluster has {name} {theirs}, this one '
        f'{ours}.',
        'config.ray',
        'Install the same versions on all: what runs come to depends on them.',
      )


def _check_accelerators(
  nodes: Sequence[Mapping[str, Any]], needs: Mapping[str, float], platform: str
) -> None:
  """Raises UserError if accelerators stand idle that nobody said so of.

  Ray hides GPUs from what asks for none: runs would fall back to cores.
  """
  if 'cpu' in (platform, os.environ.get('JAX_PLATFORMS')):
    return
  for name, field in (('GPU', 'num_gpus=1'), ('TPU', "resources='TPU=4'")):
    number = sum(node['Resources'].get(name, 0) for node in nodes)
    if number and not any(v for k, v in needs.items() if k != 'CPU'):
      raise errors.UserError(
        f'The cluster has {number:g} {name}s, of which runs would have none.',
        'config.ray',
        f"Set config.ray.{field}, or config.base.platform='cpu'.",
      )

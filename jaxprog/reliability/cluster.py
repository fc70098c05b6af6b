"""Who has started this process, and with how many others.

Cloud TPU, GKE, SLURM and Open MPI say it; elsewhere flags do.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from jaxprog import errors
from jaxprog.reliability import peers as peers_lib
from jaxprog.reliability import signals

# Seconds for the processes to find each other, as long as JAX itself waits.
_CONNECT_SECONDS = 300
SLURM = ('JOB_ID', 'STEP_NODELIST', 'NTASKS', 'PROCID', 'LOCALID')
_METADATA = (
  'http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints'
)


class Place(NamedTuple):
  """Where the processes meet; None: the cluster says it."""

  coordinator: str | None = None
  process_count: int | None = None
  process_id: int | None = None


@contextlib.contextmanager
def processes(
  place: Place, command: str, connect_seconds: int = _CONNECT_SECONDS
) -> Iterator[None]:
  """Makes this one of the processes of a run, if it is of several.

  `command` must be the same in all of them.

  Raises:
    UserError: if `place` cannot be, another process holds its port, or the
      commands differ.
  """
  cluster = detect(os.environ)
  check_place(place, cluster)
  if place.process_count == 1 or not (cluster or place.coordinator):
    yield
    return
  _initialize(place, connect_seconds)
  with signals.StopRequest() as stop:  # Again: JAX may have its own handlers.
    peers = peers_lib.Peers(stop)
    try:
      with peers:
        peers.compare('command', {'the command': command})
        yield
    finally:
      # Else process 0 leaves last, and ends it that way.
      if peers.closed.is_set():
        jax.distributed.shutdown()


def detect(environ: Mapping[str, str]) -> str:
  """Returns what has started several processes, '' if this is the only one.

  It waits for nothing, but on a Cloud TPU VM, which alone can say how many
  there are, at most 2 s for the metadata server.
  """
  # As jax looks for them, in its order.
  if 'OMPI_MCA_orte_hnp_uri' in environ:
    count = environ.get('OMPI_COMM_WORLD_SIZE', '1')
    return 'Open MPI' if _is_several(count) else ''
  if all(f'SLURM_{name}' in environ for name in SLURM):
    return 'SLURM' if _is_several(environ['SLURM_NTASKS']) else ''
  if not _has_tpu():
    return ''
  several_slices = _is_several(environ.get('MEGASCALE_NUM_SLICES', '1'))
  for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'):
    if name in environ:
      return 'GKE' if several_slices or ',' in environ[name] else ''
  if 'TPU_SKIP_MDS_QUERY' in environ:
    return ''
  return 'Cloud TPU' if several_slices or _count_workers(environ) > 1 else ''


def _is_several(count: str) -> bool:
  return count.isdecimal() and int(count) > 1


def _has_tpu() -> bool:
  """Returns whether JAX would look for the other hosts of a TPU slice."""
  chips = any(
    os.path.exists(path) for path in ('/dev/accel0', '/dev/vfio/0')
  ) or any(pathlib.Path('/dev/vfio').glob('[1-9]*'))
  return chips and importlib.util.find_spec('libtpu') is not None


def _count_workers(environ: Mapping[str, str]) -> int:
  """Returns the hosts of this Cloud TPU slice, 1 if nobody says."""
  host = environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
    _METADATA.format(host), headers={'Metadata-Flavor': 'Google'}
  )
  try:
    with urllib.request.urlopen(request, timeout=2) as answer:
      return len(answer.read().split(b','))
  except OSError:
    return 1


def check_place(place: Place, cluster: str = '') -> None:
  """Raises UserError unless `place`, with what `cluster` knows, is one."""
  coordinator, count, index = place
  flags = ' '.join(
    f'--{name}={value}'
    for name, value in place._asdict().items()
    if value is not None
  )
  if coordinator is not None and not (
    re.fullmatch(r'.+:\d{1,5}', coordinator)
    and int(coordinator.rpartition(':')[2]) < 2**16
  ):
    raise errors.UserError(
      f'{coordinator!r} is not HOST:PORT.', flags, 'Name both.'
    )
  if count is not None and count < 1:
    raise errors.UserError(f'There cannot be {count} processes.', flags)
  if index is not None and (index < 0 or (count and index >= count)):
    raise errors.UserError(
      f'There is no process {index}' + (f' among {count}.' if count else '.'),
      flags,
      'They count from 0: --process_id=0 is the one at --coordinator.',
    )
  missing = [f'--{k}' for k, v in place._asdict().items() if v is None]
  if flags and missing and not cluster and count != 1:
    raise errors.UserError(
      f'Several processes need {" and ".join(missing)} too.',
      flags,
      'Only Cloud TPU, GKE, SLURM and Open MPI say them without being asked.',
    )


def _initialize(place: Place, connect_seconds: int) -> None:
  """Waits for all processes; ends this one with code 2 if some do not come.

  JAX itself would abort it.
  """
  if place.process_id == 0 and place.coordinator:
    _check_port(place.coordinator)
  # Its SIGTERM handler would take the place of ours.
  jax.config.update('jax_enable_preemption_service', False)
  late = threading.Timer(connect_seconds, _give_up, (place, connect_seconds))
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      *place, initialization_timeout=connect_seconds + 60
    )
  except (RuntimeError, ValueError, OSError) as e:
    message = ' '.join(str(e).split())[:200]
    raise errors.UserError(
      f'The processes cannot meet: {message}', _say(place)
    ) from e
  finally:
    late.cancel()


def _check_port(coordinator: str) -> None:
  port = int(coordinator.rpartition(':')[2])
  try:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(('', port))
  except (OSError, OverflowError) as e:
    raise errors.UserError(
      f'Process 0 cannot listen on port {port}: '
      f'{getattr(e, "strerror", None) or e}.',
      f'--coordinator={coordinator}',
      'Name another port, the same one for all processes.',
    ) from None


def _give_up(place: Place, seconds: int) -> None:
  text = (
    f'Not all processes came within {seconds} s.',
    _say(place),
    'Is each of them started, and does process 0 run at that address, which '
    'the others can reach?',
  )
  signals.leave_now('\n'.join(text), 2)


def _say(place: Place) -> str:
  where = place.coordinator or 'the coordinator that the cluster names'
  index = '?' if place.process_id is None else place.process_id
  return f'process {index} at {where}'

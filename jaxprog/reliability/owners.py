"""Whose a workdir is: a process, as it describes itself to others."""

import datetime
import json
import os
import pathlib
import platform
import shlex
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from jaxprog import errors

# Looks at another's sign of life until it counts as dead.
_LOOKS = 12

Owner = dict[str, Any]
_T = TypeVar('_T')


class InUseError(errors.UserError):
  """Another process has the workdir."""


def describe_process() -> Owner:
  """Returns what others may want to know of this process."""
  now = datetime.datetime.now(datetime.UTC)
  return {
    'host': platform.node(),
    'pid': os.getpid(),
    'since': now.isoformat(timespec='seconds'),
    'start': start_time(os.getpid()),
    'boot': _boot(),
    'pid_namespace': _pid_namespace(),
    'command': errors.without_passwords(shlex.join(sys.orig_argv)),
    'token': uuid.uuid4().hex,
  }


def parse(data: bytes) -> Owner:
  """Returns what an owner has written of itself, {} if that is damaged."""
  try:
    owner = json.loads(data)
  except ValueError:
    return {}
  return owner if isinstance(owner, dict) else {}


def is_here(owner: Owner) -> bool:
  """Returns whether `owner` ran on this host, started as it is now."""
  return (owner.get('host'), owner.get('boot')) == (platform.node(), _boot())


def is_this(owner: Owner) -> bool:
  """Returns whether `owner` is this process."""
  me = describe_process()
  known = ('host', 'boot', 'pid_namespace', 'pid', 'start')
  return all(owner.get(name) == me[name] for name in known)


def is_running(owner: Owner) -> bool | None:
  """Returns whether its process is there; None if nobody here can tell.

  It is not if another one has its old pid. This process itself is not counted:
  it knows what it holds.
  """
  if not is_here(owner) or owner.get('pid_namespace') != _pid_namespace():
    return None
  pid = owner.get('pid')
  if not isinstance(pid, int) or pid == os.getpid():
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return bool(owner.get('start') == start_time(pid))


def watch(look: Callable[[], _T], first: _T, seconds: float) -> _T:
  """Returns what `look` returns as soon as it is not `first` any more.

  Or `first`, once it was that for so many seconds of this process's own clock.
  Seconds in which looking took long do not count: what kept us may have kept
  the other one too.
  """
  every, start = seconds / _LOOKS, time.monotonic()
  while True:
    time.sleep(every)
    began = time.monotonic()
    seen = look()
    ended = time.monotonic()
    if seen != first:
      return seen
    if ended - began > max(every, 1.0):
      start = ended
    elif began - start >= seconds:
      return seen


def describe_wait(owner: Owner, place: str, seconds: float) -> str:
  """Returns what is said before `owner` is watched."""
  name = _name(owner)
  return f'Waiting up to {seconds:.0f} s: process {name} may be using {place}.'


def describe_doubt(owner: Owner, place: str, seconds: float) -> str:
  """Returns what is said of an owner that a run would watch."""
  return (
    f'Process {_name(owner)} may be using {place}: a run would watch it for '
    f'{seconds:.0f} s.'
  )


def describe_dead(owner: Owner) -> str:
  """Returns what is said of an owner whose place has been taken."""
  return (
    f'Took over from process {_name(owner)}, which began '
    f'{owner.get("since", "?")} and died without giving its lock back.'
  )


def describe_successor(owner: Owner, place: str) -> str:
  """Returns what a run is told that is not the owner any more."""
  return (
    f'Process {_name(owner)} has taken over {place}; this run must not write '
    'there any more.'
  )


def refusal(owner: Owner, where: str) -> InUseError:
  """Returns what whoever comes second is told."""
  name, since = _name(owner), owner.get('since', '?')
  return InUseError(
    f'Process {name} has been using this workdir since {since}.',
    where,
    f'Stop it (kill {name}), or use another --workdir.',
  )


def _name(owner: Owner) -> str:
  return f'{owner.get("pid", "?")} on {owner.get("host", "?")}'


def start_time(pid: int) -> int | None:
  """Returns when a process started, in clock ticks since the host did.

  None where there is no /proc, and for a process that has ended.
  """
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return None
  # The name in brackets may hold anything: state is the first word after it.
  state, *fields = text.rpartition(')')[2].split()
  return None if state in 'ZX' else int(fields[18])


def _boot() -> str:
  """Returns what is another one after each start of this host, else ''."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return ''


def _pid_namespace() -> str:
  try:
    return os.readlink('/proc/self/ns/pid')
  except OSError:
    return ''

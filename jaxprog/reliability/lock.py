"""One run a workdir: WORKDIR/run.lock, which says whose it is.

What is promised:

- On one host, whenever the file system knows flock: never two runs at once.
  The kernel frees the lock when its owner dies, `kill -9` included; the next
  run takes it over at once.
- Between hosts of which each sees the other's flock (NFS 4): the same, but a
  dead owner is waited for 90 s.
- Between hosts that do not (NFS without locks, gcsfuse), and where there is no
  flock at all: the owner touches the file every 20 s, and another run refuses
  until it is 90 s old. On one host, a process that has ended is not waited for.

What is not promised there: two runs that start within the same second may both
begin. Within 20 s, one of them finds the other's name in the file and fails in
`Lock.check`. The same happens to an owner that was suspended for longer than
90 s, once another one has taken over. Saves of those seconds may mix.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
import threading
import time
import uuid
from typing import Any

from jaxprog import errors, files, paths

_BEAT_SECONDS = 20.0
_STALE_SECONDS = 90.0

# Tokens of the locks that this process holds.
_held: set[str] = set()

_Owner = dict[str, Any]


class Lock:
  """The right to write into a workdir; a context manager.

  In a run of many processes only the first one takes it.

  Attributes:
    taken_over: a sentence about the dead run that had the lock, or None.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    beat_seconds: float = _BEAT_SECONDS,
  ) -> None:
    self._path = pathlib.Path(workdir) / 'run.lock'
    self._beat_seconds = beat_seconds
    self._resources = contextlib.ExitStack()
    self._lost: str | None = None
    self.taken_over: str | None = None

  def check(self) -> None:
    """Raises a RuntimeError if another run has taken the lock over.

    Called before each save, it keeps one run from spoiling the other's.
    """
    if self._lost is not None:
      raise RuntimeError(self._lost)

  def __enter__(self) -> 'Lock':
    """Takes the lock.

    Raises:
      UserError: if another run has it, or the workdir cannot be written to.
    """
    self._me = _describe_process()
    self.taken_over, self._lost = None, None
    workdir = self._path.parent
    with paths.writing(workdir), contextlib.ExitStack() as stack:
      stack.enter_context(files.folder(workdir))
      self._file = self._acquire()
      self._resources = stack.pop_all()
    _held.add(self._me['token'])
    self._ended = threading.Event()
    thread = threading.Thread(target=self._beat, name='run.lock', daemon=True)
    thread.start()
    self._resources.callback(self._free)
    self._resources.callback(thread.join)
    self._resources.callback(self._ended.set)
    return self

  def __exit__(self, *exc_info: object) -> None:
    """Gives the lock back and removes its file; an empty workdir goes too."""
    self._resources.close()

  def _free(self) -> None:
    _held.discard(self._me['token'])
    with contextlib.suppress(OSError):
      # Before it is unlocked: nobody may take a file that then goes.
      if self._is_mine(_read(self._path)):
        self._path.unlink()
    os.close(self._file)

  def _acquire(self) -> int:
    """Returns the open file, locked and with our name in it."""
    while True:
      file = _open(self._path)
      try:
        state = _flock(file)
        if not _is_at(file, self._path):  # Its owner has just removed it.
          os.close(file)
          continue
        owner, age = _read_dead(file, self._path, state)
        if owner:
          self.taken_over = _describe_dead(owner, age)
        _write(file, self._me)
        return file
      except BaseException:
        os.close(file)
        raise

  def _beat(self) -> None:
    while not self._ended.wait(self._beat_seconds) and not self._lost:
      # A file server that does not answer now may do so the next time.
      with contextlib.suppress(OSError):
        self._touch()

  def _touch(self) -> None:
    """Shows that the owner lives, or finds that it is another one now."""
    owner = _read(self._path)
    if self._is_mine(owner):
      os.utime(self._path)
    elif owner:
      self._lose(owner)
    else:  # Somebody has removed it.
      try:
        old, self._file = self._file, self._acquire()
      except errors.UserError:
        self._lose(_read(self._path))
      else:
        os.close(old)

  def _is_mine(self, owner: _Owner) -> bool:
    return owner.get('token') == self._me['token']

  def _lose(self, owner: _Owner) -> None:
    self._lost = (
      f'Process {owner.get("pid", "?")} on {owner.get("host", "?")} has taken '
      f'over {self._path.parent}; this run must not write there any more.'
    )


def check_free(workdir: str | os.PathLike[str]) -> None:
  """Raises UserError if another run has the lock, which stays as it is."""
  path = pathlib.Path(workdir) / 'run.lock'
  try:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
  except OSError:  # Nobody has; or who takes it will be told.
    return
  try:
    # Shared, and given back at once: nobody is refused for long.
    _read_dead(file, path, _flock(file, fcntl.LOCK_SH))
  finally:
    os.close(file)


def _read_dead(
  file: int, path: pathlib.Path, state: str
) -> tuple[_Owner, float]:
  """Returns the dead owner in a lock file, {} if there is none, and its age.

  Raises:
    UserError: if the owner may be alive.
  """
  age = _age(file, path.parent)
  owner = _read(path, patience=1 if state == 'ours' else 5)
  if state == 'busy' or _may_be_alive(owner, age, state):
    raise _refusal(path, owner, age, state)
  return owner, age


def _refusal(
  path: pathlib.Path, owner: _Owner, age: float, state: str
) -> errors.UserError:
  pid, host = owner.get('pid', '?'), owner.get('host', '?')
  if state == 'busy' or _is_here(owner):
    suggestion = f'Stop it (kill {pid} on {host}), or use another --workdir.'
  else:
    left = max(0, round(_STALE_SECONDS - age))
    suggestion = (
      f'If it is dead, its lock can be taken over in {left} s, or at once '
      f'after: rm {shlex.quote(str(path))}'
    )
  return errors.UserError(
    f'Process {pid} on {host} has been using this workdir since '
    f'{owner.get("since", "?")}.',
    f'--workdir={path.parent}',
    suggestion,
  )


def _open(path: pathlib.Path) -> int:
  return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _flock(file: int, kind: int = fcntl.LOCK_EX) -> str:
  """Returns 'ours', 'busy', or 'unknown' where there is no flock."""
  try:
    return 'ours' if files.lock(file, kind, wait=False) else 'unknown'
  except BlockingIOError:
    return 'busy'


def _is_at(file: int, path: pathlib.Path) -> bool:
  """Returns whether the open file is the one at `path`."""
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False


def _read(path: pathlib.Path, patience: int = 5) -> _Owner:
  """Returns what a lock file says; {} if it is empty, unreadable or gone.

  An owner that is about to write into it is given a tenth of a second.
  """
  for _ in range(patience):
    try:
      owner = json.loads(path.read_bytes())
    except FileNotFoundError:
      return {}
    except ValueError:
      time.sleep(0.02)
      continue
    return owner if isinstance(owner, dict) else {}
  return {}


def _write(file: int, owner: _Owner) -> None:
  """Writes in place: under a new name it would be another file's lock."""
  data = f'{json.dumps(owner)}\n'.encode()
  os.pwrite(file, data, 0)
  os.ftruncate(file, len(data))
  os.fsync(file)  # gcsfuse shows it to others only then.


def _age(file: int, workdir: pathlib.Path) -> float:
  """Returns seconds since the last beat, by the file system's own clock.

  By this host's, where one may only read.
  """
  now = time.time()
  with (
    contextlib.suppress(OSError),
    tempfile.TemporaryFile(dir=workdir) as probe,
  ):
    now = os.fstat(probe.fileno()).st_mtime
  return now - os.fstat(file).st_mtime


def _may_be_alive(owner: _Owner, age: float, state: str) -> bool:
  """Returns whether somebody who has not locked the file may yet own it."""
  if not owner or owner.get('token') in _held:
    return bool(owner)
  if not _is_here(owner):
    return age < _STALE_SECONDS
  if _sees(owner):
    # Locked by us and alive: two mounts of one bucket do not share locks.
    return _is_running(owner) and age < _STALE_SECONDS
  return state == 'unknown' and age < _STALE_SECONDS


def _is_here(owner: _Owner) -> bool:
  """Returns whether `owner` ran on this host, started as it is now."""
  return (owner.get('host'), owner.get('boot')) == (platform.node(), _boot())


def _sees(owner: _Owner) -> bool:
  """Returns whether its pid means the same here as it did there."""
  return owner.get('pid_namespace') == _pid_namespace()


def _is_running(owner: _Owner) -> bool:
  """Returns whether its process is there, and is not one with its old pid.

  A process that holds no lock any more is not counted: this one, if it could
  not remove its file.
  """
  pid = owner.get('pid')
  if not isinstance(pid, int) or pid == os.getpid():
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return owner.get('start') == _start_time(pid)


def _describe_dead(owner: _Owner, age: float) -> str:
  return (
    f'Took over from process {owner.get("pid", "?")} on '
    f'{owner.get("host", "?")}, which began {owner.get("since", "?")} and died '
    f'without giving its lock back; last seen {max(0, age):.0f} s ago.'
  )


def _describe_process() -> _Owner:
  """Returns what others may want to know of this process."""
  now = datetime.datetime.now(datetime.UTC)
  return {
    'host': platform.node(),
    'pid': os.getpid(),
    'since': now.isoformat(timespec='seconds'),
    'start': _start_time(os.getpid()),
    'boot': _boot(),
    'pid_namespace': _pid_namespace(),
    'command': shlex.join(sys.orig_argv),
    'token': uuid.uuid4().hex,
  }


def _start_time(pid: int) -> int | None:
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

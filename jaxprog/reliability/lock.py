"""One run a workdir: WORKDIR/run.lock, which says whose it is.

What is promised:

- Never two runs at once on one host, nor on hosts that see each other's flock
  (NFS 4). The kernel frees the lock when its owner dies, `kill -9` included.
- What a run of this host has left is taken over at once. What one of another
  host has left is watched for 60 s: a living owner touches the file every 20 s,
  and is found even where its flock is not seen here.
- Where there is no flock a folder is refused. Named as a URL, file:// too, it
  has a lease, as every bucket has.

What is not promised: two hosts that do not see each other's flock may both
begin within the same seconds. The one whose name is not in the file then fails
before its first save.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from jaxprog import buckets, errors, files, paths
from jaxprog.reliability import lease as lease_lib
from jaxprog.reliability import owners, signals

_T = TypeVar('_T')

# Between two tries to get a lock that another has.
_POLL_SECONDS = 0.5


class Lock:
  """The right to write into a workdir, and into its bucket if it has one.

  A context manager. In a run of many processes only the first one takes it;
  the others, which write nothing, lose nothing.

  Attributes:
    url: of the bucket, '' if there is none.
    taken_over: a sentence about the dead run that had the lock, or None.
    lease: that of the bucket, or None.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    bucket: buckets.Bucket | None = None,
    say: Callable[[str], object] = signals.say,
    *,
    beat_seconds: float = lease_lib.BEAT_SECONDS,
    patience_seconds: float = lease_lib.PATIENCE_SECONDS,
  ) -> None:
    self._path = pathlib.Path(workdir) / 'run.lock'
    self._bucket, self._say = bucket, say
    self.url = bucket.url if bucket else ''
    self._beat_seconds = beat_seconds
    self._patience_seconds = patience_seconds
    self._resources = contextlib.ExitStack()
    self._me: owners.Owner = {}
    self.taken_over: str | None = None
    self.lease: lease_lib.Lease | None = None

  def check(self) -> None:
    """Raises a RuntimeError if another run has taken over.

    Called before each save, it keeps one run from spoiling the other's. It
    waits for no bucket: the disk is this run's own meanwhile.
    """
    if self._me:
      check_owner(self._path.parent, self.token)
    if self.lease is not None and self.lease.lost:
      raise RuntimeError(self.lease.lost)

  @property
  def token(self) -> str:
    """What tells this owner from all others, once it has the lock."""
    return self._me['token']

  def __enter__(self) -> 'Lock':
    """Takes the lock, then the lease.

    Raises:
      UserError: if another run has one of them, or the workdir or the bucket
        cannot be written to.
    """
    self._me = owners.describe_process()
    self.taken_over, self.lease = None, None
    workdir = self._path.parent
    with contextlib.ExitStack() as stack:
      with paths.writing(workdir):
        stack.enter_context(files.folder(workdir))
        file = self._acquire()
      stack.callback(self._free, file)
      stack.enter_context(self._beating(file))
      if self._bucket is not None:
        self.lease = lease_lib.Lease(
          self._bucket,
          self._me,
          self._say,
          self._beat_seconds,
          self._patience_seconds,
        )
        stack.enter_context(self.lease)
        self.taken_over = self.lease.taken_over or self.taken_over
      self._resources = stack.pop_all()
    return self

  def __exit__(self, *exc_info: object) -> None:
    """Gives all back and removes the file; an empty workdir goes too."""
    self._resources.close()

  @property
  def _place(self) -> str:
    return buckets.shown(self._path.parent)

  def _free(self, file: int) -> None:
    with contextlib.suppress(OSError):
      # Before it is unlocked: nobody may take a file that then goes.
      if self._is_mine(_read(self._path)):
        self._path.unlink()
    os.close(file)

  def _acquire(self) -> int:
    """Returns the open file, locked and with our name in it."""
    while True:
      file = _open(self._path)
      try:
        _claim(file, self._path)
        self._await_dead()
        if files.is_at(file, self._path):  # Its owner has not just removed it.
          _write(file, self._me)
          return file
      except BaseException:
        os.close(file)
        raise
      os.close(file)

  def _await_dead(self) -> None:
    """Returns once the owner in the file, locked by us, is known dead.

    Raises:
      UserError: if it lives, on a host whose flock is not seen here.
    """
    owner, first = _read(self._path), _look(self._path)
    if owner and not owners.is_here(owner):
      seconds = self._patience_seconds
      self._say(owners.describe_wait(owner, self._place, seconds))
      if owners.watch(lambda: _look(self._path), first, seconds) != first:
        owner = _read(self._path)
        if owner:
          raise owners.refusal(owner, _where(self._path))
    self.taken_over = owners.describe_dead(owner) if owner else None

  @contextlib.contextmanager
  def _beating(self, file: int) -> Iterator[None]:
    """Touches the file every few seconds."""
    ended = threading.Event()

    def beat():
      while not ended.wait(self._beat_seconds):
        # A file server that does not answer now may do so the next time.
        with contextlib.suppress(OSError):
          os.utime(file)

    thread = threading.Thread(target=beat, name='run.lock', daemon=True)
    thread.start()
    try:
      yield
    finally:
      ended.set()
      thread.join()

  def _is_mine(self, owner: owners.Owner) -> bool:
    return owner.get('token') == self.token


def check_owner(workdir: str | os.PathLike[str], token: str) -> None:
  """Raises a RuntimeError unless the lock is that of `token`, or nobody's.

  For processes that work for its owner.
  """
  owner = _read(pathlib.Path(workdir) / 'run.lock')
  if owner and owner.get('token') != token:
    place = buckets.shown(workdir)
    raise RuntimeError(owners.describe_successor(owner, place))


def patiently(call: Callable[[], _T], seconds: float) -> _T:
  """Returns what `call` does, tried again while another has its workdir.

  Raises:
    UserError: if one still has after so many seconds.
  """
  end = time.monotonic() + seconds
  while True:
    try:
      return call()
    except owners.InUseError:
      if time.monotonic() > end:
        raise
    time.sleep(_POLL_SECONDS)


def check_free(workdir: str | os.PathLike[str]) -> str:
  """Returns a sentence about an owner that may be alive, '' if there is none.

  It is one look: nobody is waited for and nothing is changed.

  Raises:
    UserError: if another run has the lock.
  """
  path = pathlib.Path(workdir) / 'run.lock'
  try:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
  except OSError:  # Nobody has; or who takes it will be told.
    return ''
  try:
    # Shared, and given back at once: nobody is refused for long.
    _claim(file, path, fcntl.LOCK_SH)
    owner = _read(path)
  finally:
    os.close(file)
  if not owner or owners.is_here(owner):
    return ''
  place = buckets.shown(workdir)
  return owners.describe_doubt(owner, place, lease_lib.PATIENCE_SECONDS)


def _claim(file: int, path: pathlib.Path, kind: int = fcntl.LOCK_EX) -> None:
  """Locks an open file.

  Raises:
    UserError: if another run has, or the file system knows no locks.
  """
  try:
    if files.lock(file, kind, wait=False):
      return
  except BlockingIOError:
    raise owners.refusal(_read(path, patience=5), _where(path)) from None
  workdir = path.parent.absolute()
  if buckets.url_of(workdir):
    mend = 'Let JAXPROG_CACHE_DIR name a folder on a disk of this machine.'
  else:
    mend = f'--workdir=file://{workdir} works on a copy and needs none.'
  raise errors.UserError(
    'The file system of the workdir knows no locks.', _where(path), mend
  )


def _where(path: pathlib.Path) -> str:
  return f'--workdir={buckets.shown(path.parent)}'


def _open(path: pathlib.Path) -> int:
  return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _look(path: pathlib.Path) -> tuple[int, bytes]:
  """Returns when a file was touched last and what it says.

  Opening it asks a file server anew.
  """
  try:
    with open(path, 'rb') as file:
      data = file.read()
      return os.fstat(file.fileno()).st_mtime_ns, data
  except FileNotFoundError:
    return 0, b''


def _read(path: pathlib.Path, patience: int = 1) -> owners.Owner:
  """Returns what a lock file says; {} if it is empty, unreadable or gone.

  An owner that is about to write into it is given `patience` times 20 ms.
  """
  for _ in range(patience):
    try:
      if owner := owners.parse(path.read_bytes()):
        return owner
    except OSError:
      break
    time.sleep(0.02)
  return {}


def _write(file: int, owner: owners.Owner) -> None:
  """Writes in place: under a new name it would be another file's lock."""
  data = f'{json.dumps(owner)}\n'.encode()
  os.pwrite(file, data, 0)
  os.ftruncate(file, len(data))
  os.fsync(file)  # Other hosts may see it only then.

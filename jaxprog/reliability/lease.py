"""One owner of a run in a bucket: RUN/lease/000001.json, 000002.json, ...

Each taking creates the next number, which succeeds for one alone. The owner
rewrites its own object with a new count every 20 s, and looks whether there is
a higher number: then it has lost. Giving back rewrites it as released.

Who comes takes what is released, or what a dead process of this host has left,
at once. Else it watches the newest object: if that changes, somebody lives and
it is refused; if it does not for 60 s of its own clock, it takes over. No
clocks are compared. An owner that was silent for that long finds that it is
none any more, at the latest as the bucket can be reached again.
"""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable

from jaxprog import buckets, errors
from jaxprog.reliability import owners

BEAT_SECONDS = 20.0
PATIENCE_SECONDS = 60.0
# Seconds for the last beat to come through before the lease is given back.
_FAREWELL_SECONDS = 10.0
_FOLDER = 'lease'

# Tokens of the leases that this process holds.
_held: set[str] = set()


class Lease:
  """The right to write below a URL; a context manager.

  Attributes:
    token: what tells this owner from all others.
    taken_over: a sentence about the dead run that had the lease, or None.
    lost: why this is not the owner any more, as far as the beats know; None
      while it is.
  """

  def __init__(
    self,
    bucket: buckets.Bucket,
    me: owners.Owner,
    say: Callable[[str], object],
    beat_seconds: float = BEAT_SECONDS,
    patience_seconds: float = PATIENCE_SECONDS,
  ) -> None:
    self._bucket, self._me, self._say = bucket, me, say
    self._beat_seconds = beat_seconds
    self._patience_seconds = patience_seconds
    self.token = str(me['token'])
    self.taken_over: str | None = None
    self.lost: str | None = None
    # The number of its object, how often it was written, the MD5 of that.
    self._number, self._count, self._md5 = 0, 0, ''
    self._is_forgotten = False
    # When the last beat began that came through.
    self._alive_at = 0.0
    self._turn = threading.Lock()
    self._ended = threading.Event()
    self._thread = threading.Thread(
      target=self._keep_beating, name='lease', daemon=True
    )

  def check(self) -> None:
    """Raises an error unless this is the owner, as of half a minute ago.

    Raises:
      RuntimeError: if another run has taken over.
      UserError: if the bucket has long not been reached and is not now:
        nobody knows then.
    """
    if not self.lost and _now() - self._alive_at > self._patience_seconds / 2:
      self._beat()
    if self.lost:
      raise RuntimeError(self.lost)

  def forget(self) -> None:
    """Leaves no object behind, where there was no owner before this one."""
    self._is_forgotten = True

  def __enter__(self) -> 'Lease':
    """Takes the lease.

    Raises:
      UserError: if another run has it, or the bucket cannot be written to.
    """
    _held.add(self.token)  # Before others of this process can see it.
    try:
      self._take()
    except BaseException:
      _held.discard(self.token)
      raise
    self._thread.start()
    with contextlib.suppress(errors.UserError):
      old = [x for x in _list(self._bucket) if x < self._number - 1]
      self._bucket.remove(map(_name, old))
    return self

  def __exit__(self, *exc_info: object) -> None:
    """Gives the lease back, if the bucket can be reached."""
    _held.discard(self.token)
    self._ended.set()
    self._thread.join(_FAREWELL_SECONDS)
    if not self.lost and not self._thread.is_alive():
      with contextlib.suppress(errors.UserError):
        if self._is_forgotten and self._number == 1:
          self._bucket.remove([_name(self._number)])
        else:
          self._bucket.write(_name(self._number), self._text(released=True))

  def _take(self) -> None:
    """Creates the object after the newest one, which must be nobody's."""
    while True:
      newest = _read_newest(self._bucket)
      if newest[0] and not _is_over(newest[1]):
        newest = self._watch(newest)
      number, data = newest
      before = owners.parse(data)
      self._number = number + 1
      began, text = _now(), self._text()
      if self._bucket.create(_name(self._number), text):
        break
    self._alive_at, self._md5 = began, _digest(text)
    if number and not before.get('released'):
      self.taken_over = owners.describe_dead(before)

  def _watch(self, first: tuple[int, bytes]) -> tuple[int, bytes]:
    """Returns the newest object once it is nobody's any more.

    Raises:
      UserError: if it is somebody's.
    """
    owner, url = owners.parse(first[1]), self._bucket.url
    if not (owner.get('token') in _held or owners.is_running(owner)):
      seconds = self._patience_seconds
      self._say(owners.describe_wait(owner, url, seconds))
      seen = owners.watch(lambda: _read_newest(self._bucket), first, seconds)
      owner = owners.parse(seen[1])
      if seen == first or not seen[0] or _is_over(seen[1]):
        return seen
    raise owners.refusal(owner, url)

  def _keep_beating(self) -> None:
    pause = self._beat_seconds
    while not self._ended.wait(pause) and not self.lost:
      try:
        self._beat()
        pause = self._beat_seconds
      except errors.UserError:  # The bucket may answer again soon.
        pause = self._beat_seconds / 4

  def _beat(self) -> None:
    """Shows that the owner lives, or finds that it is another one now."""
    with self._turn:
      began = _now()
      if not self._is_mine():
        self.lost = self._describe_loss()
        return
      text = self._text()
      self._bucket.write(_name(self._number), text)
      self._alive_at, self._md5 = began, _digest(text)

  def _is_mine(self) -> bool:
    found = _list(self._bucket)
    if max(found, default=0) > self._number:
      return False
    if found.get(self._number) == self._md5:
      return True
    # Not every listing has the MD5, and not all are up to date. Who has removed
    # everything and begun anew has the same numbers again.
    data = self._bucket.read(_name(self._number))
    return owners.parse(data or b'').get('token') == self.token

  def _describe_loss(self) -> str:
    url = self._bucket.url
    owner: owners.Owner | None = {}
    with contextlib.suppress(errors.UserError):
      owner = read_newest(self._bucket)
    if owner is None:
      return f'{url}/{_FOLDER} was removed; this run must not write there.'
    return owners.describe_successor(owner, url)

  def _text(self, *, released: bool = False) -> bytes:
    """Returns what the object holds: another text each time."""
    self._count += 1
    owner = {
      **self._me,
      'count': self._count,
      'released': released,
    }
    return f'{json.dumps(owner)}\n'.encode()


def read_newest(bucket: buckets.Bucket) -> owners.Owner | None:
  """Returns what the newest lease says, None if there was never one.

  It is {} where that is damaged.
  """
  number, data = _read_newest(bucket)
  return owners.parse(data) if number else None


def check_free(bucket: buckets.Bucket) -> str:
  """Returns a sentence about an owner that may be alive, '' if there is none.

  It is one look: nobody is waited for and nothing is changed.

  Raises:
    UserError: if the owner is alive, which is known on its own host alone.
  """
  owner = read_newest(bucket)
  if owner is None or owner.get('released'):
    return ''
  if owner.get('token') in _held or owners.is_running(owner):
    raise owners.refusal(owner, bucket.url)
  if owners.is_running(owner) is False:
    return ''
  return owners.describe_doubt(owner, bucket.url, PATIENCE_SECONDS)


def _read_newest(bucket: buckets.Bucket) -> tuple[int, bytes]:
  """Returns number and content of the newest object, (0, b'') if none is."""
  while numbers := _list(bucket):
    newest = max(numbers)
    data = bucket.read(_name(newest))
    if data is not None:  # Removed between the two looks.
      return newest, data
  return 0, b''


def _list(bucket: buckets.Bucket) -> dict[int, str]:
  """Returns the MD5 of each object, by its number."""
  found = {}
  for name, entry in bucket.list(_FOLDER).items():
    if number := re.fullmatch(rf'{_FOLDER}/(\d+)\.json', name):
      found[int(number[1])] = entry.md5
  return found


def _name(number: int) -> str:
  return f'{_FOLDER}/{number:06}.json'


def _is_over(data: bytes) -> bool:
  """Returns whether an owner has given its lease back, or is known dead."""
  owner = owners.parse(data)
  if owner.get('token') in _held:
    return False
  return bool(owner.get('released')) or owners.is_running(owner) is False


def _digest(data: bytes) -> str:
  return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _now() -> float:
  """Returns seconds of a clock that goes on while the machine sleeps."""
  return time.clock_gettime(
    getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC)
  )

"""A run, and the bucket that it is kept in.

The run lives in a folder on a disk, as any other. A thread looks at the folder
every few seconds and lets the bucket follow: first checkpoints that are whole,
then all other files, in the order in which they were written; then what has
gone goes there too. So whatever ends the run, the bucket holds one that a crash
could have left on the disk a little earlier.

An object in the bucket tells who wrote last, and .mirror.json whose uploads a
folder holds. If it lacks some, they are fetched before anything else. Only what
a folder once had in common with the bucket is removed, on either side.
"""

import contextlib
import functools
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import jax

from jaxprog import buckets, errors, paths
from jaxprog.reliability import copies, lease, lock, peers, signals

_LOOK_SECONDS = 5.0
# TensorBoard's files grow with every point, and each look would write them all.
_EVENTS_SECONDS = 30.0
# Seconds before a bucket that failed is written to again.
_PAUSE_SECONDS = 30.0


class Mirror:
  """Lets a bucket follow a folder; a context manager for who has the lease.

  A bucket that cannot be written to is said and tried again; the run goes on.
  """

  def __init__(
    self, folder: pathlib.Path, bucket: buckets.Bucket, owner: lock.Lock
  ) -> None:
    self._folder, self._bucket, self._owner = folder, bucket, owner
    # How files looked as the bucket had the same, and what is to go if its file
    # does.
    self._known: dict[str, copies.Look] = {}
    self._there: set[str] = set()
    # Whether the bucket knows that this folder is the newest one.
    self._is_writer = False
    self._ended = threading.Event()
    self._turn = threading.Lock()
    self._thread = threading.Thread(
      target=self._follow, name='mirror', daemon=True
    )

  def __enter__(self) -> 'Mirror':
    """Fetches what is newer in the bucket.

    Raises:
      UserError: if the folder holds another run than the bucket.
    """
    with copies.alone(self._folder):
      there = self._bucket.list()
      writer = copies.read_writer(self._bucket)
      state = copies.read_state(self._folder, self._bucket)
      if self._is_newest(state, writer, there):
        known = state.known if state else {}
        self._known = {k: v for k, v in known.items() if k in there}
      else:
        state = copies.fetch(self._folder, self._bucket)
        writer = state.holds[0] if state.holds else ''
        self._known = dict(state.known)
      self._holds = (writer, self._lease.token)
      self._note()
      if not writer:  # Or a first run that is killed soon would begin anew.
        self._become_writer()
    self._there = {*self._known, *filter(copies.is_checkpoint, there)}
    self._thread.start()
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    """Uploads what is left.

    Raises:
      RuntimeError: if that cannot be, and nothing else has ended the run.
    """
    self._ended.set()
    self._thread.join()
    try:
      self.flush()
      if not self._there:  # A mistake was found in time.
        copies.forget(self._folder, self._bucket)
        self._lease.forget()
    except Exception as e:
      if error is None or isinstance(error, errors.Stopped):
        raise
      print(copies.describe(e), file=sys.stderr)

  def flush(self) -> None:
    """Returns once the bucket holds all that the folder does.

    Raises:
      RuntimeError: if it cannot be written to, or another run has taken over.
    """
    try:
      with self._turn:
        self._upload(copies.scan(self._folder))
    except errors.UserError as e:  # No mistake of the user's hours later.
      raise RuntimeError(
        f'{self._bucket.url} lacks what was written last, which is in '
        f'{self._folder}: {copies.describe(e)}'
      ) from e

  @property
  def _lease(self) -> lease.Lease:
    assert self._owner.lease is not None
    return self._owner.lease

  def _is_newest(
    self, state: copies.State | None, writer: str, there: copies.Listing
  ) -> bool:
    """Returns whether the folder holds all that the bucket does, or more."""
    if writer and state and writer in state.holds:
      return True
    if buckets.url_of(self._folder) == self._bucket.url:
      return False
    if not writer and not any(map(copies.is_of_run, there)):
      return True  # The run began without a bucket, or is to have another one.
    if state or not copies.scan(self._folder):
      return False
    raise errors.UserError(
      f'{self._folder} and {self._bucket.url} hold different runs.',
      f'config.mirror={self._bucket.url}',
      'Name a --workdir that is empty, or another mirror.',
    )

  def _become_writer(self) -> None:
    if not self._is_writer:
      copies.write_writer(self._bucket, self._lease.token)
      self._is_writer = True

  def _note(self) -> None:
    """Keeps what the folder knows, for the next start."""
    holds = tuple(x for x in self._holds if x)
    state = copies.State(holds, dict(self._known))  # Others may write to it.
    copies.write_state(self._folder, self._bucket, state)

  def _follow(self) -> None:
    """Lets the bucket follow until the run ends."""
    pause, events_at = _LOOK_SECONDS, time.monotonic()
    while not self._ended.wait(pause):
      try:
        found, now = copies.scan(self._folder), time.monotonic()
        is_save = any('/latest/' in x and x not in self._known for x in found)
        if now < events_at + _EVENTS_SECONDS and not is_save:
          for x in [x for x in found if 'tfevents' in x and x in self._known]:
            found[x] = self._known[x]
        else:
          events_at = now
        with self._turn:
          self._upload(found)
        pause = _LOOK_SECONDS
      except Exception as e:
        if pause == _LOOK_SECONDS:
          text = f'{copies.describe(e)} The run goes on, and tries it again.'
          print(text, file=sys.stderr)
        pause = _PAUSE_SECONDS

  def _upload(self, found: Mapping[str, copies.Look]) -> None:
    """Lets the bucket follow the files that were `found`."""
    changed = {k: v for k, v in found.items() if self._known.get(k) != v}
    gone = self._there - found.keys()
    if not changed and not gone:
      return
    self._lease.check()
    self._become_writer()
    steps, others = copies.sort(changed)
    # Else a checkpoint has gone since, and what replaces it is not there yet.
    is_whole = True
    try:
      # Who goes on from a state does not draw the points before it again.
      for name in [x for x in others if 'tfevents' in x]:
        others.remove(name)
        self._put([name], found)
      for content, manifest in steps:
        # What is saved anew is none until it is whole.
        self._remove([x for x in manifest if x in self._there])
        is_whole &= self._put(content, found) and self._put(manifest, found)
      for name in others:
        self._put([name], found)
      if is_whole:
        steps, others = copies.sort(dict.fromkeys(gone, (0, 0)))
        for content, manifest in steps:
          self._remove(manifest)  # In pieces it is none any more.
          others += content
        self._remove(others)
    finally:
      self._note()

  def _remove(self, names: Collection[str]) -> None:
    self._lease.check()
    self._bucket.remove(names)
    self._there.difference_update(names)
    for name in names:
      self._known.pop(name, None)

  def _put(
    self, names: Iterable[str], found: Mapping[str, copies.Look]
  ) -> bool:
    """Returns whether files were uploaded; False: one of them is gone."""

    def put(name):
      self._lease.check()
      path = self._folder / name
      if copies.is_checkpoint(name):  # Large, and never written again.
        self._bucket.upload(path, name)
      else:
        self._bucket.write(name, copies.read_file(path))
      self._known[name] = found[name]
      self._there.add(name)

    try:
      buckets.at_once(put, names)
    except FileNotFoundError:
      return False
    return True


@contextlib.contextmanager
def hold(workdir: pathlib.Path, url: str) -> Iterator[lock.Lock]:
  """Lets this run alone write into `workdir`, and keeps it in the bucket `url`.

  '' is no bucket. Of many processes the first one has the lock; the others see
  what it had written at the last `peers.wait_for_files`.

  Raises:
    UserError: if another run has it, or one may not write there.
  """
  bucket = buckets.Bucket(url) if url else None
  owner = lock.Lock(workdir, bucket)
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      ends: list[Callable[[], None]] = []
      stack.callback(lambda: [end() for end in ends])
      stack.enter_context(owner)
      if bucket:
        mirror = stack.enter_context(Mirror(workdir, bucket, owner))
        # From now on a first signal waits for the last upload.
        stack.callback(lambda: ends.append(signals.hold_off()))
        stack.enter_context(peers.share(publish=mirror.flush))
    elif bucket:
      fetch = functools.partial(copies.refresh, workdir, bucket)
      stack.enter_context(peers.share(fetch=fetch))
    yield owner


def locate(
  workdir: str | os.PathLike[str], mirror: str = ''
) -> tuple[pathlib.Path, str]:
  """Returns the folder of a run in this process, and its bucket's URL or ''.

  Raises:
    UserError: if `mirror`, of config.mirror, is no URL.
  """
  folder = paths.workdir(workdir)
  url = os.fspath(workdir) if buckets.is_url(workdir) else mirror
  if not url:
    return folder, ''
  url = buckets.normalise(url, f'config.mirror={url}')
  if jax.process_index() > 0:
    folder = paths.copy(url, part=f'process-{jax.process_index()}')
  return folder, url

"""Several processes that train one ladder: start, save, stop, fail together.

They meet at process 0, where JAX's coordination service keeps small texts by
key. Through it they compare what they are about to train, agree on the step
to stop at, and hear of each other's end; no device takes part in that.

- A process that fails says so under one key, on which all others wait: they
  print what it said and end with its exit code.
- A process that dies without a word leaves its beats behind: process 0 looks
  for those that have stopped, and whoever loses contact looks at once.
- A wish to stop or to save is a numbered request. Each process answers with
  how often it has asked `reached`; the request is due at the call after the
  last of these, which no process has passed.
- What process 0 has written the others find on a disk that all share, or each
  fetches it, at the barrier after which it is read.
"""

import contextlib
import hashlib
import itertools
import json
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxprog import errors
from jaxprog.reliability import signals

# Seconds between two signs of life, and how many of them may be missing until
# a process counts as dead: the first where all seems well, the second where
# contact to some process has been lost.
_BEAT_SECONDS = 2.0
_SILENT_BEATS, _SUSPECT_BEATS = 30, 3
# Seconds for all to have read why the run ends.
_FAREWELL_SECONDS = 5.0
# How much later than the others process 0 leaves: JAX aborts whoever finds the
# coordination service gone.
_LAST_SECONDS = 1.0
# Waiting for a key or a barrier ends with the process, not by time.
_FOREVER_MS = 7 * 24 * 3_600_000
_PREFIX = 'jaxprog'
# What errors say when it is the other side that has failed.
_LOST = re.compile(
  r'gloo|nccl|unavailable|connection (reset|closed|refused)|socket closed|'
  r'coordination service|barrier',
  re.IGNORECASE,
)

# The one of this process; inner ones are the outer one again.
_active: 'Peers | None' = None
# What process 0 does before, and the others do after, they meet at its files.
_shared: tuple[Callable[[], object], Callable[[], object]] = (
  lambda: None,
  lambda: None,
)
# How often each barrier was passed: its name must be a new one every time.
_passed: Counter[str] = Counter()


@contextlib.contextmanager
def join(stop: signals.StopRequest) -> Iterator['Peers | None']:
  """Yields the bond with the other processes, None if there are none.

  What is raised inside ends all of them; what ends well waits for all.
  """
  if _active is not None or jax.process_count() == 1:
    yield _active
    return
  with Peers(stop) as peers:
    yield peers


def wait_for_all(name: str) -> None:
  """Returns once every process has called this with `name`."""
  if jax.process_count() > 1:
    _passed[name] += 1
    _client().wait_at_barrier(f'{_PREFIX}/{name}/{_passed[name]}', _FOREVER_MS)


def wait_for_files(name: str) -> None:
  """Returns once each process has called this and sees the files of process 0.

  On a shared disk it is `wait_for_all`.
  """
  if jax.process_count() > 1:
    publish, fetch = _shared
    publish()
    wait_for_all(name)
    fetch()


@contextlib.contextmanager
def share(
  publish: Callable[[], object] = lambda: None,
  fetch: Callable[[], object] = lambda: None,
) -> Iterator[None]:
  """Says how files reach the other processes where there is no shared disk.

  Process 0 is to `publish` what it has written, the others are to `fetch` it.
  """
  global _shared
  outer, _shared = _shared, (publish, fetch)
  try:
    yield
  finally:
    _shared = outer


def _client() -> Any:
  """Returns JAX's client of the coordination service.

  Orbax uses it the same way: there is no public name for it yet.
  """
  from jax._src import distributed

  return distributed.global_state.client


def _place() -> tuple[int, int]:
  """Returns which of how many processes this one is.

  JAX's own answers would start it, before the config has named XLA's flags.
  """
  from jax._src import distributed

  state = distributed.global_state
  return state.process_id, state.num_processes


class Peers:
  """The other processes of a run; a context manager around what all do.

  Attributes:
    closed: set once all processes have come to the end together.
  """

  def __init__(self, stop: signals.StopRequest) -> None:
    self._stop = stop
    self._client = _client()
    self._index, self._count = _place()
    self._me = f'process {self._index} on {platform.node()}'
    # Held by whoever ends this process: its own error, or another's.
    self._ending = threading.Lock()
    self.closed = threading.Event()
    # All end now, and know it.
    self._agreed = False
    # Calls of `reached`, and the requests that are due at some of them.
    self._turn = threading.Lock()
    self._calls, self._number = 0, 0
    self._due: list[tuple[int, str]] = []
    self._wishes: set[str] = set()
    self._threads = [
      threading.Thread(target=self._guard, args=(work,), daemon=True)
      for work in (self._await_end, self._await_requests, self._beat)
    ]

  def __enter__(self) -> 'Peers':
    """Starts to listen to the others."""
    global _active
    _active = self
    self._put(f'host/{self._index}', platform.node())
    for thread in self._threads:
      thread.start()
    self._stop.share(self)
    signals.on_leaving(self._announce)
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    """Waits for all if they end together, else tells them of the error."""
    global _active
    if isinstance(error, Exception) and _is_lost_contact(error):
      self._find_lost(error)
    together = error is None or self._agreed or self._stop.agreed
    if together:
      wait_for_all('finished')  # One may still fail.
    self._ending.acquire()  # Whoever was first has it for good.
    signals.on_leaving(None)
    self._stop.share(None)
    if together:
      self._close()
    else:
      self._announce(*_describe_end(error))
      self._await_farewell()
    _active = None

  def compare(self, name: str, described: Mapping[str, str]) -> None:
    """Raises UserError in all processes if they are about to differ.

    `described` names what must be the same and says what it is here; `name`
    is another one at each comparison.
    """
    text = json.dumps(described, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    digests = self._gather(f'digest/{name}', digest)
    odd = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if not odd:
      return
    if self._index in (0, odd[0]):
      self._put(f'described/{name}/{self._index}', text)
    ours, theirs = (
      json.loads(self._get(f'described/{name}/{i}')) for i in (0, odd[0])
    )
    self._agreed = True
    raise _difference(ours, theirs, odd[0], self._get(f'host/{odd[0]}'))

  def ask(self, wish: str) -> None:
    """Asks all processes to do `wish` at the same call of `reached`."""
    if wish not in self._wishes:
      self._wishes.add(wish)
      threading.Thread(target=self._request, args=(wish,), daemon=True).start()

  def reached(self) -> list[str]:
    """Returns what is due now: the same at the n-th call in each process."""
    with self._turn:
      self._calls += 1
      if not self._due:
        return []
      due = [wish for call, wish in self._due if call == self._calls]
      self._due = [x for x in self._due if x[0] > self._calls]
      self._wishes.difference_update(due)
      return due

  def _request(self, wish: str) -> None:
    """Puts `wish` under the next free number, unless another has asked."""
    while wish in self._wishes and not self.closed.is_set():
      number = self._number
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._put(f'request/{number}', wish)
        return
      while number == self._number and not self.closed.wait(0.01):
        pass  # Someone else's comes first.
      if any(w == wish for _, w in self._due):
        return

  def _await_requests(self) -> None:
    for number in itertools.count():
      self._number = number
      wish = self._get(f'request/{number}')
      if not wish:
        return
      with self._turn:  # Nobody passes a call meanwhile.
        self._wishes.add(wish)
        calls = self._gather(f'calls/{number}', str(self._calls))
        self._due.append((max(map(int, calls)) + 1, wish))

  def _await_end(self) -> None:
    """Ends this process as soon as another one says that it has failed."""
    end = json.loads(self._get('end'))
    if not end or end['index'] == self._index:
      return
    self._ending.acquire()
    signals.say(f'{end["who"]}: {end["text"]}')
    self._await_farewell()
    signals.leave_now('', end['code'])

  def _beat(self) -> None:
    """Shows that this process lives; process 0 looks whether all do."""
    watch = Watch(self._count, time.monotonic)
    for beat in itertools.count():
      self._put(f'beat/{self._index}', str(beat), allow_overwrite=True)
      if self._index == 0:
        self._look(watch, _SILENT_BEATS)
      if self.closed.wait(_BEAT_SECONDS):
        return

  def _find_lost(self, error: Exception) -> None:
    """Ends all if another process is gone; returns if none is."""
    message = ' '.join(str(error).split())[:200]
    signals.say(f'Contact with another process is lost: {message}')
    watch = Watch(self._count, time.monotonic)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      for _ in range(_SUSPECT_BEATS + 2):
        self._look(watch, _SUSPECT_BEATS)
        time.sleep(_BEAT_SECONDS)

  def _look(self, watch: 'Watch', beats: int) -> None:
    """Ends all if a process has been silent for so many beats."""
    watch.look(self._read_all('beat'))
    if silent := watch.silent(beats * _BEAT_SECONDS):
      self._say_gone(silent[0])

  def _say_gone(self, index: int) -> None:
    """Ends all processes because one has died without a word."""
    self._ending.acquire()
    text = (
      f'Process {index} on {self._get(f"host/{index}")} is gone: it has given '
      'no sign of life. The same commands go on from the last checkpoint.'
    )
    self._announce(text, 1)
    signals.say(text)
    self._await_farewell()
    signals.leave_now('', 1)

  def _guard(self, work: Callable[[], None]) -> None:
    """Runs a thread's work; without process 0 there is no use in going on."""
    try:
      work()
    except Exception as e:
      if self.closed.is_set() or not self._ending.acquire(blocking=False):
        return
      message = ' '.join(str(e).split())[:200]
      signals.leave_now(f'Contact with process 0 is lost: {message}', 1)

  def _announce(self, text: str, code: int) -> None:
    """Says why this process ends, if it is the first one to."""
    end = {'index': self._index, 'who': self._me, 'text': text, 'code': code}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._put('end', json.dumps(end))

  def _await_farewell(self) -> None:
    """Waits until all have read why they end; process 0 goes last."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.wait_at_barrier(
        f'{_PREFIX}/farewell', int(1000 * _FAREWELL_SECONDS)
      )
    if self._index == 0:
      time.sleep(_LAST_SECONDS)

  def _close(self) -> None:
    """Ends the threads: in a call of C++, Python's end would abort them."""
    self.closed.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._put('end', 'null')
    while any(thread.is_alive() for thread in self._threads):
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._put(f'request/{self._number}', '')
      for thread in self._threads:
        thread.join(0.05)
    wait_for_all('closed')

  def _gather(self, name: str, text: str) -> list[str]:
    """Returns the texts of all processes, once all have given one."""
    self._put(f'{name}/{self._index}', text)
    self._client.wait_at_barrier(f'{_PREFIX}/gather/{name}', _FOREVER_MS)
    found = self._read_all(name)
    return [found[index] for index in range(self._count)]

  def _read_all(self, name: str) -> dict[int, str]:
    """Returns what each process has put under `name`, by its index."""
    found = self._client.key_value_dir_get(f'{_PREFIX}/{name}/')
    return {int(key.rpartition('/')[2]): value for key, value in found}

  def _put(self, key: str, text: str, *, allow_overwrite: bool = False) -> None:
    self._client.key_value_set(
      f'{_PREFIX}/{key}', text, allow_overwrite=allow_overwrite
    )

  def _get(self, key: str) -> str:
    """Returns the text under `key`, as soon as there is one."""
    return self._client.blocking_key_value_get(f'{_PREFIX}/{key}', _FOREVER_MS)


class Watch:
  """Since when the beat of each process is the same, by this one's clock."""

  def __init__(self, count: int, clock: Callable[[], float]) -> None:
    self._clock = clock
    self._last = dict.fromkeys(range(count), ('', clock()))

  def look(self, beats: Mapping[int, str]) -> None:
    """Notes which beats are others than at the last look."""
    now = self._clock()
    for index, beat in beats.items():
      if self._last[index][0] != beat:
        self._last[index] = beat, now

  def silent(self, seconds: float) -> list[int]:
    """Returns the processes whose beat has not changed for so long."""
    now = self._clock()
    return [i for i, (_, at) in self._last.items() if now - at >= seconds]


def joined() -> bool:
  """Returns whether this is one of several processes of a run."""
  return _active is not None


def compare(name: str, described: Mapping[str, str]) -> None:
  """Raises UserError in all processes unless `described` is the same in all.

  `name` is another one at each comparison.
  """
  if _active is not None:
    _active.compare(name, described)


def _difference(
  first: Mapping[str, str], other: Mapping[str, str], index: int, host: str
) -> errors.UserError:
  """Returns the error that says how process `index` differs from process 0."""
  names = [
    name
    for name in sorted({*first, *other})
    if first.get(name) != other.get(name)
  ]
  where = f'process {index} on {host}'
  if 'the workdir' in names:
    return errors.UserError(
      f'The workdir of process {index} is not the one of process 0.',
      where,
      'Name a directory that all hosts share, or a bucket: gs://BUCKET/PATH.',
    )
  texts = [
    f'{name} is {other.get(name, "not there")} on process {index} and '
    f'{first.get(name, "not there")} on process 0'
    for name in names
  ]
  more = f', and {len(texts) - 3} more differ' if len(texts) > 3 else ''
  return errors.UserError(
    f'The processes are not alike: {"; ".join(texts[:3])}{more}.',
    where,
    'Start all of them with the same command, code and data.',
  )


def _describe_end(error: object) -> tuple[str, int]:
  """Returns what the other processes print, and their exit code."""
  if isinstance(error, errors.UserError):
    return str(error), 2
  if isinstance(error, errors.Stopped):
    return str(error), error.exit_code
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted.', 130
  message = ' '.join(str(error).split())[:300]
  return f'failed: {type(error).__name__}: {message}', 1


def _is_lost_contact(error: BaseException | None) -> bool:
  """Returns whether an error may be about another process that has gone."""
  while error is not None:
    if isinstance(error, errors.UserError | errors.Stopped):
      return False
    if isinstance(error, RuntimeError | ValueError | OSError) and _LOST.search(
      str(error)
    ):
      return True
    error = error.__cause__
  return False

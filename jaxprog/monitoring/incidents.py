"""The log of what went wrong, or nearly: WORKDIR/incidents.jsonl."""

import contextlib
import datetime
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

Kind = Literal[
  'skipped_step',
  'rollback',
  'quarantine',
  'damaged',
  'bad_image',
  'worker_restart',
  'resume',
  'lock',
  'config_change',
  'signal',
  'watchdog',
  'save_failed',
]

# What one and what many of a kind are called in a report.
_NAMES = {
  'skipped_step': ('skipped step', 'skipped steps'),
  'rollback': ('rollback', 'rollbacks'),
  'quarantine': ('quarantined checkpoint', 'quarantined checkpoints'),
  'damaged': ('damaged checkpoint', 'damaged checkpoints'),
  'bad_image': ('undecodable image', 'undecodable images'),
  'worker_restart': ('restart of data workers', 'restarts of data workers'),
  'resume': ('resume', 'resumes'),
  'lock': ("dead run's lock taken over", "dead runs' locks taken over"),
  'config_change': ('change of the config', 'changes of the config'),
  'signal': ('stop by a signal', 'stops by signals'),
  'watchdog': ('end by the watchdog', 'ends by the watchdog'),
  'save_failed': ('failed save', 'failed saves'),
}


def _utc_now() -> datetime.datetime:
  return datetime.datetime.now(datetime.UTC)


class Incidents:
  """Appends incidents to a file of JSON lines, each on disk at once.

  Without `path`, as in processes other than the first, they are only kept in
  memory; so are those that the disk did not take, because a log must not end
  a run. Safe to use from many threads.
  """

  def __init__(
    self,
    path: str | os.PathLike[str] | None,
    *,
    now: Callable[[], datetime.datetime] = _utc_now,
  ) -> None:
    self._path = None if path is None else pathlib.Path(path)
    self._now = now
    self._lock = threading.Lock()
    self._unwritten: list[dict[str, Any]] = []
    self._told = False

  def add(
    self,
    kind: Kind,
    message: str,
    *,
    stage: str | None = None,
    step: int | None = None,
    **fields: Any,
  ) -> dict[str, Any]:
    """Returns the incident that it has appended; NaN becomes null."""
    incident = _plain(
      {
        'time': self._now().isoformat(timespec='seconds'),
        'kind': kind,
        'stage': stage,
        'step': step,
        'message': message,
        **fields,
      }
    )
    with self._lock:
      self._append(incident)
    return incident

  def entries(self) -> list[dict[str, Any]]:
    """Returns all of the file, of earlier runs too, and what it lacks."""
    written: list[dict[str, Any]] = []
    with self._lock:
      if self._path is not None:
        with contextlib.suppress(OSError):
          written = read(self._path)
      return [*written, *self._unwritten]

  def _append(self, incident: dict[str, Any]) -> None:
    if self._path is None:
      self._unwritten.append(incident)
      return
    try:
      _append_line(self._path, json.dumps(incident))
    except OSError as e:
      self._unwritten.append(incident)
      if not self._told:
        self._told = True
        print(f'Cannot write {self._path}: {e.strerror}.', file=sys.stderr)
      print(f'Incident: {json.dumps(incident)}', file=sys.stderr)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the incidents in a file, oldest first; [] if there is none.

  A line that is no JSON, torn by a kill in mid-write, is left out.
  """
  path = pathlib.Path(path)
  try:
    lines = path.read_bytes().split(b'\n')
  except FileNotFoundError:
    return []
  parsed = (_parse(line) for line in lines)
  return [x for x in parsed if isinstance(x, dict) and 'kind' in x]


def summarise(incidents: Sequence[dict[str, Any]]) -> list[str]:
  """Returns a sentence a kind: how many, the first one and the last one."""
  kinds = dict.fromkeys(x['kind'] for x in incidents)
  return [
    _summarise_kind(kind, [x for x in incidents if x['kind'] == kind])
    for kind in kinds
  ]


def _summarise_kind(kind: str, incidents: Sequence[dict[str, Any]]) -> str:
  one, many = _NAMES.get(kind, (kind, kind))
  first, last = _describe(incidents[0]), _describe(incidents[-1])
  if len(incidents) == 1:
    return f'1 {one}: {first}.'
  return f'{len(incidents):,} {many}: first {first}; last {last}.'


def _describe(incident: dict[str, Any]) -> str:
  """Returns when, where and what, as part of a sentence."""
  stage, step = incident.get('stage'), incident.get('step')
  words = [str(incident.get('time', 'at some time'))]
  if step is not None:
    words.append(f'at step {step:,}')
  if stage is not None:
    words.append(f'of {stage}')
  message = str(incident.get('message', '')).rstrip('.')
  return f'{" ".join(words)} ({message})' if message else ' '.join(words)


def _append_line(path: pathlib.Path, line: str) -> None:
  """Appends a line and waits for the disk; ends a torn line before it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'ab+', buffering=0) as file:
    data = f'{line}\n'.encode()
    end = file.seek(0, os.SEEK_END)
    if end:
      file.seek(end - 1)
      if file.read(1) != b'\n':
        data = b'\n' + data
    while data:  # The last bytes of a full disk are a short write.
      data = data[file.write(data) or 0 :]
    os.fsync(file.fileno())


def _parse(line: bytes) -> Any:
  try:
    return json.loads(line)
  except ValueError:  # UnicodeDecodeError is one.
    return None


def _plain(value: dict[str, Any]) -> dict[str, Any]:
  """Returns what JSON can hold: no NaN, no arrays, no paths."""

  def convert(x):  # NumPy and JAX, neither imported here.
    return x.tolist() if hasattr(x, 'tolist') else str(x)

  text = json.dumps(value, default=convert)
  return json.loads(text, parse_constant=lambda _: None)

"""The log of what went wrong, or nearly: WORKDIR/incidents.jsonl."""

import contextlib
import datetime
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxprog import files

# All kinds: what one and what many of each are called in a report.
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
  'logger': ('logger that failed', 'loggers that failed'),
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
    kind: str,
    message: str,
    *,
    stage: str | None = None,
    step: int | None = None,
    **fields: Any,
  ) -> dict[str, Any]:
    """Returns the incident that it has appended; NaN becomes null."""
    incident = files.plain(
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
  try:
    lines = pathlib.Path(path).read_bytes().split(b'\n')
  except FileNotFoundError:
    return []
  found = []
  for line in lines:
    with contextlib.suppress(ValueError):  # UnicodeDecodeError is one.
      found.append(json.loads(line))
  return [x for x in found if isinstance(x, dict) and 'kind' in x]


def summarise(incidents: Sequence[dict[str, Any]]) -> list[str]:
  """Returns a sentence a kind: how many, the first one and the last one."""
  kinds = dict.fromkeys(x['kind'] for x in incidents)
  sentences = []
  for kind in kinds:
    told = [_describe(x) for x in incidents if x['kind'] == kind]
    one, many = _NAMES.get(kind, (kind, kind))
    sentences.append(
      f'1 {one}: {told[0]}.'
      if len(told) == 1
      else f'{len(told):,} {many}: first {told[0]}; last {told[-1]}.'
    )
  return sentences


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

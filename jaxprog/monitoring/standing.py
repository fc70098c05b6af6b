"""Where a run stands, for those who look at it from outside.

While a run goes on, WORKDIR/.standing.json says which step it is at. A thread
of its own writes it anew every few seconds, and it goes when the run ends: the
steps wait for nobody. Whether the run is alive says its lock, what epochs came
to its history.
"""

import contextlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxprog import files
from jaxprog.reliability import lock, owners

_NAME = '.standing.json'
_SECONDS = 5.0
# Variables that give one of a machine's devices to a run.
_DEVICES = {
  'CUDA_VISIBLE_DEVICES': 'gpu',
  'ROCR_VISIBLE_DEVICES': 'gpu',
  'TPU_VISIBLE_CHIPS': 'tpu',
}


class Teller:
  """Writes what `describe`, called in a thread, returns; close it."""

  def __init__(
    self, workdir: pathlib.Path, describe: Callable[[], Mapping[str, Any]]
  ):
    self._path, self._describe = workdir / _NAME, describe
    self._is_over = threading.Event()
    self._thread = threading.Thread(
      target=self._work, name='standing', daemon=True
    )
    self._thread.start()

  def close(self) -> None:
    """Ends the thread and removes the file."""
    self._is_over.set()
    self._thread.join()
    with contextlib.suppress(OSError):
      self._path.unlink()

  def _work(self) -> None:
    said: dict[str, Any] = {}
    me = {'pid': os.getpid(), 'devices': _describe_devices()}
    while True:
      if (found := {**me, **self._describe()}) != said:
        with contextlib.suppress(OSError):  # It is no reason to end a run.
          files.write_json(self._path, found, durable=False)
        said = found
      if self._is_over.wait(_SECONDS):
        return


class Running(NamedTuple):
  """A run under way, whose it is, and what it says of where it stands.

  `standing` has stage, index and num_stages, epoch and num_epochs, step and
  total_steps, top1 of the last evaluation, images_per_second and seconds_left
  of the run; None where there is no value. It is {} before the first stage.
  """

  workdir: pathlib.Path
  owner: owners.Owner
  standing: Mapping[str, Any]

  @property
  def where(self) -> str:
    """The host, and which of its devices if not all of them."""
    devices = self.standing.get('devices', '')
    return f'{self.owner.get("host", "?")} {devices}'.rstrip()

  @property
  def stage(self) -> str:
    """The stage that is trained, with its place if there are several."""
    if not self.standing:
      return 'starting'
    name, count = self.standing['stage'], self.standing['num_stages']
    if count == 1:
      return name
    return f'{name} ({self.standing["index"] + 1}/{count})'

  @property
  def epoch(self) -> str:
    """The epoch under way, of how many of its stage."""
    if not self.standing:
      return '-'
    return f'{self.standing["epoch"]}/{self.standing["num_epochs"]}'


def find(root: pathlib.Path, *patterns: str) -> Iterator[Running]:
  """Yields the runs under way in folders below `root` that match, by name.

  Nothing there is changed or locked.
  """
  for pattern in patterns:
    for path in sorted(root.glob(f'{pattern}/run.lock')):
      if owner := lock.find_owner(path.parent):
        yield Running(path.parent, owner, _read(path.parent, owner))


def _read(workdir: pathlib.Path, owner: owners.Owner) -> dict[str, Any]:
  """Returns where a run stands, {} if that was written by one before it."""
  found = files.read_object(workdir / _NAME) or {}
  return found if found.get('pid') == owner.get('pid') else {}


def _describe_devices() -> str:
  for name, kind in _DEVICES.items():
    if chosen := os.environ.get(name):
      return f'{kind} {chosen}'
  return ''

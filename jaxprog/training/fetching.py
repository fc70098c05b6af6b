"""Brings images from a bucket: before a stage, and of those to come."""

import contextlib
import functools
import os
import threading
from collections.abc import Mapping, Sequence

import jax
from ml_collections import config_dict

from jaxprog import buckets, errors, paths
from jaxprog.data import packs, preparation, remote, shards
from jaxprog.data.records import Dataset
from jaxprog.monitoring import activity

# Of the thread in the background: training has the cores first.
_NICENESS = 10


class _Closed(Exception):  # noqa: N818, nothing went wrong.
  """The run has ended."""


class Fetcher:
  """Brings what the stages of a run read, stage by stage; must be closed.

  While the first one trains, a thread brings what the others read. After, it
  uploads what this run itself has prepared, if it may.
  """

  def __init__(
    self, config: config_dict.ConfigDict, datasets: Sequence[Dataset]
  ) -> None:
    self._data_dir, self._datasets = paths.data_dir(config), datasets
    self._thread: threading.Thread | None = None
    self._closing = threading.Event()

  def fetch(self, index: int) -> None:
    """Brings what the stage `index` reads, and begins with the next ones."""
    dataset = self._datasets[index]
    fetch(dataset.name, dataset.stored)
    if self._thread is None and buckets.url_of(self._data_dir):
      self._thread = threading.Thread(
        target=self._work, args=(index + 1,), name='fetcher', daemon=True
      )
      self._thread.start()

  def close(self) -> None:
    """Begins nothing more; what is under way is gone on with at a start."""
    self._closing.set()

  def _work(self, start: int) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    with contextlib.suppress(_Closed):
      # Who needs it will say what is wrong.
      with contextlib.suppress(errors.UserError):
        for dataset in self._datasets[start:]:
          for stored in dataset.stored.values():
            remote.fetch(stored.paths, self._check)
      if jax.process_index() == 0:
        # The folders that are read, as they are: to look for the datasets anew
        # could replace them while they are read.
        for folder in dict.fromkeys(x.train.directory for x in self._datasets):
          with contextlib.suppress(errors.UserError):  # Most may only read.
            preparation.upload_folder(folder, self._check)

  def _check(self, done: int, total: int) -> None:
    if self._closing.is_set():
      raise _Closed


def fetch(name: str, stored: Mapping[str, shards.Shards | packs.Pack]) -> None:
  """Brings splits of the dataset `name`; shows how far it is."""
  with activity.doing(f'fetching {name}', unit='bytes') as show:
    for split, files in stored.items():
      files.fetch(functools.partial(show, part=split))

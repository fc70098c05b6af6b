"""Goes through a whole ladder in little time, before it is paid for."""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from ml_collections import config_dict

from jaxprog import buckets, paths
from jaxprog import config as config_lib
from jaxprog.data.records import Records
from jaxprog.monitoring import loggers, services
from jaxprog.reliability import checkpoints, copies, lock, peers, signals
from jaxprog.training import ladder
from jaxprog.training import setup as setup_lib

_NUM_STEPS = 2
# Batches of an evaluation: the last one is padded.
_EVAL_BATCHES = 1.5


@copies.in_bucket()
def dry_run(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: setup_lib.ModelFn | None = None,
  allow_config_change: bool = False,
) -> dict[str, float]:
  """Returns the seconds that each stage took which was tried, and says them.

  Each chosen stage trains a step or two of its own, evaluates some images,
  saves, and hands its weights over, in a folder beside `workdir` that is then
  removed; nothing is written to `workdir`. Stages that are done there are not
  tried again. Data is prepared as for the run itself.

  Raises:
    UserError: for what would end the run.
  """
  workdir = paths.workdir(workdir)
  beside = workdir.absolute().with_name(f'.{workdir.name}.dry_run')
  folder = beside / 'run'
  kept_at = buckets.url_of(workdir) or config.mirror
  # Other hosts can see a bucket alone.
  url = f'{kept_at}.dry_run' if kept_at and jax.process_count() > 1 else ''
  tried = config_lib.with_mirror(config, url)
  # Services would keep it.
  tried.loggers = tuple(
    x for x in loggers.chosen(config) if x not in services.SERVICES
  )
  seconds: dict[str, float] = {}
  began = left = time.monotonic()

  def on_epoch(name: str, row: Mapping[str, Any]) -> None:
    nonlocal left
    del row
    now = time.monotonic()
    seconds[name] = seconds.get(name, 0.0) + now - left
    left = now

  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.StopRequest())
    stack.enter_context(peers.join(stop))
    if jax.process_index() == 0:
      _begin(workdir, folder, url, stack)
    peers.wait_for_all('dry_run')
    history = ladder.train(
      tried,
      folder,
      only=only,
      skip=skip,
      model=model,
      allow_config_change=allow_config_change,
      on_epoch=on_epoch,
      shorten=_shorten,
    )
  if jax.process_index() == 0:
    _say(history, seconds, time.monotonic() - began)
  return seconds


def _begin(
  workdir: pathlib.Path,
  folder: pathlib.Path,
  url: str,
  stack: contextlib.ExitStack,
) -> None:
  """Empties `folder`, and lets what is known of `workdir` be known there."""
  beside = folder.parent
  stack.enter_context(lock.Lock(beside))  # Another dry run is refused.
  stack.callback(shutil.rmtree, beside, ignore_errors=True)
  _remove(url)  # Of one that was killed.
  stack.callback(_remove, url)
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  for name in ('config.json', 'training_history.json'):
    with contextlib.suppress(FileNotFoundError):
      shutil.copy(workdir / name, folder)
  for marker in workdir.glob('checkpoints/*/done.json'):
    name = marker.parent.name
    if checkpoints.is_done(workdir, name):
      shutil.copytree(
        marker.parent,
        checkpoints.stage_directory(folder, name),
        ignore=shutil.ignore_patterns('latest'),
      )


def _remove(url: str) -> None:
  """Removes what other processes could read."""
  if url:
    bucket = buckets.Bucket(url)
    bucket.remove(bucket.list())


def _shorten(task: setup_lib.Task) -> setup_lib.Task:
  """Returns `task` with few steps, of its whole schedule, and few images."""
  count = int(_EVAL_BATCHES * task.stage.batch_size)
  dataset = task.dataset
  total = min(_NUM_STEPS, task.steps.total)
  return dataclasses.replace(
    task,
    steps=dataclasses.replace(task.steps, total=total),
    dataset=dataclasses.replace(
      dataset,
      eval=_some(dataset.eval, count),
      holdout=_some(dataset.holdout, count) if dataset.holdout else None,
    ),
  )


def _some(split: Records, count: int) -> Records:
  """Returns at most `count` of the images, from all parts of the split."""
  chosen = np.zeros(len(split), bool)
  chosen[np.linspace(0, len(split) - 1, count).astype(int)] = True
  return split.select(chosen)


def _say(
  history: Mapping[str, Any], seconds: Mapping[str, float], took: float
) -> None:
  console = rich.console.Console(highlight=False, soft_wrap=True)
  for record in history['stages']:
    if record['name'] in seconds:
      console.print(_describe(record, seconds[record['name']]))
  console.print(f'dry run: {took:.1f} s in all; nothing of it is kept')


def _describe(record: Mapping[str, Any], seconds: float) -> str:
  source, (row, *_) = record['transfer']['from'], record['epochs']
  count = row['global_step'] - record['first_step']
  steps = '1 step' if count == 1 else f'{count} steps'
  start = f'weights of {source}' if source else 'fresh weights'
  return (
    f'{record["name"]}: {start}, {steps} {row["seconds"]:.1f} s, '
    f'evaluation of {record["num_eval_images"]:,} images '
    f'{row["eval_seconds"]:.1f} s, saved; {seconds:.1f} s with all before it'
  )

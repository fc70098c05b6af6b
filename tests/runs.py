"""What tests of the command line look at, and how they interrupt it."""

import contextlib
import html
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from unittest import mock

import jax
import numpy as np

from jaxprog import cli
from jaxprog.reliability import checkpoints

ROOT = pathlib.Path(__file__).parent.parent
TIMES = (
  'seconds',
  'images_per_second',
  'input_limit',
  'input_wait',
  'handover_seconds',
  'step_seconds',
  'save_seconds',
  'wall_seconds',
  'written',
)


def read_history(workdir):
  return json.loads((workdir / 'training_history.json').read_text())


def without_times(value):
  if isinstance(value, dict):
    skipped = (*TIMES, 'eval_seconds', 'compile_seconds', 'resumed_at_steps')
    return {k: without_times(v) for k, v in value.items() if k not in skipped}
  if isinstance(value, list):
    return [without_times(v) for v in value]
  return value


def bits(workdir, stage, weights='final'):
  """Returns the bytes of saved weights of `stage`, leaf by leaf."""
  variables, _ = checkpoints.load_weights(pathlib.Path(workdir), stage, weights)
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(variables)]


def call_main(*arguments):
  """Runs the command line in this process; returns what `run_main` would.

  A process of its own takes 2 s of a core to import JAX.
  """
  out, err = io.StringIO(), io.StringIO()
  argv = ['main.py', *map(str, arguments)]
  with (
    mock.patch.object(sys, 'argv', argv),
    contextlib.chdir(ROOT),
    mock.patch.dict(os.environ, COLUMNS='80'),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    code = cli.main(argv)
  return subprocess.CompletedProcess(
    arguments, code, out.getvalue(), err.getvalue()
  )


def without_activity(text):
  """Returns the lines of an output, but for those of what is being done."""
  lines = text.strip().split('\n')
  return [x for x in lines if not x.startswith('event=doing ')]


def snapshot(folder):
  """Returns size and time of all that is in a folder, and of itself."""
  return {
    str(x): (x.lstat().st_size, x.lstat().st_mtime_ns)
    for x in (folder, *folder.rglob('*'))
  }


def words(page):
  """Returns the words of a page, without its elements."""
  return ' '.join(html.unescape(re.sub(r'<[^>]*>', ' ', page)).split())


def wait_for(condition):
  """Returns what `condition` does as soon as that is true."""
  deadline = time.monotonic() + 60
  while not (found := condition()):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  return found


def start_main(*arguments):
  return subprocess.Popen(
    [sys.executable, 'main.py', *map(str, arguments)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for_step(process, workdir, stage, step):
  """Waits until a checkpoint of `stage` at `step` or later has committed."""
  latest = workdir / 'checkpoints' / stage / 'latest'
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    if latest.is_dir():
      steps = [int(p.name) for p in latest.iterdir() if p.name.isdigit()]
      if any(s >= step for s in steps):
        return
    if process.poll() is not None:
      raise AssertionError(process.communicate()[0])
    time.sleep(0.005)
  raise AssertionError('No checkpoint came.')


def take_over_later(workdir, folder):
  """Lets another run have the lock of `workdir` once `folder` is there."""

  def take_over():
    wait_for(folder.exists)
    other = {'token': 'of another', 'pid': 1, 'host': 'elsewhere'}
    (workdir / 'run.lock').write_text(json.dumps(other))

  threading.Thread(target=take_over, daemon=True).start()


class Enough(Exception):  # noqa: N818
  """Ends a run where a test wants it to."""


def stop_after(epochs):
  """Returns an on_epoch that ends a run once so many of a stage are over."""

  def on_epoch(name, row):
    del name
    if row['epoch'] == epochs:
      raise Enough

  return on_epoch

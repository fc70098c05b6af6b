"""Counts what a run asks of its bucket, and measures who waits for it.

A state of ResNet-50's size is saved with and without a bucket, and fetched from
there; then a small run is trained. The bucket answers each request after
`--delay` seconds, in this process.

  PYTHONPATH=. python benchmarks/bucket.py
"""

import argparse
import collections
import contextlib
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator

from benchmarks import checkpoint
from jaxprog import buckets
from jaxprog.reliability import checkpoints, lock, mirror
from tests import fake_gcs, tiny_config

_BUCKET = 'test-bucket'
_URL = f'gs://{_BUCKET}/runs/a'
_EPOCHS = 4


def main() -> None:
  """Prints requests, bytes and seconds."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet50')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--delay', type=float, default=0.05)
  parser.add_argument('--directory', help='on the disk to measure')
  args = parser.parse_args()
  state = checkpoint.create_state(args.model, ema=False)
  with (
    fake_gcs.serve((_BUCKET,)) as server,
    tempfile.TemporaryDirectory(dir=args.directory) as folder,
  ):
    os.environ['JAXPROG_CACHE_DIR'] = folder
    server.order('slow', seconds=args.delay)
    root = pathlib.Path(folder).resolve()
    save(state, root / 'alone', args.rounds, 'without a bucket')
    with counted(server, 'a start with nothing there'):
      stack = contextlib.ExitStack()
      stack.enter_context(hold(root / 'run'))
    with counted(server, 'a minute without anything new'):
      time.sleep(60)
    save(state, root / 'run', args.rounds, 'with a bucket', server)
    with counted(server, 'an end'):
      stack.close()
    with counted(server, 'a start on another machine'):
      stack.enter_context(hold(root / 'other'))
    stack.close()
    train(server)


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
  """Keeps a folder in the bucket, as a run does."""
  bucket = buckets.Bucket(_URL)
  with lock.Lock(folder, bucket) as owner, mirror.Mirror(folder, bucket, owner):
    yield


@contextlib.contextmanager
def counted(server: fake_gcs.Server, what: str) -> Iterator[None]:
  """Prints what was asked for meanwhile."""
  server.clear()
  began = time.monotonic()
  yield
  tell(what, server.clear(), time.monotonic() - began)


def tell(what: str, requests: list[fake_gcs.Request], seconds: float) -> None:
  """Prints requests by their kind, and bytes either way."""
  counts = collections.Counter(x.what for x in requests)
  kinds = ', '.join(f'{n} {kind}' for kind, n in counts.most_common())
  up, down = (sum(x[i] for x in requests) / 1e6 for i in (5, 6))
  print(
    f'{what}: {kinds or "no request"}; {up:.2f} MB up, {down:.2f} MB down; '
    f'{seconds:.1f} s',
    flush=True,
  )


def save(
  state: object,
  folder: pathlib.Path,
  rounds: int,
  what: str,
  server: fake_gcs.Server | None = None,
) -> None:
  """Prints how long saves block, and when they are in the bucket."""
  directory = folder / 'checkpoints' / 'stage'
  blocked, there = [], []
  with checkpoints.Checkpoints(directory) as saved:
    for step in range(rounds + 1):
      requests = server.clear() if server else []
      began = time.monotonic()
      saved.save_latest(state.replace(step=state.step * 0 + step), {})
      blocked.append(time.monotonic() - began)
      saved.wait()
      committed = time.monotonic()
      if server:
        name = f'runs/a/checkpoints/stage/latest/{step}/manifest.json'
        while name not in server.objects(_BUCKET):
          time.sleep(0.01)
        there.append(time.monotonic() - committed)
        time.sleep(1)  # For what goes to go.
        requests = server.clear()
        tell(f'save {step}', requests, there[-1])
  # The first one waits for what is created once.
  for text, values in (('blocks', blocked[1:]), ('is there after', there[1:])):
    if values:
      print(
        f'a save {what} {text} {statistics.median(values):.2f} s '
        f'({min(values):.2f} to {max(values):.2f}, n = {len(values)})',
        flush=True,
      )


def train(server: fake_gcs.Server) -> None:
  """Prints what each epoch of a small run asks for, its saves apart."""
  from jaxprog.training import ladder

  config = tiny_config.get_config(os.environ['JAXPROG_CACHE_DIR'])
  config.tensorboard = True
  config.stages = [{'name': 'ten', 'num_epochs': _EPOCHS}]

  def on_epoch(name: str, row: dict) -> None:
    del name
    time.sleep(12)  # Longer than the bucket is behind.
    requests = server.clear()
    saves = [x for x in requests if '/checkpoints/' in x.name]
    tell(f'epoch {row["epoch"]}, its saves', saves, 12)
    rest = [x for x in requests if x not in saves and '/lease/' not in x.name]
    tell(f'epoch {row["epoch"]}, the rest', rest, 12)
    print(sorted(pathlib.Path(x.name).name for x in rest))

  ladder.train(config, 'gs://test-bucket/runs/b', on_epoch=on_epoch)
  tell('the end of a run', server.clear(), 0)


if __name__ == '__main__':
  main()

"""Measures what starts cost: the quickstart cold, then with its cache.

Two runs of configs/quickstart.py in processes of their own, the first with an
empty compilation cache. Prints seconds until the first step, the gaps between
stages, the whole, and how many programs each run had to compile.

  python benchmarks/startup.py
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
  """Prints a row for each run."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    cache = folder / 'cache'
    prepare(folder)
    for run in ('cold', 'cached'):
      before = count_programs(cache)
      first, whole = train(folder, cache, folder / run)
      print(
        f'{run:7} first step {first:5.1f} s   whole {whole:5.1f} s   '
        f'compiled {count_programs(cache) - before:3} programs   '
        f'hand-overs {gaps(folder / run)} s'
      )


def prepare(folder: pathlib.Path) -> None:
  """Prepares the digits, which is no part of a start."""
  arguments = '--mode=prepare', f'--config.data_dir={folder}/data'
  subprocess.run(command(*arguments), cwd=ROOT, check=True)


def train(
  folder: pathlib.Path, cache: pathlib.Path, workdir: pathlib.Path
) -> tuple[float, float]:
  """Returns seconds from the start to the first step and to the end."""
  start, first = time.monotonic(), 0.0
  process = subprocess.Popen(
    command(
      f'--workdir={workdir}',
      f'--config.data_dir={folder}/data',
      f'--config.compilation_cache_dir={cache}',
    ),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  for line in process.stdout:
    if not first and line.startswith('event=step '):
      first = time.monotonic() - start
  if process.wait():
    raise SystemExit('The run failed.')
  return first, time.monotonic() - start


def command(*arguments: str) -> list[str]:
  """Returns the quickstart's command line."""
  config = '--config=configs/quickstart.py'
  return [sys.executable, 'main.py', config, *arguments]


def gaps(workdir: pathlib.Path) -> str:
  """Returns the seconds between stages."""
  history = json.loads((workdir / 'training_history.json').read_text())
  return ' '.join(
    f'{stage["handover_seconds"]:.1f}' for stage in history['stages'][1:]
  )


def count_programs(cache: pathlib.Path) -> int:
  """Returns how many compiled programs `cache` holds."""
  return len(list(cache.glob('*-cache')))


if __name__ == '__main__':
  main()

"""Measures this program on a GPU: one command, one table at the end.

    python benchmarks/gpu.py --out=runs/gpu

Each part is a process of its own with its own limit: one that fails or hangs
costs the others nothing. All of them end within --deadline seconds; what is
left out then is named, with the command that measures it. --parts chooses:

    python benchmarks/gpu.py --parts=f32,flags18 --deadline=200

--out gets gpu.md, gpu.json and what each part has printed. --toy rehearses
everything at sizes for a CPU, with figures that mean nothing.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Seconds below which no part is begun.
LEAST_SECONDS = 10.0


class Part(NamedTuple):
  """What one part may take, and the commands that it is, by their names."""

  seconds: float
  commands: dict[str, tuple[str, ...]]


class Aim(NamedTuple):
  """A bound on one of a row's values; `text` stands in the table."""

  text: str
  value: str
  at_least: float = float('-inf')
  at_most: float = float('inf')


# On an H100, by part and row.
AIMS = {
  ('quickstart', 'four stages'): Aim('< 60 s', 'seconds', at_most=60),
  ('quickstart', 'slowest hand-over'): Aim('<= 2 s', 'seconds', at_most=2),
  ('bits_deterministic', 'kill -9, gone on'): Aim('equal', 'equal', 1),
  ('step50', 'plain Flax'): Aim('>= 1.05x', 'jaxprog_is', 1.05),
  ('step50', 'PyTorch compiled'): Aim('>= 1.00x', 'jaxprog_is', 1.0),
  ('step18', 'plain Flax'): Aim('>= 1.00x', 'jaxprog_is', 1.0),
  ('loop_original', 'loop and input'): Aim('<= 3%', 'outside', at_most=0.03),
  ('loop_raw', 'loop and input'): Aim('<= 3%', 'outside', at_most=0.03),
  ('f32', 'bf16 beside f32'): Aim('30 to 50% less', 'memory_less', 0.3),
}
# Beside one another: none of them measures the device's own speed.
TOGETHER = ('quickstart', 'bits_deterministic', 'bits_none', 'photographs')
FLAGS18 = (
  'none',
  '--xla_gpu_enable_command_buffer=',
  '--xla_gpu_enable_triton_gemm=false',
  '--xla_gpu_experimental_enable_conv_fusion=true',
  '--xla_gpu_enable_latency_hiding_scheduler=true',
  '--xla_gpu_autotune_level=0',
  '--xla_gpu_deterministic_ops=true',
)
FLAGS50 = (
  'none',
  '--xla_gpu_experimental_enable_conv_fusion=true',
  '--xla_gpu_enable_triton_gemm=false',
  '--xla_gpu_autotune_level=0',
  '--xla_gpu_deterministic_ops=true',
)


def main() -> int:
  """Prints the table; returns 1 if a part failed or there is no GPU."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--parts', help='a,b; by default all')
  parser.add_argument('--deadline', type=float, help='seconds; default 470')
  parser.add_argument('--out', type=pathlib.Path, default='runs/gpu')
  parser.add_argument('--work', help='where to leave data, runs and programs')
  parser.add_argument(
    '--photos', help='.tar or folder of CLASS/*.JPEG; else some are drawn'
  )
  parser.add_argument('--toy', action='store_true')
  args = parser.parse_args()
  began = time.monotonic()
  ends = began + (args.deadline or (3600.0 if args.toy else 470.0))
  out = args.out.resolve()
  with contextlib.ExitStack() as stack:
    work = args.work or stack.enter_context(
      tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    )
    parts = list_parts(args, pathlib.Path(work).resolve())
    chosen = args.parts.split(',') if args.parts else [*parts]
    if unknown := sorted({*chosen} - {*parts}):
      parser.error(f'no part is named {unknown[0]!r}: {", ".join(parts)}')
    machine = parts.pop('machine')
    rows = measure({'machine': machine}, out, ends)
    measured = args.toy or find_platform(rows) == 'gpu'
    if measured:
      rows += measure({x: parts[x] for x in parts if x in chosen}, out, ends)
  seconds = time.monotonic() - began
  text = draw_table(rows, seconds)
  (out / 'gpu.md').write_text(text)
  found = {'seconds': seconds, 'rows': rows}
  (out / 'gpu.json').write_text(json.dumps(found, indent=2))
  print(text, end='')
  return int(not measured or any('failed' in x for x in rows))


def list_parts(args: argparse.Namespace, work: pathlib.Path) -> dict[str, Part]:
  """Returns all parts, the most telling first."""
  big = '--model=resnet50', '--image_size=224', '--batch_size=256'
  small = '--model=resnet18', '--image_size=64', '--batch_size=128'
  photographs = (f'--photos={args.photos}',) if args.photos else ()
  toy, flags18, flags50 = (), FLAGS18, FLAGS50
  if args.toy:
    toy, flags18, flags50 = ('--toy',), FLAGS18[:2], FLAGS50[:1]
    big = '--model=resnet10', '--image_size=16', '--batch_size=4'
    big += '--num_filters=4', '--rounds=2', '--steps=2'
    small = big

  def run(what: str, *arguments: str) -> tuple[str, ...]:
    script = str(ROOT / 'benchmarks' / 'gpu_runs.py')
    return sys.executable, script, what, f'--work={work}', *toy, *arguments

  def step(*arguments: str) -> tuple[str, ...]:
    script = str(ROOT / 'benchmarks' / 'gpu_step.py')
    kept = toy or (f'--programs={work / "programs"}',)
    return sys.executable, script, *kept, *arguments

  def flags(sizes: tuple[str, ...], sets: tuple[str, ...]) -> Part:
    alone = step(*sizes, '--contestants=jaxprog', '--rounds=3')
    commands = {}
    for name in sets:
      setting = f'XLA_FLAGS={name.removeprefix("none")}'
      commands[name] = 'env', setting, *alone, f'--label={name}'
    return Part(30.0 * len(sets), commands)

  def part(seconds: float, command: tuple[str, ...]) -> Part:
    return Part(seconds, {'': command})

  f32 = '--contestants=jaxprog,jaxprog f32'
  parts = {
    'machine': part(60, run('machine')),
    'quickstart': part(120, run('quickstart')),
    'bits_deterministic': part(170, run('bits', '--flags=deterministic')),
    'bits_none': part(170, run('bits', '--flags=none')),
    'photographs': part(90, run('photographs', *photographs)),
    'step50': part(210, step(*big, '--seconds=170')),
    'step18': part(120, step(*small, '--seconds=90')),
    'loop_original': part(110, run('loop', '--storage=original', *photographs)),
    'loop_raw': part(80, run('loop', '--storage=raw:256', *photographs)),
    'f32': part(100, step(*big, f32, '--seconds=70')),
    'flags18': flags(small, flags18),
    'flags50': flags(big, flags50),
  }
  if not args.toy:
    return parts
  return {k: x._replace(seconds=10 * x.seconds) for k, x in parts.items()}


def measure(
  parts: dict[str, Part], out: pathlib.Path, ends: float
) -> list[dict[str, Any]]:
  """Returns the rows of `parts`, in their order, by `ends` at the latest."""
  (out / 'logs').mkdir(parents=True, exist_ok=True)
  rows: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}

  def run(name: str) -> None:
    found = run_part(parts[name], out / 'logs' / f'{name}.txt', ends)
    rows[name] = [judge({'part': name, **x}) for x in found]
    print(f'{name}: {len(found)} rows', file=sys.stderr, flush=True)

  beside = [x for x in TOGETHER if x in parts]
  with futures.ThreadPoolExecutor(len(TOGETHER)) as pool:
    list(pool.map(run, beside))
  for name in parts:
    if name not in beside:
      run(name)
  return [row for found in rows.values() for row in found]


def run_part(
  part: Part, log: pathlib.Path, ends: float
) -> list[dict[str, Any]]:
  """Returns what the part's commands found, or what came instead."""
  now = time.monotonic()
  left_out = {'figure': 'left out, no time', 'left_out': True}
  if ends - now < LEAST_SECONDS:
    return [{'what': '', **left_out}]
  ends = min(ends, now + part.seconds)
  rows: list[dict[str, Any]] = []
  log.write_text('')
  for name, command in part.commands.items():
    if time.monotonic() >= ends:
      rows.append({'what': name, **left_out})
      continue
    began = log.stat().st_size
    with log.open('a') as file:
      code = run_command(command, file, ends)
    lines = log.read_bytes()[began:].decode(errors='replace').splitlines()
    found = [json.loads(x[4:]) for x in lines if x.startswith('ROW ')]
    # Those of a name are better the later they come.
    rows += {x['what']: x for x in found}.values()
    if code:
      last = [x for x in lines if x.strip() and not x.startswith('ROW ')]
      why = f'exit code {code}' if code > 0 else f'ended by signal {-code}'
      if time.monotonic() >= ends:
        why = f'ended after {time.monotonic() - now:.0f} s'
      text = f'FAILED, {why}: {last[-1].strip()[:120] if last else ""}'
      rows.append({'what': name, 'figure': text, 'failed': why})
  return rows


def run_command(command: tuple[str, ...], file: Any, ends: float) -> int:
  """Returns the exit code; ends the command and all that it has started."""
  path = os.environ.get('PYTHONPATH')
  env = {
    # Several processes share the card.
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    'TF_CPP_MIN_LOG_LEVEL': '2',
    **os.environ,
    'PYTHONPATH': f'{ROOT}{os.pathsep}{path}' if path else str(ROOT),
    'PYTHONUNBUFFERED': '1',
  }
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env=env,
    stdin=subprocess.DEVNULL,
    stdout=file,
    stderr=subprocess.STDOUT,
    start_new_session=True,
  )
  try:
    return process.wait(max(ends - time.monotonic(), 0))
  except subprocess.TimeoutExpired:
    return -signal.SIGKILL
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judge(row: dict[str, Any]) -> dict[str, Any]:
  """Returns `row` with its aim, and whether it was met where that is known."""
  aim = AIMS.get((row['part'], row['what']))
  if aim is None:
    return row
  value = row.get('values', {}).get(aim.value)
  met = None if value is None else aim.at_least <= value <= aim.at_most
  return {**row, 'aim': aim.text, 'met': met}


def find_platform(rows: list[dict[str, Any]]) -> str:
  """Returns what JAX computes on."""
  found = [x['values']['platform'] for x in rows if x['what'] == 'device']
  return found[0] if found else 'unknown'


def draw_table(rows: list[dict[str, Any]], seconds: float) -> str:
  """Returns the table in Markdown; aims are judged on a GPU alone."""
  judged, toy = find_platform(rows) == 'gpu', any(x.get('toy') for x in rows)
  lines = [f'{seconds:.0f} s in all.']
  if not judged:
    lines.append('**No GPU**: no figure says anything of one.')
  if toy:
    lines.append('A rehearsal at toy sizes: no figure means anything.')
  lines += ['', '| part | | figure | aim | |', '|---|---|---|---|---|']
  for row in rows:
    met = ''
    if judged and not toy:
      met = {True: 'met', False: 'MISSED'}.get(row.get('met'), '')
    cells = row['part'], row['what'], row['figure'], row.get('aim', '')
    words = [x.replace('|', '/') for x in (*cells, met)]
    lines.append(f'| {" | ".join(words)} |')
  beside = [x for x in TOGETHER if any(row['part'] == x for row in rows)]
  if len(beside) > 1:
    lines += ['', f'{", ".join(beside)} ran beside one another.']
  if left := {x['part']: None for x in rows if x.get('left_out')}:
    lines += ['', f'Left out: --parts={",".join(left)}']
  return '\n'.join(lines) + '\n'


def say(what: str, figure: str, values: dict[str, Any], **more: Any) -> None:
  """Prints a row of the table, as a part's command does."""
  row = {'what': what, 'figure': figure, 'values': values, **more}
  # In one piece: libraries write there, too.
  print(f'ROW {json.dumps(row)}\n', end='', flush=True)


if __name__ == '__main__':
  sys.exit(main())

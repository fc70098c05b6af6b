"""Ends real runs at chosen moments, and compares what came of them."""

import contextlib
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import runs
from tensorboard.backend.event_processing import event_accumulator

STAGES = ('three', 'ten')
# What a run saves to be loaded; `latest` has the optimizer's state.
WEIGHTS = ('latest', 'best', 'final', 'ema')
LIMIT_SECONDS = 300
POLL_SECONDS = 0.002
TEMPORARY = '.orbax-checkpoint-tmp'


class Seen(NamedTuple):
  """What a moment is told from."""

  workdir: pathlib.Path
  # What the process has printed, and how long it has been running.
  output: str
  seconds: float


class Moment(NamedTuple):
  """When to signal a run; `kind` is a row of the table."""

  kind: str
  is_now: Callable[[Seen], bool]
  signum: int = signal.SIGKILL
  # Seconds until a second signal follows; None: there is none.
  second_after: float | None = None
  devices: int = 1
  env: dict[str, str] = {}  # noqa: RUF012, a constant.
  program: tuple[str, ...] = ('main.py',)

  @property
  def exit_codes(self) -> tuple[int, ...]:
    if self.signum == signal.SIGKILL:
      return (-signal.SIGKILL,)
    if self.second_after is None:
      return (128 + self.signum,)
    return (128 + self.signum, -self.signum)


class Ended(NamedTuple):
  """How a start of a run ended; `hit`: by the signal, not by itself."""

  hit: bool
  exit_code: int
  output: str
  seconds: float
  # From the last signal to the end.
  left_after: float
  where: str


NEVER = Moment('to the end', lambda seen: False)


def run_until(
  moment: Moment, workdir: pathlib.Path, arguments: list[str], url: str = ''
) -> Ended:
  """Starts the run in `workdir`, the copy of `url`; signals it at `moment`."""
  count = len(list(workdir.parent.glob(f'{workdir.name}-*.txt')))
  path = workdir.parent / f'{workdir.name}-{count}.txt'
  began = time.monotonic()
  with (
    path.open('w') as file,
    _start(moment, url or workdir, arguments, file) as run,
  ):
    try:
      hit = _wait(run, moment, workdir, path, began)
      signalled = time.monotonic()
      where = describe(workdir, path.read_text()) if hit else 'the end'
      if hit:
        signalled = _signal(run, moment)
      exit_code = run.wait(LIMIT_SECONDS)
    finally:
      run.kill()
  ended = time.monotonic()
  return Ended(
    hit, exit_code, path.read_text(), ended - began, ended - signalled, where
  )


def _start(moment, workdir, arguments, file):
  devices = f'--xla_force_host_platform_device_count={moment.devices}'
  return subprocess.Popen(
    [sys.executable, *moment.program, f'--workdir={workdir}', *arguments],
    cwd=runs.ROOT,
    env={**os.environ, 'XLA_FLAGS': devices, **moment.env},
    stdout=file,
    stderr=subprocess.STDOUT,
  )


def _wait(run, moment, workdir, path, began) -> bool:
  """Returns whether the moment came; with SIGKILL the run then stands still.

  A process that has been stopped cannot leave the moment before it is killed.
  """
  while run.poll() is None:
    seconds = time.monotonic() - began
    if seconds > LIMIT_SECONDS:
      raise AssertionError(f'It hangs: {path.read_text()[-2000:]}')
    if moment.is_now(Seen(workdir, path.read_text(), seconds)):
      if moment.signum != signal.SIGKILL:
        return True
      run.send_signal(signal.SIGSTOP)
      what = os.WSTOPPED | os.WEXITED | os.WNOWAIT
      os.waitid(os.P_PID, run.pid, what)
      if moment.is_now(Seen(workdir, path.read_text(), seconds)):
        return run.poll() is None
      run.send_signal(signal.SIGCONT)
    time.sleep(POLL_SECONDS)
  return False


def _signal(run, moment) -> float:
  """Returns when the last signal was sent."""
  run.send_signal(moment.signum)
  if moment.second_after is not None:
    time.sleep(moment.second_after)
    run.send_signal(moment.signum)
  return time.monotonic()


def describe(workdir: pathlib.Path, output: str) -> str:
  """Returns the last event that was printed, and the last step saved."""
  events = re.findall(r'^event=(\w+) stage=(\w+)', output, re.MULTILINE)
  event = ' '.join(events[-1]) if events else 'start-up'
  if events and events[-1][0] == 'plan':
    event = 'compilation'
  saved = {name: committed(workdir, name) for name in STAGES}
  steps = [f'{name} {max(found)}' for name, found in saved.items() if found]
  return f'{event}, saved {steps[-1] if steps else "nothing"}'


def committed(workdir: pathlib.Path, stage: str) -> list[int]:
  """Returns the steps of `stage` that a start could go on from."""
  return [
    int(path.name)
    for path in (workdir / 'checkpoints' / stage / 'latest').glob('*')
    if path.name.isdigit()
  ]


def after(seconds: float) -> Moment:
  return Moment('kill -9 at random', lambda seen: seen.seconds >= seconds)


def in_save(nth: int) -> Moment:
  """Returns the moment in which the nth save of a start is half written."""
  names: list[str] = []

  def is_now(seen):
    if 'event=stage ' not in seen.output:  # Leftovers go before this line.
      return False
    found = seen.workdir.glob(f'checkpoints/*/latest/*{TEMPORARY}*')
    now = {str(path) for path in found}
    names.extend(now - {*names})
    return bool(now) and len(names) >= nth

  return Moment('kill -9 in a save', is_now)


def after_stage(stage: str) -> Moment:
  def is_now(seen):
    return (seen.workdir / 'checkpoints' / stage / 'done.json').exists()

  return Moment('kill -9 after a stage', is_now)


def in_handover(stage: str) -> Moment:
  """Returns a moment in which `stage` has begun but could not be resumed."""

  def is_now(seen):
    directory = seen.workdir / 'checkpoints' / stage
    return directory.is_dir() and not committed(seen.workdir, stage)

  return Moment('kill -9 in a hand-over', is_now)


def in_report() -> Moment:
  """Returns the moment in which the last report is being written."""

  def is_now(seen):
    done = seen.workdir / 'checkpoints' / STAGES[-1] / 'done.json'
    with contextlib.suppress(FileNotFoundError):
      end = done.stat().st_mtime_ns
      if any(seen.workdir.glob('.training_[mr]e*.tmp')):
        return True
      report = seen.workdir / 'training_report.txt'
      return report.stat().st_mtime_ns > end
    return False

  return Moment('kill -9 in the report', is_now)


def when_saved(stage: str, step: int) -> Moment:
  def is_now(seen):
    return any(x >= step for x in committed(seen.workdir, stage))

  return Moment('kill -9 on other devices', is_now)


def in_preparation(data_dir: pathlib.Path) -> Moment:
  def is_now(seen):
    return any(data_dir.glob('prepared/*')) and 'event' not in seen.output

  return Moment('SIGTERM in preparation', is_now, signal.SIGTERM)


def in_compilation(home: pathlib.Path) -> Moment:
  """Returns the moment in which all is compiled anew, with an empty cache."""
  env = {'HOME': str(home), 'JAX_COMPILATION_CACHE_DIR': str(home / 'xla')}
  return Moment(
    'SIGTERM in compilation',
    lambda seen: 'event=plan stage=ten' in seen.output,
    signal.SIGTERM,
    env=env,
  )


def in_training(stage: str, signum: int) -> Moment:
  return Moment(
    f'{signal.Signals(signum).name} in training',
    lambda seen: f'event=step stage={stage}' in seen.output,
    signum,
  )


def in_evaluation() -> Moment:
  """Returns a moment in the first evaluation of `ten`, after 9 steps.

  Both kinds of weights are evaluated, which takes about a second.
  """
  reached: list[float] = []

  def is_now(seen):
    if not reached and 8 in committed(seen.workdir, 'ten'):
      reached.append(seen.seconds)
    return bool(reached) and seen.seconds > reached[0] + 0.3

  return Moment('SIGTERM in evaluation', is_now, signal.SIGTERM)


def twice(stage: str) -> Moment:
  moment = in_training(stage, signal.SIGTERM)
  return moment._replace(kind='a second SIGTERM', second_after=0.02)


def last_step_shown(workdir: pathlib.Path) -> int:
  """Returns the last global step of which TensorBoard has a loss."""
  events = event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard' / workdir.name / 'train'),
    purge_orphaned_data=False,
  ).Reload()
  return max(event.step for event in events.Tensors('optimization/loss'))


def differences(
  workdir: pathlib.Path, reference: pathlib.Path, *, same_bits: bool = True
) -> list[str]:
  """Returns in what a finished run is unlike the uninterrupted one."""
  found = [f'left over: {x.relative_to(workdir)}' for x in leftovers(workdir)]
  if not same_bits:
    return found
  expected = _comparable(runs.read_history(reference)['stages'])
  stages = _comparable(runs.read_history(workdir)['stages'])
  found += _unlike(stages, expected, 'stages')
  for stage, weights in itertools.product(STAGES, WEIGHTS):
    bits = runs.bits(reference, stage, weights)
    if runs.bits(workdir, stage, weights) != bits:
      found.append(f'other bits: {stage}/{weights}')
  return found


def leftovers(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns what no finished run leaves behind."""
  return [
    path
    for path in workdir.rglob('*')
    if TEMPORARY in path.name or path.suffix == '.tmp'
  ]


def _comparable(stages: list[dict]) -> list[dict]:
  """Returns `stages` without times and without what tells of interruptions."""
  skipped = ('incidents',)
  return [
    {k: v for k, v in stage.items() if k not in skipped}
    for stage in runs.without_times(stages)
  ]


def _unlike(found, expected, path) -> list[str]:
  if isinstance(expected, dict) and isinstance(found, dict):
    return [
      text
      for key in sorted({*found, *expected})
      for text in _unlike(found.get(key), expected.get(key), f'{path}.{key}')
    ]
  if isinstance(expected, list) and isinstance(found, list):
    pairs = itertools.zip_longest(found, expected)
    return [
      text
      for i, pair in enumerate(pairs)
      for text in _unlike(*pair, f'{path}[{i}]')
    ]
  same = found == expected
  return [] if same else [f'{path}: {found!r}, uninterrupted {expected!r}']


def table(rows: list[tuple[str, bool]]) -> str:
  """Returns survived / tried for each kind of interruption."""
  kinds = list(dict.fromkeys(kind for kind, _ in rows))
  lines = [f'{"interruption":<28}survived / tried']
  for kind in kinds:
    ends = [survived for name, survived in rows if name == kind]
    lines.append(f'{kind:<28}{sum(ends):>8} / {len(ends)}')
  ends = [survived for _, survived in rows]
  return '\n'.join([*lines, f'{"all":<28}{sum(ends):>8} / {len(ends)}'])

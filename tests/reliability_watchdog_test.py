"""The watchdog, with processes that really hang."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import runs

from jaxprog.reliability import watchdog

ROOT = pathlib.Path(__file__).parent.parent
# Seconds after which a busy machine has ended what would take a minute.
LIMIT = 30
PROGRAM = """
import ctypes, hashlib, sys, threading, time
from concurrent import futures
from jaxprog.reliability import watchdog

def say_why(text):
  print('why:', text)  # Not flushed.

def read_image_forever():
  threading.Event().wait()

def compile_for_minutes():
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2**30)

def hold_the_interpreter():
  ctypes.PyDLL(None).sleep(60)

def main():
  log = sys.argv[1]
  {body}

main()
"""


def run_program(body, tmp_path):
  """Returns the finished process and the seconds that it took."""
  began = time.monotonic()
  process = subprocess.run(
    [
      sys.executable,
      '-c',
      PROGRAM.replace('{body}', body.strip()),
      str(tmp_path / 'watchdog.log'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  return process, time.monotonic() - began


def test_a_loader_that_hangs(tmp_path):
  process, seconds = run_program(
    """
  pool = futures.ThreadPoolExecutor(1, 'loader')
  with watchdog.Watchdog(0.02, log=log, on_timeout=say_why) as dog:
    dog.beat('step 12 of stage x')
    pool.submit(read_image_forever).result()
    """,
    tmp_path,
  )
  assert process.returncode == 1
  assert seconds < LIMIT
  said = 'no progress for 0.02 minutes, since step 12 of stage x'
  for text in (process.stderr, (tmp_path / 'watchdog.log').read_text()):
    assert said in text
    assert 'in read_image_forever' in text
    assert 'in main' in text
  assert process.stdout.startswith('why: Watchdog: no progress')


def test_the_main_thread_hangs_in_c_code(tmp_path):
  process, seconds = run_program(
    """
  with watchdog.Watchdog(0.02):
    compile_for_minutes()
    """,
    tmp_path,
  )
  assert process.returncode == 1
  assert seconds < LIMIT
  assert 'since the start' in process.stderr
  assert 'in compile_for_minutes' in process.stderr


def test_c_code_that_does_not_let_python_run(tmp_path):
  process, seconds = run_program(
    """
  with watchdog.Watchdog(0.02) as dog:
    dog.beat('step 1')
    time.sleep(0.5)
    hold_the_interpreter()
    """,
    tmp_path,
  )
  assert process.returncode == 1
  assert seconds < LIMIT
  assert 'in hold_the_interpreter' in process.stderr


def test_last_words_that_hang_do_not_keep_it(tmp_path):
  process, seconds = run_program(
    """
  watchdog._LAST_WORDS = 1.0
  with watchdog.Watchdog(0.02, on_timeout=lambda _: read_image_forever()):
    time.sleep(60)
    """,
    tmp_path,
  )
  assert process.returncode == 1
  assert seconds < LIMIT


def test_beats_and_pauses_and_the_end_keep_it_quiet(tmp_path):
  process, _ = run_program(
    """
  with watchdog.Watchdog(0.02) as dog:
    for i in range(16):
      dog.beat(f'step {i}')
      time.sleep(0.1)
    with dog.pause():
      time.sleep(1.6)
    time.sleep(0.1)
  with watchdog.Watchdog(0):
    pass
  time.sleep(2.8)  # Longer than either of its clocks runs.
    """,
    tmp_path,
  )
  assert process.returncode == 0, process.stderr
  assert process.stderr == ''


def test_time_is_counted_from_the_last_beat():
  now = [0.0]
  dog = watchdog.Watchdog(1, clock=lambda: now[0])

  def overdue_at(seconds):
    while now[0] < seconds:  # It looks every few seconds.
      now[0] = min(now[0] + 5, seconds)
      answer = dog.is_overdue()
    return answer

  assert not overdue_at(60)
  assert overdue_at(61)
  dog.beat('step 1')
  assert not overdue_at(120)
  with dog.pause(), dog.pause():
    assert not overdue_at(1000)
  assert not overdue_at(1060)
  assert overdue_at(1061)


def test_a_suspended_process_was_not_hanging():
  now = [0.0]
  dog = watchdog.Watchdog(1, clock=lambda: now[0])
  now[0] = 3600.0
  assert not dog.is_overdue()
  for _ in range(12):
    now[0] += 5
    answers = dog.is_overdue()
  assert answers


def test_zero_minutes_turn_it_off():
  now = [0.0]
  dog = watchdog.Watchdog(0, clock=lambda: now[0])
  now[0] = 1e9
  assert not dog.is_overdue()


@pytest.mark.parametrize('minutes', [0, 1])
def test_leaving_ends_the_thread(minutes):
  with watchdog.Watchdog(minutes) as dog:
    assert dog._thread.is_alive() == bool(minutes)
  assert not dog._thread.is_alive()


def data_workers(pid):
  """Returns the processes that read images for the process `pid`."""
  found = []
  for path in pathlib.Path(f'/proc/{pid}/task').glob('*/children'):
    for child in map(int, path.read_text().split()):
      if b'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_bytes():
        found.append(child)
  return found


def is_running(pid):
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return False
  return stat.rpartition(')')[2].split()[0] not in 'ZX'


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='It looks into /proc.')
def test_data_workers_that_hang_end_a_run(data_dir, tmp_path):
  process = runs.start_main(
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={tmp_path}',
    '--only=three',
    '--config.stages[0].num_epochs=10000',
    '--config.num_workers=2',
    '--config.worker_kind=process',
    '--config.watchdog_minutes=0.15',
  )
  runs.wait_for_step(process, tmp_path, 'three', 12)
  workers = data_workers(process.pid)
  assert len(workers) == 2
  for worker in workers:
    os.kill(worker, signal.SIGSTOP)
  try:
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert 'Watchdog: no progress for 0.15 minutes, since' in output
    assert 'feed.py' in output  # Where it waits, in the stack of the thread.
    assert 'Watchdog' in (tmp_path / 'watchdog.log').read_text()
    incidents = (tmp_path / 'incidents.jsonl').read_text()
    assert '"kind": "watchdog"' in incidents
    assert not [w for w in workers if is_running(w)]
  finally:
    for worker in workers:
      with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
  assert runs.bits(tmp_path, 'three', 'best')

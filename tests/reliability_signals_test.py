"""Signals sent to processes that are busy in one way or another."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxprog import errors
from jaxprog.reliability import signals

ROOT = pathlib.Path(__file__).parent.parent
BOTH = [signal.SIGTERM, signal.SIGINT]
# {body} runs as the command line does.
PROGRAM = """
import contextlib, hashlib, queue, signal, sys, threading, time
from concurrent import futures
from jaxprog import errors
from jaxprog.reliability import signals

def say(text):
  print(text, flush=True)

def compile_for_minutes():
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2**30)

def main():
  try:
    with signals.StopRequest(owns_process=True) as stop:
      {body}
  except errors.Stopped as e:
    say('unwound')
    return e.exit_code
  return 0

code = main()
if code:
  signals.leave(code)
"""
LOOP = """
      with stop.deferred():
        say('ready')
        while stop.signum is None:
          time.sleep(0.01)
        say(f'saving {stop.signum}')
        time.sleep(SECONDS)
        say('saved')
        raise errors.Stopped(stop.signum)
"""


class Process:
  """A program that has said that it is ready."""

  def __init__(self, body, **kwargs):
    self.process = subprocess.Popen(
      [sys.executable, '-c', PROGRAM.replace('{body}', body.strip())],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      **kwargs,
    )
    self.expect('ready')

  def expect(self, line):
    found = self.process.stdout.readline().strip()
    if found != line:
      self.process.kill()
      raise AssertionError((found, self.process.communicate()))

  def send(self, signum):
    self.process.send_signal(signum)

  def end(self, code):
    """Returns what else it said, once it has left; what hangs, hangs longer."""
    try:
      self.process.wait(timeout=30)
    finally:
      self.process.kill()
    # communicate() knows nothing of what readline() has read beyond its line.
    out, err = self.process.stdout.read(), self.process.stderr.read()
    assert self.process.returncode == code, (out, err)
    assert 'Traceback' not in err
    return out, err


@pytest.mark.parametrize('signum', BOTH)
def test_where_there_is_something_to_save_it_is_saved(signum):
  process = Process(LOOP.replace('SECONDS', '2'))
  process.send(signum)
  process.expect(f'saving {int(signum)}')
  # Longer than one may take where there is nothing to save.
  out, _ = process.end(128 + signum)
  assert out.split() == ['saved', 'unwound']


@pytest.mark.parametrize('first', BOTH)
@pytest.mark.parametrize('second', BOTH)
def test_a_second_signal_leaves_at_once(first, second):
  process = Process(LOOP.replace('SECONDS', '60'))
  process.send(first)
  process.expect(f'saving {int(first)}')
  time.sleep(0.4)
  process.send(second)
  out, err = process.end(128 + second)
  assert out == ''
  assert f'second signal, {second.name}' in err


def test_a_second_signal_leaves_c_code_at_once():
  process = Process("""
      with stop.deferred():
        say('ready')
        compile_for_minutes()
  """)
  process.send(signal.SIGTERM)
  time.sleep(2)  # More than the grace: there may be something to save.
  assert process.process.poll() is None
  process.send(signal.SIGINT)
  process.end(130)


def test_a_signal_that_comes_twice_at_once_is_one():
  # timeout(1) signals the process, then its group.
  process = Process("""
      signals._ONE_REQUEST = 60.0  # Of a machine that is busy.
      with stop.deferred():
        say('ready')
        for _ in range(2):
          signal.raise_signal(signal.SIGTERM)
        say('saved')
        raise errors.Stopped(stop.signum)
  """)
  out, _ = process.end(143)
  assert out.split() == ['saved', 'unwound']


@pytest.mark.parametrize('signum', BOTH)
@pytest.mark.parametrize(
  'body',
  [
    "say('ready'); time.sleep(60)",
    "say('ready'); queue.Queue().get()",
    "say('ready'); threading.Event().wait()",
  ],
)
def test_where_there_is_nothing_to_save_the_run_unwinds_at_once(body, signum):
  process = Process(body)
  process.send(signum)
  out, _ = process.end(128 + signum)
  assert out.split() == ['unwound']


def test_a_thread_in_c_code_keeps_nobody():
  # As the ladder waits for its compiler.
  process = Process("""
      pool = futures.ThreadPoolExecutor(1)
      future = pool.submit(compile_for_minutes)
      say('ready')
      try:
        future.result()
      finally:
        pool.shutdown(wait=False, cancel_futures=True)
  """)
  process.send(signal.SIGTERM)
  out, _ = process.end(143)
  assert out.split() == ['unwound']


def test_not_even_one_that_is_waited_for():
  process = Process("""
      with futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(compile_for_minutes)
        say('ready')
        future.result()
  """)
  process.send(signal.SIGTERM)
  out, err = process.end(143)
  assert out == ''
  assert 'Stopped by SIGTERM' in err


@pytest.mark.parametrize('signum', BOTH)
def test_the_main_thread_in_c_code_is_left(signum):
  process = Process("say('ready'); compile_for_minutes()")
  process.send(signum)
  process.end(128 + signum)


def test_time_to_leave_begins_after_saving():
  # Unwinding hangs.
  process = Process("""
      with contextlib.ExitStack() as stack:
        stack.callback(compile_for_minutes)
        with stop.deferred():
          say('ready')
          while stop.signum is None:
            time.sleep(0.01)
          time.sleep(2)
          say('saved')
  """)
  process.send(signal.SIGTERM)
  out, _ = process.end(143)
  assert out.split() == ['saved']


def test_ctrl_c_is_heard_where_the_shell_ignores_it():
  process = Process(
    LOOP.replace('SECONDS', '0'),
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
  )
  process.send(signal.SIGINT)
  out, _ = process.end(130)
  assert out.split() == ['saving', '2', 'saved', 'unwound']


def test_leaving_ends_the_children(tmp_path):
  process = Process("""
      import multiprocessing
      child = multiprocessing.get_context('spawn').Process(
        target=time.sleep, args=[60]
      )
      child.start()
      say('ready')
      say(child.pid)
      time.sleep(60)
  """)
  child = int(process.process.stdout.readline())
  os.kill(child, 0)
  process.send(signal.SIGTERM)
  process.end(143)
  deadline = time.monotonic() + 20
  while _is_running(child) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not _is_running(child)


def _is_running(pid):
  """Orphans of a container may stay zombies."""
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return False
  return stat.rpartition(')')[2].split()[0] != 'Z'


def test_the_first_signal_is_remembered():
  def train(stop, began):
    with stop.deferred():
      began.append(stop.signum)
      os.kill(os.getpid(), signal.SIGTERM)
      began.append(stop.signum)

  before = signal.getsignal(signal.SIGTERM)
  with signals.StopRequest() as stop:
    began = []
    with pytest.raises(errors.Stopped) as e:
      train(stop, began)
    assert e.value.exit_code == 143
    # What has been asked once is not begun again.
    with pytest.raises(errors.Stopped):
      train(stop, began)
    assert began == [None, signal.SIGTERM]
  assert signal.getsignal(signal.SIGTERM) == before


def test_saving_within_training_is_not_interrupted():
  saved = []

  def train(stop):
    with stop.deferred():
      os.kill(os.getpid(), signal.SIGTERM)
      with stop.deferred():
        saved.append('state')
      saved.append('history')

  with signals.StopRequest() as stop, pytest.raises(errors.Stopped):
    train(stop)
  assert saved == ['state', 'history']


def test_an_inner_one_is_the_outer_one():
  before = signal.getsignal(signal.SIGTERM)
  with signals.StopRequest() as outer:
    installed = signal.getsignal(signal.SIGTERM)
    # As jax.distributed does.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with signals.StopRequest() as inner:
      assert inner is outer
    assert signal.getsignal(signal.SIGTERM) == installed
    with pytest.raises(errors.Stopped):
      os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) == before
  with signals.StopRequest() as later:
    assert later is not outer
    assert later.signum is None


@pytest.mark.parametrize(
  'handler', [signal.default_int_handler, signal.SIG_IGN]
)
def test_a_second_ctrl_c_leaves_a_notebook_alive(handler):
  def train(stop):
    with stop.deferred():
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.signum == signal.SIGINT
      time.sleep(0.3)
      os.kill(os.getpid(), signal.SIGINT)
      raise AssertionError

  before = signal.signal(signal.SIGINT, handler)
  try:
    with signals.StopRequest() as stop, pytest.raises(KeyboardInterrupt):
      train(stop)
    assert signal.getsignal(signal.SIGINT) == handler
  finally:
    signal.signal(signal.SIGINT, before)


def test_another_thread_never_asks_to_stop():
  import threading

  found = []

  def run():
    before = signal.getsignal(signal.SIGTERM)
    with signals.StopRequest() as stop, stop.deferred():
      found.extend([stop.signum, signal.getsignal(signal.SIGTERM) == before])

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert found == [None, True]


@pytest.mark.parametrize('name', ['stdout', 'stderr'])
def test_whichever_stream_is_a_terminal_has_its_cursor_back(name):
  ours, its = os.openpty()
  streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, name: its}
  code = "from jaxprog.reliability import signals; signals.leave_now('', 3)"
  result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, **streams)
  os.close(its)
  assert result.returncode == 3
  assert os.read(ours, 100).endswith(b'\x1b[?25h')
  os.close(ours)

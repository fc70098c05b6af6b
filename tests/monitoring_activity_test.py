"""What is said of what takes long, in a terminal and elsewhere."""

import contextlib
import io
import os
import subprocess
import sys
import threading

import pytest
import runs
from conftest import ROOT
from monitoring_progress_test import Clock, Screen, Terminal

import jaxprog
from jaxprog.monitoring import activity
from jaxprog.training import setup as setup_lib


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands; what is said begins anew with it."""
  clock = Clock()
  monkeypatch.delenv('NO_COLOR', raising=False)
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '60')
  monkeypatch.setattr(activity, '_display', activity._Display(clock))
  activity._display.stream_name = 'stdout'
  return clock


def wait(clock, seconds):
  """Lets seconds go by one by one, as the thread would see them."""
  for _ in range(seconds):
    clock.now += 1.0
    activity._display.tick()


def said(stream):
  return stream.getvalue().splitlines()


def test_the_first_thing_is_said_at_once_and_what_is_brief_never(
  clock, monkeypatch
):
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  activity.use('stderr')
  with activity.doing('looking around'):
    with activity.doing('blinking'):
      clock.now += 0.5
      activity._display.tick()
    with activity.doing('sleeping'):
      wait(clock, 2)
  assert said(sys.stderr) == [
    'event=doing what="looking around" seconds=0',
    'event=doing what=sleeping seconds=1',
  ]


def test_no_silence_is_longer_than_eight_seconds(clock, monkeypatch):
  monkeypatch.setattr(sys, 'stdout', io.StringIO())
  with activity.doing('compiling', last=70.4, since=clock.now - 5.0):
    wait(clock, 17)
    assert [x.split()[-2:] for x in said(sys.stdout)] == [
      [f'seconds={seconds}', 'last_seconds=70'] for seconds in (6, 14, 22)
    ]
    clock.now += 7.0
    activity.hear()  # Somebody else has printed a line.
    wait(clock, 7)
    assert len(said(sys.stdout)) == 3
  wait(clock, 20)
  assert len(said(sys.stdout)) == 3


def test_an_outer_thing_goes_on_after_the_inner_one(clock, monkeypatch):
  monkeypatch.setattr(sys, 'stdout', io.StringIO())
  with activity.doing('preparing', unit='bytes') as show:
    show(3, 7, 'digits')
    with contextlib.suppress(ZeroDivisionError), activity.doing('dividing'):
      wait(clock, 1)
      _ = 1 / 0
    wait(clock, 1)
  assert said(sys.stdout) == [
    'event=doing what=dividing seconds=1',
    'event=doing what="preparing, digits" done=3 total=7 seconds=2',
  ]


def test_a_terminal_shows_it_below_all_that_is_printed(clock, monkeypatch):
  monkeypatch.setattr(sys, 'stdout', Terminal())
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  terminal = sys.stdout
  with activity.doing('compiling stage 2 of 4', last=70.0) as show:
    print('before')
    wait(clock, 31)
    lines = Screen(60).feed(terminal.getvalue()).lines()
    about = 'compiling stage 2 of 4: 0:31, about 1:10 the last time'
    assert lines == ['before', about]
    print('after', file=sys.stderr)  # It goes elsewhere.
    print('a line that is shorter')
    show(5, 10)
    wait(clock, 1)
    lines = Screen(60).feed(terminal.getvalue()).lines()
    assert lines[:2] == ['before', 'a line that is shorter']
    assert lines[2].startswith('compiling stage 2 of 4 ━')
    assert lines[2].endswith('─  5/10  0:32')
    assert len(lines) == 3
  screen = Screen(60).feed(terminal.getvalue())
  assert screen.lines() == ['before', 'a line that is shorter', '']
  assert screen.widest <= 60
  assert sys.stdout is terminal
  assert sys.stderr.getvalue() == 'after\n'
  assert terminal.getvalue().endswith('\x1b[?25h')  # The cursor is back.


def test_a_line_that_is_not_over_is_not_drawn_over(clock, monkeypatch):
  monkeypatch.setattr(sys, 'stdout', Terminal())
  terminal = sys.stdout
  with activity.doing('waiting'):
    wait(clock, 1)
    print('name: ', end='')
    wait(clock, 1)
    assert Screen(60).feed(terminal.getvalue()).lines() == ['name:']
    print('Ada')
    wait(clock, 1)
    lines = Screen(60).feed(terminal.getvalue()).lines()
    assert lines == ['name: Ada', 'waiting: 0:03']


def test_a_process_that_is_silenced_says_nothing(clock, monkeypatch):
  monkeypatch.setattr(sys, 'stdout', Terminal())
  with activity.doing('working'):
    wait(clock, 1)
    activity.silence()
    print('a result')
    with activity.doing('more'):
      wait(clock, 20)
    lines = Screen(60).feed(sys.stdout.getvalue()).lines()
    assert lines == ['a result', '']


def test_a_worker_process_says_nothing(tmp_path):
  script = tmp_path / 'script.py'
  script.write_text("""
import multiprocessing
from jaxprog.monitoring import activity

def speak(what):
  activity.use('stdout')
  with activity.doing(what):
    pass

speak('loading')
if __name__ == '__main__':
  spawning = multiprocessing.get_context('spawn')
  worker = spawning.Process(target=speak, args=['working'])
  worker.start()
  worker.join()
  assert worker.exitcode == 0
""")
  result = subprocess.run(
    [sys.executable, script],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == 'event=doing what=loading seconds=0\n'


def test_a_run_says_that_it_compiles_before_it_has(
  data_dir, tmp_path, monkeypatch
):
  out, go, compile_task = io.StringIO(), threading.Event(), None

  class Out(io.StringIO):
    def write(self, text):
      if 'compiling stage 1 of 1' in text:
        go.set()
      return out.write(text)

  def compile_later(task, *, carried):
    assert go.wait(60)
    return compile_task(task, carried=carried)

  compile_task = setup_lib.compile_task
  monkeypatch.setattr(setup_lib, 'compile_task', compile_later)
  monkeypatch.setattr(activity, '_display', activity._Display())
  monkeypatch.setattr(sys, 'stderr', Out())
  monkeypatch.setattr(sys, 'stdout', out)
  config = jaxprog.load_config(f'{ROOT}/tests/tiny_config.py:{data_dir}')
  history = jaxprog.train(config, tmp_path, only=['three'])
  lines = out.getvalue().splitlines()
  (first, *_) = [i for i, x in enumerate(lines) if 'compiling stage' in x]
  assert first < next(i for i, x in enumerate(lines) if 'event=stage ' in x)
  (record,) = history['stages']
  assert record['compile_seconds'] >= 1.0
  assert runs.read_history(tmp_path)['stages'][0]['compile_seconds'] >= 1.0

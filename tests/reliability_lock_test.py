"""The lock of a workdir, against processes that hold it or have died."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import runs

from jaxprog import errors
from jaxprog.reliability import lock

ROOT = pathlib.Path(__file__).parent.parent
OWNER = """
import sys, time
from jaxprog.reliability import lock
with lock.Lock(sys.argv[1]):
  print('locked', flush=True)
  sys.stdin.read()
"""
SECOND = """
import sys
from jaxprog import errors
from jaxprog.reliability import lock
try:
  with lock.Lock(sys.argv[1]) as held:
    print(held.taken_over)
except errors.UserError as e:
  print(e, file=sys.stderr)
  sys.exit(2)
"""


@contextlib.contextmanager
def owner(workdir):
  """Yields another process that holds the lock until its input ends."""
  process = subprocess.Popen(
    [sys.executable, '-c', OWNER, str(workdir)],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == 'locked\n'
    yield process
  finally:
    process.kill()
    process.communicate()


def run_second(workdir):
  return subprocess.run(
    [sys.executable, '-c', SECOND, str(workdir)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


def leave_behind(workdir, *, age=0.0, **changes):
  """Writes the lock of a dead run of this host, with some `changes`."""
  path = workdir / 'run.lock'
  path.unlink(missing_ok=True)
  with owner(workdir) as process:
    process.kill()
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  os.utime(path, (time.time() - age, time.time() - age))
  return path


def running_process():
  """Returns another process with the fields by which it is known."""
  process = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1)
  return process, {'pid': process.pid, 'start': lock._start_time(process.pid)}


def test_a_second_run_is_told_who_and_since_when(tmp_path):
  with owner(tmp_path) as process:
    second = run_second(tmp_path)
    assert second.returncode == 2
    lines = second.stderr.strip().split('\n')
    assert len(lines) == 3
    assert f'Process {process.pid} on {socket.gethostname()}' in lines[0]
    assert re.search(r'since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00', lines[0])
    assert str(tmp_path) in lines[1]
    assert f'kill {process.pid}' in lines[2]
    # The refusal has changed nothing for the owner, or the third.
    assert run_second(tmp_path).returncode == 2


def test_looking_who_has_it_changes_nothing(tmp_path):
  lock.check_free(tmp_path)
  with owner(tmp_path) as process:
    before = runs.snapshot(tmp_path)
    with pytest.raises(errors.UserError, match=f'Process {process.pid} on'):
      lock.check_free(tmp_path)
    assert runs.snapshot(tmp_path) == before
  lock.check_free(tmp_path)  # It was killed.
  path = leave_behind(tmp_path, host='elsewhere')
  with pytest.raises(errors.UserError, match='on elsewhere has been using'):
    lock.check_free(tmp_path)
  os.utime(path, (time.time() - 91,) * 2)
  lock.check_free(tmp_path)
  assert path.exists()


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
  with lock.Lock(tmp_path / 'new' / 'run'):
    pass
  assert list(tmp_path.iterdir()) == []
  with lock.Lock(tmp_path / 'new' / 'run'):
    (tmp_path / 'new' / 'run' / 'result').write_text('')
  assert (tmp_path / 'new' / 'run' / 'result').exists()


def test_it_is_free_once_its_owner_has_ended(tmp_path):
  with owner(tmp_path) as process:
    process.communicate()
    assert process.returncode == 0
  assert list(tmp_path.iterdir()) == []
  assert run_second(tmp_path).stdout == 'None\n'


def test_a_killed_owner_is_taken_over_from_at_once(tmp_path):
  with owner(tmp_path) as process:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert (tmp_path / 'run.lock').exists()
  second = run_second(tmp_path)
  assert second.returncode == 0, second.stderr
  assert f'process {process.pid} on {socket.gethostname()}' in second.stdout
  assert run_second(tmp_path).stdout == 'None\n'


def test_the_file_says_whose_it_is(tmp_path):
  with lock.Lock(tmp_path / 'new' / 'run'):
    found = json.loads((tmp_path / 'new' / 'run' / 'run.lock').read_text())
  assert found['host'] == socket.gethostname()
  assert found['pid'] == os.getpid()
  assert found['command'].startswith(sys.executable)
  # The boot, and the ticks since then.
  uptime = float(pathlib.Path('/proc/uptime').read_text().split()[0])
  began = found['start'] / os.sysconf('SC_CLK_TCK')
  assert 0 < began < uptime


def test_twice_in_one_process(tmp_path):
  def train_and_fail():
    with lock.Lock(tmp_path):
      with pytest.raises(errors.UserError, match=str(os.getpid())):
        lock.Lock(tmp_path).__enter__()
      raise ArithmeticError

  with pytest.raises(ArithmeticError):
    train_and_fail()
  again = lock.Lock(tmp_path)
  for _ in range(2):
    with again:
      assert again.taken_over is None
      assert run_second(tmp_path).returncode == 2
  assert run_second(tmp_path).returncode == 0


def test_many_that_start_at_once_are_one_after_another():
  # Each adds one to a number that it first reads.
  script = """
import pathlib, sys
from jaxprog import errors
from jaxprog.reliability import lock
path = pathlib.Path(sys.argv[1], 'number')
done = 0
while done < 50:
  try:
    with lock.Lock(sys.argv[1]) as held:
      assert held.taken_over is None
      number = int(path.read_text())
      path.write_text(str(number + 1))
      done += 1
  except errors.UserError:
    pass
"""
  # In memory, where waiting for the disk takes no time.
  with tempfile.TemporaryDirectory(dir='/dev/shm') as workdir:
    number = pathlib.Path(workdir, 'number')
    number.write_text('0')
    processes = [
      subprocess.Popen([sys.executable, '-c', script, workdir], cwd=ROOT)
      for _ in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert number.read_text() == '150'


def test_an_owner_that_ends_between_two_looks(tmp_path, monkeypatch):
  really_open = lock._open

  def open_late(path):
    file = really_open(path)
    if process.poll() is None:
      process.communicate()  # It unlocks, and removes what we have opened.
    return file

  monkeypatch.setattr(lock, '_open', open_late)
  with owner(tmp_path) as process, lock.Lock(tmp_path):
    assert run_second(tmp_path).returncode == 2


@pytest.mark.parametrize(
  'changes', [{'host': 'other'}, {'host': 'other', 'boot': 'x'}, {'boot': 'x'}]
)
def test_a_run_on_another_host_is_waited_for(tmp_path, changes):
  path = leave_behind(tmp_path, age=60, **changes)
  before = path.read_bytes(), path.stat().st_mtime
  second = run_second(tmp_path)
  assert second.returncode == 2
  host = changes.get('host', socket.gethostname())
  assert f'on {host} has been using' in second.stderr
  seconds = int(re.search(r'in (\d+) s', second.stderr)[1])
  assert 20 <= seconds <= 30
  assert (path.read_bytes(), path.stat().st_mtime) == before
  leave_behind(tmp_path, age=91, **changes)
  second = run_second(tmp_path)
  assert second.returncode == 0, second.stderr
  assert f'on {host}, which began' in second.stdout


def test_removing_the_file_frees_it_at_once(tmp_path):
  path = leave_behind(tmp_path, host='other')
  second = run_second(tmp_path)
  assert second.returncode == 2
  subprocess.run(second.stderr.strip().rpartition('after: ')[2].split())
  assert not path.exists()
  assert run_second(tmp_path).returncode == 0


def test_another_mount_that_does_not_share_locks(tmp_path):
  # The file is not locked, its owner is alive.
  process, fields = running_process()
  try:
    leave_behind(tmp_path, **fields)
    assert run_second(tmp_path).returncode == 2
    # A new process with the old one's pid is not the owner.
    leave_behind(tmp_path, pid=fields['pid'], start=fields['start'] - 1)
    assert run_second(tmp_path).returncode == 0
  finally:
    process.kill()
    process.communicate()


def test_a_file_that_this_process_could_not_remove(tmp_path):
  pid = os.getpid()
  leave_behind(tmp_path, pid=pid, start=lock._start_time(pid))
  with lock.Lock(tmp_path) as held:
    assert f'process {pid}' in held.taken_over


def test_without_flock_a_living_owner_is_found_by_its_pid(tmp_path):
  process, fields = running_process()
  try:
    path = leave_behind(tmp_path, **fields)
    found = json.loads(path.read_text())
    assert lock._may_be_alive(found, 0, 'unknown')
    assert not lock._may_be_alive(found, 91, 'unknown')
    process.send_signal(signal.SIGKILL)
    time.sleep(0.1)  # A zombie, until we wait for it.
    assert not lock._may_be_alive(found, 0, 'unknown')
  finally:
    process.kill()
    process.communicate()
  # In another container its pid says nothing.
  elsewhere = {**found, 'pid_namespace': 'pid:[1]'}
  assert lock._may_be_alive(elsewhere, 0, 'unknown')
  assert not lock._may_be_alive(elsewhere, 0, 'ours')
  assert not lock._may_be_alive(elsewhere, 91, 'unknown')


def test_the_owner_shows_that_it_lives(tmp_path):
  path = tmp_path / 'run.lock'
  with lock.Lock(tmp_path, beat_seconds=0.05) as held:
    os.utime(path, (0, 0))
    wait_until(lambda: path.stat().st_mtime > time.time() - 60)
    held.check()


def test_an_owner_learns_that_another_has_taken_over(tmp_path):
  path = tmp_path / 'run.lock'
  with lock.Lock(tmp_path, beat_seconds=0.05) as held:
    other = {**json.loads(path.read_text()), 'host': 'other', 'token': 'x'}
    path.write_text(json.dumps(other))
    wait_until(lambda: held._lost)
    with pytest.raises(RuntimeError, match='on other has taken over'):
      held.check()
  # It is not ours to remove.
  assert json.loads(path.read_text()) == other


def test_a_removed_file_is_written_anew(tmp_path):
  path = tmp_path / 'run.lock'
  with lock.Lock(tmp_path, beat_seconds=0.05) as held:
    path.unlink()
    wait_until(path.exists)
    wait_until(lambda: run_second(tmp_path).returncode == 2)
    held.check()
  assert not path.exists()


def test_a_removed_file_that_another_has_written_anew(tmp_path):
  with lock.Lock(tmp_path, beat_seconds=0.5) as held:
    (tmp_path / 'run.lock').unlink()
    with owner(tmp_path) as process:
      wait_until(lambda: held._lost)
      with pytest.raises(RuntimeError, match=f'Process {process.pid} on'):
        held.check()


@pytest.mark.parametrize('content', [b'', b'{"host": "x', b'[]', b'\xff'])
def test_a_damaged_file_is_nobodys(tmp_path, content):
  (tmp_path / 'run.lock').write_bytes(content)
  with lock.Lock(tmp_path):
    found = json.loads((tmp_path / 'run.lock').read_text())
    assert found['pid'] == os.getpid()


def test_a_damaged_file_that_is_locked_is_somebodys(tmp_path):
  path = tmp_path / 'run.lock'
  with open(path, 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    second = run_second(tmp_path)
  assert second.returncode == 2
  assert len(second.stderr.strip().split('\n')) == 3


@pytest.mark.parametrize('where', ['file/run', 'file'])
def test_a_workdir_that_cannot_be_one(tmp_path, where):
  (tmp_path / 'file').write_text('')
  second = run_second(tmp_path / where)
  assert second.returncode == 2
  assert 'Cannot write to the workdir' in second.stderr
  assert len(second.stderr.strip().split('\n')) == 3


def test_a_read_only_workdir():
  second = run_second('/sys/kernel')  # Not even root may write there.
  assert second.returncode == 2
  assert 'Cannot write to the workdir' in second.stderr
  assert len(second.stderr.strip().split('\n')) == 3


def wait_until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)

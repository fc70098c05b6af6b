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

from jaxprog import buckets, errors
from jaxprog.reliability import lease, lock, owners

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
from jaxprog import buckets, errors
from jaxprog.reliability import lease, lock, owners
try:
  with lock.Lock(sys.argv[1], patience_seconds=float(sys.argv[2])) as held:
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


def run_second(workdir, patience=60.0):
  return subprocess.run(
    [sys.executable, '-c', SECOND, str(workdir), str(patience)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


def leave_behind(workdir, **changes):
  """Writes the lock of a dead run of this host, with some `changes`."""
  path = workdir / 'run.lock'
  path.unlink(missing_ok=True)
  with owner(workdir) as process:
    process.kill()
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  return path


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
  assert lock.check_free(tmp_path) == ''
  with owner(tmp_path) as process:
    before = runs.snapshot(tmp_path)
    with pytest.raises(errors.UserError, match=f'Process {process.pid} on'):
      lock.check_free(tmp_path)
    assert runs.snapshot(tmp_path) == before
  assert lock.check_free(tmp_path) == ''  # It was killed.
  path = leave_behind(tmp_path, host='elsewhere')
  before = path.read_bytes(), path.stat().st_mtime_ns
  assert 'on elsewhere may be using' in lock.check_free(tmp_path)
  assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_who_lives_is_found_without_a_lock(tmp_path):
  assert lock.find_owner(tmp_path) == {}
  with owner(tmp_path) as process:
    assert lock.find_owner(tmp_path)['pid'] == process.pid
    process.kill()
    process.wait()
    assert (tmp_path / 'run.lock').exists()
    assert lock.find_owner(tmp_path) == {}
  with lock.Lock(tmp_path):
    assert lock.find_owner(tmp_path)['pid'] == os.getpid()
  path = leave_behind(tmp_path, host='elsewhere')
  assert lock.find_owner(tmp_path)['host'] == 'elsewhere'
  os.utime(path, (time.time() - 121,) * 2)
  assert lock.find_owner(tmp_path) == {}


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
from jaxprog import buckets, errors
from jaxprog.reliability import lease, lock, owners
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
def test_a_dead_run_of_another_host_is_waited_for(tmp_path, changes):
  path = leave_behind(tmp_path, **changes)
  pid = json.loads(path.read_text())['pid']
  host = changes.get('host', socket.gethostname())
  began = time.monotonic()
  second = run_second(tmp_path, patience=1.0)
  assert time.monotonic() - began >= 1.0
  assert second.returncode == 0, second.stderr
  assert second.stderr == (
    f'Waiting up to 1 s: process {pid} on {host} may be using {tmp_path}.\n'
  )
  assert f'from process {pid} on {host}, which began' in second.stdout
  assert run_second(tmp_path).stdout == 'None\n'


def test_a_living_run_whose_flock_is_not_seen_is_found(tmp_path):
  # Its file is touched, as another host does that locks it by itself.
  path = leave_behind(tmp_path, host='other')
  before = path.read_bytes()
  second = subprocess.Popen(
    [sys.executable, '-c', SECOND, str(tmp_path), '20'],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert 'Waiting up to 20 s' in second.stderr.readline()
  os.utime(path)
  said = second.communicate(timeout=60)[1]
  assert second.returncode == 2
  assert said.split('\n')[0].endswith(
    'has been using this workdir since ' + (json.loads(before)['since'] + '.')
  )
  assert 'on other)' in said.split('\n')[2]
  assert path.read_bytes() == before


def test_one_that_ends_while_another_watches(tmp_path):
  path = leave_behind(tmp_path, host='other')
  second = subprocess.Popen(
    [sys.executable, '-c', SECOND, str(tmp_path), '20'],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert 'Waiting up to 20 s' in second.stderr.readline()
  path.unlink()
  assert second.communicate(timeout=60)[0] == 'None\n'


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(lock.files, 'lock', lambda *args, **kwargs: False)
  with pytest.raises(errors.UserError) as found:
    lock.Lock(tmp_path / 'run').__enter__()
  what, where, how = str(found.value).split('\n')
  assert what == 'The file system of the workdir knows no locks.'
  assert where == f'--workdir={tmp_path}/run'
  assert f'--workdir=file://{tmp_path}/run' in how
  copy = buckets.copy_of('gs://bucket/run', tmp_path)
  with pytest.raises(errors.UserError, match='JAXPROG_CACHE_DIR') as found:
    lock.Lock(copy).__enter__()
  assert found.value.where == '--workdir=gs://bucket/run'


def test_a_bucket_has_one_owner_whatever_the_folder(tmp_path):
  bucket = buckets.Bucket(f'file://{tmp_path}/bucket')
  with lock.Lock(tmp_path / 'one', bucket) as held:
    held.check()
    assert lease.read_newest(bucket)['token'] == held.lease.token
    second = lock.Lock(tmp_path / 'two', bucket)
    with pytest.raises(errors.UserError, match=f'Process {os.getpid()} on'):
      second.__enter__()
    assert not (tmp_path / 'two').exists()
    held.lease.lost = 'Another has it.'
    with pytest.raises(RuntimeError, match='Another has it'):
      held.check()
    held.lease.lost = None
  assert lease.read_newest(bucket)['released']
  with lock.Lock(tmp_path / 'two', bucket) as held:
    assert held.taken_over is None


def test_a_file_that_this_process_could_not_remove(tmp_path):
  pid = os.getpid()
  leave_behind(tmp_path, pid=pid, start=owners.start_time(pid))
  with lock.Lock(tmp_path) as held:
    assert f'process {pid}' in held.taken_over


def test_the_owner_shows_that_it_lives(tmp_path):
  path = tmp_path / 'run.lock'
  with lock.Lock(tmp_path, beat_seconds=0.05) as held:
    os.utime(path, (0, 0))
    runs.wait_for(lambda: path.stat().st_mtime > time.time() - 60)
    held.check()


def test_an_owner_learns_that_another_has_taken_over(tmp_path):
  path = tmp_path / 'run.lock'
  with lock.Lock(tmp_path) as held:
    other = {**json.loads(path.read_text()), 'host': 'other', 'token': 'x'}
    path.write_text(json.dumps(other))
    with pytest.raises(RuntimeError, match='on other has taken over'):
      held.check()
  # It is not ours to remove.
  assert json.loads(path.read_text()) == other


def test_who_has_never_taken_it_has_not_lost_it(tmp_path):
  with owner(tmp_path):
    lock.Lock(tmp_path).check()  # By another process of the run, on its host.


def test_a_removed_file_that_another_has_written_anew(tmp_path):
  with lock.Lock(tmp_path) as held:
    (tmp_path / 'run.lock').unlink()
    held.check()
    with (
      owner(tmp_path) as process,
      pytest.raises(RuntimeError, match=f'Process {process.pid} on'),
    ):
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

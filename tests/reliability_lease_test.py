"""The lease of a run in a bucket, against a server and other processes."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import fake_gcs
import gcsfs
import pytest
import runs

from jaxprog import buckets, errors
from jaxprog.reliability import lease, owners

ROOT = pathlib.Path(__file__).parent.parent
# An owner on another host, who tells when it finds that it is none any more.
OWNER = """
import sys, threading, time
from jaxprog import buckets
from jaxprog.reliability import lease, owners
me = {**owners.describe_process(), 'host': sys.argv[2]}
with lease.Lease(buckets.Bucket(sys.argv[1]), me, print, 0.2, 1.0) as held:
  print('taken', flush=True)
  ended = threading.Event()
  def wait(): sys.stdin.read(); ended.set()
  threading.Thread(target=wait, daemon=True).start()
  while not ended.wait(0.05):
    try:
      held.check()
    except RuntimeError as e:
      print(e, flush=True)
      break
"""


@pytest.fixture
def server():
  with fake_gcs.serve() as server:
    gcsfs.GCSFileSystem.clear_instance_cache()  # It knows the one before.
    yield server


@pytest.fixture(params=['gs', 'file'])
def bucket(request, tmp_path):
  if request.param == 'file':
    return buckets.Bucket(f'file://{tmp_path}/run')
  request.getfixturevalue('server')
  return buckets.Bucket('gs://test-bucket/run')


def create(bucket, said=None, *, beat=0.2, patience=1.0, **changes):
  me = {**owners.describe_process(), **changes}
  say = print if said is None else said.append
  return lease.Lease(bucket, me, say, beat, patience)


@contextlib.contextmanager
def owner(bucket, host='elsewhere'):
  """Yields another process that has the lease until its input ends."""
  process = subprocess.Popen(
    [sys.executable, '-c', OWNER, bucket.url, host],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == 'taken\n'
    yield process
  finally:
    process.kill()
    process.communicate()


def leave_behind(bucket, number=1, **changes):
  """Writes the lease of a dead process of this host, with some `changes`."""
  gone = subprocess.Popen(['true'])
  gone.wait()
  me = {**owners.describe_process(), 'pid': gone.pid, **changes}
  data = json.dumps({**me, 'count': 7, 'released': False}).encode()
  bucket.write(f'lease/{number:06}.json', data)
  return me


def names(bucket):
  return sorted(bucket.list('lease'))


def test_of_many_that_come_at_once_one_wins(bucket):
  barrier, results, ended = threading.Barrier(8), [], threading.Event()

  def come():
    mine = create(buckets.Bucket(bucket.url))
    barrier.wait()
    try:
      with mine:
        results.append('won')
        ended.wait(60)
    except errors.UserError as e:
      results.append(e)

  threads = [threading.Thread(target=come) for _ in range(8)]
  for thread in threads:
    thread.start()
  runs.wait_for(lambda: len(results) == 8)
  ended.set()
  for thread in threads:
    thread.join()
  (lines,) = {str(x) for x in results if x != 'won'}
  assert results.count('won') == 1
  assert f'Process {os.getpid()} on' in lines
  assert lines.split('\n')[1] == bucket.url
  assert names(bucket) == ['lease/000001.json']


def test_what_is_given_back_is_taken_at_once(bucket):
  for _ in range(4):
    said = []
    with create(bucket, said, host='another', boot='') as held:
      assert held.taken_over is None
      assert lease.read_newest(bucket)['token'] == held.token
    assert not said
  assert lease.read_newest(bucket)['released']
  assert names(bucket) == ['lease/000003.json', 'lease/000004.json']


def test_a_dead_process_of_this_host_is_not_waited_for(bucket):
  me, said = leave_behind(bucket), []
  assert lease.check_free(bucket) == ''
  with create(bucket, said) as held:
    assert f'Took over from process {me["pid"]}' in held.taken_over
  assert not said


def test_a_living_process_of_this_host_is_not_waited_for(bucket):
  said = []
  leave_behind(bucket, pid=os.getppid(), start=owners.start_time(os.getppid()))
  before = bucket.read('lease/000001.json')
  with pytest.raises(errors.UserError, match=f'kill {os.getppid()} on'):
    create(bucket, said).__enter__()
  with pytest.raises(errors.UserError, match=f'kill {os.getppid()} on'):
    lease.check_free(bucket)
  assert not said
  assert bucket.read('lease/000001.json') == before


def test_an_owner_elsewhere_that_lives_falls_silent_and_wakes(bucket):
  said = []
  with owner(bucket) as process:
    # Who waits for all of it takes over, and raises nothing.
    with pytest.raises(errors.UserError, match='on elsewhere has been using'):
      create(bucket, said, patience=60.0).__enter__()
    assert said == [
      f'Waiting up to 60 s: process {process.pid} on elsewhere may be using '
      f'{bucket.url}.'
    ]
    assert 'on elsewhere may be using' in lease.check_free(bucket)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with create(bucket) as held:
      assert time.monotonic() - began >= 1.0
      assert f'from process {process.pid} on elsewhere' in held.taken_over
      process.send_signal(signal.SIGCONT)
      text = f'Process {os.getpid()} on {owners.describe_process()["host"]} has'
      assert process.stdout.readline().startswith(text)
      count = lease.read_newest(bucket)['count']
      runs.wait_for(lambda: lease.read_newest(bucket)['count'] > count)
      held.check()
    assert names(bucket) == ['lease/000001.json', 'lease/000002.json']


def test_one_that_gives_back_while_another_watches(bucket):
  with owner(bucket) as process:
    process.send_signal(signal.SIGSTOP)
    results, said = [], []

    def come():
      with create(bucket, said, patience=60.0) as held:
        results.append(held.taken_over)

    thread = threading.Thread(target=come)
    thread.start()
    runs.wait_for(lambda: said)
    newest = lease.read_newest(bucket)
    bucket.write(
      'lease/000001.json', json.dumps({**newest, 'released': True}).encode()
    )
    thread.join(60)
    assert results == [None]


def test_two_that_take_over_at_once(bucket):
  leave_behind(bucket, number=4, host='elsewhere')
  results, ended = [], threading.Event()

  def come():
    try:
      with create(buckets.Bucket(bucket.url)) as held:
        results.append('won')
        ended.wait(60)
        held.check()
    except errors.UserError as e:
      results.append(str(e))

  threads = [threading.Thread(target=come) for _ in range(2)]
  for thread in threads:
    thread.start()
  runs.wait_for(lambda: len(results) == 2)
  ended.set()
  for thread in threads:
    thread.join()
  assert sorted(results)[1] == 'won'
  assert f'Process {os.getpid()} on' in sorted(results)[0]
  assert names(bucket)[-1] == 'lease/000005.json'


@pytest.mark.parametrize('data', [b'', b'{"host": "x', b'[]', b'\xff'])
def test_a_damaged_object_is_watched(bucket, data):
  bucket.write('lease/000001.json', data)
  said = []
  assert lease.read_newest(bucket) == {}
  with create(bucket, said, patience=0.2) as held:
    assert held.taken_over
  assert len(said) == 1
  assert names(bucket) == ['lease/000001.json', 'lease/000002.json']


def test_who_removes_all_and_begins_anew_has_it(bucket):
  with create(bucket, beat=20.0, patience=0.0) as held:
    held.check()
    for name in names(bucket):
      bucket.remove([name])
    with (
      owner(bucket) as process,
      pytest.raises(RuntimeError, match=f'Process {process.pid} on elsewhere'),
    ):
      held.check()
  # It was not ours to give back.
  assert not lease.read_newest(bucket)['released']


def test_removed_objects_are_no_lease(bucket):
  with create(bucket, beat=20.0, patience=0.0) as held:
    bucket.remove(names(bucket))
    with pytest.raises(RuntimeError, match='lease was removed'):
      held.check()


def test_requests_of_a_beat(server):
  bucket = buckets.Bucket('gs://test-bucket/run')
  with create(bucket, patience=30.0) as held:
    server.clear()
    runs.wait_for(lambda: server.counts().get('write', 0) >= 4)
    for _ in range(20):
      held.check()
    counts = server.counts()
  assert counts.keys() == {'list', 'write'}
  assert 0 <= counts['list'] - counts['write'] <= 1


def test_faults_and_outages_do_not_lose_it(server):
  bucket = buckets.Bucket('gs://test-bucket/run')
  server.order('503', share=0.2)
  server.order('lost', share=0.1)
  with create(bucket, beat=0.05) as held:
    time.sleep(0.5)
    held.check()
    server.order('reset')
    time.sleep(1.2)  # Longer than others would wait.
    server.heal()
    held.check()
    assert held.lost is None
    count = lease.read_newest(bucket)['count']
    runs.wait_for(lambda: lease.read_newest(bucket)['count'] > count)
  assert lease.read_newest(bucket)['released']


def test_an_answer_that_is_lost_is_no_other_owner(server):
  bucket = buckets.Bucket('gs://test-bucket/run')
  server.order('lost', what='write', count=1)
  with create(bucket):
    pass
  assert names(bucket) == ['lease/000001.json']


def test_a_bucket_that_forbids_writing(server):
  server.forbid('test-bucket')
  with pytest.raises(errors.UserError, match='You may not do that'):
    create(buckets.Bucket('gs://test-bucket/run')).__enter__()


def test_a_signal_ends_the_wait(bucket):
  leave_behind(bucket, host='elsewhere')
  script = (
    'from jaxprog import buckets; '
    'from jaxprog.reliability import lease, owners, signals\n'
    'with signals.StopRequest():\n'
    f'  bucket = buckets.Bucket({bucket.url!r})\n'
    '  say = lambda text: print(text, flush=True)\n'
    '  with lease.Lease(bucket, owners.describe_process(), say): pass'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert 'Waiting up to 60 s' in process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert 'Stopped by SIGTERM' in said
  assert names(bucket) == ['lease/000001.json']

"""Two processes of one run, on this machine: they start and end together."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import fake_gcs
import pytest
import runs

from jaxprog import config as config_lib
from jaxprog import errors, fields
from jaxprog.reliability import cluster, integrity, lock, peers
from jaxprog.training import alike

CONFIG = 'tests/tiny_config.py'
# 54 steps of the first stage.
FLAGS = (
  '--only=three',
  '--config.stages[0].num_epochs=6',
  '--config.checkpoint_every_steps=5',
)
# Seconds that a busy machine may take for one run.
PATIENCE = 600
# On CPU devices all six epochs had the same bits: of two numbers the order of
# the sum does not matter. This is what another compiler may do.
TOLERANCE = 1e-5
# Each has a copy of its own, and reads what the first one has written.
SHARING = """
import sys
from jaxprog import errors
from jaxprog.reliability import cluster, mirror, peers, signals
from jaxprog.training import alike
port, index, url = sys.argv[1:]
place = cluster.Place(f'localhost:{port}', 2, int(index))
try:
  with signals.StopRequest(), cluster.processes(place, '', 60):
    folder, url = mirror.locate(url)
    with mirror.hold(folder, url):
      alike.check_workdir(folder, url)
      for turn in range(3):
        if index == '0':
          (folder / 'config.json').write_text(str(turn))
        peers.wait_for_files('turn')
        print((folder / 'config.json').read_text(), flush=True)
        peers.wait_for_all('read')
except errors.UserError as e:
  print(e, flush=True)
  signals.leave(2)
"""


def free_port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def test_hosts_may_differ_in_what_is_local_alone():
  config = config_lib.load_config(CONFIG)
  described = alike._describe_config(config)
  for field in fields.CONFIG:
    other = config_lib.load_config(CONFIG)
    with other.ignore_type():
      other[field] = 'another'
    is_alike = alike._describe_config(other) == described
    assert is_alike == (field in fields.names(fields.CONFIG, 'local')), field


def start(*arguments, devices=1, **environment):
  env = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'COLUMNS': '80',
    **environment,
  }
  return subprocess.Popen(
    [sys.executable, 'main.py', *map(str, arguments)],
    cwd=runs.ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start_pair(*arguments, environments=({}, {})):
  """Starts two processes with a device each."""
  port = free_port()
  return [
    start(
      *arguments,
      f'--coordinator=localhost:{port}',
      '--process_count=2',
      f'--process_id={index}',
      **environment,
    )
    for index, environment in enumerate(environments)
  ]


def start_counting(how):
  """Starts two processes of tests/pair.py."""
  port = free_port()
  return [
    subprocess.Popen(
      [sys.executable, 'tests/pair.py', str(port), str(index), how],
      cwd=runs.ROOT,
      env={**os.environ, 'PYTHONPATH': str(runs.ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]


def start_sharing(folder, urls):
  """Starts two processes of `SHARING`, as if each had a host of its own."""
  port = free_port()
  return [
    subprocess.Popen(
      [sys.executable, '-c', SHARING, str(port), str(index), url],
      cwd=runs.ROOT,
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAXPROG_CACHE_DIR': str(folder / f'host{index}'),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index, url in enumerate(urls)
  ]


def wait_until_counting(pair):
  """Waits until both have come to 30; both must have saved at one step."""
  saved = [process.stdout.readline() for process in pair]
  assert saved[0] == saved[1]
  assert saved[0].startswith('saved')
  for process in pair:
    assert process.stdout.readline() == 'counting\n'


def end(processes, timeout=PATIENCE):
  """Returns exit code and output of each process."""
  try:
    outputs = [p.communicate(timeout=timeout)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, x) for p, x in zip(processes, outputs, strict=True)]


def wait_for_step(processes, workdir, step):
  """Waits until a save at `step` or later has committed."""
  deadline = time.monotonic() + PATIENCE
  while not any(x >= step for x in latest_steps(workdir)):
    ended = [p for p in processes if p.poll() is not None]
    if ended or time.monotonic() > deadline:
      for process in processes:
        process.kill()
      raise AssertionError(processes[0].communicate()[0])
    time.sleep(0.005)


def stage_of(workdir):
  return runs.read_history(workdir)['stages'][0]


def latest_steps(workdir):
  return integrity.list_steps(workdir / 'checkpoints' / 'three' / 'latest')


@pytest.fixture(scope='module')
def story(config, tmp_path_factory):
  """One run, begun by one process, interrupted, and gone on with by others.

  Returns what came of each part, by name, and the workdirs:
  one: by one process with two devices, interrupted and finished.
  two: begun by that one, gone on with by two processes: a SIGTERM to the
    second, then a kill of the second, then they finish.
  back: what the two had saved at the SIGTERM, finished by one process.
  """
  one, two, back = (
    tmp_path_factory.mktemp(name) / 'run' for name in ('one', 'two', 'back')
  )
  parts = {'one': one, 'two': two, 'back': back}

  process = start(config, *FLAGS, f'--workdir={one}', devices=2)
  wait_for_step([process], one, 5)
  process.send_signal(signal.SIGTERM)
  parts['begun'] = end([process])
  shutil.copytree(one, two)
  parts['from'] = latest_steps(two)[-1]

  pair = start_pair(config, *FLAGS, f'--workdir={two}')
  wait_for_step(pair, two, parts['from'] + 5)
  pair[1].send_signal(signal.SIGTERM)
  parts['stopped'] = end(pair)
  parts['stopped_at'] = latest_steps(two)[-1]
  shutil.copytree(two, back)

  pair = start_pair(config, *FLAGS, f'--workdir={two}')
  wait_for_step(pair, two, parts['stopped_at'] + 5)
  pair[1].kill()
  parts['killed'] = end(pair)

  parts['finished'] = end(start_pair(config, *FLAGS, f'--workdir={two}'))
  for name in ('one', 'back'):
    arguments = (config, *FLAGS, f'--workdir={parts[name]}')
    parts[f'{name} finished'] = end([start(*arguments, devices=2)])
  return parts


@pytest.mark.slow
def test_two_processes_train_like_one(story):
  for name in ('begun', 'finished', 'one finished'):
    expected = 143 if name == 'begun' else 0
    assert [x[0] for x in story[name]] == [expected] * len(story[name]), story[
      name
    ]
  ours, theirs = stage_of(story['two']), stage_of(story['one'])
  assert ours['status'] == theirs['status'] == 'done'
  assert ours['epochs'][-1]['global_step'] == 54
  for a, b in zip(ours['epochs'], theirs['epochs'], strict=True):
    for name in ('train_loss', 'val_loss', 'grad_norm'):
      assert a[name] == pytest.approx(b[name], rel=TOLERANCE), name
    assert a['global_step'] == b['global_step']


@pytest.mark.slow
def test_a_checkpoint_serves_any_number_of_processes(story):
  assert [x[0] for x in story['back finished']] == [0]
  # The other way, in the middle of the stage: two went on where one had saved.
  assert stage_of(story['two'])['resumed_at_steps'][0] == story['from']
  assert stage_of(story['back'])['resumed_at_steps'][:2] == [
    story['from'],
    story['stopped_at'],
  ]
  for a, b in zip(
    stage_of(story['back'])['epochs'],
    stage_of(story['one'])['epochs'],
    strict=True,
  ):
    assert a['train_loss'] == pytest.approx(b['train_loss'], rel=TOLERANCE)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all(story):
  assert [x[0] for x in story['stopped']] == [143, 143], story['stopped']
  for _, output in story['stopped']:
    assert 'Stopped by SIGTERM, saved.' in output
  assert story['stopped_at'] > story['from']


@pytest.mark.slow
def test_a_killed_process_brings_the_other_down(story):
  (code, output), (killed, _) = story['killed']
  assert killed == -signal.SIGKILL
  assert code == 1, output
  assert re.search(r'Process 1 on \S+ is gone', output), output


@pytest.mark.parametrize('signalled', [[1], [0, 1]])
def test_a_signal_stops_all_at_the_same_step(signalled):
  pair = start_counting('count')
  wait_until_counting(pair)
  for index in signalled:
    pair[index].send_signal(signal.SIGINT)
  (code, first), (other, second) = end(pair)
  assert (code, other) == (130, 130), first + second
  assert first == second
  assert re.match(r'stopped \d+\nStopped by SIGINT, saved.\n', first)


def test_who_fails_is_heard_by_all():
  (code, first), (other, second) = end(start_counting('fail'))
  assert (code, other) == (2, 2), first + second
  text = 'A mistake.\nhere\nMend it.\n'
  assert first.endswith('counting\n' + text)
  assert re.search(rf'process 0 on \S+: {text}$', second)


def test_the_others_of_a_killed_first_process_end():
  pair = start_counting('count')
  wait_until_counting(pair)
  pair[0].kill()
  _, (code, output) = end(pair)
  # JAX itself aborts it, unless we are quicker.
  assert code in (1, -signal.SIGABRT)
  assert 'process 0 is lost' in output or 'JAX distributed service' in output


def test_processes_wait_for_each_other_at_the_end():
  (code, _), (other, _) = end(start_counting('finish'))
  assert (code, other) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_two_processes_in_a_bucket_end_with_the_bits_of_one_on_a_disk(
  story, data_dir, tmp_path, victim
):
  """Killed, they go on with nothing but the bucket, as on other machines."""

  def start(name, *flags):
    hosts = [
      {'JAXPROG_CACHE_DIR': str(tmp_path / name / str(index))}
      for index in range(2)
    ]
    arguments = (
      f'--config={CONFIG}:gs://test-bucket/data',
      f'--workdir={url}',
      *flags,
    )
    return start_pair(*arguments, environments=hosts)

  url, copy = 'gs://test-bucket/run', 'bucket@gs/test-bucket/run'
  with fake_gcs.serve() as server:
    for path in (x for x in data_dir.rglob('*') if x.is_file()):
      name = f'data/{path.relative_to(data_dir)}'
      server.put('test-bucket', name, path.read_bytes())
    pair = start('first', *FLAGS)
    wait_for_step(pair, tmp_path / 'first' / '0' / copy, 20)
    pair[victim].kill()
    for code, output in end(pair):
      assert code != 0, output
    kept = server.objects('test-bucket')
    for code, output in end(start('second', *FLAGS)):
      assert code == 0, output
    if victim:
      for code, output in end(start('third', '--mode=eval')):
        assert code == 0, output
      assert any('run/eval/' in x for x in server.objects('test-bucket'))
  assert any('/latest/' in x for x in kept)
  finished = tmp_path / 'second' / '0' / copy
  assert len(stage_of(finished)['resumed_at_steps']) == 1
  assert runs.bits(finished, 'three') == runs.bits(story['one'], 'three')


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once(story, config):
  workdir = story['two']
  pair = start_pair(config, '--mode=eval', f'--workdir={workdir}')
  (code, output), (other, _) = end(pair)
  assert (code, other) == (0, 0), output
  best = stage_of(workdir)['best']['top1']
  # 115 images, on two devices: 24 a device and batch, the last ones padded.
  assert f'{100 * best:.1f}' in output.split('\n')


def test_processes_that_differ_all_refuse(data_dir, tmp_path):
  """Started as SLURM starts the two tasks of a node."""
  job = {
    'SLURM_JOB_ID': '77',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
    'JAX_COORDINATOR_PORT': str(free_port()),
    'SRUN': 'env',  # In place of srun, which would set the next two.
    'PYTHON': sys.executable,
    'PLATFORM': 'cpu',
    'CONFIG': f'{CONFIG}:{data_dir}',
    'DATA': str(data_dir),
    'WORKDIR': str(tmp_path / 'run'),
  }
  pair = [
    subprocess.Popen(
      ['bash', 'launch/slurm.sbatch', *FLAGS, f'--config.seed={index}'],
      cwd=runs.ROOT,
      env={
        **os.environ,
        **job,
        'SLURM_PROCID': str(index),
        'SLURM_LOCALID': str(index),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  for code, output in end(pair):
    assert code == 2, output
    assert 'config.seed is 1 on process 1 and 0 on process 0' in output
    said = [x for x in runs.without_activity(output) if 'Gloo' not in x]
    assert len(said) <= 3, output


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_the_other(story, config, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(story['back'], workdir)
  stage = workdir / 'checkpoints' / 'three'
  (stage / 'done.json').unlink()
  for step in latest_steps(workdir):
    (stage / 'latest' / str(step) / 'manifest.json').write_text('{}')
  for code, output in end(start_pair(config, *FLAGS, f'--workdir={workdir}')):
    assert code == 1, output
    assert 'all saved states are damaged' in output


def test_a_locked_workdir_refuses_all(config, tmp_path):
  with lock.Lock(tmp_path):
    results = end(start_pair(config, *FLAGS, f'--workdir={tmp_path}'))
  for code, output in results:
    assert code == 2, output
    assert f'Process {os.getpid()} on' in output


def test_the_others_see_in_a_bucket_what_the_first_process_writes(tmp_path):
  with fake_gcs.serve() as server:
    pair = start_sharing(tmp_path, 2 * ['gs://test-bucket/run'])
    for code, output in end(pair):
      assert code == 0, output
      assert output.splitlines() == ['0', '1', '2']
    objects = server.objects('test-bucket')
  assert objects['run/config.json'] == b'2'
  assert b'"released": true' in objects['run/lease/000001.json']


def test_buckets_that_differ_are_refused(tmp_path):
  urls = 'gs://test-bucket/run', 'gs://test-bucket/other'
  with fake_gcs.serve():
    for code, output in end(start_sharing(tmp_path, urls)):
      assert code == 2, output
      assert 'workdir of process 1 is not the one of process 0' in output


def test_a_coordinator_that_is_not_there(config, tmp_path):
  process = start(
    config,
    f'--workdir={tmp_path}/run',
    f'--coordinator=localhost:{free_port()}',
    '--process_count=2',
    '--process_id=1',
    '--connect_seconds=3',
  )
  ((code, output),) = end([process])
  assert code == 2, output
  assert len(runs.without_activity(output)) == 3
  assert 'Not all processes came within 3 s' in output


def test_a_port_that_is_taken(tmp_path):
  with socket.socket() as taken:
    taken.bind(('', 0))
    taken.listen()
    place = cluster.Place(f'localhost:{taken.getsockname()[1]}', 2, 0)
    with (
      pytest.raises(errors.UserError, match='cannot listen on port'),
      cluster.processes(place, ''),
    ):
      pass


@pytest.mark.parametrize(
  ('place', 'expected'),
  [
    (('localhost', 2, 0), 'HOST:PORT'),
    (('localhost:1', 2, 2), 'no process 2 among 2'),
    (('localhost:1', 2, -1), 'no process -1'),
    (('localhost:1', 0, 0), 'cannot be 0 processes'),
    ((None, 2, 0), 'need --coordinator'),
    (('localhost:1', 2, None), 'need --process_id'),
    (('localhost:1', None, None), '--process_count and --process_id'),
  ],
)
def test_wrong_flags(place, expected):
  with pytest.raises(errors.UserError, match=re.escape(expected)) as found:
    cluster.check_place(cluster.Place(*place))
  assert len(str(found.value).split('\n')) <= 3


def test_a_cluster_says_what_flags_leave_out():
  cluster.check_place(cluster.Place('localhost:1'), 'SLURM')
  cluster.check_place(cluster.Place())
  cluster.check_place(cluster.Place(process_count=1))


SLURM = {f'SLURM_{name}': '0' for name in cluster.SLURM}
OMPI = {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:1'}


@pytest.mark.parametrize(
  ('environ', 'expected'),
  [
    ({}, ''),
    ({**SLURM, 'SLURM_NTASKS': '2'}, 'SLURM'),
    ({**SLURM, 'SLURM_NTASKS': '1'}, ''),
    # Within sbatch, but not started by srun.
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2'}, ''),
    ({**OMPI, 'OMPI_COMM_WORLD_SIZE': '4'}, 'Open MPI'),
    ({**OMPI, 'OMPI_COMM_WORLD_SIZE': '1'}, ''),
    # No TPU here: nothing is asked for.
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, ''),
  ],
)
def test_what_started_several_processes(environ, expected):
  assert cluster.detect(environ) == expected


def test_whose_beat_has_stopped():
  now = 0.0
  watch = peers.Watch(2, lambda: now)
  for now in (0.0, 2.0, 4.0):
    watch.look({0: str(now), 1: 'the same'})
  assert watch.silent(3.0) == [1]
  assert watch.silent(5.0) == []

"""Runs in a bucket that are killed, hindered and spoilt, and end as others do.

`make test-faults` runs them, between machines that share nothing but the
bucket; `main_bucket_test` is the short form. JAXPROG_FAULTS is the number of
runs killed at random, JAXPROG_FAULTS_SEED draws other moments.
"""

import collections
import json
import os
import pathlib
import random
import re
import signal
import time
import urllib.parse
import urllib.request

import fake_gcs
import faults_kills as kills
import machines
import pytest
import runs
from tensorboard.backend.event_processing import plugin_event_accumulator

pytestmark = [pytest.mark.faults, pytest.mark.slow]

TRIALS = int(os.environ.get('JAXPROG_FAULTS', 0))
SEED = os.environ.get('JAXPROG_FAULTS_SEED', '0')
BUCKET = 'test-bucket'
often = '--config.checkpoint_every_steps=4'
# Of the first stage.
FIRST_STEPS = 12


@pytest.fixture(scope='module')
def service():
  with fake_gcs.serve((BUCKET,)) as server:
    yield server


@pytest.fixture
def server(service):
  yield service
  service.heal()


@pytest.fixture
def machine(tmp_path):
  return lambda host: machines.Machine(tmp_path, host)


@pytest.fixture
def url(request):
  """A URL of the test's own."""
  name = re.sub(r'\W+', '-', request.node.name)
  return f'gs://{BUCKET}/runs/{name}'


@pytest.fixture(scope='module')
def config(data_dir):
  return f'--config=tests/faults_config.py:{data_dir}'


@pytest.fixture(scope='module')
def reference(config, tmp_path_factory):
  """The run that nobody interrupts, on a disk."""
  workdir = tmp_path_factory.mktemp('reference') / 'run'
  ended = kills.run_until(kills.NEVER, workdir, [config])
  assert ended.exit_code == 0, ended.output
  return workdir


@pytest.fixture(scope='module')
def stopped(service, config, tmp_path_factory):
  """The URL of a run that was stopped in its second stage."""
  url = f'gs://{BUCKET}/runs/stopped'
  one = machines.Machine(tmp_path_factory.mktemp('stopped'), 'one')
  code, _, output = stop(one, url, [config, often], signal.SIGTERM)
  assert code == 143, output
  return url


def stop(machine, url, arguments, signum, stage='ten', step=8, second=None):
  """Signals a run once a state is saved; returns how and how fast it ended."""
  process = machine.start(f'--workdir={url}', *arguments)
  runs.wait_for_step(process, machine.copy(url), stage, step)
  process.send_signal(signum)
  began = time.monotonic()
  if second is not None:
    time.sleep(second)
    process.send_signal(signum)
  out, err = process.communicate(timeout=120)
  return process.returncode, time.monotonic() - began, out + err


def copy(server, url, to):
  """Copies all objects of a run, its leases too."""
  path, other = (x.removeprefix(f'gs://{BUCKET}/') for x in (url, to))
  for name, data in server.objects(BUCKET).items():
    if name.startswith(f'{path}/'):
      server.put(BUCKET, other + name.removeprefix(path), data)


def saved(server, url, stage='ten'):
  """Returns the steps that are saved, with the names of their objects."""
  found = {}
  for name in machines.objects(server, url):
    if step := re.match(rf'checkpoints/{stage}/latest/(\d+)/', name):
      found.setdefault(int(step[1]), []).append(name)
  return found


def damage(server, url, names):
  """Flips a bit of the largest of the objects."""
  path = url.removeprefix(f'gs://{BUCKET}/')
  there = server.objects(BUCKET)
  largest = max(names, key=lambda name: len(there[f'{path}/{name}']))
  server.flip(BUCKET, f'{path}/{largest}')


def remove(server, url, name):
  path = url.removeprefix(f'gs://{BUCKET}/')
  server.delete(BUCKET, f'{path}/{name}')


def assert_whole(server, url, folder, reference):
  """Checks a run that has ended, and that the bucket holds just that."""
  assert not kills.differences(folder, reference)
  there, here = machines.objects(server, url), machines.contents(folder)
  assert [*there] == [*here] or {*there} == {*here}
  assert [x for x in here if here[x] != there[x]] == []


def in_training(seconds):
  """Returns the moment so long after the first stage began."""
  began = []

  def is_now(seen):
    if not began and 'event=stage ' in seen.output:
      began.append(seen.seconds)
    return bool(began) and seen.seconds >= began[0] + seconds

  return kills.Moment('kill -9 at random', is_now)


def starts(output):
  """Returns the stages of a start and from where each went on."""
  return re.findall(r'event=stage stage=(\w+) .*start="([^"]*)"', output)


def incidents(folder):
  text = (folder / 'incidents.jsonl').read_text()
  return re.findall(r'"kind": "(\w+)"', text)


@pytest.mark.parametrize('trial', range(TRIALS or 1))
@pytest.mark.parametrize('how', ['same', 'another', 'mirrored'])
def test_killed_at_random_moments(
  server, machine, reference, config, url, how, trial, say
):
  """`how`: on the same machine, on another one each time, and there with
  config.mirror."""
  rng, story = random.Random(f'{SEED}/{how}/{trial}'), []
  last = rng.randint(1, 3)
  for start in range(last + 1):
    here = machine('one' if how == 'same' else f'number-{start}')
    arguments, folder, to = [config, often], here.copy(url), url
    if how == 'mirrored':
      arguments, to = [*arguments, f'--config.mirror={url}'], ''
      folder = here.cache / 'run'
    folder.parent.mkdir(parents=True, exist_ok=True)
    moment = in_training(rng.uniform(0, 12)) if start < last else kills.NEVER
    moment = moment._replace(program=here.program, env=here.environ)
    ended = kills.run_until(moment, folder, arguments, to)
    story.append(f'{ended.seconds:.1f} s: {ended.where}')
    if not ended.hit:
      break
  say(f'\n{how}: ' + ', '.join(story))
  assert ended.exit_code == 0, ended.output
  assert_whole(server, url, folder, reference)


@pytest.mark.parametrize(
  ('signum', 'code', 'second'),
  [
    (signal.SIGTERM, 143, None),
    (signal.SIGINT, 130, None),
    (signal.SIGTERM, 143, 0.3),
  ],
)
def test_stopped_by_signals(
  server, machine, reference, config, url, signum, code, second, say
):
  one, two = machine('one'), machine('two')
  found, seconds, output = stop(
    one, url, [config, often], signum, second=second
  )
  say(f'\n{signum.name}: {found}, {seconds:.1f} s, {output[-300:]}')
  if second is not None:
    assert found in (code, -signum)
    assert seconds < 6
  else:
    assert found == code, output
    assert machines.objects(server, url) == machines.contents(one.copy(url))
    last = FIRST_STEPS + max(kills.committed(one.copy(url), 'ten'))
  ended = two.call(config, f'--workdir={url}')
  assert ended.returncode == 0, ended.stderr
  if second is None:
    assert starts(ended.stdout) == [('ten', f'resumed at step {last}')]
    assert 'Waiting' not in ended.stdout + ended.stderr
  assert_whole(server, url, two.copy(url), reference)


@pytest.mark.parametrize(
  'how', ['flipped', 'without manifest', 'without an object']
)
def test_a_damaged_state_is_not_gone_on_with(
  server, machine, reference, config, stopped, url, how
):
  copy(server, stopped, url)
  steps = saved(server, url)
  before, newest = sorted(steps)[-2:]
  match how:
    case 'flipped':
      damage(server, url, steps[newest])
    case 'without manifest':
      remove(server, url, next(x for x in steps[newest] if 'manifest.j' in x))
    case _:
      remove(server, url, next(x for x in steps[newest] if '_METADATA' in x))
  two = machine('two')
  ended = two.call(config, f'--workdir={url}')
  assert ended.returncode == 0, ended.stderr
  assert starts(ended.stdout) == [
    ('ten', f'resumed at step {FIRST_STEPS + before}')
  ]
  # Without its manifest an upload was never finished, which is no damage.
  is_damage = 'quarantine' in incidents(two.copy(url))
  assert is_damage == (how != 'without manifest'), incidents(two.copy(url))
  assert_whole(server, url, two.copy(url), reference)
  there = machines.objects(server, url)
  assert any('ten/quarantine/' in name for name in there) == is_damage


def test_nothing_starts_over_where_all_states_are_damaged(
  server, machine, config, stopped, url
):
  copy(server, stopped, url)
  for names in saved(server, url).values():
    damage(server, url, names)
  two = machine('two')
  ended = two.call(config, f'--workdir={url}')
  assert ended.returncode == 1
  assert 'damaged' in ended.stderr
  place = f'{url}/checkpoints/ten'
  assert f'remove {place} and {two.copy(place)}' in ended.stderr


def test_two_at_once(server, machine, config, url, say):
  one, two = machine('one'), machine('two')
  first = one.start(config, f'--workdir={url}')
  runs.wait_for_step(first, one.copy(url), 'three', 0)
  machines.until(lambda: saved(server, url, 'three'))
  began = time.monotonic()
  second = two.call(config, f'--workdir={url}')
  say(f'\nrefused after {time.monotonic() - began:.1f} s: {second.stderr}')
  assert second.returncode == 2
  *_, what, where, how = second.stderr.splitlines()
  assert f'Process {first.pid} on one' in what
  assert url in where
  assert how.startswith('Stop it')
  assert not list(two.cache.rglob('*'))
  _, err = first.communicate(timeout=120)
  assert first.returncode == 0, err


def test_two_that_start_at_the_same_moment(server, machine, config, url):
  both = [machine(x).start(config, f'--workdir={url}') for x in 'ab']
  ends = [process.communicate(timeout=200) for process in both]
  assert sorted(process.returncode for process in both) == [0, 2], ends


def test_faults_of_the_network_change_nothing(
  server, machine, reference, config, url, say
):
  for kind, share, what in (
    ('503', 0.05, ''),
    ('reset', 0.02, ''),
    ('cut', 0.02, 'read'),
    ('lost', 0.02, 'write'),
  ):
    server.order(kind, share=share, what=what)
  server.order('slow', share=0.02, seconds=1.5)
  server.clear()
  one, two = machine('one'), machine('two')
  began = time.monotonic()
  code, _, output = stop(one, url, [config, often], signal.SIGTERM)
  assert code == 143, output
  ended = two.call(config, f'--workdir={url}')
  assert ended.returncode == 0, ended.stderr
  met = collections.Counter(x.fault for x in server.requests)
  say(f'\n{time.monotonic() - began:.1f} s, {dict(met)}')
  assert min(met['503'], met['lost']) > 0
  assert_whole(server, url, two.copy(url), reference)


def test_a_bucket_that_is_away_for_a_while(machine, config, tmp_path, say):
  """Training goes on; what the bucket lacks follows."""
  one, url = machine('one'), f'gs://{BUCKET}/runs/away'
  folder, port = tmp_path / 'objects', None
  long = '--config.stages[0].num_epochs=400'
  with fake_gcs.serve((BUCKET,), folder=folder) as server:
    port = server.server_port
    process = one.start(config, long, '--only=three', f'--workdir={url}')
    machines.until(lambda: saved(server, url, 'three'))
  before = newest(one, url)
  time.sleep(40)
  assert process.poll() is None
  between = newest(one, url)
  assert between > before
  with fake_gcs.serve((BUCKET,), port, folder) as server:
    seconds = machines.until(
      lambda: max(saved(server, url, 'three'), default=0) > between, 120
    )
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert machines.objects(server, url) == machines.contents(one.copy(url))
  say(f'\naway for 40 s, followed {seconds:.1f} s after: {err}')
  assert 'Traceback' not in err


def newest(machine, url):
  return max(kills.committed(machine.copy(url), 'three'), default=0)


def test_a_bucket_that_is_away_in_the_end(
  machine, config, tmp_path, reference, say
):
  """What it lacks is said, and follows once the command is repeated."""
  one, url = machine('one'), f'gs://{BUCKET}/runs/away'
  folder = tmp_path / 'objects'
  with fake_gcs.serve((BUCKET,), folder=folder) as server:
    process = one.start(config, f'--workdir={url}')
    machines.until(lambda: saved(server, url, 'ten'))
    port = server.server_port
  done = one.copy(url) / 'checkpoints' / 'ten' / 'done.json'
  machines.until(done.exists)
  began = time.monotonic()
  _, err = process.communicate(timeout=300)
  say(f'\nended {time.monotonic() - began:.1f} s after the last stage: {err}')
  assert process.returncode == 1
  assert f'{url} lacks what was written last' in err
  assert f'Traceback: {one.copy(url)}/error.log' in err
  with fake_gcs.serve((BUCKET,), port, folder) as server:
    again = one.call(config, f'--workdir={url}')
    assert again.returncode == 0, again.stderr
    assert 'event=step' not in again.stdout
    assert_whole(server, url, one.copy(url), reference)


def kill_once(machine, server, url, arguments, pattern):
  """Kills what a machine does as soon as an object's name matches."""
  with machine.start(*arguments, f'--workdir={url}') as process:
    try:
      machines.until(
        lambda: any(
          re.search(pattern, x) for x in machines.objects(server, url)
        ),
        120,
      )
    finally:
      process.kill()


@pytest.mark.parametrize(
  ('mode', 'until', 'result'),
  [
    ('tune', r'trials/0001/.*latest', 'tune.json'),
    ('compare', r'cells/.*latest', 'comparison.json'),
  ],
)
def test_many_runs_go_on_elsewhere(
  server, machine, data_dir, url, mode, until, result
):
  arguments = [
    f'--mode={mode}',
    f'--config=tests/{mode}_config.py:{data_dir}',
    *(['--config.num_trials=3'] if mode == 'tune' else []),
  ]
  one, two = machine('one'), machine('two')
  kill_once(one, server, url, arguments, until)
  ended = two.call(*arguments, f'--workdir={url}')
  assert ended.returncode == 0, ended.stderr
  there = machines.objects(server, url)
  assert there == machines.contents(two.copy(url))
  found = json.loads(there[result])
  if mode == 'tune':
    assert len(found['trials']) == 3
  assert f'{url}/' in ended.stdout
  left = ended.stdout.replace(f'on this machine in {two.copy(url)}', '')
  assert str(two.cache) not in left


def points(folder):
  """Returns the steps of which TensorBoard shows a loss."""
  events = plugin_event_accumulator.EventAccumulator(
    str(folder), size_guidance={plugin_event_accumulator.TENSORS: 0}
  ).Reload()
  return [x.step for x in events.Tensors('optimization/loss')]


def test_tensorboard_shows_each_step_once(
  server, machine, reference, config, url, tmp_path
):
  one, two = machine('one'), machine('two')
  kill_once(one, server, url, [config, often], r'ten/latest/4/manifest')
  ended = two.call(config, f'--workdir={url}')
  assert ended.returncode == 0, ended.stderr
  assert 'lock' in incidents(two.copy(url)), incidents(two.copy(url))
  folder = tmp_path / 'events'
  folder.mkdir()
  for name in machines.objects(server, url):
    if re.fullmatch('tensorboard/[^/]+/train/.*', name):
      path = urllib.parse.quote(f'{url.removeprefix("gs://")}/{name}')
      with urllib.request.urlopen(f'{server.url}/{path}') as answer:
        (folder / pathlib.Path(name).name).write_bytes(answer.read())
  assert len(list(folder.iterdir())) == 2
  assert points(folder) == points(
    reference / 'tensorboard' / reference.name / 'train'
  )

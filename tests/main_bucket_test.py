"""The command line with a run in a bucket; faults_bucket_test tries it hard."""

import re
import signal
import time

import fake_gcs
import machines
import pytest
import runs

CONFIG = 'tests/docs_config.py'
BUCKET = 'test-bucket'
STAGES = ('four', 'seven')
URL = f'gs://{BUCKET}/runs/a'


@pytest.fixture(scope='module')
def service():
  with fake_gcs.serve((BUCKET,)) as server, pytest.MonkeyPatch.context() as env:
    for key, value in server.environ.items():
      env.setenv(key, value)
    yield server


@pytest.fixture
def server(service):
  yield service
  service.heal()


@pytest.fixture(scope='module')
def config(data_dir):
  return f'--config={CONFIG}:{data_dir}', f'--only={",".join(STAGES)}'


@pytest.fixture(scope='module')
def first(service, config, tmp_path_factory):
  """The machine that has trained the run at URL."""
  machine = machines.Machine(tmp_path_factory.mktemp('first'), 'first')
  with pytest.MonkeyPatch.context() as env:
    ended = call(env, machine, *config, f'--workdir={URL}')
  assert ended.returncode == 0, ended.stderr
  assert f'workdir: {URL}, on this machine in' in ended.stdout
  return machine


@pytest.fixture
def machine(tmp_path):
  return machines.Machine(tmp_path, 'other')


def call(monkeypatch, machine, *arguments):
  for key, value in machine.environ.items():
    monkeypatch.setenv(key, value)
  return runs.call_main(*arguments)


def copy(server, name):
  """Returns the URL of a copy of the run, without its leases."""
  for path, data in machines.objects(server, URL).items():
    server.put(BUCKET, f'runs/{name}/{path}', data)
  return f'gs://{BUCKET}/runs/{name}'


def assert_same(folder, other):
  for stage in STAGES:
    assert runs.bits(folder, stage) == runs.bits(other, stage)
    assert runs.bits(folder, stage, 'latest') == runs.bits(
      other, stage, 'latest'
    )


def test_a_run_lies_in_its_bucket_and_is_scored_elsewhere(
  server, first, machine, monkeypatch
):
  folder = first.copy(URL)
  assert machines.objects(server, URL) == machines.contents(folder)
  best = runs.read_history(folder)['stages'][-1]['best']['top1']
  ended = call(monkeypatch, machine, '--mode=eval', f'--workdir={URL}')
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.strip() == f'{100 * best:.1f}'
  assert f'{URL}/eval/seven-best.json' in ended.stderr
  assert str(machine.cache) not in ended.stderr
  assert 'eval/seven-best.json' in machines.objects(server, URL)
  found = machine.copy(URL)
  assert runs.bits(found, 'seven', 'best') == runs.bits(folder, 'seven', 'best')
  assert not (found / 'checkpoints' / 'seven' / 'latest').exists()


@pytest.mark.slow
def test_killed_here_it_goes_on_elsewhere_with_the_same_bits(
  server, first, machine, config, monkeypatch, tmp_path
):
  url = f'gs://{BUCKET}/runs/killed'
  arguments = f'--workdir={url}', '--config.checkpoint_every_steps=2'
  one = machines.Machine(tmp_path, 'one')
  with one.start(config[0], *arguments) as process:  # It has more to do.
    try:
      machines.until(
        lambda: any('seven/latest' in x for x in machines.objects(server, url))
      )
      # It is alive, but cannot end before it is looked at.
      process.send_signal(signal.SIGSTOP)
      while server.clear():  # What it had asked for is done.
        time.sleep(0.5)
      before = server.objects(BUCKET)
      monkeypatch.setattr('platform.node', lambda: one.host)
      second = call(monkeypatch, machine, *config, *arguments)
    finally:
      process.kill()
  assert second.returncode == 2
  what, where, how = second.stderr.splitlines()
  assert f'Process {process.pid} on one has been using' in what
  assert (where, how[:4]) == (url, 'Stop')
  assert not machine.cache.exists()
  assert server.objects(BUCKET) == before
  again = call(monkeypatch, machine, *config, *arguments)
  assert again.returncode == 0, again.stderr
  assert 'start="fresh weights"' not in again.stdout
  assert_same(machine.copy(url), first.copy(URL))
  assert machines.objects(server, url) == machines.contents(machine.copy(url))


@pytest.mark.slow  # Its parts are tested with mirror.py.
def test_a_mirror_brings_a_run_to_another_folder(
  server, first, machine, config, monkeypatch, tmp_path
):
  url = f'gs://{BUCKET}/runs/mirrored'
  mirror = f'--config.mirror={url}'
  one, two = tmp_path / 'one', tmp_path / 'two'
  ended = call(
    monkeypatch, machine, config[0], f'--workdir={one}', mirror, '--only=four'
  )
  assert ended.returncode == 0, ended.stderr
  ended = call(monkeypatch, machine, *config, f'--workdir={two}', mirror)
  assert ended.returncode == 0, ended.stderr
  assert 'four: done before' in ended.stdout
  assert_same(two, first.copy(URL))
  assert machines.objects(server, url) == machines.contents(two)


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_elsewhere(
  server, first, machine, config, monkeypatch
):
  url, state = copy(server, 'flipped'), {}
  server.delete(BUCKET, 'runs/flipped/checkpoints/seven/done.json')
  for name, data in machines.objects(server, url).items():
    if re.match(r'checkpoints/seven/latest/[^0]', name):
      state[len(data)] = name
  server.flip(BUCKET, f'runs/flipped/{state[max(state)]}')
  ended = call(monkeypatch, machine, *config, f'--workdir={url}')
  assert ended.returncode == 0, ended.stderr
  assert 'quarantined' in ended.stdout
  assert_same(machine.copy(url), first.copy(URL))
  there = machines.objects(server, url)
  assert any('/seven/quarantine/' in name for name in there)
  assert there == machines.contents(machine.copy(url))


@pytest.mark.parametrize(
  ('where', 'what'),
  [
    ('--workdir=gs://test-buckt/runs/b', "no bucket 'test-buckt'"),
    ('--workdir=gs://test-bucket/runs/b', 'You may not do that in gs://test-b'),
    ('--workdir=abc://test-bucket/runs/b', 'Nothing here reads abc://'),
    ('--workdir=gs://test-bucket/../../b', 'is empty, . or ..'),
    ('--config.mirror=test-bucket', "'test-bucket' is no URL"),
  ],
)
def test_a_bucket_that_does_not_serve_is_said_before_all_else(
  server, machine, config, monkeypatch, tmp_path, where, what
):
  server.forbid(BUCKET)
  own = [] if 'workdir' in where else [f'--workdir={tmp_path / "own"}']
  before = server.objects(BUCKET)
  ended = call(monkeypatch, machine, *config, where, *own)
  assert ended.returncode == 2
  assert what in ended.stderr
  assert len(ended.stderr.splitlines()) == 3
  assert not list(tmp_path.iterdir())
  assert server.objects(BUCKET) == before


def test_a_mistake_leaves_nothing_in_the_bucket(
  server, machine, config, monkeypatch, tmp_path
):
  classes = "--config.stages[0].classes=('1','17')"
  url = f'gs://{BUCKET}/runs/mistaken'
  ended = call(monkeypatch, machine, *config, f'--workdir={url}', classes)
  assert ended.returncode == 2
  assert "no class '17'" in ended.stderr
  assert not list(tmp_path.iterdir())
  assert not [x for x in server.objects(BUCKET) if 'mistaken' in x]

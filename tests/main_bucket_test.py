"""The command line with a run in a bucket; faults_bucket_test tries it hard."""

import fake_gcs
import machines
import pytest
import runs

CONFIG = 'tests/docs_config.py'
BUCKET = 'test-bucket'
URL = f'gs://{BUCKET}/runs/a'


@pytest.fixture(scope='module')
def service():
  with fake_gcs.serve((BUCKET,)) as server:
    yield server


@pytest.fixture
def server(service):
  yield service
  service.heal()


@pytest.fixture(scope='module')
def config(data_dir):
  return f'--config={CONFIG}:{data_dir}', '--only=four'


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


def test_a_run_lies_in_its_bucket_and_is_scored_elsewhere(
  server, first, machine, monkeypatch
):
  folder = first.copy(URL)
  assert machines.objects(server, URL) == machines.contents(folder)
  best = runs.read_history(folder)['stages'][-1]['best']['top1']
  ended = call(monkeypatch, machine, '--mode=eval', f'--workdir={URL}')
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.strip() == f'{100 * best:.1f}'
  assert f'{URL}/eval/four-best.json' in ended.stderr
  assert str(machine.cache) not in ended.stderr
  assert 'eval/four-best.json' in machines.objects(server, URL)
  found = machine.copy(URL)
  assert runs.bits(found, 'four', 'best') == runs.bits(folder, 'four', 'best')
  assert not (found / 'checkpoints' / 'four' / 'latest').exists()


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

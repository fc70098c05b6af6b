"""A search on a Ray cluster: none of its trials is lost, none is done twice."""

import json
import signal

import pytest
import ray_cluster
import runs

pytest.importorskip('ray')
pytestmark = [pytest.mark.faults, pytest.mark.slow]

NUM_EPOCHS = 60


def count_epochs(trial):
  path = trial / 'training_history.json'
  found = json.loads(path.read_text())['stages'] if path.exists() else []
  return len(found[0]['epochs']) if found else 0


def wait_for_more(process, trials):
  """Waits until each of the trials has one epoch more than now."""
  before = {x: count_epochs(x) for x in trials}
  ray_cluster.wait_until(
    lambda: all(count_epochs(x) > before[x] for x in trials), process
  )


def test_trials_go_on_whatever_is_lost(data_dir, tmp_path, monkeypatch):
  cluster = ray_cluster.Cluster()
  for name in ('RAY_AUTH_MODE', 'RAY_AUTH_TOKEN'):
    monkeypatch.setenv(name, cluster.environ[name])
  command = (
    '--mode=tune',
    f'--config=tests/tune_config.py:{data_dir}',
    f'--workdir={tmp_path}',
    '--config.num_trials=4',
    f'--config.base.stages[0].num_epochs={NUM_EPOCHS}',
    '--config.engine=ray',
    f'--config.ray.address={cluster.address}',
  )
  first = [tmp_path / 'trials' / x for x in ('0000', '0001')]
  process = runs.start_main(*command)
  try:
    wait_for_more(process, first)
    host = cluster.hosts.pop()
    pids = [json.loads((x / 'run.lock').read_text())['pid'] for x in first]
    on_host = [pid in ray_cluster.list_tree(host) for pid in pids]
    assert sorted(on_host) == [False, True]
    ray_cluster.signal_tree(host, signal.SIGKILL)
    cluster.hosts.append(cluster.add_host({}))
    wait_for_more(process, [first[on_host.index(True)]])
    # The other one may have ended meanwhile: it is the search that is stopped.
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert 'its process or host died' in output
    process = runs.start_main(*command)
    wait_for_more(process, [first[on_host.index(True)]])
    process.kill()
    process.communicate()
    process = runs.start_main(*command)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
  finally:
    process.kill()
    cluster.close()
  found = json.loads((tmp_path / 'tune.json').read_text())['trials']
  assert [x['status'] for x in found] == 4 * ['complete']
  assert len({x['directory'] for x in found}) == 4
  assert len({str(x['parameters']) for x in found}) == 4
  assert len(list((tmp_path / 'trials').iterdir())) == 4
  for trial in found:
    workdir = tmp_path / 'trials' / trial['directory']
    stage = runs.read_history(workdir)['stages'][0]
    epochs = [row['epoch'] for row in stage['epochs']]
    assert epochs == [*range(1, NUM_EPOCHS + 1)]
    assert trial['top1'] == stage['best']['top1']
    rate = trial['parameters']['stages[0].learning_rate']
    assert stage['learning_rate'] == pytest.approx(rate)
  lost = runs.read_history(first[on_host.index(True)])['stages'][0]
  assert len(lost['resumed_at_steps']) >= 3

"""What loggers have of a run that was cut off once, as their readers see it."""

import contextlib
import csv
import importlib.util
import json
import struct
import sys

import pytest
import tiny_config

import jaxprog
from jaxprog.monitoring import loggers, services


class CutOffError(Exception):
  pass


def train_twice(data_dir, workdir, name):
  """Returns the history of a stage that an error ended after an epoch."""
  config = tiny_config.get_config(data_dir)
  config.loggers = (name,)
  config.log_every_steps = 1

  def cut_off(*_):
    raise CutOffError

  with pytest.raises(CutOffError):
    jaxprog.train(config, workdir, only=('three',), on_epoch=cut_off)
  history = jaxprog.train(config, workdir, only=('three',))
  return history['stages'][0]


def expected_points(stage):
  """Returns what there must be of val top-1, and each step of the loss."""
  val = [(row['global_step'], row['val_top1']) for row in stage['epochs']]
  return val, list(range(1, stage['last_step'] + 1))


def kept(workdir, name):
  return json.loads((workdir / 'loggers.json').read_text())[name]


def read_csv(workdir):
  """Returns the points of the file by tag."""
  found = {}
  for row in csv.DictReader((workdir / 'metrics.csv').open()):
    point = int(row['step']), float(row['value'])
    found.setdefault(row['tag'], []).append(point)
  return found


def test_rows_of_steps_trained_again_replace_those_of_before(tmp_path):
  with loggers.open_loggers(['csv'], tmp_path, print) as writer:
    writer.forget_after(0)
    for step in range(1, 5):
      writer.write_scalars(step, {'a b,"ü': step / 3})
  with (tmp_path / 'metrics.csv').open('a') as file:
    file.write('5,a')  # A kill has cut it.
  with loggers.open_loggers(['csv'], tmp_path, print) as writer:
    writer.forget_after(2)
    writer.write_images(2, lambda: 1 / 0)  # It draws none.
    writer.write_scalars(3, {'a b,"ü': float('nan')})
  (points,) = read_csv(tmp_path).values()
  assert points[:2] == [(1, 1 / 3), (2, 2 / 3)]
  assert [step for step, _ in points] == [1, 2, 3]


def test_a_service_that_fails_ends_no_training(tmp_path, monkeypatch):
  """Until it fails it is written to, no point twice, on from where it was."""

  class Broken:
    def __init__(self, workdir, kept):
      kept.setdefault('id', 7)

    def write_scalars(self, step, scalars):
      written.append((step, scalars))
      if 'bad' in scalars:
        raise OSError('no route')

    def close(self, finished):
      written.append(finished)

  written, noted = [], []
  monkeypatch.setitem(services.SERVICES, 'wandb', Broken)

  def write(*points):
    note = lambda *words: noted.append(words)  # noqa: E731
    with (
      contextlib.suppress(CutOffError),
      loggers.open_loggers(['wandb', 'csv'], tmp_path, note) as writer,
    ):
      for step, tag in points:
        writer.write_scalars(step, {tag: 1.0})
      raise CutOffError

  write((1, 'a'), (2, 'a'), (2, 'b'))
  expected = [(1, {'a': 1.0}), (2, {'a': 1.0}), (2, {'b': 1.0}), False]
  assert written == expected
  assert kept(tmp_path, 'wandb') == {'id': 7, 'steps': {'a': 2, 'b': 2}}
  write((2, 'a'), (3, 'b'), (4, 'bad'), (5, 'a'))
  assert written[4:] == [(3, {'b': 1.0}), (4, {'bad': 1.0})]
  assert noted == [('logger', 'wandb fails and is left out: OSError: no route')]
  assert read_csv(tmp_path)['a'][-1] == (5, 1.0)


def test_a_logger_that_is_not_installed_is_named_before_anything(
  tmp_path, monkeypatch
):
  (tmp_path / 'wandb').mkdir()  # As W&B itself makes one.
  monkeypatch.syspath_prepend(tmp_path)
  config = tiny_config.get_config(tmp_path)
  for name in services.SERVICES:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
      monkeypatch.setitem(sys.modules, name, None)
    config.loggers = ('csv', name)
    with pytest.raises(jaxprog.UserError, match=rf'jaxprog\[{name}\]'):
      jaxprog.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_the_older_switch_still_leaves_tensorboard_out(tmp_path):
  config = tiny_config.get_config(tmp_path)
  assert config.loggers == ('tensorboard',)
  assert loggers.chosen(config) == ()
  config.tensorboard = True
  assert loggers.chosen(config) == ('tensorboard',)
  config.loggers = ('csv', 'csv')
  assert loggers.chosen(config) == ('csv',)
  config.loggers = ('tensorbord',)
  with pytest.raises(jaxprog.UserError, match="mean 'tensorboard'"):
    jaxprog.train(config, tmp_path / 'run')


@pytest.mark.slow
def test_csv_has_the_run(data_dir, tmp_path):
  stage = train_twice(data_dir, tmp_path, 'csv')
  val, steps = expected_points(stage)
  found = read_csv(tmp_path)
  assert found['1 three/val_top1'] == val
  assert [step for step, _ in found['optimization/loss']] == steps
  final = stage['last_step'], stage['epochs'][-1]['val_top1']
  assert found['weights/three final top-1'] == [final]


@pytest.mark.slow
def test_wandb_has_the_run(data_dir, tmp_path, monkeypatch):
  pytest.importorskip('wandb', reason="needs 'jaxprog[wandb]'")
  monkeypatch.delenv('WANDB_MODE', raising=False)
  stage = train_twice(data_dir, tmp_path, 'wandb')
  val, steps = expected_points(stage)
  rows, config, ends = [], {}, []
  for path in sorted(tmp_path.glob('wandb/offline-run-*/*.wandb')):
    assert path.stem == f'run-{kept(tmp_path, "wandb")["id"]}'
    for record in read_wandb(path):
      for item in record.run.config.update or record.config.update:
        config[item.key] = json.loads(item.value_json)
      if record.history.item:
        rows.append(
          {
            '/'.join(x.nested_key) or x.key: json.loads(x.value_json)
            for x in record.history.item
          }
        )
      if record.HasField('exit'):
        ends.append(record.exit.exit_code)
  found = [(x['_step'], x['1 three/val_top1']) for x in rows if val_of(x)]
  assert found == val
  assert [x['_step'] for x in rows if 'optimization/loss' in x] == steps
  assert config['three.optimizer'] == 'adamw'
  assert len(config['git_commit']) in (0, 40)
  assert ends == [1, 0]
  assert list(tmp_path.glob('wandb/*/files/media/images/**/*.png'))


@pytest.mark.slow
def test_no_service_hears_of_a_dry_run(data_dir, tmp_path, monkeypatch):
  pytest.importorskip('wandb', reason="needs 'jaxprog[wandb]'")
  monkeypatch.setenv('WANDB_DIR', str(tmp_path / 'kept'))
  (tmp_path / 'kept').mkdir()
  config = tiny_config.get_config(data_dir)
  config.loggers = ('csv', 'wandb')
  jaxprog.dry_run(config, tmp_path / 'run', only=('three',))
  assert not list((tmp_path / 'kept').iterdir())


def val_of(row):
  return '1 three/val_top1' in row


def read_wandb(path):
  """Yields the records of W&B's file, by its own protocol.

  After 7 bytes, blocks of 32 KiB hold parts of records, each behind a sum, its
  length and whether it is whole, first, in between or last.
  """
  from wandb.proto import wandb_internal_pb2

  data, at, parts = path.read_bytes(), 7, b''
  while at + 7 <= len(data):
    if 32768 - at % 32768 < 7:
      at += 32768 - at % 32768
      continue
    _, length, kind = struct.unpack_from('<IHB', data, at)
    parts += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
      yield wandb_internal_pb2.Record.FromString(parts)
      parts = b''


@pytest.mark.slow
def test_mlflow_has_the_run(data_dir, tmp_path, monkeypatch):
  mlflow = pytest.importorskip('mlflow', reason="needs 'jaxprog[mlflow]'")
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
  monkeypatch.chdir(tmp_path)
  stage = train_twice(data_dir, tmp_path / 'run', 'mlflow')
  val, steps = expected_points(stage)
  client = mlflow.MlflowClient()
  (experiment,) = client.search_experiments(filter_string="name = 'jaxprog'")
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.info.run_id == kept(tmp_path / 'run', 'mlflow')['id']
  assert (run.info.run_name, run.info.status) == ('run', 'FINISHED')

  def points(tag):
    found = client.get_metric_history(run.info.run_id, tag)
    return sorted((x.step, x.value) for x in found)

  assert points('1 three/val_top1') == val
  assert [step for step, _ in points('optimization/loss')] == steps
  assert run.data.params['three.optimizer'] == 'adamw'
  final = run.data.metrics['weights/three final top-1']
  assert final == stage['epochs'][-1]['val_top1']
  names = [x.path for x in client.list_artifacts(run.info.run_id)]
  assert {'images', 'hparams.json'} <= {*names}


@pytest.mark.slow
def test_trackio_has_the_run(data_dir, tmp_path, monkeypatch):
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
  pytest.importorskip('trackio', reason="needs 'jaxprog[trackio]'")
  from trackio import sqlite_storage

  stage = train_twice(data_dir, tmp_path / 'run', 'trackio')
  val, steps = expected_points(stage)
  (name,) = sqlite_storage.SQLiteStorage.get_runs('jaxprog')
  assert name == kept(tmp_path / 'run', 'trackio')['id']
  rows = sqlite_storage.SQLiteStorage.get_logs('jaxprog', name)
  found = [(x['step'], x['1 three/val_top1']) for x in rows if val_of(x)]
  assert found == val
  assert [x['step'] for x in rows if 'optimization/loss' in x] == steps
  config = sqlite_storage.SQLiteStorage.get_run_config('jaxprog', name)
  assert config['three.optimizer'] == 'adamw'

import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import fake_gcs
import numpy as np
import pytest
from data_fixtures import read_all, write_class_folders

import jaxprog
from jaxprog import buckets, errors, stages, start_from
from jaxprog.data import (
  batches,
  loader,
  packs,
  preparation,
  remote,
  verification,
  workers,
)
from jaxprog.epochs import count_steps
from jaxprog.planning import inspection
from jaxprog.training import preflight, setup

FOLDER = 'data/prepared/imagenette_folder/1.0.0'
RECORDS = f'{FOLDER}/imagenette_folder-%s.array_record-00000-of-00001'


@pytest.fixture(scope='module')
def server():
  names = 'on-disk', 'raw-only', 'forbidden', 'shared', 'small', 'anew'
  with fake_gcs.serve(names) as server:
    workers.executor.cache_clear()  # Earlier ones know another server.
    yield server


@pytest.fixture(autouse=True)
def healed(server):
  yield
  server.heal()


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
  """A data_dir with 240 + 24 images, prepared."""
  path = tmp_path_factory.mktemp('disk')
  write_class_folders(path / 'imagenette2', train=80, val=8)
  preparation.prepare('imagenette', path)
  return path


def put(server, bucket, path, name):
  """Copies a folder to a bucket, as people do."""
  for file in path.rglob('*'):
    if file.is_file():
      key = f'{name}/{file.relative_to(path).as_posix()}'
      server.put(bucket, key, file.read_bytes())


@pytest.fixture
def bucket(server, on_disk):
  """The URL of the same data in a bucket, without the raw images."""
  server.bucket('on-disk').clear()
  put(server, 'on-disk', on_disk / 'prepared', 'data/prepared')
  server.clear()
  return 'gs://on-disk/data'


def copy(url, cache):
  return buckets.copy_of(url, cache)


def reads(server):
  """Returns the name of each object that was read, without its folder."""
  return [x.name.split('/')[-1] for x in server.requests if x.what == 'read']


def make_config(url, cache, **fields):
  config = start_from('default')
  config.data_dir, config.cache_dir = str(url), str(cache)
  stage = {'name': 'a', 'dataset': 'imagenette', 'image_size': 16}
  config.stages = [stage | fields]
  return config


def make_stage():
  (stage,) = stages.create_stages(
    make_config('data', '', batch_size=32, num_epochs=2)
  )
  return stage


def read_epochs(dataset, **workers):
  stage = make_stage()
  steps = count_steps(stage, len(dataset.train))
  reader = loader.train_batches(
    dataset.train, stage, seed=3, steps=steps, **workers
  )
  found = [{k: x.copy() for k, x in batch.items()} for batch in reader]
  reader.close()
  return found


@pytest.mark.parametrize('kind', ['thread', 'process'])
def test_batches_and_identity_are_those_of_a_disk(
  server, bucket, on_disk, tmp_path, kind
):
  there = preparation.load_dataset('imagenette', copy(bucket, tmp_path))
  here = preparation.load_dataset('imagenette', on_disk)
  assert (there.fingerprint, there.version) == (here.fingerprint, here.version)
  assert there.train.names() == here.train.names()
  # What a dataset is known by needs no images.
  assert not [x for x in reads(server) if 'array_record' in x]
  assert server.counts()['list'] == 1
  expected = read_epochs(here)
  found = read_epochs(there, num_workers=2, worker_kind=kind)
  for a, b in zip(expected, found, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  # Nothing is asked of a bucket for an epoch of what was fetched.
  server.clear()
  read_epochs(there, num_workers=2, worker_kind=kind)
  again = preparation.load_dataset('imagenette', copy(bucket, tmp_path))
  assert list(read_all(again.eval))
  assert [x for x in server.requests if x.what != 'read'] == []
  assert len(reads(server)) == 1  # The evaluation split.


READ = """
import pathlib, sys
from jaxprog.data import preparation
path = pathlib.Path(sys.argv[1])
print(len(preparation.load_dataset('imagenette', path).train[0]['image']))
"""


def test_two_processes_fetch_a_file_once(server, bucket, tmp_path):
  server.order('slow', match='array_record', seconds=1)
  command = [sys.executable, '-c', READ, copy(bucket, tmp_path)]
  running = [
    subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)
  ]
  sizes = {x.communicate(timeout=60)[0] for x in running}
  assert len(sizes) == 1
  assert sizes != {b''}
  assert reads(server).count(pathlib.Path(RECORDS % 'train').name) == 1


def prepare_another(data_dir):
  """Prepares images whose files are as large as those of the bucket."""
  write_class_folders(data_dir / 'imagenette2', ('m01', 'm02', 'm03'), 80, 8)
  preparation.prepare('imagenette', data_dir)


def test_another_dataset_in_the_bucket_replaces_the_copy(
  server, bucket, tmp_path
):
  data_dir = copy(bucket, tmp_path / 'a')
  old = preparation.load_dataset('imagenette', data_dir)
  old.train.source.fetch()
  # On another machine.
  other = copy(bucket, tmp_path / 'b')
  prepare_another(other)
  preparation.upload('imagenette', other)
  remote._brought.clear()  # As in a new process.
  new = preparation.load_dataset('imagenette', data_dir)
  assert new.classes == ('m01', 'm02', 'm03')
  # Who has begun with the old one is not given the new one's images.
  for read in old.eval.source.fetch, lambda: old.train[0]:
    with pytest.raises(errors.UserError, match='has changed since') as info:
      read()
    assert info.value.where == f'gs://on-disk/{FOLDER}'
  assert {x['file_name'][0] for x in read_all(new.train)} == {'m'}


def test_what_is_prepared_anew_stays_until_it_is_uploaded(
  server, bucket, tmp_path
):
  data_dir, classes = copy(bucket, tmp_path), ('m01', 'm02', 'm03')
  preparation.load_dataset('imagenette', data_dir).train.source.fetch()
  prepare_another(data_dir)
  remote._brought.clear()  # It has taken longer.
  # Another process looks, and the upload breaks off half-way.
  assert preparation.load_dataset('imagenette', data_dir).classes == classes
  server.order('403', what='write', match='array_record')
  with pytest.raises(errors.UserError, match='You may not do that'):
    preparation.upload('imagenette', data_dir)
  server.heal()
  remote._brought.clear()
  assert f'{FOLDER}/dataset_info.json' not in server.objects('on-disk')
  assert preparation.load_dataset('imagenette', data_dir).classes == classes
  assert preparation.upload('imagenette', data_dir)
  there = preparation.load_dataset('imagenette', copy(bucket, tmp_path / 'b'))
  assert there.classes == classes


def test_a_pack_that_is_made_anew_stays_and_is_uploaded(
  server, bucket, tmp_path, monkeypatch
):
  (stage,) = stages.create_stages(make_config('', '', storage='raw:16'))

  def load(data_dir):
    return preparation.load_dataset('imagenette', data_dir)

  data_dir, other = copy(bucket, tmp_path / 'a'), copy(bucket, tmp_path / 'b')
  with monkeypatch.context() as patch:  # As an earlier release.
    patch.setattr(packs, '_DECODING', 1)
    preparation.store(load(other), stage.stored)
    preparation.upload('imagenette', other)
  pack = preparation.store(load(data_dir), stage.stored).train.pack
  remote._brought.clear()
  assert preparation.find_pack(load(data_dir).train, stage.stored) == pack
  assert packs.is_intact(pack.path)
  assert preparation.upload('imagenette', data_dir)
  name = 'data/prepared/imagenette_folder/packed/1.0.0+raw.16/pack.json'
  info = json.loads(server.objects('on-disk')[name])
  assert info['decoding'] == packs._DECODING


def test_what_was_uploaded_and_is_gone_there_is_prepared_anew(
  server, on_disk, tmp_path, capsys
):
  data_dir, url = copy('gs://anew/data', tmp_path), 'gs://anew/data'
  put(server, 'anew', on_disk / 'imagenette2', 'data/imagenette2')
  config = make_config(url, tmp_path)
  jaxprog.prepare(config)
  # As the documentation says of raw images that have changed.
  server.bucket('anew').clear()
  write_class_folders(tmp_path / 'imagenette2', ('m01', 'm02', 'm03'))
  put(server, 'anew', tmp_path / 'imagenette2', 'data/imagenette2')
  remote._brought.clear()
  jaxprog.prepare(config)
  new = preparation.load_dataset('imagenette', data_dir)
  assert new.classes == ('m01', 'm02', 'm03')
  # What came from there has gone; what was put here stays.
  assert not (data_dir / 'imagenette2').exists()
  write_class_folders(data_dir / 'imagenette2')
  assert preparation.drop_raw('imagenette', data_dir) is None


def test_files_put_into_a_folder_by_hand_come_one_by_one(server, tmp_path):
  manual = copy('gs://anew/data/downloads/manual', tmp_path)
  server.put('anew', 'data/downloads/manual/one.tar', b'1')
  remote.fetch_files(manual)
  (manual / 'one.tar').write_text('mine')
  server.put('anew', 'data/downloads/manual/two.tar', b'2')
  remote.fetch_files(manual)
  found = [(manual / f'{x}.tar').read_text() for x in ('one', 'two')]
  assert found == ['mine', '2']


def test_no_upload_speaks_of_anothers_images(server, bucket, tmp_path):
  data_dir, name = copy(bucket, tmp_path), f'{FOLDER}/metadata.json'
  prepare_another(data_dir)
  server.order('slow', what='write', match='array_record', seconds=60)

  def interfere():
    while name not in server.objects('on-disk'):
      time.sleep(0.02)
    server.put('on-disk', name, b'{}')
    server.heal()

  server.bucket('on-disk').clear()
  thread = threading.Thread(target=interfere)
  thread.start()
  with pytest.raises(errors.UserError, match='Another machine'):
    preparation.upload('imagenette', data_dir)
  thread.join()
  assert f'{FOLDER}/dataset_info.json' not in server.objects('on-disk')
  # Nor does it replace what has come since this machine looked.
  server.put('on-disk', f'{FOLDER}/dataset_info.json', b'{}')
  with pytest.raises(errors.UserError, match='Another machine'):
    preparation.upload('imagenette', data_dir)
  remote._brought.clear()
  assert preparation.upload('imagenette', data_dir)


def test_what_the_bucket_has_no_longer_goes(server, bucket, tmp_path):
  data_dir = copy(bucket, tmp_path)
  server.put('on-disk', 'data/manifests/a.sha256', b'a')
  manifest = data_dir / 'manifests/a.sha256'
  preparation.load_dataset('imagenette', data_dir)
  remote.bring(manifest.parent, '')
  assert manifest.read_text() == 'a'
  server.bucket('on-disk').clear()
  remote._brought.clear()
  with pytest.raises(errors.UserError, match='is missing'):
    preparation.load_dataset('imagenette', data_dir)
  remote.bring(manifest.parent, '')
  assert not manifest.exists()
  # What was prepared here alone stays.
  preparation.prepare('digits', data_dir)
  remote._brought.clear()
  assert preparation.check_dataset('digits', data_dir) == 'prepared'


def test_prepare_fetches_raw_images_and_uploads_the_whole_last(
  server, on_disk, tmp_path, capsys
):
  put(server, 'raw-only', on_disk / 'imagenette2', 'data/imagenette2')
  url = 'gs://raw-only/data'
  with pytest.raises(errors.UserError) as info:
    preparation.load_dataset('imagenette', copy(url, tmp_path / 'a'))
  assert info.value.where == f'its raw images are in {url}/imagenette2'
  assert '--mode=prepare' in info.value.suggestion
  server.clear()
  # It breaks off, and goes on.
  server.order('403', what='write', match='labels-train')
  jaxprog.prepare(make_config(url, tmp_path / 'a'))
  assert 'imagenette: it is here alone. You may not' in capsys.readouterr().out
  server.heal()
  jaxprog.prepare(make_config(url, tmp_path / 'a', storage='raw:16'))
  there = server.bucket('raw-only')
  written = sorted(there, key=lambda x: there[x].generation)
  of_dataset = [x for x in written if x.startswith(FOLDER + '/')]
  assert of_dataset[-1] == f'{FOLDER}/dataset_info.json'
  assert written[-1].endswith('packed/1.0.0+raw.16/pack.json')
  assert not any('raw_folder' in x for x in written)
  shown = capsys.readouterr().out
  assert f'imagenette: uploaded to {url}/prepared' in shown
  assert f'{url}/imagenette2 stays' in ' '.join(shown.split())
  assert not (copy(url, tmp_path / 'a') / 'imagenette2').exists()
  # Another machine has it all, and what it is told of the images is the same.
  (stage,) = stages.create_stages(
    make_config(url, tmp_path / 'b', storage='raw:16')
  )
  there = preparation.load_dataset('imagenette', copy(url, tmp_path / 'b'))
  here = preparation.load_dataset('imagenette', on_disk)
  assert there.fingerprint == here.fingerprint
  server.clear()
  pack = preparation.store(there, stage.stored).train
  assert 'images.bin' not in reads(server)
  pack.stored.fetch()
  assert packs.is_intact(pack.pack.path)
  # Nor is the other one read by who has opened this one.
  with pytest.raises(errors.UserError, match='has changed since'):
    packs.Pack(pack.pack.path, 'raw', sha256='another').fetch()
  # Nothing is left to be uploaded, and nothing is written.
  jaxprog.prepare(make_config(url, tmp_path / 'b', storage='raw:16'))
  assert 'is already in' in capsys.readouterr().out
  assert 'write' not in server.counts()


def test_what_one_may_not_upload_stays_in_the_copy(
  server, on_disk, tmp_path, capsys
):
  put(server, 'forbidden', on_disk / 'imagenette2', 'data/imagenette2')
  server.forbid('forbidden')
  url = 'gs://forbidden/data'
  jaxprog.prepare(make_config(url, tmp_path))
  assert 'imagenette: it is here alone.' in capsys.readouterr().out
  dataset = preparation.load_dataset('imagenette', copy(url, tmp_path))
  assert len(list(read_all(dataset.train))) == 240


def test_what_verify_has_seen_is_held_against_other_machines(
  server, bucket, on_disk, tmp_path
):
  for name, status in ('a', 'written'), ('b', 'matches'):
    data_dir = copy(bucket, tmp_path / name)
    report = verification.verify_dataset('imagenette', data_dir)
    assert report['manifest']['status'] == status
  assert report['manifest']['path'] == f'{bucket}/manifests/imagenette.sha256'
  # To remove it there is to accept what is here.
  server.delete('on-disk', 'data/manifests/imagenette.sha256')
  remote._brought.clear()
  report = verification.verify_dataset(
    'imagenette', copy(bucket, tmp_path / 'a')
  )
  assert report['manifest']['status'] == 'written'


@pytest.mark.parametrize('damage', ['delete', 'flip'])
def test_records_that_are_lost_or_damaged_are_named(
  server, bucket, tmp_path, damage
):
  dataset = preparation.load_dataset('imagenette', copy(bucket, tmp_path))
  getattr(server, damage)('on-disk', RECORDS % 'train')
  stage = make_stage()
  todo = batches.TrainBatches(
    dataset.train, stage, seed=0, steps=count_steps(stage, 240)
  )
  with pytest.raises(errors.UserError) as info:
    batches.read_batch(todo, 0)
  assert info.value.where == f'gs://on-disk/{RECORDS % "train"}'


def test_what_has_no_md5_is_checked_too(server, bucket, tmp_path):
  # As gcloud leaves files that it has sent in parts.
  server.bucket('on-disk')[RECORDS % 'train'].sums['md5Hash'] = ''
  dataset = preparation.load_dataset('imagenette', copy(bucket, tmp_path))
  server.order('flip', what='read', match='-train.array_record')
  with pytest.raises(errors.UserError, match='not what its bucket says'):
    dataset.train.source.fetch()
  server.heal()
  dataset.train.source.fetch()
  assert len(list(read_all(dataset.train))) == 240


def test_small_files_are_compared_where_no_sums_are_told(on_disk, tmp_path):
  there = tmp_path / 'there'
  shutil.copytree(on_disk / 'prepared', there / 'prepared')
  data_dir = copy(f'file://{there}', tmp_path / 'cache')
  preparation.load_dataset('imagenette', data_dir)
  # The same counts of other images, whose files are as large.
  shutil.rmtree(there / 'prepared')
  prepare_another(there)
  remote._brought.clear()
  new = preparation.load_dataset('imagenette', data_dir)
  assert new.classes == ('m01', 'm02', 'm03')
  assert {x['file_name'][0] for x in read_all(new.train)} == {'m'}


def test_a_name_does_not_lead_out_of_the_copy(server, bucket, tmp_path):
  server.put('on-disk', 'data/prepared/imagenette_folder/../../../../x', b'x')
  server.put('on-disk', f'data/imagenette2/{tmp_path}/x', b'x')
  data_dir = copy(bucket, tmp_path / 'a/b')
  preparation.load_dataset('imagenette', data_dir)
  remote.fetch_folder(data_dir / 'imagenette2')
  assert not list(tmp_path.rglob('x'))


def test_what_cannot_be_looked_for_is_not_absent(server, bucket, tmp_path):
  config = make_config(bucket, tmp_path)
  other = {'name': 'b', 'dataset': 'imagenet_mini', 'image_size': 16}
  config.stages = [*config.stages, other]
  dataset = preparation.load_dataset('imagenette', copy(bucket, tmp_path))
  server.order('403', what='list')
  all_stages = stages.create_stages(config)
  with pytest.raises(errors.UserError, match='You may not do that'):
    setup._exclude_leaks(config, all_stages, {'a': dataset})


def test_what_is_wrong_with_a_bucket_names_the_field(server, tmp_path):
  with pytest.raises(errors.UserError) as info:
    preparation.find_prepared('digits', copy('gs://typo/data', tmp_path))
  assert str(info.value).splitlines() == [
    "There is no bucket 'typo'.",
    'config.data_dir=gs://typo/data',
    'Create it first, or mend its name.',
  ]
  with pytest.raises(errors.UserError, match='gs://shared/data/imagenette2,'):
    preparation.check_dataset('imagenette', copy('gs://shared/data', tmp_path))
  server.forbid('shared', 'read')
  with pytest.raises(errors.UserError, match='You may not do that') as info:
    preparation.find_prepared(
      'digits', copy('gs://shared/data', tmp_path / 'b')
    )
  assert info.value.where == 'config.data_dir=gs://shared/data'


def test_without_room_records_are_read_in_the_bucket(
  server, bucket, on_disk, small_disk, capsys
):
  there = preparation.load_dataset('imagenette', copy(bucket, small_disk))
  here = preparation.load_dataset('imagenette', on_disk)
  there.train.source.fetch()
  shown = capsys.readouterr().err
  assert 'no room' in shown
  assert 'read from the bucket, which is slower' in shown
  for a, b in zip(
    read_epochs(here),
    read_epochs(there, num_workers=2, worker_kind='process'),
    strict=True,
  ):
    np.testing.assert_array_equal(a['image'], b['image'])
  assert not list(small_disk.rglob('*.array_record*'))
  # A pack that is here needs no room, whatever is read beside it.
  (stage,) = stages.create_stages(make_config('', '', storage='raw:16'))
  train = preparation.store(there, stage.stored).train
  config = make_config(bucket, small_disk)
  images = {*train.pack.paths, *train.source.paths}
  assert preflight.to_fetch(config, images, None, 0)[1]
  # A missing object is as empty as a missing file to what reads it.
  server.delete('on-disk', RECORDS % 'validation')
  with pytest.raises(errors.UserError, match=RECORDS % 'validation'):
    there.eval[0]


def test_without_room_other_files_are_three_lines(
  server, on_disk, small_disk, tmp_path
):
  preparation.prepare('imagenette', on_disk)
  dataset = preparation.load_dataset('imagenette', on_disk)
  (stage,) = stages.create_stages(make_config('', '', storage='raw:16'))
  preparation.store(dataset, stage.stored)
  put(server, 'small', on_disk / 'prepared', 'data/prepared')
  url = 'gs://small/data'
  there = preparation.load_dataset('imagenette', copy(url, small_disk))
  pack = preparation.store(there, stage.stored).train.pack
  with pytest.raises(errors.UserError, match='have no room here') as info:
    pack.fetch()
  assert 'config.cache_dir' in info.value.suggestion
  # What no reader of ArrayRecord knows must come, too.
  url = f'file://{on_disk}'
  there = preparation.load_dataset('imagenette', copy(url, small_disk))
  with pytest.raises(errors.UserError, match='have no room here'):
    there.train.source.fetch()


def test_check_counts_what_is_to_come(bucket, on_disk, small_disk, tmp_path):
  def find(url, cache):
    config = make_config(url, cache, batch_size=8)
    config.update(model='resnet10', num_filters=4)
    found = inspection.inspect(config).findings
    return [x for x in found if x.what.startswith('data: ')]

  (fits,) = find(bucket, tmp_path)
  assert fits.ok
  assert f'data: 524 kB to be fetched from {bucket}, ' in fits.what
  (direct,) = find(bucket, small_disk)
  assert direct.ok
  assert direct.what.endswith('is read there, which is slower')
  (too_large,) = find(f'file://{on_disk}', small_disk)
  assert not too_large.ok
  assert '--config.cache_dir' in too_large.fix
  # Nothing is said of what is here.
  assert not find(on_disk, tmp_path)


def test_a_folder_of_a_bucket_is_a_dataset(
  server, on_disk, tmp_path, monkeypatch
):
  put(server, 'shared', on_disk / 'imagenette2', 'photos')
  monkeypatch.setenv('JAXPROG_CACHE_DIR', str(tmp_path / 'cache'))
  name = 'folder:gs://shared/photos'
  with pytest.raises(errors.UserError, match='is not prepared'):
    preparation.load_dataset(name, tmp_path / 'data')
  jaxprog.prepare(make_config(tmp_path / 'data', '', dataset=name))
  first = preparation.load_dataset(name, tmp_path / 'data')
  assert len(first.train) == 240
  # It is the same wherever it is kept.
  monkeypatch.setenv('JAXPROG_CACHE_DIR', str(tmp_path / 'other'))
  again = preparation.load_dataset(name, tmp_path / 'data')
  assert again.fingerprint == first.fingerprint


@pytest.mark.slow
def test_a_run_prepares_uploads_and_fetches_ahead(server, run_main, tmp_path):
  server.bucket('shared').clear()
  flags = (
    '--config=tests/tiny_config.py:gs://shared/data',
    f'--config.cache_dir={tmp_path}/cache',
  )
  done = run_main(*flags, f'--workdir={tmp_path}/run')
  assert done.returncode == 0, done.stderr
  assert 'data/prepared/scikit_learn_digits/1.0.0/dataset_info.json' in (
    server.objects('shared')
  )
  # From a bucket that may only be read, on an empty machine, the same run.
  server.forbid('shared')
  server.clear()
  flags = flags[0], f'--config.cache_dir={tmp_path}/other'
  again = run_main(*flags, f'--workdir={tmp_path}/again')
  assert (again.returncode, 'Forbidden' in again.stderr) == (0, False)
  assert not [x for x in server.requests if x.status >= 400]
  losses = [
    [
      row['train_loss']
      for stage in json.loads(
        (tmp_path / run / 'training_history.json').read_text()
      )['stages']
      for row in stage['epochs']
    ]
    for run in ('run', 'again')
  ]
  assert losses[0] == losses[1]

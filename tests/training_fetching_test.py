import threading

import fake_gcs
import pytest
import runs
from data_fixtures import write_class_folders

from jaxprog import buckets, start_from
from jaxprog.data import preparation
from jaxprog.training import fetching


@pytest.fixture(scope='module')
def server():
  with fake_gcs.serve() as server:
    yield server


def records(folder, name):
  """Returns which splits of a dataset have come."""
  found = folder.glob(f'prepared/{name}_folder/1.0.0/[!.]*.array_record-0*')
  return {x.name.split('-')[1].partition('.')[0] for x in found}


def test_later_stages_images_come_while_the_first_one_trains(server, tmp_path):
  names = {'imagenette': 'imagenette2', 'imagenet_mini': 'imagenet-mini'}
  config = start_from('default')
  config.data_dir = 'gs://test-bucket/data'
  for name, folder in names.items():
    write_class_folders(tmp_path / folder)
    preparation.prepare(name, tmp_path)
  bucket = buckets.Bucket(config.data_dir)
  for file in tmp_path.glob('prepared/*/*/[!.]*'):
    bucket.upload(file, file.relative_to(tmp_path).as_posix())
  config.cache_dir = str(tmp_path / 'cache')
  copy = buckets.copy_of(config.data_dir, tmp_path / 'cache')
  datasets = [preparation.load_dataset(name, copy) for name in names]
  # What this machine alone has goes to the bucket meanwhile.
  extra = copy / 'prepared/imagenette_folder/1.0.0/matches-0123.json'
  extra.write_text('[]')
  fetcher = fetching.Fetcher(config, datasets)
  server.order('slow', match='imagenet_mini', what='read', seconds=60)
  fetcher.fetch(0)
  both = {'train', 'validation'}
  assert records(copy, 'imagenette') == both
  assert records(copy, 'imagenet_mini') == set()
  server.heal()
  runs.wait_for(lambda: records(copy, 'imagenet_mini') == both)
  key = f'data/prepared/imagenette_folder/1.0.0/{extra.name}'
  runs.wait_for(lambda: key in server.objects('test-bucket'))
  fetcher.close()
  runs.wait_for(
    lambda: 'fetcher' not in {x.name for x in threading.enumerate()}
  )

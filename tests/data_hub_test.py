import importlib
import json
import os
import subprocess
import sys

import hub_server
import pytest
from data_sources_test import check_records, write_hub

from jaxprog.data import preparation

pytest.importorskip('huggingface_hub')
constants = importlib.import_module('huggingface_hub.constants')
# As `prepare` does it, with the client's own settings, which it reads once.
SCRIPT = """
import json, pathlib, sys
from jaxprog import errors
from jaxprog.data import preparation

said = []
for dataset in sys.argv[2:]:
  try:
    preparation.fetch_raw(dataset, pathlib.Path(sys.argv[1]))
    preparation.prepare(dataset, sys.argv[1])
  except errors.UserError as e:
    said.append(str(e))
print(json.dumps(said))
"""


def prepare(data_dir, *datasets, **variables):
  """Prepares datasets in a process of its own; returns what was refused."""
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, data_dir, *datasets],
    env=os.environ | {'HF_TOKEN': ''} | variables,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def fetched(tmp_path_factory):
  """Returns a folder with a cache, and what the Hub was asked for."""
  root = tmp_path_factory.mktemp('hub')
  hub = hub_server.Hub(root / 'hub')
  for name in ('pets', 'more/small', 'more/large'):
    write_hub(hub.folder / 'datasets' / 'jaxprog' / name)
  with hub.running():
    said = prepare(
      root / 'data',
      'hf:jaxprog/pets',
      'hf:jaxprog/more/small',
      'hf:jaxprog/none',
      HF_ENDPOINT=hub.url,
      HF_HOME=str(root / 'home'),
    )
  return root, hub.requests, said


def test_a_dataset_comes_by_the_hubs_client(fetched):
  root, requests, (said,) = fetched
  for name in ('pets', 'more/small'):
    dataset = preparation.load_dataset(f'hf:jaxprog/{name}', root / 'data')
    check_records(dataset)
  gets = [y for x, y in requests if x == 'GET' and '/resolve/' in y]
  assert len(gets) == len(set(gets)) == 6
  assert not any('large' in x for x in gets)
  assert 'Repository Not Found' in said
  assert len(said.split('\n')) == 3


def test_its_cache_serves_where_there_is_no_network(fetched, monkeypatch):
  root, _, _ = fetched
  said = prepare(
    root / 'offline',
    'hf:jaxprog/pets',
    'hf:jaxprog/none',
    HF_HUB_OFFLINE='1',
    HF_HOME=str(root / 'home'),
  )
  check_records(preparation.load_dataset('hf:jaxprog/pets', root / 'offline'))
  assert len(said) == 1
  assert 'hf:jaxprog/none' in said[0]
  # What is prepared stays, whatever becomes of the cache.
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(root / 'home/hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  known = preparation.list_raw('hf:jaxprog/pets', root)
  (first,) = (root / 'home').rglob('datasets--jaxprog--pets/**/train-00000*')
  (other,) = first.parent.glob('train-00001*')
  other.unlink()
  other.symlink_to(first.resolve())
  changed = preparation.list_raw('hf:jaxprog/pets', root)
  assert changed.fingerprint != known.fingerprint
  preparation.prepare('hf:jaxprog/pets', root / 'offline')
  check_records(preparation.load_dataset('hf:jaxprog/pets', root / 'offline'))


@pytest.mark.slow
def test_what_the_hub_has_made_parquet_of_comes_too(tmp_path):
  hub = hub_server.Hub(tmp_path / 'hub', branch='refs/convert/parquet')
  write_hub(hub.folder / 'datasets/jaxprog/pets')
  home = {'HF_HOME': str(tmp_path / 'home')}
  with hub.running():
    variables = {'HF_ENDPOINT': hub.url} | home
    assert not prepare(tmp_path / 'data', 'hf:jaxprog/pets', **variables)
  assert not prepare(
    tmp_path / 'offline', 'hf:jaxprog/pets', HF_HUB_OFFLINE='1', **home
  )
  for name in ('data', 'offline'):
    check_records(preparation.load_dataset('hf:jaxprog/pets', tmp_path / name))

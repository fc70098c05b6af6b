"""Weights by name: the hub's own client, a hub on this machine, its cache."""

import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys

import hub_server
import networks
import numpy as np
import parity
import pytest
import runs
import safetensors.numpy
import tiny_config

from jaxprog import errors, stages
from jaxprog.models import interchange
from jaxprog.training.transfer import pretrained

huggingface_hub = pytest.importorskip('huggingface_hub', reason=parity.REASON)
constants = importlib.import_module('huggingface_hub.constants')

# The client reads its environment when it is imported.
FETCH = """
import json, sys
from jaxprog import errors, stages
from jaxprog.data import hub
for name in sys.argv[1:]:
  stage = stages.Stage(init_from=name)
  try:
    path, config, licence = hub.fetch_file(stage.hub_file, 'here')
    print(json.dumps([str(path), config, licence]))
  except errors.UserError as e:
    print(json.dumps(str(e)))
"""
CARD = b'---\nlicense: apache-2.0\ntags:\n- timm\n---\n# A network\n'


@pytest.fixture
def hub(tmp_path):
  """A hub with timm's tiny network 'a', whose card has a licence."""
  hub = hub_server.Hub(tmp_path / 'hub')
  folder = hub.folder / 'timm' / 'a'
  folder.mkdir(parents=True)
  variables = networks.draw(networks.shapes())
  safetensors.numpy.save_file(
    interchange.to_state_dict(variables), folder / 'model.safetensors'
  )
  config = {
    'architecture': 'resnet10',
    'num_classes': 3,
    'pretrained_cfg': {
      'mean': [0.485, 0.456, 0.406],
      'std': [0.229, 0.224, 0.225],
    },
  }
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'README.md').write_bytes(CARD)
  return hub


def fetch(hub, *names, **variables):
  """Returns what comes of each name: path, config and licence, or a text."""
  home = hub.folder.parent / 'home'
  environment = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(home)}
  result = subprocess.run(
    [sys.executable, '-c', FETCH, *names],
    cwd=runs.ROOT,
    env={**environment, **variables},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  return [json.loads(line) for line in result.stdout.splitlines()]


def test_names_are_those_of_timm_and_of_the_hub():
  def place(name):
    return tuple(stages.Stage(init_from=name).hub_file or ())

  published = 'timm/resnet50.a1_in1k', 'model.safetensors'
  assert place('timm:resnet50.a1_in1k') == published
  assert place('hf:timm/resnet50.a1_in1k') == published
  assert place('hf:me/w/of/b.safetensors') == ('me/w', 'of/b.safetensors')
  assert place('of/b.safetensors') == ()


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('timm:', 'names no file of the hub'),
    ('timm:me/resnet50', 'names no file of the hub'),
    ('hf:resnet50', 'names no file of the hub'),
    ('hf:me/w/pytorch_model.bin', 'can run any code'),
    ('hf:me/w/flax_model.msgpack', r'must be a \.safetensors file'),
  ],
)
def test_other_names_are_refused(name, expected):
  config = tiny_config.get_config()
  config.stages[0]['init_from'] = name
  with pytest.raises(errors.UserError, match=expected) as e:
    stages.create_stages(config)
  assert len(str(e.value).splitlines()) <= 3


def test_a_file_comes_once_and_then_from_the_cache_without_a_network(hub):
  with hub.running():
    ((path, config, licence),) = fetch(hub, 'timm:a')
    (again,) = fetch(hub, 'hf:timm/a/model.safetensors')
  sent = (hub.folder / 'timm' / 'a' / 'model.safetensors').read_bytes()
  assert pathlib.Path(path).read_bytes() == sent
  assert config['architecture'] == 'resnet10'
  assert licence == 'apache-2.0'
  assert again == [path, config, licence]
  bodies = [x for x in hub.requests if x[0] == 'GET' and 'content' in x[1]]
  assert len(bodies) == 1
  known = [path, config, licence]
  # Nobody answers any more; or nobody may be asked.
  assert fetch(hub, 'timm:a') == [known]
  assert fetch(hub, 'timm:a', HF_HUB_OFFLINE='1') == [known]


def test_what_cannot_be_had_is_said_in_three_lines(hub):
  with hub.running():
    found = fetch(hub, 'timm:b', 'hf:timm/a/other.safetensors')
  found += fetch(hub, 'timm:a', HF_HUB_OFFLINE='1')
  for text, name in zip(found, ('b', 'a', 'a'), strict=True):
    what, where, suggestion = text.splitlines()
    assert f'of timm/{name} cannot be fetched: ' in what
    assert where == 'here'
    assert f'hf download timm/{name} ' in suggestion
  assert 'Repository Not Found' in found[0]
  assert '404' in found[1]


def test_without_the_client_it_is_said_how_to_have_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(errors.UserError, match='not installed') as e:
    load()
  assert e.value.suggestion == "pip install 'jaxprog[hub]'"


@pytest.mark.slow
def test_without_a_network_the_client_gives_up_in_three_lines(hub):
  with hub.running():
    pass
  (text,) = fetch(hub, 'timm:a')
  assert len(text.splitlines()) == 3
  assert 'cannot be fetched: ' in text


def test_sizes_and_sums_are_checked(hub):
  data = (hub.folder / 'timm' / 'a' / 'model.safetensors').read_bytes()
  digest = hashlib.sha256(data).hexdigest()
  with hub.running():
    hub.content[digest] = data[:-1]
    (short,) = fetch(hub, 'timm:a')
    hub.content[digest] = data[:-1] + bytes([data[-1] ^ 1])
    wrong, still = fetch(hub, 'timm:a', 'timm:a')
    hub.content[digest] = data
    blob = pathlib.Path(still.rpartition('Delete ')[2].partition(', and')[0])
    assert blob.name == digest
    blob.unlink()
    ((path, _, _),) = fetch(hub, 'timm:a')
  assert 'cannot be fetched' in short
  assert still == wrong
  assert 'is not what the hub has: its SHA-256 is' in wrong
  assert len(wrong.splitlines()) == 3
  assert pathlib.Path(path).read_bytes() == data


def go_offline(hub, monkeypatch):
  """Lets this process have what the hub has now, from its cache alone."""
  cache = str(hub.folder.parent / 'cache')
  with hub.running():
    for path in (hub.folder / 'timm' / 'a').iterdir():
      huggingface_hub.hf_hub_download(
        'timm/a', path.name, endpoint=hub.url, cache_dir=cache
      )
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', cache)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)


def load(like=None, **fields):
  config = tiny_config.get_config()
  config.update(fields)
  config.stages[0]['init_from'] = 'timm:a'
  stage = stages.create_stages(config)[0]
  return pretrained.load(stage, like or networks.shapes(), 'abc', config)


def test_the_weights_are_those_of_the_file(hub, monkeypatch):
  go_offline(hub, monkeypatch)
  found = load()
  expected = networks.draw(networks.shapes())
  networks.assert_same_bits(
    found.variables['params']['stem_conv'], expected['params']['stem_conv']
  )
  assert found.licence == 'apache-2.0'


def test_a_network_as_timm_saves_it_comes_bit_for_bit(hub, monkeypatch):
  timm = parity.import_module('timm')
  peer = timm.create_model('resnet18.a1_in1k', pretrained=False)
  folder = hub.folder / 'timm' / 'a'
  timm.models._hub.save_for_hf(peer, folder, safe_serialization=True)
  go_offline(hub, monkeypatch)
  network = {'model': 'resnet18', 'num_filters': 64, 'stem_kernel': 7}
  like = networks.shapes(
    'resnet18', num_filters=64, stem_kernel=7, num_classes=1000
  )
  found = interchange.to_state_dict(load(like, **network).variables)
  for name, tensor in peer.state_dict().items():
    np.testing.assert_array_equal(found[name], tensor.numpy(), name)


@pytest.mark.parametrize(
  ('changes', 'fields', 'expected'),
  [
    # Its names and shapes are those of resnet10, its logits are not.
    ({'architecture': 'resnetaa10'}, {}, 'model resnetaa10 .config: resnet10'),
    ({'model_args': {'aa_layer': 'blur'}}, {}, 'resnet10 with other aa_layer'),
    ({'model_args': {'drop_rate': 0.1}}, {}, ''),
    ({}, {'mean_rgb': (0.5, 0.5, 0.5)}, r'mean_rgb \[0.485, 0.456, 0.406\] '),
    (None, {}, 'Without config.json of timm/a nobody knows'),
  ],
)
def test_a_network_that_only_looks_alike_is_refused(
  hub, monkeypatch, changes, fields, expected
):
  path = hub.folder / 'timm' / 'a' / 'config.json'
  if changes is None:
    path.unlink()
  else:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  go_offline(hub, monkeypatch)
  if not expected:
    load(**fields)
    return
  with pytest.raises(errors.UserError, match=expected) as e:
    load(**fields)
  assert len(str(e.value).splitlines()) == 3


def test_a_run_says_what_the_weights_may_be_used_for(
  hub, monkeypatch, data_dir, tmp_path
):
  go_offline(hub, monkeypatch)
  result = runs.call_main(
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={tmp_path / "run"}',
    '--only=three',
    '--config.stages[0].init_from=timm:a',
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert 'from timm:a, fresh head, licence apache-2.0' in result.stdout
  (record,) = runs.read_history(tmp_path / 'run')['stages']
  assert record['transfer']['from'] == 'timm:a'
  assert record['transfer']['licence'] == 'apache-2.0'

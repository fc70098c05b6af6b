"""What is exported is what was trained, in other programs too."""

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import hub_server
import jax
import networks
import numpy as np
import parity
import pytest
import runs
import safetensors
import safetensors.numpy
import tiny_config

from jaxprog import errors, stages
from jaxprog.models import interchange
from jaxprog.reliability import checkpoints
from jaxprog.tools import export
from jaxprog.training import hub_folder, setup
from jaxprog.training import trained as trained_lib
from jaxprog.training.transfer import pretrained

# A process that knows nothing of this program.
SERVE = """
import sys, pathlib, jax.export, numpy as np
data = pathlib.Path(sys.argv[1]).read_bytes()
serve = jax.export.deserialize(bytearray(data))
images = np.load(sys.argv[2])
np.save(sys.argv[3], serve.call(images))
np.save(sys.argv[4], serve.call(images[:2]))
assert not [name for name in sys.modules if name.startswith('jaxprog')]
print(*serve.platforms)
"""


@pytest.fixture(scope='module')
def exported(data_dir, tmp_path_factory):
  """The workdir of a run that was exported, and what was said of it."""
  workdir = tmp_path_factory.mktemp('exported')
  result = runs.call_main(
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={workdir}',
    '--only=three',
  )
  assert result.returncode == 0, result.stderr
  result = runs.call_main('--mode=export', f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  return workdir, result


@pytest.fixture(scope='module')
def weights(exported):
  return checkpoints.load_weights(exported[0], 'three', 'best')


def list_files(folder):
  """Returns path within `folder` -> content."""
  found = [path for path in folder.rglob('*') if path.is_file()]
  return {str(x.relative_to(folder)): x.read_bytes() for x in found}


def create(variables, **fields):
  """Returns `variables` as if stage 'three' had trained them."""
  config = tiny_config.get_config()
  config.update({k: v for k, v in fields.items() if k in config})
  stage = stages.create_stages(config)[0]
  size = fields.get('image_size', 8)
  num_classes = variables['params']['head']['bias'].size
  row = {'epoch': 3, 'val_top1': 0.5, 'val_top5': 0.75}
  return trained_lib.Trained(
    config=config,
    stage=dataclasses.replace(stage, image_size=size),
    weights='best',
    variables=variables,
    meta={'classes': [f'n{i}' for i in range(num_classes)], 'epoch': row},
    model_fn=setup.create_model_fn(config),
  )


def test_the_command_line_writes_four_files_and_a_folder(exported):
  workdir, result = exported
  found = list_files(workdir / 'export')
  assert sorted(found) == [
    'three.labels.txt',
    'three.md',
    'three.safetensors',
    'three.stablehlo',
    'three/README.md',
    'three/config.json',
    'three/model.safetensors',
  ]
  assert found['three/model.safetensors'] == found['three.safetensors']
  lines = result.stdout.splitlines()
  assert len(lines) == 2
  assert all('read back, logits differ by' in line for line in lines)
  assert '0.0e+00' in lines[0]
  labels = (workdir / 'export' / 'three.labels.txt').read_text()
  assert labels == '1\t1\n3\t3\n5\t5\n'


def test_the_file_holds_the_best_weights_bit_for_bit(exported, weights):
  path = exported[0] / 'export' / 'three.safetensors'
  found = safetensors.numpy.load_file(path)
  networks.assert_same_bits(found, interchange.to_state_dict(weights[0]))


def test_a_temperature_is_told_and_changes_nothing_else(weights):
  plain = create(weights[0])
  fitted = dataclasses.replace(plain, temperature=1.25)
  headers = [export._describe_file(x) for x in (plain, fitted)]
  assert headers[1] == {**headers[0], 'temperature': '1.25'}
  assert 'softmax of the logits over 1.25' in export._write_card(fitted)
  assert 'temperature' not in export._write_card(plain)


def test_the_header_says_how_to_use_them(exported, weights):
  path = exported[0] / 'export' / 'three.safetensors'
  with safetensors.safe_open(path, 'numpy') as file:
    header = file.metadata()
  assert header['format'] == 'pt'
  assert header['model'] == 'resnet10'
  assert json.loads(header['classes']) == ['1', '3', '5']
  assert json.loads(header['mean']) == [0.485, 0.456, 0.406]
  assert json.loads(header['std']) == [0.229, 0.224, 0.225]
  assert json.loads(header['image_size']) == 8
  assert json.loads(header['top1']) == weights[1]['epoch']['val_top1']
  history = json.loads((exported[0] / 'training_history.json').read_text())
  assert header['config_hash'] == history['config_hash']


def test_the_card_has_the_accuracy_and_the_number_of_images(exported, weights):
  text = (exported[0] / 'export' / 'three.md').read_text()
  row = weights[1]['epoch']
  record = checkpoints.read_done(exported[0], 'three')['record']
  count = record['num_eval_images']
  assert (
    f'Top-1 {row["val_top1"]:.1%}, top-5 {row["val_top5"]:.1%} of {count} '
    'validation images, one centre crop of 8 px each.'
  ) in text
  assert f'{record["num_train_images"]:,} images of `digits`' in text
  assert 'minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)' in text
  assert '`three.labels.txt`' in text


def test_another_config_does_not_change_what_the_run_was(
  exported, data_dir, tmp_path
):
  workdir = shutil.copytree(exported[0], tmp_path / 'run')
  export = workdir / 'export'
  header, card = read_header(export), (export / 'three.md').read_text()
  assert 'epochs: 2; batches of 48, 8 px; adamw' in card
  other = (
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={workdir}',
    '--config.stages[0].num_epochs=90',
    '--config.stages[0].optimizer=sgd_momentum',
    '--config.stages[0].schedule=constant',
    '--config.stages[0].learning_rate=9',
    '--config.stages[0].batch_size=24',
    '--config.stages[0].dataset=imagenet2012',
    '--config.stages[0].eval_split=holdout:2%',
  )
  result = runs.call_main('--mode=export', *other)
  assert result.returncode == 0, result.stderr
  assert (export / 'three.md').read_text() == card
  assert read_header(export) == header
  result = runs.call_main('--mode=eval', *other)
  assert result.returncode == 0, result.stderr
  scored = json.loads((workdir / 'eval' / 'three-best.json').read_text())
  assert scored['dataset'] == 'digits'
  assert scored['config_hash'] == header['config_hash']
  assert scored['top1'] == json.loads(header['top1'])
  result = runs.call_main('--mode=export', *other, '--config.num_filters=8')
  assert result.returncode == 2
  assert 'trained with num_filters 4 (config: 8)' in result.stderr
  assert len(result.stderr.strip().splitlines()) == 3


def test_a_score_of_other_images_is_not_passed_off(exported, tmp_path):
  workdir = shutil.copytree(exported[0], tmp_path / 'run')
  result = runs.call_main(
    '--mode=export',
    f'--workdir={workdir}',
    '--config.stages[0].eval_image_size=16',
  )
  assert result.returncode == 0, result.stderr
  header = read_header(workdir / 'export')
  assert (header['image_size'], header['top1']) == ('16', 'null')
  card = (workdir / 'export' / 'three.md').read_text()
  assert 'one centre crop of 8 px each' in card


def read_header(folder):
  with safetensors.safe_open(folder / 'three.safetensors', 'numpy') as file:
    return file.metadata()


def test_a_process_with_jax_alone_serves_the_same_logits(
  exported, weights, tmp_path
):
  images = np.random.default_rng(3).integers(0, 256, (5, 8, 8, 3), np.uint8)
  np.save(tmp_path / 'images.npy', images)
  outputs = [tmp_path / 'five.npy', tmp_path / 'two.npy']
  path = exported[0] / 'export' / 'three.stablehlo'
  command = [sys.executable, '-c', SERVE, path, tmp_path / 'images.npy']
  result = subprocess.run(
    [*map(str, command), *map(str, outputs)],
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.split() == ['cpu', 'cuda', 'tpu']
  model = setup.create_model_fn(tiny_config.get_config())(
    num_classes=3, image_size=8
  )
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  x = ((images / 255 - mean) / std).astype(np.float32)
  expected = model.apply(weights[0], x, train=False)
  five, two = (np.load(path) for path in outputs)
  assert five.dtype == np.float32
  np.testing.assert_allclose(five, expected, atol=1e-4, rtol=0)
  np.testing.assert_allclose(two, expected[:2], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
  ('model', 'image_size', 'stem_kernel', 'adapted'),
  [
    ('resnet18', 128, 7, ''),
    ('resnet18', 64, 7, 'trained below 128 px'),
    ('resnet10', 16, 3, 'no resnet10 by name and the first convolution is 3x3'),
  ],
)
def test_the_lines_of_the_card_load_it_in_timm(
  model, image_size, stem_kernel, adapted, tmp_path, monkeypatch
):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  parity.import_module('timm')
  fields = {
    'model': model,
    'num_filters': 64,
    'stem_kernel': stem_kernel,
    'image_size': image_size,
  }
  like = networks.shapes(
    model, num_filters=64, stem_kernel=stem_kernel, num_classes=7
  )
  trained = create(networks.draw(like), **fields)
  text = export.describe_timm(trained)
  assert adapted in text
  assert ('adaptation' in text) == bool(adapted)
  state_dict = interchange.to_state_dict(trained.variables)
  safetensors.numpy.save_file(state_dict, tmp_path / 'three.safetensors')
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(text.split('```')[1].removeprefix('python'), names)
  images = export._random_images(trained)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  x = ((images / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
  with torch.no_grad():
    expected = names['model'].eval()(torch.from_numpy(x.copy())).numpy()
  assert expected.std() > 0.1
  found = export.create_apply(trained)(trained.variables, images)
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_timm_creates_the_network_of_the_folder_with_the_same_logits(tmp_path):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  timm = parity.import_module('timm')
  network = {'num_filters': 64, 'stem_kernel': 7}
  like = networks.shapes('resnet18', num_classes=7, **network)
  trained = create(
    networks.draw(like), model='resnet18', image_size=128, **network
  )
  found = export.create_apply(trained)
  assert export._is_timms(trained)
  # Of other images than ours are by default.
  stage = dataclasses.replace(trained.stage, eval_crop=0.95)
  config = trained.config.copy_and_resolve_references()
  config.std_rgb = 0.25, 0.25, 0.25
  hub_folder.write(
    tmp_path,
    dataclasses.replace(trained, stage=stage, config=config),
    safetensors.numpy.save(interchange.to_state_dict(trained.variables)),
    card='',
    scores={},
    timms=True,
  )
  peer = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
  inputs = timm.data.resolve_model_data_config(peer)
  assert tuple(inputs['input_size']) == (3, 128, 128)
  assert inputs['interpolation'] == 'bilinear'
  # 134.7 px, which we round and timm rounds down.
  assert int(128 / inputs['crop_pct']) == 135
  assert tuple(inputs['mean']) == config.mean_rgb
  assert tuple(inputs['std']) == config.std_rgb
  assert peer.pretrained_cfg['label_names'] == [f'n{i}' for i in range(7)]
  images = export._random_images(trained)
  mean, std = trained.config.mean_rgb, trained.config.std_rgb
  x = ((images / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
  with torch.no_grad():
    expected = peer(torch.from_numpy(x.copy())).numpy()
  assert expected.std() > 0.1
  np.testing.assert_allclose(
    found(trained.variables, images), expected, atol=1e-4, rtol=0
  )


def test_timm_refuses_a_folder_of_what_it_would_build_otherwise(exported):
  folder = exported[0] / 'export' / 'three'
  assert 'architecture' not in json.loads((folder / 'config.json').read_text())
  assert 'timm cannot load it' in (folder / 'README.md').read_text()
  timm = parity.import_module('timm')
  with pytest.raises(KeyError, match='architecture'):
    timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_timms_crop_has_the_size_of_ours():
  stage = stages.create_stages(tiny_config.get_config())[0]
  for size in range(8, 400):
    for crop in (0.7, 0.875, 0.9, 0.95, 1.0):
      stage = dataclasses.replace(stage, eval_image_size=size, eval_crop=crop)
      theirs = hub_folder._describe_crop(stage)
      assert int(size / theirs) == round(size / crop)
      assert theirs == pytest.approx(crop, abs=1 / size)


def test_the_hubs_client_reads_scores_and_data_off_the_card(exported, weights):
  huggingface_hub = pytest.importorskip('huggingface_hub', reason=parity.REASON)
  card = huggingface_hub.ModelCard.load(
    exported[0] / 'export' / 'three' / 'README.md'
  )
  assert card.data.pipeline_tag == 'image-classification'
  row = weights[1]['epoch']
  scores = {x.metric_name: x.metric_value for x in card.data.eval_results}
  assert scores == {'top-1': row['val_top1'], 'top-5': row['val_top5']}
  (dataset,) = {x.dataset_name for x in card.data.eval_results}
  assert dataset == 'digits'
  assert card.text.lstrip().startswith('# three: resnet10, 3 classes')
  # What the client writes again says the same.
  again = huggingface_hub.ModelCard(str(card))
  assert again.data.to_dict() == card.data.to_dict()


def test_the_folder_goes_up_as_it_is_and_comes_down_as_weights(
  exported, tmp_path, monkeypatch
):
  huggingface_hub = pytest.importorskip('huggingface_hub', reason=parity.REASON)
  constants = importlib.import_module('huggingface_hub.constants')
  hub = hub_server.Hub(tmp_path / 'hub')
  folder, cache = exported[0] / 'export' / 'three', str(tmp_path / 'cache')
  with hub.running():
    api = huggingface_hub.HfApi(endpoint=hub.url, token='hf_token')
    api.upload_folder(repo_id='me/three', folder_path=folder)
    for name in ('config.json', 'README.md', 'model.safetensors'):
      api.hf_hub_download('me/three', name, cache_dir=cache)
  assert list_files(hub.folder / 'me' / 'three') == list_files(folder)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', cache)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  config = tiny_config.get_config()
  config.stages[0]['init_from'] = 'hf:me/three'
  stage = stages.create_stages(config)[0]
  found = pretrained.load(stage, networks.shapes(), ('1', '3', '5'), config)
  assert found.classes == ('1', '3', '5')
  networks.assert_same_bits(
    interchange.to_state_dict(found.variables),
    safetensors.numpy.load_file(folder / 'model.safetensors'),
  )


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'num_filters': 4}, 'timm cannot load it'),
    ({'num_filters': 64, 'blur_pool': True}, '**gives other logits**'),
  ],
)
def test_the_card_says_where_timm_is_no_help(fields, expected):
  trained = create(networks.draw(networks.shapes()), **fields)
  assert expected in export.describe_timm(trained)


def test_fast_convolutions_give_what_is_served_without_them():
  """Here they are Winograd's and matrix products, in the file XLA's own."""
  like = networks.shapes(num_filters=32, stem_kernel=7)
  trained = create(
    networks.draw(like), num_filters=32, stem_kernel=7, image_size=64
  )
  apply = export.create_apply(trained)
  images = np.repeat(export._random_images(trained), 16, axis=0)
  served = jax.export.deserialize(bytearray(export.serialize(trained)))
  found, expected = served.call(images), apply(trained.variables, images)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
  here = apply.lower(trained.variables, images).as_text()
  products = [
    text.count('stablehlo.dot_general') for text in (here, served.mlir_module())
  ]
  # The head's, once a platform.
  assert products[0] > products[1] == len(export.PLATFORMS)


def test_what_gives_other_logits_gets_no_name(tmp_path):
  good = create(networks.draw(networks.shapes()))
  export.export_trained(good, tmp_path)
  before = list_files(tmp_path)
  broken = networks.draw(networks.shapes(), seed=1)
  broken['params']['head']['bias'][0] = np.nan
  with pytest.raises(export.ParityError, match=r'three\.safetensors'):
    export.export_trained(create(broken), tmp_path)
  assert list_files(tmp_path) == before
  with pytest.raises(export.ParityError):
    export.export_trained(create(broken), tmp_path / 'new')
  assert list((tmp_path / 'new').iterdir()) == []


def test_logits_may_differ_by_a_ten_thousandth_and_no_more():
  expected = np.array([[1.0, -20.0, 3.0]], np.float32)
  assert export.compare('x', expected + 1e-3, expected) == pytest.approx(
    1e-3, rel=1e-2
  )
  with pytest.raises(export.ParityError, match=r'0\.003'):
    export.compare('x', expected + 3e-3, expected)
  small = expected / 20
  with pytest.raises(export.ParityError):
    export.compare('x', small + 2e-4, small)


def test_leftovers_of_a_killed_export_go(tmp_path):
  leftover = tmp_path / '.three.safetensors.123.tmp'
  leftover.write_bytes(b'half')
  export.export_trained(create(networks.draw(networks.shapes())), tmp_path)
  assert not leftover.exists()


def test_nothing_is_exported_of_a_stage_without_weights(exported):
  config = tiny_config.get_config()
  with pytest.raises(errors.UserError, match="'ten' has no best weights"):
    export.export(config, exported[0], stage='ten')
  with pytest.raises(errors.UserError, match='no run in'):
    export.export(config, pathlib.Path(exported[0]) / 'nowhere')

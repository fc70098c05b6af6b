"""Stages that start from a file of weights."""

import dataclasses
import importlib.util
import json
import pathlib
import pickle
import signal

import jax
import networks
import numpy as np
import parity
import pytest
import runs
import safetensors.numpy
import tiny_config

from jaxprog import errors, stages
from jaxprog.models import interchange, resnet
from jaxprog.training.transfer import carry, pretrained


def stage_from(path):
  stage = stages.create_stages(tiny_config.get_config())[0]
  return dataclasses.replace(stage, init_from=str(path))


def load(path, like, classes, **fields):
  config = tiny_config.get_config()
  config.update(fields)
  return pretrained.load(stage_from(path), like, classes, config)


def save(path, variables, classes=None, **changes):
  """Writes a file of `variables`, as exported if there are `classes`."""
  tensors = {**interchange.to_state_dict(variables), **changes}
  tensors = {k: v for k, v in tensors.items() if v is not None}
  metadata = {'classes': json.dumps(classes)} if classes else None
  safetensors.numpy.save_file(tensors, path, metadata)
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'w.safetensors'


@pytest.fixture(scope='module')
def like():
  return networks.shapes()


@pytest.fixture(scope='module')
def variables(like):
  return networks.draw(like)


def test_a_stage_starts_from_timms_weights_with_timms_logits(path):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  timm = parity.import_module('timm')
  safetensors_torch = importlib.import_module('safetensors.torch')
  torch.manual_seed(0)
  peer = timm.create_model('resnet18', num_classes=10).eval()
  for module in peer.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      torch.nn.init.uniform_(module.weight, 0.25, 0.75)
      torch.nn.init.normal_(module.running_mean, std=0.1)
      torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
  torch.nn.init.normal_(peer.fc.weight, std=0.1)
  safetensors_torch.save_file(
    peer.state_dict(), path, {'classes': json.dumps(list('abcdefghij'))}
  )
  like = networks.shapes(
    'resnet18', num_classes=10, num_filters=64, stem_kernel=7
  )
  found = load(path, like, 'abcdefghij')
  images = torch.randn(2, 3, 128, 128)
  with torch.no_grad():
    expected = peer(images).numpy()
  model = resnet.create_model('resnet18', num_classes=10, image_size=128)
  logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(
    found.variables, images.numpy().transpose(0, 2, 3, 1)
  )
  assert expected.std() > 0.1
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_the_head_is_carried_where_the_file_lists_the_same_classes(
  path, like, variables
):
  save(path, variables, ['a', 'b', 'c'])
  found = load(path, like, ('a', 'b', 'c'))
  networks.assert_same_bits(found.variables, variables)
  assert found.classes == ('a', 'b', 'c')


@pytest.mark.parametrize('classes', [None, ['a', 'c', 'b'], ['a', 'b']])
def test_other_or_unknown_classes_get_a_fresh_head(
  path, like, variables, classes
):
  save(path, variables, classes)
  names = ('a', 'b', 'c')
  found = load(path, like, names)
  fresh = networks.draw(like, seed=1)
  result = carry.transfer(found.variables, fresh, found.classes, names)
  networks.assert_same_bits(
    result.variables['params'].pop('head'), fresh['params']['head']
  )
  backbone = {k: v for k, v in variables['params'].items() if k != 'head'}
  networks.assert_same_bits(result.variables['params'], backbone)
  assert result.fresh == result.dropped == ('head',)


def test_another_number_of_classes_is_no_obstacle(path, variables):
  save(path, variables, ['a', 'b', 'c'])
  like = networks.shapes(num_classes=5)
  found = load(path, like, 'vwxyz')
  assert found.variables['params']['head']['bias'].shape == (3,)
  fresh = networks.draw(like, seed=1)
  result = carry.transfer(found.variables, fresh, found.classes, 'vwxyz')
  assert result.variables['params']['head']['bias'].shape == (5,)


def test_a_file_without_a_head_drops_none(path, like, variables):
  save(path, variables, **{'fc.weight': None, 'fc.bias': None})
  found = load(path, like, 'abc')
  fresh = networks.draw(like, seed=1)
  result = carry.transfer(found.variables, fresh, found.classes, 'abc')
  assert result.fresh == ('head',)
  assert result.dropped == ()


def test_a_thousand_logits_are_imagenets_for_its_thousand_classes_alone(path):
  spec = importlib.util.find_spec('timm')
  if spec is None:
    pytest.skip(parity.REASON)
  root = pathlib.Path(spec.origin).parent
  text = (root / 'data' / '_info' / 'imagenet_synsets.txt').read_text()
  classes = tuple(text.split())
  like = networks.shapes(num_classes=1000)
  save(path, networks.draw(like))
  assert load(path, like, classes).classes == classes
  others = (*classes[:-1], 'n99999999')
  assert load(path, like, others).classes == ()
  save(path, networks.draw(like), list(others))
  assert load(path, like, others).classes == others


def test_half_precision_is_taken_exactly(path, like, variables):
  halves = {
    k: v.astype(np.float16)
    for k, v in interchange.to_state_dict(variables).items()
  }
  safetensors.numpy.save_file(halves, path)
  found = load(path, like, 'abc')
  kernel = found.variables['params']['stem_conv']['kernel']
  expected = variables['params']['stem_conv']['kernel'].astype(np.float16)
  assert kernel.dtype == np.float32
  np.testing.assert_array_equal(kernel, expected.astype(np.float32))


def test_files_without_counters_of_batches_are_fine(path, like, variables):
  names = interchange.to_state_dict(variables)
  counters = {k: None for k in names if interchange.is_counter(k)}
  save(path, variables, ['a', 'b', 'c'], **counters)
  found = load(path, like, ('a', 'b', 'c'))
  networks.assert_same_bits(found.variables, variables)


def zeros(*shape):
  return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    (
      dict.fromkeys(
        [f'layer{i}.0.{x}.weight' for i in (1, 2) for x in ('conv1', 'conv2')]
      ),
      'lacks layer1.0.conv1.weight, layer1.0.conv2.weight, '
      'layer2.0.conv1.weight and 1 more.',
    ),
    ({'layer1.1.conv1.weight': zeros(4, 4, 3, 3)}, 'not: layer1.1.conv1'),
    ({'fc.weight': None}, r'not: fc\.bias'),
    ({'bn1.bias': zeros(5)}, r'bn1.bias is \[5\] in the file and \[4\] here'),
    ({'conv1.weight': zeros(64, 3, 7, 7)}, 'num_filters=64 .*stem_kernel=7'),
    ({'bn1.bias': np.full(4, np.inf, np.float32)}, 'bn1.bias is not finite'),
    ({'bn1.bias': np.zeros(4, np.int64)}, 'bn1.bias is I64'),
    ({'fc.weight': zeros()}, r'not: fc\.bias, fc\.weight'),
    ({'fc.weight': zeros(3, 32, 1)}, r'not: fc\.bias, fc\.weight'),
    ({'fc.weight': zeros(3, 8)}, ''),
  ],
)
def test_files_that_do_not_fit_are_refused_by_name(
  path, like, variables, changes, expected
):
  save(path, variables, **changes)
  if not expected:  # It is not used: another head may have another width.
    load(path, like, 'abc')
    return
  with pytest.raises(
    errors.UserError, match=expected.replace(' .*', '.*')
  ) as e:
    load(path, like, 'abc')
  assert str(path) in e.value.where
  assert len(str(e.value).splitlines()) <= 3


@pytest.mark.parametrize('size', [0, 4, 20, -1])
def test_damaged_files_are_refused(path, like, variables, size):
  save(path, variables)
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(errors.UserError, match='damaged, or no safetensors'):
    load(path, like, 'abc')


def test_missing_files_are_refused(path, like):
  with pytest.raises(errors.UserError, match='no such file of weights'):
    load(path, like, 'abc')


class Malicious:
  """Once unpickled, it has left its mark."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return pathlib.Path.touch, (self.mark,)


@pytest.mark.parametrize('kind', ['pickle', 'torch'])
def test_a_pickle_under_another_name_is_never_read(path, like, tmp_path, kind):
  mark = tmp_path / 'mark'
  if kind == 'pickle':
    path.write_bytes(pickle.dumps(Malicious(mark)))
    pickle.loads(path.read_bytes())
  else:
    torch = pytest.importorskip('torch', reason=parity.REASON)
    other = tmp_path / 'w.pth'
    torch.save(Malicious(mark), other)
    torch.load(other, weights_only=False)
    path.write_bytes(other.read_bytes())
  assert mark.exists()  # It would do its harm.
  mark.unlink()
  with pytest.raises(errors.UserError, match='pickle under another name') as e:
    load(path, like, 'abc')
  assert not mark.exists()
  assert 'weights_only=True' in e.value.suggestion


@pytest.mark.parametrize('name', ['w.pth', 'w.pt', 'w.bin', 'w.ckpt'])
def test_pickles_are_refused_by_name_with_the_way_to_convert_them(name):
  config = tiny_config.get_config()
  config.stages[1]['init_from'] = name
  with pytest.raises(errors.UserError, match='run any code') as e:
    stages.create_stages(config)
  assert e.value.where == "config.stages[1] ('ten').init_from"
  assert 'safetensors.torch.save_file' in e.value.suggestion
  assert len(str(e.value).splitlines()) == 3


def test_a_file_that_nothing_would_start_from_is_refused():
  config = tiny_config.get_config()
  config.stages[0] |= {'init_from': 'w.safetensors', 'transfer': 'none'}
  with pytest.raises(errors.UserError, match='nothing would start'):
    stages.create_stages(config)


def test_other_names_are_refused():
  config = tiny_config.get_config()
  config.stages[0]['init_from'] = 'weights.npz'
  with pytest.raises(errors.UserError, match=r'must be a \.safetensors file'):
    stages.create_stages(config)


@pytest.mark.slow
def test_a_run_starts_from_a_file_and_resumes_without_it(
  run_main, data_dir, tmp_path, path, variables
):
  save(path, variables, ['1', '3', '5'])
  workdir = tmp_path / 'run'
  arguments = [
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={workdir}',
    '--only=three',
    f'--config.stages[0].init_from={path}',
    '--config.checkpoint_every_steps=2',
  ]
  process = runs.start_main(*arguments)
  # The first save is whole once a second one has begun.
  runs.wait_for_step(process, workdir, 'three', 2)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  path.unlink()
  result = run_main(*arguments)
  assert result.returncode == 0, result.stdout + result.stderr
  (record,) = runs.read_history(workdir)['stages']
  assert record['transfer']['from'] == str(path)
  assert len(record['transfer']['weights']) == 16
  assert record['transfer']['fresh'] == []
  assert 'head' in record['transfer']['carried']
  assert record['resumed_at_steps']
  assert record['status'] == 'done'


def test_a_file_that_is_not_there_is_missed_before_anything_is_trained(
  data_dir, tmp_path, path
):
  result = runs.call_main(
    f'--config=tests/tiny_config.py:{data_dir}',
    f'--workdir={tmp_path / "run"}',
    f'--config.stages[2].init_from={path}',
  )
  assert result.returncode == 2
  assert f"stage 'ten_again': init_from={path}" in result.stderr
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.parametrize('part', ['model_args', 'pretrained_cfg'])
def test_a_description_that_timm_has_not_written_is_refused(part):
  said = {'architecture': 'resnet18', part: ['width']}
  known = pretrained._read_timm(said)
  with pytest.raises(errors.UserError, match='not as timm has it'):
    pretrained._check_network(known, {'model': 'resnet18'}, 'here')

"""PyTorch's names for our variables, held against timm's own networks."""

import jax
import networks
import numpy as np
import parity
import pytest

from jaxprog.models import interchange, resnet

PUBLISHED = {'num_classes': 1000, 'num_filters': 64, 'stem_kernel': 7}


@pytest.mark.parametrize(
  ('library', 'name'),
  [
    ('timm', 'resnet18'),
    ('timm', 'resnet101'),
    ('torchvision.models', 'resnet34'),
    ('torchvision.models', 'resnet50'),
  ],
)
def test_names_and_shapes_are_those_of_the_libraries(library, name):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  create = getattr(parity.import_module(library), 'create_model', None)
  with torch.device('meta'):  # No memory, no time.
    if create is None:
      peer = getattr(parity.import_module(library), name)()
    else:
      peer = create(name)
  theirs = {k: tuple(v.shape) for k, v in peer.state_dict().items()}
  counters = {k for k in theirs if interchange.is_counter(k)}
  ours = interchange.describe(networks.shapes(name, **PUBLISHED))
  assert ours == {k: v for k, v in theirs.items() if k not in counters}
  norms = {k.removesuffix('.running_var') for k in ours if 'running_var' in k}
  assert {k.removesuffix('.num_batches_tracked') for k in counters} == norms


# 224 px is what the libraries' stem is for; from 128 on ours is the same.
@pytest.mark.parametrize(
  ('name', 'image_size'), [('resnet50', 224), ('resnet18', 128)]
)
def test_timm_loads_ours_strictly_and_gives_the_same_logits(name, image_size):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  timm = parity.import_module('timm')
  variables = networks.draw(networks.shapes(name, **PUBLISHED))
  state_dict = interchange.to_state_dict(variables)
  peer = timm.create_model(name).eval()
  peer.load_state_dict(
    {k: torch.from_numpy(v) for k, v in state_dict.items()}, strict=True
  )
  images = np.random.default_rng(1).normal(size=(2, image_size, image_size, 3))
  images = images.astype(np.float32)
  with torch.no_grad():
    expected = peer(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
  model = resnet.create_model(name, num_classes=1000, image_size=image_size)
  found = jax.jit(lambda v, x: model.apply(v, x, train=False))(
    variables, images
  )
  assert expected.std() > 0.1
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_there_and_back_every_bit_is_the_same(name):
  like = networks.shapes(name)
  variables = networks.draw(like)
  state_dict = interchange.to_state_dict(variables)
  networks.assert_same_bits(
    interchange.from_state_dict(state_dict, like), variables
  )
  again = interchange.to_state_dict(
    interchange.from_state_dict(state_dict, like)
  )
  networks.assert_same_bits(again, state_dict)


def test_axes_go_where_pytorch_has_them():
  variables = networks.draw(networks.shapes())
  state_dict = interchange.to_state_dict(variables)
  kernel = variables['params']['block2_1']['shortcut_conv']['kernel']
  theirs = state_dict['layer2.0.downsample.0.weight']
  assert theirs.shape == (8, 4, 1, 1)
  assert theirs[5, 2, 0, 0] == kernel[0, 0, 2, 5]
  assert theirs.flags.c_contiguous
  stem = variables['params']['stem_conv']['kernel']
  assert state_dict['conv1.weight'][1, 2, 0, 1] == stem[0, 1, 2, 1]
  head = variables['params']['head']['kernel']
  assert state_dict['fc.weight'][2, 7] == head[7, 2]


def test_each_norm_has_a_counter_of_batches():
  state_dict = interchange.to_state_dict(networks.draw(networks.shapes()))
  counters = [k for k in state_dict if interchange.is_counter(k)]
  # A stem, two norms in each of four blocks, three projections.
  assert len(counters) == 1 + 4 * 2 + 3
  assert state_dict['bn1.num_batches_tracked'].dtype == np.int64
  assert state_dict['bn1.num_batches_tracked'].shape == ()


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    (('params', 'stem_norm', 'scale'), 'bn1.weight'),
    (('batch_stats', 'block4_2', 'norm3', 'var'), 'layer4.1.bn3.running_var'),
    (('params', 'head', 'bias'), 'fc.bias'),
  ],
)
def test_names_are_those_that_people_know(path, expected):
  assert interchange.name_of(path) == expected


@pytest.mark.parametrize(
  'path',
  [
    ('params', 'Dense_0', 'kernel'),
    ('params', 'block1_x', 'conv1', 'kernel'),
    ('params', 'block1_1', 'attention', 'kernel'),
    ('params', 'stem_conv', 'mean'),
    ('params', 'kernel'),
    ('params', 'a', 'b', 'c', 'd'),
  ],
)
def test_other_networks_are_refused(path):
  with pytest.raises(ValueError, match='/'.join(path)):
    interchange.name_of(path)

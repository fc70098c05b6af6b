import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprog import stages
from jaxprog.models import resnet

PARITY = 'make test PARITY=1 installs PyTorch and timm to compare with'


def create(name='resnet10', image_size=16, num_filters=4, **kwargs):
  return resnet.create_model(
    name,
    num_classes=10,
    image_size=image_size,
    num_filters=num_filters,
    **kwargs,
  )


def init(model, image_size):
  images = jnp.zeros((1, image_size, image_size, 3))
  return jax.eval_shape(
    lambda rng: model.init(rng, images, train=False), jax.random.key(0)
  )


# Parameters of the published networks for 1000 classes (torchvision's table).
@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('resnet18', 11_689_512),
    ('resnet34', 21_797_672),
    ('resnet50', 25_557_032),
    ('resnet101', 44_549_160),
    ('resnet152', 60_192_808),
  ],
)
def test_parameter_counts_are_the_published_ones(name, expected):
  model = resnet.create_model(name, num_classes=1000, image_size=224)
  params = init(model, 224)['params']
  assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_every_named_model_can_be_created():
  for name in stages.MODELS:
    assert 'head' in init(create(name), 16)['params']


def test_weights_fit_every_image_size():
  shapes = [init(create(image_size=s), s) for s in (16, 32, 64, 128, 224)]
  assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize(
  ('image_size', 'side'), [(16, 2), (32, 4), (64, 4), (128, 4), (224, 7)]
)
def test_the_stem_leaves_enough_positions(image_size, side):
  stem = resnet.choose_stem(image_size)
  assert -(-image_size // stem.stride // (1 + stem.pool) // 8) == side


def test_blocks_start_as_their_shortcut():
  model = create()
  variables = model.init(
    jax.random.key(0), jnp.ones((1, 16, 16, 3)), train=False
  )
  for name, block in variables['params'].items():
    if name.startswith('block'):
      np.testing.assert_array_equal(block['norm2']['scale'], 0)
      np.testing.assert_array_equal(block['norm1']['scale'], 1)


def test_logits_and_statistics_are_float32_in_bfloat16():
  model = create(dtype=jnp.bfloat16)
  variables = model.init(
    jax.random.key(0), jnp.ones((2, 16, 16, 3)), train=False
  )
  logits, updates = model.apply(
    variables, jnp.ones((2, 16, 16, 3)), train=True, mutable=['batch_stats']
  )
  assert logits.dtype == jnp.float32
  dtypes = {x.dtype for x in jax.tree.leaves((variables, updates))}
  assert dtypes == {jnp.dtype('float32')}


def test_running_statistics_follow_the_batch():
  model = create()
  images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
  variables = model.init(jax.random.key(0), images, train=False)
  _, updates = model.apply(
    variables, images, train=True, mutable=['batch_stats']
  )
  kernel = variables['params']['stem_conv']['kernel']
  y = jax.lax.conv_general_dilated(
    images,
    kernel,
    (1, 1),
    [(3, 3), (3, 3)],
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  expected = 0.1 * np.mean(y, axis=(0, 1, 2))
  found = updates['batch_stats']['stem_norm']['mean']
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def _pytorch_resnet50(torch):
  """Returns timm's ResNet-50: code no one here wrote."""
  library = torch.library.Library('torchvision', 'FRAGMENT')
  for name in ('nms', 'qnms'):
    # timm imports torchvision, whose only wheels on the index are for CUDA:
    # without these two names it fails beside a PyTorch for CPUs.
    if not hasattr(torch.ops.torchvision, name):
      library.define(f'{name}(Tensor boxes, Tensor scores, float t) -> Tensor')
  timm = pytest.importorskip('timm', reason=PARITY)
  return timm.create_model('resnet50')


def _to_flax(state_dict):
  """Returns PyTorch's ResNet weights as Flax variables."""
  variables = {'params': {}, 'batch_stats': {}}
  outer = {'conv1': 'stem_conv', 'bn1': 'stem_norm', 'fc': 'head'}
  shortcut = {
    'downsample.0': 'shortcut_conv',
    'downsample.1': 'shortcut_norm',
  }
  fields = {
    'running_mean': ('batch_stats', 'mean'),
    'running_var': ('batch_stats', 'var'),
    'bias': ('params', 'bias'),
  }
  for key, tensor in state_dict.items():
    module, field = key.rsplit('.', 1)
    if field == 'num_batches_tracked':
      continue
    value = tensor.numpy()
    if field == 'weight':
      name = 'scale' if value.ndim == 1 else 'kernel'
      collection = 'params'
      value = value.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim])
    else:
      collection, name = fields[field]
    if module.startswith('layer'):
      layer, block, inner = module.split('.', 2)
      inner = shortcut.get(inner) or inner.replace('bn', 'norm')
      path = [f'block{layer[5:]}_{int(block) + 1}', inner]
    else:
      path = [outer[module]]
    target = variables[collection]
    for part in path:
      target = target.setdefault(part, {})
    target[name] = value
  return variables


def test_resnet50_equals_pytorch():
  torch = pytest.importorskip('torch', reason=PARITY)
  torch.manual_seed(0)
  peer = _pytorch_resnet50(torch).eval()
  for module in peer.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      torch.nn.init.uniform_(module.weight, 0.5, 1.0)
      torch.nn.init.normal_(module.bias, std=0.1)
      torch.nn.init.normal_(module.running_mean, std=0.1)
      torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
  images = torch.randn(2, 3, 224, 224)
  with torch.no_grad():
    expected = peer(images).numpy()
  model = resnet.create_model('resnet50', num_classes=1000, image_size=224)
  variables = _to_flax(peer.state_dict())
  found = jax.jit(lambda v, x: model.apply(v, x, train=False))(
    variables, images.numpy().transpose(0, 2, 3, 1)
  )
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=1e-4 * scale, rtol=0)

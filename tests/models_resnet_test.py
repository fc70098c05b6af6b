import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import parity
import pytest

from jaxprog import fields
from jaxprog.models import interchange, resnet
from jaxprog.planning import costs


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


def jitted_init(model, images):
  return jax.jit(lambda rng: model.init(rng, images, train=False))(
    jax.random.key(1)
  )


def jitted_apply(model, *arguments):
  """Returns logits and statistics of a training batch."""
  apply = functools.partial(model.apply, train=True, mutable=['batch_stats'])
  return jax.jit(apply)(*arguments)


# Parameters of the published networks for 1000 classes (torchvision's table).
PARAMETERS = {
  'resnet18': 11_689_512,
  'resnet34': 21_797_672,
  'resnet50': 25_557_032,
  'resnet101': 44_549_160,
  'resnet152': 60_192_808,
}


@pytest.mark.parametrize(('name', 'expected'), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name, expected):
  model = resnet.create_model(name, num_classes=1000, image_size=224)
  params = init(model, 224)['params']
  assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_every_named_model_is_published_or_tiny():
  assert fields.CONFIG['model'].choices == ('resnet10', *PARAMETERS)
  assert 'head' in init(create('resnet10'), 16)['params']


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
  variables = jitted_init(create(), jnp.ones((1, 16, 16, 3)))
  for name, block in variables['params'].items():
    if name.startswith('block'):
      np.testing.assert_array_equal(block['norm2']['scale'], 0)
      np.testing.assert_array_equal(block['norm1']['scale'], 1)


def test_logits_and_statistics_are_float32_in_bfloat16():
  model = create(dtype=jnp.bfloat16)
  images = jnp.ones((2, 16, 16, 3))
  variables = jitted_init(model, images)
  logits, updates = jitted_apply(model, variables, images)
  assert logits.dtype == jnp.float32
  dtypes = {x.dtype for x in jax.tree.leaves((variables, updates))}
  assert dtypes == {jnp.dtype('float32')}


def test_running_statistics_follow_the_batch():
  model = create()
  images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
  variables = jitted_init(model, images)
  _, updates = jitted_apply(model, variables, images)
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


def blur_tap_by_tap(x):
  """Returns the binomial blur, written out in float64."""
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  height, width = x.shape[1:3]
  return sum(
    a * b / 16 * padded[:, i : i + height, j : j + width]
    for i, a in enumerate((1, 2, 1))
    for j, b in enumerate((1, 2, 1))
  )


@pytest.mark.parametrize('size', [(8, 8), (7, 10), (1, 1), (2, 1)])
def test_blur_is_the_binomial_kernel_with_zeros_around(size):
  x = jax.random.normal(jax.random.key(0), (2, *size, 5))
  np.testing.assert_allclose(resnet.blur(x), blur_tap_by_tap(x), atol=1e-6)


def test_blur_equals_a_depthwise_convolution_of_pytorch():
  torch = pytest.importorskip('torch', reason=parity.REASON)
  x = jax.random.normal(jax.random.key(0), (2, 9, 12, 6))
  expected = _pytorch_blur(torch, 6)(
    torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))
  ).numpy()
  found = resnet.blur(x)
  np.testing.assert_allclose(
    found, expected.transpose(0, 2, 3, 1), atol=1e-6, rtol=0
  )


def test_blur_removes_what_a_stride_of_two_would_fold():
  rows = jnp.where(jnp.arange(8) % 2, -1.0, 1.0)
  x = jnp.broadcast_to(rows[:, None, None], (1, 8, 8, 3))
  np.testing.assert_array_equal(resnet.blur(x)[:, 1:-1], 0)


def test_blur_of_bfloat16_is_rounded_once():
  x = jax.random.normal(jax.random.key(0), (2, 9, 9, 4), jnp.bfloat16)
  found = resnet.blur(x)
  assert found.dtype == jnp.bfloat16
  exact = resnet.blur(x.astype(jnp.float32))
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_gradients_pass_the_blur_as_through_a_symmetric_matrix():
  x, dy = jax.random.normal(jax.random.key(0), (2, 2, 7, 6, 3))
  dx = jax.vjp(resnet.blur, x)[1](dy)[0]
  np.testing.assert_allclose(dx, blur_tap_by_tap(dy), atol=1e-6)


@pytest.mark.parametrize('name', ['resnet10', 'resnet50'])
def test_blur_pool_has_no_parameters(name):
  plain, blurred = (
    init(create(name, num_filters=16, blur_pool=b), 16) for b in (False, True)
  )
  assert plain == blurred


def blocks_of(model, variables, images):
  """Returns what each block of `model` makes of `images`, by its name."""

  @jax.jit
  def apply(variables):
    return model.apply(
      variables,
      images,
      train=False,
      capture_intermediates=lambda module, _: isinstance(module, model.block),
    )[1]['intermediates']

  outputs = apply(variables)
  outputs.pop('features')
  return {name: out['__call__'][0] for name, out in outputs.items()}


# The last three of the four blocks stride. What enters has one, one, two and
# four times as many channels as the first has filters; 16 are enough.
@pytest.mark.parametrize(
  ('num_filters', 'expected'),
  [(4, [True, True, True, False]), (16, [True, False, False, False])],
)
def test_only_strides_over_many_channels_are_blurred(num_filters, expected):
  plain, blurred = (
    create(num_filters=num_filters, blur_pool=b) for b in (False, True)
  )
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  variables = jitted_init(plain, images)
  before, after = (blocks_of(m, variables, images) for m in (plain, blurred))
  same = [np.array_equal(before[name], after[name]) for name in sorted(before)]
  assert same == expected


def test_every_weight_of_a_blurred_network_gets_a_gradient():
  model = resnet.ResNet(
    block_sizes=(1, 1),
    block=resnet.BottleneckBlock,
    num_classes=10,
    num_filters=16,
    stem=resnet.Stem(stride=1, pool=False),
    stem_kernel=3,
    blur_pool=True,
    dtype=jnp.bfloat16,
  )
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  variables = jitted_init(model, images)
  # The last norm of a block starts at 0, which stops all gradients before it.
  params = jax.tree.map(lambda x: x + 0.1, variables['params'])

  @jax.jit
  @jax.grad
  def gradients(params):
    logits, _ = model.apply(
      {**variables, 'params': params},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    return jnp.sum(logits**2)

  for grad in jax.tree.leaves(gradients(params)):
    assert np.isfinite(grad).all()
    assert np.any(grad)


def trace_gradients(model, variables, images, *paths):
  """Returns the trace of gradients, statistics and loss of `model`."""

  def loss(params, batch_stats):
    logits, changed = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      images,
      *paths,
      train=True,
      mutable=['batch_stats'],
    )
    return jnp.mean(logits**2), changed

  grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return grad.trace(variables['params'], variables['batch_stats'])


@pytest.mark.parametrize(('groups', 'skip'), [(1, True), (2, False)])
def test_recomputed_blocks_compute_the_same(groups, skip):
  paths = [2.0 * np.random.default_rng(1).integers(0, 2, (8, 4))] * skip
  images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
  plain, recomputed = (
    create(norm_groups=groups, remat_blocks=r) for r in (False, True)
  )
  assert init(plain, 16) == init(recomputed, 16)
  variables = jax.tree.map(lambda x: x + 0.1, jitted_init(plain, images))
  expected, found = (
    trace_gradients(model, variables, images, *paths)
    .lower()
    .compile()(variables['params'], variables['batch_stats'])
    for model in (plain, recomputed)
  )
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_recomputed_blocks_hold_less_and_compute_a_third_more():
  images = jnp.zeros((16, 32, 32, 3))
  plain, recomputed = (
    trace_gradients(model, init(model, 32), images).jaxpr
    for model in (
      create('resnet18', 32, 8, remat_blocks=r) for r in (False, True)
    )
  )
  bytes_of = costs.estimate_bytes
  assert bytes_of(recomputed) < 0.6 * bytes_of(plain)
  more = costs.count_flops(recomputed) / costs.count_flops(plain)
  assert 1.3 < more < 1.34


def _pytorch_blur(torch, channels):
  """Returns the blur as the depthwise convolution that others make of it."""
  conv = torch.nn.Conv2d(
    channels, channels, 3, padding=1, groups=channels, bias=False
  )
  side = torch.tensor([1.0, 2.0, 1.0])
  conv.weight.data = (torch.outer(side, side) / 16).repeat(channels, 1, 1, 1)
  return conv.requires_grad_(False)


def _blur_pytorch(torch, module):
  """Puts a blur in front of strided convolutions, as ffcv-imagenet does."""
  for name, child in module.named_children():
    if not isinstance(child, torch.nn.Conv2d):
      _blur_pytorch(torch, child)
    elif child.stride == (2, 2) and child.in_channels >= 16:
      blur = _pytorch_blur(torch, child.in_channels)
      setattr(module, name, torch.nn.Sequential(blur, child))


def _pytorch_resnet50():
  """Returns timm's ResNet-50: code no one here wrote."""
  timm = parity.import_module('timm')
  return timm.create_model('resnet50')


# At 224 px too, which models_interchange_test compares, the stem is this one.
@pytest.mark.parametrize('blur_pool', [False, True])
def test_resnet50_equals_pytorch(blur_pool):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  torch.manual_seed(0)
  peer = _pytorch_resnet50().eval()
  for module in peer.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      torch.nn.init.uniform_(module.weight, 0.5, 1.0)
      torch.nn.init.normal_(module.bias, std=0.1)
      torch.nn.init.normal_(module.running_mean, std=0.1)
      torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
  model = resnet.create_model(
    'resnet50', num_classes=1000, image_size=128, blur_pool=blur_pool
  )
  state_dict = {k: v.numpy() for k, v in peer.state_dict().items()}
  variables = interchange.from_state_dict(state_dict, init(model, 32))
  if blur_pool:
    _blur_pytorch(torch, peer)
  images = torch.randn(2, 3, 128, 128)
  with torch.no_grad():
    expected = peer(images).numpy()
  found = jax.jit(lambda v, x: model.apply(v, x, train=False))(
    variables, images.numpy().transpose(0, 2, 3, 1)
  )
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize(
  ('block', 'theirs'),
  [
    (resnet.BasicBlock, 'BasicBlock'),
    (resnet.BottleneckBlock, 'Bottleneck'),
  ],
)
def test_blocks_are_skipped_as_in_timms_drop_path(block, theirs):
  """Its masks, read from what goes through them, and the logits they make."""
  torch = pytest.importorskip('torch', reason=parity.REASON)
  timm = parity.import_module('timm.models.resnet')
  model = resnet.ResNet((1, 1, 1, 2), block, num_classes=3)
  variables = networks.draw(init(model, 64))
  peer = timm.ResNet(
    getattr(timm, theirs), (1, 1, 1, 2), num_classes=3, drop_path_rate=0.4
  ).train()
  state_dict = interchange.to_state_dict(variables)
  peer.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()})
  rates, masks = [], []

  def note(module, inputs, output):
    first = (slice(None), 0, 0, 0)
    masks.append((output[first] / inputs[0][first]).detach().numpy())
    rates.append(module.drop_prob)

  for module in peer.modules():
    if type(module).__name__ == 'DropPath':
      module.register_forward_hook(note)
  images = np.random.default_rng(1).normal(size=(4, 64, 64, 3))
  images = images.astype(np.float32)
  torch.manual_seed(0)
  expected = peer(torch.from_numpy(images.transpose(0, 3, 1, 2)))
  expected = expected.detach().numpy()
  # The first block has no mask: its chance is 0.
  np.testing.assert_allclose(resnet.path_rates(model, 0.4), [0, *rates])
  paths = np.stack([np.ones(4), *masks], axis=1).round(4)
  assert 1 < (paths == 0).sum() < 12
  found, _ = jitted_apply(model, variables, images, paths)
  assert expected.std() > 0.1
  np.testing.assert_allclose(found, expected, atol=2e-3, rtol=0)

import functools
import itertools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import linen as nn

from jaxprog.models import conv, winograd

# (image, kernel, stride, padding, channels in, channels out): every branch of
# the CPU's rule, odd sizes, paddings wider than the image among them.
SHAPES = [
  ((8, 8), 3, 1, 1, 32, 32),  # Winograd
  ((7, 9), 3, 1, 1, 32, 40),
  ((5, 6), 3, 1, 0, 32, 32),
  ((1, 1), 3, 1, 1, 32, 32),
  ((2, 2), 3, 1, 1, 8, 4),  # shifted products
  ((4, 4), 3, 1, 2, 3, 5),
  ((8, 8), 3, 1, 1, 8, 4),  # XLA forward
  ((8, 8), 3, 2, 1, 16, 8),  # phases
  ((9, 7), 3, 2, 1, 32, 32),
  ((9, 7), 3, 2, 0, 4, 8),
  ((11, 8), 7, 2, 3, 3, 8),  # the stem
  ((12, 12), 7, 1, 3, 3, 4),
  ((6, 6), 1, 1, 0, 8, 16),
  ((7, 8), 1, 2, 0, 8, 16),  # a projection
  ((3, 3), 1, 2, 0, 4, 4),
  ((10, 10), 3, 3, 1, 4, 4),
]


@pytest.fixture(autouse=True)
def no_convolution_is_too_small(monkeypatch):
  monkeypatch.setattr(conv, '_LEAST_FLOP', 0)


def test_little_work_is_left_to_xla(monkeypatch):
  x, kernel, dy = operands(SHAPES[0])

  def text():
    def ours(x, kernel):
      return conv.conv(x, kernel, 1, 1)

    return with_gradients.lower(ours, x, kernel, dy).as_text()

  assert 'dot_general' in text()
  monkeypatch.setattr(conv, '_LEAST_FLOP', 2 * 3 * 8 * 8 * kernel.size + 1)
  assert 'dot_general' not in text()
  assert text().count('stablehlo.convolution') == 3


def operands(shape, batch=3, dtype=np.float32):
  size, side, stride, padding, channels, features = shape
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, *size, channels))
  kernel = rng.normal(size=(side, side, channels, features))
  out = [(n + 2 * padding - side) // stride + 1 for n in size]
  dy = rng.normal(size=(batch, *out, features))
  return [jnp.asarray(a, dtype) for a in (x, kernel, dy)]


def lax_conv(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((padding, padding),) * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(f, x, kernel, dy):
  y, pull = jax.vjp(f, x, kernel)
  return (y, *pull(dy))


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_forward_and_gradients_equal_lax(shape):
  _, _, stride, padding, _, _ = shape
  x, kernel, dy = operands(shape)

  def ours(x, kernel):
    return conv.conv(x, kernel, stride, padding)

  def theirs(x, kernel):
    return lax_conv(x, kernel, stride, padding)

  found = with_gradients(ours, x, kernel, dy)
  expected = with_gradients(theirs, x, kernel, dy)
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape
    # f32 rounding of sums in another order.
    scale = float(np.abs(b).max())
    np.testing.assert_allclose(a, b, atol=5e-6 * scale, rtol=0)


@pytest.mark.parametrize('band_bytes', [1, 100_000])
def test_winograd_in_bands_equals_winograd_at_once(monkeypatch, band_bytes):
  # 6x5 tiles and zeros that differ on each side: bands of one row and of
  # three, all but the first and last without padding.
  pads = ((1, 2), (2, 0))
  x, kernel, dy = operands(((11, 10), 3, 1, 1, 32, 32))
  dy = jnp.pad(dy, ((0, 0), (0, 1), (0, 0), (0, 0)))

  def compute():
    all_three = jax.jit(
      lambda x, kernel, dy: (
        winograd.conv(x, kernel, pads),
        winograd.conv(x, kernel, pads, 3),
        winograd.kernel_grad(x, dy, pads),
      )
    )
    return all_three(x, kernel, dy)

  at_once = compute()
  monkeypatch.setattr(winograd, '_BAND_BYTES', band_bytes)
  for a, b in zip(compute(), at_once, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 * float(np.abs(b).max()))


@pytest.mark.parametrize('shape', [SHAPES[0], SHAPES[4], SHAPES[7]], ids=str)
def test_float64_shows_that_the_formulas_are_exact(shape):
  _, _, stride, padding, _, _ = shape
  with jax.enable_x64(True):
    x, kernel, dy = operands(shape, dtype=np.float64)
    found = with_gradients(
      lambda x, k: conv.conv(x, k, stride, padding), x, kernel, dy
    )
    expected = with_gradients(
      lambda x, k: lax_conv(x, k, stride, padding), x, kernel, dy
    )
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_bfloat16_in_and_out():
  for shape in (SHAPES[0], SHAPES[4], SHAPES[7]):
    _, _, stride, padding, _, _ = shape
    x, kernel, dy = operands(shape, dtype=jnp.bfloat16)
    found = with_gradients(
      lambda x, k, s=stride, p=padding: conv.conv(x, k, s, p), x, kernel, dy
    )
    exact = with_gradients(
      lambda x, k, s=stride, p=padding: lax_conv(x, k, s, p),
      *(a.astype(jnp.float32) for a in (x, kernel, dy)),
    )
    for a, b in zip(found, exact, strict=True):
      assert a.dtype == jnp.bfloat16
      scale = float(np.abs(b).max())
      np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.01 * scale)


def test_the_gradient_of_a_wide_kernel_is_not_rounded():
  for shape in (SHAPES[0], SHAPES[4], SHAPES[7]):
    _, _, stride, padding, _, _ = shape
    x, kernel, dy = operands(shape)
    x, dy = (a.astype(jnp.bfloat16) for a in (x, dy))
    y, dx, found = with_gradients(
      lambda x, k, s=stride, p=padding: conv.conv(x, k, s, p), x, kernel, dy
    )
    *_, exact = with_gradients(
      lambda x, k, s=stride, p=padding: lax_conv(x, k, s, p),
      *(a.astype(jnp.float32) for a in (x, kernel, dy)),
    )
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize(
  ('platform', 'dtype'), [('tpu', 'f32'), ('cuda', 'bf16')]
)
def test_cudnn_alone_rounds_a_kernels_gradient(platform, dtype):
  x, kernel, _ = operands(SHAPES[0])

  def loss(kernel):
    return conv.conv(x.astype(jnp.bfloat16), kernel, 1, 1).sum()

  trace = jax.jit(jax.grad(loss)).trace(kernel)
  text = trace.lower(lowering_platforms=(platform,)).as_text()
  results = re.findall(r'stablehlo.convolution.*-> tensor<3x3x.*x(.*)>', text)
  assert results == [dtype]


@pytest.mark.parametrize('side', [1, 3, 7])
def test_the_module_is_flaxs(side):
  x = jax.random.normal(jax.random.key(0), (2, 9, 9, 4))
  ours, half = conv.Conv(6, side, strides=2), side // 2
  pads = ((half, half), (half, half))
  theirs = nn.Conv(6, (side, side), 2, padding=pads, use_bias=False)
  found, expected = (m.init(jax.random.key(1), x) for m in (ours, theirs))
  networks.assert_same_bits(found, expected)
  np.testing.assert_allclose(
    ours.apply(found, x), theirs.apply(expected, x), atol=1e-5
  )


@pytest.mark.parametrize('size', [(8, 8), (9, 7), (1, 2), (2, 1), (5, 6)])
def test_max_pool_equals_flax(size):
  # Few different values: ties everywhere.
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(0, 3, (2, *size, 4)), jnp.float32)

  def theirs(x):
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

  y, pull = jax.vjp(conv.max_pool, x)
  expected, expected_pull = jax.vjp(theirs, x)
  np.testing.assert_array_equal(y, expected)
  # Sums of few whole numbers have the same bits in any order.
  dy = jnp.asarray(rng.integers(-9, 9, y.shape), jnp.float32)
  np.testing.assert_array_equal(pull(dy)[0], expected_pull(dy)[0])


@pytest.mark.parametrize(
  ('platform', 'scatters'), [('cuda', False), ('rocm', False), ('tpu', True)]
)
def test_a_gpu_pools_without_a_scatter(platform, scatters):
  x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.bfloat16)
  pulled = jax.jit(jax.grad(lambda x: conv.max_pool(x).sum())).trace(x)
  text = pulled.lower(lowering_platforms=(platform,)).as_text()
  assert ('scatter' in text) == scatters


def test_it_works_under_vmap_and_checkpoint():
  x, kernel, _ = operands(SHAPES[0])
  f = jax.checkpoint(lambda x, k: conv.conv(x, k, 1, 1).sum())
  many = jax.jit(jax.vmap(jax.grad(f, argnums=1), in_axes=(0, None)))
  found = many(x[:, None], kernel).sum(axis=0)
  expected = jax.grad(lambda k: lax_conv(x, k, 1, 1).sum())(kernel)
  np.testing.assert_allclose(found, expected, atol=1e-3)


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxprog.models import conv, winograd
conv._LEAST_FLOP = 0
mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
divided, copied = (NamedSharding(mesh, P(*a)) for a in (('data',), ()))
winograd._BAND_BYTES = 1 << 20
for size, stride, channels in (
    (8, 1, 32), (16, 1, 32), (4, 1, 8), (8, 2, 16)):
  x = jax.random.normal(jax.random.key(0), (16, size, size, channels))
  k = jax.random.normal(jax.random.key(1), (3, 3, channels, channels))
  def f(x, k):
    y = conv.conv(x, k, stride, 1)
    return jnp.sum(conv.max_pool(y) ** 2)
  grad = jax.grad(f, argnums=(0, 1))
  step = jax.jit(grad, in_shardings=(divided, copied),
                 out_shardings=(divided, copied))
  text = step.lower(x, k).compile().as_text()
  assert 'all-gather' not in text and 'all-to-all' not in text, text
  for a, b in zip(step(x, k), jax.jit(grad)(x, k)):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
print('fine')
"""


@pytest.mark.slow
def test_a_sharded_batch_stays_where_it_is():
  flags = '--xla_force_host_platform_device_count=8'
  result = subprocess.run(
    [sys.executable, '-c', _SHARDED],
    env={**os.environ, 'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
  )
  assert result.stdout.strip() == 'fine', result.stderr[-3000:]


def test_other_platforms_get_one_plain_convolution():
  """What is compiled for decides, not where: no CPU formulation leaks out."""
  for shape in itertools.islice(SHAPES, 8):
    _, _, stride, padding, _, _ = shape
    x, kernel, _ = operands(shape)

    def loss(x, kernel, stride=stride, padding=padding):
      return conv.conv(x, kernel, stride, padding).sum()

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = grad.trace(x, kernel).lower(lowering_platforms=('tpu',)).as_text()
    assert text.count('stablehlo.convolution') == 3
    assert 'dot_general' not in text


@pytest.mark.parametrize('shape', [(3, 3, 5, 7), (1, 1, 64, 16), (32, 10)])
@pytest.mark.parametrize('jit', [False, True])
def test_kernels_drawn_as_vectors_are_flaxs_bit_for_bit(shape, jit):
  draw, flax = conv.lecun_normal, nn.initializers.lecun_normal()
  if jit:
    draw = jax.jit(draw, static_argnums=1)
    flax = jax.jit(flax, static_argnums=1)
  for seed in range(3):
    rng = jax.random.key(seed)
    np.testing.assert_array_equal(draw(rng, shape), flax(rng, shape))

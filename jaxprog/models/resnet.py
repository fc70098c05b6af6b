"""ResNet v1.5 (He et al. 2015, arXiv:1512.03385) for any image size.

v1.5 puts a bottleneck's stride on its 3x3 convolution, as torchvision does.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxprog.models import conv, norm

_ModuleDef = Callable[..., Any]

# ffcv's and Composer's limit: it spares the first convolution, which would
# lose the image's own edges.
_LEAST_BLUR_CHANNELS = 16


class Stem(NamedTuple):
  """How the first convolution shrinks the image; it holds no parameters."""

  stride: int
  pool: bool


def choose_stem(image_size: int) -> Stem:
  """Returns the stem that leaves at least 4x4 positions at the end.

  The published stem divides the image by 4 and the blocks by 8 more: 224 px
  end as 7x7, but 64 px would end as 2x2. Images below 32 px end smaller.
  """
  if image_size >= 128:
    return Stem(stride=2, pool=True)
  return Stem(stride=2 if image_size >= 64 else 1, pool=False)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  filters: int
  stride: int
  conv: _ModuleDef
  norm: _ModuleDef
  blur_pool: bool = False

  @nn.compact
  def __call__(self, x, path=None):
    """Returns (N, H / stride, W / stride, filters); `path` as `_pass`."""
    # Where there is a stride, both of the convolutions that see `x` have it.
    x = _blur_before_stride(self, x)
    y = self.conv(self.filters, 3, self.stride, name='conv1')(x)
    y = nn.relu(self.norm(name='norm1')(y))
    y = self.conv(self.filters, 3, 1, name='conv2')(y)
    y = self.norm(name='norm2', scale_init=nn.initializers.zeros)(y)
    y = _pass(y, path)
    return nn.relu(y + _shortcut(self, x, y))


class BottleneckBlock(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, the last four times as wide."""

  filters: int
  stride: int
  conv: _ModuleDef
  norm: _ModuleDef
  blur_pool: bool = False

  @nn.compact
  def __call__(self, x, path=None):
    """Returns (N, H / stride, W / stride, 4 * filters); `path` as `_pass`."""
    y = self.conv(self.filters, 1, 1, name='conv1')(x)
    y = nn.relu(self.norm(name='norm1')(y))
    y = _blur_before_stride(self, y)
    y = self.conv(self.filters, 3, self.stride, name='conv2')(y)
    y = nn.relu(self.norm(name='norm2')(y))
    y = self.conv(4 * self.filters, 1, 1, name='conv3')(y)
    y = self.norm(name='norm3', scale_init=nn.initializers.zeros)(y)
    y = _pass(y, path)
    x = _blur_before_stride(self, x)
    return nn.relu(y + _shortcut(self, x, y))


def _pass(y: jax.Array, path: jax.Array | None) -> jax.Array:
  """Returns residuals times `path`, f32 (N,), where there is one.

  In f32: what keeps their mean would be up to 0.4% off in bfloat16.
  """
  if path is None:
    return y
  return (path[:, None, None, None] * y).astype(y.dtype)


def _shortcut(block: BasicBlock | BottleneckBlock, x, y):
  """Returns `x`, projected if its shape is not that of `y`."""
  if x.shape == y.shape:
    return x
  features = y.shape[-1]
  x = block.conv(features, 1, block.stride, name='shortcut_conv')(x)
  return block.norm(name='shortcut_norm')(x)


def _blur_before_stride(block: BasicBlock | BottleneckBlock, x):
  """Returns `x`, blurred if `block` is about to skip pixels of it."""
  strided = block.stride > 1 and x.shape[-1] >= _LEAST_BLUR_CHANNELS
  return blur(x) if block.blur_pool and strided else x


def blur(x: jax.Array) -> jax.Array:
  """Returns NHWC images under the kernel [1, 2, 1] x [1, 2, 1] / 16.

  Each channel for itself, with zeros around the image (Zhang 2019,
  arXiv:1904.11486). Sums of shifted images: as a depthwise convolution XLA
  takes 20 times as long on CPU. Summed in f32 at least and rounded once.
  """
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  padded = jnp.pad(y, ((0, 0), (1, 1), (0, 0), (0, 0)))
  y = (padded[:, :-2] + 2 * y + padded[:, 2:]) / 4
  padded = jnp.pad(y, ((0, 0), (0, 0), (1, 1), (0, 0)))
  return ((padded[:, :, :-2] + 2 * y + padded[:, :, 2:]) / 4).astype(x.dtype)


class ResNet(nn.Module):
  """A residual network; the last norm of each block starts at zero.

  Parameters have the same shapes for every image size, so that weights fit
  across stages; only `head` depends on `num_classes`. With `blur_pool`,
  strided convolutions of the blocks see blurred images, as in ffcv-imagenet;
  that has no parameters. So many `norm_groups` of a training batch are
  normalised each by itself. With `remat_blocks`, the backward pass computes
  again what each residual block held, from what went into it.
  """

  block_sizes: Sequence[int]
  block: _ModuleDef
  num_classes: int
  num_filters: int = 64
  stem: Stem = Stem(stride=2, pool=True)
  stem_kernel: int = 7
  blur_pool: bool = False
  norm_groups: int = 1
  remat_blocks: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, paths=None, *, train: bool):
    """Returns f32 logits (N, num_classes) of images (N, H, W, 3).

    `paths`, f32 (N, blocks), is what the residual of each block is multiplied
    with: 0 where an image skips it.
    """
    conv_def = functools.partial(conv.Conv, dtype=self.dtype)
    norm_def = functools.partial(
      norm.BatchNorm,
      use_running_average=not train,
      groups=self.norm_groups,
      momentum=0.9,
      dtype=self.dtype,
    )
    x = x.astype(self.dtype)
    x = conv_def(
      self.num_filters, self.stem_kernel, self.stem.stride, name='stem_conv'
    )(x)
    pool = conv.max_pool if self.stem.pool else None
    # ReLU last: it leaves the largest the largest, too.
    x = nn.relu(norm_def(name='stem_norm')(x, pool))
    block = self.block
    if self.remat_blocks:
      keep = jax.checkpoint_policies.save_only_these_names(norm.STATISTICS)
      block = nn.remat(block, policy=keep)
    each = itertools.repeat(None) if paths is None else iter(paths.T)
    for i, size in enumerate(self.block_sizes):
      for j in range(size):
        x = block(
          filters=self.num_filters * 2**i,
          stride=2 if i > 0 and j == 0 else 1,
          conv=conv_def,
          norm=norm_def,
          blur_pool=self.blur_pool,
          name=f'block{i + 1}_{j + 1}',
        )(x, next(each))
    self.sow('intermediates', 'features', x)  # Nothing, unless asked for.
    # f32 from here: a bf16 softmax has three digits.
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return nn.Dense(
      self.num_classes,
      dtype=jnp.float32,
      kernel_init=conv.lecun_normal,
      name='head',
    )(x)


def path_rates(model: nn.Module, last: float) -> list[float]:
  """Returns the chance of each block that an image skips it.

  From 0 at the first to `last`, linearly: Huang et al. 2016 (arXiv:1603.09382)
  begin at last / blocks, timm and this at 0.
  """
  assert isinstance(model, ResNet)
  num = sum(model.block_sizes)
  return [last * i / (num - 1) for i in range(num)]


_MODELS: dict[str, tuple[tuple[int, ...], _ModuleDef]] = {
  'resnet10': ((1, 1, 1, 1), BasicBlock),
  'resnet18': ((2, 2, 2, 2), BasicBlock),
  'resnet34': ((3, 4, 6, 3), BasicBlock),
  'resnet50': ((3, 4, 6, 3), BottleneckBlock),
  'resnet101': ((3, 4, 23, 3), BottleneckBlock),
  'resnet152': ((3, 8, 36, 3), BottleneckBlock),
}


def find_name(block_sizes: Sequence[int], bottleneck: bool) -> str | None:
  """Returns the name of a network by its blocks, None if it has none."""
  wanted = tuple(block_sizes), BottleneckBlock if bottleneck else BasicBlock
  return next((name for name, x in _MODELS.items() if x == wanted), None)


def create_model(name: str, *, image_size: int, **fields: Any) -> ResNet:
  """Returns the network `name` with the stem that suits `image_size`.

  `fields` are as in `ResNet`; `num_classes` is one that must be given.
  """
  block_sizes, block = _MODELS[name]
  return ResNet(block_sizes, block, stem=choose_stem(image_size), **fields)

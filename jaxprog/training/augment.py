"""Images on the device: uint8 in, changed at random, normalised f32 out.

What happens to an example is a function of its key, and that of the run's
seed, the epoch and the example's index: batches, devices and workers do not
matter. Only `mix` pairs examples, and draws once a step.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What adjust_colors changes. Draws depend on their order.
COLORS = ('brightness', 'contrast', 'saturation', 'hue')
# Weights of red, green and blue in a grey level: torchvision's.
_GREY = (0.2989, 0.587, 0.114)
# Smallest ratio of an erased rectangle's sides; its inverse is the largest.
_ERASING_ASPECT = 0.3
# Rectangles to draw until one fits: torchvision's number.
_ERASING_TRIES = 10

# Streams of random numbers that must never meet.
_FLIP, _COLORS, _ERASING, _NOISE, _PATHS = 0, 1, 2, 3, 4
# In place of an example's index, which is never as large.
_MIX = 2**31 - 1


def normalise(
  images: jax.Array, mean_rgb: Sequence[float], std_rgb: Sequence[float]
) -> jax.Array:
  """Returns (images / 255 - mean) / std as f32, channel by channel."""
  mean = 255 * jnp.asarray(mean_rgb, jnp.float32)
  std = 255 * jnp.asarray(std_rgb, jnp.float32)
  return (images.astype(jnp.float32) - mean) / std


def example_keys(
  rng: jax.Array, epoch: jax.Array, index: jax.Array
) -> jax.Array:
  """Returns a key for each example, of (rng, epoch, index) alone.

  `epoch` and `index` are int32 (N,). The functions below draw from streams of
  their own: all of them take the same keys.
  """

  def fold(epoch, index):
    return jax.random.fold_in(jax.random.fold_in(rng, epoch), index)

  return jax.vmap(fold)(epoch, index)


def choose_mirrored(
  rng: jax.Array,
  epoch: jax.Array,
  index: jax.Array,
  *,
  alternating: bool = False,
) -> jax.Array:
  """Returns who is to be mirrored, bool (N,), from int32 epochs and indices.

  A coin decides for each example and epoch. `alternating`: it decides in
  epoch 0 alone, and from there on the example is mirrored every other epoch:
  two epochs show each example both ways (Jordan 2024, arXiv:2404.00498).
  """
  drawn_in = jnp.zeros_like(epoch) if alternating else epoch
  keys = _stream(example_keys(rng, drawn_in, index), _FLIP)
  mirrored = jax.vmap(jax.random.bernoulli)(keys)
  return mirrored ^ (epoch % 2 == 1) if alternating else mirrored


def mirror(images: jax.Array, mirrored: jax.Array) -> jax.Array:
  """Returns `images` (N, H, W, C), left and right exchanged where told."""
  return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def color_ranges(strengths: Mapping[str, float]) -> np.ndarray:
  """Returns where the amounts of kinds lie that are not 0, f32 (2, K).

  As torchvision's ColorJitter: of strength x, a factor is in
  [max(0, 1 - x), 1 + x], and the hue turns by as much as [-x, x].
  """
  kinds = {kind: x for kind, x in strengths.items() if x}
  low = [-x if k == 'hue' else max(0.0, 1 - x) for k, x in kinds.items()]
  high = [x if k == 'hue' else 1 + x for k, x in kinds.items()]
  return np.array((low, high), np.float32)


def draw_colors(keys: jax.Array, ranges: Any) -> tuple[jax.Array, jax.Array]:
  """Returns the `amounts` and `order` of `adjust_colors`, at random.

  Amounts are uniform in `ranges`, (2, K).
  """
  start, stop = ranges

  def draw(key):
    amounts, ranks = jax.random.uniform(key, (2, len(start)))
    return start + (stop - start) * amounts, jnp.argsort(ranks)

  return jax.vmap(draw)(_stream(keys, _COLORS))


def adjust_colors(
  images: jax.Array,
  kinds: tuple[str, ...],
  amounts: jax.Array,
  order: jax.Array,
) -> jax.Array:
  """Returns images (N, H, W, 3) after K operations each, f32 in [0, 255].

  As torchvision's ColorJitter on float images.

  Args:
    images: in [0, 255].
    kinds: K of COLORS.
    amounts: f32 (N, K), of each kind: the factor of all channels, of the
      distance to the image's mean grey or of that to the pixel's grey, or turns
      of the hue.
    order: int32 (N, K): which of `kinds` comes first, second and so on.
  """
  # Channel by channel, because compilers do badly on a last axis of 3: six
  # times as quick on a CPU.
  rgb = [images[..., i].astype(jnp.float32) for i in range(3)]
  for place in range(len(kinds)):
    now = order[:, place, None]
    amount = jnp.take_along_axis(amounts, now, axis=1)
    rgb = _adjust_once(rgb, kinds, now[..., None], amount[..., None])
  return jnp.stack(rgb, axis=-1)


def _adjust_once(rgb, kinds, now, amount):
  """Returns three channels (N, H, W), each image after kinds[now].

  All but the hue blend an image with something: black, its mean grey or its
  own greys. The image picks it; one blend does for all of them.
  """

  def turn(kind):
    return now == kinds.index(kind)

  other = jnp.zeros(())
  if 'contrast' in kinds or 'saturation' in kinds:
    grey = sum(w * x for w, x in zip(_GREY, rgb, strict=True))
    if 'saturation' in kinds:
      other = jnp.where(turn('saturation'), grey, other)
    if 'contrast' in kinds:
      mean = grey.mean(axis=(1, 2), keepdims=True)
      other = jnp.where(turn('contrast'), mean, other)
  if kinds == ('hue',):
    return _turn_hue(rgb, amount)
  blended = [jnp.clip(amount * x + (1 - amount) * other, 0, 255) for x in rgb]
  if 'hue' not in kinds:
    return blended
  turned = _turn_hue(rgb, amount)
  return [
    jnp.where(turn('hue'), x, y) for x, y in zip(turned, blended, strict=True)
  ]


def _turn_hue(rgb: Sequence[jax.Array], turns: jax.Array) -> list[jax.Array]:
  """Returns red, green and blue after so many turns of the colour wheel.

  Value and chroma stay. From HSV without cases: a channel is
  V - C * clip(min(k, 4 - k), 0, 1) with k = (n + 6 H) mod 6 and n = 5, 3, 1.
  """
  red, green, blue = rgb
  high = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = high - jnp.minimum(jnp.minimum(red, green), blue)
  from_green = jnp.where(
    high == green, blue - red + 2 * chroma, red - green + 4 * chroma
  )
  sixths = jnp.where(high == red, green - blue, from_green)
  sixths = sixths / jnp.where(chroma == 0, 1, chroma) + 6 * turns

  def channel(n):
    k = n + sixths
    k -= 6 * jnp.floor(k / 6)  # On a CPU a quarter of the time of k % 6.
    return high - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  return [channel(5), channel(3), channel(1)]


def random_erasing(
  keys: jax.Array,
  images: jax.Array,
  *,
  probability: Any,
  min_area: Any,
  more_area: Any,
) -> jax.Array:
  """Returns normalised images, f32 (N, H, W, C), some with a hole of noise.

  With `probability`, a rectangle is filled with standard normal noise, pixel
  by pixel (Zhong et al. 2017, arXiv:1708.04896; timm's 'pixel' mode). Its area
  is uniform in [min_area, min_area + more_area] of the image's, the logarithm
  of its aspect uniform. Of ten drawn the first that is smaller than the image
  in both directions is taken; if none is, nothing is erased.
  """
  height, width, channels = images.shape[1:]

  def fill(key, noise_key, image):
    erased = _erased(key, height, width, probability, min_area, more_area)
    noise = jax.random.normal(noise_key, (height, width, channels))
    return jnp.where(erased[..., None], noise, image)

  return jax.vmap(fill)(_stream(keys, _ERASING), _stream(keys, _NOISE), images)


def _erased(key, height, width, probability, min_area, more_area):
  """Returns the mask of a random rectangle or of nothing, (height, width)."""
  drawn = jax.random.uniform(key, (3 + 2 * _ERASING_TRIES,))
  (chance, y, x), area, aspect = jnp.split(drawn, (3, 3 + _ERASING_TRIES))
  area = height * width * (min_area + more_area * area)
  aspect = _ERASING_ASPECT ** (2 * aspect - 1)
  heights = jnp.round(jnp.sqrt(area * aspect))
  widths = jnp.round(jnp.sqrt(area / aspect))
  fits = (heights < height) & (widths < width)
  first = jnp.argmax(fits)
  box_height, box_width = heights[first], widths[first]
  top = jnp.floor(y * (height - box_height + 1))
  left = jnp.floor(x * (width - box_width + 1))
  erased = _rectangle(
    height, width, top, left, top + box_height, left + box_width
  )
  return erased & fits[first] & (chance < probability)


def _rectangle(height, width, top, left, bottom, right):
  """Returns where rows are in [top, bottom) and columns in [left, right)."""
  y, x = jnp.arange(height)[:, None], jnp.arange(width)
  return (top <= y) & (y < bottom) & (left <= x) & (x < right)


def draw_paths(keys: jax.Array, rates: Any) -> jax.Array:
  """Returns what the residual of each block is multiplied with, f32 (N, B).

  It is 0 with the chance that `rates`, (B,), names, and else what makes its
  mean 1 (Huang et al. 2016, arXiv:1603.09382; the scale is timm's DropPath's).
  """
  kept = 1 - jnp.asarray(rates, jnp.float32)

  def draw(key):
    return jnp.where(jax.random.uniform(key, kept.shape) < kept, 1 / kept, 0)

  return jax.vmap(draw)(_stream(keys, _PATHS))


def keep_low_frequencies(images: jax.Array, size: int) -> jax.Array:
  """Returns the low frequencies of images, f32 (N, size, size, C).

  The middle size x size of the spectrum, transformed back and divided by the
  pixels that are lost, so that means stay: low-frequency cropping (Wang et al.
  2024, arXiv:2405.08768, section 4.1). An even `size` keeps one frequency
  whose mirror image it drops; of what comes back the real part counts.

  Both transforms are linear in rows and in columns: two matrix products, as
  quick as an FFT at these sizes, shared by devices as any other.
  """
  if images.shape[1] == size:
    return images
  matrix = _low_frequency_matrix(images.shape[1], size)
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  rows = product('ih,nhwc->niwc', matrix.real.astype(np.float32), images)
  kept = product('jw,niwc->nijc', matrix.real.astype(np.float32), rows)
  # The imaginary part is of rank one: one frequency, alternating signs.
  wave = matrix.imag[0].astype(np.float32)
  lost = product('h,nhwc,w->nc', wave, images, wave)
  signs = np.float32(1 - 2 * (np.arange(size) % 2))
  return kept - product('i,j,nc->nijc', signs, signs, lost)


def _low_frequency_matrix(length: int, size: int) -> np.ndarray:
  """Returns what makes `size` samples of `length`, complex (size, length)."""
  spectrum = np.fft.fftshift(np.fft.fft(np.eye(length), axis=0), axes=0)
  first = length // 2 - size // 2
  middle = np.fft.ifftshift(spectrum[first : first + size], axes=0)
  return np.fft.ifft(middle, axis=0) * size / length


def mix(
  rng: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  mixup_alpha: Any = None,
  cutmix_alpha: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns images and targets, each mixed with those of the example before.

  One share a step is drawn from Beta(alpha, alpha). Mixup (Zhang et al. 2017,
  arXiv:1710.09412) averages two images with it. CutMix (Yun et al. 2019,
  arXiv:1905.04899) keeps it of the one and pastes a rectangle of the other
  over the rest, at the same place; its share is then the one of the pixels. If
  both alphas are set, a coin decides for one of them.

  Args:
    rng: of this step.
    images: f32 (N, H, W, C).
    targets: f32 (N, classes), of which each row sums to 1.
    weights: (N,), of the examples in the loss. One whose partner has 0, such
      as an image that could not be read, stays as it is.
    mixup_alpha: above 0; None: no mixup.
    cutmix_alpha: above 0; None: no CutMix.
  """
  if mixup_alpha is None and cutmix_alpha is None:
    return images, targets
  height, width = images.shape[1:3]
  share_of_pixel, share = _draw_shares(
    rng, height, width, mixup_alpha, cutmix_alpha
  )
  mixed = jnp.roll(weights, 1) > 0
  share_of_pixel = jnp.where(
    mixed[:, None, None, None], share_of_pixel[..., None], 1
  )
  share = jnp.where(mixed[:, None], share, 1)
  return _average(images, share_of_pixel), _average(targets, share)


def _average(x: jax.Array, share: jax.Array) -> jax.Array:
  return share * x + (1 - share) * jnp.roll(x, 1, axis=0)


def _draw_shares(rng, height, width, mixup_alpha, cutmix_alpha):
  """Returns what stays of each pixel, (height, width), and of the target."""
  rng = jax.random.fold_in(rng, _MIX)
  coin_key, share_key, box_key = jax.random.split(rng, 3)
  if mixup_alpha is None or cutmix_alpha is None:
    cut = jnp.array(mixup_alpha is None)
    alpha = jnp.float32(cutmix_alpha if mixup_alpha is None else mixup_alpha)
  else:
    cut = jax.random.bernoulli(coin_key)
    alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
  share = jax.random.beta(share_key, alpha, alpha)
  pasted = _pasted(box_key, height, width, share)
  return (
    jnp.where(cut, jnp.where(pasted, 0.0, 1.0), share),
    jnp.where(cut, 1 - pasted.mean(), share),
  )


def _pasted(key, height, width, share):
  """Returns the mask of a rectangle of area 1 - share, cut at the edges."""
  side = jnp.sqrt(1 - share)
  box_height = jnp.floor(height * side)
  box_width = jnp.floor(width * side)
  y, x = jnp.floor(jax.random.uniform(key, (2,)) * jnp.array([height, width]))
  top, left = y - box_height // 2, x - box_width // 2
  return _rectangle(
    height, width, top, left, top + box_height, left + box_width
  )


def _stream(keys: jax.Array, stream: int) -> jax.Array:
  return jax.vmap(jax.random.fold_in, (0, None))(keys, stream)

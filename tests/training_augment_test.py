import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprog.training import augment

RNG = jax.random.key(7)
KINDS = ('brightness', 'contrast', 'saturation', 'hue')
JITTER = {'brightness': 0.4, 'contrast': 0.5, 'saturation': 0.6, 'hue': 0.2}
ERASING = {'probability': 0.5, 'min_area': 0.05, 'more_area': 0.35}
# Tests spend their time on compilation: a quarter of it without optimisation.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def pixels(n, height=12, width=10, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, height, width, 3)).astype(np.uint8)


def keys(n, epoch=0):
  return augment.example_keys(RNG, jnp.full(n, epoch), jnp.arange(n))


def jitter(keys, images, **strengths):
  drawn = augment.draw_colors(keys, augment.color_ranges(strengths))
  return augment.adjust_colors(images, tuple(strengths), *drawn)


def all_of(images, epoch, index):
  """Returns what happens to each example by itself."""
  images = augment.mirror(
    images, augment.choose_mirrored(RNG, epoch, index, alternating=False)
  )
  drawn = augment.example_keys(RNG, epoch, index)
  images = jitter(drawn, images, **JITTER)
  images = augment.normalise(images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
  return augment.random_erasing(drawn, images, **ERASING)


def chi_squared(counts):
  counts = np.asarray(counts)
  return ((counts - counts.mean()) ** 2).sum() / counts.mean()


def test_normalise_written_down():
  images = pixels(2)
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
  got = augment.normalise(images, mean, std)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, (images / 255 - mean) / std, atol=1e-6)


def test_keys_are_of_rng_epoch_and_index():
  epoch, index = (x.ravel() for x in np.mgrid[0:20, 0:30])
  create = jit(lambda *x: jax.random.key_data(augment.example_keys(*x)))
  found = [
    np.asarray(create(rng, epoch, index)) for rng in (RNG, jax.random.key(8))
  ]
  assert len(np.unique(np.concatenate(found), axis=0)) == 1200
  expected = jax.random.fold_in(jax.random.fold_in(RNG, 3), 4)
  np.testing.assert_array_equal(found[0][94], jax.random.key_data(expected))


def test_an_example_does_not_depend_on_its_batch():
  images = pixels(16)
  index, epoch = np.arange(100, 116), np.arange(16) % 3
  augmented = jit(all_of)
  whole = np.asarray(augmented(images, epoch, index))
  assert len(np.unique(whole, axis=0)) == 16
  later = np.asarray(augmented(images, epoch + 1, index))
  assert (later != whole).any(axis=(1, 2, 3)).all()
  order = np.random.default_rng(0).permutation(16)
  shuffled = augmented(images[order], epoch[order], index[order])
  np.testing.assert_array_equal(shuffled, whole[order])
  # Three of them among strangers.
  images[3:], index[3:] = pixels(13, seed=1), np.arange(13)
  among_others = augmented(images, epoch, index)
  np.testing.assert_array_equal(among_others[:3], whole[:3])


@pytest.mark.parametrize('dtype', [np.uint8, np.float32, jnp.bfloat16])
def test_mirror_exchanges_left_and_right_where_told(dtype):
  images = pixels(3).astype(dtype)
  got = augment.mirror(images, jnp.array([True, False, True]))
  assert got.dtype == dtype
  expected = images.copy()
  expected[[0, 2]] = images[[0, 2], :, ::-1]
  np.testing.assert_array_equal(got, expected)


@functools.cache
def compiled_choice(alternating):
  choose = functools.partial(augment.choose_mirrored, alternating=alternating)
  return jit(choose)


def mirrored(epoch, n=10_000, alternating=False):
  choose = compiled_choice(alternating)
  return np.asarray(choose(RNG, jnp.full(n, epoch), jnp.arange(n)))


def test_a_coin_an_epoch_decides_who_is_mirrored():
  first, second = mirrored(0), mirrored(1)
  assert first.dtype == bool
  # 10,000 coins: a standard error is 0.005.
  assert abs(first.mean() - 0.5) < 0.0165
  assert abs((first == second).mean() - 0.5) < 0.0165
  assert abs((first[1:] == first[:-1]).mean() - 0.5) < 0.0165


def test_alternating_shows_each_example_both_ways_in_two_epochs():
  first = mirrored(0, alternating=True)
  np.testing.assert_array_equal(first, mirrored(0))
  for epoch in range(5):
    now = mirrored(epoch, alternating=True)
    np.testing.assert_array_equal(now, first ^ bool(epoch % 2))
  mixed = augment.choose_mirrored(
    RNG, jnp.array([4, 7, 7]), jnp.array([3, 3, 4]), alternating=True
  )
  assert mixed.tolist() == [first[3], not first[3], not first[4]]


@pytest.fixture(scope='module')
def torch_colors():
  """torchvision's operations on float images in [0, 1], by kind."""
  functional = parity.import_module('torchvision.transforms.v2.functional')
  import torch

  def adjust(kind, image, amount):
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    got = getattr(functional, f'adjust_{kind}')(tensor, float(amount))
    return got.numpy().transpose(1, 2, 0)

  return adjust


def hard_images(n):
  """Returns images with greys, black, white, pure and tied channels."""
  images = pixels(n, 24, 20).astype(np.float32)
  images[:, 0] = images[:, 0, :, :1]
  images[:, 1, :, 1] = images[:, 1, :, 2]
  images[:, 2, :, 0] = images[:, 2, :, 1]
  images[:, 3] = np.eye(3)[np.arange(20) % 3] * 255
  images[:, 4, :10], images[:, 4, 10:] = 0, 255
  images[0] = 0
  images[1] = 255
  images[2] /= 7.3
  return images


@pytest.mark.parametrize(
  'kinds', [*((kind,) for kind in KINDS), KINDS[:3], KINDS[1:], KINDS]
)
def test_colors_are_those_of_torchvision_in_every_order(torch_colors, kinds):
  orders = list(itertools.permutations(range(len(kinds))))
  n = 24
  order = np.resize(np.array(orders), (n, len(kinds)))
  images = hard_images(n)
  rng = np.random.default_rng(1)
  hue = np.array(kinds) == 'hue'
  low, high = np.where(hue, -0.5, 0), np.where(hue, 0.5, 2.5)
  amounts = rng.uniform(low, high, (n, len(kinds))).astype(np.float32)
  adjust = jit(augment.adjust_colors, static_argnums=1)
  got = adjust(images, kinds, amounts, order)
  for i in range(n):
    expected = images[i] / 255
    for k in order[i]:
      expected = torch_colors(kinds[k], expected, amounts[i, k])
    np.testing.assert_allclose(got[i] / 255, expected, atol=1e-5)


def test_factors_and_orders_are_uniform():
  n = 12_000
  strengths = {**JITTER, 'contrast': 1.5}
  draw = jit(
    functools.partial(
      augment.draw_colors, ranges=augment.color_ranges(strengths)
    )
  )
  amounts, order = map(np.asarray, draw(keys(n)))
  ranges = np.array([(0.6, 1.4), (0, 2.5), (0.4, 1.6), (-0.2, 0.2)])
  for found, (low, high) in zip(amounts.T, ranges, strict=True):
    assert low <= found.min() <= found.max() <= high
    counts, _ = np.histogram(found, 20, (low, high))
    # 20 cells: chance exceeds 43.8 once in a thousand.
    assert chi_squared(counts) < 43.8
  # Independent of one another: a standard error is 1 / sqrt(n).
  correlations = np.corrcoef(amounts.T) - np.eye(4)
  assert np.abs(correlations).max() < 4 / np.sqrt(n)
  _, counts = np.unique(order, axis=0, return_counts=True)
  assert len(counts) == 24
  # 24 cells: chance exceeds 49.7 once in a thousand.
  assert chi_squared(counts) < 49.7


def traced(**strengths):
  jittered = functools.partial(jitter, **strengths)
  return str(jax.make_jaxpr(jittered)(keys(2), pixels(2)))


def test_other_colors_are_not_traced():
  # A mean is a sum, a hue needs a floor, a random number a shift of bits.
  signs = 'reduce_sum', 'floor', 'shift_right_logical'
  for strengths, expected in (
    ({'brightness': 0.1}, (False, False, True)),
    ({'contrast': 0.1}, (True, False, True)),
    ({'brightness': 0.1, 'saturation': 0.1}, (False, False, True)),
    ({'hue': 0.1}, (False, True, True)),
  ):
    found = traced(**strengths)
    assert tuple(sign in found for sign in signs) == expected, strengths
  assert ' clamp' not in traced(hue=0.1).split('floor')[0]


@functools.cache
def compiled_erasing():
  return jit(
    lambda *numbers: augment.random_erasing(
      keys(2000),
      jnp.full((2000, 24, 32, 2), -9.0),
      probability=numbers[0],
      min_area=numbers[1],
      more_area=numbers[2],
    )
  )


def erased(**options):
  """Returns 2000 images of -9 after erasing, and masks of what was erased."""
  numbers = {**ERASING, **options}.values()
  got = np.asarray(compiled_erasing()(*map(float, numbers)))
  return got, (got != -9).any(axis=-1)


def boxes(masks):
  """Returns top, left, height, width of each mask, checked to be full."""
  found = []
  for mask in masks:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    assert mask.sum() == box[2] * box[3]
    found.append(box)
  return np.array(found)


def drawn_boxes(n, height, width):
  """Returns heights and widths of rectangles that fit, from NumPy."""
  rng = np.random.default_rng(0)
  area = height * width * rng.uniform(0.05, 0.4, n)
  aspect = np.exp(rng.uniform(np.log(0.3), -np.log(0.3), n))
  sides = np.round([np.sqrt(area * aspect), np.sqrt(area / aspect)])
  return sides[:, (sides[0] < height) & (sides[1] < width)]


def test_erased_rectangles_have_the_chance_area_and_aspect_asked_for():
  _, masks = erased()
  hit = masks.any(axis=(1, 2))
  # A standard error is 0.5 / sqrt(2000) = 0.011.
  assert abs(hit.mean() - 0.5) < 0.037
  top, left, height, width = boxes(masks[hit]).T
  expected_height, expected_width = drawn_boxes(400_000, 24, 32)
  for found, expected in (
    (height * width, expected_height * expected_width),
    (np.log(height / width), np.log(expected_height / expected_width)),
  ):
    error = expected.std() / np.sqrt(len(found))
    assert abs(found.mean() - expected.mean()) < 3.3 * error
    # The spread of a flat distribution has half of that error, or less.
    assert abs(found.std() / expected.std() - 1) < 3.3 / np.sqrt(len(found))
  for start, rest in ((top, 24 - height), (left, 32 - width)):
    # Anywhere between both edges alike: mean 1/2, variance about 1/12.
    assert start.min() == 0
    assert (start == rest).any()
    at = (start + 0.5) / (rest + 1)
    assert abs(at.mean() - 0.5) < 3.3 * np.sqrt(1 / 12 / len(at))


def test_erased_pixels_are_standard_normal_and_the_rest_stays():
  got, masks = erased(probability=1)
  assert masks.any(axis=(1, 2)).mean() > 0.99
  noise = got[masks]
  n = noise.size
  assert abs(noise.mean()) < 3.3 / np.sqrt(n)
  assert abs(noise.std() - 1) < 3.3 / np.sqrt(2 * n)
  # Channels, neighbours and images differ.
  assert abs(np.corrcoef(noise.T)[0, 1]) < 3.3 / np.sqrt(n / 2)
  next_to = masks[:, :, 1:] & masks[:, :, :-1]
  pairs = got[:, :, 1:][next_to].ravel(), got[:, :, :-1][next_to].ravel()
  assert abs(np.corrcoef(pairs)[0, 1]) < 3.3 / np.sqrt(len(pairs[0]))
  assert len(np.unique(noise)) > 0.9 * n
  assert (got[~masks] == -9).all()


def test_a_rectangle_that_never_fits_erases_nothing():
  _, masks = erased(probability=1, min_area=1, more_area=0)
  assert not masks.any()
  _, masks = erased(probability=0)
  assert not masks.any()


def test_ten_rectangles_are_drawn_until_one_fits():
  _, masks = erased(probability=1, min_area=0.8, more_area=0)
  # Both sides round to less than the image's if the aspect is between these.
  area = 0.8 * 24 * 32
  lowest, highest = area / 31.5**2, 23.5**2 / area
  one = np.log(highest / lowest) / (2 * -np.log(0.3))
  ten = 1 - (1 - one) ** 10
  error = np.sqrt(ten * (1 - ten) / 2000)
  assert abs(masks.any(axis=(1, 2)).mean() - ten) < 3.3 * error


@functools.cache
def compiled_mix(mixup_alpha, cutmix_alpha):
  mix = functools.partial(
    augment.mix,
    mixup_alpha=mixup_alpha or None,
    cutmix_alpha=cutmix_alpha or None,
  )
  return jit(jax.vmap(mix, (0, None, None, None)))


def mix_many(mixup_alpha, cutmix_alpha, weights=(1, 1, 1, 1)):
  """Returns images and targets of 1500 steps, and what was mixed."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(4, 16, 12, 3)).astype(np.float32)
  targets = np.eye(4, 5, dtype=np.float32)
  mixed = compiled_mix(mixup_alpha, cutmix_alpha)(
    jax.random.split(jax.random.key(3), 1500),
    images,
    targets,
    np.array(weights, np.float32),
  )
  return *map(np.asarray, mixed), images, targets


def check_shares(shares, alpha):
  """Asserts mean and variance of Beta(alpha, alpha)."""
  n, variance = len(shares), 1 / (4 * (2 * alpha + 1))
  assert abs(shares.mean() - 0.5) < 3.3 * np.sqrt(variance / n)
  squares = (shares - 0.5) ** 2
  assert abs(squares.mean() - variance) < 3.3 * squares.std() / np.sqrt(n)


@pytest.mark.parametrize(('side', 'size'), [(32, 16), (33, 16), (32, 15)])
def test_low_frequencies_are_the_middle_of_numpys_spectrum(side, size):
  images = np.random.default_rng(0).normal(size=(2, side, side, 3))
  spectrum = np.fft.fftshift(np.fft.fft2(images, axes=(1, 2)), axes=(1, 2))
  first = side // 2 - size // 2
  rows = slice(first, first + size)
  middle = np.fft.ifftshift(spectrum[:, rows, rows], axes=(1, 2))
  expected = np.fft.ifft2(middle, axes=(1, 2)).real * (size / side) ** 2
  found = augment.keep_low_frequencies(images.astype(np.float32), size)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  means = found.mean((1, 2)), images.mean((1, 2))
  np.testing.assert_allclose(*means, atol=1e-6)


def test_waves_that_fit_a_smaller_image_lose_nothing():
  def wave(side):
    x = np.arange(side) / side
    rows, columns = np.cos(2 * np.pi * 3 * x), np.sin(2 * np.pi * 5 * x)
    return np.outer(1 + rows, columns)[None, :, :, None].astype(np.float32)

  found = augment.keep_low_frequencies(wave(64), 16)
  np.testing.assert_allclose(found, wave(16), atol=1e-5)
  np.testing.assert_array_equal(
    augment.keep_low_frequencies(wave(64), 64), wave(64)
  )


def test_mixup_averages_with_one_share_a_step():
  mixed, mixed_targets, images, targets = mix_many(0.2, 0.0)
  shares = mixed_targets[:, 0, 0]
  check_shares(shares, 0.2)
  np.testing.assert_allclose(mixed_targets.sum(-1), 1, atol=1e-6)
  share = shares[:, None, None]
  expected = share * targets + (1 - share) * np.roll(targets, 1, axis=0)
  np.testing.assert_allclose(mixed_targets, expected, atol=1e-6)
  share = share[..., None, None]
  expected = share * images + (1 - share) * np.roll(images, 1, axis=0)
  np.testing.assert_allclose(mixed, expected, atol=1e-5)


def drawn_pastes(n, alpha, height, width):
  """Returns the pasted part of the image, from NumPy."""
  rng = np.random.default_rng(0)
  side = np.sqrt(1 - rng.beta(alpha, alpha, n))
  part = np.ones(n)
  for length in (height, width):
    box = np.floor(length * side)
    start = rng.integers(length, size=n) - box // 2
    part *= (np.minimum(start + box, length) - np.maximum(start, 0)) / length
  return part


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels():
  mixed, mixed_targets, images, targets = mix_many(0.0, 1.0)
  n = len(mixed)
  own, other = mixed == images, mixed == np.roll(images, 1, axis=0)
  assert (own ^ other).all()
  masks = other.all(axis=-1)
  np.testing.assert_array_equal(masks[..., None] | own, True)
  assert (masks == masks[:, :1]).all()
  masks = masks[:, 0]
  hit = masks.any(axis=(1, 2))
  boxes(masks[hit])
  part = masks.mean(axis=(1, 2))
  share = 1 - part[:, None, None]
  expected = share * targets + (1 - share) * np.roll(targets, 1, axis=0)
  np.testing.assert_allclose(mixed_targets, expected, atol=1e-6)
  np.testing.assert_allclose(mixed_targets.sum(-1), 1, atol=1e-6)
  drawn = drawn_pastes(400_000, 1.0, 16, 12)
  assert abs(part.mean() - drawn.mean()) < 3.3 * drawn.std() / np.sqrt(n)
  assert abs(part.std() / drawn.std() - 1) < 3.3 / np.sqrt(2 * n)
  # The centre of a small one is anywhere.
  small = boxes(masks[hit & (part < 0.02)])
  assert len(np.unique(small[:, 0])) > 10
  assert len(np.unique(small[:, 1])) > 8


def test_each_step_mixes_or_cuts_by_a_coin():
  mixed, mixed_targets, images, _ = mix_many(0.4, 2.0)
  other = np.roll(images, 1, axis=0)
  cut = ((mixed == images) | (mixed == other)).all(axis=(1, 2, 3, 4))
  # A share that rounds to 1 looks like a cut: few of Beta(0.4, 0.4).
  assert abs(cut.mean() - 0.5) < 3.3 * 0.5 / np.sqrt(len(cut))
  check_shares(mixed_targets[~cut, 0, 0], 0.4)
  part = 1 - mixed_targets[cut, 0, 0]
  drawn = drawn_pastes(400_000, 2.0, 16, 12)
  error = drawn.std() / np.sqrt(len(part))
  assert abs(part.mean() - drawn.mean()) < 3.3 * error
  assert abs(part.std() / drawn.std() - 1) < 3.3 / np.sqrt(2 * len(part))


@pytest.mark.parametrize('alphas', [(0.2, 0.0), (0.0, 1.0), (0.4, 2.0)])
def test_nothing_is_mixed_with_an_image_of_weight_zero(alphas):
  mixed, mixed_targets, images, targets = mix_many(*alphas, (1, 0, 1, 1))
  expected, expected_targets, _, _ = mix_many(*alphas)
  assert (mixed[:, 2] == images[2]).all()
  assert (mixed_targets[:, 2] == targets[2]).all()
  np.testing.assert_array_equal(mixed[:, [0, 1, 3]], expected[:, [0, 1, 3]])
  np.testing.assert_array_equal(
    mixed_targets[:, [0, 1, 3]], expected_targets[:, [0, 1, 3]]
  )


def test_without_alphas_nothing_is_mixed():
  images, targets = jnp.ones((2, 4, 4, 3)), jnp.eye(2)
  got = augment.mix(RNG, images, targets, jnp.ones(2))
  assert got[0] is images
  assert got[1] is targets


def on(devices):
  """Returns a batch after everything, computed on these devices."""

  def step(images, epoch, index, targets, weights):
    mirrored = augment.choose_mirrored(RNG, epoch, index, alternating=True)
    images = all_of(augment.mirror(images, mirrored), epoch, index)
    mixed = augment.mix(
      jax.random.fold_in(RNG, 1),
      images,
      targets,
      weights,
      mixup_alpha=0.2,
      cutmix_alpha=1.0,
    )
    drawn = augment.example_keys(RNG, epoch, index)
    return *mixed, augment.draw_paths(drawn, (0.0, 0.5, 0.5))

  mesh = jax.make_mesh(
    (len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices
  )
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  n = 32
  batch = (
    pixels(n),
    np.full(n, 5),
    np.arange(n) * 3,
    np.eye(n, dtype=np.float32),
    np.arange(n) % 7 > 0,
  )
  outputs = jit(step)(*jax.device_put(batch, sharding))
  assert len(outputs[0].sharding.device_set) == len(devices)
  return [np.asarray(x) for x in outputs]


def largest_difference():
  one, eight = on(jax.devices()[:1]), on(jax.devices())
  return max(
    float(np.abs(a - b).max()) for a, b in zip(one, eight, strict=True)
  )


def test_eight_devices_compute_what_one_does():
  code = (
    'import jax, training_augment_test as t; '
    'print(jax.device_count(), t.largest_difference())'
  )
  folder = pathlib.Path(__file__).parent
  found = subprocess.run(
    [sys.executable, '-c', code],
    cwd=folder,
    env={
      **os.environ,
      'PYTHONPATH': f'{folder}{os.pathsep}{folder.parent}',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    },
    capture_output=True,
    text=True,
    check=True,
  )
  devices, difference = found.stdout.split()
  assert int(devices) == 8
  assert float(difference) <= 1e-6


def test_paths_are_dropped_as_often_as_asked_and_keep_their_mean():
  rates, n = np.array([0.0, 0.1, 0.5, 0.9]), 20_000
  draw = jit(lambda keys: augment.draw_paths(keys, rates))
  paths = np.asarray(draw(keys(n)))
  np.testing.assert_allclose(
    np.where(paths == 0, 1 / (1 - rates), paths),
    np.broadcast_to(1 / (1 - rates), (n, 4)),
    rtol=1e-6,
  )
  # Five standard deviations of a mean of n.
  np.testing.assert_allclose((paths == 0).mean(axis=0), rates, atol=5 / n**0.5)
  deviation = np.sqrt(rates / (1 - rates) / n)
  assert (np.abs(paths.mean(axis=0) - 1) <= 5 * deviation + 1e-6).all()
  # Blocks are skipped one by one, and so are images.
  dropped = (paths[:, 1:] == 0).astype(float)
  together = np.corrcoef(dropped.T) - np.eye(3)
  neighbours = np.corrcoef(dropped[1:, 1], dropped[:-1, 1])[0, 1]
  assert max(np.abs(together).max(), abs(neighbours)) < 5 / n**0.5


def test_paths_are_those_of_the_example():
  rates, order = (0.0, 0.5, 0.5), np.random.default_rng(0).permutation(64)
  whole = np.asarray(augment.draw_paths(keys(64), rates))
  shuffled = augment.draw_paths(keys(64)[order], rates)
  np.testing.assert_array_equal(shuffled, whole[order])
  later = np.asarray(augment.draw_paths(keys(64, epoch=1), rates))
  assert (later[:, 1:] != whole[:, 1:]).any(axis=0).all()

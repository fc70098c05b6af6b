import pathlib
import subprocess
import sys

import numpy as np
import parity
import pytest
from data_fixtures import photo
from PIL import Image

from jaxprog.data import policies

NAMES = tuple(policies.OPERATIONS)


@pytest.fixture(scope='module')
def autoaugment():
  """torchvision's module of policies: code no one here wrote."""
  return parity.import_module('torchvision.transforms.autoaugment')


def textured(width, height):
  """Returns a photo with noise: no two neighbours are alike."""
  noise = np.random.default_rng(1).integers(-20, 21, (height, width, 3))
  return np.clip(photo(width, height) + noise, 0, 255).astype(np.uint8)


# Flat, nearly flat and dark ones have their own paths through histograms.
IMAGES = {
  'photo': textured(61, 48),
  'even sides': textured(64, 64),
  'flat': np.full((16, 20, 3), 77, np.uint8),
  'two greys': np.indices((16, 20)).sum(0)[..., None].repeat(3, 2) % 2 + 90,
  'dark': textured(40, 40) // 4,
}


def spaces(height, width):
  return (
    policies.rand_augment_space(height, width),
    policies.trivial_augment_space(),
  )


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('kind', IMAGES)
def test_each_operation_has_the_pixels_of_torchvision(autoaugment, name, kind):
  pixels = IMAGES[kind].astype(np.uint8)
  image = Image.fromarray(pixels)
  nearest = autoaugment.InterpolationMode.NEAREST
  for space in spaces(*pixels.shape[:2]):
    strengths, signed = space[name]
    for strength in strengths or (0.0,):
      for x in (strength, -strength) if signed else (strength,):
        expected = autoaugment._apply_op(image, name, x, nearest, None)
        got = policies.OPERATIONS[name](image, x)
        assert got.mode == 'RGB'
        np.testing.assert_array_equal(got, expected, f'{name} {x}')
  np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize('size', [(224, 224), (37, 500), (64, 331)])
def test_strengths_are_those_of_torchvision(autoaugment, size):
  expected = (
    autoaugment.RandAugment()._augmentation_space(31, size),
    autoaugment.TrivialAugmentWide()._augmentation_space(31),
  )
  for ours, theirs in zip(spaces(*size), expected, strict=True):
    assert set(ours) == set(theirs) == set(NAMES)
    for name, (strengths, signed) in ours.items():
      bins, has_sign = theirs[name]
      assert signed == has_sign
      # No strength is one zero there.
      found, bins = np.array(strengths or (0.0,)), np.atleast_1d(bins)
      np.testing.assert_array_equal(found, bins, name)


def test_strengths_in_closed_form():
  rand, trivial = spaces(100, 200)
  assert rand['TranslateX'][0][30] == pytest.approx(200 * 150 / 331)
  assert rand['TranslateY'][0][30] == pytest.approx(100 * 150 / 331)
  assert rand['Rotate'][0][9] == pytest.approx(9)
  assert rand['Posterize'][0][9] == 8 - round(9 * 4 / 30)
  assert rand['Solarize'][0][9] == 255 - 9 * 8.5
  assert trivial['TranslateX'] == trivial['TranslateY']
  assert trivial['TranslateX'][0][15] == pytest.approx(16)
  assert trivial['Posterize'][0][30] == 2
  assert all(len(bins) in (0, 31) for bins, _ in rand.values())


def test_operations_written_down():
  pixels = textured(32, 24)
  image = Image.fromarray(pixels)

  def apply(name, strength):
    return np.asarray(policies.OPERATIONS[name](image, strength))

  np.testing.assert_array_equal(apply('Identity', 0), pixels)
  moved = apply('TranslateX', 5.9)
  np.testing.assert_array_equal(moved[:, 5:], pixels[:, :-5])
  assert not moved[:, :5].any()
  moved = apply('TranslateY', -3)
  np.testing.assert_array_equal(moved[:-3], pixels[3:])
  assert not moved[-3:].any()
  np.testing.assert_array_equal(apply('Posterize', 3), pixels & 0b11100000)
  inverted = np.where(pixels < 100, pixels, 255 - pixels)
  np.testing.assert_array_equal(apply('Solarize', 100), inverted)
  brighter = np.minimum(pixels * 1.5, 255).astype(int)
  np.testing.assert_array_equal(apply('Brightness', 0.5), brighter)
  assert apply('AutoContrast', 0).min() == 0
  sheared = apply('ShearX', 1.0)
  for y in range(24):
    # Row y, whose middle is at y + 1/2, moves to the left by as much.
    row = pixels[y, y + 1 :]
    np.testing.assert_array_equal(sheared[y, : len(row)], row)


def both(image, rng):
  yield policies.rand_augment(image, rng, 2, 15)
  yield policies.trivial_augment(image, rng)


def test_shape_and_dtype_stay():
  for size in ((17, 31), (32, 32), (1, 1)):
    for seed in range(60):
      image = textured(*size)
      before = image.copy()
      for got in both(image, np.random.default_rng(seed)):
        assert (got.shape, got.dtype) == (image.shape, np.uint8)
      np.testing.assert_array_equal(image, before)


def test_the_rng_decides_alone():
  image = textured(32, 32)

  def results(seed):
    return np.stack(list(both(image, np.random.default_rng(seed))))

  seen = {results(seed).tobytes() for seed in range(20)}
  assert len(seen) > 15
  assert seen == {results(seed).tobytes() for seed in range(20)}


def test_layers_are_applied_one_after_another():
  image = textured(32, 32)
  for seed in range(30):
    rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
    expected = Image.fromarray(image)
    for _ in range(3):
      space = policies.rand_augment_space(32, 32)
      name, strength = policies.choose(space, again, 12)
      expected = policies.OPERATIONS[name](expected, strength)
    got = policies.rand_augment(image, rng, 3, 12)
    np.testing.assert_array_equal(got, expected)
    # Both have drawn as many numbers.
    assert rng.random() == again.random()


def chi_squared(counts):
  expected = sum(counts) / len(counts)
  return sum((count - expected) ** 2 for count in counts) / expected


def test_operations_signs_and_strengths_are_uniform(monkeypatch):
  drawn = []
  operations = {
    name: lambda image, x, name=name: drawn.append((name, x)) or image
    for name in NAMES
  }
  monkeypatch.setattr(policies, 'OPERATIONS', operations)
  image = np.zeros((32, 32, 3), np.uint8)
  rng = np.random.default_rng(0)
  for _ in range(14_000):
    policies.trivial_augment(image, rng)
  counts = [sum(name == x for name, _ in drawn) for x in NAMES]
  # 14 cells: chance exceeds 34.5 once in a thousand.
  assert chi_squared(counts) < 34.5
  rotations = [x for name, x in drawn if name == 'Rotate']
  bins = np.bincount(np.round(np.abs(rotations) / 4.5).astype(int))
  # 31 cells: chance exceeds 59.7 once in a thousand.
  assert len(bins) == 31
  assert chi_squared(bins.tolist()) < 59.7
  signs = np.sign([x for x in rotations if x])
  # A standard error is 1 / sqrt(n).
  assert abs(signs.mean()) < 3.3 / np.sqrt(len(signs))
  drawn.clear()
  policies.rand_augment(image, rng, 7_000, 9)
  counts = [sum(name == x for name, _ in drawn) for x in NAMES]
  assert chi_squared(counts) < 34.5
  assert {round(abs(x), 3) for name, x in drawn if name == 'Rotate'} == {9.0}


def test_no_framework_is_imported():
  code = (
    'import sys; from jaxprog.data import policies; '
    "print({'jax', 'torch', 'tensorflow'} & set(sys.modules))"
  )
  found = subprocess.run(
    [sys.executable, '-c', code],
    cwd=pathlib.Path(__file__).parent.parent,
    capture_output=True,
    text=True,
    check=True,
  )
  assert found.stdout == 'set()\n'

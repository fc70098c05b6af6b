import io

import numpy as np
import pytest
from data_fixtures import (
  encode,
  photo,
  real_data,
  write_class_folders,
)
from PIL import Image

from jaxprog import named
from jaxprog.data import leaks, preparation, signatures

FILTERS = ('BILINEAR', 'BICUBIC', 'BOX', 'LANCZOS')


def write_folder(root, train, val):
  """Writes file name -> encoded image of both splits, all of one class."""
  for split, images in (('train', train), ('val', val)):
    folder = root / split / 'n01440764'
    folder.mkdir(parents=True)
    for name, image in images.items():
      (folder / name).write_bytes(image)


def jpeg(seed, width=96, height=96, quality=90):
  return encode(photo(width, height, seed), 'JPEG', quality=quality)


def copy(image, size=(64, 64), resample='BICUBIC', quality=85):
  opened = Image.open(io.BytesIO(image)).convert('RGB')
  small = opened.resize(size, Image.Resampling[resample])
  return encode(np.asarray(small), 'JPEG', quality=quality)


def pictures(seeds, size=96):
  return {f'{seed}.jpg': jpeg(seed, size, size) for seed in seeds}


def load(tmp_path, **folders):
  """Returns a dataset for each stage, from its train and val images."""
  datasets = {}
  for stage, (name, train, val) in folders.items():
    root = tmp_path / stage
    raw = named.find(name).folders[0] if name in named.DATASETS else 'images'
    write_folder(root / raw, train, val)
    dataset = name if name in named.DATASETS else f'folder:{root / raw}'
    datasets[stage] = preparation.load_dataset(dataset, root)
  return datasets


def files_excluded(found, datasets, stage):
  names = datasets[stage].train.names()
  return {names[i] for i in np.flatnonzero(found.excluded[stage])}


def table(*images):
  return np.array([signatures.sign(x) for x in images])


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('ILSVRC2012_val_00000293.JPEG', True),
    ('ILSVRC2012_val_00000293', True),
    ('ILSVRC2012_val_0000293.JPEG', False),
    ('ILSVRC2012_val_00000293_1.JPEG', False),
    ('ILSVRC2012_test_00000293.JPEG', False),
    ('n01440764_10026.JPEG', False),
    ('val_293.JPEG', False),
  ],
)
def test_names_of_ilsvrc_validation_images(name, expected):
  assert leaks.is_ilsvrc_validation(name) == expected


def test_ilsvrc_validation_images_are_held_out_by_name_alone(tmp_path):
  train = {**pictures([1, 2]), 'ILSVRC2012_val_00000001.JPEG': jpeg(3)}
  val = {**pictures([4]), 'ILSVRC2012_val_00000002.JPEG': jpeg(5)}
  datasets = load(tmp_path, a=('folder', train, val))
  found = leaks.find_overlap(datasets)
  assert files_excluded(found, datasets, 'a') == {
    'ILSVRC2012_val_00000001.JPEG'
  }
  assert found.counts == {'a': {'name': 1, 'content': 0, 'perceptual': 0}}
  assert found.contaminates == {'a': {'imagenet2012': 1}}
  assert found.shared == []
  # A stage that evaluates on them is named, and shares one of them.
  found = leaks.find_overlap(
    datasets, absent={'big': 'imagenet2012', 'x': 'digits'}
  )
  assert found.contaminates == {'a': {'big': 1}}
  assert [(x.stage, x.eval_file, x.other_stage) for x in found.shared] == [
    ('a', 'ILSVRC2012_val_00000002.JPEG', 'big')
  ]
  assert found.excluded['a'].sum() == 1


def test_equal_names_count_where_names_are_imagenets(tmp_path):
  name = 'n01440764_10026.JPEG'
  val_name = 'ILSVRC2012_val_00000001'
  datasets = load(
    tmp_path,
    nette=(
      'imagenette',
      {**pictures([1]), f'{val_name}.JPEG': jpeg(2)},
      {name: jpeg(3)},
    ),
    mini=(
      'imagenet_mini',
      {name: jpeg(4), 'same.JPEG': jpeg(5)},
      {f'{val_name}.png': jpeg(6), 'same.JPEG': jpeg(7)},
    ),
    other=('folder', {name: jpeg(8), 'a.jpg': jpeg(9)}, {'a.jpg': jpeg(10)}),
  )
  found = leaks.find_overlap(datasets)
  assert files_excluded(found, datasets, 'nette') == {f'{val_name}.JPEG'}
  assert files_excluded(found, datasets, 'mini') == {name}
  assert not found.excluded['other'].any()
  assert found.contaminates['nette'] == {'mini': 1}
  assert found.contaminates['mini'] == {'nette': 1}
  (leak,) = [x for x in found.leaks if x.train_stage == 'mini']
  assert leak.eval_file == name
  assert datasets['mini'].train.names()[leak.train_index] == name


def test_an_evaluation_image_of_any_stage_is_held_out_of_every_stage(tmp_path):
  secret, other = jpeg(1), jpeg(2)
  datasets = load(
    tmp_path,
    a=('folder', {**pictures([3, 4]), 'x.jpg': other}, {'y.jpg': secret}),
    b=(
      'folder',
      {**pictures([5]), 'c.jpg': copy(secret), 'd.jpg': secret},
      {'e.jpg': other, 'f.jpg': jpeg(6)},
    ),
    c=('folder', {**pictures([7]), 'g.jpg': jpeg(6)}, pictures([8])),
  )
  found = leaks.find_overlap(datasets)
  assert [files_excluded(found, datasets, x) for x in 'abc'] == [
    {'x.jpg'},
    {'c.jpg', 'd.jpg'},
    {'g.jpg'},
  ]
  assert found.counts['b'] == {'name': 0, 'content': 1, 'perceptual': 1}
  assert found.contaminates == {'a': {'b': 1}, 'b': {'a': 2}, 'c': {'b': 1}}
  assert found.shared == []


def test_the_same_image_in_two_evaluations_is_listed_not_excluded(tmp_path):
  secret = jpeg(1)
  datasets = load(
    tmp_path,
    a=('folder', pictures([3]), {'x.jpg': secret}),
    b=('folder', pictures([4]), {'y.jpg': jpeg(2), 'z.jpg': copy(secret)}),
  )
  found = leaks.find_overlap(datasets)
  (pair,) = found.shared
  assert (pair.stage, pair.eval_file, pair.eval_index) == ('a', 'x.jpg', 0)
  assert pair.other_stage == 'b'
  assert pair.other_file == 'z.jpg'
  assert pair.reason == 'perceptual'
  assert not any(x.any() for x in found.excluded.values())


def test_the_strongest_reason_counts(tmp_path):
  name = 'ILSVRC2012_val_00000001.JPEG'
  datasets = load(
    tmp_path,
    a=('folder', {name: jpeg(1), **pictures([2, 6])}, pictures([3])),
    b=(
      'folder',
      pictures([4]),
      {'x.jpg': jpeg(1), 'y.jpg': copy(jpeg(2)), 'u.jpg': jpeg(6)},
    ),
    c=('folder', pictures([5]), {'z.jpg': jpeg(2), 'v.jpg': copy(jpeg(6))}),
  )
  found = leaks.find_overlap(datasets, absent={'d': 'tfds:imagenet2012'})
  assert found.counts['a'] == {'name': 1, 'content': 2, 'perceptual': 0}
  assert found.contaminates['a'] == {'b': 3, 'c': 2, 'd': 1}


def test_of_several_equal_evaluation_images_the_first_is_named():
  images = [jpeg(1), jpeg(2), jpeg(2), jpeg(1)]
  evaluation = leaks.Images(list('abcd'), table(*images), keeps_names=False)
  train = leaks.Images(list('ef'), table(jpeg(2), jpeg(3)), keeps_names=False)
  assert leaks.match(train, evaluation) == [(0, 1, 'content')]


def test_stages_that_share_a_dataset_hash_it_once(tmp_path, monkeypatch):
  calls = []
  read = signatures.read_signatures

  def counted(records, **options):
    calls.append(records.name)
    return read(records, **options)

  monkeypatch.setattr(signatures, 'read_signatures', counted)
  write_class_folders(tmp_path / 'imagenette2')
  some = [
    preparation.load_dataset('imagenette', tmp_path, classes=x)
    for x in ((), ('n01', 'n02'), ('n02',))
  ]
  found = leaks.find_overlap(dict(zip('abc', some, strict=True)))
  assert sorted(calls) == ['train', 'validation']
  # The fixture's evaluation images are the first two of each class.
  for stage, dataset in zip('abc', some, strict=True):
    names = dataset.train.names()
    assert len(names) == len(found.excluded[stage])
    assert files_excluded(found, {stage: dataset}, stage) == {
      x for x in names if x.endswith(('_0.JPEG', '_1.JPEG'))
    }
    assert found.counts[stage]['content'] == 2 * len(dataset.classes)
  assert found.shared == []


def test_digits_do_not_leak(data_dir):
  datasets = {
    str(n): preparation.load_dataset(
      'digits', data_dir, classes=[str(i) for i in range(n)]
    )
    for n in (4, 7, 10)
  }
  found = leaks.find_overlap(datasets)
  assert not any(x.any() for x in found.excluded.values())
  assert found.shared == []
  assert [len(x) for x in found.excluded.values()] == [
    len(x.train) for x in datasets.values()
  ]


def test_damaged_images_match_nothing_and_are_counted(tmp_path):
  damaged = [jpeg(i)[:300] for i in (1, 2)]
  datasets = load(
    tmp_path,
    a=(
      'folder',
      {**pictures([3]), 'x.jpg': damaged[0]},
      {**pictures([4]), 'y.jpg': damaged[1]},
    ),
  )
  found = leaks.find_overlap(datasets)
  assert found.damaged == {'a': 2}
  assert not found.excluded['a'].any()


@pytest.mark.parametrize('resample', FILTERS)
@pytest.mark.parametrize('size', [(64, 64), (160, 160), (240, 180)])
def test_copies_are_found_at_another_size(resample, size):
  originals = [jpeg(i, 320, 240) for i in range(12)]
  copies = [copy(x, size, resample, 75) for x in reversed(originals)]
  best = leaks.match_looks(table(*copies), table(*originals))
  np.testing.assert_array_equal(best, np.arange(12)[::-1])


def test_copies_of_the_middle_are_found():
  pixels = [photo(320, 240, seed=i) for i in range(8)]
  originals = [encode(x, 'JPEG', quality=90) for x in pixels]
  middles = [encode(x[:, 40:280], 'JPEG', quality=90) for x in pixels]
  copies = table(*(copy(x) for x in middles))
  best = leaks.match_looks(copies, table(*originals))
  np.testing.assert_array_equal(best, np.arange(8))
  best = leaks.match_looks(table(*originals), copies)
  np.testing.assert_array_equal(best, np.arange(8))
  # But a part is another image.
  parts = [encode(x[:180, :180], 'JPEG', quality=90) for x in pixels]
  assert (leaks.match_looks(table(*parts), copies) == -1).all()


def test_flat_images_are_not_alike():
  rng = np.random.default_rng(0)

  def flat(level):
    noise = rng.normal(level, 3, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    return encode(noise, 'JPEG', quality=90)

  a, b = table(*(flat(200) for _ in range(20))), table(*map(flat, (200, 201)))
  assert (leaks.match_looks(a, b) == -1).all()
  white = table(encode(np.full((64, 64, 3), 255, np.uint8)))
  assert leaks.match_looks(white, white)[0] == -1


def test_flat_images_of_the_same_faint_shade_are_not_alike():
  shade = np.linspace(200, 203, 64)[:, None, None] + np.zeros((64, 64, 3))
  image = table(encode(shade.astype(np.uint8)))
  assert image['comparable']
  assert leaks.match_looks(image, image)[0] == -1


def test_pale_images_that_differ_in_detail_are_not_alike():
  # From afar the same, and everywhere within a few grey levels.
  pale = 230 + (photo(64, 64).astype(float) - 128) / 16
  detail = np.where(np.indices((16, 16)).sum(0) % 2, 4.0, -4.0)
  detail = np.kron(detail, np.ones((4, 4)))[:, :, None]
  a, b = (
    table(encode(np.round(pale + x).astype(np.uint8)))
    for x in (detail, -detail)
  )
  assert leaks.match_looks(a, a)[0] == 0
  assert leaks.match_looks(a, b)[0] == -1
  levels = np.abs(a['thumbnails'].astype(int) - b['thumbnails']).mean()
  assert levels < leaks.MAX_GREY_LEVELS


def test_other_brightness_is_another_image():
  # The same but for the exposure: alike only when centred and scaled.
  pixels = photo(64, 64)
  darker = (pixels * 0.8).astype(np.uint8)
  found = leaks.match_looks(table(encode(darker)), table(encode(pixels)))
  assert found[0] == -1


def test_the_nearest_of_several_is_named_whatever_the_blocks(monkeypatch):
  pixels = photo(96, 96).astype(np.int64)
  near = [encode((pixels + x).clip(0, 255).astype(np.uint8)) for x in (5, 1, 3)]
  others = [jpeg(i) for i in range(50, 57)]
  evaluation = table(*others[:3], *near, *others[3:])
  train = table(*others[::-1], encode(pixels.astype(np.uint8)))
  expected = [9, 8, 7, 6, 2, 1, 0, 4]
  for block, pairs in ((2048, 4096), (1, 1), (2, 1), (3, 2)):
    monkeypatch.setattr(leaks, '_BLOCK', block)
    monkeypatch.setattr(leaks, '_IMAGES', block)
    monkeypatch.setattr(leaks, '_PAIRS', pairs)
    found = leaks.match_looks(train, evaluation)
    np.testing.assert_array_equal(found, expected)
  assert len(leaks.match_looks(train[:0], evaluation)) == 0
  assert (leaks.match_looks(train, evaluation[:0]) == -1).all()


def test_matches_are_those_of_all_pairs_compared_one_by_one():
  rng = np.random.default_rng(0)
  train = np.zeros(40, signatures.SIGNATURE)
  train['thumbnails'] = rng.integers(0, 256, (40, 2, 16, 16, 3))
  train['comparable'] = True
  evaluation = train[::-1][:25].copy()
  noise = rng.normal(
    0, rng.uniform(0, 25, (25, 1, 1, 1, 1)), (25, 2, 16, 16, 3)
  )
  evaluation['thumbnails'] = (evaluation['thumbnails'] + noise).clip(0, 255)
  evaluation['comparable'][:5] = False

  def alike(a, b):
    a, b = a.astype(float), b.astype(float)
    levels = np.abs(a - b).mean()
    a, b = (x - x.mean((0, 1)) for x in (a, b))
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    return levels <= leaks.MAX_GREY_LEVELS and cosine >= 1 - leaks.MAX_DISTANCE

  expected = [
    max(
      (
        j
        for j in range(25)
        if evaluation['comparable'][j]
        and any(
          alike(train['thumbnails'][i, v], evaluation['thumbnails'][j, v])
          for v in (0, 1)
        )
      ),
      default=-1,
    )
    for i in range(40)
  ]
  assert 3 < sum(x >= 0 for x in expected) < 20
  np.testing.assert_array_equal(leaks.match_looks(train, evaluation), expected)


def test_no_pair_is_lost_by_looking_at_few():
  rng = np.random.default_rng(1)

  def create(count):
    made = np.zeros(count, signatures.SIGNATURE)
    small = rng.normal(128, 60, (count, 2, 4, 4, 3)).clip(0, 255)
    made['thumbnails'] = small.repeat(4, axis=2).repeat(4, axis=3)
    made['comparable'] = rng.random(count) < 0.9
    return made

  evaluation, train = create(120), create(400)
  # Copies on either side of the limit, some of two images at once.
  for i, j in enumerate(rng.integers(0, 120, 300)):
    shift = rng.choice([-9, -8, -5, 0, 5, 8, 9], p=[0.1, *[0.16] * 5, 0.1])
    noise = rng.integers(-3, 4, (2, 16, 16, 3)) * rng.integers(0, 2)
    copied = evaluation['thumbnails'][j].astype(int) + shift + noise
    train['thumbnails'][i] = copied.clip(0, 255)
  evaluation[1::9] = evaluation[::9][: len(evaluation[1::9])]
  levels = np.full((2, 400, 120), np.inf)
  for view in (0, 1):
    a, b = (leaks._coarse(x, view)[0] for x in (train, evaluation))
    i, j = np.nonzero(a @ b.T >= 1 - leaks.MAX_COARSE_DISTANCE)
    levels[view, i, j] = leaks._compare(
      train['thumbnails'][i, view], evaluation['thumbnails'][j, view]
    )
  nearest = levels.min(0)
  expected = np.where(nearest.min(1) < np.inf, nearest.argmin(1), -1)
  assert 100 < (expected >= 0).sum() < 300
  np.testing.assert_array_equal(leaks.match_looks(train, evaluation), expected)


def test_planted_photographs_are_found_and_no_others(tmp_path):
  if not real_data():
    pytest.skip('JAXPROG_DATA names no folder.')
  tiny = sorted((real_data() / 'tiny-imagenet-200').glob('train/*/images/*'))
  nette = sorted((real_data() / 'imagenette2').glob('val/*/*'))
  clean = table(*(x.read_bytes() for x in tiny[::20]))
  evaluation = table(*(x.read_bytes() for x in nette[::5]))
  planted = [
    copy(x.read_bytes(), (64, 64), FILTERS[i % 4], 75 + i % 21)
    for i, x in enumerate(nette[::5])
  ]
  best = leaks.match_looks(np.concatenate([clean, table(*planted)]), evaluation)
  assert len(planted) == 300
  np.testing.assert_array_equal(best[-300:], np.arange(300))
  assert (best[:-300] == -1).all()


def test_real_imagenette_leaks_by_name_alone(tmp_path):
  if not real_data():
    pytest.skip('JAXPROG_DATA names no folder.')
  (tmp_path / 'imagenette2').symlink_to(real_data() / 'imagenette2')
  dataset = preparation.load_dataset('imagenette', tmp_path)
  found = leaks.find_overlap(
    {'a': dataset}, absent={'imagenet': 'imagenet2012'}
  )
  assert found.counts['a'] == {'name': 159, 'content': 0, 'perceptual': 0}
  assert found.contaminates == {'a': {'imagenet': 159}}
  assert len(found.shared) == 53
  assert found.damaged == {'a': 0}

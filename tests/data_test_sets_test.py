"""Published test sets, in small copies that are laid out as they unpack."""

import importlib.util
import io
import json
import pathlib
import runpy

import jax
import numpy as np
import parity
import pytest
from data_fixtures import write_image
from flax import linen as nn
from PIL import Image

from jaxprog import errors, named
from jaxprog.data import batches, preprocess, test_sets
from jaxprog.training import steps

WNIDS = test_sets.read_imagenet_classes()
PIXELS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def load(name, data_dir, classes=WNIDS):
  return test_sets.load(name, data_dir, classes, classes)


def write_images(root, counts):
  """Writes so many images into each folder."""
  for folder, count in counts.items():
    (root / folder).mkdir(parents=True)
    for i in range(count):
      write_image(root / folder / f'{folder}_{i}.JPEG', i)


def write_objectnet(root):
  """Writes a copy of ObjectNet with four classes, of which ImageNet has three.

  Its lines and numbers are in another order than ImageNet's WordNet ids.
  """
  lines = ['tench', 'hen', 'goldfish, Carassius auratus', 'hammerhead', 'cock']
  numbers = {0: 0, 1: 2, 4: 3, 7: 4, 8: 1}  # WordNet id -> line, both from 0.
  texts = {
    'folder_to_objectnet_label.json': {
      'a_fish': 'A fish',
      'bird': 'Bird',
      'mug': 'Mug',
      'shark': 'Shark',
    },
    'objectnet_to_imagenet_1k.json': {
      'A fish': 'goldfish, Carassius auratus; tench',
      'Bird': 'cock; hen',
      'Shark': 'hammerhead',
    },
    'pytorch_to_imagenet_2012_id.json': {str(k): v for k, v in numbers.items()},
  }
  (root / 'mappings').mkdir(parents=True)
  for name, text in texts.items():
    (root / 'mappings' / name).write_text(json.dumps(text))
  path = root / 'mappings' / 'imagenet_to_label_2012_v2'
  path.write_text('\n'.join(lines) + '\n')
  counts = {'a_fish': 5, 'bird': 6, 'mug': 2, 'shark': 3}
  write_images(root / 'images', counts)
  return root


def write_real(data_dir, lists):
  """Writes validation images 1, 2, ... and ReaL's lists of them.

  Classes have them in turn, so that records are not in the order of numbers.
  """
  for i in range(len(lists)):
    for path in (
      f'train/{WNIDS[i % 3]}/{i}.JPEG',
      f'val/{WNIDS[i % 3]}/ILSVRC2012_val_{i + 1:08d}.JPEG',
    ):
      path = data_dir / 'imagenet1k' / path
      write_image(path, i)
  (data_dir / 'real.json').write_text(json.dumps(lists))


def score(loaded, logits):
  """Returns top-1 and top-5 by the evaluation step, of made-up logits."""

  class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      return jax.numpy.asarray(logits, jax.numpy.float32)

  split = loaded.dataset.eval
  count = len(split)
  labels = split.labels if split.answers is None else split.answers
  data = {
    'image': np.zeros((count, 2, 2, 3), np.uint8),
    'label': labels,
    'mask': np.ones(count, bool),
  }
  step = steps.create_eval_step(Fixed(), PIXELS, among=loaded.among)
  sums, outcomes = jax.jit(step)({}, data, steps.zero_eval_sums())
  assert sums['count'] == count
  assert np.isfinite(outcomes['loss']).all()
  return float(sums['top1']) / count, float(sums['top5']) / count


def draw_logits(count, seed=0):
  """Returns logits of the 1,000 classes; the first dozen are likely."""
  logits = np.random.default_rng(seed).normal(size=(count, 1000))
  logits[:, :12] += 3
  return logits.astype(np.float32)


def find_timm():
  """Returns timm's folder: its import takes torchvision, and seconds."""
  spec = importlib.util.find_spec('timm')
  if spec is None:
    pytest.skip(parity.REASON)
  return pathlib.Path(spec.origin).parent


def test_the_classes_are_imagenet_s():
  text = (find_timm() / 'data' / '_info' / 'imagenet_synsets.txt').read_text()
  assert text.split() == WNIDS


def test_numbered_folders_are_numbers(tmp_path):
  folder = tmp_path / 'imagenetv2-matched-frequency-format-val'
  write_images(folder, {'0': 1, '2': 2, '10': 3, '999': 1})
  split = load('imagenet_v2', tmp_path).dataset.eval
  assert sorted(split.labels) == [0, 2, 2, 10, 10, 10, 999]
  for i, label in enumerate(split.labels):
    assert split.describe(i).startswith(f'{label}/{label}_')
  logits = draw_logits(7)
  expected = np.mean(np.argmax(logits, 1) == split.labels)
  assert score(load('imagenet_v2', tmp_path), logits)[0] == expected


@pytest.mark.parametrize(
  ('name', 'folder'),
  [('imagenet_r', 'imagenet-r'), ('imagenet_a', 'imagenet-a')],
)
def test_renditions_and_adversarial_ones_choose_among_their_own_classes(
  tmp_path, name, folder
):
  """As their authors' eval.py: output[:, the classes' places].argmax."""
  places = [3, 5, 9, 11, 500, 700]
  write_images(tmp_path / folder, {WNIDS[x]: 5 for x in places})
  (tmp_path / folder / 'README.txt').write_text('About it.')
  loaded = load(name, tmp_path)
  labels = loaded.dataset.eval.labels
  assert sorted(set(labels)) == places
  logits = draw_logits(30)
  order = np.argsort(-logits[:, places], axis=1)
  target = np.searchsorted(places, labels)[:, None]
  expected = [(order[:, :k] == target).any(1).mean() for k in (1, 5)]
  assert score(loaded, logits) == pytest.approx(expected)
  # Among all 1,000 hardly one is right.
  unmasked = np.mean(np.argmax(logits, 1) == labels)
  assert unmasked < expected[0]
  assert f'{name} has 30 images here; published' in loaded.notes[0]


def test_sketches_are_chosen_among_all_classes(tmp_path):
  write_images(tmp_path / 'sketch', {WNIDS[x]: 4 for x in (1, 7, 8)})
  loaded = load('imagenet_sketch', tmp_path)
  logits = draw_logits(12)
  expected = np.mean(np.argmax(logits, 1) == loaded.dataset.eval.labels)
  assert score(loaded, logits)[0] == expected


def test_real_is_scored_as_timm_does(tmp_path):
  timm = runpy.run_path(find_timm() / 'data' / 'real_labels.py')
  rng = np.random.default_rng(1)
  lists = [sorted(rng.choice(12, i % 4, False).tolist()) for i in range(40)]
  write_real(tmp_path, lists)
  loaded = load('imagenet_real', tmp_path)
  logits = draw_logits(40)
  numbers = [int(loaded.dataset.eval.describe(i)[-13:-5]) for i in range(30)]
  assert len(loaded.dataset.eval) == 30
  assert numbers != sorted(numbers)
  found = score(loaded, logits[np.array(numbers) - 1])
  names = [f'ILSVRC2012_val_{i + 1:08d}.JPEG' for i in range(40)]
  theirs = timm['RealLabelsImagenet'](names, tmp_path / 'real.json')
  torch = pytest.importorskip('torch', reason=parity.REASON)
  theirs.add_result(torch.from_numpy(logits))
  expected = [theirs.get_accuracy(k) / 100 for k in (1, 5)]
  assert found == pytest.approx(expected)


def test_a_label_among_several_is_the_image_s_own_where_it_is_right(tmp_path):
  # Images 1 to 3 are of classes 0 to 2.
  write_real(tmp_path, [[4, 0], [7], []])
  split = load('imagenet_real', tmp_path).dataset.eval
  assert split.labels.tolist() == [0, 7]
  assert split.answers.tolist() == [[0, 4], [7, -1]]


def test_objectnet_s_own_classes_are_right_by_its_authors_rule(tmp_path):
  """A prediction counts as the ObjectNet class that has it, others as none."""
  write_objectnet(tmp_path / 'objectnet-1.0')
  loaded = load('objectnet', tmp_path)
  split = loaded.dataset.eval
  folders = [split.describe(i).split('/')[0] for i in range(len(split))]
  assert sorted(set(folders)) == ['a_fish', 'bird', 'shark']
  to_objectnet = {0: 'a_fish', 1: 'a_fish', 4: 'shark', 7: 'bird', 8: 'bird'}
  logits = draw_logits(len(split))
  top5 = np.argsort(-logits, axis=1)[:, :5]
  hits = np.array(
    [
      [to_objectnet.get(int(x)) == folder for x in row]
      for row, folder in zip(top5, folders, strict=True)
    ]
  )
  expected = hits[:, 0].mean(), hits.any(1).mean()
  assert 0 < expected[0] < expected[1]
  assert score(loaded, logits) == pytest.approx(expected)


def test_objectnet_s_red_border_is_cut_off(tmp_path):
  write_objectnet(tmp_path / 'objectnet-1.0')
  pixels = np.full((13, 21, 3), (255, 0, 0), np.uint8)
  inside = np.random.default_rng(0).integers(0, 256, (9, 17, 3), np.uint8)
  pixels[2:-2, 2:-2] = inside
  for path in (tmp_path / 'objectnet-1.0' / 'images').glob('*/*.JPEG'):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'png')
    path.write_bytes(file.getvalue())
  split = load('objectnet', tmp_path).dataset.eval
  found = preprocess.decode(split.original(3))
  np.testing.assert_array_equal(found, inside)


def test_images_of_unknown_classes_are_left_out_and_counted(tmp_path):
  write_images(tmp_path / 'sketch', {WNIDS[x]: 4 for x in (1, 7, 8)})
  loaded = load('imagenet_sketch', tmp_path, [WNIDS[8], 'n99', WNIDS[1]])
  assert sorted(loaded.dataset.eval.labels) == [0] * 4 + [2] * 4
  assert '4 images of classes that the weights do not know' in loaded.notes[1]
  with pytest.raises(errors.UserError, match='know no class of'):
    load('imagenet_sketch', tmp_path, ['dog', 'cat'])


def test_a_damaged_image_is_wrong_whatever_would_be_right(tmp_path):
  write_objectnet(tmp_path / 'objectnet-1.0')
  path = tmp_path / 'objectnet-1.0' / 'images' / 'bird' / 'bird_2.JPEG'
  path.write_bytes(path.read_bytes()[:40])
  split = load('objectnet', tmp_path).dataset.eval
  (index,) = (i for i in range(len(split)) if 'bird_2' in split.describe(i))

  class Stage:
    batch_size, eval_size, eval_crop = len(split), 8, 1.0
    eval_interpolation = 'bilinear'

  reader = batches.EvalBatches(split, Stage, num_shards=1)
  batch = batches.allocate(reader.layout(0))
  (bad,) = reader.fill(0, range(len(split)), batch)
  assert (bad.row, bad.name) == (index, 'bird/bird_2.JPEG')
  assert batch['label'][index].tolist() == [-1, -1]
  assert batch['label'][index - 1].tolist() == [7, 8]


@pytest.mark.parametrize('name', named.TESTS)
def test_what_is_absent_is_told_with_where_to_get_and_put_it(tmp_path, name):
  with pytest.raises(errors.UserError) as e:
    load(name, tmp_path)
  what, where, how = str(e.value).split('\n')
  assert name in what
  assert str(tmp_path / named.TESTS[name].places[0]) in where
  assert named.TESTS[name].source in how


@pytest.mark.parametrize('folder', ['1000', 'n00000000', 'cats'])
def test_a_folder_of_another_name_is_refused(tmp_path, folder):
  write_images(tmp_path / 'imagenet-r', {folder: 1})
  with pytest.raises(errors.UserError, match=f"'{folder}' is no class"):
    load('imagenet_r', tmp_path)


@pytest.mark.parametrize('broken', ['{', '{"A fish": "trout"}'])
def test_other_mappings_are_refused(tmp_path, broken):
  root = write_objectnet(tmp_path / 'objectnet-1.0')
  (root / 'mappings' / 'objectnet_to_imagenet_1k.json').write_text(broken)
  with pytest.raises(errors.UserError) as e:
    load('objectnet', tmp_path)
  assert 'cannot be read' in e.value.what or 'as published' in e.value.what


def test_lists_of_fewer_images_are_refused(tmp_path):
  write_real(tmp_path, [[0], [1], [2]])
  (tmp_path / 'real.json').write_text('[[0], [1]]')
  with pytest.raises(errors.UserError, match='nothing of ILSVRC2012_val_00000'):
    load('imagenet_real', tmp_path)

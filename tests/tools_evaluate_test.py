import csv
import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import optax
import pytest
import runs
import two_stages
from data_fixtures import encode
from flax import linen as nn

import jaxprog
from jaxprog.data import preparation, preprocess, test_sets
from jaxprog.models import resnet
from jaxprog.reliability import checkpoints
from jaxprog.tools import evaluate as tool
from jaxprog.training import augment
from jaxprog.training import trained as trained_lib


@pytest.fixture(scope='module')
def config(data_dir):
  return two_stages.get_config(data_dir)


@pytest.fixture(scope='module')
def workdir(data_dir, tmp_path_factory):
  return two_stages.copy(tmp_path_factory, data_dir)


@pytest.fixture(scope='module')
def digits(data_dir):
  return preparation.load_dataset('digits', data_dir)


@pytest.fixture(scope='module')
def best(config, workdir):
  return jaxprog.evaluate(config, workdir)


def write_folder(root, split, classes, broken=''):
  """Writes the digits of `split` that are in `classes` as folder:ROOT."""
  for i, label in enumerate(split.labels.tolist()):
    if str(label) in classes:
      for part in ('train', 'val'):
        path = pathlib.Path(root, part, str(label), f'{i}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(split.original(i))
  if broken:
    pathlib.Path(root, broken).write_bytes(b'\x89PNG\r\n\x1a\n nothing more')
  return f'folder:{root}'


def test_the_command_line_prints_the_best_top1_of_the_log(workdir):
  result = runs.call_main('--mode=eval', f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  best = runs.read_history(workdir)['stages'][-1]['best']['top1']
  assert result.stdout == f'{100 * best:.1f}\n'
  for text in ('ten, best weights', 'top-5', 'most often mistaken'):
    assert text in result.stderr
  assert str(workdir / 'eval' / 'ten-best.csv') in result.stderr
  overall = json.loads((workdir / 'eval' / 'ten-best.json').read_text())
  assert overall['top1'] == best


@pytest.mark.parametrize('weights', ['best', 'final', 'ema'])
def test_the_scores_are_those_of_the_log(config, workdir, weights):
  ten = runs.read_history(workdir)['stages'][1]
  found = jaxprog.evaluate(config, workdir, weights=weights)
  row = ten['epochs'][found['epoch'] - 1]
  prefix = 'ema' if weights == 'ema' else 'val'
  assert {name: found[name] for name in ('loss', 'top1', 'top5')} == {
    name: row[f'{prefix}_{name}'] for name in ('loss', 'top1', 'top5')
  }
  if weights == 'best':
    assert found['top1'] == ten['best']['top1']
  if weights == 'ema':
    assert found['top1'] == max(x['ema_top1'] for x in ten['epochs'])
  if weights == 'final':
    assert row == ten['epochs'][-1]


def test_a_holdout_s_choice_is_scored_on_the_validation_images(config, workdir):
  three = runs.read_history(workdir)['stages'][0]
  found = jaxprog.evaluate(config, workdir, stage='three')
  assert found['count'] == three['validation']['num_images']
  assert found['top1'] == three['validation']['top1']


def test_classes_and_calibration_are_those_of_the_log(workdir, best):
  noted = runs.read_history(workdir)['stages'][1]['diagnostics']
  assert (best['nll'], best['ece']) == (noted['nll'], noted['ece'])
  counts = [[x['images'], x['right']] for x in best['per_class']]
  assert counts == noted['per_class']
  wrong = [x for x in noted['confusions'] if x['label'] != x['predicted']]
  assert best['confusions'] == [
    {
      'class': str(x['label']),
      'predicted': str(x['predicted']),
      'count': x['count'],
    }
    for x in wrong
  ]
  assert sum(x['count'] for x in wrong) == round(360 * (1 - best['top1']))


def test_the_csv_has_a_row_for_each_class(workdir, best):
  with open(workdir / 'eval' / 'ten-best.csv') as file:
    rows = list(csv.DictReader(file))
  assert [x['class'] for x in rows] == [str(i) for i in range(10)]
  assert sum(int(x['images']) for x in rows) == best['count'] == 360
  right = sum(int(x['right']) for x in rows)
  assert right / 360 == pytest.approx(best['top1'], abs=1e-12)
  for x in rows:
    assert float(x['top1']) == int(x['right']) / int(x['images'])


def test_other_data_with_some_of_the_classes_goes_by_name(
  config, workdir, best, digits, tmp_path, capsys
):
  own = {x['class']: x for x in best['per_class']}
  other = write_folder(tmp_path / 'some', digits.eval, ('9', '4'))
  capsys.readouterr()
  found = jaxprog.evaluate(config, workdir, dataset=other)
  assert found['per_class'] == [own['4'], own['9']]
  assert found['count'] == own['4']['images'] + own['9']['images']
  captured = capsys.readouterr()
  assert 'has 2 of the 10 classes' in ' '.join(captured.err.split())
  assert not captured.out
  assert len(list((workdir / 'eval').glob('ten-best-some-*.csv'))) == 1


def test_labels_go_by_name_whatever_the_order(digits):
  turned = tool.relabel(digits, digits.classes[::-1], digits.classes[::-1])
  assert turned.classes == digits.classes[::-1]
  for before, after in (
    (digits.eval, turned.eval),
    (digits.train, turned.train),
  ):
    np.testing.assert_array_equal(after.labels, 9 - before.labels)
    assert after[7]['wnid'] == before[7]['wnid']


def test_unknown_classes_are_named(config, workdir, digits, tmp_path):
  other = write_folder(tmp_path, digits.eval, ('1', '8', '9'))
  with pytest.raises(jaxprog.UserError) as e:
    jaxprog.evaluate(config, workdir, stage='three', dataset=other)
  assert "it has '8', '9', which they do not" in str(e.value)
  assert "they know 3: '1', '3', '5'" in str(e.value)


def test_undecodable_images_count_as_wrong_and_are_named(
  config, workdir, best, digits, tmp_path, capsys
):
  other = write_folder(tmp_path, digits.eval, ('6',), 'val/6/bad.png')
  found = jaxprog.evaluate(config, workdir, dataset=other)
  (six,), sound = found['per_class'], best['per_class'][6]
  assert (six['images'], six['right']) == (sound['images'] + 1, sound['right'])
  assert found['confusions'] == [
    x for x in best['confusions'] if x['class'] == '6'
  ]
  assert list(found['bad_images']) == ['6/bad.png']
  assert '6/bad.png' in capsys.readouterr().err


def test_no_image_is_a_mistake(digits):
  nothing = digits.eval.select(np.zeros(len(digits.eval), bool))
  with pytest.raises(jaxprog.UserError, match='no image to evaluate on'):
    tool.check_images(dataclasses.replace(digits, eval=nothing))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('model', 'resnet18'),
    ('num_filters', 8),
    ('stem_kernel', 7),
    ('std_rgb', (0.5, 0.5, 0.5)),
  ],
)
def test_another_config_than_the_weights_is_a_mistake(
  data_dir, workdir, field, value
):
  config = two_stages.get_config(data_dir)
  config[field] = value
  with pytest.raises(jaxprog.UserError, match=f'trained with {field} '):
    jaxprog.evaluate(config, workdir)


def test_another_image_size_than_the_weights_is_a_mistake(data_dir, workdir):
  config = two_stages.get_config(data_dir)
  config.stages[1]['image_size'] = 16
  with pytest.raises(jaxprog.UserError, match='trained with image_size 8'):
    jaxprog.evaluate(config, workdir)
  config = two_stages.get_config(data_dir)
  config.stages[1]['eval_image_size'] = 16
  assert jaxprog.evaluate(config, workdir)['count'] == 360


class Linear(nn.Module):
  num_classes: int
  image_size: int
  dtype: type

  @nn.compact
  def __call__(self, x, *, train):
    del train
    return nn.Dense(self.num_classes, name='head')(x.reshape(len(x), -1))


def test_weights_of_another_network_are_a_mistake(config, workdir):
  with pytest.raises(jaxprog.UserError, match="not of the config's network"):
    tool.evaluate(config, workdir, model=Linear)


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ({'weights': 'worst'}, 'Unknown weights'),
    ({'stage': 'tne'}, "Did you mean 'ten'"),
    ({'stage': 'three', 'weights': 'ema'}, 'no ema weights'),
    ({'dataset': 'digit'}, "Did you mean 'digits'"),
    ({'dataset': 'folder:/nowhere'}, 'no folder'),
  ],
)
def test_mistakes_are_told(config, workdir, arguments, expected):
  with pytest.raises(jaxprog.UserError, match=expected):
    jaxprog.evaluate(config, workdir, **arguments)


def test_both_mirror_images_are_averaged(config, workdir, best):
  found = jaxprog.evaluate(config, workdir, flip_average=True)
  trained = trained_lib.load_trained(config, workdir)
  data = tool.load_dataset(trained, '').eval
  images = np.stack([crop(data.original(i)) for i in range(len(data))])
  logits = read_logits(trained, images) + read_logits(
    trained, images[:, :, ::-1]
  )
  right = np.argmax(logits, 1) == data.labels
  assert found['top1'] == pytest.approx(right.mean(), abs=1e-9)
  assert found['flip_average']
  assert found['loss'] != best['loss']
  flipping = two_stages.get_config(config.data_dir)
  flipping.stages[1]['eval_flip'] = True
  assert jaxprog.evaluate(flipping, workdir)['loss'] == found['loss']
  assert (workdir / 'eval' / 'ten-best-flip.json').is_file()


def crop(encoded, size=8):
  return preprocess.center_crop(encoded, size, eval_crop=1.0)


def read_logits(trained, images):
  apply = jax.jit(trained.create_apply())
  return np.asarray(apply(trained.variables, images))


def test_several_sizes_become_a_table_and_a_picture(config, workdir, best):
  result = runs.call_main(
    '--mode=eval', f'--workdir={workdir}', '--eval_image_size=32,16,8'
  )
  assert result.returncode == 0, result.stderr
  lines = [x.split() for x in result.stdout.splitlines()]
  assert lines[0] == ['size', 'top-1', 'top-5']
  assert [x[0] for x in lines[1:]] == ['8', '16', '32']
  assert lines[1][1] == f'{100 * best["top1"]:.1f}'
  rows = json.loads((workdir / 'eval' / 'ten-best-sizes.json').read_text())
  assert [x['image_size'] for x in rows] == [8, 16, 32]
  larger = two_stages.get_config(config.data_dir)
  larger.stages[1]['eval_image_size'] = 16
  assert rows[1]['nll'] == jaxprog.evaluate(larger, workdir)['nll']
  picture = (workdir / 'eval' / 'ten-best-sizes.png').read_bytes()
  assert preprocess.decode(picture).std() > 10


def test_any_size_is_seen_by_the_network_that_was_trained(
  config, workdir, digits, tmp_path
):
  size = 64  # A network for it would begin with a stride.
  few = digits.eval.select(np.arange(len(digits.eval)) < 48)
  write_folder(tmp_path, few, '0123456789')
  data = f'folder:{tmp_path}'
  found = jaxprog.evaluate(config, workdir, dataset=data, eval_image_size=size)
  trained = trained_lib.load_trained(config, workdir)
  images = np.stack([crop(few.original(i), size) for i in range(48)])
  model = trained.create_model().clone(stem=resnet.Stem(stride=1, pool=False))
  images = augment.normalise(images, config.mean_rgb, config.std_rgb)
  apply = jax.jit(functools.partial(model.apply, train=False))
  losses = optax.softmax_cross_entropy_with_integer_labels(
    apply(trained.variables, images), few.labels
  )
  assert found['nll'] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_one_size_is_one_figure(config, workdir):
  result = runs.call_main(
    '--mode=eval', f'--workdir={workdir}', '--eval_image_size=16'
  )
  found = jaxprog.evaluate(config, workdir, eval_image_size=16)
  assert result.stdout == f'{100 * found["top1"]:.1f}\n'
  assert found['image_size'] == 16
  assert (workdir / 'eval' / 'ten-best-16px.csv').is_file()


@pytest.mark.parametrize(
  ('flag', 'what'),
  [
    ('--eval_image_size=large', 'takes whole numbers of pixels'),
    ('--eval_image_size=8,7', '7 pixels are too few'),
    ('--input=imagenet_w2', "Did you mean 'imagenet_v2'"),
    ('--input=imagenet_v2', 'imagenetv2-matched-frequency.tar.gz'),
  ],
)
def test_wrong_sizes_and_test_sets_are_told_in_three_lines(workdir, flag, what):
  result = runs.call_main('--mode=eval', f'--workdir={workdir}', flag)
  assert result.returncode == 2
  assert what in result.stderr
  lines = [x for x in result.stderr.splitlines() if 'event=' not in x]
  assert len(lines) <= 3


def test_the_size_of_a_run_is_a_field(workdir):
  result = runs.call_main(f'--workdir={workdir}', '--eval_image_size=16')
  assert result.returncode == 2
  assert '--config.stages[0].eval_image_size=16' in result.stderr


@pytest.fixture(scope='module')
def of_imagenet(workdir, tmp_path_factory):
  """A data_dir, and a run whose digits bear the names of ImageNet's classes."""
  data_dir = tmp_path_factory.mktemp('imagenet')
  directory = checkpoints.stage_directory(data_dir / 'run', 'three')
  variables, meta = checkpoints.load_weights(workdir, 'three', 'best')
  wnids = [test_sets.read_imagenet_classes()[i] for i in (1, 2, 10)]
  meta = {**meta, 'classes': wnids, 'class_names': wnids}
  with checkpoints.Checkpoints(directory) as saved:
    saved.save_weights('best', 1, variables, meta)
  shutil.copy(workdir / 'config.json', data_dir / 'run')
  return data_dir, wnids


def write_digits(split, root, names):
  """Writes the images of 1, 3 and 5 below ROOT/NAME."""
  for digit, name in zip((1, 3, 5), names, strict=False):
    (root / name).mkdir(parents=True)
    for i in np.flatnonzero(split.labels == digit).tolist():
      (root / name / f'{i}.png').write_bytes(split.original(i))


def test_numbered_folders_of_imagenet_v2_are_scored_by_name(
  config, workdir, of_imagenet, digits, capsys
):
  data_dir, _ = of_imagenet
  own = jaxprog.evaluate(config, workdir, stage='three')
  folder = data_dir / 'imagenetv2-matched-frequency-format-val'
  write_digits(digits.eval, folder, ('1', '2', '10'))
  capsys.readouterr()
  found = jaxprog.evaluate(
    two_stages.get_config(data_dir),
    data_dir / 'run',
    stage='three',
    dataset='imagenet_v2',
  )
  assert found['count'] == own['count']
  assert [x['right'] for x in found['per_class']] == [
    x['right'] for x in own['per_class']
  ]
  assert found['nll'] == pytest.approx(own['nll'], rel=1e-5)
  said = ' '.join(capsys.readouterr().err.split())
  count = found['count']
  assert f'imagenet_v2 has {count} images here; published figures' in said
  path = data_dir / 'run' / 'eval' / 'three-best-imagenet_v2.json'
  assert path.is_file()


def test_imagenet_r_is_chosen_among_its_own_classes(of_imagenet, digits):
  data_dir, wnids = of_imagenet
  config, folder = two_stages.get_config(data_dir), data_dir / 'imagenet-r'
  write_digits(digits.eval, folder, wnids[:2])
  found = jaxprog.evaluate(
    config, data_dir / 'run', stage='three', dataset='imagenet_r'
  )
  trained = trained_lib.load_trained(config, data_dir / 'run', stage='three')
  images = sorted(folder.glob('*/*.png'))
  logits = read_logits(
    trained, np.stack([crop(x.read_bytes()) for x in images])
  )
  labels = [wnids.index(x.parent.name) for x in images]
  right = np.argmax(logits[:, :2], 1) == labels
  assert found['chosen_among'] == 2
  assert found['top1'] == pytest.approx(right.mean(), abs=1e-9)
  assert {x['predicted'] for x in found['confusions']} <= {*wnids[:2]}


def test_several_classes_may_be_right(of_imagenet, digits):
  data_dir, _ = of_imagenet
  root = data_dir / 'objectnet-1.0'
  write_digits(digits.eval, root / 'images', ('both', 'spare', 'ten'))
  (root / 'mappings').mkdir()
  for name, text in {
    'folder_to_objectnet_label.json': {'both': 'Both', 'ten': 'Ten'},
    'objectnet_to_imagenet_1k.json': {'Both': 'one; two', 'Ten': 'ten'},
    'pytorch_to_imagenet_2012_id.json': {'1': 0, '2': 1, '10': 2},
  }.items():
    (root / 'mappings' / name).write_text(json.dumps(text))
  names = root / 'mappings' / 'imagenet_to_label_2012_v2'
  names.write_text('one\ntwo\nten\n')
  config = two_stages.get_config(data_dir)
  found = jaxprog.evaluate(
    config, data_dir / 'run', stage='three', dataset='objectnet'
  )
  trained = trained_lib.load_trained(config, data_dir / 'run', stage='three')
  images = [*(root / 'images').glob('both/*'), *(root / 'images').glob('ten/*')]
  inside = [preprocess.decode(x.read_bytes())[2:-2, 2:-2] for x in images]
  resized = [crop(encode(x)) for x in inside]
  predicted = np.argmax(read_logits(trained, np.stack(resized)), 1)
  is_ten = [x.parent.name == 'ten' for x in images]
  right = (predicted == 2) == is_ten
  assert found['count'] == len(images)
  assert found['top1'] == pytest.approx(right.mean(), abs=1e-9)
  wrong = sum(x['count'] for x in found['confusions'])
  assert wrong == np.count_nonzero(~right)

"""What saved weights know of other data, and how sure they may be."""

import json

import jax
import numpy as np
import pytest
import runs
import two_stages
from flax import linen as nn
from scipy import special
from sklearn import linear_model

import jaxprog
from jaxprog.data import preparation, preprocess
from jaxprog.tools import probe as tool
from jaxprog.training import forward, trained


@pytest.fixture(scope='module')
def config(data_dir):
  return two_stages.get_config(data_dir)


@pytest.fixture(scope='module')
def workdir(data_dir, tmp_path_factory):
  return two_stages.copy(tmp_path_factory, data_dir)


@pytest.fixture(scope='module')
def digits(data_dir):
  return preparation.load_dataset('digits', data_dir)


def crop(split):
  """Returns the images of a split as evaluation sees them, and their labels."""
  images = [
    preprocess.center_crop(split.original(i), 8, eval_crop=1.0)
    for i in range(len(split))
  ]
  return np.stack(images), split.labels


def test_a_probe_is_scikit_learns_on_what_goes_into_the_head(
  config, workdir, digits
):
  (row,) = jaxprog.probe(config, workdir)
  weights = trained.load_trained(config, workdir, stage='three')
  # A head that hands on what it gets.
  variables = weights.variables
  size = len(variables['params']['head']['kernel'])
  head = {'kernel': np.eye(size), 'bias': np.zeros(size)}
  variables = {**variables, 'params': {**variables['params'], 'head': head}}
  model = weights.model_fn(num_classes=size, image_size=8, dtype=np.float32)

  def see(split):
    images, labels = crop(split)
    pixels = (images / 255 - config.mean_rgb) / config.std_rgb
    return np.asarray(model.apply(variables, pixels, train=False)), labels

  chosen, held = tool._choose_train(digits.train)
  x, labels = see(digits.train.select(chosen))
  assert np.bincount(labels).tolist() == [15] * 10
  assert np.bincount(labels[held]).tolist() == [5] * 10
  mean, std = x.mean(0), np.maximum(x.std(0), 1e-12)
  ridge = linear_model.Ridge(alpha=row['penalty'])
  ridge.fit((x - mean) / std, 2 * np.eye(10)[labels] - 1)
  new, labels = see(digits.eval)
  right = ridge.predict((new - mean) / std).argmax(-1) == labels
  assert row['top1'] == pytest.approx(right.mean(), abs=1 / 360)
  assert row['num_images'] == 360
  assert (row['from'], row['to']) == ('three', 'ten')
  assert 0.1 < row['random_top1'] != row['top1'] > 0.2


def test_the_command_line_prints_a_line_a_pair_and_the_reports_have_it(workdir):
  result = runs.call_main('--mode=eval', f'--workdir={workdir}', '--probe')
  assert result.returncode == 0, result.stderr
  (row,) = json.loads((workdir / 'probe.json').read_text())['rows']
  assert result.stdout == f'three ten {100 * row["top1"]:.1f}\n'
  for text in (
    result.stderr,
    (workdir / 'training_report.txt').read_text(),
    (workdir / 'report.html').read_text(),
  ):
    assert 'random weights' in text
    assert f'{row["random_top1"]:.1%}' in text


def test_what_cannot_be_probed_is_told(config, workdir, capsys):
  config = config.copy_and_resolve_references()
  config.stages.append(
    {'name': 'far', 'dataset': 'folder:/nowhere', 'num_epochs': 1}
  )
  assert len(jaxprog.probe(config, workdir)) == 1
  assert 'far is left out: There is no' in capsys.readouterr().err
  config.stages = config.stages[:1]
  with pytest.raises(jaxprog.UserError, match='a later one with its data'):
    jaxprog.probe(config, workdir)
  for flag in ('--stage=ten', '--input=digits', '--calibrate'):
    result = runs.call_main(
      '--mode=eval', f'--workdir={workdir}', '--probe', flag
    )
    assert result.returncode == 2
    assert '--mode=eval --probe takes no --' in result.stderr


def test_a_probe_is_fitted_on_some_of_each_class_and_chosen_on_others(digits):
  zeros = np.flatnonzero(digits.train.labels == 0)[:4]
  some = np.isin(np.arange(len(digits.train)), zeros)
  split = digits.train.select(some | (digits.train.labels > 0))
  chosen, held = tool._choose_train(split)
  labels = split.labels[chosen]
  assert np.bincount(labels).tolist() == [4] + [15] * 9
  assert np.bincount(labels[held]).tolist() == [1] + [5] * 9


def test_features_of_a_network_of_ones_own_are_what_its_head_gets():
  class Own(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      del train
      x = nn.Dense(6, name='body')(x.mean(axis=(1, 2)))
      return nn.Dense(4, name='head')(nn.relu(x))

  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  pixels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
  variables = Own().init(jax.random.key(0), images / 255, train=False)
  found = forward.create_features(Own(), pixels)(variables, images)
  body = variables['params']['body']
  mean = (images.mean(axis=(1, 2)) / 255 - 0.5) / 0.5
  expected = np.maximum(mean @ body['kernel'] + body['bias'], 0)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope='module')
def photo(digits, tmp_path_factory):
  path = tmp_path_factory.mktemp('photo') / 'three.png'
  index = int(np.flatnonzero(digits.eval.labels == 3)[0])
  path.write_bytes(digits.eval.original(index))
  return path


def test_predictions_are_at_the_temperature_of_the_holdout(
  config, workdir, photo, capsys
):
  (plain,) = jaxprog.predict(config, workdir, photo, stage='three')
  found = jaxprog.calibrate(config, workdir, stage='three')
  three, _ = runs.read_history(workdir)['stages']
  assert found['fitted_on'] == 'the hold-out'
  assert found['num_fitted'] == three['holdout']['images']
  assert found['num_measured'] == three['validation']['num_images']
  # Before, it is as training has seen it.
  for name in ('nll', 'ece'):
    seen = three['diagnostics'][name]
    assert found['before'][name] == pytest.approx(seen, abs=1e-5)
  assert 'calibration error' in capsys.readouterr().err
  (now,) = jaxprog.predict(config, workdir, photo, stage='three')
  assert [x for x, _ in now['top5']] == [x for x, _ in plain['top5']]
  before, after = ([p for _, p in x['top5']] for x in (plain, now))
  expected = special.softmax(np.log(before) / found['temperature'])
  np.testing.assert_allclose(after, expected, rtol=1e-4)
  assert 'temperature of' in capsys.readouterr().err
  again = jaxprog.calibrate(config, workdir, stage='three')
  assert again == found


def test_without_a_holdout_it_is_half_of_the_validation_images(workdir):
  flags = ('--mode=eval', f'--workdir={workdir}', '--calibrate')
  result = runs.call_main(*flags)
  assert result.returncode == 0, result.stderr
  path = workdir / 'calibration' / 'ten-best.json'
  found = json.loads(path.read_text())
  assert result.stdout == f'{found["temperature"]:.3f}\n'
  assert found['fitted_on'] == 'half of the validation images'
  assert (found['num_fitted'], found['num_measured']) == (180, 180)
  assert str(path) in result.stderr
  text = (workdir / 'training_report.txt').read_text()
  text = ' '.join(text.split())
  assert f'a temperature of {found["temperature"]:.3g}, fitted on half' in text
  assert f'{found["after"]["ece"]:.1%}' in text
  page = (workdir / 'report.html').read_text()
  assert f'after, temperature {found["temperature"]:.3g}' in page


def test_other_weights_and_other_crops_have_no_temperature(config, workdir):
  found = jaxprog.calibrate(config, workdir)

  def load(config=config):
    return trained.load_trained(config, workdir).temperature

  assert load() == found['temperature'] != 1
  other = config.copy_and_resolve_references()
  other.stages[1]['eval_image_size'] = 16
  assert load(other) == 1
  path = workdir / 'calibration' / 'ten-best.json'
  path.write_text(json.dumps({**found, 'digest': 'of others'}))
  assert load() == 1
  path.write_text('{')
  assert load() == 1

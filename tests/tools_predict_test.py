import csv
import dataclasses
import io
import os
import shutil

import data_sources_test
import jax
import numpy as np
import pytest
import runs
import two_stages
from data_fixtures import encode, photo
from PIL import Image

import jaxprog
from jaxprog.data import preparation, preprocess
from jaxprog.reporting import contact_sheet
from jaxprog.tools import evaluate, predict
from jaxprog.training import loop, trained


@pytest.fixture(scope='module')
def config(data_dir):
  return two_stages.get_config(data_dir)


@pytest.fixture(scope='module')
def workdir(data_dir, tmp_path_factory):
  return two_stages.copy(tmp_path_factory, data_dir)


@pytest.fixture(scope='module')
def homeless(config, tmp_path_factory):
  """The config where none of the data is."""
  config = config.copy_and_resolve_references()
  config.data_dir = str(tmp_path_factory.mktemp('nothing'))
  return config


def read_csv(path):
  with open(path) as file:
    return list(csv.DictReader(file))


def write_kinds(root):
  """Writes the same photograph in each kind of file; returns their names."""
  root.mkdir()
  rgb = photo(48, 32)
  image = Image.fromarray(rgb)
  deep = np.asarray(image.convert('L'), np.uint16) * 257
  kinds = {
    'photo.jpg': image,
    'grey.png': image.convert('L'),
    'photo.webp': image,
    'cmyk.jpeg': image.convert('CMYK'),
    'first.gif': image.convert('P'),
    'photo.bmp': image,
    'photo.tiff': image,
    'deep.png': Image.fromarray(deep),
    'alpha.png': image.convert('RGBA'),
    'no_suffix': image,
  }
  for name, kind in kinds.items():
    more = [Image.new('P', image.size)] if name.endswith('.gif') else []
    options = {'save_all': True, 'append_images': more} if more else {}
    kind.save(root / name, None if '.' in name else 'PNG', **options)
  return sorted(kinds)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """A folder as people have them; returns it and its images' names."""
  root = tmp_path_factory.mktemp('input') / 'my photos'
  names = write_kinds(root)
  (root / 'notes.txt').write_text('BMW, not a bitmap.')
  (root / '.hidden.jpg').write_bytes(encode(photo(9, 9), 'JPEG'))
  (root / 'loop.jpg').symlink_to('loop.jpg')
  os.mkfifo(root / 'pipe.jpg')
  (root / 'folder.jpg').mkdir()
  (root / 'below' / '.trash').mkdir(parents=True)
  (root / 'below' / '.trash' / 'a.jpg').write_bytes(b'')
  shutil.copy(root / 'photo.jpg', root / 'below' / 'B.JPG')
  whole = (root / 'photo.jpg').read_bytes()
  (root / 'half.jpg').write_bytes(whole[: len(whole) // 2])
  (root / 'text.jpg').write_text('no image')
  return root, sorted([*names, 'below/B.JPG', 'half.jpg', 'text.jpg'])


def test_the_command_line_names_what_each_image_shows(
  workdir, homeless, photos
):
  root, names = photos
  result = runs.call_main(
    '--mode=predict',
    f'--workdir={workdir}',
    f'--config.data_dir={homeless.data_dir}',
    f'--input={root}',
  )
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert [x.split()[0] for x in lines[: len(names)]] == names
  left_out = '1 x .txt (notes.txt), 1 x broken link (loop.jpg)'
  assert f'Left out: {left_out}, 1 x special file (pipe.jpg)' in result.stderr
  assert '2 cannot be read' in result.stderr
  path = workdir / 'predictions' / 'my photos.csv'
  assert lines[len(names)] == f'CSV: {path}'
  assert lines[len(names) + 1] == f'Contact sheet: {path.with_suffix(".png")}'
  rows = read_csv(path)
  assert [x['file'] for x in rows] == [str(root / x) for x in names]
  assert all(bool(x['class']) != bool(x['error']) for x in rows)
  assert Image.open(path.with_suffix('.png')).width > 800


@pytest.mark.parametrize('name', ['', 'nowhere', 'empty'])
def test_without_an_image_there_is_a_mistake(homeless, tmp_path, name):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'notes.txt').write_text('')
  expected = {
    '': 'There is no --input',
    'nowhere': "no image or folder '.*nowhere'",
    'empty': r"no image in '.*empty': 1 x \.txt \(notes\.txt\)",
  }
  with pytest.raises(jaxprog.UserError, match=expected[name]):
    jaxprog.predict(homeless, tmp_path, str(tmp_path / name) if name else '')


def test_one_file_that_is_no_image_is_a_mistake(homeless, workdir, tmp_path):
  (tmp_path / 'notes.txt').write_text('hello')
  with pytest.raises(jaxprog.UserError, match='cannot be read: it is no image'):
    jaxprog.predict(homeless, workdir, tmp_path / 'notes.txt')


def test_every_kind_is_read_as_evaluation_would(homeless, workdir, photos):
  root, _ = photos
  found = {x['file']: x for x in jaxprog.predict(homeless, workdir, root)}
  assert 'error' in found[str(root / 'half.jpg')]
  assert found[str(root / 'text.jpg')] == {
    'file': str(root / 'text.jpg'),
    'error': 'it is no image',
  }
  weights = trained.load_trained(homeless, workdir)
  model = weights.create_model()
  apply = jax.jit(lambda images: model.apply(variables, images, train=False))
  variables = weights.variables
  for file, x in found.items():
    if 'error' in x:
      continue
    # The whole image by Pillow, then the same crop and, in NumPy, softmax.
    pixels = np.asarray(Image.open(file).convert('RGB'))
    if file.endswith('deep.png'):
      grey = (np.asarray(Image.open(file), np.int64) >> 8).astype(np.uint8)
      pixels = np.stack([grey] * 3, -1)
    crop = preprocess.center_crop(encode(pixels), 8, eval_crop=1.0)
    scaled = (crop / 255 - homeless.mean_rgb) / homeless.std_rgb
    images = np.asarray(scaled, np.float32)[None]
    logits = np.asarray(apply(images))[0]
    exponents = np.exp(logits - logits.max())
    order = np.argsort(-logits)[:5]
    assert [name for name, _ in x['top5']] == [str(i) for i in order]
    np.testing.assert_allclose(
      [p for _, p in x['top5']], (exponents / exponents.sum())[order], rtol=1e-3
    )
    assert (x['class'], x['probability']) == x['top5'][0]


def test_classes_are_those_of_the_evaluation_image_by_image(
  config, workdir, data_dir, tmp_path, capsys
):
  split = preparation.load_dataset('digits', data_dir).eval
  for i in range(len(split)):
    (tmp_path / f'{i:03}.png').write_bytes(split.original(i))
  weights = trained.load_trained(config, workdir)
  data = evaluate.load_dataset(weights, '')
  task = evaluate.create_task(weights, data)
  variables = jax.device_put(weights.variables, task.shardings.replicated)
  _, outcomes, _ = loop.evaluate(task, variables, data.eval)
  found = jaxprog.predict(config, workdir, tmp_path)
  assert [int(x['class']) for x in found] == outcomes['predicted'].tolist()
  np.testing.assert_allclose(
    [x['probability'] for x in found], outcomes['confidence'], rtol=1e-4
  )
  out = capsys.readouterr().out.splitlines()
  assert out[predict.NUM_ROWS].startswith('... and 340 more in ')
  rows = read_csv(workdir / 'predictions' / f'{tmp_path.name}.csv')
  for x, row in zip(found, rows, strict=True):
    second, probability = x['top5'][1]
    assert row['class'] == row['name'] == x['class']
    assert float(row['probability']) == pytest.approx(
      x['probability'], abs=1e-6
    )
    assert row['class_2'] == second
    assert float(row['probability_2']) == pytest.approx(probability, abs=1e-6)
    assert row['error'] == ''


def test_one_image_alone_gets_the_same_probabilities(homeless, workdir, photos):
  root, _ = photos
  together = jaxprog.predict(homeless, workdir, root)
  (alone,) = jaxprog.predict(homeless, workdir, root / 'photo.jpg')
  (same,) = (x for x in together if x['file'] == alone['file'])
  assert alone['class'] == same['class']
  assert alone['probability'] == pytest.approx(same['probability'], rel=1e-5)
  assert (workdir / 'predictions' / 'photo.csv').is_file()


def test_exif_orientation_is_ignored_and_said(
  homeless, workdir, tmp_path, capsys
):
  turned = Image.Exif()
  turned[0x0112] = 6
  pixels = photo(32, 32)
  (tmp_path / 'a.jpg').write_bytes(encode(pixels, 'JPEG'))
  (tmp_path / 'b.jpg').write_bytes(encode(pixels, 'JPEG', exif=turned))
  upright, other = jaxprog.predict(homeless, workdir, tmp_path)
  assert other['top5'] == upright['top5']
  assert '1 have an EXIF orientation' in capsys.readouterr().err


def test_names_that_no_terminal_should_see(homeless, workdir, tmp_path, capsys):
  data = encode(photo(16, 16), 'JPEG')
  (tmp_path / 'a\x1b[31m\n.jpg').write_bytes(data)
  (tmp_path / 'b\udcff.jpg').write_bytes(data)
  (tmp_path / 'c\n.jpg').write_bytes(b'damaged')
  found = jaxprog.predict(homeless, workdir, tmp_path)
  ends = [x['file'][-5:] for x in found]
  assert ends == ['\n.jpg', '\udcff.jpg', '\n.jpg']
  out = capsys.readouterr().out
  assert '\x1b' not in out
  assert len(out.splitlines()) == 5
  assert len(read_csv(workdir / 'predictions' / f'{tmp_path.name}.csv')) == 3


def test_memory_does_not_grow_with_the_folder(config, workdir, tmp_path):
  (tmp_path / 'a.jpg').write_bytes(encode(photo(16, 16), 'JPEG'))
  weights = trained.load_trained(config, workdir)
  asked = []

  class Files(list):
    def __iter__(self):
      for file in super().__iter__():
        asked.append(file)
        yield file

  files = Files([tmp_path / 'a.jpg'] * 1000)
  for i, _ in enumerate(predict.classify(weights, files)):
    # Some read ahead, a batch that is computed and one that is told.
    ahead = 4 * os.cpu_count()
    assert len(asked) <= i + ahead + 2 * predict.BATCH_SIZE
  assert i == 999


def test_right_and_wrong_are_marked_by_the_name_of_the_folder(config, workdir):
  found = trained.load_trained(config, workdir)
  meta = {**found.meta, 'classes': ['n1', 'n2', 'n3'], 'class_names': None}
  meta['class_names'] = first, second, _ = 'crane', 'dog', 'crane'
  found = dataclasses.replace(found, meta=meta)

  def tile(folder, name, label='n1'):
    prediction = {'file': f'{folder}/x.png', 'class': label, 'name': name}
    return predict._tile({**prediction, 'probability': 0.5}, found)

  assert tile(first, first)[1:] == (f'✓ {first}', '50.0%', True)
  wrong = tile(second, first)
  assert wrong[1:] == (f'✗ {first}', f'50.0%, is {second}', False)
  assert tile('holidays', first)[1:] == (first, '50.0%', None)
  # Two classes may share a name.
  assert tile('n3', first)[1:] == (f'✗ {first}', '50.0%, is crane', False)
  assert tile('crane', first, 'n3').is_right


def test_images_in_files_of_many_are_those_of_evaluation(
  homeless, workdir, tmp_path
):
  root = data_sources_test.write_hub(tmp_path / 'hub')
  many = predict.predict(homeless, workdir, f'parquet:{root}')
  for name, label, data in data_sources_test.images('validation'):
    path = tmp_path / 'files' / data_sources_test.NAMES[label] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  files = predict.predict(homeless, workdir, tmp_path / 'files')
  assert len(files) == 9

  def by_name(predictions, folder):
    return {
      x['file'].removeprefix(f'{folder}/'): (x['class'], x['probability'])
      for x in predictions
    }

  found, expected = by_name(many, root), by_name(files, tmp_path / 'files')
  assert found.keys() == expected.keys()
  for name, (label, probability) in expected.items():
    assert found[name] == (label, pytest.approx(probability, rel=1e-5))
  assert (workdir / 'predictions/hub.png').exists()


def test_a_long_title_is_whole_on_several_lines():
  text = 'Great Pyrenees, a very large dog of the mountains'
  lines = contact_sheet._wrap(text, contact_sheet.TITLE_SIZE)
  assert len(lines) == 2
  assert ' '.join(lines) == text
  font = contact_sheet._font(contact_sheet.TITLE_SIZE)
  assert max(map(font.getlength, lines)) <= contact_sheet.TILE_WIDTH


def test_a_contact_sheet_shows_whole_images_in_a_grid(tmp_path):
  red = np.full((10, 200, 3), (200, 0, 0), np.uint8)
  (tmp_path / 'wide.png').write_bytes(encode(red))
  tiles = [contact_sheet.Tile(tmp_path / 'wide.png', 'a class ' * 9, '99.0%')]
  tiles += [contact_sheet.Tile(None, 'cannot be read', 'b.jpg')] * 60
  page = contact_sheet.draw(tiles, 'heading')
  pixels = np.asarray(page)
  shown = np.argwhere((pixels == (200, 0, 0)).all(-1))
  height, width = shown.max(0) - shown.min(0) + 1
  assert (height, width) == (contact_sheet.TILE_WIDTH // 20, 220)
  grey = (pixels == 0xEC).all(-1)
  filled = contact_sheet.TILE_WIDTH * contact_sheet.TILE_HEIGHT
  # Text has a few pixels of that grey.
  count = grey.sum() / filled
  assert contact_sheet.MAX_TILES - 1 <= count < contact_sheet.MAX_TILES - 0.9
  assert Image.open(io.BytesIO(contact_sheet.encode(page))).size == page.size

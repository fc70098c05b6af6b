import importlib.util
import json
import os
import pathlib
import random

import pyarrow as pa
import pytest
import tiny_config
from data_fixtures import encode, photo, read_all, write_image
from pyarrow import parquet as pq

import jaxprog
from jaxprog import errors, start_from
from jaxprog.data import parquet, preparation, tars, verification
from jaxprog.tools import audit

NAMES = ('tench, Tinca tinca', 'cat', 'dog')


def images(split: str, count: int = 9) -> list[tuple[str, int, bytes]]:
  """Returns name, label and bytes of images, no two alike."""
  start = {'train': 0, 'validation': 100, 'test': 200}[split]
  return [
    (f'{split}_{i}.png', i % 3, encode(photo(20, 16, start + i)))
    for i in range(count)
  ]


def write_parquet(path, rows, *, image='image', label='label', **options):
  """Writes rows as the Hub has them: what they are, say the metadata."""
  features = {
    image: {'_type': 'Image'},
    label: {'_type': 'ClassLabel', 'names': list(NAMES)},
  }
  noted = json.dumps({'info': {'features': features}})
  kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
  table = pa.table(
    {
      image: pa.array([{'bytes': x, 'path': n} for n, _, x in rows], kind),
      label: pa.array([x for _, x, _ in rows], pa.int64()),
    }
  ).replace_schema_metadata({'huggingface': noted})
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(table, path, row_group_size=options.pop('group', 2), **options)


def write_hub(root: pathlib.Path) -> pathlib.Path:
  train = images('train')
  for i, part in enumerate((train[:5], train[5:])):
    write_parquet(root / f'data/train-0000{i}-of-00002.parquet', part)
  write_parquet(
    root / 'data/validation-00000-of-00001.parquet', images('validation')
  )
  return root


def write_tars(root: pathlib.Path) -> pathlib.Path:
  """Writes what WebDataset's own writer makes of the same images."""
  webdataset = pytest.importorskip('webdataset')
  root.mkdir(parents=True, exist_ok=True)
  train = images('train')
  for name, part in (
    ('train-000', train[:5]),
    ('train-001', train[5:]),
    ('val-000', images('validation')),
  ):
    with webdataset.TarWriter(f'{root}/{name}.tar') as writer:
      for file, label, data in part:
        key = f'folder/{file.removesuffix(".png")}'
        writer.write({'__key__': key, 'png': data, 'cls': str(label)})
  (root / 'classnames.txt').write_text('\n'.join(NAMES))
  return root


def check_records(dataset, names=NAMES):
  """Checks every image, its name and its class."""
  assert dataset.classes == tuple(sorted(names))
  for split, records in (
    ('train', dataset.train),
    ('validation', dataset.eval),
  ):
    known = {name: (label, data) for name, label, data in images(split)}
    found = read_all(records)
    assert sorted(x['file_name'] for x in found) == sorted(known)
    for x in found:
      label, data = known[x['file_name']]
      assert (x['wnid'], x['image']) == (names[label], data)
      assert dataset.classes[x['label']] == x['wnid']


def test_the_hubs_parquet(tmp_path):
  write_hub(tmp_path / 'hub')
  name = f'parquet:{tmp_path}/hub'
  check_records(preparation.load_dataset(name, tmp_path / 'data'))


def test_webdatasets_tars(tmp_path):
  root = write_tars(tmp_path / 'all[1].test')
  (tmp_path / 'links').mkdir()
  (tmp_path / 'links' / 'all').symlink_to(root)
  braces = f'wds:{root}/{{train-{{000..001}},val-{{000..000}}}}.tar'
  for name in (
    braces,
    f'wds:{root}/*.tar',
    f'wds:{root}',
    f'wds:{tmp_path}/links',
  ):
    check_records(preparation.load_dataset(name, tmp_path / 'data'))
  name = f'wds:{root}/{{train-00*,val-{{000..002}},dev-*}}.tar'
  with pytest.raises(errors.UserError, match='3 tars are missing, 3 are there'):
    preparation.load_dataset(name, tmp_path / 'other')


def test_labels_in_json_and_tars_that_are_not_whole(tmp_path):
  webdataset = pytest.importorskip('webdataset')
  kinds = ('jpg', 'jpeg', 'webp')
  for name in ('train-0.tar', 'val-0.tar'):
    with webdataset.TarWriter(str(tmp_path / name), encoder=False) as writer:
      for i, kind in enumerate(kinds):
        data = encode(photo(9, 9, i), 'WEBP' if kind == 'webp' else 'JPEG')
        noted = json.dumps({'label': 'of no use', 'class_name': NAMES[i]})
        writer.write({'__key__': str(i), kind: data, 'json': noted.encode()})
      writer.write({'__key__': 'README', 'txt': b'no image'})
  name = f'wds:{tmp_path}?label=class_name'
  dataset = preparation.load_dataset(name, tmp_path / 'data')
  assert dataset.classes == tuple(sorted(NAMES))
  assert sorted(dataset.train.names()) == ['0.jpg', '1.jpeg', '2.webp']
  assert dataset.left_out.startswith('2 x without an image (train-0.tar/README')
  sizes = tmp_path / 'sizes.json'
  sizes.write_text('{"train-0.tar": 5}')
  with pytest.raises(errors.UserError, match='has 4 examples'):
    preparation.load_dataset(name, tmp_path / 'other')
  sizes.write_text('{"train-0.tar": 4}')
  preparation.load_dataset(name, tmp_path / 'other')
  whole = (tmp_path / 'val-0.tar').read_bytes()
  (tmp_path / 'val-0.tar').write_bytes(whole[:1500])
  with pytest.raises(errors.UserError, match='cannot be read'):
    preparation.prepare(name, tmp_path / 'data')
  (tmp_path / 'val-0.tar').rename(tmp_path / 'val-0.tar.gz')
  with pytest.raises(errors.UserError, match='is compressed'):
    preparation.prepare(name, tmp_path / 'data')


def test_it_is_verified(tmp_path):
  name = f'parquet:{write_hub(tmp_path / "hub")}'
  for kind in ('raw', 'prepared'):
    report = verification.verify_dataset(name, tmp_path / 'data')
    assert (report['kind'], report['errors']) == (kind, [])
    preparation.prepare(name, tmp_path / 'data')


def test_columns_of_other_names_and_classes_that_are_words(tmp_path):
  rows = images('train')
  table = pa.table(
    {
      'id': list(range(9)),
      'photo': [x for _, _, x in rows],
      'thumb': [x for _, _, x in rows],
      'kind': pa.array(['cat', 'dog', 'ant'] * 3).dictionary_encode(),
    }
  )
  for split in ('train', 'test'):
    (tmp_path / split).mkdir()
    pq.write_table(table, tmp_path / split / 'x.parquet')
  with pytest.raises(errors.UserError, match='no one column of images') as e:
    preparation.load_dataset(f'parquet:{tmp_path}', tmp_path / 'data')
  assert 'photo (binary)' in e.value.what
  name = f'parquet:{tmp_path}?image=photo&label=kind'
  dataset = preparation.load_dataset(name, tmp_path / 'data')
  assert dataset.classes == ('ant', 'cat', 'dog')
  # An image without a name is called by its file and row.
  by_name = {x['file_name']: x for x in read_all(dataset.train)}
  assert by_name['x-7']['image'] == rows[7][2]
  assert by_name['x-7']['wnid'] == 'dog'


def test_imagenets_classes_and_names_are_those_of_its_folder(tmp_path):
  # The Hub calls files NAME_WNID.JPEG, and two classes alike.
  wnids = ('n02012849', 'n03126707', 'n01440764')
  for split, start in (('train', '{0}_{1}'), ('val', 'ILSVRC2012_val_{1:08}')):
    rows = [
      (f'{start.format(wnids[y], i)}_{wnids[y]}.JPEG', y, data)
      for i, (_, y, data) in enumerate(images('train'))
    ]
    write_parquet(tmp_path / f'{split}-00000-of-00001.parquet', rows)
  dataset = preparation.load_dataset(f'parquet:{tmp_path}', tmp_path / 'data')
  assert dataset.classes == tuple(sorted(wnids))
  assert dataset.class_names == ('dog', 'tench, Tinca tinca', 'cat')
  assert sorted(dataset.train.names())[0] == 'n01440764_2.JPEG'
  assert sorted(dataset.eval.names())[0] == 'ILSVRC2012_val_00000000.JPEG'


def test_numbers_without_names_sort_as_numbers(tmp_path):
  table = pa.table(
    {'image': [x for _, _, x in images('train', 11)], 'label': range(11)}
  )
  for split in ('train', 'val'):
    pq.write_table(table, tmp_path / f'{split}.parquet')
  dataset = preparation.load_dataset(f'parquet:{tmp_path}', tmp_path / 'data')
  assert dataset.classes == tuple(f'{i:02}' for i in range(11))


def damage(root: pathlib.Path, how: str) -> str:
  """Spoils a folder of the Hub's files; returns what is said of it."""
  first = root / 'data/train-00000-of-00002.parquet'
  match how:
    case 'incomplete':
      first.unlink()
      return '1 of 2 files train-… are missing'
    case 'no evaluation':
      (root / 'data/validation-00000-of-00001.parquet').unlink()
      return 'needs files for training and for evaluation; there are 2 of train'
    case 'Git LFS':
      first.write_text('version https://git-lfs.github.com/spec/v1\n')
      return 'it stands for a file in Git LFS'
    case 'cut off':
      os.truncate(first, first.stat().st_size // 2)
      return 'cannot be read'
    case 'unlabelled':
      write_parquet(first, [(n, -1, x) for n, _, x in images('train')])
      return 'Image 0 has no label'
    case 'out of range':
      write_parquet(first, [(n, 3, x) for n, _, x in images('train')])
      return 'Image 0 is of class 3; there are 3'
    case 'a class without images':
      path = root / 'data/validation-00000-of-00001.parquet'
      write_parquet(path, [x for x in images('validation') if x[1]])
      return f'Class {NAMES[0]!r} has no images in the validation split'
    case 'two datasets':
      write_hub(root / 'more')
      return 'There are 2 datasets: data, more/data'
    case 'no bytes':
      write_parquet(first, [(n, y, None) for n, y, _ in images('train')])
      return 'has no bytes'
  raise ValueError(how)


@pytest.mark.parametrize(
  'how',
  [
    'incomplete',
    'no evaluation',
    'Git LFS',
    'cut off',
    'unlabelled',
    'out of range',
    'a class without images',
    'two datasets',
    'no bytes',
  ],
)
def test_what_is_not_in_order_is_refused(tmp_path, how):
  said = damage(write_hub(tmp_path / 'hub'), how)
  with pytest.raises(errors.UserError) as caught:
    preparation.load_dataset(f'parquet:{tmp_path}/hub', tmp_path / 'data')
  assert said in caught.value.what
  assert len(str(caught.value).split('\n')) == 3
  assert not list((tmp_path / 'data').rglob('*.array_record*'))


@pytest.mark.parametrize(
  ('dataset', 'meant'),
  [
    ('wds:{}/hub', 'did you mean parquet:{}/hub?'),
    ('parquet:{}/pets', 'did you mean folder:{}/pets?'),
    ('parquet:{}/hub/data/train-00000-of-00002.parquet', '{}/hub/data.'),
    ('wds:{}/hub/{{train,val}}-{{0..9}}.tar', '{{000..146}} are 147 files'),
  ],
)
def test_what_was_meant_is_said(tmp_path, dataset, meant):
  write_hub(tmp_path / 'hub')
  write_image(tmp_path / 'pets/train/cat/1.png', 1)
  with pytest.raises(errors.UserError) as caught:
    preparation.load_dataset(dataset.format(tmp_path), tmp_path / 'data')
  assert meant.format(tmp_path) in caught.value.suggestion


def test_a_file_written_anew_is_noticed(tmp_path):
  root = write_hub(tmp_path / 'hub')
  name, data_dir = f'parquet:{root}', tmp_path / 'data'
  before = preparation.load_dataset(name, data_dir)
  path = root / 'data/validation-00000-of-00001.parquet'
  os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
  with pytest.raises(errors.UserError, match='were written to'):
    preparation.check_dataset(name, data_dir)
  preparation.prepare(name, data_dir)  # It is what it was.
  after = preparation.load_dataset(name, data_dir)
  assert after.train.source is before.train.source
  rows = images('validation')
  rows[4] = (*rows[4][:2], images('test')[4][2])
  write_parquet(path, rows)
  with pytest.raises(errors.UserError, match='--mode=prepare'):
    preparation.check_dataset(name, data_dir)
  preparation.prepare(name, data_dir)
  after = preparation.load_dataset(name, data_dir)
  assert after.fingerprint != before.fingerprint
  assert rows[4][2] in [x['image'] for x in read_all(after.eval)]


@pytest.mark.parametrize('group', [7, 100, 1000])
def test_rows_may_be_read_in_any_order(tmp_path, monkeypatch, group):
  monkeypatch.setattr(parquet, '_HELD', 2)
  rows = [(f'{i}', i % 3, bytes([i]) * i) for i in range(200)]
  for split in ('train', 'val'):
    write_parquet(tmp_path / f'{split}.parquet', rows, group=group)
  raw = parquet.list_raw('x', tmp_path)
  found = [(i, x) for i, x in enumerate(raw.images('train'))]
  assert [x.size for _, x in found] == sorted(x.size for _, x in found)
  random.Random(0).shuffle(found)
  for i, image in [*found, *found]:
    assert image.read() == rows[i][2]


@pytest.mark.parametrize(
  ('pattern', 'expanded'),
  [
    ('a.tar', ['a.tar']),
    ('a-{000..002}.tar', ['a-000.tar', 'a-001.tar', 'a-002.tar']),
    ('{8..10}', ['8', '9', '10']),
    ('{08..10}', ['08', '09', '10']),
    ('{a,b}{0..1}', ['a0', 'a1', 'b0', 'b1']),
    ('{t-{0..1},v-{0..0}}.tar', ['t-0.tar', 't-1.tar', 'v-0.tar']),
    ('{t,}x', ['tx', 'x']),
    ('open{0..1', ['open{0..1']),
  ],
)
def test_braces(pattern, expanded):
  assert tars.expand(pattern) == expanded


def test_leaks_between_them_and_a_folder_are_found(tmp_path, capsys):
  kinds = {'parquet': write_hub}
  if importlib.util.find_spec('webdataset'):
    kinds['wds'] = write_tars
  for split, seed in (('train', 300), ('val', 400)):
    write_image(tmp_path / f'folder/{split}/cat/own.png', seed)
  leak = tmp_path / 'folder/train/cat/leak.png'
  leak.write_bytes(images('validation')[4][2])
  config = start_from('default')
  config.data_dir = str(tmp_path / 'data')
  config.stages = [
    {'name': kind, 'dataset': f'{kind}:{write(tmp_path / kind)}'}
    for kind, write in kinds.items()
  ]
  dataset = f'folder:{tmp_path}/folder'
  config.stages.append({'name': 'own', 'dataset': dataset})
  assert audit.audit(config) == 1
  shown = capsys.readouterr().out
  for kind in kinds:
    assert f'own/leak.png -> {kind}/validation_4.png' in shown


@pytest.mark.slow
def test_a_run_on_it_predicts(tmp_path):
  config = tiny_config.get_config(tmp_path / 'data')
  config.stages = config.stages[2:]
  name = f'parquet:{write_hub(tmp_path / "hub")}'
  config.stages[0].update(dataset=name, batch_size=4)
  jaxprog.train(config, tmp_path / 'run')
  path = tmp_path / 'a.png'
  path.write_bytes(images('train')[0][2])
  (found,) = jaxprog.predict(config, tmp_path / 'run', path)
  assert {x for x, _ in found['top5']} == set(NAMES)

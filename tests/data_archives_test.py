import errno
import gzip
import hashlib
import io
import os
import pathlib
import shutil
import stat
import tarfile
import zipfile

import pyarrow as pa
import pytest

from jaxprog import errors, named
from jaxprog.data import archives

CONTENT = {'pets/train/cat/1.png': b'one' * 999, 'pets/val/cat/2.png': b'two'}


def sha256(path) -> str:
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def write_tar(path, content=CONTENT, members=(), mode='w'):
  with tarfile.open(path, mode) as tar:
    for name, data in content.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
    for member in members:
      tar.addfile(member)
  return path


def write_zip(path, content=CONTENT, members=()):
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as zipped:
    for name, data in content.items():
      zipped.writestr(name, data)
    for member, data in members:
      zipped.writestr(member, data)
  return path


def tar_member(name, kind=tarfile.REGTYPE, linkname=''):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = kind, linkname
  return member


def zip_link(name, target):
  member = zipfile.ZipInfo(name)
  member.create_system = 3
  member.external_attr = (stat.S_IFLNK | 0o777) << 16
  return member, target


def files_below(root) -> dict[str, bytes]:
  """Returns the files of a folder, but for what Python makes of configs."""
  return {
    str(x.relative_to(root)): x.read_bytes()
    for x in root.rglob('*')
    if x.is_file() and x.suffix != '.pyc'
  }


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / 'outer' / 'data'
  path.mkdir(parents=True)
  return path


def write_zstd(path, tar):
  """Packs a tar in two frames, as they who use several cores do."""
  whole = tar.read_bytes()
  frames = (pa.compress(x, 'zstd', True) for x in (whole[:700], whole[700:]))
  path.write_bytes(b''.join(frames))
  return path


@pytest.mark.parametrize(
  'kind', ['a.tar', 'a.tar.gz', 'a.tgz', 'a.tar.zst', 'a.zip']
)
def test_an_archive_unpacks_whole(tmp_path, folder, kind):
  path = tmp_path / kind
  if kind.endswith('zip'):
    write_zip(path)
  elif kind.endswith('zst'):
    write_zstd(path, write_tar(tmp_path / 'b.tar'))
  else:
    write_tar(path, mode='w:gz' if kind.endswith('gz') else 'w')
  seen = []
  found = archives.extract(
    path, folder, sha256=sha256(path), progress=lambda *x: seen.append(x)
  )
  assert found == (folder / 'pets',)
  assert files_below(folder) == CONTENT
  assert seen[-1] == (2, 2)
  assert [x.name for x in folder.iterdir()] == ['pets']


def test_a_leading_dot_is_no_folder(tmp_path, folder):
  path = write_tar(
    tmp_path / 'a.tar',
    {f'./{name}': data for name, data in CONTENT.items()},
    [tar_member('.', tarfile.DIRTYPE)],
  )
  archives.extract(path, folder, sha256=sha256(path), expected=('pets',))
  assert files_below(folder) == CONTENT


BAD_TARS = {
  '../x': tar_member('../x'),
  'pets/../../x': tar_member('pets/../../x'),
  '/tmp/jaxprog_x': tar_member('/tmp/jaxprog_x'),
  'pets/symlink': tar_member('pets/symlink', tarfile.SYMTYPE, '/etc'),
  'pets/hardlink': tar_member('pets/hardlink', tarfile.LNKTYPE, '../x'),
  'pets/link': tar_member('pets/link', tarfile.SYMTYPE, '1.png'),
  'pets/fifo_device': tar_member('pets/fifo_device', tarfile.FIFOTYPE),
  'pets/device': tar_member('pets/device', tarfile.CHRTYPE),
}
BAD_ZIPS = {
  '../x': ('../x', b'x'),
  'pets/../../x': ('pets/../../x', b'x'),
  '/tmp/jaxprog_x': ('/tmp/jaxprog_x', b'x'),
  '..\\x': ('..\\x', b'x'),
  'C:/x': ('C:/x', b'x'),
  'pets/symlink': zip_link('pets/symlink', '/etc'),
}


@pytest.mark.parametrize(
  ('write', 'name', 'member'),
  [
    *((write_tar, *bad) for bad in BAD_TARS.items()),
    *((write_zip, *bad) for bad in BAD_ZIPS.items()),
  ],
)
def test_what_could_be_written_elsewhere_is_refused_by_name(
  tmp_path, folder, write, name, member
):
  path = write(tmp_path / 'archive', members=[member])
  with pytest.raises(errors.UserError) as caught:
    archives.extract(path, folder, sha256=sha256(path))
  reason = next((x for x in ('link', 'device') if x in name), 'path')
  assert f'{name!r} is a' in caught.value.what
  assert reason in caught.value.what.replace(repr(name), '')
  assert len(str(caught.value).split('\n')) == 3
  assert files_below(tmp_path) == {'archive': path.read_bytes()}
  assert list(folder.iterdir()) == []
  assert not pathlib.Path('/tmp/jaxprog_x').exists()


def test_many_bad_members_are_counted(tmp_path, folder):
  path = write_tar(tmp_path / 'a.tar', {f'../{i}': b'' for i in range(1000)})
  with pytest.raises(errors.UserError, match='and 997 more') as caught:
    archives.extract(path, folder, sha256=sha256(path))
  assert len(caught.value.what) < 200


def test_a_wrong_sum_shows_both_and_unpacks_nothing(tmp_path, folder):
  path = write_tar(tmp_path / 'a.tar')
  right = sha256(path)
  for wrong in ('0' * 64, right[:-1], ''):
    with pytest.raises(errors.UserError) as caught:
      archives.extract(path, folder, sha256=wrong)
    assert f'expected {wrong}, found {right}' in caught.value.where
  assert list(folder.iterdir()) == []
  archives.extract(path, folder, sha256=right.upper())


def test_what_is_there_already_is_not_touched(tmp_path, folder):
  path = write_tar(tmp_path / 'a.tar')
  (folder / 'pets').mkdir()
  (folder / 'pets' / 'mine').write_text('mine')
  with pytest.raises(errors.UserError, match='there already'):
    archives.extract(path, folder, sha256=sha256(path))
  assert files_below(folder) == {'pets/mine': b'mine'}


def test_another_archive_than_expected_is_said(tmp_path, folder):
  path = write_tar(tmp_path / 'a.tar')
  with pytest.raises(errors.UserError, match='imagenette2/ at its top'):
    archives.extract(
      path, folder, sha256=sha256(path), expected=('imagenette2',)
    )
  assert list(folder.iterdir()) == []


@pytest.mark.parametrize('write', [write_tar, write_zip])
def test_no_room_is_said_before_anything_is_written(
  tmp_path, monkeypatch, write
):
  path = write(tmp_path / 'archive')
  size = sum(map(len, CONTENT.values()))
  usage = shutil.disk_usage(tmp_path)
  free = usage._replace(free=size - 1)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: free)
  with pytest.raises(errors.UserError, match='GB are free'):
    archives.extract(path, tmp_path / 'data', sha256=sha256(path))
  assert not (tmp_path / 'data').exists()
  free = usage._replace(free=size)
  archives.extract(path, tmp_path / 'data', sha256=sha256(path))


@pytest.mark.parametrize('write', [write_tar, write_zip])
def test_an_interrupted_extraction_leaves_nothing(tmp_path, folder, write):
  path = write(tmp_path / 'archive')

  def stop(done, total):
    if total == 2:  # Members, not bytes; one has been written.
      assert files_below(folder)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    archives.extract(path, folder, sha256=sha256(path), progress=stop)
  assert list(folder.iterdir()) == []
  # As a killed process leaves it.
  (folder / '.unpacking.1' / 'pets').mkdir(parents=True)
  (folder / '.unpacking.1' / 'pets' / 'half').write_text('half')
  archives.extract(path, folder, sha256=sha256(path))
  assert files_below(folder) == CONTENT


def test_a_disk_that_fills_up_is_not_the_archives_fault(tmp_path, folder):
  path = write_tar(tmp_path / 'a.tar')

  def fill(done, total):
    if total == 2:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with pytest.raises(errors.UserError, match='unpack: No space left'):
    archives.extract(path, folder, sha256=sha256(path), progress=fill)
  assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
  'kind', ['a.tar', 'a.tgz', 'a.tar.zst', 'a.zip', 'no archive']
)
def test_a_damaged_archive_is_said(tmp_path, folder, kind):
  path = tmp_path / kind
  content = {'pets/a': bytes(range(256)) * 400}
  if kind.endswith('zip'):
    data = bytearray(write_zip(path, content).read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)
  else:
    write_tar(path, content, mode='w:gz' if kind.endswith('gz') else 'w')
    if kind.endswith('zst'):
      write_zstd(path, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if kind != 'no archive' else b'no')
  with pytest.raises(errors.UserError, match='cannot be read') as caught:
    archives.extract(path, folder, sha256=sha256(path))
  assert len(str(caught.value).split('\n')) == 3
  assert list(folder.iterdir()) == []


MANY = {f'pets/{i}.png': bytes([i]) * 600 for i in range(50)}


def flip_a_header(data: bytes) -> bytes:
  changed = bytearray(data)
  changed[25 * 3 * 512 + 5] ^= 4  # A member is a header and two blocks.
  return bytes(changed)


def swallow_an_entry(data: bytes) -> bytes:
  """An entry's comment swallows the next entry of a zip's directory."""
  start = data.index(b'PK\1\2')
  length = data.index(b'PK\1\2', start + 4) - start
  changed = bytearray(data)
  changed[start + 32 : start + 34] = length.to_bytes(2, 'little')
  return bytes(changed)


def cut_the_end(data: bytes) -> bytes:
  return data[: data.rindex(b'PK\5\6')]


@pytest.mark.parametrize(
  ('kind', 'spoil'),
  [
    ('tar', flip_a_header),
    ('tar.gz', flip_a_header),
    ('tar.zst', flip_a_header),
    ('tar', lambda data: data[: 3 * 512 * 20]),  # Between two members.
    ('tar', lambda data: data[: 3 * 512 * 20 + 100]),
    ('tar', lambda data: data + data),
    ('tar', lambda data: data + b'x'),
    ('tar.gz', lambda data: data[: 3 * 512 * 20]),
    ('tar.zst', lambda data: data[: 3 * 512 * 20]),
    ('tar.zst', lambda data: data + b'x'),
    ('zip', swallow_an_entry),
    ('zip', cut_the_end),
  ],
)
def test_no_part_of_an_archive_is_taken_for_the_whole(
  tmp_path, folder, kind, spoil
):
  path = tmp_path / 'archive'
  write = write_zip if kind == 'zip' else write_tar
  data = spoil(write(path, MANY).read_bytes())
  match kind:
    case 'tar.gz':
      data = gzip.compress(data)
    case 'tar.zst':
      data = pa.compress(data, 'zstd', True)
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match='cannot be read') as caught:
    archives.extract(path, folder, sha256=sha256(path))
  assert len(str(caught.value).split('\n')) == 3
  assert list(folder.iterdir()) == []


@pytest.mark.parametrize('spoil', ['more', 'sum', 'cut'])
def test_a_tar_gz_is_read_to_its_sum(tmp_path, folder, spoil):
  path = write_tar(tmp_path / 'a.tgz', MANY, mode='w:gz')
  data = bytearray(path.read_bytes())
  match spoil:
    case 'more':
      data += b'<html>'
    case 'sum':
      data[-6] ^= 1
    case 'cut':
      del data[-8:]
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match='cannot be read'):
    archives.extract(path, folder, sha256=sha256(path))
  assert list(folder.iterdir()) == []


@pytest.mark.parametrize('mode', ['w', 'w:gz'])
@pytest.mark.parametrize('size', [2**60, 2**70, -512])
@pytest.mark.parametrize('kind', [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_member_that_claims_an_impossible_size_is_refused(
  tmp_path, folder, mode, size, kind
):
  member = tar_member('pets/big.png', kind)
  member.size = size
  path = tmp_path / 'archive'
  with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
    tar.addfile(tar_member('pets/small.png'))
    tar.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
  with pytest.raises(errors.UserError, match='cannot be read') as caught:
    archives.extract(path, folder, sha256=sha256(path))
  assert len(str(caught.value).split('\n')) == 3
  assert list(folder.iterdir()) == []


def test_what_macos_adds_is_left_out(tmp_path, folder):
  names = {'cats': write_zip, 'dogs': write_zip, 'x': write_tar}
  for name, write in names.items():
    added = f'{name}/.DS_Store', f'{name}/._1.png', f'__MACOSX/{name}/._1.png'
    content = {f'{name}/1.png': b'one', **dict.fromkeys(added, b'x')}
    path = write(tmp_path / name, content)
    assert archives.extract(path, folder, sha256=sha256(path)) == (
      folder / name,
    )
  assert files_below(folder) == {f'{x}/1.png': b'one' for x in names}


def test_a_tar_that_holds_a_zip_is_a_tar(tmp_path, folder):
  inner = write_zip(tmp_path / 'inner.zip').read_bytes()
  path = write_tar(tmp_path / 'a.tar', {'pets/inner.zip': inner})
  archives.extract(path, folder, sha256=sha256(path))
  assert files_below(folder) == {'pets/inner.zip': inner}


def test_an_archive_that_is_not_there_is_said(tmp_path):
  with pytest.raises(errors.UserError, match='cannot be read: No such file'):
    archives.extract(tmp_path / 'a.tar', tmp_path, sha256='')


def test_sha256_file_reports_bytes(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, 'BLOCK', 10)
  path = tmp_path / 'file'
  path.write_bytes(b'x' * 25)
  seen = []
  found = archives.sha256_file(path, lambda *x: seen.append(x))
  assert found == hashlib.sha256(b'x' * 25).hexdigest()
  assert seen == [(10, 25), (20, 25), (25, 25)]


def test_a_download_is_there_when_its_sum_is_right(tmp_path):
  source = tmp_path / 'source'
  source.write_bytes(b'right')
  path = tmp_path / 'downloads' / 'file'
  seen = []
  for content in (None, b'left over, and wrong', b'right'):
    if content:
      path.write_bytes(content)
    archives.download(
      source.as_uri(), path, sha256(source), lambda *x: seen.append(x)
    )
    assert files_below(path.parent) == {'file': b'right'}
  assert seen[0] == (5, 5)
  source.rename(tmp_path / 'gone')  # What is there is not fetched again.
  archives.download(source.as_uri(), path, sha256(path))


def test_a_wrong_or_broken_download_leaves_nothing(tmp_path):
  source = tmp_path / 'source'
  source.write_bytes(b'wrong')
  path = tmp_path / 'downloads' / 'file'
  with pytest.raises(errors.UserError) as caught:
    archives.download(source.as_uri(), path, '0' * 64)
  assert f'expected {"0" * 64}, found {sha256(source)}' in caught.value.where

  def stop(done, total):
    assert [x.name for x in path.parent.iterdir()] == ['file.part']
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    archives.download(source.as_uri(), path, sha256(source), stop)
  with pytest.raises(errors.UserError, match='download failed'):
    archives.download('http://127.0.0.1:9/x', path, sha256(source))
  assert list(path.parent.iterdir()) == []


def test_imagenettes_sum_is_the_one_that_tfds_registers():
  import tensorflow_datasets as tfds

  builder = tfds.builder_cls('imagenette')
  known = named.DATASETS['imagenette'].archive
  assert builder.url_infos[known.url].checksum == known.sha256

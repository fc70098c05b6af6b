"""A bucket follows a folder, and a folder is fetched from it."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap

import fake_gcs
import pytest
import runs

from jaxprog import buckets, errors
from jaxprog.reliability import copies, integrity, lock, mirror

URL = 'gs://test-bucket/runs/a'
PREFIX = 'runs/a/'


@pytest.fixture
def server(monkeypatch, tmp_path):
  with fake_gcs.serve() as server:
    monkeypatch.setenv('JAXPROG_CACHE_DIR', str(tmp_path / 'cache'))
    yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """A thread that would look while a test looks waits for long."""
  monkeypatch.setattr(mirror, '_LOOK_SECONDS', 1000.0)


@contextlib.contextmanager
def held(folder, url=URL):
  """Yields what lets the bucket follow `folder`, as a run does."""
  folder.mkdir(parents=True, exist_ok=True)
  bucket = buckets.Bucket(url)
  with (
    lock.Lock(folder, bucket) as owner,
    mirror.Mirror(folder, bucket, owner) as found,
  ):
    yield found


def save(folder, name, step, stage='ten', text='weights'):
  """Writes a checkpoint as orbax and integrity do, of two files."""
  directory = folder / 'checkpoints' / stage / name
  integrity.begin(directory, step)
  (directory / str(step) / 'd').mkdir(parents=True)
  (directory / str(step) / 'metadata').write_text('tree')
  (directory / str(step) / 'd' / 'data').write_text(f'{text} {step}')
  integrity.finish(directory, step)


def objects(server):
  """Returns the objects of the run but its leases."""
  found = server.objects('test-bucket')
  return {
    k.removeprefix(PREFIX): v
    for k, v in found.items()
    if not k.startswith(f'{PREFIX}lease/')
  }


def contents(folder):
  return {name: (folder / name).read_bytes() for name in copies.scan(folder)}


def written(server):
  """Returns what was written and removed, in order, but leases."""
  return [
    ('' if x.what == 'write' else '-') + x.name.removeprefix(PREFIX)
    for x in server.clear()
    if x.what in ('write', 'delete') and '/lease/' not in x.name
  ]


def test_a_bucket_follows_a_folder_in_an_order_that_a_crash_could_leave(
  server, tmp_path
):
  folder = tmp_path / 'run'
  with held(folder) as following:
    save(folder, 'latest', 1)
    save(folder, 'best', 1)
    (folder / 'history.json').write_text('1')
    following.flush()
    names = written(server)
    step = 'checkpoints/ten/{}/1/{}'
    assert {*names[:2]} == {
      step.format('best', 'metadata'),
      step.format('best', 'd/data'),
    }
    assert names[2] == step.format('best', 'manifest.json')
    assert names[5] == step.format('latest', 'manifest.json')
    assert names[6:] == ['history.json']
    save(folder, 'latest', 2)
    integrity.remove(folder / 'checkpoints/ten/latest', 1)
    (folder / 'history.json').write_text('2')
    (folder / 'done.json').write_text('2')
    following.flush()
    names = written(server)
    assert names[2] == 'checkpoints/ten/latest/2/manifest.json'
    assert names[3:5] == ['history.json', 'done.json']
    assert names[5] == '-checkpoints/ten/latest/1/manifest.json'
    assert len(names) == 8
  assert objects(server) == contents(folder)


def test_what_has_not_changed_asks_for_nothing(server, tmp_path):
  folder = tmp_path / 'run'
  with held(folder) as following:
    save(folder, 'latest', 1)
    following.flush()
    server.clear()
    for _ in range(5):
      following.flush()
    assert not server.clear()
  with held(folder) as following:  # The same folder knows what is there.
    server.clear()
    following.flush()
    assert not written(server)


def test_a_checkpoint_is_uploaded_whole_or_not_at_all(server, tmp_path):
  folder = tmp_path / 'run'
  with held(folder) as following:
    save(folder, 'latest', 1)
    directory = folder / 'checkpoints/ten/latest'
    integrity.begin(directory, 2)
    (directory / '2').mkdir()
    (directory / '2' / 'data').write_text('half')
    (directory / '3.orbax-checkpoint-tmp').mkdir()
    (directory / '3.orbax-checkpoint-tmp' / 'data').write_text('half')
    (folder / '.history.tmp').write_text('half')
    following.flush()
    assert all('/latest/1/' in name for name in objects(server))
  # An upload that was cut short: its manifest is not there.
  server.put('test-bucket', f'{PREFIX}checkpoints/ten/latest/4/data', b'half')
  with held(tmp_path / 'other') as following:
    assert [x.parent.name for x in (tmp_path / 'other').rglob('manifest.json')]
    assert not list((tmp_path / 'other').rglob('latest/4'))
    following.flush()
  assert not [name for name in objects(server) if '/latest/4/' in name]


def test_who_had_the_lease_last_has_the_newest_files(server, tmp_path, capfd):
  one, two = tmp_path / 'one', tmp_path / 'two'
  with held(one):
    save(one, 'latest', 1)
    (one / 'history.json').write_text('one')
  # Killed before it could upload this, it is still the newest.
  (one / 'history.json').write_text('one, later')
  save(one, 'latest', 2)
  with held(one) as following:
    following.flush()
    assert contents(one) == objects(server)
    assert objects(server)['history.json'] == b'one, later'
  (one / 'history.json').write_text('one, lost')
  save(one, 'latest', 3)
  with held(two):
    assert (two / 'history.json').read_text() == 'one, later'
    (two / 'history.json').write_text('two')
    integrity.remove(two / 'checkpoints/ten/latest', 1)
  with held(one):  # Another one went on meanwhile.
    assert contents(one) == contents(two) == objects(server)
    assert (one / 'history.json').read_text() == 'two'


def test_a_mirror_is_of_one_run(server, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  one.mkdir()
  (one / 'history.json').write_text('begun without a mirror')
  with held(one):
    pass
  assert objects(server) == contents(one)
  two.mkdir()
  (two / 'history.json').write_text('another run')
  with pytest.raises(errors.UserError, match='different runs'), held(two):
    pass
  assert (two / 'history.json').read_text() == 'another run'
  assert objects(server) == contents(one)
  # The copy of a URL is nobody's own.
  copy = buckets.copy_of(URL, tmp_path / 'cache')
  copy.mkdir(parents=True)
  (copy / 'history.json').write_text('of a run that was removed')
  with held(copy):
    assert contents(copy) == contents(one)


def test_a_folder_that_was_being_fetched_is_fetched_again(server, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  with held(one):
    save(one, 'latest', 1)
    (one / 'history').write_text('1')
  two.mkdir()
  (two / 'history').write_text('1')
  copies.write_state(two, buckets.Bucket(URL), copies.State())  # It was killed.
  with held(two):
    assert contents(two) == contents(one)


def test_a_run_that_never_began_leaves_nothing(server, tmp_path):
  folder = tmp_path / 'a' / 'run'

  def run():
    with (
      lock.Lock(folder, buckets.Bucket(URL)) as owner,
      mirror.Mirror(folder, buckets.Bucket(URL), owner),
    ):
      raise errors.UserError('A mistake.')

  with pytest.raises(errors.UserError, match='A mistake'):
    run()
  assert not (tmp_path / 'a').exists()
  assert not server.objects('test-bucket')


def test_a_bucket_that_fails_is_said_once_and_caught_up_with(
  server, tmp_path, monkeypatch, capfd
):
  monkeypatch.setattr(mirror, '_LOOK_SECONDS', 0.02)
  monkeypatch.setattr(mirror, '_PAUSE_SECONDS', 0.05)
  folder = tmp_path / 'run'
  with held(folder):
    server.forbid('test-bucket')
    (folder / 'history.json').write_text('1')
    runs.wait_for(lambda: sum(x.status == 403 for x in server.requests) > 2)
    server.heal()
    runs.wait_for(lambda: 'history.json' in objects(server))
  err = capfd.readouterr().err
  assert err.count('The run goes on') == 1
  assert 'You may not do that in gs://test-bucket' in err


def test_what_could_not_be_uploaded_ends_the_run_with_an_error(
  server, tmp_path
):
  folder = tmp_path / 'run'

  def run():
    with held(folder):
      (folder / 'history.json').write_text('1')
      server.forbid('test-bucket')

  with pytest.raises(RuntimeError, match='lacks what was written'):
    run()
  server.heal()
  with held(folder):
    pass
  assert objects(server)['history.json'] == b'1'


def test_of_a_run_that_never_began_nothing_is_left(server, tmp_path):
  with held(tmp_path / 'run'):
    pass
  assert not server.objects('test-bucket')
  assert not [*(tmp_path / 'run').iterdir()]


def test_events_are_uploaded_now_and_then(server, tmp_path, monkeypatch):
  monkeypatch.setattr(mirror, '_LOOK_SECONDS', 0.02)
  folder = tmp_path / 'run'
  events = folder / 'tensorboard' / 'events.out.tfevents.1'
  name = f'tensorboard/{events.name}'
  with held(folder):
    events.parent.mkdir()
    new = events.with_name('.new')  # Never half written.
    new.write_text('1')
    new.replace(events)
    runs.wait_for(lambda: name in objects(server))
    events.write_text('12')
    (folder / 'history.json').write_text('1')
    runs.wait_for(lambda: 'history.json' in objects(server))
    assert objects(server)[name] == b'1'
    # A state comes with the points before it.
    server.clear()
    save(folder, 'latest', 1)
    runs.wait_for(
      lambda: 'checkpoints/ten/latest/1/manifest.json' in objects(server)
    )
    assert written(server)[0] == name
    assert objects(server)[name] == b'12'
    events.write_text('123')
  assert objects(server)[name] == b'123'


def test_a_search_that_is_written_to_is_uploaded_as_of_one_moment(
  server, tmp_path
):
  folder = tmp_path / 'run'
  with (
    held(folder) as following,
    contextlib.closing(sqlite3.connect(folder / 'tune.db')) as database,
  ):
    database.execute('create table trials (number)')
    database.execute('insert into trials values (1)')
    database.commit()
    database.execute('insert into trials values (2)')
    (folder / 'tune.journal').write_text('{"op_code":0}\n{"op_')
    following.flush()
  (tmp_path / 'copy.db').write_bytes(objects(server)['tune.db'])
  with contextlib.closing(sqlite3.connect(tmp_path / 'copy.db')) as database:
    assert database.execute('select * from trials').fetchall() == [(1,)]
  assert objects(server)['tune.journal'] == b'{"op_code":0}\n'


def test_who_looks_fetches_what_it_needs_and_uploads_what_it_wrote(
  server, tmp_path
):
  run = tmp_path / 'run'
  with held(run):
    save(run, 'best', 1)
    (run / 'history.json').write_text('1')
  copy = buckets.copy_of(URL, tmp_path / 'cache')
  with copies.read(URL, weights=False) as folder:
    assert folder == copy
    assert [*contents(folder)] == ['history.json']
    (folder / 'report.html').write_text('good')
  assert objects(server)['report.html'] == b'good'
  with copies.read(URL) as folder:
    assert contents(folder) == objects(server)
    assert len(contents(folder)) == 5
  server.clear()
  with copies.read(URL) as folder:
    pass
  assert 'read' not in {x.what for x in server.clear() if 'lease' not in x.name}
  with held(copy):  # Its files are newer than those of the bucket.
    (copy / 'history.json').write_text('2')
    with copies.read(URL) as folder:
      assert (folder / 'history.json').read_text() == '2'


def test_who_says_which_weights_it_needs_gets_no_others(server, tmp_path):
  run = tmp_path / 'run'
  with held(run):
    for name in ('latest', 'best', 'final'):
      save(run, name, 1)
    (run / 'history.json').write_text('1')

  @copies.in_bucket(chosen=True)
  def look(workdir, weights='best'):
    names = contents(workdir)
    return sorted({x.split('/')[2] for x in names if '/' in x}), len(names)

  assert look(URL) == (['best'], 4)
  assert look(URL, weights='final') == (['best', 'final'], 7)
  with held(run):
    integrity.remove(run / 'checkpoints/ten/final', 1)
  assert look(URL) == (['best', 'final'], 7)  # Nobody has asked for the latter.
  assert look(URL, 'final') == (['best'], 4)
  with copies.read(URL) as folder:
    assert contents(folder) == objects(server)


def test_what_may_not_be_uploaded_is_said_and_kept(server, tmp_path, capfd):
  with held(tmp_path / 'run'):
    (tmp_path / 'run' / 'history.json').write_text('1')
  server.forbid('test-bucket')
  with copies.read(URL, weights=False) as folder:
    (folder / 'report.html').write_text('good')
  assert 'What was written is in' in capfd.readouterr().err
  assert (folder / 'report.html').read_text() == 'good'


def test_what_a_folder_knows_is_of_one_url(server, tmp_path):
  state = copies.State(('abc',), {'history.json': (1, 2)})
  copies.write_state(tmp_path, buckets.Bucket(URL), state)
  assert copies.read_state(tmp_path, buckets.Bucket(URL)) == state
  assert copies.read_state(tmp_path, buckets.Bucket(f'{URL}b')) is None
  (tmp_path / '.mirror.json').write_text(json.dumps([1])[:-1])
  assert copies.read_state(tmp_path, buckets.Bucket(URL)) is None


def test_what_else_lies_there_is_left_alone(server, tmp_path):
  for name in ('data/images', 'lease.tar', 'notes/a.txt'):
    server.put('test-bucket', f'{PREFIX}{name}', b'of others')
  folder = tmp_path / 'run'
  (folder / '.venv').mkdir(parents=True)
  (folder / '.venv' / 'a.json').write_text('not of the run')
  (folder / 'src').mkdir()
  (folder / 'src' / 'a.json').write_text('not of the run')
  with held(folder):
    (folder / 'history.json').write_text('1')
  assert [*objects(server)] == [
    'data/images',
    'history.json',
    'lease.tar',
    'notes/a.txt',
  ]
  with copies.read(URL) as copy:
    assert [*contents(copy)] == ['history.json']


def test_every_folder_that_is_written_to_is_of_the_run():
  pattern = re.compile(r"workdir / f?'(\w+)(?:/[^']*)?'")
  found = {
    name
    for path in (runs.ROOT / 'jaxprog').rglob('*.py')
    for name in pattern.findall(path.read_text())
  }
  assert found >= {'eval', 'tensorboard', 'export'}
  assert found <= {*copies.FOLDERS}


def test_what_others_have_added_stays_on_both_sides(server, tmp_path):
  folder, other = tmp_path / 'run', tmp_path / 'other'
  with held(folder):
    save(folder, 'latest', 1)
    (folder / 'history.json').write_text('1')
  server.put('test-bucket', f'{PREFIX}eval/x.json', b'of a laptop')
  (folder / '.git' / 'refs').mkdir(parents=True)
  (folder / 'notes.txt').write_text('of the owner')
  with held(folder):
    (folder / 'history.json').unlink()
  assert 'eval/x.json' in objects(server)
  assert 'history.json' not in objects(server)
  server.delete('test-bucket', f'{PREFIX}notes.txt')
  with held(other):
    assert (other / 'eval' / 'x.json').exists()
    (other / 'eval' / 'x.json').unlink()
  (folder / 'mine.txt').write_text('of the owner')
  with held(folder):
    assert (folder / 'mine.txt').exists()
    assert (folder / '.git' / 'refs').is_dir()
  assert 'eval/x.json' not in objects(server)


def test_what_a_bucket_has_lost_is_uploaded_again(server, tmp_path):
  folder = tmp_path / 'run'
  with held(folder):
    save(folder, 'latest', 1)
    (folder / 'history.json').write_text('1')
  whole = objects(server)
  for name in whole:
    server.delete('test-bucket', f'{PREFIX}{name}')
  with held(folder):
    pass
  assert objects(server) == whole == contents(folder)


def test_who_has_written_nothing_makes_no_other_old(server, tmp_path):
  folder, other = tmp_path / 'run', tmp_path / 'other'
  with held(folder):
    (folder / 'history.json').write_text('1')
  (folder / 'history.json').write_text('2, not uploaded')
  other.mkdir()
  (other / 'history.json').write_text('another run')
  with pytest.raises(errors.UserError, match='different runs'), held(other):
    pass
  server.order('403', what='list', match=f'^{PREFIX}$')
  with pytest.raises(errors.UserError), held(folder):
    pass
  server.heal()
  with held(folder):
    assert (folder / 'history.json').read_text() == '2, not uploaded'
  assert objects(server)['history.json'] == b'2, not uploaded'


def test_where_no_sums_are_told_sizes_are_not_enough(tmp_path):
  url = f'file://{tmp_path}/bucket'
  one, two = tmp_path / 'one', tmp_path / 'two'
  for folder, text in ((one, 'step 100'), (two, 'step 200'), (one, 'step 300')):
    with held(folder, url):
      known = sorted(x.name for x in folder.glob('*.json'))
      if known == ['history.json', 'seen.json']:
        assert (folder / 'history.json').read_text() == 'step 200'
      (folder / 'history.json').write_text(text)
      (folder / 'seen.json').write_text(text)
  written = tmp_path / 'bucket' / 'history.json'
  assert written.read_text() == 'step 300'
  before = written.stat().st_mtime_ns
  with held(one, url):
    pass
  assert written.stat().st_mtime_ns == before


def test_what_changes_while_it_is_fetched_is_listed_again(server, tmp_path):
  with held(tmp_path / 'run'):
    (tmp_path / 'run' / 'history.json').write_text('1')
  server.order('flip', what='read', match='history', count=2)
  with copies.read(URL) as folder:
    assert (folder / 'history.json').read_text() == '1'


def test_beside_a_run_a_reader_uploads_nothing(server, tmp_path):
  copy = buckets.copy_of(URL, tmp_path / 'cache')
  with held(copy):
    server.clear()
    with copies.read(URL) as folder:
      (folder / 'report.html').write_text('good')
    assert not written(server)
  assert objects(server)['report.html'] == b'good'


def test_a_step_that_is_saved_anew_is_none_until_it_is_whole(server, tmp_path):
  folder = tmp_path / 'run'
  with held(folder) as following:
    save(folder, 'latest', 1)
    following.flush()
    shutil.rmtree(folder / 'checkpoints')
    save(folder, 'latest', 1, text='other weights')
    server.clear()
    following.flush()
    names = written(server)
  manifest = 'checkpoints/ten/latest/1/manifest.json'
  assert (names[0], names[-1]) == (f'-{manifest}', manifest)


def test_a_database_of_others_is_no_search(server, tmp_path):
  folder = tmp_path / 'run'
  with held(folder):
    (folder / 'thumbs.db').write_bytes(b'no SQLite')
    (folder / 'zz.json').write_text('1')
  assert objects(server)['zz.json'] == b'1'


def test_a_copy_that_cannot_be_written_is_told(server, tmp_path, monkeypatch):
  with held(tmp_path / 'run'):
    (tmp_path / 'run' / 'history.json').write_text('1')
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('JAXPROG_CACHE_DIR', str(tmp_path / 'file'))
  with (
    pytest.raises(errors.UserError, match='Cannot write') as found,
    copies.read(URL),
  ):
    pass
  assert found.value.where.startswith('JAXPROG_CACHE_DIR=')


def test_a_signal_waits_for_the_last_upload(server, tmp_path):
  code = f"""
    import os, pathlib, signal, sys, time
    from jaxprog import errors
    from jaxprog.reliability import mirror, signals
    folder = pathlib.Path({str(tmp_path / 'run')!r})
    try:
      with signals.StopRequest(owns_process=True):
        with mirror.hold(folder, {URL!r}):
          (folder / 'history.json').write_text('1')
          os.kill(os.getpid(), signal.SIGTERM)
          time.sleep(60)
    except errors.Stopped as e:
      sys.exit(e.exit_code)
  """
  server.order('slow', what='write', match='history', seconds=2.5)
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    cwd=runs.ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 143, done.stderr
  assert objects(server)['history.json'] == b'1'
  (newest,) = [k for k in server.objects('test-bucket') if k.endswith('1.json')]
  assert json.loads(server.objects('test-bucket')[newest])['released']

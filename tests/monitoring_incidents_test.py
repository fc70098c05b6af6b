"""The incident log, read back from files that a kill or a full disk left."""

import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxprog.monitoring import incidents

ROOT = pathlib.Path(__file__).parent.parent


def fixed_time():
  return datetime.datetime(2026, 11, 1, 12, tzinfo=datetime.UTC)


def test_each_incident_is_a_line(tmp_path):
  log = incidents.Incidents(tmp_path / 'run' / 'x.jsonl', now=fixed_time)
  added = log.add('skipped_step', 'two\nlines', stage='a', step=3, loss=1.5)
  log.add('resume', 'again')
  assert added == {
    'time': '2026-11-01T12:00:00+00:00',
    'kind': 'skipped_step',
    'stage': 'a',
    'step': 3,
    'message': 'two\nlines',
    'loss': 1.5,
  }
  lines = (tmp_path / 'run' / 'x.jsonl').read_text().splitlines()
  assert [json.loads(line)['kind'] for line in lines] == [
    'skipped_step',
    'resume',
  ]
  assert incidents.read(tmp_path / 'run' / 'x.jsonl')[0] == added


def test_what_json_has_no_word_for(tmp_path):
  log = incidents.Incidents(tmp_path / 'x')
  log.add(
    'rollback',
    '',
    loss=float('nan'),
    rate=np.float32('inf'),
    names=np.array(['a', 'b']),
    path=tmp_path,
    nested={'x': [np.float64('nan')]},
  )
  (found,) = incidents.read(tmp_path / 'x')
  assert 'NaN' not in (tmp_path / 'x').read_text()
  assert found['loss'] is None
  assert found['rate'] is None
  assert found['names'] == ['a', 'b']
  assert found['path'] == str(tmp_path)
  assert found['nested'] == {'x': [None]}


def test_earlier_runs_are_kept(tmp_path):
  incidents.Incidents(tmp_path / 'x').add('resume', 'first')
  log = incidents.Incidents(tmp_path / 'x')
  log.add('resume', 'second')
  assert [x['message'] for x in log.entries()] == ['first', 'second']


@pytest.mark.parametrize('cut', [1, 2, 10, 40])
def test_a_torn_line_costs_only_itself(tmp_path, cut):
  path = tmp_path / 'x'
  log = incidents.Incidents(path)
  log.add('resume', 'whole')
  log.add('resume', 'törn')
  os.truncate(path, path.stat().st_size - cut)
  torn = [] if cut > 1 else ['törn']  # Only its end is missing.
  assert [x['message'] for x in incidents.read(path)] == ['whole', *torn]
  incidents.Incidents(path).add('resume', 'after')
  found = [x['message'] for x in incidents.read(path)]
  assert found == ['whole', *torn, 'after']


def test_damaged_bytes_are_left_out(tmp_path):
  path = tmp_path / 'x'
  path.write_bytes(b'\xff\xfe{}\n[1]\n{"no": "kind"}\n\n{"kind": "lock"}\n')
  assert incidents.read(path) == [{'kind': 'lock'}]
  assert incidents.read(tmp_path / 'nothing') == []


def test_nothing_that_was_added_is_lost_by_a_kill(tmp_path):
  script = (
    'import os, sys, itertools\n'
    'from jaxprog.monitoring import incidents\n'
    'log = incidents.Incidents(sys.argv[1])\n'
    'for i in itertools.count():\n'
    "  log.add('bad_image', 'x', step=i)\n"
    '  print(i, flush=True)\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script, str(tmp_path / 'x')],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  for _ in range(20):
    process.stdout.readline()
  process.send_signal(signal.SIGKILL)
  said = process.communicate()[0].splitlines()
  last = int(said[-1]) if said else 19
  steps = [x['step'] for x in incidents.read(tmp_path / 'x')]
  assert steps == list(range(len(steps)))
  assert len(steps) > last


def test_many_threads_write_whole_lines(tmp_path):
  log = incidents.Incidents(tmp_path / 'x')

  def add(name):
    for i in range(20):
      log.add('bad_image', name * 1000, step=i)

  threads = [threading.Thread(target=add, args=[x]) for x in 'abcd']
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  found = incidents.read(tmp_path / 'x')
  assert len(found) == 80
  for name in 'abcd':
    steps = [x['step'] for x in found if x['message'] == name * 1000]
    assert steps == list(range(20))


def test_a_full_disk_ends_nothing_and_is_said_once(capsys):
  log = incidents.Incidents('/dev/full')
  log.add('skipped_step', 'one', step=1)
  log.add('skipped_step', 'two', step=2)
  error = capsys.readouterr().err
  assert error.count('Cannot write /dev/full: No space left') == 1
  assert '"two"' in error


def test_what_the_disk_did_not_take_is_still_known(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  log = incidents.Incidents(tmp_path / 'file' / 'x')
  log.add('skipped_step', 'one', step=1)
  assert 'Cannot write' in capsys.readouterr().err
  assert [x['message'] for x in log.entries()] == ['one']


def test_without_a_path_it_is_kept_in_memory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  log = incidents.Incidents(None)
  log.add('resume', 'here')
  assert [x['message'] for x in log.entries()] == ['here']
  assert not list(tmp_path.iterdir())


def test_the_report_says_how_many_of_each():
  log = incidents.Incidents(None, now=fixed_time)
  log.add('skipped_step', 'the loss was nan.', stage='a', step=1200)
  log.add('lock', 'Took over.')
  log.add('skipped_step', 'the loss was inf', stage='b', step=7)
  time = '2026-11-01T12:00:00+00:00'
  assert incidents.summarise(log.entries()) == [
    f'2 skipped steps: first {time} at step 1,200 of a (the loss was nan); '
    f'last {time} at step 7 of b (the loss was inf).',
    f"1 dead run's lock taken over: {time} (Took over).",
  ]
  assert incidents.summarise([]) == []

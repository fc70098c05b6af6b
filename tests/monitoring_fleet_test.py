"""What a run says of where it stands, and a line for each of many."""

import io
import re

import history_fixture
import rich.console
import runs

from jaxprog.monitoring import fleet, progress, standing
from jaxprog.reliability import lock

METRICS = {'loss': 1.2, 'top1': 0.5, 'images_per_second': 1234.5}


def test_a_run_is_found_while_it_goes_on_and_says_where_it_stands(tmp_path):
  workdir = tmp_path / 'cells' / 'a' / 'seed-0'

  def find():
    return list(standing.find(tmp_path, 'cells/*/*'))

  with lock.Lock(workdir):
    assert [(x.workdir, x.stage, x.epoch) for x in find()] == [
      (workdir, 'starting', '-')
    ]
    console = rich.console.Console(file=io.StringIO())
    with progress.Progress(2, console=console, workdir=workdir) as shown:
      shown.start_stage(1, 'ten', [10, 20])
      runs.wait_for(lambda: find()[0].standing)
      shown.step(10, METRICS)
      shown.end_epoch(history_fixture.create_row(1), True)
      shown.step(11, METRICS)
      (path,) = workdir.glob('.standing.json')
    assert not path.exists()
    # The first of its words may have been the last before it ended.
    teller = standing.Teller(workdir, shown._describe)
    (run,) = runs.wait_for(lambda: find() if path.exists() else ())
    assert (run.stage, run.epoch) == ('ten (2/2)', '2/2')
    assert run.standing['step'] == 11
    assert run.standing['images_per_second'] == 1234.5
    assert run.standing['top1'] == history_fixture.create_row(1)['val_top1']
    teller.close()
  assert find() == []


def test_what_one_before_it_has_left_is_not_a_runs_own(tmp_path):
  with lock.Lock(tmp_path / 'a'):
    (tmp_path / 'a' / '.standing.json').write_text('{"pid": 1, "stage": "x"}')
    (run,) = standing.find(tmp_path, '*')
    assert run.stage == 'starting'


def create_seen(count, name='adamw seed {}'):
  values = {
    'devices': 'gpu 3',
    'stage': 'tiny_imagenet',
    'index': 0,
    'num_stages': 1,
    'epoch': 3,
    'num_epochs': 90,
    'step': 1200,
    'total_steps': 36000,
    'top1': 0.4567,
    'images_per_second': 1234.5,
    'seconds_left': 3723.0,
  }
  running = [
    (name.format(i), standing.Running(None, {'host': 'node'}, values))
    for i in range(count)
  ]
  return fleet.Seen(5, 24, running, 7200.0)


def draw(*arguments):
  lines = fleet.draw('runs', *arguments)
  return [re.sub(r'\x1b\[[0-9;]*m', '', x) for x in lines]


def test_each_run_has_a_line_with_what_fits():
  head, titles, *lines = draw(create_seen(3), 160, 20)
  assert head.endswith('5/24   left 2:00:00')
  assert titles.split() == [
    'run',
    'on',
    'stage',
    'epoch',
    'top-1',
    'images/s',
    'left',
  ]
  assert [x.split() for x in lines] == [
    f'adamw seed {i} node gpu 3 tiny_imagenet 3/90 45.7% 1,234 1:02:03'.split()
    for i in range(3)
  ]
  long = 'last_alone_equal_seconds_of_everything seed {}'
  _, titles, *lines = draw(create_seen(12, long), 60, 5)
  assert titles.split() == ['run', 'epoch', 'top-1', 'left']
  assert lines[0].startswith('last_alone_equal_se...ing seed 0 ')
  assert lines[-1] == 'and 7 more under way'
  for width in (60, 80, 160):
    assert max(map(len, draw(create_seen(12, long), width, 20))) < width
  assert draw(create_seen(0), 80, 20)[1:] == []


def test_where_nothing_can_be_drawn_runs_are_lines_of_key_and_value():
  now = [0.0]
  console = rich.console.Console(file=io.StringIO(), width=40)
  shown = fleet.Fleet(console, 'runs', clock=lambda: now[0])
  for seconds in (0.0, 1.0, 59.0, 1.0):
    now[0] += seconds
    shown.show(create_seen(2))
  shown.close()
  first, run, *others = console.file.getvalue().splitlines()
  assert first == 'event=runs over=5 total=24 running=2 left=2:00:00'
  assert run == (
    'event=run run="adamw seed 0" on="node gpu 3" stage=tiny_imagenet '
    'epoch=3/90 step=1200/36000 top1=0.4567 images_per_second=1234.5 '
    'left=1:02:03'
  )
  assert len(others) == 4  # The last minute has another three.


def test_a_device_is_named_where_a_run_has_one_of_several(monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2')
  assert standing._describe_devices() == 'gpu 2'

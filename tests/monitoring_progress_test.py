import io
import re
import sys

import history_fixture
import pytest
import rich.console

from jaxprog.monitoring import activity
from jaxprog.monitoring import progress as progress_lib

METRICS = {
  'loss': 1.25,
  'top1': 0.5,
  'learning_rate': 1e-3,
  'grad_norm': 0.8123,
  'images_per_second': 640.0,
  'input_wait': 0.031,
  'device_memory': 12_340_000_000,
}
# What the bar says of them, in groups.
PHRASES = (
  'loss 1.2500 top-1 50.0% lr 1.00e-03 grad norm 0.8123',
  'images/s 640 input wait 3.1% device memory 12.3 GB',
  'left 0:50 epoch 2:30 stage 2:30 run',
)


# What stands above titles, with lines to both sides of it.
GROUP = r'(?:─+ )?([a-z:]+)(?: ─+)?'


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


class Screen:
  """What a terminal shows after the control codes that rich sends."""

  def __init__(self, width):
    self.width, self.rows, self.row, self.column = width, [''], 0, 0
    self.widest = 0

  def feed(self, text):
    for code in re.findall(r'\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]', text):
      self._put(code)
    return self

  def _put(self, code):
    if code == '\n':
      self.row, self.column = self.row + 1, 0
      if self.row == len(self.rows):
        self.rows.append('')
    elif code == '\r':
      self.column = 0
    elif code.startswith('\x1b'):
      self._control(code)
    else:
      row = self.rows[self.row].ljust(self.column)
      self.rows[self.row] = row[: self.column] + code + row[self.column + 1 :]
      self.column += 1
      self.widest = max(self.widest, self.column)

  def _control(self, code):
    if code == '\x1b[2K':
      self.rows[self.row] = ''
    elif code == '\x1b[J':
      self.rows[self.row] = self.rows[self.row][: self.column]
      self.rows[self.row + 1 :] = []
    elif code[-1] == 'A':
      self.row -= int(code[2:-1])
    else:
      assert code[-1] in 'mlh', code

  def lines(self):
    return [row.rstrip() for row in self.rows]


class Terminal(io.StringIO):
  """What the program writes to, and takes for a terminal."""

  encoding = 'utf-8'

  def isatty(self):
    return True


@pytest.fixture(autouse=True)
def streams(monkeypatch):
  """Lets a test see what is drawn and said, from nothing."""
  monkeypatch.delenv('NO_COLOR', raising=False)
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setattr(activity, '_display', activity._Display())
  before = sys.stdout
  yield
  sys.stdout = before


def create_console(width=80, terminal=True):
  if terminal:
    sys.stdout = Terminal()
  return rich.console.Console(
    file=None if terminal else io.StringIO(),
    width=width,
    height=50,
    color_system='standard' if terminal else None,
    legacy_windows=False,
    _environ={'TERM': 'xterm'},
  )


def create_plan(history):
  return [
    progress_lib.Description(
      name=stage['name'],
      num_train_images=stage['num_train_images'],
      num_classes=stage['num_classes'],
      image_size=stage['image_size'],
      batch_size=stage['batch_size'],
      total_steps=10 * stage['num_epochs'],
      warmup_steps=5,
      peak_learning_rate=0.002,
      final_learning_rate=8e-9,
      parameters=25_557_032,
    )
    for stage in history['stages']
  ]


def run(console, history, clock=None):
  """Shows all of `history`, ten steps an epoch, a tenth of a second each."""
  clock = clock or Clock()
  plan = create_plan(history)
  with progress_lib.Progress(len(plan), console=console, clock=clock) as shown:
    shown.start_run(plan)
    for index, stage in enumerate(history['stages']):
      name = stage['name']
      ends = range(10, plan[index].total_steps + 1, 10)
      shown.start_stage(index, name, ends, optimizer='x')
      for row in stage['epochs']:
        for step in range(10):
          clock.now += 0.1
          shown.step(10 * (row['epoch'] - 1) + step + 1, METRICS)
        for batch in range(4):
          clock.now += 0.1
          shown.evaluate(batch, 4)
        shown.end_epoch(row, row['epoch'] == stage['best']['epoch'])
      shown.message(f'[{name}] is over')
      shown.end_stage(stage)
  return console.file.getvalue()


@pytest.mark.parametrize('width', [40, 80, 160])
def test_terminal_keeps_every_row_and_wraps_none(width):
  history = history_fixture.create_history((3, 12))
  screen = Screen(width).feed(run(create_console(width), history))
  assert screen.widest <= width
  lines = screen.lines()
  for stage in history['stages']:
    for row in stage['epochs']:
      epoch = f'{row["epoch"]}/{stage["num_epochs"]} '
      begins = [x for x in lines if x.startswith(epoch)]
      assert len(begins) == 1, epoch
      assert f'{row["val_top1"]:.1%}' in begins[0]
      is_best = row['epoch'] == stage['best']['epoch']
      assert begins[0].endswith('*') == is_best
    assert f'[{stage["name"]}] is over' in lines
  # The bar is gone.
  assert not any('left ' in x or '━' in x for x in lines)


def test_less_important_columns_give_way():
  def header(width):
    console = create_console(width)
    screen = Screen(width).feed(
      run(console, history_fixture.create_history((1,)))
    )
    return next(x for x in screen.lines() if x.startswith('epoch ')).split()

  wide = 'loss top-1 loss top-1 top-5 lr grad norm images/s input wait time'
  normal = 'loss top-1 loss top-1 top-5 lr images/s time'
  assert ' '.join(header(160)) == f'epoch {wide}'
  assert ' '.join(header(80)) == f'epoch {normal}'
  assert header(40)[0] == 'epoch'
  assert 'top-1' in header(40)


def test_columns_stand_below_their_titles():
  history = history_fixture.create_history((3,))
  lines = Screen(80).feed(run(create_console(80), history)).lines()
  begin = next(i for i, x in enumerate(lines) if x.startswith('epoch '))
  rows = [x for x in lines if x.startswith(('1/3', '2/3', '3/3'))]
  ends = [m.end() for m in re.finditer(r'\S+', lines[begin])][1:]
  for row in rows:
    assert [m.end() for m in re.finditer(r'[^\s*]+', row)][1:] == ends
  # 'train' spans loss and top-1 of training, 'val' those after them; m:ss is
  # said of the time.
  spans = [(m.group(1), m.end()) for m in re.finditer(GROUP, lines[begin - 1])]
  assert spans == [('train', ends[1]), ('val', ends[4]), ('m:ss', ends[-1])]


def test_plan_shows_what_was_derived():
  text = run(create_console(100), history_fixture.create_history((1, 1)))
  row = next(
    x for x in Screen(100).feed(text).lines() if x.startswith('tiny_imagenet ')
  )
  cells = 'tiny_imagenet 100,000 200 64 128 10 5 0.002 8e-09 25.6M'
  assert ' '.join(row.split()) == cells


def test_bar_is_drawn_at_most_eight_times_a_second():
  clock, console = Clock(), create_console()
  with progress_lib.Progress(1, console=console, clock=clock) as shown:
    shown.start_stage(0, 'a', [1000])
    begin = console.file.tell()
    for step in range(1000):
      clock.now += 0.01
      shown.step(step + 1, METRICS)
    drawn = console.file.getvalue()[begin:].count('/1000')
  assert 40 <= drawn <= 80


def draw_bar(width, height=50):
  """Returns the lines of the bar in the middle of a stage of three epochs."""
  clock, console = Clock(), create_console(width)
  console.size = rich.console.ConsoleDimensions(width, height)
  shown = progress_lib.Progress(4, console=console, clock=clock)
  shown.start_stage(3, 'a', [100, 200, 300], start_step=140)
  assert 'waiting for the first step' in console.file.getvalue()
  for step in range(141, 151):
    shown.step(step, METRICS)
    clock.now += 1.0
  screen = Screen(width).feed(console.file.getvalue())
  shown.close()
  assert screen.widest <= width
  lines = screen.lines()
  begin = next(i for i, x in enumerate(lines) if ' 50/100' in x)
  return [' '.join(x.split()) for x in lines[begin:]]


def test_bar_shows_step_metrics_and_times():
  bar, *lines = draw_bar(80)
  assert bar.startswith('stage 4/4 epoch 2/3 ')
  assert bar.endswith(' 50/100')
  assert tuple(lines) == PHRASES


@pytest.mark.parametrize(('width', 'num_lines'), [(40, 6), (60, 4), (160, 2)])
def test_nothing_of_the_bar_is_lost_at_any_width(width, num_lines):
  bar, *lines = draw_bar(width)
  assert bar.startswith('stage 4/4 epoch 2/3 ')
  assert ' '.join(lines) == ' '.join(PHRASES)
  assert len(lines) == num_lines


def test_a_low_terminal_keeps_what_matters_most():
  _, *lines = draw_bar(40, height=5)
  assert lines == [
    'loss 1.2500 top-1 50.0%',
    'lr 1.00e-03 images/s 640',
    'left 2:30 stage 2:30 run',
  ]
  _, *lines = draw_bar(40, height=3)
  assert lines == ['loss 1.2500 top-1 50.0%']


def test_rows_after_a_resize_have_the_columns_that_fit():
  console = create_console(160)
  history = history_fixture.create_history((2,))
  rows = history['stages'][0]['epochs']
  with progress_lib.Progress(1, console=console, clock=Clock()) as shown:
    shown.start_stage(0, 'a', [10, 20])
    shown.end_epoch(rows[0], True)
    console.size = rich.console.ConsoleDimensions(50, 50)
    shown.end_epoch(rows[1], False)
  lines = Screen(160).feed(console.file.getvalue()).lines()
  headers = [x.split() for x in lines if x.startswith('epoch ')]
  assert len(headers) == 2
  assert len(headers[0]) > len(headers[1])
  last = next(x for x in lines if x.startswith('2/2'))
  assert len(last) <= 50
  assert f'{rows[1]["val_top1"]:.1%}' in last


@pytest.mark.parametrize('width', [80, 160])
def test_averaged_weights_have_a_column_where_they_are_kept(width):
  console = create_console(width)
  row = {**history_fixture.create_row(1), 'ema_top1': 0.4567}
  with progress_lib.Progress(1, console=console, clock=Clock()) as shown:
    shown.start_stage(0, 'a', [10, 20], averages=True)
    shown.end_epoch(row, True)
  lines = Screen(width).feed(console.file.getvalue()).lines()
  titles = next(x for x in lines if x.startswith('epoch '))
  shown_row = next(x for x in lines if x.startswith('1/2'))
  assert titles.index('ema') + 3 == shown_row.index('45.7%') + 5


def plain_lines(console):
  """Returns the key=value lines as dicts."""
  return [
    dict(pair.split('=', 1) for pair in re.findall(r'\w+=(?:"[^"]*"|\S+)', x))
    for x in console.file.getvalue().splitlines()
  ]


@pytest.fixture
def paced():
  """Returns a clock, the lines so far, and a stage of 3 epochs of 10 steps."""
  clock, console = Clock(), create_console(terminal=False)
  plan = create_plan(history_fixture.create_history((3, 3)))
  shown = progress_lib.Progress(2, console=console, clock=clock)
  shown.start_run(plan)
  shown.start_stage(0, 'imagenette', [10, 20, 30])

  def train(first):
    """Takes ten steps of 40 s each, longer than between two lines."""
    for step in range(first, first + 10):
      clock.now += 40.0
      shown.step(step, METRICS)

  def lines():
    return [x for x in plain_lines(console) if x['event'] == 'step']

  yield clock, shown, train, lines
  shown.close()


def test_time_left_of_epoch_stage_and_run(paced):
  clock, _, train, lines = paced
  clock.now += 500.0  # Compilation counts for nothing.
  train(1)
  first, second, *_ = lines()
  assert first['step'] == '1/30'
  assert 'epoch_left' not in first
  assert (first['grad_norm'], first['input_wait']) == ('0.8123', '0.031')
  assert first['device_memory'] == '12340000000'
  # 8 steps of the epoch and 28 of the stage are left. The second stage has as
  # many steps, twice the batch and 64 px: 1200 s * 2 * (64 / 224)^2 = 196 s.
  assert second['epoch_left'] == '5:20'
  assert second['stage_left'] == '18:40'
  assert second['run_left'] == '21:56'


def test_time_left_counts_every_evaluation_to_come(paced):
  clock, shown, train, lines = paced
  train(1)
  for batch in range(5):
    shown.evaluate(batch, 4)
    clock.now += 5.0
  shown.end_epoch(history_fixture.create_row(1), True)
  clock.now += 100.0  # Saving counts for nothing.
  train(11)
  line = lines()[11]
  assert line['epoch'] == '2/3'
  assert line['step'] == '12/30'
  # 8 steps and an evaluation of 20 s; then 10 steps and one more.
  assert line['epoch_left'] == '5:40'
  assert line['stage_left'] == '12:40'


def test_time_left_ignores_pauses_between_epochs(paced):
  clock, shown, train, lines = paced
  train(1)
  shown.end_epoch(history_fixture.create_row(1), True)
  clock.now += 500.0
  train(11)
  assert lines()[-1]['stage_left'] == '6:40'


def test_rate_follows_a_machine_that_slows_down():
  clock, console = Clock(), create_console(terminal=False)
  with progress_lib.Progress(1, console=console, clock=clock) as shown:
    shown.start_stage(0, 'a', [10_000])
    for step in range(1, 1201):
      clock.now += 0.1 if step < 1000 else 3.0
      shown.step(step, METRICS)
  # 8,800 steps of 3 s are 7:20:00.
  hours, minutes, _ = plain_lines(console)[-1]['stage_left'].split(':')
  assert int(hours) + int(minutes) / 60 == pytest.approx(7 + 20 / 60, abs=0.05)


def test_pipe_gets_one_greppable_line_an_epoch():
  console = create_console(width=20, terminal=False)
  history = history_fixture.create_history((3, 2))
  text = run(console, history)
  assert '\x1b' not in text
  lines = [x for x in plain_lines(console) if x.get('event') == 'epoch']
  rows = [row for stage in history['stages'] for row in stage['epochs']]
  assert len(lines) == len(rows) == 5
  for line, row in zip(lines, rows, strict=True):
    assert float(line['val_top1']) == pytest.approx(row['val_top1'], rel=1e-5)
    assert int(line['global_step']) == row['global_step']
  assert [x['epoch'] for x in lines] == ['1/3', '2/3', '3/3', '1/2', '2/2']
  best = [stage['best']['epoch'] for stage in history['stages']]
  assert [x['epoch'][0] for x in lines if x['best'] == 'true'] == [
    str(epoch) for epoch in best
  ]
  assert '[imagenette] is over' in text.splitlines()
  events = [x['event'] for x in plain_lines(console) if 'event' in x]
  assert events[:3] == ['plan', 'plan', 'stage']
  assert events.count('stage_end') == 2


def test_pipe_gets_a_line_on_steps_every_eight_seconds():
  clock, console = Clock(), create_console(terminal=False)
  with progress_lib.Progress(1, console=console, clock=clock) as shown:
    shown.start_stage(0, 'a', [10_000], note='two words')
    for step in range(1, 10_001):
      clock.now += 0.1
      shown.step(step, METRICS)
  lines = plain_lines(console)
  assert lines[0]['note'] == '"two words"'
  assert sum(x['event'] == 'step' for x in lines) == 125


@pytest.mark.parametrize(
  ('kind', 'variables', 'live'),
  [
    (Terminal, {'TERM': 'xterm'}, True),
    (Terminal, {'TERM': 'dumb'}, False),
    (Terminal, {'TERM': 'xterm', 'NO_COLOR': '1'}, False),
    (Terminal, {'TERM': 'xterm', 'NO_COLOR': ''}, True),
    (io.StringIO, {'TERM': 'xterm', 'FORCE_COLOR': '1'}, False),
  ],
)
def test_live_only_where_it_can_be(monkeypatch, kind, variables, live):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  console = rich.console.Console(file=kind(), _environ=variables)
  with progress_lib.Progress(1, console=console, clock=Clock()) as shown:
    shown.start_stage(0, 'a', [10])
  text = console.file.getvalue()
  assert ('\x1b' in text) == live
  assert ('event=stage' in text) == (not live)


def test_bar_is_taken_away_when_training_fails():
  console = create_console()
  clock = Clock()

  def fail():
    with progress_lib.Progress(1, console=console, clock=clock) as shown:
      shown.start_stage(0, 'a', [10])
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    fail()
  text = console.file.getvalue()
  assert '\x1b[?25h' in text  # The cursor is back.
  assert not any('━' in x for x in Screen(80).feed(text).lines())

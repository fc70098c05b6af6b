"""Makes the pictures of README and docs/ again; run it from a checkout.

    PYTHONPATH=. python docs/make_pictures.py [NAME=WORKDIR ...]

Trains the quickstart, at 80 columns and at 160, for what shows a terminal or a
report: leave the machine alone meanwhile, since the pictures show times. Those
of longer runs are made of their workdirs: ladder= (that of its three budgets)
and nette_tiny=. Needs Chromium.
"""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.terminal_theme
import rich.text
from PIL import Image

from jaxprog.comparison import statistics
from jaxprog.reporting import plots

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
sys.path.append(str(ROOT / 'tests'))
import chromium  # noqa: E402

# What a terminal is told besides letters: colours, and where to go on.
_CONTROL = re.compile(r'\x1b\[([0-9;?]*)([A-Za-z])|\r|\n')
_TERMINAL = (
  '<meta charset="utf-8"/><body style="margin:0"><pre style="margin:0;'
  'display:inline-block;padding:16px;color:{foreground};'
  "background:{background};font:15px/1.3 'DejaVu Sans Mono',monospace\">"
  '{code}</pre></body>'
)
# Of the machine that a picture was made on, nothing but its kind is of use.
_SHORTEN = """
for (const [name, text] of [['host', 'machine'], ['platform', 'Linux'],
    ['command', 'python main.py --config=quickstart --workdir=runs/first']])
  for (const found of document.querySelectorAll('.facts dt'))
    if (found.textContent === name)
      found.nextElementSibling.firstChild.textContent = text;
"""
# Of configs/compare_ladder.py.
BUDGETS = ('short', 'middle', 'long')
_SHOWN_EPOCH = 3  # Of the second stage, while the next one trains.


def main() -> None:
  """Makes all pictures that it can, and says which it did not."""
  given = dict(x.split('=', 1) for x in sys.argv[1:])
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)
    browser = chromium.Browser(workdir / 'profile')
    with contextlib.closing(browser):
      for columns, name in ((160, 'other'), (80, 'first')):
        text = train(workdir / name, columns, stops=name == 'other')
        path = DOCS / f'terminal_{columns}.png'
        path.write_bytes(draw_terminal(browser, text, columns, workdir))
      page = workdir / 'first' / 'report.html'
      browser.open(page, 1280)
      browser.evaluate(_SHORTEN)
      shot = browser.screenshot(x=0, y=0, width=1280, height=3080)
      (DOCS / 'report_1280.png').write_bytes(shot)
      browser.open(page, 400)
      browser.evaluate(_SHORTEN)
      (DOCS / 'report_400.png').write_bytes(draw_columns(browser, 3, 1230))
  if 'ladder' in given:
    path = pathlib.Path(given['ladder'])
    found = [read_comparison(path / budget) for budget in BUDGETS]
    (DOCS / 'ladder.png').write_bytes(plots.encode(draw_gains(found)))
  if 'nette_tiny' in given:
    path = pathlib.Path(given['nette_tiny'], 'training_history.json')
    plots.plot_history(json.loads(path.read_text()), DOCS / 'nette_tiny.png')
  left = {'ladder', 'nette_tiny'} - given.keys()
  if left:
    print(f'Left as they are, for want of a workdir: {", ".join(sorted(left))}')


def read_comparison(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what came of a comparison."""
  return json.loads((workdir / 'comparison.json').read_text())


def draw_gains(found: Sequence[dict[str, Any]]) -> plots.Figure:
  """Returns what each cell is above the reference, over the budgets.

  A panel a cell, all on the same axes, with 95% intervals.
  """
  arms = [statistics.by_cell(result['runs']) for result in found]
  reference = found[0]['reference']
  budgets = [arm[reference][0]['num_epochs'] for arm in arms]
  cells = [cell for cell in arms[0] if cell != reference]
  figure = plots.create_figure(9, 4.6)
  figure.set_layout_engine('constrained')
  panels = figure.subplots(2, -(-len(cells) // 2), sharex=True, sharey=True)
  for cell, axes in zip(cells, panels.flat, strict=False):
    gains = [
      statistics.compare(
        statistics.final_scores(arm[cell]),
        statistics.final_scores(arm[reference]),
      ).estimate
      for arm in arms
    ]
    plots.bare(axes)
    axes.axhline(0, color=plots.INK, linewidth=1)
    axes.plot(budgets, [100 * x.mean for x in gains], 'o-', color='#0072b2')
    for x, gain in zip(budgets, gains, strict=True):
      axes.vlines(x, 100 * gain.low, 100 * gain.high, color='#0072b2')
    axes.set_title(cell, loc='left', fontsize=10.5, color=plots.INK)
    axes.set_xscale('log')
    axes.set_xticks(budgets, [f'{x:g}' for x in budgets], minor=False)
    axes.minorticks_off()
  figure.supxlabel('budget, epochs of the last stage alone', fontsize=10)
  figure.supylabel(f'top-1 less that of {reference}, points', fontsize=10)
  return figure


def train(workdir: pathlib.Path, columns: int, *, stops: bool) -> str:
  """Trains the quickstart in a terminal; returns what that shows on the way.

  In colours, as it is while the second stage trains. The run is stopped then,
  or goes on to its end.
  """
  terminal, there = pty.openpty()
  size = struct.pack('HHHH', 50, columns, 0, 0)
  fcntl.ioctl(there, termios.TIOCSWINSZ, size)
  names = {'COLUMNS', 'LINES', 'NO_COLOR'}
  environment = {k: v for k, v in os.environ.items() if k not in names}
  command = 'main.py', '--config=quickstart', f'--workdir={workdir}'
  process = subprocess.Popen(
    [sys.executable, *command],
    stdin=there,
    stdout=there,
    stderr=there,
    cwd=ROOT,
    env={
      'JAX_PLATFORMS': 'cpu',
      **environment,
      'TERM': 'xterm-256color',
      'PYTHONPATH': str(ROOT),
    },
  )
  os.close(there)
  received = bytearray()

  def read() -> None:
    with contextlib.suppress(OSError):  # The other end is closed.
      while part := os.read(terminal, 1 << 16):
        received.extend(part)

  reader = threading.Thread(target=read)
  reader.start()
  while count_epochs(workdir) < _SHOWN_EPOCH and process.poll() is None:
    time.sleep(0.05)
  time.sleep(1.0)  # Into the next epoch, where there is a bar.
  text = bytes(received).decode(errors='replace')
  if stops:
    process.send_signal(signal.SIGTERM)
  process.wait()
  reader.join()
  os.close(terminal)
  if process.returncode and not stops:
    raise RuntimeError(bytes(received).decode(errors='replace'))
  return screen(text)


def count_epochs(workdir: pathlib.Path) -> int:
  """Returns how many epochs of the second stage are over."""
  try:
    text = (workdir / 'training_history.json').read_text()
  except OSError:
    return 0
  stages = json.loads(text)['stages']
  return len(stages[1]['epochs']) if len(stages) > 1 else 0


def screen(text: str) -> str:
  """Returns the lines that a terminal shows of `text`, colours in them."""
  lines, row, colour, end = [''], 0, '', 0
  at_start = False

  def write(part: str) -> None:
    nonlocal at_start
    if not part:
      return
    # What moves to the start of a line writes all of it again.
    lines[row] = ('' if at_start else lines[row]) + colour + part
    at_start = False

  for found in _CONTROL.finditer(text):
    write(text[end : found.start()])
    end = found.end()
    parameters, kind = found.groups()
    if kind == 'm':
      colour = '' if parameters in ('', '0') else f'\x1b[{parameters}m'
      if not colour and not at_start:
        lines[row] += '\x1b[0m'
    elif kind == 'A':
      row = max(0, row - int(parameters or 1))
    elif kind == 'K':
      lines[row] = ''
    elif kind == 'J':  # All from here on; the cursor is at the start.
      lines[row:] = ['']
    elif found.group() == '\r':
      at_start = True
    elif found.group() == '\n':
      row, at_start = row + 1, False
      lines += [''] * (row == len(lines))
  write(text[end:])
  return '\n'.join(lines).rstrip()


def draw_terminal(
  browser: chromium.Browser, text: str, columns: int, folder: pathlib.Path
) -> bytes:
  """Returns a PNG of what a dark terminal shows."""
  console = rich.console.Console(
    width=columns, record=True, file=io.StringIO(), force_terminal=True
  )
  console.print(rich.text.Text.from_ansi(text, overflow='fold'))
  path = folder / 'terminal.html'
  path.write_text(
    console.export_html(
      theme=rich.terminal_theme.MONOKAI,
      inline_styles=True,
      code_format=_TERMINAL,
    ),
    encoding='utf-8',
  )
  browser.open(path, 2000)
  box = browser.evaluate(
    '(({width, height}) => ({x: 0, y: 0, width, height}))'
    '(document.querySelector("pre").getBoundingClientRect())'
  )
  return browser.screenshot(**box)


def draw_columns(browser: chromium.Browser, count: int, height: int) -> bytes:
  """Returns a PNG of the top of a page 400 pixels wide, in columns."""
  page = Image.new('RGB', (420 * count - 20, height), '#d0d4da')
  for i in range(count):
    part = browser.screenshot(x=0, y=i * height, width=400, height=height)
    page.paste(Image.open(io.BytesIO(part)), (420 * i, 0))
  out = io.BytesIO()
  page.save(out, 'PNG')
  return out.getvalue()


if __name__ == '__main__':
  main()

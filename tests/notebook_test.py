"""The notebook of docs/: run as it stands, and as it is committed."""

import importlib.util
import pathlib
import re

import pytest

nbformat = pytest.importorskip('nbformat', reason='needs the extra test')
nbclient = pytest.importorskip('nbclient', reason='needs the extra test')

ROOT = pathlib.Path(__file__).parent.parent
PATH = ROOT / 'docs' / 'notebook.ipynb'


def code_cells(notebook):
  return [x for x in notebook.cells if x.cell_type == 'code']


def kinds(cell):
  """Returns what the outputs of a cell can be shown as."""
  return [set(x.get('data', {})) for x in cell.outputs if x.get('data')]


def check_outputs(notebook):
  config, batch, train, _, history, figure, report = code_cells(notebook)
  assert 'bold: not the default' in config.outputs[0].data['text/html']
  assert 'text/html' in kinds(config)[0]
  assert 'image/png' in kinds(batch)[-1]
  # One output for the whole run, and no lines of events.
  (shown,) = [x for x in train.outputs if x.get('data')]
  html = shown.data['text/html']
  assert html.count('<table>') == 2
  assert html.count('done, best top-1') == 2
  assert 'progress' not in html
  assert 'event=' not in str(train.outputs)
  assert 'image/png' in history.outputs[0].data['text/html']
  assert 'image/png' in kinds(figure)[0]
  assert 'Training report' in report.outputs[0].text


def test_it_is_committed_with_its_outputs():
  check_outputs(nbformat.read(PATH, 4))


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('ipykernel') is None, reason='needs the extra test'
)
def test_it_runs_as_it_stands(tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  notebook = nbformat.read(PATH, 4)
  for cell in code_cells(notebook):
    cell.outputs = []
  place = {'metadata': {'path': str(tmp_path)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
  check_outputs(notebook)


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('ipykernel') is None, reason='needs the extra test'
)
def test_an_output_says_what_is_being_done_below_the_tables():
  begin = """
import time
from jaxprog.monitoring import activity, notebook, progress
compiling = activity.doing('compiling', last=70.0)
_ = compiling.__enter__()
while notebook._current is None:
  time.sleep(0.1)
"""
  train = """
run = progress.Progress(1)
run.start_stage(0, 'three', [5])
while 'compiling' not in notebook._current._html():
  time.sleep(0.1)
"""
  end = """
_ = compiling.__exit__(None, None, None)
"""
  cells = map(nbformat.v4.new_code_cell, (begin, train, train + end))
  notebook = nbformat.v4.new_notebook(cells=list(cells))
  client = nbclient.NotebookClient(notebook, timeout=60)
  client.execute(cwd=str(ROOT))
  shown = []
  for cell in notebook.cells:
    (output,) = cell.outputs  # One, and no lines of events.
    shown.append(output['data']['text/html'])
  line = '<p>compiling: 0:0., about 1:10 the last time</p>'
  assert re.fullmatch(line, shown[0])
  assert 'three' in shown[1]
  assert 'compiling: 0:' in shown[1]
  assert 'three' in shown[2]
  assert 'compiling' not in shown[2]

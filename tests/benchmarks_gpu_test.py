"""The measurement on a GPU, rehearsed at toy sizes on a CPU."""

import json
import os
import pathlib
import subprocess
import sys
import time

import machines
import pytest

from benchmarks import gpu

ROOT = pathlib.Path(__file__).parent.parent
STEPS = ['jaxprog', 'plain Flax', 'PyTorch', 'PyTorch compiled']
BITS = ['twice', 'kill -9, gone on']
# Part -> what it has rows of.
ROWS = {
  'machine': ['device', 'versions'],
  'quickstart': [
    *('four stages', 'slowest hand-over', 'stage four', 'stage seven'),
  ],
  'bits_deterministic': BITS,
  'bits_none': BITS,
  'photographs': ['images'],
  'step50': STEPS,
  'step18': STEPS,
  'loop_original': ['loop and input'],
  'loop_raw': ['loop and input'],
  'f32': ['jaxprog', 'jaxprog f32', 'bf16 beside f32'],
  'flags18': ['none', '--xla_gpu_enable_command_buffer='],
  'flags50': ['none'],
}


def run(out, *arguments, env=None):
  """Returns the finished command and the rows of each part."""
  command = [sys.executable, 'benchmarks/gpu.py', f'--out={out}']
  done = subprocess.run(
    [*command, *arguments],
    cwd=ROOT,
    env={**os.environ, **(env or {})},
    capture_output=True,
    text=True,
  )
  rows = {}
  for row in json.loads((out / 'gpu.json').read_text())['rows']:
    rows.setdefault(row['part'], []).append(row)
  return done, rows


def python(text):
  return sys.executable, '-c', text


def test_without_a_gpu_nothing_else_is_measured(tmp_path):
  done, rows = run(tmp_path)
  assert done.returncode == 1
  assert [*rows] == ['machine']
  assert '**No GPU**' in done.stdout


def is_running(pid):
  try:
    return ' Z ' not in pathlib.Path('/proc', pid, 'stat').read_text()
  except OSError:
    return False


def test_a_rehearsal_names_the_machine_and_judges_nothing(tmp_path):
  done, rows = run(tmp_path, '--toy', '--parts=photographs')
  assert done.returncode == 0, done.stdout
  assert {x: [r['what'] for r in rows[x]] for x in rows} == {
    'machine': ROWS['machine'],
    'photographs': ROWS['photographs'],
  }
  text = (tmp_path / 'gpu.md').read_text()
  assert text == done.stdout
  assert '**No GPU**' in text
  assert 'toy sizes' in text
  assert 'cores of' in text
  assert not {'met', 'MISSED'} & {*text.split()}


def test_a_part_that_fails_or_hangs_leaves_the_others_alone(tmp_path):
  child = tmp_path / 'child'
  hang = f'sleep 600 & echo $! > {child}; echo it hangs; wait'
  say = 'from benchmarks import gpu; gpu.say("a", "{}", {{}})'
  parts = {
    'fails': gpu.Part(
      60, {'x': python('1 / 0'), 'y': python(say.format('after it'))}
    ),
    'hangs': gpu.Part(3, {'': ('sh', '-c', hang), 'next': python('print()')}),
    'good': gpu.Part(60, {'': python(f'{say.format(1)}; {say.format(2)}')}),
    'late': gpu.Part(60, {'': python('print()')}),
  }
  before_late = {x: parts[x] for x in parts if x != 'late'}
  rows = gpu.measure(before_late, tmp_path, time.monotonic() + 200)
  rows += gpu.measure({'late': parts['late']}, tmp_path, time.monotonic())
  found = [(x['part'], x['what'], x['figure']) for x in rows]
  assert found == [
    ('fails', 'x', 'FAILED, exit code 1: ZeroDivisionError: division by zero'),
    ('fails', 'a', 'after it'),
    ('hangs', '', 'FAILED, ended after 3 s: it hangs'),
    ('hangs', 'next', 'left out, no time'),
    ('good', 'a', '2'),
    ('late', '', 'left out, no time'),
  ]
  machines.until(lambda: not is_running(child.read_text().strip()))
  assert 'Left out: --parts=hangs,late' in gpu.draw_table(rows, 1.0)


def row(part, what, **values):
  return gpu.judge(
    {'part': part, 'what': what, 'figure': 'f', 'values': values}
  )


def test_aims_are_judged_on_a_gpu():
  rows = [
    row('machine', 'device', platform='gpu'),
    row('quickstart', 'four stages', seconds=61.0),
    row('step50', 'plain Flax', jaxprog_is=1.05),
    row('step50', 'PyTorch compiled', jaxprog_is=0.99),
    row('step50', 'PyTorch', jaxprog_is=0.5),
    row('loop_raw', 'loop and input', outside=0.03),
    row('f32', 'bf16 beside f32', memory_less=None),
    row('bits_deterministic', 'kill -9, gone on', equal=1),
    row('bits_none', 'kill -9, gone on', equal=0),
  ]
  verdicts = [
    line.split(' | ')[-1].strip(' |')
    for line in gpu.draw_table(rows, 1.0).splitlines()
    if line.startswith('|')
  ]
  assert verdicts[2:] == [
    *('', 'MISSED', 'met', 'MISSED', '', 'met', '', 'met', ''),
  ]
  rows[0] = row('machine', 'device', platform='cpu')
  assert not {'met', 'MISSED'} & {*gpu.draw_table(rows, 1.0).split()}


@pytest.mark.faults
@pytest.mark.slow
def test_every_part_is_rehearsed(tmp_path):
  done, rows = run(tmp_path, '--toy')
  assert done.returncode == 0, done.stdout
  assert {x: [r['what'] for r in rows[x]] for x in rows} == ROWS
  assert [r for x in rows for r in rows[x] if 'failed' in r] == []
  for flags in ('none', 'deterministic'):
    *_, killed = rows[f'bits_{flags}']
    assert killed['values']['equal'] == 1  # On a CPU always.
    assert 'killed 1 times' in killed['figure']


@pytest.mark.slow
def test_without_pytorch_its_rows_say_so(tmp_path):
  (tmp_path / 'torch.py').write_text('raise ImportError("no torch here")')
  env = {'PYTHONPATH': str(tmp_path)}
  done, rows = run(tmp_path, '--toy', '--parts=step18', env=env)
  assert done.returncode == 0, done.stdout
  found = {x['what']: x['figure'] for x in rows['step18']}
  assert [*found] == [
    *('jaxprog', 'plain Flax', 'PyTorch', 'PyTorch compiled'),
  ]
  assert found['PyTorch'] == found['PyTorch compiled'] == 'not installed'
  assert 'torch not installed' in done.stdout

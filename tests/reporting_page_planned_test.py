"""The report's section on what was planned for other hardware."""

import json

import history_fixture
from planning_elsewhere_test import CHIP_RATE, fill_in

from jaxprog.planning import outlook
from jaxprog.reporting import rundir
from jaxprog.reporting.page import html, markup, planned

TPUS = {'devices': {'kind': 'TPU v5 lite', 'count': 4}}


def create_run(**fields):
  history = history_fixture.create_history((3,))
  found = fill_in()
  figures = {
    'topology': 'v5e:2x2',
    'device_kind': 'TPU v5 lite',
    'num_chips': 4,
    'model': 'resnet50',
    'utilization': 0.5,
    'stages': [found.figures()],
    'notes': outlook.notes([found]),
  }
  # As it comes back from the file.
  figures = json.loads(json.dumps(figures))
  return rundir.RunFiles('run', history, hardware_plan=figures, **fields)


def section(run):
  return markup.join(*map(markup.render, planned.planned(run)))


def test_a_plan_stands_in_the_report():
  page = html.page(create_run())
  assert 'Planned elsewhere' in page
  for text in ('v5e:2x2', '10.0 GB', '312 MB', 'memory', 'not run'):
    assert text in page, text


def test_a_run_on_such_chips_is_held_against_its_plan():
  found = section(create_run(environment=TPUS))
  assert 'Planned against measured' in found
  rows = create_run().stages[0]['epochs']
  rate = sum(x['images_per_second'] for x in rows) / len(rows) / 4
  assert f'{rate / CHIP_RATE:.2f}x' in found


def test_a_run_on_others_is_not():
  other = {'devices': {'kind': 'cpu', 'count': 1}}
  found = section(create_run(environment=other))
  assert 'Planned against measured' not in found
  assert '1 x cpu' in found
  fewer = {'devices': {'kind': 'TPU v5 lite', 'count': 8}}
  assert 'against measured' not in section(create_run(environment=fewer))


def test_gpus_are_known_by_the_start_of_their_name():
  assert planned._is_kind('NVIDIA H100 80GB HBM3', 'NVIDIA H100')
  assert not planned._is_kind('TPU v5 lite', 'TPU v5')


def test_without_a_plan_there_is_no_section():
  run = create_run()._replace(hardware_plan=None)
  assert section(run) == ''
  assert 'Planned elsewhere' not in html.page(run)

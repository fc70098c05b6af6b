import itertools
import json

import comparison_fixture as fixture
import pytest

from jaxprog import errors
from jaxprog.comparison import figures, page, tables
from jaxprog.tools import report


def create_result(runs):
  cells = dict.fromkeys(run['cell'] for run in runs)
  return {
    'version': page.VERSION,
    'finished': True,
    'reference': runs[0]['cell'],
    'verdicts': ['<b>The ladder pays</b>.', 'a against b: no difference.'],
    'runs': runs,
    'cells': [
      {'name': name, 'stages': ['x'], 'overrides': {'y': 1}, 'equal': ''}
      for name in cells
    ],
  }


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('compared')
  runs = fixture.create_arms()
  result = create_result(runs)
  (workdir / 'comparison.json').write_text(json.dumps(result))
  figures.plot(workdir, runs, target=0.1)
  report.write_report([workdir])
  return workdir


def test_the_page_has_the_figures_of_the_table(workdir):
  result = json.loads((workdir / 'comparison.json').read_text())
  text = (workdir / 'report.html').read_text()
  summaries = tables.summarize(result['runs'], result['reference'])
  for table in tables.tabulate(summaries):
    for cell in (*table.titles, *itertools.chain(*table.rows)):
      assert cell == '-' or page.markup.join(cell) in text
  assert 'data:image/png;base64,' in text


def test_what_is_said_is_escaped(workdir):
  text = (workdir / 'report.html').read_text()
  assert '&lt;b&gt;The ladder pays&lt;/b&gt;.' in text
  assert '<b>' not in text


def without(result, name):
  return {k: v for k, v in result.items() if k != name}


WHOLE = create_result(fixture.create_arms(1))


@pytest.mark.parametrize(
  ('damaged', 'why'),
  [
    ('{', 'Expecting'),
    ([], 'no object'),
    ({}, 'version is none'),
    ({**WHOLE, 'version': 1}, 'version is 1, not 2'),
    (without(WHOLE, 'reference'), "lacks 'reference'"),
    ({**WHOLE, 'runs': None}, 'not iterable'),
    ({**WHOLE, 'runs': [{'cell': 'ladder'}]}, "lacks 'seed'"),
    ({**WHOLE, 'cells': ['ladder']}, 'must be integers'),
    (
      {**WHOLE, 'cells': [{**WHOLE['cells'][0], 'overrides': []}]},
      "no attribute 'items'",
    ),
    (
      {**WHOLE, 'runs': [{**WHOLE['runs'][0], 'curve': [{}]}]},
      "lacks 'epochs'",
    ),
    ({**WHOLE, 'reference': 'other'}, "lacks 'other'"),
  ],
)
def test_a_damaged_or_foreign_comparison_is_said(tmp_path, damaged, why):
  text = damaged if isinstance(damaged, str) else json.dumps(damaged)
  (tmp_path / 'comparison.json').write_text(text)
  with pytest.raises(errors.UserError, match='damaged') as e:
    report.write_report([tmp_path])
  assert why in e.value.what
  assert not (tmp_path / 'report.html').exists()

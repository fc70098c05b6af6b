import itertools
import json

import comparison_fixture as fixture
import pytest

from jaxprog import errors
from jaxprog.comparison import charts, page, statistics, tables, verdicts
from jaxprog.reporting.page import markup
from jaxprog.tools import report


def create_result(runs):
  cells = dict.fromkeys(run['cell'] for run in runs)
  return {
    'version': statistics.VERSION,
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
  report.write_report([workdir])
  return workdir


def test_the_page_has_the_figures_of_the_table(workdir):
  result = json.loads((workdir / 'comparison.json').read_text())
  text = (workdir / 'report.html').read_text()
  summaries = tables.summarize(result['runs'], result['reference'])
  for table in tables.tabulate(summaries):
    titles = [column.title for column in table.columns]
    for cell in (*titles, *itertools.chain(*table.rows)):
      assert cell == '-' or markup.join(cell) in text


def test_what_is_said_is_escaped(workdir):
  text = (workdir / 'report.html').read_text()
  assert '&lt;b&gt;The ladder pays&lt;/b&gt;.' in text
  assert '<b>The' not in text


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


def read_page(tmp_path, runs, target=0.3):
  result = {**create_result(runs), 'target_top1': target}
  (tmp_path / 'comparison.json').write_text(json.dumps(result))
  return page.write_page(tmp_path).read_text()


def test_what_more_seeds_show_than_were_planned_is_exploratory(tmp_path):
  runs = fixture.create_cell('a', [0.5, 0.51, 0.5, 0.49])
  runs += fixture.create_cell('b', [0.6, 0.611, 0.6, 0.59])
  texts = []
  for planned in (3, 4):
    result = {
      **create_result(runs),
      'config': {'seeds': 4, 'margin': 0.0},
      'max_seeds': planned,
      'looks': [
        {'seeds': 3, 'level': 0.01, 'verdict': 'B was better.'},
        {'seeds': 4, 'level': None if planned == 3 else 0.04, 'verdict': ''},
      ],
    }
    (tmp_path / 'comparison.json').write_text(json.dumps(result))
    texts.append(page.write_page(tmp_path).read_text())
  more, as_planned = texts
  assert '3 seeds were planned' in more
  assert 'With 3: B was better.' in more
  assert '&lt;0.001' not in more
  assert '&lt;0.001' in as_planned
  assert 'were planned' not in as_planned
  assert 'Intervals of differences are of 9' in as_planned


def test_differences_to_the_reference_come_first(workdir):
  text = (workdir / 'report.html').read_text()
  summaries = tables.summarize(fixture.create_arms(), 'ladder')
  rows = [x for x in summaries if x.difference]
  rows.sort(key=lambda x: -x.difference.estimate.mean)
  said = [
    f'{x.cell}: {verdicts.format_points(x.difference.estimate)} points'
    for x in rows
  ]
  assert len(said) == 6
  places = [text.index(markup.join(x)) for x in said]
  assert places == sorted(places)
  assert places[-1] < text.index('Final top-1 over seeds')


@pytest.mark.parametrize(('seeds', 'lines'), [(3, 21), (4, 7)])
def test_curves_are_there_for_every_cost(tmp_path, seeds, lines):
  text = read_page(tmp_path, fixture.create_arms(seeds))
  for name in ('images', 'flops', 'seconds'):
    assert f'id="by-{name}"' in text
    assert f'for="by-{name}"' in text
  # A line each, and that of the target, over each cost.
  assert text.count('<path class="line') == 3 * (lines + 1)
  # The interval at the end of a mean.
  assert text.count('class="whisker') == (3 * 7 if seeds == 4 else 0)


def test_a_run_that_failed_changes_no_axis():
  runs = [fixture.create_run('a', seed, 0.95) for seed in range(2)]
  failed = fixture.create_run('a', 2, None, 'failed', num_images=0)
  assert charts.curves([*runs, failed], 0.9) == charts.curves(runs, 0.9)


def test_of_many_cells_the_best_have_curves(tmp_path):
  text = read_page(tmp_path, fixture.create_grid())
  assert 'the best 8 of 20 cells' in text
  assert 'is drawn when' not in text

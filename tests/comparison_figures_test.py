"""Pictures and tables of comparisons: what they say, and that it is legible."""

import csv
import io
import itertools
import re

import comparison_fixture
import matplotlib.colors
import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
import rich.console

from jaxprog.comparison import figures, statistics, tables, verdicts

create_run = comparison_fixture.create_run
create_scores = comparison_fixture.create_scores


def estimate(finals):
  return statistics.estimate(create_scores(finals).values())


@pytest.fixture(scope='module')
def grid_runs():
  return comparison_fixture.create_grid()


@pytest.fixture(scope='module')
def arm_runs():
  return comparison_fixture.create_arms()


def texts_of(figure):
  """Returns each text that is drawn with its box, in pixels."""
  figure.canvas.draw()
  renderer = figure.canvas.get_renderer()
  texts = figure.findobj(
    lambda x: isinstance(x, matplotlib.text.Text) and x.get_visible()
  )
  # Locators keep labels of ticks outside the axis; those are not drawn.
  drawn = {
    id(tick.label1) for axes in figure.axes for tick in _drawn_ticks(axes)
  } | {id(tick.label2) for axes in figure.axes for tick in _drawn_ticks(axes)}
  ticks = {
    id(label)
    for axes in figure.axes
    for axis in (axes.xaxis, axes.yaxis)
    for tick in (*axis.majorTicks, *axis.minorTicks)
    for label in (tick.label1, tick.label2)
  }
  return [
    (text.get_text(), text.get_window_extent(renderer))
    for text in dict.fromkeys(texts)
    if text.get_text().strip() and (id(text) in drawn or id(text) not in ticks)
  ]


def _drawn_ticks(axes):
  for axis in (axes.xaxis, axes.yaxis):
    low, high = sorted(axis.get_view_interval())
    yield from (t for t in axis.get_major_ticks() if low <= t.get_loc() <= high)


def check_texts(figure):
  """Checks that no text leaves the canvas or lies on another one."""
  texts = texts_of(figure)
  width, height = figure.canvas.get_width_height()
  for text, box in texts:
    assert min(box.x0, box.y0) >= 0, text
    assert max(box.x1 - width, box.y1 - height) <= 0, text
  for (first, a), (second, b) in itertools.combinations(texts, 2):
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    down = min(a.y1, b.y1) - max(a.y0, b.y0)
    # Boxes hold the room of the largest letters: two pixels may be shared.
    assert min(across, down) < 2, (first, second)
  return [text for text, _ in texts]


def test_a_grid_has_a_heat_map_of_all_cells_and_curves_of_the_best(grid_runs):
  grid = figures.find_grid(grid_runs)
  figure = figures.draw_grid(grid_runs, grid)
  heat, curves = figure.axes
  texts = check_texts(figure)
  scores = [
    r['final_top1'] for r in grid_runs if r['cell'] == 'sgd / one_cycle'
  ]
  e = estimate(scores)
  assert f'{100 * e.mean:.1f}\n± {100 * e.std:.1f}\nn = 3' in texts
  assert sum('n = 2\n1 diverged' in text for text in texts) == 1
  values = heat.images[0].get_array()
  assert values.shape == (5, 4)
  assert values[0, 0] == pytest.approx(100 * e.mean)
  # Four cells of three runs each: few enough to be seen one by one.
  assert len(curves.lines) == 12
  ends = [x.get_ydata()[-1] for x in curves.lines[:3]]
  assert ends == pytest.approx([100 * x for x in scores])
  assert 'sgd / one_cycle (n = 3)' in texts


def test_letters_can_be_read_on_every_colour_of_the_map():
  for value in np.linspace(0, 1, 101):
    color = matplotlib.colormaps[figures.MAP](value)
    letters = figures._on(color)
    assert contrast(color, letters) > 3.9, value


def contrast(first, second):
  """Returns the contrast of two colours as WCAG 2 defines it."""
  channels = [np.array(matplotlib.colors.to_rgb(c)) for c in (first, second)]
  linear = [
    np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    for c in channels
  ]
  low, high = sorted(c @ (0.2126, 0.7152, 0.0722) for c in linear)
  return (high + 0.05) / (low + 0.05)


def test_a_grid_is_found_only_where_every_pair_is_a_cell(grid_runs):
  grid = figures.find_grid(grid_runs)
  assert grid[:2] == ('optimizer', 'schedule')
  assert grid.columns == ('one_cycle', 'cosine', 'step', 'polynomial')
  assert figures.find_grid(grid_runs[3:]) is None
  assert figures.find_grid(grid_runs[:6]) is None
  labels = [{**r, 'labels': {'x': r['seed'], 'y': 1}} for r in grid_runs]
  assert figures.find_grid(labels) is None


def test_cells_without_a_grid_are_held_against_the_reference(arm_runs):
  figure = figures.draw_forest(arm_runs, 'ladder')
  texts = check_texts(figure)
  (axes,) = figure.axes
  labels = [label.get_text() for label in axes.get_yticklabels()]
  others = {
    x.cell: x.difference.estimate
    for x in tables.summarize(arm_runs, 'ladder')
    if x.difference
  }
  assert labels == sorted(others, key=lambda x: -others[x].mean)
  assert len(labels) == 6
  # Interval and mean of the first row.
  interval, mean = axes.lines[:2]
  e = others[labels[0]]
  assert tuple(interval.get_xdata()) == pytest.approx(
    (100 * e.low, 100 * e.high)
  )
  assert mean.get_xdata()[0] == pytest.approx(100 * e.mean)
  fills = {
    label: line.get_markerfacecolor() != 'white'
    for label, line in zip(labels, axes.lines[1:-1:2], strict=True)
  }
  assert fills == {
    x.cell: x.p_value < 0.05
    for x in tables.summarize(arm_runs, 'ladder')
    if x.difference
  }
  assert set(fills.values()) == {True, False}
  assert f'{verdicts.format_points(e)}, n = 3' in texts


def test_cells_whose_runs_are_lost_come_last_and_say_so():
  runs = [
    create_run('a', 0, 0.3),
    create_run('lost', 0, status='diverged'),
    create_run('lost', 1, status='failed'),
    create_run('one', 0, 0.4),
  ]
  figure = figures.draw_forest(runs, 'a')
  labels = [x.get_text() for x in figure.axes[0].get_yticklabels()]
  assert labels == ['one', 'lost']
  texts = check_texts(figure)
  assert '1 diverged, 1 failed' in texts
  assert '+10.0, n = 1' in texts


def test_a_ladder_has_differences_above_curves(arm_runs):
  figure = figures.draw_ladder(arm_runs, 0.3, 'ladder')
  texts = check_texts(figure)
  forest, curves, *_ = figure.axes
  assert len(forest.get_yticks()) == 6
  assert texts.count('imagenette ends') == texts.count('imagewoof ends') == 1
  assert texts.count('target 30.0%') == 1
  vertical = [
    line.get_xdata()[0] for line in curves.lines if len(line.get_xdata()) == 2
  ]
  assert {4000, 11000} <= set(vertical)
  assert 30 in [line.get_ydata()[0] for line in curves.lines]


@pytest.mark.parametrize(('seeds', 'lines'), [(3, 3), (4, 1)])
def test_few_runs_are_drawn_and_of_more_the_mean(seeds, lines):
  runs = comparison_fixture.create_arms(seeds)
  _, curves, *_ = figures.draw_ladder(runs, 0.3, 'ladder').axes
  drawn = [x for x in curves.lines if x.get_label() == 'ladder']
  assert len(drawn) == lines
  # What has one evaluation is seen too.
  assert all(x.get_marker() == 'o' for x in drawn)
  # An interval at the end of each of the seven means, and no band.
  assert len(curves.collections) == (7 if lines == 1 else 0)


def test_ladders_start_where_their_earlier_stages_end(arm_runs):
  _, curves, *_ = figures.draw_ladder(arm_runs, 0.3, 'ladder').axes
  starts = {line.get_label(): line.get_xdata()[0] for line in curves.lines}
  assert starts['ladder'] == 12000
  assert starts['last stage alone, equal FLOPs'] == 1000


def test_arms_look_different(arm_runs):
  _, curves, *_ = figures.draw_ladder(arm_runs, 0.3, 'ladder').axes
  lines = {x.get_label(): x for x in curves.lines}
  lines = {k: v for k, v in lines.items() if not k.startswith('_')}
  assert len({x.get_color() for x in lines.values()}) == len(lines) == 7
  dashes = {k[:6]: x.get_linestyle() for k, x in lines.items()}
  assert dashes == {'ladder': '-', 'last s': '--'}


def test_names_of_stages_that_end_close_together_do_not_touch(arm_runs):
  ends = ((2000, 'imagenette'), (3500, 'imagewoof-with-a-long-name'))
  ends = (*ends, (5000, 'tiny_imagenet'), (11000, 'mini_imagenet'))
  boundaries = [comparison_fixture.create_boundary(*end) for end in ends]
  runs = [{**r, 'boundaries': r['boundaries'] and boundaries} for r in arm_runs]
  check_texts(figures.draw_ladder(runs, 0.5, 'ladder'))


def test_the_ladder_of_one_run_and_of_none_is_drawn():
  for run in (create_run('a', 0), create_run('a', 0, status='failed')):
    check_texts(figures.draw_ladder([run], 0.2, 'a'))


def test_long_names_stay_on_the_canvas(grid_runs):
  name = 'an_optimizer_with_a_name_of_no_reasonable_length'
  runs = [
    {
      **run,
      'cell': run['cell'].replace('sgd', name),
      'overrides': {
        k: v.replace('sgd', name).replace('step', name)
        for k, v in run['overrides'].items()
      },
    }
    for run in grid_runs
  ]
  check_texts(figures.draw_grid(runs, figures.find_grid(runs)))
  check_texts(figures.draw_forest(runs, runs[0]['cell']))
  check_texts(figures.draw_ladder(runs[:24], 0.3, runs[0]['cell']))


def test_pictures_are_written(tmp_path, grid_runs, arm_runs):
  path = tmp_path / 'optimizer_scheduler_comparison.png'
  assert figures.plot(tmp_path, grid_runs, 0.3) == path
  heat = matplotlib.image.imread(path)
  alone = [{**run, 'boundaries': []} for run in arm_runs]
  assert figures.plot(tmp_path, alone, 0.3) == path
  assert matplotlib.image.imread(path).shape != heat.shape
  path = figures.plot(tmp_path, arm_runs, 0.3)
  assert path.name == 'ladder_comparison.png'
  assert matplotlib.image.imread(path).shape[1] == 1430


def terminal(runs, reference, width=80):
  console = rich.console.Console(width=width, file=io.StringIO())
  summaries = tables.summarize(runs, reference)
  console.print(tables.render(summaries, reference))
  return console.file.getvalue()


def test_a_table_fits_80_columns_and_keeps_its_numbers(grid_runs):
  text = terminal(grid_runs, 'sgd / one_cycle')
  assert max(map(len, text.splitlines())) <= 80
  lines = text.splitlines()
  assert any('sgd / cosine' in x and '58.02  1.17' in x for x in lines)
  assert '2 done, 1' in text
  words = ' '.join(text.split())
  assert 'Of 60 runs 1 diverged: counted here, in no mean.' in words
  assert 'The best of 20 cells is chosen on these same runs' in words
  assert 'of 19 independent comparisons' in words


def test_a_narrow_table_has_names_and_whole_numbers():
  runs = [
    create_run(cell, seed, top1 + seed / 100)
    for cell, top1 in {'plain': 0.4, 'sgd-one_cycle': 0.3}.items()
    for seed in range(3)
  ]
  wide, narrow = (
    terminal(runs, 'plain', width).partition('Final')[0].split()
    for width in (200, 60)
  )
  numbers = [x.strip('[],') for x in wide if re.search(r'\d', x)]
  assert len(numbers) > 20
  assert {'plain', *numbers} <= {x.strip('[],') for x in narrow}


def test_a_summary_adjusts_p_values_for_the_number_of_cells():
  finals = {
    'a': (0.4, 0.41, 0.42),
    'b': (0.3, 0.32, 0.31),
    'c': (0.4, 0.4, 0.4),
  }
  runs = [
    create_run(cell, i, x)
    for cell in finals
    for i, x in enumerate(finals[cell])
  ]
  a, b, c = tables.summarize(runs, 'a')
  assert a.difference is None
  assert a.p_value is None
  first = create_scores(finals['a'])
  p = {
    k: statistics.compare(create_scores(finals[k]), first).p_value for k in 'bc'
  }
  assert b.p_value == pytest.approx(2 * p['b'])
  assert c.p_value == pytest.approx(p['c'])
  assert b.difference.estimate.mean == pytest.approx(-0.1)
  assert b.costs == {
    'epochs': 4,
    'images': 4000,
    'flops': 8e12,
    'seconds': 40,
  }


def test_a_cell_without_a_finished_run_stays_in_the_table():
  runs = [
    create_run('a', 0, 0.4),
    create_run('b', 0, None, status='failed', curve=[], learning_rate=None),
  ]
  text = terminal(runs, 'a')
  assert '1 failed' in text
  assert '40.00' in text


def test_every_run_and_every_cell_is_a_row(tmp_path, grid_runs):
  summaries = tables.summarize(grid_runs, 'sgd / one_cycle')
  described = [
    {'name': x.cell, 'control': False, 'flops_per_image': 1.0, 'tuning': None}
    for x in summaries
  ]
  tables.write(tmp_path, grid_runs, described)
  runs = list(csv.DictReader((tmp_path / 'comparison_runs.csv').open()))
  cells = list(csv.DictReader((tmp_path / 'comparison_cells.csv').open()))
  assert (len(runs), len(cells)) == (60, 20)
  assert runs[-1]['status'] == 'diverged'
  assert runs[0]['override:optimizer'] == 'sgd'
  assert runs[-1]['images'] == ''
  assert float(runs[0]['final_top1']) == grid_runs[0]['final_top1']
  assert float(runs[0]['flops']) == 2.4e13
  assert cells[0]['difference_mean'] == ''
  assert cells[-1]['done'] == '2'
  expected = summaries[1].difference.estimate
  assert float(cells[1]['difference_low']) == expected.low
  assert float(cells[1]['p_holm']) == summaries[1].p_value


def test_a_row_has_the_figures_in_percent(grid_runs):
  summaries = tables.summarize(grid_runs, 'sgd / one_cycle')
  accuracies, _ = tables.tabulate(summaries)
  row = 'sgd / cosine', '3', '58.02', '1.17', '[55.12, 60.91]'
  assert accuracies.rows[1][:5] == row


@pytest.mark.parametrize(
  ('value', 'text'),
  [(12, '12'), (999.6, '1k'), (128000, '128k'), (1.281e6, '1.28M'), (0, '0')],
)
def test_counts_are_short(value, text):
  assert tables.format_count(value) == text

import html.parser
import math
import re
import xml.etree.ElementTree as ET

import pytest

from jaxprog.reporting import timeline
from jaxprog.reporting.page import charts, markup

HEIGHT = 220.0
# The plot leaves 10 pixels above and 8 below: see charts._TOP and _BOTTOM.
TOP, FOOT = 10.0, 212.0


def draw(points, **arguments):
  """Returns the chart of one line as a tree; y runs from 0 to 100."""
  arguments = {
    'y': timeline.Scale(0, 100),
    'x_end': 10,
    'x_label': 'epochs',
    'format_y': '{:g}'.format,
    'summary': 'A line.',
    'series': [charts.Series('train', 'train', points)],
    **arguments,
  }
  text = charts.line_chart('Loss', **arguments)
  return ET.fromstring(text)


def find(tree, name, style):
  return [x for x in tree.iter(name) if style in x.get('class', '').split()]


def path(tree):
  found, *_ = find(tree, 'path', 'line')
  return [
    (pen, float(x), float(y))
    for pen, x, y in re.findall(r'([ML])(\S+) (\S+)', found.get('d'))
  ]


def percent(element, field='cx'):
  return float(element.get(field).removesuffix('%'))


def test_a_point_lies_where_its_values_say():
  drawn = path(draw([(0, 0.0), (5, 50.0), (10, 100.0)]))
  # x in thousandths of the width; y from the top.
  assert drawn == [
    ('M', 0.0, FOOT),
    ('L', 500.0, (TOP + FOOT) / 2),
    ('L', 1000.0, TOP),
  ]


def test_a_logarithmic_axis_has_equal_factors_at_equal_distances():
  y = timeline.Scale(0.001, 10.0, log=True)
  drawn = path(draw([(1, 0.001), (2, 0.1), (3, 10.0)], y=y))
  assert [at for _, _, at in drawn] == [FOOT, (TOP + FOOT) / 2, TOP]


def test_lines_break_where_there_is_no_value():
  drawn = path(draw([(1, 1.0), (2, 2.0), (3, None), (4, 4.0), (5, 5.0)]))
  assert [pen for pen, _, _ in drawn] == ['M', 'L', 'M', 'L']


def test_a_point_without_neighbours_is_a_dot():
  # More than are shown as dots each.
  more = [(6 + x / 200, 1.0) for x in range(220)]
  tree = draw([(1, 1.0), (2, None), (4, 50.0), (5, None), *more])
  dots = find(tree, 'circle', 'dot')
  assert [percent(dot) for dot in dots] == [10.0, 40.0]
  assert float(dots[1].get('cy')) == (TOP + FOOT) / 2


def test_each_point_of_a_short_line_is_a_dot_and_none_of_stairs():
  points = [(1, 1.0), (2, 2.0), (3, 3.0)]
  assert len(find(draw(points), 'circle', 'dot')) == 3
  line = charts.Series('rate', 'train', points, stairs=True)
  tree = draw([], series=[line])
  assert not find(tree, 'circle', 'dot')
  (found,) = find(tree, 'path', 'line')
  # Across first, then up or down: each value holds until the next.
  assert re.fullmatch(r'M\S+ \S+( H\S+V\S+){2}', found.get('d'))


def test_a_label_lies_above_every_line_that_is_near():
  line = [(4, 50.0), (5, 90.0), (6, 50.0)]
  other = charts.Series('val', 'val', [(5, 60.0)])
  tree = draw(
    line,
    series=[charts.Series('train', 'train', line), other],
    labels=[charts.Label(5, 60.0, '60%', 'val', (55.0, 65.0))],
  )
  (label,) = find(tree, 'text', 'best-label')
  (dot,) = find(tree, 'circle', 'best')
  peak = min(y for _, _, y in path(tree))
  assert float(label.get('y')) < peak < float(dot.get('cy'))
  (whisker,) = find(tree, 'line', 'whisker')
  ends = float(whisker.get('y1')), float(whisker.get('y2'))
  assert ends[0] < float(dot.get('cy')) < ends[1]


def test_accuracies_near_one_are_told_apart_by_their_errors():
  y = timeline.fit_top1([20.0, 99.0, 99.9], 10_000)
  # An error ten times as small is as far again.
  assert y.at(99.9) - y.at(99) == pytest.approx(y.at(99) - y.at(90))
  assert 0 < y.at(20.0) < y.at(99.9) < 1
  assert {90, 99, 99.9} <= set(y.ticks())
  # None of 200 is not told from a quarter of an image.
  perfect = timeline.fit_top1([50.0, 100.0], 200)
  assert perfect.at(100) == pytest.approx(1)
  assert perfect.ticks()[-1] == 100
  # One class, and hardly an image.
  for count in (0, 1, 10):
    assert timeline.fit_top1([100.0], count).at(100) == pytest.approx(1)
  linear = timeline.fit_top1([10.0, 60.0], 100)
  assert linear.at(35) == pytest.approx((linear.at(10) + linear.at(60)) / 2)


def test_of_labels_that_would_touch_the_last_one_stays():
  labels = [charts.Label(x, 50.0, f'{x}', 'val') for x in (1, 4, 4.5, 9)]
  tree = draw([(0, 0.0), (10, 1.0)], labels=labels)
  assert len(find(tree, 'circle', 'best')) == 4
  texts = [x.text for x in find(tree, 'text', 'best-label')]
  assert sorted(texts) == ['1', '4.5', '9']


def test_marks_and_hints_say_what_they_stand_for():
  tree = draw(
    [(0, 0.0), (10, 1.0)],
    marks=[charts.Mark('resume', 2.5, 'resumed at 100')],
    hints=[(2, 'epoch 2'), (6, 'epoch 6')],
    spans=timeline.spans([stage(range(6)), stage(range(4))]),
  )
  (mark,) = find(tree, 'g', 'mark')
  assert mark.find('title').text == 'resumed at 100'
  assert percent(mark.find('line'), 'x1') == 25.0
  first, second = find(tree, 'g', 'hint')
  assert [x.find('title').text for x in (first, second)] == [
    'epoch 2',
    'epoch 6',
  ]
  # Each strip reaches half way to the next one.
  assert percent(first.find('rect'), 'width') == 40.0
  assert percent(second.find('rect'), 'x') == 40.0
  (band,) = find(tree, 'rect', 'band')
  assert (percent(band, 'x'), percent(band, 'width')) == (60.0, 40.0)


@pytest.mark.parametrize(
  ('low', 'high', 'count', 'expected'),
  [
    (0, 10, 5, [0, 2, 4, 6, 8, 10]),
    (0, 0.83, 4, [0, 0.5]),
    (0, 150, 6, [0, 50, 100, 150]),
    (0, 1.5, 6, [0, 0.5, 1, 1.5]),
  ],
)
def test_ticks_are_round_and_inside(low, high, count, expected):
  assert timeline.Scale(low, high).ticks(count) == pytest.approx(expected)


def test_logarithmic_ticks_are_powers_of_ten():
  assert timeline.Scale(1e-5, 0.3, log=True).ticks() == pytest.approx(
    [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
  )


def test_a_scale_is_logarithmic_only_where_values_are_far_apart():
  assert not timeline.fit_scale([0.1, 1.9], log=True).log
  scale = timeline.fit_scale([1e-9, 0.1, 0.0], log=True)
  assert scale.log
  assert math.log10(scale.high / scale.low) < 6
  assert timeline.fit_scale([]) == timeline.Scale(0.0, 1.08)


def test_parts_of_a_bar_add_up_and_lie_end_to_end():
  bar = ET.fromstring(
    charts.stacked_bar([('a', 's', 1.0), ('b', 's', 0.0), ('c', 's', 3.0)], 'x')
  )
  rects = [(percent(r, 'x'), percent(r, 'width')) for r in bar.iter('rect')]
  assert rects == [(0.0, 25.0), (25.0, 75.0)]
  titles = [title.text for title in bar.iter('title')]
  assert titles == ['a: 25.0%', 'c: 75.0%']
  ET.fromstring(charts.stacked_bar([('a', 's', 0.0)], 'nothing'))


def test_calibration_bars_leave_out_empty_bins():
  bins = [(0, 0.0, 0.0), (10, 0.75, 0.5)]
  (bar,) = find(ET.fromstring(charts.reliability(bins, 's')), 'rect', 'bar')
  assert (float(bar.get('y')), float(bar.get('height'))) == (120.0, 120.0)
  assert '10 images: confidence 75.0%, accuracy 50.0%' in bar.find('title').text


def test_a_heat_map_has_a_row_a_label():
  counts = {(0, 0): 9, (0, 1): 1, (1, 1): 5}
  tree = ET.fromstring(charts.heat_map(['cat', 'dog'], counts))
  first, second = tree.findall('tr')[1:]
  right, wrong = first.findall('td')
  assert (right.get('class'), right.text) == ('right', '9')
  assert (wrong.get('class'), wrong.text) == ('wrong', '1')
  assert wrong.get('title') == 'cat taken for dog: 1 of 10'
  assert wrong.get('style') == '--part:21%'
  assert second.find('td').text is None


def test_a_range_bar_marks_the_run_in_its_range():
  tree = ET.fromstring(
    charts.range_bar((0.85, 0.95), [('other', 0.935)], 0.91, 's')
  )
  (expected,) = find(tree, 'rect', 'expected')
  assert (percent(expected, 'x'), percent(expected, 'width')) == (85.0, 10.0)
  (run,) = find(tree, 'circle', 'best')
  assert percent(run) == 91.0
  (other,) = find(tree, 'line', 'reference')
  assert percent(other, 'x1') == 93.5


def test_what_is_not_made_here_is_escaped():
  evil = '<script>alert("1")</script>&'
  text = markup.tag('p', evil, markup.tag('b', 'x'), title=evil)
  seen = []

  class Reader(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
      seen.append((tag, dict(attrs)))

    def handle_data(self, data):
      seen.append(data)

  Reader().feed(text)
  assert seen[0] == ('p', {'title': evil})
  assert evil in ''.join(x for x in seen if isinstance(x, str))
  assert [x[0] for x in seen if isinstance(x, tuple)] == ['p', 'b']


def stage(rows, **fields):
  epochs = [
    {'epoch': i, 'global_step': step, 'learning_rate': 0.1}
    for i, step in enumerate(rows, 1)
  ]
  return {
    'name': 'a',
    'epochs': epochs,
    'steps_per_epoch': 100,
    'num_epochs': len(rows),
    'image_size': 32,
    **fields,
  }


def test_steps_lie_between_the_epochs_that_they_belong_to():
  first, second = timeline.spans(
    [stage([100, 200]), stage([], name='none'), stage([300, 400, 500])]
  )
  assert (second.begin, second.end, second.number) == (2.0, 5.0, 3)
  assert second.first_step() == 200
  assert second.position(350) == 3.5
  assert first.position(50) == 0.5
  assert first.position(10_000) == 2.0


def test_a_stage_shorter_than_an_epoch_begins_where_it_began():
  (span,) = timeline.spans([stage([1050], num_epochs=0.5)])
  assert span.first_step() == 1000


def test_rates_end_with_the_training():
  phased = stage(
    [100, 200, 300],
    learning_rates=[0.1, 0.2, 0.3, 0.4],
    num_epochs=4,
  )
  _, span = timeline.spans([stage([1]), phased])
  # Trained for three of four epochs.
  assert span.rates() == [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3), (4.0, 0.3)]

"""Charts as HTML with inline SVG: pure functions of their data.

Across, positions are percentages, so that one chart fits every width of the
page and its letters keep their size; lines lie in a nested image that is
stretched. Down, positions are pixels. Colours are classes of the style sheet,
for light and dark. What the pointer is over says its numbers, without scripts.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxprog.reporting.facts import shorten
from jaxprog.reporting.page.markup import Html, tag
from jaxprog.reporting.timeline import Point, Scale, Span

# Width of the stretched image, in units of its own.
_UNITS = 1000.0
# Pixels around the plot that its outermost marks and letters need, and above
# one whose points have labels.
_TOP, _BOTTOM, _HEAD = 10.0, 8.0, 28.0
# With more points to a chart, dots would run into one another.
_MAX_DOTS = 200
# Pixels of a line of letters.
_LINE = 15.0
# Labels closer than this part of the width would touch on a telephone, and so
# far to either side do they reach.
_LABEL_DISTANCE, _LABEL_REACH = 0.17, 0.045


class _Plane(NamedTuple):
  """Where x and y lie: as a part of the width, in pixels from the top."""

  x_end: float
  y: Scale
  height: float
  head: float = _TOP

  def left(self, x: float) -> float:
    return x / self.x_end

  def top(self, y: float) -> float:
    full = self.height - self.head - _BOTTOM
    return self.height - _BOTTOM - self.y.at(y) * full


class Series(NamedTuple):
  """A line: its name, its class in the style sheet, its points by x.

  `stairs` hold each value until the next one, and have no dots.
  """

  name: str
  style: str
  points: Sequence[Point]
  stairs: bool = False

  @property
  def values(self) -> list[float]:
    """Those that there are."""
    return [value for _, value in self.points if value is not None]


class Mark(NamedTuple):
  """Something that happened at `x`; `text` says what.

  Its style is 'resume' or 'incident', both drawn at the foot of the chart.
  """

  style: str
  x: float
  text: str


class Label(NamedTuple):
  """A point named by its value, such as the best epoch, and its interval."""

  x: float
  y: float
  text: str
  style: str
  interval: tuple[float, float] | None = None


def line_chart(
  title: str,
  series: Sequence[Series],
  *,
  y: Scale,
  x_end: float,
  x_label: str,
  format_y: Callable[[float], str],
  summary: str,
  format_x: Callable[[float], str] = '{:g}'.format,
  height: float = 220,
  spans: Sequence[Span] = (),
  marks: Sequence[Mark] = (),
  labels: Sequence[Label] = (),
  hints: Sequence[tuple[float, str]] = (),
  sign: str = 'best epoch',
  names_at_ends: bool = False,
) -> Html:
  """Returns lines over x from 0 to `x_end`; what is outside `y` is cut off.

  Of `labels` that would touch, the last ones stay; their dots stand for `sign`.
  `hints` are x and what the pointer shows nearest to it, `summary` is for those
  who cannot see the chart. With `names_at_ends` lines are named there, if there
  is room, and the chart cannot be zoomed.
  """
  plane = _Plane(x_end, y, height, _HEAD if labels else _TOP)
  shapes = [
    *_draw_lines(series, plane),
    *(_mark_shape(mark, plane) for mark in marks),
    *_label_shapes(labels, plane, series),
    *_hint_strips(hints, plane),
  ]
  return tag(
    'figure',
    tag('figcaption', tag('b', title), *_legend(series, marks, labels, sign)),
    _span_names(spans, x_end),
    _panel(
      shapes,
      height,
      [(plane.top(tick), format_y(tick)) for tick in y.ticks()],
      [(plane.left(x), format_x(x)) for x in Scale(0, x_end).ticks(6)],
      f'{title}. {summary}',
      [_band(span, plane) for span in spans[1::2]],
      _end_names(series, plane) if names_at_ends else None,
    ),
    tag('p', x_label, class_='axis-label'),
    class_='named' if names_at_ends else 'zoom',
    data_axis=x_label,
    data_end=f'{x_end:g}',
  )


def _band(span: Span, plane: _Plane) -> Html:
  ends = plane.left(span.begin), plane.left(span.end)
  return _bar(ends, (0, plane.height), 'band')


def _end_names(series: Sequence[Series], plane: _Plane) -> Html:
  """Returns the names of lines, each as near to its end as others allow."""
  ends = sorted(
    (plane.top(line.values[-1]), line.name, line.style)
    for line in series
    if line.name and line.values
  )
  places: list[float] = []
  for y, *_ in ends:
    places.append(max(y, places[-1] + _LINE if places else _LINE / 2))
  # What was pushed out below moves up, and pushes in turn.
  limit = plane.height
  for i in reversed(range(len(places))):
    places[i] = limit = min(places[i], limit)
    limit -= _LINE
  texts = (
    _text(shorten(name, 36), 0, y + 4, 'start', class_=f'name {style}')
    for y, (_, name, style) in zip(places, ends, strict=True)
  )
  return _image(texts, plane.height)


def _legend(
  series: Sequence[Series],
  marks: Sequence[Mark],
  labels: Sequence[Label],
  sign: str,
) -> list[Html]:
  """Returns the names of lines and of what is marked, each beside its sign."""
  names = [
    tag(
      'span', tag('i', class_=f'key {s.style}'), s.name, class_='entry line-of'
    )
    for s in series
    if s.values and s.name
  ]
  signs = {'resume': '▲ resumed', 'incident': '◆ incident'}
  marked = [
    tag('span', signs[style], class_=f'entry {style}')
    for style in dict.fromkeys(mark.style for mark in marks)
  ]
  if labels:
    span = ' and 95% interval' if any(x.interval for x in labels) else ''
    marked.append(tag('span', f'● {sign}{span}', class_='entry'))
  return [*names, *marked]


def bar_rows(
  title: str, key: Sequence[Html], rows: Sequence[tuple[str, Html, str]]
) -> Html:
  """Returns rows of a name, a bar and a figure, below a title and a key."""
  cells = (
    (tag('span', name, title=name), bar, tag('span', figure, class_='num'))
    for name, bar, figure in rows
  )
  return tag(
    'figure',
    tag('figcaption', tag('b', title), *key),
    tag('div', *itertools.chain.from_iterable(cells), class_='rows'),
  )


def stacked_bar(
  parts: Sequence[tuple[str, str, float]], summary: str, whole: float = 0.0
) -> Html:
  """Returns (name, style, amount) side by side.

  As wide as the page, or of it the part that they are of `whole`.
  """
  total = sum(amount for _, _, amount in parts) or 1.0
  scale = whole or total
  edges = itertools.accumulate((p[2] / scale for p in parts), initial=0.0)
  bars = [
    _bar(x, (0, 20), style, f'{name}: {amount / total:.1%}')
    for (name, style, amount), x in zip(
      parts, itertools.pairwise(edges), strict=True
    )
    if amount > 0
  ]
  return _image(bars, 20, summary, 'stack')


def spread_bar(
  parts: Sequence[tuple[float, float, float]],
  middle: float,
  late: float,
  summary: str,
) -> Html:
  """Returns a strip that is stronger where there is more, and two lines.

  `parts` are begin, end and amount; these, and where half and nearly all lie
  to the left, are parts of the width.
  """
  top = max((amount for _, _, amount in parts), default=1.0)
  shapes = [
    _bar((x, end), (4, 20), 'bar', fill_opacity=f'{0.1 + 0.5 * y / top:.2f}')
    for x, end, y in parts
  ]
  shapes += [
    _upright(middle, (1, 23), class_='reference'),
    _upright(late, (1, 23), class_='late'),
  ]
  return _image(shapes, 24, summary, 'range')


def interval_bar(
  at: tuple[float, float, float], null: float, is_shown: bool, summary: str
) -> Html:
  """Returns an interval with its mean, at parts of the width, across `null`.

  One that `is_shown` to differ from that is filled.
  """
  low, middle, high = at
  shapes = [
    _upright(null, (0, 24), class_='reference null'),
    tag(
      'line',
      class_='interval',
      x1=_percent(low),
      x2=_percent(high),
      y1=12,
      y2=12,
    ),
    _dot(middle, 12, 5, 'mean shown' if is_shown else 'mean', summary),
  ]
  return _image(shapes, 24, summary, 'range')


def range_bar(
  expected: tuple[float, float] | None,
  references: Sequence[tuple[str, float]],
  value: float | None,
  summary: str,
) -> Html:
  """Returns a scale of 0 to 100 % with a range, references and a value."""
  shapes = [_rule(14)]
  if expected:
    said = f'expected: {expected[0]:.0%} to {expected[1]:.0%}'
    shapes.append(_bar(expected, (5, 23), 'expected', said))
  for name, at in references:
    said = tag('title', f'{name}: {at:.1%}')
    shapes.append(_upright(at, (1, 27), said, class_='reference'))
  if value is not None:
    shapes.append(_dot(value, 14, 6, 'best', f'this run: {value:.1%}'))
  return _image(shapes, 28, summary, 'range')


def reliability(bins: Sequence[tuple[int, float, float]], summary: str) -> Html:
  """Returns accuracy over confidence; bins are count, confidence, accuracy.

  A bar for each bin, stronger the more images it has; the diagonal is what
  perfect calibration would give.
  """
  height = 240.0
  total = sum(count for count, _, _ in bins) or 1
  bars = [
    _bar(
      (i / len(bins), (i + 0.94) / len(bins)),
      (height * (1 - accuracy), height),
      'bar',
      f'{count:,} images: confidence {confidence:.1%}, accuracy {accuracy:.1%}',
      fill_opacity=f'{0.3 + 0.7 * math.sqrt(count / total):.2f}',
    )
    for i, (count, confidence, accuracy) in enumerate(bins)
    if count
  ]
  ideal = tag('line', class_='ideal', x1=0, y1='100%', x2='100%', y2=0)
  ticks = [(height * (1 - x), f'{x:.0%}') for x in (0.0, 0.5, 1.0)]
  names = [(x, f'{x:.0%}') for x in (0.0, 0.5, 1.0)]
  panel = _panel([*bars, ideal], height, ticks, names, summary)
  label = tag('p', 'accuracy over confidence', class_='axis-label')
  return tag('figure', panel, label, class_='small')


def heat_map(
  names: Sequence[str], counts: Mapping[tuple[int, int], int]
) -> Html:
  """Returns a matrix, a row a label and a column a prediction.

  A cell is the stronger the larger its part of the row.
  """
  every = range(len(names))

  def cell(i: int, j: int, total: int) -> Html:
    count = counts.get((i, j), 0)
    part = count / (total or 1)
    return tag(
      'td',
      count or None,
      title=f'{names[i]} taken for {names[j]}: {count:,} of {total:,}',
      class_='right' if i == j else 'wrong',
      style=f'--part:{12 + 88 * part:.0f}%' if count else None,
    )

  rows = []
  for i, name in enumerate(names):
    total = sum(counts.get((i, j), 0) for j in every)
    cells = (cell(i, j, total) for j in every)
    rows.append(tag('tr', tag('th', shorten(name, 18), scope='row'), *cells))
  heads = (
    tag('th', tag('span', shorten(name, 18)), scope='col') for name in names
  )
  return tag('table', tag('tr', tag('td'), *heads), *rows, class_='heat')


def sparkline(points: Sequence[Point]) -> Html:
  """Returns a line without axes, from the least to the largest value."""
  begin = points[0][0] if points else 0.0
  line = Series('', 'val', [(x - begin, value) for x, value in points])
  if not line.values:
    return Html()
  low, high = min(line.values), max(line.values)
  y = Scale(low, high if high > low else low + 1)
  plane = _Plane(line.points[-1][0] or 1.0, y, 36.0)
  return _image(_draw_lines([line], plane, 0), plane.height, style='spark')


def _image(
  shapes: Iterable[Html],
  height: float,
  summary: str | None = None,
  style: str | None = None,
) -> Html:
  """Returns an image as wide as the page; without `summary` it is not read."""
  return tag(
    'svg',
    *shapes,
    class_=style,
    width='100%',
    height=_pixels(height),
    role='img' if summary else None,
    aria_label=summary,
    aria_hidden=None if summary else 'true',
  )


def _bar(
  x: tuple[float, float],
  y: tuple[float, float],
  style: str | None,
  said: str | None = None,
  **attributes: object,
) -> Html:
  """Returns a bar between two parts of the width and two heights."""
  return tag(
    'rect',
    tag('title', said) if said else None,
    class_=style,
    x=_percent(x[0]),
    width=_percent(x[1] - x[0]),
    y=_pixels(y[0]),
    height=_pixels(y[1] - y[0]),
    **attributes,
  )


def _dot(x: float, y: float, r: float, style: str, said: str = '') -> Html:
  return tag(
    'circle',
    tag('title', said) if said else None,
    class_=style,
    cx=_percent(x),
    cy=_pixels(y),
    r=f'{r:g}',
  )


def _upright(
  x: float, y: tuple[float, float], *said: Html, class_: str | None = None
) -> Html:
  """Returns a line down at a part of the width."""
  at = _percent(x)
  ends = {'y1': _pixels(y[0]), 'y2': _pixels(y[1])}
  return tag('line', *said, class_=class_, x1=at, x2=at, **ends)


def _panel(
  shapes: Iterable[Html],
  height: float,
  y_names: Sequence[tuple[float, str]],
  x_names: Sequence[tuple[float, str]],
  summary: str,
  bands: Sequence[Html] = (),
  beside: Html | None = None,
) -> Html:
  """Returns shapes over a grid over bands, between the names of both axes."""
  names = (_text(name, '100%', y + 4, text_anchor='end') for y, name in y_names)
  grid = (_rule(y) for y, _ in y_names)
  return tag(
    'div',
    _image(names, height),
    _image([_view([*bands, *grid, *shapes], height)], height, summary, 'plot'),
    tag('div', beside, class_='beside') if beside else None,
    tag('div'),
    axis(x_names),
    class_='panel',
  )


def _view(shapes: Iterable[Html], height: float) -> Html:
  """Returns what the page's script makes wider than its chart, to zoom."""
  return tag(
    'svg', *shapes, class_='view', width='100%', height=_pixels(height)
  )


def axis(names: Iterable[tuple[float, str]]) -> Html:
  """Returns names below a chart, each at its part of the width."""
  texts = (
    _text(name, _percent(x), 14, text_anchor=_anchor(x)) for x, name in names
  )
  return _image([_view(texts, 18)], 18, style='axis')


def _draw_lines(
  lines: Sequence[Series], plane: _Plane, max_dots: int = _MAX_DOTS
) -> list[Html]:
  """Returns lines, and dots: of all points or of those without neighbours."""
  paths, dots = [], []
  count = sum(len(x.points) for x in lines if not x.stairs)
  for line in lines:
    commands = []
    shown = [
      value is not None and (value >= plane.y.low or not plane.y.log)
      for _, value in line.points
    ]
    for i, (x, value) in enumerate(line.points):
      if value is None or not shown[i]:
        continue
      left, top = plane.left(x), plane.top(value)
      goes_on = i > 0 and shown[i - 1]
      if goes_on and line.stairs:
        commands.append(f'H{left * _UNITS:.2f}V{top:.2f}')
        continue
      commands.append(f'{"L" if goes_on else "M"}{left * _UNITS:.2f} {top:.2f}')
      alone = not goes_on and not any(shown[i + 1 : i + 2])
      if alone or (count <= max_dots and not line.stairs):
        dots.append(_dot(left, top, 3, f'dot {line.style}'))
    path = ' '.join(commands)
    paths.append(tag('path', class_=f'line {line.style}', d=path))
  stretched = tag(
    'svg',
    *paths,
    viewBox=f'0 0 {_UNITS:g} {plane.height:g}',
    preserveAspectRatio='none',
    width='100%',
    height=_pixels(plane.height),
  )
  return [stretched, *dots]


def _span_names(spans: Sequence[Span], x_end: float) -> Html | None:
  names = [
    tag(
      'span',
      span.name,
      tag('small', f' · {span.stage["image_size"]} px'),
      title=span.name,
      style=f'width:{_percent((span.end - span.begin) / x_end)}',
    )
    for span in spans
  ]
  names_above = tag(
    'div',
    tag('div'),
    tag('div', tag('div', *names), class_='cut'),
    class_='panel bands',
  )
  return names_above if names else None


def _rule(y: float) -> Html:
  at = _pixels(y)
  return tag('line', class_='grid', x1='0', x2='100%', y1=at, y2=at)


def _mark_shape(mark: Mark, plane: _Plane) -> Html:
  """Returns a line across the plot and a sign at its foot."""
  x, height = plane.left(mark.x), plane.height
  return tag(
    'g',
    tag('title', mark.text),
    _upright(x, (0, height - 12)),
    _text('▲' if mark.style == 'resume' else '◆', _percent(x), height - 2),
    class_=f'mark {mark.style}',
  )


def _label_shapes(
  labels: Sequence[Label], plane: _Plane, series: Sequence[Series]
) -> Iterator[Html]:
  """Yields dots, their intervals, and texts above all lines near to them."""
  taken: list[float] = []
  for label in reversed(labels):
    x, y = plane.left(label.x), plane.top(label.y)
    tops = [y - 5]
    if label.interval:
      low, high = (plane.top(v) for v in label.interval)
      tops.append(max(high, 0.0))
      ends = tops[-1], min(low, plane.height)
      yield _upright(x, ends, class_=f'whisker {label.style}')
    yield _dot(x, y, 4.5, f'best {label.style}', label.text)
    touches = any(abs(x - other) < _LABEL_DISTANCE for other in taken)
    if touches or not label.text:
      continue
    taken.append(x)
    tops += [
      plane.top(value)
      for line in series
      for at, value in line.points
      if value is not None and abs(plane.left(at) - x) < _LABEL_REACH
    ]
    yield _text(
      label.text,
      _percent(x),
      max(min(tops) - 7, 11),
      class_=f'best-label {label.style}',
      text_anchor=_anchor(x, 0.04),
    )


def _hint_strips(
  hints: Sequence[tuple[float, str]], plane: _Plane
) -> Iterator[Html]:
  """Yields invisible strips, each as wide as the way to its neighbours."""
  at, height = [plane.left(x) for x, _ in hints], plane.height
  edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(at)), 1.0]
  for x, strip, (_, text) in zip(
    at, itertools.pairwise(edges), hints, strict=False
  ):
    yield tag(
      'g',
      tag('title', text),
      _bar(strip, (0, height), None),
      _upright(x, (0, height)),
      class_='hint',
    )


def _text(
  text: str,
  x: float | str,
  y: float,
  text_anchor: str | None = 'middle',
  **attributes: object,
) -> Html:
  at = x if isinstance(x, str) else _pixels(x)
  return tag(
    'text', text, x=at, y=_pixels(y), text_anchor=text_anchor, **attributes
  )


def _anchor(fraction: float, margin: float = 0.02) -> str:
  """Returns the side on which a text at an edge stays inside."""
  if fraction < margin:
    return 'start'
  return 'end' if fraction > 1 - margin else 'middle'


def _percent(fraction: float) -> str:
  return f'{100 * fraction:.3f}%'


def _pixels(value: float) -> str:
  return f'{value:.2f}'.rstrip('0').rstrip('.')

"""Charts as HTML with inline SVG: pure functions of their data.

Across, positions are percentages, so that one chart fits every width of the
page and its letters keep their size; lines lie in a nested image that is
stretched. Down, positions are pixels. Colours are classes of the style sheet,
for light and dark. What the pointer is over says its numbers, without scripts.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxprog.reporting.page.markup import Html, join, tag

# x, and a value or None where there is none.
Point = tuple[float, float | None]
Format = Callable[[float], str]

# Above this ratio of its extremes an axis may be logarithmic, and one that is
# shows so many decades: one-cycle ends millions below its peak.
LOG_RATIO = 20.0
LOG_DECADES = 5

# Width of the stretched image, in units of its own.
_UNITS = 1000.0
# Pixels around the plot that its outermost marks and letters need.
_TOP, _BOTTOM = 10.0, 8.0
# Labels closer than this part of the width would touch on a telephone.
_LABEL_DISTANCE = 0.17


class Scale(NamedTuple):
  """A range of values along an axis."""

  low: float
  high: float
  log: bool = False

  def at(self, value: float) -> float:
    """Returns where `value` lies, from 0 at `low` to 1 at `high`."""
    if self.log:
      low, high = math.log(self.low), math.log(self.high)
      return (math.log(max(value, self.low)) - low) / (high - low)
    return (value - self.low) / (self.high - self.low)


class Series(NamedTuple):
  """A line: its name, its class in the style sheet, its points by x."""

  name: str
  style: str
  points: Sequence[Point]


class Band(NamedTuple):
  """A part of the x axis with a name, such as a stage."""

  name: str
  begin: float
  end: float
  # Behind the name where the page is wide.
  detail: str = ''


class Mark(NamedTuple):
  """Something that happened at `x`; `text` says what.

  Its style is 'resume' or 'incident', both drawn at the foot of the chart.
  """

  style: str
  x: float
  text: str


class Label(NamedTuple):
  """A point named by its value, such as the best epoch."""

  x: float
  y: float
  text: str
  style: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Returns round numbers in [low, high], about `count`, at even distances."""
  if not high > low:
    return [low]
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Returns the powers of ten in [low, high], 2 and 5 too if they are few."""
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  powers = [10.0**i for i in range(first, last + 1)]
  factors = (1, 2, 5) if last - first <= 2 else (1,)
  found = [f * p for p in powers for f in factors]
  return [x for x in found if low * 0.999 <= x <= high * 1.001]


def fit_scale(values: Sequence[float], *, log: bool = False) -> Scale:
  """Returns a scale from 0 to a little above `values`.

  With `log` it is logarithmic if they are positive and far apart.
  """
  top = max(values, default=0.0) or 1.0
  positive = [x for x in values if x > 0]
  if log and positive and top > LOG_RATIO * min(positive):
    return Scale(
      max(min(positive), top / 10**LOG_DECADES) / 1.5, top * 1.5, True
    )
  return Scale(min(0.0, *values, 0.0), top * 1.08)


def line_chart(
  title: str,
  series: Sequence[Series],
  *,
  y: Scale,
  x_end: float,
  x_label: str,
  format_y: Format,
  summary: str,
  height: float = 220,
  bands: Sequence[Band] = (),
  marks: Sequence[Mark] = (),
  labels: Sequence[Label] = (),
  hints: Sequence[tuple[float, str]] = (),
  y_ticks: Sequence[float] | None = None,
) -> Html:
  """Returns lines over x from 0 to `x_end`.

  Args:
    title: above the chart, beside the names of its series.
    series: lines that break where there is no value.
    y: the vertical scale; what is outside is cut off.
    x_end: end of the horizontal axis.
    x_label: what the horizontal axis counts.
    format_y: writes a tick of the vertical axis.
    summary: the chart in a sentence, for those who cannot see it.
    height: of the plot, in pixels.
    bands: parts of the x axis, every other one shaded, named above the plot.
    marks: at the foot of the plot.
    labels: named points; of those that would touch, the last ones stay.
    hints: x and what the pointer shows nearest to it.
    y_ticks: instead of round numbers.
  """
  at_y = _vertical(y, height)
  if y_ticks is None:
    y_ticks = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high, 4)
  plot = tag(
    'svg',
    *_band_rects(bands, x_end, height),
    *(_rule(at_y(tick)) for tick in y_ticks),
    _stretched(height, [_path(s, y, x_end, height) for s in series]),
    *_dots(series, y, x_end, height),
    *_mark_shapes(marks, x_end, height),
    *_label_shapes(labels, x_end, at_y),
    *_hint_strips(hints, x_end, height),
    class_='plot',
    width='100%',
    height=_pixels(height),
    role='img',
    aria_label=f'{title}. {summary}',
  )
  return tag(
    'figure',
    tag('figcaption', tag('b', title), *legend(series, marks, labels)),
    _band_names(bands, x_end),
    tag(
      'div',
      _y_axis([(at_y(tick), format_y(tick)) for tick in y_ticks], height),
      plot,
      class_='panel',
    ),
    _x_axis(x_end, x_label),
    class_='chart',
  )


def legend(
  series: Sequence[Series],
  marks: Sequence[Mark] = (),
  labels: Sequence[Label] = (),
) -> list[Html]:
  """Returns the names of lines and of what is marked, each beside its sign."""
  names = [
    tag('span', tag('i', class_=f'key {s.style}'), s.name, class_='entry')
    for s in series
    if any(value is not None for _, value in s.points)
  ]
  signs = {'resume': '▲ resumed', 'incident': '◆ incident', '': '● best epoch'}
  styles = [*dict.fromkeys(mark.style for mark in marks), *[''] * bool(labels)]
  return names + [
    tag('span', signs[style], class_=f'entry {style}') for style in styles
  ]


def strip_chart(
  rows: Mapping[str, Sequence[tuple[float, float, float]]],
  x_end: float,
  height: float = 26,
) -> Html:
  """Returns, for each name, bars (begin, end, value) that say their value.

  The larger the value beside the others of its row, the stronger the colour.
  """
  drawn = []
  for name, bars in rows.items():
    top = max((value for _, _, value in bars), default=1) or 1
    cells = [
      tag(
        'div',
        f'{value:g}',
        title=f'{name} {value:g}',
        style=f'left:{_percent(begin / x_end)};'
        f'width:{_percent((end - begin) / x_end)};'
        f'--strength:{12 + 48 * value / top:.0f}%',
      )
      for begin, end, value in bars
    ]
    drawn.append(
      tag(
        'div',
        tag('span', name, class_='strip-name'),
        tag('div', *cells, class_='strip', style=f'height:{height:g}px'),
        class_='panel',
      )
    )
  return tag('div', *drawn, class_='strips')


def stacked_bar(parts: Sequence[tuple[str, str, float]], summary: str) -> Html:
  """Returns one bar as wide as the page: (name, style, amount) side by side."""
  total = sum(amount for _, _, amount in parts) or 1.0
  begins = itertools.accumulate((p[2] / total for p in parts), initial=0.0)
  rects = [
    tag(
      'rect',
      tag('title', f'{name}: {amount / total:.1%}'),
      class_=style,
      x=_percent(begin),
      width=_percent(amount / total),
      height='20',
    )
    for (name, style, amount), begin in zip(parts, begins, strict=False)
    if amount > 0
  ]
  return tag(
    'svg',
    *rects,
    class_='stack',
    width='100%',
    height='20',
    role='img',
    aria_label=summary,
  )


def histogram(
  title: str,
  bars: Sequence[tuple[str, int]],
  *,
  summary: str,
  height: float = 120,
) -> Html:
  """Returns a bar for each (name, count), names below where there is room."""
  top = max((count for _, count in bars), default=0) or 1
  width = 1 / max(len(bars), 1)
  # At most five names: they are up to fifty pixels wide.
  every = -(-len(bars) // 5)
  rects = [
    tag(
      'rect',
      tag('title', f'{name}: {count:,}'),
      class_='bar',
      x=_percent((i + 0.06) * width),
      width=_percent(0.88 * width),
      y=_pixels(height - count / top * (height - 4)),
      height=_pixels(count / top * (height - 4)),
    )
    for i, (name, count) in enumerate(bars)
  ]
  names = [
    _text(
      name,
      x=_percent((i + 0.5) * width),
      y='14',
      text_anchor=_anchor((i + 0.5) * width, 0.08),
    )
    for i, (name, _) in enumerate(bars)
    if i % every == 0
  ]
  return tag(
    'figure',
    tag('figcaption', tag('b', title)),
    tag(
      'svg',
      *rects,
      class_='plot',
      width='100%',
      height=_pixels(height),
      role='img',
      aria_label=f'{title}. {summary}',
    ),
    tag('svg', *names, width='100%', height='20', aria_hidden='true'),
    class_='chart small',
  )


def range_bar(
  expected: tuple[float, float] | None,
  references: Sequence[tuple[str, float]],
  value: float | None,
  summary: str,
) -> Html:
  """Returns a scale of 0 to 100 % with a range, references and a value."""
  shapes = [_rule(14.0)]
  if expected:
    low, high = expected
    shapes.append(
      tag(
        'rect',
        tag('title', f'expected: {low:.0%} to {high:.0%}'),
        class_='expected',
        x=_percent(low),
        width=_percent(high - low),
        y='5',
        height='18',
      )
    )
  for name, at in references:
    shapes.append(
      tag(
        'line',
        tag('title', f'{name}: {at:.1%}'),
        class_='reference',
        x1=_percent(at),
        x2=_percent(at),
        y1='1',
        y2='27',
      )
    )
  if value is not None:
    shapes.append(
      tag(
        'circle',
        tag('title', f'this run: {value:.1%}'),
        class_='best',
        cx=_percent(value),
        cy='14',
        r='6',
      )
    )
  return tag(
    'svg',
    *shapes,
    class_='range',
    width='100%',
    height='28',
    role='img',
    aria_label=summary,
  )


def percent_axis() -> Html:
  """Returns the ticks below `range_bar`s."""
  marks = [
    _text(
      f'{x}%',
      x=f'{x}%',
      y='14',
      text_anchor=_anchor(x / 100),
      class_='minor' if x % 50 else None,
    )
    for x in range(0, 101, 25)
  ]
  return tag(
    'svg',
    *marks,
    class_='range-axis',
    width='100%',
    height='18',
    aria_hidden='true',
  )


def reliability(bins: Sequence[tuple[int, float, float]], summary: str) -> Html:
  """Returns accuracy over confidence; bins are count, confidence, accuracy.

  A bar for each bin, stronger the more images it has; the diagonal is what
  perfect calibration would give.
  """
  size = 240.0
  total = sum(count for count, _, _ in bins) or 1
  width = size / max(len(bins), 1)
  rects = [
    tag(
      'rect',
      tag(
        'title',
        f'{count:,} images: confidence {confidence:.1%}, '
        f'accuracy {accuracy:.1%}',
      ),
      class_='bar',
      x=_pixels(i * width + 1),
      width=_pixels(width - 2),
      y=_pixels(size * (1 - accuracy)),
      height=_pixels(size * accuracy),
      fill_opacity=f'{0.3 + 0.7 * math.sqrt(count / total):.2f}',
    )
    for i, (count, confidence, accuracy) in enumerate(bins)
    if count
  ]
  frame = [
    tag('line', class_='grid', x1=0, x2=240, y1=y, y2=y)
    for y in (0, 60, 120, 180, 240)
  ]
  diagonal = tag('line', class_='ideal', x1=0, y1=240, x2=240, y2=0)
  names = [
    *(
      _text(f'{v}', x=-6, y=f'{244 - 2.4 * v:g}', text_anchor='end')
      for v in (0, 50, 100)
    ),
    *(
      _text(f'{v}', x=f'{2.4 * v:g}', y=257, text_anchor='middle')
      for v in (0, 50, 100)
    ),
    _text('confidence %', x=120, y=274, text_anchor='middle'),
    _text(
      'accuracy %',
      x=-28,
      y=120,
      text_anchor='middle',
      transform='rotate(-90 -28 120)',
    ),
  ]
  return tag(
    'svg',
    *frame,
    *rects,
    diagonal,
    *names,
    viewBox='-44 -8 298 290',
    class_='reliability',
    width='298',
    height='290',
    role='img',
    aria_label=summary,
  )


def heat_map(
  names: Sequence[str], counts: Mapping[tuple[int, int], int], summary: str
) -> Html:
  """Returns a matrix, a row a label and a column a prediction.

  A cell is the stronger the larger its part of the row.
  """
  cell, count = 30.0, len(names)
  left = 10 + 6.6 * min(max(map(len, names), default=0), 18)
  sums = [
    sum(counts.get((i, j), 0) for j in range(count)) for i in range(count)
  ]
  cells = [
    _cell(i, j, counts.get((i, j), 0), sums[i], cell, names)
    for i in range(count)
    for j in range(count)
  ]
  rows = [
    _text(
      shorten(name, 18),
      x=-8,
      y=_pixels((i + 0.5) * cell + 4),
      text_anchor='end',
    )
    for i, name in enumerate(names)
  ]
  columns = [
    _text(
      shorten(name, 18),
      x=0,
      y=0,
      transform=f'translate({(j + 0.5) * cell + 4:g} -8) rotate(-60)',
    )
    for j, name in enumerate(names)
  ]
  side = count * cell
  # Turned by 60 degrees, a name is 0.87 as high and half as wide as long.
  top, right = 6 + 0.87 * left, max(4.0, 0.5 * left - cell / 2)
  box = -left, -top, left + side + right, top + side + 4
  return tag(
    'svg',
    *itertools.chain.from_iterable(cells),
    *rows,
    *columns,
    viewBox=' '.join(f'{x:g}' for x in box),
    class_='heat',
    width=f'{box[2]:g}',
    height=f'{box[3]:g}',
    role='img',
    aria_label=summary,
  )


def sparkline(points: Sequence[Point], style: str, height: float = 36) -> Html:
  """Returns a line without axes, from the least to the largest value."""
  values = [value for _, value in points if value is not None]
  if not values:
    return Html('')
  low, high = min(values), max(values)
  y = Scale(low, high if high > low else low + 1)
  begin, end = points[0][0], points[-1][0]
  moved = [(x - begin, value) for x, value in points]
  x_end = end - begin or 1.0
  series = [Series('', style, moved)]
  return tag(
    'svg',
    _stretched(height, [_path(series[0], y, x_end, height)]),
    *_dots(series, y, x_end, height),
    class_='spark',
    width='100%',
    height=_pixels(height),
    aria_hidden='true',
  )


def row(name: str, chart: Html, value: str) -> Html:
  """Returns three cells of a grid."""
  return join(
    tag('span', name, title=name), chart, tag('span', value, class_='num')
  )


def shorten(text: str, width: int) -> str:
  """Returns `text`, its end cut off where it is longer than `width`."""
  return text if len(text) <= width else f'{text[: width - 1]}…'


def _vertical(y: Scale, height: float) -> Callable[[float], float]:
  """Returns the function from a value to its pixel, from the top."""

  def at(value: float) -> float:
    return height - _BOTTOM - y.at(value) * (height - _TOP - _BOTTOM)

  return at


def _stretched(height: float, paths: Sequence[Html]) -> Html:
  return tag(
    'svg',
    *paths,
    viewBox=f'0 0 {_UNITS:g} {height:g}',
    preserveAspectRatio='none',
    width='100%',
    height=_pixels(height),
  )


def _path(series: Series, y: Scale, x_end: float, height: float) -> Html:
  at_y, commands, pen = _vertical(y, height), [], 'M'
  for x, value in series.points:
    if value is None or (y.log and value <= 0):
      pen = 'M'
      continue
    commands.append(f'{pen}{x / x_end * _UNITS:.2f} {at_y(value):.2f}')
    pen = 'L'
  return tag('path', class_=f'line {series.style}', d=' '.join(commands))


def _dots(
  series: Sequence[Series], y: Scale, x_end: float, height: float
) -> Iterator[Html]:
  """Yields a dot for each point without neighbours, which no line shows."""
  at_y = _vertical(y, height)
  for s in series:
    values = [None, *(value for _, value in s.points), None]
    for i, (x, value) in enumerate(s.points):
      if value is not None and values[i] is None and values[i + 2] is None:
        yield tag(
          'circle',
          class_=f'dot {s.style}',
          cx=_percent(x / x_end),
          cy=_pixels(at_y(value)),
          r='3',
        )


def _band_rects(
  bands: Sequence[Band], x_end: float, height: float
) -> list[Html]:
  return [
    tag(
      'rect',
      class_='band',
      x=_percent(band.begin / x_end),
      width=_percent((band.end - band.begin) / x_end),
      height=_pixels(height),
    )
    for band in bands[1::2]
  ]


def _band_names(bands: Sequence[Band], x_end: float) -> Html | None:
  if not bands:
    return None
  names = [
    tag(
      'span',
      band.name,
      tag('small', f' · {band.detail}') if band.detail else None,
      title=band.name,
      style=f'width:{_percent((band.end - band.begin) / x_end)}',
    )
    for band in bands
  ]
  return tag('div', tag('div'), tag('div', *names), class_='panel bands')


def _rule(y: float) -> Html:
  at = _pixels(y)
  return tag('line', class_='grid', x1='0', x2='100%', y1=at, y2=at)


def _mark_shapes(
  marks: Sequence[Mark], x_end: float, height: float
) -> list[Html]:
  """Returns a line across the plot and a sign at its foot for each mark."""
  return [
    tag(
      'g',
      tag('title', mark.text),
      tag('line', x1=at, x2=at, y1='0', y2=_pixels(height - 12)),
      tag(
        'text',
        '▲' if mark.style == 'resume' else '◆',
        x=at,
        y=_pixels(height - 2),
        text_anchor='middle',
      ),
      class_=f'mark {mark.style}',
    )
    for mark in marks
    for at in [_percent(mark.x / x_end)]
  ]


def _label_shapes(
  labels: Sequence[Label], x_end: float, at_y: Callable[[float], float]
) -> Iterator[Html]:
  taken: list[float] = []
  for label in reversed(labels):
    x, y = label.x / x_end, at_y(label.y)
    yield tag(
      'circle',
      tag('title', label.text),
      class_=f'best {label.style}',
      cx=_percent(x),
      cy=_pixels(y),
      r='4.5',
    )
    if any(abs(x - other) < _LABEL_DISTANCE for other in taken):
      continue
    taken.append(x)
    # Below, where the curve came up from, if there is room.
    below = y + 19 < at_y(0)
    yield _text(
      label.text,
      x=_percent(x),
      y=_pixels(y + 19 if below else y - 9),
      class_=f'best-label {label.style}',
      text_anchor=_anchor(x, 0.08),
    )


def _hint_strips(
  hints: Sequence[tuple[float, str]], x_end: float, height: float
) -> list[Html]:
  """Returns invisible strips, each as wide as the way to its neighbours."""
  at = [x / x_end for x, _ in hints]
  edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(at)), 1.0]
  return [
    tag(
      'g',
      tag('title', text),
      tag(
        'rect',
        x=_percent(edges[i]),
        width=_percent(edges[i + 1] - edges[i]),
        height=_pixels(height),
      ),
      tag(
        'line',
        x1=_percent(at[i]),
        x2=_percent(at[i]),
        y1='0',
        y2=_pixels(height),
      ),
      class_='hint',
    )
    for i, (_, text) in enumerate(hints)
  ]


def _y_axis(marks: Sequence[tuple[float, str]], height: float) -> Html:
  return tag(
    'svg',
    *(
      _text(name, x='100%', y=_pixels(y + 4), text_anchor='end')
      for y, name in marks
    ),
    class_='axis',
    width='100%',
    height=_pixels(height),
    aria_hidden='true',
  )


def _x_axis(x_end: float, label: str) -> Html:
  marks = [
    _text(
      f'{tick:g}',
      x=_percent(tick / x_end),
      y='14',
      text_anchor=_anchor(tick / x_end),
    )
    for tick in ticks(0, x_end, 6)
  ]
  axis = tag('svg', *marks, width='100%', height='18', aria_hidden='true')
  return join(
    tag('div', tag('div'), axis, class_='panel'),
    tag('p', label, class_='axis-label'),
  )


def _cell(
  i: int, j: int, count: int, total: int, cell: float, names: Sequence[str]
) -> list[Html]:
  """Returns the square of label `i` taken for `j`, with its count."""
  part = count / total if total else 0.0
  style = 'right' if i == j else 'wrong'
  square = tag(
    'rect',
    tag('title', f'{names[i]} taken for {names[j]}: {count:,} of {total:,}'),
    class_=style if count else 'none',
    x=_pixels(j * cell + 1),
    y=_pixels(i * cell + 1),
    width=_pixels(cell - 2),
    height=_pixels(cell - 2),
    rx='3',
    fill_opacity=f'{0.12 + 0.88 * part:.2f}' if count else None,
  )
  if not count:
    return [square]
  number = _text(
    f'{count}',
    x=_pixels((j + 0.5) * cell),
    y=_pixels((i + 0.5) * cell + 4),
    text_anchor='middle',
    class_='on-strong' if part > 0.5 else 'on-weak',
  )
  return [square, number]


def _text(text: str, **attributes: object) -> Html:
  return tag('text', text, **attributes)


def _anchor(fraction: float, margin: float = 0.02) -> str:
  """Returns the side on which a text at an edge stays inside."""
  if fraction < margin:
    return 'start'
  return 'end' if fraction > 1 - margin else 'middle'


def _percent(fraction: float) -> str:
  return f'{100 * fraction:.3f}%'


def _pixels(value: float) -> str:
  return f'{value:.2f}'.rstrip('0').rstrip('.')

"""Numbers as people read them."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard


def is_number(value: float | None) -> TypeGuard[float]:
  """Returns whether `value` can be compared and drawn: not None, NaN, inf."""
  return value is not None and math.isfinite(value)


def percent(fraction: float | None) -> str:
  """Returns a fraction as '93.4%', '-' for None and NaN."""
  return f'{fraction:.1%}' if is_number(fraction) else '-'


def percents(bounds: tuple[float, float]) -> str:
  """Returns a range of fractions as '85-92%', one of equal ends as '85%'."""
  low, high = bounds
  return f'{100 * low:g}-{100 * high:g}%' if low < high else f'{100 * low:g}%'


def count(count: int) -> str:
  """Returns '812', '23.5k', '25.6M'."""
  for size, suffix in ((10**9, 'G'), (10**6, 'M'), (10**3, 'k')):
    if count >= size:
      return f'{count / size:.1f}{suffix}'
  return str(count)


def flops(flops: float | None) -> str:
  """Returns '24.3 G', '850 M', '1.20 T'; '' for None."""
  if flops is None:
    return ''
  for size, suffix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if flops >= size:
      return f'{flops / size:.3g} {suffix}'
  return f'{flops:.0f}'


def size(count: float | None) -> str:
  """Returns '3.2 GB', '409 MB', '12 kB'; '' for None."""
  if count is None:
    return ''
  for size, unit, digits in ((1e9, 'GB', 1), (1e6, 'MB', 0)):
    if count >= size:
      return f'{count / size:,.{digits}f} {unit}'
  return f'{count / 1e3:.0f} kB'


def seconds(seconds: float | None) -> str:
  """Returns '83 ms', '2.4 s' or, from a minute on, '12:40'; '' for None."""
  if seconds is None:
    return ''
  if seconds >= 60:
    return duration(seconds)
  return f'{seconds:.1f} s' if seconds >= 1 else f'{1e3 * seconds:.3g} ms'


def duration(seconds: float | None) -> str:
  """Returns '0:41', '12:40', '3:21:10' or '2d 03:21'; '-' for None."""
  if seconds is None or not math.isfinite(seconds):
    return '-'
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  days, hour = divmod(hours, 24)
  if days:
    return f'{days}d {hour:02}:{minute:02}'
  if hours:
    return f'{hours}:{minute:02}:{second:02}'
  return f'{minute}:{second:02}'


def minutes(bounds: tuple[float, float]) -> str:
  """Returns a range of minutes as '30 min' or '1-2 h'."""
  low, high = bounds
  if low == high:
    return f'{low:g} min'
  return f'{low / 60:g}-{high / 60:g} h'


def hours(hours: float) -> str:
  """Returns '12 s', '7.5 min' or '31.2 h'."""
  for size, unit, digits in ((1, 'h', 1), (1 / 60, 'min', 1)):
    if hours >= size:
      return f'{hours / size:,.{digits}f} {unit}'
  return f'{3600 * hours:.0f} s'


def cost(cost: float | None) -> str:
  """Returns '412' or '0.31'; '' for None."""
  if cost is None:
    return ''
  return f'{cost:,.0f}' if cost >= 10 else f'{cost:.2f}'


def cell(field: str, values: Mapping[str, Any]) -> str:
  """Returns one value of a row or of a step's metrics as people read it."""
  value = values.get(field)
  if not is_number(value):
    return '-'
  if field == 'seconds':
    return duration(value)
  if field.endswith(('top1', 'top5', 'input_wait')):
    return percent(value)
  if field == 'learning_rate':
    return f'{value:.2e}'
  if field.endswith('_memory'):
    return f'{value / 1e9:.2f} GB' if value < 1e10 else f'{value / 1e9:.1f} GB'
  if field == 'images_per_second':
    return f'{value:,.0f}' if value >= 100 else f'{value:.1f}'
  return f'{value:.4f}' if value < 100 else f'{value:.4g}'

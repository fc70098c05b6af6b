"""The axes of a ladder's charts: epochs, stage after stage, and values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.ticker
import numpy as np

from jaxprog import formats

# x in epochs of the whole ladder, and a value or None where there is none.
Point = tuple[float, float | None]

# Above this ratio of its extremes an axis may be logarithmic, and one that is
# shows so many decades: one-cycle ends millions below its peak.
LOG_RATIO = 20.0
_LOG_DECADES = 5
# Percent of top-1 above which errors are what can be compared.
_ERRORS_FROM = 90.0


class Scale(NamedTuple):
  """A range of values along an axis."""

  low: float
  high: float
  log: bool = False
  # Of accuracies in percent: the least error that is told from none. Equal
  # factors of the error then lie at equal distances; 0: they do not.
  least_error: float = 0.0

  def at(self, value: float) -> float:
    """Returns where `value` lies, from 0 at `low` to 1 at `high`."""
    if self.least_error:
      errors = (100 - self.low, 100 - value, 100 - self.high)
      low, here, high = (math.log(max(x, self.least_error)) for x in errors)
      return (low - here) / (low - high)
    if self.log:
      low, high = math.log(self.low), math.log(self.high)
      return (math.log(max(value, self.low)) - low) / (high - low)
    return (value - self.low) / (self.high - self.low)

  def ticks(self, count: int = 4) -> list[float]:
    """Returns round numbers within it, about `count`; powers of ten if log."""
    if self.least_error:
      return self._error_ticks()
    few = self.log and self.high < 100 * self.low
    locator = (
      matplotlib.ticker.LogLocator(subs=(1, 2, 5) if few else (1,), numticks=99)
      if self.log
      else matplotlib.ticker.MaxNLocator(count, steps=(1, 2, 5, 10))
    )
    return [
      float(x)
      for x in locator.tick_values(self.low, self.high)
      if 0.999 * self.low <= x <= 1.001 * self.high
    ]

  def _error_ticks(self) -> list[float]:
    """Returns accuracies with round errors that are not too close."""
    found: list[float] = []
    for error in (
      0.0,
      *(x * 10.0**i for x in (1, 5, 2) for i in (2, 1, 0, -1)),
    ):
      at = self.at(100 - error)
      if 0 <= at <= 1.001 and all(abs(at - self.at(x)) > 0.09 for x in found):
        found.append(100 - error)
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class Span:
  """The part of the axis that belongs to a stage."""

  stage: Mapping[str, Any]
  # 1 for the first stage of the history, those without rows included.
  number: int
  begin: float
  end: float

  @property
  def name(self) -> str:
    """The stage's, after its number."""
    return f'{self.number} {self.stage["name"]}'

  def points(self, field: str, scale: float = 1.0) -> list[Point]:
    """Returns a point for each row; one without a finite number has None."""
    rows = ((row['epoch'], row.get(field)) for row in self.stage['epochs'])
    return [
      (self.begin + float(x), scale * y if formats.is_number(y) else None)
      for x, y in rows
    ]

  def rates(self) -> list[Point]:
    """Returns from where on each learning rate holds, and the span's end.

    Of an epoch it is the last one where nothing closer is known.
    """
    held = [(x - 1, y) for x, y in self.points('learning_rate')]
    if rates := self.stage.get('learning_rates'):
      part = self.stage['num_epochs'] / len(rates)
      steps = ((self.begin + i * part, y) for i, y in enumerate(rates))
      held = [(x, y) for x, y in steps if x < self.end]
    return [*held, (self.end, held[-1][1])]

  def position(self, step: float) -> float:
    """Returns where the global `step` lies, at the nearest end if outside."""
    rows = self.stage['epochs']
    steps = [self.first_step(), *(row['global_step'] for row in rows)]
    epochs = [0.0, *(row['epoch'] for row in rows)]
    return self.begin + float(np.interp(step, steps, epochs))

  def first_step(self) -> int:
    """Returns the global step before the stage's first one."""
    if (first := self.stage.get('first_step')) is not None:
      return first
    row = self.stage['epochs'][0]
    per_epoch = self.stage['steps_per_epoch']
    # A stage shorter than one epoch has one row of fewer steps.
    steps = row['epoch'] * per_epoch * min(1.0, self.stage['num_epochs'])
    return max(0, round(row['global_step'] - steps))


def spans(stages: Sequence[Mapping[str, Any]]) -> list[Span]:
  """Returns the stages that have rows, end to end."""
  found, begin = [], 0.0
  for number, stage in enumerate(stages, 1):
    if stage['epochs']:
      end = begin + stage['epochs'][-1]['epoch']
      found.append(Span(stage, number, begin, end))
      begin = end
  return found


def fit_rates(spans: Sequence[Span]) -> Scale:
  """Returns a scale of the learning rates of `spans`, 0 to the highest.

  Logarithmic where the stages' peaks are far apart, down to a hundredth of the
  lowest: how a schedule ends would take all of it.
  """
  values = [[y for _, y in x.rates() if y is not None] for x in spans]
  peaks = [max(x) for x in values if x and max(x) > 0]
  if peaks and max(peaks) > LOG_RATIO * min(peaks):
    return Scale(min(peaks) / 100, 2 * max(peaks), log=True)
  return fit_scale(peaks)


def fit_top1(values: Sequence[float], num_images: int) -> Scale:
  """Returns a scale on which accuracies in percent can be told apart.

  From 90% on they are told by their errors, down to half an image of
  `num_images`.
  """
  if not values:
    return Scale(0.0, 100.0)
  low, best = min(values), max(values)
  if best > _ERRORS_FROM:
    least = 50 / max(num_images, 1)
    top = 100 - max(100 - best, least) / 1.5
    # Of few images that are all right, the least that is wrong is shown too.
    low = max(0.0, min(low - 2, 100 - 3 * least))
    return Scale(low, top, least_error=least / 1.5)
  low = max(0.0, low - 0.1 * (best - low))
  return Scale(low, best + 0.05 * (best - low) + 0.1)


def fit_scale(values: Sequence[float], *, log: bool = False) -> Scale:
  """Returns a scale from 0 to a little above `values`.

  With `log` it is logarithmic if they are positive and far apart.
  """
  top = max(values, default=0.0) or 1.0
  positive = [x for x in values if x > 0]
  if log and positive and top > LOG_RATIO * min(positive):
    return Scale(
      max(min(positive), top / 10**_LOG_DECADES) / 1.5, top * 1.5, True
    )
  return Scale(min(0.0, *values, 0.0), top * 1.08)

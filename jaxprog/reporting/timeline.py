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

  def ticks(self, count: int = 4) -> list[float]:
    """Returns round numbers within it, about `count`; powers of ten if log."""
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
    """Returns a point for each row; one without a finite number has None.

    Of the learning rate they are as close as it was sampled.
    """
    stage = self.stage
    at = [row['epoch'] for row in stage['epochs']]
    values = [row.get(field) for row in stage['epochs']]
    rates = stage.get('learning_rates') or []
    if field == 'learning_rate' and len(rates) > 1:
      at = np.linspace(0, stage['num_epochs'], len(rates)).tolist()
      values = rates
    return [
      (self.begin + float(x), scale * y if formats.is_number(y) else None)
      for x, y in zip(at, values, strict=True)
      if x <= self.end - self.begin
    ]

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

  def segments(self, field: str) -> list[tuple[float, float, Any]]:
    """Returns begin, end and value of `field` as the stage's phases set it."""
    found = [[self.begin, self.end, self.stage[field]]]
    for from_epoch, changes in self.stage.get('phases') or ():
      at = self.begin + from_epoch
      if field in changes and at < self.end:
        found[-1][1] = at
        found.append([at, self.end, changes[field]])
    return [(begin, end, value) for begin, end, value in found]


def spans(stages: Sequence[Mapping[str, Any]]) -> list[Span]:
  """Returns the stages that have rows, end to end."""
  found, begin = [], 0.0
  for number, stage in enumerate(stages, 1):
    if stage['epochs']:
      end = begin + stage['epochs'][-1]['epoch']
      found.append(Span(stage, number, begin, end))
      begin = end
  return found


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

"""The common axis of a ladder's charts: epochs, one stage after the other."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprog import formats

# x in epochs of the whole ladder, and a value or None where there is none.
Point = tuple[float, float | None]


@dataclasses.dataclass(frozen=True)
class Span:
  """The part of the axis that belongs to a stage."""

  stage: Mapping[str, Any]
  # 1 for the first stage of the history, those without rows included.
  number: int
  begin: float
  end: float

  def points(self, field: str, scale: float = 1.0) -> list[Point]:
    """Returns a point for each row; one without a finite number has None."""
    return [
      (self.begin + row['epoch'], _scaled(row.get(field), scale))
      for row in self.stage['epochs']
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

  def rates(self) -> list[Point]:
    """Returns the learning rate as sampled, else after each epoch."""
    rates = self.stage.get('learning_rates') or ()
    if len(rates) < 2:
      return self.points('learning_rate')
    length = self.stage['num_epochs']
    at = np.linspace(0, length, len(rates))
    return [
      (self.begin + float(x), _scaled(rate, 1.0))
      for x, rate in zip(at, rates, strict=True)
      if x <= self.end - self.begin
    ]

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


def _scaled(value: float | None, scale: float) -> float | None:
  return scale * value if formats.is_number(value) else None

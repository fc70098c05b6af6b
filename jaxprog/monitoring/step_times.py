"""How long steps take: a histogram that a checkpoint can hold."""

import math
import time
from collections.abc import Callable, Sequence

# Bins to a factor of two: each is 19% wider than the one before.
_BINS_PER_OCTAVE = 4


class StepTimes:
  """Counts the seconds from step to step of a loop that waits for its devices.

  They are those of the slowest of what goes on side by side: the device, the
  input, the host; and a save, where it blocks. The first step after `pause`
  has none before it and is not counted.
  """

  def __init__(
    self,
    histogram: Sequence[Sequence[float]] = (),
    clock: Callable[[], float] = time.monotonic,
  ):
    """Goes on from `histogram`, as `histogram()` has returned it."""
    self._counts = {edge: int(count) for edge, count in histogram}
    self._clock = clock
    self._last: float | None = None
    self._seconds, self._steps = 0.0, 0

  def pause(self) -> None:
    """Lets what goes on until the next step count for nothing."""
    self._last = None

  def step(self) -> None:
    """Counts a step: the loop has done all that it does for one."""
    now = self._clock()
    if self._last is not None:
      seconds = now - self._last
      edge = _upper_edge(seconds)
      self._counts[edge] = self._counts.get(edge, 0) + 1
      self._seconds, self._steps = self._seconds + seconds, self._steps + 1
    self._last = now

  def histogram(self) -> list[list[float]]:
    """Returns [upper edge in seconds, count] of each bin that is not empty."""
    return [[edge, self._counts[edge]] for edge in sorted(self._counts)]

  def take_mean(self) -> float | None:
    """Returns the mean since the last call, None if no step was counted."""
    mean = self._seconds / self._steps if self._steps else None
    self._seconds, self._steps = 0.0, 0
    return mean


def _upper_edge(seconds: float) -> float:
  """Returns the end of the bin (edge / 2**0.25, edge] that `seconds` are in."""
  octaves = math.log2(max(seconds, 1e-6))
  return 2.0 ** (math.ceil(octaves * _BINS_PER_OCTAVE) / _BINS_PER_OCTAVE)

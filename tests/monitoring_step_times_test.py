import json

import pytest

from jaxprog.monitoring import step_times


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def count(times, clock, seconds):
  for x in seconds:
    clock.now += x
    times.step()


def test_intervals_fall_into_bins_of_a_constant_ratio():
  clock = Clock()
  times = step_times.StepTimes(clock=clock)
  # 1 s ends a bin; the next ones end at 2**0.25 = 1.189 s and 1.414 s.
  count(times, clock, [50.0, 1.0, 1.01, 1.18, 1.2, 0.9])
  assert times.histogram() == [
    [pytest.approx(1.0), 2],
    [pytest.approx(2**0.25), 2],
    [pytest.approx(2**0.5), 1],
  ]
  assert times.take_mean() == pytest.approx(5.29 / 5)
  assert times.take_mean() is None


def test_a_pause_is_no_step():
  clock = Clock()
  times = step_times.StepTimes(clock=clock)
  count(times, clock, [1.0, 1.0])
  times.pause()
  count(times, clock, [900.0, 1.0])
  assert times.histogram() == [[1.0, 2]]


def test_a_resumed_histogram_goes_on():
  clock = Clock()
  times = step_times.StepTimes(clock=clock)
  count(times, clock, [0.0, 0.3, 0.31, 0.07])
  saved = json.loads(json.dumps(times.histogram()))
  again = step_times.StepTimes(saved, clock=clock)
  count(again, clock, [0.0, 0.3])
  before, after = (sum(n for _, n in x) for x in (saved, again.histogram()))
  assert (before, after) == (3, 4)
  assert len(again.histogram()) == len(saved)

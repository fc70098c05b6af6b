"""A comparison that is not over, as others see it."""

import pytest

from jaxprog.comparison import under_way


@pytest.mark.parametrize(
  ('left', 'waiting', 'seconds'),
  [
    ((), (), 0.0),
    ((5.0,), (), 5.0),
    # One by one.
    ((5.0,), (10.0, 20.0), 35.0),
    ((), (10.0, 20.0), 30.0),
    # One place has runs to 13 and 23, the other one to 15.
    ((5.0, 3.0), (10.0, 10.0, 10.0), 23.0),
    # What is longest ends last, whatever there is besides.
    ((100.0, 1.0), (10.0, 10.0), 100.0),
  ],
)
def test_runs_begin_where_others_end(left, waiting, seconds):
  assert under_way.expect(left, waiting) == seconds

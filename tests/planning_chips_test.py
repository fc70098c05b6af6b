"""Chips that are not here: what is asked for, and times told from bytes."""

import pytest

from jaxprog import errors
from jaxprog.planning import chips
from jaxprog.tools import plan
from jaxprog.training import xla_flags


def test_a_topology_is_a_grid_of_chips_on_hosts():
  asked = chips.parse_topology('v5e:4x8')
  assert (asked.num_chips, asked.num_hosts) == (32, 8)
  assert asked.cores_per_chip == 112 / 4
  assert chips.parse_topology('v5p:2x2x4').num_chips == 16
  assert chips.parse_topology('h100:8').num_hosts == 1


def test_a_host_that_is_not_full_has_more_cores_for_each_chip():
  assert chips.parse_topology('v5e:1x1').cores_per_chip == 112


@pytest.mark.parametrize(
  ('text', 'what', 'suggestion'),
  [
    ('', 'There is no --topology', 'v5e:2x2'),
    ('v5x:2x2', "Unknown chip 'v5x'", "'v5p'"),
    ('v5e:4', "'4' is no number of v5e", 'v5e:2x2'),
    ('v5p:2x2', 'v5p:NxNxN', 'v5p:2x2x2'),
    ('v5e:0x2', "'0x2'", 'v5e:2x2'),
    ('v5e', "''", 'v5e:2x2'),
    ('h100:16', 'more than one machine', 'h100:8'),
  ],
)
def test_what_is_no_topology_is_refused_in_three_lines(text, what, suggestion):
  with pytest.raises(errors.UserError) as caught:
    chips.parse_topology(text)
  assert what in caught.value.what
  assert suggestion in caught.value.suggestion


def test_a_sum_takes_two_passes_of_the_bytes_and_two_of_the_grid():
  asked = chips.parse_topology('v5e:4x4')
  chip = asked.chip
  # 4 + 4 hops to the farthest chip of two rings and back.
  hop = 2 * 8 * chip.hop_seconds
  moved = 2 * 15 / 16 * 1e8 / chip.network_rate
  assert asked.reduce_seconds(1e8, 3) == pytest.approx(moved + 3 * hop)


def test_what_fits_on_a_gpu_is_what_a_run_started_here_takes(monkeypatch):
  asked, names = chips.parse_topology('h100:1'), xla_flags._MEMORY
  for name in names:
    monkeypatch.setenv(name, '')
  assert asked.chip.usable_bytes == 0.9 * asked.chip.memory_bytes
  xla_flags.use('none')
  assert asked.chip.usable_bytes == 0.9 * asked.chip.memory_bytes
  figures = {'chip_hour_price': 0, 'utilization': 0.38}
  assert 'of 76 GB that a run may allocate' in plan._explain(figures, asked)
  for name, other in (names, names[::-1]):  # A user's own.
    monkeypatch.setenv(name, '0.5')
    monkeypatch.setenv(other, '')
    xla_flags.use('none')
    assert asked.chip.usable_bytes == 0.5 * asked.chip.memory_bytes
  monkeypatch.setenv(name, 'half')
  with pytest.raises(errors.UserError, match='no part of the memory'):
    _ = asked.chip.usable_bytes
  tpu = chips.parse_topology('v5e:1x1').chip
  assert tpu.usable_bytes == tpu.memory_bytes


def test_a_single_chip_exchanges_nothing():
  assert chips.parse_topology('v5e:1x1').reduce_seconds(1e9, 100) == 0


def test_a_missing_compiler_is_said_with_what_to_install():
  # No plugin for NVIDIA GPUs is among what the tests install.
  with pytest.raises(errors.UserError) as caught:
    chips.create_mesh(chips.parse_topology('h100:2'))
  assert 'NVIDIA H100 is not installed' in caught.value.what
  assert "'.[cuda]'" in caught.value.suggestion

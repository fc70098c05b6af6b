"""Hardware that a step can be compiled for without having it.

Figures are the makers': Cloud TPU's pages "TPU v4", "v5e", "v5p" and "v6e",
NVIDIA's data sheets "A100" (SXM, 40 GB) and "H100" (SXM), their memory as CUDA
reports it, and the number of vCPUs of the machine types that hold them on
Google Cloud (ct4p, ct5lp, ct5p, ct6e, a2-highgpu-8g, a3-highgpu-8g).
"""

import math
import os
import re
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxprog import errors
from jaxprog.training import xla_flags


class Chip(NamedTuple):
  """What one chip does in a second, and what stands around it."""

  # Of jax.Device.
  device_kind: str
  platform: str
  # FLOPs a second of matrix products: bf16; and as f32 is computed by default
  # (on TPU in bf16 too, on GPU in TF32).
  bf16_flops: float
  f32_flops: float
  memory_bytes: float
  # Bytes a second: from and to its memory, and to its neighbours over all
  # links, one way.
  memory_rate: float
  network_rate: float
  # Seconds that a message takes from a chip to the next.
  hop_seconds: float
  chips_per_host: int
  host_cores: int
  # Of the grid of chips; 0: all are one hop apart.
  dimensions: int

  @property
  def usable_bytes(self) -> float:
    """What a run may allocate of the memory."""
    part = xla_flags.memory_part() if self.platform == 'cuda' else 1.0
    return part * self.memory_bytes


_CHIPS = {
  'a100': Chip(
    'NVIDIA A100', 'cuda', 312e12, 156e12, 42.4e9, 1555e9, 300e9, 2e-6, 8, 96, 0
  ),
  'h100': Chip(
    'NVIDIA H100',
    'cuda',
    989e12,
    495e12,
    84.9e9,
    3350e9,
    450e9,
    2e-6,
    8,
    208,
    0,
  ),
  'v4': Chip(
    'TPU v4', 'tpu', 275e12, 275e12, 32e9, 1228e9, 300e9, 1e-6, 4, 240, 3
  ),
  'v5e': Chip(
    'TPU v5 lite', 'tpu', 197e12, 197e12, 16e9, 819e9, 200e9, 1e-6, 4, 112, 2
  ),
  'v5p': Chip(
    'TPU v5', 'tpu', 459e12, 459e12, 95e9, 2765e9, 600e9, 1e-6, 4, 208, 3
  ),
  'v6e': Chip(
    'TPU v6 lite', 'tpu', 918e12, 918e12, 32e9, 1638e9, 400e9, 1e-6, 4, 180, 2
  ),
}
# The part of the rates that a step reaches, as published of TPU v3 and measured
# on an H100, and the seconds that each of its kernels takes besides there
# (docs/plan.md).
UTILIZATION = {'tpu': 0.7, 'cuda': 0.8}
KERNEL_SECONDS = {'tpu': 0.0, 'cuda': 6.2e-6}
# libtpu asks a cloud's servers what it runs on, complains if nobody answers,
# and lets one process in: none of it is of use where there is no TPU.
_WITHOUT_A_TPU = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}
_EXAMPLES = 'v5e:2x2, v6e:4x4, v4:2x2x1, v5p:2x2x2, h100:8 or a100:8'


class Topology(NamedTuple):
  """Some chips of a kind, and how they lie."""

  # 'v5e:4x4'.
  name: str
  chip: Chip
  sides: tuple[int, ...]

  @property
  def num_chips(self) -> int:
    """All chips; each is one device."""
    return math.prod(self.sides)

  @property
  def num_hosts(self) -> int:
    """The machines that hold them."""
    return math.ceil(self.num_chips / self.chip.chips_per_host)

  @property
  def cores_per_chip(self) -> float:
    """Cores of the hosts over all chips."""
    a_host = min(self.num_chips, self.chip.chips_per_host)
    return self.chip.host_cores / a_host

  @property
  def hops(self) -> int:
    """From one chip to the farthest and back, each side being a ring."""
    if not self.chip.dimensions:
      return min(self.num_chips, 2)
    return 2 * sum(side // 2 for side in self.sides)

  def reduce_seconds(self, num_bytes: float, collectives: int) -> float:
    """Returns what sums of `num_bytes` over all chips take, in all.

    Each byte goes through each link twice, once to be added and once to be
    told; and every collective waits for the farthest chip, twice.
    """
    n = self.num_chips
    if n == 1:
      return 0.0
    moving = 2 * (n - 1) / n * num_bytes / self.chip.network_rate
    return moving + 2 * collectives * self.hops * self.chip.hop_seconds


def parse_topology(text: str) -> Topology:
  """Returns what 'v5e:4x4' or 'h100:8' asks for.

  Raises:
    UserError: for an unknown chip or a grid that it does not come in.
  """
  name, _, grid = text.partition(':')
  chip = _CHIPS.get(name)
  if chip is None:
    raise errors.UserError(
      f'Unknown chip {name!r}.' if name else 'There is no --topology.',
      f'--topology={text}',
      errors.did_you_mean(name, _CHIPS) if name else f'Write {_EXAMPLES}.',
    )
  match = re.fullmatch(r'[1-9]\d{0,3}(x[1-9]\d{0,3})*', grid)
  sides = tuple(map(int, grid.split('x'))) if match else ()
  if len(sides) != max(chip.dimensions, 1):
    wanted = 'x'.join('N' * max(chip.dimensions, 1))
    raise errors.UserError(
      f'{grid!r} is no number of {name}: it comes as {name}:{wanted}.',
      f'--topology={text}',
      f'Write {_EXAMPLES}.',
    )
  if chip.platform == 'cuda' and sides[0] > chip.chips_per_host:
    raise errors.UserError(
      f'{sides[0]} GPUs are more than one machine has; only one is planned.',
      f'--topology={text}',
      f'Write {name}:{chip.chips_per_host}.',
    )
  return Topology(text, chip, sides)


def create_mesh(topology: Topology) -> Mesh:
  """Returns devices to compile for, along the axis `data`.

  Nothing of this machine's own devices is touched.

  Raises:
    UserError: if what compiles for them is not installed, or refuses them.
  """
  try:
    found = _describe(topology)
  except (NotImplementedError, RuntimeError, ValueError) as e:
    raise _refused(topology, e) from None
  return Mesh(np.asarray(found.devices), ('data',), axis_types=(AxisType.Auto,))


def _describe(topology: Topology) -> Any:
  if topology.chip.platform == 'tpu':
    for name, value in _WITHOUT_A_TPU.items():
      os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.num_chips < topology.chip.chips_per_host:
      sides = (*topology.sides, 1, 1)[:3]
      options['chips_per_host_bounds'] = sides
    if topology.name.startswith('v4:'):
      options['chip_config_name'] = 'megacore'  # A chip is one device.
    return topologies.get_topology_desc(topology.name, 'tpu', **options)
  name = topology.name.partition(':')[0]
  return topologies.get_topology_desc(
    '',
    'cuda',
    target_config=_TARGETS[name],
    topology=f'1x1x{topology.num_chips}',
  )


def _refused(topology: Topology, error: Exception) -> errors.UserError:
  """Returns what a user can do about `error`."""
  where = f'--topology={topology.name}'
  missing, package = isinstance(error, NotImplementedError), 'cuda'
  if topology.chip.platform == 'tpu':
    missing, package = 'not installed' in str(error), 'tpu'
  if missing:
    return errors.UserError(
      f'The compiler for {topology.chip.device_kind} is not installed.',
      where,
      f"pip install --editable '.[{package}]' (no such hardware is needed).",
    )
  message = ' '.join(str(error).split())[:200]
  return errors.UserError(
    f'{topology.name} cannot be compiled for: {message}',
    where,
    f'Write {_EXAMPLES}.',
  )


# XLA's GpuTargetConfigProto, as text: what GPUs have in common, and their own.
_TARGET = """
  gpu_device_info {
    threads_per_block_limit: 1024
    threads_per_warp: 32
    threads_per_core_limit: 2048
    shared_memory_per_block: 49152
    block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535
    block_dim_limit_z: 65535
    registers_per_core_limit: 65536
    registers_per_block_limit: 65536
    %s
  }
  platform_name: "CUDA"
  dnn_version_info { major: 9 minor: 10 }
  device_description_str: "%s"
"""
_A100 = """
    cuda_compute_capability { major: 8 }
    core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
    memory_bandwidth: 1555000000000 device_memory_size: 42410000000
    l2_cache_size: 41943040
    shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
"""
_H100 = """
    cuda_compute_capability { major: 9 }
    core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
    memory_bandwidth: 3350000000000 device_memory_size: 84900000000
    l2_cache_size: 52428800
    shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
"""
_TARGETS = {
  'a100': _TARGET % (_A100, 'NVIDIA A100-SXM4-40GB'),
  'h100': _TARGET % (_H100, 'NVIDIA H100 80GB HBM3'),
}

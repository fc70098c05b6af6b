"""Shows what a ladder needs and takes on hardware that is not here."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import rich.console
from ml_collections import config_dict

from jaxprog import buckets, files, formats, paths
from jaxprog.planning import chips, elsewhere, outlook
from jaxprog.reliability import copies
from jaxprog.reporting.page import planned
from jaxprog.training import preflight

FILE = 'hardware_plan.json'


@copies.in_bucket(weights=False)
def plan(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None = None,
  *,
  topology: str,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns what each stage of `config` takes on `topology` ('v5e:4x4').

  Prints it as tables; saves it as WORKDIR/hardware_plan.json where there is a
  `workdir`. Datasets that are not here count as published. The compiler for
  TPUs is told that there are none here: a process that is to train on one
  afterwards should not plan.

  Raises:
    UserError: for a mistake in the config or the topology, for a dataset that
      neither is here nor has known counts, or if the compiler is missing.
  """
  workdir = None if workdir is None else paths.workdir(workdir)
  asked = chips.parse_topology(topology)
  if workdir:
    preflight.check_workdir(workdir)
  console = rich.console.Console(markup=False)
  setup = elsewhere.create_setup(config, asked, only, skip)
  say = functools.partial(outlook.say, console=console)
  outlooks = elsewhere.look_ahead(setup, asked, say)
  stages = [x.figures() for x in outlooks]
  figures = {
    'topology': asked.name,
    'device_kind': asked.chip.device_kind,
    'num_chips': asked.num_chips,
    'num_hosts': asked.num_hosts,
    'model': config.model,
    'utilization': stages[0]['utilization'],
    'chip_hour_price': config.chip_hour_price,
    'stages': stages,
    'hours': outlook.total(stages, 'hours'),
    'cost': outlook.total(stages, 'cost'),
    'notes': outlook.notes(outlooks),
  }
  _show(figures, asked, console)
  if workdir:
    path = workdir / FILE
    files.write_json(path, figures)
    console.print(f'\n{buckets.shown(path)}', highlight=False, soft_wrap=True)
  return figures


def _show(
  figures: dict[str, Any],
  topology: chips.Topology,
  console: rich.console.Console,
) -> None:
  outlook.say(
    f'\n{figures["model"]} on {topology.name}: {topology.num_chips} x '
    f'{topology.chip.device_kind}, {topology.num_hosts} '
    f'host{"s" if topology.num_hosts > 1 else ""} (compiled, not run)',
    console,
    'bold',
  )
  took = formats.hours(figures['hours']), formats.cost(figures['cost'])
  for columns, last in (
    (planned.NEEDS, ()),
    (planned.TAKES, ('ladder', *[''] * (len(planned.TAKES) - 3), *took)),
  ):
    titles = [x.title for x in columns]
    rows = [
      [str(x.cell(stage)) for x in columns] for stage in figures['stages']
    ]
    console.print()
    console.print(outlook.create_table(titles, rows, last))
  console.print()
  for note in figures['notes']:
    outlook.say(note, console)
  outlook.say(_explain(figures, topology), console, 'dim')


def _explain(figures: dict[str, Any], topology: chips.Topology) -> str:
  """Returns what the figures are, and what they assume."""
  chip = topology.chip
  price = (
    '' if figures['chip_hour_price'] else ' Set chip_hour_price for a cost.'
  )
  each = chips.KERNEL_SECONDS[chip.platform]
  kernels = f', and {1e6 * each:g} microseconds a kernel' if each else ''
  return (
    'HBM: arguments, results and temporaries of the compiled step on one chip, '
    f'of {chip.usable_bytes / 1e9:.0f} GB that a run may allocate. largest: '
    'batch that would fit. sums: exchanges between chips a step, and their '
    'bytes. FLOPs and traffic (HBM bytes read and written): of one image in '
    'training. images/s: of one '
    f'chip at {figures["utilization"]:.0%} of {chip.bf16_flops / 1e12:.0f} '
    f'TFLOP/s and {chip.memory_rate / 1e9:,.0f} GB/s, exchanges added '
    f'({chip.network_rate / 1e9:.0f} GB/s){kernels}. cores: of '
    f'the host for each chip, which has {topology.cores_per_chip:g}. hours: '
    f'with evaluations, without compilation.{price}'
  )

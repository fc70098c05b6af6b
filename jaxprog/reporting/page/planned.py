"""The section on what was planned for other hardware."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from jaxprog import formats
from jaxprog.reporting.parts import Column, Part, Table, Words
from jaxprog.reporting.rundir import RunFiles


def _largest(stage: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the step that needs most memory."""
  return max(stage['steps'], key=lambda step: step['memory_bytes'])


# What a step needs of a chip, and what the stages take.
NEEDS = (
  Column('stage', lambda x: x['name'], left=True),
  Column('px', lambda x: f'{_largest(x)["image_size"]}'),
  Column('batch', lambda x: f'{_largest(x)["batch_size"]:,}'),
  Column('a chip', lambda x: f'{_largest(x)["batch_size"] / x["num_chips"]:g}'),
  Column('HBM', lambda x: formats.size(_largest(x)['memory_bytes'])),
  Column('fits', lambda x: 'yes' if x['fits'] else 'NO'),
  Column('largest', lambda x: f'~{x["largest_batch"]:,}'),
  Column('sums', lambda x: f'{_largest(x)["collectives"] or "-"}'),
  Column(
    'of',
    lambda x: formats.size(_largest(x)['collective_bytes'] or None) or '-',
  ),
)
TAKES = (
  Column('stage', lambda x: x['name'], left=True),
  Column('FLOPs', lambda x: formats.flops(x['flops_per_image'])),
  Column('traffic', lambda x: formats.size(x['traffic_per_image'])),
  Column('bound by', lambda x: x['bound_by']),
  Column('images/s', lambda x: f'{x["images_per_second"]:,.0f}'),
  Column('cores', lambda x: f'{x["cores_needed"]:.1f}'),
  Column('hours', lambda x: formats.hours(x['hours'])),
  Column('cost', lambda x: formats.cost(x['cost'])),
)
# Of a stage's plan and its record.
_MEASURED = (
  Column('stage', lambda x: x[1]['name'], left=True),
  Column('images/s a chip', lambda x: f'{_chip_rate(*x):,.0f}'),
  Column('planned', lambda x: f'{x[0]["images_per_second"]:,.0f}'),
  Column(
    'ratio', lambda x: f'{_chip_rate(*x) / x[0]["images_per_second"]:.2f}x'
  ),
  Column('hours', lambda x: formats.hours(x[1]['seconds'] / 3600)),
  Column('planned', lambda x: formats.hours(x[0]['hours'])),
)


def planned(run: RunFiles) -> Iterator[Part]:
  """Yields the plan, beside what was measured where the run used such chips.

  Nothing if --mode=plan was never asked in this workdir.
  """
  plan = run.hardware_plan
  if plan is None:
    return
  yield (
    f'Compiled for {plan["topology"]} ({plan["num_chips"]} x '
    f'{plan["device_kind"]}), not run: times are {plan["utilization"]:.0%} of '
    "the chip's published rates. HBM, images/s and cores are those of a chip, "
    'FLOPs and traffic those of an image; sums are exchanges between chips in '
    'a step.'
  )
  name = f'{plan["model"]} on {plan["topology"]}'
  yield Table(NEEDS, plan['stages'], f'{name}: what a step needs')
  yield Table(TAKES, plan['stages'], f'{name}: what a stage takes')
  devices = (run.environment or {}).get('devices') or {}
  kind, count = devices.get('kind'), devices.get('count')
  if count == plan['num_chips'] and _is_kind(kind, plan['device_kind']):
    trained = {stage['name']: stage for stage in run.stages if stage['epochs']}
    found = [
      (x, trained[x['name']]) for x in plan['stages'] if x['name'] in trained
    ]
    yield Words(['Planned against measured:'])
    yield Table(_MEASURED, found, 'Planned against measured')
  else:
    yield (
      f'This run used {count or "?"} x {kind or "unknown devices"}: nothing to '
      'hold the plan against.'
    )
  if plan['notes']:
    yield plan['notes']


def _chip_rate(plan: Mapping[str, Any], stage: Mapping[str, Any]) -> float:
  """Returns the mean of images/s a chip over the epochs of a stage."""
  rates = [row['images_per_second'] for row in stage['epochs']]
  return statistics.mean(rates) / plan['num_chips']


def _is_kind(kind: str | None, wanted: str) -> bool:
  """Returns whether devices are those planned; GPUs add their memory."""
  longer = wanted.startswith('NVIDIA') and (kind or '').startswith(wanted)
  return kind == wanted or longer

"""The report's section on what was planned for other hardware."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.reporting import facts
from jaxprog.reporting.page import markup
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles

_PLAN_TITLES = (
  'stage',
  'batch',
  'HBM',
  'fits',
  'FLOPs an image',
  'traffic an image',
  'bound by',
  'images/s a chip',
  'cores a chip',
  'hours',
  'cost',
)


def planned(run: RunFiles) -> Html:
  """Returns the plan, beside what was measured where the run used such chips.

  Nothing if --mode=plan was never asked in this workdir.
  """
  plan = run.hardware_plan
  if plan is None:
    return Html('')
  return join(
    tag(
      'p',
      f'Compiled for {plan["topology"]} ({plan["num_chips"]} x '
      f'{plan["device_kind"]}), not run: times are '
      f'{plan["utilization"]:.0%} of the chip’s published rates.',
      class_='note',
    ),
    markup.table(
      list(_PLAN_TITLES),
      [_plan_row(stage) for stage in plan['stages']],
      caption=f'{plan["model"]} on {plan["topology"]}',
      left=(0, 3, 6),
    ),
    _measured(run, plan),
    tag('ul', *(tag('li', x) for x in plan['notes']), class_='notes')
    if plan['notes']
    else None,
  )


def _plan_row(stage: Mapping[str, Any]) -> list[str]:
  largest = max(stage['steps'], key=lambda step: step['memory_bytes'])
  return [
    stage['name'],
    f'{largest["batch_size"]:,}',
    formats.size(largest['memory_bytes']),
    'yes' if stage['fits'] else 'NO',
    formats.flops(stage['flops_per_image']),
    formats.size(stage['traffic_per_image']),
    stage['bound_by'],
    f'{stage["images_per_second"]:,.0f}',
    f'{stage["cores_needed"]:.1f}',
    formats.hours(stage['hours']),
    formats.cost(stage['cost']),
  ]


def _measured(run: RunFiles, plan: Mapping[str, Any]) -> Html:
  """Returns planned beside measured, or why there is nothing to compare."""
  devices = (run.environment or {}).get('devices') or {}
  kind, count = devices.get('kind'), devices.get('count')
  if count != plan['num_chips'] or not _is_kind(kind, plan['device_kind']):
    return tag(
      'p',
      f'This run used {count or "?"} x {kind or "unknown devices"}: nothing to '
      'hold the plan against.',
      class_='note',
    )
  rows = list(_compare(plan['stages'], run.stages))
  titles = 'stage', 'images/s a chip', 'planned', 'ratio', 'hours', 'planned'
  return markup.table(
    list(titles), rows, caption='Planned against measured', left=(0,)
  )


def _is_kind(kind: str | None, wanted: str) -> bool:
  """Returns whether devices are those planned; GPUs add their memory."""
  longer = wanted.startswith('NVIDIA') and (kind or '').startswith(wanted)
  return kind == wanted or longer


def _compare(
  planned_stages: Sequence[Mapping[str, Any]],
  stages: Sequence[Mapping[str, Any]],
) -> Iterator[list[str]]:
  """Yields a row for each stage that was planned and trained."""
  by_name = {stage['name']: stage for stage in planned_stages}
  for stage in stages:
    if stage['name'] not in by_name or not stage['epochs']:
      continue
    found = facts.measured(by_name[stage['name']], stage)
    ratio = found['images_per_second'] / found['planned_images_per_second']
    yield [
      stage['name'],
      f'{found["images_per_second"]:,.0f}',
      f'{found["planned_images_per_second"]:,.0f}',
      f'{ratio:.2f}x',
      formats.hours(found['hours']),
      formats.hours(found['planned_hours']),
    ]

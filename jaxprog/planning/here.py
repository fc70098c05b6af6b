"""What a ladder will cost, as tables for a terminal and as plain figures."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.table
import rich.text

from jaxprog import formats
from jaxprog import stages as stages_lib
from jaxprog.reporting import facts

# Columns of the plan, in characters: names of the rows; least and most of one
# stage. So four stages are 80 wide.
_LABEL_WIDTH, _STAGE_WIDTHS = 12, (15, 28)


@dataclasses.dataclass
class StagePlan:
  """A stage beforehand; what was not counted or measured is None.

  Bytes are those of one device, seconds those of the whole run.
  """

  stage: stages_lib.Stage
  num_classes: int
  num_train_images: int
  num_eval_images: int
  total_steps: int
  num_evaluations: int
  final_learning_rate: float
  parameters: int
  # Mean over the stage's training images, gradients included.
  flops_per_image: float | None = None
  # Of the step that needs most, and whether a compiler said so.
  memory_bytes: int | None = None
  memory_compiled: bool = False
  device_bytes: int | None = None
  compile_seconds: float | None = None
  # Mean over the stage's steps, and whether it was measured.
  step_seconds: float | None = None
  step_measured: bool = False
  # Reading a batch with all cores, and what a step takes with its input.
  input_seconds: float | None = None
  fed_step_seconds: float | None = None
  # One evaluation, its input included.
  evaluation_seconds: float | None = None
  notes: list[str] = dataclasses.field(default_factory=list)

  @property
  def fits(self) -> bool | None:
    """Whether the step's memory is there, None where one is not known."""
    if self.memory_bytes is None or self.device_bytes is None:
      return None
    return self.memory_bytes <= self.device_bytes

  @property
  def seconds(self) -> float | None:
    """The stage's training and evaluations, as far as they are known."""
    a_step = self.fed_step_seconds or self.step_seconds
    if a_step is None:
      return None
    evaluations = self.num_evaluations * (self.evaluation_seconds or 0.0)
    return self.total_steps * a_step + evaluations

  def figures(self) -> dict[str, Any]:
    """Returns all of it as plain values."""
    values = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != 'stage'
    }
    stage = self.stage
    return {
      'name': stage.name,
      'dataset': stage.dataset,
      'image_size': stage.image_size,
      'eval_image_size': stage.eval_size,
      'batch_size': stage.batch_size,
      'phases': [[x.from_epoch, dict(x.changes)] for x in stage.phases],
      'num_epochs': stage.num_epochs,
      'optimizer': stage.optimizer,
      'schedule': stage.schedule,
      'peak_learning_rate': stage.peak_learning_rate,
      'augmentation': describe_augmentation(stage),
      **values,
      'fits': self.fits,
      'seconds': self.seconds,
      'comparable': is_comparable(self),
    }


def describe_augmentation(stage: stages_lib.Stage) -> str:
  """Returns what a stage does to its training images, in words."""
  parts = [f'crop {stage.min_crop_area:.0%}-100%']
  if stage.flip:
    parts.append('mirror, alternating' if stage.alternating_flip else 'mirror')
  colors = ('brightness', 'contrast', 'saturation', 'hue')
  if jitter := [
    f'{x} {getattr(stage, x):g}' for x in colors if stage.__dict__[x]
  ]:
    parts.append(' '.join(jitter))
  if stage.auto_augment == 'rand_augment':
    layers, strength = stage.rand_augment_layers, stage.rand_augment_magnitude
    parts.append(f'RandAugment {layers} x {strength}')
  elif stage.auto_augment == 'trivial_augment':
    parts.append('TrivialAugment')
  if stage.erasing_probability:
    parts.append(f'erase {stage.erasing_probability:.0%}')
  for field, name in (('mixup_alpha', 'mixup'), ('cutmix_alpha', 'cutmix')):
    if value := getattr(stage, field):
      parts.append(f'{name} {value:g}')
  if stage.label_smoothing:
    parts.append(f'labels smoothed {stage.label_smoothing:g}')
  return ', '.join(parts)


def _describe_phases(stage: stages_lib.Stage) -> str:
  """Returns what changes within a stage, '' if nothing does."""
  return '; '.join(
    f'from epoch {phase.from_epoch + 1}: '
    + ', '.join(f'{name} {value:g}' for name, value in phase.changes)
    for phase in stage.phases
  )


# Row by row: what it is called and what it says of a stage; rows that say
# nothing of any stage are left out.
_ROWS: tuple[tuple[str, Callable[[StagePlan], str]], ...] = (
  ('dataset', lambda p: p.stage.dataset),
  ('classes', lambda p: f'{p.num_classes:,}'),
  ('images', lambda p: f'{p.num_train_images:,}'),
  ('evaluated on', lambda p: f'{p.num_eval_images:,}'),
  ('px', lambda p: _describe_sizes(p.stage)),
  ('batch', lambda p: f'{p.stage.batch_size}'),
  ('epochs', lambda p: f'{p.stage.num_epochs:g}'),
  ('steps', lambda p: f'{p.total_steps:,}'),
  ('phases', lambda p: _describe_phases(p.stage)),
  ('optimizer', lambda p: p.stage.optimizer.replace('_', ' ')),
  ('schedule', lambda p: p.stage.schedule.replace('_', ' ')),
  ('peak rate', lambda p: f'{p.stage.peak_learning_rate:.3g}'),
  ('last rate', lambda p: f'{p.final_learning_rate:.2g}'),
  ('augmentation', lambda p: describe_augmentation(p.stage)),
  ('parameters', lambda p: formats.count(p.parameters)),
  ('FLOPs/image', lambda p: formats.flops(p.flops_per_image)),
  ('memory', lambda p: _about(p.memory_bytes, p.memory_compiled)),
  ('device has', lambda p: formats.size(p.device_bytes)),
  ('fits', lambda p: _describe_fit(p)),
  ('compile', lambda p: formats.seconds(p.compile_seconds)),
  ('step', lambda p: _estimated(p.step_seconds, p.step_measured)),
  ('input', lambda p: formats.seconds(p.input_seconds)),
  ('evaluation', lambda p: formats.seconds(p.evaluation_seconds)),
  ('stage takes', lambda p: _estimated(p.seconds, p.step_measured, whole=True)),
)


def plan_tables(
  plans: Sequence[StagePlan], width: int
) -> Iterator[rich.table.Table]:
  """Yields tables of the plan, a column a stage, as many as are in `width`."""
  least, most = _STAGE_WIDTHS
  number = min(len(plans), max(1, (width - _LABEL_WIDTH) // (least + 2)))
  stage_width = max(least, min(most, (width - _LABEL_WIDTH) // number - 2))
  rows = [(name, cell) for name, cell in _ROWS if any(map(cell, plans))]
  for start in range(0, len(plans), number):
    part = plans[start : start + number]
    table = create_table('stage', *(plan.stage.name for plan in part))
    table.columns[0].width = _LABEL_WIDTH
    for column in table.columns[1:]:
      column.width = stage_width
    for name, cell in rows:
      cells = [rich.text.Text(cell(plan) or '-') for plan in part]
      for text in cells:
        text.stylize('bold red' if text.plain == 'NO' else '')
      table.add_row(name, *cells)
    yield table


def notes(plans: Sequence[StagePlan]) -> list[str]:
  """Returns a sentence on each thing that the plan's figures leave open."""
  found = []
  for plan in plans:
    name = plan.stage.name
    if plan.fits is False:
      found.append(
        f'{name}: does not fit: a step needs {_about_bytes(plan)}, there are '
        f'{formats.size(plan.device_bytes)}. Set micro_batch_size, or lower '
        'batch_size or image_size.'
      )
    found += [f'{name}: {note}' for note in plan.notes]
  return found


def total_seconds(plans: Sequence[StagePlan]) -> float | None:
  """Returns what all stages take, None if one of them is not known."""
  seconds = [plan.seconds for plan in plans]
  return None if None in seconds else sum(filter(None, seconds))


def model_table(layers: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  """Returns a network group by group: output, parameters, FLOPs forward.

  Args:
    layers: name, modules, parameters, output (a shape) and flops of each.
  """
  titles = ('layers', 'output', 'parameters', 'share', 'FLOPs', 'share')
  table = create_table(*titles)
  parameters = sum(x['parameters'] for x in layers)
  flops = sum(x['flops'] for x in layers)

  def figures(row: Mapping[str, Any]) -> list[str]:
    return [
      formats.count(row['parameters']),
      f'{row["parameters"] / max(parameters, 1):.1%}',
      formats.flops(row['flops']),
      f'{row["flops"] / max(flops, 1):.1%}',
    ]

  for row in layers:
    blocks = row['name'].startswith('block')
    name = f'{row["name"]} x {row["modules"]}' if blocks else row['name']
    table.add_row(name, ' x '.join(map(str, row['output'])), *figures(row))
  total = {'parameters': parameters, 'flops': flops}
  table.add_row('total', '', *figures(total), style='bold')
  return table


def is_comparable(plan: StagePlan) -> bool | None:
  """Returns whether the mission's range speaks of what a stage will do.

  None where the mission says nothing of its dataset.
  """
  expected = facts.EXPECTATIONS.get(plan.stage.dataset)
  if expected is None:
    return None
  size = expected.num_train_images, expected.num_epochs
  return size == (plan.num_train_images, math.ceil(plan.stage.num_epochs))


def expectation_table(plans: Sequence[StagePlan]) -> rich.table.Table:
  """Returns what the scorecard will hold each stage against."""
  titles = 'stage', 'top-1', 'minutes', 'planned', 'comparable'
  table = create_table(*titles, left=(0, 4))
  for plan in plans:
    expected = facts.EXPECTATIONS.get(plan.stage.dataset)
    if expected is None:
      missing = f'no range is stated for {plan.stage.dataset}'
      table.add_row(plan.stage.name, '-', '-', '-', missing)
      continue
    minutes = dict.fromkeys(f'{x:g}' for x in expected.minutes)
    planned, about = plan.seconds, '' if plan.step_measured else '~'
    table.add_row(
      plan.stage.name,
      '-'.join(f'{x:.0%}' for x in expected.top1),
      '-'.join(minutes),
      '-' if planned is None else f'{about}{planned / 60:,.0f}',
      _describe_comparison(plan, expected),
    )
  return table


def _describe_comparison(plan: StagePlan, expected: facts.Expectation) -> str:
  if is_comparable(plan):
    return 'yes'
  return (
    f'no: stated for {expected.num_train_images:,} images, '
    f'{expected.num_epochs} epochs; here {plan.num_train_images:,}, '
    f'{plan.stage.num_epochs:g}'
  )


def create_table(*titles: str, left: Sequence[int] = (0,)) -> rich.table.Table:
  """Returns an empty table without lines, which any pipe can carry.

  Columns named in `left` are left-aligned.
  """
  table = rich.table.Table(
    box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style='bold'
  )
  for i, title in enumerate(titles):
    table.add_column(
      rich.text.Text(title),
      justify='left' if i in left else 'right',
      overflow='fold',
    )
  return table


def _describe_fit(plan: StagePlan) -> str:
  if plan.fits and not plan.memory_compiled:
    return 'probably'
  return {True: 'yes', False: 'NO', None: ''}[plan.fits]


def _describe_sizes(stage: stages_lib.Stage) -> str:
  evaluated = f', eval {stage.eval_size}'
  differs = stage.eval_size != stage.image_size
  return f'{stage.image_size}{evaluated if differs else ""}'


def _about(count: int | None, exact: bool) -> str:
  return '' if count is None else f'{"" if exact else "~"}{formats.size(count)}'


def _about_bytes(plan: StagePlan) -> str:
  return _about(plan.memory_bytes, plan.memory_compiled)


def _estimated(
  seconds: float | None, measured: bool, *, whole: bool = False
) -> str:
  if seconds is None:
    return ''
  text = formats.duration(seconds) if whole else formats.seconds(seconds)
  return text if measured else f'~{text}'

"""What a stage will need and take: figures, and tables for a terminal.

`timing` fills them in by measuring here, `elsewhere` by compiling for chips
that are not.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from jaxprog import formats
from jaxprog import stages as stages_lib
from jaxprog.monitoring import progress as progress_lib
from jaxprog.reporting import facts
from jaxprog.training import described
from jaxprog.training import setup as setup_lib

# An Outlook as plain values, as it stands in plan.json and hardware_plan.json.
Figures = Mapping[str, Any]
# Columns of a table of stages, in characters: names of the rows; least and most
# of one stage. So four stages are 80 wide.
_LABEL_WIDTH, _STAGE_WIDTHS = 12, (15, 28)


@dataclasses.dataclass
class Outlook:
  """A stage beforehand; what was neither counted nor measured is None.

  Bytes are those of one device, seconds those of the whole run.
  """

  stage: stages_lib.Stage
  # What the run itself will say of it before it starts.
  known: progress_lib.Description
  num_eval_images: int
  num_evaluations: int
  # Mean over the stage's training images, gradients included.
  flops_per_image: float | None = None
  # Of the step that needs most, and whether a compiler said so.
  memory_bytes: int | None = None
  memory_compiled: bool = False
  device_bytes: float | None = None
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
  # More figures, of chips that are elsewhere.
  chips: Figures = dataclasses.field(default_factory=dict)

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
    return (self.known.total_steps + self._passes) * a_step + evaluations

  @property
  def _passes(self) -> float:
    """What measuring statistics before evaluations takes, in steps.

    A forward pass is a third of one.
    """
    if not self.stage.is_schedule_free:
      return 0.0
    an_epoch = self.known.total_steps / self.stage.num_epochs
    batches = min(self.stage.transfer_batches, an_epoch)
    return self.num_evaluations * batches / 3

  def figures(self) -> Figures:
    """Returns all of it as plain values."""
    stage, values = self.stage, dict(vars(self))
    del values['stage'], values['known'], values['chips']
    expected = facts.EXPECTATIONS.get(stage.dataset)
    size = self.known.num_train_images, math.ceil(stage.num_epochs)
    return {
      **self.known._asdict(),
      'dataset': stage.dataset,
      'eval_image_size': stage.eval_size,
      'phases': [[x.from_epoch, dict(x.changes)] for x in stage.phases],
      'num_epochs': stage.num_epochs,
      'optimizer': stage.optimizer,
      'schedule': stage.schedule,
      'augmentation': _describe_augmentation(stage),
      'published_top1': stage.published_top1,
      'differs': list(stage.differs),
      'teacher': stage.distill_from,
      **values,
      'fits': self.fits,
      'seconds': self.seconds,
      # Whether the mission's range speaks of this; None: it says nothing.
      'comparable': expected
      and size == (expected.num_train_images, expected.num_epochs),
      **self.chips,
    }


def look_ahead(task: setup_lib.Task) -> Outlook:
  """Returns what is known of a stage without its costs."""
  a_time = 2 if task.stage.ema_decay else 1
  return Outlook(
    stage=task.stage,
    known=described.describe(task),
    num_eval_images=len(task.dataset.selection),
    # The best weights once more.
    num_evaluations=a_time * len(task.steps.epoch_ends) + 1,
  )


def _describe_augmentation(stage: stages_lib.Stage) -> str:
  """Returns what a stage does to its training images, in words."""
  parts = [f'crop {stage.min_crop_area:.0%}-100%']
  if stage.crop_interpolation != 'bilinear':
    parts[0] += f', {stage.crop_interpolation}'
  if stage.augment_repeats > 1:
    parts.append(f'{stage.augment_repeats} copies of an image')
  if stage.low_frequency_size:
    parts.append(f'low frequencies, {stage.low_frequency_size} px')
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
  if stage.loss != 'softmax':
    parts.append(f'loss {stage.loss}')
  if stage.drop_path:
    parts.append(f'blocks skipped 0%-{stage.drop_path:.2g}')
  if stage.label_smoothing:
    parts.append(f'labels smoothed {stage.label_smoothing:g}')
  return ', '.join(parts)


def _describe_phases(x: Figures) -> str:
  """Returns what changes within a stage, '' if nothing does."""
  return '; '.join(
    f'from epoch {start + 1}: '
    + ', '.join(f'{name} {value:g}' for name, value in changes.items())
    for start, changes in x['phases']
  )


def _describe_sizes(x: Figures) -> str:
  size, evaluated = x['image_size'], x['eval_image_size']
  return f'{size}' if evaluated == size else f'{size}, eval {evaluated}'


# Row by row: what it is called and what it says of a stage; rows that say
# nothing of any stage are left out.
_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
  ('dataset', lambda x: x['dataset']),
  ('classes', lambda x: f'{x["num_classes"]:,}'),
  ('images', lambda x: f'{x["num_train_images"]:,}'),
  ('evaluated on', lambda x: f'{x["num_eval_images"]:,}'),
  ('px', _describe_sizes),
  ('batch', lambda x: f'{x["batch_size"]}'),
  ('epochs', lambda x: f'{x["num_epochs"]:g}'),
  ('steps', lambda x: f'{x["total_steps"]:,}'),
  ('phases', _describe_phases),
  ('optimizer', lambda x: x['optimizer'].replace('_', ' ')),
  ('schedule', lambda x: x['schedule'].replace('_', ' ')),
  ('peak rate', lambda x: f'{x["peak_learning_rate"]:.3g}'),
  ('last rate', lambda x: f'{x["final_learning_rate"]:.2g}'),
  ('augmentation', lambda x: x['augmentation']),
  ('teacher', lambda x: x['teacher']),
  ('parameters', lambda x: formats.count(x['parameters'])),
  ('FLOPs/image', lambda x: formats.flops(x['flops_per_image'])),
  ('memory', lambda x: _size(x['memory_bytes'], x['memory_compiled'])),
  ('device has', lambda x: formats.size(x['device_bytes'])),
  ('fits', lambda x: _describe_fit(x['fits'], x['memory_compiled'])),
  ('compile', lambda x: formats.seconds(x['compile_seconds'])),
  ('step', lambda x: _about(x, formats.seconds, 'step_seconds')),
  ('input', lambda x: formats.seconds(x['input_seconds'])),
  ('evaluation', lambda x: formats.seconds(x['evaluation_seconds'])),
  ('stage takes', lambda x: _about(x, formats.duration, 'seconds')),
)


def stage_tables(
  stages: Sequence[Figures], width: int
) -> Iterator[rich.table.Table]:
  """Yields tables with a column a stage, as many as are in `width`."""
  least, most = _STAGE_WIDTHS
  number = min(len(stages), max(1, (width - _LABEL_WIDTH) // (least + 2)))
  stage_width = max(least, min(most, (width - _LABEL_WIDTH) // number - 2))
  rows = [(name, cell) for name, cell in _ROWS if any(map(cell, stages))]
  for start in range(0, len(stages), number):
    part = stages[start : start + number]
    table = create_table(
      ('stage', *(x['name'] for x in part)),
      [(name, *(cell(x) or '-' for x in part)) for name, cell in rows],
    )
    table.columns[0].width = _LABEL_WIDTH
    for column in table.columns[1:]:
      column.width = stage_width
    yield table


def model_table(layers: Sequence[Figures]) -> rich.table.Table:
  """Returns a network group by group: output, parameters, FLOPs forward.

  Args:
    layers: name, modules, parameters, output (a shape) and flops of each.
  """
  parameters, flops = total(layers, 'parameters'), total(layers, 'flops')

  def shares(row):
    return (
      formats.count(row['parameters']),
      formats.percent(row['parameters'] / max(parameters, 1)),
      formats.flops(row['flops']),
      formats.percent(row['flops'] / max(flops, 1)),
    )

  def name(row):
    blocks = row['name'].startswith('block')
    return f'{row["name"]} x {row["modules"]}' if blocks else row['name']

  return create_table(
    ('layers', 'output', 'parameters', 'share', 'FLOPs', 'share'),
    [(name(x), ' x '.join(map(str, x['output'])), *shares(x)) for x in layers],
    ('total', '', *shares({'parameters': parameters, 'flops': flops})),
  )


def expectation_table(stages: Iterable[Figures]) -> rich.table.Table:
  """Returns what the scorecard will hold each stage against."""
  rows = []
  for x in stages:
    expected = facts.EXPECTATIONS.get(x['dataset'])
    if expected is None:
      missing = f'no range is stated for {x["dataset"]}'
      rows.append((x['name'], '-', '-', '-', missing))
      continue
    about, seconds = '' if x['step_measured'] else '~', x['seconds']
    rows.append(
      (
        x['name'],
        '-'.join(f'{bound:.0%}' for bound in expected.top1),
        '-'.join(dict.fromkeys(f'{bound:g}' for bound in expected.minutes)),
        '-' if seconds is None else f'{about}{seconds / 60:,.0f}',
        'yes'
        if x['comparable']
        else f'no: stated for {expected.num_train_images:,} images, '
        f'{expected.num_epochs} epochs; here {x["num_train_images"]:,}, '
        f'{x["num_epochs"]:g}',
      )
    )
  titles = 'stage', 'top-1', 'minutes', 'planned', 'comparable'
  return create_table(titles, rows, left=(0, 4))


def recipe_lines(stages: Iterable[Figures]) -> list[str]:
  """Returns what is published of each stage's recipe, and what differs."""
  lines = []
  for x in stages:
    if not x['published_top1']:
      continue
    took, about = x['seconds'], '' if x['step_measured'] else '~'
    hours = '' if took is None else f'; here {about}{took / 3600:,.1f} hours'
    lines.append(
      f'  {x["name"]}: {x["published_top1"]:.1%} top-1 after '
      f'{x["num_epochs"]:g} epochs{hours}'
    )
    lines += [f'    differs: {text}' for text in x['differs']]
  return lines


def create_table(
  titles: Sequence[str],
  rows: Iterable[Sequence[str]],
  last: Sequence[str] = (),
  *,
  left: Sequence[int] = (0,),
) -> rich.table.Table:
  """Returns a table without lines, which any pipe can carry.

  A `last` row stands out, and so does NO. Columns in `left` are left-aligned.
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
  for row in rows:
    styles = ['bold red' if cell == 'NO' else '' for cell in row]
    table.add_row(*map(rich.text.Text, row, styles))
  if last:
    table.add_row(*map(rich.text.Text, last), style='bold')
  return table


def total(rows: Iterable[Figures], name: str) -> Any:
  """Returns the sum of a figure, None if one row does not know it."""
  values = [x[name] for x in rows]
  return None if None in values else sum(values)


def notes(outlooks: Iterable[Outlook]) -> list[str]:
  """Returns a sentence on each thing that the figures leave open."""
  found = []
  for x in outlooks:
    name = x.stage.name
    if x.fits is False:
      found.append(
        f'{name}: does not fit: a step needs '
        f'{_size(x.memory_bytes, x.memory_compiled)}, there are '
        f"{formats.size(x.device_bytes)}. Set remat='blocks' or "
        'micro_batch_size, or lower batch_size or image_size.'
      )
    found += [f'{name}: {note}' for note in x.notes]
  return found


def say(text: str, console: rich.console.Console, style: str = '') -> None:
  """Prints a line as it is; only a terminal breaks it, between words."""
  shown = rich.text.Text(showable(text, console), style)
  console.print(shown, soft_wrap=not console.is_terminal)


def showable(text: str, console: rich.console.Console) -> str:
  """Returns `text` with ? for what the console cannot show."""
  return text.encode(console.encoding, 'replace').decode(console.encoding)


def _describe_fit(fits: bool | None, compiled: bool) -> str:
  if fits and not compiled:
    return 'probably'
  return {True: 'yes', False: 'NO', None: ''}[fits]


def _size(count: int | None, compiled: bool) -> str:
  return (
    '' if count is None else f'{"" if compiled else "~"}{formats.size(count)}'
  )


def _about(x: Figures, show: Callable[[float], str], name: str) -> str:
  """Returns a time, with ~ if it was estimated, '' if it is not known."""
  if x[name] is None:
    return ''
  return f'{"" if x["step_measured"] else "~"}{show(x[name])}'

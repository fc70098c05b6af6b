"""The report in words: training_report.txt and the table after a run."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table

from jaxprog import formats
from jaxprog.monitoring import incidents as incidents_lib
from jaxprog.reporting import baselines as baselines_lib
from jaxprog.reporting import facts

WIDTH = 80


def report(
  history: Mapping[str, Any],
  environment: Mapping[str, Any] | None = None,
  planned: Sequence[str] = (),
  incidents: Sequence[dict[str, Any]] = (),
  model: str | None = None,
) -> str:
  """Returns the report as plain text, at most 80 columns wide.

  Args:
    history: of a run that is finished or under way.
    environment: what environment.json holds.
    planned: names of all stages of the config, so that the report can say
      which of them were not run.
    incidents: what incidents.jsonl holds.
    model: the network of the config, None if it is unknown.
  """
  stages = history['stages']
  sections = [
    ('Training report', _header(history, environment)),
    ('Stages', _stage_table(stages)),
    ('Results', _result_table(stages)),
    ('Weights carried over', _transfer_table(stages)),
    ('Where the time went', _time_table(stages)),
    ('Scorecard', _scorecard_lines(history)),
    ('Published results', _baseline_lines(history, model)),
    ('Most frequent confusions', _confusion_lines(stages)),
    ('Notes', _note_lines(stages, planned)),
  ]
  if incidents:
    found = incidents_lib.summarise(incidents)
    lines = [line for x in found for line in _wrap(f'- {x}')]
    sections.append(('Incidents', lines))
  sections = [section for section in sections if section[1]]
  return (
    '\n\n'.join(
      '\n'.join((title, '=' * len(title), *lines)) for title, lines in sections
    )
    + '\n'
  )


def summary_table(history: Mapping[str, Any]) -> rich.table.Table:
  """Returns a table of the stages' results, to be printed after a run."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  columns = ('stage', 'px', 'best top-1', 'epoch', 'top-5', 'time', 'status')
  for column in columns:
    right = column not in ('stage', 'status')
    table.add_column(
      column, justify='right' if right else 'left', no_wrap=column != 'status'
    )
  for stage in history['stages']:
    best = _best_row(stage)
    validation = stage.get('validation')
    top5 = (
      validation.get('top5') if validation else (best or {}).get('val_top5')
    )
    epoch = f'{best["epoch"]}/{facts.planned_epochs(stage)}' if best else '-'
    table.add_row(
      stage['name'],
      str(stage['image_size']),
      formats.percent(facts.best_top1(stage)),
      epoch,
      formats.percent(top5),
      formats.duration(stage['seconds']),
      stage['status'].replace('_', ' '),
    )
  return table


def _header(
  history: Mapping[str, Any], environment: Mapping[str, Any] | None
) -> list[str]:
  pairs = facts.describe_run(history, environment)
  return [line for pair in pairs for line in _definition(*pair)]


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  rows = [
    (
      stage['name'],
      stage['dataset'],
      str(stage['num_classes']),
      f'{stage["num_train_images"]:,}',
      f'{stage["num_eval_images"]:,}',
      str(stage['image_size']),
      str(stage['batch_size']),
      f'{facts.trained_epochs(stage)}/{facts.planned_epochs(stage)}',
    )
    for stage in stages
  ]
  titles = 'stage', 'dataset', 'classes', 'train', 'val', 'px', 'batch'
  return _table((*titles, 'epochs'), rows, left=(0, 1))


def _result_table(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  rows = []
  for stage in stages:
    best = stage['best'] or {'epoch': '-', 'top1': None}
    last = stage['epochs'][-1] if stage['epochs'] else {}
    speed = {'images_per_second': facts.median_speed(stage)}
    rows.append(
      (
        stage['name'],
        formats.percent(best['top1']),
        str(best['epoch']),
        formats.percent(last.get('val_top1')),
        formats.percent(last.get('val_top5')),
        formats.duration(stage['seconds']),
        formats.cell('images_per_second', speed),
        stage['status'].replace('_', ' '),
      )
    )
  titles = 'stage', 'best', 'epoch', 'last', 'top-5', 'time', 'images/s'
  lines = _table((*titles, 'status'), rows, left=(0, 7))
  note = 'best and last are top-1, top-5 is of the last epoch, on val images.'
  held = [s for s in stages if facts.chooses_on_holdout(s)]
  if held:
    names = ', '.join(stage['name'] for stage in held)
    note += f' On training images held out instead: {names}; see the notes.'
  return [*lines, '', *_wrap(note)]


def _transfer_table(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  rows = []
  for stage in stages:
    transfer = stage['transfer'] or {}
    rows.append(
      (
        stage['name'],
        transfer.get('from') or '-',
        *(_names(transfer.get(k)) for k in ('carried', 'fresh', 'dropped')),
      )
    )
  titles = 'stage', 'from', 'carried', 'fresh', 'dropped'
  return _table(titles, rows, left=range(5))


def _scorecard_lines(history: Mapping[str, Any]) -> list[str]:
  scores = facts.scorecard(history)
  rows = []
  for score in scores:
    expected = score.expectation
    star = '' if score.comparable or not expected else ' *'
    rows.append(
      (
        score.stage,
        formats.percent(score.top1),
        formats.percents(expected.top1)
        if expected
        else 'no expectation stated',
        score.top1_verdict + (star if score.top1_verdict else ''),
        formats.duration(score.minutes * 60),
        formats.minutes(expected.minutes) if expected else '',
        score.minutes_verdict + (star if expected else ''),
      )
    )
  titles = 'stage', 'top-1', 'expected', 'is', 'time', 'expected', 'is'
  lines = _table(titles, rows, left=(0, 2, 3, 5, 6))
  if any(score.expectation for score in scores):
    lines += ['', *_wrap('Expectation of the mission, given without evidence.')]
  return lines + [
    line
    for remark in facts.scorecard_remarks(history)
    for line in _wrap(remark)
  ]


def _time_table(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  rows = []
  for stage in stages:
    split = facts.time_split(stage)
    total = sum(split) or 1.0
    rows.append(
      (
        stage['name'],
        formats.duration(sum(split)),
        *(formats.percent(seconds / total) for seconds in split),
      )
    )
  titles = 'stage', 'time', 'training', 'input wait', 'evaluation', 'hand-over'
  if not rows:
    return []
  return [*_table(titles, rows, left=(0,)), '', *_wrap(facts.time_note(stages))]


def _baseline_lines(history: Mapping[str, Any], model: str | None) -> list[str]:
  """Returns what others have reached on the same data, and how."""
  return [
    line
    for x in baselines_lib.compare(history, model)
    for line in _wrap(f'- {describe_comparison(x)}')
  ]


def describe_comparison(x: baselines_lib.Beside) -> str:
  """Returns a sentence about a stage and a published result."""
  low, high = x.baseline.top1
  reached = f'{100 * low:.1f}' + (f'-{100 * high:.1f}' if high > low else '')
  differs = f' Differs: {"; ".join(x.differs)}.' if x.differs else ''
  return (
    f'{x.stage}: {formats.percent(x.top1)} here, {reached}% by '
    f'{x.baseline.model} tested at {x.baseline.eval_size} px '
    f'({x.baseline.source}).{differs}'
  )


def _confusion_lines(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  lines = []
  for stage in stages:
    found = facts.confusions(stage, 3)
    words = [
      f'{label} taken for {taken}, {count:,} of {of:,}'
      for label, taken, count, of in found
    ]
    if words:
      lines += _wrap(f'- {stage["name"]}: {"; ".join(words)}')
  return lines


def _note_lines(
  stages: Sequence[Mapping[str, Any]], planned: Sequence[str]
) -> list[str]:
  found = facts.notes(stages, planned)
  return [line for note in found for line in _wrap(f'- {note}')] or ['none']


def _best_row(stage: Mapping[str, Any]) -> Mapping[str, Any] | None:
  best = stage['best'] or {}
  rows = (r for r in stage['epochs'] if r['epoch'] == best.get('epoch'))
  return next(rows, None)


def _names(value: Any) -> str:
  """Returns what a transfer lists: names as they are, many as a number."""
  if value is None:
    return '-'
  if isinstance(value, str | int):
    return str(value)
  names = list(value)
  text = ', '.join(names)
  return (text or 'none') if len(text) <= 24 else f'{len(names)} modules'


def _table(
  titles: Sequence[str],
  rows: Sequence[Sequence[str]],
  left: Sequence[int] = (),
) -> list[str]:
  """Returns aligned lines of at most `WIDTH`; texts may lose their middle.

  Args:
    titles: of the columns.
    rows: a cell for each title.
    left: the columns of text, aligned left; numbers are never shortened.
  """
  widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
  gap = 2
  while sum(widths) + gap * (len(widths) - 1) > WIDTH:
    widths[max(left, key=widths.__getitem__)] -= 1
  lines = []
  for row in (titles, ['-' * w for w in widths], *rows):
    cells = (
      facts.shorten(cell, w).ljust(w)
      if i in left
      else facts.shorten(cell, w).rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    lines.append((' ' * gap).join(cells).rstrip())
  return lines


def _definition(name: str, text: str) -> list[str]:
  return textwrap.wrap(
    text,
    WIDTH,
    initial_indent=f'{name:<10}',
    subsequent_indent=' ' * 10,
    break_on_hyphens=False,
  ) or [name]


def _wrap(text: str) -> list[str]:
  return textwrap.wrap(
    text, WIDTH, subsequent_indent='  ', break_on_hyphens=False
  )

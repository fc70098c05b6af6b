"""Tables of a comparison: for the terminal, for a page, and CSV to read on."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table
import rich.text

from jaxprog import files
from jaxprog.comparison import statistics, verdicts
from jaxprog.comparison.statistics import Axis, Difference, Estimate, Record

AXES: tuple[Axis, ...] = ('epochs', 'images', 'flops', 'seconds')
STATUSES = ('done', 'diverged', 'failed')

ACCURACY_TITLES = (
  'cell',
  'n',
  'top-1',
  'std',
  '95% interval',
  'difference',
  'p',
)
COST_TITLES = (
  'cell',
  'best rate',
  'epochs',
  'images',
  'FLOPs',
  'seconds',
  'runs',
)

_NONE = '-'
_CAPTION = (
  'Final top-1 (%), over seeds. Difference: to {reference}, in points, over '
  'the seeds that both have. p: of that, for all cells together (Holm), from '
  f'{statistics.MIN_RUNS} runs on. Intervals count other seeds and other '
  'evaluation images.'
)
_MAGNITUDES = ((1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


class CellSummary(NamedTuple):
  """What the runs of a cell come to.

  `top1` is None where no run is done; `difference` and `p_value`, the latter
  adjusted for the number of cells, are None for the reference itself as well.
  `by_image`: whether it is known which images each run has right. `costs` are
  means of the runs that are done, `counts` runs by status.
  """

  cell: str
  counts: Mapping[str, int]
  top1: Estimate | None
  difference: Difference | None
  p_value: float | None
  by_image: bool
  learning_rates: tuple[float, ...]
  costs: Mapping[Axis, float]


def summarize(runs: Iterable[Record], reference: str) -> list[CellSummary]:
  """Returns a summary of each cell, in the order of their first runs.

  Args:
    runs: of all cells, in any state.
    reference: the cell that the others are compared with.

  Raises:
    ValueError: if `reference` is none of the cells.
  """
  cells = statistics.by_cell(runs)
  if reference not in cells:
    raise ValueError(f'No cell {reference!r} among {list(cells)}.')
  summaries = [
    _summarize(cell, cells[cell], () if cell == reference else cells[reference])
    for cell in cells
  ]
  adjusted = statistics.holm([s.p_value for s in summaries])
  return [
    summary._replace(p_value=p)
    for summary, p in zip(summaries, adjusted, strict=True)
  ]


def comparison_table(
  summaries: Sequence[CellSummary], reference: str
) -> rich.console.Group:
  """Returns two tables and notes on them, for 80 columns."""
  accuracies, costs = _table(ACCURACY_TITLES), _table(COST_TITLES)
  for summary in summaries:
    accuracies.add_row(*map(rich.text.Text, accuracy_row(summary)))
    costs.add_row(*map(rich.text.Text, cost_row(summary)))
  texts = notes(summaries, reference)
  return rich.console.Group(
    accuracies, costs, *(rich.text.Text(text) for text in texts)
  )


def notes(summaries: Sequence[CellSummary], reference: str) -> list[str]:
  """Returns what a reader of the table has to know, a sentence or two each."""
  texts = [_CAPTION.format(reference=reference)]
  compared = [s for s in summaries if s.difference is not None]
  if any(s.difference and not s.difference.paired for s in compared):
    texts.append(
      'Where fewer than two seeds are in common, runs are not paired (Welch).'
    )
  if compared and not all(s.by_image for s in summaries if s.top1):
    texts.append(
      'Which images each run has right is not known of all: the images of two '
      'cells are taken for independent ones, which makes intervals wide.'
    )
  texts.append(verdicts.multiplicity_note(len(compared)))
  tops = [s.top1 for s in summaries if s.top1 is not None]
  texts.append(verdicts.selection_note(tops))
  lost = {
    status: sum(s.counts[status] for s in summaries) for status in STATUSES[1:]
  }
  if any(lost.values()):
    said = ' and '.join(f'{n} {status}' for status, n in lost.items() if n)
    total = sum(sum(s.counts.values()) for s in summaries)
    texts.append(f'Of {total} runs {said}: counted here, in no mean.')
  return [text for text in texts if text]


def run_rows(runs: Iterable[Record]) -> list[dict[str, Any]]:
  """Returns a row for each run; costs are those at its last evaluation."""
  rows: list[dict[str, Any]] = []
  for run in runs:
    last = run['curve'][-1] if run['curve'] else {}
    rows.append(
      {
        **{k: run[k] for k in ('cell', 'seed', 'status', 'learning_rate')},
        **{k: run[k] for k in ('final_top1', 'best_top1')},
        **{axis: last.get(axis) for axis in AXES},
        **{f'override:{k}': v for k, v in run['overrides'].items()},
      }
    )
  return rows


def cell_rows(summaries: Iterable[CellSummary]) -> list[dict[str, Any]]:
  """Returns a row for each cell; accuracies are parts of one, not percent."""
  return [
    {
      'cell': s.cell,
      **{status: s.counts[status] for status in STATUSES},
      **_estimate_fields('top1', s.top1),
      **_estimate_fields(
        'difference', s.difference.estimate if s.difference else None
      ),
      'paired': s.difference.paired if s.difference else None,
      'p_holm': s.p_value,
      'learning_rate': ' '.join(f'{rate:g}' for rate in s.learning_rates),
      **{axis: s.costs.get(axis) for axis in AXES},
    }
    for s in summaries
  ]


def write_csv(
  path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]
) -> None:
  """Writes `rows` with a header, atomically; None becomes an empty field."""
  fields = dict.fromkeys(field for row in rows for field in row)
  buffer = io.StringIO(newline='')
  writer = csv.DictWriter(buffer, list(fields), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  files.write_bytes(path, buffer.getvalue().encode())


def format_count(value: float) -> str:
  """Returns a number of images or seconds in four letters: '128k', '1.3M'."""
  for size, letter in _MAGNITUDES:
    # What would be rounded up to the next magnitude is shown in it.
    if value >= 0.9995 * size:
      return f'{value / size:.3g}{letter}'
  return f'{value:.3g}'


def _summarize(
  cell: str, runs: Sequence[Record], reference: Sequence[Record]
) -> CellSummary:
  scores = statistics.final_scores(runs)
  against = statistics.final_scores(reference)
  comparison = (
    statistics.compare(scores, against) if scores and against else None
  )
  rates = {run['learning_rate'] for run in runs} - {None}
  return CellSummary(
    cell,
    {s: sum(run['status'] == s for run in runs) for s in STATUSES},
    statistics.estimate(scores.values()) if scores else None,
    comparison,
    comparison.p_value if comparison else None,
    all(score.outcomes is not None for score in scores.values()),
    tuple(sorted(rates)),
    _mean_costs(runs),
  )


def _mean_costs(runs: Sequence[Record]) -> dict[Axis, float]:
  ends = [run['curve'][-1] for run in statistics.done(runs) if run['curve']]
  if not ends:
    return {}
  return {axis: sum(end[axis] for end in ends) / len(ends) for axis in AXES}


def _table(titles: Sequence[str]) -> rich.table.Table:
  table = rich.table.Table(
    box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
  )
  table.add_column(titles[0], overflow='fold')
  for title in titles[1:]:
    # Only the first and the last may have to be broken.
    last = title == 'runs'
    table.add_column(
      title,
      justify='left' if last else 'right',
      no_wrap=not last,
      overflow='fold',
    )
  return table


def accuracy_row(s: CellSummary) -> tuple[str, ...]:
  """Returns what stands below ACCURACY_TITLES."""
  n = str(s.counts['done'])
  if s.top1 is None:
    return (s.cell, n, *[_NONE] * 5)
  std, low, high = (
    None if x is None else f'{100 * x:.2f}'
    for x in (s.top1.std, s.top1.low, s.top1.high)
  )
  return (
    s.cell,
    n,
    f'{100 * s.top1.mean:.2f}',
    std or _NONE,
    f'[{low}, {high}]' if low else _NONE,
    verdicts.format_points(s.difference.estimate) if s.difference else _NONE,
    _format_p(s.p_value),
  )


def cost_row(s: CellSummary) -> tuple[str, ...]:
  """Returns what stands below COST_TITLES."""
  rates = [f'{rate:.3g}' for rate in s.learning_rates]
  formats = {'flops': '{:.2e}'.format, 'epochs': '{:.3g}'.format}
  costs = [
    formats.get(axis, format_count)(s.costs[axis]) if s.costs else _NONE
    for axis in AXES
  ]
  runs = [f'{n} {status}' for status, n in s.counts.items() if n]
  # Seeds of a cell share a rate, unless someone chose otherwise.
  rate = f'{rates[0]}..{rates[-1]}' if len(rates) > 1 else ''.join(rates)
  return (s.cell, rate or _NONE, *costs, ', '.join(runs))


def _format_p(p: float | None) -> str:
  if p is None:
    return _NONE
  return '<0.001' if p < 0.001 else f'{p:.3f}'


def _estimate_fields(name: str, e: Estimate | None) -> dict[str, float | None]:
  fields = ('mean', 'std', 'low', 'high')
  return {f'{name}_{field}': e and getattr(e, field) for field in fields}

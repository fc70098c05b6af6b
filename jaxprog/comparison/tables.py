"""Tables of a comparison: for the terminal, for a page, and CSV to read on."""

import csv
import io
import operator
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.text

from jaxprog import files
from jaxprog.comparison import claims, statistics, verdicts
from jaxprog.comparison.claims import Claim
from jaxprog.comparison.sequential import Rule
from jaxprog.comparison.statistics import Axis, Difference, Estimate, Record
from jaxprog.reporting.parts import Column, Table
from jaxprog.reporting.report import terminal_table

_AXES: tuple[Axis, ...] = ('epochs', 'images', 'flops', 'seconds')
_NONE = '-'
_CAPTION = (
  '{whose} top-1 (%), over seeds. Difference: to {reference}, in points, over '
  'the seeds that both have. p: of that, for all cells together (Holm), from '
  f'{statistics.MIN_RUNS} runs on. Intervals count other seeds and other '
  'evaluation images.'
)
_PLAIN = Rule()


class CellSummary(NamedTuple):
  """What the runs of a cell come to.

  `top1` is None where no run is done, `claim` for the reference itself as well.
  """

  cell: str
  runs: Sequence[Record]
  top1: Estimate | None
  claim: Claim | None

  @property
  def difference(self) -> Difference | None:
    """How it differs from the reference."""
    return self.claim and self.claim.difference

  @property
  def p_value(self) -> float | None:
    """Adjusted for the looks and the number of cells."""
    return self.claim and self.claim.p_value

  @property
  def counts(self) -> dict[str, int]:
    """How many runs there are, by status."""
    statuses = [run['status'] for run in self.runs]
    return {x: statuses.count(x) for x in ('done', 'diverged', 'failed')}

  @property
  def is_shown(self) -> bool:
    """Whether it differs from the reference, all cells taken together."""
    return self.claim is not None and self.claim.differs

  @property
  def learning_rates(self) -> list[float]:
    """The rates of all runs, each once."""
    return sorted({run['learning_rate'] for run in self.runs} - {None})

  @property
  def costs(self) -> dict[Axis, float]:
    """Means of the runs that are done; none where there are none."""
    done = statistics.done(self.runs)
    ends = [run['curve'][-1] for run in done if run['curve']]
    if not ends:
      return {}
    return {axis: sum(end[axis] for end in ends) / len(ends) for axis in _AXES}


def summarize(
  runs: Iterable[Record], reference: str, rule: Rule = _PLAIN
) -> list[CellSummary]:
  """Returns a summary of each cell, in the order of their first runs.

  `reference` is the cell that the others are compared with; it has a run.
  """
  cells = statistics.by_cell(runs)
  scores = {cell: statistics.final_scores(cells[cell]) for cell in cells}
  found = claims.find(cells, reference, rule)
  return [
    CellSummary(
      cell,
      cells[cell],
      statistics.estimate(scores[cell].values()) if scores[cell] else None,
      found.get(cell),
    )
    for cell in cells
  ]


def create_table(
  titles: Sequence[str],
  rows: Sequence[tuple[str, ...]],
  caption: str = '',
  left: Sequence[int] = (0,),
) -> Table:
  """Returns a table of texts; the columns that are not `left` are numbers."""
  columns = [
    Column(title, operator.itemgetter(i), left=i in left)
    for i, title in enumerate(titles)
  ]
  return Table(columns, rows, caption)


def tabulate(summaries: Sequence[CellSummary]) -> tuple[Table, Table]:
  """Returns the accuracies and the costs of all cells."""
  accuracies = create_table(
    ('cell', 'n', 'top-1', 'std', '95% interval', 'difference', 'p', 'equal'),
    [_accuracy_row(summary) for summary in summaries],
    f'{_whose(summaries)} top-1 over seeds, %; equal: within so many points, '
    'all together',
  )
  costs = create_table(
    ('cell', 'best rate', 'epochs', 'images', 'FLOPs', 'seconds', 'runs'),
    [_cost_row(summary) for summary in summaries],
    'Means over runs',
    left=(0, 6),
  )
  return accuracies, costs


def render(
  summaries: Sequence[CellSummary], reference: str, rule: Rule = _PLAIN
) -> rich.console.Group:
  """Returns both tables and notes on them, for 80 columns."""
  texts = map(rich.text.Text, notes(summaries, reference, rule))
  accuracies, costs = tabulate(summaries)
  return rich.console.Group(
    # Within how many points cells are equal is said by the verdicts below.
    terminal_table(accuracies.columns[:-1], accuracies.rows, gap=1),
    terminal_table(costs.columns, costs.rows, gap=1),
    *texts,
  )


def notes(
  summaries: Sequence[CellSummary], reference: str, rule: Rule = _PLAIN
) -> list[str]:
  """Returns what a reader of the table has to know, a sentence or two each."""
  texts = [_CAPTION.format(reference=reference, whose=_whose(summaries))]
  runs = [run for summary in summaries for run in summary.runs]
  if statistics.has_holdout(runs):
    texts.append(
      'Weights were chosen on the hold-out, which curves and targets are of; '
      'the validation images were looked at once.'
    )
    if not all(run.get('holdout_images') for run in statistics.done(runs)):
      texts.append('Some runs have no hold-out: theirs are the last weights.')
  compared = [s.difference for s in summaries if s.difference]
  if not all(difference.paired for difference in compared):
    texts.append(
      'Where fewer than two seeds are in common, runs are not paired (Welch).'
    )
  if compared and None in [run['outcomes'] for run in statistics.done(runs)]:
    texts.append(
      'Which images each run has right is not known of all: the images of two '
      'cells are taken for independent ones, which makes intervals wide.'
    )
  texts.append(verdicts.multiplicity_note(len(compared), rule))
  texts.append(verdicts.selection_note([s.top1 for s in summaries if s.top1]))
  if lost := statistics.count_lost(runs):
    texts.append(
      f'Of {len(runs)} runs {" and ".join(lost)}: counted here, in no mean.'
    )
  return [text for text in texts if text]


def _whose(summaries: Sequence[CellSummary]) -> str:
  runs = [run for summary in summaries for run in summary.runs]
  return statistics.whose(runs).capitalize()


def _run_rows(runs: Iterable[Record]) -> list[dict[str, Any]]:
  """Returns a row for each run; costs are those at its last evaluation."""
  rows: list[dict[str, Any]] = []
  for run in runs:
    end = run['curve'][-1] if run['curve'] else {}
    rows.append(
      {
        **{k: run[k] for k in ('cell', 'seed', 'status', 'learning_rate')},
        **{k: run[k] for k in ('final_top1', 'best_top1')},
        **{axis: end.get(axis) for axis in _AXES},
        **{f'override:{k}': v for k, v in run['overrides'].items()},
        **{k: run[k] for k in ('control', 'resumed', 'error')},
      }
    )
  return rows


def _cell_rows(
  summaries: Iterable[CellSummary], cells: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Returns a row for each cell; accuracies are parts of one, not percent."""
  by_name = {cell['name']: cell for cell in cells}
  rows: list[dict[str, Any]] = []
  for s in summaries:
    cell, difference, costs = by_name[s.cell], s.difference, s.costs
    tuning = cell['tuning'] or {}
    row: dict[str, Any] = {
      'cell': s.cell,
      **s.counts,
      **_estimate_fields('top1', s.top1),
      **_estimate_fields('difference', difference and difference.estimate),
      'paired': difference and difference.paired,
      'p_holm': s.p_value,
      'p_equal': s.claim and s.claim.p_equal,
      'equal_within': s.claim and s.claim.within,
      'verdict': s.claim and s.claim.verdict,
      'learning_rate': ' '.join(f'{rate:g}' for rate in s.learning_rates),
      **{axis: costs.get(axis) for axis in _AXES},
      'control': cell['control'],
      'flops_per_image': cell['flops_per_image'],
      'tuned_factor': tuning.get('factor'),
      'tuned_at_border': tuning.get('at_border'),
    }
    rows.append(row)
  return rows


def write(
  workdir: pathlib.Path,
  records: Sequence[Record],
  cells: Sequence[Mapping[str, Any]],
  rule: Rule = _PLAIN,
) -> None:
  """Writes comparison_runs.csv and comparison_cells.csv.

  `cells` is what comparison.json says of them, the reference first.
  """
  summaries = summarize(records, cells[0]['name'], rule)
  for name, rows in (
    ('comparison_runs.csv', _run_rows(records)),
    ('comparison_cells.csv', _cell_rows(summaries, cells)),
  ):
    fields = dict.fromkeys(field for row in rows for field in row)
    buffer = io.StringIO(newline='')
    writer = csv.DictWriter(buffer, list(fields), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    files.write_bytes(workdir / name, buffer.getvalue().encode())


def format_count(value: float) -> str:
  """Returns a number of images or seconds in four letters: '128k', '1.3M'."""
  for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    # What would be rounded up to the next magnitude is shown in it.
    if value >= 0.9995 * size:
      return f'{value / size:.3g}{letter}'
  return f'{value:.3g}'


def _accuracy_row(s: CellSummary) -> tuple[str, ...]:
  n = str(s.counts['done'])
  if s.top1 is None:
    return (s.cell, n, *[_NONE] * 6)
  std, low, high = (
    None if x is None else f'{100 * x:.2f}'
    for x in (s.top1.std, s.top1.low, s.top1.high)
  )
  p = _NONE
  if s.p_value is not None:
    p = '<0.001' if s.p_value < 0.001 else f'{s.p_value:.3f}'
  return (
    s.cell,
    n,
    f'{100 * s.top1.mean:.2f}',
    std or _NONE,
    f'[{low}, {high}]' if low else _NONE,
    verdicts.format_points(s.difference.estimate) if s.difference else _NONE,
    p,
    _within(s.claim),
  )


def _within(claim: Claim | None) -> str:
  if claim is None or claim.within is None:
    return _NONE
  return verdicts.format_bound(claim.within).split()[0]


def _cost_row(s: CellSummary) -> tuple[str, ...]:
  rates = [f'{rate:.3g}' for rate in s.learning_rates]
  formats = {'flops': '{:.2e}'.format, 'epochs': '{:.3g}'.format}
  costs = [
    formats.get(axis, format_count)(value) for axis, value in s.costs.items()
  ] or [_NONE] * len(_AXES)
  runs = [f'{n} {status}' for status, n in s.counts.items() if n]
  # Seeds of a cell share a rate, unless someone chose otherwise.
  rate = f'{rates[0]}..{rates[-1]}' if len(rates) > 1 else ''.join(rates)
  return (s.cell, rate or _NONE, *costs, ', '.join(runs))


def _estimate_fields(name: str, e: Estimate | None) -> dict[str, float | None]:
  fields = ('mean', 'std', 'low', 'high')
  return {f'{name}_{field}': e and getattr(e, field) for field in fields}

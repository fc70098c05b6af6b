"""Says which checkpoints of a run are whole."""

import collections
import pathlib
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table
import rich.text

from jaxprog import errors, paths
from jaxprog.monitoring import activity
from jaxprog.reliability import checkpoints, copies, integrity
from jaxprog.reporting import rundir

_STYLES = {'intact': 'green', 'damaged': 'bold red', 'unfinished': 'yellow'}


@copies.in_bucket()
def verify_checkpoints(workdir: str | pathlib.Path) -> int:
  """Returns 0 if no checkpoint of `workdir` is damaged, else 1.

  Prints what was found; nothing is written, moved or removed.

  Raises:
    UserError: if there are no checkpoints.
  """
  workdir = paths.workdir(workdir)
  rundir.check(workdir)
  with activity.doing('reading the checkpoints'):
    findings = checkpoints.check_workdir(workdir)
  if not findings:
    raise errors.UserError(
      'There are no checkpoints.',
      f'--workdir={workdir}',
      'Name the --workdir of a run that has trained.',
    )
  console = rich.console.Console(highlight=False, markup=False)
  console.print(_table(findings))
  for found in findings:
    if found.detail:
      console.print(
        f'{_name(found)}: {found.status}: {found.detail}',
        style=_STYLES[found.status],
        soft_wrap=True,
      )
  counts = collections.Counter(found.status for found in findings)
  console.print(', '.join(f'{counts[x]} {x}' for x in _STYLES), soft_wrap=True)
  return 1 if counts['damaged'] else 0


def _table(findings: Sequence[integrity.Condition]) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE, show_edge=False)
  table.add_column(' stage', overflow='fold')
  table.add_column('checkpoint', no_wrap=True)
  table.add_column('step', justify='right', no_wrap=True)
  table.add_column('MB', justify='right', no_wrap=True)
  table.add_column('status', no_wrap=True)
  for found in findings:
    table.add_row(
      f' {found.stage}',
      found.name,
      f'{found.step:,}' if found.step >= 0 else '-',
      f'{found.bytes / 1e6:,.1f}',
      rich.text.Text(found.status, _STYLES[found.status]),
    )
  return table


def _name(found: integrity.Condition) -> str:
  step = f'/{found.step}' if found.step >= 0 else ''
  return f'{found.stage}/{found.name}{step}'

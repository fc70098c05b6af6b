"""Makes the reports of runs anew; puts several runs side by side."""

import contextlib
import os
import pathlib
from collections.abc import Sequence

from jaxprog import buckets, errors, files
from jaxprog.comparison import page, search_page
from jaxprog.monitoring import activity
from jaxprog.reliability import copies
from jaxprog.reporting import outputs, rundir
from jaxprog.reporting.page import side_by_side


def write_report(
  workdirs: str | pathlib.Path | Sequence[str | pathlib.Path],
) -> None:
  """Writes training_report.txt, training_metrics.png and report.html of each.

  From training_history.json and what else a run has left, without its data or
  its devices. With several `workdirs` the first one gets a comparison.html. Of
  a comparison or a search, also while it goes on, it writes report.html.

  Raises:
    UserError: if one has no run or no history; then nothing is written.
  """
  if isinstance(workdirs, str | os.PathLike):
    workdirs = [workdirs]
  with contextlib.ExitStack() as stack:
    folders = [
      stack.enter_context(copies.read(x, weights=False)) for x in workdirs
    ]
    _write(folders)


def _write(folders: list[pathlib.Path]) -> None:
  for folder in folders:
    rundir.check(folder)
  comparisons = [x for x in folders if page.is_comparison(x)]
  searches = [x for x in folders if search_page.is_search(x)]
  folders = [x for x in folders if x not in comparisons + searches]
  runs = [rundir.read_run(folder) for folder in folders]
  try:
    with activity.doing('drawing the reports'):
      paths = [page.write_page(folder) for folder in comparisons]
      paths += [search_page.write_page(folder) for folder in searches]
      paths += [path for x in folders for path in outputs.write_reports(x)]
    if len(runs) > 1:
      paths.append(folders[0] / 'comparison.html')
      files.write_bytes(paths[-1], side_by_side.side_by_side(runs).encode())
  except OSError as e:
    raise errors.UserError(
      f'Cannot write a report: {e.strerror}.',
      str(e.filename or folders[0]),
      'Name directories that you may write to.',
    ) from None
  for path in paths:
    print(buckets.shown(path))

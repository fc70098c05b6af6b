"""Writes the reports of a run from the files of its workdir alone."""

import contextlib
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from jaxprog import errors, files
from jaxprog.reliability import lock
from jaxprog.reporting import plots, report, rundir
from jaxprog.reporting.page import html


def write_reports(
  workdir: str | os.PathLike[str],
  incidents: Sequence[dict[str, Any]] | None = None,
  *,
  is_live: bool = False,
) -> list[pathlib.Path]:
  """Returns the paths of the report, the picture and the page it has written.

  Args:
    workdir: with a training_history.json; see rundir.read_run.
    incidents: where the run knows of some that its log could not take.
    is_live: whether the run goes on, so that the page renews itself.
  """
  run, workdir = rundir.read_run(workdir), pathlib.Path(workdir)
  if incidents is not None:
    run = run._replace(incidents=incidents)
  paths = [
    workdir / name
    for name in ('training_report.txt', 'training_metrics.png', 'report.html')
  ]
  files.write_bytes(paths[0], report.report(run).encode())
  plots.plot_history(run.history, paths[1])
  files.write_bytes(paths[2], html.page(run, is_live=is_live).encode())
  return paths


def write_page(workdir: str | os.PathLike[str], *, is_live: bool) -> None:
  """Writes report.html alone, which is quick enough for every epoch."""
  page = html.page(rundir.read_run(workdir), is_live=is_live)
  files.write_bytes(pathlib.Path(workdir) / 'report.html', page.encode())


def add_to_reports(workdir: str | os.PathLike[str]) -> None:
  """Writes text and page anew, with what was found since the run has ended.

  One that is under way has them written by its next epoch.
  """
  workdir = pathlib.Path(workdir)
  with contextlib.suppress(errors.UserError):  # It is held, or has no history.
    lock.check_free(workdir)
    run = rundir.read_run(workdir)
    text = workdir / 'training_report.txt'
    files.write_bytes(text, report.report(run).encode())
    write_page(workdir, is_live=False)


# After a page that took a core for more than a moment, in seconds, none is
# written for so many times as long. A run that a signal ends waits no longer.
_QUICK, _REST, _LEAST = 0.1, 20.0, 1.0


class Reporter:
  """Writes reports in a thread of its own, from what the run has saved.

  Training never waits for it: while one page is being written, one more may
  wait, and that one will read the newest history. Pages of a long run take
  long, and a core: they are written the more rarely.
  """

  def __init__(
    self,
    executor: futures.Executor,
    workdir: pathlib.Path,
    incidents: Callable[[], Sequence[dict[str, Any]]],
    clock: Callable[[], float] = time.monotonic,
    cost: Callable[[], float] = time.thread_time,
  ):
    """Takes an `executor` of one thread, and what returns all incidents."""
    self._executor, self._workdir = executor, workdir
    self._incidents, self._clock, self._cost = incidents, clock, cost
    self._page: futures.Future[None] | None = None
    self._next = -math.inf  # When a page may be written again, by the clock.

  def refresh(self) -> None:
    """Lets report.html be written anew, unless that is about to happen."""
    page = self._page
    rested = self._clock() >= self._next
    if rested and (page is None or page.running() or page.done()):
      # What fails here fails aloud in the last report.
      self._page = self._executor.submit(self._write_page)

  def write(self, *, is_last: bool) -> futures.Future[None]:
    """Lets all reports be written anew, if the run has a history by then."""
    return self._executor.submit(self._write, is_last)

  def stop(self) -> None:
    """Writes report.html once more, of a run that has ended, if that is quick.

    The rest takes longer than a signal allows.
    """
    if self._clock() >= self._next:
      page = self._executor.submit(self._write_page, False)
      futures.wait([page], timeout=_LEAST)

  def _write_page(self, is_live: bool = True) -> None:
    began = self._cost()
    write_page(self._workdir, is_live=is_live)
    took = self._cost() - began
    if took > _QUICK:
      self._next = self._clock() + _REST * took

  def _write(self, is_last: bool) -> None:
    if (self._workdir / 'training_history.json').exists():
      write_reports(self._workdir, self._incidents(), is_live=not is_last)

"""Bars for what takes long before a run begins."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


@contextlib.contextmanager
def progress_bars(
  console: rich.console.Console, *, count: bool = True, size: bool = False
) -> Iterator[Callable[[str, int, int], None]]:
  """Yields a function that shows of what how much is done, and of how much.

  Nothing is shown before it is called, or where the output is no terminal.
  `count` shows both numbers rather than their ratio, `size` as bytes.
  """
  shown: rich.progress.ProgressColumn = rich.progress.TaskProgressColumn()
  if size:
    shown = rich.progress.DownloadColumn()
  elif count:
    shown = rich.progress.MofNCompleteColumn()
  bar = rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    shown,
    rich.progress.TimeRemainingColumn(),
    console=console,
    disable=not console.is_terminal,
  )
  tasks: dict[str, rich.progress.TaskID] = {}

  def show(what: str, done: int, total: int) -> None:
    if not tasks:
      bar.start()
    if what not in tasks:
      tasks[what] = bar.add_task(what, total=total)
    bar.update(tasks[what], completed=done, total=total)

  try:
    yield show
  finally:
    bar.stop()


@contextlib.contextmanager
def progress_bar(
  console: rich.console.Console,
  title: str,
  *,
  count: bool = True,
  size: bool = False,
) -> Iterator[Callable[[int, int], None]]:
  """Yields the same for one thing, `title`."""
  with progress_bars(console, count=count, size=size) as show:
    yield functools.partial(show, title)

"""Keeps people informed of a comparison or a search while it goes on."""

import contextlib
import functools
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import rich.console

from jaxprog import errors
from jaxprog.comparison import page, search_page, under_way
from jaxprog.monitoring import fleet
from jaxprog.reliability import lock, owners

# How often the runs are looked at.
_LOOK_SECONDS = 2.0
# How often the page is written: not sooner, and so that it takes a hundredth of
# a core, which training may be short of.
_PAGE_SECONDS, _REST = 30.0, 100.0


def comparison(
  workdir: pathlib.Path, console: rich.console.Console, *, lines: bool
) -> contextlib.AbstractContextManager[None]:
  """Keeps report.html of a comparison, which has begun, up to date.

  With `lines` a line on each run under way is shown too: where runs go on in
  other processes and do not say so here themselves.
  """
  plan = under_way.read_plan(workdir)
  see = functools.partial(_see, plan) if lines and plan else None
  return _watched(workdir, console, page.write_page, see)


def search(
  workdir: pathlib.Path, console: rich.console.Console, *, lines: bool
) -> contextlib.AbstractContextManager[None]:
  """Does the same for a search."""
  see = functools.partial(search_page.see, workdir) if lines else None
  return _watched(workdir, console, search_page.write_page, see)


@contextlib.contextmanager
def _watched(
  workdir: pathlib.Path,
  console: rich.console.Console,
  write_page: Callable[..., pathlib.Path],
  see: Callable[[], fleet.Seen] | None,
) -> Iterator[None]:
  is_over = threading.Event()

  def write(**how: bool) -> None:
    # Nobody has taken over the workdir; a full disk ends the runs themselves.
    with contextlib.suppress(OSError, errors.UserError):
      if owners.is_this(lock.find_owner(workdir)):
        write_page(workdir, **how)

  def work() -> None:
    next_page = time.monotonic() + _LOOK_SECONDS
    with contextlib.ExitStack() as stack:
      if see is not None:
        shown = fleet.Fleet(console, 'runs')
        stack.callback(shown.close)
      while not is_over.is_set():
        if see is not None:
          with contextlib.suppress(OSError, errors.UserError):
            shown.show(see())
        if time.monotonic() >= next_page:
          began = time.thread_time()
          write()
          rest = max(_PAGE_SECONDS, _REST * (time.thread_time() - began))
          next_page = time.monotonic() + rest
        is_over.wait(_LOOK_SECONDS)

  thread = threading.Thread(target=work, name='live', daemon=True)
  thread.start()
  try:
    yield
  finally:
    is_over.set()
    thread.join()
    write(is_live=False)  # Of one that was stopped it is what is left.


def _see(plan: under_way.Plan) -> fleet.Seen:
  state = under_way.look(plan)
  named = [(plan.name(x), x) for x in state.running]
  total = len(state.statuses)
  return fleet.Seen(state.num_over, total, named, state.seconds_left)

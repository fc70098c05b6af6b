"""Keeps people informed of a comparison or a search while it goes on."""

import contextlib
import functools
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

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


class _WritePage(Protocol):
  def __call__(
    self, workdir: pathlib.Path, *, is_live: bool | None = None
  ) -> pathlib.Path: ...


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
  write_page: _WritePage,
  see: Callable[[], fleet.Seen] | None,
) -> Iterator[None]:
  is_over = threading.Event()
  thread = threading.Thread(
    target=_work,
    args=(workdir, console, write_page, see, is_over),
    name='live',
    daemon=True,
  )
  thread.start()
  try:
    yield
  finally:
    is_over.set()
    thread.join()
    # Of one that was stopped it is what is left.
    with contextlib.suppress(OSError, errors.UserError):
      if _is_ours(workdir):
        write_page(workdir, is_live=False)


def _is_ours(workdir: pathlib.Path) -> bool:
  """Returns whether nobody has taken over the workdir."""
  return owners.is_this(lock.find_owner(workdir))


def _work(
  workdir: pathlib.Path,
  console: rich.console.Console,
  write_page: _WritePage,
  see: Callable[[], fleet.Seen] | None,
  is_over: threading.Event,
) -> None:
  next_page = time.monotonic() + _LOOK_SECONDS
  with contextlib.ExitStack() as stack:
    if see is not None:
      shown = fleet.Fleet(console, 'runs')
      stack.callback(shown.close)
    while not is_over.is_set():
      # A disk that is full ends the runs themselves.
      with contextlib.suppress(OSError, errors.UserError):
        if see is not None:
          shown.show(see())
        if time.monotonic() >= next_page and _is_ours(workdir):
          began = time.thread_time()
          write_page(workdir)
          rest = max(_PAGE_SECONDS, _REST * (time.thread_time() - began))
          next_page = time.monotonic() + rest
      is_over.wait(_LOOK_SECONDS)


def _see(plan: under_way.Plan) -> fleet.Seen:
  state = under_way.look(plan)
  named = [(plan.name(x), x) for x in state.running]
  total = len(state.statuses)
  return fleet.Seen(state.num_over, total, named, state.seconds_left)

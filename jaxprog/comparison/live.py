"""Keeps people informed of a comparison while it goes on."""

import contextlib
import pathlib
import threading
import time
from collections.abc import Iterator

import rich.console

from jaxprog import errors
from jaxprog.comparison import page, under_way
from jaxprog.monitoring import fleet

# How often the runs are looked at.
_LOOK_SECONDS = 2.0
# How often the page is written: not sooner, and so that it takes a hundredth of
# a core, which training may be short of.
_PAGE_SECONDS, _REST = 30.0, 100.0


@contextlib.contextmanager
def watched(
  workdir: pathlib.Path, console: rich.console.Console, *, lines: bool
) -> Iterator[None]:
  """Keeps report.html of a comparison, which has begun, up to date.

  With `lines` a line on each run under way is shown too: where runs go on in
  other processes and do not say so here themselves.
  """
  is_over = threading.Event()
  thread = threading.Thread(
    target=_work, args=(workdir, console, lines, is_over), daemon=True
  )
  thread.start()
  try:
    yield
  except BaseException:
    is_over.set()
    thread.join()
    with contextlib.suppress(OSError, errors.UserError):
      page.write_page(workdir, is_live=False)
    raise
  finally:
    is_over.set()
    thread.join()


def _work(
  workdir: pathlib.Path,
  console: rich.console.Console,
  lines: bool,
  is_over: threading.Event,
) -> None:
  plan, next_page = under_way.read_plan(workdir), 0.0
  if plan is None:
    return
  with contextlib.ExitStack() as stack:
    shown = None
    if lines:
      shown = fleet.Fleet(console, 'runs')
      stack.callback(shown.close)
      shown.show(_see(plan))
    while not is_over.wait(_LOOK_SECONDS):
      # What fails here fails aloud at the end.
      with contextlib.suppress(OSError, errors.UserError):
        if shown is not None:
          shown.show(_see(plan))
        if time.monotonic() >= next_page:
          began = time.thread_time()
          page.write_page(workdir)
          rest = max(_PAGE_SECONDS, _REST * (time.thread_time() - began))
          next_page = time.monotonic() + rest


def _see(plan: under_way.Plan) -> fleet.Seen:
  state = under_way.look(plan)
  named = [(plan.name(x), x) for x in state.running]
  total = len(state.statuses)
  return fleet.Seen(state.num_over, total, named, state.seconds_left)

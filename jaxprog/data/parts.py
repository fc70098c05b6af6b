"""Long work on many records, of which a kill takes only what is under way."""

import collections
import contextlib
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

import numpy as np

from jaxprog import files

_T = TypeVar('_T')
_S = TypeVar('_S')

# Is told how much is done, and how much there is.
Progress = Callable[[int, int], None]
# What is made of the records of one part.
Arrays = dict[str, np.ndarray]


def in_order(
  function: Callable[[_S], _T], items: Iterable[_S], num_workers: int = 0
) -> Generator[_T]:
  """Yields what `function` makes of each item; a bounded number ahead.

  It is called from as many threads as cores unless `num_workers` says how
  many. Who stops early need not wait for what was not begun.
  """
  num_workers = num_workers or os.cpu_count() or 1
  pending: collections.deque[futures.Future[_T]] = collections.deque()
  pool = futures.ThreadPoolExecutor(num_workers, 'jaxprog-parts')
  try:
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) >= 4 * num_workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def told(
  items: Iterable[_T],
  total: int,
  progress: Progress | None,
  size: Callable[[_T], int] = lambda _: 1,
) -> Iterator[_T]:
  """Yields `items`; tells `progress` of each once it is dealt with."""
  done = 0
  for item in items:
    yield item
    done += size(item)
    if progress:
      progress(done, max(total, done))


def read_parts(
  folder: pathlib.Path,
  count: int,
  size: int,
  read: Callable[[range], Arrays],
  progress: Progress | None = None,
) -> Iterator[Arrays]:
  """Yields what `read` makes of range(count), in parts of `size`, in order.

  Each part is kept in `folder`, where that can be written to, and found there
  after a kill; the caller removes it once the whole is kept. `progress` is
  called with the records done and in all.
  """

  def find(part: range) -> Arrays:
    file = folder / f'{part.start}.npz'
    try:
      with np.load(file, allow_pickle=False) as found:
        return dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
      pass  # Not there yet, or not whole: it has a sum.
    arrays = read(part)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with contextlib.suppress(OSError):  # Prepared data may be read-only.
      files.write_bytes(file, buffer.getvalue())
    return arrays

  whole = range(count)
  parts = [whole[i : i + size] for i in range(0, count, size)]
  made = zip(parts, in_order(find, parts), strict=True)
  for _, arrays in told(made, count, progress, lambda x: len(x[0])):
    yield arrays

"""Hands the weights of one stage to the next."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax

from jaxprog import errors

Variables = dict[str, Any]


class _Transfer(NamedTuple):
  """What a stage starts from, and where each part of it came from.

  `carried` and `fresh` name top-level modules; `dropped` those of the earlier
  stage that went nowhere.
  """

  variables: Variables
  carried: tuple[str, ...]
  fresh: tuple[str, ...]
  dropped: tuple[str, ...]


def transfer(
  trained: Variables,
  fresh: Variables,
  trained_classes: Sequence[str],
  classes: Sequence[str],
  *,
  keep_head: bool | None = None,
) -> _Transfer:
  """Returns `trained` with the head of `fresh` where the classes differ.

  Equal counts are not equal classes: the lists decide, unless `keep_head`
  does. All else, BatchNorm's statistics included, is carried bit for bit and
  must match in name, shape and dtype, because a backbone that silently
  restarts from scratch still trains, only worse. Of `fresh` only the head
  needs values: the rest may be shapes.

  Raises:
    UserError: if anything but the head differs.
  """
  if keep_head is None:
    keep_head = tuple(trained_classes) == tuple(classes)
  reset = set() if keep_head else {'head'}
  _check_backbone(trained, fresh, reset)
  modules = set(fresh['params'])
  return _Transfer(
    {
      collection: {
        **trained[collection],
        **{k: v for k, v in fresh[collection].items() if k in reset},
      }
      for collection in fresh
    },
    carried=tuple(sorted(modules - reset)),
    fresh=tuple(sorted(modules & reset)),
    dropped=tuple(sorted(set(trained['params']) & reset)),
  )


def _check_backbone(
  trained: Variables, fresh: Variables, reset: Collection[str]
) -> None:
  ours, theirs = _leaves(fresh, reset), _leaves(trained, reset)
  for path in sorted({*ours, *theirs}):
    if ours.get(path) != theirs.get(path):
      raise errors.UserError(
        f'The weights before do not fit: {path} is {theirs.get(path)} there '
        f'and {ours.get(path)} here.',
        'transfer between stages',
        'model, num_filters and stem_kernel must be the same in all stages.',
      )


def _leaves(variables: Variables, reset: Collection[str]) -> dict[str, str]:
  kept = {
    collection: {k: v for k, v in modules.items() if k not in reset}
    for collection, modules in variables.items()
  }
  return {
    jax.tree_util.keystr(path): f'{x.dtype}{list(x.shape)}'
    for path, x in jax.tree_util.tree_leaves_with_path(kept)
  }

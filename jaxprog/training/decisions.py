"""What evaluations decide: the plateau's rate, and an early end.

Both are functions of the rows of the history alone, which the checkpoint
holds: a run that was resumed decides like one that was not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.stages import Stage

Rows = Sequence[Mapping[str, Any]]


def rate_scale(stage: Stage, rows: Rows) -> float:
  """Returns what the `plateau` schedule multiplies the rate with from here.

  As PyTorch's ReduceLROnPlateau with an absolute threshold: after more than
  `plateau_patience` evaluations without a gain of `plateau_min_delta` the
  scale falls by `plateau_factor`, at most to `end_factor`; the following
  `plateau_cooldown` evaluations do not count as bad.
  """
  if stage.schedule != 'plateau':
    return 1.0
  scale, num_bad, cooldown = 1.0, 0, 0
  gains = _list_gains(rows, stage.plateau_metric, stage.plateau_min_delta)
  for gained in gains:
    num_bad = 0 if gained else num_bad + 1
    if cooldown > 0:
      cooldown, num_bad = cooldown - 1, 0
    if num_bad > stage.plateau_patience:
      scale = max(scale * stage.plateau_factor, stage.end_factor)
      cooldown, num_bad = stage.plateau_cooldown, 0
  return scale


def reason_to_stop(stage: Stage, rows: Rows) -> str:
  """Returns why the stage should end before its time, '' if it should not."""
  last = rows[-1]['val_top1'] if rows else None
  if (
    stage.target_top1 and formats.is_number(last) and last >= stage.target_top1
  ):
    return f'val_top1 reached the target of {stage.target_top1:.1%}'
  if not stage.early_stopping_patience:
    return ''
  num_bad, metric = 0, stage.best_metric
  for gained in _list_gains(rows, metric, stage.early_stopping_min_delta):
    num_bad = 0 if gained else num_bad + 1
  if num_bad < stage.early_stopping_patience:
    return ''
  return f'{metric} did not improve for {num_bad} evaluations'


def _list_gains(rows: Rows, metric: str, min_delta: float) -> list[bool]:
  """Returns of each row whether it is better than the best one before.

  By more than `min_delta`; what is not finite never is.
  """
  best, gains = -math.inf, []
  for row in rows:
    value = -math.inf
    if formats.is_number(row[metric]):
      value = -row[metric] if metric == 'val_loss' else row[metric]
    gains.append(value > best + min_delta)
    best = value if gains[-1] else best
  return gains

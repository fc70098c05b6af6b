"""What evaluations decide: the plateau's rate, and an early end.

Both are functions of the rows of the history alone, which the checkpoint
holds: a run that was resumed decides like one that was not.
"""

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
  scale, best, num_bad, cooldown = 1.0, None, 0, 0
  for value in _gains(rows, stage.plateau_metric):
    if _is_better(value, best, stage.plateau_min_delta):
      best, num_bad = value, 0
    else:
      num_bad += 1
    if cooldown > 0:
      cooldown, num_bad = cooldown - 1, 0
    if num_bad > stage.plateau_patience:
      scale = max(scale * stage.plateau_factor, stage.end_factor)
      cooldown, num_bad = stage.plateau_cooldown, 0
  return scale


def reason_to_stop(stage: Stage, rows: Rows) -> str:
  """Returns why the stage should end before its time, '' if it should not."""
  scores = _gains(rows, 'val_top1')
  last = scores[-1] if scores else None
  if stage.target_top1 and last is not None and last >= stage.target_top1:
    return f'val_top1 reached the target of {stage.target_top1:.1%}'
  if not stage.early_stopping_patience:
    return ''
  best, num_bad = None, 0
  for value in scores:
    if _is_better(value, best, stage.early_stopping_min_delta):
      best, num_bad = value, 0
    else:
      num_bad += 1
  if num_bad < stage.early_stopping_patience:
    return ''
  return f'val_top1 did not improve for {num_bad} evaluations'


def _gains(rows: Rows, metric: str) -> list[float | None]:
  """Returns the metric so that more is better; None where it is not finite."""
  sign = -1.0 if metric == 'val_loss' else 1.0
  values = [row[metric] for row in rows]
  return [sign * x if formats.is_number(x) else None for x in values]


def _is_better(
  value: float | None, best: float | None, min_delta: float
) -> bool:
  if value is None:
    return False
  return best is None or value > best + min_delta

"""The history of a run: plain dicts that say what each epoch came to.

    {'version': 1, 'config_hash': ..., 'stages': [stage, ...]}

A stage has name, dataset, num_classes, image_size, batch_size, optimizer,
schedule, num_epochs, steps_per_epoch, num_train_images, num_eval_images,
transfer, status (done, running, stopped_early), seconds, best and epochs; each
of these has epoch, global_step, train_loss, train_top1, val_loss, val_top1,
val_top5, learning_rate, grad_norm, seconds, images_per_second and input_wait,
None where there is no value. Both hold more than that.

Where classes are unequal, rows have val_balanced_top1, too: the mean over the
classes of the top-1 of each.

Epochs count from 1: row 3 was written when the third epoch was over.
Accuracies are fractions in [0, 1], times seconds, `global_step` counts over
all stages. The functions change the dicts they are given and return them.
"""

import json
import os
import pathlib
from typing import Any

from jaxprog import errors, formats

History = dict[str, Any]
Stage = dict[str, Any]
Row = dict[str, Any]

VERSION = 1


def new_history(config_hash: str) -> History:
  """Returns a history without stages."""
  return {'version': VERSION, 'config_hash': config_hash, 'stages': []}


def find_stage(history: History, name: str) -> Stage | None:
  """Returns the stage of that name, None if it was never begun."""
  return next((s for s in history['stages'] if s['name'] == name), None)


def next_step(history: History, name: str) -> int:
  """Returns the global steps of all stages but `name`, those yet to come too.

  A stage says in 'last_step' where it ends, or will.
  """
  ends = [0]
  for stage in history['stages']:
    if stage['name'] != name:
      trained = [row['global_step'] for row in stage['epochs']]
      ends.append(stage.get('last_step', max(trained, default=0)))
  return max(ends)


def holdout_rules(history: History) -> dict[str, int]:
  """Returns stage -> the rule by which its hold-out was chosen, where it was.

  The first rule had no number.
  """
  return {
    stage['name']: (stage.get('holdout') or {'rule': 1})['rule']
    for stage in history['stages']
    if str(stage.get('eval_split')).startswith('holdout')
  }


def begin_stage(history: History, **fields: Any) -> Stage:
  """Returns a running stage of `fields`, without rows, put into `history`.

  Whether a stage is begun, resumed or done is for its checkpoints to say, not
  for this file, which a crash may leave a little ahead or behind.
  """
  begun = {'status': 'running', 'seconds': 0.0, 'best': None, 'epochs': []}
  stage = {**fields, **begun}
  put_stage(history, stage)
  return stage


def put_stage(history: History, stage: Stage) -> None:
  """Puts `stage` in the place of one of the same name, else last."""
  names = [x['name'] for x in history['stages']]
  at = names.index(stage['name']) if stage['name'] in names else len(names)
  history['stages'][at : at + 1] = [stage]


def add_epoch(stage: Stage, **row: Any) -> Row:
  """Returns the row added to `stage`, in place of one of the same epoch.

  Also brings the stage's 'best' and 'seconds' up to date.
  """
  rows = [r for r in stage['epochs'] if r['epoch'] != row['epoch']] + [row]
  stage['epochs'] = sorted(rows, key=lambda r: r['epoch'])
  metric = stage.get('best_metric', 'val_top1')
  stage['best'] = best_epoch(stage['epochs'], metric)
  stage['seconds'] = sum(
    (r['seconds'] or 0.0) + r.get('eval_seconds', 0.0) for r in stage['epochs']
  )
  return row


def best_epoch(
  rows: list[Row], field: str = 'val_top1'
) -> dict[str, Any] | None:
  """Returns {'epoch', 'top1'} of the highest `field`, the first of equals.

  And 'balanced_top1' where the rows have it. None where no row has a finite
  `field`, which begins with val_ or ema_.
  """
  rated = [r for r in rows if formats.is_number(r.get(field))]
  if not rated:
    return None
  best, kind = max(rated, key=lambda r: r[field]), field.partition('_')[0]
  scores = {x: best.get(f'{kind}_{x}') for x in ('top1', 'balanced_top1')}
  found = {name: x for name, x in scores.items() if x is not None}
  return {'epoch': best['epoch'], **found}


def load_history(path: str | os.PathLike[str]) -> History:
  """Returns the history saved at `path`.

  Raises:
    UserError: where there is none, or something else.
  """
  try:
    history = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise errors.UserError(
      'There is no training history here yet.',
      str(path),
      'Name a workdir in which at least one epoch was trained.',
    ) from None
  except ValueError as error:
    raise errors.UserError(
      f'The training history is damaged: {error}.',
      str(path),
      'Move it away: training goes on from the checkpoints without it.',
    ) from None
  if not isinstance(history, dict) or not isinstance(
    history.get('stages'), list
  ):
    raise errors.UserError('This is not a training history.', str(path))
  if history.get('version') != VERSION:
    raise errors.UserError(
      f'The training history has version {history.get("version")!r}; '
      f'this program reads version {VERSION}.',
      str(path),
    )
  return history

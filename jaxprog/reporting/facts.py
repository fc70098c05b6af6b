"""What a run has come to: its scores, its times, what to know of them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxprog import formats
from jaxprog.monitoring import history as history_lib

# Train top-1 above validation top-1 by more than this, at the end of a stage,
# is named overfitting.
OVERFITTING_GAP = 0.10


# What a changed config leaves nothing of, by its name in a state.
_RENEWED = {
  'opt_state': 'the optimizer began anew',
  'ema': 'averaging began anew',
}


class Expectation(NamedTuple):
  """What the mission expects of a stage, and the size it speaks of."""

  top1: tuple[float, float]
  minutes: tuple[float, float]
  num_train_images: int
  num_epochs: int


# By dataset. The mission states these ranges without evidence.
EXPECTATIONS = {
  'imagenette': Expectation((0.85, 0.95), (30, 30), 9_469, 20),
  'tiny_imagenet': Expectation((0.60, 0.70), (60, 120), 100_000, 30),
  'imagenet_mini': Expectation((0.45, 0.55), (120, 180), 34_745, 40),
  'imagenet2012': Expectation((0.70, 0.80), (300, 420), 1_281_167, 60),
}


class TimeSplit(NamedTuple):
  """Where the seconds of a stage went."""

  # Forward, backward and update; steps are compiled before.
  training: float
  # For the next batch, while the device has nothing to do.
  input_wait: float
  evaluation: float
  # From the end of the stage before until the first batch is asked for, waiting
  # for this stage's compiler included.
  hand_over: float


class Score(NamedTuple):
  """A stage beside its expectation; verdicts: below, within, above or ''."""

  stage: str
  dataset: str
  top1: float | None
  minutes: float
  expectation: Expectation | None
  top1_verdict: str
  minutes_verdict: str
  comparable: bool


def best_top1(stage: Mapping[str, Any]) -> float | None:
  """Returns the top-1 that a stage stands for, None before its first epoch.

  That of its best weights on the validation images. Where a hold-out chooses
  them, it is theirs until validation is looked at, once, at the stage's end;
  see `is_on_holdout`.
  """
  found = stage.get('validation') or stage['best']
  return found['top1'] if found else None


def is_on_holdout(stage: Mapping[str, Any]) -> bool:
  """Returns whether `best_top1` is of training images that were set aside."""
  return chooses_on_holdout(stage) and not stage.get('validation')


def chooses_on_holdout(stage: Mapping[str, Any]) -> bool:
  """Returns whether a part of the training images decides which epoch is best.

  Then the stage's evaluations, epoch by epoch, are on that part.
  """
  return str(stage.get('eval_split') or '').startswith('holdout')


def scorecard(history: Mapping[str, Any]) -> list[Score]:
  """Returns every stage beside what the mission expects of its dataset.

  Compared is what is printed: top-1 in tenths of a percent, time in minutes.
  """
  return [_score(stage) for stage in history['stages']]


def scorecard_remarks(history: Mapping[str, Any]) -> list[str]:
  """Returns a sentence for each stage that the mission speaks otherwise of."""
  stages = {stage['name']: stage for stage in history['stages']}
  return [
    f'* {score.stage}: the expectation speaks of '
    f'{score.expectation.num_train_images:,} training images and '
    f'{score.expectation.num_epochs} epochs; {_as_run(stages[score.stage])}.'
    for score in scorecard(history)
    if score.expectation and not score.comparable
  ]


def time_split(stage: Mapping[str, Any]) -> TimeSplit:
  """Returns where the seconds of a stage went, as its rows say.

  Saves are in none of them, nor the part of an epoch before it was resumed.
  """
  rows = stage['epochs']
  seconds = [row['seconds'] or 0.0 for row in rows]
  waits = [
    s * (row['input_wait'] or 0.0) for s, row in zip(seconds, rows, strict=True)
  ]
  return TimeSplit(
    training=sum(seconds) - sum(waits),
    input_wait=sum(waits),
    evaluation=sum(row.get('eval_seconds') or 0.0 for row in rows),
    hand_over=stage.get('handover_seconds') or 0.0,
  )


def time_note(stages: Sequence[Mapping[str, Any]]) -> str:
  """Returns what a reader of the stages' `time_split` has to know."""
  note = (
    'Steps are compiled ahead: compiling the first stage is in no figure, '
    'waiting for the compiler of a later one is in its hand-over. Saves are in '
    'none.'
  )
  if any(stage.get('resumed_at_steps') for stage in stages):
    note += (
      ' An epoch resumed in its middle counts only the time since, though its '
      'earlier steps were kept.'
    )
  return note


def median_speed(stage: Mapping[str, Any]) -> float | None:
  """Returns the median of its epochs' images per second, None without one."""
  speeds = [
    row['images_per_second']
    for row in stage['epochs']
    if formats.is_number(row['images_per_second'])
  ]
  return statistics.median(speeds) if speeds else None


def measured(
  plan: Mapping[str, Any], stage: Mapping[str, Any]
) -> dict[str, float]:
  """Returns planned and measured images/s a chip and hours of a stage.

  Args:
    plan: of a stage, as `figures` gives it.
    stage: its record in a run's history, trained on such chips.
  """
  rows = stage['epochs']
  rate = sum(x['images_per_second'] for x in rows) / max(len(rows), 1)
  return {
    'planned_images_per_second': plan['images_per_second'],
    'images_per_second': rate / plan['num_chips'],
    'planned_hours': plan['hours'],
    'hours': stage['seconds'] / 3600,
  }


def confusions(
  stage: Mapping[str, Any], limit: int
) -> list[tuple[str, str, int, int]]:
  """Returns the most frequent mistakes of a stage's best weights.

  Each is the label, what it was taken for, how often, and how many images of
  the label there are; [] before the stage is over.
  """
  found = stage.get('diagnostics') or {}
  classes, per_class = found.get('classes', ()), found.get('per_class', ())
  mistakes = [
    x for x in found.get('confusions', ()) if x['label'] != x['predicted']
  ]
  return [
    (
      classes[x['label']],
      classes[x['predicted']],
      x['count'],
      per_class[x['label']][0],
    )
    for x in mistakes[:limit]
  ]


def planned_epochs(stage: Mapping[str, Any]) -> str:
  """Returns the epochs that the config asks for."""
  return f'{stage["num_epochs"]:g}'


def trained_epochs(stage: Mapping[str, Any]) -> str:
  """Returns the epochs trained; the row of a shorter last one counts less."""
  return f'{min(len(stage["epochs"]), stage["num_epochs"]):g}'


def describe_run(
  history: Mapping[str, Any], environment: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
  """Returns names and texts: config, date, machine, versions, command."""
  pairs = [('config', history['config_hash'] or '-')]
  if environment:
    devices = environment.get('devices') or {}
    git = environment.get('git') or {}
    dirty = ' with uncommitted changes' if git.get('dirty') else ''
    count = f'{devices.get("count")} x {devices.get("kind")}'
    processes = devices.get('process_count', 1)
    spread = f', {processes} processes' if processes > 1 else ''
    versions = environment.get('versions', {})
    shown = ('jax', 'flax', 'optax', 'orbax-checkpoint')
    pairs += [
      ('date', environment.get('time', '-')),
      ('host', environment.get('host', '-')),
      ('platform', environment.get('platform', '-')),
      ('devices', count + spread if devices else '-'),
      ('commit', git.get('commit', '-') + dirty),
      ('python', environment.get('python', '-')),
      (
        'versions',
        ', '.join(f'{k} {versions[k]}' for k in shown if k in versions),
      ),
      ('command', environment.get('command', '-')),
    ]
  total = sum(stage['seconds'] for stage in history['stages'])
  pairs.append(('trained', formats.duration(total)))
  return pairs


def notes(
  stages: Sequence[Mapping[str, Any]], planned: Sequence[str] = ()
) -> list[str]:
  """Returns sentences about what a reader must know beside the figures.

  What was not run, interrupted, stopped early, overfitted or left out.
  """
  notes = [note for stage in stages for note in _stage_notes(stage)]
  begun = {stage['name'] for stage in stages}
  if missing := [name for name in planned if name not in begun]:
    notes.append(f"Not run, of this config's stages: {', '.join(missing)}.")
  finished = {s['dataset'] for s in stages if s['status'] != 'running'}
  if unseen := [name for name in EXPECTATIONS if name not in finished]:
    notes.append(
      f"Not finished in this run, of the mission's datasets: "
      f'{", ".join(unseen)}. Nothing here speaks for them.'
    )
  return notes


def describe_changes(stage: Mapping[str, Any]) -> list[str]:
  """Returns each change of config that a stage went on with, for a sentence."""
  return [
    f'after {x["epoch"]:.3g} epochs it went on with '
    + ', '.join(
      f'{field} {shorten(str(now), 40)} (before: {shorten(str(was), 40)})'
      for field, (was, now) in x['fields'].items()
    )
    + ''.join(f'; {_RENEWED[part]}' for part in x['renewed'])
    for x in stage.get('config_changes') or ()
  ]


def _stage_notes(stage: Mapping[str, Any]) -> list[str]:
  name, notes = stage['name'], []
  planned, done = planned_epochs(stage), trained_epochs(stage)
  if stage['status'] == 'running':
    notes.append(
      f'{name}: not finished, {done} of {planned} epochs; its figures are '
      'provisional.'
    )
  if stage['status'] == 'stopped_early':
    why = f' ({stage["stopped"]})' if 'stopped' in stage else ''
    note = f'{name}: stopped early, after {done} of {planned} epochs{why}'
    if stage['schedule'] not in ('constant', 'plateau'):
      note += (
        f'; its schedule ({stage["schedule"]}) never reached its last '
        'learning rates'
      )
    notes.append(f'{note}.')
  notes += _input_notes(stage)
  if steps := stage.get('resumed_at_steps'):
    times = 'once' if len(steps) == 1 else f'{len(steps)} times'
    where = ', '.join(f'{step:,}' for step in steps)
    notes.append(
      f'{name}: interrupted and resumed {times}, at global step {where}.'
    )
  notes += [f'{name}: {x}.' for x in describe_changes(stage)]
  if note := _overfitting_note(stage):
    notes.append(note)
  if average := history_lib.best_epoch(stage['epochs'], 'ema_top1'):
    notes.append(
      f'{name}: its averaged weights reach '
      f'{formats.percent(average["top1"])} at epoch '
      f'{average["epoch"]}.'
    )
  if skipped := sum(r.get('skipped_steps', 0) for r in stage['epochs']):
    notes.append(
      f'{name}: {skipped} steps changed nothing, because their loss, gradient '
      'or new state was not finite.'
    )
  if bad := [r['epoch'] for r in stage['epochs'] if _is_broken(r)]:
    notes.append(f'{name}: the loss was not finite in epochs {_ranges(bad)}.')
  return notes


def _input_notes(stage: Mapping[str, Any]) -> list[str]:
  """Returns sentences about what the stage was trained and chosen on."""
  name, notes = stage['name'], []
  if validation := stage.get('validation'):
    notes.append(
      f'{name}: the best epoch was chosen on {stage["eval_split"]} of the '
      f'training images; its weights, of epoch {validation["epoch"]}, reach '
      f'{formats.percent(validation["top1"])} on the '
      f'{validation["num_images"]:,} validation images, looked at once.'
    )
  if excluded := sum(stage.get('excluded_images', {}).values()):
    notes.append(
      f'{name}: {excluded:,} training images were left out because a stage is '
      'evaluated on them, or on a copy.'
    )
  if bad := stage.get('bad_images'):
    more = ', ...' if len(bad) > 3 else ''
    notes.append(
      f'{name}: {len(bad):,} images could not be decoded and were left out of '
      f'the loss, or counted as wrong: {", ".join(sorted(bad)[:3])}{more}.'
    )
  if limit := stage.get('input_limit'):
    notes.append(f'{name}: {limit}.')
  return notes


def _overfitting_note(stage: Mapping[str, Any]) -> str:
  """Returns a sentence if the gap is large and wider than it was before."""
  gaps = [(gap, r) for r in stage['epochs'] if (gap := _gap(r)) is not None]
  if not gaps:
    return ''
  (narrow, then), (wide, _) = min(gaps, key=lambda x: x[0]), gaps[-1]
  if wide <= OVERFITTING_GAP or wide <= narrow:
    return ''
  return (
    f'{stage["name"]}: overfitting: train top-1 ends {100 * wide:.1f} points '
    f'above validation top-1 ({100 * narrow:+.1f} in epoch {then["epoch"]}). '
    'Train top-1 is a running average on augmented images, so the gap on '
    'equal terms is larger.'
  )


def _score(stage: Mapping[str, Any]) -> Score:
  top1 = best_top1(stage)
  minutes = stage['seconds'] / 60
  expected = EXPECTATIONS.get(stage['dataset'])
  score = Score(
    stage['name'], stage['dataset'], top1, minutes, expected, '', '', True
  )
  if expected is None:
    return score
  size = expected.num_train_images, expected.num_epochs
  return score._replace(
    top1_verdict=_verdict(top1, expected.top1, 3),
    minutes_verdict=_verdict(minutes, expected.minutes, 0),
    comparable=size == (stage['num_train_images'], len(stage['epochs']))
    and not is_on_holdout(stage),
  )


def _verdict(
  value: float | None, bounds: tuple[float, float], digits: int
) -> str:
  if value is None:
    return ''
  value, (low, high) = round(value, digits), bounds
  return 'below' if value < low else 'above' if value > high else 'within'


def _as_run(stage: Mapping[str, Any]) -> str:
  done = len(stage['epochs'])
  epochs = 'epoch' if done == 1 else 'epochs'
  where = ', and top-1 is on a hold-out' if is_on_holdout(stage) else ''
  return f'here it was {stage["num_train_images"]:,} and {done} {epochs}{where}'


def _gap(row: Mapping[str, Any]) -> float | None:
  train, val = row['train_top1'], row['val_top1']
  if formats.is_number(train) and formats.is_number(val):
    return train - val
  return None


def _is_broken(row: Mapping[str, Any]) -> bool:
  return not formats.is_number(row['train_loss'])


def _ranges(numbers: Sequence[int]) -> str:
  """Returns '3, 7-9' for [3, 7, 8, 9]."""
  parts: list[list[int]] = []
  for number in numbers:
    if parts and number == parts[-1][-1] + 1:
      parts[-1].append(number)
    else:
      parts.append([number])
  return ', '.join(
    f'{p[0]}-{p[-1]}' if len(p) > 1 else str(p[0]) for p in parts
  )


def shorten(text: str, width: int) -> str:
  """Returns `text`, its middle left out where it is longer than `width`."""
  if len(text) <= width:
    return text
  head = (width - 2) // 2
  return f'{text[:head]}..{text[len(text) - (width - 2 - head) :]}'

"""What a run has come to: its scores, its times, what to know of them."""

import datetime
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprog import formats
from jaxprog.monitoring import history as history_lib
from jaxprog.reporting import rundir

# Train top-1 above validation top-1 by more than this, at the end of a stage,
# is named overfitting.
_OVERFITTING_GAP = 0.10
# The largest class over the smallest one, from which on that is said.
_NOTED_RATIO = 1.5
# Of 95%, in standard deviations.
_Z = 1.96
# Of so many classes or fewer, five are too many.
_TOP5_CLASSES = 10
# What is told of a run's environment, in this order.
_ENVIRONMENT = (
  *('date', 'host', 'processor', 'memory', 'devices', 'platform'),
  *('commit', 'python', 'versions', 'command'),
)
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
  """Where the seconds of a stage went, one after the other."""

  # Forward, backward and update, and saves within an epoch.
  training: float = 0.0
  # For the next batch, while the device has nothing to do.
  input_wait: float = 0.0
  evaluation: float = 0.0
  # At the end of each epoch, as long as training waits for them.
  saves: float = 0.0
  # Waiting for it, which goes on while the stage before trains.
  compiling: float = 0.0
  # From the end of the stage before until the first batch is asked for.
  hand_over: float = 0.0
  # Of a run: all that is in no stage.
  rest: float = 0.0


class Score(NamedTuple):
  """A stage beside its expectation; verdicts: below, within, above or ''."""

  stage: str
  top1: float | None
  minutes: float
  expectation: Expectation | None
  top1_verdict: str = ''
  minutes_verdict: str = ''
  # A sentence on another size than the expectation speaks of; '': the same.
  remark: str = ''


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


def chance(stage: Mapping[str, Any]) -> float:
  """Returns the top-1 of guessing, where classes are equally large."""
  return 1 / stage['num_classes']


def describe_interval(stage: Mapping[str, Any]) -> str:
  """Returns the interval of `best_top1`, '' before its first epoch."""
  top1 = best_top1(stage)
  if not formats.is_number(top1):
    return ''
  found = stage.get('validation') or {'num_images': stage['num_eval_images']}
  low, high = interval(top1, found['num_images'])
  return f'{100 * low:.1f} to {100 * high:.1f}%'


def interval(top1: float, count: int) -> tuple[float, float]:
  """Returns the 95% interval of a top-1 by the number of its images.

  Wilson's: of one network, on other images; other seeds are not in it.
  """
  if not count:
    return 0.0, 1.0
  part = _Z**2 / count
  middle = (top1 + part / 2) / (1 + part)
  half = math.sqrt(part * (top1 * (1 - top1) + part / 4)) / (1 + part)
  return max(middle - half, 0.0), min(middle + half, 1.0)


def shows_top5(stage: Mapping[str, Any]) -> bool:
  """Returns whether its top-5 says something: of few classes it is all."""
  return stage['num_classes'] > _TOP5_CLASSES


def score(stage: Mapping[str, Any]) -> Score:
  """Returns a stage beside what the mission expects of its dataset.

  Compared is what is printed: top-1 in tenths of a percent, time in minutes.
  """
  top1, minutes = best_top1(stage), stage['seconds'] / 60
  expected = EXPECTATIONS.get(stage['dataset'])
  found = Score(stage['name'], top1, minutes, expected)
  if expected is None:
    return found
  return found._replace(
    top1_verdict=_verdict(top1, expected.top1, 3),
    minutes_verdict=_verdict(minutes, expected.minutes, 0),
    remark=_describe_size(stage, expected),
  )


def time_split(stage: Mapping[str, Any]) -> TimeSplit:
  """Returns where the seconds of a stage went, as its rows say.

  Not the part of an epoch before it was resumed.
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
    saves=stage.get('save_seconds') or 0.0,
    compiling=stage.get('compile_seconds') or 0.0,
    hand_over=stage.get('handover_seconds') or 0.0,
  )


def run_split(history: Mapping[str, Any]) -> dict[str, TimeSplit]:
  """Returns the splits of the stages, and of what is in none of them.

  Together they are the time of the run, where the history knows that.
  """
  splits = {stage['name']: time_split(stage) for stage in history['stages']}
  known = sum(map(sum, splits.values()))
  if (wall := history.get('wall_seconds') or 0.0) > known:
    splits['the rest'] = TimeSplit(rest=wall - known)
  return splits


def time_note(history: Mapping[str, Any]) -> str:
  """Returns what a reader of `run_split` has to know."""
  note = (
    'A later stage is compiled while the one before trains: what counts is '
    'waiting for it. A save within an epoch is in its training.'
  )
  untimed = [x['name'] for x in history['stages'] if 'compile_seconds' not in x]
  if 'wall_seconds' in history:
    note += (
      ' The rest is the start, the look at the best weights of each stage and '
      'what else lies between.'
    )
    if untimed:
      note += f' Saves and compilation of {", ".join(untimed)} were not timed.'
  else:
    note = 'Written before saves and compilation were timed: they are in none.'
  if any(stage.get('resumed_at_steps') for stage in history['stages']):
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


def describe_speed(stage: Mapping[str, Any]) -> str:
  """Returns `median_speed` as people read it."""
  speed = {'images_per_second': median_speed(stage)}
  return formats.cell('images_per_second', speed)


def last_row(stage: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the row of the last epoch, an empty one before the first."""
  return stage['epochs'][-1] if stage['epochs'] else {}


def total_seconds(run: rundir.RunFiles) -> float:
  """Returns the time that all stages have taken so far."""
  return sum(stage['seconds'] for stage in run.stages)


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


def describe_status(stage: Mapping[str, Any]) -> str:
  """Returns 'done', 'running' or 'stopped early'."""
  return stage['status'].replace('_', ' ')


def describe_run(run: rundir.RunFiles) -> dict[str, str]:
  """Returns names and texts: config, date, machine, versions, command."""
  found = {'config': run.history['config_hash'] or '-'}
  if environment := run.environment:
    devices = environment.get('devices') or {}
    git = environment.get('git') or {}
    versions = environment.get('versions', {})
    cores = environment.get('cpu_count')
    dirty = ' with uncommitted changes' if git.get('dirty') else ''
    shown = ('jax', 'flax', 'optax', 'orbax-checkpoint')
    said = {
      **environment,
      'date': describe_time(environment.get('time')),
      'processor': ', '.join(
        [environment.get('cpu') or '?'] + [f'{cores} cores'] * bool(cores)
      ),
      'memory': formats.size(environment.get('memory_bytes')),
      'devices': devices and _describe_devices(devices),
      'commit': git.get('commit', '-')[:10] + dirty,
      'versions': ', '.join(
        f'{k} {versions[k]}' for k in shown if k in versions
      ),
    }
    found |= {name: said.get(name) or '-' for name in _ENVIRONMENT}
  elif run.incidents is not None:
    found['machine'] = 'unknown: there is no environment.json'
  return {**found, 'trained': formats.duration(total_seconds(run))}


def describe_time(time: str | None) -> str:
  """Returns '27 November 2026, 19:15:02 UTC' of an ISO date, else `time`."""
  try:
    when = datetime.datetime.fromisoformat(time or '')
  except ValueError:
    return time or '-'
  return f'{when.day} {when:%B %Y, %H:%M:%S} {when:%Z}'.rstrip()


def _describe_devices(devices: Mapping[str, Any]) -> str:
  processes = devices.get('process_count', 1)
  spread = f', {processes} processes' if processes > 1 else ''
  memory = formats.size(devices.get('memory_bytes'))
  of = f' of {memory}' if memory else ''
  return f'{devices.get("count")} x {devices.get("kind")}{of}{spread}'


def notes(run: rundir.RunFiles) -> list[str]:
  """Returns sentences about what a reader must know beside the figures.

  What was not run, interrupted, stopped early, overfitted or left out.
  """
  stages = run.stages
  notes = [f'{s["name"]}: {x}.' for s in stages for x in _stage_notes(s)]
  begun = {stage['name'] for stage in stages}
  if missing := [name for name in run.planned if name not in begun]:
    notes.append(f"Not run, of this config's stages: {', '.join(missing)}.")
  finished = {s['dataset'] for s in stages if s['status'] != 'running'}
  unseen = [name for name in EXPECTATIONS if name not in finished]
  if unseen and any(s['dataset'] in EXPECTATIONS for s in stages):
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


def _stage_notes(stage: Mapping[str, Any]) -> Iterator[str]:
  """Yields sentences on a stage, without its name and their full stop."""
  planned, done = planned_epochs(stage), trained_epochs(stage)
  rows = stage['epochs']
  if stage['status'] == 'running':
    yield (
      f'not finished, {done} of {planned} epochs; its figures are provisional'
    )
  if stage['status'] == 'stopped_early':
    why = f' ({stage["stopped"]})' if 'stopped' in stage else ''
    cut = (
      ''
      if stage['schedule'] in ('constant', 'plateau')
      else (
        f'; its schedule ({stage["schedule"]}) never reached its last learning '
        'rates'
      )
    )
    yield f'stopped early, after {done} of {planned} epochs{why}{cut}'
  yield from _input_notes(stage)
  if steps := stage.get('resumed_at_steps'):
    times = 'once' if len(steps) == 1 else f'{len(steps)} times'
    where = ', '.join(f'{step:,}' for step in steps)
    yield f'interrupted and resumed {times}, at global step {where}'
  yield from describe_changes(stage)
  yield from _overfitting_notes(rows)
  if average := history_lib.best_epoch(rows, 'ema_top1'):
    yield (
      f'its averaged weights reach {formats.percent(average["top1"])} at epoch '
      f'{average["epoch"]}'
    )
  if skipped := sum(row.get('skipped_steps', 0) for row in rows):
    yield (
      f'{skipped} steps changed nothing, because their loss, gradient or new '
      'state was not finite'
    )
  if bad := [
    r['epoch'] for r in rows if not formats.is_number(r['train_loss'])
  ]:
    yield f'the loss was not finite in epochs {_ranges(bad)}'


def _input_notes(stage: Mapping[str, Any]) -> Iterator[str]:
  """Yields sentences about what the stage was trained and chosen on."""
  yield from _class_notes(stage)
  if validation := stage.get('validation'):
    yield (
      f'the best epoch was chosen on {stage["eval_split"]} of the training '
      f'images; its weights, of epoch {validation["epoch"]}, reach '
      f'{formats.percent(validation["top1"])} on the '
      f'{validation["num_images"]:,} validation images, looked at once'
    )
  if excluded := sum(stage.get('excluded_images', {}).values()):
    yield (
      f'{excluded:,} training images were left out because a stage is '
      'evaluated on them, or on a copy'
    )
  if bad := stage.get('bad_images'):
    more = ', ...' if len(bad) > 3 else ''
    yield (
      f'{len(bad):,} images could not be decoded and were left out of the '
      f'loss, or counted as wrong: {", ".join(sorted(bad)[:3])}{more}'
    )
  if limit := stage.get('input_limit'):
    yield limit


def _class_notes(stage: Mapping[str, Any]) -> Iterator[str]:
  """Yields a sentence if classes are so unequal that it matters, or chose."""
  found = stage.get('validation') or stage['best'] or {}
  if formats.is_number(found.get('balanced_top1')):
    least, most = stage['class_sizes']
    chose = stage['best_metric'] == 'val_balanced_top1'
    if most < _NOTED_RATIO * least and not chose:
      return
    yield (
      f'its classes have {least:,} to {most:,} training images; balanced '
      f'top-1, the mean over classes, is '
      f'{formats.percent(found["balanced_top1"])}'
      + ' and has chosen the best epoch'
      * chose
    )


def _overfitting_notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  """Yields a sentence if the gap is large and wider than it was before."""
  gaps = [
    (row['train_top1'] - row['val_top1'], row['epoch'])
    for row in rows
    if formats.is_number(row['train_top1'])
    and formats.is_number(row['val_top1'])
  ]
  if not gaps:
    return
  (narrow, then), (wide, _) = min(gaps), gaps[-1]
  if wide > max(_OVERFITTING_GAP, narrow):
    yield (
      f'overfitting: train top-1 ends {100 * wide:.1f} points above validation '
      f'top-1 ({100 * narrow:+.1f} in epoch {then}). Train top-1 is a running '
      'average on augmented images, so the gap on equal terms is larger'
    )


def _verdict(
  value: float | None, bounds: tuple[float, float], digits: int
) -> str:
  if value is None:
    return ''
  value, (low, high) = round(value, digits), bounds
  return 'below' if value < low else 'above' if value > high else 'within'


def _describe_size(stage: Mapping[str, Any], expected: Expectation) -> str:
  """Returns in what a stage is not what its expectation speaks of, or ''."""
  done, held = len(stage['epochs']), is_on_holdout(stage)
  wanted = expected.num_train_images, expected.num_epochs
  if (stage['num_train_images'], done) == wanted and not held:
    return ''
  return (
    f'* {stage["name"]}: the expectation speaks of {wanted[0]:,} training '
    f'images and {wanted[1]} epochs; here it was '
    f'{stage["num_train_images"]:,} and {done} '
    f'{"epoch" if done == 1 else "epochs"}'
    f'{", and top-1 is on a hold-out" if held else ""}.'
  )


def _ranges(numbers: Sequence[int]) -> str:
  """Returns '3, 7-9' for [3, 7, 8, 9]."""
  count = itertools.count()
  runs = [
    list(x) for _, x in itertools.groupby(numbers, lambda n: n - next(count))
  ]
  return ', '.join(f'{x[0]}-{x[-1]}' if len(x) > 1 else str(x[0]) for x in runs)


def shorten(text: str, width: int) -> str:
  """Returns `text`, its middle left out where it is longer than `width`."""
  if len(text) <= width:
    return text
  head = (width - 2) // 2
  return f'{text[:head]}..{text[len(text) - (width - 2 - head) :]}'

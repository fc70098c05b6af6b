"""The report's first section: the result, each stage, what ran on what."""

from collections.abc import Mapping, Sequence
from typing import Any

from configs import default
from jaxprog import config as config_lib
from jaxprog import formats
from jaxprog.reporting import facts
from jaxprog.reporting.page import charts, markup
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles


def overview(run: RunFiles) -> Html:
  """Returns the section's content."""
  return join(
    _headline(run),
    tag(
      'div',
      *(_card(i, stage) for i, stage in enumerate(run.stages, 1)),
      class_='cards',
    ),
    tag('h3', 'What ran on what'),
    _facts(run),
    tag('h3', 'The config beside the defaults'),
    config_difference(run.config),
  )


def describe_status(run: RunFiles) -> tuple[str, str]:
  """Returns how far the run is, and the class of the chip that says so."""
  over = sum(stage['status'] != 'running' for stage in run.stages)
  total = max(len(run.planned), len(run.stages))
  if over == total:
    return 'finished', 'good'
  running = any(stage['status'] == 'running' for stage in run.stages)
  more = ', one under way or interrupted' if running else ''
  return f'{over} of {total} stages finished{more}', 'warn'


def remark_chips(run: RunFiles) -> list[Html]:
  """Returns what a reader must know of the run at first sight."""
  resumes = sum(len(s.get('resumed_at_steps') or ()) for s in run.stages)
  early = [s['name'] for s in run.stages if s['status'] == 'stopped_early']
  texts = []
  if resumes:
    texts.append(f'resumed {"once" if resumes == 1 else f"{resumes} times"}')
  if early:
    texts.append(f'stopped early: {", ".join(early)}')
  return [tag('a', x, class_='chip warn', href='#notes') for x in texts]


def status_chip(stage: Mapping[str, Any]) -> Html:
  """Returns a stage's status, with colour where it is not simply done."""
  words = stage['status'].replace('_', ' ')
  if stage['status'] == 'running':
    words = 'not finished'
  good = stage['status'] == 'done'
  return tag('span', words, class_='chip good' if good else 'chip warn')


def _headline(run: RunFiles) -> Html:
  trained = [stage for stage in run.stages if stage['best']]
  tiles: list[tuple[str, str]] = []
  if trained:
    tiles.append(_headline_result(trained[-1]))
  seconds = sum(stage['seconds'] for stage in run.stages)
  epochs = sum(len(stage['epochs']) for stage in run.stages)
  status, _ = describe_status(run)
  over = sum(stage['status'] != 'running' for stage in run.stages)
  total = max(len(run.planned), len(run.stages))
  tiles += [
    (formats.duration(seconds), 'trained and evaluated'),
    (f'{over} of {total}', 'stages finished'),
    (f'{epochs:,}', 'epochs'),
  ]
  first = 'tile first' if trained else 'tile'
  return tag(
    'div',
    *(
      tag('div', tag('b', a), tag('span', b), class_='tile' if i else first)
      for i, (a, b) in enumerate(tiles)
    ),
    class_='tiles',
    aria_label=f'Result; {status}',
    role='group',
  )


def _headline_result(stage: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the top-1 that a stage stands for, and what it is."""
  if validation := stage.get('validation'):
    return (
      formats.percent(validation['top1']),
      f'top-1 of {stage["name"]} on {validation["num_images"]:,} validation '
      f'images, looked at once; epoch {validation["epoch"]} was chosen on '
      f'{stage["eval_split"]}',
    )
  best = stage['best']
  held = facts.is_on_holdout(stage)
  return (
    formats.percent(best['top1']),
    f'best top-1 of {stage["name"]}, epoch {best["epoch"]} of '
    f'{facts.planned_epochs(stage)}, on {stage["num_eval_images"]:,} '
    + ('training images held out' if held else 'validation images'),
  )


def _card(number: int, stage: Mapping[str, Any]) -> Html:
  best, held = stage['best'], facts.chooses_on_holdout(stage)
  at = ' top-1' + (f', epoch {best["epoch"]}' if best else '')
  at += ', on a hold-out' if facts.is_on_holdout(stage) else ''
  speed = {'images_per_second': facts.median_speed(stage)}
  pairs = [
    ('data', f'{stage["dataset"]}, {stage["num_classes"]:,} classes'),
    (
      'images',
      f'{stage["num_train_images"]:,} train, {stage["num_eval_images"]:,} '
      + ('held out' if held else 'val'),
    ),
    ('input', f'{stage["image_size"]} px, batch {stage["batch_size"]}'),
    ('recipe', f'{stage["optimizer"]}, {stage["schedule"]}'),
    (
      'epochs',
      f'{facts.trained_epochs(stage)} of {facts.planned_epochs(stage)}',
    ),
    (
      'time',
      f'{formats.duration(stage["seconds"])}, '
      f'{formats.cell("images_per_second", speed)} images/s',
    ),
  ]
  if 'num_params' in stage:
    pairs.append(('weights', formats.count(stage['num_params'])))
  points = [(float(r['epoch']), r['val_top1']) for r in stage['epochs']]
  return tag(
    'article',
    tag('h3', tag('span', f'{number}  {stage["name"]}'), status_chip(stage)),
    _description(stage),
    tag(
      'div',
      formats.percent(facts.best_top1(stage)),
      tag('small', at),
      class_='score',
    ),
    charts.sparkline(points, 'val'),
    definitions(pairs),
    class_='card',
  )


def _description(stage: Mapping[str, Any]) -> Html | None:
  text = stage.get('description')
  return tag('p', text, class_='note') if text else None


def definitions(pairs: Sequence[tuple[str, object]], style: str = '') -> Html:
  """Returns a list of names and what they stand for."""
  items = [join(tag('dt', name), tag('dd', value)) for name, value in pairs]
  return tag('dl', *items, class_=style or None)


def _facts(run: RunFiles) -> Html:
  pairs: list[tuple[str, object]] = []
  for name, text in facts.describe_run(run.history, run.environment):
    value = tag('code', text) if name in ('command', 'commit') else text
    pairs.append((name, value))
  if run.environment is None:
    pairs.append(('machine', 'unknown: there is no environment.json'))
  return definitions(pairs, 'facts')


def config_difference(config: Mapping[str, Any] | None) -> Html:
  """Returns the fields that are not as configs/default.py has them, folded.

  `config` is what config.json holds, with every stage complete.
  """
  if config is None:
    return tag('p', 'Unknown: there is no config.json.', class_='note')
  defaults = config_lib.to_json(default.get_config())
  fields = [
    [tag('code', name), quote(defaults.get(name)), tag('b', quote(value))]
    for name, value in sorted(config.items())
    if name not in ('stages', 'stage_defaults') and value != defaults.get(name)
  ]
  rows = _stage_rows(config['stages'], defaults['stage_defaults'])
  if not fields and not rows:
    return tag('p', 'All is as by default.')
  said = f'{len(fields)} fields of the run and {len(rows)} of the stages differ'
  return tag(
    'details',
    tag('summary', said),
    _field_table(fields, ['this run'], 'Fields of the run'),
    _field_table(
      rows,
      [stage['name'] for stage in config['stages']],
      'Fields of the stages; bold: not the default',
    ),
  )


def _field_table(
  rows: Sequence[Sequence[object]], names: Sequence[str], caption: str
) -> Html | None:
  if not rows:
    return None
  titles = ['field', 'default', *names]
  left = tuple(range(len(titles)))
  return markup.table(titles, rows, caption=caption, left=left)


def _stage_rows(
  stages: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[list[object]]:
  """Returns a row for each field that some stage has of its own."""

  def cell(field: str, value: Any) -> Html:
    same = value == defaults.get(field)
    return tag('span', quote(value), class_='same' if same else 'changed')

  fields = sorted({field for stage in stages for field in stage})
  return [
    [
      tag('code', field),
      quote(defaults.get(field)),
      *(cell(field, stage.get(field)) for stage in stages),
    ]
    for field in fields
    if field not in ('name', 'description')
    and any(stage.get(field) != defaults.get(field) for stage in stages)
  ]


def quote(value: Any) -> str:
  """Returns a config's value as people read it."""
  if value is None or value == '':
    return '–'
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, list):
    return ', '.join(map(quote, value)) or 'none'
  return f'{value:g}' if isinstance(value, float) else str(value)

"""The report's first section: the result, each stage, what ran on what."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxprog import config as config_lib
from jaxprog import formats
from jaxprog.reporting import facts
from jaxprog.reporting.page import charts, markup
from jaxprog.reporting.page.markup import Html, tag
from jaxprog.reporting.parts import Column, Heading, Part, Table
from jaxprog.reporting.rundir import RunFiles

STAGES = (
  Column('stage', lambda x: x['name'], left=True),
  Column('dataset', lambda x: x['dataset'], left=True),
  Column('classes', lambda x: f'{x["num_classes"]:,}'),
  Column('train', lambda x: f'{x["num_train_images"]:,}'),
  Column('val', lambda x: _describe_split(x)),
  Column('px', lambda x: _by_phase(x, 'image_size')),
  Column('batch', lambda x: _by_phase(x, 'batch_size')),
  Column('epochs', lambda x: f'{facts.trained_epochs(x)}/{x["num_epochs"]:g}'),
  Column('recipe', lambda x: f'{x["optimizer"]}, {x["schedule"]}', True, True),
  Column('weights', lambda x: _describe_weights(x), wide=True),
)
_RESULTS = (
  Column('stage', lambda x: x['name'], left=True),
  Column('best', lambda x: formats.percent((x['best'] or {}).get('top1'))),
  Column('epoch', lambda x: str((x['best'] or {'epoch': '-'})['epoch'])),
  Column('last', lambda x: formats.percent(facts.last_row(x).get('val_top1'))),
  Column('chance', lambda x: formats.percent(facts.chance(x))),
  Column('top-5', lambda x: _last_top5(x)),
  Column('time', lambda x: formats.duration(x['seconds'])),
  Column('images/s', facts.describe_speed),
  Column('status', facts.describe_status, left=True),
)
# Parts of a config that are no fields.
GROUPS = {'stages', 'stage_defaults'}
# Stands for the value of a field that a config does not have.
_ABSENT = object()


def overview(run: RunFiles) -> Iterator[Part]:
  """Yields the result, what ran on what, and each stage."""
  yield _headline(run)
  cards = [_card(i, stage) for i, stage in enumerate(run.stages, 1)]
  yield tag('div', *cards, class_='cards')
  yield tag('h3', 'What ran on what')
  yield facts.describe_run(run)
  yield Heading('Stages')
  yield Table(STAGES, run.stages, 'What each stage was trained on')
  yield Heading('Results')
  few = not any(map(facts.shows_top5, run.stages))
  columns = [x for x in _RESULTS if not (few and x.title == 'top-5')]
  yield Table(columns, run.stages, 'What came of each stage')
  note = 'best and last are top-1 on val images, chance is that of guessing.'
  if not few:
    note += ' top-5 is of the last epoch.'
  if held := [x['name'] for x in run.stages if facts.chooses_on_holdout(x)]:
    note += (
      f' On training images held out instead: {", ".join(held)}; see the notes.'
    )
  yield note
  yield tag('h3', 'The config beside the defaults')
  yield config_difference(run.config)


def describe_status(run: RunFiles) -> tuple[str, str]:
  """Returns how far the run is, and the class of the chip that says so."""
  over, total = _count_stages(run)
  if over == total:
    return 'finished', 'good'
  running = any(stage['status'] == 'running' for stage in run.stages)
  more = ', one under way or interrupted' if running else ''
  return f'{over} of {total} stages finished{more}', 'warn'


def _count_stages(run: RunFiles) -> tuple[int, int]:
  """Returns how many stages are over, and how many there will be."""
  over = sum(stage['status'] != 'running' for stage in run.stages)
  return over, max(len(run.planned), len(run.stages))


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


def _headline(run: RunFiles) -> Html:
  status, _ = describe_status(run)
  over, total = _count_stages(run)
  epochs = sum(len(stage['epochs']) for stage in run.stages)
  results = [
    tile(*_headline_result(x), 'tile first') for x in run.stages if x['best']
  ]
  return tag(
    'div',
    *results[-1:],
    *_time_tiles(run),
    tile(f'{over} of {total}', 'stages finished'),
    tile(f'{epochs:,}', 'epochs'),
    class_='tiles',
    aria_label=f'Result; {status}',
    role='group',
  )


def _time_tiles(run: RunFiles) -> Iterator[Html]:
  if 'wall_seconds' in run.history:
    # A history that was lost in between leaves a clock that knows less.
    wall = sum(map(sum, facts.run_split(run.history).values()))
    yield tile(formats.duration(wall), 'from start to end')
  trained = formats.duration(facts.total_seconds(run))
  yield tile(trained, 'trained and evaluated')


def tile(figure: str, said: str, style: str = 'tile') -> Html:
  """Returns a large figure above what it is."""
  return tag('div', tag('b', figure), tag('span', said), class_=style)


def _headline_result(stage: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the top-1 that a stage stands for, and what it is."""
  reached = formats.percent(facts.best_top1(stage))
  unsure = f'; {_describe_spread(stage)}'
  if validation := stage.get('validation'):
    return (
      reached,
      f'top-1 of {stage["name"]} on {validation["num_images"]:,} validation '
      f'images, looked at once; epoch {validation["epoch"]} was chosen on '
      f'{stage["eval_split"]}{unsure}',
    )
  held = facts.is_on_holdout(stage)
  return (
    reached,
    f'best top-1 of {stage["name"]}, epoch {stage["best"]["epoch"]} of '
    f'{facts.planned_epochs(stage)}, on {stage["num_eval_images"]:,} '
    + ('training images held out' if held else 'validation images')
    + unsure,
  )


def _describe_spread(stage: Mapping[str, Any]) -> str:
  """Returns what the stage's top-1 is to be held against."""
  spread = facts.describe_interval(stage)
  level = f'chance {formats.percent(facts.chance(stage))}'
  return f'95% interval {spread}, {level}' if spread else level


def _last_top5(stage: Mapping[str, Any]) -> str:
  last = facts.last_row(stage) if facts.shows_top5(stage) else {}
  return formats.percent(last.get('val_top5'))


def _card(number: int, stage: Mapping[str, Any]) -> Html:
  best = stage['best']
  at = ' top-1' + (f', epoch {best["epoch"]}' if best else '')
  at += ', on a hold-out' if facts.is_on_holdout(stage) else ''
  running, done = (stage['status'] == x for x in ('running', 'done'))
  status = 'not finished' if running else facts.describe_status(stage)
  return tag(
    'article',
    tag(
      'h3',
      tag('span', f'{number}  {stage["name"]}'),
      tag('span', status, class_=f'chip {"good" if done else "warn"}'),
    ),
    tag('p', stage.get('description') or '', class_='note'),
    tag(
      'div',
      formats.percent(facts.best_top1(stage)),
      tag('small', at),
      class_='score',
    ),
    tag('p', _describe_spread(stage), class_='note'),
    charts.sparkline([(r['epoch'], r['val_top1']) for r in stage['epochs']]),
    class_='card',
  )


def _describe_weights(stage: Mapping[str, Any]) -> str:
  return formats.count(stage['num_params']) if 'num_params' in stage else '-'


def _describe_split(stage: Mapping[str, Any]) -> tuple[str, str]:
  """Returns how many images are evaluated on, and whether they are held out."""
  held = facts.chooses_on_holdout(stage)
  return f'{stage["num_eval_images"]:,}', 'held out' if held else ''


def _by_phase(stage: Mapping[str, Any], field: str) -> tuple[str, str]:
  """Returns the values that a stage's phases set, and when."""
  phases = stage.get('phases') or ()
  later = [(x, changes[field]) for x, changes in phases if field in changes]
  values = stage[field], *(value for _, value in later)
  since = ', '.join(f'{x:g}' for x, _ in later)
  return ' → '.join(map(str, values)), since and f'after epoch {since}'


def config_difference(
  config: Mapping[str, Any] | None, *, is_open: bool = False
) -> Html:
  """Returns the fields that are not as configs/default.py has them.

  Folded, unless it `is_open`. `config` is what config.json holds, with every
  stage complete.
  """
  if config is None:
    return tag('p', 'Unknown: there is no config.json.', class_='note')
  defaults = config_lib.to_json(config_lib.defaults())
  stages, of_stages = config['stages'], defaults['stage_defaults']
  own = differing_rows([defaults, config], config.keys() - GROUPS)
  fields = set().union(*stages) - {'name', 'description'}
  rows = differing_rows([of_stages, *stages], fields)
  if not own and not rows:
    return tag('p', 'All is as by default.')
  said = f'{len(own)} fields of the run and {len(rows)} of the stages differ'
  titles = ['field', 'default']
  names = [stage['name'] for stage in stages]
  return tag(
    'details',
    tag('summary', said),
    field_table([*titles, 'this run'], own, 'Fields of the run'),
    field_table(
      [*titles, *names], rows, 'Fields of the stages; bold: not the default'
    ),
    open='' if is_open else None,
  )


def field_table(
  titles: Sequence[str], rows: Sequence[Sequence[Html]], caption: str
) -> Html | None:
  """Returns a table of what `differing_rows` has found, None of nothing."""
  if not rows:
    return None
  return markup.table(titles, rows, caption=caption, left=range(len(titles)))


def differing_rows(
  columns: Sequence[Mapping[str, Any]], names: Iterable[str]
) -> list[list[Html]]:
  """Returns a row for each field of `names` that the columns do not share.

  What is not as in the first column is bold.
  """
  rows = []
  for name in sorted(names):
    values = [fields.get(name, _ABSENT) for fields in columns]
    same = [value == values[0] for value in values]
    if not all(same):
      cells = (
        tag('span', _quote(value), class_='same')
        if x
        else tag('b', _quote(value), class_='changed')
        for value, x in zip(values, same, strict=True)
      )
      rows.append([tag('code', name), *cells])
  return rows


def _quote(value: Any) -> str:
  """Returns a config's value as people read it."""
  if value is _ABSENT:
    return 'not set'
  if value is None or value == '':
    return '–'
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, list):
    return ', '.join(map(_quote, value)) or 'none'
  return f'{value:g}' if isinstance(value, float) else str(value)

"""comparison.html: several runs side by side, without a verdict."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.monitoring import history as history_lib
from jaxprog.reporting import facts
from jaxprog.reporting.page import charts, html, markup, overview
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles

# Parts of a config that are no fields.
_GROUPS = ('stages', 'stage_defaults')
# Stands for the value of a field that a config does not have.
_ABSENT = object()
# Styles of lines; further runs begin again.
_STYLES = ('s0', 's1', 's2', 's3', 's4', 's5')


def side_by_side(runs: Sequence[RunFiles]) -> str:
  """Returns a page with a column for each run."""
  runs = _with_own_names(runs)
  return html.document(
    f'Comparison of {len(runs)} runs',
    tag(
      'header',
      tag('p', 'Comparison', class_='eyebrow'),
      tag('h1', ' · '.join(run.name for run in runs)),
      tag(
        'p',
        'Each column is one run with one seed: n = 1. A difference between '
        'two of them says nothing of what a repetition would give.',
        class_='note',
      ),
      class_='top',
    ),
    [
      ('runs', 'Runs', _facts(runs)),
      ('config', 'Config differences', _config(runs)),
      ('results', 'Results by stage', _results(runs)),
      ('curves', 'Top-1 by stage', _curves(runs)),
    ],
    'Made from the training_history.json, config.json and environment.json of '
    'each workdir by --mode=report.',
  )


def _with_own_names(runs: Sequence[RunFiles]) -> list[RunFiles]:
  """Returns the runs with numbers behind names that occur twice."""
  names = [run.name for run in runs]
  return [
    run._replace(name=f'{run.name} ({i})') if names.count(run.name) > 1 else run
    for i, run in enumerate(runs, 1)
  ]


def _table(
  runs: Sequence[RunFiles], rows: list[list[object]], caption: str
) -> Html:
  titles = ['', *(run.name for run in runs)]
  return markup.table(
    titles, rows, caption=caption, left=tuple(range(len(titles)))
  )


def _facts(runs: Sequence[RunFiles]) -> Html:
  described = [
    {
      'n': '1',
      'status': overview.describe_status(run)[0],
      **dict(facts.describe_run(run.history, run.environment)),
    }
    for run in runs
  ]
  names = dict.fromkeys(itertools.chain.from_iterable(described))
  rows: list[list[object]] = [
    [name, *(one.get(name, '–') for one in described)] for name in names
  ]
  return _table(runs, rows, 'What ran on what')


def _config(runs: Sequence[RunFiles]) -> Html:
  """Returns the fields that are not the same in all runs."""
  flat = _flatten([run.config for run in runs])
  names = sorted(set(itertools.chain.from_iterable(flat)))
  rows: list[list[object]] = [
    [tag('code', name), *(_quote(fields, name) for fields in flat)]
    for name in names
    if any(
      fields.get(name, _ABSENT) != flat[0].get(name, _ABSENT) for fields in flat
    )
  ]
  lacking = [run.name for run in runs if run.config is None]
  note = (
    tag('p', f'Without a config.json: {", ".join(lacking)}.', class_='note')
    if lacking
    else None
  )
  if not rows:
    return join(note, tag('p', 'None.'))
  return join(
    note, _table(runs, rows, 'Not the same in all runs; *: of every stage')
  )


def _quote(fields: Mapping[str, Any], name: str) -> object:
  if name in fields:
    return overview.quote(fields[name])
  return tag('span', 'not set', class_='same')


def _flatten(
  configs: Sequence[Mapping[str, Any] | None],
) -> list[dict[str, Any]]:
  """Returns each config's fields by name, those of its stages too.

  A stage's field is STAGE.field; but one that no config varies from stage to
  stage stands once, as '*.field'.
  """
  stages = [(config or {}).get('stages', ()) for config in configs]
  fields = {f for run in stages for stage in run for f in stage}
  varied = {f for f in fields for run in stages if _varies(run, f)}
  flat = []
  for config, run in zip(configs, stages, strict=True):
    own = {k: v for k, v in (config or {}).items() if k not in _GROUPS}
    for stage in run:
      for field in stage.keys() - {'name', 'description'}:
        where = stage['name'] if field in varied else '*'
        own[f'{where}.{field}'] = stage[field]
    flat.append(own)
  return flat


def _varies(stages: Sequence[Mapping[str, Any]], field: str) -> bool:
  values = [stage.get(field) for stage in stages]
  return any(value != values[0] for value in values)


def _stage_names(runs: Sequence[RunFiles]) -> list[str]:
  return list(dict.fromkeys(s['name'] for run in runs for s in run.stages))


def _results(runs: Sequence[RunFiles]) -> Html:
  return join(*(_stage_table(runs, name) for name in _stage_names(runs)))


def _stage_table(runs: Sequence[RunFiles], name: str) -> Html:
  columns = [
    _stage_figures(history_lib.find_stage(run.history, name)) for run in runs
  ]
  names = list(dict.fromkeys(itertools.chain.from_iterable(columns)))
  rows: list[list[object]] = [
    [field, *(column.get(field, '–') for column in columns)] for field in names
  ]
  titles = ['', *(run.name for run in runs)]
  table = markup.table(titles, rows, caption=f'{name}, by run', left=(0,))
  return join(tag('h3', name), table)


def _stage_figures(stage: Mapping[str, Any] | None) -> dict[str, str]:
  if stage is None:
    return {'status': 'not run'}
  best = stage['best'] or {'epoch': '–'}
  last = stage['epochs'][-1] if stage['epochs'] else {}
  speed = {'images_per_second': facts.median_speed(stage)}
  return {
    'status': stage['status'].replace('_', ' '),
    'best top-1': formats.percent(facts.best_top1(stage)),
    'best top-1 on': 'a hold-out'
    if facts.is_on_holdout(stage)
    else 'validation',
    'at epoch': str(best['epoch']),
    'epochs evaluated on': 'a hold-out'
    if facts.chooses_on_holdout(stage)
    else 'validation',
    'last top-1': formats.percent(last.get('val_top1')),
    'last val loss': formats.cell('val_loss', last),
    'epochs': f'{facts.trained_epochs(stage)} of {facts.planned_epochs(stage)}',
    'time': formats.duration(stage['seconds']),
    'images/s': formats.cell('images_per_second', speed),
    'train images': f'{stage["num_train_images"]:,}',
    'px': str(stage['image_size']),
    'resumes': str(len(stage.get('resumed_at_steps') or ())),
  }


def _curves(runs: Sequence[RunFiles]) -> Html:
  found = [_stage_chart(runs, name) for name in _stage_names(runs)]
  return join(*found) if any(found) else tag('p', 'No epoch is finished yet.')


def _stage_chart(runs: Sequence[RunFiles], name: str) -> Html | None:
  """Returns validation top-1 over the epochs of a stage, a line a run."""
  series, labels, said = [], [], []
  for i, run in enumerate(runs):
    stage = history_lib.find_stage(run.history, name)
    if stage is None or not stage['epochs']:
      continue
    style = _STYLES[i % len(_STYLES)]
    points: list[charts.Point] = [
      (row['epoch'], _percent(row['val_top1'])) for row in stage['epochs']
    ]
    series.append(charts.Series(run.name, style, points))
    if best := stage['best']:
      text = f'{100 * best["top1"]:.1f}%'
      labels.append(
        charts.Label(best['epoch'], 100 * best['top1'], text, style)
      )
      said.append(f'{run.name} {text}')
  if not series:
    return None
  return charts.line_chart(
    name,
    series,
    y=charts.Scale(0, 104),
    y_ticks=range(0, 101, 20),
    x_end=max(x for s in series for x, _ in s.points),
    x_label='epochs of the stage',
    format_y='{:g}%'.format,
    labels=labels,
    summary=f'Best: {", ".join(said) or "none yet"}.',
  )


def _percent(value: float | None) -> float | None:
  return 100 * value if formats.is_number(value) else None

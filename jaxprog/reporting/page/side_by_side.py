"""comparison.html: several runs side by side, without a verdict."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprog import formats
from jaxprog.monitoring import history as history_lib
from jaxprog.reporting import facts, timeline
from jaxprog.reporting.page import charts, curves, html, markup, overview
from jaxprog.reporting.page.markup import Html, join, render, tag
from jaxprog.reporting.rundir import RunFiles

# Styles of lines; further runs begin again.
_STYLES = ('s0', 's1', 's2', 's3', 's4', 's5')


def side_by_side(runs: Sequence[RunFiles]) -> str:
  """Returns a page with a column for each run."""
  runs = _with_own_names(runs)
  names = list(dict.fromkeys(s['name'] for run in runs for s in run.stages))
  by_stage = {
    name: [history_lib.find_stage(run.history, name) for run in runs]
    for name in names
  }
  results = (
    join(
      tag('h3', name),
      _table(runs, list(map(_figures, stages)), f'{name}, by run', left=(0,)),
    )
    for name, stages in by_stage.items()
  )
  drawn = [_chart(runs, name, stages) for name, stages in by_stage.items()]
  described = [
    {
      'n': '1',
      'status': overview.describe_status(run)[0],
      **facts.describe_run(run),
    }
    for run in runs
  ]
  return html.document(
    f'Comparison of {len(runs)} runs',
    html.create_header(
      'Comparison',
      ' · '.join(run.name for run in runs),
      render(
        'Each column is one run with one seed: n = 1. A difference between two '
        'of them says nothing of what a repetition would give.'
      ),
    ),
    [
      ('runs', 'Runs', _table(runs, described, 'What ran on what')),
      ('config', 'Config differences', _config(runs)),
      ('results', 'Results by stage', join(*results)),
      (
        'curves',
        'Top-1 by stage',
        join(*drawn) or tag('p', 'No epoch is finished yet.'),
      ),
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
  runs: Sequence[RunFiles],
  columns: Sequence[Mapping[str, Any]],
  caption: str,
  left: Sequence[int] | None = None,
) -> Html:
  """Returns a table with a row for each name that a column has."""
  titles = ['', *(run.name for run in runs)]
  rows = [
    [name, *(column.get(name, '-') for column in columns)]
    for name in dict.fromkeys(itertools.chain.from_iterable(columns))
  ]
  left = range(len(titles)) if left is None else left
  return markup.table(titles, rows, caption=caption, left=left)


def _config(runs: Sequence[RunFiles]) -> Html:
  """Returns the fields that are not the same in all runs."""
  flat = _flatten([run.config or {} for run in runs])
  rows = overview.differing_rows(flat, set().union(*flat))
  lacking = [run.name for run in runs if run.config is None]
  said = f'Without a config.json: {", ".join(lacking)}.'
  caption = 'Not the same in all runs; *: of every stage'
  return join(
    tag('p', said, class_='note') if lacking else None,
    overview.field_table(['', *(run.name for run in runs)], rows, caption)
    or tag('p', 'None.'),
  )


def _flatten(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns each config's fields by name, those of its stages too.

  A stage's field is STAGE.field; but one that no config varies from stage to
  stage stands once, as '*.field'.
  """
  stages = [config.get('stages', ()) for config in configs]
  fields = {f for run in stages for stage in run for f in stage}
  varied = {
    field
    for field in fields
    for run in stages
    if any(stage.get(field) != run[0].get(field) for stage in run)
  }
  flat = []
  for config, run in zip(configs, stages, strict=True):
    own = {k: v for k, v in config.items() if k not in overview.GROUPS}
    for stage in run:
      for field in stage.keys() - {'name', 'description'}:
        where = stage['name'] if field in varied else '*'
        own[f'{where}.{field}'] = stage[field]
    flat.append(own)
  return flat


def _figures(stage: Mapping[str, Any] | None) -> dict[str, Any]:
  if stage is None:
    return {'status': 'not run'}
  best = stage['best'] or {'epoch': '-'}
  last = facts.last_row(stage)
  splits = 'validation', 'a hold-out'
  return {
    'status': facts.describe_status(stage),
    'best top-1': formats.percent(facts.best_top1(stage)),
    'best top-1 on': splits[facts.is_on_holdout(stage)],
    'at epoch': str(best['epoch']),
    'epochs evaluated on': splits[facts.chooses_on_holdout(stage)],
    'last top-1': formats.percent(last.get('val_top1')),
    'last val loss': formats.cell('val_loss', last),
    'epochs': f'{facts.trained_epochs(stage)} of {facts.planned_epochs(stage)}',
    'time': formats.duration(stage['seconds']),
    'images/s': facts.describe_speed(stage),
    'resumes': str(len(stage.get('resumed_at_steps') or ())),
    **{x.title: x.cell(stage) for x in overview.STAGES[1:]},
  }


def _chart(
  runs: Sequence[RunFiles],
  name: str,
  stages: Sequence[Mapping[str, Any] | None],
) -> Html | None:
  """Returns validation top-1 over the epochs of a stage, a line a run."""
  found = [
    (run.name, style, span)
    for run, stage, style in zip(runs, stages, itertools.cycle(_STYLES))
    for span in timeline.spans([stage] if stage else [])
  ]
  if not found:
    return None
  return curves.draw_top1(
    charts.line_chart,
    name,
    [
      charts.Series(label, style, span.points('val_top1', 100))
      for label, style, span in found
    ],
    found,
    x_end=max(span.end for _, _, span in found),
    x_label='epochs of the stage',
  )

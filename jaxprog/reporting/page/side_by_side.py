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
  """Returns a page with a column for each run: first what came of them."""
  runs = _with_own_names(runs)
  names = list(dict.fromkeys(s['name'] for run in runs for s in run.stages))
  by_stage = {
    name: [history_lib.find_stage(run.history, name) for run in runs]
    for name in names
  }
  common = {k: v for k, v in by_stage.items() if None not in v} or by_stage
  drawn = [_chart(runs, name, stages) for name, stages in common.items()]
  described = [
    {
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
      ('results', 'Results', _results(runs, common, by_stage)),
      (
        'curves',
        'Top-1 by stage',
        join(*drawn) or tag('p', 'No epoch is finished yet.'),
      ),
      ('config', 'Config differences', _config(runs)),
      ('runs', 'What ran on what', _table(runs, described, 'The runs')),
    ],
    'Made from the training_history.json, config.json and environment.json of '
    'each workdir by --mode=report.',
  )


def _results(
  runs: Sequence[RunFiles],
  shown: Mapping[str, Sequence[Mapping[str, Any] | None]],
  known: Mapping[str, object],
) -> Html:
  """Returns a table of stages and runs; of stages in all of them, if any."""
  rows = [[name, *map(_figures, stages)] for name, stages in shown.items()]
  titles = ['stage', *(run.name for run in runs)]
  others = [name for name in known if name not in shown]
  return join(
    markup.table(titles, rows, caption='Best top-1'),
    render(f'Not in every run: {", ".join(others)}.') if others else None,
  )


def _with_own_names(runs: Sequence[RunFiles]) -> list[RunFiles]:
  """Returns the runs with numbers behind names that occur twice."""
  names = [run.name for run in runs]
  return [
    run._replace(name=f'{run.name} ({i})') if names.count(run.name) > 1 else run
    for i, run in enumerate(runs, 1)
  ]


def _table(
  runs: Sequence[RunFiles], columns: Sequence[Mapping[str, Any]], caption: str
) -> Html:
  """Returns a table with a row for each name that a column has."""
  titles = ['', *(run.name for run in runs)]
  rows = [
    [name, *(column.get(name, '-') for column in columns)]
    for name in dict.fromkeys(itertools.chain.from_iterable(columns))
  ]
  return markup.table(titles, rows, caption=caption, left=range(len(titles)))


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


def _figures(stage: Mapping[str, Any] | None) -> tuple[str, str]:
  """Returns a stage's top-1, and what else is to be known of it."""
  if stage is None:
    return 'not run', ''
  best = stage['best'] or {'epoch': '-'}
  spread = facts.describe_interval(stage)
  said = [
    f'95% interval {spread}' if spread else '',
    f'epoch {best["epoch"]} of {facts.planned_epochs(stage)}',
    f'on {stage["num_eval_images"]:,} images'
    + (' held out' if facts.is_on_holdout(stage) else ''),
    formats.duration(stage['seconds']),
    '' if stage['status'] == 'done' else facts.describe_status(stage),
  ]
  return formats.percent(facts.best_top1(stage)), ', '.join(filter(None, said))


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
    x_label=f'epochs of {name}',
  )

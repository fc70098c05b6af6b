"""From run directories to records, and to what these say.

A run's record has all that statistics, tables and figures read; see
`read_record`.
"""

import itertools
import json
import pathlib
import statistics as mean_lib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ml_collections import config_dict

from jaxprog import formats
from jaxprog.comparison import claims, sequential, statistics, verdicts
from jaxprog.comparison.budgets import StageCost
from jaxprog.comparison.cells import Cell
from jaxprog.comparison.claims import Claim
from jaxprog.comparison.runs import Planned
from jaxprog.comparison.sequential import Rule
from jaxprog.comparison.statistics import Axis, Record
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import outcomes as outcomes_lib
from jaxprog.training import run as run_lib


def read_record(
  planned: Planned,
  outcome: Mapping[str, Any],
  handovers: Mapping[str, float],
) -> Record:
  """Returns what came of one run, an entry of `runs` in docs/compare.md.

  `curve` and `boundaries` count the whole ladder, also what was trained once
  for several cells. Its accuracies, and `best_top1`, are those of the images
  that choose the best weights, parts of one, None where there are none. So is
  `final_top1`, of the last epoch's weights; but where a hold-out chooses, it is
  that of the best weights on the validation images, looked at once.
  `learning_rate` and `num_epochs` are the last stage's.

  `outcome` says how it ended: 'status', 'error' and 'shared'. `handovers` are
  seconds of the hand-over to a stage where it was not measured, because the
  stage before came from another run.
  """
  history = run_lib.read_history(planned.workdir)
  curve, boundaries = _read_costs(planned, history, handovers)
  last = history_lib.find_stage(history, planned.names[-1])
  num_images, holdout_images = last['num_eval_images'] if last else 0, 0
  final = best = outcomes = None
  if outcome['status'] == 'done' and last and last['best']:
    epoch, final = (last['epochs'][-1][x] for x in ('epoch', 'val_top1'))
    validation = last.get('validation')
    if validation:
      epoch, final = validation['epoch'], validation['top1']
      num_images, holdout_images = validation['num_images'], num_images
    found = final, last['best']['top1']
    final, best = (x if formats.is_number(x) else None for x in found)
    path = outcomes_lib.find_path(
      planned.workdir, planned.names[-1], validation=bool(validation)
    )
    outcomes = outcomes_lib.read(path, epoch)
  resumes = [stage.get('resumed_at_steps', ()) for stage in history['stages']]
  return {
    'cell': planned.cell.name,
    'seed': planned.seed,
    'overrides': dict(planned.cell.overrides),
    'labels': dict(planned.cell.labels),
    'control': planned.cell.control,
    'status': outcome['status'],
    'error': outcome['error'],
    'learning_rate': planned.last.peak_learning_rate,
    'num_epochs': planned.last.num_epochs,
    'final_top1': final,
    'best_top1': best,
    'num_images': num_images,
    'holdout_images': holdout_images,
    'outcomes': outcomes_lib.to_json(outcomes),
    'curve': curve,
    'boundaries': boundaries,
    'shared': outcome['shared'],
    'resumed': sum(map(len, resumes)),
    'workdir': str(planned.workdir),
    **_read_machine(planned.workdir),
  }


def _read_machine(workdir: pathlib.Path) -> dict[str, str]:
  """Returns on which host and kind of device a run was last begun."""
  try:
    found = json.loads((workdir / 'environment.json').read_text())
  except (FileNotFoundError, ValueError):
    return {'host': '', 'device': ''}
  devices = found.get('devices') or {}
  kind = devices.get('kind', '')
  if devices.get('platform') == 'cpu':  # Which is all that JAX says of it.
    kind = found.get('cpu', kind)
  return {'host': found.get('host', ''), 'device': kind}


def _read_costs(
  planned: Planned,
  history: history_lib.History,
  handovers: Mapping[str, float],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Returns a record's curve and boundaries, of the stages that were begun."""
  spent = dict.fromkeys(('epochs', 'images', 'flops', 'seconds'), 0.0)
  curve: list[dict[str, Any]] = []
  boundaries: list[dict[str, Any]] = []
  first_step = 0
  for cost in planned.costs:
    stage = history_lib.find_stage(history, cost.name)
    if stage is None:
      return [], boundaries
    handover = {**cost.handover._asdict(), 'seconds': 0.0}
    if boundaries:
      default = handovers.get(cost.name, 0.0)
      handover['seconds'] = stage.get('handover_seconds', default)
    for kind, value in handover.items():
      spent[kind] += value
    first_step = stage.get('first_step', first_step)
    curve = _read_curve(stage, cost, first_step, spent)
    if curve:
      spent = {k: v for k, v in curve[-1].items() if k != 'top1'}
    before = {f'handover_{kind}': value for kind, value in handover.items()}
    boundaries.append({'stage': cost.name, **before, **spent})
    first_step += cost.steps.total
  return curve, boundaries


def _read_curve(
  stage: Mapping[str, Any],
  cost: StageCost,
  first_step: int,
  spent: Mapping[str, float],
) -> list[dict[str, Any]]:
  """Returns a point for each evaluation, with what was `spent` before."""
  curve, seconds = [], spent['seconds']
  for row in stage['epochs']:
    images, flops = cost.at(row['global_step'] - first_step)
    seconds += (row['seconds'] or 0.0) + row.get('eval_seconds', 0.0)
    top1 = row['val_top1']
    curve.append(
      {
        'epochs': spent['epochs'] + min(row['epoch'], stage['num_epochs']),
        'images': spent['images'] + images,
        'flops': spent['flops'] + flops,
        'seconds': seconds,
        'top1': top1 if formats.is_number(top1) else None,
      }
    )
  return curve


def measure_handovers(planned: Sequence[Planned]) -> dict[str, float]:
  """Returns the mean measured seconds of the hand-over to each stage."""
  found: dict[str, list[float]] = {}
  for run in planned:
    for stage in run_lib.read_history(run.workdir)['stages']:
      if 'handover_seconds' in stage:
        found.setdefault(stage['name'], []).append(stage['handover_seconds'])
  return {name: mean_lib.fmean(x) for name, x in found.items()}


def find_verdicts(
  records: Sequence[Record],
  cells: Sequence[Cell],
  target: float,
  budget: Axis | Literal['own'],
  rule: Rule,
) -> list[str]:
  """Returns sentences on each cell against the reference, the first cell.

  The first sentence is that of the whole: whether the ladder pays, if there are
  controls, else which cells differ.
  """
  by_cell = statistics.by_cell(records)
  reference, *others = (cell for cell in cells if cell.name in by_cell)
  sentences, controls = [], dict[Axis, str]()
  unlike = set[str]()
  for cell in others:
    names = [cell.name, reference.name]
    if cell.control:  # Of the ladder is spoken, against what it has to beat.
      names.reverse()
    a, b = (by_cell[name] for name in names)
    axis = cell.equal or ('images' if budget == 'own' else budget)
    kinds = sorted({run['device'] for run in statistics.done([*a, *b])})
    if axis == 'seconds' and len(kinds) > 1:
      sentences.append(
        f'{" against ".join(names)}: seconds of {" and ".join(kinds)} are not '
        'equal, nothing can be compared.'
      )
      unlike.add(cell.name)
      continue
    text = verdicts.compare_sentence(a, b, target, axis, rule)
    sentences.append(f'{" against ".join(names)}: {text}.')
    if cell.control and cell.equal:
      controls[axis] = cell.name
  ladder = by_cell[reference.name]
  arms = {x.name: by_cell[x.name] for x in others if x.name not in unlike}
  if controls:
    sentences.insert(0, verdicts.overall(ladder, arms, controls, rule))
  elif arms:
    sentences.insert(0, verdicts.ranking([*arms.values()], ladder, rule))
  return sentences


def read_previous(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns what comparison.json holds; None: there is none to go on from."""
  try:
    text = (workdir / 'comparison.json').read_text(encoding='utf-8')
    found = json.loads(text)
  except (FileNotFoundError, ValueError):
    return None
  known = isinstance(found, dict) and found.get('version') == statistics.VERSION
  return found if known else None


def conclude(
  records: Sequence[Record],
  cells: Sequence[Cell],
  config: config_dict.ConfigDict,
  target: float,
  *,
  finished: bool,
  previous: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Returns what is claimed and by which plan, entries of comparison.json.

  `previous` is what it held before.
  """
  plan = sequential.go_on(previous, config.seeds, config.max_seeds)
  rule = plan.rule(config.seeds, finished=finished, margin=config.margin)
  sentences = find_verdicts(records, cells, target, config.budget, rule)
  if finished:
    plan = plan.add(config.seeds, rule, next(iter(sentences), ''))
  runs = statistics.by_cell(records)
  found = claims.find(runs, cells[0].name, rule) if records else {}
  return {
    'max_seeds': plan.max_seeds,
    'looks': list(plan.looks),
    'verdicts': sentences,
    'differences': [_describe(cell, x) for cell, x in found.items()],
  }


def _describe(cell: str, claim: Claim) -> dict[str, Any]:
  e = claim.difference.estimate
  return {
    'cell': cell,
    **e._asdict(),
    'p_holm': claim.p_value,
    'p_equal': claim.p_equal,
    'equal_within': claim.within,
    'verdict': claim.verdict,
  }


def sum_costs(records: Sequence[Record]) -> dict[str, float]:
  """Returns what runs took: images, FLOPs, seconds; shared stages once."""
  total = dict.fromkeys(('images', 'flops', 'seconds'), 0.0)
  for record in records:
    ends = [dict.fromkeys(total, 0.0), *record['boundaries']]
    for before, end in itertools.pairwise(ends):
      if end['stage'] not in record['shared']:
        for kind in total:
          total[kind] += end[kind] - before[kind]
  return total

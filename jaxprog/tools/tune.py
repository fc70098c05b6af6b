"""Searches hyper-parameters with Optuna, each trial a run of its own.

WORKDIR/tune.db is Optuna's own storage (its dashboard shows it), WORKDIR/trials
holds the runs. The same command goes on after any end: what was under way when
a search was killed is resumed, not begun again.
"""

import csv
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, files, formats, paths, stages
from jaxprog.comparison import statistics
from jaxprog.data import workers
from jaxprog.monitoring import history as history_lib
from jaxprog.reliability import lock, signals
from jaxprog.training import ladder, loop, preflight

_KINDS = ('choice', 'integer', 'log', 'uniform')
_SAMPLERS = ('random', 'tpe')
_PRUNERS = ('hyperband', 'median', 'none')
_STUDY = 'jaxprog'


def tune(
  config: config_dict.ConfigDict | str, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Returns what was found: best (number, top1, parameters) and trials.

  `config` is that of a search, or names it: NAME[:ARG] or FILE[:ARG].

  Raises:
    UserError: for a mistake in the search, before anything is trained.
    Stopped: after a SIGTERM or Ctrl-C, once all is saved.
  """
  workers.leave_if_starting()
  workdir = paths.workdir(workdir)
  if isinstance(config, str):
    config = config_lib.load_config(config)
  check(config)
  preflight.launch(stages.complete(config.base), workdir, only=config.only)
  with signals.StopRequest(), lock.Lock(workdir):
    study = _open_study(config, workdir)
    _check_same_search(config, study, workdir)
    _enqueue_unfinished(study)
    left = config.num_trials - _count_finished(study)
    if left > 0:
      try:
        study.optimize(
          lambda trial: _run_trial(config, workdir, trial),
          n_trials=left,
          timeout=60 * config.timeout_minutes or None,
        )
      except _LeaveRunning as e:
        raise e.stopped from None
    found = _describe(study)
    _write(config, workdir, found)
  _show(config, workdir, found)
  return found


class _LeaveRunning(BaseException):
  """Passes Optuna, which takes any Exception for a trial that has failed."""

  def __init__(self, stopped: errors.Stopped):
    super().__init__(str(stopped))
    self.stopped = stopped


def check(config: config_dict.ConfigDict) -> None:
  """Raises UserError for the first mistake in a search."""
  for field, choices in (('sampler', _SAMPLERS), ('pruner', _PRUNERS)):
    if config.get(field) not in choices:
      raise errors.UserError(
        f'{field} is {config.get(field)!r}; it is one of {", ".join(choices)}.',
        f'config.{field}',
        'Start from tune_default.',
      )
  for field, least in (('num_trials', 1), ('timeout_minutes', 0)):
    if not config[field] >= least:
      raise errors.UserError(
        f'{field} is {config[field]}; it must be at least {least}.',
        f'config.{field}',
      )
  if not config.search:
    raise errors.UserError(
      'There is nothing to search.',
      'config.search',
      "Write {'field': 'stages[-1].learning_rate', 'log': (1e-4, 1e-1)}.",
    )
  for entry in config.search:
    _check_entry(entry)
  found = [
    path
    for entry in config.search
    for path in config_lib.locate(
      config.base, entry['field'], f'config.search: {entry["field"]}'
    )
  ]
  for path in found:
    if found.count(path) > 1:
      raise errors.UserError(f'{path} is searched twice.', 'config.search')
  firsts = {entry['field']: _extremes(entry)[0] for entry in config.search}
  for entry in config.search:
    for value in _extremes(entry):
      ladder = _create_ladder(config, {**firsts, entry['field']: value})
      stages.select(stages.create_stages(ladder), config.only)


def _check_entry(entry: Mapping[str, Any]) -> None:
  where = f'config.search: {dict(entry)}'
  kinds = [kind for kind in _KINDS if kind in entry]
  if 'field' not in entry or len(kinds) != 1 or len(entry) != 2:
    raise errors.UserError(
      f"An entry has 'field' and one of {', '.join(_KINDS)}.", where
    )
  low, high = _ends(entry)
  if kinds[0] != 'choice' and not (
    len(entry[kinds[0]]) == 2
    and all(
      isinstance(x, int if kinds[0] == 'integer' else int | float)
      for x in (low, high)
    )
    and low < high
    and math.isfinite(high)
    and (low > 0 or kinds[0] != 'log')
  ):
    raise errors.UserError(
      f'{kinds[0]} needs two {"whole " if kinds[0] == "integer" else ""}'
      f'numbers, the lower one first'
      f'{" and above 0" if kinds[0] == "log" else ""}.',
      where,
    )


def _ends(entry: Mapping[str, Any]) -> tuple[Any, Any]:
  values = next(entry[kind] for kind in _KINDS if kind in entry)
  if not isinstance(values, Sequence) or isinstance(values, str) or not values:
    raise errors.UserError(
      f'{values!r} is no list of values.', f'config.search: {dict(entry)}'
    )
  return values[0], values[-1]


def _extremes(entry: Mapping[str, Any]) -> Sequence[Any]:
  """Returns every choice, or both ends of a range as what is drawn from it."""
  if 'choice' in entry:
    return entry['choice']
  return _ends(entry) if 'integer' in entry else [*map(float, _ends(entry))]


def _create_ladder(
  config: config_dict.ConfigDict, values: Mapping[str, Any]
) -> config_dict.ConfigDict:
  """Returns the config of one trial."""
  trial = stages.complete(config.base)
  for field, value in values.items():
    config_lib.set_field(trial, field, value, f'config.search: {field}')
  return stages.complete(trial)


def _open_study(config: config_dict.ConfigDict, workdir: pathlib.Path) -> Any:
  import optuna  # Half a second, for this mode alone.
  import sqlalchemy

  # Written out by hand, ? and # in a name would end it.
  storage = sqlalchemy.engine.URL.create(
    'sqlite', database=str((workdir / 'tune.db').absolute())
  )
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  study = optuna.create_study(
    study_name=_STUDY,
    storage=storage.render_as_string(),
    direction='maximize',
    load_if_exists=True,
    pruner=_create_pruner(config),
  )
  # From the same seed, every start would draw the first trials again.
  seed = config.sampler_seed + len(study.get_trials())
  if config.sampler == 'tpe':
    study.sampler = optuna.samplers.TPESampler(seed=seed)
  else:
    study.sampler = optuna.samplers.RandomSampler(seed=seed)
  return study


def _check_same_search(
  config: config_dict.ConfigDict, study: Any, workdir: pathlib.Path
) -> None:
  """Raises UserError if what lies there is a search for something else."""
  searched = json.dumps([[dict(x) for x in config.search], list(config.only)])
  base = config_lib.config_hash(stages.complete(config.base))
  before = study.user_attrs.get('search', [base, searched])
  if list(before) != [base, searched]:
    raise errors.UserError(
      'The search here began with another ladder, or searched other fields.',
      f'--workdir={workdir}',
      'Use another --workdir, or the config that it began with.',
    )
  study.set_user_attr('search', [base, searched])


def _create_pruner(config: config_dict.ConfigDict) -> Any:
  import optuna

  match config.pruner:
    case 'median':
      return optuna.pruners.MedianPruner(
        n_startup_trials=config.pruner_startup_trials,
        n_warmup_steps=config.pruner_warmup_epochs,
      )
    case 'hyperband':
      return optuna.pruners.HyperbandPruner(
        min_resource=max(1, config.pruner_warmup_epochs)
      )
  return optuna.pruners.NopPruner()


def _enqueue_unfinished(study: Any) -> None:
  """Asks again for trials that came to no end, in the same directories."""
  import optuna

  failed = optuna.trial.TrialState.FAIL
  last = {t.user_attrs.get('directory', ''): t for t in study.get_trials()}
  for directory, trial in last.items():
    if trial.state == optuna.trial.TrialState.RUNNING:
      study.tell(trial.number, state=failed)
    elif trial.state != failed:
      continue
    if directory and trial.params:
      study.enqueue_trial(trial.params, user_attrs={'directory': directory})


def _count_finished(study: Any) -> int:
  import optuna

  states = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
  return len(study.get_trials(states=states))


def _run_trial(
  config: config_dict.ConfigDict, workdir: pathlib.Path, trial: Any
) -> float:
  """Returns the best top-1 of the last stage of a trial.

  A trial whose loss stays not finite is worth 0: the search must learn from
  it.
  """
  import optuna

  directory = trial.user_attrs.get('directory', f'{trial.number:04d}')
  trial.set_user_attr('directory', directory)
  values = {x['field']: _suggest(trial, x) for x in config.search}
  config_of_trial = _create_ladder(config, values)
  chosen = stages.select(stages.create_stages(config_of_trial), config.only)
  last = chosen[-1].name

  reported = set()

  def report(row):
    if formats.is_number(row['val_top1']):
      reported.add(row['epoch'])
      trial.report(row['val_top1'], row['epoch'])

  def on_epoch(stage, row):
    if stage == last:
      report(row)
      if trial.should_prune():
        raise optuna.TrialPruned

  console = rich.console.Console(markup=False)
  shown = ', '.join(f'{k}={_short(v)}' for k, v in values.items())
  console.print(f'trial {directory}: {shown}', highlight=False, soft_wrap=True)
  try:
    history = ladder.train(
      config_of_trial,
      workdir / 'trials' / directory,
      only=[stage.name for stage in chosen],
      on_epoch=on_epoch,
    )
  except errors.Stopped as e:
    raise _LeaveRunning(e) from None
  except loop.SkippedTooOftenError as e:
    trial.set_user_attr('error', str(e)[:500])
    return 0.0
  stage = history_lib.find_stage(history, last) or {}
  trial.set_user_attr('num_images', stage.get('num_eval_images', 0))
  for row in stage.get('epochs', ()):
    if row['epoch'] not in reported:  # It was trained by an earlier start.
      report(row)
  return (stage.get('best') or {'top1': 0.0})['top1']


def _suggest(trial: Any, entry: Mapping[str, Any]) -> Any:
  name = entry['field']
  if 'choice' in entry:
    return trial.suggest_categorical(name, list(entry['choice']))
  if 'integer' in entry:
    return trial.suggest_int(name, *entry['integer'])
  if 'log' in entry:
    return trial.suggest_float(name, *map(float, entry['log']), log=True)
  return trial.suggest_float(name, *map(float, entry['uniform']))


def _describe(study: Any) -> dict[str, Any]:
  """Returns what JSON can hold of all trials that came to an end."""
  trials = [
    {
      'number': trial.number,
      'directory': trial.user_attrs.get('directory', ''),
      'status': trial.state.name.lower(),
      'top1': trial.value
      if trial.value is not None
      else max(trial.intermediate_values.values(), default=None),
      'epochs': max(trial.intermediate_values, default=0),
      'parameters': trial.params,
    }
    for trial in study.get_trials()
    if trial.state.is_finished() and trial.state.name != 'FAIL'
  ]
  whole = [x for x in trials if x['status'] == 'complete']
  best = max(whole, key=lambda x: x['top1'], default=None)
  attrs = [trial.user_attrs for trial in study.get_trials()]
  images = max((x.get('num_images', 0) for x in attrs), default=0)
  return {
    'version': 1,
    'best': best,
    'num_images': images,
    # Whole trials that the evaluation images do not tell from the best one.
    'alike': [
      x['directory']
      for x in whole
      if best
      and x != best
      and not statistics.told_apart(x['top1'], best['top1'], images)
    ],
    'trials': trials,
  }


def _write(
  config: config_dict.ConfigDict, workdir: pathlib.Path, found: dict[str, Any]
) -> None:
  """Writes tune.json and tune.csv; the best config as best_config.json."""
  files.write_json(workdir / 'tune.json', found)
  fields = [x['field'] for x in config.search]
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(['trial', 'status', 'top1', 'epochs', *fields])
  for trial in found['trials']:
    ended = [trial[x] for x in ('directory', 'status', 'top1', 'epochs')]
    values = [trial['parameters'].get(field) for field in fields]
    writer.writerow([*ended, *values])
  files.write_bytes(workdir / 'tune.csv', text.getvalue().encode())
  if found['best']:
    best = _create_ladder(config, found['best']['parameters'])
    files.write_json(
      workdir / 'best_config.json', config_lib.to_json(stages.complete(best))
    )


def _show(
  config: config_dict.ConfigDict, workdir: pathlib.Path, found: dict[str, Any]
) -> None:
  """Prints the ten best trials and what they do not say."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  fields = [x['field'] for x in config.search]
  for column in ('trial', 'top-1', 'epochs', 'status', *fields):
    table.add_column(column, overflow='fold')
  ranked = sorted(found['trials'], key=lambda x: -(x['top1'] or 0))
  for trial in ranked[:10]:
    top1 = '-' if trial['top1'] is None else f'{trial["top1"]:.1%}'
    values = [_short(trial['parameters'].get(field)) for field in fields]
    table.add_row(
      trial['directory'], top1, str(trial['epochs']), trial['status'], *values
    )
  console = rich.console.Console(markup=False)
  console.print(table)
  pruned = sum(x['status'] == 'pruned' for x in found['trials'])
  alike = len(found['alike'])
  console.print(
    f'{len(found["trials"])} trials, {pruned} of them pruned. Of the others '
    f'{found["num_images"]:,} evaluation images do not tell {alike} from the '
    'best. The best of many is partly luck: train it with other seeds before '
    'you believe it.\n'
    f'{workdir / "best_config.json"}',
    highlight=False,
    markup=False,
    soft_wrap=True,
  )


def _short(value: Any) -> str:
  return f'{value:.3g}' if isinstance(value, float) else str(value)

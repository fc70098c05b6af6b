"""Searches hyper-parameters with Optuna, each trial a run of its own.

Optuna's own storage keeps what is known (its dashboard shows it) and
WORKDIR/trials the runs, one or many at once. The same command goes on after any
end: what was under way when a search was killed is resumed, not begun again.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
from ml_collections import config_dict

from jaxprog import buckets, errors, files, formats, stages
from jaxprog import config as config_lib
from jaxprog.comparison import engines, live, search_page, statistics, tasks
from jaxprog.data import workers
from jaxprog.fields import Field, unknown
from jaxprog.monitoring import history as history_lib
from jaxprog.reliability import lock, mirror, signals
from jaxprog.reporting.report import terminal_table
from jaxprog.training import ladder, loop, preflight

# Why there can be no search; help(jaxprog) looks at this module all the same.
_missing: ImportError | None = None
try:
  import optuna
  from optuna import distributions
  from optuna.trial import TrialState

  from jaxprog.comparison import studies
except ImportError as e:
  _missing = e

_KINDS = ('choice', 'integer', 'log', 'uniform')


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
  if _missing:
    raise errors.not_installed('A search', '--mode=tune', _missing, 'tune')
  if isinstance(config, str):
    config = config_lib.load_config(config)
  config_lib.check_kind(config, 'tune')
  workdir, url = mirror.locate(workdir, config.base.mirror)
  config = config_lib.complete(config_lib.with_mirror(config), 'tune_default')
  space = create_space(config)
  with engines.devices_elsewhere(config):
    base = stages.complete(config.base)
    if config.engine != 'serial':
      # Accelerators are for trials, which look whether they are the right ones.
      base.platform = 'any'
    preflight.launch(base, workdir, only=config.only)
    with (
      signals.StopRequest(),
      mirror.hold(workdir, url) as owner,
      engines.start(config, workdir, _say) as engine,
    ):
      study = studies.open_study(config, workdir, engine.slots)
      plain = config_lib.to_json(config)
      plain['storage'] = errors.without_passwords(config.storage)
      files.write_json(workdir / 'config.json', plain)
      studies.enqueue_unfinished(study)
      search = _Search(config, workdir, study, space, owner, engine)
      console = rich.console.Console(markup=False)
      with live.search(workdir, console, lines=config.engine != 'serial'):
        _run_trials(search)
      found = _describe(study)
      _write(config, workdir, found)
  _show(config, workdir, found)
  return found


def create_space(
  config: config_dict.ConfigDict,
) -> dict[str, distributions.BaseDistribution]:
  """Returns what each field that is searched is drawn from.

  Raises:
    UserError: for the first mistake in a search.
  """
  for field in (
    Field('sampler', str, None, choices=('random', 'tpe')),
    Field('pruner', str, None, choices=('hyperband', 'median', 'none')),
    Field('num_trials', int, None, within='[1, inf)'),
    Field('timeout_minutes', float, None),
    Field('sampler_seed', int, None),
    Field('pruner_startup_trials', int, None),
    Field('pruner_warmup_epochs', int, None),
    Field('only', tuple[str, ...], None),
    Field('storage', str, None),
  ):
    field.check(config.get(field.name), 'config')
  engines.check(config)
  studies.check_storage(config)
  if not config.search:
    raise errors.UserError(
      'There is nothing to search.',
      'config.search',
      "Write {'field': 'stages[-1].learning_rate', 'log': (1e-4, 1e-1)}.",
    )
  space = {_field(x): _create_distribution(x) for x in config.search}
  found = [
    path
    for x in config.search
    for path in config_lib.locate(
      config.base, x['field'], f'config.search: {x["field"]}'
    )
  ]
  for path in found:
    if found.count(path) > 1:
      raise errors.UserError(f'{path} is searched twice.', 'config.search')
  known = [stage['name'] for stage in config.base.stages]
  for name in config.only:
    if name not in known:
      raise unknown(name, known, 'stage', 'config.only')
  firsts = {path: _extremes(drawn)[0] for path, drawn in space.items()}
  for path, drawn in space.items():
    for value in _extremes(drawn):
      ladder = _create_ladder(config, {**firsts, path: value})
      stages.select(stages.create_stages(ladder), config.only)
  return space


def _field(entry: Any) -> str:
  """Returns the path of the field that an entry of the search names."""
  path = entry.get('field') if isinstance(entry, Mapping) else None
  if not isinstance(path, str):
    raise errors.UserError(
      f'An entry of the search is not {entry!r}.',
      'config.search',
      "Write {'field': 'stages[-1].learning_rate', 'log': (1e-4, 1e-1)}.",
    )
  if path.startswith('stage_defaults'):
    raise errors.UserError(
      'Stages are complete: their defaults change nothing any more.',
      f'config.search: {path}',
      f'Write stages[*]{path.removeprefix("stage_defaults")}.',
    )
  return path


def _create_distribution(
  entry: Mapping[str, Any],
) -> distributions.BaseDistribution:
  where = f'config.search: {dict(entry)}'
  kind = next((kind for kind in _KINDS if kind in entry), '')
  if set(entry) != {'field', kind}:
    raise errors.UserError(
      f"An entry has 'field' and one of {', '.join(_KINDS)}.", where
    )
  values = entry[kind]
  if not isinstance(values, Sequence) or isinstance(values, str) or not values:
    raise errors.UserError(f'{values!r} is no list of values.', where)
  if kind == 'choice':
    # As they are once stored, or Optuna would not know them again.
    choices = json.loads(json.dumps(values))
    warnings.filterwarnings('ignore', 'Choices for a categorical')
    return distributions.CategoricalDistribution(choices)
  whole, log = kind == 'integer', kind == 'log'
  if not (
    len(values) == 2
    and all(isinstance(x, int if whole else int | float) for x in values)
    and values[0] < values[1] < math.inf
    and (values[0] > 0 or not log)
  ):
    raise errors.UserError(
      f'{kind} needs two {"whole " * whole}numbers, the lower one first'
      f'{" and above 0" * log}.',
      where,
    )
  low, high = values
  if whole:
    return distributions.IntDistribution(low, high)
  return distributions.FloatDistribution(low, high, log=log)


def _extremes(drawn: Any) -> Sequence[Any]:
  """Returns every choice, or both ends of a range."""
  if isinstance(drawn, distributions.CategoricalDistribution):
    return drawn.choices
  return drawn.low, drawn.high


def _create_ladder(
  config: config_dict.ConfigDict, values: Mapping[str, Any]
) -> config_dict.ConfigDict:
  """Returns the config of one trial."""
  trial = stages.complete(config.base)
  for field, value in values.items():
    config_lib.set_field(trial, field, value, f'config.search: {field}')
  return stages.complete(trial)


@dataclasses.dataclass(frozen=True)
class _Search:
  """What trials are asked for and run with."""

  config: config_dict.ConfigDict
  workdir: pathlib.Path
  study: optuna.Study
  space: dict[str, distributions.BaseDistribution]
  owner: lock.Lock
  engine: engines.Engine


def _run_trials(search: _Search) -> None:
  """Runs trials until there are enough; as many at once as there is room for.

  Workers take turns: between two lines of `engine.run` nothing else happens.
  """
  config, study = search.config, search.study
  deadline = time.monotonic() + (60 * config.timeout_minutes or math.inf)
  states = TrialState.COMPLETE, TrialState.PRUNED
  left = config.num_trials - len(study.get_trials(states=states))

  def work():
    nonlocal left
    while left > 0 and time.monotonic() < deadline:
      left -= 1
      _run_trial(search)
      _write(config, search.workdir, _describe(study))

  workers = min(search.engine.slots, left)
  search.engine.at_once([work] * workers)


def _run_trial(search: _Search) -> None:
  """Tells the study the best top-1 of the last stage of its next trial.

  A trial whose loss stays not finite is worth 0: the search must learn from
  it. One that ends otherwise stays under way, or has failed if its host died
  too often: the next start goes on with it.

  Raises:
    RuntimeError: if another search has taken over the workdir.
  """
  config, study, owner = search.config, search.study, search.owner
  owner.check()  # The trial's own lock knows nothing of it.
  trial = study.ask(search.space)
  directory = trial.user_attrs.get('directory', f'{trial.number:04d}')
  trial.set_user_attr('directory', directory)
  config_of_trial = _create_ladder(config, trial.params)
  chosen = stages.select(stages.create_stages(config_of_trial), config.only)
  shown = ', '.join(
    f'{k}={search_page.short(v)}' for k, v in trial.params.items()
  )
  _say(f'trial {directory}: {shown}')
  try:
    outcome = search.engine.run(
      f'trial {directory}',
      train_trial,
      trial,
      config_of_trial,
      search.workdir / 'trials' / directory,
      [stage.name for stage in chosen],
      *engines.guard(config, search.workdir, owner),
    )
  except tasks.LostError as e:
    study.tell(trial, state=TrialState.FAIL)
    _say(f'{e}: the next start tries it again')
    return
  owner.check()
  for name in ('error', 'num_images'):
    if name in outcome:
      trial.set_user_attr(name, outcome[name])
  top1 = outcome['top1']
  study.tell(trial, top1, TrialState.PRUNED if top1 is None else None)
  if config.engine != 'serial':
    result = 'pruned' if top1 is None else f'top-1 {top1:.1%}'
    _say(f'trial {directory}: {result}')


def train_trial(
  trial: optuna.Trial,
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  names: Sequence[str],
  check: Callable[[], object],
  patience_seconds: float,
) -> dict[str, Any]:
  """Trains stages of a trial, and reports the last one's epochs to its study.

  Returns its best top1, None if it was pruned, num_images that it was scored
  on and the error if its loss stayed not finite. What `check` raises, which is
  called after each epoch, ends it. A process that still has the workdir is
  waited for with patience.
  """
  last = names[-1]
  reported = set()

  def report(row):
    if formats.is_number(row['val_top1']):
      reported.add(row['epoch'])
      trial.report(row['val_top1'], row['epoch'])

  def on_epoch(stage, row):
    check()
    if stage == last:
      report(row)
      if trial.should_prune():
        raise optuna.TrialPruned

  try:
    history = lock.patiently(
      lambda: ladder.train(config, workdir, only=names, on_epoch=on_epoch),
      patience_seconds,
    )
  except optuna.TrialPruned:
    return {'top1': None}
  except loop.SkippedTooOftenError as e:
    return {'top1': 0.0, 'error': str(e)[:500]}
  stage = history_lib.find_stage(history, last) or {}
  for row in stage.get('epochs', ()):
    if row['epoch'] not in reported:  # It was trained by an earlier start.
      report(row)
  return {
    'top1': (stage.get('best') or {'top1': 0.0})['top1'],
    'num_images': stage.get('num_eval_images', 0),
  }


def _describe(study: optuna.Study) -> dict[str, Any]:
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
    row = {**trial, **trial['parameters']}
    titles = ('directory', 'status', 'top1', 'epochs', *fields)
    writer.writerow([row.get(title) for title in titles])
  files.write_bytes(workdir / 'tune.csv', text.getvalue().encode())
  if found['best']:
    best = _create_ladder(config, found['best']['parameters'])
    files.write_json(workdir / 'best_config.json', config_lib.to_json(best))


def _show(
  config: config_dict.ConfigDict, workdir: pathlib.Path, found: dict[str, Any]
) -> None:
  """Prints the ten best trials and what they do not say."""
  fields = [x['field'] for x in config.search]
  table = search_page.tabulate(found, fields)
  rich.console.Console(markup=False).print(
    terminal_table(table.columns, table.rows[:10])
  )
  pruned = sum(x['status'] == 'pruned' for x in found['trials'])
  alike = len(found['alike'])
  _say(
    f'{len(found["trials"])} trials, {pruned} of them pruned. Of the others '
    f'{found["num_images"]:,} evaluation images do not tell {alike} from the '
    'best. The best of many is partly luck: train it with other seeds before '
    'you believe it.\n'
    f'{buckets.shown(workdir / "best_config.json")}'
  )


def _say(text: str) -> None:
  console = rich.console.Console(markup=False)
  console.print(text, highlight=False, soft_wrap=True)

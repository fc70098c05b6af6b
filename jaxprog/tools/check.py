"""Shows what is in the way of a config, and what it comes to, at no cost."""

import contextlib
import os
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.text
from ml_collections import config_dict

from jaxprog import buckets, errors, files, formats, named, paths, stages
from jaxprog.data import records
from jaxprog.monitoring import activity
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import progress as progress_lib
from jaxprog.planning import absent, costs, inspection, outlook, timing
from jaxprog.reliability import copies
from jaxprog.reporting import facts, plots
from jaxprog.training import described, preflight, preview
from jaxprog.training import run as run_lib
from jaxprog.training import setup as setup_lib

# Raw datasets of at most so many images are prepared to show the plan: that
# takes seconds.
_FEW_IMAGES = 5_000
# Load of each core from which on times are said to be those of a busy machine.
_BUSY = 0.75
# By Finding.ok, where the terminal can show them and where it cannot; style.
_MARKS = {
  True: ('✓', '+', 'green'),
  None: ('!', '!', 'yellow'),
  False: ('✗', 'x', 'red'),
}


@copies.in_bucket()
def check(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: setup_lib.ModelFn | None = None,
  allow_config_change: bool = False,
) -> int:
  """Returns 0 if nothing is in the way of training `config`, else 2.

  Prints what was looked at; then the network, each stage's learning rate, what
  it costs and what the scorecard compares, also of data that is not here if its
  numbers are known. Saves WORKDIR/plan.json, learning_rates.png and, where its
  data is prepared, a stage's first training images, augmented_STAGE.png, where
  there is a `workdir`.
  """
  workdir = None if workdir is None else paths.workdir(workdir)
  console = rich.console.Console(markup=False)
  with activity.doing('looking for what is in the way'):
    seen = inspection.inspect(
      config,
      workdir,
      only=only,
      skip=skip,
      model=model,
      allow_config_change=allow_config_change,
    )
  _show_findings(seen.findings, console)
  with contextlib.suppress(errors.UserError):  # A finding says so.
    table = workdir and preflight.difference_table(config, workdir)
    if table:
      console.print(table)
  if any(x.ok is False and not x.is_absent for x in seen.findings):
    console.print('The plan comes once that is mended.')
    return 2
  try:
    _show_outlook(seen, console)
  except errors.UserError as e:
    _show_findings([inspection.crossed(e)], console)
    return 2
  return 2 if any(x.ok is False for x in seen.findings) else 0


def _show_findings(
  findings: Iterable[inspection.Finding], console: rich.console.Console
) -> None:
  """Prints a line for each finding, what mends it below it, and a summary.

  Only a terminal's lines are broken, and no command's: it can be pasted.
  """
  findings = list(findings)
  plain = not _can_show('✓✗', console)
  for finding in findings:
    mark, ascii_mark, style = _MARKS[finding.ok]
    width = console.width if console.is_terminal else 10**6
    lines = textwrap.wrap(
      finding.what, width - 2, break_long_words=False, break_on_hyphens=False
    )
    text = rich.text.Text.assemble(
      (ascii_mark if plain else mark, style), ' ', '\n  '.join(lines)
    )
    if finding.fix:
      text.append(f'\n    {finding.fix}', style='bold')
    text.plain = outlook.showable(text.plain, console)
    console.print(text, soft_wrap=True)
  console.print(f'\n{inspection.summary(findings)}', highlight=False)


def _can_show(text: str, console: rich.console.Console) -> bool:
  return outlook.showable(text, console) == text


def _show_outlook(
  seen: inspection.Inspection, console: rich.console.Console
) -> None:
  """Prints the network, the rates, the plan and what it will be held against.

  Saves them as WORKDIR/plan.json and WORKDIR/learning_rates.png.

  Raises:
    UserError: for any mistake in the config, the devices or the data.
  """
  config, cheap = seen.config, _cheap(seen)
  with activity.doing('building the networks'):
    tasks = _create_tasks(seen, cheap)
    rates = {
      task.stage.name: described.sample_learning_rate(task) for task in tasks
    }
  # To be searched with grep.
  if not (console.is_terminal or console.is_jupyter):
    with progress_lib.Progress(len(tasks), console=console) as progress:
      progress.start_run([described.describe(task) for task in tasks])
  last = tasks[-1]
  size = last.stage.image_size
  layers = costs.summarise_layers(last.model, last.state_shapes.variables, size)
  name = 'your network' if seen.model else config.model
  title = f'{name} at {size} px, as {last.stage.name} trains it'
  outlook.say(f'\n{title} (FLOPs of one image, forward)', console, 'bold')
  console.print(outlook.model_table(layers))
  _show_rates(tasks, rates, console)
  busy = _describe_load() if config.check_steps else ''
  outlooks = []
  for task in tasks:
    doing = 'compiling and timing' if config.check_steps else 'counting'
    with activity.doing(f'{doing} {task.stage.name}'):
      found = timing.measure(task, config.check_steps)
    found.notes += _describe_shortcuts(seen, cheap, found)
    outlooks.append(found)
  figures: dict[str, Any] = {
    'model': config.model,
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'check_steps': config.check_steps,
    'stages': [x.figures() for x in outlooks],
    'layers': layers,
  }
  figures['seconds'] = outlook.total(figures['stages'], 'seconds')
  _show_costs(figures, outlook.notes(outlooks), console)
  if busy:
    outlook.say(f'\n{busy}', console, 'yellow')
  if seen.workdir and jax.process_index() == 0:
    image = seen.workdir / 'learning_rates.png'
    epochs = {task.stage.name: task.stage.num_epochs for task in tasks}
    plots.plot_learning_rates(rates, epochs, image)
    files.write_json(seen.workdir / 'plan.json', figures)
    written = [seen.workdir / 'plan.json', image]
    counted = _count_datasets(seen)
    for task, found in zip(tasks, outlooks, strict=True):
      if found.fits is not False and task.stage.name not in counted:
        written.append(seen.workdir / f'augmented_{task.stage.name}.png')
        preview.draw_first(task).save(written[-1])
    paths = '\n'.join(map(str, written))
    outlook.say(f'\n{buckets.shown(paths)}', console)


def _create_tasks(
  seen: inspection.Inspection, config: config_dict.ConfigDict
) -> tuple[setup_lib.Task, ...]:
  """Returns the stages of `config` as they will go on in the workdir.

  Where images are only counted, they are stages of a run that has not begun.
  """
  counted = _count_datasets(seen)
  here = [x.name for x in seen.chosen if x.name not in counted]
  run = seen.workdir or pathlib.Path(os.devnull)
  if any(
    x.name == 'latest' and x.status == 'damaged' for x in seen.checkpoints
  ):
    # Training sets it aside first; below no folder no stage has begun.
    run = pathlib.Path(os.devnull)
  found: dict[str, records.Dataset] = {}
  if here:
    setup = setup_lib.create_setup(
      config,
      only=here,
      model=seen.model,
      holdout_rules=history_lib.holdout_rules(run_lib.read_history(run)),
    )
    if not counted:
      return run_lib.create_tasks(setup, run)
    found |= setup.datasets
  known = stages.create_stages(config)
  chosen = stages.select(known, seen.only, seen.skip)
  datasets = {**found, **counted}
  setup = setup_lib.assemble(config, known, chosen, datasets, seen.model)
  return tuple(setup_lib.create_task(setup, stage) for stage in chosen)


def _count_datasets(seen: inspection.Inspection) -> dict[str, records.Dataset]:
  """Returns by stage what is not here, or would be prepared for long."""
  counted = {}
  for stage in seen.chosen:
    dataset, raw = seen.data[stage.name]
    if dataset or (raw and raw.num_images <= _FEW_IMAGES):
      continue
    known = (
      absent.count_raw(raw) if raw else named.find(stage.dataset).published
    )
    if known:
      counted[stage.name] = absent.count_dataset(stage, known)
  return counted


def _show_rates(
  tasks: Sequence[setup_lib.Task],
  rates: Mapping[str, Sequence[float]],
  console: rich.console.Console,
) -> None:
  outlook.say('\nlearning rates, first step to last', console, 'bold')
  width = max(len(name) for name in rates)
  for task in tasks:
    name = task.stage.name
    line = progress_lib.sparkline(rates[name], 40)
    if not _can_show(line, console):
      at = 0, len(rates[name]) // 2, -1
      line = ' -> '.join(f'{rates[name][i]:.2g}' for i in at)
    console.print(
      f'  {name:{width}}  {line}  {task.stage.schedule}',
      highlight=False,
    )


def _show_costs(
  figures: Mapping[str, Any],
  notes: Sequence[str],
  console: rich.console.Console,
) -> None:
  """Prints the plan, what it leaves open, and the scorecard's ranges."""
  stages, seconds = figures['stages'], figures['seconds']
  for table in outlook.stage_tables(stages, console.width):
    console.print()
    console.print(table)
  console.print()
  for note in notes:
    outlook.say(note, console)
  outlook.say(_describe_measuring(figures['check_steps']), console, 'dim')
  if seconds is not None:
    measured = all(x['step_measured'] for x in stages)
    about = 'about ' if measured else 'very roughly '
    took = formats.duration(seconds)
    outlook.say(f'The ladder will take {about}{took}.', console, 'bold')
  if lines := outlook.recipe_lines(stages):
    outlook.say('\nwhat the source of a recipe has reached', console, 'bold')
    for line in lines:
      outlook.say(line, console)
  if any(x['dataset'] in facts.EXPECTATIONS for x in stages):
    title = "what the scorecard will compare: the mission's range"
    outlook.say(f'\n{title}', console, 'bold')
    console.print(outlook.expectation_table(stages))


def _describe_measuring(num_steps: int) -> str:
  """Returns what was counted and how the times came about."""
  counted = (
    'FLOPs: convolutions and matrix products of a training step, two for a '
    'multiplication with its addition.'
  )
  if not num_steps:
    return f'{counted} Nothing was compiled or timed: check_steps is 0.'
  together = (
    'added to it, because both need the same cores'
    if jax.default_backend() == 'cpu'
    else 'which may be the slower'
  )
  return (
    f'{counted} step: median of {num_steps} on images of noise, after one. '
    f'input: reading as many real ones with all cores, {together}. Memory: '
    'arguments, results and temporaries of the compiled step. ~: estimated, '
    'nothing ran.'
  )


def _describe_load() -> str:
  """Returns that others use the cores to be timed, '' if they are free."""
  load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
  if jax.default_backend() != 'cpu' or load < _BUSY * cores:
    return ''
  return (
    f'Other processes are busy (load {load:.1f} on {cores} cores): alone, the '
    'run is faster than this says.'
  )


def _cheap(seen: inspection.Inspection) -> config_dict.ConfigDict:
  """Returns the config without what takes long before a run.

  Images are not stored anew but read as they are stored already, else as they
  came; leaks are left out only where they were looked for before.
  """
  config = stages.complete(seen.config)
  stored = {x.name for x in seen.chosen if seen.is_stored(x)}
  for stage in config.stages:
    if stage.name not in stored:
      stage.storage = 'original'
  if config.exclude_leaks:
    config.exclude_leaks = inspection.leaks_are_known(config)
  return config


def _describe_shortcuts(
  seen: inspection.Inspection,
  cheap: config_dict.ConfigDict,
  found: outlook.Outlook,
) -> list[str]:
  """Returns in what a stage is looked at otherwise than it will be trained."""
  notes = []
  asked = next(x for x in seen.chosen if x.name == found.stage.name)
  if asked.storage != found.stage.storage and found.input_seconds is not None:
    notes.append(
      f'input timed on originals; training reads {asked.storage}, which is '
      'not stored yet'
    )
  if seen.config.exclude_leaks and not cheap.exclude_leaks:
    notes.append(
      'leaks were not looked for yet: training images that a stage is '
      'evaluated on are counted here and will be left out'
    )
  return notes

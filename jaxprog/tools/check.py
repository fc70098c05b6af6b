"""Shows what a config comes to, and what is in the way, before it is paid for.

Nothing is compiled here.
"""

import pathlib
import textwrap
from collections.abc import Iterable, Sequence

import jax
import rich.console
import rich.text
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, stages
from jaxprog.data import sources
from jaxprog.reporting import plots
from jaxprog.reporting import progress as progress_lib
from jaxprog.training import ladder, preflight
from jaxprog.training import setup as setup_lib

# Raw datasets of at most so many images are prepared to show the plan: that
# takes seconds.
_FEW_IMAGES = 5_000
# By Finding.ok, where the terminal can show them and where it cannot; style.
_MARKS = {
  True: ('✓', '+', 'green'),
  None: ('!', '!', 'yellow'),
  False: ('✗', 'x', 'red'),
}


def check(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> int:
  """Returns 0 if nothing is in the way of training `config`, else 2.

  Prints what was looked at; then the plan of the ladder and each stage's
  learning rate, where the data is prepared. Saves WORKDIR/learning_rates.png
  where there is a `workdir`.
  """
  console = rich.console.Console()
  findings = preflight.inspect(config, workdir, only=only, skip=skip)
  show(findings, console)
  if workdir:
    _show_differences(config, workdir, console)
  if any(x.ok is False for x in findings):
    console.print('The plan comes once that is mended.')
    return 2
  if not _is_ready(config, only, skip):
    console.print('The plan comes once the data is prepared.')
    return 0
  try:
    show_plan(config, workdir, only, skip, console)
  except errors.UserError as e:
    what = ' '.join(x.removesuffix('.') for x in (e.what, e.where) if x)
    show([preflight.Finding(False, what, e.suggestion)], console)
    return 2
  return 0


def show(
  findings: Iterable[preflight.Finding], console: rich.console.Console
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
    text.plain = _showable(text.plain, console)
    console.print(text, soft_wrap=True)
  console.print(f'\n{preflight.summary(findings)}', highlight=False)


def _can_show(text: str, console: rich.console.Console) -> bool:
  try:
    text.encode(console.encoding)
  except UnicodeEncodeError:
    return False
  return True


def _showable(text: str, console: rich.console.Console) -> str:
  """Returns `text` with ? for what the console cannot show."""
  return text.encode(console.encoding, 'replace').decode(console.encoding)


def _show_differences(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  console: rich.console.Console,
) -> None:
  """Prints in what the run of `workdir` began otherwise, if in anything."""
  try:
    saved = preflight.saved_configs(config, workdir)
  except errors.UserError:
    return  # A finding says so.
  table = config_lib.difference_table(*saved) if saved else None
  if table is not None and table.row_count:
    console.print(table)


def _is_ready(
  config: config_dict.ConfigDict, only: Sequence[str], skip: Sequence[str]
) -> bool:
  """Returns whether all data is prepared, or is in seconds."""
  chosen = stages.select(stages.create_stages(config), only, skip)
  data_dir = pathlib.Path(config.data_dir)
  for dataset in {stage.dataset for stage in chosen}:
    if sources.find_prepared(dataset, data_dir) is None:
      raw = sources.list_raw(dataset, data_dir)
      if raw is None or raw.num_images > _FEW_IMAGES:
        return False
  return True


def show_plan(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None,
  only: Sequence[str],
  skip: Sequence[str],
  console: rich.console.Console,
) -> None:
  """Prints the plan of the ladder and each stage's learning rate.

  Raises:
    UserError: for any mistake in the config, the devices or the data.
  """
  setup = setup_lib.create_setup(_cheap(config), only=only, skip=skip)
  tasks = [setup_lib.create_task(setup, stage) for stage in setup.chosen]
  rates = {task.stage.name: ladder.sample_learning_rate(task) for task in tasks}
  with progress_lib.Progress(len(tasks), console=console) as progress:
    ladder.announce(progress, tasks)
  console.print('\nlearning rates, first step to last', highlight=False)
  width = max(len(name) for name in rates)
  for task in tasks:
    name = task.stage.name
    line = progress_lib.sparkline(rates[name], 40)
    if not _can_show(line, console):
      line = ' -> '.join(f'{rates[name][i]:.2g}' for i in (0, 100, -1))
    console.print(
      f'  {name:{width}}  {line}  {task.stage.schedule}',
      highlight=False,
    )
  if workdir and jax.process_index() == 0:
    path = pathlib.Path(workdir) / 'learning_rates.png'
    epochs = {task.stage.name: task.stage.num_epochs for task in tasks}
    plots.plot_learning_rates(rates, epochs, path)
    shown = _showable(f'\n{path}', console)
    console.print(shown, highlight=False, markup=False, soft_wrap=True)


def _cheap(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Returns `config` without what takes long before a run and not in a plan.

  Images are not stored anew, and leaks are left out only where they were
  looked for before.
  """
  config = stages.complete(config)
  for stage in config.stages:
    stage.storage = 'original'
  if config.exclude_leaks:
    config.exclude_leaks = all(
      preflight.is_signed(sources.load_dataset(dataset, config.data_dir))
      for dataset in {stage.dataset for stage in config.stages}
      if sources.find_prepared(dataset, pathlib.Path(config.data_dir))
    )
  return config

"""Shows what a config comes to before anything is paid for."""

import pathlib
from collections.abc import Sequence

import jax
import rich.console
from ml_collections import config_dict

from jaxprog.reporting import plots
from jaxprog.reporting import progress as progress_lib
from jaxprog.training import ladder
from jaxprog.training import setup as setup_lib


def check(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> None:
  """Prints the plan of the ladder and each stage's learning rate.

  Saves WORKDIR/learning_rates.png where there is a `workdir`.

  Raises:
    UserError: for any mistake in the config, the devices or the data.
  """
  setup = setup_lib.create_setup(config, only=only, skip=skip)
  tasks = [setup_lib.create_task(setup, stage) for stage in setup.chosen]
  rates = {task.stage.name: ladder.sample_learning_rate(task) for task in tasks}
  console = rich.console.Console()
  with progress_lib.Progress(len(tasks), console=console) as progress:
    ladder.announce(progress, tasks)
  console.print('\nlearning rates, first step to last', highlight=False)
  width = max(len(name) for name in rates)
  for task in tasks:
    name = task.stage.name
    line = progress_lib.sparkline(rates[name], 40)
    console.print(
      f'  {name:{width}}  {line}  {task.stage.schedule}',
      highlight=False,
    )
  if workdir and jax.process_index() == 0:
    path = pathlib.Path(workdir) / 'learning_rates.png'
    epochs = {task.stage.name: task.stage.num_epochs for task in tasks}
    plots.plot_learning_rates(rates, epochs, path)
    console.print(f'\n{path}', highlight=False, soft_wrap=True)

"""Prepares the datasets of a config, so that training can begin at once."""

from collections.abc import Sequence

import rich.console
import rich.progress
from ml_collections import config_dict

from jaxprog import stages
from jaxprog.data import sources


def prepare(
  config: config_dict.ConfigDict,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> None:
  """Prepares every dataset that the chosen stages use, each once.

  Raises:
    UserError: if raw images are missing or wrong.
  """
  chosen = stages.select(stages.create_stages(config), only, skip)
  console = rich.console.Console()
  for dataset in dict.fromkeys(stage.dataset for stage in chosen):
    columns = (
      rich.progress.TextColumn('{task.description}'),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
      task = bar.add_task(dataset, visible=False)

      def show(done, total, bar=bar, task=task):
        bar.update(task, completed=done, total=total, visible=True)

      sources.prepare(dataset, config.data_dir, progress=show)
    console.print(f'{dataset}: prepared in {config.data_dir}/prepared')

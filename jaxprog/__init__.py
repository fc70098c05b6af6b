"""Train one ResNet up a ladder of image datasets.

Everything the command line does is one call here: what a module of tools/ is
named after, and the rest below. Each is imported when it is asked for, so that
`import jaxprog` is quick. ~ in a path is the user's home. docs/python.md shows
them in a notebook.
"""

import importlib
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxprog import version
from jaxprog.errors import Stopped, UserError

if TYPE_CHECKING:
  from ml_collections import config_dict

  from jaxprog.config import load_config, start_from
  from jaxprog.data.records import Dataset
  from jaxprog.reporting.plots import plot_history
  from jaxprog.tools.audit import audit
  from jaxprog.tools.calibrate import calibrate
  from jaxprog.tools.check import check
  from jaxprog.tools.compare import compare
  from jaxprog.tools.dry_run import dry_run
  from jaxprog.tools.evaluate import evaluate
  from jaxprog.tools.export import export
  from jaxprog.tools.lr_find import lr_find
  from jaxprog.tools.plan import plan
  from jaxprog.tools.predict import predict
  from jaxprog.tools.prepare import prepare
  from jaxprog.tools.probe import probe
  from jaxprog.tools.report import write_report
  from jaxprog.tools.size_sweep import size_sweep
  from jaxprog.tools.tune import tune
  from jaxprog.tools.verify import verify
  from jaxprog.tools.verify_checkpoints import verify_checkpoints
  from jaxprog.training.ladder import train
  from jaxprog.training.preview import show_batch

__version__ = version.VERSION
# Names that no module of tools/ has, and where they are.
_ELSEWHERE = {
  'load_config': 'config',
  'start_from': 'config',
  'plot_history': 'reporting.plots',
  'show_batch': 'training.preview',
  'train': 'training.ladder',
  'write_report': 'tools.report',
}
_TOOLS = {x.stem for x in pathlib.Path(__file__).parent.glob('tools/[!_]*.py')}
__all__ = sorted(
  {*_ELSEWHERE, *_TOOLS, 'Stopped', 'UserError', 'load_datasets', 'train_stage'}
)


def load_datasets(
  config: 'config_dict.ConfigDict', names: Sequence[str] = ()
) -> 'dict[str, Dataset]':
  """Returns each stage's dataset, checked; prepares what is local."""
  from jaxprog import stages
  from jaxprog.training import setup

  chosen = stages.select(stages.create_stages(config), names)
  return setup.load_datasets(config, chosen)


def train_stage(
  config: 'config_dict.ConfigDict', workdir: str | pathlib.Path, name: str
) -> dict[str, Any]:
  """Returns the history of `train` with only the stage `name`."""
  from jaxprog.training import ladder

  return ladder.train(config, workdir, only=(name,))


def report(history: dict[str, Any]) -> str:
  """Returns the report of a run as plain text; notebooks show it as a page.

  A page of all there is to a run is WORKDIR/report.html.
  """
  from jaxprog.reporting import rundir, shown

  return shown.show_report(rundir.RunFiles('', history))


def __getattr__(name: str) -> Any:
  """Imports one of the names when it is first asked for."""
  if name not in _ELSEWHERE and name not in _TOOLS:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from jaxprog.monitoring import activity

  where = _ELSEWHERE.get(name, f'tools.{name}')
  with activity.doing('loading JAX and other libraries'):
    found = getattr(importlib.import_module(f'{__name__}.{where}'), name)
  return globals().setdefault(name, found)


def __dir__() -> list[str]:
  return [*globals(), *__all__]


def _show_configs() -> None:
  """Lets notebooks show of a config what is not as by default.

  Its class is ml_collections' own, and stays as it is.
  """
  ipython = sys.modules.get('IPython')
  if ipython is None or (shell := ipython.get_ipython()) is None:
    return

  def to_html(config):
    from jaxprog.reporting import shown

    return shown.config_html(config)

  formatter = shell.display_formatter.formatters['text/html']
  module = 'ml_collections.config_dict.config_dict'
  formatter.for_type_by_name(module, 'ConfigDict', to_html)


_show_configs()

"""Train one ResNet up a ladder of image datasets.

Everything the command line does is one call here. The names below import
what they need when they are called, so that `import jaxprog` is quick. ~ in a
path is the user's home.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxprog.errors import Stopped, UserError

if TYPE_CHECKING:
  from ml_collections import config_dict

  from jaxprog.data.records import Dataset

__all__ = [
  'Stopped',
  'UserError',
  'audit',
  'check',
  'compare',
  'dry_run',
  'evaluate',
  'export',
  'load_config',
  'load_datasets',
  'lr_find',
  'plan',
  'plot_history',
  'predict',
  'prepare',
  'report',
  'train',
  'train_stage',
  'tune',
  'verify',
  'verify_checkpoints',
  'write_report',
]
__version__ = '0.1.0'


def load_config(
  spec: str, overrides: dict[str, str] | None = None
) -> 'config_dict.ConfigDict':
  """Returns the config of FILE[:ARG]; see jaxprog.config.load_config."""
  from jaxprog import config

  return config.load_config(spec, overrides)


def load_datasets(
  config: 'config_dict.ConfigDict', names: Sequence[str] = ()
) -> 'dict[str, Dataset]':
  """Returns each stage's dataset, checked; prepares what is local."""
  from jaxprog import stages
  from jaxprog.training import setup

  chosen = stages.select(stages.create_stages(config), names)
  return setup.load_datasets(config, chosen)


def prepare(
  config: 'config_dict.ConfigDict',
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  input: str = '',
  sha256: str = '',
  download: bool = False,
) -> None:
  """Prepares the datasets of the stages; see jaxprog.tools.prepare."""
  from jaxprog.tools import prepare as tool

  tool.prepare(
    config,
    only=only,
    skip=skip,
    input=input,
    sha256=sha256,
    download=download,
  )


def verify(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> int:
  """Returns 0 if all images are in order, else 1; see jaxprog.tools.verify."""
  from jaxprog.tools import verify as tool

  return tool.verify(config, _optional(workdir), only=only, skip=skip)


def verify_checkpoints(workdir: str | pathlib.Path) -> int:
  """Returns 0 if all are whole; see jaxprog.tools.verify_checkpoints."""
  from jaxprog.tools import verify_checkpoints as tool

  return tool.verify_checkpoints(_workdir(workdir))


def audit(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> int:
  """Returns the exit code of an audit; see jaxprog.tools.audit."""
  from jaxprog.tools import audit as tool

  return tool.audit(config, _optional(workdir), only=only, skip=skip)


def train(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: Callable[..., Any] | None = None,
  allow_config_change: bool = False,
) -> dict[str, Any]:
  """Returns the history of the run; see jaxprog.training.ladder.train."""
  from jaxprog.training import ladder

  return ladder.train(
    config,
    _workdir(workdir),
    only=only,
    skip=skip,
    model=model,
    allow_config_change=allow_config_change,
  )


def dry_run(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: Callable[..., Any] | None = None,
  allow_config_change: bool = False,
) -> dict[str, float]:
  """Returns the seconds of each stage; see jaxprog.tools.dry_run.dry_run."""
  from jaxprog.tools import dry_run as tool

  return tool.dry_run(
    config,
    workdir,
    only=only,
    skip=skip,
    model=model,
    allow_config_change=allow_config_change,
  )


def train_stage(
  config: 'config_dict.ConfigDict', name: str, workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Returns the history of `train` with only the stage `name`."""
  return train(config, workdir, only=(name,))


def check(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: Callable[..., Any] | None = None,
  allow_config_change: bool = False,
) -> int:
  """Returns 0 if nothing is in the way of a run; see jaxprog.tools.check."""
  from jaxprog.tools import check as tool

  return tool.check(
    config,
    _optional(workdir),
    only=only,
    skip=skip,
    model=model,
    allow_config_change=allow_config_change,
  )


def plan(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path | None = None,
  *,
  topology: str,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns what stages take on hardware elsewhere; see jaxprog.tools.plan."""
  from jaxprog.tools import plan as tool

  workdir = _optional(workdir)
  return tool.plan(config, workdir, topology=topology, only=only, skip=skip)


def compare(
  config: 'config_dict.ConfigDict | str', workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Returns the records of a comparison; see jaxprog.tools.compare.compare.

  `config` is that of a comparison, or names it: FILE[:ARG].
  """
  from jaxprog.tools import compare as tool

  if isinstance(config, str):
    config = load_config(config)
  return tool.compare(config, _workdir(workdir))


def tune(
  config: 'config_dict.ConfigDict | str', workdir: str | pathlib.Path
) -> dict[str, Any]:
  """Returns what a search has found; see jaxprog.tools.tune.tune.

  `config` is that of a search, or names it: FILE[:ARG].
  """
  from jaxprog.tools import tune as tool

  if isinstance(config, str):
    config = load_config(config)
  return tool.tune(config, _workdir(workdir))


def lr_find(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
) -> dict[str, Any]:
  """Returns a range test of the rate; see jaxprog.tools.lr_find.lr_find."""
  from jaxprog.tools import lr_find as tool

  return tool.lr_find(config, _workdir(workdir), stage=stage)


def evaluate(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
  dataset: str = '',
  model: Callable[..., Any] | None = None,
) -> dict[str, Any]:
  """Returns loss, top1, top5; see jaxprog.tools.evaluate.evaluate."""
  from jaxprog.tools import evaluate as tool

  return tool.evaluate(
    config,
    _workdir(workdir),
    stage=stage,
    weights=weights,
    dataset=dataset,
    model=model,
  )


def predict(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path,
  input: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
  model: Callable[..., Any] | None = None,
) -> list[dict[str, Any]]:
  """Returns what images show; see jaxprog.tools.predict.predict."""
  from jaxprog.tools import predict as tool

  return tool.predict(
    config, _workdir(workdir), input, stage=stage, weights=weights, model=model
  )


def export(
  config: 'config_dict.ConfigDict',
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
) -> dict[str, pathlib.Path]:
  """Returns the files it wrote; see jaxprog.tools.export.export."""
  from jaxprog.tools import export as tool

  workdir = _workdir(workdir)
  return tool.export(config, workdir, stage=stage, weights=weights)


def write_report(
  workdirs: str | pathlib.Path | Sequence[str | pathlib.Path],
) -> None:
  """Writes the reports of one run or several; see jaxprog.tools.report."""
  from jaxprog.tools import report as tool

  if isinstance(workdirs, str | os.PathLike):
    workdirs = [workdirs]
  tool.write_report([_workdir(x) for x in workdirs])


def plot_history(history: dict[str, Any], path: str | pathlib.Path) -> None:
  """Draws loss, accuracy and learning rate over all stages to `path`."""
  from jaxprog.reporting import plots

  plots.plot_history(history, path)


def report(history: dict[str, Any]) -> str:
  """Returns the report of a run as plain text."""
  from jaxprog.reporting import report as reporting
  from jaxprog.reporting import rundir

  return reporting.report(rundir.RunFiles('', history))


def _workdir(path: str | pathlib.Path) -> pathlib.Path:
  from jaxprog import paths

  return paths.workdir(path)


def _optional(path: str | pathlib.Path | None) -> pathlib.Path | None:
  return None if path is None else _workdir(path)

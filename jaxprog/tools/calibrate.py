"""Fits a temperature to saved weights, and says what it mends."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import rich.console
from ml_collections import config_dict

from jaxprog import buckets, errors, files, formats
from jaxprog import paths as paths_lib
from jaxprog.data.records import Records
from jaxprog.monitoring import activity, calibrated, outcomes, temperature
from jaxprog.monitoring import history as history_lib
from jaxprog.reliability import copies
from jaxprog.reporting import outputs, report
from jaxprog.reporting.parts import Column
from jaxprog.tools import evaluate
from jaxprog.training import fetching, forward
from jaxprog.training import run as run_lib
from jaxprog.training import setup as setup_lib
from jaxprog.training import trained as trained_lib

# Of a temperature and what was measured at it.
_COLUMNS = (
  Column('temperature', lambda x: f'{x[0]:.3g}'),
  Column('loss', lambda x: f'{x[1]["nll"]:.3f} nats'),
  Column('calibration error', lambda x: formats.percent(x[1]['ece'])),
)


class _Images(NamedTuple):
  """A part of a dataset, and what to call it."""

  split: Records
  name: str


@copies.in_bucket(chosen=True)
def calibrate(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
  model: setup_lib.ModelFn | None = None,
) -> dict[str, Any]:
  """Returns the temperature that suits saved weights, and what it mends.

  Keys: stage, weights, epoch, temperature; fitted_on and num_fitted, the images
  it was fitted on, which are the stage's hold-out, or else half of the
  validation images; measured_on and num_measured, all validation images or
  their other half; before and after, each with nll (nats), ece and calibration
  as in monitoring.diagnostics; and for which weights and images it is.
  WORKDIR/calibration/STAGE-WEIGHTS.json keeps it: `predict` and `export` use
  it, the reports show it. Images that cannot be decoded are left out.

  `stage`, `weights` and `model` are those of `trained.load_trained`.

  Raises:
    UserError: if there are no such weights or images.
  """
  workdir = paths_lib.workdir(workdir)
  trained = trained_lib.load_trained(
    config, workdir, stage=stage, weights=weights, model=model
  )
  console = evaluate.open_console()
  step = forward.create_step(trained.create_apply())
  fitted, measured = _divide(trained, workdir)
  value = temperature.fit(*_see(trained, step, fitted))
  logits, labels = _see(trained, step, measured)
  found = {
    'stage': trained.stage.name,
    'weights': weights,
    'epoch': trained.epoch,
    'temperature': value,
    'fitted_on': fitted.name,
    'num_fitted': len(fitted.split),
    'measured_on': measured.name,
    'num_measured': len(measured.split),
    'before': temperature.measure(logits, labels, 1.0),
    'after': temperature.measure(logits, labels, value),
    **trained.calibrated_for,
  }
  path = calibrated.find_path(workdir, trained.stage.name, weights)
  if not console.quiet:
    files.write_json(path, found)
    outputs.add_to_reports(workdir)
  _show(found, path, console)
  return found


def _divide(
  trained: trained_lib.Trained, workdir: pathlib.Path
) -> tuple[_Images, _Images]:
  """Returns the images to fit on, and others to measure on.

  Of validation images it is every second one of their names, class by class.
  """
  stage = trained.trained_stage
  data = evaluate.relabel(
    evaluate.load_dataset(trained, ''), trained.classes, trained.class_names
  )
  rules = history_lib.holdout_rules(run_lib.read_history(workdir))
  data = setup_lib.take_holdout(data, stage, rules.get(stage.name))
  if data.holdout is not None:
    return (
      _Images(data.holdout, 'the hold-out'),
      _Images(data.eval, 'the validation images'),
    )
  split = data.eval
  if len(split) < 2:
    raise errors.UserError(
      'One image is too few to fit a temperature on and to measure it on.',
      str(split.directory),
      "Train with eval_split='holdout:2%', or evaluate on more.",
    )
  order = outcomes.sort_images(split)
  chosen = np.zeros(len(split), bool)
  chosen[order.positions[::2]] = True
  return (
    _Images(split.select(chosen), 'half of the validation images'),
    _Images(split.select(~chosen), 'the other half of the validation images'),
  )


def _see(
  trained: trained_lib.Trained, step: Any, images: _Images
) -> tuple[np.ndarray, np.ndarray]:
  """Returns logits and labels of the images that can be decoded."""
  split, name = images.split, trained.stage.name
  fetching.fetch(trained.stage.dataset, {split.name: split.source})
  with activity.doing(f'scoring {name} on {images.name}') as show:
    (logits,), labels = forward.run(
      step, [trained.variables], split, trained.stage, trained.config, show
    )
  known = labels >= 0
  if not known.any() or not np.isfinite(logits).all():
    raise errors.UserError(
      'Nothing can be measured: no image can be decoded, or the weights are '
      'not finite.',
      f'stage {name!r}, {trained.weights} weights, {images.name}',
      'See --mode=verify and --mode=eval.',
    )
  return logits[known], labels[known]


def _show(
  found: Mapping[str, Any], path: pathlib.Path, console: rich.console.Console
) -> None:
  console.print(
    f'{found["stage"]}, {found["weights"]} weights of epoch {found["epoch"]}, '
    f'fitted on {found["fitted_on"]} ({found["num_fitted"]:,}), measured on '
    f'{found["measured_on"]} ({found["num_measured"]:,}):'
  )
  rows = [(1.0, found['before']), (found['temperature'], found['after'])]
  console.print(report.terminal_table(_COLUMNS, rows))
  console.print(buckets.shown(path), soft_wrap=True)

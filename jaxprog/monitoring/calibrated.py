"""What was fitted to saved weights: WORKDIR/calibration/STAGE-WEIGHTS.json."""

import pathlib
from typing import Any

from jaxprog import files


def find_path(workdir: pathlib.Path, stage: str, weights: str) -> pathlib.Path:
  """Returns where the temperature of saved weights is kept."""
  return workdir / 'calibration' / f'{stage}-{weights}.json'


def read(
  workdir: pathlib.Path, stage: str, weights: str
) -> dict[str, Any] | None:
  """Returns what is kept of saved weights, None where nothing can be read."""
  return files.read_object(find_path(workdir, stage, weights))

"""What was fitted to saved weights: WORKDIR/calibration/STAGE-WEIGHTS.json."""

import json
import pathlib
from typing import Any


def find_path(workdir: pathlib.Path, stage: str, weights: str) -> pathlib.Path:
  """Returns where the temperature of saved weights is kept."""
  return workdir / 'calibration' / f'{stage}-{weights}.json'


def read(
  workdir: pathlib.Path, stage: str, weights: str
) -> dict[str, Any] | None:
  """Returns what is kept of saved weights, None where nothing can be read."""
  try:
    found = json.loads(find_path(workdir, stage, weights).read_bytes())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None

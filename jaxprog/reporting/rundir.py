"""What a run has left in its workdir."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprog.reporting import history as history_lib
from jaxprog.reporting import incidents as incidents_lib


class Run(NamedTuple):
  """A run, as far as its files tell."""

  # Of its workdir.
  name: str
  history: dict[str, Any]
  # What config.json and environment.json hold; None where there is none.
  config: dict[str, Any] | None = None
  environment: dict[str, Any] | None = None
  incidents: Sequence[dict[str, Any]] = ()
  # What --mode=plan has left, None if it was never asked.
  hardware_plan: dict[str, Any] | None = None

  @property
  def stages(self) -> list[dict[str, Any]]:
    """The stages that were begun."""
    return self.history['stages']

  @property
  def planned(self) -> tuple[str, ...]:
    """Names of all stages of the config, () if it is unknown."""
    stages = (self.config or {}).get('stages', ())
    return tuple(stage['name'] for stage in stages)

  @property
  def model(self) -> str | None:
    """The network of the config, None if it is unknown."""
    return (self.config or {}).get('model')


def read_run(workdir: str | os.PathLike[str]) -> Run:
  """Returns what `workdir` says of its run; nothing there is executed.

  Raises:
    UserError: if there is no history, or a damaged one.
  """
  workdir = pathlib.Path(workdir)
  return Run(
    name=workdir.resolve().name,
    history=history_lib.load_history(workdir / 'training_history.json'),
    config=_read_object(workdir / 'config.json'),
    environment=_read_object(workdir / 'environment.json'),
    incidents=incidents_lib.read(workdir / 'incidents.jsonl'),
    hardware_plan=_read_object(workdir / 'hardware_plan.json'),
  )


def _read_object(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the JSON object in a file, None where there is none."""
  try:
    value = json.loads(path.read_bytes())
  except (OSError, ValueError):
    return None
  return value if isinstance(value, dict) else None

"""What a run has left in its workdir."""

import contextlib
import difflib
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxprog import buckets, errors, files
from jaxprog.monitoring import calibrated
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import incidents as incidents_lib

read_object = files.read_object  # Of the page of searches.

# Any of these in a folder shows that a run, a comparison or a search has begun.
_SIGNS = (
  'config.json',
  'training_history.json',
  'checkpoints',
  'comparison.json',
  'tune.db',
  'tune.journal',
  'tune_study.txt',
)
# So many other runs are named to who has asked for one that is not there.
_NAMED = 5


class RunFiles(NamedTuple):
  """A run, as far as its files tell."""

  # Of its workdir.
  name: str
  history: dict[str, Any]
  # What config.json and environment.json hold; None where there is none.
  config: dict[str, Any] | None = None
  environment: dict[str, Any] | None = None
  # None where the history alone is known.
  incidents: Sequence[dict[str, Any]] | None = None
  # What --mode=plan has left, None if it was never asked.
  hardware_plan: dict[str, Any] | None = None
  # What --mode=eval --probe has left, a row a pair of stages, and of the best
  # weights --calibrate, by stage.
  probed: Sequence[dict[str, Any]] = ()
  temperatures: Mapping[str, dict[str, Any]] = types.MappingProxyType({})

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


def read_run(workdir: str | os.PathLike[str]) -> RunFiles:
  """Returns what `workdir` says of its run; nothing there is executed.

  Raises:
    UserError: if there is no history, or a damaged one.
  """
  workdir = pathlib.Path(workdir)
  history = history_lib.load_history(workdir / 'training_history.json')
  fitted = {
    x['name']: calibrated.read(workdir, x['name'], 'best')
    for x in history['stages']
  }
  return RunFiles(
    name=workdir.resolve().name,
    history=history,
    config=files.read_object(workdir / 'config.json'),
    environment=files.read_object(workdir / 'environment.json'),
    incidents=incidents_lib.read(workdir / 'incidents.jsonl'),
    hardware_plan=files.read_object(workdir / 'hardware_plan.json'),
    probed=(files.read_object(workdir / 'probe.json') or {}).get('rows', ()),
    temperatures={name: x for name, x in fitted.items() if x},
  )


def check(workdir: str | os.PathLike[str]) -> None:
  """Raises UserError, naming runs that are near, if `workdir` holds none."""
  workdir = pathlib.Path(workdir)
  if not _is_run(workdir):
    raise errors.UserError(
      f'There is no run in {buckets.shown(workdir)}.',
      f'--workdir={buckets.shown(workdir)}',
      _describe_near(workdir),
    )


def _is_run(folder: pathlib.Path) -> bool:
  # It raises nothing, whatever the name.
  return any(os.path.exists(folder / name) for name in _SIGNS)


def _describe_near(workdir: pathlib.Path) -> str:
  """Returns a sentence on runs below `workdir`, or else beside it."""
  below, beside = _list_runs(workdir), _list_runs(workdir.parent)
  named = difflib.get_close_matches(workdir.name, [x.name for x in beside])
  if not below and named:
    return f'Did you mean {str(workdir.parent / named[0])!r}?'
  runs = below or beside
  if not runs:
    return 'Name the --workdir that a run was trained with.'
  more = f' and {len(runs) - _NAMED} more' if len(runs) > _NAMED else ''
  return f'Known: {", ".join(map(str, runs[:_NAMED]))}{more}.'


def _list_runs(folder: pathlib.Path) -> list[pathlib.Path]:
  with contextlib.suppress(OSError):
    return sorted(x for x in folder.iterdir() if _is_run(x))
  return []

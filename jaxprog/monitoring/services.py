"""Runs that W&B, MLflow and Trackio keep, each by its own library.

What they keep stays on this machine until their own variables say otherwise.
Each begins a run, or goes on with the one that was `kept`, and ends it as
finished or as cut off.
"""

import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxprog import files
from jaxprog.monitoring import environment

_PROJECT = 'jaxprog'


class _Logged:
  """A run of a library that has `log` and `Image`."""

  _library: Any
  _run: Any = None

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log(dict(scalars), step=step)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    shown = {tag: self._library.Image(image) for tag, image in images.items()}
    self._run.log(shown, step=step)


class _Wandb(_Logged):
  """A run of W&B's, offline unless WANDB_MODE says otherwise."""

  def __init__(self, workdir: pathlib.Path, kept: dict[str, Any]):
    # Its own errors would be sent, offline too.
    os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')
    import wandb

    kept.setdefault('id', secrets.token_hex(4))
    self._library = wandb
    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', _PROJECT),
      name=workdir.name,
      id=kept['id'],
      dir=os.environ.get('WANDB_DIR', str(workdir)),
      mode=None if 'WANDB_MODE' in os.environ else 'offline',
      resume='allow',
      reinit='create_new',
      settings=wandb.Settings(silent=True, console='off'),
    )

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Sets the config; a run that goes on may have changed some of it."""
    self._run.config.update(dict(hparams), allow_val_change=True)

  def close(self, finished: bool = True) -> None:
    self._run.finish(exit_code=0 if finished else 1)


class _Mlflow:
  """A run of MLflow's, in its local store or at MLFLOW_TRACKING_URI."""

  def __init__(self, workdir: pathlib.Path, kept: dict[str, Any]):
    os.environ.setdefault('MLFLOW_DISABLE_TELEMETRY', 'true')
    import mlflow
    from mlflow import entities

    self._entities = entities
    self._client = mlflow.MlflowClient(kept.get('store'))
    if 'id' in kept:
      self._client.update_run(kept['id'], status='RUNNING')
    else:
      uri = self._client.tracking_uri
      # From wherever the run goes on. What is a server's may hold a password.
      if uri.startswith('sqlite:'):
        kept['store'] = uri
      kept['id'] = self._create(workdir.name)
    self._id = kept['id']

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    now = time.time_ns() // 10**6
    points = [
      self._entities.Metric(tag, float(value), now, step)
      for tag, value in scalars.items()
    ]
    self._client.log_batch(self._id, metrics=points)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    for tag, image in images.items():
      self._client.log_image(self._id, image, artifact_file=f'{tag}.png')

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Logs parameters, which MLflow lets nobody change, and config.json."""
    self._client.log_dict(self._id, dict(hparams), 'hparams.json')
    known = self._client.get_run(self._id).data.params
    new = [
      self._entities.Param(name, str(value)[:500])
      for name, value in hparams.items()
      if name not in known
    ]
    for i in range(0, len(new), 100):  # As many as one call takes.
      self._client.log_batch(self._id, params=new[i : i + 100])
    if commit := hparams.get('git_commit'):
      self._client.set_tag(self._id, 'mlflow.source.git.commit', commit)

  def close(self, finished: bool = True) -> None:
    status = 'FINISHED' if finished else 'KILLED'
    self._client.set_terminated(self._id, status)

  def _create(self, name: str) -> str:
    """Returns the id of a new run."""
    experiment = os.environ.get('MLFLOW_EXPERIMENT_NAME', _PROJECT)
    found = self._client.get_experiment_by_name(experiment)
    number = (
      found.experiment_id
      if found
      else self._client.create_experiment(experiment)
    )
    return self._client.create_run(number, run_name=name).info.run_id


class _Trackio(_Logged):
  """A run of Trackio's, local unless its own variables name a server."""

  def __init__(self, workdir: pathlib.Path, kept: dict[str, Any]):
    import trackio

    self._library = trackio
    resume = 'allow' if 'id' in kept else 'never'
    # Trackio finds a run by its name, which others must not have.
    kept.setdefault('id', f'{workdir.name}-{secrets.token_hex(3)}')
    self._begin = lambda config: trackio.init(
      os.environ.get('TRACKIO_PROJECT', _PROJECT),
      name=kept['id'],
      config=config,
      resume=resume,
      embed=False,
    )

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Begins the run, which takes its config only then."""
    self._run = self._begin(dict(hparams))

  def close(self, finished: bool = True) -> None:
    """Waits until all is written; Trackio knows no other end."""
    if self._run is not None:
      self._run.finish()


SERVICES = {'mlflow': _Mlflow, 'trackio': _Trackio, 'wandb': _Wandb}


class Service:
  """Writes to one of them, by the five methods of clu's MetricWriter.

  WORKDIR/loggers.json keeps which run it is, so that the same one goes on, and
  the last step of each tag: none of them can forget, so of a step that is
  trained again the first figure stays. What a service fails at ends no
  training: `note` is told, and nothing more is written to it.
  """

  def __init__(
    self,
    name: str,
    workdir: pathlib.Path,
    note: Callable[[str, str], object],
  ):
    """Begins a run of the service called `name`, or goes on with its own."""
    # Whether the run had ended by itself when all was written.
    self.finished = True
    self._name, self._note = name, note
    self._path = workdir / 'loggers.json'
    self._kept: dict[str, Any] = self._read().get(name, {})
    self._steps: dict[str, int] = self._kept.setdefault('steps', {})
    self._run: Any = None
    try:
      self._run = SERVICES[name](workdir, self._kept)
    except Exception as e:
      self._give_up(e)
    self.flush()

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes those of `scalars` that are not written yet."""
    if new := self._take_new(step, scalars):
      self._try(lambda run: run.write_scalars(step, new))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes pictures that are not written yet."""
    if new := self._take_new(step, images):
      self._try(lambda run: run.write_images(step, new))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes what the run was made with, and of which commit."""
    git = environment.environment()['git'] or {}
    hparams = {**hparams, 'git_commit': git.get('commit', '')}
    self._try(lambda run: run.write_hparams(hparams))

  def forget_after(self, step: int) -> None:
    """Does nothing: see above."""

  def flush(self) -> None:
    """Keeps which run it is and what was written; the rest is on its way."""
    known = self._read()
    if self._run is not None and self._kept != known.get(self._name):
      files.write_json(self._path, {**known, self._name: self._kept})

  def close(self) -> None:
    """Ends the run, as a finished one if it is."""
    self._try(lambda run: run.close(self.finished))

  def _take_new(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    new = {k: v for k, v in values.items() if step > self._steps.get(k, -1)}
    self._steps |= dict.fromkeys(new, step)
    return new

  def _try(self, call: Callable[[Any], object]) -> None:
    if self._run is not None:
      try:
        call(self._run)
      except Exception as e:
        self._give_up(e)

  def _give_up(self, error: Exception) -> None:
    self._run = None
    why = ' '.join(f'{type(error).__name__}: {error}'.split())
    self._note('logger', f'{self._name} fails and is left out: {why}')

  def _read(self) -> dict[str, Any]:
    try:
      return json.loads(self._path.read_bytes())
    except FileNotFoundError:
      return {}

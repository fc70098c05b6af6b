"""Says what each stage's features know of the data of later stages."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from ml_collections import config_dict

from jaxprog import buckets, errors, files, stages
from jaxprog import paths as paths_lib
from jaxprog.data.records import Dataset, Records
from jaxprog.monitoring import activity, outcomes
from jaxprog.monitoring import history as history_lib
from jaxprog.reliability import checkpoints, copies
from jaxprog.reporting import outputs, report, rundir
from jaxprog.reporting.page import hand_over
from jaxprog.tools import evaluate
from jaxprog.training import alike, devices, fetching, forward, linear_probe
from jaxprog.training import run as run_lib
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib
from jaxprog.training import trained as trained_lib

# Training images of a class, at most, of which every third chooses the penalty;
# and images that are scored.
_PER_CLASS, _HELD, _SCORED = 15, 3, 5_000


@copies.in_bucket(weights='best')
def probe(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  model: setup_lib.ModelFn | None = None,
) -> list[dict[str, Any]]:
  """Returns what the best weights of each stage know of each later one's data.

  A row for each pair of stages, with the keys from, epoch (of its weights), to,
  dataset, num_classes, image_size, num_train_images, per_class (at most so many
  of them a class), split, num_images (scored), top1 (a linear classifier's on
  the features), penalty; random_top1 and random_penalty are those of a network
  at random weights. Rows are printed, kept in WORKDIR/probe.json and shown in
  the reports. Stages whose data is not here are left out, and named.

  The images that decide which weights of a stage are best are those scored: its
  hold-out, or else the validation images. `model` is what `train` was given.

  Raises:
    UserError: if no stage is done, or no later one has its data here.
  """
  workdir = paths_lib.workdir(workdir)
  rundir.check(workdir)
  console = evaluate.open_console()
  ladder = stages.create_stages(config)
  sources = [
    trained_lib.load_trained(config, workdir, stage=x.name, model=model)
    for x in ladder[:-1]
    if checkpoints.is_done(workdir, x.name)
  ]
  datasets = _load_datasets(config, workdir, ladder, sources, console)
  rows = []
  for i, stage in enumerate(ladder):
    earlier = {x.name for x in ladder[:i]}
    if stage.name in datasets:
      known = [x for x in sources if x.stage.name in earlier]
      rows += _probe(config, stage, datasets[stage.name], known)
  path = workdir / 'probe.json'
  if not console.quiet:
    files.write_json(path, {'rows': rows})
    outputs.add_to_reports(workdir)
  columns = [x for x in hand_over.PROBED if not x.wide]
  console.print(report.terminal_table(columns, rows))
  console.print(buckets.shown(path), soft_wrap=True)
  return rows


def _load_datasets(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  ladder: Sequence[stages.Stage],
  sources: Sequence[trained_lib.Trained],
  console: rich.console.Console,
) -> dict[str, Dataset]:
  """Returns the data of each stage after the first of `sources`, by name."""
  names = [x.name for x in ladder]
  first = min((names.index(x.stage.name) for x in sources), default=len(names))
  rules = history_lib.holdout_rules(run_lib.read_history(workdir))
  datasets = {}
  for stage in ladder[first + 1 :]:
    try:
      (data,) = setup_lib.load_datasets(config, [stage]).values()
      evaluate.check_images(data)
    except errors.UserError as e:
      console.print(f'{stage.name} is left out: {e.what}')
      continue
    rule = rules.get(stage.name)
    datasets[stage.name] = setup_lib.take_holdout(data, stage, rule)
  if not datasets:
    raise errors.UserError(
      'No stage is done that has a later one with its data here.',
      f'--workdir={buckets.shown(workdir)}',
      'A probe tells what one stage knows of the data of the next.',
    )
  alike.check_alike(config, datasets)
  return datasets


def _probe(
  config: config_dict.ConfigDict,
  stage: stages.Stage,
  data: Dataset,
  sources: Sequence[trained_lib.Trained],
) -> list[dict[str, Any]]:
  """Returns a row for what each of `sources` knows of the data of `stage`."""
  step, networks = _create_networks(config, stage, data, sources)

  def see(split):
    fetching.fetch(data.name, {split.name: split.source})
    with activity.doing(f'probing {stage.name}, {split.name} images') as show:
      return forward.run(step, networks, split, stage, config, show)

  scored = data.selection.select(_choose_scored(data.selection))
  chosen, held = _choose_train(data.train)
  train, seen = see(data.train.select(chosen)), see(scored)
  known = train.labels >= 0
  _check_images(stage, known, held)
  with activity.doing(f'solving for {stage.name}'):
    found = [
      linear_probe.choose(
        x[known], train.labels[known], held[known], data.num_classes
      )
      for x in train.outputs
    ]
  # An undecodable image has the label -1, which nobody predicts.
  top1s = [
    float(np.mean(y.predict(x) == seen.labels))
    for y, x in zip(found, seen.outputs, strict=True)
  ]
  common = {
    'to': stage.name,
    'dataset': stage.dataset,
    'num_classes': data.num_classes,
    'image_size': stage.eval_size,
    'num_train_images': int(known.sum()),
    'per_class': _PER_CLASS,
    'split': stage.eval_split,
    'num_images': len(scored),
    'random_top1': top1s[0],
    'random_penalty': found[0].penalty,
  }
  return [
    {
      'from': source.stage.name,
      'epoch': source.epoch,
      **common,
      'top1': top1,
      'penalty': y.penalty,
    }
    for source, top1, y in zip(sources, top1s[1:], found[1:], strict=True)
  ]


def _create_networks(
  config: config_dict.ConfigDict,
  stage: stages.Stage,
  data: Dataset,
  sources: Sequence[trained_lib.Trained],
) -> tuple[Any, list[Any]]:
  """Returns the step to features, and variables: random ones, then `sources`'.

  The network is that of `stage`, to which a hand-over would carry them.
  """
  network = sources[0].model_fn(
    num_classes=data.num_classes,
    image_size=stage.largest_size,
    dtype=devices.resolve_dtype(
      config.dtype, stage.mixed_precision, jax.default_backend()
    ),
  )
  draw = functools.partial(state_lib.init_variables, network, stage.eval_size)
  fresh = jax.device_get(jax.jit(draw)(jax.random.key(config.seed)))
  step = forward.create_step(
    forward.create_features(network, (config.mean_rgb, config.std_rgb))
  )
  networks = [
    _without_head(x) for x in (fresh, *(y.variables for y in sources))
  ]
  return step, networks


def _without_head(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what features depend on; heads differ in shape, this does not."""
  params = {k: v for k, v in variables['params'].items() if k != 'head'}
  return {**variables, 'params': params}


def _choose_train(split: Records) -> tuple[np.ndarray, np.ndarray]:
  """Returns which images are chosen, (n,), and which of these are held."""
  order = _shuffle(split)
  order = order[np.argsort(split.labels[order], kind='stable')]
  labels = split.labels[order]
  places = np.empty(len(order), np.int64)
  places[order] = np.arange(len(order)) - np.searchsorted(labels, labels)
  chosen = places < _PER_CLASS
  return chosen, places[chosen] % _HELD == _HELD - 1


def _choose_scored(split: Records) -> np.ndarray:
  """Returns which images are scored, (n,)."""
  chosen = np.zeros(len(split), bool)
  chosen[_shuffle(split)[:_SCORED]] = True
  return chosen


def _shuffle(split: Records) -> np.ndarray:
  """Returns all positions in an order that depends on the names alone."""
  order = outcomes.sort_images(split)
  return np.random.default_rng(0).permutation(order.positions)


def _check_images(
  stage: stages.Stage, known: np.ndarray, held: np.ndarray
) -> None:
  """Raises UserError if there is nothing to solve for or to choose by."""
  if not (known & held).any() or not (known & ~held).any():
    raise errors.UserError(
      f'No class of {stage.dataset!r} has {_HELD} training images that can be '
      'decoded.',
      f'stage {stage.name!r}',
      'A probe is fitted on some and chosen on others; see --mode=verify.',
    )

"""Scores saved weights on a stage's evaluation images, or on others."""

import csv
import dataclasses
import io
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from ml_collections import config_dict

from jaxprog import buckets, epochs, errors, files, stages
from jaxprog import config as config_lib
from jaxprog import paths as paths_lib
from jaxprog.data import preparation
from jaxprog.data.records import Dataset
from jaxprog.monitoring import activity, diagnostics
from jaxprog.reliability import copies
from jaxprog.reporting import scores
from jaxprog.training import alike, devices, fetching, loop
from jaxprog.training import setup as setup_lib
from jaxprog.training import trained as trained_lib

_CSV_FIELDS = ('class', 'name', 'images', 'right', 'top1')


@copies.in_bucket(chosen=True)
def evaluate(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
  dataset: str = '',
  model: setup_lib.ModelFn | None = None,
) -> dict[str, Any]:
  """Returns how saved weights do on every image of an evaluation split, once.

  Keys: stage, weights, epoch, config_hash (of the run), dataset, image_size,
  eval_crop, interpolation, count, loss, top1 and top5 (accuracies in [0, 1]),
  nll (nats), ece, per_class (class, name, images, right and top1 of each
  class), confusions (class, predicted and count, the most frequent one first)
  and bad_images (why each could not be decoded; they count as wrong).
  All of it is shown on stderr and written to
  WORKDIR/eval/STAGE-WEIGHTS[-DATASET].csv and .json.

  `config` says where the data is and how to evaluate; the rest is the run's
  own. A `dataset` other than the stage's may lack classes, and their order is
  of no matter: labels go by name. `stage`, `weights` and `model` are those of
  `trained.load_trained`.

  Raises:
    UserError: if there are no such weights or images, or the dataset has
      classes that the weights do not know.
  """
  workdir = paths_lib.workdir(workdir)
  trained = trained_lib.load_trained(
    config, workdir, stage=stage, weights=weights, model=model
  )
  if quiet := jax.process_index() != 0:
    activity.silence()
  console = rich.console.Console(
    stderr=True, quiet=quiet, highlight=False, markup=False
  )
  if dataset == trained.stage.dataset:
    dataset = ''
  data = load_dataset(trained, dataset)
  known = relabel(data, trained.classes, trained.class_names)
  if data.num_classes < len(trained.classes):
    console.print(
      f'{data.name} has {data.num_classes:,} of the {len(trained.classes):,} '
      'classes that the weights know; labels go by name.'
    )
  found = {
    'stage': trained.stage.name,
    'weights': weights,
    'epoch': trained.epoch,
    'config_hash': config_lib.config_hash(trained.run_config),
    'dataset': data.name,
    'image_size': trained.stage.eval_size,
    'eval_crop': trained.stage.eval_crop,
    'interpolation': trained.stage.eval_interpolation,
    **_score(trained, known, set(data.classes)),
  }
  paths = _write(workdir, found, dataset)
  scores.show(found, console)
  for path in paths:
    console.print(buckets.shown(path), soft_wrap=True)
  return found


def load_dataset(trained: trained_lib.Trained, dataset: str) -> Dataset:
  """Returns the stage's own data, or `dataset`; it has images to evaluate on.

  Raises:
    UserError: if it is not here, or holds none.
  """
  stage = trained.stage
  if dataset:
    stage = _with_dataset(trained.config, stage.name, dataset)
  data = setup_lib.load_datasets(trained.config, [stage])[stage.name]
  check_images(data)
  alike.check_alike(trained.config, {stage.name: data})
  return data


def check_images(dataset: Dataset) -> None:
  """Raises UserError if there is nothing to evaluate on."""
  if not len(dataset.eval):
    raise errors.UserError(
      f'{dataset.name!r} has no image to evaluate on.',
      str(dataset.eval.directory),
      'Name another one with --input.',
    )


def _with_dataset(
  config: config_dict.ConfigDict, name: str, dataset: str
) -> stages.Stage:
  """Returns the stage `name` as if it were about all classes of `dataset`."""
  config = stages.complete(config)
  for fields in config.stages:
    if fields.name == name:
      fields.update(dataset=dataset, classes=(), num_classes=0)
  try:
    return stages.select(stages.create_stages(config), only=(name,))[0]
  except errors.UserError as e:
    raise errors.UserError(e.what, f'--input={dataset}', e.suggestion) from None


def relabel(
  dataset: Dataset, classes: Sequence[str], class_names: Sequence[str]
) -> Dataset:
  """Returns `dataset` with its labels as positions in `classes`, by name.

  Raises:
    UserError: if it has a class that is not among them.
  """
  place = {name: i for i, name in enumerate(classes)}
  unknown = [x for x in dataset.classes if x not in place]
  if unknown:
    more = f' and {len(unknown) - 5:,} more' if len(unknown) > 5 else ''
    raise errors.UserError(
      f'The weights know other classes than {dataset.name!r}: it has '
      f'{", ".join(map(repr, unknown[:5]))}{more}, which they do not.',
      f'they know {len(classes):,}: {", ".join(map(repr, classes[:5]))}'
      + (', ...' if len(classes) > 5 else ''),
      'Name the classes of the data as in training; some may be missing.',
    )
  label = np.array([place[x] for x in dataset.classes], np.int32)

  def move(split):
    return dataclasses.replace(
      split, labels=label[split.labels], classes=tuple(classes)
    )

  return dataclasses.replace(
    dataset,
    classes=tuple(classes),
    class_names=tuple(class_names),
    train=move(dataset.train),
    eval=move(dataset.eval),
  )


def create_task(
  trained: trained_lib.Trained, dataset: Dataset
) -> setup_lib.Task:
  """Returns what evaluates `trained` on `dataset`; it is not for training."""
  stage = trained.stage
  # Evaluation needs no length of a stage, and the data may have few training
  # images.
  num_images = 1000 * max(part.batch_size for _, part in stage.parts)
  setup = setup_lib.Setup(
    config=trained.config,
    stages=(stage,),
    chosen=(stage,),
    datasets={stage.name: dataset},
    steps={stage.name: epochs.count_steps(stage, num_images)},
    model_fn=trained.model_fn,
    shardings=devices.create_shardings(),
  )
  return setup_lib.create_task(setup, stage)


def _score(
  trained: trained_lib.Trained,
  dataset: Dataset,
  present: Collection[str],
) -> dict[str, Any]:
  """Returns count and all that comes of the images of `dataset`.

  Classes that are not `present` in the data have no row.
  """
  task, split = create_task(trained, dataset), dataset.eval
  variables = jax.device_put(trained.variables, task.shardings.replicated)
  fetching.fetch(dataset.name, {split.name: split.source})
  with activity.doing(
    f'scoring {trained.stage.name} on {dataset.name}'
  ) as show:
    means, outcomes, bad = loop.evaluate(task, variables, split, show)
  found = diagnostics.diagnose(outcomes, split.labels, dataset.num_classes)
  classes, names = dataset.classes, dataset.class_names
  return {
    'count': len(split),
    **means,
    'nll': found['nll'],
    'ece': found['ece'],
    'per_class': [
      {
        'class': name,
        'name': human,
        'images': images,
        'right': right,
        'top1': right / images if images else None,
      }
      for name, human, (images, right) in zip(
        classes, names, found['per_class'], strict=True
      )
      if name in present
    ],
    'confusions': [
      {
        'class': classes[x['label']],
        'predicted': classes[x['predicted']],
        'count': x['count'],
      }
      for x in found['confusions']
      if x['label'] != x['predicted']
    ],
    'bad_images': bad,
  }


def _write(
  workdir: pathlib.Path, found: Mapping[str, Any], dataset: str
) -> list[pathlib.Path]:
  """Writes one row a class as CSV, and all else as JSON; returns their paths.

  `dataset` is part of the files' name, '' where it is the stage's own.
  """
  other = preparation.folder_config(dataset) or dataset
  parts = [found['stage'], found['weights'], re.sub(r'[^\w.-]+', '-', other)]
  path = workdir / 'eval' / '-'.join(x for x in parts if x)
  paths = [path.with_name(path.name + x) for x in ('.csv', '.json')]
  if jax.process_index() == 0:
    out = io.StringIO()
    rows = csv.DictWriter(out, _CSV_FIELDS, lineterminator='\n')
    rows.writeheader()
    rows.writerows(found['per_class'])
    files.write_bytes(paths[0], out.getvalue().encode())
    overall = {k: v for k, v in found.items() if k != 'per_class'}
    files.write_json(paths[1], overall)
  return paths

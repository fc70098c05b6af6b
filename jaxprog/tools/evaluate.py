"""Scores saved weights on a stage's evaluation images, or on others."""

import csv
import dataclasses
import difflib
import io
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
from ml_collections import config_dict

from jaxprog import buckets, epochs, errors, files, named, stages
from jaxprog import config as config_lib
from jaxprog import paths as paths_lib
from jaxprog.data import preparation, test_sets
from jaxprog.data.records import Dataset
from jaxprog.monitoring import activity, diagnostics
from jaxprog.reliability import copies
from jaxprog.reporting import scores
from jaxprog.training import alike, devices, fetching, loop
from jaxprog.training import setup as setup_lib
from jaxprog.training import trained as trained_lib

_CSV_FIELDS = ('class', 'name', 'images', 'right', 'top1')
# Pixels, as of the field eval_image_size.
_LEAST_SIZE = 8


class Subject(NamedTuple):
  """Weights, and what they are scored on."""

  trained: trained_lib.Trained
  # Its labels are positions among the classes of the weights.
  dataset: Dataset
  # The classes that it has.
  present: frozenset[str]
  # What the network chooses among, bool (classes,); None: all that it knows.
  among: np.ndarray | None
  # What the files of the scores are called by.
  words: tuple[str, ...]
  console: rich.console.Console

  def at_size(self, size: int) -> 'Subject':
    """Returns the same with evaluation images of so many pixels.

    Raises:
      UserError: if that is no size of images.
    """
    if size < _LEAST_SIZE:
      raise errors.UserError(
        f'{size} pixels are too few for an image.',
        '--eval_image_size',
        f'Name sizes of at least {_LEAST_SIZE}, such as 96,128,160.',
      )
    stage = dataclasses.replace(self.trained.stage, eval_image_size=size)
    trained = dataclasses.replace(self.trained, stage=stage)
    return self._replace(trained=trained, words=(*self.words, f'{size}px'))


@copies.in_bucket(chosen=True)
def evaluate(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
  dataset: str = '',
  model: setup_lib.ModelFn | None = None,
  flip_average: bool = False,
  eval_image_size: int = 0,
) -> dict[str, Any]:
  """Returns how saved weights do on every image of an evaluation split, once.

  Keys: stage, weights, epoch, config_hash (of the run), dataset, image_size,
  eval_crop, interpolation, flip_average, num_classes (that the weights know),
  chosen_among (so many of them), count, loss, top1 and top5 (accuracies in
  [0, 1]), nll (nats), ece, per_class (class, name, images, right and top1 of
  each class), confusions (class, predicted and count, the most frequent one
  first) and bad_images (why each could not be decoded; they count as wrong).
  All of it is shown on stderr and written to
  WORKDIR/eval/STAGE-WEIGHTS[-DATASET][-flip][-SIZEpx].csv and .json.

  `config` says where the data is and how to evaluate; the rest is the run's
  own. A `dataset` other than the stage's may lack classes, and their order is
  of no matter: labels go by name. `stage`, `weights` and `model` are those of
  `trained.load_trained`. With `flip_average` logits are the mean of those of
  an image and its mirror image, as with the field eval_flip;
  `eval_image_size` takes the place of the stage's, unless it is 0.

  Raises:
    UserError: if there are no such weights or images, or the dataset has
      classes that the weights do not know.
  """
  workdir = paths_lib.workdir(workdir)
  subject = find_subject(
    config,
    workdir,
    stage=stage,
    weights=weights,
    dataset=dataset,
    model=model,
    flip_average=flip_average,
  )
  if eval_image_size:
    subject = subject.at_size(eval_image_size)
  found = score(subject)
  paths = _write(workdir, found, subject)
  scores.show(found, subject.console)
  for path in paths:
    subject.console.print(buckets.shown(path), soft_wrap=True)
  return found


def find_subject(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  *,
  stage: str,
  weights: str,
  dataset: str,
  model: setup_lib.ModelFn | None,
  flip_average: bool,
) -> Subject:
  """Returns what is to be scored; the arguments are those of `evaluate`.

  Says on stderr what is special about the data.

  Raises:
    UserError: if there are no such weights or images, or the dataset has
      classes that the weights do not know.
  """
  trained = trained_lib.load_trained(
    config, workdir, stage=stage, weights=weights, model=model
  )
  if flip_average:
    flipping = dataclasses.replace(trained.stage, eval_flip=True)
    trained = dataclasses.replace(trained, stage=flipping)
  console = open_console()
  if dataset == trained.stage.dataset:
    dataset = ''
  data, present, among, notes = _find_data(trained, dataset)
  for note in notes:
    console.print(note)
  name = preparation.folder_config(dataset) or dataset
  words = (
    trained.stage.name,
    weights,
    re.sub(r'[^\w.-]+', '-', name),
    'flip' * flip_average,
  )
  return Subject(trained, data, frozenset(present), among, words, console)


def open_console() -> rich.console.Console:
  """Returns the stderr of the first process; the others are quiet."""
  if quiet := jax.process_index() != 0:
    activity.silence()
  return rich.console.Console(
    stderr=True, quiet=quiet, highlight=False, markup=False
  )


def _find_data(
  trained: trained_lib.Trained, dataset: str
) -> tuple[Dataset, Collection[str], np.ndarray | None, Sequence[str]]:
  """Returns data, labelled as the weights know it, and what `Subject` has.

  The last are sentences on it.
  """
  if dataset in named.TESTS:
    with activity.doing(f'opening {dataset}') as show:
      data, among, notes = test_sets.load(
        dataset,
        paths_lib.data_dir(trained.config),
        trained.classes,
        trained.class_names,
        show,
      )
    alike.check_alike(trained.config, {trained.stage.name: data})
    present = {data.classes[x] for x in np.unique(data.eval.labels)}
    return data, present, among, notes
  data = load_dataset(trained, dataset)
  known = relabel(data, trained.classes, trained.class_names)
  notes = ()
  if data.num_classes < len(trained.classes):
    notes = (
      f'{data.name} has {data.num_classes:,} of the {len(trained.classes):,} '
      'classes that the weights know; labels go by name.',
    )
  return known, data.classes, None, notes


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
    how = e.suggestion
    if difflib.get_close_matches(dataset, named.TESTS):
      how = errors.did_you_mean(dataset, [*named.DATASETS, *named.TESTS])
    raise errors.UserError(e.what, f'--input={dataset}', how) from None


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
  trained: trained_lib.Trained,
  dataset: Dataset,
  among: np.ndarray | None = None,
) -> setup_lib.Task:
  """Returns what evaluates `trained` on `dataset`; it is not for training.

  Classes are chosen `among` these, bool (classes,), or all.
  """
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
  return setup_lib.create_task(setup, stage, among=among)


def score(subject: Subject) -> dict[str, Any]:
  """Returns what `evaluate` does; classes that are not present have no row."""
  trained, dataset, present, among, *_ = subject
  stage, split = trained.stage, dataset.eval
  task = create_task(trained, dataset, among)
  variables = jax.device_put(trained.variables, task.shardings.replicated)
  fetching.fetch(dataset.name, {split.name: split.source})
  what = f'scoring {stage.name} on {dataset.name}, {stage.eval_size} px'
  with activity.doing(what) as show:
    means, outcomes, bad = loop.evaluate(task, variables, split, show)
  if split.answers is not None:
    # Another of the right answers is no mistake.
    right = outcomes['rank'] < 1
    predicted = np.where(right, split.labels, outcomes['predicted'])
    outcomes = {**outcomes, 'predicted': predicted}
  found = diagnostics.diagnose(outcomes, split.labels, dataset.num_classes)
  classes, names = dataset.classes, dataset.class_names
  return {
    'stage': stage.name,
    'weights': trained.weights,
    'epoch': trained.epoch,
    'config_hash': config_lib.config_hash(trained.run_config),
    'dataset': dataset.name,
    'image_size': stage.eval_size,
    'eval_crop': stage.eval_crop,
    'interpolation': stage.eval_interpolation,
    'flip_average': stage.eval_flip,
    'num_classes': len(classes),
    'chosen_among': len(classes) if among is None else int(among.sum()),
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


def find_path(
  workdir: pathlib.Path, subject: Subject, ending: str
) -> pathlib.Path:
  """Returns where what was found of `subject` is written."""
  name = '-'.join(x for x in subject.words if x)
  return workdir / 'eval' / f'{name}{ending}'


def _write(
  workdir: pathlib.Path, found: Mapping[str, Any], subject: Subject
) -> list[pathlib.Path]:
  """Writes a row a class as CSV, and all else as JSON; returns their paths."""
  paths = [find_path(workdir, subject, x) for x in ('.csv', '.json')]
  if jax.process_index() == 0:
    out = io.StringIO()
    rows = csv.DictWriter(out, _CSV_FIELDS, lineterminator='\n')
    rows.writeheader()
    rows.writerows(found['per_class'])
    files.write_bytes(paths[0], out.getvalue().encode())
    overall = {k: v for k, v in found.items() if k != 'per_class'}
    files.write_json(paths[1], overall)
  return paths

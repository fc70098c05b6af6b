"""Datasets that cannot be read yet, as far as their numbers are known."""

from typing import cast

from jaxprog import named
from jaxprog import stages as stages_lib
from jaxprog.data import builders, records
from jaxprog.training import setup as setup_lib


def count_raw(raw: builders.Raw) -> named.Published:
  """Returns what a raw dataset holds, as it is listed."""
  splits = (builders.TRAIN, builders.EVAL)
  counts = [sum(1 for _ in raw.images(split)) for split in splits]
  return named.Published(len(raw.classes), *counts)


def count_dataset(
  stage: stages_lib.Stage, known: named.Published
) -> records.Dataset:
  """Returns the dataset of a stage without its images."""
  classes = stage.classes or tuple(map(str, range(known.classes)))
  part = len(classes) / known.classes
  held = round(known.train * part * stage.holdout_part)
  train, evaluated = round(known.train * part) - held, round(known.eval * part)

  def split(number: int) -> records.Records:
    """Returns what has a length, and no images."""
    return cast(records.Records, range(number))

  return records.Dataset(
    name=stage.dataset,
    classes=classes,
    class_names=classes,
    train=split(train),
    eval=split(evaluated),
    holdout=split(held) if held else None,
  )


def is_read(task: setup_lib.Task) -> bool:
  """Returns whether a stage's images can be read."""
  return isinstance(task.dataset.train, records.Records)


def describe(task: setup_lib.Task) -> list[str]:
  """Returns a note on what was only counted, or none."""
  if is_read(task):
    return []
  train, evaluated = len(task.dataset.train), len(task.dataset.eval)
  return [
    f'{task.stage.dataset} is not here as it will be read: counted as '
    f'{train:,} training and {evaluated:,} evaluation images'
  ]

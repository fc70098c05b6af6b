"""A history as a real ladder leaves it: four stages, hundreds of rows."""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprog.monitoring import history as history_lib

STAGE_FIELDS = (
  'name',
  'dataset',
  'num_classes',
  'image_size',
  'batch_size',
  'optimizer',
  'schedule',
  'num_epochs',
  'steps_per_epoch',
  'num_train_images',
  'num_eval_images',
  'transfer',
)


class Rung(NamedTuple):
  name: str
  dataset: str
  num_classes: int
  image_size: int
  batch_size: int
  optimizer: str
  schedule: str
  num_epochs: int
  num_train_images: int
  num_eval_images: int
  peak: float
  top1: float
  speed: float


LADDER = (
  Rung(
    name='imagenette',
    dataset='imagenette',
    num_classes=10,
    image_size=224,
    batch_size=64,
    optimizer='adamw',
    schedule='one_cycle',
    num_epochs=20,
    num_train_images=9469,
    num_eval_images=3925,
    peak=0.002,
    top1=0.91,
    speed=812.0,
  ),
  Rung(
    name='tiny_imagenet',
    dataset='tiny_imagenet',
    num_classes=200,
    image_size=64,
    batch_size=128,
    optimizer='adamw',
    schedule='cosine_warmup',
    num_epochs=30,
    num_train_images=100000,
    num_eval_images=10000,
    peak=0.001,
    top1=0.63,
    speed=5214.0,
  ),
  Rung(
    name='imagenet_mini',
    dataset='imagenet_mini',
    num_classes=1000,
    image_size=224,
    batch_size=96,
    optimizer='sgd_momentum',
    schedule='polynomial',
    num_epochs=40,
    num_train_images=34745,
    num_eval_images=3923,
    peak=0.0005,
    top1=0.41,
    speed=845.0,
  ),
  Rung(
    name='imagenet',
    dataset='imagenet2012',
    num_classes=1000,
    image_size=224,
    batch_size=128,
    optimizer='sgd_momentum',
    schedule='exponential_warmup',
    num_epochs=60,
    num_train_images=1281167,
    num_eval_images=50000,
    peak=0.1,
    top1=0.752,
    speed=861.0,
  ),
)


def create_history(
  num_epochs: Sequence[int | None] = (None, None, None, None), seed: int = 0
) -> dict[str, Any]:
  """Returns the ladder; a number cuts or stretches a stage to that length."""
  rng = random.Random(seed)
  history = history_lib.new_history('3f1c9a52')
  global_step = 0
  for rung, epochs in zip(LADDER, num_epochs, strict=False):
    stage = _begin(history, rung, epochs or rung.num_epochs)
    global_step = _train(stage, rung, global_step, rng)
    stage['status'] = 'done'
  return history


def create_row(epoch: int, **values: Any) -> dict[str, Any]:
  """Returns a complete row of a history with plausible values."""
  return {
    'epoch': epoch,
    'global_step': epoch * 100,
    'train_loss': 2.0 / epoch,
    'train_top1': 0.5,
    'val_loss': 2.1 / epoch,
    'val_top1': 0.5,
    'val_top5': 0.8,
    'learning_rate': 0.001,
    'grad_norm': 1.2,
    'seconds': 41.0,
    'images_per_second': 812.0,
    'input_wait': 0.02,
    **values,
  }


def _begin(history: dict[str, Any], rung: Rung, epochs: int) -> dict[str, Any]:
  before = [stage['name'] for stage in history['stages']]
  fields = rung._asdict()
  for left_out in ('peak', 'top1', 'speed'):
    del fields[left_out]
  return history_lib.begin_stage(
    history,
    **{**fields, 'num_epochs': epochs},
    steps_per_epoch=rung.num_train_images // rung.batch_size,
    transfer={
      'from': before[-1] if before else None,
      'carried': ['conv_init', 'bn_init', 'ResNetBlock_0'] if before else [],
      'fresh': ['head'] if before else ['conv_init', 'head'],
    },
  )


def _train(
  stage: dict[str, Any], rung: Rung, global_step: int, rng: random.Random
) -> int:
  chance = math.log(stage['num_classes'])
  for epoch in range(1, stage['num_epochs'] + 1):
    part = epoch / stage['num_epochs']
    learned = 1 - math.exp(-4 * part)
    top1 = rung.top1 * learned * (1 + rng.gauss(0, 0.012))
    loss = chance * (1 - 0.8 * learned * rung.top1) + rng.gauss(0, 0.02)
    global_step += stage['steps_per_epoch']
    row = create_row(
      epoch,
      global_step=global_step,
      train_loss=loss + 0.35 - 0.3 * part,
      train_top1=max(0.0, top1 - 0.08 + 0.11 * part),
      val_loss=loss,
      val_top1=top1,
      val_top5=top1 + (1 - top1) * 0.65,
      learning_rate=rung.peak * (math.cos(math.pi * part) + 1.001) / 2.001,
      grad_norm=1.0 + rng.random(),
      seconds=stage['num_train_images'] / rung.speed * 1.04,
      images_per_second=rung.speed * (1 + rng.gauss(0, 0.01)),
    )
    history_lib.add_epoch(stage, **row)
  return global_step

"""What others have reached on the same data, and where they say so."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxprog.reporting import facts


class Baseline(NamedTuple):
  """A published accuracy; top-1 as a fraction, the range a source gives.

  Images are trained on at `image_size`, the last one where it grows, and tested
  at `eval_size`.
  """

  dataset: str
  num_classes: int
  num_train_images: int
  model: str
  image_size: int
  eval_size: int
  num_epochs: int
  top1: tuple[float, float]
  source: str
  remark: str = ''


class Speed(NamedTuple):
  """Published training throughput of ResNet-50 at 224 px, images/s a GPU."""

  device: str
  images_per_second: tuple[float, float]
  source: str


class Beside(NamedTuple):
  """A stage beside a baseline, and in what the two differ."""

  stage: str
  top1: float | None
  baseline: Baseline
  differs: tuple[str, ...]


def _imagenette() -> Iterator[Baseline]:
  """Yields the leaderboard: by image size, accuracy after so many epochs.

  Its rules allow no larger size in validation than in training.
  """
  epochs = 5, 20, 80, 200
  found = {
    128: (0.874, 0.916, 0.936, 0.942),
    192: (0.868, 0.925, 0.945, 0.950),
    256: (0.869, 0.935, 0.949, 0.951),
  }
  for size, scores in found.items():
    for length, top1 in zip(epochs, scores, strict=True):
      yield Baseline(
        'imagenette',
        10,
        9_469,
        'xresnext50',
        size,
        size,
        length,
        (top1, top1),
        'fastai/imagenette, README, leaderboard',
      )


def _ffcv() -> Iterator[Baseline]:
  """Yields ffcv's ImageNet results by model and epochs.

  Sizes are those of the configs that its table links to; its text says that 224
  px were tested.
  """
  epochs = 16, 24, 32, 40, 56, 88
  found = {
    'resnet50': (0.738, 0.756, 0.766, 0.772, 0.780, 0.784),
    'resnet18': (0.669, 0.688, 0.700, 0.706, 0.713, 0.724),
  }
  for model, scores in found.items():
    for length, top1 in zip(epochs, scores, strict=True):
      yield Baseline(
        'imagenet2012',
        1_000,
        1_281_167,
        model,
        192,
        256,
        length,
        (top1, top1),
        'libffcv/ffcv-imagenet, README and configs',
        'with flip averaging, and images that grow from 160 px',
      )


def _imagenet(
  epochs: int,
  low: float,
  high: float,
  source: str,
  image_size: int = 224,
  eval_size: int = 224,
) -> Baseline:
  return Baseline(
    'imagenet2012',
    1_000,
    1_281_167,
    'resnet50',
    image_size,
    eval_size,
    epochs,
    (low, high),
    source,
  )


BASELINES = (
  *_imagenette(),
  *(
    Baseline(
      'tiny_imagenet',
      200,
      100_000,
      model,
      64,
      64,
      100,
      (top1, top1),
      'cs-giung/giung2-jax, projects/Baseline-ImageNet',
    )
    for model, top1 in (('resnet18', 0.655), ('resnet50', 0.692))
  ),
  Baseline(
    'imagenet_mini',
    1_000,
    34_745,
    'resnet50',
    224,
    224,
    100,
    (0.187, 0.187),
    'the only public training log found',
    'its sizes are the usual ones, not said',
  ),
  *_ffcv(),
  _imagenet(100, 0.763, 0.767, 'flax, examples/imagenet, README'),
  _imagenet(100, 0.781, 0.781, 'timm, ResNet-50 A3', image_size=160),
  _imagenet(100, 0.760, 0.760, 'timm, ResNet-50 A3', 160, 160),
  _imagenet(300, 0.798, 0.798, 'timm, ResNet-50 A2'),
  _imagenet(600, 0.804, 0.804, 'timm, ResNet-50 A1'),
  Baseline(
    'tfds:cifar10',
    10,
    50_000,
    'airbench CNN',
    32,
    32,
    8,
    (0.940, 0.940),
    'KellerJordan/cifar10-airbench, README',
    'with the mean over mirrored and shifted images',
  ),
)

# Images that the published results were evaluated on: all there are.
EVAL_IMAGES = {
  'imagenette': 3_925,
  'tiny_imagenet': 10_000,
  'imagenet_mini': 3_923,
  'imagenet2012': 50_000,
  'tfds:cifar10': 10_000,
}

# A GPU is one device to JAX, and so its images can be counted by device.
SPEEDS = (
  Speed('A100', (2_470, 2_470), 'PyTorch with mixed precision'),
  Speed('H100', (6_900, 6_900), 'MLPerf Training 3.0, computed'),
)


def compare(history: Mapping[str, Any], model: str | None) -> list[Beside]:
  """Returns each stage beside the baselines of the same data and classes.

  Of each source and model that is the one of the nearest image sizes, in
  training and in testing, then of the nearest number of epochs. Those of the
  run's own `model` are all there is, where there are any; None is an unknown
  one.
  """
  return [
    Beside(
      stage['name'],
      facts.best_top1(stage),
      baseline,
      tuple(_differences(stage, model, baseline)),
    )
    for stage in history['stages']
    for baseline in _choose(stage, model)
  ]


def compare_speed(
  stage: Mapping[str, Any], model: str | None, device: str
) -> Speed | None:
  """Returns the published speed of the same network, size and device."""
  if model != 'resnet50' or stage['image_size'] != 224:
    return None
  return next((x for x in SPEEDS if x.device.lower() in device.lower()), None)


def _choose(stage: Mapping[str, Any], model: str | None) -> list[Baseline]:
  same = [
    x
    for x in BASELINES
    if (x.dataset, x.num_classes) == (stage['dataset'], stage['num_classes'])
  ]
  same = [x for x in same if x.model == model] or same

  def distance(x: Baseline) -> tuple[float, float, float]:
    return (
      abs(math.log(x.image_size / stage['image_size'])),
      abs(math.log(x.eval_size / _eval_size(stage))),
      abs(math.log(x.num_epochs / stage['num_epochs'])),
    )

  families = dict.fromkeys((x.source, x.model) for x in same)
  return [
    min((x for x in same if (x.source, x.model) == f), key=distance)
    for f in families
  ]


def _eval_size(stage: Mapping[str, Any]) -> int:
  """Returns the pixels that a stage is evaluated at; old records lack them."""
  return stage.get('eval_image_size') or stage['image_size']


def _differences(
  stage: Mapping[str, Any], model: str | None, baseline: Baseline
) -> Iterator[str]:
  if model != baseline.model:
    yield f'{baseline.model}, here {model or "an unknown network"}'
  if stage['image_size'] != baseline.image_size:
    yield f'{baseline.image_size} px, here {stage["image_size"]} px'
  if _eval_size(stage) != baseline.eval_size:
    yield f'tested at {baseline.eval_size} px, here at {_eval_size(stage)} px'
  # The row of a shorter last epoch counts less.
  done = min(len(stage['epochs']), stage['num_epochs'])
  if done != baseline.num_epochs:
    yield f'{baseline.num_epochs} epochs, here {done:g}'
  if stage['num_train_images'] != baseline.num_train_images:
    yield (
      f'{baseline.num_train_images:,} training images, here '
      f'{stage["num_train_images"]:,}'
    )
  if facts.is_on_holdout(stage):
    yield 'validation images, here on a hold-out'
  else:
    yield from _fewer_eval_images(stage)
  if (stage.get('transfer') or {}).get('from'):
    yield 'from scratch, here from an earlier stage'
  if baseline.remark:
    yield baseline.remark


def _fewer_eval_images(stage: Mapping[str, Any]) -> Iterator[str]:
  validation = stage.get('validation') or {}
  count = validation.get('num_images', stage['num_eval_images'])
  published = EVAL_IMAGES.get(stage['dataset'], count)
  if count != published:
    yield f'{published:,} evaluation images, here {count:,}'

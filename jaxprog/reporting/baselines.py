"""What others have reached on the same data, and where they say so."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxprog import named
from jaxprog.reporting import facts, rundir


class Baseline(NamedTuple):
  """A published accuracy; top-1 as a fraction, the range a source gives.

  Images are trained on at `image_size`, the last one where it grows, and tested
  at `eval_size`.
  """

  dataset: str
  model: str
  image_size: int
  eval_size: int
  num_epochs: int
  top1: tuple[float, float]
  source: str
  remark: str


class Beside(NamedTuple):
  """A stage beside a baseline, and in what the two differ."""

  stage: str
  top1: float | None
  baseline: Baseline
  differs: tuple[str, ...]


# What others have used: all there is.
_DATA = {
  **{name: x.published for name, x in named.DATASETS.items() if x.published},
  'tfds:cifar10': named.Published(10, 50_000, 10_000),
}

_LEADERBOARD = 'fastai/imagenette, README, leaderboard'
_FFCV = 'libffcv/ffcv-imagenet, README and configs'
_FFCV_EPOCHS = (16, 24, 32, 40, 56, 88)
_FLAX = 'flax, examples/imagenet, README'
_GIUNG = 'cs-giung/giung2-jax, projects/Baseline-ImageNet'
_TORCHVISION = 'torchvision, ResNet-50 V2'
_AIRBENCH = 'KellerJordan/cifar10-airbench, README'
_ONLY_LOG = 'the only public training log found'
_REMARKS = {
  _ONLY_LOG: 'its sizes are the usual ones, not said',
  _FFCV: 'with images that grow from 160 px',
  _TORCHVISION: 'of averaged weights',
  _AIRBENCH: 'with the mean over shifted images',
}
# Whose scores are of an image and its mirror image.
_FLIPS = (_FFCV, _AIRBENCH)
# By dataset: the model, the sizes that it was trained and tested at, top-1
# after so many epochs, the source.
_PUBLISHED: dict[str, list[tuple[str, int, int, dict[int, Any], str]]] = {
  # The leaderboard's rules allow no larger size in validation.
  'imagenette': [
    ('xresnext50', size, size, by_length, _LEADERBOARD)
    for size, by_length in (
      (128, {5: 0.874, 20: 0.916, 80: 0.936, 200: 0.942}),
      (192, {5: 0.868, 20: 0.925, 80: 0.945, 200: 0.950}),
      (256, {5: 0.869, 20: 0.935, 80: 0.949, 200: 0.951}),
    )
  ],
  'tiny_imagenet': [
    ('resnet18', 64, 64, {100: 0.655}, _GIUNG),
    ('resnet50', 64, 64, {100: 0.692}, _GIUNG),
  ],
  'imagenet_mini': [('resnet50', 224, 224, {100: 0.187}, _ONLY_LOG)],
  'imagenet2012': [
    # Sizes are those of the configs that ffcv's table links to; its text says
    # that 224 px were tested.
    *(
      (model, 192, 256, dict(zip(_FFCV_EPOCHS, top1, strict=True)), _FFCV)
      for model, top1 in (
        ('resnet50', (0.738, 0.756, 0.766, 0.772, 0.780, 0.784)),
        ('resnet18', (0.669, 0.688, 0.700, 0.706, 0.713, 0.724)),
      )
    ),
    ('resnet50', 224, 224, {100: (0.763, 0.767)}, _FLAX),
    ('resnet50', 160, 224, {100: 0.781}, 'timm, ResNet-50 A3'),
    ('resnet50', 160, 160, {100: 0.760}, 'timm, ResNet-50 A3'),
    ('resnet50', 224, 224, {300: 0.798}, 'timm, ResNet-50 A2'),
    ('resnet50', 224, 224, {600: 0.804}, 'timm, ResNet-50 A1'),
    ('resnet50', 176, 224, {600: 0.809}, _TORCHVISION),
  ],
  'tfds:cifar10': [('airbench CNN', 32, 32, {8: 0.940}, _AIRBENCH)],
}

_BASELINES = [
  Baseline(
    dataset,
    model,
    image_size,
    eval_size,
    epochs,
    top1 if isinstance(top1, tuple) else (top1, top1),
    source,
    _REMARKS.get(source, ''),
  )
  for dataset, published in _PUBLISHED.items()
  for model, image_size, eval_size, by_length, source in published
  for epochs, top1 in by_length.items()
]

# Images/s a GPU in training ResNet-50 at 224 px, and who says so. A GPU is one
# device to JAX, and so its images can be counted by device.
SPEEDS = {
  'A100': (2_470, 'PyTorch with mixed precision'),
  'H100': (6_900, 'MLPerf Training 3.0, computed'),
}


def compare(run: rundir.RunFiles) -> list[Beside]:
  """Returns each stage beside the baselines of the same data and classes.

  Of each source and model that is the one of the nearest image sizes, in
  training and in testing, then of the nearest number of epochs. Those of the
  run's own model are all there is, where there are any.
  """
  return [
    Beside(
      stage['name'],
      facts.best_top1(stage),
      baseline,
      tuple(_differences(stage, run.model, baseline)),
    )
    for stage in run.stages
    for baseline in _choose(stage, run.model)
  ]


def _choose(stage: Mapping[str, Any], model: str | None) -> list[Baseline]:
  same = [x for x in _BASELINES if x.dataset == stage['dataset']]
  if not same or stage['num_classes'] != _DATA[stage['dataset']].classes:
    return []
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
  flips = baseline.source in _FLIPS
  if flips != stage.get('eval_flip', False):
    here = 'with flip averaging, here without'
    yield here if flips else 'without flip averaging, here with it'
  # The row of a shorter last epoch counts less.
  done = min(len(stage['epochs']), stage['num_epochs'])
  if done != baseline.num_epochs:
    yield f'{baseline.num_epochs} epochs, here {done:g}'
  data = _DATA[baseline.dataset]
  if stage['num_train_images'] != data.train:
    yield (
      f'{data.train:,} training images, here {stage["num_train_images"]:,}'
    )
  validation = stage.get('validation') or {}
  count = validation.get('num_images', stage['num_eval_images'])
  if facts.is_on_holdout(stage):
    yield 'validation images, here on a hold-out'
  elif count != data.eval:
    yield f'{data.eval:,} evaluation images, here {count:,}'
  if (stage.get('transfer') or {}).get('from'):
    yield 'from scratch, here from an earlier stage'
  if baseline.remark:
    yield baseline.remark

"""Writes a stage's weights for other programs, and tries what it has written.

WORKDIR/export/ gets STAGE.safetensors (timm's names), STAGE.stablehlo (a
function of images, for serving), STAGE.labels.txt and STAGE.md, a model card;
and STAGE/, the same weights as timm and the Hugging Face hub take them.
"""

import contextlib
import dataclasses
import json
import operator
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from ml_collections import config_dict

from jaxprog import buckets, files, version
from jaxprog import config as config_lib
from jaxprog import paths as paths_lib
from jaxprog.models import conv, interchange, resnet
from jaxprog.monitoring import activity
from jaxprog.reliability import checkpoints, copies
from jaxprog.reporting import facts
from jaxprog.training import hub_folder, setup
from jaxprog.training import state as state_lib
from jaxprog.training import trained as trained_lib

# Largest difference of two logits, over the largest logit or 1.
TOLERANCE = 1e-4
# As jax.export names them.
PLATFORMS = ('cpu', 'cuda', 'tpu')
# Random images that what was written is tried on.
_NUM_IMAGES = 2


class ParityError(RuntimeError):
  """A file gives other logits than the network that it was made from."""


class _Score(NamedTuple):
  """Accuracies in [0, 1] on so many images, None where that is not known."""

  top1: float
  top5: float
  num_images: int | None
  split: str


@copies.in_bucket(chosen=True)
def export(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
) -> dict[str, pathlib.Path]:
  """Returns the paths of safetensors, stablehlo, labels, card and folder.

  A file gets its name once it has been read back and has given the network's
  own logits on random images. The default stage is the last one that `workdir`
  has finished. No images are needed.

  Raises:
    UserError: if there are no such weights.
    ParityError: if a file gives other logits; none is left behind.
  """
  workdir = paths_lib.workdir(workdir)
  trained = trained_lib.load_trained(
    config, workdir, stage=stage, weights=weights
  )
  name = trained.stage.name
  if done := checkpoints.read_done(workdir, name):
    trained = dataclasses.replace(trained, record=done['record'])
  return export_trained(trained, workdir / 'export')


def export_trained(
  trained: trained_lib.Trained, directory: pathlib.Path
) -> dict[str, pathlib.Path]:
  """Writes four files and a folder into `directory`; returns their paths."""
  name = trained.stage.name
  paths = {
    'safetensors': directory / f'{name}.safetensors',
    'stablehlo': directory / f'{name}.stablehlo',
    'labels': directory / f'{name}.labels.txt',
    'card': directory / f'{name}.md',
    'folder': directory / name,
  }
  apply, images = create_apply(trained), _random_images(trained)
  with activity.doing(f'compiling {name}'):
    expected = apply(trained.variables, images)
  tensors = interchange.to_state_dict(trained.variables)
  encoded = safetensors.numpy.save(tensors, _describe_file(trained))
  with (
    activity.doing(f'trying {paths["safetensors"].name}'),
    _written(paths['safetensors'], encoded) as path,
  ):
    tensors = safetensors.numpy.load_file(path)
    found = apply(
      interchange.from_state_dict(tensors, trained.variables), images
    )
    _report(paths['safetensors'], compare(path.name, found, expected))
  with (
    activity.doing(f'compiling and trying {paths["stablehlo"].name}'),
    _written(paths['stablehlo'], serialize(trained)) as path,
  ):
    found = jax.export.deserialize(bytearray(path.read_bytes())).call(images)
    _report(paths['stablehlo'], compare(path.name, found, expected))
  files.write_bytes(paths['labels'], _list_labels(trained).encode())
  files.write_bytes(paths['card'], _write_card(trained).encode())
  score = _find_score(trained)
  hub_folder.write(
    paths['folder'],
    trained,
    encoded,
    _write_card(trained, in_folder=True),
    {'top-1': score.top1, 'top-5': score.top5},
    timms=_is_timms(trained),
  )
  return paths


def create_apply(trained: trained_lib.Trained) -> trained_lib.Apply:
  """Returns apply(variables, images) -> logits, compiled where it is called.

  All of it is f32, on every platform: TPUs and GPUs would else multiply in
  less, and no two of them would agree to four digits.
  """
  apply = trained.create_apply(np.float32)
  return jax.jit(jax.default_matmul_precision('highest')(apply))


def serialize(trained: trained_lib.Trained) -> bytes:
  """Returns StableHLO for any number of images, the weights in it.

  Its convolutions are XLA's own: which of ours is best on a CPU depends on the
  number of images.
  """
  apply, size = create_apply(trained), trained.stage.eval_size
  (batch,) = jax.export.symbolic_shape('b')
  shape = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)

  @jax.jit
  def serve(images):
    with nn.intercept_methods(_convolve_plainly):
      return apply(trained.variables, images)

  return bytes(jax.export.export(serve, platforms=PLATFORMS)(shape).serialize())


def _convolve_plainly(
  method: Callable[..., Any],
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  context: nn.module.InterceptorContext,
) -> Any:
  """Returns what `method` does; a convolution of ours as XLA's own."""
  module = context.module
  if not isinstance(module, conv.Conv) or context.method_name != '__call__':
    return method(*args, **kwargs)
  (x,), half = args, module.kernel_size // 2
  kernel: Any = module.get_variable('params', 'kernel')
  return conv.xla(x, kernel, module.strides, ((half, half),) * 2)


def compare(name: str, found: Any, expected: Any) -> float:
  """Returns the largest difference of two arrays of logits.

  Raises:
    ParityError: if it is too large, or not a number.
  """
  difference = float(np.max(np.abs(np.asarray(found) - np.asarray(expected))))
  limit = TOLERANCE * max(1.0, float(np.max(np.abs(expected))))
  if not difference <= limit:
    raise ParityError(
      f'{name} gives other logits than the network: the largest difference is '
      f'{difference:.2g}, {limit:.2g} would do. It was removed.'
    )
  return difference


@contextlib.contextmanager
def _written(path: pathlib.Path, data: bytes) -> Iterator[pathlib.Path]:
  """Yields where `data` lies to be tried; then it takes the name `path`.

  If that fails, nothing is left of it, and of `path` what was there before.
  """
  for leftover in path.parent.glob(f'.{path.name}.*.tmp'):  # Of killed ones.
    leftover.unlink(missing_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  files.write_bytes(temporary, data)
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _random_images(trained: trained_lib.Trained) -> np.ndarray:
  size = trained.stage.eval_size
  shape = _NUM_IMAGES, size, size, 3
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _report(path: pathlib.Path, difference: float) -> None:
  print(
    f'{buckets.shown(path)}: read back, logits differ by {difference:.1e} at '
    f'most ({_NUM_IMAGES} random images)'
  )


def _describe_file(trained: trained_lib.Trained) -> dict[str, str]:
  """Returns what the safetensors' header says besides names and shapes."""
  config, stage = trained.config, trained.stage
  fields = {
    **{field: config[field] for field in setup.NETWORK},
    'classes': trained.classes,
    'class_names': trained.class_names,
    'image_size': stage.eval_size,
    'eval_crop': stage.eval_crop,
    'interpolation': stage.eval_interpolation,
    'mean': config.mean_rgb,
    'std': config.std_rgb,
    'jaxprog': version.VERSION,
    'config_hash': config_lib.config_hash(trained.run_config),
    'stage': stage.name,
    'weights': trained.weights,
    'epoch': trained.epoch,
    'top1': _find_score(trained).top1 if _is_seen_alike(trained) else None,
  }
  # 'pt': arrays are as PyTorch has them.
  text = {
    k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()
  }
  if trained.temperature != 1:
    text['temperature'] = json.dumps(trained.temperature)
  return {'format': 'pt', **text}


def _find_score(trained: trained_lib.Trained) -> _Score:
  """Returns how the weights did on validation images, one crop of each.

  On those that chose them, if the stage has looked at no others.
  """
  record, row = trained.record, trained.meta['epoch']
  seen = record.get('diagnostics', {})
  if trained.weights == 'best' and seen.get('epoch') == trained.epoch:
    return _Score(seen['top1'], seen['top5'], seen['num_images'], 'validation')
  kind = 'ema' if trained.weights == 'ema' else 'val'
  return _Score(
    row[f'{kind}_top1'],
    row[f'{kind}_top5'],
    record.get('num_eval_images'),
    trained.trained_stage.eval_split,
  )


def _is_seen_alike(trained: trained_lib.Trained) -> bool:
  """Returns whether images are used as those that gave the score were."""
  seen = operator.attrgetter(
    'eval_size', 'eval_crop', 'eval_interpolation', 'eval_flip'
  )
  return seen(trained.stage) == seen(trained.trained_stage)


def _list_labels(trained: trained_lib.Trained) -> str:
  """Returns a line for each logit: WordNet id or class, tab, name."""
  pairs = zip(trained.classes, trained.class_names, strict=True)
  return ''.join(f'{_words(x)}\t{_words(name)}\n' for x, name in pairs)


def _words(text: str) -> str:
  return ' '.join(text.split())


def _write_card(
  trained: trained_lib.Trained, *, in_folder: bool = False
) -> str:
  """Returns what a person has to know who did not train it, as Markdown.

  Other files lie beside the one `in_folder`.
  """
  stage, config = trained.stage, trained.config
  if in_folder:
    labels = 'label_names in config.json, in the order of the logits'
    pytorch = _describe_folder(trained)
    use = "`init_from='hf:OWNER/NAME'` starts a stage of jaxprog."
  else:
    labels = f'those of `{stage.name}.labels.txt`, a line for each logit'
    pytorch = describe_timm(trained)
    use = _describe_jax(trained)
  params = state_lib.count_params(trained.variables['params'])
  description = f'{stage.description}\n\n' if stage.description else ''
  return f"""# {stage.name}: {config.model}, {len(trained.classes):,} classes

{description}{params:,} parameters, {trained.weights} weights (epoch \
{trained.epoch}). The classes are {labels}.

## Accuracy
{_describe_score(trained)}{_describe_temperature(trained)}

## Training
{_describe_training(trained)}

## Input
{_describe_input(trained)}

## PyTorch
{pytorch}

## JAX
{use}

## Licence
None is chosen. What the licence of the images{_name_licence(trained)} allows \
limits what the weights may be used for: decide before you share them.

Written by jaxprog {version.VERSION}, config \
{config_lib.config_hash(trained.run_config)}.
"""


def _name_licence(trained: trained_lib.Trained) -> str:
  """Returns whose licence counts beside that of the images."""
  licence = trained.record.get('transfer', {}).get('licence')
  return f' and that of the first weights ({licence})' if licence else ''


def _describe_score(trained: trained_lib.Trained) -> str:
  found, stage = _find_score(trained), trained.trained_stage
  number = '' if found.num_images is None else f'{found.num_images:,} '
  images = 'validation' if found.split == 'validation' else 'held-out training'
  looks = ', the mean logits of both mirror images' * stage.eval_flip
  text = (
    f'Top-1 {found.top1:.1%}, top-5 {found.top5:.1%} of {number}{images} '
    f'images, one centre crop of {stage.eval_size} px each{looks}.'
  )
  if trained.weights == 'final':
    return text
  return f'{text} The epoch was chosen by its accuracy on {stage.eval_split}.'


def _describe_temperature(trained: trained_lib.Trained) -> str:
  if trained.temperature == 1:
    return ''
  return (
    f'\n\nProbabilities are the softmax of the logits over '
    f'{trained.temperature:.4g}, a temperature that was fitted to these '
    'weights; the logits themselves are as in training.'
  )


def _describe_training(trained: trained_lib.Trained) -> str:
  stage, record = trained.trained_stage, trained.record
  images = f'{record["num_train_images"]:,} images of ' if record else ''
  origin = record.get('transfer', {}).get('from')
  if origin and not stage.hub_file:
    # The name of a stage, or of a file: its folder is nobody's business.
    origin = pathlib.Path(origin).name
  start = f'`{origin}`' if origin else 'fresh weights'
  epochs = f'epochs: {stage.num_epochs:g}' if record else 'not finished'
  if record.get('status') == 'stopped_early':
    epochs += f', stopped after {len(record["epochs"])}'
  changes = facts.describe_changes(record)
  dataset = hub_folder.name_dataset(stage)
  return (
    f'{images}`{dataset}`, from {start}; {epochs}; batches of '
    f'{stage.batch_size}, {stage.image_size} px; {stage.optimizer}, '
    f'{stage.schedule}, peak rate {stage.peak_learning_rate:g}, weight decay '
    f'{stage.weight_decay:g}.'
    + ''.join(f' {x[0].upper()}{x[1:]}.' for x in changes)
  )


def _describe_input(trained: trained_lib.Trained) -> str:
  stage, config = trained.stage, trained.config
  mean, std = (
    ', '.join(f'{x:g}' for x in v) for v in (config.mean_rgb, config.std_rgb)
  )
  size, shorter = stage.eval_size, round(stage.eval_size / stage.eval_crop)
  return (
    f'RGB, the shorter side resized to {shorter} px ('
    f'{stage.eval_interpolation}, antialiased), the centre {size}x{size}, '
    f'divided by 255, minus ({mean}), over ({std}).'
  )


def _describe_jax(trained: trained_lib.Trained) -> str:
  stage = trained.stage
  size = stage.eval_size
  return f"""```python
import pathlib
import jax.export
data = pathlib.Path('{stage.name}.stablehlo').read_bytes()
serve = jax.export.deserialize(bytearray(data))
logits = serve.call(images)  # uint8 (any number, {size}, {size}, 3)
```
The normalisation and the weights are in it; platforms: {', '.join(PLATFORMS)}.
It needs flatbuffers and JAX, of this release ({jax.__version__}) or one of the
next six months. `init_from='{stage.name}.safetensors'` starts a stage of
jaxprog."""


def _is_timms(trained: trained_lib.Trained) -> bool:
  """Returns whether timm builds this very network by the name of its model."""
  config, (_, adapted) = trained.config, _timm_code(trained, '')
  return config.num_filters == 64 and not config.blur_pool and not adapted


def _describe_folder(trained: trained_lib.Trained) -> str:
  """Returns how timm loads the folder that the text lies in."""
  if not _is_timms(trained):
    return describe_timm(trained, hub_folder.WEIGHTS)
  return f"""```python
import timm
name = 'local-dir:export/{trained.stage.name}'  # Or 'hf-hub:OWNER/NAME'.
model = timm.create_model(name, pretrained=True).eval()
inputs = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**inputs)
```
It gives the same logits."""


def describe_timm(trained: trained_lib.Trained, file: str = '') -> str:
  """Returns how timm loads the weights in `file`, or why it cannot."""
  config, size = trained.config, trained.stage.eval_size
  if config.num_filters != 64:
    return (
      f'timm cannot load it: its networks begin with 64 filters, this one with '
      f'num_filters={config.num_filters}. Names and layout are those of its '
      f'{config.model}.'
    )
  lines, adapted = _timm_code(
    trained, file or f'{trained.stage.name}.safetensors'
  )
  text = '\n'.join(['```python', *lines, '```\n'])
  if config.blur_pool:
    return (
      f'{text}It loads with `strict=True`, but **gives other logits**: '
      'blur_pool blurs in front of strided convolutions, which timm does not.'
    )
  if not adapted:
    return f'{text}It loads with `strict=True` and gives the same logits.'
  return (
    f'{text}So it loads with `strict=True` and gives the same logits at {size} '
    f'px. Without the adaptation it does not: {" and ".join(adapted)}.'
  )


def _timm_code(
  trained: trained_lib.Trained, file: str
) -> tuple[list[str], list[str]]:
  """Returns lines of Python that make `model`, and what they adapt."""
  config, stage = trained.config, trained.stage
  classes = f'num_classes={len(trained.classes)}'
  stem, side = resnet.choose_stem(stage.largest_size), config.stem_kernel
  adapted = []
  create = f"model = timm.create_model('{config.model}', {classes})"
  if config.model == 'resnet10':
    adapted.append('timm has no resnet10 by name')
    block = 'timm.models.resnet.BasicBlock'
    create = f'model = timm.models.resnet.ResNet({block}, [1] * 4, {classes})'
  lines = ['import safetensors.torch, timm, torch', create]
  if side != 7:
    adapted.append(f'the first convolution is {side}x{side}')
  if not (stem.stride == 2 and stem.pool):
    adapted.append('trained below 128 px, our stem shrinks images less')
  if side != 7 or stem.stride != 2:
    shape = f'3, 64, {side}, {stem.stride}, {side // 2}, bias=False'
    lines.append(f'model.conv1 = torch.nn.Conv2d({shape})')
  if not stem.pool:
    lines.append('model.maxpool = torch.nn.Identity()')
  load = f"weights = safetensors.torch.load_file('{file}')"
  return [*lines, load, 'model.load_state_dict(weights, strict=True)'], adapted

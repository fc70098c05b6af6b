"""A folder of weights as timm and the Hugging Face hub take it.

config.json is timm's: `timm.create_model('local-dir:FOLDER')` reads it. What
timm would build otherwise than we did, is not called by the name of its network
there: it fails, and does not give other logits.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxprog import files, stages
from jaxprog.training import trained as trained_lib

WEIGHTS = 'model.safetensors'


def write(
  folder: pathlib.Path,
  trained: trained_lib.Trained,
  weights: bytes,
  card: str,
  scores: Mapping[str, float],
  *,
  timms: bool,
) -> None:
  """Writes config.json, model.safetensors and README.md into `folder`.

  `card` is Markdown and stands below what the hub reads of it, such as the
  `scores`, name -> part of 1; `timms`: timm builds this very network.
  """
  files.write_bytes(folder / WEIGHTS, weights)
  config = json.dumps(_describe_network(trained, timms), indent=2)
  files.write_bytes(folder / 'config.json', config.encode())
  head = _describe_card(trained, scores, timms)
  # JSON is YAML.
  lines = [f'{k}: {json.dumps(v)}' for k, v in head.items()]
  text = '\n'.join(['---', *lines, '---', card])
  files.write_bytes(folder / 'README.md', text.encode())


def name_dataset(stage: stages.Stage) -> str:
  """Returns what a stage was trained on; where it lies is nobody's business."""
  kind, _, path = stage.dataset.partition(':')
  return pathlib.Path(path).name if kind == 'folder' else stage.dataset


def _describe_network(
  trained: trained_lib.Trained, timms: bool
) -> dict[str, Any]:
  """Returns what config.json says."""
  config, stage = trained.config, trained.stage
  size, num_classes = stage.eval_size, len(trained.classes)
  described = {
    'num_classes': num_classes,
    'num_features': len(trained.variables['params']['head']['kernel']),
    'global_pool': 'avg',
    'label_names': trained.classes,
    'label_descriptions': dict(
      zip(trained.classes, trained.class_names, strict=True)
    ),
    'pretrained_cfg': {
      'custom_load': False,
      'input_size': (3, size, size),
      'fixed_input_size': False,
      'interpolation': stage.eval_interpolation,
      'crop_pct': _describe_crop(stage),
      'crop_mode': 'center',
      'mean': config.mean_rgb,
      'std': config.std_rgb,
      'num_classes': num_classes,
      'first_conv': 'conv1',
      'classifier': 'fc',
    },
  }
  if timms:
    return {'architecture': config.model, **described}
  return {'model': config.model, **described}


def _describe_crop(stage: stages.Stage) -> float:
  """Returns timm's crop_pct: it rounds the size before the crop down."""
  before = round(stage.eval_size / stage.eval_crop)
  if int(stage.eval_size / stage.eval_crop) == before:
    return stage.eval_crop
  return stage.eval_size / (before + 0.5)


def _describe_card(
  trained: trained_lib.Trained, scores: Mapping[str, float], timms: bool
) -> dict[str, Any]:
  """Returns what the hub reads of a model card.

  There is no licence: whose weights they are has yet to choose one.
  """
  stage = trained.trained_stage
  dataset = name_dataset(stage)
  results = {
    'task': {'type': 'image-classification'},
    'dataset': {'type': dataset, 'name': dataset, 'split': stage.eval_split},
    'metrics': [
      {'type': 'accuracy', 'name': name, 'value': value}
      for name, value in scores.items()
    ],
  }
  library = 'timm' if timms else 'jaxprog'
  base = {'base_model': stage.hub_file.repo} if stage.hub_file else {}
  return {
    'library_name': library,
    'pipeline_tag': 'image-classification',
    'tags': ['image-classification', 'resnet', library],
    **base,
    'metrics': ['accuracy'],
    'model-index': [{'name': stage.name, 'results': [results]}],
  }

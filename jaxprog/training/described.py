"""What is said and noted of a stage, as its task and its record tell it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprog import config as config_lib
from jaxprog import stages
from jaxprog.data import jpeg
from jaxprog.monitoring import progress as progress_lib
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib

# Rates that a picture can tell apart.
_NUM_RATES = 400
_PADDED = 512


def describe(task: setup_lib.Task) -> progress_lib.Description:
  """Returns what is printed of a stage before the run starts."""
  stage = task.stage
  return progress_lib.Description(
    name=stage.name,
    num_train_images=len(task.dataset.train),
    num_classes=len(task.dataset.classes),
    image_size=stage.image_size,
    batch_size=stage.batch_size,
    total_steps=task.steps.total,
    warmup_steps=task.steps.warmup,
    peak_learning_rate=stage.peak_learning_rate,
    final_learning_rate=float(task.learning_rate_fn(task.steps.total - 1)),
    parameters=state_lib.count_params(task.state_shapes.variables['params']),
  )


def sample_learning_rate(task: setup_lib.Task) -> list[float]:
  """Returns the rates of equal parts of a stage, each that of its first step.

  Of a short stage a part is one step. Else they are about 400, as many in each
  epoch, so that a rate which falls between two epochs does so between parts.
  Without what the plateau schedule will lower them by: nobody knows yet.
  """
  steps, length = task.steps, task.stage.num_epochs
  count = round(length * max(1, _NUM_RATES // math.ceil(length)))
  count = min(count, steps.total)
  first = [steps.epoch_start(i * length / count) for i in range(count)]
  at = np.minimum(np.array(first, np.int32), steps.total - 1)
  # Of one length in most stages, so that this compiles once.
  padded = np.resize(at, -(-count // _PADDED) * _PADDED)
  return jax.vmap(task.learning_rate_fn)(padded)[:count].tolist()


def join_rates(
  task: setup_lib.Task,
  record: Mapping[str, Any],
  new: Sequence[float],
  epoch: float,
) -> list[float]:
  """Returns the rates that a stage has had, and those that it will have.

  None where either are not known beforehand.
  """
  old = record.get('learning_rates') or []
  if not old or not new:
    return []
  at = np.arange(len(new)) * task.stage.num_epochs / len(new)
  part = (at * len(old) / record['num_epochs']).astype(int)
  had = np.array(old)[np.minimum(part, len(old) - 1)]
  return np.where(at < epoch, had, new).tolist()


def fields(task: setup_lib.Task) -> dict[str, Any]:
  """Returns the fields of a stage's record that are known beforehand."""
  stage, dataset = task.stage, task.dataset
  stem = getattr(task.model, 'stem', None)
  holdout = None
  if dataset.holdout is not None:  # What was set aside, and by which rule.
    rule, images = dataset.holdout_rule, len(dataset.holdout)
    holdout = {'rule': rule, 'part': stage.holdout_part, 'images': images}
  sizes = np.bincount(dataset.train.labels)
  sizes = sizes[sizes > 0]
  return {
    'name': stage.name,
    'description': stage.description,
    'dataset': stage.dataset,
    'num_classes': len(dataset.classes),
    'image_size': stage.image_size,
    'batch_size': stage.batch_size,
    'optimizer': stage.optimizer,
    'schedule': stage.schedule,
    'learning_rate': stage.peak_learning_rate,
    'label_smoothing': stage.label_smoothing,
    'loss': stage.loss,
    'num_epochs': stage.num_epochs,
    'steps_per_epoch': task.steps.phases[0].per_epoch,
    'num_train_images': len(dataset.train),
    'num_eval_images': len(dataset.selection),
    'class_sizes': [int(sizes.min()), int(sizes.max())],
    'eval_split': stage.eval_split,
    'best_metric': stage.best_metric,
    'holdout': holdout,
    'eval_image_size': stage.eval_size,
    'eval_flip': stage.eval_flip,
    'data_version': dataset.version,
    'decoder': jpeg.version(),
    'excluded_images': dict(dataset.excluded),
    'phases': [[x.from_epoch, dict(x.changes)] for x in stage.phases],
    'num_params': state_lib.count_params(task.state_shapes.variables['params']),
    'dtype': task.dtype.name,
    'stem': stem._asdict() if stem is not None else None,
  }


def weights_meta(task: setup_lib.Task) -> dict[str, Any]:
  """Returns what is stored with weights, so that they can be used alone."""
  config = task.config
  return {
    'stage': task.stage.name,
    'classes': list(task.dataset.classes),
    'class_names': list(task.dataset.class_names),
    **{field: config[field] for field in setup_lib.NETWORK},
    'image_size': task.stage.image_size,
    'mean_rgb': list(config.mean_rgb),
    'std_rgb': list(config.std_rgb),
    # All that they were trained with, as complete as config.json.
    'config': config_lib.to_json(stages.complete(config)),
  }


def start(record: Mapping[str, Any]) -> str:
  """Returns where the weights come from, for a person."""
  origin = record['transfer']
  if record.get('resumed_at_steps'):
    return f'resumed at step {record["resumed_at_steps"][-1]}'
  if origin['from'] is None:
    done = ['fresh weights']
  else:
    done = [f'from {origin["from"]}', *_describe_handover(record)]
  if taught := record.get('teacher'):
    done.append(f'taught {taught["classes"]} classes by {taught["from"]}')
  return ', '.join(done)


def _describe_handover(record: Mapping[str, Any]) -> list[str]:
  """Returns what was done with weights on their way to a stage."""
  origin = record['transfer']
  head = 'fresh head' if 'head' in origin['fresh'] else 'head carried'
  match origin.get('head'):
    case 'zero':
      head = 'head of zeros'
    case 'by_class':
      rows = sum(map(len, origin['head_rows'].values()))
      head = f'{rows} of {record["num_classes"]} head rows carried'
  done = [head]
  if origin['operator'] != 'plain':
    done.append(origin['operator'])
  if origin['statistics'] != 'carry':
    done.append(f'statistics {origin["statistics"]}')
  if 'licence' in origin:
    done.append(f'licence {origin["licence"]}')
  return done

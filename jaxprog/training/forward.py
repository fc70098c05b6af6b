"""What networks make of the images of a split, one centre crop of each."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import config_dict

from jaxprog import stages
from jaxprog.data import loader
from jaxprog.data.records import Records
from jaxprog.training import augment, devices


class Seen(NamedTuple):
  """What came of n images."""

  # Of each network, f32 (n, k).
  outputs: list[np.ndarray]
  # (n,), -1 where an image could not be decoded.
  labels: np.ndarray


def create_features(
  model: nn.Module, pixels: tuple[Sequence[float], Sequence[float]]
) -> Callable[[Any, jax.Array], jax.Array]:
  """Returns apply(variables, images) -> what goes into the head, f32 (N, d).

  Images are uint8 (N, S, S, 3); the head's own weights need not be there.
  """

  def skip_head(method, args, kwargs, context):
    if context.module.path == ('head',):
      return args[0]
    return method(*args, **kwargs)

  def apply(variables, images):
    images = augment.normalise(images, *pixels)
    with nn.intercept_methods(skip_head):
      found: Any = model.apply(variables, images, train=False)
    return found.reshape(len(found), -1).astype(jnp.float32)

  return apply


def create_step(apply: Callable[[Any, jax.Array], jax.Array]) -> Any:
  """Returns step(variables, batch) -> (outputs, labels), for `run`."""
  shardings = devices.create_shardings()

  def step(variables, batch):
    return apply(variables, batch['image']), batch['label']

  return jax.jit(
    step,
    in_shardings=(shardings.replicated, shardings.batch),
    out_shardings=shardings.replicated,
  )


def run(
  step: Any,
  networks: Sequence[Any],
  split: Records,
  stage: stages.Stage,
  config: config_dict.ConfigDict,
  on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> Seen:
  """Returns what `step` makes of every image, with each network's variables.

  An image is decoded once, as `stage` has it for evaluation.
  """
  shardings = devices.create_shardings()
  networks = jax.device_put(list(networks), shardings.replicated)
  reader = loader.eval_batches(
    split,
    stage,
    num_workers=config.num_workers or len(os.sched_getaffinity(0)),
    worker_kind=config.worker_kind,
  )
  found: list[list[np.ndarray]] = [[] for _ in networks]
  labels: list[np.ndarray] = []
  with contextlib.closing(reader):
    for batch in loader.prefetch_to_device(reader, shardings.batch):
      outputs = [step(variables, batch) for variables in networks]
      for rows, (output, _) in zip(found, outputs, strict=True):
        rows.append(np.asarray(output))
      labels.append(np.asarray(outputs[0][1]))
      on_batch(len(labels), -(-len(split) // len(batch['label'])))
  count = len(split)
  return Seen(
    [np.concatenate(rows)[:count] for rows in found],
    np.concatenate(labels)[:count],
  )

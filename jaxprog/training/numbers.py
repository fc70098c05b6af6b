"""The numbers of a stage that its compiled steps take as arguments.

As constants, each trial of a sweep would compile what the one before had. What
is computed of them alone is computed here, in 64 bits, and rounded once, as
Python and XLA do with constants: a step comes to the same bits, or its last
ones differ where the compiler fuses otherwise. Shapes and choices stay static,
and whether a number is 0: a step is compiled without what that would do.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxprog import epochs, stages
from jaxprog.models import resnet
from jaxprog.optim import optimizers, schedules
from jaxprog.training import augment, distillation, losses

# A tree of float32 and int32; its leaves are named where they are read.
Numbers = dict[str, Any]


def read(
  stage: stages.Stage,
  steps: epochs.Steps,
  model: nn.Module,
  params: Any,
  *,
  num_classes: int,
  class_weights: np.ndarray | None = None,
) -> Numbers:
  """Returns the numbers of `stage`, as it is in one part of it.

  `params` are what is trained, of which shapes will do. Images of a class
  count as `class_weights`, (num_classes,), in the loss; None: all alike.
  """
  rates = resnet.path_rates(model, stage.drop_path) if stage.drop_path else ()
  numbers = {
    'class_weights': class_weights,
    'ema_decay': stage.ema_decay,
    'factors': optimizers.read_factors(params, stage),
    'frozen': steps.frozen,
    'images': read_images(stage),
    'lesson': distillation.read_numbers(stage, steps),
    'loss': losses.read_numbers(stage, num_classes),
    'optimizer': optimizers.read_numbers(stage),
    'path_rates': np.array(rates),
    'schedule': schedules.read_numbers(stage, steps),
  }
  return jax.tree.map(_narrow, numbers)


def read_images(stage: stages.Stage) -> Numbers:
  """Returns the numbers by which images are changed and mixed."""
  strengths = {kind: getattr(stage, kind) for kind in augment.COLORS}
  least, most = stage.erasing_min_area, stage.erasing_max_area
  return {
    'mixup_alpha': stage.mixup_alpha or None,
    'cutmix_alpha': stage.cutmix_alpha or None,
    'colors': augment.color_ranges(strengths),
    'erasing': {
      'probability': stage.erasing_probability,
      'min_area': least,
      'more_area': most - least,
    },
  }


def _narrow(x: Any) -> np.ndarray:
  """Returns a number, or an array of them, as devices have it."""
  x = np.asarray(x)
  return x.astype(np.float32 if x.dtype.kind == 'f' else np.int32)

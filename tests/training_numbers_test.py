"""Which numbers of a stage are arguments of its compiled step."""

import logging
import re

import jax
import numpy as np
import pytest
import tiny_config
from flax import linen as nn

import jaxprog
from jaxprog import fields
from jaxprog.training import setup

COLORS = ('brightness', 'contrast', 'saturation', 'hue')
# Stages in which a step uses numbers, and other values of these; every field
# that is one stands in some case.
CASES = {
  'adamw': (
    {'gradient_clipping': 1.0, 'freeze_epochs': 0.5, 'warmup_epochs': 0.5},
    {
      **{'b1': 0.8, 'b2': 0.99, 'eps': 1e-6, 'weight_decay': 0.03},
      **{'gradient_clipping': 2.0, 'learning_rate': 0.3, 'num_epochs': 3.0},
      **{'freeze_epochs': 0.75, 'warmup_epochs': 1.0},
    },
  ),
  'sgd_momentum': (
    {'schedule': 'polynomial', 'end_factor': 0.1, 'adaptive_clipping': 0.1}
    | {'warmup_steps': 3},
    {
      **{'momentum': 0.8, 'end_factor': 0.2, 'adaptive_clipping': 0.2},
      **{'base_batch_size': 300, 'warmup_steps': 5},
    },
  ),
  'lars': (
    {'schedule': 'step', 'milestones': (0.5, 1.0)},
    {'trust_coefficient': 0.01, 'milestones': (0.75, 1.5), 'step_factor': 0.3},
  ),
  'rmsprop': (
    {'schedule': 'cosine', 'restart_epochs': 0.5, 'restart_factor': 1.5},
    {'rms_decay': 0.9, 'restart_epochs': 0.6, 'restart_factor': 1.4},
  ),
  'schedule_free_adamw': (
    {'schedule': 'constant', 'warmup_steps': 3},
    {'b1': 0.8, 'warmup_steps': 5},
  ),
  'muon': (
    {'schedule': 'one_cycle', 'ema_decay': 0.9, 'layer_decay': 0.9}
    | {'head_rate_factor': 1.5, 'backbone_rate_factor': 0.7},
    {
      **{'warmup_fraction': 0.4, 'div_factor': 20.0, 'final_div_factor': 100.0},
      **{'ema_decay': 0.99, 'layer_decay': 0.8, 'head_rate_factor': 2.0},
      'backbone_rate_factor': 0.5,
    },
  ),
  'adamw_8bit': (
    {
      **dict.fromkeys((*COLORS, 'erasing_probability', 'cutmix_alpha'), 0.1),
      **{'mixup_alpha': 0.1, 'class_weighting': 0.5, 'balanced_sampling': 0.1},
      'label_smoothing': 0.1,
    },
    {
      **dict.fromkeys((*COLORS, 'erasing_probability', 'cutmix_alpha'), 0.2),
      **{'mixup_alpha': 0.2, 'class_weighting': 0.6, 'balanced_sampling': 0.2},
      **{'erasing_min_area': 0.1, 'erasing_max_area': 0.5},
      'label_smoothing': 0.2,
    },
  ),
  'sgd_momentum_8bit': (
    {'loss': 'bce', 'bce_target_threshold': 0.2, 'distill_features': 0.5}
    | {'distill_from': 'stage:three', 'distill_epochs': 1.0},
    {'bce_target_threshold': 0.3, 'distill_features': 0.6}
    | {'distill_weight': 0.3, 'distill_temperature': 3.0}
    | {'distill_epochs': 1.5},
  ),
}
SCALED = ('lars', 'sgd_momentum')
# Other numbers that a step is compiled for, in a stage that uses them: they are
# shapes or exponents.
STATIC = {
  'batch_size': (24, {}),
  'ema_warmup_power': (0.5, {'ema_decay': 0.9, 'ema_warmup_power': 1.0}),
  'image_size': (16, {}),
  'low_frequency_size': (8, {'image_size': 16}),
  'micro_batch_size': (24, {}),
  'power': (1.5, {'schedule': 'polynomial'}),
  'quantization_block': (
    8,
    {'optimizer': 'adamw_8bit', 'quantization_min_size': 8},
  ),
  'quantization_min_size': (8, {'optimizer': 'adamw_8bit'}),
}
# And those that only hosts know.
HOST = {
  **{'augment_repeats': 2, 'dash_least': 0.5, 'early_stopping_min_delta': 0.1},
  **{'early_stopping_patience': 2, 'eval_crop': 0.9, 'eval_image_size': 16},
  **{'max_crop_aspect': 1.5, 'min_crop_area': 0.5, 'num_classes': 10},
  **{'perturb': 0.1, 'plateau_cooldown': 1, 'plateau_factor': 0.2},
  **{'plateau_min_delta': 0.1, 'plateau_patience': 2, 'published_top1': 0.5},
  **{'rand_augment_layers': 3, 'rand_augment_magnitude': 5, 'shrink': 0.4},
  **{'reset_blocks': 1, 'target_top1': 0.5, 'transfer_batches': 5},
}


class Network(nn.Module):
  """Two layers, which tell their features: quick to lower."""

  num_classes: int

  @nn.compact
  def __call__(self, x, *, train):
    """Returns logits."""
    del train
    x = nn.Dense(3, name='stem_dense')(x)
    self.sow('intermediates', 'features', x)
    return nn.Dense(self.num_classes, name='head')(x.mean((1, 2)))


def create_network(num_classes, **_):
  return Network(num_classes)


def create_task(data_dir, model=create_network, **fields):
  config = tiny_config.get_config(data_dir)
  config.stages[1] = {'name': 'ten', 'num_epochs': 2, **fields}
  found = setup.create_setup(config, only=('ten',), model=model)
  return setup.create_task(found, found.chosen[0])


def lower(*args, names=False, **fields):
  """Returns the text of a stage's steps, lowered, with names of arguments."""
  task = create_task(*args, **fields)
  lowered = [task.trace_train_step(x).lower() for x in task.train_steps]
  return '\n'.join(x.as_text(debug_info=names) for x in lowered)


def list_numbers(*args, **fields):
  """Returns the numbers of a stage's last step by their paths."""
  task = create_task(*args, **fields)
  tree = task.numbers[task.program(task.steps.total - 1)]
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): x.tolist() for path, x in leaves}


@pytest.mark.parametrize('case', CASES)
def test_a_number_is_an_argument_of_the_step(data_dir, case):
  fixed, changes = CASES[case]
  fixed = {'optimizer': case, 'scale_learning_rate': case in SCALED, **fixed}
  text = lower(data_dir, **fixed)
  assert lower(data_dir, **{**fixed, **changes}) == text
  # Each of them is one that the step reads.
  read = lower(data_dir, names=True, **fixed)
  before = list_numbers(data_dir, **fixed)
  for name, value in changes.items():
    after = list_numbers(data_dir, **{**fixed, name: value})
    changed = [path for path, x in after.items() if x != before[path]]
    assert any(f'numbers{path}' in read for path in changed), name


def test_numbers_of_convolutions_and_blocks_are_arguments(data_dir):
  texts = {
    lower(data_dir, None, drop_path=x, optimizer='muon', momentum=1 - x)
    for x in (0.1, 0.2)
  }
  assert len(texts) == 1


@pytest.mark.parametrize('name', STATIC)
def test_shapes_and_exponents_are_static(data_dir, name):
  value, fixed = STATIC[name]
  text = lower(data_dir, **fixed)
  assert lower(data_dir, **{**fixed, name: value}) != text


def test_the_lists_are_whole(data_dir):
  assert lower(data_dir, **HOST) == lower(data_dir)
  seen = {name for _, changes in CASES.values() for name in changes}
  numbers = {*seen, 'drop_path'}
  assert numbers == {*fields.names(fields.STAGE, 'number')}
  kinds = int, float, tuple[float, ...]
  known = {name for name, x in fields.STAGE.items() if x.kind in kinds}
  assert known == numbers | STATIC.keys() | HOST.keys()


def test_a_sweep_compiles_once(data_dir, tmp_path, caplog):
  # Other numbers in every run of this test: none is in JAX's cache on disk.
  rng, missed = np.random.default_rng(), []
  names = 'learning_rate', 'weight_decay', 'label_smoothing', 'brightness'
  for num_epochs in (1.0, 0.5):
    config = tiny_config.get_config(data_dir)
    drawn = rng.uniform(0.01, 0.1, 5)
    config.stages[1].update(zip(names, drawn, strict=False))
    config.stages[1].update(
      b1=1 - drawn[4], warmup_epochs=0.2, num_epochs=num_epochs
    )
    caplog.clear()
    with caplog.at_level(logging.DEBUG, 'jax._src.compiler'):
      jaxprog.train(
        config, tmp_path / str(num_epochs), only=('ten',), model=create_network
      )
      jax.jit(lambda x, y=drawn[0]: x + y)(1.0)
    missed.append(re.findall("CACHE MISS for '(\\w+)'", caplog.text))
  # What is never the same was compiled, and so misses are heard of.
  assert 'jit__lambda' in missed[1]
  assert not {'jit_train_step', 'jit_eval_step'} & {*missed[1]}

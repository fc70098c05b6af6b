"""ResNet variables under the names of torchvision's and timm's state dicts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from jaxprog.models import resnet

Variables = dict[str, Any]
Path = tuple[str, ...]

# torchvision's and timm's classifier.
HEAD = ('fc.weight', 'fc.bias')
_TRACKED = 'num_batches_tracked'

_OUTER = {'stem_conv': 'conv1', 'stem_norm': 'bn1', 'head': 'fc'}
_INNER = {
  'conv1': 'conv1',
  'conv2': 'conv2',
  'conv3': 'conv3',
  'norm1': 'bn1',
  'norm2': 'bn2',
  'norm3': 'bn3',
  'shortcut_conv': 'downsample.0',
  'shortcut_norm': 'downsample.1',
}
_FIELDS = {
  ('params', 'kernel'): 'weight',
  ('params', 'scale'): 'weight',
  ('params', 'bias'): 'bias',
  ('batch_stats', 'mean'): 'running_mean',
  ('batch_stats', 'var'): 'running_var',
}
_BLOCK = re.compile(r'layer(\d+)\.(\d+)\.')
# Axes of ours in their order, by the number of axes: HWIO becomes OIHW.
_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def to_state_dict(variables: Variables) -> dict[str, np.ndarray]:
  """Returns the state dict of `variables`: names, and arrays OIHW or (O, I).

  Values are carried as they are, running variances too: here they are means
  over the batch, in PyTorch unbiased, which is one part in the images times
  pixels of a batch. PyTorch's counters of batches, which it needs to load and
  nothing reads at its usual momentum, are 0.

  Raises:
    ValueError: if it is not one of our ResNets.
  """
  tensors = {}
  for path, (name, leaf, axes) in _match(variables).items():
    tensors[name] = np.ascontiguousarray(np.asarray(leaf).transpose(axes))
    if path[-1] == 'mean':
      module = name.rpartition('.')[0]
      tensors[f'{module}.{_TRACKED}'] = np.zeros((), np.int64)
  return tensors


def from_state_dict(
  tensors: Mapping[str, np.ndarray], like: Variables
) -> Variables:
  """Returns variables in the structure of `like`, from a state dict.

  Raises:
    KeyError: if one is missing; what `like` does not have is left out.
    ValueError: if `like` is not one of our ResNets.
  """
  return traverse_util.unflatten_dict(
    {
      path: tensors[name].transpose(np.argsort(axes))
      for path, (name, _, axes) in _match(like).items()
    }
  )


def describe(like: Variables) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape of the state dict of `like`, without counters.

  Raises:
    ValueError: if it is not one of our ResNets.
  """
  return {
    name: tuple(leaf.shape[i] for i in axes)
    for name, leaf, axes in _match(like).values()
  }


def find_network(
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any] | None:
  """Returns the fields that make a state dict's network, None if none do."""
  blocks = {x.groups() for x in map(_BLOCK.match, shapes) if x}
  sizes = [sum(group == str(i) for group, _ in blocks) for i in range(1, 5)]
  name = resnet.find_name(sizes, 'layer1.0.conv3.weight' in shapes)
  stem = shapes.get('conv1.weight', ())
  if name is None or len(stem) != 4:
    return None
  return {'name': name, 'num_filters': stem[0], 'stem_kernel': stem[3]}


def is_counter(name: str) -> bool:
  """Returns whether `name` is one of PyTorch's counters of batches."""
  return name.rpartition('.')[2] == _TRACKED


def name_of(path: Sequence[str]) -> str:
  """Returns the name of a leaf of ours, ('params', 'stem_conv', 'kernel').

  Raises:
    ValueError: if it is not one of our ResNets.
  """
  collection, *modules, leaf = path
  try:
    return f'{_module_name(*modules)}.{_FIELDS[collection, leaf]}'
  except (KeyError, TypeError, ValueError):
    where = '/'.join(path)
    raise ValueError(f'{where} has no counterpart in a ResNet.') from None


def _module_name(outer: str, inner: str = '') -> str:
  if not inner:
    return _OUTER[outer]
  group, _, block = outer.removeprefix('block').partition('_')
  return f'layer{int(group)}.{int(block) - 1}.{_INNER[inner]}'


def _match(like: Variables) -> dict[Path, tuple[str, Any, tuple[int, ...]]]:
  """Returns the name of each leaf, the leaf and its axes in their order."""
  leaves, found = traverse_util.flatten_dict(like), {}
  for path, leaf in leaves.items():
    if len(leaf.shape) not in _AXES:
      raise ValueError(f'{"/".join(path)} has no counterpart in a ResNet.')
    found[path] = name_of(path), leaf, _AXES[len(leaf.shape)]
  return found

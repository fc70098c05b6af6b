"""What a stage starts from when `init_from` names a file of weights.

Only safetensors: a header in JSON and plain arrays, so that reading a file
from anywhere runs nothing.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors

from jaxprog import errors, files, paths, stages
from jaxprog.models import interchange

Variables = dict[str, Any]

# Of the 1000 WordNet ids of ILSVRC 2012, sorted, a newline between two: the
# order of the logits in all published weights.
_IMAGENET_1K = (
  '385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd'
)
# All become f32 exactly.
_DTYPES = ('F32', 'F16')


class _Pretrained(NamedTuple):
  """Weights of a file; `classes` is () where they are not known."""

  # As of a stage before; without 'head' where the file has none.
  variables: Variables
  classes: tuple[str, ...]
  # The first 16 hex digits of the file's SHA-256.
  digest: str


def load(
  stage: stages.Stage, like: Variables, classes: Sequence[str]
) -> _Pretrained:
  """Returns the weights in the file that `stage.init_from` names.

  Their classes are known if the file lists them, as those do that this program
  has exported. 1000 logits without a list are taken for ImageNet-1k's, if
  `classes`, those of the stage, are that. `like` gives the network's shapes;
  the head has the file's own where the classes differ.

  Raises:
    UserError: if it is missing or damaged, no safetensors, or of another
      network.
  """
  where = f'stage {stage.name!r}: init_from={stage.init_from}'
  path = paths.expand(stage.init_from, where)
  with _open(path, where) as file:
    names = file.keys()
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    known = _classes(file.metadata() or {}, shapes, classes)
    if known != tuple(classes):
      like = _with_head_of(like, shapes)
    try:
      expected = interchange.describe(like)
    except ValueError as e:
      raise errors.UserError(
        f'init_from is for our ResNets: {e}',
        where,
        'Leave it out with a network of your own.',
      ) from None
    _check_names(expected, shapes, where)
    tensors = {name: _read(file, name, where) for name in expected}
  return _Pretrained(
    interchange.from_state_dict(tensors, like), known, files.digest(path)[:16]
  )


def find_network(stage: stages.Stage) -> dict[str, Any]:
  """Returns what makes the network whose weights `distill_from` names.

  That is what `resnet.create_model` takes, as the tensors' shapes tell it, and
  whether it blurs, which a file of ours says.

  Raises:
    UserError: if it is missing or damaged, or none of our networks.
  """
  where = f'stage {stage.name!r}: distill_from={stage.distill_from}'
  with _open(paths.expand(stage.distill_from, where), where) as file:
    names = file.keys()
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    blurs = (file.metadata() or {}).get('blur_pool') == 'true'
  found = interchange.find_network(shapes)
  if found is None:
    raise errors.UserError(
      'The file holds none of our ResNets.',
      where,
      "It must hold one under torchvision's and timm's names.",
    )
  return {**found, 'blur_pool': blurs}


@contextlib.contextmanager
def _open(path: pathlib.Path, where: str) -> Iterator[Any]:
  if not os.path.isfile(path):  # It raises nothing, whatever the name.
    raise errors.UserError(
      'There is no such file of weights.', where, 'Is the path right?'
    )
  try:
    with open(path, 'rb') as start:
      begins = start.read(2)
    opened = safetensors.safe_open(path, 'numpy')
  except OSError as e:
    raise errors.UserError(
      f'The weights cannot be read: {e.strerror}.', where
    ) from None
  except safetensors.SafetensorError as e:
    message = ' '.join(str(e).split())
    pickled = begins == b'PK' or begins[:1] == b'\x80'
    raise errors.UserError(
      'The file is a pickle under another name; it was not read.'
      if pickled
      else f'The file is damaged, or no safetensors: {message}.',
      where,
      stages.HOW_TO_CONVERT if pickled else 'Fetch or export it again.',
    ) from None
  with opened as file:
    yield file


def _classes(
  metadata: Mapping[str, str],
  shapes: Mapping[str, tuple[int, ...]],
  classes: Sequence[str],
) -> tuple[str, ...]:
  """Returns the classes of a file's logits, () where nobody can know them."""
  rows = (*shapes.get(interchange.HEAD[0], ()), 0)[0]
  with contextlib.suppress(ValueError):
    listed = json.loads(metadata.get('classes', 'null'))
    if isinstance(listed, list):
      return tuple(listed) if len(listed) == rows else ()
  text = '\n'.join(classes)
  of_imagenet = hashlib.sha256(text.encode()).hexdigest() == _IMAGENET_1K
  return tuple(classes) if rows == 1000 and of_imagenet else ()


def _with_head_of(
  like: Variables, shapes: Mapping[str, tuple[int, ...]]
) -> Variables:
  """Returns `like` with the head that the file has, if it has one."""
  params = {k: v for k, v in like['params'].items() if k != 'head'}
  kernel, bias = (shapes.get(name, ())[::-1] for name in interchange.HEAD)
  if (len(kernel), len(bias)) == (2, 1):
    params['head'] = {
      'kernel': jax.ShapeDtypeStruct(kernel, np.float32),
      'bias': jax.ShapeDtypeStruct(bias, np.float32),
    }
  return {**like, 'params': params}


def _check_names(
  expected: Mapping[str, tuple[int, ...]],
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
) -> None:
  """Raises UserError unless all but counters fit."""
  _check_stem(expected, shapes, where)
  found = {name for name in shapes if not interchange.is_counter(name)}
  for names, what in (
    (sorted(set(expected) - found), 'lacks'),
    (sorted(found - set(expected)), 'has what the network has not:'),
  ):
    if names:
      more = f' and {len(names) - 3} more' if len(names) > 3 else ''
      raise errors.UserError(
        f'The file {what} {", ".join(names[:3])}{more}.',
        where,
        "It must hold config.model, under torchvision's and timm's names.",
      )
  for name, shape in expected.items():
    if shapes[name] != shape:
      raise errors.UserError(
        f'{name} is {list(shapes[name])} in the file and {list(shape)} here.',
        where,
        'config.model, num_filters and stem_kernel must be those of the file.',
      )


def _check_stem(
  expected: Mapping[str, tuple[int, ...]],
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
) -> None:
  stem = 'conv1.weight'
  ours, theirs = expected.get(stem), shapes.get(stem)
  if ours and theirs and len(theirs) == 4 and ours != theirs:
    filters, _, _, side = theirs
    raise errors.UserError(
      f"The file's first convolution has {filters} filters of {side}x{side}, "
      f"the config's {ours[0]} of {ours[3]}x{ours[3]}.",
      where,
      f'Set config.num_filters={filters} and config.stem_kernel={side}.',
    )


def _read(file: Any, name: str, where: str) -> np.ndarray:
  """Returns a tensor in f32."""
  dtype = file.get_slice(name).get_dtype()
  if dtype not in _DTYPES:
    raise errors.UserError(
      f'{name} is {dtype} in the file.',
      where,
      f'Convert the weights to one of {", ".join(_DTYPES)}.',
    )
  tensor = file.get_tensor(name).astype(np.float32)
  if not np.isfinite(tensor).all():
    raise errors.UserError(
      f'{name} is not finite in the file.', where, 'Fetch or export it again.'
    )
  return tensor

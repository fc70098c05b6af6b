"""What a stage starts from when `init_from` names a file of weights.

It lies here or on the Hugging Face hub. Only safetensors: a header in JSON and
plain arrays, so that reading a file from anywhere runs nothing.
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
from jaxprog.data import hub
from jaxprog.models import interchange
from jaxprog.monitoring import activity

Variables = dict[str, Any]

# Of the 1000 WordNet ids of ILSVRC 2012, sorted, a newline between two: the
# order of the logits in all published weights.
_IMAGENET_1K = (
  '385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd'
)
# All become f32 exactly.
_DTYPES = ('F32', 'F16')
# Fields that decide what a network computes and its weights' shapes do not
# show: by their names in the header of a file of ours.
_HEADER = {
  'model': 'model',
  'blur_pool': 'blur_pool',
  'mean': 'mean_rgb',
  'std': 'std_rgb',
}
# What timm's model_args may say: it has no effect on logits or shows in shapes.
_HARMLESS = (
  *('drop_block_rate', 'drop_path_rate', 'drop_rate', 'in_chans'),
  *('num_classes', 'zero_init_last'),
)


class Pretrained(NamedTuple):
  """Weights of a file; `classes` is () where they are not known."""

  # As of a stage before; without 'head' where the file has none.
  variables: Variables
  classes: tuple[str, ...]
  # The first 16 hex digits of the file's SHA-256.
  digest: str
  # What the hub says they may be used for, '' where it says nothing.
  licence: str = ''


def load(
  stage: stages.Stage,
  like: Variables,
  classes: Sequence[str],
  config: Mapping[str, Any],
) -> Pretrained:
  """Returns the weights in the file that `stage.init_from` names.

  Their classes are known if the file lists them, as those do that this program
  has exported. 1000 logits without a list are taken for ImageNet-1k's, if
  `classes`, those of the stage, are that. `like` gives the network's shapes;
  the head has the file's own where the classes differ. Where the file or its
  repository says more of the network, `config` must say the same where it has
  such a field.

  Raises:
    UserError: if it is missing or damaged, no safetensors, or of another
      network.
  """
  where = f'stage {stage.name!r}: init_from={stage.init_from}'
  fetched = _find(stage, where)
  path = fetched.path
  with _open(path, where) as file:
    known = _read_header(file.metadata() or {})
    _check_network({**known, **_read_timm(fetched.config)}, config, where)
    names = file.keys()
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    found = _classes(file.metadata() or {}, shapes, classes)
    if found != tuple(classes):
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
  return Pretrained(
    interchange.from_state_dict(tensors, like),
    found,
    files.digest(path)[:16],
    fetched.licence,
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


def _find(stage: stages.Stage, where: str) -> hub.File:
  """Returns the file that a stage names, from the hub if it lies there."""
  if stage.hub_file is None:
    return hub.File(paths.expand(stage.init_from, where), {}, '')
  with activity.doing(f'fetching {stage.hub_file.repo}'):
    fetched = hub.fetch_file(stage.hub_file, where)
  if stage.init_from.startswith('timm:') and not _read_timm(fetched.config):
    # Of some the names and shapes are a ResNet's, and the logits are not.
    repo = stage.hub_file.repo
    raise errors.UserError(
      f'Without config.json of {repo} nobody knows which network it is.',
      where,
      f'Where there is a network: hf download {repo} config.json',
    )
  return fetched


def _read_header(metadata: Mapping[str, str]) -> dict[str, Any]:
  """Returns the fields of a config that a file of ours says."""
  known = {}
  for name, field in _HEADER.items():
    with contextlib.suppress(KeyError, ValueError):
      text = metadata[name]
      known[field] = text if field == 'model' else json.loads(text)
  return known


def _read_timm(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a config that a config.json of timm's says."""
  if 'architecture' not in config:
    return {}
  model, arguments = config['architecture'], config.get('model_args') or {}
  of_images = config.get('pretrained_cfg') or config
  if not isinstance(arguments, dict) or not isinstance(of_images, dict):
    return {'model': f'{model} with a config.json that is not as timm has it'}
  plain = {k: arguments.get(k) for k in _HARMLESS} | {'global_pool': 'avg'}
  if changed := [k for k, v in arguments.items() if plain.get(k) != v]:
    model = f'{model} with other {", ".join(changed)}'
  known = {
    'model': model,
    'mean_rgb': of_images.get('mean'),
    'std_rgb': of_images.get('std'),
  }
  return {k: v for k, v in known.items() if v is not None}


def _check_network(
  known: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> None:
  """Raises UserError unless `config` has what is known of a file's network."""
  ours = {k: config[k] for k in known if k in config}
  ours |= {k: list(v) for k, v in ours.items() if isinstance(v, tuple)}
  wrong = [field for field, value in ours.items() if known[field] != value]
  if wrong:
    listed = (f'{x} {known[x]} (config: {ours[x]})' for x in wrong)
    raise errors.UserError(
      f'The weights are of a network with {", ".join(listed)}.',
      where,
      f'config.{" and config.".join(wrong)} must be those of the file.',
    )


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

"""Saved weights, with the stage and the network that they belong to."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, files, paths, stages
from jaxprog.monitoring import calibrated
from jaxprog.reliability import checkpoints
from jaxprog.reporting import rundir
from jaxprog.training import augment, devices, preflight, setup, xla_flags
from jaxprog.training import state as state_lib

_WEIGHTS = ('best', 'final', 'ema')
# Logits of variables and images.
Apply = Callable[[Any, Any], jax.Array]
_OF_PIXELS = ('mean_rgb', 'std_rgb')
# Of a stage, what another config may say: how its weights are used.
_OF_USE = (
  'batch_size',
  'eval_crop',
  'eval_flip',
  'eval_image_size',
  'eval_interpolation',
  'mixed_precision',
)


@dataclasses.dataclass(frozen=True)
class Trained:
  """Weights of a stage, how to use them, and what they were trained with.

  `config` says where the data is and how to compute; of `stage` it says what
  evaluation does. All else is the run's own, as its workdir tells it.
  """

  config: config_dict.ConfigDict
  stage: stages.Stage
  weights: str
  # params and batch_stats, in NumPy.
  variables: dict[str, Any]
  meta: checkpoints.Meta
  model_fn: setup.ModelFn
  # What done.json says of the stage; {} unless `export` has put it there.
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # What logits are divided by to become probabilities; 1: none was fitted.
  temperature: float = 1.0

  @functools.cached_property
  def run_config(self) -> config_dict.ConfigDict:
    """The config that the weights were trained with."""
    if 'config' not in self.meta:
      return self.config
    return config_lib.restore(self.meta['config'])

  @functools.cached_property
  def trained_stage(self) -> stages.Stage:
    """The stage as it was trained."""
    if 'config' not in self.meta:
      return self.stage
    return setup.find_stage(self.run_config, self.stage.name) or self.stage

  @property
  def classes(self) -> tuple[str, ...]:
    """WordNet ids or names, in the order of the logits."""
    return tuple(self.meta['classes'])

  @property
  def class_names(self) -> tuple[str, ...]:
    """The same for people, where they were known."""
    return tuple(self.meta.get('class_names') or self.classes)

  @property
  def epoch(self) -> int:
    """The epoch of the stage that the weights come from."""
    return int(self.meta['epoch']['epoch'])

  @functools.cached_property
  def calibrated_for(self) -> dict[str, Any]:
    """These weights and how they see images, which a temperature is for."""
    leaves = jax.tree.leaves(self.variables)
    return {
      'digest': files.digest_parts(*(np.asarray(x).tobytes() for x in leaves)),
      'image_size': self.stage.eval_size,
      'eval_crop': self.stage.eval_crop,
      'interpolation': self.stage.eval_interpolation,
    }

  def create_model(self, dtype: Any = None) -> nn.Module:
    """Returns the network that was trained, in the stage's own dtype."""
    return self.model_fn(
      num_classes=len(self.classes),
      image_size=self.stage.largest_size,
      dtype=dtype
      or devices.resolve_dtype(
        self.config.dtype, self.stage.mixed_precision, jax.default_backend()
      ),
    )

  def create_apply(self, dtype: Any = None) -> Apply:
    """Returns apply(variables, images) -> logits, pure.

    Images are uint8 RGB (N, S, S, 3), logits f32 (N, classes).
    """
    model = self.create_model(dtype)
    pixels = self.config.mean_rgb, self.config.std_rgb

    def apply(variables, images):
      images = augment.normalise(images, *pixels)
      return model.apply(variables, images, train=False)

    return apply


def load_trained(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  stage: str = '',
  weights: str = 'best',
  model: setup.ModelFn | None = None,
) -> Trained:
  """Returns saved weights of `stage`, else of the last one that is done.

  `weights` are the best, the final or the averaged ones (ema); `model` is what
  `train` was given in place of the config's own network. A temperature that was
  fitted to other weights, or for images of another size or crop, is left out.

  Raises:
    UserError: if there is no run, or none of these weights, or another config
      or network made them, or nothing can be written to `workdir`.
    DamagedError: if they are not what was saved.
  """
  workdir = pathlib.Path(workdir)
  rundir.check(workdir)
  if weights not in _WEIGHTS:
    raise errors.UserError(
      f'Unknown weights {weights!r}.', '--weights', 'Use best, final or ema.'
    )
  by_name = {x.name: x for x in stages.create_stages(config)}
  name = stage or _last_done_stage(list(by_name.values()), workdir)
  if name not in by_name:
    raise errors.UserError(
      f'This config has no stage {name!r}.',
      f'--stage={name}',
      errors.did_you_mean(name, by_name),
    )
  variables, meta = checkpoints.load_weights(workdir, name, weights)
  of_run = _read_config(workdir)
  trained = Trained(
    config=config,
    stage=by_name[name],
    weights=weights,
    variables=variables,
    meta={**of_run, **meta},
    model_fn=model or setup.create_model_fn(config),
  )
  _check_meta(trained, () if model else setup.NETWORK, of_run)
  used = {field: getattr(trained.stage, field) for field in _OF_USE}
  # Who taught it may be gone.
  stage_of_run = dataclasses.replace(
    trained.trained_stage, distill_from='', **used
  )
  trained = dataclasses.replace(trained, stage=stage_of_run)
  xla_flags.use(config.xla_flags)
  devices.keep_compiled(paths.cache_dir(config))
  devices.check_platform(config.platform)
  _check_shapes(trained)
  preflight.check_workdir(workdir)
  return _with_temperature(trained, workdir)


def _with_temperature(trained: Trained, workdir: pathlib.Path) -> Trained:
  """Returns `trained` with the temperature that was fitted to it, if any."""
  fitted = calibrated.read(workdir, trained.stage.name, trained.weights)
  if fitted and all(
    fitted.get(k) == v for k, v in trained.calibrated_for.items()
  ):
    return dataclasses.replace(trained, temperature=fitted['temperature'])
  return trained


def _read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the run's config for weights that were saved without theirs."""
  config = files.read_object(workdir / 'config.json')
  return {'config': config} if config else {}


def _last_done_stage(
  ladder: Sequence[stages.Stage], workdir: pathlib.Path
) -> str:
  """Returns the last stage of `ladder` that `workdir` has finished."""
  for stage in reversed(ladder):
    if checkpoints.read_done(workdir, stage.name) is not None:
      return stage.name
  raise errors.UserError(
    'No stage of this workdir is finished yet.',
    f'--workdir={workdir}',
    'Train first, or name another --workdir.',
  )


def _check_meta(
  trained: Trained, of_network: tuple[str, ...], of_run: dict[str, Any]
) -> None:
  """Raises UserError if the weights were trained with other values.

  Since then their stage may have gone on with another image_size: `of_run`,
  what `_read_config` returned, is no other config.
  """
  config, meta, stage = trained.config, trained.meta, trained.stage
  here = {
    **{field: config[field] for field in of_network},
    **{field: list(config[field]) for field in _OF_PIXELS},
  }
  ladder = of_run.get('config', {}).get('stages', ())
  of_stage = [x['image_size'] for x in ladder if x['name'] == stage.name]
  if stage.image_size not in of_stage:
    here['image_size'] = stage.image_size
  wrong = [
    f'{field} {meta[field]} (config: {value})'
    for field, value in here.items()
    if field in meta and meta[field] != value
  ]
  if wrong:
    suggestion = 'Leave --config out to use the one of --workdir.'
    if 'image_size' in here and meta.get('image_size') != stage.image_size:
      suggestion += ' Evaluation at another size is eval_image_size.'
    raise errors.UserError(
      f'The weights were trained with {", ".join(wrong)}.',
      f'stage {stage.name!r}, {trained.weights}',
      suggestion,
    )


def _check_shapes(trained: Trained) -> None:
  """Raises UserError if the weights are not of the network."""
  init = functools.partial(
    state_lib.init_variables, trained.create_model(), trained.stage.eval_size
  )
  expected = jax.eval_shape(init, jax.random.key(0))

  def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(x) for path, x in leaves}

  if shapes(trained.variables) != shapes(expected):
    raise errors.UserError(
      "The weights are not of the config's network.",
      f'stage {trained.stage.name!r}, {trained.weights}',
      'For weights of a network of your own, call jaxprog.evaluate or '
      'jaxprog.predict with model=..., as train was.',
    )

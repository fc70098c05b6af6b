"""What config, data and devices decide before there are any weights."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import config_dict

from jaxprog import epochs, errors, fields, paths
from jaxprog import stages as stages_lib
from jaxprog.data import balance, leaks, loader, preparation, records, workers
from jaxprog.data.records import Dataset
from jaxprog.models import resnet
from jaxprog.monitoring import activity
from jaxprog.optim import optimizers, schedules
from jaxprog.training import alike, devices, distillation, xla_flags
from jaxprog.training import numbers as numbers_lib
from jaxprog.training import state as state_lib
from jaxprog.training import steps as steps_lib
from jaxprog.training.transfer import pretrained

# Called with num_classes, image_size (of training: it may be evaluated at other
# sizes) and dtype; returns a Flax module whose classifier is named head.
ModelFn = Callable[..., nn.Module]


@dataclasses.dataclass(frozen=True)
class Setup:
  """What all stages of one call have in common."""

  config: config_dict.ConfigDict
  # Every stage of the config, and those that this call is about, in order.
  stages: tuple[stages_lib.Stage, ...]
  chosen: tuple[stages_lib.Stage, ...]
  datasets: Mapping[str, Dataset]
  steps: Mapping[str, epochs.Steps]
  model_fn: ModelFn
  shardings: devices.Shardings


class Program(NamedTuple):
  """Steps that differ in these are compiled one by one."""

  batch_size: int
  image_size: int
  # Values of _TRACED, which the compiled step is made for.
  options: tuple[float, ...]
  frozen: bool
  # Whether a teacher is asked.
  taught: bool


# What decides what the network computes, and its weights' shapes do not show.
NETWORK = ('model', 'num_filters', 'stem_kernel', 'blur_pool')
# What a phase may change in the compiled step, besides shapes.
_TRACED = fields.names(fields.STAGE, 'traced')


@dataclasses.dataclass(frozen=True)
class Task:
  """All that stays the same while one stage trains."""

  config: config_dict.ConfigDict
  stage: stages_lib.Stage
  steps: epochs.Steps
  dataset: Dataset
  model: nn.Module
  dtype: Any
  learning_rate_fn: optax.Schedule
  # The state as shapes, dtypes and shardings.
  state_shapes: state_lib.TrainState
  # What runs on the devices: init(rng) -> variables, init_head(rng) -> the
  # head's part of them, create_state(variables) -> state,
  # train_steps[program](state, batch, *arguments(program)) -> (state, metrics),
  # eval_step(variables, batch, sums) -> (sums, outcomes).
  init: Any
  init_head: Any
  create_state: Any
  train_steps: Mapping[Program, Any]
  eval_step: Any
  # What the programs compute with, on the devices.
  numbers: Mapping[Program, numbers_lib.Numbers]
  shardings: devices.Shardings
  # Decides the order of examples, fresh weights and augmentation.
  seed: int
  init_rng: jax.Array
  step_rng: jax.Array
  # Who teaches beside the labels, {} where nobody does: shapes, until the
  # stage begins.
  teacher: distillation.Teacher

  def arguments(self, program: Program) -> tuple[Any, ...]:
    """Returns what a training step takes besides state and batch."""
    told = self.step_rng, self.numbers[program]
    return (*told, self.teacher) if program.taught else told

  @property
  def num_workers(self) -> int:
    """Workers that read ahead: those asked for, else one a core."""
    return self.config.num_workers or len(os.sched_getaffinity(0))

  def program(self, step: int) -> Program:
    """Returns which of the compiled steps `step` of the stage is."""
    return self._programs[max(x for x in self._programs if x <= step)]

  @functools.cached_property
  def _programs(self) -> dict[int, Program]:
    return _list_programs(self.stage, self.steps)

  def read_batches(self, seed: int, start_step: int = 0) -> workers.Reader:
    """Returns this process's part of the training batches; close it."""
    return loader.train_batches(
      self.dataset.train,
      self.stage,
      seed=seed,
      steps=self.steps,
      start_step=start_step,
      num_workers=self.num_workers,
      worker_kind=self.config.worker_kind,
    )

  def batch_shapes(
    self, batch_size: int, image_size: int, *, training: bool
  ) -> steps_lib.Batch:
    """Returns a global batch as shapes, dtypes and shardings."""
    images = (batch_size, image_size, image_size, 3)
    shapes = {
      'image': jax.ShapeDtypeStruct(images, jnp.uint8),
      'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
      'mask': jax.ShapeDtypeStruct((batch_size,), jnp.bool_),
    }
    if training:
      shapes['index'] = shapes['epoch'] = shapes['label']
    return _place(shapes, self.shardings.batch)

  @property
  def eval_batch_size(self) -> int:
    """Images of a batch of evaluation, which all devices share."""
    num_devices = jax.device_count()
    return -(-self.stage.batch_size // num_devices) * num_devices

  def trace_train_step(self, program: Program) -> jax.stages.Traced:
    """Returns the trace of a training step."""
    batch = self.batch_shapes(
      program.batch_size, program.image_size, training=True
    )
    step = self.train_steps[program]
    return step.trace(self.state_shapes, batch, *self.arguments(program))

  def trace_eval_step(self) -> jax.stages.Traced:
    """Returns the trace of an evaluation step."""
    sums = jax.eval_shape(steps_lib.zero_eval_sums)
    return self.eval_step.trace(
      self.state_shapes.variables,
      self.batch_shapes(
        self.eval_batch_size, self.stage.eval_size, training=False
      ),
      _place(sums, self.shardings.replicated),
    )


def create_setup(
  config: config_dict.ConfigDict,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: ModelFn | None = None,
  holdout_rules: Mapping[str, int] | None = None,
) -> Setup:
  """Returns the chosen stages with their data, found and checked.

  Stages that have begun go on with their `holdout_rules`, by name.

  Raises:
    UserError: for any mistake in the config, the devices or the data.
  """
  all_stages = stages_lib.create_stages(config)
  chosen = stages_lib.select(all_stages, only, skip)
  if model is not None:
    check_own_network(config, chosen)
  xla_flags.use(config.xla_flags)
  devices.keep_compiled(paths.cache_dir(config))
  devices.check_platform(config.platform)
  stages_lib.check_devices(chosen, jax.device_count())
  stages_lib.check_batch_norm(config, jax.device_count())
  found = load_datasets(config, chosen)
  if config.exclude_leaks:
    found = _exclude_leaks(config, all_stages, found)
  rules = holdout_rules or {}
  datasets = {
    stage.name: _prepare(found[stage.name], stage, rules.get(stage.name))
    for stage in chosen
  }
  alike.check_alike(config, datasets)
  return assemble(config, all_stages, chosen, datasets, model)


def assemble(
  config: config_dict.ConfigDict,
  all_stages: tuple[stages_lib.Stage, ...],
  chosen: tuple[stages_lib.Stage, ...],
  datasets: Mapping[str, Dataset],
  model: ModelFn | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Setup:
  """Returns what is known of the stages, to train on all devices or `mesh`."""
  shardings = devices.create_shardings(mesh)
  return Setup(
    config=config,
    stages=all_stages,
    chosen=chosen,
    datasets=datasets,
    steps={
      stage.name: epochs.count_steps(stage, len(datasets[stage.name].train))
      for stage in chosen
    },
    model_fn=model or create_model_fn(config, shardings.batch.mesh.size),
    shardings=shardings,
  )


def find_stage(
  config: config_dict.ConfigDict, name: str
) -> stages_lib.Stage | None:
  """Returns the stage `name` of `config`, whatever the others are."""
  config = config_dict.ConfigDict(config)
  config.stages = [x for x in config.stages if x.name == name]
  return stages_lib.create_stages(config)[0] if config.stages else None


def load_datasets(
  config: config_dict.ConfigDict, chosen: Sequence[stages_lib.Stage]
) -> dict[str, Dataset]:
  """Returns the dataset of each stage, by the stage's name.

  All are looked for before the first is prepared: a dataset missing in the
  last stage is said at once, not hours later.
  """
  data_dir = paths.data_dir(config)
  found: dict[str, str] = {}
  for stage in chosen:
    if stage.dataset not in found:
      found[stage.dataset] = check_dataset(data_dir, stage)
  datasets = {}
  for stage in chosen:
    datasets[stage.name] = load_dataset(data_dir, stage, found[stage.dataset])
    found[stage.dataset] = 'prepared'
  return datasets


def check_dataset(
  data_dir: str | os.PathLike[str], stage: stages_lib.Stage
) -> str:
  """Returns 'prepared' or 'raw', as `preparation.check_dataset` does.

  Raises:
    UserError: naming the stage, if its dataset is missing or not in order.
  """
  try:
    return preparation.check_dataset(stage.dataset, data_dir)
  except errors.UserError as e:
    where = f'stage {stage.name!r}: {e.where}'
    raise errors.UserError(e.what, where, e.suggestion) from None


def load_dataset(
  data_dir: str | os.PathLike[str], stage: stages_lib.Stage, found: str = ''
) -> Dataset:
  """Returns the dataset of a stage; shows how far what takes long is.

  `found` is what `check_dataset` has returned, if it was asked already.
  """
  how = 'opening' if found == 'prepared' else 'preparing'
  with activity.doing(f'{how} {stage.dataset}') as show:
    return preparation.load_dataset(
      stage.dataset,
      data_dir,
      classes=stage.classes,
      num_classes=stage.num_classes,
      where=f'stage {stage.name!r}',
      progress=show,
      found=found,
    )


def _prepare(
  dataset: Dataset, stage: stages_lib.Stage, rule: int | None
) -> Dataset:
  """Returns `dataset` with the stage's hold-out, stored as it asks for.

  Raises:
    UserError: if a hold-out takes all or nothing, or there is no room.
  """
  dataset = take_holdout(dataset, stage, rule)
  what = f'storing {stage.dataset} as {stage.storage}'
  with activity.doing(what) as show:
    return preparation.store(dataset, stage.stored, progress=show)


def take_holdout(
  dataset: Dataset, stage: stages_lib.Stage, rule: int | None
) -> Dataset:
  """Returns `dataset` with the stage's hold-out, if it asks for one.

  `rule` is that by which the run has chosen it, None before it has.

  Raises:
    UserError: if a hold-out takes all or nothing.
  """
  if not stage.holdout_part:
    return dataset
  where, rule = f'stage {stage.name!r}', rule or records.HOLDOUT_RULE
  return records.take_holdout(dataset, stage.holdout_part, where, rule)


def _exclude_leaks(
  config: config_dict.ConfigDict,
  all_stages: Sequence[stages_lib.Stage],
  datasets: Mapping[str, Dataset],
) -> dict[str, Dataset]:
  """Returns `datasets` without images that any stage evaluates on.

  Stages that are not trained now count too, if their data is here.
  """
  known, absent = dict(datasets), {}
  for stage in all_stages:
    if stage.name in known:
      continue
    # What cannot be looked for is not absent: its bucket may be out of reach.
    preparation.is_here(stage.dataset, paths.data_dir(config))
    try:
      known |= load_datasets(config, [stage])
    except errors.UserError:
      absent[stage.name] = stage.dataset
  with activity.doing('looking for leaks') as show:
    found = leaks.find_overlap(known, absent=absent, progress=show)
  return {
    name: dataclasses.replace(
      dataset,
      train=dataset.train.select(~found.excluded[name]),
      excluded=found.counts[name],
    )
    for name, dataset in datasets.items()
  }


def create_task(
  setup: Setup,
  stage: stages_lib.Stage,
  learning_rate_fn: Callable[..., jax.Array] | None = None,
  among: np.ndarray | None = None,
) -> Task:
  """Returns the model, the optimizer and the steps of `stage`.

  `learning_rate_fn` takes the place of the stage's own schedule, and its second
  argument may be the schedule's numbers; evaluation chooses `among` classes,
  bool (classes,), or all.
  """
  dataset, steps = setup.datasets[stage.name], setup.steps[stage.name]
  (platform,) = {x.platform for x in setup.shardings.batch.mesh.devices.flat}
  dtype = devices.resolve_dtype(
    setup.config.dtype, stage.mixed_precision, platform
  )

  def create_model(image_size):
    return setup.model_fn(
      num_classes=len(dataset.classes), image_size=image_size, dtype=dtype
    )

  model = create_model(stage.image_size)
  learning_rate_fn = learning_rate_fn or schedules.create_learning_rate_fn(
    stage, steps
  )
  replicated = setup.shardings.replicated
  seed = zlib.crc32(f'{setup.config.seed}/{stage.name}'.encode())
  init_rng, step_rng = jax.random.split(jax.random.key(seed))
  init = functools.partial(state_lib.init_variables, model, stage.image_size)
  create_teacher, teacher = _find_teacher(setup, stage, create_model, dtype)
  create_state = _create_state_fn(
    stage, model, create_teacher, teacher, init_rng
  )
  state_shapes = jax.eval_shape(lambda rng: create_state(init(rng)), init_rng)
  jit = functools.partial(jax.jit, out_shardings=replicated)
  train_steps, eval_step = _create_steps(
    setup, stage, create_model, create_teacher, learning_rate_fn, among
  )
  return Task(
    config=setup.config,
    stage=stage,
    steps=steps,
    dataset=dataset,
    model=model,
    dtype=jnp.dtype(dtype),
    learning_rate_fn=learning_rate_fn,
    state_shapes=_place(state_shapes, replicated),
    init=jit(init),
    init_head=jit(lambda rng: init(rng)['params']['head']),
    create_state=jit(create_state),
    train_steps=train_steps,
    eval_step=eval_step,
    numbers=_read_numbers(
      setup, stage, model, state_shapes.params, train_steps
    ),
    shardings=setup.shardings,
    seed=seed,
    init_rng=_place_key(init_rng, replicated),
    step_rng=_place_key(step_rng, replicated),
    teacher=_place(teacher, replicated),
  )


def _find_teacher(
  setup: Setup,
  stage: stages_lib.Stage,
  create_model: Callable[[int], nn.Module],
  dtype: Any,
) -> tuple[Callable[[int], nn.Module], distillation.Teacher]:
  """Returns what makes a stage's teacher for an image size, and its shapes.

  `create_model` is the stage's own network: another stage's is the same, once
  its head has the classes of this one.

  Raises:
    UserError: if it is a file that is missing, or of none of our networks.
  """
  if not stage.distill_from:
    return create_model, {}
  num_classes = len(setup.datasets[stage.name].classes)
  if not stage.teacher_stage[0]:
    network = pretrained.find_network(stage)

    def create_model(image_size):
      return resnet.create_model(
        image_size=image_size, num_classes=num_classes, dtype=dtype, **network
      )

  size = stage.image_size
  init = functools.partial(state_lib.init_variables, create_model(size), size)
  variables = jax.eval_shape(init, jax.random.key(0))
  known = jax.ShapeDtypeStruct((num_classes,), jnp.bool_)
  return create_model, {'variables': variables, 'known': known}


def _create_state_fn(
  stage: stages_lib.Stage,
  model: nn.Module,
  create_teacher: Callable[[int], nn.Module],
  teacher: distillation.Teacher,
  rng: jax.Array,
) -> Callable[[Any], state_lib.TrainState]:
  """Returns create_state(variables), whose state may have a projection."""

  def create_projection(variables):
    if not stage.distill_from or not stage.distill_features:
      return {}
    return distillation.create_projection(
      (model, create_teacher(stage.image_size)),
      (variables, teacher['variables']),
      stage.image_size,
      jax.random.fold_in(rng, zlib.crc32(b'projection')),
    )

  return functools.partial(
    state_lib.create_state,
    tx=optimizers.create_optimizer(stage),
    ema=stage.ema_decay > 0,
    projection=create_projection,
  )


def _create_steps(
  setup: Setup,
  stage: stages_lib.Stage,
  create_model: Callable[[int], nn.Module],
  create_teacher: Callable[[int], nn.Module],
  learning_rate_fn: Callable[..., jax.Array],
  among: np.ndarray | None,
) -> tuple[dict[Program, Any], Any]:
  """Returns the training steps by program, and the evaluation step.

  A training step takes the old state's memory; without `donate_state` the old
  state stays beside the new one.
  """
  config, dataset = setup.config, setup.datasets[stage.name]
  steps, pixels = setup.steps[stage.name], (config.mean_rgb, config.std_rgb)
  replicated, divided = setup.shardings

  def jit(function, arguments=1, **options):
    return jax.jit(
      function,
      in_shardings=(replicated, divided, *[replicated] * arguments),
      out_shardings=replicated,
      compiler_options=compiler_options(config, steps),
      **options,
    )

  def create_train_step(program):
    part = _part(stage, program)
    teach = None
    if program.taught:
      teach = distillation.create_teach_fn(
        create_teacher(program.image_size), part, frozen=program.frozen
      )
    return steps_lib.create_train_step(
      create_model(program.image_size),
      learning_rate_fn,
      part,
      steps,
      pixels,
      num_classes=dataset.num_classes,
      frozen=program.frozen,
      teach=teach,
    )

  donated = 0 if config.donate_state else ()
  train_steps = {
    program: jit(
      create_train_step(program), 2 + program.taught, donate_argnums=donated
    )
    for program in _list_programs(stage, steps).values()
  }
  # With the stem that was trained, whatever size is evaluated.
  model = create_model(stage.largest_size)
  eval_step = steps_lib.create_eval_step(
    model, pixels, flip=stage.eval_flip, among=among
  )
  return train_steps, jit(eval_step)


def _read_numbers(
  setup: Setup,
  stage: stages_lib.Stage,
  model: nn.Module,
  params: Any,
  programs: Iterable[Program],
) -> dict[Program, numbers_lib.Numbers]:
  """Returns what the programs compute with, on all devices.

  All processes read it from one config, and none waits for another, as it would
  in device_put. Where they are only compiled for, numbers are shapes.
  """
  dataset, sharding = setup.datasets[stage.name], setup.shardings.replicated
  is_here = sharding.mesh.devices.flat[0] in jax.devices()

  def put(x):
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

  found = {}
  for program in programs:
    numbers = numbers_lib.read(
      _part(stage, program),
      setup.steps[stage.name],
      model,
      params,
      num_classes=dataset.num_classes,
      class_weights=_weigh_classes(dataset, stage),
    )
    found[program] = (
      jax.tree.map(put, numbers) if is_here else _place(numbers, sharding)
    )
  return found


def compiler_options(
  config: config_dict.ConfigDict, steps: epochs.Steps
) -> dict[str, bool | int]:
  """Returns how a stage's steps are compiled here, beside all flags."""
  platform = jax.devices()[0].client.platform_version
  return xla_flags.step_options(config.xla_flags, platform, steps.total)


def _weigh_classes(
  dataset: Dataset, stage: stages_lib.Stage
) -> np.ndarray | None:
  """Returns what an image of each class counts in the loss; None: all alike."""
  if not stage.class_weighting:
    return None
  counts = np.ones(dataset.num_classes, np.int64)
  if isinstance(dataset.train, records.Records):  # They may only be counted.
    labels = dataset.train.labels
    counts = np.bincount(labels, minlength=dataset.num_classes)
  return balance.class_weights(
    counts, stage.class_weighting, stage.balanced_sampling
  )


def compile_task(task: Task, *, carried: bool) -> Task:
  """Returns `task` with all that it runs compiled, from shapes alone.

  It may run in the background while another stage trains. A stage to which
  weights are `carried` draws at most a new head, which compiles in a fifth of
  the time.
  """
  init = 'init_head' if carried else 'init'
  variables = task.state_shapes.variables
  return dataclasses.replace(
    task,
    **{init: getattr(task, init).lower(task.init_rng).compile()},
    create_state=task.create_state.lower(variables).compile(),
    train_steps={
      program: task.trace_train_step(program).lower().compile()
      for program in task.train_steps
    },
    eval_step=task.trace_eval_step().lower().compile(),
  )


def _part(stage: stages_lib.Stage, program: Program) -> stages_lib.Stage:
  """Returns `stage` as `program` trains it."""
  options: dict[str, Any] = dict(zip(_TRACED, program.options, strict=True))
  return dataclasses.replace(stage, **options)


def _list_programs(
  stage: stages_lib.Stage, steps: epochs.Steps
) -> dict[int, Program]:
  """Returns first step -> the program from there on, in their order."""
  parts = {step: steps.part(stage, step) for step in steps.starts}
  return {
    step: Program(
      batch_size=steps.phase(step).batch_size,
      image_size=part.image_size,
      options=tuple(getattr(part, field) for field in _TRACED),
      frozen=step < steps.frozen,
      taught=step < steps.taught
      and distillation.is_taught(stage, frozen=step < steps.frozen),
    )
    for step, part in parts.items()
  }


def _place_key(key: jax.Array, sharding: jax.sharding.NamedSharding) -> Any:
  """Returns `key` on all devices; device_put takes no key past a process.

  Where they are only compiled for, it is a shape.
  """
  if sharding.mesh.devices.flat[0] not in jax.devices():
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding)
  data = jax.device_put(jax.random.key_data(key), sharding)
  return jax.random.wrap_key_data(data)


def _place(shapes: Any, sharding: jax.sharding.Sharding) -> Any:
  """Returns `shapes` with `sharding` on every leaf."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )


def create_model_fn(
  config: config_dict.ConfigDict, num_devices: int = 1
) -> ModelFn:
  """Returns what makes the config's own network.

  Its training batches are divided among `num_devices`, which only a batch_norm
  other than 'global' asks for; evaluation does not.
  """
  return functools.partial(
    resnet.create_model,
    config.model,
    num_filters=config.num_filters,
    stem_kernel=config.stem_kernel,
    blur_pool=config.blur_pool,
    norm_groups=stages_lib.count_norm_groups(config.batch_norm, num_devices),
    remat_blocks=config.remat == 'blocks',
  )


def check_own_network(
  config: config_dict.ConfigDict, chosen: Sequence[stages_lib.Stage]
) -> None:
  """Refuses what only the config's network does, for a user's own."""
  for field, default in (('batch_norm', 'global'), ('remat', 'none')):
    if config[field] != default:
      raise errors.UserError(
        f'{field} is for the networks of the config; yours came as model.',
        f'config.{field}',
        f'Do it in your module, and leave {field} at {default!r}.',
      )
  for stage in chosen:
    if any(part.drop_path for _, part in stage.parts):
      raise errors.UserError(
        'drop_path is for the networks of the config; yours came as model.',
        f'stage {stage.name!r}',
        'Do it in your module, and leave drop_path at 0.',
      )

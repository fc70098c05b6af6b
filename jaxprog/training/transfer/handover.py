"""What a stage starts from: fresh weights, or those of a stage before it."""

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprog import errors, stages
from jaxprog.data import loader
from jaxprog.reliability import checkpoints, peers
from jaxprog.training import augment
from jaxprog.training import setup as setup_lib
from jaxprog.training.transfer import carry, operators, pretrained

Variables = dict[str, Any]


class _Source(NamedTuple):
  """Weights to start from, and whose they are."""

  name: str
  variables: Variables
  classes: tuple[str, ...]
  # 'best', 'final' or 'ema', or the digest of a file.
  weights: str
  # Of weights from the hub, as it says.
  licence: str = ''


def hand_over(
  setup: setup_lib.Setup, workdir: pathlib.Path, task: setup_lib.Task
) -> tuple[Variables, dict[str, Any]]:
  """Returns a stage's first variables and a record of their origin.

  They come from the nearest earlier stage that is done, or from the file that
  `init_from` names, and go through the stage's operators: first the head is
  chosen, then what was carried is shrunk, then blocks are reset, then the
  statistics are made to fit.
  """
  stage = task.stage
  operator = operators.OPERATORS[stage.transfer]
  source = _load_source(setup, workdir, task)
  if source is None:
    fresh = task.init(task.init_rng)
    modules = sorted(fresh['params'])
    return fresh, {'from': None, 'carried': [], 'fresh': modules, 'dropped': []}
  fresh = _draw_fresh(task)
  result = carry.transfer(
    source.variables,
    fresh,
    source.classes,
    task.dataset.classes,
    keep_head=False if stage.transfer_head in ('fresh', 'zero') else None,
  )
  heads = _list_heads(setup, workdir, task, source)
  variables, head = _choose_head(task, result.variables, fresh, heads)
  params = variables['params']
  grads = _mean_gradient(task, variables) if operator.needs_gradient else {}
  changed = operator.change(stage, params, fresh['params'], grads)
  carried = [x for x in result.carried if x != 'head' or not head]
  params = {**params, **{name: changed[name] for name in carried}}
  variables, blocks = operators.reset_blocks(
    {**variables, 'params': params}, fresh, stage.reset_blocks
  )
  return _fit_statistics(task, variables), {
    'from': source.name,
    'weights': source.weights,
    'carried': [x for x in result.carried if x not in blocks],
    'fresh': sorted({*result.fresh, *blocks}),
    'dropped': list(result.dropped),
    **head,
    'operator': operator.title.format(stage),
    'statistics': stage.transfer_statistics,
    **({'licence': source.licence} if source.licence else {}),
  }


def trace_passes(
  task: setup_lib.Task,
) -> tuple[int, int, list[jax.stages.Traced]]:
  """Returns the passes over training images that a hand-over to `task` takes.

  That is how many images they see, and traces of one part of a batch with how
  often each runs. An operator may ask for gradients, fresh statistics for a
  forward pass: that it is begun with two starts is seen by the compiler, which
  runs it once.
  """
  stage, functions = task.stage, list[Callable[..., Any]]()
  if operators.OPERATORS[stage.transfer].needs_gradient:
    functions.append(functools.partial(_gradient, task))
  if stage.transfer_statistics == 'recalibrate' and stage.transfer != 'none':
    functions.append(lambda variables, x: _apply(task, variables, x)[1])
  parts, batches = _count_parts(stage), _count_batches(task)
  first = task.program(0)
  shapes = task.batch_shapes(
    first.batch_size // parts, first.image_size, training=True
  )
  variables = task.state_shapes.variables
  traces = [jax.jit(f).trace(variables, shapes) for f in functions]
  return len(functions) * batches * first.batch_size, batches * parts, traces


def needs_backbone(stage: stages.Stage) -> bool:
  """Returns whether a stage draws more fresh weights than a head."""
  needs_fresh = operators.OPERATORS[stage.transfer].needs_fresh
  return needs_fresh or stage.reset_blocks > 0


def _load_source(
  setup: setup_lib.Setup, workdir: pathlib.Path, task: setup_lib.Task
) -> _Source | None:
  """Returns the weights that `task` takes over, None if it starts afresh."""
  name = find_source(setup, workdir, task.stage)
  # A shared file system may show a new marker to one host before another.
  peers.compare(
    f'source/{task.stage.name}', {f'the start of {task.stage.name}': name or ''}
  )
  if name is None:
    return None
  if task.stage.init_from:
    found = _load_file(task)
    # Each host has fetched its own.
    peers.compare(
      f'weights/{task.stage.name}', {f'the weights of {name}': found.digest}
    )
    return _Source(
      name, found.variables, found.classes, found.digest, found.licence
    )
  weights = task.stage.transfer_weights
  variables, meta = checkpoints.load_weights(workdir, name, weights)
  return _Source(name, variables, tuple(meta['classes']), weights)


def find_source(
  setup: setup_lib.Setup, workdir: pathlib.Path, stage: stages.Stage
) -> str | None:
  """Returns the nearest earlier stage that is done, None if there is none.

  A stage with `init_from` has that file in its place.
  """
  if stage.transfer == 'none':
    return None
  if stage.init_from:
    return stage.init_from
  return next(iter(_find_sources(setup, workdir, stage)), None)


def _find_sources(
  setup: setup_lib.Setup, workdir: pathlib.Path, stage: stages.Stage
) -> list[str]:
  """Returns the earlier stages that are done, the nearest one first.

  Stages before it in this call come first (`--only` decides their order),
  then those of the config that an earlier call may have trained.
  """
  called = [s.name for s in setup.chosen]
  ladder = [s.name for s in setup.stages]
  before = called[: called.index(stage.name)]
  left_out = ladder[: ladder.index(stage.name)]
  return [
    name
    for name in dict.fromkeys([*before[::-1], *left_out[::-1]])
    if checkpoints.is_done(workdir, name)
  ]


def check(
  setup: setup_lib.Setup,
  task: setup_lib.Task,
  before: stages.Stage | None,
  workdir: pathlib.Path,
) -> None:
  """Raises UserError for what a stage could not start from.

  `before` is the stage before it in this call, None where it is the first.
  """
  for wrong, what, suggestion in _mistakes(setup, task, before, workdir):
    if wrong:
      raise errors.UserError(what, f'stage {task.stage.name!r}', suggestion)


def _mistakes(
  setup: setup_lib.Setup,
  task: setup_lib.Task,
  before: stages.Stage | None,
  workdir: pathlib.Path,
) -> Iterator[tuple[bool, str, str]]:
  """Yields (whether it is there, what is wrong, a suggestion)."""
  stage, head = task.stage, task.state_shapes.params['head']
  blocks = operators.list_blocks(task.state_shapes.params)
  yield (
    stage.reset_blocks > len(blocks),
    f'reset_blocks is {stage.reset_blocks}; the network has {len(blocks)} '
    'blocks.',
    '',
  )
  yield (
    stage.transfer_head == 'by_class' and set(head) != {'kernel', 'bias'},
    f'transfer_head is by_class, and the head holds {", ".join(head)}.',
    'It needs a dense layer: kernel and bias.',
  )
  starts_afresh = stage.transfer == 'none' or (
    before is None and find_source(setup, workdir, stage) is None
  )
  yield (
    starts_afresh and task.steps.frozen > 0,
    'freeze_epochs would train a head on a backbone of fresh weights.',
    'Set it to 0, train a stage before this one, or set init_from.',
  )
  if before and not starts_afresh and not stage.init_from:
    yield (
      stage.transfer_weights == 'ema' and not before.ema_decay,
      f"transfer_weights is 'ema', and {before.name!r} keeps no averages.",
      f'Set ema_decay of {before.name!r}, or take best or final.',
    )


def _load_file(task: setup_lib.Task) -> pretrained.Pretrained:
  """Returns the weights in the file that `init_from` names."""
  shapes, classes = task.state_shapes.variables, task.dataset.classes
  return pretrained.load(task.stage, shapes, classes, task.config)


def check_source(
  setup: setup_lib.Setup, task: setup_lib.Task, workdir: pathlib.Path
) -> None:
  """Raises UserError if the file of weights does not fit.

  Or if a head by class would find the row of no class.
  """
  stage = task.stage
  file = _load_file(task) if stage.init_from else None
  if stage.transfer_head != 'by_class' or stage.transfer == 'none':
    return
  called = [x.name for x in setup.chosen]
  known = {x: setup.datasets[x].classes for x in called}
  before = called[: called.index(stage.name)]
  for name in _find_sources(setup, workdir, stage):
    done = checkpoints.read_done(workdir, name) or {}
    known[name] = tuple(done.get('classes', ()))
    before.append(name)
  if file:
    before, known[stage.init_from] = [stage.init_from], file.classes
  taught = {*itertools.chain(*(known[name] for name in before))}
  if before and not taught & {*task.dataset.classes}:
    raise errors.UserError(
      f'transfer_head is by_class, and {", ".join(dict.fromkeys(before))} '
      'knew no class of this stage.',
      f'stage {stage.name!r}',
      "Set it to 'auto': the head starts afresh.",
    )


def _draw_fresh(task: setup_lib.Task) -> Variables:
  """Returns fresh weights; shapes of the backbone where only they matter."""
  if needs_backbone(task.stage):
    return task.init(task.init_rng)
  shapes = task.state_shapes.variables
  head = task.init_head(task.init_rng)
  return {**shapes, 'params': {**shapes['params'], 'head': head}}


def _choose_head(
  task: setup_lib.Task,
  variables: Variables,
  fresh: Variables,
  heads: Sequence[operators.Head],
) -> tuple[Variables, dict[str, Any]]:
  """Returns the variables with the head asked for, and what became of it."""
  rows: dict[str, list[str]] = {}
  new = fresh['params']['head']
  match task.stage.transfer_head:
    case 'zero':
      # Every class is as likely at first. The backbone has no gradient until
      # the head has taken its first step.
      new = jax.tree.map(jnp.zeros_like, new)
    case 'by_class':
      new, rows = operators.carry_head_rows(new, task.dataset.classes, heads)
    case _:
      return variables, {}
  return {**variables, 'params': {**variables['params'], 'head': new}}, {
    'head': task.stage.transfer_head,
    'head_rows': rows,
  }


def _list_heads(
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  task: setup_lib.Task,
  source: _Source,
) -> list[operators.Head]:
  """Returns what a head by class may take rows from, the nearest first.

  Rows fit the backbone that they were trained on: with a file of weights only
  its own head counts.
  """
  if task.stage.transfer_head != 'by_class':
    return []
  heads = []
  if head := source.variables['params'].get('head'):
    heads.append(operators.Head(source.name, source.classes, head))
  if task.stage.init_from:
    return heads
  for name in _find_sources(setup, workdir, task.stage)[1:]:
    variables, meta = checkpoints.load_weights(workdir, name, 'best')
    head = variables['params']['head']
    heads.append(operators.Head(name, meta['classes'], head))
  return heads


def _fit_statistics(task: setup_lib.Task, variables: Variables) -> Variables:
  match task.stage.transfer_statistics:
    case 'reset':
      shapes = task.state_shapes.batch_stats
      statistics = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(x.shape, path[-1].key == 'var', x.dtype),
        shapes,
      )
    case 'recalibrate':
      statistics = create_statistics_fn(task)(variables)
    case _:
      return variables
  return {**variables, 'batch_stats': statistics}


def _mean_gradient(task: setup_lib.Task, variables: Variables) -> Variables:
  """Returns the mean gradient over `transfer_batches` training batches.

  Each image that the loss may see counts once, whatever its batch hides.

  The reference takes a moving average over a whole pass instead, with 0.3 for
  the newest batch: some ten batches decide it.
  """
  grad = jax.jit(functools.partial(_gradient, task))
  total: Any = jax.tree.map(jnp.zeros_like, variables['params']), 0
  for batch in _batches(task):
    total = jax.tree.map(jnp.add, total, grad(variables, batch))
  grads, count = total
  return jax.tree.map(lambda x: x / jnp.maximum(count, 1), grads)


def _gradient(
  task: setup_lib.Task, variables: Variables, batch: dict[str, jax.Array]
) -> tuple[Variables, jax.Array]:
  """Returns the gradient of the summed loss on a training batch, and its count.

  The batch is not augmented; hidden images are in neither.
  """

  def loss(params):
    logits, _ = _apply(task, {**variables, 'params': params}, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    return jnp.sum(losses, where=batch['mask']), jnp.sum(batch['mask'])

  return jax.grad(loss, has_aux=True)(variables['params'])


def create_statistics_fn(task: setup_lib.Task) -> Callable[[Variables], Any]:
  """Returns f(variables) -> BatchNorm's statistics on `transfer_batches`.

  They are the stage's first training batches, whenever it is called.
  """

  @jax.jit
  def measure(variables, batch):
    zeros = jax.tree.map(jnp.zeros_like, variables['batch_stats'])
    # With two starts, the step that a running average takes can be told.
    _, after = _apply(task, {**variables, 'batch_stats': zeros}, batch)
    ones = jax.tree.map(jnp.ones_like, zeros)
    _, other = _apply(task, {**variables, 'batch_stats': ones}, batch)
    return jax.tree.map(
      lambda low, high: low / (1 - (high - low)), after, other
    )

  return lambda variables: operators.average_statistics(
    [measure(variables, x) for x in _batches(task)]
  )


def _apply(
  task: setup_lib.Task, variables: Variables, batch: dict[str, jax.Array]
) -> tuple[Any, Any]:
  """Returns f32 logits and statistics of a training batch, not augmented."""
  pixels = task.config.mean_rgb, task.config.std_rgb
  images = augment.normalise(batch['image'], *pixels)
  logits, changed = task.model.apply(
    variables, images, train=True, mutable=['batch_stats']
  )
  return logits, changed['batch_stats']


def _count_parts(stage: stages.Stage) -> int:
  return stage.batch_size // (stage.micro_batch_size or stage.batch_size)


def _count_batches(task: setup_lib.Task) -> int:
  return min(task.stage.transfer_batches, task.steps.phases[0].per_epoch)


def _batches(task: setup_lib.Task) -> Iterator[dict[str, jax.Array]]:
  """Yields the stage's first training batches on the devices, in parts.

  What fits in training only as micro-batches does so here.
  """
  reader = task.read_batches(task.seed)
  parts = _count_parts(task.stage)
  with contextlib.closing(reader):
    placed = loader.prefetch_to_device(reader, task.shardings.batch)
    for batch in itertools.islice(placed, _count_batches(task)):
      for part in range(parts):
        # Every device keeps what it has: each parts-th example.
        yield {name: x[part::parts] for name, x in batch.items()}

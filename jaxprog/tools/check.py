"""Shows what a config comes to, and what is in the way, before it is paid for.

A few steps of each stage are compiled and timed, on images of noise and from
weights of zeros; nothing is trained. What is compiled is kept for the run.
"""

import contextlib
import functools
import math
import os
import pathlib
import statistics
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.text
from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, files, formats, paths, stages
from jaxprog.data import loader, preparation
from jaxprog.monitoring import history as history_lib
from jaxprog.monitoring import progress as progress_lib
from jaxprog.planning import costs
from jaxprog.planning import here as plan_lib
from jaxprog.reliability import checkpoints
from jaxprog.reporting import plots
from jaxprog.training import described, preflight
from jaxprog.training import run as run_lib
from jaxprog.training import setup as setup_lib
from jaxprog.training import steps as steps_lib

# Raw datasets of at most so many images are prepared to show the plan: that
# takes seconds.
_FEW_IMAGES = 5_000
# Seconds of a step, as estimated, above which none is compiled or timed.
_LONGEST_STEP = 10.0
# Of a large matrix product's FLOPs a second, what a ResNet's step reaches.
_FLOPS_PART = 0.5
# Load of each core from which on times are said to be those of a busy machine.
_BUSY = 0.75
# By Finding.ok, where the terminal can show them and where it cannot; style.
_MARKS = {
  True: ('✓', '+', 'green'),
  None: ('!', '!', 'yellow'),
  False: ('✗', 'x', 'red'),
}


def check(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: setup_lib.ModelFn | None = None,
  allow_config_change: bool = False,
) -> int:
  """Returns 0 if nothing is in the way of training `config`, else 2.

  Prints what was looked at; then, where the data is prepared, the network,
  each stage's learning rate, what it costs and what the scorecard compares.
  Saves WORKDIR/plan.json and learning_rates.png where there is a `workdir`.
  """
  workdir = None if workdir is None else paths.workdir(workdir)
  console = rich.console.Console(markup=False)
  findings = preflight.inspect(
    config,
    workdir,
    only=only,
    skip=skip,
    model=model,
    allow_config_change=allow_config_change,
  )
  show(findings, console)
  if workdir:
    _show_differences(config, workdir, console)
  if any(x.ok is False for x in findings):
    console.print('The plan comes once that is mended.')
    return 2
  if not _is_ready(config, only, skip):
    console.print('The plan comes once the data is prepared.')
    return 0
  try:
    show_plan(config, workdir, only, skip, model, console)
  except errors.UserError as e:
    show([preflight.crossed(e)], console)
    return 2
  return 0


def show(
  findings: Iterable[preflight.Finding], console: rich.console.Console
) -> None:
  """Prints a line for each finding, what mends it below it, and a summary.

  Only a terminal's lines are broken, and no command's: it can be pasted.
  """
  findings = list(findings)
  plain = not _can_show('✓✗', console)
  for finding in findings:
    mark, ascii_mark, style = _MARKS[finding.ok]
    width = console.width if console.is_terminal else 10**6
    lines = textwrap.wrap(
      finding.what, width - 2, break_long_words=False, break_on_hyphens=False
    )
    text = rich.text.Text.assemble(
      (ascii_mark if plain else mark, style), ' ', '\n  '.join(lines)
    )
    if finding.fix:
      text.append(f'\n    {finding.fix}', style='bold')
    text.plain = _showable(text.plain, console)
    console.print(text, soft_wrap=True)
  console.print(f'\n{preflight.summary(findings)}', highlight=False)


def _can_show(text: str, console: rich.console.Console) -> bool:
  try:
    text.encode(console.encoding)
  except UnicodeEncodeError:
    return False
  return True


def _showable(text: str, console: rich.console.Console) -> str:
  """Returns `text` with ? for what the console cannot show."""
  return text.encode(console.encoding, 'replace').decode(console.encoding)


def _show_differences(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  console: rich.console.Console,
) -> None:
  """Prints in what the run of `workdir` began otherwise, if in anything."""
  try:
    saved = preflight.saved_configs(config, workdir)
  except errors.UserError:
    return  # A finding says so.
  table = config_lib.difference_table(*saved) if saved else None
  if table is not None and table.row_count:
    console.print(table)


def _is_ready(
  config: config_dict.ConfigDict, only: Sequence[str], skip: Sequence[str]
) -> bool:
  """Returns whether all data is prepared, or is in seconds."""
  chosen = stages.select(stages.create_stages(config), only, skip)
  data_dir = paths.data_dir(config)
  for dataset in {stage.dataset for stage in chosen}:
    if preparation.find_prepared(dataset, data_dir) is None:
      raw = preparation.list_raw(dataset, data_dir)
      if raw is None or raw.num_images > _FEW_IMAGES:
        return False
  return True


def show_plan(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None,
  only: Sequence[str],
  skip: Sequence[str],
  model: setup_lib.ModelFn | None,
  console: rich.console.Console,
) -> None:
  """Prints the network, the rates, the plan and what it will be held against.

  Saves them as WORKDIR/plan.json and WORKDIR/learning_rates.png.

  Raises:
    UserError: for any mistake in the config, the devices or the data.
  """
  cheap = _cheap(config, only, skip)
  run = pathlib.Path(workdir or os.devnull)
  if workdir and any(
    x.name == 'latest' and x.status == 'damaged'
    for x in checkpoints.check_workdir(run)
  ):
    # Training sets it aside first; below no folder no stage has begun.
    run = pathlib.Path(os.devnull)
  setup = setup_lib.create_setup(
    cheap,
    only=only,
    skip=skip,
    model=model,
    holdout_rules=history_lib.holdout_rules(run_lib.read_history(run)),
  )
  tasks = run_lib.create_tasks(setup, run)
  rates = {
    task.stage.name: described.sample_learning_rate(task) for task in tasks
  }
  if not console.is_terminal:  # To be searched with grep.
    with progress_lib.Progress(len(tasks), console=console) as progress:
      progress.start_run([described.describe(task) for task in tasks])
  layers = costs.summarise_layers(
    tasks[-1].model,
    tasks[-1].state_shapes.variables,
    tasks[-1].stage.image_size,
  )
  name = config.model if model is None else 'your network'
  _show_model(name, tasks[-1], layers, console)
  _show_rates(tasks, rates, console)
  busy = _describe_load() if config.check_steps else ''
  plans = [_measure_safely(task, config, console) for task in tasks]
  for plan in plans:
    plan.notes += _describe_shortcuts(config, cheap, plan)
  _show_costs(plans, config, console)
  if busy:
    _say(f'\n{busy}', console, 'yellow')
  if workdir and jax.process_index() == 0:
    path = pathlib.Path(workdir)
    epochs = {task.stage.name: task.stage.num_epochs for task in tasks}
    plots.plot_learning_rates(rates, epochs, path / 'learning_rates.png')
    files.write_json(path / 'plan.json', _figures(config, plans, layers))
    _say(f'\n{path / "plan.json"}\n{path / "learning_rates.png"}', console)


def _figures(
  config: config_dict.ConfigDict,
  plans: Sequence[plan_lib.StagePlan],
  layers: Sequence[costs.Layers],
) -> dict[str, Any]:
  """Returns all that is known beforehand, as plain values."""
  return {
    'model': config.model,
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'check_steps': config.check_steps,
    'stages': [plan.figures() for plan in plans],
    'layers': [x._asdict() for x in layers],
    'seconds': plan_lib.total_seconds(plans),
  }


def _say(text: str, console: rich.console.Console, style: str = '') -> None:
  """Prints a line as it is; only a terminal breaks it, between words."""
  shown = rich.text.Text(_showable(text, console), style)
  console.print(shown, soft_wrap=not console.is_terminal)


def _show_model(
  name: str,
  task: setup_lib.Task,
  layers: Sequence[costs.Layers],
  console: rich.console.Console,
) -> None:
  size = task.stage.image_size
  title = f'{name} at {size} px, as {task.stage.name} trains it'
  _say(f'\n{title} (FLOPs of one image, forward)', console, 'bold')
  console.print(plan_lib.model_table([x._asdict() for x in layers]))


def _show_rates(
  tasks: Sequence[setup_lib.Task],
  rates: Mapping[str, Sequence[float]],
  console: rich.console.Console,
) -> None:
  _say('\nlearning rates, first step to last', console, 'bold')
  width = max(len(name) for name in rates)
  for task in tasks:
    name = task.stage.name
    line = progress_lib.sparkline(rates[name], 40)
    if not _can_show(line, console):
      line = ' -> '.join(f'{rates[name][i]:.2g}' for i in (0, 100, -1))
    console.print(
      f'  {name:{width}}  {line}  {task.stage.schedule}',
      highlight=False,
    )


def _show_costs(
  plans: Sequence[plan_lib.StagePlan],
  config: config_dict.ConfigDict,
  console: rich.console.Console,
) -> None:
  """Prints the plan, what it leaves open, and the scorecard's ranges."""
  for table in plan_lib.plan_tables(plans, console.width):
    console.print()
    console.print(table)
  console.print()
  for note in plan_lib.notes(plans):
    _say(note, console)
  _say(_describe_measuring(config.check_steps), console, 'dim')
  seconds = plan_lib.total_seconds(plans)
  if seconds is not None:
    measured = all(plan.step_measured for plan in plans)
    about = 'about ' if measured else 'very roughly '
    took = formats.duration(seconds)
    _say(f'The ladder will take {about}{took}.', console, 'bold')
  _say(
    "\nwhat the scorecard will compare: the mission's range", console, 'bold'
  )
  console.print(plan_lib.expectation_table(plans))


def _describe_measuring(num_steps: int) -> str:
  """Returns what was counted and how the times came about."""
  counted = (
    'FLOPs: convolutions and matrix products of a training step, two for a '
    'multiplication with its addition.'
  )
  if not num_steps:
    return f'{counted} Nothing was compiled or timed: check_steps is 0.'
  together = (
    'added to it, because both need the same cores'
    if jax.default_backend() == 'cpu'
    else 'which may be the slower'
  )
  return (
    f'{counted} step: median of {num_steps} on images of noise, after one. '
    f'input: reading as many real ones with all cores, {together}. Memory: '
    'arguments, results and temporaries of the compiled step. ~: estimated, '
    'nothing ran.'
  )


def _describe_load() -> str:
  """Returns that others use the cores to be timed, '' if they are free."""
  load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
  if jax.default_backend() != 'cpu' or load < _BUSY * cores:
    return ''
  return (
    f'Other processes are busy (load {load:.1f} on {cores} cores): alone, the '
    'run is faster than this says.'
  )


def _plan_stage(task: setup_lib.Task) -> plan_lib.StagePlan:
  """Returns what is known of a stage without its costs."""
  stage, planned = task.stage, described.describe(task)
  evaluations = len(task.steps.epoch_ends) * (2 if stage.ema_decay else 1)
  plan = plan_lib.StagePlan(
    stage=stage,
    num_classes=planned.num_classes,
    num_train_images=planned.num_train_images,
    num_eval_images=len(task.dataset.selection),
    total_steps=planned.total_steps,
    num_evaluations=evaluations + 1,  # The best weights once more.
    final_learning_rate=planned.final_learning_rate,
    parameters=planned.parameters,
  )
  if stage.scale_learning_rate:
    plan.notes.append(
      f'learning rate {stage.learning_rate:g} x {stage.batch_size} / '
      f'{stage.base_batch_size} = {stage.peak_learning_rate:g}'
    )
  return plan


def _measure_safely(
  task: setup_lib.Task,
  config: config_dict.ConfigDict,
  console: rich.console.Console,
) -> plan_lib.StagePlan:
  """Returns a stage's plan, as far as it can be made.

  A step that does not compile or has no room is a note of its own stage, not
  the end of the other stages' plan.
  """
  plan = _plan_stage(task)
  doing = (
    f'{task.stage.name}: compiling and timing; check_steps=0 leaves it out'
  )
  try:
    with contextlib.ExitStack() as stack:
      if console.is_terminal and config.check_steps:
        stack.enter_context(console.status(doing))
      _measure(task, config.check_steps, plan)
  except errors.Stopped:
    raise
  except Exception as e:
    message = ' '.join(str(e).split())[:200]
    plan.notes.append(f'not measured: {type(e).__name__}: {message}')
  return plan


def _measure(
  task: setup_lib.Task, num_steps: int, plan: plan_lib.StagePlan
) -> None:
  """Fills in what a stage costs; each figure as soon as it is known."""
  counts = costs.count_steps(task)
  traces = {x: costs.trace_train_step(task, x) for x in counts}
  flops = {x: costs.count_flops(trace.jaxpr) for x, trace in traces.items()}
  images = sum(n * x.batch_size for x, n in counts.items())
  plan.flops_per_image = sum(n * flops[x] for x, n in counts.items()) / images
  if not num_steps:
    return
  plan.device_bytes = _device_bytes()
  if _is_too_much(task, traces, max(flops.values()), plan):
    return
  compiled, plan.compile_seconds = {}, 0.0
  for program, trace in traces.items():
    begin = time.perf_counter()
    compiled[program] = trace.lower().compile()
    plan.compile_seconds += time.perf_counter() - begin
  found = [costs.read_memory(step) for step in compiled.values()]
  plan.memory_bytes = max((x.total for x in found if x), default=None)
  plan.memory_compiled = plan.memory_bytes is not None
  if plan.fits is False:
    return
  seconds = sum(
    n * _time_train_step(task, x, compiled[x], num_steps)
    for x, n in counts.items()
  )
  plan.step_seconds = seconds / plan.total_steps
  plan.step_measured = True
  _measure_input(task, num_steps, plan)
  _measure_evaluation(task, num_steps, plan)


def _is_too_much(
  task: setup_lib.Task,
  traces: Mapping[setup_lib.Program, jax.stages.Traced],
  flops: float,
  plan: plan_lib.StagePlan,
) -> bool:
  """Returns whether a step would fill the memory or take too long to time.

  Then what is estimated stands in the plan, and the reason in its notes.
  """
  state = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(task.state_shapes)
  )
  together = max(costs.estimate_bytes(x.jaxpr) for x in traces.values())
  needed = state + (together - state) // jax.device_count()
  rate = _FLOPS_PART * jax.device_count() * _product_rate(task.dtype.name)
  if jax.default_backend() == 'cpu':  # Simulated devices share the cores.
    rate /= jax.local_device_count()
  a_step = flops / rate
  if plan.device_bytes and needed > plan.device_bytes:
    why = 'it would not fit'
  elif a_step > _LONGEST_STEP:
    why = f'one step would take about {formats.seconds(a_step)} here'
  else:
    return False
  plan.memory_bytes = needed
  mean = plan.flops_per_image or 0.0
  images = sum(n * x.batch_size for x, n in costs.count_steps(task).items())
  plan.step_seconds = mean * images / plan.total_steps / rate
  plan.notes.append(f'not timed: {why}')
  return True


@functools.cache
def _product_rate(dtype: str) -> float:
  """Returns FLOPs a second of a matrix product on one device."""
  side = 1024
  x = jnp.ones((side, side), dtype)
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  best = math.inf
  for _ in range(3):
    begin = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - begin)
  return 2 * side**3 / best


def _device_bytes() -> int | None:
  """Returns the memory that a device of this process has, None if unknown."""
  device = jax.local_devices()[0]
  with contextlib.suppress(RuntimeError, NotImplementedError):
    if limit := (device.memory_stats() or {}).get('bytes_limit'):
      return limit
  if device.platform != 'cpu':
    return None
  free = _free_memory()
  return free and free // jax.local_device_count()


def _free_memory() -> int | None:
  """Returns the bytes of RAM that are free, also under a container's limit."""
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().split('\n')
    (line,) = (x for x in lines if x.startswith('MemAvailable:'))
  except (OSError, ValueError):
    return None
  free = 1024 * int(line.split()[1])
  group = pathlib.Path('/sys/fs/cgroup')
  with contextlib.suppress(OSError, ValueError):  # 'max' is no limit.
    limit = int((group / 'memory.max').read_text())
    used = int((group / 'memory.current').read_text())
    free = min(free, max(limit - used, 0))
  return free


def _time_train_step(
  task: setup_lib.Task,
  program: setup_lib.Program,
  step: jax.stages.Compiled,
  num_steps: int,
) -> float:
  """Returns the median seconds of a step; the first one does not count."""
  batch = _random_batch(
    task.batch_shapes(program.batch_size, program.image_size, training=True)
  )
  state, seconds = _zeros(task.state_shapes), []
  for _ in range(num_steps + 1):
    begin = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch, task.step_rng))
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds[1:])


def _measure_input(
  task: setup_lib.Task, num_steps: int, plan: plan_lib.StagePlan
) -> None:
  """Fills in what reading a batch takes, and a step with its input."""
  batches = loader.train_batches(
    task.dataset.train,
    task.stage,
    seed=task.seed,
    steps=task.steps,
    num_workers=1,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with contextlib.closing(batches):
    next(batches)  # Files are opened for the first one.
    images, busy = batches.images, batches.busy
    for _ in range(min(num_steps, task.steps.total - 1)):
      next(batches)
    an_image = (batches.busy - busy) / max(batches.images - images, 1)
  images = task.stage.batch_size / jax.process_count()
  plan.input_seconds = an_image * images / task.num_workers
  plan.fed_step_seconds = _together(plan.step_seconds or 0, plan.input_seconds)


def _together(computing: float, reading: float) -> float:
  """Returns the seconds of both at once; on CPUs they share the cores."""
  if jax.default_backend() == 'cpu':
    return computing + reading
  return max(computing, reading)


def _measure_evaluation(
  task: setup_lib.Task, num_steps: int, plan: plan_lib.StagePlan
) -> None:
  """Fills in what one evaluation takes, its images read as in training."""
  num_devices = jax.device_count()
  size = -(-task.stage.batch_size // num_devices) * num_devices
  trace = costs.trace_eval_step(task, size)
  begin = time.perf_counter()
  step = trace.lower().compile()
  plan.compile_seconds = (
    (plan.compile_seconds or 0) + time.perf_counter() - begin
  )
  batch = _random_batch(
    task.batch_shapes(size, task.stage.eval_size, training=False)
  )
  variables = _zeros(task.state_shapes.variables)
  sums = jax.device_put(steps_lib.zero_eval_sums(), task.shardings.replicated)
  for i in range(2):
    if i == 1:
      begin = time.perf_counter()
    jax.block_until_ready(step(variables, batch, sums))
  a_batch = time.perf_counter() - begin
  batches = -(-plan.num_eval_images // size)
  reading = (plan.input_seconds or 0) * size / task.stage.batch_size
  plan.evaluation_seconds = batches * _together(a_batch, reading)


def _zeros(shapes: Any) -> Any:
  """Returns a pytree of zeros, each leaf where its sharding has it."""
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  create = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    out_shardings=shardings,
  )
  return create()


def _random_batch(shapes: Any) -> Any:
  """Returns a batch of noise, all of whose images count."""

  def create():
    image, label = shapes['image'], shapes['label']
    noise = jax.random.bits(jax.random.key(0), image.shape, image.dtype)
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    batch |= {'image': noise, 'mask': jnp.ones(label.shape, bool)}
    if 'index' in shapes:
      batch['index'] = jnp.arange(label.size, dtype=label.dtype)
    return batch

  shardings = {name: x.sharding for name, x in shapes.items()}
  return jax.jit(create, out_shardings=shardings)()


def _cheap(
  config: config_dict.ConfigDict, only: Sequence[str], skip: Sequence[str]
) -> config_dict.ConfigDict:
  """Returns `config` without what takes long before a run and not in a plan.

  Images are not stored anew but read as they are stored already, else as they
  came; leaks are left out only where they were looked for before.
  """
  config = stages.complete(config)
  chosen = stages.select(stages.create_stages(config), only, skip)
  data_dir = paths.data_dir(config)
  stored = {x.name for x in chosen if _is_stored(x, data_dir)}
  for stage in config.stages:
    if stage.name not in stored:
      stage.storage = 'original'
  if config.exclude_leaks:
    config.exclude_leaks = preflight.leaks_are_known(config)
  return config


def _is_stored(stage: stages.Stage, data_dir: pathlib.Path) -> bool:
  """Returns whether a stage's training images lie there as it reads them."""
  opened = preparation.open_prepared(stage.dataset, data_dir)
  return opened is not None and (
    preparation.find_pack(opened.train.records, stage.stored) is not None
  )


def _describe_shortcuts(
  config: config_dict.ConfigDict,
  cheap: config_dict.ConfigDict,
  plan: plan_lib.StagePlan,
) -> list[str]:
  """Returns in what a stage is planned otherwise than it will be trained."""
  notes = []
  name, storage = plan.stage.name, plan.stage.storage
  asked = next(x for x in stages.create_stages(config) if x.name == name)
  if asked.storage != storage and plan.input_seconds is not None:
    notes.append(
      f'input timed on originals; training reads {asked.storage}, which is '
      'not stored yet'
    )
  if config.exclude_leaks and not cheap.exclude_leaks:
    notes.append(
      'leaks were not looked for yet: training images that a stage is '
      'evaluated on are counted here and will be left out'
    )
  return notes

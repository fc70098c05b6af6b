"""Measures on this machine what a stage will need and take.

A few steps are compiled and timed, on images of noise and from weights of
zeros; nothing is trained. What is compiled is kept for the run.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxprog import errors, formats
from jaxprog.data import loader
from jaxprog.planning import absent, costs, outlook
from jaxprog.training import devices, preflight
from jaxprog.training import setup as setup_lib
from jaxprog.training import steps as steps_lib

# Seconds of a step, as estimated, above which none is compiled or timed.
_LONGEST_STEP = 10.0
# Of a large matrix product's FLOPs a second, what a ResNet's step reaches.
_FLOPS_PART = 0.5


def measure(task: setup_lib.Task, num_steps: int) -> outlook.Outlook:
  """Returns what a stage will need and take, as far as it can be told.

  A step that does not compile or has no room is a note of its own stage, not
  the end of the look at others. Without `num_steps` nothing is compiled.
  """
  found, stage = outlook.look_ahead(task), task.stage
  found.notes += absent.describe(task)
  if stage.scale_learning_rate:
    found.notes.append(
      f'learning rate {stage.learning_rate:g} x {stage.batch_size} / '
      f'{stage.base_batch_size} = {stage.peak_learning_rate:g}'
    )
  try:
    _measure(task, num_steps, found)
  except errors.Stopped:
    raise
  except Exception as e:
    message = ' '.join(str(e).split())[:200]
    found.notes.append(f'not measured: {type(e).__name__}: {message}')
  return found


def _measure(
  task: setup_lib.Task, num_steps: int, found: outlook.Outlook
) -> None:
  """Fills in what a stage costs; each figure as soon as it is known."""
  counts = costs.steps_by_program(task)
  traces = {x: task.trace_train_step(x) for x in counts}
  flops = {x: costs.count_flops(trace.jaxpr) for x, trace in traces.items()}
  all_flops = sum(n * flops[x] for x, n in counts.items())
  images = sum(n * x.batch_size for x, n in counts.items())
  found.flops_per_image = all_flops / images
  if not num_steps:
    return
  found.device_bytes = _device_bytes()
  needed = max(_estimate_bytes(task, trace) for trace in traces.values())
  rate = _flops_rate(task)
  longest = max(flops.values()) / rate
  why = ''
  if found.device_bytes and needed > found.device_bytes:
    why = 'it would not fit'
  elif longest > _LONGEST_STEP:
    why = f'one step would take about {formats.seconds(longest)} here'
  if why:
    found.memory_bytes = needed
    found.step_seconds = all_flops / task.steps.total / rate
    found.notes.append(f'not timed: {why}')
    return
  compiled, found.compile_seconds = {}, 0.0
  for program, trace in traces.items():
    compiled[program] = _compile(trace, found)
  memory = [costs.read_memory(step) for step in compiled.values()]
  found.memory_bytes = max((x.total for x in memory if x), default=None)
  found.memory_compiled = found.memory_bytes is not None
  if found.fits is False:
    return
  seconds = sum(
    n * _time_train_step(task, x, compiled[x], num_steps)
    for x, n in counts.items()
  )
  found.step_seconds = seconds / task.steps.total
  found.step_measured = True
  if absent.is_read(task):
    found.input_seconds = _time_input(task, num_steps)
    found.fed_step_seconds = _together(found.step_seconds, found.input_seconds)
  found.evaluation_seconds = _time_evaluation(task, found)


def _compile(
  trace: jax.stages.Traced, found: outlook.Outlook
) -> jax.stages.Compiled:
  """Returns a step compiled, and adds what that took to `found`."""
  begin = time.perf_counter()
  step = trace.lower().compile()
  took = time.perf_counter() - begin
  found.compile_seconds = (found.compile_seconds or 0.0) + took
  return step


def _estimate_bytes(task: setup_lib.Task, trace: jax.stages.Traced) -> int:
  """Returns about what a step needs on each device, its state included."""
  state = preflight.count_bytes((task.state_shapes, task.teacher))
  together = costs.estimate_bytes(trace.jaxpr)
  return state + (together - state) // jax.device_count()


def _flops_rate(task: setup_lib.Task) -> float:
  """Returns about the FLOPs a second of a step on all devices."""
  rate = _FLOPS_PART * jax.device_count() * _product_rate(task.dtype.name)
  if jax.default_backend() == 'cpu':  # Simulated devices share the cores.
    rate /= jax.local_device_count()
  return rate


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
  if limit := devices.memory_bytes(device):
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
  task = dataclasses.replace(task, teacher=_zeros(task.teacher))
  for _ in range(num_steps + 1):
    begin = time.perf_counter()
    state, _ = jax.block_until_ready(
      step(state, batch, *task.arguments(program))
    )
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds[1:])


def _time_input(task: setup_lib.Task, num_steps: int) -> float:
  """Returns the seconds of reading this process' part of a batch."""
  batches = loader.train_batches(
    task.dataset.train,
    task.stage,
    seed=task.seed,
    steps=task.steps,
    num_workers=1,
  )
  with contextlib.closing(batches):
    next(batches)  # Files are opened for the first one.
    images, busy = batches.images, batches.busy
    for _ in range(min(num_steps, task.steps.total - 1)):
      next(batches)
    an_image = (batches.busy - busy) / max(batches.images - images, 1)
  images = task.stage.batch_size / jax.process_count()
  return an_image * images / task.num_workers


def _together(computing: float, reading: float) -> float:
  """Returns the seconds of both at once; on CPUs they share the cores."""
  if jax.default_backend() == 'cpu':
    return computing + reading
  return max(computing, reading)


def _time_evaluation(task: setup_lib.Task, found: outlook.Outlook) -> float:
  """Returns the seconds of one, its images read as in training."""
  size = task.eval_batch_size
  step = _compile(task.trace_eval_step(), found)
  batch = _random_batch(
    task.batch_shapes(size, task.stage.eval_size, training=False)
  )
  variables = _zeros(task.state_shapes.variables)
  sums = jax.device_put(steps_lib.zero_eval_sums(), task.shardings.replicated)
  jax.block_until_ready(step(variables, batch, sums))
  begin = time.perf_counter()
  jax.block_until_ready(step(variables, batch, sums))
  a_batch = time.perf_counter() - begin
  reading = (found.input_seconds or 0.0) * size / task.stage.batch_size
  return -(-found.num_eval_images // size) * _together(a_batch, reading)


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

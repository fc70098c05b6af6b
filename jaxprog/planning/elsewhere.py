"""What a ladder will take on hardware that nobody has yet.

Each stage's own training step is compiled for the chips asked for; what the
compiler says of it and what the chips' makers say of them give memory, time
and cost. Nothing runs. What was compiled once is answered from a cache.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_dict

from jaxprog import files, named, paths
from jaxprog import stages as stages_lib
from jaxprog.data import preparation, records
from jaxprog.monitoring import activity
from jaxprog.planning import absent, chips, costs, outlook
from jaxprog.training import devices, xla_flags
from jaxprog.training import setup as setup_lib

# Images a second that one core makes ready at 224 px, by the kind of storage:
# medians of benchmarks/input.py on an AMD EPYC (docs/data.md). Raw images
# cost by their pixels, and the least time that any image takes.
_IMAGES_PER_CORE = {'original': 540.0, 'jpeg': 1407.0, 'raw': 4317.0}
_MOST_IMAGES_PER_CORE = 18_500.0
_MEASURED_SIZE = 224
# What a bicubic crop of that size takes longer, in seconds: 0.65 of all that an
# image takes as it came. And the part of the crops that are resized so.
_BICUBIC_SECONDS = 0.65 / _IMAGES_PER_CORE['original']
_BICUBIC_PARTS = {'bilinear': 0.0, 'random': 0.5, 'bicubic': 1.0}


@dataclasses.dataclass(frozen=True)
class Step:
  """One compiled step of a stage, as one chip takes it.

  Bytes and FLOPs are those of the compiled program; seconds are those that
  the chip's published rates allow, with nothing lost.
  """

  batch_size: int
  image_size: int
  steps: int
  # Convolutions and matrix products of the whole batch over all chips.
  flops: float
  # Of its memory: read and written; all that is needed, and what of it grows
  # with the batch.
  traffic_bytes: float
  memory_bytes: int
  activation_bytes: int
  collectives: int
  collective_bytes: int
  compute_seconds: float
  memory_seconds: float
  # What kernels take to begin and to end, however little they do.
  kernel_seconds: float
  network_seconds: float
  compile_seconds: float

  def seconds(self, utilization: float) -> float:
    """Returns what a step takes at a part of the chip's own rates.

    What kernels and the network take is added: nothing says that it hides.
    """
    own = max(self.compute_seconds, self.memory_seconds) / utilization
    return own + self.kernel_seconds + self.network_seconds


def fill_in(
  found: outlook.Outlook,
  steps: Sequence[Step],
  topology: chips.Topology,
  config: config_dict.ConfigDict,
) -> None:
  """Lets compiled steps say what a stage needs and takes on `topology`."""
  stage, num_chips = found.stage, topology.num_chips
  num_images = sum(x.steps * x.batch_size for x in steps)
  utilization = (
    config.plan_utilization or chips.UTILIZATION[topology.chip.platform]
  )

  def mean(value: Callable[[Step], float]) -> float:
    """Returns the mean over all images, each as often as it is seen."""
    return sum(x.steps * value(x) for x in steps) / num_images

  # Images a second of one chip, were its input always there; and of its input.
  chip_rate = 1 / mean(lambda x: x.seconds(utilization)) / num_chips
  images_per_core = config.images_per_core or _images_per_core(stage)
  input_rate = images_per_core * topology.cores_per_chip
  rate = min(chip_rate, input_rate)
  largest = max(steps, key=lambda x: x.memory_bytes)
  a_step = num_images / found.known.total_steps / num_chips
  found.flops_per_image = mean(lambda x: x.flops)
  found.memory_bytes, found.memory_compiled = largest.memory_bytes, True
  found.device_bytes = topology.chip.usable_bytes
  found.compile_seconds = sum(x.compile_seconds for x in steps)
  found.step_seconds = a_step / chip_rate
  found.input_seconds = a_step / input_rate
  found.fed_step_seconds = a_step / rate
  # An evaluated image is a third of the work, and so is its mirror image.
  looks = found.num_eval_images * (1 + stage.eval_flip)
  found.evaluation_seconds = looks / 3 / rate / num_chips
  if waits := input_rate < chip_rate:
    cores = topology.cores_per_chip
    found.notes.append(_describe_wait(chip_rate, cores, input_rate, stage))
  hours = (found.seconds or 0.0) / 3600
  price = config.chip_hour_price
  found.chips = {
    'storage': stage.storage,
    'num_chips': num_chips,
    'chip_bytes': topology.chip.usable_bytes,
    'utilization': utilization,
    'images_per_core': images_per_core,
    'cores_per_chip': topology.cores_per_chip,
    'chip_hour_price': price,
    'steps': [dataclasses.asdict(x) for x in steps],
    'largest_batch': _largest_batch(largest, topology),
    'num_steps': found.known.total_steps,
    'num_images': num_images,
    'traffic_per_image': mean(lambda x: x.traffic_bytes) * num_chips,
    'images_per_second': rate,
    'bound_by': 'input' if waits else _find_bound(mean, utilization),
    'cores_needed': chip_rate / images_per_core,
    'hours': hours,
    'cost': hours * num_chips * price if price else None,
  }


def _describe_wait(
  chip_rate: float, cores: float, input_rate: float, stage: stages_lib.Stage
) -> str:
  return (
    f'waits for its input: a chip could take {chip_rate:,.0f} images/s and '
    f'its {cores:g} cores make {input_rate:,.0f}, stored as {stage.storage}. '
    "Set storage to 'raw:256' or 'jpeg:256', or image_size lower."
  )


def _find_bound(
  mean: Callable[[Callable[[Step], float]], float], utilization: float
) -> str:
  """Returns what takes most of a stage's steps."""
  parts = {
    'compute': mean(lambda x: x.compute_seconds) / utilization,
    'memory': mean(lambda x: x.memory_seconds) / utilization,
    'kernels': mean(lambda x: x.kernel_seconds),
    'network': mean(lambda x: x.network_seconds),
  }
  return max(parts, key=lambda name: parts[name])


def _largest_batch(step: Step, topology: chips.Topology) -> int:
  """Returns about the largest global batch that fits: even on each chip.

  What grows with the batch is taken to grow in proportion to it.
  """
  fixed = step.memory_bytes - step.activation_bytes
  a_chip = step.batch_size / topology.num_chips
  room = (topology.chip.usable_bytes - fixed) * a_chip
  most = int(room / max(step.activation_bytes, 1))
  return max(most // 2 * 2, 0) * topology.num_chips


class _Compiled(NamedTuple):
  """What the compiler says of one step; as in `Step`, of one micro-batch."""

  traffic_bytes: float
  memory_bytes: int
  activation_bytes: int
  kernels: int
  collectives: int
  collective_bytes: int
  seconds: float


@contextlib.contextmanager
def _without_jaxs_cache() -> Iterator[None]:
  """Keeps JAX from storing programs that only other hardware can load."""
  kept = jax.config.values['jax_enable_compilation_cache']
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # It asks the config once.
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', kept)
    compilation_cache.reset_cache()


def create_setup(
  config: config_dict.ConfigDict,
  topology: chips.Topology,
  only: Sequence[str],
  skip: Sequence[str],
) -> setup_lib.Setup:
  """Returns the chosen stages as they will train on `topology`.

  Raises:
    UserError: as `plan`.
  """
  all_stages = stages_lib.create_stages(config)
  chosen = stages_lib.select(all_stages, only, skip)
  stages_lib.check_devices(chosen, topology.num_chips)
  stages_lib.check_batch_norm(config, topology.num_chips)
  datasets = {stage.name: _count_dataset(config, stage) for stage in chosen}
  mesh = chips.create_mesh(topology)
  return setup_lib.assemble(config, all_stages, chosen, datasets, mesh=mesh)


def _count_dataset(
  config: config_dict.ConfigDict, stage: stages_lib.Stage
) -> records.Dataset:
  """Returns the stage's dataset, or what is published of it."""
  data_dir = paths.data_dir(config)
  known = named.find(stage.dataset).published
  if known is None or preparation.find_prepared(stage.dataset, data_dir):
    found = setup_lib.load_datasets(config, [stage])[stage.name]
    if stage.holdout_part:
      found = records.take_holdout(
        found, stage.holdout_part, f'stage {stage.name!r}'
      )
    return found
  return absent.count_dataset(stage, known)


_Key = tuple[str, setup_lib.Program]


def look_ahead(
  setup: setup_lib.Setup, topology: chips.Topology, say: Callable[[str], None]
) -> list[outlook.Outlook]:
  """Returns what each chosen stage needs and takes on `topology`.

  `say` is told what is compiled.
  """
  with activity.doing('building the networks'):
    tasks = [setup_lib.create_task(setup, stage) for stage in setup.chosen]
  with _without_jaxs_cache():
    compiled = _compile_all(tasks, topology, say)
  return [_describe(task, topology, compiled) for task in tasks]


def _compile_all(
  tasks: Sequence[setup_lib.Task],
  topology: chips.Topology,
  say: Callable[[str], None],
) -> dict[_Key, tuple[float, _Compiled]]:
  """Returns the FLOPs and the compiled figures of each stage's programs.

  Those not in the cache are compiled side by side, one for each core: a
  compiler uses one.
  """
  directory = paths.cache_dir(tasks[0].config)
  if directory:
    directory /= 'plans'
    devices.create_cache(directory)
  found: dict[_Key, tuple[float, _Compiled]] = {}
  with (
    futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    activity.doing(f'compiling for {topology.name}') as show,
  ):
    waiting = {}
    for task in tasks:
      for program in task.train_steps:
        trace = task.trace_train_step(program)
        flops = costs.count_flops(trace.jaxpr)
        lowered = trace.lower()
        options = compiler_options(task.config.xla_flags, topology)
        digest = _digest(lowered, topology, options)
        path = directory and directory / f'{digest}.json'
        key = task.stage.name, program
        if path and (saved := _read(path)):
          found[key] = flops, saved
          continue
        compiling = pool.submit(_compile, lowered, options, path)
        waiting[compiling] = key, flops
    if waiting:
      say(
        f'Compiling {len(waiting)} training steps for {topology.name}: some '
        'minutes each for a large network; kept for the next time.'
      )
    for done, compiling in enumerate(futures.as_completed(waiting), 1):
      show(done, len(waiting))
      key, flops = waiting[compiling]
      found[key] = flops, compiling.result()
      say(f'{key[0]}: compiled in {found[key][1].seconds:.0f} s')
  return found


def compiler_options(
  preset: str, topology: chips.Topology
) -> dict[str, bool | int]:
  """Returns how to compile for chips that are not here, with a set of flags."""
  if topology.chip.platform == 'tpu':
    return xla_flags.compiler_options(preset, 'tpu')
  # Kernels are chosen by rule: trying them out would take the GPU.
  options = xla_flags.compiler_options(preset, 'gpu')
  options['xla_gpu_autotune_level'] = 0
  if options.get('xla_gpu_deterministic_ops'):
    # Triton's have no rule here.
    options['xla_gpu_enable_triton_gemm'] = False
  return options


def _compile(
  lowered: Any, options: dict[str, bool | int], path: pathlib.Path | None
) -> _Compiled:
  begin = time.perf_counter()
  program = lowered.compile(compiler_options=options)
  memory = costs.read_memory(program)
  if memory is None:
    raise RuntimeError('the compiler says nothing of the memory it needs')
  text = program.as_text()
  exchanges = costs.read_collectives(text)
  compiled = _Compiled(
    traffic_bytes=costs.read_traffic(program),
    memory_bytes=memory.total,
    activation_bytes=memory.temporaries,
    kernels=len(costs.read_operations(text)),
    collectives=len(exchanges),
    collective_bytes=sum(exchanges),
    seconds=time.perf_counter() - begin,
  )
  if path:
    files.write_json(path, compiled._asdict())
  return compiled


def _digest(
  lowered: Any, topology: chips.Topology, options: Mapping[str, Any]
) -> str:
  """Returns what stands for a program, its target and who compiles it."""
  flags = os.environ.get('XLA_FLAGS', ''), str(sorted(options.items()))
  parts = [topology.name, *flags, lowered.as_text()]
  for package in ('jax', 'jaxlib', 'libtpu', 'jax-cuda13-pjrt'):
    try:
      parts.append(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
      parts.append('')
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()


def _read(path: pathlib.Path) -> _Compiled | None:
  """Returns what was compiled before, None if it was not, or is damaged."""
  try:
    return _Compiled(**json.loads(path.read_bytes()))
  except (OSError, ValueError, TypeError):
    return None


def _describe(
  task: setup_lib.Task,
  topology: chips.Topology,
  compiled: Mapping[_Key, tuple[float, _Compiled]],
) -> outlook.Outlook:
  stage = task.stage
  steps = [
    _count_step(task, topology, program, count, *compiled[stage.name, program])
    for program, count in costs.steps_by_program(task).items()
    if count
  ]
  found = outlook.look_ahead(task)
  fill_in(found, steps, topology, task.config)
  found.chips = {'dtype': task.dtype.name, **found.chips}
  if stage.micro_batch_size:
    found.notes.append(
      'traffic and sums are those of one micro-batch times their number'
    )
  found.notes += absent.describe(task)
  return found


def _count_step(
  task: setup_lib.Task,
  topology: chips.Topology,
  program: setup_lib.Program,
  steps: int,
  flops: float,
  compiled: _Compiled,
) -> Step:
  """Returns what a program costs; its loop over micro-batches counts whole."""
  chip, micro = topology.chip, task.stage.micro_batch_size
  times = program.batch_size // micro if micro else 1
  traffic = times * compiled.traffic_bytes
  sums = times * compiled.collectives
  summed = times * compiled.collective_bytes
  rate = chip.f32_flops if task.dtype == 'float32' else chip.bf16_flops
  return Step(
    batch_size=program.batch_size,
    image_size=program.image_size,
    steps=steps,
    flops=flops,
    traffic_bytes=traffic,
    memory_bytes=compiled.memory_bytes,
    activation_bytes=compiled.activation_bytes,
    collectives=sums,
    collective_bytes=summed,
    compute_seconds=flops / topology.num_chips / rate,
    memory_seconds=traffic / chip.memory_rate,
    kernel_seconds=times
    * compiled.kernels
    * chips.KERNEL_SECONDS[chip.platform],
    network_seconds=topology.reduce_seconds(summed, sums),
    compile_seconds=compiled.seconds,
  )


def _images_per_core(stage: stages_lib.Stage) -> float:
  """Returns how many images a second one core makes ready for training."""
  kind = stage.stored.kind
  rate = _IMAGES_PER_CORE[kind]
  if kind == 'raw':
    rate *= (_MEASURED_SIZE / stage.image_size) ** 2
  rate = min(rate, _MOST_IMAGES_PER_CORE)
  more = _BICUBIC_PARTS[stage.crop_interpolation] * _BICUBIC_SECONDS
  return rate / (1 + rate * more * (stage.image_size / _MEASURED_SIZE) ** 2)

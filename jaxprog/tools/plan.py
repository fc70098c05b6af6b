"""Plans a ladder for hardware that is not here.

Each stage's own training step is compiled for the chips asked for; what the
compiler says of it and what the chips' makers say of them give memory, time
and cost. Nothing runs. What was compiled once is answered from a cache.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, cast

import jax
import rich.console
import rich.text
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_dict

from jaxprog import epochs, files, named, paths
from jaxprog import stages as stages_lib
from jaxprog.data import preparation, records
from jaxprog.data.records import Dataset, Split
from jaxprog.planning import chips, costs, elsewhere
from jaxprog.training import devices, preflight, xla_flags
from jaxprog.training import setup as setup_lib

FILE = 'hardware_plan.json'
# Images a second that one core makes ready at 224 px, by the kind of storage:
# medians of benchmarks/input.py on an AMD EPYC (docs/data.md). Raw images
# cost by their pixels, and the least time that any image takes.
_IMAGES_PER_CORE = {'original': 540.0, 'jpeg': 1407.0, 'raw': 4317.0}
_MOST_IMAGES_PER_CORE = 18_500.0
_MEASURED_SIZE = 224


class Compiled(NamedTuple):
  """What the compiler says of one step; bytes are those of one device."""

  traffic_bytes: float
  memory: costs.Memory
  collectives: tuple[costs.Collective, ...]
  seconds: float


def plan(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None = None,
  *,
  topology: str,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns what each stage of `config` takes on `topology` ('v5e:4x4').

  Prints it as tables; saves it as WORKDIR/hardware_plan.json where there is a
  `workdir`. Datasets that are not here count as published. The compiler for
  TPUs is told that there are none here: a process that is to train on one
  afterwards should not plan.

  Raises:
    UserError: for a mistake in the config or the topology, for a dataset that
      neither is here nor has known counts, or if the compiler is missing.
  """
  workdir = None if workdir is None else paths.workdir(workdir)
  asked = chips.parse_topology(topology)
  if workdir:
    preflight.check_workdir(workdir)
  console = rich.console.Console(markup=False)
  setup = create_setup(config, asked, only, skip)
  tasks = [setup_lib.create_task(setup, stage) for stage in setup.chosen]
  with _without_jaxs_cache():
    compiled = _compile_all(tasks, asked, console)
  plans = [_plan_stage(task, asked, compiled) for task in tasks]
  _show(plans, asked, config, console)
  figures = {
    'topology': asked.name,
    'device_kind': asked.chip.device_kind,
    'num_chips': asked.num_chips,
    'num_hosts': asked.num_hosts,
    'model': config.model,
    'utilization': config.plan_utilization,
    'chip_hour_price': config.chip_hour_price,
    'stages': [x.figures() for x in plans],
    'hours': sum(x.hours for x in plans),
    'cost': elsewhere.total_cost(plans),
    'notes': elsewhere.notes(plans),
  }
  if workdir:
    path = workdir / FILE
    files.write_json(path, figures)
    console.print(f'\n{path}', highlight=False, soft_wrap=True)
  return figures


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
  return setup_lib.Setup(
    config=config,
    stages=all_stages,
    chosen=chosen,
    datasets=datasets,
    steps={
      stage.name: epochs.count_steps(stage, len(datasets[stage.name].train))
      for stage in chosen
    },
    model_fn=setup_lib.create_model_fn(config, mesh.devices.size),
    shardings=devices.create_shardings(mesh),
  )


@dataclasses.dataclass(frozen=True)
class _Count:
  """Images that are not here."""

  number: int

  def __len__(self) -> int:
    return self.number


def _count_dataset(
  config: config_dict.ConfigDict, stage: stages_lib.Stage
) -> Dataset:
  """Returns the stage's dataset, or what is published of it."""
  data_dir = paths.data_dir(config)
  known = named.find(stage.dataset).published
  if known is None or preparation.find_prepared(stage.dataset, data_dir):
    found = setup_lib.load_datasets(config, [stage])[stage.name]
    if stage.holdout:
      found = records.take_holdout(
        found, stage.holdout, f'stage {stage.name!r}'
      )
    return found
  classes = stage.classes or tuple(map(str, range(known.classes)))
  part = len(classes) / known.classes
  held = round(known.train * part * stage.holdout)
  train, evaluated = round(known.train * part) - held, round(known.eval * part)

  def split(number: int) -> Split:
    return cast(Split, _Count(number))

  return Dataset(
    name=stage.dataset,
    classes=classes,
    class_names=classes,
    train=split(train),
    eval=split(evaluated),
    holdout=split(held) if held else None,
  )


_Key = tuple[str, setup_lib.Program]


def _compile_all(
  tasks: Sequence[setup_lib.Task],
  topology: chips.Topology,
  console: rich.console.Console,
) -> dict[_Key, tuple[float, Compiled]]:
  """Returns the FLOPs and the compiled figures of each stage's programs.

  Those not in the cache are compiled side by side, one for each core: a
  compiler uses one.
  """
  directory = _cache_directory(tasks[0].config)
  found: dict[_Key, tuple[float, Compiled]] = {}
  with futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    waiting = {}
    for task in tasks:
      for program in task.train_steps:
        trace = costs.trace_train_step(task, program)
        flops = costs.count_flops(trace.jaxpr)
        lowered = trace.lower()
        options = _compiler_options(task, topology)
        digest = _digest(lowered, topology, options)
        path = directory and directory / f'{digest}.json'
        key = task.stage.name, program
        if path and (saved := _read(path)):
          found[key] = flops, saved
          continue
        compiling = pool.submit(_compile, lowered, options, path)
        waiting[compiling] = key, flops
    if waiting:
      _say(
        f'Compiling {len(waiting)} training steps for {topology.name}: some '
        'minutes each for a large network; kept for the next time.',
        console,
      )
    for compiling in futures.as_completed(waiting):
      key, flops = waiting[compiling]
      found[key] = flops, compiling.result()
      _say(f'{key[0]}: compiled in {found[key][1].seconds:.0f} s', console)
  return found


def _compiler_options(
  task: setup_lib.Task, topology: chips.Topology
) -> dict[str, bool | int]:
  preset = task.config.xla_flags
  if topology.chip.platform == 'tpu':
    return xla_flags.compiler_options(preset, 'tpu')
  # Kernels are chosen by rule: trying them out would take the GPU.
  untried: dict[str, bool | int] = {'xla_gpu_autotune_level': 0}
  return {**xla_flags.compiler_options(preset, 'gpu'), **untried}


def _compile(
  lowered: Any, options: dict[str, bool | int], path: pathlib.Path | None
) -> Compiled:
  begin = time.perf_counter()
  program = lowered.compile(compiler_options=options)
  memory = costs.read_memory(program)
  if memory is None:
    raise RuntimeError('the compiler says nothing of the memory it needs')
  compiled = Compiled(
    traffic_bytes=costs.read_traffic(program),
    memory=memory,
    collectives=tuple(costs.read_collectives(program.as_text())),
    seconds=time.perf_counter() - begin,
  )
  if path:
    files.write_json(path, compiled._asdict())
  return compiled


def _cache_directory(config: config_dict.ConfigDict) -> pathlib.Path | None:
  directory = paths.cache_dir(config)
  if directory is None:
    return None
  devices.create_cache(directory / 'plans')
  return directory / 'plans'


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


def _read(path: pathlib.Path) -> Compiled | None:
  """Returns what was compiled before, None if it was not, or is damaged."""
  try:
    saved = json.loads(path.read_bytes())
    return Compiled(
      traffic_bytes=saved['traffic_bytes'],
      memory=costs.Memory(*saved['memory']),
      collectives=tuple(costs.Collective(*x) for x in saved['collectives']),
      seconds=saved['seconds'],
    )
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _plan_stage(
  task: setup_lib.Task,
  topology: chips.Topology,
  compiled: Mapping[_Key, tuple[float, Compiled]],
) -> elsewhere.StagePlan:
  stage, config = task.stage, task.config
  create_step = functools.partial(_plan_step, task, topology)
  steps = [
    create_step(program, count, *compiled[stage.name, program])
    for program, count in costs.count_steps(task).items()
    if count
  ]
  evaluations = len(task.steps.epoch_ends) * (2 if stage.ema_decay else 1) + 1
  notes = []
  if stage.micro_batch_size:
    notes.append(
      'traffic and sums are those of one micro-batch times their number'
    )
  if not isinstance(task.dataset.train, Split):
    notes.append(
      f'{stage.dataset} is not here: {len(task.dataset.train):,} training and '
      f'{len(task.dataset.eval):,} evaluation images, as published'
    )
  return elsewhere.StagePlan(
    name=stage.name,
    dataset=stage.dataset,
    dtype=task.dtype.name,
    storage=stage.storage,
    num_train_images=len(task.dataset.train),
    num_eval_images=len(task.dataset.selection),
    num_epochs=stage.num_epochs,
    num_evaluations=evaluations,
    num_chips=topology.num_chips,
    chip_bytes=topology.chip.memory_bytes,
    utilization=config.plan_utilization,
    images_per_core=config.images_per_core or _images_per_core(stage),
    cores_per_chip=topology.cores_per_chip,
    chip_hour_price=config.chip_hour_price,
    steps=tuple(steps),
    notes=tuple(notes),
  )


def _plan_step(
  task: setup_lib.Task,
  topology: chips.Topology,
  program: setup_lib.Program,
  steps: int,
  flops: float,
  compiled: Compiled,
) -> elsewhere.Step:
  """Returns what a program costs; its loop over micro-batches counts whole."""
  chip, micro = topology.chip, task.stage.micro_batch_size
  times = program.batch_size // micro if micro else 1
  traffic = times * compiled.traffic_bytes
  sums = times * len(compiled.collectives)
  summed = times * sum(x.num_bytes for x in compiled.collectives)
  rate = chip.f32_flops if task.dtype == 'float32' else chip.bf16_flops
  return elsewhere.Step(
    batch_size=program.batch_size,
    image_size=program.image_size,
    steps=steps,
    flops=flops,
    traffic_bytes=traffic,
    memory_bytes=compiled.memory.total,
    activation_bytes=compiled.memory.temporaries,
    collectives=sums,
    collective_bytes=summed,
    compute_seconds=flops / topology.num_chips / rate,
    memory_seconds=traffic / chip.memory_rate,
    network_seconds=topology.reduce_seconds(summed, sums),
    compile_seconds=compiled.seconds,
  )


def _images_per_core(stage: stages_lib.Stage) -> float:
  """Returns how many images a second one core makes ready for training."""
  kind = stage.stored.kind
  rate = _IMAGES_PER_CORE[kind]
  if kind == 'raw':
    rate *= (_MEASURED_SIZE / stage.image_size) ** 2
  return min(rate, _MOST_IMAGES_PER_CORE)


def _show(
  plans: Sequence[elsewhere.StagePlan],
  topology: chips.Topology,
  config: config_dict.ConfigDict,
  console: rich.console.Console,
) -> None:
  chip = topology.chip
  _say(
    f'\n{config.model} on {topology.name}: {topology.num_chips} x '
    f'{chip.device_kind}, {topology.num_hosts} '
    f'host{"s" if topology.num_hosts > 1 else ""} (compiled, not run)',
    console,
    'bold',
  )
  for table in elsewhere.tables(plans):
    console.print()
    console.print(table)
  console.print()
  for note in elsewhere.notes(plans):
    _say(note, console)
  _say(_explain(topology, config), console, 'dim')


def _explain(topology: chips.Topology, config: config_dict.ConfigDict) -> str:
  """Returns what the figures are, and what they assume."""
  chip = topology.chip
  price = '' if config.chip_hour_price else ' Set chip_hour_price for a cost.'
  return (
    'HBM: arguments, results and temporaries of the compiled step on one chip, '
    f'of {chip.memory_bytes / 1e9:.0f} GB. largest: batch that would fit. '
    'sums: exchanges between chips a step, and their bytes. FLOPs and traffic '
    '(HBM bytes read and written): of one image in training. images/s: of one '
    f'chip at {config.plan_utilization:.0%} of {chip.bf16_flops / 1e12:.0f} '
    f'TFLOP/s and {chip.memory_rate / 1e9:,.0f} GB/s, exchanges added '
    f'({chip.network_rate / 1e9:.0f} GB/s); no run has measured it. cores: of '
    f'the host for each chip, which has {topology.cores_per_chip:g}. hours: '
    f'with evaluations, without compilation.{price}'
  )


def _say(text: str, console: rich.console.Console, style: str = '') -> None:
  """Prints a line as it is; only a terminal breaks it, between words."""
  console.print(rich.text.Text(text, style), soft_wrap=not console.is_terminal)

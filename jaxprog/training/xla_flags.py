"""What XLA reads as it starts: named sets of its flags, a GPU's memory."""

import os

from jaxprog import errors

# For TPUs flags go to libtpu, which alone knows them; for GPUs and CPUs to XLA.
# Each platform ignores what is for the others.
PRESETS: dict[str, dict[str, dict[str, str]]] = {
  # XLA's own choices.
  'none': {},
  # Gradients are summed while the rest of the backward pass computes. TPU: as
  # MaxText sets them for data parallelism. GPU: as JAX's "GPU performance tips"
  # advise, with sums of up to 128 MiB in one exchange: all of a ResNet-50's.
  'overlap': {
    'tpu': {
      'xla_tpu_enable_data_parallel_all_reduce_opt': 'true',
      'xla_tpu_data_parallel_opt_different_sized_ops': 'true',
      'xla_enable_async_all_reduce': 'true',
    },
    'gpu': {
      'xla_gpu_enable_latency_hiding_scheduler': 'true',
      'xla_gpu_all_reduce_combine_threshold_bytes': '134217728',
    },
  },
  # The same bits in every run, for the price of slower kernels on GPUs; TPUs
  # and CPUs give them anyway.
  'deterministic': {'gpu': {'xla_gpu_deterministic_ops': 'true'}},
}
_VARIABLES = {'tpu': 'LIBTPU_INIT_ARGS', 'gpu': 'XLA_FLAGS'}
# The part of a GPU's memory that JAX takes, under the names that it knows. Its
# own 0.75 would leave 20 of 80 GB unused; CUDA's context and kernels and NCCL's
# buffers need some GB beside it.
_MEMORY = 'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'
_MEMORY_PART = 0.9
# On an H100 trying kernels out takes some 10 s a stage; what a short one could
# save by the best of them is less.
_TUNED_STEPS = 500


def use(preset: str) -> None:
  """Sets a preset's flags and the memory, before JAX looks for devices.

  After that XLA reads no more of them. What the environment sets already stays
  as it is: a user's own wins.
  """
  if not any(os.environ.get(name) for name in _MEMORY):
    os.environ[_MEMORY[0]] = str(_MEMORY_PART)
  # A wrong name is refused where the config's fields are checked.
  for platform, flags in PRESETS.get(preset, {}).items():
    variable = _VARIABLES[platform]
    words = os.environ.get(variable, '').split()
    known = {word.lstrip('-').partition('=')[0] for word in words}
    words += [f'--{k}={v}' for k, v in flags.items() if k not in known]
    if words:
      os.environ[variable] = ' '.join(words)


def share_memory(part: float) -> None:
  """Has this process take a part of what it would of a GPU's memory."""
  share = memory_part() * part
  for name in _MEMORY:
    os.environ.pop(name, None)
  os.environ[_MEMORY[0]] = f'{share:.3g}'


def step_options(
  preset: str, platform: str, num_steps: int
) -> dict[str, bool | int]:
  """Returns how XLA compiles a stage of `num_steps` steps, beside all flags.

  A short stage on an NVIDIA GPU takes kernels by rule and not by trial, unless
  the environment says how to choose, or the preset needs them tried out.
  `platform` is a client's `platform_version`.
  """
  name = 'xla_gpu_autotune_level'
  if 'cuda' not in platform.lower() or num_steps >= _TUNED_STEPS:
    return {}
  chosen = preset == 'deterministic' or name in os.environ.get('XLA_FLAGS', '')
  return {} if chosen else {name: 0}


def memory_part() -> float:
  """Returns the part of a GPU's memory that a run started here may allocate.

  Raises:
    UserError: if the environment says what is no number.
  """
  for name in _MEMORY:
    if text := os.environ.get(name):
      try:
        return float(text)
      except ValueError:
        raise errors.UserError(
          f'{text!r} is no part of the memory.', name, 'Set it to 0.9, or not.'
        ) from None
  return _MEMORY_PART


def compiler_options(preset: str, platform: str) -> dict[str, bool | int]:
  """Returns the preset's flags as `jax.stages.Lowered.compile` takes them."""
  return {
    name: int(value) if value.isdecimal() else value == 'true'
    for name, value in PRESETS[preset].get(platform, {}).items()
  }

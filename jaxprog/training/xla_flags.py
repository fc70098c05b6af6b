"""Named sets of XLA's flags, each with its reason."""

import os

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


def use(preset: str) -> None:
  """Sets the flags of a preset, before JAX first looks for devices.

  What the environment sets already stays as it is: a user's own flag wins.
  """
  for platform, flags in PRESETS[preset].items():
    variable = _VARIABLES[platform]
    words = os.environ.get(variable, '').split()
    known = {word.lstrip('-').partition('=')[0] for word in words}
    words += [f'--{k}={v}' for k, v in flags.items() if k not in known]
    if words:
      os.environ[variable] = ' '.join(words)


def compiler_options(preset: str, platform: str) -> dict[str, bool | int]:
  """Returns the preset's flags as `jax.stages.Lowered.compile` takes them."""
  return {
    name: int(value) if value.isdecimal() else value == 'true'
    for name, value in PRESETS[preset].get(platform, {}).items()
  }

"""Where a run computes: platform, precision, mesh and shardings."""

import contextlib
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprog import errors, formats
from jaxprog.monitoring import activity


class Shardings(NamedTuple):
  """One copy of the state on each device; a batch is divided among them."""

  replicated: NamedSharding
  batch: NamedSharding


def check_platform(wanted: str) -> None:
  """Raises UserError if the config asks for what this machine has not.

  A silent fall back to CPU would cost days (jax #10192).
  """
  with activity.doing('starting JAX'):
    found = jax.default_backend()
  if wanted not in ('any', found):
    raise errors.UserError(
      f'The config asks for {wanted!r}, JAX found {found!r}: '
      f'{jax.device_count()} x {jax.devices()[0].device_kind}.',
      'config.platform',
      "Install jax[tpu] or jax[cuda13], or set platform to 'any'.",
    )


def describe() -> str:
  """Returns number, kind, platform and, where it is known, memory."""
  first = jax.local_devices()[0]
  text = f'{jax.device_count()} x {first.device_kind}'
  if first.device_kind.lower() != first.platform:
    text += f' ({first.platform})'
  memory = memory_bytes(first)
  return text + (f', {formats.size(memory)} each' if memory else '')


def memory_bytes(device: jax.Device) -> int | None:
  """Returns the memory that a device has, None where its backend is silent."""
  with contextlib.suppress(RuntimeError, NotImplementedError):
    return (device.memory_stats() or {}).get('bytes_limit') or None
  return None


def keep_compiled(directory: pathlib.Path | None) -> None:
  """Makes JAX keep what it compiles in `directory`; None keeps nothing.

  Raises:
    UserError: as `create_cache`.
  """
  if directory is None:
    return
  create_cache(directory)
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def create_cache(directory: pathlib.Path) -> None:
  """Makes a directory for what is compiled, unless it is there.

  Raises:
    UserError: if another user could write there, and so run code here, or
      this one cannot.
  """
  where = f'config.compilation_cache_dir={directory}'
  try:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
  except OSError as e:
    raise errors.UserError(
      f'There is no compilation cache: {e.strerror}.',
      where,
      "Name a directory of your own, or '' for none.",
    ) from None
  if found.st_mode & 0o022 or found.st_uid != os.getuid():
    raise errors.UserError(
      'Others can write to the compilation cache, and so run code here.',
      where,
      f'chmod 700 {directory}, or name a directory of your own.',
    )


def create_shardings(mesh: Mesh | None = None) -> Shardings:
  """Returns how states and batches lie on `mesh`, a line of devices.

  By default they are all those of all processes.
  """
  mesh = mesh or jax.make_mesh(
    (jax.device_count(),), ('data',), axis_types=(AxisType.Auto,)
  )
  return Shardings(
    NamedSharding(mesh, PartitionSpec()),
    NamedSharding(mesh, PartitionSpec('data')),
  )


def resolve_dtype(dtype: str, mixed_precision: bool, platform: str) -> Any:
  """Returns the dtype to compute in on `platform`; parameters stay f32.

  'auto' is bfloat16 except on CPU, where it is emulated and slower.
  """
  if not mixed_precision or dtype == 'float32':
    return jnp.float32
  if dtype == 'auto' and platform == 'cpu':
    return jnp.float32
  return jnp.bfloat16

"""Where a run computes: platform, precision, mesh and shardings."""

import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprog import errors


class Shardings(NamedTuple):
  """One copy of the state on each device; a batch is divided among them."""

  replicated: NamedSharding
  batch: NamedSharding


def check_platform(wanted: str) -> None:
  """Raises UserError if the config asks for what this machine has not.

  A silent fall back to CPU would cost days (jax #10192).
  """
  found = jax.default_backend()
  if wanted not in ('any', found):
    raise errors.UserError(
      f'The config asks for {wanted!r}, JAX found {found!r}: '
      f'{jax.device_count()} x {jax.devices()[0].device_kind}.',
      'config.platform',
      "Install jax[tpu] or jax[cuda13], or set platform to 'any'.",
    )


def keep_compiled(directory: str) -> None:
  """Makes JAX keep what it compiles in `directory`; '' keeps nothing.

  Raises:
    UserError: if another user could write there, and so run code here.
  """
  if not directory:
    return
  path = pathlib.Path(directory).expanduser()
  path.mkdir(mode=0o700, parents=True, exist_ok=True)
  if path.stat().st_mode & 0o022 or path.stat().st_uid != os.getuid():
    raise errors.UserError(
      'Others can write to the compilation cache, and so run code here.',
      f'config.compilation_cache_dir={directory}',
      f'chmod 700 {path}, or name a directory of your own.',
    )
  jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def create_mesh() -> Mesh:
  """Returns all devices of all processes along one axis, `data`."""
  return jax.make_mesh(
    (jax.device_count(),), ('data',), axis_types=(AxisType.Auto,)
  )


def create_shardings(mesh: Mesh) -> Shardings:
  """Returns how states and batches lie on `mesh`."""
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

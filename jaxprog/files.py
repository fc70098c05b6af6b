"""Files that are either whole or not there, locks on them and their sums."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

# What flock answers where the file system or its server knows no locks; NFS
# says EBADF of what is not open for writing, as no folder ever is.
_NO_FLOCK = frozenset(
  (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EBADF)
)


def lock(file: int, kind: int = fcntl.LOCK_EX, *, wait: bool = True) -> bool:
  """Locks an open file against others; the kernel frees it with its owner.

  Returns False where the file system knows no locks. `kind` is LOCK_EX, or
  LOCK_SH for one of many.

  Raises:
    BlockingIOError: if another has locked it and we are not to `wait`.
  """
  try:
    fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    raise
  except OSError as e:
    if e.errno not in _NO_FLOCK:
      raise
    return False
  return True


def is_at(file: int, path: str | os.PathLike[str]) -> bool:
  """Returns whether an open file is the one at `path`."""
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False


def read_object(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the JSON object in a file, None where there is none."""
  try:
    value = json.loads(pathlib.Path(path).read_bytes())
  except (OSError, ValueError):
    return None
  return value if isinstance(value, dict) else None


def write_json(
  path: str | os.PathLike[str], value: Any, *, durable: bool = True
) -> None:
  """Writes what `plain` makes of `value` as JSON, as `write_bytes` does."""
  text = json.dumps(plain(value), indent=2, allow_nan=False)
  write_bytes(path, f'{text}\n'.encode(), durable=durable)


def write_bytes(
  path: str | os.PathLike[str], data: bytes, *, durable: bool = True
) -> None:
  """Replaces the file at `path`; a reader sees all of the old or the new.

  If `durable`, the new one is on the disk before its name is, so that a crash
  of the whole machine cannot leave an empty file.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with open(temporary, 'wb') as file:
      file.write(data)
      if durable:
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[None]:
  """Makes a folder, and removes what it has made if it ends up empty."""
  made = [x for x in (path, *path.parents) if not x.exists()]
  try:
    path.mkdir(parents=True, exist_ok=True)
    yield
  finally:
    for x in made:
      with contextlib.suppress(OSError):
        x.rmdir()


def digest(path: str | os.PathLike[str]) -> str:
  """Returns the SHA-256 of a file, in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def digest_parts(*parts: str | bytes) -> str:
  """Returns the SHA-256 of all `parts`, in hex, in order and kept apart."""
  digest = hashlib.sha256()
  for part in parts:
    encoded = part.encode() if isinstance(part, str) else part
    digest.update(f'{len(encoded)}\0'.encode() + encoded)
  return digest.hexdigest()


def plain(value: Any) -> Any:
  """Returns what JSON gives back of `value`; NaN and infinities become None.

  NumPy and JAX scalars become numbers, arrays and tuples lists, paths and
  other objects strings.
  """
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple | set | frozenset):
    return [plain(v) for v in value]
  if hasattr(value, 'tolist'):  # NumPy and JAX, neither imported here.
    return plain(value.tolist())
  return str(value)

"""Datasets and files of the Hugging Face Hub, through its own client.

Cache, token, server and offline mode are those of every program that uses it:
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import contextlib
import json
import pathlib
import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxprog import errors, files, stages

# What of a dataset is looked for, in this order: its own files, and those that
# the Hub makes of whatever it has.
_WANTED = (
  ('main', '*.parquet'),
  ('main', '*.tar'),
  ('refs/convert/parquet', '*.parquet'),
)


class File(NamedTuple):
  """A file in the cache, and what its repository says of it."""

  path: pathlib.Path
  # {} where there is no config.json.
  config: Mapping[str, Any]
  # '' where there is none.
  licence: str


def find_dataset(name: str) -> pathlib.Path | None:
  """Returns the folder of OWNER/NAME/FOLDER@REVISION in the cache, if whole."""
  for revision, pattern in _WANTED:
    try:
      folder = _get(name, revision, pattern, local_files_only=True)
    except Exception:  # Not there, or not all of it, or no client.
      continue
    if folder:
      return folder
  return None


def fetch_dataset(name: str) -> None:
  """Brings a dataset to the cache; what is there serves if the Hub does not.

  Raises:
    UserError: if the Hub has no such dataset, or it cannot come.
  """
  where = f'dataset {f"hf:{name}"!r}'
  try:
    if any(_get(name, *x) for x in _WANTED):
      return
  except ImportError as e:
    raise errors.not_installed('hf:NAME', where, e, 'hub') from e
  except Exception as e:  # The client and what it calls raise many.
    if find_dataset(name):
      return
    hint = 'Is the name right? For what is not public: hf auth login'
    raise _not_fetched('It', where, e, hint) from e
  raise errors.UserError(
    'It has neither Parquet files nor tars.',
    where,
    'Write it with Dataset.to_parquet, then parquet:PATH reads it.',
  )


def fetch_file(file: stages.HubFile, where: str) -> File:
  """Returns `file`, which is fetched if the cache has not its newest version.

  Raises:
    UserError: naming `where`, if it cannot be had or is not what the Hub has.
  """
  try:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors
    from huggingface_hub.utils import logging
  except ImportError as e:
    raise errors.not_installed('init_from', where, e, 'hub') from None

  def find(name):
    try:
      return pathlib.Path(huggingface_hub.hf_hub_download(file.repo, name))
    except hub_errors.EntryNotFoundError:  # In the cache, if offline.
      return None

  verbosity = logging.get_verbosity()
  logging.set_verbosity_error()  # It tells of each of six attempts.
  try:
    path = pathlib.Path(huggingface_hub.hf_hub_download(file.repo, file.path))
    config, card = find('config.json'), find('README.md')
  except Exception as e:  # Its own, or of whatever it speaks HTTP with.
    hint = (
      f'Where there is a network: hf download {file.repo} {file.path} '
      'config.json README.md; its cache is $HF_HOME.'
    )
    what = f'{file.path} of {file.repo}'
    raise _not_fetched(what, where, e, hint) from None
  finally:
    logging.set_verbosity(verbosity)
  _check_sum(path, where)
  licence = ''
  with contextlib.suppress(Exception):  # Anybody may have written it.
    data: Any = huggingface_hub.metadata_load(card) if card else {}
    licence = data['license']
    if licence == 'other':
      licence = data.get('license_name', licence)
  return File(path, _read_config(config), str(licence))


def _get(
  name: str, revision: str, pattern: str, *, local_files_only: bool = False
) -> pathlib.Path | None:
  """Returns where files of a revision are, None if it has none of these.

  Whatever huggingface_hub raises comes through, but that a revision is none.
  """
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  name, _, given = name.partition('@')
  owner, *rest = name.split('/', 2)
  below = rest[1] if len(rest) > 1 else ''
  try:
    root = huggingface_hub.snapshot_download(
      '/'.join([owner, *rest[:1]]),
      repo_type='dataset',
      revision=given or revision,
      allow_patterns=[
        '/'.join(filter(None, (below, pattern))),
        *('*classnames.txt', '*sizes.json') * (pattern == '*.tar'),
      ],
      local_files_only=local_files_only,
    )
  except hub_errors.RevisionNotFoundError:
    if given:
      raise
    return None
  folder = pathlib.Path(root, below)
  return folder if any(folder.rglob(pattern)) else None


def _not_fetched(
  what: str, where: str, error: Exception, hint: str
) -> errors.UserError:
  said = textwrap.shorten(f'{type(error).__name__}: {error}', 300)
  return errors.UserError(f'{what} cannot be fetched: {said}', where, hint)


def _check_sum(path: pathlib.Path, where: str) -> None:
  """Raises UserError if a file of the cache is not what its name says.

  The cache names what it has by the Hub's SHA-256, and looks at it no more once
  it is there. Small files have another sum, and links do not work everywhere.
  """
  blob = path.resolve()
  if (
    re.fullmatch('[0-9a-f]{64}', blob.name)
    and (found := files.digest(blob)) != blob.name
  ):
    raise errors.UserError(
      f'The cached file is not what the hub has: its SHA-256 is {found}.',
      where,
      f'Delete {blob}, and it is fetched again.',
    )


def _read_config(path: pathlib.Path | None) -> Mapping[str, Any]:
  with contextlib.suppress(ValueError):
    config = json.loads(path.read_bytes()) if path else {}
    if isinstance(config, dict):
      return config
  return {}

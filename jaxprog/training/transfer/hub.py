"""Files of the Hugging Face hub, through its own client.

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
from jaxprog.monitoring import activity

# Of a sentence on what the client says, in characters.
_MAX_LENGTH = 300


class Fetched(NamedTuple):
  """A file in the cache, and what its repository says of it."""

  path: pathlib.Path
  # {} where there is no config.json.
  config: Mapping[str, Any]
  # '' where there is none.
  licence: str


def fetch(file: stages.HubFile, where: str) -> Fetched:
  """Returns `file`, which is fetched if the cache has not its newest version.

  Raises:
    UserError: naming `where`, if it cannot be had or is not what the hub has.
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
  with activity.doing(f'fetching {file.repo}'):
    try:
      path = pathlib.Path(huggingface_hub.hf_hub_download(file.repo, file.path))
      config, card = find('config.json'), find('README.md')
    except Exception as e:  # Its own, or of whatever it speaks HTTP with.
      raise _not_fetched(file, where, e) from None
    finally:
      logging.set_verbosity(verbosity)
  _check_sum(path, where)
  licence = ''
  with contextlib.suppress(Exception):  # Anybody may have written it.
    data: Any = huggingface_hub.metadata_load(card) if card else {}
    licence = data['license']
    if licence == 'other':
      licence = data.get('license_name', licence)
  return Fetched(path, _read_config(config), str(licence))


def _not_fetched(
  file: stages.HubFile, where: str, error: Exception
) -> errors.UserError:
  said = textwrap.shorten(str(error), _MAX_LENGTH, placeholder=' …')
  return errors.UserError(
    f'{file.path} of {file.repo} cannot be fetched: {said}',
    where,
    f'Where there is a network: hf download {file.repo} {file.path} '
    'config.json README.md; its cache is $HF_HOME.',
  )


def _check_sum(path: pathlib.Path, where: str) -> None:
  """Raises UserError if a file of the cache is not what its name says.

  The cache names what it has by the hub's SHA-256, and looks at it no more once
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

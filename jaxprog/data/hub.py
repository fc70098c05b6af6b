"""Datasets of the Hugging Face Hub, by its own client and in its own cache."""

import pathlib
import textwrap

from jaxprog import errors
from jaxprog.data import builders, parquet, sources, tars

# What of a dataset is looked for, in this order: its own files, and those that
# the Hub makes of whatever it has.
_WANTED = (
  ('main', '*.parquet'),
  ('main', '*.tar'),
  ('refs/convert/parquet', '*.parquet'),
)


def find(name: str) -> pathlib.Path | None:
  """Returns the folder of OWNER/NAME/FOLDER@REVISION in the cache, if whole."""
  for revision, pattern in _WANTED:
    try:
      folder = _get(name, revision, pattern, local_files_only=True)
    except Exception:  # Not there, or not all of it, or no client.
      continue
    if folder:
      return folder
  return None


def fetch(name: str) -> None:
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
    if find(name):
      return
    text = textwrap.shorten(f'{type(e).__name__}: {e}', 300)
    raise errors.UserError(
      f'It cannot be fetched: {text}',
      where,
      'Is the name right? For what is not public: hf auth login',
    ) from e
  raise errors.UserError(
    'It has neither Parquet files nor tars.',
    where,
    'Write it with Dataset.to_parquet, then parquet:PATH reads it.',
  )


def list_raw(
  dataset: str, folder: pathlib.Path, image: str, label: str
) -> builders.Raw:
  """Returns the images of what `find` has found, checked.

  Raises:
    UserError: as `parquet.list_raw` and `tars.list_raw`.
  """
  if sources.find_files(folder, '.parquet'):
    return parquet.list_raw(dataset, folder, image, label)
  return tars.list_raw(dataset, folder, image=image, label=label)


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
  return folder if sources.find_files(folder, pattern[1:]) else None

"""Prepares the datasets of a config, so that training can begin at once."""

import pathlib
import re
from collections.abc import Sequence

import rich.console
from ml_collections import config_dict

from jaxprog import buckets, errors, named, paths, stages
from jaxprog.data import archives, builders, folders, preparation
from jaxprog.monitoring import activity
from jaxprog.tools import audit


def prepare(
  config: config_dict.ConfigDict,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  input: str = '',
  sha256: str = '',
  download: bool = False,
) -> None:
  """Prepares every dataset that the chosen stages use, each once.

  `input` is an archive of raw images with that SHA-256, unpacked into
  config.data_dir first. `download` fetches those of Imagenette and Tiny
  ImageNet that the stages need and that are not there.

  Raises:
    UserError: if raw images are missing or wrong, or an archive is not what
      it should be.
  """
  chosen = stages.select(stages.create_stages(config), only, skip)
  datasets = tuple(dict.fromkeys(stage.dataset for stage in chosen))
  data_dir = paths.data_dir(config)
  console = rich.console.Console(markup=False)
  if sha256:
    _check_sum(sha256, input)
  is_new = not data_dir.is_dir()
  if input:
    archive = str(paths.expand(input, f'--input={input}'))
    _unpack(archive, sha256.lower(), data_dir, datasets, console)
  if download:
    for dataset in datasets:
      _download(dataset, data_dir, console)
  if is_new and data_dir.is_dir():
    preparation.say_new(data_dir)
  for dataset in datasets:
    with activity.doing(f'fetching {dataset}', unit='bytes') as show:
      preparation.fetch_raw(dataset, data_dir, show)
    with activity.doing(f'preparing {dataset}') as show:
      raw = preparation.prepare(dataset, data_dir, progress=show)
    where = buckets.shown(data_dir / 'prepared')
    console.print(f'{dataset}: prepared in {where}', soft_wrap=True)
    if raw:
      _show_raw(dataset, raw, console)
  for stage in chosen:
    _store(stage, data_dir, console)
  if config.exclude_leaks:
    # What is found is kept, so that a run need not look again.
    present = audit.load_present(stages.create_stages(config), data_dir)
    found = audit.find_leaks(*present)
    excluded = sum(int(x.sum()) for x in found.excluded.values())
    console.print(f'leaks: {excluded:,} training images will be left out')
  if url := buckets.url_of(data_dir):
    for dataset in datasets:
      _upload(dataset, data_dir, url, console)


def _check_sum(sha256: str, archive: str) -> None:
  if not re.fullmatch('[0-9A-Fa-f]{64}', sha256):
    raise errors.UserError(
      f'{sha256!r} is no SHA-256: that has 64 digits from 0 to f.',
      '--sha256',
      "Copy it whole from the archive's publisher.",
    )
  if not archive:
    raise errors.UserError(
      '--sha256 is of no archive.', '', 'Name it with --input=ARCHIVE.'
    )


def _show_raw(
  dataset: str, raw: builders.Raw, console: rich.console.Console
) -> None:
  """Prints whence the labels are, and what was left out."""
  if raw.labels_from:
    text = errors.printable(f'{dataset}: labels of val: {raw.labels_from}')
    console.print(text, highlight=False, soft_wrap=True)
  if raw.left_out:
    left_out = folders.describe(raw.left_out)
    text = errors.printable(f'{dataset}: left out: {left_out}')
    console.print(text, style='yellow', highlight=False, soft_wrap=True)


def _upload(
  dataset: str, data_dir: pathlib.Path, url: str, console: rich.console.Console
) -> None:
  """Brings what is prepared to its bucket, and lets go of raw images there."""
  try:
    with activity.doing(f'uploading {dataset}', unit='bytes') as show:
      is_new = preparation.upload(dataset, data_dir, show)
  except buckets.ForbiddenError as e:
    console.print(f'{dataset}: it is here alone. {e.what}', soft_wrap=True)
    return
  what = 'uploaded to' if is_new else 'is already in'
  console.print(f'{dataset}: {what} {url}/prepared', soft_wrap=True)
  if dropped := preparation.drop_raw(dataset, data_dir):
    console.print(
      f'{dataset}: {dropped} is removed; {buckets.shown(dropped)} stays',
      soft_wrap=True,
    )


def _store(
  stage: stages.Stage, data_dir: pathlib.Path, console: rich.console.Console
) -> None:
  """Writes the training images in the form that `stage` reads."""
  if stage.stored.kind == 'original':
    return
  dataset = preparation.load_dataset(stage.dataset, data_dir)
  with activity.doing(f'storing {stage.dataset} as {stage.storage}') as show:
    dataset = preparation.store(dataset, stage.stored, progress=show)
  console.print(
    f'{stage.dataset}: stored as {dataset.version}', highlight=False
  )


def _unpack(
  archive: str,
  sha256: str,
  data_dir: pathlib.Path,
  datasets: Sequence[str],
  console: rich.console.Console,
) -> None:
  """Unpacks an archive that the user has, once its sum is known to be right."""
  if not sha256:
    raise errors.UserError(
      f'--input needs --sha256; that of this file is '
      f'{archives.sha256_file(archive)}.',
      archive,
      "Compare it with its publisher's, then give it as --sha256.",
    )
  with activity.doing(f'unpacking {archive}', unit='percent') as show:
    found = archives.extract(
      archive,
      data_dir,
      sha256=sha256,
      expected=_raw_folders(datasets, data_dir),
      progress=show,
    )
  for path in found:
    console.print(f'unpacked {path}', highlight=False, soft_wrap=True)


def _raw_folders(
  datasets: Sequence[str], data_dir: pathlib.Path
) -> tuple[str, ...]:
  """Returns the names below `data_dir` that hold raw images of `datasets`."""
  names: list[str] = []
  for dataset in datasets:
    names += [x.partition('/')[0] for x in named.find(dataset).folders]
    folder = paths.dataset_folder(dataset)
    if folder and data_dir.absolute() in folder.absolute().parents:
      names.append(folder.absolute().parts[len(data_dir.absolute().parts)])
  return tuple(names)


def _download(
  dataset: str, data_dir: pathlib.Path, console: rich.console.Console
) -> None:
  """Fetches and unpacks a known archive, unless its dataset is there."""
  archive = named.find(dataset).archive
  if archive is None or preparation.is_here(dataset, data_dir):
    return
  path = data_dir / 'downloads' / pathlib.PurePath(archive.url).name
  with activity.doing(f'fetching {dataset}', unit='percent') as show:
    archives.download(archive.url, path, archive.sha256, show)
  _unpack(str(path), archive.sha256, data_dir, (dataset,), console)

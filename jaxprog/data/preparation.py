"""From a dataset's name to its prepared copy: of a raw folder, or of tfds."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import random
import shutil
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming, read_only_builder

from jaxprog import buckets, errors, files, named, paths
from jaxprog.data import (
  builders,
  folders,
  hub,
  layouts,
  packs,
  parquet,
  parts,
  remote,
  shards,
  sources,
  tars,
)
from jaxprog.data import records as records_lib
from jaxprog.data.records import Dataset, Records
from jaxprog.stages import Storage

# What a disk answers that takes no more, and what tfds says before it is asked.
_FULL = (
  *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
  'Not enough disk space',
)
# Where images belong that are in no folder of data_dir.
_LIE_IN = {
  'folder': 'Its images belong into PATH/{train,val}/CLASS/.',
  'parquet': "PATH is a folder with train and validation in its files' names.",
  'wds': 'Write wds:PATH/{train-{000..146},val-{00..06}}.tar, or wds:PATH.',
}
# Beside the records: how the raw folder looked.
_LOOKS = 'raw_folder.json'
# What looking at the times of raw files may take at a start, in seconds.
_LOOK_SECONDS = 0.3


def load_dataset(
  dataset: str,
  data_dir: str | os.PathLike[str],
  *,
  classes: Sequence[str] = (),
  num_classes: int = 0,
  where: str = '',
  progress: parts.Progress | None = None,
  found: str = '',
) -> Dataset:
  """Returns the dataset of that name; prepares it if it lies there raw.

  `classes` keeps only these classes, `num_classes` is checked unless 0. In
  messages `where` says who asked. What `check_dataset` has `found` just now is
  not looked for again.

  Raises:
    UserError: if it is missing, has changed since it was prepared, or has
      other classes than asked for.
  """
  data_dir = pathlib.Path(data_dir)
  if (found or check_dataset(dataset, data_dir)) == 'raw':
    prepare(dataset, data_dir, progress=progress)
  prepared = find_prepared(dataset, data_dir)
  if prepared is None:  # Another process may have removed it.
    raise _missing(dataset, data_dir)
  loaded = records_lib.open_dataset(dataset, prepared, progress)
  if classes:
    loaded = records_lib.select_classes(loaded, classes, where)
  if num_classes and num_classes != loaded.num_classes:
    folder = _find_raw(dataset, data_dir) or prepared.data_dir
    raise errors.UserError(
      f'num_classes is {num_classes}, but {dataset!r} has '
      f'{loaded.num_classes} classes.',
      ', '.join(x for x in (where, buckets.shown(folder)) if x),
      'Is the folder complete? If so, set num_classes to what it has.',
    )
  return loaded


def check_dataset(
  dataset: str,
  data_dir: str | os.PathLike[str],
  *,
  seconds: float = _LOOK_SECONDS,
) -> str:
  """Returns 'prepared', or 'raw' if `load_dataset` would prepare it first.

  Every raw folder's time and every list of labels is looked at, then, for so
  many seconds, the sizes and times of files, of one folder after the other,
  in an order left to chance. Only what differs has all files listed.

  Raises:
    UserError: if it is neither, the raw folder is not in order, or it has
      changed since it was prepared.
  """
  data_dir = pathlib.Path(data_dir)
  prepared = find_prepared(dataset, data_dir)
  if _is_kept(dataset, prepared):
    return 'prepared'
  root = _find_root(dataset, data_dir)
  if prepared and (root is None or _is_untouched(root, prepared, seconds)):
    return 'prepared'
  raw = list_raw(dataset, data_dir)
  if raw is None:
    raise _missing(dataset, data_dir)
  if prepared is None:
    return 'raw'
  advice = 'with --mode=prepare, or move the raw folder away.'
  if not _is_made_of(prepared, raw):
    raise errors.UserError(
      f'{dataset!r} has changed since it was prepared.',
      f'{raw.root} is not what {prepared.data_dir} was made of',
      f'Prepare it again {advice}',
    )
  if written := _written_to(prepared, raw):
    raise errors.UserError(
      f'Images of {dataset!r} were written to since it was prepared.',
      f'{raw.root}, in {written[0]}'
      + (f' and {len(written) - 1:,} more' if written[1:] else ''),
      f'Compare them {advice}',
    )
  _write_looks(prepared, raw.looks)
  return 'prepared'


def prepare(
  dataset: str,
  data_dir: str | os.PathLike[str],
  *,
  progress: parts.Progress | None = None,
) -> builders.Raw | None:
  """Makes DATA_DIR/prepared/… of a dataset, unless it is there and current.

  Local folders come before tfds, which may download. `progress` is called
  with the images done and in all, for local ones, and with the records whose
  labels were read, for others. What is interrupted leaves nothing that looks
  finished, and a second process waits for the first; where the file system
  knows no locks, what one of them has finished stays. Returns what the raw
  folder holds, None if there is none.

  Raises:
    UserError: if there is nothing to prepare it from, or no room.
  """
  data_dir = pathlib.Path(data_dir)
  raw = None
  if not _is_kept(dataset, find_prepared(dataset, data_dir)):
    raw = list_raw(dataset, data_dir)
  # Before it is locked: one may not be allowed to write there.
  if current := _find_current(dataset, data_dir, raw):
    records_lib.open_dataset(dataset, current, progress)  # Indexes the labels.
    if raw is not None:
      _note_unchanged(current, raw)
    return raw
  builder = None
  if raw is None:
    # Before anything is written: what cannot be had leaves no folder behind.
    builder = _create_tfds_builder(dataset, data_dir)
    _check_source(dataset, builder, data_dir)
  with _writing(data_dir / 'prepared') as is_locked:
    if _find_current(dataset, data_dir, raw):
      return raw
    prepared = find_prepared(dataset, data_dir)
    if prepared is not None:
      remote.remove(pathlib.Path(prepared.data_dir))
    if raw is not None:
      builder = builders.Images(
        dataset, raw, data_dir, folder_config(dataset), progress
      )
    assert builder is not None
    if is_locked:
      folder = pathlib.Path(builder.data_dir).parent
      if raw is not None and isinstance(builder, builders.Images):
        builder.kept = folder / f'incomplete.{_identify(raw)}'
        _remove_leftovers(folder, builder.kept)
      else:
        _remove_leftovers(folder)
    try:
      _download_and_prepare(dataset, builder, data_dir)
    except OSError:
      if is_locked or not _find_current(dataset, data_dir, raw):
        raise
    records_lib.open_dataset(dataset, builder, progress)  # Indexes the labels.
    if raw is not None:
      _write_looks(builder, raw.looks)
  return raw


def _is_kept(dataset: str, prepared: tfds.core.DatasetBuilder | None) -> bool:
  """Returns whether it is prepared, whatever the Hub or its cache has now."""
  return bool(prepared) and paths.dataset_source(dataset).kind == 'hf'


def _find_current(
  dataset: str, data_dir: pathlib.Path, raw: builders.Raw | None
) -> tfds.core.DatasetBuilder | None:
  """Returns what is prepared from `raw`, or at all if that is None."""
  prepared = find_prepared(dataset, data_dir)
  if prepared is None or raw is None:
    return prepared
  if _is_made_of(prepared, raw) and not _is_edited(dataset, prepared, raw):
    return prepared
  return None


def _find_raw(dataset: str, data_dir: pathlib.Path) -> pathlib.Path | None:
  folders = _raw_folders(dataset, data_dir)
  return next((x for x in folders if x.is_dir()), None)


def _find_root(dataset: str, data_dir: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder that holds a dataset's raw splits, if there is one."""
  folder = _find_raw(dataset, data_dir)
  if folder is None or paths.dataset_source(dataset).kind in paths.OF_MANY:
    return folder
  return layouts.locate(folder)


def _raw_folders(dataset: str, data_dir: pathlib.Path) -> list[pathlib.Path]:
  """Returns where a dataset may lie raw."""
  source = paths.dataset_source(dataset)
  if source.kind == 'hf':
    folder = hub.find_dataset(source.place)
    return [folder] if folder else []
  folder = paths.dataset_folder(dataset)
  known = [data_dir / name for name in named.find(dataset).folders]
  return [folder] if folder else known


def is_here(dataset: str, data_dir: pathlib.Path) -> bool:
  """Returns whether a dataset is here, raw or prepared."""
  return bool(
    dataset == 'digits'
    or _find_raw(dataset, data_dir)
    or find_prepared(dataset, data_dir)
  )


def fetch_raw(
  dataset: str,
  data_dir: pathlib.Path,
  progress: parts.Progress | None = None,
) -> None:
  """Brings what a dataset can be prepared from, where a bucket or Hub has it.

  Nothing comes where the dataset is here already. `progress` is told of bytes
  of a bucket.
  """
  source = paths.dataset_source(dataset)
  if source.kind == 'hf' and not find_prepared(dataset, data_dir):
    hub.fetch_dataset(source.place)
  if not is_here(dataset, data_dir):
    raw = _raw_folders(dataset, data_dir)
    came = any(remote.fetch_folder(x, progress) for x in raw)
    if not came and named.find(dataset).manual:
      remote.fetch_files(data_dir / 'downloads' / 'manual', progress)


def drop_raw(dataset: str, data_dir: pathlib.Path) -> pathlib.Path | None:
  """Removes a raw folder that came from a bucket and is there; returns it."""
  folder = _find_raw(dataset, data_dir)
  if folder is None or not remote.is_fetched(folder):
    return None
  shutil.rmtree(folder)
  return folder


def upload(
  dataset: str, data_dir: pathlib.Path, progress: parts.Progress | None = None
) -> bool:
  """Brings what is prepared of a dataset to the bucket of its copy.

  `progress` is told of bytes. Returns whether anything was missing there.

  Raises:
    UserError: if the bucket cannot be written to.
  """
  prepared = find_prepared(dataset, data_dir)
  if prepared is None:
    return False
  return upload_folder(pathlib.Path(prepared.data_dir), progress)


def upload_folder(
  folder: pathlib.Path, progress: parts.Progress | None = None
) -> bool:
  """As `upload`, of what is prepared in `folder`."""
  done = [remote.upload(x, progress) for x in (folder, *list_packs(folder))]
  return any(done)


def list_raw(dataset: str, data_dir: pathlib.Path) -> builders.Raw | None:
  """Returns the raw images of a dataset, None if they are not here.

  Raises:
    UserError: if their folder is not in order.
  """
  if dataset == 'digits':
    return builders.list_digits()
  root = _find_root(dataset, data_dir)
  if root is None:
    return None
  kind, place, image, label = paths.dataset_source(dataset)
  match kind:
    case 'hf' if not sources.find_files(root, '.parquet'):
      return tars.list_raw(dataset, root, image=image, label=label)
    case 'hf' | 'parquet':
      return parquet.list_raw(dataset, root, image, label)
    case 'wds':
      return tars.list_raw(dataset, root, place, image, label)
  return layouts.list_folder(
    root, named.find(dataset).class_names, is_anyones=kind == 'folder'
  )


def folder_config(dataset: str) -> str:
  """Returns a name for the prepared copy of folder:PATH and its like, or ''."""
  kind, place, *columns = paths.dataset_source(dataset)
  folder = paths.dataset_folder(dataset)
  if folder is None and kind != 'hf':
    return ''
  path = buckets.shown(os.path.abspath(folder)) if folder else place
  if not folders.is_utf8(path):
    what = 'The path of the folder is not UTF-8.'
    raise errors.UserError(what, path, 'Rename it.')
  if kind == 'folder':
    whole = path
  else:
    files = place.removeprefix(paths.tars_folder(place)) * (kind == 'wds')
    whole = '\0'.join((kind, path, files, *columns))
  digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
  return f'{os.path.basename(path)}-{digest}'


def find_prepared(
  dataset: str, data_dir: pathlib.Path
) -> tfds.core.DatasetBuilder | None:
  """Returns the prepared dataset: of a local folder first, then of tfds."""
  root = data_dir / 'prepared'
  path = root / builders.prepared_name(dataset) / folder_config(dataset)
  remote.bring(root, path.relative_to(root).as_posix())
  path /= str(builders.Images.VERSION)
  if os.path.isfile(path / 'dataset_info.json'):
    return tfds.builder_from_directory(path)
  spec = named.find(dataset).tfds
  if not spec or _find_raw(dataset, data_dir):
    return None
  try:
    name, _ = naming.parse_builder_name_kwargs(spec)
  except ValueError as e:
    raise _refused_by_tfds(dataset, e) from e
  remote.bring(root, str(name))
  try:
    return read_only_builder.builder_from_files(spec, data_dir=root)
  except tfds.core.registered.DatasetNotFoundError:
    return None


def open_prepared(dataset: str, data_dir: pathlib.Path) -> Dataset | None:
  """Returns the dataset with all its classes, None if it is not prepared."""
  prepared = find_prepared(dataset, data_dir)
  return prepared and records_lib.open_dataset(dataset, prepared)


def _is_untouched(
  root: pathlib.Path, prepared: tfds.core.DatasetBuilder, seconds: float
) -> bool:
  """Returns whether nothing below `root` is seen to have changed.

  A million sizes take 10 s from a local disk, and minutes from a network's.
  """
  looks = _read_looks(prepared)
  if looks is None:
    return False
  deadline = time.monotonic() + seconds
  try:
    if any(
      os.stat(root / x).st_mtime_ns != looks.times[x] for x in looks.times
    ) or any(
      hashlib.sha256((root / x).read_bytes()).hexdigest() != looks.lists[x]
      for x in looks.lists
    ):
      return False
    names = list(looks.images)
    random.shuffle(names)
    for name in names:
      if folders.look(root / name) != looks.images[name]:
        return False
      if time.monotonic() > deadline:
        break
  except OSError:
    return False
  return True


def _is_made_of(prepared: tfds.core.DatasetBuilder, raw: builders.Raw) -> bool:
  """Returns whether paths, sizes and names of classes are what they were."""
  known = prepared.info.metadata or {}
  # Before that was noted, fewer lists were looked at for names.
  is_named = 'labels_from' not in known or (
    known.get('class_names') == list(raw.class_names)
  )
  return is_named and known.get('fingerprint') == raw.fingerprint


def _written_to(
  prepared: tfds.core.DatasetBuilder, raw: builders.Raw
) -> list[str]:
  """Returns the folders some of whose images were written to."""
  known = _read_looks(prepared)
  if known is None:
    return []
  return [
    name
    for name, look in raw.looks.images.items()
    if known.images.get(name, look) != look
  ]


def _is_edited(
  dataset: str, prepared: tfds.core.DatasetBuilder, raw: builders.Raw
) -> bool:
  """Returns whether an image that was written to is not what it was."""
  written = {pathlib.Path(raw.root, x) for x in _written_to(prepared, raw)}
  if not written:
    return False
  opened = records_lib.open_dataset(dataset, prepared)
  for split, records in (
    (builders.TRAIN, opened.train),
    (builders.EVAL, opened.eval),
  ):
    # A few images are held at a time: what they are read from may be large.
    images = (x for x in raw.images(split) if x.container in written)
    known: dict[tuple[str, str], int] = {}
    for image in images:
      if not known:
        labels = (records.classes[x] for x in records.labels)
        keys = zip(labels, records.names(), strict=True)
        known = {key: i for i, key in enumerate(keys)}
      i = known.get((image.wnid, image.file_name))
      if i is not None and image.read() != records.original(i):
        return True
  return False


def _read_looks(prepared: tfds.core.DatasetBuilder) -> builders.Looks | None:
  """Returns how the raw folder looked, None if that is not known."""
  noted = {}
  for file in _looks_files(prepared):
    with contextlib.suppress(OSError, ValueError, TypeError):
      looks = builders.Looks(**json.loads(file.read_text()))
      noted[file.stat().st_mtime_ns] = looks
  return noted[max(noted)] if noted else None


def _looks_files(
  prepared: tfds.core.DatasetBuilder,
) -> list[pathlib.Path]:
  """Returns where that is noted: beside the records, or else in the cache.

  Who may only read prepared data has none but the second.
  """
  directory = pathlib.Path(prepared.data_dir)
  name = files.digest_parts(str(directory.resolve()))[:16]
  found = [directory / _LOOKS]
  with contextlib.suppress(errors.UserError):  # Nobody knows a home.
    found.append(paths.cache_home() / 'looks' / f'{name}.json')
  return found


def _write_looks(
  prepared: tfds.core.DatasetBuilder, looks: builders.Looks
) -> bool:
  """Returns whether it could be noted how the raw folder looks."""
  for file in _looks_files(prepared):
    with contextlib.suppress(OSError):  # Prepared data may be read-only.
      files.write_json(file, looks._asdict())
      return True
  return False


def _note_unchanged(
  prepared: tfds.core.DatasetBuilder, raw: builders.Raw
) -> None:
  written = _written_to(prepared, raw)
  if not _write_looks(prepared, raw.looks) and written:
    raise errors.UserError(
      'The prepared copy is right, but that cannot be noted there.',
      str(prepared.data_dir),
      'Set $JAXPROG_CACHE_DIR to a folder that you may write to.',
    )


def _create_tfds_builder(
  dataset: str, data_dir: pathlib.Path
) -> tfds.core.DatasetBuilder:
  """Returns the builder that tfds ships under a name, not prepared."""
  spec = named.find(dataset).tfds
  if not spec:
    raise _missing(dataset, data_dir)
  try:
    return tfds.builder(
      spec, data_dir=data_dir / 'prepared', file_format='array_record'
    )
  except tfds.core.registered.DatasetNotFoundError as e:
    raise errors.UserError(
      f'tfds has no dataset {spec!r}.',
      f'dataset {dataset!r}',
      errors.did_you_mean(
        spec, tfds.list_builders(with_community_datasets=False)
      ),
    ) from e
  except Exception as e:  # Each builder raises what it likes.
    raise _refused_by_tfds(dataset, e) from e


def _refused_by_tfds(dataset: str, error: Exception) -> errors.UserError:
  """Returns what is wrong with a name, configuration or version."""
  # Without what tfds was called with.
  text = str(error).rpartition('}": ')[2] or type(error).__name__
  return errors.UserError(
    f'tfds refuses {dataset!r}: {textwrap.shorten(text, 200)}',
    'dataset of a stage',
    'Write tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:VERSION.',
  )


def _download_and_prepare(
  dataset: str, builder: tfds.core.DatasetBuilder, data_dir: pathlib.Path
) -> None:
  tfds.disable_progress_bar()
  shards.allow(shards.SORTED)  # Little data needs none of them.
  try:
    builder.download_and_prepare(
      download_dir=data_dir / 'downloads',
      download_config=shards.DownloadConfig(),
    )
  except AssertionError as e:
    if 'manual_dir' not in str(e) and 'Manual directory' not in str(e):
      raise
    raise _missing(dataset, data_dir) from e
  except OSError as e:
    if e.errno != errno.EMFILE:
      raise
    raise shards.too_many(shards.SORTED, str(builder.data_dir)) from e


def _check_source(
  dataset: str, builder: tfds.core.DatasetBuilder, data_dir: pathlib.Path
) -> None:
  """Raises UserError if what is to be put there or downloaded is not there.

  tfds itself tries ten times, for minutes.
  """
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    if not (data_dir / 'downloads' / 'manual').is_dir():
      raise _missing(dataset, data_dir)
    return
  for url in list(builder.url_infos or ())[:1]:
    request = urllib.request.Request(url, method='HEAD')
    try:
      urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
      pass  # It answers; tfds may ask for it otherwise.
    except OSError as e:
      missing = _missing(dataset, data_dir)
      raise errors.UserError(
        f'{missing.what} {url} cannot be reached.',
        missing.where,
        'Put it there, or run --mode=prepare where there is a network.',
      ) from e


def _advise(source: str, folder: pathlib.Path) -> str:
  """Returns what to do about a `folder` that is none."""
  if source == 'folder':
    return layouts.find_alike(folder) or _LIE_IN[source]
  if folder.is_file():
    return f'It is a file: name the folder {folder.parent}.'
  return _LIE_IN[source]


def _missing(dataset: str, data_dir: pathlib.Path) -> errors.UserError:
  source, _, rest = dataset.partition(':')
  raw = _raw_folders(dataset, data_dir)
  if found := next((x for x in raw if remote.holds(x)), None):
    return errors.UserError(
      f'{dataset!r} is not prepared.',
      f'its raw images are in {buckets.shown(found)}',
      'Prepare it, once, where there is room for both: --mode=prepare',
    )
  if source == 'hf':
    return errors.UserError(
      f'{dataset!r} is not here.',
      'looked in the cache of huggingface_hub',
      'Fetch and prepare it, once: --mode=prepare',
    )
  if source in _LIE_IN:
    place = str(raw[0]) if source != 'folder' else rest
    is_url = buckets.is_url(rest)
    return errors.UserError(
      f'There is no folder {place!r}.',
      f'dataset {dataset!r}' if is_url else f'looked in {pathlib.Path.cwd()}',
      _advise(source, raw[0]),
    )
  known = named.find(dataset)
  looked = list(map(buckets.shown, raw))
  if known.tfds or buckets.url_of(data_dir):
    looked.append(buckets.shown(data_dir / 'prepared'))
  advice = 'Put the unpacked folder there.'
  if known.manual:
    looked.append(buckets.shown(data_dir / 'downloads/manual' / known.manual))
  elif known.tfds:
    advice = 'Put it there, or download it with --mode=prepare.'
  return errors.UserError(
    f'The dataset {dataset!r} is missing.',
    f'looked for {", ".join(looked)}',
    layouts.find_misplaced(data_dir, known) or advice,
  )


def say_new(data_dir: pathlib.Path) -> None:
  """Says where data_dir lies; a mistyped one is made like any other."""
  if buckets.url_of(data_dir) is None:
    print(f'data_dir is new: {data_dir.absolute()}', file=sys.stderr)


@contextlib.contextmanager
def _writing(
  root: pathlib.Path,
  advice: str = 'Set config.data_dir to a folder of your own, with links to '
  'raw folders that you may only read.',
) -> Iterator[bool]:
  """Lets one process at a time write below `root`; False: no locks there.

  Raises:
    UserError: if one may not write there, with `advice`, or the disk is full.
  """
  is_new = not root.parent.is_dir()
  try:
    root.mkdir(parents=True, exist_ok=True)
    file = open(root / '.lock', 'w')  # noqa: SIM115
  except OSError as e:
    raise errors.UserError(
      f'Cannot write prepared data: {e.strerror}.',
      str(root),
      advice,
    ) from e
  try:
    with file:
      if is_new:
        say_new(root.parent)
      yield files.lock(file.fileno())
  except Exception as e:  # ArrayRecord's writer raises no OSError.
    full = next((x for x in _FULL if x in str(e)), None)
    if full is None or isinstance(e, errors.UserError):
      raise
    raise errors.UserError(
      f'Cannot write prepared data: {full}.',
      str(root),
      'Make room there, or set config.data_dir to where there is some.',
    ) from e


def _remove_leftovers(
  folder: pathlib.Path, but: pathlib.Path | None = None
) -> None:
  """Removes what interrupted preparations and removals left in `folder`."""
  for leftover in folder.glob('incomplete.*'):
    if leftover != but:
      shutil.rmtree(leftover)


def _identify(raw: builders.Raw) -> str:
  """Returns what is another for any other images, or others written to."""
  looks = json.dumps(raw.looks, sort_keys=True)
  return files.digest_parts(raw.fingerprint, looks)[:16]


def store(
  dataset: Dataset, storage: Storage, *, progress: parts.Progress | None = None
) -> Dataset:
  """Returns `dataset` with its training images stored for speed.

  They are written at the first call, beside the prepared dataset. Evaluation
  goes on reading the originals.
  """
  records = dataset.train
  if storage.kind == 'original' or records.pack is not None:
    return dataset
  path = _pack_path(records, storage)
  # Before it is locked: one may not be allowed to write there.
  pack = find_pack(records, storage)
  if pack is None:
    advice = "Let who may write there prepare it, or set storage='original'."
    with _writing(path.parent, advice) as is_locked:
      pack = find_pack(records, storage)
      if pack is None:
        remote.remove(path)
        if is_locked:
          _remove_leftovers(path.parent)
        records.source.fetch()
        packs.write_pack(
          path,
          records.at,
          len(records.source),
          storage,
          fingerprint=records.fingerprint,
          progress=progress,
        )
        pack = find_pack(records, storage)
  packed = dataclasses.replace(records, pack=pack)
  return dataclasses.replace(dataset, train=packed)


def find_pack(records: Records, storage: Storage) -> packs.Pack | None:
  """Returns what `store` has made of `records`, None if it has not."""
  return packs.open_pack(_pack_path(records, storage), records.fingerprint)


def _pack_path(records: Records, storage: Storage) -> pathlib.Path:
  name = '.'.join(str(x) for x in storage if x)  # raw, raw.256, jpeg.512.90.
  packed = records.directory.parent / 'packed'
  return packed / f'{records.directory.name}+{name}'


def list_packs(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the packs that `store` has made of a prepared dataset."""
  return sorted((directory.parent / 'packed').glob(f'{directory.name}+*'))

"""What stands in the way of a run, found before anything is paid for."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import shutil
import socket
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
from packaging import requirements, specifiers

from jaxprog import config as config_lib
from jaxprog import errors, files, formats, named, paths
from jaxprog import stages as stages_lib
from jaxprog.data import builders, folders, preparation, signatures
from jaxprog.data.records import Dataset
from jaxprog.monitoring import history as history_lib
from jaxprog.optim import optimizers
from jaxprog.reliability import checkpoints, integrity, lock
from jaxprog.training import devices
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib

# Where requirements.txt and pyproject.toml lie in a checkout.
_ROOT = pathlib.Path(__file__).parents[2]
# TensorBoard's files, plots and reports of one run, in bytes.
_REPORTS = 20_000_000
# Beside the numbers a checkpoint holds their names and shapes; and file
# systems round up.
_OVERHEAD = 1.05
# Of a stage that no dataset is known for, to size its head.
_CLASSES = 1000


class Finding(NamedTuple):
  """One thing that was looked at."""

  # True: in order, None: a warning, False: the run would fail.
  ok: bool | None
  what: str
  # The command or the change that mends it, '' if none is known.
  fix: str = ''


class Size(NamedTuple):
  """What one checkpoint of a stage takes, in bytes."""

  stage: str
  state: int
  variables: int
  # How many of the variables there are at most: final, and best and averages
  # twice, because two states speak of them.
  copies: int


class _Data(NamedTuple):
  """What there is of a stage's dataset; nothing: it is missing or wrong."""

  dataset: Dataset | None = None
  raw: builders.Raw | None = None


def inspect(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike[str] | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: setup_lib.ModelFn | None = None,
  allow_config_change: bool = False,
) -> list[Finding]:
  """Returns all that is in order or in the way of training `config`.

  No problem hides another: what can still be looked at is. Nothing is
  prepared, written or compiled. What `ladder.train` refuses is asked of the
  functions that it asks.
  """
  chosen, found = _check_config(config, only, skip)
  found += _gather(_check_versions())
  found += _gather(_check_devices(config.platform))
  found += _gather(_check_cache(config))
  found += _gather(_check_batches(config, chosen))
  found += _gather(_check_network(config, model))
  looked = [_look(config, stage) for stage in chosen]
  found += [finding for _, finding in looked]
  data = {stage.name: x for stage, (x, _) in zip(chosen, looked, strict=True)}
  found += _gather(_check_left_out(chosen, data))
  found += _gather(_check_packs(chosen, data))
  found += _gather(_check_leaks(config, chosen))
  if workdir:
    path = pathlib.Path(workdir)
    found += _gather(_check_workdir(path))
    found += _gather(_check_run(config, path, allow_config_change))
    found += _gather(_check_checkpoints(path))
  found += _gather(_check_disk(config, workdir, chosen, data, model))
  return found


def summary(findings: Iterable[Finding]) -> str:
  """Returns how many there are of each kind, in one sentence."""
  counts = [[x.ok for x in findings].count(ok) for ok in (True, None, False)]
  words = (
    f'{counts[0]} in order',
    f'{counts[1]} warning{"s" * (counts[1] != 1)}',
    f'{counts[2]} to mend',
  )
  return f'{", ".join(words)}.'


def launch(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> None:
  """Raises UserError for what would fail hours later, at no cost.

  That is a workdir that cannot be written to, or is another run's, and a
  dataset that is missing.
  """
  chosen = stages_lib.select(stages_lib.create_stages(config), only, skip)
  devices.check_platform(config.platform)
  data_dir = _data_dir(config)
  for stage in chosen:
    if preparation.is_here(stage.dataset, data_dir):
      continue
    try:
      preparation.check_dataset(stage.dataset, data_dir)
    except errors.UserError as e:
      where = f'stage {stage.name!r}: {e.where}'
      fix = _mend(stage.dataset, e.suggestion)
      raise errors.UserError(e.what, where, fix) from None
  claim_workdir(pathlib.Path(workdir))


def claim_workdir(workdir: pathlib.Path) -> None:
  """Raises UserError if no run can begin or go on in `workdir`."""
  if '[' in os.path.realpath(workdir):
    raise errors.UserError(
      'Checkpoints cannot be saved below a folder with [ in its name.',
      f'--workdir={workdir}',
      'orbax takes it for a pattern: choose another --workdir.',
    )
  if jax.process_index() == 0:  # It takes the lock: it knows its host's dead.
    lock.check_free(workdir)
  check_workdir(workdir)


def _data_dir(config: config_dict.ConfigDict) -> pathlib.Path:
  refuse_bucket(config.data_dir, 'config.data_dir')
  return paths.data_dir(config)


def refuse_bucket(path: str | os.PathLike[str], where: str) -> None:
  """Raises UserError for gs://BUCKET and its like.

  Records are read by position, and a save ends with a rename under a lock:
  that needs a file system.
  """
  found = re.match(r'([a-z][a-z0-9]+):/+([^/]*)', str(path))
  if found:
    scheme, bucket = found.groups()
    raise errors.UserError(
      f'{scheme}://{bucket} is no folder.',
      f'{where}={path}',
      f'Mount it: gcsfuse --implicit-dirs {bucket} /mnt/{bucket}, then name '
      f'/mnt/{bucket}.',
    )


def quick(
  tasks: Sequence[setup_lib.Task], workdir: str | os.PathLike[str]
) -> list[str]:
  """Returns lines on devices, disk and what `workdir` holds already.

  Raises:
    UserError: if the disk is too small for what the run will write.
  """
  path = pathlib.Path(workdir)
  sizes = [
    _size(task.stage, task.state_shapes, task.state_shapes.variables)
    for task in tasks
  ]
  need, free = bytes_to_write(path, sizes), _free(path)
  if need > free:
    raise errors.UserError(
      f'The run needs {formats.size(need)} of disk; {formats.size(free)} are '
      'free.',
      f'--workdir={workdir}',
      'Free some, or name a --workdir on a larger disk.',
    )
  return [
    f'devices: {_describe_devices()}',
    f'disk: {formats.size(need)} to be written, {formats.size(free)} free',
    *(f'run: {line}' for line in _describe_run(path)),
  ]


def check_workdir(workdir: pathlib.Path) -> None:
  """Raises UserError if a file cannot be written to `workdir` and renamed.

  Leaves nothing behind, not even folders.
  """
  refuse_bucket(workdir, '--workdir')
  probe = workdir / f'.probe.{socket.gethostname()}.{os.getpid()}'
  try:
    with files.folder(workdir):
      files.write_bytes(probe, b'probe')
      probe.unlink()
  except OSError as e:
    raise errors.UserError(
      f'Cannot write to the workdir: {e.strerror}.',
      f'--workdir={workdir}',
      'Name a directory that you may write to.',
    ) from None


def bytes_to_write(workdir: pathlib.Path | None, sizes: Iterable[Size]) -> int:
  """Returns how much the stages still write, at most, in bytes.

  All that they save stays until they are done: two states, the weights that
  either speaks of, and the final ones. What replaces an old checkpoint is there
  beside it for a while.
  """
  total = replaced = 0
  for size in sizes:
    if workdir and checkpoints.is_done(workdir, size.stage):
      continue
    there = _folder_bytes(workdir, size.stage) if workdir else 0
    total += max(0, 2 * size.state + size.copies * size.variables - there)
    beside = size.state + size.copies // 2 * size.variables
    replaced = max(replaced, beside)
  if not replaced:
    return 0
  return int(_OVERHEAD * (total + replaced)) + _REPORTS


def saved_configs(
  config: config_dict.ConfigDict, workdir: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]] | None:
  """Returns what config.differences and difference_table take.

  None where no run of `workdir` has begun.
  """
  path = pathlib.Path(workdir)
  history, before = path / 'training_history.json', path / 'config.json'
  if not history.is_file() or not before.is_file():
    return None
  started = history_lib.load_history(history)['stages']
  return (
    config_lib.to_json(config_lib.load_config(str(before))),
    config_lib.to_json(stages_lib.complete(config)),
    tuple(stage['name'] for stage in started),
  )


def check_changes(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike[str],
  allow_config_change: bool,
) -> list[str]:
  """Returns what of `config` changes the meaning of the run in `workdir`.

  Raises:
    UserError: if there is any such change, and it is not allowed.
  """
  saved = saved_configs(config, workdir)
  changes = config_lib.differences(*saved) if saved else []
  if changes and not allow_config_change:
    more = f' and {len(changes) - 3} more' if len(changes) > 3 else ''
    raise errors.UserError(
      f'The run in {workdir} began with another config.',
      '; '.join(changes[:3]) + more,
      'Use another --workdir, or --allow_config_change to go on anyway.',
    )
  return changes


def prepare_command() -> str:
  """Returns what prepares the data of this very call, to be pasted."""
  script = sys.argv[0]
  if pathlib.PurePath(script).name != 'main.py':
    return 'jaxprog.prepare(config)'
  words, kept = iter(sys.argv[1:]), []
  for word in words:
    flag, equals, value = word.lstrip('-').partition('=')
    if flag.partition('.')[0] in ('config', 'only', 'skip', 'workdir'):
      kept.append((flag, value if equals else next(words, '')))
  # Without --config, the one in the workdir serves.
  if any(flag == 'config' for flag, _ in kept):
    kept = [(flag, value) for flag, value in kept if flag != 'workdir']
  flags = [f'--{flag}={value}' for flag, value in kept]
  return shlex.join(['python', script, *flags, '--mode=prepare'])


def _gather(check: Iterator[Finding]) -> list[Finding]:
  """Returns what `check` yields; what it raises becomes a cross."""
  found = []
  try:
    for finding in check:
      found.append(finding)
  except errors.UserError as e:
    found.append(crossed(e))
  except (OSError, ValueError, RuntimeError) as e:
    message = ' '.join(str(e).split())
    found.append(Finding(False, f'{type(e).__name__}: {message}'))
  return found


def crossed(e: errors.UserError) -> Finding:
  """Returns a mistake as something to mend."""
  where = f' ({e.where})' if e.where else ''
  return Finding(False, f'{e.what.removesuffix(".")}{where}', e.suggestion)


def _check_config(
  config: config_dict.ConfigDict, only: Sequence[str], skip: Sequence[str]
) -> tuple[tuple[stages_lib.Stage, ...], list[Finding]]:
  """Returns the chosen stages, none if the config is wrong."""
  try:
    known = stages_lib.create_stages(config)
    chosen = stages_lib.select(known, only, skip)
  except errors.UserError as e:
    return (), [crossed(e)]
  names = ', '.join(stage.name for stage in chosen)
  left_out = len(known) - len(chosen)
  more = f'; {left_out} left out' if left_out else ''
  return chosen, [Finding(True, f'config: {names}{more}')]


def _check_versions(root: pathlib.Path = _ROOT) -> Iterator[Finding]:
  """Yields what is missing or of a version that was not tried."""
  python, packages = _read_requirements(root)
  found = platform.python_version()
  wrong = 0
  if not specifiers.SpecifierSet(python).contains(found, prereleases=True):
    yield Finding(None, f'Python {found} is not {python}')
  for package in packages:
    try:
      version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
      wrong += 1
      fix = shlex.join(['pip', 'install', f'{package.name}{package.specifier}'])
      yield Finding(False, f'{package.name} is not installed', fix)
      continue
    if not package.specifier.contains(version, prereleases=True):
      wrong += 1
      what = f'{package.name} {version} is not {package.specifier}'
      fix = shlex.join(['pip', 'install', f'{package.name}{package.specifier}'])
      yield Finding(None, what, fix)
  if not wrong:
    what = f'Python {found}, {len(packages)} packages within their bounds'
    yield Finding(True, what)


def _read_requirements(
  root: pathlib.Path,
) -> tuple[str, list[requirements.Requirement]]:
  """Returns the bounds on Python and on the packages that apply here."""
  try:
    project = tomllib.loads((root / 'pyproject.toml').read_text())['project']
    python = project['requires-python']
    lines = (root / 'requirements.txt').read_text().splitlines()
  except OSError:  # Installed, not a checkout.
    python = importlib.metadata.metadata('jaxprog')['Requires-Python']
    lines = importlib.metadata.requires('jaxprog') or []
  packages = [
    requirements.Requirement(line)
    for line in lines
    if line.strip() and not line.startswith('#')
  ]
  return python, [
    x for x in packages if not x.marker or x.marker.evaluate({'extra': ''})
  ]


def _check_devices(wanted: str) -> Iterator[Finding]:
  try:
    jax.devices()
  except RuntimeError as e:
    message = ' '.join(str(e).split())
    yield Finding(
      False,
      f'JAX finds no devices: {message}',
      'Set JAX_PLATFORMS to what this machine has, or unset it.',
    )
    return
  devices.check_platform(wanted)
  asked = '' if wanted == 'any' else ', as asked'
  yield Finding(True, f'devices: {_describe_devices()}{asked}')


def _has_devices() -> bool:
  try:
    return bool(jax.devices())
  except RuntimeError:
    return False


def _describe_devices() -> str:
  """Returns number, kind, platform and, where it is known, memory."""
  first = jax.local_devices()[0]
  text = f'{jax.device_count()} x {first.device_kind}'
  if first.device_kind.lower() != first.platform:
    text += f' ({first.platform})'
  memory = None
  # Not every backend counts.
  with contextlib.suppress(RuntimeError, NotImplementedError):
    memory = (first.memory_stats() or {}).get('bytes_limit')
  return text + (f', {formats.size(memory)} each' if memory else '')


def _check_cache(config: config_dict.ConfigDict) -> Iterator[Finding]:
  directory = paths.cache_dir(config)
  devices.keep_compiled(directory)
  if directory:
    what = f'compiled steps: kept in {directory}, closed to others'
    yield Finding(True, what)


def _check_batches(
  config: config_dict.ConfigDict, chosen: Sequence[stages_lib.Stage]
) -> Iterator[Finding]:
  if not chosen or not _has_devices():
    return
  count, wrong = jax.device_count(), 0
  try:
    stages_lib.check_batch_norm(config, count)
  except errors.UserError as e:
    yield crossed(e)
  for stage in chosen:
    try:
      stages_lib.check_devices([stage], count)
    except errors.UserError as e:
      wrong += 1
      yield crossed(e)
  if not wrong:
    among = f'{count} device{"s" * (count > 1)}'
    yield Finding(True, f'batch sizes: divide among {among}')


def _check_network(
  config: config_dict.ConfigDict, model: setup_lib.ModelFn | None
) -> Iterator[Finding]:
  if model is not None:
    setup_lib.check_own_network(config)
    yield Finding(True, 'network: your own')


def _look(
  config: config_dict.ConfigDict, stage: stages_lib.Stage
) -> tuple[_Data, Finding]:
  """Returns what there is of a stage's dataset, and what is wrong with it."""
  where = f'stage {stage.name!r}'
  try:
    data_dir = _data_dir(config)
    if preparation.check_dataset(stage.dataset, data_dir) == 'raw':
      return _look_at_raw(data_dir, stage, where)
    dataset = setup_lib.load_dataset(data_dir, stage)
  except errors.UserError as e:
    fix = _mend(stage.dataset, e.suggestion)
    named = e.where.removeprefix(where).removeprefix(', ')
    what = f'{where}: {e.what}'.removesuffix('.')
    return _Data(), Finding(False, f'{what} ({named})', fix)
  except OSError as e:
    return _Data(), Finding(False, f'{where}: {stage.dataset}: {e}')
  what = (
    f'{where}: {stage.dataset} is prepared, {dataset.num_classes} classes, '
    f'{len(dataset.train):,} + {len(dataset.eval):,} images'
  )
  return _Data(dataset=dataset), Finding(True, what)


def _look_at_raw(
  data_dir: pathlib.Path, stage: stages_lib.Stage, where: str
) -> tuple[_Data, Finding]:
  raw = preparation.list_raw(stage.dataset, data_dir)
  assert raw is not None  # check_dataset has found it.
  known = set(raw.classes)
  unknown = [x for x in stage.classes if x not in known]
  if unknown:
    near = errors.did_you_mean(unknown[0], raw.classes)
    what = f'{where}: {stage.dataset} has no class {unknown[0]!r}'
    return _Data(raw=raw), Finding(False, what, near)
  count = len(stage.classes or raw.classes)
  if stage.num_classes not in (0, count):
    what = (
      f'{where}: num_classes is {stage.num_classes}, but {stage.dataset!r} '
      f'has {count} classes ({raw.root})'
    )
    fix = 'Is the folder complete? If so, set num_classes to what it has.'
    return _Data(raw=raw), Finding(False, what, fix)
  what = (
    f'{where}: {stage.dataset} is raw, {count} classes; {raw.num_images:,} '
    'images will be prepared first'
  )
  return _Data(raw=raw), Finding(None, what, prepare_command())


def _check_left_out(
  chosen: Sequence[stages_lib.Stage], data: Mapping[str, _Data]
) -> Iterator[Finding]:
  left_out = {}
  for stage in chosen:
    found = data[stage.name]
    if found.dataset:
      left_out[stage.dataset] = found.dataset.left_out
    elif found.raw:
      left_out[stage.dataset] = folders.describe(found.raw.left_out)
  for dataset, what in left_out.items():
    if what:
      yield Finding(None, errors.printable(f'{dataset}: left out: {what}'))


def _mend(dataset: str, suggestion: str) -> str:
  """Returns a dataset's suggestion with the command that it speaks of."""
  missing = suggestion.startswith('Put ')
  if missing and named.find(dataset).archive:
    return f'{prepare_command()} --download'
  if '--mode=prepare' in suggestion:
    return prepare_command()
  if missing:
    return f'{suggestion.removesuffix(".")}, then: {prepare_command()}'
  return suggestion


def _check_packs(
  chosen: Sequence[stages_lib.Stage], data: Mapping[str, _Data]
) -> Iterator[Finding]:
  for stage in chosen:
    dataset, raw = data[stage.name]
    if stage.stored.kind == 'original' or not (dataset or raw):
      continue
    where = f'stage {stage.name!r}'
    if dataset and preparation.find_pack(dataset.train.records, stage.stored):
      yield Finding(True, f'{where}: images are stored as {stage.storage}')
    else:
      what = f'{where}: images will be stored as {stage.storage} first'
      yield Finding(None, what, prepare_command())


def _check_leaks(
  config: config_dict.ConfigDict, chosen: Sequence[stages_lib.Stage]
) -> Iterator[Finding]:
  if not config.exclude_leaks or not chosen:
    return
  if leaks_are_known(config):
    yield Finding(True, 'leaks: looked for before, left out')
  else:
    what = 'leaks: every image will be compared first'
    yield Finding(None, what, prepare_command())


def leaks_are_known(config: config_dict.ConfigDict) -> bool:
  """Returns whether all images that are here were described before.

  Those of every stage: a stage leaves out what any other is evaluated on.
  """
  data_dir = paths.data_dir(config)
  for dataset in {x.dataset for x in stages_lib.create_stages(config)}:
    opened = preparation.open_prepared(dataset, data_dir)
    if opened is None:
      if preparation.is_here(dataset, data_dir):
        return False
      continue
    for split in (opened.train, opened.eval):
      if not signatures.is_kept(split.records):
        return False
  return True


def _check_workdir(workdir: pathlib.Path) -> Iterator[Finding]:
  claim_workdir(workdir)
  yield Finding(True, f'workdir: {workdir} can be written to')


def _check_run(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  allow_config_change: bool,
) -> Iterator[Finding]:
  for line in _describe_run(workdir):
    yield Finding(True, f'run: {line}')
  for marker in sorted(workdir.glob('checkpoints/*/done.json')):
    name = marker.parent.name
    if not checkpoints.is_done(workdir, name):
      yield Finding(
        None,
        f'run: {name}/done.json is damaged: the stage is finished again from '
        'its last save',
      )
  changes = check_changes(config, workdir, allow_config_change)
  if changes:
    what = f'run: goes on with another config: {"; ".join(changes)}'
    yield Finding(None, what)


def _check_checkpoints(workdir: pathlib.Path) -> Iterator[Finding]:
  """Yields what `checkpoints.verify_all` would find damaged."""
  findings = checkpoints.check_workdir(workdir)
  for found in findings:
    if found.status == 'damaged' and found.step >= 0:
      what = f'{found.stage}/{found.name}: step {found.step} is damaged'
      yield Finding(None, f'run: {what} ({found.detail})')
  for stage in checkpoints.find_lost(workdir, findings):
    yield Finding(False, f'run: {checkpoints.lost_error(stage)}')


def _describe_run(workdir: pathlib.Path) -> list[str]:
  """Returns a line on the stages that are done or interrupted, or none."""
  path = workdir / 'training_history.json'
  if not path.is_file():
    return []
  parts = []
  for stage in history_lib.load_history(path)['stages']:
    name = stage['name']
    latest = checkpoints.stage_directory(workdir, name) / 'latest'
    saved = integrity.list_finished(latest)
    if checkpoints.is_done(workdir, name):
      parts.append(f'{name} done')
    elif saved:
      parts.append(f'{name} interrupted, saved at step {max(saved)}')
    else:
      parts.append(f'{name} begun, nothing saved')
  return [', '.join(parts)] if parts else []


def _check_disk(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike[str] | None,
  chosen: Sequence[stages_lib.Stage],
  data: Mapping[str, _Data],
  model: setup_lib.ModelFn | None,
) -> Iterator[Finding]:
  """Yields a finding for each file system that the run writes to."""
  if not chosen or not _has_devices():
    return
  path = pathlib.Path(workdir) if workdir else None
  run = bytes_to_write(path, _estimate_sizes(config, chosen, data, model))
  raw = {x.raw.root: x.raw for x in data.values() if x.raw}
  prepared = int(_OVERHEAD * sum(map(_raw_bytes, raw.values())))
  data_dir = paths.data_dir(config)
  if raw and not os.access(_nearest(data_dir / 'prepared'), os.W_OK):
    fix = 'Set config.data_dir to a folder that you may write to.'
    yield Finding(False, f'data: {data_dir} cannot be written to', fix)
  needs = [(data_dir, 'prepared data', prepared)]
  if path is None:
    yield Finding(
      True, f'disk: a run will write {formats.size(run)} of results'
    )
  else:
    needs.append((path, 'results', run))
  by_disk: dict[int, list[tuple[pathlib.Path, str, int]]] = {}
  for need in needs:
    if need[2]:
      by_disk.setdefault(_nearest(need[0]).stat().st_dev, []).append(need)
  for on_disk in by_disk.values():
    yield _compare_disk(on_disk)


def _compare_disk(needs: Sequence[tuple[pathlib.Path, str, int]]) -> Finding:
  where = needs[-1][0]
  total, free = sum(need for _, _, need in needs), _free(where)
  parts = ' and '.join(f'{formats.size(x)} of {what}' for _, what, x in needs)
  return Finding(
    total <= free,
    f'disk: {parts} to be written, {formats.size(free)} free at {where}',
    '' if total <= free else 'Free some, or name a folder on a larger disk.',
  )


def _estimate_sizes(
  config: config_dict.ConfigDict,
  chosen: Sequence[stages_lib.Stage],
  data: Mapping[str, _Data],
  model_fn: setup_lib.ModelFn | None,
) -> list[Size]:
  """Returns what checkpoints take; stages count as if all had all classes.

  So the network is traced once, which takes a second.
  """

  def count(stage: stages_lib.Stage) -> int:
    dataset, raw = data[stage.name]
    classes = dataset.classes if dataset else raw.classes if raw else ()
    return len(classes) or stage.num_classes or _CLASSES

  size = chosen[0].image_size if model_fn else 32
  model = (model_fn or setup_lib.create_model_fn(config))(
    num_classes=max(map(count, chosen)), image_size=size, dtype=jnp.float32
  )
  rng = jax.random.key(0)
  variables = jax.eval_shape(
    lambda rng: state_lib.init_variables(model, size, rng), rng
  )

  def create_state(stage: stages_lib.Stage) -> Any:
    tx = optimizers.create_optimizer(stage)
    ema = stage.ema_decay > 0
    return jax.eval_shape(
      lambda x: state_lib.create_state(x, tx, ema=ema), variables
    )

  return [_size(stage, create_state(stage), variables) for stage in chosen]


def _size(stage: stages_lib.Stage, state: Any, variables: Any) -> Size:
  copies = 5 if stage.ema_decay else 3
  return Size(stage.name, _count_bytes(state), _count_bytes(variables), copies)


def _count_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _raw_bytes(raw: builders.Raw) -> int:
  return sum(
    len(image.data)
    if isinstance(image.data, bytes)
    else image.data.stat().st_size
    for split in (builders.TRAIN, builders.EVAL)
    for image in raw.images(split)
  )


def _folder_bytes(workdir: pathlib.Path, stage: str) -> int:
  """Returns the size of what a stage has saved, less what is in quarantine."""
  total = 0
  for name in ('latest', 'best', 'final', 'ema'):
    folder = checkpoints.stage_directory(workdir, stage) / name
    for path in folder.rglob('*'):
      with contextlib.suppress(OSError):  # Removed meanwhile.
        total += path.lstat().st_size if path.is_file() else 0
  return total


def _free(path: pathlib.Path) -> int:
  return shutil.disk_usage(_nearest(path)).free


def _nearest(path: pathlib.Path) -> pathlib.Path:
  """Returns the nearest folder that exists."""
  path = path.absolute()
  return next(x for x in (path, *path.parents) if x.is_dir())

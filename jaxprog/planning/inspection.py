"""What stands in the way of a run, found before anything is paid for."""

import dataclasses
import functools
import importlib.metadata
import itertools
import os
import pathlib
import platform
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
from packaging import requirements, specifiers

from jaxprog import buckets, errors, formats, named, paths
from jaxprog import stages as stages_lib
from jaxprog.data import (
  builders,
  folders,
  packs,
  preparation,
  records,
  signatures,
)
from jaxprog.monitoring import loggers
from jaxprog.optim import optimizers
from jaxprog.reliability import checkpoints, integrity, lease
from jaxprog.training import devices, preflight
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib

# Where requirements.txt and pyproject.toml lie in a checkout.
_ROOT = pathlib.Path(__file__).parents[2]
# Extras whose packages the program imports: wrong ones count, missing ones not.
_EXTRAS = ('gcs', 'mlflow', 's3', 'tensorflow', 'trackio', 'tune', 'wandb')
_Packages = list[requirements.Requirement]
# Of a stage that no dataset is known for, to size its head.
_CLASSES = 1000


class Finding(NamedTuple):
  """One thing that was looked at."""

  # True: in order, None: a warning, False: the run would fail.
  ok: bool | None
  what: str
  # The command or the change that mends it, '' if none is known.
  fix: str = ''
  # Whether all that is wrong is that data is not here whose numbers are known.
  is_absent: bool = False


class Data(NamedTuple):
  """What there is of a stage's dataset; nothing: it is missing or wrong."""

  dataset: records.Dataset | None = None
  raw: builders.Raw | None = None

  @property
  def classes(self) -> tuple[str, ...]:
    """Names of all that there are, none if nothing is there."""
    found = self.dataset or self.raw
    return tuple(found.classes) if found else ()


@dataclasses.dataclass
class Inspection:
  """What was looked at, for whom, and what there was."""

  config: config_dict.ConfigDict
  workdir: pathlib.Path | None
  only: Sequence[str]
  skip: Sequence[str]
  model: setup_lib.ModelFn | None
  allow_config_change: bool
  findings: list[Finding] = dataclasses.field(default_factory=list)
  # None of them if the config is wrong.
  chosen: tuple[stages_lib.Stage, ...] = ()
  has_devices: bool = False
  # By stage.
  data: dict[str, Data] = dataclasses.field(default_factory=dict)
  # What was found of the checkpoints in the workdir.
  checkpoints: list[integrity.Condition] = dataclasses.field(
    default_factory=list
  )

  def is_stored(self, stage: stages_lib.Stage) -> bool:
    """Returns whether a stage's training images lie there as it reads them."""
    return self._find_pack(stage) is not None

  def _find_pack(self, stage: stages_lib.Stage) -> packs.Pack | None:
    dataset = self.data[stage.name].dataset
    if dataset is None or stage.stored.kind == 'original':
      return None
    return preparation.find_pack(dataset.train, stage.stored)

  def list_images(self) -> set[str]:
    """Returns the files of images that the chosen stages read."""
    found: set[str] = set()
    for stage in self.chosen:
      if dataset := self.data[stage.name].dataset:
        found.update(dataset.eval.source.paths)
        pack = self._find_pack(stage)
        if pack is None or stage.holdout_part:
          found.update(dataset.train.source.paths)
        found.update(pack.paths if pack else ())
    return found


def inspect(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike[str] | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
  model: setup_lib.ModelFn | None = None,
  allow_config_change: bool = False,
) -> Inspection:
  """Returns all that is in order or in the way of training `config`.

  No problem hides another: what can still be looked at is. Nothing is prepared
  or compiled, and nothing stays that is written: whether a folder or a bucket
  can be written to is tried. What `ladder.train` refuses is asked of the
  functions that it asks.
  """
  path = pathlib.Path(workdir) if workdir else None
  seen = Inspection(config, path, only, skip, model, allow_config_change)
  for check in _CHECKS:
    try:
      for finding in check(seen):
        seen.findings.append(finding)
    except errors.UserError as e:
      seen.findings.append(crossed(e))
    except (OSError, ValueError, RuntimeError) as e:
      message = ' '.join(str(e).split())
      seen.findings.append(Finding(False, f'{type(e).__name__}: {message}'))
  return seen


def summary(findings: Iterable[Finding]) -> str:
  """Returns how many there are of each kind, in one sentence."""
  counts = [[x.ok for x in findings].count(ok) for ok in (True, None, False)]
  words = (
    f'{counts[0]} in order',
    f'{counts[1]} warning{"s" * (counts[1] != 1)}',
    f'{counts[2]} to mend',
  )
  return f'{", ".join(words)}.'


def crossed(e: errors.UserError) -> Finding:
  """Returns a mistake as something to mend."""
  where = f' ({e.where})' if e.where else ''
  return Finding(False, f'{e.what.removesuffix(".")}{where}', e.suggestion)


def _check_config(seen: Inspection) -> Iterator[Finding]:
  known = stages_lib.create_stages(seen.config)
  seen.chosen = stages_lib.select(known, seen.only, seen.skip)
  names = ', '.join(stage.name for stage in seen.chosen)
  left_out = len(known) - len(seen.chosen)
  more = f'; {left_out} left out' if left_out else ''
  yield Finding(True, f'config: {names}{more}')
  loggers.chosen(seen.config)


def _check_versions(
  seen: Inspection | None = None, root: pathlib.Path = _ROOT
) -> Iterator[Finding]:
  """Yields what is missing or of a version that was not tried."""
  del seen
  python, needed, extra = _read_requirements(root)
  version = platform.python_version()
  wrong = []
  if not specifiers.SpecifierSet(python).contains(version, prereleases=True):
    wrong.append(Finding(None, f'Python {version} is not {python}'))
  for package in [*needed, *extra]:
    name, bounds = package.name, package.specifier
    fix = shlex.join(['pip', 'install', f'{name}{bounds}'])
    try:
      found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      if package in needed:
        wrong.append(Finding(False, f'{name} is not installed', fix))
      continue
    if not bounds.contains(found, prereleases=True):
      wrong.append(Finding(None, f'{name} {found} is not {bounds}', fix))
  what = f'Python {version}, {len(needed)} packages within their bounds'
  yield from wrong or [Finding(True, what)]


def _read_requirements(root: pathlib.Path) -> tuple[str, _Packages, _Packages]:
  """Returns the bounds on Python, on all packages and on those of extras."""
  try:
    project = tomllib.loads((root / 'pyproject.toml').read_text())['project']
    python = project['requires-python']
    lines = project.get('optional-dependencies', {})
    lines[''] = (root / 'requirements.txt').read_text().splitlines()
  except OSError:  # Installed, not a checkout.
    python = importlib.metadata.metadata('jaxprog')['Requires-Python']
    found = importlib.metadata.requires('jaxprog') or []
    lines = dict.fromkeys(('', *_EXTRAS), found)

  def parse(extra):
    packages = [
      requirements.Requirement(line)
      for line in lines.get(extra, ())
      if line.strip() and not line.startswith('#')
    ]
    return [
      x for x in packages if not x.marker or x.marker.evaluate({'extra': extra})
    ]

  needed, more = parse(''), itertools.chain(*map(parse, _EXTRAS))
  return python, needed, [x for x in more if x not in needed]


def _check_devices(seen: Inspection) -> Iterator[Finding]:
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
  seen.has_devices = True
  devices.check_platform(seen.config.platform)
  asked = '' if seen.config.platform == 'any' else ', as asked'
  yield Finding(True, f'devices: {devices.describe()}{asked}')


def _check_cache(seen: Inspection) -> Iterator[Finding]:
  directory = paths.cache_dir(seen.config)
  devices.keep_compiled(directory)
  if directory:
    what = f'compiled steps: kept in {directory}, closed to others'
    yield Finding(True, what)


def _check_batches(seen: Inspection) -> Iterator[Finding]:
  if not seen.chosen or not seen.has_devices:
    return
  count, wrong = jax.device_count(), []
  try:
    stages_lib.check_batch_norm(seen.config, count)
  except errors.UserError as e:
    yield crossed(e)
  for stage in seen.chosen:
    try:
      stages_lib.check_devices([stage], count)
    except errors.UserError as e:
      wrong.append(crossed(e))
  what = f'batch sizes: divide among {count} device{"s" * (count > 1)}'
  yield from wrong or [Finding(True, what)]


def _check_network(seen: Inspection) -> Iterator[Finding]:
  if seen.model is not None:
    setup_lib.check_own_network(seen.config)
    yield Finding(True, 'network: your own')


def _check_datasets(seen: Inspection) -> Iterator[Finding]:
  """Yields what there is of each dataset; the fault of one is said once."""
  found: dict[Finding, list[str]] = {}
  for stage in seen.chosen:
    where = f'stage {stage.name!r}'
    try:
      finding = _check_dataset(seen, stage, where)
    except errors.UserError as e:
      place = e.where.removeprefix(where).lstrip('., ')
      what = e.what.removesuffix('.') + f' ({place})' * bool(place)
      fix = preflight.mend(stage.dataset, e.suggestion)
      finding = Finding(False, what, fix, is_absent=_is_absent(seen, stage))
    except OSError as e:
      finding = Finding(False, f'{stage.dataset}: {e}')
    found.setdefault(finding, []).append(repr(stage.name))
  for finding, names in found.items():
    stages = f'stage{"s" * (len(names) > 1)} {", ".join(names)}'
    yield finding._replace(what=f'{stages}: {finding.what}')


def _is_absent(seen: Inspection, stage: stages_lib.Stage) -> bool:
  """Returns whether a dataset is not here, and how many images it has."""
  known = named.find(stage.dataset).published
  data_dir = paths.data_dir(seen.config)
  return known is not None and not preparation.is_here(stage.dataset, data_dir)


def _check_dataset(
  seen: Inspection, stage: stages_lib.Stage, where: str
) -> Finding:
  """Notes what there is of a stage's dataset, and says it.

  Raises:
    UserError: if it is missing or not what the stage asks for.
  """
  seen.data[stage.name] = Data()
  data_dir = paths.data_dir(seen.config)
  if preparation.check_dataset(stage.dataset, data_dir) == 'prepared':
    dataset = setup_lib.load_dataset(data_dir, stage, 'prepared')
    seen.data[stage.name] = Data(dataset=dataset)
    what = (
      f'{stage.dataset} is prepared, {dataset.num_classes} classes, '
      f'{len(dataset.train):,} + {len(dataset.eval):,} images'
    )
    return Finding(True, what)
  raw = preparation.list_raw(stage.dataset, data_dir)
  assert raw is not None  # check_dataset has found it.
  seen.data[stage.name] = Data(raw=raw)
  known = set(raw.classes)
  for name in stage.classes:
    if name not in known:
      raise errors.UserError(
        f'{stage.dataset!r} has no class {name!r}.',
        f'{where}.classes',
        errors.did_you_mean(name, raw.classes),
      )
  count = len(stage.classes or raw.classes)
  if stage.num_classes not in (0, count):
    raise errors.UserError(
      f'num_classes is {stage.num_classes}, but {stage.dataset!r} has {count} '
      'classes.',
      str(raw.root),
      'Is the folder complete? If so, set num_classes to what it has.',
    )
  what = (
    f'{stage.dataset} is raw, {count} classes; {raw.num_images:,} images will '
    'be prepared first'
  )
  return Finding(None, what, preflight.prepare_command())


def _check_left_out(seen: Inspection) -> Iterator[Finding]:
  left_out = {}
  for stage in seen.chosen:
    dataset, raw = seen.data[stage.name]
    if dataset:
      left_out[stage.dataset] = dataset.left_out
    elif raw:
      left_out[stage.dataset] = folders.describe(raw.left_out)
  for name, what in left_out.items():
    if what:
      yield Finding(None, errors.printable(f'{name}: left out: {what}'))


def _check_packs(seen: Inspection) -> Iterator[Finding]:
  for stage in seen.chosen:
    if stage.stored.kind == 'original' or not any(seen.data[stage.name]):
      continue
    where = f'stage {stage.name!r}'
    if seen.is_stored(stage):
      yield Finding(True, f'{where}: images are stored as {stage.storage}')
    else:
      what = f'{where}: images will be stored as {stage.storage} first'
      yield Finding(None, what, preflight.prepare_command())


def _check_leaks(seen: Inspection) -> Iterator[Finding]:
  if not seen.config.exclude_leaks or not seen.chosen:
    return
  if leaks_are_known(seen.config):
    yield Finding(True, 'leaks: looked for before, left out')
  else:
    what = 'leaks: every image will be compared first'
    yield Finding(None, what, preflight.prepare_command())


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
      if not signatures.is_kept(split):
        return False
  return True


def _check_workdir(seen: Inspection) -> Iterator[Finding]:
  if seen.workdir:
    if owner := preflight.claim_workdir(seen.workdir):
      yield Finding(None, owner)
    yield Finding(True, f'workdir: {seen.workdir} can be written to')


def _check_bucket(seen: Inspection) -> Iterator[Finding]:
  """Tries to write into the run's bucket, unless somebody may own it."""
  if url := seen.workdir and buckets.url_of(seen.workdir):
    bucket = buckets.Bucket(url, f'--workdir={url}')
  elif url := seen.config.mirror:
    bucket = buckets.Bucket(url, f'config.mirror={url}')
  else:
    return
  if owner := lease.check_free(bucket):
    yield Finding(None, owner)
    return
  bucket.write('.probe', b'probe')
  bucket.remove(['.probe'])
  yield Finding(True, f'workdir: {url} can be written to')


def _check_run(seen: Inspection) -> Iterator[Finding]:
  if not seen.workdir:
    return
  for line in preflight.describe_run(seen.workdir):
    yield Finding(True, line)
  for marker in sorted(seen.workdir.glob('checkpoints/*/done.json')):
    name = marker.parent.name
    if not checkpoints.is_done(seen.workdir, name):
      what = f'run: {name}/done.json is damaged: the stage is finished again'
      yield Finding(None, f'{what} from its last save')
  changes = preflight.check_changes(
    seen.config, seen.workdir, seen.allow_config_change
  )
  if changes:
    what = f'run: goes on with another config: {"; ".join(changes)}'
    yield Finding(None, what)


def _check_checkpoints(seen: Inspection) -> Iterator[Finding]:
  """Yields what `checkpoints.verify_all` would find damaged."""
  if not seen.workdir:
    return
  seen.checkpoints = checkpoints.check_workdir(seen.workdir)
  for found in seen.checkpoints:
    if found.status == 'damaged' and found.step >= 0:
      what = f'{found.stage}/{found.name}: step {found.step} is damaged'
      yield Finding(None, f'run: {what} ({found.detail})')
  for stage in checkpoints.find_lost(seen.workdir, seen.checkpoints):
    yield Finding(False, f'run: {checkpoints.lost_error(stage)}')


def _check_disk(seen: Inspection) -> Iterator[Finding]:
  """Yields a finding for each file system that the run writes to."""
  if not seen.chosen or not seen.has_devices:
    return
  run = preflight.bytes_to_write(seen.workdir, _describe_states(seen))
  raw = {x.raw.root: x.raw for x in seen.data.values() if x.raw}
  prepared = int(preflight.OVERHEAD * sum(map(_raw_bytes, raw.values())))
  data_dir = paths.data_dir(seen.config)
  nearest = preflight.nearest_folder(data_dir / 'prepared')
  if raw and not os.access(nearest, os.W_OK):
    fix = 'Set config.data_dir to a folder that you may write to.'
    yield Finding(False, f'data: {data_dir} cannot be written to', fix)
  if found := preflight.to_fetch(
    seen.config, seen.list_images(), seen.workdir, run
  ):
    line, fits = found
    fix = '' if fits else preflight.MOVE
    yield Finding(fits, f'data: {line}', fix)
  needs = [(data_dir, 'prepared data', prepared)]
  if seen.workdir:
    needs.append((seen.workdir, 'results', run))
  else:
    what = f'disk: a run will write {formats.size(run)} of results'
    yield Finding(True, what)
  by_disk: dict[int, list[tuple[pathlib.Path, str, int]]] = {}
  for path, what, count in needs:
    if count:
      disk = preflight.nearest_folder(path).stat().st_dev
      by_disk.setdefault(disk, []).append((path, what, count))
  for on_disk in by_disk.values():
    where, free = on_disk[-1][0], preflight.free_bytes(on_disk[-1][0])
    parts = ' and '.join(
      f'{formats.size(count)} of {what}' for _, what, count in on_disk
    )
    fits = sum(count for _, _, count in on_disk) <= free
    yield Finding(
      fits,
      f'disk: {parts} to be written, {formats.size(free)} free at {where}',
      '' if fits else 'Free some, or name a folder on a larger disk.',
    )


def _describe_states(
  seen: Inspection,
) -> Iterator[tuple[stages_lib.Stage, state_lib.TrainState]]:
  """Yields each stage's state, as shapes, as if all stages had all classes.

  So the network is traced once, which takes a second.
  """
  num_classes = max(
    len(seen.data[stage.name].classes) or stage.num_classes or _CLASSES
    for stage in seen.chosen
  )
  size = seen.chosen[0].image_size if seen.model else 32
  create = seen.model or setup_lib.create_model_fn(seen.config)
  model = create(num_classes=num_classes, image_size=size, dtype=jnp.float32)
  rng = jax.random.key(0)
  variables = jax.eval_shape(
    lambda rng: state_lib.init_variables(model, size, rng), rng
  )

  for stage in seen.chosen:
    create_state = functools.partial(
      state_lib.create_state,
      tx=optimizers.create_optimizer(stage),
      ema=stage.ema_decay > 0,
    )
    yield stage, jax.eval_shape(create_state, variables)


def _raw_bytes(raw: builders.Raw) -> int:
  return sum(
    image.size
    for split in (builders.TRAIN, builders.EVAL)
    for image in raw.images(split)
  )


# Each finds what it can, whatever the others have found; in this order.
_CHECKS: tuple[Callable[[Inspection], Iterator[Finding]], ...] = (
  _check_config,
  _check_versions,
  _check_devices,
  _check_cache,
  _check_batches,
  _check_network,
  _check_datasets,
  _check_left_out,
  _check_packs,
  _check_leaks,
  _check_workdir,
  _check_bucket,
  _check_run,
  _check_checkpoints,
  _check_disk,
)

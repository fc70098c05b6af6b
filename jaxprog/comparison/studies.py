"""Optuna's study of a search: where it is kept, what draws, what prunes.

It is in WORKDIR/tune.db (SQLite, for one process), in WORKDIR/tune.journal or
in a database, and then WORKDIR/tune_study.txt says under which name. The
process that has the lock of the workdir alone asks for trials and tells how
they ended; a trial, which may run elsewhere, reports its epochs.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

import optuna
import sqlalchemy
from ml_collections import config_dict
from optuna import storages
from optuna.storages import journal
from optuna.trial import TrialState

from jaxprog import config as config_lib
from jaxprog import errors, files, stages

# What shows where a search is kept, and under which name in a file.
_FILES = {
  'sqlite': 'tune.db',
  'journal': 'tune.journal',
  'database': 'tune_study.txt',
}
_DESCRIBED = {
  'sqlite': 'tune.db, which is for one process',
  'journal': 'tune.journal',
  'database': 'a database',
}
_GO_ON = {
  'sqlite': "Go on with engine 'serial' and storage ''",
  'journal': "Go on with storage 'journal'",
  'database': 'Let storage name the database',
}
_NAME = 'jaxprog'


def check_storage(config: config_dict.ConfigDict) -> None:
  """Raises UserError if a search can be kept in no such place."""
  if config.storage in ('', 'journal'):
    return
  where = f'config.storage={config.storage}'
  how = "Write '', 'journal', postgresql://… or mysql://…"
  try:
    url = _url(config)
    url.get_dialect().import_dbapi()
  except ImportError as e:
    raise errors.UserError(
      f'The database needs a driver that is not installed: {e}.',
      where,
      'Install it, or name the one that is there: postgresql+psycopg2://…',
    ) from None
  except sqlalchemy.exc.ArgumentError:
    what = 'config.storage is no URL of a database.'
    raise errors.UserError(what, where, how) from None
  if url.get_backend_name() == 'sqlite' and config.engine != 'serial':
    raise errors.UserError('SQLite is not for many workers.', where, how)


def open_study(
  config: config_dict.ConfigDict, workdir: pathlib.Path, slots: int = 1
) -> optuna.Study:
  """Returns the study of a search for `slots` trials at once.

  Raises:
    UserError: if the search there is kept elsewhere, or is one for something
      else, or if the database does not answer.
  """
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  match _find_kind(config, workdir):
    case 'sqlite':
      # Written out by hand, ? and # in a name would end it.
      url = sqlalchemy.engine.URL.create(
        'sqlite', database=str((workdir / _FILES['sqlite']).absolute())
      )
      study = _create_study(config, url.render_as_string(), _NAME)
    case 'journal':
      storage = _open_journal(workdir / _FILES['journal'])
      study = _create_study(config, storage, _NAME)
    case _:
      study = _open_in_database(config, workdir)
  # From the same seed, every start would draw the first trials again.
  seed = config.sampler_seed + len(study.get_trials())
  if config.sampler == 'tpe':
    # Trials under way count as bad ones, or all would try the same. For one at
    # a time Optuna's versions differ in that, and have their own choice.
    lies: dict[str, Any] = {'constant_liar': True} if slots > 1 else {}
    study.sampler = optuna.samplers.TPESampler(seed=seed, **lies)
  else:
    study.sampler = optuna.samplers.RandomSampler(seed=seed)
  _check_same_search(config, study, workdir)
  return study


def enqueue_unfinished(study: optuna.Study) -> None:
  """Asks again for trials that came to no end, in the same directories."""
  last = {t.user_attrs.get('directory', ''): t for t in study.get_trials()}
  for directory, trial in last.items():
    if trial.state == TrialState.RUNNING:
      study.tell(trial.number, state=TrialState.FAIL)
    elif trial.state != TrialState.FAIL:
      continue
    if directory and trial.params:
      study.enqueue_trial(trial.params, user_attrs={'directory': directory})


def _find_kind(config: config_dict.ConfigDict, workdir: pathlib.Path) -> str:
  """Returns which of `_FILES` the search is kept in, or to be.

  Raises:
    UserError: if it is kept elsewhere.
  """
  there = [x for x, name in _FILES.items() if (workdir / name).exists()]
  if config.storage:
    kind = 'journal' if config.storage == 'journal' else 'database'
  elif config.engine != 'serial' or 'journal' in there:
    kind = 'journal'
  else:
    kind = 'sqlite'
  for other in there:
    if other != kind:
      raise errors.UserError(
        f'The search here is kept in {_DESCRIBED[other]}.',
        f'config.storage={config.storage!r}, config.engine={config.engine!r}',
        f'{_GO_ON[other]}, or use another --workdir.',
      )
  return kind


def _url(config: config_dict.ConfigDict) -> sqlalchemy.engine.URL:
  """Returns the database's URL, with what $NAMES are in the environment."""
  return sqlalchemy.engine.make_url(os.path.expandvars(config.storage))


def _create_study(
  config: config_dict.ConfigDict,
  storage: str | storages.BaseStorage,
  name: str,
) -> optuna.Study:
  """Returns the study called `name`, a new one if there is none."""
  match config.pruner:
    case 'median':
      pruner: Any = optuna.pruners.MedianPruner(
        n_startup_trials=config.pruner_startup_trials,
        n_warmup_steps=config.pruner_warmup_epochs,
      )
    case 'hyperband':
      pruner = optuna.pruners.HyperbandPruner(
        min_resource=max(1, config.pruner_warmup_epochs)
      )
    case _:
      pruner = optuna.pruners.NopPruner()
  return optuna.create_study(
    study_name=name,
    storage=storage,
    direction='maximize',
    load_if_exists=True,
    pruner=pruner,
  )


def _open_journal(path: pathlib.Path) -> storages.JournalStorage:
  # A file that only one can create is a lock on NFS 3 and later and needs no
  # symbolic links, as Optuna's own choice does. One that a dead process has
  # left counts for nothing after 30 s.
  lock = journal.JournalFileOpenLock(str(path))
  backend = journal.JournalFileBackend(str(path), lock)
  lock.acquire()
  try:
    data = path.read_bytes()
    # A full disk has torn the last line, and the next one would join it.
    os.truncate(path, data.rfind(b'\n') + 1)
  finally:
    lock.release()
  return storages.JournalStorage(backend)


def _open_in_database(
  config: config_dict.ConfigDict, workdir: pathlib.Path
) -> optuna.Study:
  path = workdir / _FILES['database']
  url = _url(config)
  with _answering(config):
    storage = storages.RDBStorage(
      url.render_as_string(hide_password=False),
      # Hours may pass between two trials, and firewalls forget connections.
      engine_kwargs={'pool_pre_ping': True},
    )
    known = optuna.get_all_study_names(storage)
    if path.exists():
      name = path.read_text().strip()
      if name not in known:
        raise errors.UserError(
          f'The database has no study {name!r}, with which the search began.',
          f'config.storage={config.storage}',
          'Name the database that it began with, or use another --workdir.',
        )
      return _create_study(config, storage, name)
    # The database may be that of other searches too.
    name = f'{workdir.absolute().name}-{secrets.token_hex(4)}'
    study = _create_study(config, storage, name)
  files.write_bytes(path, f'{name}\n'.encode())
  return study


@contextlib.contextmanager
def _answering(config: config_dict.ConfigDict) -> Iterator[None]:
  """Turns what a database answers at the start into a UserError."""
  try:
    yield
  except (
    sqlalchemy.exc.SQLAlchemyError,
    optuna.exceptions.StorageInternalError,
    RuntimeError,  # It was written by another version of Optuna.
  ) as e:
    told = getattr(e, 'orig', None) or e.__cause__ or e
    raise errors.UserError(
      f'The database cannot be used: {" ".join(str(told).split())[:300]}',
      f'config.storage={config.storage}',
      'Does it exist, and may this user create tables there?',
    ) from None


def _check_same_search(
  config: config_dict.ConfigDict, study: optuna.Study, workdir: pathlib.Path
) -> None:
  """Raises UserError if what lies there is a search for something else."""
  searched = json.dumps([[dict(x) for x in config.search], list(config.only)])
  base = config_lib.config_hash(stages.complete(config.base))
  before = study.user_attrs.get('search', [base, searched])
  if list(before) != [base, searched]:
    raise errors.UserError(
      'The search here began with another ladder, or searched other fields.',
      f'--workdir={workdir}',
      'Use another --workdir, or the config that it began with.',
    )
  study.set_user_attr('search', [base, searched])

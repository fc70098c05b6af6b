"""Reads a config file, applies overrides, compares two configs."""

import ast
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import rich.box
import rich.table
import rich.text
from ml_collections import config_dict

from configs import default
from jaxprog import errors, stages

# What may change between two starts of one run without changing its result.
_FREE_FIELDS = (
  'check_steps',
  'checkpoint_every_minutes',
  'checkpoint_every_steps',
  'compilation_cache_dir',
  'data_dir',
  'donate_state',
  'log_every_steps',
  'lr_find_max',
  'lr_find_min',
  'lr_find_steps',
  'max_bad_images',
  'max_skipped_steps',
  'num_workers',
  'platform',
  'profile_steps',
  'stage_defaults',
  'tensorboard',
  'watchdog_minutes',
  'worker_kind',
)
# Stands for the value of a field that one of two configs does not have.
_ABSENT = object()


def load_config(
  spec: str, overrides: Mapping[str, str] | None = None
) -> config_dict.ConfigDict:
  """Returns the config that FILE[:ARG] makes, with every stage complete.

  A .py file is run and its `get_config` called, with ARG if there is one; a
  .json file is only read. `overrides` maps a field's path, such as
  'stages[0].num_epochs', to its new value as text. What a comparison compares
  are the stages of its `base`.

  Raises:
    UserError: if the file is missing or breaks, or an override names nothing.
  """
  if spec.endswith('.json'):  # Its path may hold colons, it has no ARG.
    config = config_dict.ConfigDict(_read_json(pathlib.Path(spec)))
  else:
    path, _, argument = spec.partition(':')
    config = _run_config_file(pathlib.Path(path), argument)
  pending = dict(overrides or {})
  # Defaults first: stages that do not say otherwise take them over.
  for field in [
    f for f in pending if not f.startswith(('stages[', 'base.stages['))
  ]:
    _override(config, field, pending.pop(field))
  config = _complete(config)
  for field, text in pending.items():
    _override(config, field, text)
  return config


def _complete(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  if 'base' not in config:
    return stages.complete(config)
  config = config_dict.ConfigDict(config)
  config.base = stages.complete(config.base)
  return config


def set_field(
  config: config_dict.ConfigDict, field: str, value: Any, where: str
) -> None:
  """Sets the field at a path, such as 'stages[-1].optimizer', to `value`.

  Raises:
    UserError: naming `where`, if the path names nothing, or a group.
  """
  target, last = _find(config, field, where)
  if isinstance(_descend(target, last, where), config_dict.ConfigDict | list):
    raise errors.UserError('This names a group, not one field.', where)
  _set(target, last, value)


def to_json(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns `config` as what JSON can hold: tuples become lists."""
  return json.loads(json.dumps(_plain(config)))


def config_hash(config: config_dict.ConfigDict) -> str:
  """Returns 16 hex digits that change whenever the result might."""
  plain = {k: v for k, v in to_json(config).items() if k not in _FREE_FIELDS}
  text = json.dumps(plain, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class Change(NamedTuple):
  """One field in which two configs differ."""

  # 'seed', or 'STAGE.batch_size'.
  field: str
  was: Any
  now: Any
  # Whether the result of the run stays the same.
  allowed: bool


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], started: tuple[str, ...]
) -> list[str]:
  """Returns 'field: old -> new' for what would change a run's meaning.

  Stages are matched by name and only those `started` count: later ones may
  still be edited, added or left out.
  """
  return [
    f'{x.field}: {_quote(x.was)} -> {_quote(x.now)}'
    for x in changes(old, new, started)
    if not x.allowed
  ]


def changes(
  old: Mapping[str, Any], new: Mapping[str, Any], started: tuple[str, ...]
) -> list[Change]:
  """Returns every difference, those that would change a run's meaning first."""
  found = _changes('', old, new, _FREE_FIELDS)
  old_stages = {s['name']: s for s in old['stages']}
  new_stages = {s['name']: s for s in new['stages']}
  for name in new_stages:
    if name in old_stages:
      free = ('description',) if name in started else None
      found += _changes(f'{name}.', old_stages[name], new_stages[name], free)
  names = ', '.join(old_stages), ', '.join(new_stages)
  if names[0] != names[1]:
    found.append(Change('stages', *names, allowed=True))
  return sorted(found, key=lambda x: x.allowed)


def difference_table(
  old: Mapping[str, Any], new: Mapping[str, Any], started: tuple[str, ...]
) -> rich.table.Table:
  """Returns a row for each difference; no rows if there is none.

  Dimmed are those that may change within one run.
  """
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for column in ('field', 'was', 'is'):
    table.add_column(column, overflow='fold')
  table.add_column('result', no_wrap=True, min_width=7)
  for x in changes(old, new, started):
    was, now = _shorten(_quote(x.was), _quote(x.now))
    style, result = ('dim', 'allowed') if x.allowed else ('', 'changes')
    # Text: what is in brackets is no markup.
    cells = [rich.text.Text(text) for text in (x.field, was, now, result)]
    table.add_row(*cells, style=style)
  return table


def _changes(
  prefix: str,
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  free: Collection[str] | None,
) -> list[Change]:
  """Returns the fields that differ; with `free` None all are allowed."""
  return [
    Change(
      prefix + field,
      old.get(field, _ABSENT),
      new.get(field, _ABSENT),
      allowed=free is None or field in free,
    )
    for field in sorted({*old, *new} - {'stages', 'stage_defaults'})
    if old.get(field, _ABSENT) != new.get(field, _ABSENT)
  ]


def _quote(value: Any) -> str:
  return 'not set' if value is _ABSENT else repr(value)


def _shorten(was: str, now: str, limit: int = 40) -> tuple[str, str]:
  """Returns both, long ones cut to where they begin to differ."""
  pairs = zip(was, now, strict=False)
  common = sum(1 for _ in itertools.takewhile(lambda x: x[0] == x[1], pairs))

  def cut(text: str) -> str:
    if len(text) <= limit:
      return text
    start = max(0, min(common - limit // 4, len(text) - limit))
    stop = start + limit
    before, after = '...' * (start > 0), '...' * (stop < len(text))
    return before + text[start:stop] + after

  return cut(was), cut(now)


def _plain(value: Any) -> Any:
  if isinstance(value, config_dict.ConfigDict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  return value


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    fields = json.loads(path.read_text())
    if 'base' not in fields:
      return _restore_ladder(fields)
    base = _restore_ladder(fields.pop('base'))
    return {**_with_tuples(fields), 'base': base}
  except FileNotFoundError:
    raise errors.UserError(
      f'There is no config file {str(path)!r}.', f'--config={path}'
    ) from None
  except OSError as e:
    raise errors.UserError(
      f'{path} cannot be read: {e.strerror}', f'--config={path}'
    ) from None
  except ValueError as e:
    raise errors.UserError(f'{path} is not JSON: {e}') from None
  except (KeyError, AttributeError, TypeError):
    raise errors.UserError(f'{path} is not a config.') from None


def _restore_ladder(fields: dict[str, Any]) -> dict[str, Any]:
  """Returns a saved ladder; fields younger than the file have defaults."""
  known = default.get_config().to_dict()
  stage_list = [_with_tuples(stage) for stage in fields.pop('stages')]
  saved = _with_tuples(fields)
  of_stages = {**known['stage_defaults'], **saved.pop('stage_defaults', {})}
  return {**known, **saved, 'stage_defaults': of_stages, 'stages': stage_list}


def _with_tuples(value: Any) -> Any:
  """Returns `value` with the tuples that JSON made lists of."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(value) if isinstance(value, list) else value


def _run_config_file(
  path: pathlib.Path, argument: str
) -> config_dict.ConfigDict:
  where = f'--config={path}'
  if not path.is_file():
    siblings = [str(p) for p in path.parent.glob('*.py')]
    raise errors.UserError(
      f'There is no config file {str(path)!r}.',
      where,
      errors.did_you_mean(str(path), siblings) if siblings else '',
    )
  try:
    spec = importlib.util.spec_from_file_location('jaxprog_config', path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([argument] if argument else []))
  except errors.UserError:
    raise
  except Exception as e:
    message = ' '.join(str(e).split())
    raise errors.UserError(
      f'The config file fails: {type(e).__name__}: {message}',
      where + (f':{argument}' if argument else ''),
      'It must define get_config(), which may take one string.'
      if isinstance(e, AttributeError | TypeError)
      else '',
    ) from e
  if not isinstance(config, config_dict.ConfigDict):
    raise errors.UserError(
      f'get_config returned a {type(config).__name__}, not a ConfigDict.', where
    )
  return config


def _override(config: config_dict.ConfigDict, field: str, text: str) -> None:
  """Sets one field of `config`, given by its path, from text."""
  where = f'--config.{field}={text}'
  target, last = _find(config, field, where)
  old = _descend(target, last, where)
  _set(target, last, _parse(text, old, last, where))


def _find(
  config: config_dict.ConfigDict, field: str, where: str
) -> tuple[Any, str]:
  """Returns what holds the field at a path, and the path's last part."""
  *parents, last = re.findall(r'[^.\[\]]+|\[-?\d+\]', field) or ['']
  target: Any = config
  for part in parents:
    target = _descend(target, part, where)
  return target, last


def _set(target: Any, last: str, value: Any) -> None:
  if last.startswith('['):
    target[int(last[1:-1])] = value
  else:
    with target.ignore_type():
      target[last] = value


def _descend(target: Any, part: str, where: str) -> Any:
  if part.startswith('['):
    index = int(part[1:-1])
    if not isinstance(target, list | tuple):
      raise errors.UserError(f'{part} does not index a list.', where)
    if not -len(target) <= index < len(target):
      raise errors.UserError(
        f'Index {index} is out of range: there are {len(target)}.',
        where,
        f'Use 0 to {len(target) - 1}.' if target else '',
      )
    return target[index]
  if not isinstance(target, config_dict.ConfigDict):
    raise errors.UserError(f'{part!r} is no field of a value.', where)
  if part not in target:
    raise errors.UserError(
      f'Unknown field {part!r}.', where, errors.did_you_mean(part, target)
    )
  return target[part]


def _parse(text: str, old: Any, field: str, where: str) -> Any:
  """Returns `text` as a value of the type of `old`, the value it replaces."""
  if isinstance(old, str):
    return text.strip('\'"')
  if isinstance(old, config_dict.ConfigDict | list):
    raise errors.UserError('This names a group, not one field.', where)
  try:
    value = ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
  except (ValueError, SyntaxError):
    if isinstance(old, tuple):
      return tuple(x.strip() for x in text.split(',') if x.strip())
    value = text
  if isinstance(old, tuple) and not isinstance(value, list | tuple):
    value = (value,)
  if field == 'classes':
    value = tuple(str(x) for x in value)
  if isinstance(old, float) and type(value) is int:
    value = float(value)
  return value

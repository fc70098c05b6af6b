"""Reads a config file, applies overrides, compares two configs."""

import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
import rich.table
import rich.text
from ml_collections import config_dict

from jaxprog import errors, fields, paths, stages

# What may change between two starts of one run without changing its result.
_FREE = {'stage_defaults', *fields.names(fields.CONFIG, 'free')}
_HERE = pathlib.Path(__file__).parent
# The configs that come with the package: installed within it, in a checkout
# beside it.
_INSTALLED = _HERE / 'configs'
_SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _HERE.parent / 'configs'
# Stands for the value of a field that one of two configs does not have.
_ABSENT = object()


def load_config(
  spec: str, overrides: Mapping[str, str] | None = None
) -> config_dict.ConfigDict:
  """Returns the config that `start_from` gives, with every stage complete.

  `overrides` maps a field's path, such as 'stages[0].num_epochs', to its new
  value as text. What a comparison compares are the stages of its `base`.

  Raises:
    UserError: if the file is missing or breaks, or an override names nothing.
  """
  config = start_from(spec)
  stages.check_shape(config.get('base', config))
  pending = dict(overrides or {})
  # Defaults first: stages that do not say otherwise take them over.
  for field in [f for f in pending if not re.match(r'(base\.)?stages[.[]', f)]:
    _override(config, field, pending.pop(field))
  if 'base' in config:
    config.base = stages.complete(config.base)
  else:
    config = stages.complete(config)
  for field, text in pending.items():
    _override(config, field, text)
  return config


def start_from(spec: str) -> config_dict.ConfigDict:
  """Returns the config that NAME[:ARG] or FILE[:ARG] makes, to build on.

  NAME is that of a shipped config. A .py file is run and its `get_config`
  called, with ARG if there is one; a .json file is only read. Stages may be
  incomplete: they will take what they leave out from `stage_defaults`.

  Raises:
    UserError: if the file is missing or breaks.
  """
  path, argument = _split_spec(spec)
  if path.suffix != '.json':
    return _run_config_file(path, argument, f'--config={spec}')
  if argument:
    raise errors.UserError(
      'A saved config takes no argument.',
      f'--config={spec}',
      f'Write --config={path}.',
    )
  return config_dict.ConfigDict(_read_json(path))


def defaults() -> config_dict.ConfigDict:
  """Returns a config without stages: all fields, all defaults."""
  config = fields.defaults(fields.CONFIG)
  config.stage_defaults = fields.defaults(fields.STAGE)
  config.stages = []
  return config


def _split_spec(spec: str) -> tuple[pathlib.Path, str]:
  """Returns the file and the argument of SPEC[:ARG]; both may hold colons.

  Where there is no file, NAME and configs/NAME.py are shipped ones.

  Raises:
    UserError: if there is neither.
  """
  where = f'--config={spec}'
  shipped = {x.stem: x for x in _SHIPPED.glob('[!_]*.py')}
  name, _, argument = spec.partition(':')
  if name in shipped:
    return shipped[name], argument
  whole = paths.expand(spec, where)
  if whole.is_file():
    return whole, ''
  found = re.fullmatch(r'(.*?\.(?:py|json))(?::(.*))?', spec, re.DOTALL)
  text, argument = found.groups('') if found else spec.partition(':')[::2]
  path = paths.expand(text, where)
  if path.is_file():
    return path, argument
  for name, file in shipped.items():
    if text == f'configs/{name}.py':
      return file, argument
  siblings = [str(x) for x in path.parent.glob('*.py')] if found else []
  raise errors.UserError(
    f'There is no config file {text!r}.',
    where,
    errors.did_you_mean(text, siblings or shipped),
  )


def restore(fields: dict[str, Any]) -> config_dict.ConfigDict:
  """Returns the config of which `to_json` made `fields`, complete.

  Fields that are younger than these have their defaults.
  """
  return stages.complete(config_dict.ConfigDict(_restore_ladder({**fields})))


def set_field(
  config: config_dict.ConfigDict, field: str, value: Any, where: str
) -> None:
  """Sets what a path names, such as 'stages[-1].optimizer', to `value`.

  Raises:
    UserError: naming `where`, if the path names nothing, or a group.
  """
  for path in locate(config, field, where):
    target, last = _find(config, path, where)
    _set(target, last, value)


def locate(
  config: config_dict.ConfigDict, field: str, where: str
) -> tuple[str, ...]:
  """Returns the paths that a path names, with each stage by its index.

  'stages[*].flip' names a field of all stages, 'stages.four.flip' one of the
  stage with that name, 'stages[-1].flip' one of the last.

  Raises:
    UserError: naming `where`, if there is no such stage.
  """
  match = re.fullmatch(
    r'(base\.)?stages(?:\[(\*|-?\d+)\]|\.(.+))\.(\w+)', field
  )
  if match is None:
    return (field,)
  base, index, name, last = match.groups()
  ladder = config.base.stages if base else config.stages
  every = range(len(ladder))
  if name is not None:
    known = [stage.get('name') for stage in ladder]
    if name not in known:
      raise fields.unknown(name, known, 'stage', where)
    every = every[known.index(name) :][:1]
  elif index != '*':
    _descend(ladder, f'[{index}]', where)
    every = every[int(index) :][:1]
  return tuple(f'{base or ""}stages[{i}].{last}' for i in every)


def to_json(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns `config` as what JSON can hold: tuples become lists."""
  return json.loads(json.dumps(_plain(config)))


def with_mirror(
  config: config_dict.ConfigDict, url: str = ''
) -> config_dict.ConfigDict:
  """Returns a copy of `config` whose runs are kept at `url`, '' for nowhere."""
  config = config.copy_and_resolve_references()
  config.get('base', config).mirror = url
  return config


def check_kind(config: config_dict.ConfigDict, mode: str) -> None:
  """Raises UserError unless `config` is one of what --mode does."""
  of_many = 'tune' if 'search' in config else 'compare'
  kind = of_many if 'base' in config else 'train'
  asks_many = mode in ('compare', 'tune')
  if kind == (mode if asks_many else 'train'):
    return
  how = f'Use --mode={kind}, or the config that it starts from.'
  if kind == 'train':
    what = f'This config is of one run: --mode={mode} needs another kind.'
    how = 'Start from compare_default or tune_default.'
  elif asks_many:
    what = f'This config is none for --mode={mode}.'
  else:
    what = 'This config is not of one run.'
  raise errors.UserError(what, f'--mode={mode}', how)


def complete(
  config: config_dict.ConfigDict, default: str
) -> config_dict.ConfigDict:
  """Returns `config` with the fields of a shipped one that it lacks, in place.

  They are younger than it.
  """
  known = start_from(default)
  for name in set(known) - set(config):
    config[name] = known[name]
  return config


def config_hash(config: config_dict.ConfigDict) -> str:
  """Returns 16 hex digits that change whenever the result might."""
  plain = {k: v for k, v in to_json(config).items() if k not in _FREE}
  for name, field in fields.CONFIG.items():
    if field.hashed is not None:
      plain[name] = field.hashed
  plain = _without_younger(plain, fields.CONFIG)
  plain['stages'] = [
    _without_younger(stage, fields.STAGE) for stage in plain['stages']
  ]
  text = json.dumps(plain, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_younger(
  values: Mapping[str, Any], declared: fields.Declared
) -> dict[str, Any]:
  """Returns `values`, JSON's, without what older configs could not say."""
  absent = {
    name: _plain(declared[name].default)
    for name in fields.names(declared, 'younger')
  }
  return {k: v for k, v in values.items() if k not in absent or v != absent[k]}


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
  found = _changes('', old, new, _FREE)
  old_stages = {s['name']: s for s in old['stages']}
  new_stages = {s['name']: s for s in new['stages']}
  for name in new_stages:
    if name in old_stages:
      free = fields.names(fields.STAGE, 'free') if name in started else None
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
    values = json.loads(path.read_text())
    if 'base' not in values:
      return _restore_ladder(values)
    base = _restore_ladder(values.pop('base'))
    # A comparison or a search, of which fields younger than the file too have
    # their defaults.
    kind = 'tune' if 'search' in values else 'compare'
    known = start_from(f'{kind}_default').to_dict()
    return {**known, **_with_tuples(values), 'base': base}
  except OSError as e:
    raise errors.UserError(
      f'{path} cannot be read: {e.strerror}', f'--config={path}'
    ) from None
  except ValueError as e:
    raise errors.UserError(f'{path} is not JSON: {e}') from None
  except (KeyError, AttributeError, TypeError):
    raise errors.UserError(f'{path} is not a config.') from None


def _restore_ladder(values: dict[str, Any]) -> dict[str, Any]:
  """Returns a saved ladder; fields younger than the file have defaults."""
  known = defaults().to_dict()
  stage_list = [_with_tuples(stage) for stage in values.pop('stages')]
  saved = _with_tuples(values)
  of_stages = {**known['stage_defaults'], **saved.pop('stage_defaults', {})}
  return {**known, **saved, 'stage_defaults': of_stages, 'stages': stage_list}


def _with_tuples(value: Any) -> Any:
  """Returns `value` with the tuples that JSON made lists of."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(value) if isinstance(value, list) else value


def _run_config_file(
  path: pathlib.Path, argument: str, where: str
) -> config_dict.ConfigDict:
  spec = importlib.util.spec_from_file_location('jaxprog_config', path)
  if spec is None or spec.loader is None:
    raise errors.UserError('A config is a .py or a .json file.', where)
  try:
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([argument] if argument else []))
  except errors.UserError:
    raise
  except Exception as e:
    message = ' '.join(str(e).split())
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(e.__traceback__)
      if frame.filename == str(path.absolute())
    ]
    suggestion = ''
    if isinstance(e, ImportError | AttributeError) and "'configs" in message:
      suggestion = (
        "Shipped configs are found by name: start_from('default'), with "
        'from jaxprog import start_from.'
      )
    elif not lines and isinstance(e, AttributeError | TypeError):
      suggestion = 'It must define get_config(), which may take one string.'
    raise errors.UserError(
      f'The config file fails: {type(e).__name__}: {message}',
      where + (f', line {lines[-1]}' if lines else ''),
      suggestion,
    ) from e
  if not isinstance(config, config_dict.ConfigDict):
    raise errors.UserError(
      f'get_config returned a {type(config).__name__}, not a ConfigDict.', where
    )
  return config


def _override(config: config_dict.ConfigDict, field: str, text: str) -> None:
  where = f'--config.{field}={text}'
  for path in locate(config, field, where):
    target, last = _find(config, path, where)
    value = _declaration(path, target[last]).parse(text, where)
    _set(target, last, value)
    if path.endswith(f'stage_defaults.{last}'):
      ladder = config.base if path.startswith('base.') else config
      _check_effect(ladder.stages, last, value, where)


def _declaration(path: str, value: Any) -> fields.Field:
  """Returns what a path names; a comparison's own are as their `value`."""
  parent, _, last = path.removeprefix('base.').rpartition('.')
  declared = fields.STAGE if parent.startswith('stage') else fields.CONFIG
  return declared.get(last) or fields.Field(last, type(value), value)


def _check_effect(
  ladder: Sequence[Any], field: str, value: Any, where: str
) -> None:
  """Says which stages do not take a default over, because they have their own.

  Raises:
    UserError: if none does.
  """
  others = [str(s.get('name')) for s in ladder if s.get(field, value) != value]
  said = f'{", ".join(others)} keep their own {field}'
  if others and all(field in stage for stage in ladder):
    path = where.partition('=')[0].replace('stage_defaults', 'stages[*]')
    raise errors.UserError(
      f'No stage takes it over: {said}.', where, f'Use {path} for all of them.'
    )
  if others:
    print(f'{where}: {said}.', file=sys.stderr)


def _find(
  config: config_dict.ConfigDict, field: str, where: str
) -> tuple[Any, str]:
  """Returns what holds the field at a path, and the path's last part."""
  *parents, last = re.findall(r'[^.\[\]]+|\[-?\d+\]', field) or ['']
  target: Any = config
  for part in parents:
    target = _descend(target, part, where)
  found = _descend(target, last, where)
  if isinstance(found, config_dict.ConfigDict | list):
    raise errors.UserError('This names a group, not one field.', where)
  if isinstance(target, tuple):
    raise errors.UserError('This names a part of a value.', where)
  return target, last


def _set(target: Any, last: str, value: Any) -> None:
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

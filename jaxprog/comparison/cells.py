"""From a comparison's config to its cells; every mistake is found here.

A cell is the base ladder with some fields changed. Nothing is imported that
takes time, so that a typo costs a second.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, stages

Budget = Literal['epochs', 'images', 'flops', 'seconds']
BUDGETS: tuple[Budget, ...] = ('epochs', 'images', 'flops', 'seconds')
# As a budget: every cell is as long as it says itself.
OWN = 'own'
# The cell of a comparison that has controls or operators alone.
LADDER = 'ladder'
# Fields of the last stage that follow from something else.
_DERIVED = {
  'num_epochs': 'It follows from the budget: change base.stages[-1] instead.',
  'name': 'Stages keep their names, so that cells can share them.',
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """What is trained with each seed.

  Attributes:
    name: a directory of the comparison.
    overrides: fields of the base ladder by their paths, and their values.
    only: the stages that are trained; (): all.
    labels: its entry on each axis of the grid, for people.
    equal: what its cost has in common with the reference's, of `BUDGETS`; '':
      nothing, it is as long as it says itself.
    control: whether it is the last stage alone.
  """

  name: str
  overrides: Mapping[str, Any]
  only: tuple[str, ...] = ()
  labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
  equal: Budget | Literal[''] = ''
  control: bool = False


def create_cells(config: config_dict.ConfigDict) -> tuple[Cell, ...]:
  """Returns the cells of a comparison, the reference first.

  The ladder of every cell has been validated. Controls are not among them.

  Raises:
    UserError: for the first mistake.
  """
  _check_fields(config)
  _check_base(config)
  found = [*_grid_cells(config), *map(_explicit_cell, config.cells)]
  if not found and (config.operators or config.controls):
    found = [Cell(LADDER, {})]
  if not found:
    raise errors.UserError(
      'The comparison has no cells.',
      'config.grid, config.cells and config.operators',
      "Write config.grid = ({'stages[-1].optimizer': ('adamw', 'rmsprop')},).",
    )
  found += [_operator_cell(config, entry) for entry in config.operators]
  equal: Budget | Literal[''] = ''
  if config.budget != OWN:
    equal = config.budget
  found = [dataclasses.replace(cell, equal=equal) for cell in found]
  _check_names(found)
  for cell in found:
    check_cell(config, cell)
  return _reference_first(config, found)


def create_ladder(
  config: config_dict.ConfigDict, cell: Cell, seed: int
) -> config_dict.ConfigDict:
  """Returns the config of one run of `cell`: the base, overridden."""
  ladder = stages.complete(config.base)
  for field, value in cell.overrides.items():
    where = f'cell {cell.name!r}: {field}={value!r}'
    for path in config_lib.locate(ladder, field, where):
      if config.budget != OWN or not path.endswith('.num_epochs'):
        _check_field(path, len(ladder.stages), where)
    config_lib.set_field(ladder, field, value, where)
  ladder = stages.complete(ladder)
  ladder.seed = seed
  return ladder


def check_cell(config: config_dict.ConfigDict, cell: Cell) -> None:
  """Raises UserError for what is wrong in a cell's ladder, naming the cell."""
  ladder = create_ladder(config, cell, config.base.seed)
  try:
    trained_stages(ladder, cell)
  except errors.UserError as e:
    where = f'cell {cell.name!r}: {e.where}'
    raise errors.UserError(e.what, where, e.suggestion) from None


def trained_stages(
  ladder: config_dict.ConfigDict, cell: Cell
) -> tuple[stages.Stage, ...]:
  """Returns the stages that a run of `cell` trains, in order."""
  return stages.select(stages.create_stages(ladder), cell.only)


def seeds(config: config_dict.ConfigDict) -> tuple[int, ...]:
  """Returns the seeds that every cell is trained with."""
  return tuple(config.base.seed + i for i in range(config.seeds))


def tuning_seeds(config: config_dict.ConfigDict) -> tuple[int, ...]:
  """Returns the seeds that learning rates are chosen with."""
  first = config.base.seed + config.tuning.first_seed
  return tuple(first + i for i in range(config.tuning.seeds))


def _grid_cells(config: config_dict.ConfigDict) -> Iterator[Cell]:
  axes = [
    list(_axis(axis, f'config.grid[{i}]')) for i, axis in enumerate(config.grid)
  ]
  titles = [_title(axis) for axis in axes]
  for entries in itertools.product(*axes) if axes else ():
    overrides: dict[str, Any] = {}
    paths: set[str] = set()
    for _, changed in entries:
      found = {
        path
        for field in changed
        for path in config_lib.locate(config.base, field, 'config.grid')
      }
      if paths & found:
        raise errors.UserError(
          f'Two axes of the grid change {min(paths & found)!r}.', 'config.grid'
        )
      paths |= found
      overrides |= changed
    names = [name for name, _ in entries]
    labels = dict(zip(titles, names, strict=True))
    yield Cell('-'.join(names), overrides, labels=labels)


def _axis(axis: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields name and overrides of each entry of an axis."""
  if not isinstance(axis, Mapping) or not axis or not all(axis.values()):
    raise errors.UserError(
      f'An axis of the grid is empty, or no dict: {axis!r}.',
      where,
      "Write {'stages[-1].batch_size': (32, 64)}.",
    )
  for key, values in axis.items():
    if isinstance(values, Mapping):
      yield _safe(key), dict(values)
    elif isinstance(values, list | tuple) and len(axis) == 1:
      for value in values:
        yield _name_value(key, value), {key: value}
    else:
      raise errors.UserError(
        f'An axis of the grid is one field with a tuple of values, or names '
        f'with a dict of fields each, not {axis!r}.',
        where,
      )


def _title(axis: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
  """Returns the first field that all entries of an axis set, differently."""
  first, *others = (changed for _, changed in axis)
  for field, value in first.items():
    values = [changed.get(field, value) for changed in others]
    if all(field in x for x in others) and value not in values:
      return field.rpartition('.')[2]
  return ', '.join(name for name, _ in axis)


def _name_value(field: str, value: Any) -> str:
  if isinstance(value, str) and value:
    return _safe(value)
  return _safe(f'{field.rpartition(".")[2]}_{value}')


def _safe(text: str) -> str:
  """Returns `text` as what may name a directory."""
  return re.sub(r'[^A-Za-z0-9._-]+', '_', str(text)).strip('._-') or '_'


def _explicit_cell(entry: Any) -> Cell:
  where = 'config.cells'
  _check_entry(entry, ('name', 'overrides'), ('stages',), where)
  _check_name(entry['name'], where)
  return Cell(
    entry['name'], dict(entry['overrides']), tuple(entry.get('stages', ()))
  )


def _operator_cell(config: config_dict.ConfigDict, entry: Any) -> Cell:
  where = 'config.operators'
  _check_entry(entry, ('name', 'fields'), (), where)
  _check_name(entry['name'], where)
  if len(config.base.stages) < 2:
    raise errors.UserError(
      'A ladder of one stage hands nothing over.',
      where,
      'Leave operators empty, or give config.base a stage before.',
    )
  fields = entry['fields'].items()
  return Cell(entry['name'], {f'stages[-1].{k}': v for k, v in fields})


def _check_entry(
  entry: Any, needed: Sequence[str], more: Sequence[str], where: str
) -> None:
  if isinstance(entry, Mapping):
    unknown = [k for k in entry if k not in (*needed, *more)]
    if unknown:
      raise errors.UserError(
        f'Unknown field {unknown[0]!r} of a cell.',
        where,
        errors.did_you_mean(str(unknown[0]), (*needed, *more)),
      )
    name, changed = (entry.get(k) for k in needed)
    if isinstance(name, str) and isinstance(changed, Mapping):
      return
  raise errors.UserError(
    f'A cell is not {entry!r}.',
    where,
    f"Write {{'{needed[0]}': 'wide', '{needed[1]}': {{FIELD: VALUE}}}}.",
  )


def _check_name(name: str, where: str) -> None:
  if name != _safe(name):
    raise errors.UserError(
      f'The name of a cell is a directory, not {name!r}.',
      where,
      f'Name it {_safe(name)!r}.',
    )


def _check_names(found: Sequence[Cell]) -> None:
  names = [cell.name for cell in found]
  for i, name in enumerate(names):
    if name in names[:i]:
      raise errors.UserError(
        f'Two cells are named {name!r}.',
        'config.grid, config.cells and config.operators',
        'A name is a directory of the comparison: choose another.',
      )


def _check_field(field: str, num_stages: int, where: str) -> None:
  """Refuses what would be ignored, or would break what cells share."""
  if field.startswith('stage_defaults'):
    raise errors.UserError(
      'Stages are complete: their defaults change nothing any more.',
      where,
      f'Write stages[-1]{field.removeprefix("stage_defaults")}.',
    )
  if field == 'seed':
    raise errors.UserError(
      'A cell has the seeds of the comparison.',
      where,
      'Set config.seeds, or config.base.seed.',
    )
  last = re.fullmatch(rf'stages\[{num_stages - 1}\]\.(\w+)', field)
  if last and last[1] in _DERIVED:
    raise errors.UserError(
      f'A cell cannot set {last[1]} of the last stage.',
      where,
      _DERIVED[last[1]],
    )


def _reference_first(
  config: config_dict.ConfigDict, found: Sequence[Cell]
) -> tuple[Cell, ...]:
  names = [cell.name for cell in found]
  reference = config.reference or names[0]
  if reference not in names:
    raise errors.UserError(
      f'The reference is no cell: {reference!r}.',
      'config.reference',
      errors.did_you_mean(reference, names),
    )
  return tuple(sorted(found, key=lambda cell: cell.name != reference))


def _check_fields(config: config_dict.ConfigDict) -> None:
  """Raises UserError for a mistake in the comparison's own fields."""
  if 'base' not in config:
    raise errors.UserError(
      'This config is no comparison: it has no base.',
      '--mode=compare',
      'Begin with --config=compare_strategies.',
    )
  for field in ('grid', 'cells', 'operators'):
    if not isinstance(config[field], list | tuple):
      raise errors.UserError(
        f'{field} must be a tuple of dicts, not {config[field]!r}.',
        f'config.{field}',
      )
  if config.budget not in (*BUDGETS, OWN):
    raise errors.UserError(
      f'Unknown budget {config.budget!r}.',
      'config.budget',
      errors.did_you_mean(str(config.budget), (*BUDGETS, OWN)),
    )
  if not isinstance(config.controls, bool):
    raise errors.UserError(
      f'controls must be True or False, not {config.controls!r}.',
      'config.controls',
    )
  _check_numbers(config)


def _check_base(config: config_dict.ConfigDict) -> None:
  try:
    stages.create_stages(config.base)
  except errors.UserError as e:
    where = e.where.replace('config', 'config.base', 1)
    raise errors.UserError(e.what, where, e.suggestion) from None


def _check_numbers(config: config_dict.ConfigDict) -> None:
  tuning = config.tuning
  for field, value, low, high, whole in (
    ('seeds', config.seeds, 1, math.inf, True),
    ('timed_epochs', config.timed_epochs, 1, math.inf, True),
    ('target_top1', config.target_top1, 0, 1, False),
    ('tuning.seeds', tuning.seeds, 1, math.inf, True),
    ('tuning.first_seed', tuning.first_seed, config.seeds, math.inf, True),
    ('tuning.keep', tuning.keep, 1e-9, 1, False),
    *(('tuning.rungs', x, 1e-9, 1, False) for x in tuning.rungs),
    *(('tuning.factors', x, 1e-9, 1e9, False) for x in tuning.factors),
  ):
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
      kind = 'a whole number' if whole else 'a number'
      raise errors.UserError(
        f'{field} must be {kind}, not {value!r}.', f'config.{field}'
      )
    if not low <= value <= high:
      raise errors.UserError(
        f'{field} is {value:g}; it must be {_bounds(low, high)}.',
        f'config.{field}',
      )
  rungs = tuple(tuning.rungs)
  if tuning.factors and (not rungs or list(rungs) != sorted(set(rungs))):
    raise errors.UserError(
      f'rungs must rise: {rungs}.', 'config.tuning.rungs', 'Write (0.25, 0.5).'
    )
  if len(set(tuning.factors)) != len(tuning.factors):
    raise errors.UserError('A factor is there twice.', 'config.tuning.factors')


def _bounds(low: float, high: float) -> str:
  if low < 1e-6:
    return f'above 0 and at most {high:g}'
  return f'at least {low:g}' + (f', at most {high:g}' * (high < math.inf))

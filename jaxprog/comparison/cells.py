"""From a comparison's config to its cells; every mistake is found here.

A cell is the base ladder with some fields changed. Nothing is imported that
takes time, so that a typo costs a second.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard

from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import errors, stages
from jaxprog.fields import Field, unknown

_Budget = Literal['epochs', 'images', 'flops', 'seconds']
_BUDGETS: tuple[_Budget, ...] = ('epochs', 'images', 'flops', 'seconds')
# As a budget: every cell is as long as it says itself.
_OWN = 'own'
# The cell of a comparison that has controls or operators alone.
_LADDER = 'ladder'
# The control as long as it says itself, whose learning rate serves the others.
CONTROL = 'last_alone'
# Letters in the name of a cell, which file systems end at 255 bytes.
_MAX_NAME = 200
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
    equal: what its cost has in common with the reference's, of `_BUDGETS`; '':
      nothing, it is as long as it says itself.
    control: whether it is the last stage alone.
  """

  name: str
  overrides: Mapping[str, Any]
  only: tuple[str, ...] = ()
  labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
  equal: _Budget | Literal[''] = ''
  control: bool = False


def create_cells(config: config_dict.ConfigDict) -> tuple[Cell, ...]:
  """Returns the cells of a comparison, the reference first, controls last.

  The ladder of every cell has been validated.

  Raises:
    UserError: for the first mistake.
  """
  _check_fields(config)
  with _placing(lambda where: where.replace('config', 'config.base', 1)):
    stages.create_stages(config.base)
  found = [*_grid_cells(config)]
  found += [_explicit_cell(config, entry) for entry in config.cells]
  if not found and (config.operators or config.controls):
    found = [Cell(_LADDER, {})]
  if not found:
    raise errors.UserError(
      'The comparison has no cells.',
      'config.grid, config.cells and config.operators',
      "Write config.grid = ({'stages[-1].optimizer': ('adamw', 'rmsprop')},).",
    )
  found += [_operator_cell(config, entry) for entry in config.operators]
  equal: _Budget | Literal[''] = ''
  if config.budget != _OWN:
    equal = config.budget
  found = [dataclasses.replace(cell, equal=equal) for cell in found]
  found = _reference_first(config, found)
  if config.controls:
    found += _create_controls(config, found[0])
  _check_names(found)
  for cell in found:
    ladder = create_ladder(config, cell, config.base.seed)
    with in_cell(cell):
      trained_stages(ladder, cell)
  return tuple(found)


def create_ladder(
  config: config_dict.ConfigDict, cell: Cell, seed: int
) -> config_dict.ConfigDict:
  """Returns the config of one run of `cell`: the base, overridden."""
  ladder = stages.complete(config.base)
  for field, value in cell.overrides.items():
    where = f'cell {cell.name!r}: {field}={value!r}'
    for path in config_lib.locate(ladder, field, where):
      if config.budget != _OWN or not path.endswith('.num_epochs'):
        _check_field(path, len(ladder.stages), where)
    config_lib.set_field(ladder, field, value, where)
  ladder = stages.complete(ladder)
  ladder.seed = seed
  return ladder


@contextlib.contextmanager
def _placing(where: Callable[[str], str]) -> Iterator[None]:
  """Says by `where` in which part of a comparison a mistake's place is."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(e.what, where(e.where), e.suggestion) from None


def in_cell(cell: Cell) -> contextlib.AbstractContextManager[None]:
  """Names the cell in which a mistake is."""
  return _placing(lambda where: f'cell {cell.name!r}: {where}')


def trained_stages(
  ladder: config_dict.ConfigDict, cell: Cell
) -> tuple[stages.Stage, ...]:
  """Returns the stages that a run of `cell` trains, in order.

  Raises:
    UserError: for a mistake in them, or a teacher that is not among them.
  """
  chosen = stages.select(stages.create_stages(ladder), cell.only)
  names = [stage.name for stage in chosen]
  for i, stage in enumerate(chosen):
    teacher, _ = stage.teacher_stage
    if teacher and teacher not in names[:i]:
      raise errors.UserError(
        f'{teacher!r} teaches, and is not trained before this stage.',
        f'stage {stage.name!r}: distill_from={stage.distill_from}',
        "Set it to '' here, or train that stage too.",
      )
  return chosen


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
    paths: list[str] = []
    for _, changed in entries:
      overrides |= changed
      paths += {
        path
        for field in changed
        for path in config_lib.locate(config.base, field, 'config.grid')
      }
    twice = sorted(path for path in paths if paths.count(path) > 1)
    if twice:
      raise errors.UserError(
        f'Two axes of the grid change {twice[0]!r}.', 'config.grid'
      )
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
    if _are_fields(values):
      yield _safe(key), dict(values)
    elif isinstance(values, list | tuple) and len(axis) == 1:
      for value in values:
        yield _name_value(str(key), value), {str(key): value}
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


def _explicit_cell(config: config_dict.ConfigDict, entry: Any) -> Cell:
  name, overrides = _read_entry(entry, 'overrides', 'config.cells', ('stages',))
  where = f'cell {name!r}'
  field = Field('stages', tuple[str, ...], None)
  only = field.check(entry.get('stages', ()), where)
  known = [stage['name'] for stage in config.base.stages]
  for stage in only:
    if stage not in known:
      raise unknown(stage, known, 'stage', f'{where}.stages')
  return Cell(name, overrides, only)


def _operator_cell(config: config_dict.ConfigDict, entry: Any) -> Cell:
  where = 'config.operators'
  name, changed = _read_entry(entry, 'fields', where)
  if len(config.base.stages) < 2:
    raise errors.UserError(
      'A ladder of one stage hands nothing over.',
      where,
      'Leave operators empty, or give config.base a stage before.',
    )
  return Cell(name, {f'stages[-1].{k}': v for k, v in changed.items()})


def _read_entry(
  entry: Any, field: str, where: str, more: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
  """Returns the name of a cell, and what its `field` says that it changes."""
  known = ('name', field, *more)
  entries = entry if isinstance(entry, Mapping) else {}
  for key in entries:
    if key not in known:
      raise errors.UserError(
        f'Unknown field {key!r} of a cell.',
        where,
        errors.did_you_mean(str(key), known),
      )
  name, changed = entries.get('name'), entries.get(field)
  if not isinstance(name, str) or not _are_fields(changed):
    raise errors.UserError(
      f'A cell is not {entry!r}.',
      where,
      f"Write {{'name': 'wide', '{field}': {{FIELD: VALUE}}}}.",
    )
  if name != _safe(name):
    raise errors.UserError(
      f'The name of a cell is a directory, not {name!r}.',
      where,
      f'Name it {_safe(name)!r}.',
    )
  return name, dict(changed)


def _are_fields(changed: Any) -> TypeGuard[Mapping[str, Any]]:
  """Returns whether `changed` is a dict whose keys may be paths of fields."""
  return isinstance(changed, Mapping) and all(
    isinstance(field, str) for field in changed
  )


def _create_controls(
  config: config_dict.ConfigDict, reference: Cell
) -> list[Cell]:
  """Returns the reference's last stage alone: what a ladder has to beat.

  At its own length, and at the cost of the reference's whole ladder in FLOPs,
  in images and in seconds.
  """
  if len(config.base.stages) < 2:
    raise errors.UserError(
      'The last stage of a ladder of one is the ladder.',
      'config.controls',
      'Set controls to False, or give config.base a stage before.',
    )
  # A head on a backbone of fresh weights is not worth training.
  changed = {**reference.overrides, 'stages[-1].freeze_epochs': 0.0}
  ladder = create_ladder(config, reference, config.base.seed)
  if ladder.stages[-1].distill_from.startswith('stage:'):
    changed['stages[-1].distill_from'] = ''
  alone = Cell(
    CONTROL,
    changed,
    only=(stages.create_stages(config.base)[-1].name,),
    control=True,
  )
  kinds: tuple[_Budget, ...] = ('flops', 'images', 'seconds')
  return [
    alone,
    *(
      dataclasses.replace(alone, name=f'{CONTROL}_equal_{kind}', equal=kind)
      for kind in kinds
    ),
  ]


def _check_names(found: Sequence[Cell]) -> None:
  names = [cell.name for cell in found]
  for i, cell in enumerate(found):
    if len(cell.name) > _MAX_NAME:
      raise errors.UserError(
        f'The name of a cell is a directory, and too long: {cell.name!r}.',
        'config.grid, config.cells and config.operators',
        "In a grid names may be given: {'few': {FIELD: VALUE}, ...}.",
      )
    if cell.name in names[:i]:
      raise errors.UserError(
        f'{cell.name!r} is the name of a control.'
        if cell.control
        else f'Two cells are named {cell.name!r}.',
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
) -> list[Cell]:
  names = [cell.name for cell in found]
  reference = config.reference or names[0]
  if reference not in names:
    raise errors.UserError(
      f'The reference is no cell: {reference!r}.',
      'config.reference',
      errors.did_you_mean(reference, names),
    )
  return sorted(found, key=lambda cell: cell.name != reference)


def _check_fields(config: config_dict.ConfigDict) -> None:
  """Raises UserError for a mistake in the comparison's own fields."""
  for name in ('grid', 'cells', 'operators'):
    if not isinstance(config[name], list | tuple):
      raise errors.UserError(
        f'{name} must be a tuple of dicts, not {config[name]!r}.',
        f'config.{name}',
      )
  tuning = config.tuning
  for field in (  # Their defaults are those of configs/compare_default.py.
    Field('budget', str, None, choices=(*_BUDGETS, _OWN)),
    Field('controls', bool, None),
    Field('seeds', int, None, within='[1, inf)'),
    Field('max_seeds', int, None, within=f'0 or [{config.seeds}, inf)'),
    Field('margin', float, None, within='[0, 1)'),
    Field('pilot', str, None),
    Field('timed_epochs', int, None, within='[1, inf)'),
    Field('target_top1', float, None, within='[0, 1]'),
    Field('tuning.seeds', int, None, within='[1, inf)'),
    # Trials have other seeds than what is compared.
    Field('tuning.first_seed', int, None, within=f'[{config.seeds}, inf)'),
    Field('tuning.keep', float, None, within='(0, 1]'),
    Field('tuning.rungs', tuple[float, ...], None, within='(0, 1]'),
    Field('tuning.factors', tuple[float, ...], None, within='(0, 1e9]'),
  ):
    own = field.name.removeprefix('tuning.')
    field.check((config if own == field.name else tuning)[own], 'config')
  rungs = tuple(tuning.rungs)
  if tuning.factors and (not rungs or list(rungs) != sorted(set(rungs))):
    raise errors.UserError(
      f'rungs must rise: {rungs}.', 'config.tuning.rungs', 'Write (0.25, 0.5).'
    )
  if len(set(tuning.factors)) != len(tuning.factors):
    raise errors.UserError('A factor is there twice.', 'config.tuning.factors')

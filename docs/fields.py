"""Prints docs/fields.md; run it with PYTHONPATH=. from a checkout."""

import inspect
import re

from jaxprog import fields

_INTRODUCTION = """# Every field

Made from [jaxprog/fields.py](../jaxprog/fields.py), where each is declared. A
config sets `config.FIELD`; a stage is a dict, and what it leaves out comes from
`config.stage_defaults`. What a cell leaves empty is told with the field above.
Numbers are at least 0 where nothing else is said.

*resume*: a run that has begun may go on with another value. *hosts*: the hosts
of one run may differ in it. *phases*: it may change within a stage. *sweeps*: a
sweep over it compiles once, but for 0:
[docs/compare.md](compare.md#trials-do-not-compile)."""


def to_markdown() -> str:
  """Returns docs/fields.md."""
  tables = (
    ('Of the run', fields.ConfigFields, fields.CONFIG),
    ('Of a stage', fields.StageFields, fields.STAGE),
  )
  lines = [_INTRODUCTION]
  for title, cls, declared in tables:
    comments = _read_comments(cls)
    lines += [
      f'\n## {title}',
      '| field | default | values | may change | |',
      '|---|---|---|---|---|',
      *(_describe(x, comments.get(x.name, '')) for x in declared.values()),
    ]
  return '\n'.join(lines) + '\n'


def _read_comments(cls: type) -> dict[str, str]:
  """Returns what the source says above each field that has a comment."""
  found, comment = {}, ''
  for line in inspect.getsource(cls).splitlines():
    declared = re.match(r'  (\w+): ', line)
    if line.startswith('  # '):
      comment += line[3:]
    elif declared:
      found[declared[1]] = comment.strip()
      comment = ''
  return found


def _describe(x: fields.Field, comment: str) -> str:
  """Returns the row of a field."""
  facts = {
    'resume': x.free,
    'hosts': x.local,
    'phases': x.phase,
    'sweeps': x.number,
  }
  may = ', '.join(fact for fact, true in facts.items() if true)
  default = f'{x.default:g}' if x.kind is float else repr(x.default)
  values = ', '.join(f'`{choice}`' for choice in x.choices)
  if values and x.pattern != fields.Field.pattern:
    values = f'such as {values}'
  if values and x.kind == tuple[str, ...]:
    values = f'any of {values}'
  if not values:
    values = fields.WANTED[x.kind].removeprefix('a ')
    if x.within != fields.Field.within:
      values += f' in {x.within}'
  values += f', {x.unit}' * bool(x.unit)
  return f'| `{x.name}` | `{default}` | {values} | {may} | {comment} |'


if __name__ == '__main__':
  print(to_markdown(), end='')

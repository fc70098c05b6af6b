"""A room imports only rooms below it, and modules of a room go no circle."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parent.parent / 'jaxprog'
# From the ground up; rooms of one row know nothing of each other.
ROWS = (
  ('errors', 'version'),
  ('files', 'formats', 'fields', 'named'),
  ('buckets',),
  ('paths', 'stages'),
  ('epochs', 'config'),
  ('models', 'data', 'optim', 'reliability'),
  ('monitoring',),
  ('reporting',),
  ('training',),
  ('planning',),
  ('comparison',),
  ('tools',),
  ('cli',),
  ('__main__',),
)
LEVELS = {room: level for level, row in enumerate(ROWS) for room in row}


def list_modules():
  for path in ROOT.rglob('*.py'):
    parts = path.relative_to(ROOT).with_suffix('').parts
    if parts[-1] != '__init__':
      yield '.'.join(parts), path


MODULES = dict(list_modules())


def list_imports(name):
  """Yields the modules of ours that one imports, in functions too."""
  for node in ast.walk(ast.parse(MODULES[name].read_text())):
    if isinstance(node, ast.ImportFrom):
      base = f'{node.module}.'.removeprefix('jaxprog.').rstrip('.')
      for alias in node.names:
        for found in (f'{base}.{alias.name}'.lstrip('.'), base):
          if found in MODULES:
            yield found
            break


def room(module):
  return module.partition('.')[0]


def test_no_arrow_climbs():
  climbing = [
    f'{name} -> {found}'
    for name in MODULES
    for found in list_imports(name)
    if room(found) != room(name) and LEVELS[room(found)] >= LEVELS[room(name)]
  ]
  assert not climbing


def test_no_circle():
  graph = {name: set(list_imports(name)) for name in MODULES}
  graphlib.TopologicalSorter(graph).prepare()

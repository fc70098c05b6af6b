"""What a step costs, told from its trace and from its compiled program.

Nothing runs here and nothing asks for the devices of this machine: a step that
was compiled for other hardware answers as well.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.extend import core

from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib
from jaxprog.training.transfer import handover


class Memory(NamedTuple):
  """Bytes of each device that a compiled step needs while it runs."""

  # Arguments, results that do not take their place, and temporaries.
  total: int
  temporaries: int


def steps_by_program(task: setup_lib.Task) -> dict[setup_lib.Program, int]:
  """Returns how many steps of a stage each of its programs takes."""
  steps = task.steps
  counts = dict.fromkeys(task.train_steps, 0)
  for start, end in itertools.pairwise((*steps.starts, steps.total)):
    counts[task.program(start)] += end - start
  return counts


def count_handover(task: setup_lib.Task) -> tuple[int, float]:
  """Returns the training images that a hand-over to a stage takes, and FLOPs.

  Those of its passes over them; what changes weights one by one is left out, as
  an optimizer's update is.
  """
  num_images, repeats, traces = handover.trace_passes(task)
  flops = sum(count_flops(trace.jaxpr) for trace in traces)
  return num_images, repeats * flops


def read_memory(compiled: jax.stages.Compiled) -> Memory | None:
  """Returns what the compiler says of memory, None where it says nothing."""
  try:
    found: Any = compiled.memory_analysis()
  except (NotImplementedError, RuntimeError):
    return None
  if found is None:
    return None
  lasting = found.argument_size_in_bytes + found.output_size_in_bytes
  temporary = found.temp_size_in_bytes
  # The donated state is an argument and a result.
  return Memory(lasting - found.alias_size_in_bytes + temporary, temporary)


def read_traffic(compiled: jax.stages.Compiled) -> float:
  """Returns the bytes that a device's step reads and writes in its memory.

  As the compiler counts them; where it does not (on GPUs), those of the
  operands and results of all operations between fusions. Loops count once.
  """
  if counted := (compiled.cost_analysis() or {}).get('bytes accessed'):
    return counted
  operations = read_operations(compiled.as_text() or '')
  return float(sum(x.num_bytes for x in operations))


# Operations that move nothing.
_VIEWS = {'bitcast', 'constant', 'get-tuple-element', 'parameter', 'tuple'}


class Operation(NamedTuple):
  """A line of a compiled program that reads or writes memory."""

  # As HLO's text has it: '%copy.3', 'fusion', all of the line.
  name: str
  kind: str
  line: str
  # What it reads and writes.
  num_bytes: int


def read_operations(program: str) -> list[Operation]:
  """Returns the operations of the entry of HLO's text.

  Those of its entry alone: what happens within a fusion stays on the chip.
  Of an operation that begins and ends apart, the beginning is there. Room that
  a library's kernels work in (results in bytes, u8) does not count.
  """
  entry = program[program.find('\nENTRY ') :]
  found = re.finditer(
    r'^\s*(?:ROOT )?(%\S+) = (.*?) ([\w-]+)\((.*?)\)(?:, .*|$)', entry, re.M
  )
  shapes: dict[str, int] = {}
  operations = []
  for match in found:
    name, shape, kind, operands = match.groups()
    if kind == 'custom-call':
      shape = re.sub(r'\bu8\[[^\]]*\]', '', shape)
    shapes[name] = _shape_bytes(shape)
    if kind not in _VIEWS and not kind.endswith('-done'):
      read = re.findall(r'%[\w.-]+', operands)
      num_bytes = shapes[name] + sum(shapes.get(x, 0) for x in read)
      operations.append(Operation(name, kind, match[0], num_bytes))
  return operations


_COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-permute',
  'reduce-scatter',
)
_BITS = {'bf16': 16, 'pred': 8}


def read_collectives(program: str) -> list[int]:
  """Returns the bytes that each device puts into a program's exchanges.

  It is compiled, and given as HLO's text. An exchange of many arrays is one.
  Loops count once. What is counted of one that begins and ends apart is its
  beginning.
  """
  names = '|'.join(_COLLECTIVES)
  found = re.finditer(
    rf'^\s*(?:ROOT )?%?\S+ = (.*?) ({names})(-start)?\(', program, re.M
  )
  sizes = []
  for shapes, kind, starts in (x.groups() for x in found):
    size = _shape_bytes(shapes)
    # Of what begins, both operand and result are named; of sums alone by the
    # XLA of jax 0.11 and later.
    if starts and (kind != 'all-reduce' or shapes.startswith('((')):
      size //= 2
    sizes.append(size)
  return sizes


def _shape_bytes(shape: str) -> int:
  """Returns the bytes of an array or of a tuple of them, as HLO writes it."""
  arrays = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shape)
  return sum(map(_array_bytes, arrays))


def _array_bytes(array: tuple[str, str]) -> int:
  dtype, sides = array
  bits = _BITS.get(dtype) or int(re.sub(r'\D', '', dtype) or 8)
  return math.prod(int(x) for x in sides.split(',') if x) * bits // 8


def count_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> float:
  """Returns the FLOPs of all convolutions and matrix products of a trace.

  A multiplication and an addition are two. Zeros that pad an image count and
  those that spread one do not: what papers call 4.09 GMAC of a ResNet-50 are
  8.18 GFLOP here. Each convolution counts as what it stands for, however CPUs
  compute it. Loops count as often as they run, those that end by themselves
  (`lax.while_loop`) once. What nothing depends on does not count. Everything
  else (normalisation, augmentation, the optimizer) is left out: XLA's own
  count has it, but knows neither loops nor this formulation.
  """
  return sum(map(_equation_flops, _needed(_open(jaxpr))))


def _open(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> core.Jaxpr:
  return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _needed(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
  """Yields the equations that the results depend on, the last one first."""
  needed = set(_variables(jaxpr.outvars))
  for equation in reversed(jaxpr.eqns):
    if equation.effects or needed.intersection(equation.outvars):
      needed.update(_variables(equation.invars))
      yield equation


def _variables(atoms: Any) -> list[core.Var]:
  return [x for x in atoms if not isinstance(x, core.Literal)]


def _equation_flops(equation: core.JaxprEqn) -> float:
  match equation.primitive.name:
    case 'conv_general_dilated':
      return _convolution_flops(equation)
    case 'dot_general':
      return _product_flops(equation)
    case 'scan':
      return equation.params['length'] * count_flops(equation.params['jaxpr'])
  return sum(map(count_flops, _inner(equation)))


def _convolution_flops(equation: core.JaxprEqn) -> float:
  kernel: Any = equation.invars[1].aval
  output: Any = equation.outvars[0].aval
  features = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
  spread = math.prod(equation.params['lhs_dilation'])
  return 2 * output.size * kernel.size / features / spread


def _product_flops(equation: core.JaxprEqn) -> float:
  (contracted, _), _ = equation.params['dimension_numbers']
  left: Any = equation.invars[0].aval
  output: Any = equation.outvars[0].aval
  return 2 * output.size * math.prod(left.shape[i] for i in contracted)


def _inner(equation: core.JaxprEqn) -> list[core.Jaxpr]:
  """Returns the traces within an equation; of branches, the last.

  The last one is the default of those that depend on the platform: CPUs have
  their own.
  """
  found = []
  for value in equation.params.values():
    if isinstance(value, tuple | list) and value:
      value = value[-1]
    if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
      found.append(_open(value))
  return found


def estimate_bytes(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
  """Returns the most bytes that are alive at once, computed line by line.

  Arguments last until they are used, as if all were donated. An estimate over
  all devices together, of a program that nobody has compiled:
  compilers join operations and so store less, and CPUs' convolutions need room
  of their own (ResNet-18, batch 64 of 64 px: 286 MB estimated, 409 compiled).
  """
  jaxpr = _open(jaxpr)
  last = {
    variable: i
    for i, equation in enumerate(jaxpr.eqns)
    for variable in _variables([*equation.invars, *equation.outvars])
  }
  last.update(dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns)))
  dying: dict[int, list[core.Var]] = {}
  for variable, i in last.items():
    dying.setdefault(i, []).append(variable)
  given = [*jaxpr.invars, *jaxpr.constvars]
  alive = peak = sum(map(_count_bytes, given))
  for i, equation in enumerate(jaxpr.eqns):
    alive += sum(map(_count_bytes, equation.outvars))
    peak = max(peak, alive + max(map(_own_bytes, _inner(equation)), default=0))
    alive -= sum(map(_count_bytes, dying.get(i, ())))
  return peak


def _own_bytes(jaxpr: core.Jaxpr) -> int:
  """Returns what an inner trace holds besides its arguments and results."""
  ends = [*jaxpr.invars, *jaxpr.constvars, *_variables(jaxpr.outvars)]
  return max(0, estimate_bytes(jaxpr) - sum(map(_count_bytes, ends)))


def _count_bytes(variable: core.Var) -> int:
  aval: Any = variable.aval
  dtype = getattr(aval, 'dtype', None)
  return aval.size * dtype.itemsize if dtype is not None else 0


def summarise_layers(
  model: nn.Module, variables: Any, image_size: int
) -> list[dict[str, Any]]:
  """Returns the groups of a network's modules, in the order of the forward.

  Modules whose names agree up to the first '_' are a group: stem, block1, head.
  Of each: `name`, number of `modules`, `parameters`, the shape that the last
  one `output`s for one image, and that image's `flops`, forward: counted from
  each kernel and the size of what it makes, as `count_flops` counts them.
  """
  flops: dict[str, float] = {}
  outputs: dict[str, tuple[int, ...]] = {}

  def note(function, arguments, keywords, context):
    output = function(*arguments, **keywords)
    path = context.module.path
    if path and context.method_name == '__call__':
      kernel = context.module.variables.get('params', {}).get('kernel')
      if kernel is not None:
        made = 2 * output.size * kernel.size / kernel.shape[-1]
        flops[path[0]] = flops.get(path[0], 0) + made
      outputs[path[0]] = output.shape[1:]
    return output

  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), 'float32')
  apply = functools.partial(model.apply, train=False)
  with nn.intercept_methods(note):
    jax.eval_shape(apply, variables, images)
  groups: dict[str, list[str]] = {}
  for name in outputs:
    groups.setdefault(name.split('_')[0], []).append(name)
  params = variables['params']
  return [
    {
      'name': group,
      'modules': len(names),
      'parameters': state_lib.count_params([params.get(x, {}) for x in names]),
      'output': outputs[names[-1]],
      'flops': sum(flops.get(name, 0) for name in names),
    }
    for group, names in groups.items()
  ]

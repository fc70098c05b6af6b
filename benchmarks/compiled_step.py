"""Compiles the training step for TPUs or GPUs, ours beside plain Flax.

None is needed, only the compiler: pip install --editable '.[tpu]', '.[cuda]'.
Both are the same network, batch and bf16; 'plain' is what a JAX user writes:
nn.Conv, nn.BatchNorm, optax's SGD with momentum, images that come normalised.
Ours is the step that training itself compiles, from uint8 images on, with
mirroring, masks, metrics and the guard against steps that are not finite.

Prints per image and chip what the compiler counts: bytes read and written in
HBM (where it counts none, on GPUs, those of the operands and results of all
operations), FLOPs; and per step temporaries, exchanges between chips and their
bytes, and the operations, each a kernel or a library's call: how many of them
are fusions, copies, fusions that transpose and convolutions of cuDNN's.

  python benchmarks/compiled_step.py --batch_norm=global,per_device
  python benchmarks/compiled_step.py --topology=h100:1
"""

import argparse
import time
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxprog
from jaxprog.models import conv, norm, resnet
from jaxprog.planning import chips, costs, elsewhere
from jaxprog.training import devices, xla_flags
from jaxprog.training import setup as setup_lib


def main() -> None:
  """Prints a row for each program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet50')
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument('--batch_size', type=int, default=256, help='a chip')
  parser.add_argument('--num_filters', type=int, default=64)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--topology', default='v5e:2x2')
  parser.add_argument('--batch_norm', default='global', help='a,b')
  parser.add_argument('--remat', default='none', help='a,b')
  parser.add_argument('--xla_flags', default='none', choices=xla_flags.PRESETS)
  parser.add_argument('--no_plain', action='store_true')
  parser.add_argument('--hlo', help='where to write the compiled programs')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  topology = chips.parse_topology(args.topology)
  options = elsewhere.compiler_options(args.xla_flags, topology)
  if not args.no_plain:
    plain = trace_plain(args, topology)[0].lower()
    describe('plain Flax', plain, options, args)
  for batch_norm in args.batch_norm.split(','):
    for remat in args.remat.split(','):
      lowered = lower_ours(args, topology, batch_norm, remat)
      describe(f'jaxprog {batch_norm} {remat}', lowered, options, args)


def lower_ours(args, topology, batch_norm, remat):
  """Returns the step that training compiles, lowered."""
  task = create_task(args, topology, batch_norm, remat)
  (program,) = task.train_steps
  return task.trace_train_step(program).lower()


def create_task(args, topology, batch_norm='global', remat='none'):
  """Returns ImageNet's stage as training makes it."""
  config = jaxprog.load_config('configs/progressive.py')
  config.model, config.batch_norm, config.remat = args.model, batch_norm, remat
  config.num_filters, config.dtype = args.num_filters, args.dtype
  *_, stage = config.stages
  stage['image_size'] = args.image_size
  stage['batch_size'] = args.batch_size * topology.num_chips
  setup = elsewhere.create_setup(config, topology, (stage['name'],), ())
  return setup_lib.create_task(setup, *setup.chosen)


def trace_plain(args, topology):
  """Returns the traces of the plain step, and of what draws its state."""
  with (
    mock.patch.object(conv, 'Conv', plain_conv),
    mock.patch.object(conv, 'max_pool', conv.xla_max_pool),
    mock.patch.object(norm, 'BatchNorm', plain_norm),
  ):
    return trace_network(args, topology)


def plain_conv(features, kernel_size, strides=1, **kwargs) -> nn.Conv:
  """Returns Flax's own convolution with the padding that ours has."""
  half = kernel_size // 2
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides,
    padding=((half, half), (half, half)),
    use_bias=False,
    **kwargs,
  )


def plain_norm(groups: int, **kwargs) -> 'PlainNorm':
  """Returns Flax's own normalisation of the whole batch."""
  del groups
  return PlainNorm(**kwargs)


class PlainNorm(nn.BatchNorm):
  """Pools after it has normalised."""

  def __call__(self, x, pool=None):
    """Returns what `pool` leaves of normalised images."""
    x = super().__call__(x)
    return x if pool is None else pool(nn.relu(x))


def kernels_alone(params):
  """Returns which of the parameters decay."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def trace_network(args, topology):
  """Returns both for a step as a JAX user writes it."""
  model = resnet.create_model(
    args.model,
    num_classes=1000,
    image_size=args.image_size,
    num_filters=args.num_filters,
    dtype=args.dtype,
  )
  tx = optax.chain(
    optax.add_decayed_weights(1e-4, kernels_alone),
    optax.sgd(0.1, 0.9),
  )
  replicated, divided = devices.create_shardings(chips.create_mesh(topology))
  side, total = args.image_size, args.batch_size * topology.num_chips
  images = jax.ShapeDtypeStruct(
    (total, side, side, 3), jnp.dtype(args.dtype), sharding=divided
  )
  labels = jax.ShapeDtypeStruct((total,), jnp.int32, sharding=divided)

  def init(rng):
    variables = model.init(rng, jnp.zeros((1, side, side, 3)), train=False)
    return variables, tx.init(variables['params'])

  def loss_fn(params, batch_stats, images, labels):
    logits, changed = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), changed['batch_stats']

  def step(state, images, labels):
    variables, opt_state = state
    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(
      variables['params'], variables['batch_stats'], images, labels
    )
    updates, opt_state = tx.update(grads, opt_state, variables['params'])
    params = optax.apply_updates(variables['params'], updates)
    return {'params': params, 'batch_stats': batch_stats}, opt_state

  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    jax.eval_shape(init, jax.random.key(0)),
  )
  jitted = jax.jit(step, out_shardings=replicated, donate_argnums=0)
  drawing = jax.jit(init, out_shardings=replicated)
  return jitted.trace(state, images, labels), drawing.trace(jax.random.key(0))


def describe(name: str, lowered, options, args) -> None:
  """Compiles a program and prints what the compiler says of it."""
  begin = time.perf_counter()
  compiled = lowered.compile(compiler_options=options)
  seconds = time.perf_counter() - begin
  text = compiled.as_text()
  if args.hlo:
    with open(f'{args.hlo}/{name.replace(" ", "_")}.hlo', 'w') as file:
      file.write(text)
  memory = costs.read_memory(compiled)
  sums = costs.read_collectives(text)
  traffic = costs.read_traffic(compiled) / args.batch_size
  flops = (compiled.cost_analysis() or {}).get('flops', 0) / args.batch_size
  counted = f'{flops / 1e9:6.2f} GFLOP/image ' if flops else ''
  print(
    f'{name:26} {traffic / 1e6:7.1f} MB/image {counted}'
    f'{memory.temporaries / 1e9:6.2f} GB temporary '
    f'{len(sums):4} exchanges {sum(sums) / 1e6:7.1f} MB '
    f'({seconds:.0f} s to compile)\n{"":26} {count_operations(text)}',
    flush=True,
  )


def count_operations(program: str) -> str:
  """Returns how many operations a compiled program has, all and by kind."""
  operations = costs.read_operations(program)
  counts = {
    'fusions': sum(x.kind == 'fusion' for x in operations),
    'copies': sum(x.kind.startswith('copy') for x in operations),
    'transposing fusions': sum('transpose' in x.name for x in operations),
    'cuDNN convolutions': sum('"__cudnn$conv' in x.line for x in operations),
  }
  parts = ', '.join(f'{count} {kind}' for kind, count in counts.items())
  return f'{len(operations)} operations: {parts}'


if __name__ == '__main__':
  main()

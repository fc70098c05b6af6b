"""Compiles a training step for a TPU v5e chip, ours and with plain nn.Conv.

No TPU is needed, only `pip install libtpu`. The two programs should be the
same: what makes convolutions fast on CPU must not leak into others. Prints
FLOPs, bytes and memory as the compiler counts them, and the convolutions.

  TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_step.py --model=resnet18
"""

import argparse
import re
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprog.models import conv, resnet


def main() -> None:
  """Prints a row for each program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet18')
  parser.add_argument('--image_size', type=int, default=64)
  parser.add_argument('--batch_size', type=int, default=128)
  parser.add_argument('--topology', default='v5e:2x2')
  args = parser.parse_args()
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=args.topology
  )
  mesh = Mesh(topology.devices, ('data',), axis_types=(AxisType.Auto,))
  describe('jaxprog', compile_step(args, mesh))
  with (
    mock.patch.object(conv, 'Conv', plain_conv),
    mock.patch.object(conv, 'max_pool', conv.xla_max_pool),
  ):
    describe('nn.Conv', compile_step(args, mesh))


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


def compile_step(args: argparse.Namespace, mesh):
  """Returns the compiled bf16 step of SGD with momentum."""
  model = resnet.create_model(
    args.model,
    num_classes=1000,
    image_size=args.image_size,
    dtype=jnp.bfloat16,
  )
  tx = optax.sgd(0.1, 0.9)
  replicated = NamedSharding(mesh, PartitionSpec())
  divided = NamedSharding(mesh, PartitionSpec('data'))
  side = args.image_size
  images = jax.ShapeDtypeStruct(
    (args.batch_size, side, side, 3), jnp.float32, sharding=divided
  )
  labels = jax.ShapeDtypeStruct((args.batch_size,), jnp.int32, sharding=divided)

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
    updates, opt_state = tx.update(grads, opt_state)
    params = optax.apply_updates(variables['params'], updates)
    return {'params': params, 'batch_stats': batch_stats}, opt_state

  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    jax.eval_shape(init, jax.random.key(0)),
  )
  jitted = jax.jit(step, donate_argnums=0)
  return jitted.lower(state, images, labels).compile()


def describe(name: str, compiled) -> None:
  """Prints what the compiler says of a program."""
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  text = compiled.as_text()
  convolutions = len(re.findall(r' convolution\(', text))
  print(
    f'{name:8} {cost["flops"] / 1e9:9.3f} GFLOP '
    f'{cost["bytes accessed"] / 1e6:9.2f} MB accessed '
    f'{memory.temp_size_in_bytes / 1e6:8.2f} MB temporary '
    f'{convolutions:4d} convolutions'
  )


if __name__ == '__main__':
  main()

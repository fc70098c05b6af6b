"""What a ladder will take on hardware that nobody has yet."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import rich.table
import rich.text

from jaxprog import formats
from jaxprog.planning import here as plan_lib


@dataclasses.dataclass(frozen=True)
class Step:
  """One compiled step of a stage, as one chip takes it.

  Bytes and FLOPs are those of the compiled program; seconds are those that
  the chip's published rates allow, with nothing lost.
  """

  batch_size: int
  image_size: int
  steps: int
  # Convolutions and matrix products of the whole batch over all chips.
  flops: float
  # Of its memory: read and written; all that is needed, and what of it grows
  # with the batch.
  traffic_bytes: float
  memory_bytes: int
  activation_bytes: int
  collectives: int
  collective_bytes: int
  compute_seconds: float
  memory_seconds: float
  network_seconds: float
  compile_seconds: float

  def seconds(self, utilization: float) -> float:
    """Returns what a step takes at a part of the chip's own rates.

    What the network takes is added: nothing says that it hides.
    """
    own = max(self.compute_seconds, self.memory_seconds) / utilization
    return own + self.network_seconds


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """A stage on `num_chips` chips; bytes are those of one of them."""

  name: str
  dataset: str
  dtype: str
  storage: str
  num_train_images: int
  num_eval_images: int
  num_epochs: float
  num_evaluations: int
  num_chips: int
  chip_bytes: float
  utilization: float
  # Images a second that one core makes ready, and the cores of each chip.
  images_per_core: float
  cores_per_chip: float
  # 0: unknown.
  chip_hour_price: float
  steps: tuple[Step, ...]
  notes: tuple[str, ...] = ()

  @property
  def largest(self) -> Step:
    """The step that needs most memory."""
    return max(self.steps, key=lambda x: x.memory_bytes)

  @property
  def fits(self) -> bool:
    """Whether every step has room in the chip's memory."""
    return self.largest.memory_bytes <= self.chip_bytes

  @property
  def largest_batch(self) -> int:
    """About the largest global batch that fits: what fits per chip, even.

    What grows with the batch is taken to grow in proportion to it.
    """
    step = self.largest
    fixed = step.memory_bytes - step.activation_bytes
    a_chip = step.batch_size / self.num_chips
    room = (self.chip_bytes - fixed) * a_chip / max(step.activation_bytes, 1)
    return max(int(room) // 2 * 2, 0) * self.num_chips

  @property
  def num_steps(self) -> int:
    """Of the whole stage."""
    return sum(step.steps for step in self.steps)

  @property
  def num_images(self) -> int:
    """That the stage trains on, each as often as it is seen."""
    return sum(step.steps * step.batch_size for step in self.steps)

  @property
  def flops_per_image(self) -> float:
    """Mean over the stage, gradients included."""
    return sum(x.steps * x.flops for x in self.steps) / self.num_images

  @property
  def traffic_per_image(self) -> float:
    """Bytes of memory read and written for an image, mean over the stage."""
    a_chip = sum(x.steps * x.traffic_bytes for x in self.steps)
    return a_chip * self.num_chips / self.num_images

  @property
  def device_seconds(self) -> float:
    """All steps, were the input always there."""
    return sum(x.steps * x.seconds(self.utilization) for x in self.steps)

  @property
  def chip_rate(self) -> float:
    """Images a second of one chip, were the input always there."""
    return self.num_images / self.device_seconds / self.num_chips

  @property
  def input_rate(self) -> float:
    """Images a second that the hosts' cores make ready for one chip."""
    return self.images_per_core * self.cores_per_chip

  @property
  def cores_needed(self) -> float:
    """Cores for each chip, so that it does not wait."""
    return self.chip_rate / self.images_per_core

  @property
  def images_per_second(self) -> float:
    """Of one chip, input and all."""
    return min(self.chip_rate, self.input_rate)

  @property
  def bound_by(self) -> str:
    """What takes most of a step: compute, memory, network or input."""
    if self.input_rate < self.chip_rate:
      return 'input'
    parts = {
      name: sum(x.steps * getattr(x, f'{name}_seconds') for x in self.steps)
      for name in ('compute', 'memory', 'network')
    }
    return max(parts, key=lambda name: parts[name])

  @property
  def hours(self) -> float:
    """Training and evaluations; an evaluated image is a third of the work."""
    evaluated = self.num_evaluations * self.num_eval_images / 3
    rate = self.images_per_second * self.num_chips
    return (self.num_images + evaluated) / rate / 3600

  @property
  def cost(self) -> float | None:
    """Of all chips for the stage, None without a price."""
    if not self.chip_hour_price:
      return None
    return self.hours * self.num_chips * self.chip_hour_price

  def figures(self) -> dict[str, Any]:
    """Returns all of it as plain values."""
    derived = (
      'fits',
      'largest_batch',
      'num_steps',
      'num_images',
      'flops_per_image',
      'traffic_per_image',
      'images_per_second',
      'bound_by',
      'cores_needed',
      'hours',
      'cost',
    )
    return {
      **dataclasses.asdict(self),
      **{name: getattr(self, name) for name in derived},
    }


def tables(plans: Sequence[StagePlan]) -> Iterator[rich.table.Table]:
  """Yields what a step needs of a chip, then what the stages take."""
  needs = plan_lib.create_table(
    'stage', 'px', 'batch', 'a chip', 'HBM', 'fits', 'largest', 'sums', 'of'
  )
  for plan in plans:
    step = plan.largest
    needs.add_row(
      plan.name,
      f'{step.image_size}',
      f'{step.batch_size:,}',
      f'{step.batch_size / plan.num_chips:g}',
      formats.size(step.memory_bytes),
      rich.text.Text('yes' if plan.fits else 'NO', '' if plan.fits else 'red'),
      f'~{plan.largest_batch:,}',
      f'{step.collectives or "-"}',
      formats.size(step.collective_bytes or None) or '-',
    )
  yield needs
  takes = plan_lib.create_table(
    'stage',
    'FLOPs',
    'traffic',
    'bound by',
    'images/s',
    'cores',
    'hours',
    'cost',
  )
  for plan in plans:
    takes.add_row(
      plan.name,
      formats.flops(plan.flops_per_image),
      formats.size(plan.traffic_per_image),
      plan.bound_by,
      f'{plan.images_per_second:,.0f}',
      f'{plan.cores_needed:.1f}',
      formats.hours(plan.hours),
      formats.cost(plan.cost),
    )
  takes.add_row(
    'ladder',
    *[''] * 5,
    formats.hours(sum(plan.hours for plan in plans)),
    formats.cost(total_cost(plans)),
    style='bold',
  )
  yield takes


def total_cost(plans: Sequence[StagePlan]) -> float | None:
  """Returns what all stages cost, None without a price."""
  costs = [plan.cost for plan in plans]
  return None if None in costs else sum(filter(None, costs))


def notes(plans: Sequence[StagePlan]) -> list[str]:
  """Returns a sentence on each thing that stands in the way."""
  found = []
  for plan in plans:
    step = plan.largest
    if not plan.fits:
      found.append(
        f'{plan.name}: does not fit: a step needs '
        f'{formats.size(step.memory_bytes)} of '
        f"{formats.size(plan.chip_bytes)}. Set remat='blocks', or a "
        'smaller micro_batch_size or batch_size.'
      )
    if plan.bound_by == 'input':
      found.append(
        f'{plan.name}: waits for its input: a chip could take '
        f'{plan.chip_rate:,.0f} images/s and its {plan.cores_per_chip:g} cores '
        f'make {plan.input_rate:,.0f}, stored as {plan.storage}. Set storage '
        "to 'raw:256' or 'jpeg:256', or image_size lower."
      )
    found += [f'{plan.name}: {note}' for note in plan.notes]
  return found

"""Numbers that a compiled step takes as arguments, with the bits of constants.

XLA computes with a constant what it can before the step runs, and divides by it
with a multiplication. Whoever passes a number does the same here.
"""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Number:
  """A number, and what is computed of it: optax takes it for a float."""

  value: Any
  # 1 - value, 1 / value and value ** 2.
  rest: Any
  inverse: Any
  square: Any

  def __rsub__(self, one: float) -> Any:
    assert one == 1
    return self.rest

  def __mul__(self, other: Any) -> Any:
    return self.value * other

  def __rtruediv__(self, other: Any) -> Any:
    return other * self.inverse

  def __pow__(self, power: Any) -> Any:
    if isinstance(power, int):
      assert power == 2
      return self.square
    return self.value**power


def create_number(value: float) -> Number:
  """Returns what stands for `value`; at 0 it has no inverse."""
  return Number(value, 1 - value, inverse(value) if value else 0.0, value**2)


def inverse(value: float) -> float:
  """Returns what a division by a constant multiplies with."""
  return float(np.float32(1) / np.float32(value))

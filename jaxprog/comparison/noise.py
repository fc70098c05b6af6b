"""What evaluation images and seeds leave uncertain of a mean over runs.

Other seeds show in how far apart runs lie. Other images do not: all runs are
evaluated on the same ones, and may all owe the same part of their accuracy to
them. So no error here is smaller than what the images leave uncertain. Where it
is known which images each run has right, that is counted, image by image; else
it is that of as many independent ones. docs/compare.md shows how often equal
cells are then told apart.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from jaxprog.comparison.sequential import ERROR


class Noise(NamedTuple):
  """What the evaluation images leave uncertain of a mean over runs.

  `own` is the variance by which each run is lucky for itself, so that it shows
  in how far apart runs lie; `shared` is that by which all of them are, and more
  runs do not lessen it. `freedom` are the degrees of freedom of their sum.
  Numbers, or arrays of many cases at once.
  """

  own: Any
  shared: Any = 0.0
  freedom: Any = math.inf


class Error(NamedTuple):
  """A standard error: its size, and how its multiples are distributed.

  `freedom` are its degrees of freedom up to a level of ERROR. Beyond, they are
  those of the seeds, `tail`: a few that lie close by chance are taken for seeds
  without an effect, which is too seldom to matter in 5% of all cases, and far
  too often in 0.5%. So limits below ERROR stand to that at ERROR as they do in
  a t-test over seeds. Numbers, or arrays of many cases.
  """

  size: Any
  freedom: Any
  tail: Any

  def half(self, level: float) -> Any:
    """Returns half an interval that misses in a part `level` of all cases."""
    if level >= ERROR:
      return special.stdtrit(self.freedom, 1 - level / 2) * self.size
    return special.stdtrit(self.tail, 1 - level / 2) * self._tail_size

  def p_value(self, distance: Any) -> Any:
    """Returns how often a mean lies so far off, or farther, on either side."""
    near = 2 * special.stdtr(self.freedom, -abs(distance) / self.size)
    far = 2 * special.stdtr(self.tail, -abs(distance) / self._tail_size)
    return np.where(near >= ERROR, near, far)

  @property
  def _tail_size(self) -> Any:
    limits = (
      special.stdtrit(x, 1 - ERROR / 2) for x in (self.freedom, self.tail)
    )
    return self.size * np.divide(*limits)


def image_noise(*arms: np.ndarray) -> Noise:
  """Returns the noise of a sum of means, of what came of each image.

  Args:
    *arms: (..., runs, images) each, with the same images: an accuracy is one
      arm of 0 and 1, a difference of pairs one of -1, 0 and 1, that of two
      cells whose runs do not pair two, the second one negated.
  """
  num_images = arms[0].shape[-1]
  means = sum(arm.mean(-2) for arm in arms)
  squares = (means - means.mean(-1, keepdims=True)) ** 2
  second, fourth = squares.sum(-1), (squares**2).sum(-1)
  # Where all images say the same, as if one did not.
  alike = second == 0
  second, fourth = np.where(alike, 1, second), np.where(alike, 1, fourth)
  total = second / num_images**2
  own = np.minimum(sum(map(_own_noise, arms)), total)
  # As many as there are images with a say; twice, as of a variance.
  return Noise(own, total - own, 2 * second**2 / fourth)


def _own_noise(arm: np.ndarray) -> Any:
  """Returns the variance of a mean by what neither run nor image explains."""
  runs, images = arm.shape[-2:]
  if runs == 1:
    return 0.0
  left = arm - arm.mean(-2, keepdims=True) - arm.mean(-1, keepdims=True)
  left += arm.mean((-2, -1), keepdims=True)
  freedom = (runs - 1) * (images - 1)
  return (left**2).sum((-2, -1)) / freedom / (runs * images)


def binomial_variance(top1: Any, num_images: int) -> Any:
  """Returns the `own` noise of an accuracy of which only the mean is known.

  As if no two runs had an image in common (Agresti & Coull 1998: four more
  images, two of them right, keep it above 0).
  """
  part = (top1 * num_images + 2) / (num_images + 4)
  return part * (1 - part) / (num_images + 4)


def standard_error(spread: Any, freedom: Any, noise: Noise) -> Error:
  """Returns the standard error of a mean over runs.

  Where runs lie no further apart than their own noise makes them, nothing shows
  of seeds and the error is that of the images. But few runs may lie close by
  chance: with a limit at the noise itself, three of them would be told apart
  too often. Past the limit, `spread` takes the place of the runs' own noise,
  and degrees of freedom are averaged by their part of the variance, which is
  more careful than Satterthwaite's formula. Limit and average were chosen by
  benchmarks/false_positives.py.

  Args:
    spread: variance of the mean, from how far apart runs lie.
    freedom: of `spread`.
    noise: of the same mean.
  """
  limit = 1 - (2 / (freedom + 1)) ** 2.5
  seeds = np.where(spread > limit * noise.own, spread, 0.0)
  variance = np.maximum(seeds, noise.own) + noise.shared
  part = np.minimum(seeds / variance, 1)
  inverse = part / freedom + (1 - part) / noise.freedom
  together = 1 / np.maximum(inverse, 1e-9)
  return Error(np.sqrt(variance), together, np.minimum(freedom, together))

"""Traces of some steps of a stage, for TensorBoard's profile page."""

import pathlib

import jax

# The first steps are spent on filling queues.
_SKIPPED_STEPS = 10


class Profile:
  """Traces `num_steps` steps of a stage, after its first ten; close it.

  A stage too short for that has its last ones traced. What is traced goes to
  LOGDIR/plugins/profile/TIME.
  """

  def __init__(
    self, logdir: pathlib.Path | None, num_steps: int, total_steps: int
  ):
    """Traces nothing if `logdir` is None or `num_steps` 0."""
    self._logdir = logdir
    num_steps = min(num_steps, total_steps) if logdir else 0
    self.first = min(_SKIPPED_STEPS, total_steps - num_steps)
    self.end = self.first + num_steps
    self._tracing = False

  def begin_step(self, step: int) -> None:
    """Starts the trace if `step` is to be traced; a resume may begin late."""
    if not self._tracing and self.first <= step < self.end:
      jax.profiler.start_trace(str(self._logdir))
      self._tracing = True

  def end_step(self, step: int, outputs: object) -> None:
    """Stops the trace after the last step, once its `outputs` are there."""
    if self._tracing and step + 1 >= self.end:
      jax.block_until_ready(outputs)
      self.close()

  def close(self) -> None:
    """Writes what was traced, if a trace is under way."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()

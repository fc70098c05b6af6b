"""Trains runs that differ in their seed alone together, as one program.

States are stacked along a first axis, and the step of an ordinary run is mapped
over it with jax.vmap: a small network then fills a large device. Each seed has
its own batches, weights and random numbers, and its own run directory, which
says after each epoch what it would say if the run were alone. So any of them
goes on by itself, and several at the same step go on together.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_dict

from jaxprog import errors
from jaxprog.comparison import runs
from jaxprog.comparison.runs import Planned
from jaxprog.reporting import outputs
from jaxprog.training import (
  checkpoints,
  handover,
  integrity,
  ladder,
  lock,
  loop,
  preflight,
  signals,
)
from jaxprog.training import feed as feed_lib
from jaxprog.training import setup as setup_lib
from jaxprog.training import state as state_lib
from jaxprog.training import steps as steps_lib


@dataclasses.dataclass
class _Member:
  """One of the runs, from its first stage to its last."""

  planned: Planned
  run: ladder.Run
  # Stages that another run trained.
  shared: list[str]
  # Its steps stayed not finite: it goes on by itself, from its last epoch.
  apart: bool = False


@dataclasses.dataclass
class _Lane:
  """A member in the stage under way; between epochs it has its own state."""

  member: _Member
  task: setup_lib.Task
  state: state_lib.TrainState
  out: loop.Outputs
  feed: feed_lib.Feed


class Programs:
  """What a stage runs on the devices for several seeds at once.

  Everything is compiled for each number of seeds that is met.
  """

  def __init__(self, task: setup_lib.Task) -> None:
    """Takes the `task` of any of the seeds, its steps not compiled yet."""
    replicated, divided = task.shardings
    self._task = task
    self._batches = NamedSharding(
      divided.mesh, PartitionSpec(None, *divided.spec)
    )
    self._train_steps = {
      program: jax.jit(
        jax.vmap(train_step),
        in_shardings=(replicated, self._batches, replicated),
        out_shardings=replicated,
        donate_argnums=(0,) if task.config.donate_state else (),
      )
      for program, train_step in task.train_steps.items()
    }
    # All seeds are evaluated on the same images.
    self._eval_step = jax.jit(
      jax.vmap(task.eval_step, in_axes=(0, None, 0)),
      in_shardings=(replicated, divided, replicated),
      out_shardings=replicated,
    )
    # Trees of each seed -> the tree of all, and back.
    self.stack = jax.jit(_stack, out_shardings=replicated)
    self.stack_batches = jax.jit(_stack, out_shardings=self._batches)
    self.unstack = jax.jit(_unstack, out_shardings=replicated)
    self._compiled: dict[Any, Any] = {}

  def train_step(self, program: setup_lib.Program, count: int) -> Any:
    """Returns the ordinary step, over all seeds.

    train_step(states, batches, rngs) -> (states, metrics), all stacked.
    """
    key = program, count
    if key not in self._compiled:
      task = self._task
      batch = task.batch_shapes(
        program.batch_size, program.image_size, training=True
      )
      self._compiled[key] = (
        self._train_steps[program]
        .lower(
          _widen(task.state_shapes, count, task.shardings.replicated),
          _widen(batch, count, self._batches),
          self.stack([task.step_rng] * count),
        )
        .compile()
      )
    return self._compiled[key]

  def eval_step(self, count: int) -> Any:
    """Returns the ordinary evaluation, over all seeds.

    eval_step(variables, batch, sums) -> (sums, outcomes); `batch` is one for
    all seeds.
    """
    if count not in self._compiled:
      task, replicated = self._task, self._task.shardings.replicated
      num_devices = jax.device_count()
      batch_size = -(-task.stage.batch_size // num_devices) * num_devices
      self._compiled[count] = self._eval_step.lower(
        _widen(task.state_shapes.variables, count, replicated),
        task.batch_shapes(batch_size, task.stage.eval_size, training=False),
        self.stack([steps_lib.zero_eval_sums()] * count),
      ).compile()
    return self._compiled[count]

  def compile(self, count: int) -> None:
    """Compiles all for `count` seeds: no hand-over has to wait for it."""
    for program in self._train_steps:
      self.train_step(program, count)
    self.eval_step(count)


def _stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _unstack(tree: Any) -> list[Any]:
  count = len(jax.tree.leaves(tree)[0])
  return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def _widen(shapes: Any, count: int, sharding: jax.sharding.Sharding) -> Any:
  """Returns the shapes of `count` trees that are stacked."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (count, *x.shape), x.dtype, sharding=sharding
    ),
    shapes,
  )


def train(planned: Sequence[Planned], earlier: Sequence[Planned]) -> str:
  """Brings runs that differ in their seed alone to their ends.

  Those that are over are left out. One is left open if its steps stay not
  finite, all are if anything fails: `runs.run` goes on with each, from its last
  epoch, and finds out what is wrong with it. Returns what has failed, or ''.

  Args:
    planned: the runs.
    earlier: runs that are over, whose stages may serve these too.

  Raises:
    UserError: for a mistake that the user can mend.
    Stopped: after a signal, once all is saved.
    SaveError: if the disk is full.
  """
  left = [x for x in planned if runs.read_outcome(x) is None]
  if len(left) < 2:
    return ''
  try:
    _train(left, earlier)
  except (errors.UserError, errors.Stopped, integrity.SaveError):
    raise
  except Exception as e:
    for one in left:
      runs.write_traceback(one.workdir)
    return f'{type(e).__name__}: {" ".join(str(e).split())}'
  return ''


def _train(planned: Sequence[Planned], earlier: Sequence[Planned]) -> None:
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.StopRequest())
    members = _open(planned, earlier, stop, stack)
    lead = members[0].run
    ladder.announce(lead.progress, lead.tasks)
    seeds = ', '.join(str(x.seed) for x in planned)
    lead.progress.message(f'Seeds {seeds} together; shown is the first.')
    programs = _compile(members)
    try:
      _train_stages(members, programs)
    except errors.Stopped as e:
      for member in members:
        member.run.incidents.add('signal', str(e))
      raise
    finally:
      if stop.signum is None:
        reports = [ladder.write_reports(member.run) for member in members]
        for report in reports:
          report.result()
  for member in members:
    if not member.apart:
      runs.write_outcome(member.planned, member.shared, 'done')


def _open(
  planned: Sequence[Planned],
  earlier: Sequence[Planned],
  stop: signals.StopRequest,
  stack: contextlib.ExitStack,
) -> list[_Member]:
  """Returns the runs, all checked; they share their data."""
  first, *_ = planned
  setup = setup_lib.create_setup(first.config, only=first.names)
  # What draws figures does so in one thread.
  executor = futures.ThreadPoolExecutor(1, 'reporter')
  stack.callback(executor.shutdown, wait=False, cancel_futures=True)
  members: list[_Member] = []
  for one in planned:
    preflight.launch(one.config, one.workdir, only=one.names)
    shared = runs.share_stages(one, earlier)
    run = ladder.open_run(
      dataclasses.replace(setup, config=one.config),
      one.workdir,
      stack.enter_context(lock.Lock(one.workdir)),
      stop,
      stack,
      quiet=bool(members),
    )
    reporter = outputs.Reporter(executor, one.workdir, run.incidents.entries)
    run = dataclasses.replace(run, reporter=reporter)
    members.append(_Member(one, run, shared))
  return members


def _compile(members: Sequence[_Member]) -> list[Programs]:
  """Returns the programs of each stage, and lets all members use them.

  All stages are compiled before the first one begins, but those that are done.
  """
  lead = members[0].run
  programs = []
  with contextlib.ExitStack() as stack:
    for member in members:  # Large networks compile for long.
      stack.enter_context(member.run.dog.pause())
    tasks = []
    for task in lead.tasks:
      programs.append(Programs(task))
      task = dataclasses.replace(task, train_steps={})
      if not all(_is_done(member, task) for member in members):
        programs[-1].compile(len(members))
        task = setup_lib.compile_task(task, carried=_is_carried(lead, task))
        for member in members:
          ladder.note_rates(member.run, task)
      tasks.append(task)
  for member in members:
    pairs = zip(tasks, member.run.tasks, strict=True)
    own = tuple(_with_seed(task, other) for task, other in pairs)
    member.run = dataclasses.replace(member.run, tasks=own)
  return programs


def _is_done(member: _Member, task: setup_lib.Task) -> bool:
  name = task.stage.name
  return checkpoints.read_done(member.planned.workdir, name) is not None


def _is_carried(run: ladder.Run, task: setup_lib.Task) -> bool:
  """Returns whether a stage draws at most a new head."""
  is_first = task.stage is run.tasks[0].stage and not handover.find_source(
    run.setup, run.workdir, task.stage
  )
  return not is_first and not handover.needs_backbone(task.stage)


def _with_seed(task: setup_lib.Task, other: setup_lib.Task) -> setup_lib.Task:
  """Returns `task`, all that is compiled included, with the seed of `other`."""
  return dataclasses.replace(
    task,
    config=other.config,
    seed=other.seed,
    init_rng=other.init_rng,
    step_rng=other.step_rng,
  )


def _train_stages(
  members: Sequence[_Member], programs: Sequence[Programs]
) -> None:
  left = None
  for index, stage_programs in enumerate(programs):
    going = [member for member in members if not member.apart]
    if going:
      left = _train_stage(going, index, stage_programs, left)


def _train_stage(
  members: Sequence[_Member],
  index: int,
  programs: Programs,
  left: float | None,
) -> float | None:
  """Trains a stage of all members that have not done it.

  `left` is when the stage before was left, and what comes back is when this
  one was, by the monotonic clock; None if nothing was trained.
  """
  with contextlib.ExitStack() as stack:
    # Outermost: saves under way are waited for.
    stack.enter_context(members[0].run.stop.deferred())
    lanes = [
      _open_lane(member, index, len(members), stack)
      for member in members
      if not ladder.pass_over(member.run, member.run.tasks[index])
    ]
    for lane in lanes:
      lane.out.left = left
    while group := _choose(lanes):
      _train_epoch(programs, group)
    lanes = [lane for lane in lanes if not lane.member.apart]
    for lane in lanes:
      ladder.finish_stage(lane.member.run, lane.task, lane.state, lane.out)
    left = time.monotonic() if lanes else None
  for lane in lanes:
    lane.member.run.save_history()
    lane.member.run.progress.end_stage(lane.out.record)
  return left


def _open_lane(
  member: _Member, index: int, count: int, stack: contextlib.ExitStack
) -> _Lane:
  """Returns where a member goes on; it has its part of the data workers."""
  run, task = member.run, member.run.tasks[index]
  directory = checkpoints.stage_directory(run.workdir, task.stage.name)
  saved = checkpoints.Checkpoints(directory, run.on_incident)
  stack.enter_context(saved)
  state, out = ladder.open_stage(run, index, task, saved)
  config = config_dict.ConfigDict(task.config)
  config.num_workers = max(1, task.num_workers // count)
  feed = feed_lib.Feed(
    dataclasses.replace(task, config=config),
    loop.data_seed(task, out.record),
    int(state.step),
  )
  stack.enter_context(contextlib.closing(feed))
  return _Lane(member, task, state, out, feed)


def _choose(lanes: Sequence[_Lane]) -> list[_Lane]:
  """Returns the lanes that are furthest from the end of the stage.

  After a kill some may have saved an epoch more than others, which catch up.
  """
  steps = {
    i: int(lane.state.step)
    for i, lane in enumerate(lanes)
    if not lane.member.apart and int(lane.state.step) < lane.task.steps.total
  }
  return [lanes[i] for i, step in steps.items() if step == min(steps.values())]


def _train_epoch(programs: Programs, group: Sequence[_Lane]) -> None:
  """Trains and evaluates the rest of an epoch; each lane's state is saved."""
  task, stop = group[0].task, group[0].member.run.stop
  first, count = int(group[0].state.step), len(group)
  epoch = task.steps.epoch(first)
  end = task.steps.epoch_ends[epoch]
  batch_size = task.steps.phase(first).batch_size
  for lane in group:
    lane.feed.begin_epoch()
    lane.out.step_times.pause()
  _note_handovers(group, first)
  began = time.monotonic()
  states = programs.stack([lane.state for lane in group])
  rngs = programs.stack([lane.task.step_rng for lane in group])
  pending = None
  for step in range(first, end):
    batches = _next_batches(programs, group, step)
    # Step n is dispatched before the metrics of step n - 1 are read.
    train_step = programs.train_step(task.program(step), count)
    states, metrics = train_step(states, batches, rngs)
    if pending is not None:
      timing = _timing(began, (step - first) * batch_size, group)
      _report(group, *pending, timing)
    pending = step, metrics
    if all(lane.member.apart for lane in group):
      return
    if stop.signum is not None and step + 1 < end:
      _save_and_leave(group, programs.unstack(states), stop.signum)
  jax.block_until_ready(states)
  timing = _timing(began, (end - first) * batch_size, group)
  if pending is not None:
    _report(group, *pending, timing)
  _end_epoch(programs, group, states, epoch, timing)


def _next_batches(
  programs: Programs, group: Sequence[_Lane], step: int
) -> steps_lib.Batch:
  """Returns the batch of each lane, stacked."""
  batches = [lane.feed.next() for lane in group]
  for lane, batch in zip(group, batches, strict=True):
    loop.note_bad_images(lane.task, lane.feed.bad, lane.out)
    if step == 0:
      loop.write_preview(lane.task, batch, lane.out)
  return programs.stack_batches(batches)


def _timing(
  began: float, num_images: int, group: Sequence[_Lane]
) -> dict[str, float]:
  """Returns a lane's part of the seconds since `began`, and what they took.

  `num_images` are those of one lane.
  """
  seconds = time.monotonic() - began
  waited = sum(lane.feed.waited for lane in group)
  return {
    'seconds': seconds / len(group),
    'images_per_second': num_images * len(group) / seconds,
    'input_wait': waited / seconds,
  }


def _note_handovers(group: Sequence[_Lane], step: int) -> None:
  """Notes each lane's part of the time until its first batch was asked for."""
  now = time.monotonic()
  for lane in group:
    if lane.out.left is None:
      continue
    seconds = (now - lane.out.left) / len(group)
    lane.out.left = None
    lane.out.record['handover_seconds'] = seconds
    scalars = {'perf/handover_seconds': seconds}
    lane.out.writer.write_scalars(lane.task.first_step + step + 1, scalars)


def _report(
  group: Sequence[_Lane],
  step: int,
  metrics: steps_lib.Metrics,
  timing: dict[str, float],
) -> None:
  """Shows a step of each lane; those that are not finite go apart."""
  own = _unstack_host(metrics)
  for lane, values in zip(group, own, strict=True):
    if lane.member.apart:
      continue
    try:
      loop.report_step(lane.task, step, values, timing, lane.out)
    except loop.NotFiniteError:
      lane.member.apart = True
      name = lane.task.stage.name
      lane.member.run.on_incident(
        'rollback',
        f'{name}: {lane.out.skipped} steps in a row, up to step {step + 1}, '
        'were not finite; this seed goes on by itself, from its last epoch',
        stage=name,
        step=step + 1,
      )


def _unstack_host(tree: Any) -> Iterator[Any]:
  """Yields the part of each seed, in NumPy."""
  return iter(_unstack(jax.device_get(tree)))


def _save_and_leave(
  group: Sequence[_Lane], states: Sequence[state_lib.TrainState], signum: int
) -> None:
  """Saves each lane in the middle of an epoch, and raises Stopped."""
  for lane, state in zip(group, states, strict=True):
    if not lane.member.apart:
      loop.save(lane.task, state, lane.out)
  raise errors.Stopped(signum, saved=True)


def _end_epoch(
  programs: Programs,
  group: Sequence[_Lane],
  states: state_lib.TrainState,
  epoch: int,
  timing: dict[str, float],
) -> None:
  """Evaluates all lanes at once, then records and saves each.

  Raises:
    Stopped: if that was asked for, once all are saved.
  """
  began = time.monotonic()
  scores = _evaluate(programs, group, states.variables)
  averaged: list[dict[str, float]] = [{} for _ in group]
  if states.ema:
    averaged = _evaluate(programs, group, states.ema)
  eval_seconds = (time.monotonic() - began) / len(group)
  timing = {**timing, 'eval_seconds': eval_seconds}
  own = programs.unstack(states)
  for i, (lane, state) in enumerate(zip(group, own, strict=True)):
    if not lane.member.apart:
      lane.state = loop.close_epoch(
        lane.task, state, epoch, scores[i], averaged[i], timing, lane.out
      )
  stop = group[0].member.run.stop
  if stop.signum is not None:
    raise errors.Stopped(stop.signum, saved=True)


def _evaluate(
  programs: Programs, group: Sequence[_Lane], variables: Any
) -> list[dict[str, float]]:
  """Returns mean loss, top1 and top5 of each lane."""
  lead, count = group[0], len(group)
  split = lead.task.dataset.selection
  task = dataclasses.replace(lead.task, eval_step=programs.eval_step(count))

  def on_bad(bad):
    for lane in group:
      loop.note_bad_images(lane.task, bad, lane.out)

  sums = loop.add_up(
    task,
    variables,
    split,
    programs.stack([steps_lib.zero_eval_sums()] * count),
    lead.out.progress.evaluate,
    on_bad,
  )
  return [loop.mean_scores(own, len(split)) for own in _unstack_host(sums)]

import dataclasses

import jax
import numpy as np
import pytest
import tiny_config

from jaxprog import errors, stages
from jaxprog.data import preparation
from jaxprog.planning import costs
from jaxprog.training import setup


def create_task(data_dir, **fields):
  """Returns the first of the tiny ladder's tasks."""
  config = tiny_config.get_config(data_dir)
  config.update(fields)
  made = setup.create_setup(config, only=['three'])
  return setup.create_task(made, made.chosen[0])


def batch(task):
  rng = np.random.default_rng(0)
  shapes = task.batch_shapes(48, task.stage.image_size, training=True)
  drawn = jax.tree.map(
    lambda x: rng.integers(0, 3, x.shape).astype(x.dtype), shapes
  )
  return jax.device_put(drawn, task.shardings.batch)


def take_steps(task, num_steps=2):
  """Returns the first state, and the last one with its metrics."""
  first = current = task.create_state(task.init(task.init_rng))
  ((program, step),) = task.train_steps.items()
  metrics = None
  for _ in range(num_steps):
    current, metrics = step(current, batch(task), *task.arguments(program))
  return first, (current, metrics)


@pytest.fixture(scope='module')
def donated(data_dir):
  return take_steps(create_task(data_dir))


def test_a_step_takes_the_memory_of_the_old_state(donated):
  first, _ = donated
  assert all(x.is_deleted() for x in jax.tree.leaves(first))


def test_a_state_that_is_not_donated_can_still_be_read(donated, data_dir):
  first, last = take_steps(create_task(data_dir, donate_state=False))
  kernel = np.asarray(first.params['head']['kernel'])
  assert first.step == 0
  assert not np.array_equal(kernel, last[0].params['head']['kernel'])
  jax.tree.map(np.testing.assert_array_equal, last, donated[1])


def test_a_dataset_of_many_stages_is_looked_at_once(data_dir, monkeypatch):
  config = tiny_config.get_config(data_dir)
  asked, look = [], preparation.check_dataset

  def note(dataset, *arguments, **options):
    asked.append(dataset)
    return look(dataset, *arguments, **options)

  monkeypatch.setattr(preparation, 'check_dataset', note)
  assert len(setup.load_datasets(config, stages.create_stages(config))) == 3
  assert asked == ['digits']


def test_what_a_step_needs_to_know_is_made_once(data_dir):
  phases = ({'from_epoch': 1, 'mixup_alpha': 0.5},)
  config = tiny_config.get_config(data_dir)
  config.stages[0].update(phases=phases, freeze_epochs=0.5, num_epochs=3)
  made = setup.create_setup(config, only=['three'])
  task = setup.create_task(made, made.chosen[0])
  assert task.stage.parts is task.stage.parts
  programs = [task.program(step) for step in range(task.steps.total)]
  for step, program in enumerate(programs):
    part = task.steps.part(task.stage, step)
    assert program == (
      task.steps.phase(step).batch_size,
      part.image_size,
      tuple(getattr(part, field) for field in setup._TRACED),
      step < task.steps.frozen,
      False,
    )
  assert set(programs) == set(task.train_steps)
  assert len(programs[0].options) > 0
  assert len({id(program) for program in programs}) == 3
  # Phases of a changed copy are its own.
  shorter = dataclasses.replace(task.stage, phases=())
  assert len(shorter.parts) == 1


def test_the_config_says_what_is_recomputed(data_dir):
  assert create_task(data_dir, remat='blocks').model.remat_blocks
  assert not create_task(data_dir).model.remat_blocks


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('remat', 'block', "Did you mean 'blocks'"),
    ('donate_state', 'no', 'must be True or False'),
  ],
)
def test_memory_savers_are_checked(field, value, expected):
  config = tiny_config.get_config()
  with config.ignore_type():
    config[field] = value
  with pytest.raises(errors.UserError, match=expected):
    stages.create_stages(config)


def test_a_short_run_with_recomputed_blocks_loses_nothing(donated, data_dir):
  _, (_, metrics) = take_steps(create_task(data_dir, remat='blocks'))
  for name, value in donated[1][1].items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3)


def test_the_network_sees_low_frequencies_as_long_as_a_phase_says(data_dir):
  config = tiny_config.get_config(data_dir)
  phases = ({'from_epoch': 1, 'low_frequency_size': 0},)
  config.stages[2].update(
    image_size=32, low_frequency_size=16, phases=phases, num_epochs=2
  )
  made = setup.create_setup(config, only=['ten_again'])
  task = setup.create_task(made, made.chosen[0])
  first, last = (task.program(x) for x in (0, task.steps.total - 1))
  assert first.image_size == last.image_size == 32
  flops = [
    costs.count_flops(task.trace_train_step(x).jaxpr) for x in (first, last)
  ]
  # Besides it the crop: two products, and one wave.
  crop = 2 * 48 * 3 * (16 * 32 * 32 + 16 * 16 * 32)
  assert flops[0] - crop == pytest.approx(flops[1] / 4, rel=0.02)

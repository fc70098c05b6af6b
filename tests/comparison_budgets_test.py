import compare_config
import pytest

from jaxprog import epochs, errors, stages
from jaxprog.comparison import budgets
from jaxprog.planning import costs
from jaxprog.training import setup as setup_lib

NUM_IMAGES = 1437  # Digits that are trained on.
KINDS = ('epochs', 'images', 'flops')


def cost(name, num_epochs, per_epoch, images, flops):
  """Returns the cost of a stage whose steps are all alike."""
  phases = (epochs.Phase(0, 0, per_epoch, images),)
  steps = epochs.Steps(phases, round(num_epochs * per_epoch))
  return budgets.StageCost(name, num_epochs, steps, {(0, False, False): flops})


@pytest.fixture(scope='module')
def meter():
  return budgets.Meter()


@pytest.fixture
def ladder(data_dir):
  """Returns one stage of 29 steps of 48 images an epoch, two epochs."""
  return stages.complete(compare_config.get_config(data_dir).base)


def test_a_stage_costs_what_its_steps_do_whatever_they_are():
  phases = epochs.Phase(0, 0, 20, 8), epochs.Phase(1, 20, 10, 16)
  steps = epochs.Steps(phases, 30, frozen=10)
  flops = {
    (0, True, False): 1.0,
    (0, False, False): 5.0,
    (1, False, False): 7.0,
  }
  stage = budgets.StageCost('x', 3.0, steps, flops)
  assert stage.at(0) == (0, 0.0)
  assert stage.at(10) == (80, 10.0)
  assert stage.at(13) == (8 * 13, 10 * 1 + 3 * 5.0)
  assert stage.at(30) == (8 * 20 + 16 * 10, 10 * (1 + 5 + 7.0))
  assert [stage.total(kind) for kind in KINDS] == [3.0, 320, 130.0]


def test_flops_are_those_of_the_step_that_training_compiles(
  meter, ladder, data_dir
):
  (found,) = meter.measure(ladder, ())
  setup = setup_lib.create_setup(ladder)
  task = setup_lib.create_task(setup, setup.chosen[0])
  (program,) = task.train_steps
  traced = task.trace_train_step(program)
  assert found.steps.total == 2 * (NUM_IMAGES // 48)
  assert found.total('images') == found.steps.total * 48
  per_step = costs.count_flops(traced.jaxpr)
  assert found.total('flops') == pytest.approx(found.steps.total * per_step)


def test_a_frozen_backbone_and_smaller_images_cost_less(meter, ladder):
  stage = ladder.stages[0]
  stage.freeze_epochs = 1.0
  stage.phases = ({'from_epoch': 1, 'image_size': 16},)
  (found,) = meter.measure(ladder, ())
  images, frozen = found.at(29)
  assert images == 29 * 48
  # Without the backbone's gradients; four times the pixels.
  assert found.total('flops') - frozen > 4 * frozen > 0


def test_a_teacher_costs_until_it_stops(meter, ladder):
  (alone,) = meter.measure(ladder, ())
  ladder.stages[0].update(distill_from='stage:three', distill_epochs=1.0)
  (taught,) = meter.measure(ladder, ())
  first, total = (x.at(29)[1] for x in (alone, taught))
  # A forward pass is a third of a step, nearly.
  assert total / first == pytest.approx(4 / 3, rel=0.05)
  rest = [x.total('flops') - x.at(29)[1] for x in (alone, taught)]
  assert rest[0] == rest[1]


def test_lengths_that_cost_the_same_as_a_ladder_of_two_stages():
  first = cost('a', 4.0, 10, 8, 1.0)
  last = cost('b', 6.0, 20, 16, 3.0)
  totals = {'epochs': 10.0, 'images': 2240, 'flops': 400.0}
  for kind, budget in totals.items():
    assert first.total(kind) + last.total(kind) == budget
    # The same ladder has its own length, to the bit.
    assert budgets.equal_epochs(budget, (first, last), kind, '') == 6.0
    alone = budgets.equal_epochs(budget, (last,), kind, '')
    longer = cost('b', alone, 20, 16, 3.0)
    assert longer.total(kind) == pytest.approx(budget, rel=0.01)
    assert alone == pytest.approx(6.0 * budget / last.total(kind))


def test_phases_that_move_by_whole_epochs_are_fitted(meter, ladder):
  ladder.stages[0].num_epochs = 3.0
  ladder.stages[0].phases = (
    {'from_epoch': 1, 'image_size': 12},
    {'from_epoch': 2, 'image_size': 16},
  )

  def measure(tried):
    return meter.measure(tried, ())

  def total(length):
    return measure(budgets.set_length(ladder, 'ten', length))[0].total('flops')

  (own,) = measure(ladder)
  budget = 1.45 * own.total('flops')
  alone = budgets.equal_epochs(budget, (own,), 'flops', '')
  assert abs(total(alone) / budget - 1) > 0.03
  fitted = budgets.fit_length(ladder, budget, 'flops', measure, '')
  assert total(fitted) == pytest.approx(budget, rel=0.02)
  # Where all phases cost the same, nothing is tried.
  images = 1.45 * own.total('images')
  length = budgets.fit_length(ladder, images, 'images', measure, '')
  assert length == pytest.approx(1.45 * own.num_epochs, rel=0.02)


def test_a_hand_over_is_paid_before_the_first_step():
  first, last = cost('a', 4.0, 10, 8, 1.0), cost('b', 6.0, 20, 16, 3.0)
  dash = last._replace(handover=budgets.HandOver(160, 30.0))
  totals = {'epochs': 6.0, 'images': 16 * 120 + 160, 'flops': 3.0 * 120 + 30}
  assert {kind: dash.total(kind) for kind in KINDS} == totals
  assert dash.at(120) == last.at(120)
  for kind in KINDS:
    budget = first.total(kind) + last.total(kind)
    length = budgets.equal_epochs(budget, (first, dash), kind, '')
    shorter = cost('b', length, 20, 16, 3.0)._replace(handover=dash.handover)
    spent = first.total(kind) + shorter.total(kind)
    assert spent == pytest.approx(budget, rel=0.01)
    assert (length < 6.0) == (kind != 'epochs')


@pytest.mark.parametrize(
  ('fields', 'passes'),
  [
    ({'transfer': 'dash'}, (1, 3)),
    ({'transfer_statistics': 'recalibrate'}, (1, 1)),
    ({'transfer': 'dash', 'transfer_statistics': 'recalibrate'}, (2, 4)),
    ({'transfer': 'none', 'transfer_statistics': 'recalibrate'}, (0, 0)),
    ({'transfer': 'shrink_and_perturb'}, (0, 0)),
  ],
)
def test_what_a_hand_over_computes_is_counted(meter, ladder, fields, passes):
  """A gradient takes three forward passes, but for that of the images."""
  images, forwards = passes
  stage = ladder.stages[0]
  ladder.stages = [
    {**stage, 'name': 'first'},
    {**stage, **fields, 'transfer_batches': 7, 'micro_batch_size': 24},
  ]
  first, last = meter.measure(ladder, ())
  assert first.handover == (0, 0)
  assert last.handover.images == images * 7 * 48
  forward = first.at(1)[1] / 3 * 7
  assert last.handover.flops == pytest.approx(forwards * forward, rel=0.1)
  # A stage that is trained alone is handed nothing.
  (alone,) = meter.measure(ladder, ('ten',))
  assert alone.handover == (0, 0)


def test_what_is_left_of_measured_seconds_is_spent_on_the_last_stage():
  assert budgets.fit_epochs(80.0, 8.0, 1.0, '') == pytest.approx(10.0)


def test_stages_that_take_all_of_a_budget_are_a_mistake():
  first, last = cost('a', 4.0, 10, 8, 1.0), cost('b', 6.0, 20, 16, 3.0)
  with pytest.raises(errors.UserError, match='takes all of the budget') as e:
    budgets.equal_epochs(40.0, (first, last), 'flops', "cell 'x'")
  assert e.value.where == "cell 'x'"
  with pytest.raises(errors.UserError):
    budgets.fit_epochs(0.0, 1.0, 1.0, '')


def test_a_schedule_keeps_its_shape_when_a_stage_is_shortened(ladder):
  stage = ladder.stages[0]
  stage.num_epochs = 12.0
  stage.schedule = 'step'
  stage.milestones = (6.0, 9.0)
  stage.warmup_epochs = 1.5
  stage.phases = (
    {'from_epoch': 4, 'batch_size': 24},
    {'from_epoch': 5, 'batch_size': 16},
    {'from_epoch': 9, 'batch_size': 8},
  )
  ladder.stages = [stage]
  (short,) = budgets.set_length(ladder, 'ten', 4.0).stages
  assert (short.num_epochs, short.warmup_epochs) == (4.0, 0.5)
  assert short.milestones == pytest.approx((2.0, 3.0))
  # Whole epochs, one after the other.
  assert [p['from_epoch'] for p in short.phases] == [1, 2, 3]
  assert ladder.stages[0].num_epochs == 12.0
  (found,) = stages.create_stages(budgets.set_length(ladder, 'ten', 6.0))
  steps = epochs.count_steps(found, NUM_IMAGES)
  assert steps.milestones[0] == steps.epoch_start(3.0)

import math

import comparison_fixture
import pytest

from jaxprog.comparison import claims, sequential, statistics, verdicts
from jaxprog.comparison.sequential import Rule

run, cell = comparison_fixture.create_run, comparison_fixture.create_cell
SPREAD = (-0.01, 0.0, 0.01)
PLAIN = Rule()


def estimate(finals):
  scores = comparison_fixture.create_scores(finals)
  return statistics.estimate(scores.values())


def arm(name, level, spread=SPREAD, **fields):
  finals = [level + x for x in spread]
  return cell(name, finals, **fields)


def at_target(name, costs, finals):
  """Returns an arm whose runs reach 30% after `costs` thousand images."""
  runs = []
  for seed, (cost, final) in enumerate(zip(costs, finals, strict=True)):
    curve = comparison_fixture.create_curve([0.3, final], step=1000 * cost)
    runs.append(run(name, seed, final, curve=curve))
  return runs


def sentence(a, b, axis='flops'):
  return verdicts.compare_sentence(a, b, 0.3, axis)


LEVEL = (0.4, 0.42, 0.41)


def test_the_target_reached_sooner():
  a = at_target('the ladder', (8, 8.2, 8.4), LEVEL)
  b = at_target('the control', (10, 10, 10), (0.41, 0.41, 0.41))
  assert sentence(a, b) == (
    'the ladder reached 30.0% top-1 sooner, after 0.82x [0.77, 0.87] of the '
    'FLOPs; final accuracy +0.0 [-2.5, 2.5] points: no difference shown, equal '
    'within 1.7 points, n = 3'
  )


def test_the_target_reached_later():
  a = at_target('the ladder', (12, 12.2, 12.4), LEVEL)
  b = at_target('the control', (10, 10, 10), (0.38, 0.4, 0.391))
  assert sentence(a, b, 'images') == (
    'the ladder reached 30.0% top-1 later, after 1.22x [1.17, 1.27] of the '
    'images; final accuracy +2.0 [1.8, 2.1] points: better, n = 3'
  )


def test_the_target_reached_with_no_difference_shown():
  a = at_target('the ladder', (9, 10, 11), LEVEL)
  b = at_target('the control', (10, 10, 10), (0.43, 0.45, 0.441))
  assert sentence(a, b, 'seconds') == (
    'the ladder reached 30.0% top-1 after 1.00x [0.78, 1.28] of the seconds: '
    'no difference shown; final accuracy -3.0 [-3.2, -2.9] points: worse, '
    'n = 3'
  )


def test_the_target_reached_by_some():
  a = arm('the ladder', 0.3)
  b = arm('the control', 0.35)
  assert verdicts.target_sentence(a, b, 0.3, 'flops') == (
    '30.0% top-1 was reached by 2 of 3 runs of the ladder and 3 of 3 runs of '
    'the control'
  )


def test_the_target_reached_by_none():
  a, b = arm('the ladder', 0.2), arm('the control', 0.2, (0.0,))
  assert verdicts.target_sentence(a, b, 0.3, 'flops') == (
    '30.0% top-1 was reached by none of 3 runs of the ladder and none of 1 run '
    'of the control'
  )


def test_one_run_each():
  a = at_target('the ladder', (8,), (0.41,))
  b = at_target('the control', (10,), (0.4,))
  assert sentence(a, b) == (
    'the ladder reached 30.0% top-1 after 0.80x of the FLOPs; final accuracy '
    '+1.0 points; one run each: nothing can be said of the spread'
  )


def test_one_run_against_several():
  text = verdicts.accuracy_sentence(arm('a', 0.4, (0.0,)), arm('b', 0.4))
  assert text == (
    'final accuracy +1.0 points; n = 1 pair of 1 and 3 runs: nothing can be '
    'said of the spread'
  )


def answer(a, b, rule=PLAIN):
  names = [x[0]['cell'] for x in (a, b)]
  found = claims.find(dict(zip(names, (a, b), strict=True)), names[0], rule)
  return verdicts.answer(a, b, found, rule)


def test_unequal_numbers_of_runs_that_pair():
  a, b = arm('a', 0.4), arm('b', 0.4, (*SPREAD, 0.5))
  assert verdicts.accuracy_sentence(a, b) == (
    'final accuracy +0.0 [0.0, 0.0] points: no difference shown, equal within '
    '0.01 points, n = 3 pairs of 3 and 4 runs'
  )


def test_unequal_numbers_of_runs_that_do_not_pair():
  a = arm('a', 0.4)
  b = [run('b', 7, 0.4), run('b', 8, 0.41)]
  assert verdicts.accuracy_sentence(a, b) == (
    'final accuracy -0.5 [-3.0, 2.0] points: too few runs to tell, n = 3 and '
    '2, unpaired'
  )


def test_two_runs_each_are_called_neither_better_nor_sooner():
  a = at_target('the ladder', (93, 96), (0.5, 0.51))
  b = at_target('the control', (100, 102), (0.3, 0.31))
  text = sentence(a, b)
  assert text.count('too few runs to tell') == 2
  assert 'better' not in text
  assert 'sooner' not in text
  assert answer(a, b)[0] == 'not shown'


def test_runs_without_any_spread_are_as_uncertain_as_their_images():
  few = {'num_images': 360}
  a, b = arm('a', 0.889, (0, 0, 0), **few), arm('b', 0.864, (0, 0, 0), **few)
  assert 'no difference shown' in verdicts.accuracy_sentence(a, b)
  assert answer(a, b)[0] == 'not shown'
  a, b = arm('a', 0.889, (0, 0, 0)), arm('b', 0.864, (0, 0, 0))
  assert answer(a, b)[0] == 'pays'


def test_runs_that_are_not_in_the_mean_are_said():
  a = arm('the ladder', 0.4)
  a.append(run('a', 3, status='diverged'))
  a.append(run('a', 4, status='failed'))
  b = [*arm('b', 0.4), run('b', 3, status='failed')]
  assert verdicts.lost_runs(a, b) == [
    'of 5 runs of the ladder 1 diverged and 1 failed, not in the mean',
    'of 4 runs of b 1 failed, not in the mean',
  ]
  assert sentence(a, b).endswith('; '.join(['', *verdicts.lost_runs(a, b)]))


def test_no_run_at_all():
  a, b = arm('the ladder', 0.4), arm('the control', 0.4, status='failed')
  assert sentence(a, b) == (
    'no run of the control finished: nothing can be compared'
  )


def test_a_shown_difference_is_never_printed_as_if_it_touched_zero():
  e = statistics.Estimate(0.004, 0.001, 0.0003, 0.0077, 3)
  assert verdicts.format_points(e) == '+0.40 [0.03, 0.77]'
  e = statistics.Estimate(0.95, 0.1, 0.91, 0.997, 3)
  assert verdicts.format_ratio(e) == '0.950x [0.910, 0.997]'


def test_what_rounds_to_nothing_has_no_sign():
  e = statistics.Estimate(-0.0001, 0.1, -0.0002, 0.004, 3)
  assert verdicts.format_points(e) == '+0.0 [0.0, 0.4]'


@pytest.mark.parametrize(
  ('level', 'word'),
  [
    (0.45, 'pays'),
    (0.35, 'does not pay'),
    (0.4, 'not shown'),
  ],
)
def test_an_answer_follows_the_final_accuracy(level, word):
  a, b = arm('a', level, (-0.001, 0.0, 0.002)), arm('b', 0.4)
  assert answer(a, b)[0] == word


def test_one_run_each_answers_nothing():
  a, b = arm('a', 0.9, (0.0,)), arm('b', 0.1, (0.0,))
  assert answer(a, b)[0] == 'not shown'


def test_an_arm_whose_runs_diverge_does_not_win_by_those_that_are_left():
  a, b = arm('the ladder', 0.5), arm('the control', 0.4)
  a.append(run('a', 3, status='diverged'))
  word, ground = answer(a, b)
  assert word == 'not shown'
  assert ground.endswith(', runs of the ladder diverged')
  # It may lose by them, though.
  assert answer(b, a)[0] == 'not shown'
  worse = [*arm('c', 0.3), a[-1]]
  assert answer(worse, b)[0] == 'does not pay'


def test_arms_are_not_equal_by_the_runs_that_are_left():
  a, b = arm('the ladder', 0.4), arm('the control', 0.4)
  rule = Rule(margin=0.01)
  assert answer(a, b, rule)[0] == 'equal'
  a.append(run('a', 3, status='diverged'))
  word, ground = answer(a, b, rule)
  assert word == 'not shown'
  assert ground.endswith(', runs of the ladder diverged')


def test_the_first_line_answers_for_each_control():
  ladder = arm('the ladder', 0.4, (0, 0.01, 0.021))
  arms = {
    'b': arm('b', 0.38, (0, 0.01, 0.02)),
    'c': arm('c', 0.42, (0, 0.01, 0.02)),
    'd': arm('d', 0.4, (0.02, 0, 0.02)),
  }
  controls = {'flops': 'b', 'images': 'c', 'seconds': 'd'}
  assert verdicts.overall(ladder, arms, controls) == (
    'The ladder pays at equal FLOPs (+2.0 [1.9, 2.2] points, n = 3); it does '
    'not pay at equal images (-2.0 [-2.1, -1.8] points, n = 3); it is not '
    'shown to pay at equal seconds (-0.3 [-4.1, 3.5] points, n = 3, equal '
    'within 5.1 points).'
  )


def test_the_first_line_joins_controls_of_the_same_answer():
  ladder, control = arm('the ladder', 0.4), arm('b', 0.3, (0, 0.01, 0.02))
  controls = {'flops': 'b', 'images': 'b'}
  assert verdicts.overall(ladder, {'b': control}, controls) == (
    'The ladder pays at equal FLOPs (+9.0 [9.0, 9.0] points, n = 3) and at '
    'equal images (+9.0 [9.0, 9.0] points, n = 3).'
  )


def test_the_first_line_counts_how_many_cells_there_are():
  ladder = arm('the ladder', 0.4, (0, 0.01, 0.014))
  arms = {'b': arm('b', 0.385, (0, 0.01, 0.02))}
  text = verdicts.overall(ladder, arms, {'flops': 'b'})
  assert (
    text == 'The ladder pays at equal FLOPs (+1.3 [0.4, 2.2] points, n = 3).'
  )
  arms |= {name: arm(name, 0.4, (0.02, 0, 0.02)) for name in 'cde'}
  text = verdicts.overall(ladder, arms, {'flops': 'b'})
  assert text == (
    'The ladder is not shown to pay at equal FLOPs (+1.3 [0.4, 2.2] points, '
    'n = 3, p = 0.091 of 4 cells together).'
  )


def test_the_first_line_says_where_there_was_nothing_to_compare():
  lost = arm('the control', 0.4, status='failed')
  ladder, controls = arm('the ladder', 0.4), {'flops': 'the control'}
  assert verdicts.overall(ladder, {'the control': lost}, controls) == (
    'The ladder is not shown to pay at equal FLOPs (no run of the control '
    'finished).'
  )


def test_no_sentence_calls_two_arms_equal_without_saying_within_what():
  a, b = arm('a', 0.4), arm('b', 0.4)
  assert 'equal' not in sentence(a, b).replace('equal within 0.01 points', '')


@pytest.mark.parametrize(
  ('margin', 'shown', 'word', 'said'),
  [
    (0.02, 0.005, 'equal', 'points: equal within 2 points, n = 5'),
    (
      0.008,
      0.005,
      'not shown',
      'points: no difference shown, equal within 1.2 points, n = 5',
    ),
    (
      0.02,
      0.01,
      'pays',
      'points: better, equal within 2 points, n = 5',
    ),
    (0.02, 0.02, 'pays', 'points: better, n = 5'),
  ],
)
def test_a_margin_separates_equal_from_not_shown(margin, shown, word, said):
  a = arm('a', 0.4 + shown, (-0.008, 0.008, 0.0, 0.006, -0.006))
  b = arm('b', 0.4, (0, 0, 0, 0, 0))
  rule = Rule(margin=margin)
  assert verdicts.accuracy_sentence(a, b, rule).endswith(said)
  found, ground = answer(a, b, rule)
  assert found == word
  assert ('equal within 2' in ground) == ('better, equal' in said)
  text = verdicts.overall(a, {'b': b}, {'flops': 'b'}, rule)
  assert ('A is equal within 2 points to the control' in text) == (
    word == 'equal'
  )


def test_what_is_exploratory_or_under_way_is_not_claimed():
  a, b = arm('a', 0.5), arm('b', 0.4)
  for silence in (sequential.EXPLORATORY, sequential.UNDER_WAY):
    rule = Rule(silence=silence, margin=0.3)
    text = verdicts.accuracy_sentence(a, b, rule)
    assert text == (
      f'final accuracy +10.0 [10.0, 10.0] points: {silence}, n = 3'
    )
    word, ground = answer(a, b, rule)
    assert (word, ground.endswith(silence)) == ('not shown', True)
    text = verdicts.ranking([a], b, rule)
    assert text == (
      f'A is not shown to differ from b in final accuracy ({silence}).'
    )
    slow = at_target('slow', (12, 12.2, 12.4), LEVEL)
    fast = at_target('fast', (10, 10, 10), LEVEL)
    text = verdicts.target_sentence(slow, fast, 0.3, 'flops', rule)
    assert text.endswith(f'of the FLOPs: {silence}')


def test_a_bound_is_rounded_up():
  found = map(verdicts.format_bound, (0.0201, 0.02, 0.01, 0.00991, 0.00001))
  assert list(found) == [
    *('2.1 points', '2 points', '1 point', '1 point', '0.01 points')
  ]


def test_many_comparisons_are_said_to_be_many():
  assert verdicts.multiplicity_note(1) == ''
  assert verdicts.multiplicity_note(3) == (
    'Each interval holds 95% by itself: of 3 independent comparisons without '
    'any difference, at least one would show one in 14% of all cases.'
  )


def test_the_intervals_of_a_look_are_said_to_be_its_own():
  note = verdicts.multiplicity_note(1, Rule((1 / 3,)))
  assert note.startswith('Intervals of differences are of 99.4% at this look:')


def test_the_best_cell_is_said_to_be_chosen():
  cells = [estimate([0.3, 0.3 + 0.02 * math.sqrt(2)])] * 2
  # A standard error of 2 / sqrt(2) points, of which the best of two leads by
  # 1 / sqrt(pi).
  assert verdicts.selection_note(cells) == (
    'The best of 2 cells is chosen on these same runs, so its mean is too '
    'high: were all cells alike, it would still come out about 0.8 points '
    'above their average. Run it again with new seeds before its number is '
    'quoted.'
  )
  assert verdicts.selection_note(cells[:1]) == ''
  assert verdicts.selection_note([estimate([0.3])] * 3).endswith(
    'one run each, so nothing can be said of by how much.'
  )


def test_the_first_sentence_says_which_cells_differ():
  cells = {
    'a': (0.50, 0.51, 0.52, 0.51),
    'good': (0.60, 0.61, 0.62, 0.61),
    'bad': (0.40, 0.41, 0.42, 0.41),
    'same': (0.51, 0.50, 0.53, 0.50),
  }
  a, *others = (cell(name, finals) for name, finals in cells.items())
  assert verdicts.ranking(others, a) == (
    'Better than a: good (+10.0 [10.0, 10.0] points); worse than a: bad (-10.0 '
    '[-10.0, -10.0] points); same is not shown to differ from a in final '
    'accuracy (equal within 2.2 points).'
  )
  many = [cell(f'c{i}', cells['same']) for i in range(4)]
  assert verdicts.ranking(many, a) == (
    '4 of 4 cells are not shown to differ from a in final accuracy (equal '
    'within 2.5 points).'
  )
  assert verdicts.ranking(many[:2], a, Rule(margin=0.03)) == (
    'C0 and c1 are equal to a within 3 points.'
  )
  lost = cell('lost', [None], status='failed')
  assert verdicts.ranking([lost], a).startswith('Lost is not shown')


def test_of_many_cells_one_is_not_named_for_its_interval_alone():
  ladder, *others = statistics.by_cell(
    comparison_fixture.create_arms(5)
  ).values()
  scores = [statistics.final_scores(arm) for arm in (others[3], ladder)]
  assert statistics.is_difference(statistics.compare(*scores).estimate)
  name = others[3][0]['cell']
  assert name in verdicts.ranking(others[3:4], ladder).split(' than ladder')[1]
  assert name not in verdicts.ranking(others, ladder)


def test_with_a_hold_out_the_best_weights_are_spoken_of():
  a = at_target('a', (8, 8.2, 8.4), LEVEL)
  b = at_target('b', (10, 10, 10), (0.41, 0.41, 0.41))
  held = [[{**run, 'holdout_images': 100} for run in arm] for arm in (a, b)]
  said = sentence(*held)
  assert "; best weights' accuracy +0.0 [-2.5, 2.5] points" in said
  # The curves, of fewer images, say less than the accuracies do.
  assert said.startswith('a reached 30.0% top-1 on the hold-out after 0.82x [')
  assert sentence(a, b).startswith('a reached 30.0% top-1 sooner, after 0.82x')
  assert "in best weights' accuracy" in verdicts.ranking(held[:1], held[1])


def test_a_target_that_none_can_miss_is_in_no_ratio():
  """The lowest accuracy of all runs may be 0, where curves do not rise."""
  runs = [
    comparison_fixture.create_run(cell, seed, 0.0, num_images=90)
    for cell in 'ab'
    for seed in range(3)
  ]
  start = comparison_fixture.create_boundary(500)
  runs = [{**run, 'boundaries': [start]} for run in runs]
  said = verdicts.compare_sentence(runs[:3], runs[3:], 0.0, 'images')
  assert said.startswith('0.0% top-1 was reached by 3 of 3 runs of a and 3')


def test_cells_are_not_ranked_by_the_runs_that_are_left():
  arms = {
    cell: comparison_fixture.create_cell(cell, [x] * 3)
    for cell, x in (('a', 0.4), ('b', 0.5), ('c', 0.4))
  }
  for cell in 'bc':
    gone = comparison_fixture.create_run(cell, 3, None, 'diverged', curve=[])
    arms[cell].append(gone)
  found = claims.find(arms, 'a', Rule(margin=0.01))
  assert [x.verdict for x in found.values()] == ['not shown', 'not shown']
  assert [x.within for x in found.values()] == [None, None]
  arms['a'].append({**arms['b'][-1], 'cell': 'a'})
  found = claims.find(arms, 'a', Rule(margin=0.01))
  assert [x.verdict for x in found.values()] == ['better', 'not shown']

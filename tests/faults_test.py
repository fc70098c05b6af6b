"""Runs that are killed, and end as if they had not been.

`make test-faults` tries every interruption often; `make test` has one kill, of
the command line, and the signals' own tests. JAXPROG_FAULTS is the number of
runs killed at random, JAXPROG_FAULTS_SEED draws other moments.
"""

import os
import random
import shutil
import signal

import faults_kills as kills
import pytest
import runs

pytestmark = [pytest.mark.faults, pytest.mark.slow]

CONFIG = 'tests/faults_config.py'
TRIALS = int(os.environ.get('JAXPROG_FAULTS', 0))
SEED = os.environ.get('JAXPROG_FAULTS_SEED', '0')
often = '--config.checkpoint_every_steps=4'
full_form = pytest.mark.skipif(not TRIALS, reason='make test-faults runs it')


@pytest.fixture(scope='module')
def rows(say):
  """Collects (kind, survived), and prints the table in the end."""
  found = []
  yield found
  say(f'\n{kills.table(found)}')


@pytest.fixture(scope='module')
def reference(data_dir, tmp_path_factory, say):
  """The uninterrupted run, and the seconds that a warm one takes."""
  workdir = tmp_path_factory.mktemp('reference') / 'run'
  arguments = [f'--config={CONFIG}:{data_dir}']
  ended = kills.run_until(kills.NEVER, workdir, arguments)
  assert ended.exit_code == 0, ended.output
  if TRIALS:
    again = [*arguments, often]
    ended = kills.run_until(kills.NEVER, workdir.with_name('again'), again)
    assert not kills.differences(workdir.with_name('again'), workdir)
  say(f'\nuninterrupted: {ended.seconds:.1f} s, seed {SEED}')
  return workdir, ended.seconds


@pytest.fixture
def survives(reference, data_dir, rows, say, tmp_path):
  """Interrupts a run at each moment in turn, lets it finish, and compares."""

  def check(*moments, data_dir=data_dir, check_end=None, **options):
    arguments = [f'--config={CONFIG}:{data_dir}', often]
    workdir, story, hits = tmp_path / 'run', [], []
    for moment in moments:
      ended = kills.run_until(moment, workdir, arguments)
      story.append(f'{moment.kind} after {ended.seconds:.1f} s: {ended.where}')
      if not ended.hit:
        break
      bad = _wrong_end(moment, ended)
      if check_end:
        bad += check_end(moment, workdir, ended)
      hits.append((moment.kind, bad))
    wrong = []
    last = moments[-1]._replace(is_now=kills.NEVER.is_now, env={})
    ended = kills.run_until(last, workdir, arguments)
    if ended.exit_code:
      wrong.append(f'ended with {ended.exit_code}: {ended.output[-1500:]}')
    else:
      wrong += kills.differences(workdir, reference[0], **options)
    # What differs in the end may come of any of them.
    rows.extend((kind, not (bad or wrong)) for kind, bad in hits)
    wrong = [text for _, bad in hits for text in bad] + wrong
    say('\n  ' + '\n  '.join([*story, *(f'WRONG: {x}' for x in wrong)]))
    shutil.move(workdir, tmp_path / f'run-{len(list(tmp_path.iterdir()))}')
    assert not wrong, '\n'.join(story + wrong)
    return len(hits)

  return check


def _wrong_end(moment, ended):
  if ended.exit_code in moment.exit_codes:
    return []
  return [
    f'{moment.kind}: exit code {ended.exit_code} is not of '
    f'{moment.exit_codes}: {ended.output[-300:]}'
  ]


@pytest.mark.parametrize('trial', range(TRIALS or 1))
def test_killed_at_random_moments(survives, reference, trial):
  rng = random.Random(f'{SEED}/{trial}')
  seconds = reference[1]
  count = rng.randint(1, 3) if TRIALS else 2
  while not survives(
    *(kills.after(rng.uniform(0, seconds)) for _ in range(count))
  ):
    seconds *= 0.8  # It was over before the first of them.


@pytest.mark.parametrize('trial', range(3 if TRIALS else 1))
def test_killed_where_stages_meet_and_files_are_written(survives, trial):
  moments = (
    kills.in_save(2),
    kills.after_stage('three'),
    kills.in_handover('ten'),
    kills.in_save(2 + trial),
    kills.after_stage('ten'),
    kills.in_report(),
  )
  if not TRIALS:
    moments = moments[2:4]
  assert survives(*moments) == len(moments)


@full_form
def test_killed_in_twenty_saves(survives):
  rng, hits = random.Random(f'{SEED}/saves'), 0
  while hits < 20:
    hits += survives(*(kills.in_save(rng.randint(1, 3)) for _ in range(4)))


@full_form
@pytest.mark.parametrize('trial', range(3 if TRIALS else 1))
def test_stopped_by_signals_wherever_they_arrive(survives, tmp_path, trial):
  # Fresh data, and a home in which nothing has been compiled.
  data_dir = tmp_path / 'data'
  moments = (
    kills.in_preparation(data_dir),
    kills.in_compilation(tmp_path / 'home'),
    kills.in_training('three', signal.SIGTERM),
    kills.in_training('ten', signal.SIGINT),
    kills.in_evaluation(),
    kills.twice('ten'),
  )
  data_dir.mkdir()
  (tmp_path / 'home').mkdir(mode=0o700)
  hits = survives(*moments, data_dir=data_dir, check_end=_lost_too_much)
  assert hits == len(moments)


def _lost_too_much(moment, workdir, ended):
  """Returns what is wrong with what a signal left behind."""
  if moment.second_after is not None:
    slow = ended.left_after > 5
    return [f'left after {ended.left_after:.1f} s'] if slow else []
  wrong = ['a traceback'] if 'Traceback' in ended.output else []
  if 'training' in moment.kind or 'evaluation' in moment.kind:
    stage = next(
      name for name in kills.STAGES[::-1] if kills.committed(workdir, name)
    )
    before = {'three': 0, 'ten': 12}[stage]
    saved = before + max(kills.committed(workdir, stage))
    shown = kills.last_step_shown(workdir)
    if shown > saved + 1:
      wrong.append(f'step {shown} was shown, {saved} is saved')
  return wrong


@full_form
def test_resumed_on_another_number_of_devices(survives, reference, tmp_path):
  moments = (
    kills.when_saved('three', 4)._replace(devices=8),
    kills.when_saved('ten', 4)._replace(devices=4),
    kills.when_saved('ten', 12)._replace(devices=8),
  )
  assert survives(*moments, same_bits=False) == 3
  workdir = next(tmp_path.glob('run-*/training_history.json')).parent
  # Sums over the batch are added in another order: f32 rounding, which the
  # steps amplify.
  for one, other, rel in zip(
    runs.read_history(reference[0])['stages'],
    runs.read_history(workdir)['stages'],
    (1e-4, 5e-3),
    strict=True,
  ):
    assert other['num_eval_images'] == one['num_eval_images']
    for a, b in zip(one['epochs'], other['epochs'], strict=True):
      assert (b['epoch'], b['global_step']) == (a['epoch'], a['global_step'])
      assert b['train_loss'] == pytest.approx(a['train_loss'], rel=rel)


@full_form
def test_an_odd_number_of_images_is_counted_once(run_main, reference):
  workdir = reference[0]
  three = runs.read_history(workdir)['stages'][0]
  assert three['num_eval_images'] == 115
  for devices in (1, 8):
    result = run_main(
      '--mode=eval', f'--workdir={workdir}', '--stage=three', devices=devices
    )
    assert result.stdout.strip() == f'{100 * three["best"]["top1"]:.1f}'

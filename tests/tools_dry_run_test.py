"""A ladder tried in two steps a stage, as a user does it."""

import shutil

import runs
import two_stages


def listing(folder):
  """Returns every path below `folder` with what it holds."""
  return {
    path: path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
  }


def test_every_stage_is_tried_and_nothing_kept(config, tmp_path):
  workdir = tmp_path / 'runs' / 'first'
  left = workdir.parent / '.first.dry_run' / 'checkpoints'  # Of one killed.
  left.mkdir(parents=True)
  (left / 'old').touch()
  result = runs.call_main(
    config, f'--workdir={workdir}', '--dry_run', '--skip=ten_again'
  )
  assert result.returncode == 0, result.stderr
  lines = result.stdout.split('\n')
  (three,) = (x for x in lines if x.startswith('three: fresh weights, 2 steps'))
  assert 'evaluation of 72 images' in three
  assert any(x.startswith('ten: weights of three, 2 steps') for x in lines)
  assert list(workdir.parent.iterdir()) == []


def test_a_run_goes_on_as_if_nothing_had_been_tried(
  data_dir, tmp_path_factory, tmp_path
):
  workdir = tmp_path / 'run'
  two_stages.copy(tmp_path_factory, data_dir).rename(workdir)
  shutil.rmtree(workdir / 'checkpoints' / 'ten')
  before = listing(workdir)
  result = runs.call_main(
    f'--config=tests/two_stages.py:{data_dir}',
    f'--workdir={workdir}',
    '--dry_run',
  )
  assert result.returncode == 0, result.stderr
  assert 'three: done before' in result.stdout
  assert 'ten: weights of three, 2 steps' in result.stdout
  assert listing(workdir) == before
  assert list(tmp_path.iterdir()) == [workdir]


def test_a_mistake_is_three_lines_and_leaves_nothing(config, tmp_path):
  result = runs.call_main(
    config,
    f'--workdir={tmp_path}/run',
    '--dry_run',
    '--config.stages[2].dataset=folder:/nowhere',
  )
  assert result.returncode == 2
  assert len(result.stderr.strip().split('\n')) <= 3
  assert not list(tmp_path.glob('.*'))


def test_other_modes_refuse(config, tmp_path):
  result = runs.call_main(
    config, f'--workdir={tmp_path}/run', '--dry_run', '--mode=prepare'
  )
  assert result.returncode == 2
  assert '--mode=prepare takes no --dry_run.' in result.stderr

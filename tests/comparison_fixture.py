"""Records of runs that never ran, for what is told about comparisons."""

import numpy as np

from jaxprog.comparison import statistics

STAGES = ('imagenette', 'imagewoof')
# So many images that they leave nothing uncertain.
MANY = 10**12


def create_scores(values, num_images=MANY):
  """Returns the scores of seeds 0, 1, ..."""
  return {i: statistics.Score(x, num_images) for i, x in enumerate(values)}


def create_run(cell, seed, final=0.3, status='done', **fields):
  """Returns a run without earlier stages that rises straight to `final`."""
  run = {
    'cell': cell,
    'seed': seed,
    'overrides': {},
    'labels': {},
    'control': False,
    'learning_rate': 0.1,
    'status': status,
    'error': '',
    'resumed': 0,
    'final_top1': final,
    'best_top1': final,
    'num_images': MANY,
    'outcomes': None,
    'curve': create_curve([(final or 0) * i / 4 for i in range(1, 5)]),
    'boundaries': [],
    'host': 'here',
    'device': 'a processor',
  }
  return {**run, **fields}


def create_curve(values, start=0.0, step=1000):
  """Returns evaluations every `step` images, the first after `start` + one."""
  return [
    {
      'images': start + step * (i + 1),
      'flops': 2e9 * (start + step * (i + 1)),
      'seconds': 0.01 * (start + step * (i + 1)),
      'epochs': float(i + 1),
      'top1': value,
    }
    for i, value in enumerate(values)
  ]


def create_boundary(images, stage='imagenette'):
  return {
    'stage': stage,
    'images': images,
    'flops': 2e9 * images,
    'seconds': 0.01 * images,
  }


def create_cell(cell, finals, **fields):
  """Returns a run of `cell` for each of `finals`, with seeds 0, 1, ..."""
  return [create_run(cell, i, x, **fields) for i, x in enumerate(finals)]


def create_arms(num_seeds=3):
  """Returns seven arms: four ladders of two earlier stages, three controls."""
  rng = np.random.default_rng(0)
  arms = {
    'ladder': (0.34, True, 20),
    'ladder, shrink and perturb': (0.35, True, 20),
    'ladder, DASH': (0.335, True, 20),
    'ladder, head by class': (0.352, True, 20),
    'last stage alone, equal FLOPs': (0.33, False, 26),
    'last stage alone, equal images': (0.341, False, 31),
    'last stage alone, equal seconds': (0.32, False, 24),
  }
  runs = []
  for cell, (top, staged, epochs) in arms.items():
    for seed in range(num_seeds):
      level = top + 0.006 * rng.standard_normal()
      rise = 1 - np.exp(-np.arange(1, epochs + 1) / (4 if staged else 7))
      values = level * rise + 0.004 * rng.standard_normal(epochs)
      start = 11000 if staged else 0
      curve = create_curve(list(values), start)
      seconds = 1 + 0.03 * rng.standard_normal()
      for row in curve:
        row['seconds'] *= seconds
      boundaries = [
        create_boundary(4000, STAGES[0]),
        create_boundary(11000, STAGES[1]),
      ]
      runs.append(
        create_run(
          cell,
          seed,
          float(values[-1]),
          curve=curve,
          boundaries=boundaries if staged else [],
        )
      )
  return runs


def create_grid(rows=5, columns=4, num_seeds=3):
  """Returns optimizers x schedules, of which one run diverged."""
  rng = np.random.default_rng(1)
  optimizers = ('sgd', 'adamw', 'lamb', 'lion', 'rmsprop')[:rows]
  schedules = ('one_cycle', 'cosine', 'step', 'polynomial')[:columns]
  runs = []
  for i, optimizer in enumerate(optimizers):
    for j, schedule in enumerate(schedules):
      for seed in range(num_seeds):
        final = 0.6 - 0.03 * i - 0.02 * j + 0.01 * rng.standard_normal()
        run = create_run(
          f'{optimizer} / {schedule}',
          seed,
          final,
          overrides={'optimizer': optimizer, 'schedule': schedule},
          learning_rate=0.1 / (i + 1),
        )
        rise = 1 - np.exp(-np.arange(1, 13) / 4)
        run['curve'] = create_curve(list(final * rise / rise[-1]))
        runs.append(run)
  runs[-1] = {**runs[-1], 'status': 'diverged', 'curve': []}
  return runs

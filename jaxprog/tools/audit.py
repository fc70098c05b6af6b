"""Finds training images that some stage is evaluated on."""

import collections
import itertools
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import rich.box
import rich.console
import rich.table
from ml_collections import config_dict

from jaxprog import buckets, files, paths, stages
from jaxprog.data import leaks, preparation
from jaxprog.data.records import Dataset
from jaxprog.monitoring import activity
from jaxprog.reliability import copies

_NUM_EXAMPLES = 10


@copies.in_bucket(weights=False)
def audit(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> int:
  """Returns 0 if no leak is trained on, else 1; prints what was found.

  Leaks that config.exclude_leaks keeps out of training count as none. Every
  pair is written to WORKDIR/audit.json where there is a `workdir`. Stages
  whose data is not here are named and left out.

  Raises:
    UserError: for mistakes in the config, or if no dataset is here.
  """
  workdir = None if workdir is None else paths.workdir(workdir)
  chosen = stages.select(stages.create_stages(config), only, skip)
  if workdir:
    from jaxprog.training import preflight  # JAX, which prepare can do without.

    preflight.check_workdir(workdir)
  console = rich.console.Console(markup=False, highlight=False)
  datasets, absent = load_present(chosen, paths.data_dir(config))
  found = find_leaks(datasets, absent)
  console.print(_table(datasets, found))
  for line in _lines(found, absent):
    console.print(line, soft_wrap=True)
  if workdir:
    path = workdir / 'audit.json'
    files.write_json(path, _summary(datasets, absent, found))
    console.print(buckets.shown(path), soft_wrap=True)
  excluded = sum(int(x.sum()) for x in found.excluded.values())
  console.print(_verdict(excluded, config.exclude_leaks), soft_wrap=True)
  return int(excluded > 0 and not config.exclude_leaks)


def load_present(
  chosen: Iterable[stages.Stage], data_dir: str | pathlib.Path
) -> tuple[dict[str, Dataset], dict[str, str]]:
  """Returns the datasets that are here, and the names of the others."""
  from jaxprog.training import setup  # As above.

  chosen = list(chosen)
  absent = {
    stage.name: stage.dataset
    for stage in chosen
    if not preparation.is_here(stage.dataset, pathlib.Path(data_dir))
  }
  if len(absent) == len(chosen):
    absent = {}  # Loading the first one says where it should be.
  datasets = {
    stage.name: setup.load_dataset(data_dir, stage)
    for stage in chosen
    if stage.name not in absent
  }
  return datasets, absent


def find_leaks(
  datasets: Mapping[str, Dataset], absent: Mapping[str, str]
) -> leaks.Overlap:
  """Returns what `leaks.find_overlap` finds; shows how far it is."""
  with activity.doing('comparing images') as show:
    return leaks.find_overlap(datasets, absent=absent, progress=show)


def _table(
  datasets: Mapping[str, Dataset], found: leaks.Overlap
) -> rich.table.Table:
  """Returns how many images each stage must not train on, and why."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('stage', overflow='fold')
  for column in ('images', 'by name', 'by content', 'perceptual'):
    table.add_column(column, justify='right', no_wrap=True)
  table.add_column('contaminates', overflow='fold')
  for stage, dataset in datasets.items():
    numbers = len(dataset.train), *found.counts[stage].values()
    targets = (f'{x} ({n:,})' for x, n in found.contaminates[stage].items())
    table.add_row(
      stage, *(f'{x:,}' for x in numbers), '\n'.join(targets) or '-'
    )
  return table


def _lines(found: leaks.Overlap, absent: Mapping[str, str]) -> list[str]:
  """Returns examples, and what was not excluded or not looked at."""
  lines = [f'  {_describe(leak)}' for leak in _examples(found.leaks)]
  if lines:
    lines.insert(0, f'{len(lines)} of {len(found.leaks):,} pairs:')
  shared = Counter((x.stage, x.other_stage) for x in found.shared)
  lines += [
    f'{stage} and {other} share {n:,} evaluation image{"s" * (n > 1)}, '
    'not excluded.'
    for (stage, other), n in shared.items()
  ]
  lines += [
    f'{stage}: {n:,} image{"s" * (n > 1)} cannot be read; --mode=verify '
    'names them.'
    for stage, n in found.damaged.items()
    if n
  ]
  lines += [
    f'{stage}: {dataset} is not here; '
    + ('known by name.' if leaks.evaluates_on_ilsvrc(dataset) else 'left out.')
    for stage, dataset in absent.items()
  ]
  return lines


def _examples(found: Sequence[leaks.Leak]) -> list[leaks.Leak]:
  """Returns some leaks: of every kind one, then of every kind a second, …."""
  kinds = [(x.train_stage, x.eval_stage, x.reason) for x in found]
  numbers: dict = collections.defaultdict(itertools.count)
  order = [next(numbers[kind]) for kind in kinds]
  first = sorted(range(len(found)), key=order.__getitem__)[:_NUM_EXAMPLES]
  return sorted(found[i] for i in first)


def _describe(leak: leaks.Leak) -> str:
  """Returns the training and the evaluation file on one line."""
  target = leak.eval_stage
  if leak.eval_index >= 0:
    target += f'/{leak.eval_file}'
  return f'{leak.train_stage}/{leak.train_file} -> {target}'


def _verdict(excluded: int, exclude_leaks: bool) -> str:
  if not excluded:
    return 'No training image is an evaluation image.'
  images = f'{excluded:,} training image{"s" * (excluded > 1)}'
  if exclude_leaks:
    return f'{images} kept out of training by config.exclude_leaks.'
  leak = 'leak' if excluded > 1 else 'leaks'
  return f'{images} {leak}: --config.exclude_leaks=True keeps them out.'


def _summary(
  datasets: Mapping[str, Dataset],
  absent: Mapping[str, str],
  found: leaks.Overlap,
) -> dict:
  """Returns what audit.json holds."""
  return {
    'version': 1,
    'stages': [
      {
        'name': stage,
        'dataset': dataset.name,
        'num_train_images': len(dataset.train),
        'num_eval_images': len(dataset.eval),
        'excluded': int(found.excluded[stage].sum()),
        'reasons': found.counts[stage],
        'contaminates': found.contaminates[stage],
        'damaged': found.damaged[stage],
      }
      for stage, dataset in datasets.items()
    ],
    'absent': dict(absent),
    'leaks': [leak._asdict() for leak in found.leaks],
    'shared_evaluation': [pair._asdict() for pair in found.shared],
  }

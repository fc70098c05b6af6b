"""Looks at every image before a run does."""

import collections
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
from ml_collections import config_dict

from jaxprog import buckets, errors, files, paths, stages
from jaxprog.data import remote, verification
from jaxprog.monitoring import activity
from jaxprog.reliability import copies

# Problems of one kind that are printed; the JSON has all.
_SHOWN = 10


@copies.in_bucket(weights=False)
def verify(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path | None = None,
  *,
  only: Sequence[str] = (),
  skip: Sequence[str] = (),
) -> int:
  """Returns 0 if the datasets of the chosen stages are in order, else 1.

  Prints what was found and writes it to WORKDIR/verify.json, or else to
  DATA_DIR/manifests/verify.json, if there is a DATA_DIR. See
  jaxprog.data.verification.

  Raises:
    UserError: for a mistake in the config.
  """
  workdir = None if workdir is None else paths.workdir(workdir)
  chosen = stages.select(stages.create_stages(config), only, skip)
  num_threads = config.num_workers or os.cpu_count() or 1
  console = rich.console.Console(markup=False, highlight=False)
  data_dir, reports = paths.data_dir(config), []
  for dataset, num_classes in _num_classes(chosen).items():
    with activity.doing(f'reading {dataset}') as show:
      report = verification.verify_dataset(
        dataset,
        data_dir,
        num_classes=num_classes,
        num_threads=num_threads,
        progress=show,
      )
    _print_report(console, report)
    reports.append(report)
  found = _summarise(reports, num_threads)
  _print_summary(console, found)
  if workdir or data_dir.is_dir():
    folder = workdir or data_dir / 'manifests'
    _write(console, folder / 'verify.json', found)
  return 0 if found['ok'] else 1


def _num_classes(chosen: Sequence[stages.Stage]) -> dict[str, int]:
  """Returns each dataset and the classes that a stage says it has, 0: none."""
  datasets: dict[str, int] = {}
  for stage in chosen:
    stated = 0 if stage.classes else stage.num_classes
    datasets[stage.dataset] = datasets.get(stage.dataset) or stated
  return datasets


def _summarise(
  reports: Sequence[Mapping[str, Any]], num_threads: int
) -> dict[str, Any]:
  images = sum(x['images'] for r in reports for x in r['splits'].values())
  seconds = sum(report.get('seconds', 0.0) for report in reports)
  rate = images / seconds if seconds else 0.0
  return {
    'ok': not any(report['errors'] for report in reports),
    'images': images,
    'seconds': seconds,
    'images_per_second': rate,
    'images_per_second_per_core': rate / num_threads,
    'datasets': reports,
  }


def _print_report(
  console: rich.console.Console, report: Mapping[str, Any]
) -> None:
  def say(text: str, style: str = '') -> None:
    console.print(errors.printable(text), style=style, soft_wrap=True)

  path = buckets.shown(report.get('path', ''))
  about = f'{report["kind"]}, {path}' if 'kind' in report else '-'
  say(f'{report["dataset"]}: {about}', 'bold')
  if report['splits']:
    console.print(_table(report['splits']))
    manifest = report['manifest']
    say(f'  manifest {manifest["status"]}: {manifest["path"]}')
    match manifest['status']:
      case 'matches':
        for sentence in report['counts']:
          say(f'  {sentence}, as in the manifest')
      case 'written' if report['counts']:
        say('  The next verify accepts this number of images.')
      case 'differs':
        say('  If all changes are meant, remove the manifest.')
  _print_problems(say, report)


def _print_problems(
  say: Callable[[str, str], None], report: Mapping[str, Any]
) -> None:
  for level, style in (('errors', 'red'), ('warnings', 'yellow')):
    by_kind = collections.defaultdict(list)
    for problem in report[level]:
      by_kind[problem['kind']].append(problem)
    for kind, problems in by_kind.items():
      say(f'  {level[:-1]}: {kind} ({len(problems):,})', style)
      for problem in problems[:_SHOWN]:
        say(f'    {problem["name"]}: {problem["detail"]}', '')
      if len(problems) > _SHOWN:
        say(f'    and {len(problems) - _SHOWN:,} more', '')
      if kind in verification.ADVICE:
        say(f'    {verification.ADVICE[kind]}', '')


def _table(splits: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE, show_edge=False)
  table.add_column(' split')
  for column in ('images', 'published', 'classes', 'images a class'):
    table.add_column(column, justify='right')
  for split, counts in splits.items():
    expected = counts['expected']
    table.add_row(
      f' {split}',
      f'{counts["images"]:,}',
      f'{expected:,}' if expected else '-',
      f'{counts["classes"]:,}',
      f'{counts["smallest_class"]:,} to {counts["largest_class"]:,}',
    )
  return table


def _print_summary(
  console: rich.console.Console, found: Mapping[str, Any]
) -> None:
  reports = found['datasets']
  wrong, doubtful = (
    sum(len(report[level]) for report in reports)
    for level in ('errors', 'warnings')
  )
  console.print(
    f'{found["images"]:,} images, {wrong:,} errors, {doubtful:,} warnings, '
    f'{found["seconds"]:.1f} s: '
    f'{found["images_per_second"]:,.0f} images/s, '
    f'{found["images_per_second_per_core"]:,.0f} images/s/core',
    soft_wrap=True,
  )


def _write(
  console: rich.console.Console, path: pathlib.Path, found: dict[str, Any]
) -> None:
  try:
    files.write_json(path, found)
    remote.send(path)
    text = buckets.shown(path)
  except OSError as e:  # Data may be read-only; what was found is printed.
    text = f'{path} was not written: {e.strerror}'
  console.print(text, soft_wrap=True)

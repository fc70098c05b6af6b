"""Scores saved weights at several sizes of evaluation images."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import config_dict

from jaxprog import buckets, errors, files
from jaxprog import paths as paths_lib
from jaxprog.reliability import copies
from jaxprog.reporting import plots
from jaxprog.tools import evaluate
from jaxprog.training import setup as setup_lib

_KEPT = ('image_size', 'count', 'top1', 'top5', 'nll', 'ece')


@copies.in_bucket(chosen=True)
def size_sweep(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  sizes: Sequence[int],
  *,
  stage: str = '',
  weights: str = 'best',
  dataset: str = '',
  model: setup_lib.ModelFn | None = None,
  flip_average: bool = False,
) -> list[dict[str, Any]]:
  """Returns how saved weights do at each of `sizes`, in pixels, rising.

  Objects look larger in a random crop than in a centre crop of the same size,
  so that networks tend to do best at sizes above the one they were trained at
  (Touvron et al. 2019, arXiv:1906.06423). The network is the one that was
  trained, at each size. Keys: image_size, count, top1, top5, nll and ece. They
  are written to WORKDIR/eval/STAGE-WEIGHTS[-DATASET][-flip]-sizes.json, and
  drawn in .png.

  Other arguments are those of `evaluate.evaluate`.

  Raises:
    UserError: if there are no sizes, weights or images, or the dataset has
      classes that the weights do not know.
  """
  workdir = paths_lib.workdir(workdir)
  if not sizes:
    raise errors.UserError(
      'There are no sizes to evaluate at.',
      '--eval_image_size',
      'Name several: --eval_image_size=96,128,160.',
    )
  subject = evaluate.find_subject(
    config,
    workdir,
    stage=stage,
    weights=weights,
    dataset=dataset,
    model=model,
    flip_average=flip_average,
  )
  subjects = [subject.at_size(x) for x in sorted(set(sizes))]
  scores = [evaluate.score(x) for x in subjects]
  rows = [{name: found[name] for name in _KEPT} for found in scores]
  if jax.process_index() == 0:
    _write(workdir, subject, rows)
  return rows


def _write(
  workdir: pathlib.Path, subject: evaluate.Subject, rows: list[dict[str, Any]]
) -> None:
  """Writes and draws the scores, and says where."""
  trained = subject.trained
  paths = [
    evaluate.find_path(workdir, subject, f'-sizes.{x}') for x in ('json', 'png')
  ]
  files.write_json(paths[0], rows)
  title = f'{trained.stage.name}, {trained.weights} weights'
  trained_at = {part.image_size for _, part in trained.trained_stage.parts}
  plots.plot_sizes(rows, trained_at, title, paths[1])
  for path in paths:
    subject.console.print(buckets.shown(path), soft_wrap=True)

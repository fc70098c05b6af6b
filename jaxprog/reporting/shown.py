"""What calls from Python return, as notebooks show it."""

import base64
from typing import Any

from ml_collections import config_dict

from jaxprog import config as config_lib
from jaxprog import stages
from jaxprog.reporting import plots, report, rundir
from jaxprog.reporting.page import html, overview
from jaxprog.reporting.page.markup import join, render, tag
from jaxprog.reporting.parts import Table


class History(dict[str, Any]):
  """The history of a run, shown as a table of its stages and as curves."""

  def _repr_html_(self) -> str:
    table = Table(report.SUMMARY, self['stages'], 'Results of the stages')
    picture = base64.b64encode(plots.encode(plots.plot_history(self))).decode()
    image = tag(
      'img',
      src=f'data:image/png;base64,{picture}',
      alt='Loss, accuracy and learning rate of all stages',
      style='max-width: 100%',
    )
    return str(join(render(table), image))


class Report(str):
  """The report of a run as text, shown as the page with its pictures."""

  run: rundir.RunFiles

  def _repr_html_(self) -> str:
    # In a frame: it has a style and a script of its own.
    page = str(html.page(self.run))
    return str(tag('iframe', srcdoc=page, width='100%', height=600))


def show_report(run: rundir.RunFiles) -> Report:
  """Returns the report of a run; its page is made when it is shown."""
  text = Report(report.report(run))
  text.run = run
  return text


def config_html(config: config_dict.ConfigDict) -> str | None:
  """Returns what of a config is not as by default, None if it is none of ours.

  Of a comparison or a search it is that of its base.
  """
  base = config.get('base')
  config = base if isinstance(base, config_dict.ConfigDict) else config
  if not {'stages', 'stage_defaults'} <= {*config}:
    return None
  plain = config_lib.to_json(stages.complete(config))
  return str(overview.config_difference(plain, is_open=True))

"""report.html: a run on one page that needs nothing else, no network either."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprog.reporting import facts
from jaxprog.reporting.page import overview, script, sections, style
from jaxprog.reporting.page.markup import Html, join, render, tag
from jaxprog.reporting.rundir import RunFiles

# With an icon of its own, or the browser asks for one.
_PAGE = Html("""<!DOCTYPE html>
<html lang="en"{live}><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width"/>
<link rel="icon" href="data:,"/>
{again}<title>{title}</title><style>{css}</style></head>
<body>{header}<nav aria-label="Contents"><ul>{links}</ul></nav>
<main>{sections}<footer>{footer}</footer></main>
<script>{script}</script></body></html>
""")
# A page is loaded anew every so many seconds while its run goes on.
_RENEWED = 15
# A run that was killed cannot say so: without anything new for so many seconds,
# and for as long as so many epochs, it has ended.
_SILENT_SECONDS, _SILENT_EPOCHS = 1800, 4
# Without scripts it forgets what was unfolded.
_AGAIN = Html(
  '<noscript><meta http-equiv="refresh" content="{0}"/></noscript>\n'
)
_LINK = Html('<li><a href="#{0}">{1}</a></li>')
_SECTION = Html(
  '<section id="{0}" aria-labelledby="{0}-title">'
  '<h2 id="{0}-title">{1}</h2>{2}</section>'
)


def page(run: RunFiles, *, is_live: bool = False) -> str:
  """Returns the page of a run that is finished or under way.

  One that `is_live` renews itself, until it is written without that or has
  had nothing new for long.
  """
  status, chip = overview.describe_status(run)
  contents = [
    (section.name, section.title, join(*map(render, section.parts(run))))
    for section in sections.SECTIONS
  ]
  return document(
    f'{run.name}: training report',
    create_header(
      'Training report',
      run.name,
      create_chips(
        tag('span', status, class_=f'chip {chip}'),
        *overview.remark_chips(run),
        written=run.history.get('written'),
        is_live=is_live,
      ),
    ),
    [found for found in contents if found[2]],
    'One run with one seed: n = 1. Made from training_history.json, '
    'config.json, environment.json and incidents.jsonl of the workdir; '
    '--mode=report makes it again.',
    live=_describe_live(run.history) if is_live else None,
  )


def _describe_live(history: Mapping[str, Any]) -> Html:
  """Returns how often a page is loaded anew, and until when."""
  epochs = [
    (row['seconds'] or 0.0) + (row.get('eval_seconds') or 0.0)
    for stage in history['stages']
    for row in stage['epochs']
  ]
  longest = max(epochs, default=0.0)
  return renew(history.get('written'), _SILENT_EPOCHS * longest)


def renew(written: str | None, seconds: float = 0.0) -> Html:
  """Returns what `document` needs of a page that is loaded anew, until when.

  It is `written` so, and has nothing new for so many `seconds` at times.
  """
  until = None
  if written:
    when = datetime.datetime.fromisoformat(written)
    silent = max(_SILENT_SECONDS, seconds)
    until = (when + datetime.timedelta(seconds=silent)).isoformat()
  return Html(' data-live="{0}" data-until="{1}"').format(_RENEWED, until)


def create_chips(*chips: Html, written: str | None, is_live: bool) -> Html:
  """Returns what a page says of itself: `chips`, renewal, of when it is."""
  renewed = f'renewed every {_RENEWED} seconds'
  as_of = f'as of {facts.describe_time(written)}'
  return tag(
    'p',
    *chips,
    tag('span', renewed, class_='chip live') if is_live else None,
    tag('span', as_of, class_='note') if written else None,
    class_='chips',
  )


def create_header(kind: str, title: str, below: Html) -> Html:
  """Returns what stands above the sections."""
  eyebrow = tag('p', kind, class_='eyebrow')
  return tag('header', eyebrow, tag('h1', title), below, class_='top')


def document(
  title: str,
  header: Html,
  parts: Sequence[tuple[str, str, Html]],
  footer: str,
  *,
  live: Html | None = None,
) -> str:
  """Returns a whole page of sections (id, title, content) with their list."""
  return _PAGE.format(
    live=live or '',
    again=_AGAIN.format(_RENEWED) if live else '',
    script=Html(script.SCRIPT),
    title=title,
    css=Html(style.CSS),
    header=header,
    links=join(*(_LINK.format(*part) for part in parts)),
    sections=join(*(_SECTION.format(*part) for part in parts)),
    footer=footer,
  )

"""report.html: a run on one page that needs nothing else, no network either."""

from collections.abc import Sequence

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

  One that `is_live` renews itself, until it is written without that.
  """
  status, chip = overview.describe_status(run)
  live = f'renewed every {_RENEWED} seconds'
  written = run.history.get('written')
  contents = [
    (section.name, section.title, join(*map(render, section.parts(run))))
    for section in sections.SECTIONS
  ]
  return document(
    f'{run.name}: training report',
    create_header(
      'Training report',
      run.name,
      tag(
        'p',
        tag('span', status, class_=f'chip {chip}'),
        *overview.remark_chips(run),
        tag('span', live, class_='chip') if is_live else None,
        tag('span', f'as of {facts.describe_time(written)}', class_='note')
        if written
        else None,
        class_='chips',
      ),
    ),
    [found for found in contents if found[2]],
    'One run with one seed: n = 1. Made from training_history.json, '
    'config.json, environment.json and incidents.jsonl of the workdir; '
    '--mode=report makes it again.',
    is_live=is_live,
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
  is_live: bool = False,
) -> str:
  """Returns a whole page of sections (id, title, content) with their list."""
  return _PAGE.format(
    live=Html(f' data-live="{_RENEWED}"') if is_live else '',
    again=_AGAIN.format(_RENEWED) if is_live else '',
    script=Html(script.SCRIPT),
    title=title,
    css=Html(style.CSS),
    header=header,
    links=join(*(_LINK.format(*part) for part in parts)),
    sections=join(*(_SECTION.format(*part) for part in parts)),
    footer=footer,
  )

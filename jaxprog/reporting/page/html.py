"""report.html: a run on one page that needs nothing else, no network either."""

from collections.abc import Callable

from jaxprog.reporting.page import (
  classes,
  curves,
  hand_over,
  notes,
  overview,
  planned,
  scorecard,
  style,
  time,
)
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles

# Id, title and content of each section, in order; without content there is
# none.
SECTIONS: tuple[tuple[str, str, Callable[[RunFiles], Html]], ...] = (
  ('overview', 'Overview', overview.overview),
  ('scorecard', 'Scorecard', scorecard.scorecard),
  ('curves', 'Curves', curves.curves),
  ('hand-over', 'Hand-over', hand_over.hand_over),
  ('time', 'Time', time.time),
  ('plan', 'Planned elsewhere', planned.planned),
  (
    'classes',
    'Classes and mistakes',
    lambda run: classes.per_class(run.stages),
  ),
  ('notes', 'Notes and incidents', notes.notes),
)


def page(run: RunFiles) -> str:
  """Returns the page of a run that is finished or under way."""
  status, chip = overview.describe_status(run)
  return document(
    f'{run.name}: training report',
    tag(
      'header',
      tag('p', 'Training report', class_='eyebrow'),
      tag('h1', run.name),
      tag(
        'p',
        tag('span', status, class_=f'chip {chip}'),
        *overview.remark_chips(run),
        class_='chips',
      ),
      class_='top',
    ),
    [
      (name, title, content)
      for name, title, create in SECTIONS
      if (content := create(run))
    ],
    'One run with one seed: n = 1. Made from training_history.json, '
    'config.json, environment.json and incidents.jsonl of the workdir; '
    '--mode=report makes it again.',
  )


def document(
  title: str,
  header: Html,
  parts: list[tuple[str, str, Html]],
  footer: str,
) -> str:
  """Returns a whole page of sections (id, title, content) with their list."""
  links = [
    tag('li', tag('a', name, href=f'#{anchor}')) for anchor, name, _ in parts
  ]
  body = [
    tag(
      'section',
      tag('h2', name, id=f'{anchor}-title'),
      content,
      id=anchor,
      aria_labelledby=f'{anchor}-title',
    )
    for anchor, name, content in parts
  ]
  head = join(
    tag('meta', charset='utf-8'),
    tag('meta', name='viewport', content='width=device-width'),
    # An icon of its own, or the browser asks for one.
    tag('link', rel='icon', href='data:,'),
    tag('title', title),
    tag('style', Html(style.CSS)),
  )
  nav = tag('nav', tag('ul', *links), aria_label='Contents')
  main = tag('main', *body, tag('footer', footer))
  html = tag(
    'html', tag('head', head), tag('body', header, nav, main), lang='en'
  )
  return f'<!DOCTYPE html>\n{html}\n'

"""report.html: a run on one page that needs nothing else, no network either."""

from collections.abc import Sequence

from jaxprog.reporting.page import overview, sections, style
from jaxprog.reporting.page.markup import Html, join, render, tag
from jaxprog.reporting.rundir import RunFiles


def page(run: RunFiles) -> str:
  """Returns the page of a run that is finished or under way."""
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
      tag(
        'p',
        tag('span', status, class_=f'chip {chip}'),
        *overview.remark_chips(run),
        class_='chips',
      ),
    ),
    [found for found in contents if found[2]],
    'One run with one seed: n = 1. Made from training_history.json, '
    'config.json, environment.json and incidents.jsonl of the workdir; '
    '--mode=report makes it again.',
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

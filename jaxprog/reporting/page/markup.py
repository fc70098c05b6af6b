"""HTML that is escaped unless it was made here."""

import html
from collections.abc import Sequence


class Html(str):
  """Text that is HTML already; any other string is escaped on its way in."""

  __slots__ = ()


# Elements that have no end tag.
_VOID = frozenset(
  {'br', 'img', 'link', 'meta', 'line', 'rect', 'circle', 'path'}
)


def tag(name: str, /, *children: object, **attributes: object) -> Html:
  """Returns an element of HTML or SVG.

  Args:
    name: of the element.
    *children: `Html` as it is, None as nothing, all else escaped.
    **attributes: 'class_' loses its last '_', other '_' become '-'; None
      leaves an attribute out.
  """
  words = [name]
  for key, value in attributes.items():
    if value is not None:
      key = key.removesuffix('_').replace('_', '-')
      words.append(f'{key}="{html.escape(str(value))}"')
  opening = ' '.join(words)
  if name in _VOID and not children:
    return Html(f'<{opening}/>')
  return Html(f'<{opening}>{join(*children)}</{name}>')


def join(*children: object) -> Html:
  """Returns its arguments side by side, as `tag` takes them."""
  return Html(''.join(map(_escape, children)))


def table(
  titles: Sequence[str],
  rows: Sequence[Sequence[object]],
  *,
  caption: str,
  left: tuple[int, ...] = (0,),
) -> Html:
  """Returns a table in a box that scrolls by itself.

  Args:
    titles: of the columns.
    rows: a cell for each title; the first one is the row's header.
    caption: says what the table is, to those who cannot see it too.
    left: columns of text; the others are numbers and aligned right.
  """

  def shown(cell: object) -> object:
    return '–' if cell == '-' else cell

  def style(i: int) -> str | None:
    return None if i in left else 'num'

  head = [
    tag('th', x, scope='col', class_=style(i)) for i, x in enumerate(titles)
  ]
  body = [
    tag(
      'tr',
      tag('th', row[0], scope='row', class_=style(0)),
      *(tag('td', shown(x), class_=style(i)) for i, x in enumerate(row[1:], 1)),
    )
    for row in rows
  ]
  inner = tag(
    'table',
    tag('caption', caption),
    tag('thead', tag('tr', *head)),
    tag('tbody', *body),
  )
  return tag(
    'div', inner, class_='scroll', tabindex=0, role='region', aria_label=caption
  )


def _escape(child: object) -> str:
  if child is None:
    return ''
  if isinstance(child, Html):
    return child
  return html.escape(str(child))

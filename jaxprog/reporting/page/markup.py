"""Elements of HTML; what is not made here is escaped on its way in."""

from collections.abc import Iterable, Sequence

from markupsafe import Markup as Html
from markupsafe import escape

from jaxprog.reporting.parts import Heading, Part, Table, Words

# Elements that have no end tag.
_VOID = frozenset(
  {'br', 'img', 'link', 'meta', 'line', 'rect', 'circle', 'path'}
)
# Longer texts need room in a table.
_LONG = 50
# Facts that are typed or copied.
_CODE = ('command', 'commit')


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
      words.append(f'{key}="{escape(value)}"')
  opening = ' '.join(words)
  if name in _VOID and not children:
    return Html(f'<{opening}/>')
  return Html(f'<{opening}>{join(*children)}</{name}>')


def join(*children: object) -> Html:
  """Returns its arguments side by side, as `tag` takes them."""
  return Html(''.join(escape(x) for x in children if x is not None))


def render(part: Part) -> Html:
  """Returns a part of a section as the page shows it."""
  match part:
    case Html():
      return part
    case str():
      return tag('p', part, class_='note')
    case list():
      return tag('ul', *(tag('li', x) for x in part), class_='notes')
    case dict():
      pairs = (
        join(tag('dt', k), tag('dd', tag('code', v) if k in _CODE else v))
        for k, v in part.items()
      )
      return tag('dl', *pairs, class_='facts')
    case Heading(text):
      return tag('h3', text)
    case Words():
      return Html()
    case Table(columns, rows, caption):
      return table(
        [column.title for column in columns],
        [[column.cell(row) for column in columns] for row in rows],
        caption=caption,
        left=[i for i, column in enumerate(columns) if column.left],
      )


def table(
  titles: Sequence[str],
  rows: Iterable[Sequence[object]],
  *,
  caption: str,
  left: Sequence[int] = (0,),
) -> Html:
  """Returns a table in a box that scrolls by itself.

  Args:
    titles: of the columns.
    rows: a cell for each title; the first one is the row's header. Of two texts
      the second is in small print.
    caption: says what the table is, to those who cannot see it too.
    left: columns of text; the others are numbers and aligned right.
  """

  def create_cell(name: str, value: object, i: int, scope: str | None) -> Html:
    text, small = value if isinstance(value, tuple) else (value, '')
    if not isinstance(text, Html) and len(str(text)) > _LONG:
      text = tag('span', text, class_='long')
    return tag(
      name,
      '–' if text == '-' else text,
      tag('small', small) if small else None,
      scope=scope,
      class_=None if i in left else 'num',
    )

  head = [create_cell('th', x, i, 'col') for i, x in enumerate(titles)]
  body = [
    tag(
      'tr',
      create_cell('th', row[0], 0, 'row'),
      *(create_cell('td', x, i, None) for i, x in enumerate(row[1:], 1)),
    )
    for row in rows
  ]
  inner = tag(
    'table',
    tag('caption', caption),
    tag('thead', tag('tr', *head)),
    tag('tbody', *body),
  )
  return scroll(inner, caption)


def scroll(content: Html, said: str) -> Html:
  """Returns a box that scrolls by itself, where `content` is wider."""
  return tag(
    'div', content, class_='scroll', tabindex=0, role='region', aria_label=said
  )

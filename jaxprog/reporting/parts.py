"""What the sections of a report are made of, for the text and for the page."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import markupsafe

from jaxprog.reporting import rundir


class Column(NamedTuple):
  """A column of a table.

  `cell` says what stands in it of that which a row is about: a text, or two of
  which the page has the second in small print.
  """

  title: str
  cell: Callable[[Any], str | tuple[str, str]]
  # Texts are aligned left; numbers, which are never shortened, right.
  left: bool = False
  # The page alone has room for it.
  wide: bool = False


class Table(NamedTuple):
  """Columns, and what each row is about."""

  columns: Sequence[Column]
  rows: Sequence[Any]
  # Says what the table is, on the page.
  caption: str


class Heading(NamedTuple):
  """Begins a part of a section that has a name of its own."""

  text: str


class Words(NamedTuple):
  """Parts for the text alone, where the page has a picture."""

  parts: 'Sequence[Part]'


# A sentence, points, names and what they stand for; HTML is for the page alone.
Part: TypeAlias = (
  markupsafe.Markup | str | list[str] | dict[str, str] | Table | Heading | Words
)


class Section(NamedTuple):
  """A section of the reports; one without parts is left out."""

  # Of its place on the page.
  name: str
  title: str
  parts: Callable[[rundir.RunFiles], Iterable[Part]]

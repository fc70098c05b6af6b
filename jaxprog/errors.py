"""Exceptions that end a run in a planned way, with an exit code."""

import difflib
import re
import signal
import textwrap
from collections.abc import Iterable

# Of a sentence that names what is known, in characters.
_MAX_LENGTH = 800
# Of scheme://user:password@host; it may have a / and an @ of its own. One that
# is the $NAME of a variable is none.
_PASSWORD = re.compile(r'(://[^\s/:@]*:)(?!\$\w+@[^\s@]*(?:\s|$))\S*@')


class UserError(Exception):
  """A mistake in what the user asked for; shown in at most three lines.

  The command line prints `what`, `where` and `suggestion`, a line each, and
  exits with code 2. Anything else that escapes is our mistake, not theirs.
  """

  def __init__(self, what: str, where: str = '', suggestion: str = ''):
    what, where, suggestion = (
      without_passwords(printable(x)) for x in (what, where, suggestion)
    )
    super().__init__('\n'.join(x for x in (what, where, suggestion) if x))
    self.what, self.where, self.suggestion = what, where, suggestion

  def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
    """A worker process's mistake reaches its parent as it was."""
    return type(self), (self.what, self.where, self.suggestion)


class Stopped(Exception):  # noqa: N818, nothing went wrong.
  """A signal asked the run to stop; `saved`: it has saved what it had."""

  def __init__(self, signum: int, *, saved: bool = False):
    what = ', saved' if saved else ''
    super().__init__(f'Stopped by {signal.Signals(signum).name}{what}.')
    self.exit_code = 128 + signum


def not_installed(
  what: str, where: str, error: ImportError, extra: str
) -> UserError:
  """Returns the mistake of asking for `what` without its packages.

  `extra` is that of ours that has them, '' if none has.
  """
  return UserError(
    f'{what} needs a package that is not installed: {error}.',
    where,
    f"pip install 'jaxprog[{extra}]'" if extra else '',
  )


def printable(text: str) -> str:
  """Returns a line with what no terminal should see or can show escaped."""
  return ''.join(x if x.isprintable() else _escape(x) for x in text)


def without_passwords(text: str) -> str:
  """Returns `text` with *** for the password of each URL in it."""
  return _PASSWORD.sub(r'\1***@', text)


def _escape(char: str) -> str:
  if '\udc80' <= char <= '\udcff':  # os.fsdecode's sign for a byte.
    return f'\\x{ord(char) - 0xDC00:02x}'
  return repr(char)[1:-1]


def did_you_mean(word: str, words: Iterable[str]) -> str:
  """Returns a sentence naming the word of `words` nearest to `word`.

  Where none is near, it names all, or of many the least unlike.
  """
  known = sorted(words)
  near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
  if near:
    return f'Did you mean {near[0]!r}?'
  text = f'Known: {", ".join(known)}.'
  if len(text) <= _MAX_LENGTH:
    return text
  some = difflib.get_close_matches(word, known, n=5, cutoff=0.0)
  text = textwrap.shorten(', '.join(some), _MAX_LENGTH, placeholder=' …')
  return f'{len(known):,} are known, such as {text}.'

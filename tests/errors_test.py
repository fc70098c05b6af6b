import pickle

import pytest

from jaxprog import errors


def test_a_mistake_has_three_lines_whatever_it_names():
  found = errors.UserError('a\nb', 'caf\udce9\x1b[31m', 'c\r\u2028d')
  lines = ['a\\nb', 'caf\\xe9\\x1b[31m', 'c\\r\\u2028d']
  assert str(found).splitlines() == lines
  assert [found.what, found.where, found.suggestion] == lines


@pytest.mark.parametrize('text', ['', 'Zährte 猫', "it's \\ C:\\x"])
def test_what_can_be_shown_is_shown_as_it_is(text):
  assert errors.printable(text) == text


def test_of_many_known_words_some_are_named():
  words = [f'class_{i:04}' for i in range(8_000)]
  assert errors.did_you_mean('clas_0007', words) == "Did you mean 'class_0007'?"
  known = errors.did_you_mean('x', words)
  assert known.startswith('8,000 are known, such as class_')
  assert len(known) < 100
  assert errors.did_you_mean('x', ['b', 'a']) == 'Known: a, b.'


def test_a_mistake_in_a_worker_reaches_its_parent_as_it_was():
  found = pickle.loads(pickle.dumps(errors.UserError('a', 'b', 'c')))
  assert str(found) == 'a\nb\nc'


@pytest.mark.parametrize(
  ('text', 'shown'),
  [
    ('postgresql://me:a/b@c@host:1/d', 'postgresql://me:***@host:1/d'),
    ("x --storage='mysql://me:pw@h/d' y", "x --storage='mysql://me:***@h/d' y"),
    ('redis://:pw@host', 'redis://:***@host'),
    ('mysql://me:$PW@host/d', 'mysql://me:$PW@host/d'),
    ('mysql://me:$x@y@host/d', 'mysql://me:***@host/d'),
    ('http://host:80/a', 'http://host:80/a'),
    ('ssh://me@host: no', 'ssh://me@host: no'),
    ('gs://bucket/a@b', 'gs://bucket/a@b'),
  ],
)
def test_a_mistake_shows_no_password(text, shown):
  assert str(errors.UserError('', text)) == shown

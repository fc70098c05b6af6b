import hashlib
import json
import math

import numpy as np
import pytest

from jaxprog import files


def test_json_holds_what_numpy_and_tuples_hold(tmp_path):
  value = {'a': np.float32(0.5), 'b': (1, np.arange(2)), 'c': tmp_path}
  files.write_json(tmp_path / 'x.json', value)
  found = json.loads((tmp_path / 'x.json').read_text())
  assert found == {'a': 0.5, 'b': [1, [0, 1]], 'c': str(tmp_path)}


def test_what_json_cannot_say_becomes_null(tmp_path):
  files.write_json(tmp_path / 'x.json', [math.nan, math.inf, 1.0])
  assert json.loads((tmp_path / 'x.json').read_text()) == [None, None, 1.0]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'x'
  files.write_bytes(path, b'old')

  def full(fd):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.fsync', full)
  with pytest.raises(OSError, match='No space'):
    files.write_bytes(path, b'new')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]
  # What need not outlive a crash waits for no disk.
  files.write_json(path, {'a': 1}, durable=False)
  assert files.read_object(path) == {'a': 1}
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('text', [None, b'', b'{"a":', b'[1]', b'\xff'])
def test_what_is_no_object_is_none(tmp_path, text):
  if text is not None:
    (tmp_path / 'x').write_bytes(text)
  assert files.read_object(tmp_path / 'x') is None


def test_digests(tmp_path):
  (tmp_path / 'x').write_bytes(b'abc')
  assert files.digest(tmp_path / 'x') == hashlib.sha256(b'abc').hexdigest()
  assert files.digest_parts('ab', b'c') == files.digest_parts(b'ab', 'c')
  assert files.digest_parts('ab', 'c') != files.digest_parts('a', 'bc')

import pathlib

import pytest

from jaxprog import named
from jaxprog.data import builders

README = pathlib.Path(__file__).parent.parent / 'README.md'


@pytest.mark.parametrize('name', named.DATASETS)
def test_a_named_dataset_is_known_to_all_who_ask(name):
  known = named.find(name)
  assert f'\n| `{name}` | ' in README.read_text()
  for folder in known.folders[:1]:
    assert f' `{folder}/' in README.read_text()


def test_no_two_datasets_share_a_folder():
  folders = [y for x in named.DATASETS.values() for y in x.folders]
  assert len(set(folders)) == len(folders)
  prepared = [builders.prepared_name(x) for x in [*named.DATASETS, 'folder:x']]
  assert len(set(prepared)) == len(prepared)


def test_what_is_known_of_others():
  assert named.find('tfds:mnist').tfds == 'mnist'
  assert named.find('folder:mnist') == named.find('tfds:')

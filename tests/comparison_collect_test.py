import dataclasses

import comparison_fixture
import pytest

from jaxprog.comparison import cells, collect, sequential

RULE = sequential.Rule()


def test_seconds_of_unlike_devices_are_not_compared():
  chosen = [cells.Cell(x, {}, equal='seconds') for x in ('a', 'b')]
  records = [
    comparison_fixture.create_run(cell.name, seed, device=f'kind {seed // 2}')
    for cell in chosen
    for seed in range(3)
  ]
  (sentence,) = collect.find_verdicts(records, chosen, 0.2, 'seconds', RULE)
  assert 'seconds of kind 0 and kind 1 are not equal' in sentence
  alike = [{**record, 'device': 'kind 0'} for record in records]
  for found, budget in ((alike, 'seconds'), (records, 'images')):
    own = [dataclasses.replace(cell, equal=budget) for cell in chosen]
    sentences = collect.find_verdicts(found, own, 0.2, budget, RULE)
    assert len(sentences) == 2
    assert 'kind' not in ' '.join(sentences)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"version": 1}'])
def test_a_damaged_comparison_is_begun_anew(tmp_path, text):
  (tmp_path / 'comparison.json').write_text(text)
  assert collect.read_previous(tmp_path) is None

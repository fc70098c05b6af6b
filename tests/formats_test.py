import pytest

from jaxprog import formats


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (None, '-'),
    (float('nan'), '-'),
    (0, '0:00'),
    (59.6, '1:00'),
    (3599.4, '59:59'),
    (3600, '1:00:00'),
    (86_399.9, '1d 00:00'),
    (2 * 86_400 + 3 * 3600 + 60, '2d 03:01'),
  ],
)
def test_durations(seconds, text):
  assert formats.duration(seconds) == text


@pytest.mark.parametrize(
  ('field', 'value', 'text'),
  [
    ('val_top1', 0.9344, '93.4%'),
    ('val_top1', None, '-'),
    ('train_loss', float('nan'), '-'),
    ('train_loss', 0.12345, '0.1235'),
    ('train_loss', 123456.0, '1.235e+05'),
    ('learning_rate', 0.0, '0.00e+00'),
    ('images_per_second', 12_345.6, '12,346'),
    ('images_per_second', 9.26, '9.3'),
    ('input_wait', 0.015, '1.5%'),
    ('process_memory', 1_234_000_000, '1.23 GB'),
  ],
)
def test_cells(field, value, text):
  assert formats.cell(field, {field: value}) == text


@pytest.mark.parametrize(
  ('hours', 'text'), [(31.24, '31.2 h'), (0.125, '7.5 min'), (0.01, '36 s')]
)
def test_hours_have_the_unit_that_people_use(hours, text):
  assert formats.hours(hours) == text

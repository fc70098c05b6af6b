from sklearn import datasets

from jaxprog.data import builders


def test_every_fifth_digit_is_for_evaluation():
  raw = builders.list_digits()
  digits = datasets.load_digits()
  found = {split: list(raw.images(split)) for split in ('train', 'validation')}
  expected = [f'digit_{i:04d}.png' for i in range(0, 1797, 5)]
  assert [x.file_name for x in found['validation']] == expected
  assert len(found['train']) + len(expected) == raw.num_images
  assert [x.wnid for x in found['validation']] == [
    str(x) for x in digits.target[::5]
  ]

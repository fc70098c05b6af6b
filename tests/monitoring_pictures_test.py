import numpy as np

from jaxprog.monitoring import diagnostics, pictures


def create_diagnostics(labels, predicted, names, worst=()):
  right = np.equal(labels, predicted)
  outcomes = {
    'loss': np.where(right, 0.1, 3.0),
    'rank': np.where(right, 0, 1),
    'predicted': np.array(predicted),
    'confidence': np.full(len(labels), 0.5),
  }
  found = diagnostics.diagnose(outcomes, np.array(labels), len(names))
  return {**found, 'classes': names, 'worst': list(worst)}


def cell_of(picture, row, column, num_classes):
  """Returns the colour of a cell, at a corner where no number stands."""
  side = num_classes * pictures.CELL
  top = len(picture) - pictures.GAP - side
  outline = (picture[-pictures.GAP - 1] != 255).any(axis=-1)
  left = int(np.flatnonzero(outline)[0])
  y, x = top + row * pictures.CELL + 3, left + column * pictures.CELL + 3
  return tuple(int(c) for c in picture[y, x])


def test_a_grid_has_a_tile_for_each_image_in_reading_order():
  colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
  images = [np.full((8, 8, 3), c, np.uint8) for c in colors]
  grid = pictures.draw_grid(images, [['a'], ['b'], ['c']], columns=2)
  step_x = pictures.TILE + pictures.GAP
  step_y = step_x + pictures.LINE
  assert grid.shape == (2 * step_y + pictures.GAP, 2 * step_x + pictures.GAP, 3)
  for i, color in enumerate(colors):
    y, x = pictures.GAP + i // 2 * step_y, pictures.GAP + i % 2 * step_x
    tile = grid[y : y + pictures.TILE, x : x + pictures.TILE]
    assert (tile == color).all()
    caption = grid[y + pictures.TILE : y + step_y - pictures.GAP, x:][:, :20]
    assert (caption < 255).any()


def test_long_captions_stay_below_their_image():
  black = [np.zeros((4, 4, 3), np.uint8)]
  grid = pictures.draw_grid(black, [['W' * 200]])
  assert (grid[:, -pictures.GAP :] == 255).all()


def test_wide_images_keep_their_shape():
  grid = pictures.draw_grid([np.zeros((50, 100, 3), np.uint8)], [()])
  dark = (grid == 0).all(axis=-1)
  assert (dark.any(1).sum(), dark.any(0).sum()) == (56, 112)


def test_cells_are_as_dark_as_their_shares():
  labels = [0] * 4 + [1] * 4 + [2] * 4
  predicted = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 0]
  found = create_diagnostics(labels, predicted, ['a', 'b', 'c'])
  picture = pictures.draw_confusion(found)

  def cell(row, column):
    return cell_of(picture, row, column, 3)

  assert cell(0, 0) == (0, 114, 178)  # All of its images.
  assert cell(0, 1) == cell(1, 0) == (255, 255, 255)  # None.
  blue = [255 + 0.5 * (x - 255) for x in (0, 114, 178)]
  np.testing.assert_allclose(cell(1, 1), blue, atol=1)
  red, _, other = cell(1, 2)
  assert red > other  # A mistake.
  assert sum(cell(1, 2)) < sum(cell(2, 0))  # 50% against 25%.


def test_of_many_classes_those_with_most_mistakes_are_shown():
  num_classes = 30
  labels = list(range(num_classes)) * 2
  predicted = list(labels)
  predicted[28], predicted[29] = 29, 28
  names = [f'name {i}' for i in range(num_classes)]
  found = create_diagnostics(labels, predicted, names)
  picture = pictures.draw_confusion(found)
  n = pictures.MAX_CLASSES
  assert len(picture) < (n + 6) * pictures.CELL
  # Classes 28 and 29 are the last two.
  assert cell_of(picture, n - 2, n - 1, n) != (255, 255, 255)
  assert cell_of(picture, n - 3, n - 1, n) == (255, 255, 255)


def test_worst_mistakes_without_a_thumbnail_or_without_any_are_drawn():
  mistake = {'label': 0, 'predicted': 1, 'confidence': 0.9, 'thumbnail': ''}
  found = create_diagnostics([0, 1], [1, 1], ['a, b', 'c'], [mistake])
  drawn = pictures.draw_mistakes('x', found)
  assert set(drawn) == {'images/x/worst', 'images/x/confusion'}
  tile = drawn['images/x/worst'][pictures.GAP : pictures.TILE, pictures.GAP :]
  assert (tile[:, : pictures.TILE] == 230).all()
  nothing = pictures.draw_worst({**found, 'worst': []})
  assert (nothing < 255).any()


def test_a_class_goes_by_the_first_of_its_names():
  assert pictures.short_name('tench, Tinca tinca') == 'tench'

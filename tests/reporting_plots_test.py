import io

import history_fixture
import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from jaxprog.monitoring import history as history_lib
from jaxprog.reporting import plots


@pytest.fixture
def draw(tmp_path, monkeypatch):
  """Returns a function that plots and gives back the figure and the pixels."""
  figures = []
  savefig = matplotlib.figure.Figure.savefig

  def keep(figure, *arguments, **options):
    figures.append(figure)
    return savefig(figure, *arguments, **options)

  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', keep)

  def draw(history):
    path = tmp_path / 'training_metrics.png'
    plots.plot_history(history, path)
    image = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert('RGB'))
    return figures[-1], image

  return draw


def lines(axes, color):
  """Returns x and y of the lines of a color that are data, end to end."""
  found = [
    line
    for line in axes.lines
    if line.get_color() == color and line.get_linestyle() == '-'
  ]
  return tuple(
    np.concatenate([get(x) for x in found])
    for get in (lambda x: x.get_xdata(), lambda x: x.get_ydata())
  )


def texts(axes):
  return [t for t in axes.texts if t.get_text()]


def test_draws_every_row_at_its_place(draw):
  history = history_fixture.create_history((3, 1, 2))
  figure, _ = draw(history)
  loss, accuracy, _ = figure.axes
  rows = [row for stage in history['stages'] for row in stage['epochs']]
  for axes, color, field, scale in (
    (loss, plots.TRAIN, 'train_loss', 1),
    (loss, plots.VAL, 'val_loss', 1),
    (accuracy, plots.TRAIN, 'train_top1', 100),
  ):
    x, y = lines(axes, color)
    np.testing.assert_array_equal(x, [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(y, [scale * row[field] for row in rows])
  # Of ten classes, the first stage's, five are no news.
  x, y = lines(accuracy, plots.TOP5)
  np.testing.assert_array_equal(x, [4, 5, 6])
  np.testing.assert_allclose(y, [100 * row['val_top5'] for row in rows[3:]])


def test_marks_the_best_epoch_of_each_stage(draw):
  history = history_fixture.create_history((5, 4))
  history['stages'][0]['best'] = {'epoch': 2, 'top1': 0.777}
  figure, _ = draw(history)
  accuracy = figure.axes[1]
  marks = [
    (line.get_xdata()[0], line.get_ydata()[0])
    for line in accuracy.lines
    if line.get_linestyle() == 'None' or len(line.get_xdata()) == 1
  ]
  best = history['stages'][1]['best']
  assert marks == [(2, 77.7), (5 + best['epoch'], 100 * best['top1'])]
  labels = [t.get_text() for t in texts(accuracy)]
  assert '77.7%' in labels
  assert f'{best["top1"]:.1%}' in labels


@pytest.mark.parametrize(
  'num_epochs',
  [(20, 30, 40, 60), (1, 1, 1, 1), (1, 3, 300, 2), (300, 1, 1, 1), (2,)],
)
def test_no_text_meets_another_or_leaves_the_picture(draw, num_epochs):
  history = history_fixture.create_history(num_epochs)
  for stage in history['stages']:
    stage['name'] += '_at_full_length'
  figure, image = draw(history)
  figure.canvas.draw()
  names = [t for t in texts(figure.axes[0]) if t.get_text().endswith('px')]
  assert len(names) == len(num_epochs)
  boxes = [t.get_window_extent() for t in [*names, *figure.texts]]
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[:i])
  height, width, _ = image.shape
  for axes in figure.axes:
    for text in texts(axes):
      box = text.get_window_extent()
      assert box.x0 >= 0, text
      assert box.x1 <= width, text
      assert box.y0 >= 0, text
      assert box.y1 <= height, text


def test_lines_are_named_in_their_colours_beside_the_panel(draw):
  figure, image = draw(history_fixture.create_history((4, 2)))
  figure.canvas.draw()
  panel = figure.axes[1].get_window_extent()
  names = figure.axes[1].get_legend().get_texts()
  assert [(x.get_text(), x.get_color()) for x in names] == [
    ('val top-5', plots.TOP5),
    ('train top-1', plots.TRAIN),
    ('val top-1', plots.VAL),
  ]
  for name in names:
    box = name.get_window_extent()
    assert panel.x1 < box.x0 < box.x1 < image.shape[1]


def test_single_epoch_shows(draw):
  history = history_fixture.create_history((1,))
  history['stages'][0]['num_classes'] = 200
  figure, image = draw(history)
  loss, accuracy, rate = figure.axes
  for axes, color in (
    (loss, plots.TRAIN),
    (loss, plots.VAL),
    (accuracy, plots.TOP5),
    (rate, plots.RATE),
  ):
    box = axes.get_window_extent()
    top, bottom = (round(len(image) - y) for y in (box.y1, box.y0))
    panel = image[top:bottom, round(box.x0) : round(box.x1)].astype(int)
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    # A marker of 3.5 points covers about 30 pixels at 130 dpi.
    assert (np.abs(panel - wanted).sum(-1) < 12).sum() >= 15, color


def test_missing_values_are_gaps(draw):
  history = history_fixture.create_history((8,))
  rows = history['stages'][0]['epochs']
  rows[3].update(val_loss=None, learning_rate=None)
  rows[5].update(val_loss=float('nan'))
  figure, _ = draw(history)
  _, y = lines(figure.axes[0], plots.VAL)
  np.testing.assert_array_equal(np.flatnonzero(np.isnan(y)), [3, 5])


@pytest.mark.parametrize(
  ('peaks', 'scale'),
  [((0.1, 1e-3), 'log'), ((1e-3, 5e-4), 'linear'), ((0.0, 0.0), 'linear')],
)
def test_rates_are_logarithmic_where_peaks_are_far_apart(draw, peaks, scale):
  history = history_fixture.create_history((2, 2))
  for stage, peak in zip(history['stages'], peaks, strict=True):
    # How far down a schedule ends does not count.
    stage['learning_rates'] = [peak, 1e-9 * peak]
  figure, _ = draw(history)
  assert figure.axes[2].get_yscale() == scale


def test_given_rates_are_drawn_as_far_as_trained(draw):
  history = history_fixture.create_history((4, 2))
  del history['stages'][0]['epochs'][2:]
  rates = np.linspace(0.1, 0.5, 40)
  history['stages'][0]['learning_rates'] = rates.tolist()
  figure, _ = draw(history)
  x, y = lines(figure.axes[2], plots.RATE)
  # Each holds until the next one, the last of them to the end.
  np.testing.assert_allclose(x[:21], np.linspace(0, 2, 21), atol=1e-12)
  np.testing.assert_allclose(y[:21], [*rates[:20], rates[19]])
  np.testing.assert_array_equal(x[21:], [2, 3, 4])
  styles = {line.get_drawstyle() for line in figure.axes[2].lines}
  assert 'steps-post' in styles


def test_copes_with_nothing_to_draw(draw):
  figure, _ = draw(history_lib.new_history(''))
  assert 'no epoch finished yet' in [t.get_text() for t in figure.texts]
  history = history_fixture.create_history((2, 1))
  history['stages'][1].update(epochs=[], best=None, status='running')
  figure, _ = draw(history)
  assert 'in training: tiny_imagenet' in [t.get_text() for t in figure.texts]
  x, _ = lines(figure.axes[0], plots.TRAIN)
  np.testing.assert_array_equal(x, [1, 2])

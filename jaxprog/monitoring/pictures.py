"""Pictures of images and of mistakes, as RGB arrays, drawn with Pillow."""

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pixels: the side of an image in a grid, and of a matrix's cell.
TILE, CELL, GAP, FONT_SIZE = 112, 34, 8, 14
# TensorBoard shows a grid 350 pixels wide, and its captions have to be read.
COLUMNS = 4
LINE = FONT_SIZE + 4
# More classes would not be legible side by side.
MAX_CLASSES = 20

_PAPER, _INK, _FAINT = (255, 255, 255), (51, 51, 51), (230, 230, 230)
# Okabe and Ito's blue and vermilion, as in plots: right and wrong.
_RIGHT, _WRONG = (0, 114, 178), (213, 94, 0)
_FONT = ImageFont.load_default(FONT_SIZE)


def draw_grid(
  images: Sequence[np.ndarray],
  captions: Sequence[Sequence[str]],
  columns: int = COLUMNS,
) -> np.ndarray:
  """Returns images side by side with the lines of their captions below.

  Args:
    images: uint8 (height, width, 3) each, of any size: fitted into tiles,
      without smoothing where they are enlarged.
    captions: lines of text for each image, cut off where they are too long.
    columns: at most so many in a row.
  """
  columns = max(1, min(columns, len(images)))
  rows = max(1, -(-len(images) // columns))
  step_x = TILE + GAP
  step_y = TILE + GAP + LINE * max(map(len, captions), default=1)
  canvas = Image.new(
    'RGB', (columns * step_x + GAP, rows * step_y + GAP), _PAPER
  )
  draw = ImageDraw.Draw(canvas)
  for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
    x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
    canvas.paste(_fit(Image.fromarray(image)), (x, y))
    for j, line in enumerate(lines):
      _write(draw, (x, y + TILE + 2 + j * LINE), line, TILE)
  if not images:
    _write(draw, (GAP, GAP), 'none', TILE)
  return np.asarray(canvas)


def draw_mistakes(
  stage: str, diagnostics: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns images/STAGE/worst and images/STAGE/confusion.

  `diagnostics` are those of a finished stage's record in the history.
  """
  return {
    f'images/{stage}/worst': draw_worst(diagnostics),
    f'images/{stage}/confusion': draw_confusion(diagnostics),
  }


def draw_worst(diagnostics: Mapping[str, Any]) -> np.ndarray:
  """Returns the wrong images of the highest losses: label, then prediction."""
  names = list(map(short_name, diagnostics['classes']))
  worst = diagnostics['worst']
  captions = [
    (names[w['label']], f'as {names[w["predicted"]]}, {w["confidence"]:.0%}')
    for w in worst
  ]
  return draw_grid([_decode(w['thumbnail']) for w in worst], captions)


def draw_confusion(diagnostics: Mapping[str, Any]) -> np.ndarray:
  """Returns the matrix of labels (rows) and predictions, in % of a row.

  Of more than MAX_CLASSES classes, those with the most mistakes are shown.
  """
  names = diagnostics['classes']
  counts, rights = np.array(diagnostics['per_class']).reshape(-1, 2).T
  shown = np.sort(np.argsort(rights - counts, kind='stable')[:MAX_CLASSES])
  place = {int(c): i for i, c in enumerate(shown)}
  shares = np.zeros((len(shown), len(shown)))
  for pair in diagnostics['confusions']:
    label, predicted = pair['label'], pair['predicted']
    if label in place and predicted in place:
      share = pair['count'] / max(counts[label], 1)
      shares[place[label], place[predicted]] = share
  top1 = rights.sum() / max(counts.sum(), 1)
  title = f'Labels (rows) taken for (columns), %; top-1 {top1:.1%}'
  if len(shown) < len(names):
    title += f'; the {len(shown)} of {len(names)} classes with most mistakes'
  return _draw_matrix(shares, [short_name(names[c]) for c in shown], title)


def short_name(name: str) -> str:
  """Returns the first of a class's names: 'tench' of 'tench, Tinca tinca'."""
  return name.split(',')[0]


def _draw_matrix(
  shares: np.ndarray, names: Sequence[str], title: str
) -> np.ndarray:
  """Returns `shares` (n, n) in [0, 1] as a matrix with names at both sides."""
  margin = GAP + min(160, round(max(_FONT.getlength(x) for x in names)) + GAP)
  top, side = LINE + GAP + margin, len(names) * CELL
  width = max(margin + side, round(_FONT.getlength(title)) + GAP) + GAP
  canvas = Image.new('RGB', (width, top + side + GAP), _PAPER)
  draw = ImageDraw.Draw(canvas)
  draw.text((GAP, GAP), title, _INK, _FONT)
  for i, name in enumerate(names):
    _write(draw, (GAP, top + i * CELL + 10), name, margin - GAP)
    canvas.paste(
      _upright(name, margin - GAP), (margin + i * CELL + 8, LINE + GAP)
    )
    for j in range(len(names)):
      _draw_cell(
        draw, (margin + j * CELL, top + i * CELL), shares[i, j], i == j
      )
  return np.asarray(canvas)


def _draw_cell(
  draw: ImageDraw.ImageDraw, at: tuple[int, int], share: float, right: bool
) -> None:
  """Draws a cell, the darker the larger its share; nothing is no number."""
  x, y = at
  color = np.array(_RIGHT if right else _WRONG)
  # A few percent of mistakes have to be seen.
  strength = share if right else share**0.5
  fill = tuple(np.round(255 + strength * (color - 255)).astype(int).tolist())
  draw.rectangle((x, y, x + CELL, y + CELL), fill, _FAINT)
  if share:
    text = f'{100 * share:.0f}' if share >= 0.005 else '<1'
    ink = _PAPER if strength > 0.6 else _INK
    draw.text((x + CELL / 2, y + CELL / 2), text, ink, _FONT, anchor='mm')


def _upright(text: str, length: int) -> Image.Image:
  """Returns `text` turned to run upwards, starting at the bottom edge."""
  image = Image.new('RGB', (length, LINE), _PAPER)
  _write(ImageDraw.Draw(image), (0, 0), text, length)
  return image.transpose(Image.Transpose.ROTATE_90)


def _write(
  draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int
) -> None:
  """Writes as much of `text` as `width` pixels take."""
  while _FONT.getlength(text) > width:
    text = text[:-1]
  draw.text(at, text, _INK, _FONT)


def _fit(image: Image.Image) -> Image.Image:
  """Returns `image` with its longer side as long as a tile's."""
  scale = TILE / max(image.size)
  size = [max(1, round(scale * x)) for x in image.size]
  enlarged = scale > 1
  how = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
  return image.resize((size[0], size[1]), how)


def _decode(thumbnail: str) -> np.ndarray:
  """Returns a JPEG in base64 as an array, grey where there is none."""
  try:
    encoded = io.BytesIO(base64.b64decode(thumbnail))
    return np.asarray(Image.open(encoded).convert('RGB'))
  except (OSError, binascii.Error):
    return np.full((TILE, TILE, 3), 230, np.uint8)

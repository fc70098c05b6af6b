"""Many images on one page, each with what a network sees in it."""

import functools
import io
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jaxprog.data import builders, preprocess

MAX_TILES = 40
# Pixels: of an image's box, of the gaps, of the text.
TILE_WIDTH, TILE_HEIGHT = 220, 165
# A title has so many lines at most, and so has what is below it.
_MAX_LINES = 3
GAP, MARGIN = 18, 28
TITLE_SIZE, DETAIL_SIZE, HEADING_SIZE = 16, 14, 22
_LEADING = 5
PAPER, INK, GREY, FRAME = '#ffffff', '#1a1a1a', '#6b6b6b', '#ececec'
RIGHT, WRONG = '#00704f', '#b3410c'


class Tile(NamedTuple):
  """An image, None for one that cannot be read, and its caption.

  `is_right` says whether the title is what it shows, None if that is unknown.
  """

  image: pathlib.Path | builders.RawImage | None
  title: str
  detail: str
  is_right: bool | None = None


def draw(tiles: Sequence[Tile], heading: str) -> Image.Image:
  """Returns the first MAX_TILES tiles in a grid under `heading`, in RGB.

  Images keep their aspect and are shown whole, as they are stored.
  """
  tiles = tiles[:MAX_TILES]
  columns = min(8, max(math.ceil(math.sqrt(1.6 * len(tiles))), 2))
  rows = -(-len(tiles) // columns)
  width = 2 * MARGIN + columns * (TILE_WIDTH + GAP) - GAP
  caption = max(
    len(_wrap(tile.title, TITLE_SIZE)) * (TITLE_SIZE + _LEADING)
    + len(_wrap(tile.detail, DETAIL_SIZE)) * (DETAIL_SIZE + _LEADING)
    for tile in tiles
  )
  cell_height = TILE_HEIGHT + caption + GAP
  top = MARGIN + HEADING_SIZE + GAP
  height = top + rows * cell_height + MARGIN // 2
  page = Image.new('RGB', (width, height), PAPER)
  pen = ImageDraw.Draw(page)
  _write(pen, (MARGIN, MARGIN), heading, HEADING_SIZE, INK, width - 2 * MARGIN)
  for i, tile in enumerate(tiles):
    left = MARGIN + i % columns * (TILE_WIDTH + GAP)
    _draw_tile(page, pen, tile, left, top + i // columns * cell_height)
  return page


def encode(page: Image.Image) -> bytes:
  """Returns `page` as PNG."""
  out = io.BytesIO()
  page.save(out, 'PNG')
  return out.getvalue()


def _draw_tile(
  page: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, left: int, top: int
) -> None:
  image = _read(tile.image) if tile.image else None
  if image is None:
    box = (left, top, left + TILE_WIDTH - 1, top + TILE_HEIGHT - 1)
    pen.rectangle(box, FRAME)
  else:
    x = left + (TILE_WIDTH - image.width) // 2
    page.paste(image, (x, top + (TILE_HEIGHT - image.height) // 2))
  middle, y = left + TILE_WIDTH // 2, top + TILE_HEIGHT + 6
  colour = {None: INK, True: RIGHT, False: WRONG}[tile.is_right]
  if tile.is_right is not None:
    box = (left, top, left + TILE_WIDTH - 1, top + TILE_HEIGHT - 1)
    pen.rectangle(box, outline=colour, width=3)
  for text, size, ink in (
    (tile.title, TITLE_SIZE, colour),
    (tile.detail, DETAIL_SIZE, GREY),
  ):
    for line in _wrap(text, size):
      _write(pen, (middle, y), line, size, ink, TILE_WIDTH, 'ma')
      y += size + _LEADING


def _wrap(text: str, size: int) -> list[str]:
  """Returns a text in lines of a tile's width; the last one may be longer."""
  font, lines = _font(size), ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if len(lines) < _MAX_LINES and font.getlength(longer) > TILE_WIDTH:
      lines.append(word)
    else:
      lines[-1] = longer
  return [line for line in lines if line] or ['']


def _read(file: pathlib.Path | builders.RawImage) -> Image.Image | None:
  """Returns the whole image as large as its box allows, None if damaged."""
  try:
    if isinstance(file, builders.RawImage):
      encoded = file.read()
    else:
      encoded = file.read_bytes()
    opened = preprocess.open_image(encoded)
    whole = (0.0, 0.0, float(opened.width), float(opened.height))
    shrink = max(opened.width / TILE_WIDTH, opened.height / TILE_HEIGHT)
    denominator = 8
    while denominator > 1 and shrink < 2 * denominator:
      denominator //= 2
    pixels, _, _ = opened.read(whole, denominator)
  except (OSError, preprocess.BadImageError):
    return None
  # Of a handful of pixels each should be seen.
  tiny = max(pixels.shape) <= 64
  method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
  image = Image.fromarray(pixels)
  return ImageOps.contain(image, (TILE_WIDTH, TILE_HEIGHT), method)


def _write(
  pen: ImageDraw.ImageDraw,
  place: tuple[int, int],
  text: str,
  size: int,
  colour: str,
  width: int,
  anchor: str = 'la',
) -> None:
  """Writes `text`, cut to `width`; 'ma' has its middle at `place`."""
  font = _font(size)
  shown = text
  while font.getlength(shown) > width and text:
    text = text[:-1]
    shown = f'{text.rstrip()}…'
  pen.text(place, shown, colour, font, anchor)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
  """Returns DejaVu Sans, which Matplotlib brings along."""
  folder = pathlib.Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
  return ImageFont.truetype(str(folder / 'DejaVuSans.ttf'), size)

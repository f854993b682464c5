"""Images side by side as one PNG. Same input, same bytes."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.data.images import from_array

CELL = 64  # pixels aimed at for the side of one image in a grid
MARGIN, GAP, LABEL_GAP = 16, 6, 10
LABEL, CAPTION = 13, 11  # font sizes, pixels
INK, HAIRLINE = (70, 70, 76), (222, 222, 226)
Labels = Sequence[str] | None
Lines = Sequence[str]  # a label, wrapped


def image_grid(
    images: np.ndarray, columns: int, path: Path, *,
    row_labels: Labels = None, column_labels: Labels = None, captions: Labels = None,
) -> None:  # fmt: skip
    """Write uint8 images (N, C, H, W), C = 1 or 3, row by row as one PNG, small ones enlarged to about 64 pixels.

    Labels name rows and columns, captions stand below each image. Long ones are wrapped.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"expected uint8 images (N, 1 or 3, H, W), found {images.dtype} {images.shape}")
    rows = -(-len(images) // columns)
    counts = {"row label": (row_labels, rows), "column label": (column_labels, columns), "caption": (captions, len(images))}
    for what, (labels, count) in counts.items():
        if labels is not None and len(labels) != count:
            raise ValueError(f"found {len(labels)} {what}s, expected {count}")
    scale = max(1, round(CELL / max(images.shape[2:])))
    height, width = images.shape[2] * scale, images.shape[3] * scale

    heads, sides = [wrap(label, 20) for label in column_labels or ()], [wrap(label, 24) for label in row_labels or ()]
    below = [wrap(caption, max(14, width // 7)) for caption in captions or ()]
    pitch_x = GAP + max(width, _width(heads, LABEL), _width(below, CAPTION))
    pitch_y = GAP + max(height + (_height(below, CAPTION) + LABEL_GAP if below else 0), _height(sides, LABEL))
    left = MARGIN + (_width(sides, LABEL) + LABEL_GAP if sides else 0)
    top = MARGIN + (_height(heads, LABEL) + GAP if heads else 0)

    canvas = Image.new("RGB", (left + columns * pitch_x - GAP + MARGIN, top + rows * pitch_y - GAP + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(heads):
        _write(draw, lines, left + column * pitch_x + (pitch_x - GAP) / 2, top - GAP - _height([lines], LABEL), LABEL, "mm")
    for row, lines in enumerate(sides):
        _write(draw, lines, left - LABEL_GAP, top + row * pitch_y + (pitch_y - GAP - _height([lines], LABEL)) / 2, LABEL, "rm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x = left + column * pitch_x + (pitch_x - GAP - width) // 2
        y = top + row * pitch_y + (0 if below else (pitch_y - GAP - height) // 2)
        canvas.paste(from_array(image).resize((width, height), Image.Resampling.NEAREST).convert("RGB"), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=HAIRLINE)
        if below:
            _write(draw, below[index], x + width / 2, y + height + 2, CAPTION, "mm")
    canvas.save(path, format="PNG", optimize=True)


def _width(labels: Sequence[Lines], size: int) -> int:
    return max((int(_font(size).getlength(line)) + 1 for lines in labels for line in lines), default=0)


def _height(labels: Sequence[Lines], size: int) -> int:
    return (size + 4) * max(map(len, labels), default=0)


def _write(draw: ImageDraw.ImageDraw, lines: Lines, x: float, y: float, size: int, anchor: str) -> None:
    """Lines of text from y downward."""
    for number, line in enumerate(lines):
        draw.text((x, y + (number + 0.5) * (size + 4)), line, fill=INK, font=_font(size), anchor=anchor)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along: the same on every machine."""
    found = importlib.util.find_spec("matplotlib")  # importing it takes longer than drawing
    assert found and found.origin
    file = Path(found.origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)

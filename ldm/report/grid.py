"""Images side by side as one PNG. Same input, same bytes."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Images = NDArray[np.uint8]  # (N, C, H, W)
CELL = 64  # pixels aimed at for the side of one image in a grid
MARGIN, GAP, LABEL_GAP, LINE = 16, 6, 10, 17
INK, HAIRLINE = (70, 70, 76), (222, 222, 226)


def image_grid(
    images: Images,
    columns: int,
    path: str | PathLike[str],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    scale: int | None = None,
) -> None:
    """Write uint8 images (N, C, H, W), C = 1 or 3, row by row as one PNG, each pixel `scale` pixels wide.

    By default small images are enlarged to about 64 pixels, without smoothing. A long row label is wrapped.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"expected uint8 images (N, 1 or 3, H, W), found {images.dtype} {images.shape}")
    rows = -(-len(images) // columns)
    for what, labels, count in (("row", row_labels, rows), ("column", column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {what} labels for {count} {what}s of images")
    scale = scale or max(1, round(CELL / max(images.shape[2:])))
    height, width = images.shape[2] * scale, images.shape[3] * scale

    heads = [wrap(label, 20) for label in column_labels or ()]
    sides = [wrap(label, 24) for label in row_labels or ()]
    pitch_x = GAP + max(width, _width(heads))
    pitch_y = GAP + max(height, LINE * max((len(lines) for lines in sides), default=0))
    left = MARGIN + (_width(sides) + LABEL_GAP if sides else 0)
    top = MARGIN + (LINE * max(len(lines) for lines in heads) + GAP if heads else 0)
    size = (left + columns * pitch_x - GAP + MARGIN, top + rows * pitch_y - GAP + MARGIN)

    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(heads):
        _write(draw, lines, left + column * pitch_x + (pitch_x - GAP) / 2, top - GAP - LINE * len(lines) / 2, "mm")
    for row, lines in enumerate(sides):
        _write(draw, lines, left - LABEL_GAP, top + row * pitch_y + (pitch_y - GAP) / 2, "rm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x = left + column * pitch_x + (pitch_x - GAP - width) // 2
        y = top + row * pitch_y + (pitch_y - GAP - height) // 2
        pixels = np.moveaxis(image, 0, -1)  # (H, W, C)
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels))
        canvas.paste(tile.resize((width, height), Image.Resampling.NEAREST).convert("RGB"), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=HAIRLINE)
    canvas.save(path, format="PNG", optimize=True)


def _width(labels: Sequence[Sequence[str]]) -> int:
    return max((int(_font().getlength(line)) + 1 for lines in labels for line in lines), default=0)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: float, y: float, anchor: str) -> None:
    """Lines of text centred vertically on y."""
    for number, line in enumerate(lines):
        draw.text((x, y + (number - (len(lines) - 1) / 2) * LINE), line, fill=INK, font=_font(), anchor=anchor)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along: the same on every machine."""
    found = importlib.util.find_spec("matplotlib")  # importing it takes longer than drawing
    assert found and found.origin
    file = Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(file), 13, layout_engine=ImageFont.Layout.BASIC)

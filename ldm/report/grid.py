"""Images side by side as one PNG. Same input, same bytes."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.data.images import from_array

CELL = 64  # pixels aimed at for the side of one image in a grid
MARGIN, GAP, LABEL_GAP = 16, 6, 10
LABEL, CAPTION = 13, 11  # font sizes, pixels
LINES = 3  # of a text, at most
INK, HAIRLINE = (70, 70, 76), (222, 222, 226)
Labels = Sequence[str] | None


def image_grid(
    images: Sequence[np.ndarray] | np.ndarray, columns: int, path: Path, *,
    row_labels: Labels = None, column_labels: Labels = None, captions: Labels = None,
) -> None:  # fmt: skip
    """Write uint8 images (C, H, W), C = 1 or 3, row by row as one PNG, small ones enlarged to about 64 pixels."""
    if wrong := [image for image in images if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3)]:
        raise ValueError(f"expected uint8 images (1 or 3, H, W), found {wrong[0].dtype} {wrong[0].shape}")
    if not len(images):
        raise ValueError("expected images, found none")
    rows = -(-len(images) // columns)
    counts = {"row label": (row_labels, rows), "column label": (column_labels, columns), "caption": (captions, len(images))}
    for what, (labels, count) in counts.items():
        if labels is not None and len(labels) != count:
            raise ValueError(f"found {len(labels)} {what}s, expected {count}")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))  # of a cell
    scale = max(1, round(CELL / max(height, width)))
    height, width = height * scale, width * scale

    heads, sides = _Texts(column_labels, 20, LABEL), _Texts(row_labels, 24, LABEL)
    below = _Texts(captions, max(14, width // 7), CAPTION)
    pitch_x = GAP + max(width, heads.width, below.width)
    pitch_y = GAP + max(height + (below.height + LABEL_GAP if captions else 0), sides.height)
    left = MARGIN + (sides.width + LABEL_GAP if row_labels else 0)
    top = MARGIN + (heads.height + GAP if column_labels else 0)

    canvas = Image.new("RGB", (left + columns * pitch_x - GAP + MARGIN, top + rows * pitch_y - GAP + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(heads.texts):
        at = left + column * pitch_x + (pitch_x - GAP) / 2, top - GAP
        draw.multiline_text(at, text, INK, heads.font, "md", align="center")
    for row, text in enumerate(sides.texts):
        at = left - LABEL_GAP, top + row * pitch_y + (pitch_y - GAP) / 2
        draw.multiline_text(at, text, INK, sides.font, "rm", align="right")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        own = from_array(image).resize((image.shape[2] * scale, image.shape[1] * scale), Image.Resampling.NEAREST).convert("RGB")
        x = left + column * pitch_x + (pitch_x - GAP - own.width) // 2
        y = top + row * pitch_y + ((height if captions else pitch_y - GAP) - own.height) // 2
        canvas.paste(own, (x, y))
        draw.rectangle((x - 1, y - 1, x + own.width, y + own.height), outline=HAIRLINE)
        if captions:
            at = x + own.width / 2, y + own.height + 4
            draw.multiline_text(at, below.texts[index], INK, below.font, "ma", align="center")
    canvas.save(path, format="PNG", optimize=True)


class _Texts:
    """Texts wrapped at `length` letters, `LINES` lines at most, in the font that matplotlib brings along, the same everywhere."""

    def __init__(self, texts: Labels, length: int, size: int):
        package = importlib.util.find_spec("matplotlib")  # importing it takes longer than drawing
        assert package and package.origin
        file = Path(package.origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans.ttf"
        self.font = ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)
        self.texts = ["\n".join(wrap(text, length, max_lines=LINES, placeholder=" …")) for text in texts or ()]
        draw = ImageDraw.Draw(Image.new("L", (1, 1)))
        boxes = [draw.multiline_textbbox((0, 0), text, self.font) for text in self.texts]
        self.width, self.height = (max((math.ceil(box[axis]) for box in boxes), default=0) for axis in (2, 3))  # pixels

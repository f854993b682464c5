"""Folders of photographs: parts of scikit-learn's two sample photographs, in many shapes, with captions of many lengths."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

# each a token of BERT's vocabulary, which MiniLM has
WORDS = [
    "red",
    "blue",
    "green",
    "house",
    "tree",
    "water",
    "sky",
    "light",
    "dark",
    "small",
    "large",
    "old",
    "new",
    "stone",
    "wall",
]
SHAPES = [(48 + 12 * (i % 10), 48 + 12 * ((3 * i + i // 10) % 10)) for i in range(20)]  # width and height
SHORTEST, LONGEST = 5, 300  # tokens of captions
UPRIGHT = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180, 8: Image.Transpose.ROTATE_270}  # how EXIF turns them


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(pixels) for pixels in load_sample_images().images)


def part(number: int, width: int, height: int) -> Image.Image:
    """A part of a photograph, RGB, at a place and in a scale of its own."""
    random, source = np.random.default_rng(number), photographs()[number % 2]
    scale = random.uniform(1, min(source.width / width, source.height / height))
    across, down = width * scale, height * scale
    left, top = random.uniform(0, source.width - across), random.uniform(0, source.height - down)
    return source.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + across, top + down))


def caption(number: int, tokens: int) -> str:
    """Words of one token each, between the two special ones."""
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS, tokens - 2))


def write_photographs(folder: Path, count: int = 300, longest: int = LONGEST) -> list[dict[str, Any]]:
    """JPEGs and PNGs, some of them lying on a side as their EXIF says, every fifth with two captions; rows of what is where."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        width, height = SHAPES[number % len(SHAPES)]
        image, name = part(number, width, height), f"{number:03d}.{'png' if number % 3 else 'jpg'}"
        exif = Image.Exif()
        if orientation := [1, 6, 1, 3, 8][number % 5] if number % 3 == 0 else None:
            exif[0x0112] = orientation
            image = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
        image.save(folder / name, quality=92, exif=exif)
        tokens = SHORTEST + number * (longest - SHORTEST) // (count - 1)
        texts = [caption(number, tokens), *([caption(number + count, SHORTEST + number % 9)] if number % 5 == 0 else [])]
        rows.append({"file_name": name, "text": texts, "tokens": tokens})
    lines = (json.dumps({"file_name": row["file_name"], "text": row["text"]}) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text("".join(lines))
    return rows

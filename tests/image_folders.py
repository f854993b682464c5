"""Small collections of images, for tests that shard them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

SIZE = 8
OPTIONS: dict[str, Any] = {
    "image_size": SIZE,
    "channels": 3,
    "resize_filter": "lanczos",
    "val_fraction": 0.2,
    "test_fraction": 0.3,
    "shard_size": 7,
    "max_bad_fraction": 0.2,
}


def make_folder(folder: Path, names: list[str], seed: int = 0) -> dict[str, np.ndarray]:
    """Noise images of the shards' own size under `names`, with captions; returns their pixels (C, H, W)."""
    random, pixels, rows = np.random.default_rng(seed), {}, []
    for number, name in enumerate(names):
        pixels[name] = random.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[name].transpose(1, 2, 0)).save(folder / name)
        rows.append({"file_name": name, "text": f"caption {number % 5} ä", "label": str(number)})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return pixels


def numbered(count: int, top: str = "") -> list[str]:
    return [f"{top}{'/' if top else ''}{i:03d}.png" for i in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

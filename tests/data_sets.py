"""Small data sets that the package `datasets` opens, and what a source wrote of them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff", "GIF": "gif"}
PICTURE = datasets.Image()
STRING, NAMES = Value("string"), ClassLabel(names=["cat", "dog"])
TEXT = {"image": PICTURE, "text": STRING}


def encoded(number: int, kind: str = "PNG") -> bytes:
    """A file of noise."""
    file, noise = io.BytesIO(), np.random.default_rng(number).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    more = {"save_all": True, "append_images": [Image.fromarray(noise[1])]} if kind == "MPO" else {}
    Image.fromarray(noise[0]).save(file, kind, **more)
    return file.getvalue()


def rows(count: int, **columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    image = {"image": lambda i: {"bytes": encoded(i), "path": None}}
    return [{name: value(i) for name, value in (image | columns).items()} for i in range(count)]


def save(folder: Path, features: dict[str, Any], **splits: list[dict[str, Any]]) -> Path:
    """A local data set: a parquet file for each split."""
    (folder / "data").mkdir(parents=True)
    for split, members in splits.items():
        table = Dataset.from_list(members, features=Features(features))
        # Not `to_parquet`, which would put the contents of files in the place of their names.
        pq.write_table(table.data.table, folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n")[:-1]]

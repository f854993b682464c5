"""Images and captions that are dropped into an inbox, and what is seen of them afterwards."""

import io
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ldm.collection.inbox import waiting
from ldm.collection.ingest import SETTLE
from ldm.data.captions import NOT_INGESTED
from ldm.data.folders import read_folder

MINE = "data/raw/mine"
WAITING = waiting(SETTLE)


def blob(seed: int, form: str = "PNG") -> bytes:
    """An image file of noise, 8x8 and grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def drop(path: Path, content: bytes | str, seconds_ago: float = 60) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(path, (time.time() - seconds_ago,) * 2)


def drop_many(inbox: Path, start: int, stop: int) -> None:
    for number in range(start, stop):
        drop(inbox / f"{number:03d}.png", blob(number))
        drop(inbox / f"{number:03d}.txt", f"noise {number}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listed(inbox: Path) -> dict[str, str]:
    """What `NOT_INGESTED` says, as a spreadsheet reads it."""
    return dict(pd.read_csv(inbox / NOT_INGESTED, keep_default_na=False)[["file_name", "reason"]].itertuples(index=False))


def captions(root: Path) -> dict[str, str]:
    return dict(read_folder(root / MINE).table[["file_name", "text"]].itertuples(index=False))


def today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"

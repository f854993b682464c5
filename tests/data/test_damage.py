"""A corrupted collection: 1,000 files in 18 kinds of damage. No crash, no hang, and kept + quarantined = found."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ldm.data.reader import SPLITS, open_shards
from ldm.data.shards import write_shards

FILES = 1000
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF"}
Random = np.random.Generator


def picture(random: Random, suffix: str) -> bytes:
    shape = (*random.integers(12, 40, 2), 3)
    image = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
    mode = random.choice(["RGB", "L", "P", "RGBA", "CMYK"] if suffix == "tif" else ["RGB", "L"])
    buffer = io.BytesIO()
    image.convert(mode).save(
        buffer, FORMATS[suffix], **({"progressive": True} if suffix == "jpg" and random.random() < 0.5 else {})
    )
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(random: Random, side: int = 30_000) -> bytes:
    """A PNG of 900 million pixels in a few hundred kilobytes: its header promises what would not fit in memory."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(side * 10))) + chunk(b"IEND", b"")


def text_bomb(random: Random) -> bytes:
    """A PNG whose compressed text chunk unfolds to 100 MB."""
    packed = zlib.compress(bytes(100_000_000))
    blob = picture(random, "png")
    return blob[:33] + chunk(b"zTXt", b"Comment\0\0" + packed) + blob[33:]


def flipped(random: Random, blob: bytes, reach: int | None = None) -> bytes:
    damaged = bytearray(blob)
    for place in random.integers(0, min(reach or len(blob), len(blob)), random.integers(1, 20)):
        damaged[place] ^= 1 << random.integers(8)
    return bytes(damaged)


def spliced(random: Random, blob: bytes) -> bytes:
    a, b = sorted(random.integers(0, len(blob), 2))
    return blob[:a] + blob[b:]


# each takes a sound file and returns the damaged one, and True where it can never be kept
DAMAGE: dict[str, tuple[Callable[[Random, bytes], bytes], bool]] = {
    "zero bytes": (lambda random, blob: b"", True),
    "cut in the header": (lambda random, blob: blob[: random.integers(1, 8)], True),
    "cut anywhere": (lambda random, blob: blob[: random.integers(1, len(blob))], False),
    "last byte missing": (lambda random, blob: blob[:-1], False),
    "bits flipped anywhere": (lambda random, blob: flipped(random, blob), False),
    "bits flipped in the header": (lambda random, blob: flipped(random, blob, 64), False),
    "zeros from the middle on": (lambda random, blob: blob[: len(blob) // 2] + bytes(len(blob) - len(blob) // 2), False),
    "all zeros": (lambda random, blob: bytes(len(blob)), True),
    "random bytes": (lambda random, blob: random.bytes(len(blob)), True),
    "signature, then random bytes": (lambda random, blob: blob[:8] + random.bytes(len(blob)), True),
    "text": (lambda random, blob: b"this is no image at all\n" * 20, True),
    "HTML of a download that failed": (lambda random, blob: b"<html><title>404</title></html>", True),
    "a piece cut out": (spliced, False),
    "bytes put in": (lambda random, blob: blob[: len(blob) // 3] + random.bytes(50) + blob[len(blob) // 3 :], False),
    "rubbish after the end": (lambda random, blob: blob + random.bytes(200), False),
    "an EPS that would run a program": (lambda random, blob: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", True),
    "too many pixels": (lambda random, blob: bomb(random), True),
    "a text bomb": (lambda random, blob: text_bomb(random), False),
}  # fmt: skip
RARE = {"too many pixels", "a text bomb"}  # large files: a few are enough


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
def test_every_damaged_file_is_accounted_for(tmp_path: Path) -> None:
    random, rows, hopeless = np.random.default_rng(0), [], set()
    source = tmp_path / "source"
    source.mkdir()
    kinds = [kind for kind in DAMAGE if kind not in RARE]
    for number in range(FILES + 200):
        suffix = list(FORMATS)[number % len(FORMATS)]
        name, blob = f"{number:04d}.{suffix}", picture(random, suffix)
        if number < FILES:
            kind = sorted(RARE)[number % 2] if number % 100 < 2 else kinds[number % len(kinds)]
            damage, never = DAMAGE[kind]
            blob = damage(random, blob)
            hopeless |= {name} if never else set()
        (source / name).write_bytes(blob)
        rows.append({"file_name": name, "text": "x", "damaged": number < FILES})
    pd.DataFrame(rows).to_csv(source / "metadata.csv", index=False)

    index = write_shards(
        source, tmp_path / "shards", image_size=8, channels=3, resize_filter="box", val_fraction=0.2, test_fraction=0.2,
        shard_size=64, max_bad_fraction=0.99, workers=2,
    )  # fmt: skip

    quarantined = pd.read_csv(tmp_path / "shards/quarantine.csv")
    kept = pd.concat([open_shards(tmp_path / "shards", split).captions for split in SPLITS])
    assert index["found"] == FILES + 200 == len(kept) + len(quarantined)
    assert set(kept.file_name) | set(quarantined.file_name) == {row["file_name"] for row in rows}
    assert hopeless <= set(quarantined.file_name)
    assert not set(quarantined.file_name) & {row["file_name"] for row in rows if not row["damaged"]}  # none that is sound
    assert quarantined.reason.str.len().between(5, 200).all() and not quarantined.reason.str.contains("0x|/tmp").any()
    for split in SPLITS:  # what was kept can be read
        reader = open_shards(tmp_path / "shards", split)
        assert reader.images(range(len(reader))).shape == (len(reader), 3, 8, 8)

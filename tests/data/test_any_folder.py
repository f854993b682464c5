"""Folders of any names, layouts, encodings and conventions: no image is lost, no caption is lost or invented."""

import csv
import hashlib
import io
import json
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data import shards
from ldm.data.reader import SPLITS, open_shards

SUFFIXES = {"png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "tif", "tiff", "gif", "heic", "avif", "svg", "dng"}
OPTIONS: dict[str, Any] = {
    "image_size": 4, "channels": 3, "val_fraction": 0.3, "test_fraction": 0.3, "shard_size": 3, "max_bad_fraction": 1.0,
}  # fmt: skip

# the independent reader


def is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in SUFFIXES


def is_left_behind(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return any(part.startswith(".") or part in ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN") for part in parts)


def text_of(path: Path) -> str:
    blob = path.read_bytes()
    return blob.decode("utf-16" if blob[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").replace("\r\n", "\n")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() == ".parquet":
        yield from pd.read_parquet(path).to_dict("records")
    elif path.suffix.lower() == ".csv":
        yield from csv.DictReader(io.StringIO(text_of(path), newline=""))
    else:
        yield from (json.loads(line) for line in text_of(path).split("\n") if line)


def caption_of(path: Path, folder: Path) -> str:
    """From the nearest table, else from the file beside the image, else from its folder's name."""
    for place in path.parents[: len(path.relative_to(folder).parts)]:
        for table in (file for file in place.iterdir() if file.stem.lower() == "metadata"):
            of = {unicodedata.normalize("NFC", row["file_name"]): row["text"] for row in rows_of(table)}
            return of[unicodedata.normalize("NFC", path.relative_to(place).as_posix())]
    for beside in (path.with_suffix(end) for end in (".txt", ".TXT", ".caption")):
        if beside.is_file():
            return text_of(beside).strip()
    if path.with_suffix(".json").is_file():
        return json.loads(text_of(path.with_suffix(".json")))["caption"].strip()
    return path.parent.name


# folders to read

LETTERS = st.sampled_from([*"abzAZ09 -_,;'()#%+=~!", '"', "é", "e\u0301", "ü", "日", "🙂", "."])
NAMES = st.lists(LETTERS, min_size=1, max_size=6).map("".join).filter(lambda name: name.strip(" .") == name)
WORDS = st.text(st.one_of(st.characters(exclude_categories=("Cs", "Cc")), st.sampled_from("\n\t\"',;")), max_size=30)
GOOD = [".png", ".PNG", ".jpg", ".JPEG", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".gif"]
FORMATS = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".gif": "GIF"}
LEFT = ("@eaDir/x.png", "__MACOSX/._a.png", ".hidden/y.jpg", ".z.png", "Thumbs.db", "#recycle/old.png", "$RECYCLE.BIN/b.bmp")
PASSED_OVER = ("hidden", "@eaDir", "__MACOSX", "Thumbs.db", "#recycle", "$RECYCLE.BIN")
CONVENTIONS = (
    "metadata.csv", "METADATA.CSV", "metadata.jsonl", "metadata.parquet", ".txt", ".TXT", ".caption", ".json", ".txt and .json",
    "classes",
)  # fmt: skip


def png(number: int) -> bytes:
    blob = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)).save(blob, "PNG")
    return blob.getvalue()


def some_of_each_split() -> list[bytes]:
    """Two images for each split: a split of fewer is refused."""
    found: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for blob in map(png, range(1000, 1100)):
        split = shards.split_of(hashlib.sha256(blob).hexdigest(), OPTIONS["val_fraction"], OPTIONS["test_fraction"])
        found[split] += [blob] * (len(found[split]) < 2)
    return [blob for blobs in found.values() for blob in blobs]


FILLING = some_of_each_split()


def unique(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@st.composite
def layouts(draw: Callable[..., Any]) -> dict[str, Any]:
    """What lies in a folder: images by name, with their captions."""
    convention = draw(st.sampled_from(CONVENTIONS))
    tops = draw(st.lists(NAMES, max_size=3, unique_by=unique))
    places = ["", *tops, *(f"{top}/deep" for top in tops[:1])]
    stems = draw(st.lists(NAMES.filter(lambda name: not name.startswith("#")), min_size=1, max_size=12, unique_by=unique))
    inner = [place for place in places if place] or ["cat"]
    images = {f"{inner[0]}/filling{number}.png": (f"of {number}", True) for number in range(len(FILLING))}
    for stem in stems:
        place = draw(st.sampled_from(inner if convention == "classes" else places))
        kind = draw(st.sampled_from([*GOOD, *GOOD, ".heic", "broken"]))
        suffix = ".png" if kind == "broken" else kind
        images[f"{place}/{stem}{suffix}".lstrip("/")] = (draw(WORDS), kind in GOOD)
    return {
        "convention": convention, "images": images, "left": draw(st.sets(st.sampled_from(LEFT))),
        "encoding": draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), "newline": draw(st.sampled_from(["\n", "\r\n"])),
        "in each folder": draw(st.booleans()),
    }  # fmt: skip


def write_table(path: Path, rows: list[dict[str, str]], encoding: str, newline: str) -> None:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix.lower() == ".csv":
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"], lineterminator=newline)
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_bytes("".join(json.dumps(row) + newline for row in rows).encode(encoding))


def write_folder(folder: Path, layout: dict[str, Any]) -> None:
    convention, random = layout["convention"], np.random.default_rng(0)
    for name, (text, good) in layout["images"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "/filling" in name:
            path.write_bytes(FILLING[int(path.stem.removeprefix("filling"))])
        elif good:
            pixels = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, FORMATS.get(path.suffix.lower(), "JPEG"))
        else:
            path.write_bytes(b"\x89PNG\r\n\x1a\n no more")
        if convention == ".txt and .json":  # as img2dataset writes them
            path.with_suffix(".txt").write_text(text)
            path.with_suffix(".json").write_text(json.dumps({"caption": text or None, "url": "x", "exif": "{}"}))
        elif convention == ".json":
            path.with_suffix(convention).write_text(json.dumps({"caption": text, "n": 1}))
        elif convention.startswith("."):
            path.with_suffix(convention).write_bytes(text.replace("\n", layout["newline"]).encode(layout["encoding"]))
    if convention.lower().startswith("metadata"):
        names = list(layout["images"])
        places = {str(Path(name).parent) for name in names} if layout["in each folder"] else {"."}
        for place in places:
            of = [name for name in names if not layout["in each folder"] or str(Path(name).parent) == place]
            rows = [{"file_name": str(Path(name).relative_to(place)), "text": layout["images"][name][0]} for name in of]
            write_table(folder / place / convention, rows, layout["encoding"], layout["newline"])
    for name in layout["left"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"left behind")


def packed(folder: Path, into: Path) -> None:
    into.mkdir()
    with tarfile.open(into / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(folder, ".")


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_every_image_is_somewhere_and_every_caption_is_its_own(form: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(layouts())
    def check(layout: dict[str, Any]) -> None:
        if form == "tar":  # in which a name ends at its first dot
            images = {name.replace(".", "_", name.count(".") - 1): of for name, of in layout["images"].items()}
            layout = layout | {"convention": ".txt", "images": images}
        with tempfile.TemporaryDirectory() as scratch:
            source, out = Path(scratch, "source"), Path(scratch, "out")
            source.mkdir()
            write_folder(source, layout)
            files = [path for path in source.rglob("*") if path.is_file() and is_image(path)]
            left = {path for path in files if is_left_behind(path, source)}
            names = {path: path.relative_to(source).as_posix() for path in files}
            if form == "tar":
                packed(source, Path(scratch, "tars"))
                names = {path: f"0.tar/{Path(name).with_suffix(path.suffix.lower())}" for path, name in names.items()}
            expected = {names[path]: caption_of(path, source) for path in files if path not in left}
            index = shards.write_shards(Path(scratch, "tars") if form == "tar" else source, out, **OPTIONS)
            refused = set(pd.read_csv(out / "quarantine.csv", dtype=str, keep_default_na=False).file_name)
            held = [row for split in SPLITS for row in open_shards(out, split).captions.to_dict("records")]
            found = {row["file_name"]: row["text"] for row in held}
            assert len(held) == len(found) == sum(good for _, good in layout["images"].values())
            assert found.keys().isdisjoint(refused) and found.keys() | refused == expected.keys()
            assert found == {name: expected[name] for name in found}
            assert sum(index["captions"]["origins"].values()) == len(found)
            assert sum(index["ignored"].get(what, 0) for what in PASSED_OVER) == len(layout["left"])

    check()

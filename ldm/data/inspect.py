"""What a folder of images or of shards holds, and whether shards are what their index says."""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ldm.base.errors import InputError
from ldm.base.hashing import file_hash
from ldm.data.batches import order
from ldm.data.folders import Place
from ldm.data.images import MAX_PIXELS, UnreadableImage, decode, fit_square, from_array, to_array
from ldm.data.parallel import IMAGES_PER_WORKER, default_workers, processes
from ldm.data.reader import PARTS, SPLITS, ShardReader, open_shards
from ldm.data.shards import read_collection

SHOWN = 12  # labels, reasons
SHEET, TILE = 48, 96  # images of a contact sheet, and the side of each in pixels


def check_shards(folder: Path) -> Iterator[str]:
    """Every way in which a shard folder is not what its index says, a line each: hashes, sizes, offsets, images, strays."""
    try:
        yield from _check_folder(folder)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        yield f"{folder / 'index.json'}: damaged ({type(error).__name__}: {error})"


def _check_folder(folder: Path) -> Iterator[str]:
    readers = {split: open_shards(folder, split) for split in SPLITS}
    index = readers["train"].index
    trusted = True
    for entry in [*index["shards"], *({"name": name, **file} for name, file in index["files"].items())]:
        path = folder / entry["name"]
        if not path.is_file():
            yield f"{path}: missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{path}: {path.stat().st_size} bytes, the index says {entry['bytes']}"
        elif file_hash(path) != entry["sha256"]:
            yield f"{path}: its sha256 is not that of the index"
            trusted = trusted and entry["name"] != "offsets.npy"
    known = {"index.json", *index["files"], *(shard["name"] for shard in index["shards"])}
    yield from (f"{folder / name}: not in the index" for name in sorted({path.name for path in folder.iterdir()} - known))
    for split, reader in readers.items() if trusted else ():
        counted = {shard["name"]: len(positions) for shard, positions in reader.shard_positions()}
        for shard in index["shards"]:
            if shard["split"] == split and counted.get(shard["name"]) != shard["count"]:
                found = counted.get(shard["name"], 0)
                yield f"{folder / 'offsets.npy'}: {found} samples of {shard['name']}, the index says {shard['count']}"
        for shard, positions in reader.shard_positions():
            yield from _check_shard(reader, folder / shard["name"], positions)


def _check_shard(reader: ShardReader, path: Path, positions: range) -> Iterator[str]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = {(member.offset_data, member.size) for member in tar}
    except (OSError, tarfile.TarError) as error:
        yield f"{path}: not a readable tar: {error}"
        return
    for position in positions:
        _, *places = reader.offsets(position)
        for part, offset, size in zip(PARTS, places[::2], places[1::2], strict=True):
            if (offset, size) not in members:
                yield f"{path}: no file of {size} bytes at {offset}, where offsets.npy has the {part} of sample {position}"
        try:
            reader[position]
        except (InputError, ValueError) as error:
            yield str(error)


@dataclass(frozen=True)
class Inventory:
    """What was found: a row per image (`file_name`, `text`, `width`, `height`, `bytes`, and `split` of shards), and a sheet."""

    images: pd.DataFrame
    unreadable: pd.DataFrame  # file_name, reason
    ignored: dict[str, int]  # suffix -> how many files that are no images
    sheet: np.ndarray  # uint8 (N, 3, TILE, TILE): some images, taken at random

    def summary(self) -> list[tuple[str, str]]:
        """What a reader wants to know first, a line each: what, and how much of it."""
        images = self.images
        splits = ""
        if "split" in images:
            splits = f" ({', '.join(f'{(images.split == split).sum():,} {split}' for split in SPLITS)})"
        lines = [("images", f"{len(images):,}{splits}"), ("unreadable", f"{len(self.unreadable):,}")]
        lines += [(f"  {count:,}", str(reason)) for reason, count in self.unreadable.reason.value_counts().head(SHOWN).items()]
        if self.ignored:
            lines.append(("ignored", ", ".join(f"{count:,} {suffix}" for suffix, count in self.ignored.items())))
        if len(images):
            for name in ("width", "height", "bytes"):
                lines.append((name, _spread(images[name])))
            empty = (images.text.str.strip() == "").sum()
            lengths = _spread(images.text.str.len())
            lines.append(("captions", f"{images.text.nunique():,} distinct, {empty:,} empty; {lengths} characters"))
            if "label" in images:
                counts = images.label.value_counts()
                shown = ", ".join(f"{label} {count:,}" for label, count in counts.head(SHOWN).items())
                lines.append(("labels", f"{len(counts)}: {shown}{', …' if len(counts) > SHOWN else ''}"))
        return lines


def inspect(folder: Path, *, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> Inventory:
    """Look through a shard folder, or through a folder of images or tars that is yet to be sharded, under these limits."""
    if (folder / "index.json").is_file():
        return _of_shards(folder)
    return _of_collection(folder, partial(_look, min_side=min_side, max_pixels=max_pixels))


def _of_shards(folder: Path) -> Inventory:
    parts, tiles = [], []
    readers = [open_shards(folder, split) for split in SPLITS]
    total = sum(map(len, readers))
    chosen = order(0, total, 0, min(SHEET, total))
    for reader in readers:
        side = reader.preprocessing.side
        sizes = [reader.offsets(i)[2] for i in range(len(reader))]
        parts.append(reader.captions.assign(width=side, height=side, bytes=sizes, split=reader.split))
    starts = np.cumsum([0, *map(len, readers)])
    for i in chosen.tolist():
        number = int(np.searchsorted(starts, i, side="right")) - 1
        tiles.append(_tile(from_array(readers[number].images([i - starts[number]])[0])))
    quarantined = pd.read_csv(folder / "quarantine.csv", dtype=str, keep_default_na=False)
    return Inventory(pd.concat(parts, ignore_index=True), quarantined, readers[0].index["ignored"], np.array(tiles))


def _of_collection(folder: Path, look: Callable[[Place], tuple[int, int, int, str]]) -> Inventory:
    collection = read_collection(folder)
    with processes(min(default_workers(), len(collection.places) // IMAGES_PER_WORKER)) as run:
        looks = pd.DataFrame(run(look, collection.places), columns=["width", "height", "bytes", "reason"])
    frame = pd.concat([collection.table, looks], axis=1)
    refused = pd.DataFrame(collection.refused.items(), columns=["file_name", "reason"])
    unreadable = pd.concat([refused, frame.loc[frame.reason != "", ["file_name", "reason"]]], ignore_index=True)
    readable = np.flatnonzero(frame.reason == "")
    chosen = readable[order(0, len(readable), 0, min(SHEET, len(readable)))].tolist() if len(readable) else []
    tiles = [_tile(decode(collection.places[i].read(), channels=3)) for i in chosen]
    return Inventory(frame.iloc[readable].drop(columns="reason"), unreadable, collection.ignored, np.array(tiles))


def _look(place: Place, *, min_side: int, max_pixels: int) -> tuple[int, int, int, str]:
    """Width, height and bytes of an image, and why it cannot be read if so."""
    try:
        blob = place.read()
        return *decode(blob, channels=3, min_side=min_side, max_pixels=max_pixels).size, len(blob), ""
    except UnreadableImage as error:
        return 0, 0, 0, str(error)


def _spread(values: pd.Series) -> str:
    low, middle, high = values.quantile([0, 0.5, 1])
    return f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}"


def _tile(image: Image.Image) -> np.ndarray:
    return to_array(fit_square(image.convert("RGB"), TILE, "lanczos", "contain"))

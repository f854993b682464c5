"""Statistics of a folder of images or of shards, and a check of shards against their index."""

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ldm.base.errors import InputError
from ldm.base.files import file_hash
from ldm.data.batches import order
from ldm.data.caption_columns import FURTHER, captions_in
from ldm.data.captions import ORIGINS
from ldm.data.conventions import Convention
from ldm.data.folders import Place
from ldm.data.images import MAX_PIXELS, PROFILE, UnreadableImage, decode, fit_to, from_array, to_array
from ldm.data.parallel import IMAGES_PER_WORKER, default_workers, mapped
from ldm.data.reader import PARTS, SPLITS, ShardReader, open_shards
from ldm.data.shards import read_collection

MOST_FREQUENT = 12  # labels and reasons in a summary
SHEET, TILE = 48, 96  # images of a contact sheet, and the side of each in pixels


def check_shards(folder: Path) -> Iterator[str]:
    """Every difference between a shard folder and its index, a line each: hashes, sizes, offsets, images, further files."""
    try:
        readers = [open_shards(folder, split) for split in SPLITS]
        index = readers[0].index
        expected = {entry["name"]: entry for entry in index["shards"]} | index["files"]
        further = sorted({path.name for path in folder.iterdir()} - {"index.json", *expected})
        damaged = dict.fromkeys(further, "not in the index")
        for name, entry in expected.items():
            path = folder / name
            if not path.is_file():
                damaged[name] = "missing"
            elif path.stat().st_size != entry["bytes"]:
                damaged[name] = f"{path.stat().st_size} bytes, the index says {entry['bytes']}"
            elif file_hash(path) != entry["sha256"]:
                damaged[name] = "its sha256 is not that of the index"
        yield from (f"{folder / name}: {problem}" for name, problem in damaged.items())
        for reader in readers if "offsets.npy" not in damaged else ():
            yield from _check_split(reader, folder)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        yield f"{folder / 'index.json'}: damaged ({type(error).__name__}: {error})"


def _check_split(reader: ShardReader, folder: Path) -> Iterator[str]:
    positions = {shard["name"]: positions for shard, positions in reader.shard_positions()}
    for shard in (shard for shard in reader.index["shards"] if shard["split"] == reader.split):
        path, here = folder / shard["name"], positions.get(shard["name"], range(0))
        if len(here) != shard["count"]:
            yield f"{folder / 'offsets.npy'}: {len(here)} samples of {path.name}, the index says {shard['count']}"
        try:
            with tarfile.open(path, "r:") as tar:
                members = {(member.offset_data, member.size) for member in tar}
        except (OSError, tarfile.TarError) as error:
            yield f"{path}: not a readable tar: {error}"
            continue
        for position in here:
            places = reader.offsets[position, 1:].reshape(-1, 2).tolist()
            for part, (offset, size) in zip(PARTS, places, strict=True):
                if (offset, size) not in members:
                    yield f"{path}: no file of {size} bytes at {offset}, where offsets.npy has the {part} of sample {position}"
            try:
                reader[position]
            except (InputError, ValueError) as error:
                yield str(error)


@dataclass(frozen=True)
class Inventory:
    """What was found. `images`: `file_name`, `text`, maybe `captions` and `label`, `width`, `height`, `bytes`, maybe `split`."""

    images: pd.DataFrame
    unreadable: pd.DataFrame  # file_name, reason
    origins: dict[str, int]  # of captions: table, file, folder name or none -> number
    converted: dict[str, int]  # colour profiles other than sRGB -> number
    ignored: dict[str, int]  # files passed over: suffix, or what they are -> number
    sheet: np.ndarray  # uint8 (N, 3, TILE, TILE): some images, drawn at random

    def summary(self) -> list[tuple[str, str]]:
        """Lines for people: a name and its value."""
        images, reasons = self.images, self.unreadable.reason.value_counts().head(MOST_FREQUENT)
        splits = ", ".join(f"{(images.split == split).sum():,} {split}" for split in SPLITS if "split" in images)
        lines = [("images", f"{len(images):,}" + (f" ({splits})" if splits else "")), ("unreadable", f"{len(self.unreadable):,}")]
        lines += [(f"  {count:,}", str(reason)) for reason, count in reasons.items()]
        for name, counts in (("passed over", self.ignored), ("profiles", self.converted)):
            if counts:
                lines.append((name, ", ".join(f"{count:,} {what}" for what, count in counts.items())))
        if len(images):
            captions = captions_in(images)
            texts, several = pd.Series([*chain(*captions)], dtype=str), sum(len(found) > 1 for found in captions)
            spreads = images[["width", "height", "bytes"]].quantile([0, 0.5, 1])
            spreads["captions"] = texts.str.len().quantile([0, 0.5, 1])
            spread = {str(name): f"{low:,.0f} to {high:,.0f}, median {mid:,.0f}" for name, (low, mid, high) in spreads.items()}
            origins = ", ".join(f"{count:,} from {ORIGINS[origin]}" for origin, count in self.origins.items())
            numbers = f"{texts.nunique():,} distinct, {(texts.str.strip() == '').sum():,} empty"
            numbers += f"; {several:,} images have several" if several else ""
            spread["captions"] = f"{origins}; {numbers}; {spread['captions']} characters"
            lines += spread.items()
        if "split" in images:  # in shards, few sizes
            sizes = Counter(zip(images.width, images.height, strict=True))
            lines.append(("shapes", ", ".join(f"{n:,} of {width}x{height}" for (width, height), n in sorted(sizes.items()))))
        if len(images) and "label" in images:
            labels = images.label.value_counts()
            listed = [f"{label} {count:,}" for label, count in labels.head(MOST_FREQUENT).items()]
            lines.append(("labels", f"{len(labels)}: {', '.join(listed)}{', …' if len(labels) > MOST_FREQUENT else ''}"))
        return lines


def inspect(folder: Path, *, min_side: int = 1, max_pixels: int = MAX_PIXELS, captions: Convention = "auto") -> Inventory:
    """The inventory of a shard folder, or of a folder of images or tars before sharding under these settings."""
    if (folder / "index.json").is_file():
        return _inspect_shards(folder)
    collection = read_collection(folder, captions)
    table, places = collection.table, collection.places

    def look(place: Place) -> dict[str, Any]:
        blob = place.read()
        image = decode(blob, channels=3, min_side=min_side, max_pixels=max_pixels)
        return {"width": image.width, "height": image.height, "bytes": len(blob), PROFILE: image.info.get(PROFILE)}

    with mapped(look, places, min(default_workers(), len(places) // IMAGES_PER_WORKER)) as looks:
        found = list(looks)
    bad = {name: str(error) for name, error in zip(table.file_name, found, strict=True) if isinstance(error, UnreadableImage)}
    readable = np.flatnonzero(~table.file_name.isin(bad))
    images = table.iloc[readable].filter(["file_name", "text", FURTHER, "label"])  # others may have the names of these columns
    seen = pd.DataFrame([found[i] for i in readable], images.index, ["width", "height", "bytes", PROFILE])
    converted = Counter(seen.pop(PROFILE).dropna())
    unreadable = pd.DataFrame([*collection.refused.items(), *bad.items()], columns=["file_name", "reason"])
    drawn = readable[order(0, len(readable), 0, min(SHEET, len(readable)))]
    sheet = _sheet(decode(places[i].read(), channels=3) for i in drawn)
    origins = Counter(collection.origins)
    return Inventory(pd.concat([images, seen], axis=1), unreadable, origins, converted, collection.ignored, sheet)


def _inspect_shards(folder: Path) -> Inventory:
    readers = [open_shards(folder, split) for split in SPLITS]
    parts = [_stored_images(reader) for reader in readers]
    places = [(reader, i) for reader in readers for i in range(len(reader))]
    drawn = [places[i] for i in order(0, len(places), 0, min(SHEET, len(places)))]
    quarantined = pd.read_csv(folder / "quarantine.csv", dtype=str, keep_default_na=False)
    sheet, index = _sheet(from_array(reader.images([i])[0]) for reader, i in drawn), readers[0].index
    origins = index.get("captions", {}).get("origins", {})  # earlier shards have none
    return Inventory(pd.concat(parts, ignore_index=True), quarantined, origins, index.get("converted", {}), {}, sheet)


def _stored_images(reader: ShardReader) -> pd.DataFrame:
    """The part of `Inventory.images` that is of one split."""
    images = reader.captions.assign(width=0, height=0, bytes=reader.offsets[:, 2], split=reader.split)
    for shape, positions in reader.shapes.items():
        images.loc[positions, ["height", "width"]] = reader.preprocessing.stored(shape)
    return images


def _sheet(images: Iterable[Image.Image]) -> np.ndarray:
    return np.array([to_array(fit_to(image.convert("RGB"), (TILE, TILE), "lanczos", "contain")) for image in images])

"""Folder of images -> WebDataset tars with an index, and random access to what they hold.

A shard folder holds plain tars that any WebDataset client reads (`KEY.png`, `KEY.txt`, `KEY.json` per image),
`index.json` (what is in them, by which preprocessing, with their hashes), `offsets.npy` (where each file starts)
and, where the source has one, `prompts.csv`. Equal inputs give equal bytes.
"""

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.data import images
from ldm.errors import InputError
from ldm.hashing import canonical_json, content_hash, file_hash

SPLITS = ("train", "val", "test")
SMALLEST_SPLIT = 2  # images; a mean of fewer has no standard error
PARTS = ("png", "txt", "json")  # offsets.npy: shard number, then offset and size of each of these


@dataclass(frozen=True)
class Sample:
    key: str
    image: np.ndarray  # uint8 (C, H, W)
    text: str
    meta: dict[str, Any]  # `file_name` and the further columns of the caption table


def split_of(digest: str, val_fraction: float, test_fraction: float) -> str:
    """The split of an image by its content hash: stable as data grows, and equal files always land together."""
    position = int(digest[:15], 16) / 16**15
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def write_shards(
    folder: Path,
    out: Path,
    *,
    image_size: int,
    channels: int,
    resize_filter: str,
    val_fraction: float,
    test_fraction: float,
    shard_size: int,
    max_bad_fraction: float,
) -> dict[str, Any]:
    """Write the images of `folder` as shards to `out`, all or nothing, and return the index.

    A shard holds images of one split and one top-level subfolder, so that a new subfolder leaves every other
    shard as it is. Unreadable images are listed in the index with the reason.
    Raises `InputError` for bad folders and captions (see `images.list_images`), for more than
    `max_bad_fraction` unreadable images, and for a split with fewer than `SMALLEST_SPLIT`; `out` is untouched then.
    """
    table = images.list_images(folder)
    prompts = _prompts(folder, table)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    groups, quarantined = _group(folder, table, channels, val_fraction, test_fraction)
    if len(quarantined) > max_bad_fraction * len(table):
        shutil.rmtree(partial)
        first = quarantined[0]
        raise InputError(
            f"{folder}: {len(quarantined)} of {len(table)} images are unreadable, more than data.max_bad_fraction "
            f"{max_bad_fraction} allows; the first is {first['file_name']!r} ({first['reason']})"
        )
    sizes = {split: sum(len(members) for group, members in groups.items() if group[0] == split) for split in SPLITS}
    small = [split for split in SPLITS if sizes[split] < SMALLEST_SPLIT]
    if small:
        shutil.rmtree(partial)
        raise InputError(
            f"{folder}: its {len(table)} images leave fewer than {SMALLEST_SPLIT} for the {' and '.join(small)} split; "
            "add images or raise data.val_fraction or data.test_fraction"
        )
    preprocessing = {"image_size": image_size, "channels": channels, "resize_filter": resize_filter, "fit": "cover"}
    shards, offsets = _write_groups(folder, partial, groups, preprocessing, shard_size)
    np.save(partial / "offsets.npy", offsets)
    ends = np.cumsum([sizes[split] for split in SPLITS]).tolist()
    splits = {split: [start, end] for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False)}
    index = {
        "version": 1,
        "preprocessing": preprocessing,
        "splits": splits,
        "shards": shards,
        "offsets_sha256": file_hash(partial / "offsets.npy"),
        "found": len(table),
        "quarantined": quarantined,
    }
    if prompts:
        shutil.copyfile(prompts, partial / "prompts.csv")
    (partial / "index.json").write_text(canonical_json(index), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return index


Groups = dict[tuple[str, str], list[tuple[dict[str, Any], str]]]  # (split, top-level folder): caption row, content hash


def _group(
    folder: Path, table: pd.DataFrame, channels: int, val_fraction: float, test_fraction: float
) -> tuple[Groups, list[dict[str, str]]]:
    """Readable images by (split, top-level folder), and the unreadable ones with the reason."""
    groups: Groups = {}
    quarantined = []
    for row in ({str(k): v for k, v in row.items()} for row in table.to_dict("records")):
        try:
            blob = (folder / row["file_name"]).read_bytes()
            images.decode(blob, channels=channels)
        except (images.UnreadableImage, OSError) as error:
            reason = str(getattr(error, "strerror", error))  # without the path, which is this machine's
            quarantined.append({"file_name": row["file_name"], "reason": reason})
            continue
        digest = content_hash(blob)
        top = row["file_name"].split("/")[0] if "/" in row["file_name"] else ""
        groups.setdefault((split_of(digest, val_fraction, test_fraction), top), []).append((row, digest))
    return groups, quarantined


def _write_groups(
    folder: Path, out: Path, groups: Groups, preprocessing: dict[str, Any], shard_size: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Write the tars of all groups, split by split; returns their entries of the index and the offset table."""
    shards: list[dict[str, Any]] = []
    offsets: list[np.ndarray] = []
    for split, top in sorted(groups, key=lambda group: (SPLITS.index(group[0]), group[1])):
        members = groups[split, top]
        for number, start in enumerate(range(0, len(members), shard_size)):
            path = out / f"{split}-{top + '-' if top else ''}{number:05d}.tar"
            chunk = members[start : start + shard_size]
            rows = _write_tar(path, (_encode(folder, row, digest, preprocessing) for row, digest in chunk))
            offsets.append(np.insert(rows, 0, len(shards), axis=1))
            entry = {"name": path.name, "split": split, "count": len(rows)}
            shards.append({**entry, "sha256": file_hash(path), "bytes": path.stat().st_size})
    return shards, np.concatenate(offsets)


def _encode(folder: Path, row: dict[str, Any], digest: str, preprocessing: dict[str, Any]) -> dict[str, Any]:
    image = images.decode((folder / row["file_name"]).read_bytes(), channels=preprocessing["channels"])
    # Equal files may stand under several names, so the key needs both: content first, then name.
    key = digest[:16] + content_hash(row["file_name"].encode())[:8]
    meta = {name: value for name, value in row.items() if name != "text"}
    return {
        "__key__": key,
        "png": images.to_png(images.fit_square(image, preprocessing["image_size"], preprocessing["resize_filter"])),
        "txt": row["text"].encode(),
        "json": canonical_json(meta).encode(),
    }


def _write_tar(path: Path, samples: Iterator[dict[str, Any]]) -> np.ndarray:
    """Write one tar; returns offset and size of each part, int64 (N, 2 * len(PARTS))."""
    import webdataset  # only to write: a machine that trains on shards need not have it

    with webdataset.TarWriter(str(path), user="", group="", mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as written:
        for member in written:
            key, part = member.name.split(".", 1)
            places.setdefault(key, {})[part] = (member.offset_data, member.size)
    return np.array([[n for part in PARTS for n in place[part]] for place in places.values()], dtype=np.int64)


def _prompts(folder: Path, table: pd.DataFrame) -> Path | None:
    """The source's optional `prompts.csv` (`text,label`: prompts to evaluate that no caption contains)."""
    source = folder / "prompts.csv"
    if not source.is_file():
        return None
    try:
        prompts = pd.read_csv(source, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise InputError(f"{source}: not readable as a table: {error}") from None
    if not {"text", "label"} <= set(prompts.columns):
        raise InputError(f"{source}: expected columns text,label; found {', '.join(prompts.columns)}")
    unknown = sorted(set(prompts.label) - set(table.get("label", [])))
    if unknown:
        raise InputError(f"{source}: label {unknown[0]!r} is no image's label; mend it, or label the images")
    return source


class ShardReader:
    """Random access to the samples of one split: `len(reader)`, `reader[i]`. Holds one open file per shard."""

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        path = folder / "index.json"
        try:
            self.index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: not found; run the `shard` stage (dvc repro shard)") from None
        if split not in self.index["splits"]:
            raise InputError(f"{path}: no split {split!r}; found {', '.join(self.index['splits'])}")
        start, stop = self.index["splits"][split]
        self._rows = np.load(folder / "offsets.npy", mmap_mode="r")[start:stop]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Sample:
        shard, *places = (int(n) for n in self._rows[position])
        text, meta = self._read(shard, *places[2:4]), self._read(shard, *places[4:6])
        return Sample(
            key=self._key(shard, places[0]),
            image=self._image(position),
            text=text.decode(),
            meta=json.loads(meta),
        )

    def images(self, positions: np.ndarray | range) -> np.ndarray:
        """Decoded pixels of several samples, uint8 (N, C, H, W)."""
        return np.stack([self._image(int(i)) for i in positions])

    def shard_positions(self) -> list[tuple[dict[str, Any], range]]:
        """The shards of this split, each with the positions of its samples."""
        numbers = np.asarray(self._rows[:, 0])
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        return [(self.index["shards"][int(numbers[a])], range(a, b)) for a, b in pairwise(edges) if a < b]

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """`prompts.csv`: columns `text,label`; empty where the source has none."""
        path = self.folder / "prompts.csv"
        return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame({"text": [], "label": []})

    @cached_property
    def captions(self) -> pd.DataFrame:
        """`key`, `text` and the caption table's further columns of every sample, without decoding pixels."""
        rows = []
        for shard, *places in self._rows.tolist():
            text, meta = self._read(shard, *places[2:4]).decode(), json.loads(self._read(shard, *places[4:6]))
            own = {"key": self._key(shard, places[0]), "text": text}
            rows.append(own | meta | own)  # a column `key` of the caption table does not replace the sample's
        return pd.DataFrame(rows)

    def _image(self, position: int) -> np.ndarray:
        shard, offset, size, *_ = (int(n) for n in self._rows[position])
        channels = self.index["preprocessing"]["channels"]
        try:
            return images.to_array(images.decode(self._read(shard, offset, size), channels=channels))
        except images.UnreadableImage as error:
            key, name = self._key(shard, offset), self.folder / self.index["shards"][shard]["name"]
            raise InputError(f"{name}: sample {key} is damaged ({error}); run the `shard` stage again") from None

    def _key(self, shard: int, png_offset: int) -> str:
        header = self._read(shard, png_offset - tarfile.BLOCKSIZE, 100)  # the name field that opens a tar header
        return header.split(b"\0", 1)[0].decode().split(".", 1)[0]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        name = self.folder / self.index["shards"][shard]["name"]
        if shard not in self._files:
            try:
                self._files[shard] = os.open(name, os.O_RDONLY)
            except FileNotFoundError:
                raise InputError(f"{name}: not found, though index.json lists it; run the `shard` stage again") from None
        blob = os.pread(self._files[shard], size, offset)
        if len(blob) != size:
            raise InputError(f"{name}: ends before byte {offset + size}; it is damaged, run the `shard` stage again")
        return blob

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def open_shards(folder: Path | str, split: str = "train") -> ShardReader:
    """Open one split of a shard folder; `InputError` where there is none."""
    return ShardReader(Path(folder), split)

"""Folder of images -> WebDataset tars with an index, and random access to what they hold.

A shard folder holds plain tars that any WebDataset client reads (`KEY.png`, `KEY.txt`, `KEY.json` per image),
`index.json` (what is in them, by which preprocessing, with their hashes), `offsets.npy` (where each file starts)
and, where the source has one, `prompts.csv`. Equal inputs give equal bytes.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tarfile
import webdataset

from ldm.data import images
from ldm.errors import InputError
from ldm.hashing import canonical_json, content_hash, file_hash

SPLITS = ("train", "val", "test")
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
    `max_bad_fraction` unreadable images, and for a split that ends up empty; `out` is untouched then.
    """
    table = images.list_images(folder)
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
    empty = [split for split in SPLITS if not any(group[0] == split for group in groups)]
    if empty:
        shutil.rmtree(partial)
        raise InputError(
            f"{folder}: {len(table)} images leave the {' and '.join(empty)} split empty; "
            "add images or raise data.val_fraction or data.test_fraction"
        )
    shards, offsets, splits = [], [], {}
    for split in SPLITS:
        start = sum(len(rows) for rows in offsets)
        for top in sorted(group[1] for group in groups if group[0] == split):
            members = groups[split, top]
            for number, first_member in enumerate(range(0, len(members), shard_size)):
                name = f"{split}-{top + '-' if top else ''}{number:05d}.tar"
                chunk = members[first_member : first_member + shard_size]
                samples = (_encode(folder, row, digest, image_size, channels, resize_filter) for row, digest in chunk)
                rows = _write_tar(partial / name, samples)
                offsets.append(np.insert(rows, 0, len(shards), axis=1))
                fingerprint = {"sha256": file_hash(partial / name), "bytes": (partial / name).stat().st_size}
                shards.append({"name": name, "split": split, "count": len(rows), **fingerprint})
        splits[split] = [start, sum(len(rows) for rows in offsets)]
    np.save(partial / "offsets.npy", np.concatenate(offsets))
    index = {
        "version": 1,
        "preprocessing": {"image_size": image_size, "channels": channels, "resize_filter": resize_filter, "fit": "cover"},
        "splits": splits,
        "shards": shards,
        "offsets_sha256": file_hash(partial / "offsets.npy"),
        "found": len(table),
        "quarantined": quarantined,
    }
    _copy_prompts(folder, partial)
    (partial / "index.json").write_text(canonical_json(index), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return index


Groups = dict[tuple[str, str], list[tuple[dict[str, Any], str]]]


def _group(
    folder: Path, table: pd.DataFrame, channels: int, val_fraction: float, test_fraction: float
) -> tuple[Groups, list[dict[str, str]]]:
    """Readable images by (split, top-level folder), and the unreadable ones with the reason."""
    groups: Groups = {}
    quarantined = []
    for row in table.to_dict("records"):
        blob = (folder / row["file_name"]).read_bytes()
        try:
            images.decode(blob, channels=channels)
        except images.UnreadableImage as error:
            quarantined.append({"file_name": row["file_name"], "reason": str(error)})
            continue
        digest = content_hash(blob)
        top = row["file_name"].split("/")[0] if "/" in row["file_name"] else ""
        groups.setdefault((split_of(digest, val_fraction, test_fraction), top), []).append((row, digest))
    return groups, quarantined


def _encode(
    folder: Path, row: dict[str, Any], digest: str, image_size: int, channels: int, resize_filter: str
) -> dict[str, Any]:
    image = images.decode((folder / row["file_name"]).read_bytes(), channels=channels)
    # Equal files may stand under several names, so the key needs both: content first, then name.
    key = digest[:16] + content_hash(row["file_name"].encode())[:8]
    meta = {name: value for name, value in row.items() if name != "text"}
    return {
        "__key__": key,
        "png": images.to_png(images.fit_square(image, image_size, resize_filter)),
        "txt": row["text"].encode(),
        "json": canonical_json(meta).encode(),
    }


def _write_tar(path: Path, samples: Iterator[dict[str, Any]]) -> np.ndarray:
    """Write one tar; returns offset and size of each part, int64 (N, 2 * len(PARTS))."""
    with webdataset.TarWriter(str(path), user="", group="", mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as written:
        for member in written:
            key, part = member.name.split(".", 1)
            places.setdefault(key, {})[part] = (member.offset_data, member.size)
    return np.array([[n for part in PARTS for n in place[part]] for place in places.values()], dtype=np.int64)


def _copy_prompts(folder: Path, out: Path) -> None:
    """Carry the source's optional `prompts.csv` (`text,label`: prompts to evaluate that no caption contains)."""
    source = folder / "prompts.csv"
    if not source.is_file():
        return
    columns = pd.read_csv(source, dtype=str, keep_default_na=False, nrows=0).columns
    if not {"text", "label"} <= set(columns):
        raise InputError(f"{source}: expected columns text,label; found {', '.join(columns)}")
    shutil.copyfile(source, out / "prompts.csv")


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
        png, text, meta = (self._read(shard, *places[2 * i : 2 * i + 2]) for i in range(len(PARTS)))
        return Sample(
            key=self._key(shard, places[0]),
            image=images.to_array(images.decode(png, channels=self.index["preprocessing"]["channels"])),
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
        return [(self.index["shards"][int(numbers[a])], range(a, b)) for a, b in zip(edges, edges[1:], strict=False) if a < b]

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
            rows.append({"key": self._key(shard, places[0]), "text": text, **meta})
        return pd.DataFrame(rows)

    def _image(self, position: int) -> np.ndarray:
        shard, offset, size, *_ = (int(n) for n in self._rows[position])
        channels = self.index["preprocessing"]["channels"]
        return images.to_array(images.decode(self._read(shard, offset, size), channels=channels))

    def _key(self, shard: int, png_offset: int) -> str:
        header = self._read(shard, png_offset - tarfile.BLOCKSIZE, 100)  # the name field that opens a tar header
        return header.split(b"\0", 1)[0].decode().split(".", 1)[0]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            self._files[shard] = os.open(self.folder / self.index["shards"][shard]["name"], os.O_RDONLY)
        blob = os.pread(self._files[shard], size, offset)
        if len(blob) != size:
            name = self.folder / self.index["shards"][shard]["name"]
            raise InputError(f"{name}: ends before byte {offset + size}; it is damaged, run the `shard` stage again")
        return blob

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def open_shards(folder: Path | str, split: str = "train") -> ShardReader:
    """Open one split of a shard folder; `InputError` where there is none."""
    return ShardReader(Path(folder), split)

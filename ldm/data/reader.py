"""Random access to the samples of a shard folder, on this disk or behind a URL."""

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from ldm.base.errors import InputError, env_positive
from ldm.base.files import canonical_json, content_hash
from ldm.base.paths import SHARD_CACHE, SHARDS
from ldm.data.images import Preprocessing, UnreadableImage, decode_stored
from ldm.data.remote import ShardCache, is_url
from ldm.data.shapes import Shape, as_text

VERSION = 3  # of index.json
SPLITS = ("train", "val", "test")
PARTS = ("image", "txt", "json")  # columns of offsets.npy: shard number, then offset and size of each part
OPEN_FILES = 64  # shards on this disk that are open at once
OPEN_FETCHED = 1  # fetched shards that are open at once: an open file takes space even after it was evicted
CACHE_GB, MOST_GB = 50.0, 1e9  # of fetched shards: by default, and where no end is wanted
AGAIN = "run the `shard` stage again"


@dataclass(frozen=True)
class Sample:
    key: str
    image: np.ndarray  # uint8 (C, H, W)
    text: str
    meta: dict[str, Any]  # `file_name` and the further columns of the caption table


class ShardReader:
    """Random access to the samples of one split: `len(reader)`, `reader[i]`. Safe to use in a forked process.

    `place` is a folder, or a URL whose shards come through `cache`, a bounded folder on this disk. `offsets` are the split's
    rows of offsets.npy, int64 (N, 7): shard number, then offset and size of each of `PARTS`; of a subset only `rows` of them.
    """

    def __init__(self, place: Path | str, split: str, cache: ShardCache | None = None, rows: np.ndarray | None = None):
        self.place, self.split, self._cache, self._rows = place, split, cache, rows
        self._files: dict[int, IO[bytes]] = {}  # by shard number, in the order of opening
        where = f"{place}/index.json"
        try:
            text = cache.text("index.json") if cache else Path(where).read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            hint = "so this is no folder of shards; run the `shard` stage (dvc repro shard)"
            raise InputError(f"{where}: not found, {hint}") from None
        try:
            self.index: dict[str, Any] = json.loads(text)
            version, splits = self.index.get("version"), self.index.get("splits", {})
            if version != VERSION:
                raise InputError(f"{where}: version {version}, expected {VERSION}; {AGAIN}")
            if split not in splits:
                raise InputError(f"{where}: no split {split!r}; found {', '.join(splits)}")
            start, stop = splits[split]
            self.preprocessing = Preprocessing(**self.index["preprocessing"])
            self.offsets = self._read_offsets()[start:stop]
            if len(self) != stop - start:
                raise InputError(f"{place}/offsets.npy: {len(self)} rows of {split}, {stop - start} expected; {AGAIN}")
            if rows is not None:
                self.offsets = np.array(self.offsets[rows])
            self._shard_shapes = [(height, width) for height, width in (shard["shape"] for shard in self.index["shards"])]
            if unknown := set(self._shard_shapes) - set(self.preprocessing.all_shapes):
                raise ValueError(f"a shard of shape {list(unknown.pop())}, which its preprocessing does not have")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{where}: damaged ({type(error).__name__}: {error}); {AGAIN}") from None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, position: int) -> Sample:
        """The sample, its image cropped at the centre; raises `InputError`, naming the sample, if it is damaged."""
        key, text, meta = self._caption(self.offsets[position].tolist())
        return Sample(key, self.images([position])[0], text, meta)

    def images(self, positions: Sequence[int] | np.ndarray, crops: np.ndarray | None = None) -> np.ndarray:
        """Decoded pixels, uint8 (N, C, H, W), cropped at the centre or by `crops` (N, 3): first row, first column, mirrored.

        A `ValueError` if they are not all of one shape.
        """
        p, rows = self.preprocessing, self.offsets[np.asarray(positions, dtype=np.int64)].tolist()
        height, width = shape = self._shape_of_all([shard for shard, *_ in rows])
        images = np.empty((len(rows), height, width, p.channels), dtype=np.uint8)
        for i, (shard, offset, size, *_) in enumerate(rows):
            try:
                image = decode_stored(self._read(shard, offset, size), p, shape)
            except UnreadableImage as error:
                where = f"{self.place}/{self.index['shards'][shard]['name']}: sample {self._key(shard, offset)}"
                raise InputError(f"{where} is damaged ({error}); {AGAIN}") from None
            top, left, mirrored = (p.margin // 2, p.margin // 2, 0) if crops is None else crops[i]
            image = image[top : top + height, left : left + width]
            images[i] = image[:, ::-1] if mirrored else image
        return images.transpose(0, 3, 1, 2)  # a view: pixels lie as decoders write them and as convolutions like them

    def _shape_of_all(self, shards: list[int]) -> Shape:
        """The one shape of these shards' samples; of none, the first that there is."""
        shapes = sorted({self._shard_shapes[shard] for shard in shards}) or list(self.preprocessing.all_shapes[:1])
        if len(shapes) > 1:
            raise ValueError(f"images of {' and '.join(map(as_text, shapes))}: read those of one shape at a time (`shapes`)")
        return shapes[0]

    def shape_of(self, position: int) -> Shape:
        """The shape (height, width) of a sample's image."""
        return self._shard_shapes[int(self.offsets[position, 0])]

    @cached_property
    def shapes(self) -> dict[Shape, np.ndarray]:
        """The shapes (height, width) of this split, in order, each with the positions of its samples, ascending."""
        found: dict[Shape, list[np.ndarray]] = {}
        for shard, positions in self.shard_positions():
            found.setdefault(tuple(shard["shape"]), []).append(np.arange(positions.start, positions.stop))
        return {shape: np.concatenate(found[shape]) for shape in sorted(found)}

    def subset(self, positions: Sequence[int] | np.ndarray) -> "ShardReader":
        """A reader of the samples at these positions alone, in ascending order. Its `digest` is that of all shards."""
        chosen = np.unique(np.asarray(positions, dtype=np.int64))
        return ShardReader(self.place, self.split, self._cache, chosen if self._rows is None else self._rows[chosen])

    def first_by_hash(self, count: int) -> "ShardReader":
        """At most `count` samples, those whose keys are the smallest: a choice by content that stays, as a split grows."""
        if count >= len(self):
            return self
        keys = [self._key(shard, offset) for shard, offset in self.offsets[:, :2].tolist()]
        return self.subset(sorted(range(len(keys)), key=keys.__getitem__)[:count])

    @property
    def digest(self) -> str:
        """Identity of the shards: the hash of their index, which has the hash of each."""
        return content_hash(canonical_json(self.index).encode())

    def shard_positions(self) -> list[tuple[dict[str, Any], range]]:
        """The shards of this split, each with the positions of its samples."""
        numbers = np.asarray(self.offsets[:, 0])
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        return [(self.index["shards"][int(numbers[a])], range(a, b)) for a, b in pairwise(edges) if a < b]

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """`prompts.csv`: columns `text,label`; empty if the source has none."""
        if "prompts.csv" not in self.index["files"]:
            return pd.DataFrame({"text": [], "label": []})
        with self._open("prompts.csv", self.index["files"]["prompts.csv"]) as file:
            return pd.read_csv(file, dtype=str, keep_default_na=False)

    @cached_property
    def captions(self) -> pd.DataFrame:
        """`key`, `text` and the caption table's further columns of every sample, without decoding pixels."""
        return self.captions_of(range(len(self)))

    def captions_of(self, positions: range) -> pd.DataFrame:
        """The rows of `captions` at these positions."""
        rows = []
        for key, text, meta in map(self._caption, self.offsets[positions.start : positions.stop : positions.step].tolist()):
            sample = {"key": key, "text": text}
            rows.append(sample | meta | sample)  # a column `key` of the caption table does not replace the sample's
        return pd.DataFrame(rows)

    def _caption(self, offsets: list[int]) -> tuple[str, str, dict[str, Any]]:
        shard, image, _, *places = offsets
        text, meta = self._read(shard, *places[:2]), self._read(shard, *places[2:])
        return self._key(shard, image), text.decode(), json.loads(meta)

    def _key(self, shard: int, image_offset: int) -> str:
        header = self._read(shard, image_offset - tarfile.BLOCKSIZE, 100)  # the name field that opens a tar header
        return header.split(b"\0", 1)[0].decode(errors="replace").split(".", 1)[0]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        entry = self.index["shards"][shard]
        if shard not in self._files:
            if len(self._files) >= (OPEN_FETCHED if self._cache else OPEN_FILES):
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = self._open(entry["name"], entry)
        blob = os.pread(self._files[shard].fileno(), size, offset)
        if len(blob) != size:
            raise InputError(f"{self.place}/{entry['name']}: ends before byte {offset + size}; it is damaged, {AGAIN}")
        return blob

    def _read_offsets(self) -> np.ndarray:
        with self._open("offsets.npy", self.index["files"]["offsets.npy"]) as file:
            try:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if dtype != np.int64 or shape[1:] != (1 + 2 * len(PARTS),):
                    raise ValueError(f"{dtype} of shape {shape}")
                return np.memmap(file, dtype, "r", file.tell(), shape)
            except Exception as error:  # numpy's reader of headers raises anything
                raise InputError(f"{self.place}/offsets.npy: damaged ({error}); {AGAIN}") from None

    def _open(self, name: str, entry: dict[str, Any]) -> IO[bytes]:
        if self._cache:
            return os.fdopen(self._cache.open(name, entry["sha256"], entry["bytes"]), "rb")
        try:
            return open(f"{self.place}/{name}", "rb")
        except FileNotFoundError:
            raise InputError(f"{self.place}/{name}: not found, though index.json lists it; {AGAIN}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.place, self.split, self._cache, self._rows)


def open_shards(
    place: Path | str, split: str = "train", *, cache: Path | None = None, cache_bytes: int = int(CACHE_GB * 1e9)
) -> ShardReader:
    """Open one split of a shard folder; raises `InputError` if there is none.

    `place` may be any URL that fsspec knows. A shard is fetched when it is first read, verified by its sha256, and kept in the
    folder `cache` (default: `ldm-shards` in the user's cache folder), which holds `cache_bytes` at most.
    """
    if not is_url(place):
        return ShardReader(Path(place), split)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return ShardReader(str(place), split, ShardCache(str(place), cache or home / "ldm-shards", cache_bytes))


def stage_shards(root: Path, split: str) -> ShardReader:
    """A split of `data/shards`, or of the same shards at `LDM_SHARDS`, kept in `.ldm/shards`, `LDM_SHARD_CACHE_GB` at most."""
    url, local = os.environ.get("LDM_SHARDS"), root / SHARDS
    if not url:
        return open_shards(local, split)
    limit = min(env_positive("LDM_SHARD_CACHE_GB", "gigabytes", CACHE_GB), MOST_GB)
    reader = open_shards(url, split, cache=root / SHARD_CACHE, cache_bytes=int(limit * 1e9))
    index = local / "index.json"
    if index.is_file() and json.loads(index.read_text(encoding="utf-8")) != reader.index:
        raise InputError(f"LDM_SHARDS {url}: its index.json is not that of {local}; copy {local} there again")
    return reader

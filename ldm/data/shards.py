"""Folder of images -> WebDataset tars with an index.

A shard folder holds plain tars that any WebDataset client reads (`KEY.png` or `KEY.jpg`, `KEY.txt`, `KEY.json` per
image), `index.json` (what is in them, by which preprocessing, with their hashes), `offsets.npy` (where each file starts),
`quarantine.csv` (images that were not taken, with the reason), `duplicates.csv` (images that repeat or resemble another)
and, where the source has one, `prompts.csv`. Equal inputs give equal bytes, whatever the number of processes.
"""

import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial as partial_function
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from ldm.base.errors import InputError
from ldm.base.files import replacing
from ldm.base.hashing import canonical_json, content_hash, file_hash
from ldm.data.duplicates import SIDE, near_duplicates, thumbnail
from ldm.data.folders import PROMPTS, Collection, Place, read_folder, walk
from ldm.data.images import MAX_PIXELS, SUFFIXES, Preprocessing, UnreadableImage, to_png
from ldm.data.parallel import IMAGES_PER_WORKER, processes
from ldm.data.reader import PARTS, SPLITS, VERSION
from ldm.data.tars import read_tars

SMALLEST_SPLIT = 2  # images; a mean of fewer has no standard error
HASHED_AT_ONCE = 256  # files
ENCODED_AT_ONCE = 16

Row = dict[str, Any]  # of the caption table


class TooManyUnreadable(InputError):
    """More unreadable images than allowed; `quarantined` (columns `file_name,reason`) lists them."""

    def __init__(self, message: str, quarantined: pd.DataFrame):
        super().__init__(message)
        self.quarantined = quarantined


@dataclass(frozen=True)
class _Limits:
    min_side: int
    max_pixels: int


@dataclass(frozen=True)
class _Member:
    """An image to be sharded."""

    row: Row
    place: Place
    digest: str  # content hash of its file


@dataclass(frozen=True)
class _Encoded:
    sample: dict[str, Any]  # as the tar takes it
    look: bytes  # thumbnail


@dataclass(frozen=True)
class _Shard:
    name: str
    split: str
    members: list[_Member]  # those that could be read
    looks: list[bytes]
    offsets: np.ndarray  # int64 (N, 2 * len(PARTS))
    identity: dict[str, str | int]  # sha256, bytes


def split_of(digest: str, val_fraction: float, test_fraction: float) -> str:
    """The split of an image by its content hash: stable as data grows, and equal files always land together."""
    position = int(digest[:15], 16) / 16**15
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def read_collection(folder: Path) -> Collection:
    """The captioned images of a folder, as files (`images.read_folder`) or in WebDataset tars (`tars.read_tars`)."""
    suffixes = {PurePosixPath(name).suffix.lower() for name, _ in walk(folder)} if folder.is_dir() else set()
    if ".tar" not in suffixes:
        return read_folder(folder)
    if suffixes & SUFFIXES:
        raise InputError(
            f"{folder}: holds tars and also images ({', '.join(sorted(suffixes & SUFFIXES))}); keep one kind in a folder"
        )
    return read_tars(folder)


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
    fit: str = "cover",
    background: str = "#ffffff",
    margin: int = 0,
    min_side: int = 1,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write the images of `folder` (see `read_collection`) as shards to `out`, all or nothing, and return the index.

    A shard holds images of one split and one top-level subfolder, so that a new subfolder leaves every other
    shard as it is. Every image found is either in a shard or in `quarantine.csv` with the reason. `workers` processes
    share the work; `progress(what, done, total)` is told how many images are hashed, then written.

    Raises `InputError` for bad folders and captions, for a split with fewer than `SMALLEST_SPLIT` images, and
    `TooManyUnreadable` for more than `max_bad_fraction` unreadable ones; `out` is untouched then.
    """
    collection = read_collection(folder)
    prompts = _prompts(folder, collection.table)
    preprocessing = Preprocessing(image_size, channels, resize_filter, fit, background, margin)
    found = len(collection.places) + len(collection.refused)
    workers = min(workers, len(collection.places) // IMAGES_PER_WORKER)
    with replacing(out) as partial, processes(workers) as run:
        digests = _digests(collection.places, run, progress)
        groups, unread = _group(collection, digests, val_fraction, test_fraction)
        planned = list(_planned(groups, shard_size))
        encode = partial_function(_encode_all, preprocessing=preprocessing, limits=_Limits(min_side, max_pixels))
        encoded = chain.from_iterable(run(encode, _chunks([member for _, _, members in planned for member in members])))
        bad, done, total = [*collection.refused.items(), *unread], 0, len(collection.places)
        shards = []
        progress("write", done, total)
        for name, split, members in planned:
            shard = _write_shard(partial / name, split, members, encoded, bad)
            if shard.members:
                shards.append(shard)
            else:
                (partial / name).unlink()
            done += len(members)
            progress("write", done, total)
        quarantined = pd.DataFrame(sorted(bad), columns=["file_name", "reason"])
        _refuse_if_too_many(folder, quarantined, found, max_bad_fraction)
        sizes = {split: sum(len(shard.members) for shard in shards if shard.split == split) for split in SPLITS}
        _refuse_small_splits(folder, found, sizes)
        if prompts:
            shutil.copyfile(prompts, partial / PROMPTS)
        quarantined.to_csv(partial / "quarantine.csv", index=False, errors="backslashreplace")
        counts = {"found": found, "quarantined": len(quarantined), "ignored": collection.ignored}
        return _write_index(partial, shards, sizes, {"preprocessing": asdict(preprocessing), **counts})


def _write_index(out: Path, shards: list[_Shard], sizes: dict[str, int], facts: dict[str, Any]) -> dict[str, Any]:
    """Offsets, duplicates, and `index.json`, which names every other file with its hash."""
    np.save(out / "offsets.npy", np.concatenate([np.insert(s.offsets, 0, number, axis=1) for number, s in enumerate(shards)]))
    duplicates = _duplicates(shards)
    duplicates.to_csv(out / "duplicates.csv", index=False)
    ends = np.cumsum([sizes[split] for split in SPLITS]).tolist()
    files = [path for path in sorted(out.iterdir()) if path.suffix != ".tar"]
    index = {
        "version": VERSION,
        **facts,
        "duplicates": dict(sorted(Counter(duplicates.kind).items())),
        "splits": {split: [start, end] for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False)},
        "shards": [{"name": s.name, "split": s.split, "count": len(s.members), **s.identity} for s in shards],
        "files": {path.name: {"sha256": file_hash(path), "bytes": path.stat().st_size} for path in files},
    }
    (out / "index.json").write_text(canonical_json(index), encoding="utf-8")
    return index


Groups = dict[tuple[str, str], list[_Member]]  # by split and top-level folder


def _group(
    collection: Collection, digests: list[tuple[str, str]], val_fraction: float, test_fraction: float
) -> tuple[Groups, list[tuple[str, str]]]:
    """Images by (split, top-level folder), and those that cannot even be read, with the reason."""
    groups: Groups = {}
    unread = []
    for row, place, (digest, reason) in zip(collection.table.to_dict("records"), collection.places, digests, strict=True):
        name = row["file_name"]
        if reason:
            unread.append((name, reason))
            continue
        top = name.split("/")[0] if "/" in name else ""
        member = _Member({str(column): value for column, value in row.items()}, place, digest)
        groups.setdefault((split_of(digest, val_fraction, test_fraction), top), []).append(member)
    return groups, unread


def _digests(
    places: list[Place], run: Callable[..., Iterator[Any]], progress: Callable[[str, int, int], None]
) -> list[tuple[str, str]]:
    chunks = [places[start : start + HASHED_AT_ONCE] for start in range(0, len(places), HASHED_AT_ONCE)]
    digests: list[tuple[str, str]] = []
    progress("hash", 0, len(places))
    for chunk in run(_hash, chunks):
        digests += chunk
        progress("hash", len(digests), len(places))
    return digests


def _hash(places: list[Place]) -> list[tuple[str, str]]:
    """Content hash of each file, or why it cannot be read."""
    results = []
    for place in places:
        try:
            results.append((content_hash(place.read()), ""))
        except UnreadableImage as error:
            results.append(("", str(error)))
    return results


def _planned(groups: Groups, shard_size: int) -> Iterator[tuple[str, str, list[_Member]]]:
    """Name, split and members of each shard."""
    for split, top in sorted(groups, key=lambda group: (SPLITS.index(group[0]), group[1])):
        members = groups[split, top]
        for number, start in enumerate(range(0, len(members), shard_size)):
            yield f"{split}-{_plain(top)}{number:05d}.tar", split, members[start : start + shard_size]


def _chunks(members: list[_Member]) -> list[list[_Member]]:
    return [members[start : start + ENCODED_AT_ONCE] for start in range(0, len(members), ENCODED_AT_ONCE)]


def _plain(top: str) -> str:
    """A folder's name as part of a shard's: what shells, URLs and WebDataset's brace notation treat specially is replaced."""
    # A name that ends as ours do might be that of another folder.
    if not top or (re.fullmatch(r"[\w.-]{1,100}", top, re.ASCII) and not re.search(r"-[0-9a-f]{8}$", top)):
        return top and f"{top}-"
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', top)[:80]}-{content_hash(top.encode())[:8]}-"


def _write_shard(
    path: Path, split: str, members: list[_Member], encoded: Iterator[_Encoded | str], bad: list[tuple[str, str]]
) -> _Shard:
    """Write one tar from as many of `encoded` as it has members; unreadable ones go to `bad` with the reason."""
    kept: list[_Member] = []
    looks: list[bytes] = []

    def samples() -> Iterator[dict[str, Any]]:
        for member, found in zip(members, islice(encoded, len(members)), strict=True):
            if isinstance(found, str):
                bad.append((member.row["file_name"], found))
                continue
            kept.append(member)
            looks.append(found.look)
            yield found.sample

    offsets = _write_tar(path, samples())
    return _Shard(path.name, split, kept, looks, offsets, {"sha256": file_hash(path), "bytes": path.stat().st_size})


def _encode_all(members: list[_Member], *, preprocessing: Preprocessing, limits: _Limits) -> list[_Encoded | str]:
    """What becomes of each image: its sample, or why it cannot be read."""
    results: list[_Encoded | str] = []
    for member in members:
        try:
            results.append(_encode(member, preprocessing, limits))
        except UnreadableImage as error:
            results.append(str(error))
    return results


def _encode(member: _Member, preprocessing: Preprocessing, limits: _Limits) -> _Encoded:
    blob = member.place.read()
    if content_hash(blob) != member.digest:
        raise InputError(f"{member.place.path}: changed while it was read; run the `shard` stage when nothing writes there")
    image = preprocessing.read(blob, min_side=limits.min_side, max_pixels=limits.max_pixels)
    stored = {"jpg": blob} if preprocessing.is_stored(blob) else {"png": to_png(image)}
    # Equal files may stand under several names, so the key needs both: content first, then name.
    key = member.digest[:16] + content_hash(member.row["file_name"].encode(errors="backslashreplace"))[:8]
    meta = {name: value for name, value in member.row.items() if name != "text" and value == value}  # NaN: it has no such column
    try:
        json.dumps(meta, allow_nan=False)
        sample = {"__key__": key, **stored, "txt": member.row["text"].encode(), "json": canonical_json(meta).encode()}
    except ValueError as error:
        raise InputError(
            f"{member.row['file_name']!r}: caption and columns cannot be written as UTF-8 and JSON: {error}"
        ) from None
    return _Encoded(sample, thumbnail(image))


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
            places.setdefault(key, {})["image" if f".{part}" in SUFFIXES else part] = (member.offset_data, member.size)
    table = [[n for part in PARTS for n in place[part]] for place in places.values()]
    return np.array(table, dtype=np.int64).reshape(-1, 2 * len(PARTS))


def _refuse_if_too_many(folder: Path, quarantined: pd.DataFrame, found: int, max_bad_fraction: float) -> None:
    if len(quarantined) > max_bad_fraction * found:
        first = quarantined.iloc[0]
        raise TooManyUnreadable(
            f"{folder}: {len(quarantined)} of {found} images are unreadable, more than data.max_bad_fraction {max_bad_fraction} "
            f"allows; the first is {first.file_name!r} ({first.reason}); remove or mend them, or raise the bound",
            quarantined,
        )


def _refuse_small_splits(folder: Path, found: int, sizes: dict[str, int]) -> None:
    small = [split for split in SPLITS if sizes[split] < SMALLEST_SPLIT]
    if small:
        raise InputError(
            f"{folder}: its {found} images leave fewer than {SMALLEST_SPLIT} for the {' and '.join(small)} split; "
            "add images or raise data.val_fraction or data.test_fraction"
        )


def _duplicates(shards: Sequence[_Shard]) -> pd.DataFrame:
    """Images that repeat (`exact`: same bytes) or resemble (`near`: see `ldm.data.duplicates`) one that comes before."""
    names = [member.row["file_name"] for shard in shards for member in shard.members]
    digests = [member.digest for shard in shards for member in shard.members]
    splits = [shard.split for shard in shards for _ in shard.members]
    looks = np.frombuffer(b"".join(look for shard in shards for look in shard.looks), dtype=np.uint8)
    first: dict[str, int] = {}
    near = dict(near_duplicates(looks.reshape(-1, SIDE, SIDE, 3)))
    pairs = []
    for i, digest in enumerate(digests):
        exact = first.setdefault(digest, i)
        j = exact if exact < i else near.get(i)
        if j is not None:
            pairs.append((names[i], names[j], "exact" if exact < i else "near", splits[i], splits[j]))
    return pd.DataFrame(pairs, columns=["file_name", "of", "kind", "split", "split_of"])


def _prompts(folder: Path, table: pd.DataFrame) -> Path | None:
    """The source's optional `prompts.csv` (`text,label`: prompts to evaluate that no caption contains)."""
    source = folder / PROMPTS
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

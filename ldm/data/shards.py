"""Write a folder of captioned images as WebDataset tars with an index.

A shard folder holds plain tars that any WebDataset client reads (`KEY.png` or `KEY.jpg`, `KEY.txt`, `KEY.json` per image),
`index.json` (preprocessing, and every file with its hash), `offsets.npy` (where each part of a sample starts),
`quarantine.csv` (images that were left out, with the reason), `duplicates.csv` (images that repeat or resemble another) and,
if the source has one, `prompts.csv`. Equal inputs give equal bytes, whatever the number of processes.
"""

import functools
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

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
HASHED_AT_ONCE, ENCODED_AT_ONCE = 256, 16  # images of a task of a worker process

Run = Callable[..., Iterator[Any]]  # a `map`
Progress = Callable[[str, int, int], None]  # (what, done, total)
Sample = dict[str, Any]  # for webdataset's TarWriter
T = TypeVar("T")


@dataclass(frozen=True)
class _Member:
    """An image to be written to a shard."""

    row: dict[str, Any]  # of the caption table
    place: Place
    digest: str  # content hash of its file


@dataclass(frozen=True)
class _Shard:
    name: str
    split: str
    members: list[_Member]  # those that could be read
    thumbnails: list[bytes]
    offsets: np.ndarray  # int64 (N, 2 * len(PARTS))
    identity: dict[str, str | int]  # sha256, bytes


def split_of(digest: str, val_fraction: float, test_fraction: float) -> str:
    """The split of an image by its content hash: it stays as data grows, and equal files share a split."""
    position = int(digest[:15], 16) / 16**15
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def read_collection(folder: Path) -> Collection:
    """The captioned images of a folder: files (`folders.read_folder`) or members of WebDataset tars (`tars.read_tars`)."""
    suffixes = {PurePosixPath(name).suffix.lower() for name, _ in walk(folder)}
    if ".tar" not in suffixes:
        return read_folder(folder)
    if images := ", ".join(sorted(suffixes & SUFFIXES)):
        raise InputError(f"{folder}: holds tars and also images ({images}); keep one kind in a folder")
    return read_tars(folder)


def write_shards(
    folder: Path,
    out: Path,
    *,
    val_fraction: float,
    test_fraction: float,
    shard_size: int,
    max_bad_fraction: float,
    min_side: int = 1,
    max_pixels: int = MAX_PIXELS,
    report: Path | None = None,
    workers: int = 1,
    progress: Progress = lambda what, done, total: None,
    **preprocessing: Any,
) -> dict[str, Any]:
    """Write the images of `folder` (see `read_collection`) as shards to `out`, all or nothing, and return the index.

    A shard holds images of one split and one top-level subfolder, so a new subfolder changes no other shard. Every image is
    either in a shard or in `quarantine.csv`. `workers` processes hash, then encode; `progress` is told how many images are
    done. `preprocessing` has the fields of `images.Preprocessing`.

    Raises `InputError` for bad folders and captions, for a split with fewer than `SMALLEST_SPLIT` images, and if more than
    `max_bad_fraction` of the images are unreadable, which then are listed in the file `report`.
    """
    collection = read_collection(folder)
    prompts = _find_prompts(folder, collection.table)
    recipe = Preprocessing(**preprocessing)
    bad, total, done = dict(collection.refused), len(collection.places), 0  # bad: file name -> reason
    with replacing(out) as partial, processes(min(workers, total // IMAGES_PER_WORKER)) as run:
        digests = _digests(collection.places, run, progress)
        planned = _plan(collection, digests, bad, val_fraction, test_fraction, shard_size)
        encode = functools.partial(_encode, preprocessing=recipe, limits={"min_side": min_side, "max_pixels": max_pixels})
        chunks = _chunks([member for _, _, members in planned for member in members], ENCODED_AT_ONCE)
        encoded = chain.from_iterable(run(encode, chunks))
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
        found = total + len(collection.refused)
        quarantined = pd.DataFrame(sorted(bad.items()), columns=["file_name", "reason"])
        sizes = {split: sum(len(shard.members) for shard in shards if shard.split == split) for split in SPLITS}
        if len(quarantined) > max_bad_fraction * found:
            _refuse_unreadable(folder, found, quarantined, max_bad_fraction, report)
        if small := " and ".join(split for split in SPLITS if sizes[split] < SMALLEST_SPLIT):
            few = f"its {found} images leave fewer than {SMALLEST_SPLIT} for the {small} split"
            raise InputError(f"{folder}: {few}; add images or raise data.val_fraction or data.test_fraction")
        if prompts:
            shutil.copyfile(prompts, partial / PROMPTS)
        quarantined.to_csv(partial / "quarantine.csv", index=False, errors="backslashreplace")
        counts = {"found": found, "quarantined": len(quarantined), "ignored": collection.ignored}
        return _write_index(partial, shards, sizes, {"preprocessing": asdict(recipe), **counts})


def _write_index(out: Path, shards: list[_Shard], sizes: dict[str, int], facts: dict[str, Any]) -> dict[str, Any]:
    """Write offsets, duplicates and `index.json`."""
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


def _digests(places: list[Place], run: Run, progress: Progress) -> list[tuple[str, str]]:
    digests: list[tuple[str, str]] = []
    progress("hash", 0, len(places))
    for chunk in run(_hash, _chunks(places, HASHED_AT_ONCE)):
        digests += chunk
        progress("hash", len(digests), len(places))
    return digests


def _hash(places: list[Place]) -> list[tuple[str, str]]:
    """Content hash of each file, and why it cannot be read if so."""
    results = []
    for place in places:
        try:
            results.append((content_hash(place.read()), ""))
        except UnreadableImage as error:
            results.append(("", str(error)))
    return results


def _plan(
    collection: Collection, digests: list[tuple[str, str]], bad: dict[str, str],
    val_fraction: float, test_fraction: float, shard_size: int,
) -> list[tuple[str, str, list[_Member]]]:  # fmt: skip
    """Name, split and members of each shard. Images without a hash go to `bad`."""
    groups: dict[tuple[str, str], list[_Member]] = {}  # by split and top-level folder
    for row, place, (digest, reason) in zip(collection.table.to_dict("records"), collection.places, digests, strict=True):
        name = row["file_name"]
        if reason:
            bad[name] = reason
            continue
        top = name.split("/")[0] if "/" in name else ""
        member = _Member({str(column): value for column, value in row.items()}, place, digest)
        groups.setdefault((split_of(digest, val_fraction, test_fraction), top), []).append(member)
    return [
        (f"{split}-{_plain(top)}{number:05d}.tar", split, members)
        for split, top in sorted(groups, key=lambda group: (SPLITS.index(group[0]), group[1]))
        for number, members in enumerate(_chunks(groups[split, top], shard_size))
    ]


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _plain(top: str) -> str:
    """A folder's name as a part of a shard's, without what shells, URLs and WebDataset's brace notation treat specially."""
    # A folder's name that ends like the names made here is replaced too: it might be that of another folder.
    if not top or (re.fullmatch(r"[\w.-]{1,100}", top, re.ASCII) and not re.search(r"-[0-9a-f]{8}$", top)):
        return top and f"{top}-"
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', top)[:80]}-{content_hash(top.encode())[:8]}-"


def _encode(members: list[_Member], *, preprocessing: Preprocessing, limits: dict[str, int]) -> list[tuple[Sample, bytes] | str]:
    """Each image as a sample for a tar, with its thumbnail, or why it cannot be read."""
    results: list[tuple[Sample, bytes] | str] = []
    for member in members:
        try:
            blob = member.place.read()
            if content_hash(blob) != member.digest:
                path = member.place.path
                raise InputError(f"{path}: changed while it was read; run the `shard` stage when nothing writes there")
            image = preprocessing.read(blob, **limits)
            stored = {"jpg": blob} if preprocessing.is_stored(blob) else {"png": to_png(image)}
            results.append((_sample(member, stored), thumbnail(image)))
        except UnreadableImage as error:
            results.append(str(error))
    return results


def _sample(member: _Member, image: Sample) -> Sample:
    name, text = member.row["file_name"], member.row["text"]
    # Equal files may have several names, so the key is made of both: content first, then name.
    key = member.digest[:16] + content_hash(name.encode(errors="backslashreplace"))[:8]
    meta = {column: value for column, value in member.row.items() if column != "text" and value == value}  # NaN: no value
    try:
        json.dumps(meta, allow_nan=False)
        return {"__key__": key, **image, "txt": text.encode(), "json": canonical_json(meta).encode()}
    except ValueError as error:
        raise InputError(f"{name!r}: caption and columns cannot be written as UTF-8 and JSON: {error}") from None


def _write_shard(
    path: Path, split: str, members: list[_Member], encoded: Iterator[tuple[Sample, bytes] | str], bad: dict[str, str]
) -> _Shard:
    """Write one tar from the next of `encoded`, one for each member. Unreadable images go to `bad`."""
    import webdataset  # only to write: a machine that trains on shards need not have it

    kept, thumbnails = [], []
    with webdataset.TarWriter(str(path), user="", group="", mtime=0, encoder=False) as tar:
        for member, found in zip(members, islice(encoded, len(members)), strict=True):
            if isinstance(found, str):
                bad[member.row["file_name"]] = found
                continue
            tar.write(found[0])
            kept.append(member)
            thumbnails.append(found[1])
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as written:
        for info in written:
            key, part = info.name.split(".", 1)
            places.setdefault(key, {})["image" if f".{part}" in SUFFIXES else part] = (info.offset_data, info.size)
    offsets = np.array([[n for part in PARTS for n in place[part]] for place in places.values()], dtype=np.int64)
    identity: dict[str, str | int] = {"sha256": file_hash(path), "bytes": path.stat().st_size}
    return _Shard(path.name, split, kept, thumbnails, offsets.reshape(-1, 2 * len(PARTS)), identity)


def _refuse_unreadable(folder: Path, found: int, bad: pd.DataFrame, max_bad_fraction: float, report: Path | None) -> NoReturn:
    if report:
        report.parent.mkdir(exist_ok=True)
        bad.to_csv(report, index=False, errors="backslashreplace")
    many = f"{len(bad)} of {found} images are unreadable, more than data.max_bad_fraction {max_bad_fraction} allows"
    first = f"the first is {bad.file_name[0]!r} ({bad.reason[0]}){f', all are in {report}' if report else ''}"
    raise InputError(f"{folder}: {many}; {first}; remove or mend them, or raise the bound")


def _duplicates(shards: list[_Shard]) -> pd.DataFrame:
    """Images that repeat (`exact`: same bytes) or resemble (`near`: see `ldm.data.duplicates`) an earlier one."""
    members = [(member.row["file_name"], member.digest, shard.split) for shard in shards for member in shard.members]
    thumbnails = np.frombuffer(b"".join(blob for shard in shards for blob in shard.thumbnails), dtype=np.uint8)
    near = dict(near_duplicates(thumbnails.reshape(-1, SIDE, SIDE, 3)))
    first: dict[str, int] = {}
    pairs = []
    for i, (name, digest, split) in enumerate(members):
        exact = first.setdefault(digest, i)
        j = exact if exact < i else near.get(i)
        if j is not None:
            pairs.append((name, members[j][0], "exact" if exact < i else "near", split, members[j][2]))
    return pd.DataFrame(pairs, columns=["file_name", "of", "kind", "split", "split_of"])


def _find_prompts(folder: Path, table: pd.DataFrame) -> Path | None:
    """The folder's optional `prompts.csv` (`text,label`: prompts for evaluation that no caption contains), checked."""
    path = folder / PROMPTS
    if not path.is_file():
        return None
    try:
        prompts = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise InputError(f"{path}: not readable as a table: {error}") from None
    if not {"text", "label"} <= set(prompts.columns):
        raise InputError(f"{path}: expected columns text,label; found {', '.join(prompts.columns)}")
    unknown = sorted(set(prompts.label) - set(table.get("label", [])))
    if unknown:
        raise InputError(f"{path}: label {unknown[0]!r} is no image's label; mend it, or label the images")
    return path

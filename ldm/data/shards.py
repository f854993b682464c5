"""Write a folder of captioned images as WebDataset tars with an index and a list of duplicates; README.md says which files."""

import contextlib
import functools
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ldm.base.errors import InputError
from ldm.base.files import canonical_json, content_hash, file_hash, replacing
from ldm.base.options import chosen
from ldm.data.caption_columns import all_captions, captions_in
from ldm.data.captions import PROMPTS
from ldm.data.conventions import Convention
from ldm.data.folders import Collection, Place, read_folder, walk
from ldm.data.images import (
    CROPPED,
    MAX_PIXELS,
    PROFILE,
    SUFFIXES,
    Preprocessing,
    UnreadableImage,
    decode_stored,
    to_array,
    to_png,
)
from ldm.data.jpeg import bare
from ldm.data.parallel import IMAGES_PER_WORKER, mapped
from ldm.data.reader import SPLITS, VERSION
from ldm.data.shapes import Shape, Shapes, Square, as_text
from ldm.data.tars import read_tars

SIDE = 16  # of a thumbnail, in pixels
EDGE = 2.0  # grey levels between neighbouring cells that count as an edge; flat areas would flip with every compression
BANDS, BAND_BITS = 4, 14
NEAR_BITS = BANDS - 1  # hashes that differ in fewer bits than there are bands are equal in at least one band
CROWD = 1000  # images with an equal band that a later one is compared with, so that time does not grow with their square
NEAR_LEVELS = 4.0  # mean absolute difference of thumbnails, in levels of 256
SMALLEST_SPLIT = 2  # images; a mean of fewer has no standard error

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class _Image:
    row: dict[str, Any]  # of the caption table
    place: Place
    digest: str  # content hash of its file
    split: str
    top: str  # the top-level folder: a shard holds images of one, so a new folder changes no other shard
    shape: Shape  # that models see: a shard holds images of one
    origin: str  # of its caption
    # once it is written:
    profile: str = ""  # the colour profile that was converted to sRGB
    cropped: float = 0.0  # the share of its pixels that fell outside
    thumbnail: bytes = b""
    offsets: tuple[int, ...] = ()  # its row of offsets.npy


def split_of(digest: str, val_fraction: float, test_fraction: float) -> str:
    """The split of an image by its content hash: it stays as data grows, and equal files share a split."""
    position = int(digest[:15], 16) / 16**15
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def read_collection(folder: Path, captions: Convention = "auto") -> Collection:
    """The captioned images of a folder: files (`folders.read_folder`) or members of WebDataset tars (`tars.read_tars`)."""
    suffixes = {PurePosixPath(name).suffix.lower() for name, _ in walk(folder)}
    if ".tar" not in suffixes:
        return read_folder(folder, captions)
    if images := ", ".join(sorted(suffixes & SUFFIXES)):
        raise InputError(f"{folder}: holds tars and also images ({images}); keep one kind in a folder")
    return read_tars(folder, captions)


def write_shards(
    folder: Path, out: Path, *, val_fraction: float, test_fraction: float, shard_size: int, max_bad_fraction: float,
    min_side: int = 1, max_pixels: int = MAX_PIXELS, captions: Convention = "auto", report: Path | None = None, workers: int = 1,
    shapes: dict[str, Any] | None = None, check_captions: Callable[[list[str]], object] = lambda captions: None,
    progress: Progress = lambda what, done, total: None, **preprocessing: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write the images of `folder` (see `read_collection`) as shards to `out`, all or nothing, and return the index.

    To what is returned, `ignored` adds what was passed over, which is no part of the shards.
    `preprocessing` has the fields of `images.Preprocessing`, `shapes` a choice of `Shapes` as settings have it, or squares.
    `check_captions` gets all captions before anything is written, and may refuse them. Raises `InputError` for bad folders,
    captions and splits, and if more than `max_bad_fraction` of the images are unreadable, which then are listed in `report`.
    """
    collection = read_collection(folder, captions)
    prompts = _find_prompts(folder, collection.table)
    check_captions([*chain(*captions_in(collection.table))])
    shapes_seen = chosen(Shapes, shapes or Square().model_dump()).shapes(preprocessing["image_size"])
    recipe, bad = Preprocessing(**preprocessing, shapes=shapes_seen), dict(collection.refused)  # bad: file name -> reason
    places = collection.places
    found, workers = len(places) + len(bad), min(workers, len(places) // IMAGES_PER_WORKER)

    bounds: dict[str, Any] = {"recipe": recipe, "min_side": min_side, "max_pixels": max_pixels}
    look, encode = functools.partial(_look, **bounds), functools.partial(_encode, **bounds)
    with replacing(out) as partial:
        with mapped(look, places, workers, functools.partial(progress, "hash")) as looks:
            images = _hashed(collection, looks, bad, val_fraction, test_fraction)
        with mapped(encode, images, workers, functools.partial(progress, "write")) as encoded:
            shards, written = _write_tars(partial, images, encoded, shard_size, bad, len(recipe.all_shapes) > 1)
        quarantined = pd.DataFrame(sorted(bad.items()), columns=["file_name", "reason"])
        if len(bad) > max_bad_fraction * found:
            if report:
                report.parent.mkdir(exist_ok=True)
                quarantined.to_csv(report, index=False, errors="backslashreplace")
            many = f"{len(bad)} of {found} images are unreadable, more than data.max_bad_fraction {max_bad_fraction} allows"
            first = f"the first is {quarantined.file_name[0]!r} ({quarantined.reason[0]})"
            first += f", all are in {report}" if report else ""
            raise InputError(f"{folder}: {many}; {first}; remove or mend them, or raise the bound")
        sizes = Counter(image.split for image in written)
        if small := " and ".join(split for split in SPLITS if sizes[split] < SMALLEST_SPLIT):
            few = f"its {len(written)} readable images leave fewer than {SMALLEST_SPLIT} for the {small} split"
            advice = f"add images or {'lower' if 'train' in small else 'raise'} data.val_fraction or data.test_fraction"
            raise InputError(f"{folder}: {few}; {advice}")
        if prompts:
            shutil.copyfile(prompts, partial / PROMPTS)
        quarantined.to_csv(partial / "quarantine.csv", index=False, errors="backslashreplace")
        facts = {"preprocessing": asdict(recipe), "found": found, "quarantined": len(bad), "captions": _captions(written)}
        facts["converted"] = _counted(image.profile for image in written if image.profile)
        facts["cropped"] = _cropped(written)
        return _write_index(partial, shards, written, facts) | {"ignored": collection.ignored}


def _look(place: Place, recipe: Preprocessing, **bounds: int) -> tuple[str, Shape]:
    """Hash and shape of an image file."""
    blob = place.read()
    return content_hash(blob), recipe.shape_in(blob, **bounds)


def _encode(image: _Image, recipe: Preprocessing, **bounds: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The image's parts by suffix, in the order of `reader.PARTS`, and what `_Image` says of it once it is written."""
    blob = image.place.read()
    if content_hash(blob) != image.digest:
        raise InputError(f"{image.place.path}: changed while it was read; run the `shard` stage when nothing writes there")
    pixels = recipe.read(blob, **bounds)
    facts = {"thumbnail": thumbnail(pixels), "profile": pixels.info.get(PROFILE, ""), "cropped": pixels.info[CROPPED]}
    return _stored(blob, pixels, recipe, image.shape) | _texts(image.row), facts


def _cropped(images: list[_Image]) -> dict[str, float]:
    """The share of an image's pixels that fell outside."""
    shares = np.array([image.cropped for image in images])
    return {"mean": round(float(shares.mean()), 6), "largest": round(float(shares.max()), 6)}


def _captions(images: list[_Image]) -> dict[str, Any]:
    """How many images have captions from where, how many have several, how many captions are empty, and how many differ."""
    texts = [all_captions(image.row) for image in images]
    several, distinct = sum(len(captions) > 1 for captions in texts), set(chain(*texts))
    empty = sum(not text.strip() for text in chain(*texts))
    origins = _counted(image.origin for image in images)
    return {"origins": origins, "several": several, "empty": empty, "distinct": len(distinct)}


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _hashed(collection: Collection, looks: Iterator[Any], bad: dict[str, str], val: float, test: float) -> list[_Image]:
    """The images, those of one shard side by side. Unreadable files go to `bad`."""
    images = []
    rows = collection.table.to_dict("records")
    for row, origin, place, found in zip(rows, collection.origins, collection.places, looks, strict=True):
        name = row["file_name"]
        if isinstance(found, UnreadableImage):
            bad[name] = str(found)
        else:
            (digest, shape), top = found, name.split("/")[0] if "/" in name else ""
            values, split = {str(k): v for k, v in row.items()}, split_of(digest, val, test)
            images.append(_Image(values, place, digest, split, top, shape, origin))
    return sorted(images, key=lambda image: (SPLITS.index(image.split), image.top, image.shape))


def _stored(blob: bytes, pixels: Image.Image, recipe: Preprocessing, shape: Shape) -> dict[str, bytes]:
    """What is stored of an image file by suffix: a JPEG whose picture needs no change without loss, else a PNG."""
    if recipe.is_stored(blob):
        with contextlib.suppress(UnreadableImage):
            stripped = bare(blob)
            if np.array_equal(decode_stored(stripped, recipe, shape), to_array(pixels).transpose(1, 2, 0)):
                return {"jpg": stripped}
    return {"png": to_png(pixels)}


def _texts(row: dict[str, Any]) -> dict[str, bytes]:
    """The caption and the further columns of an image, by suffix."""
    meta = {column: value for column, value in row.items() if column != "text" and value == value}  # NaN: no value
    try:
        json.dumps(meta, allow_nan=False)
        return {"txt": row["text"].encode(), "json": canonical_json(meta).encode()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{row['file_name']!r}: caption and columns cannot be written as UTF-8 and JSON: {error}") from None


def _write_tars(
    out: Path, images: list[_Image], encoded: Iterator[Any], shard_size: int, bad: dict[str, str], shaped: bool
) -> tuple[list[dict[str, Any]], list[_Image]]:
    """Write shards; return their entries in the index, and the images in them. Unreadable images go to `bad`.

    If `shaped`, there are several shapes, and the shards' names have them.
    """
    import webdataset  # only to write: a machine that trains on shards need not have it

    shards: list[dict[str, Any]] = []
    written: list[_Image] = []
    for (split, top, shape), group in groupby(images, lambda image: (image.split, image.top, image.shape)):
        members, prefix = list(group), f"{split}-{_plain(top)}{f'{as_text(shape)}-' if shaped else ''}"
        for number, start in enumerate(range(0, len(members), shard_size)):
            path = out / f"{prefix}{number:05d}.tar"
            before, position = len(written), 0
            with webdataset.TarWriter(str(path), user="", group="", mtime=0, encoder=False) as tar:
                for image, found in zip(members[start : start + shard_size], encoded, strict=False):
                    if isinstance(found, UnreadableImage):
                        bad[image.row["file_name"]] = str(found)
                        continue
                    parts, facts = found
                    name = content_hash(image.row["file_name"].encode(errors="backslashreplace"))
                    tar.write({"__key__": image.digest[:16] + name[:8], **parts})  # equal files may have several names
                    places = {}
                    for part, blob in sorted(parts.items()):  # the order in which they are written, each after its header
                        places[part] = position + tarfile.BLOCKSIZE, len(blob)
                        position += tarfile.BLOCKSIZE * (1 + -(-len(blob) // tarfile.BLOCKSIZE))
                    offsets = len(shards), *chain(*(places[part] for part in parts))
                    written.append(replace(image, offsets=offsets, **facts))
            if count := len(written) - before:
                identity = {"sha256": file_hash(path), "bytes": path.stat().st_size}
                shards.append({"name": path.name, "split": split, "shape": list(shape), "count": count, **identity})
            else:
                path.unlink()
    return shards, written


def _plain(top: str) -> str:
    """A folder's name as a part of a shard's, without what shells, URLs and WebDataset's brace notation treat specially."""
    # A folder's name that ends like the names made here is replaced too: it might be that of another folder.
    if not top or (re.fullmatch(r"[\w.-]{1,100}", top, re.ASCII) and not re.search(r"-[0-9a-f]{8}$", top)):
        return top and f"{top}-"
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', top)[:80]}-{content_hash(top.encode())[:8]}-"


def _write_index(out: Path, shards: list[dict[str, Any]], images: list[_Image], facts: dict[str, Any]) -> dict[str, Any]:
    """Write offsets, duplicates and `index.json`."""
    np.save(out / "offsets.npy", np.array([image.offsets for image in images], dtype=np.int64))
    duplicates = _duplicates(images)
    duplicates.to_csv(out / "duplicates.csv", index=False)
    splits = [image.split for image in images]
    index = {
        "version": VERSION,
        **facts,
        "duplicates": _counted(duplicates.kind),
        "splits": {split: [splits.index(split), splits.index(split) + splits.count(split)] for split in SPLITS},
        "shards": shards,
        "files": {
            p.name: {"sha256": file_hash(p), "bytes": p.stat().st_size} for p in sorted(out.iterdir()) if p.suffix != ".tar"
        },
    }
    text = canonical_json(index)
    (out / "index.json").write_text(text, encoding="utf-8")
    return json.loads(text)


def _duplicates(images: list[_Image]) -> pd.DataFrame:
    """Images that repeat (`exact`: same bytes) or resemble (`near`: see `near_duplicates`) an earlier one."""
    thumbnails = np.frombuffer(b"".join(image.thumbnail for image in images), dtype=np.uint8)
    near = dict(near_duplicates(thumbnails.reshape(-1, SIDE, SIDE, 3)))
    first: dict[str, int] = {}
    pairs = []
    for i, image in enumerate(images):
        exact = first.setdefault(image.digest, i)
        if (j := exact if exact < i else near.get(i)) is not None:
            names = image.row["file_name"], images[j].row["file_name"]
            pairs.append((*names, "exact" if exact < i else "near", image.split, images[j].split))
    return pd.DataFrame(pairs, columns=["file_name", "of", "kind", "split", "split_of"])


def thumbnail(image: Image.Image) -> bytes:
    """The image in RGB, `SIDE` pixels square."""
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def near_duplicates(thumbnails: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield `(i, j)` for each image i that is nearly equal to an earlier image, j being the first of these.

    `thumbnails` is uint8 (N, SIDE, SIDE, 3). Nearly equal: the hashes differ in at most `NEAR_BITS` bits (difference hash,
    Krawetz 2013) and the thumbnails by at most `NEAR_LEVELS`. Only images with an equal band of their hashes are compared.
    """
    flat, first, inverse = np.unique(thumbnails.reshape(-1, SIDE * SIDE * 3), axis=0, return_index=True, return_inverse=True)
    by_age = np.argsort(first)  # distinct thumbnails in the order of their first images
    flat, first, age = flat[by_age], first[by_age], np.argsort(by_age)
    hashes = _hashes(flat)
    best = np.arange(len(flat))  # the first near thumbnail of each
    for band in range(BANDS):
        keys = (hashes >> np.uint64(BAND_BITS * band)) & np.uint64(2**BAND_BITS - 1)
        order = np.argsort(keys, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for position, member in enumerate(members[1:], start=1):
                earlier = members[: min(position, CROWD)]
                earlier = earlier[np.bitwise_count(hashes[earlier] ^ hashes[member]) <= NEAR_BITS]
                distance = np.abs(flat[earlier].astype(np.int16) - flat[member]).mean(axis=1)
                near = earlier[distance <= NEAR_LEVELS]
                if len(near):
                    best[member] = min(best[member], near[0])
    for i, number in enumerate(age[inverse.ravel()].tolist()):
        j = int(first[best[number]])
        if j < i:
            yield i, j


def _hashes(flat: np.ndarray) -> np.ndarray:
    """Difference hashes of 56 bits, uint64 (N,)."""
    cells = flat.reshape(-1, 8, SIDE // 8, 8, SIDE // 8, 3).mean(axis=(2, 4, 5))
    bits = (cells[:, :, 1:] - cells[:, :, :-1] > EDGE).reshape(len(flat), BANDS * BAND_BITS)
    return bits @ (np.uint64(1) << np.arange(bits.shape[1], dtype=np.uint64))


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
    if unknown := sorted(set(prompts.label) - set(table.get("label", []))):
        raise InputError(f"{path}: label {unknown[0]!r} is no image's label; mend it, or label the images")
    return path

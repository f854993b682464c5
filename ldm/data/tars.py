"""Read a folder of WebDataset tars as a collection of captioned images."""

import json
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from ldm.base.errors import InputError
from ldm.data.folders import Collection, Place, walk
from ldm.data.images import SUFFIXES

PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}  # suffixes that loaders are known to unpickle
TEXTS = ("txt", "caption")
MAX_TEXT = 2**20  # bytes of a caption or of JSON

Parts = dict[str, tarfile.TarInfo]  # the files of a sample by extension


def read_tars(folder: Path) -> Collection:
    """The images of every `*.tar` below `folder` (README.md); `file_name` is `TAR/KEY.SUFFIX`. Raises `InputError`."""
    rows: list[dict[str, Any]] = []
    places: dict[str, Place] = {}
    ignored: Counter[str] = Counter()
    for name, reason in walk(folder):
        path = folder / name
        if path.suffix != ".tar":
            ignored[path.suffix or name] += 1
            continue
        if reason:
            raise InputError(f"{path}: {reason}")
        for key, parts in _samples(path, ignored).items():
            images = [part for part in parts if f".{part}" in SUFFIXES]
            if len(images) > 1:
                raise InputError(f"{path}: sample {key!r} has {len(images)} images, {' and '.join(images)}; keep one")
            if images:
                rows.append({"file_name": f"{name}/{key}.{images[0]}", **_caption(path, key, parts)})
                places[rows[-1]["file_name"]] = Place(path, parts[images[0]].offset_data, parts[images[0]].size)
            else:
                ignored[f"(samples without an image in {name})"] += 1
    if not rows:
        raise InputError(f"{folder}: its tars hold no images ({', '.join(sorted(SUFFIXES))})")
    table = pd.DataFrame(rows).sort_values("file_name", ignore_index=True)
    if "label" in table and table.label.isna().any():
        raise InputError(f"{folder}: {table.file_name[table.label.isna()].iloc[0]!r} has no label, as other samples do")
    return Collection(table, [places[name] for name in table.file_name], {}, dict(sorted(ignored.items())))


def _samples(path: Path, ignored: Counter[str]) -> dict[str, Parts]:
    """The parts of each sample of a tar, by its key. Counts members that are no part of a sample in `ignored`."""
    samples: dict[str, Parts] = {}
    try:
        with tarfile.open(path, "r:") as tar:  # plain tars only: a compressed one has no random access
            for member in tar:
                if member.isdir():
                    continue
                name, where = PurePosixPath(member.name), f"{path}: member {member.name!r}"
                stem, _, extension = name.name.partition(".")
                extension = extension.lower()
                if name.is_absolute() or ".." in name.parts:
                    raise InputError(f"{where} leads out of the tar; write it again with plain names")
                if not member.isreg() or member.issparse():
                    raise InputError(f"{where} is a link, a device or sparse; only plain files are read")
                if extension.rpartition(".")[2] in PICKLES:
                    raise InputError(f"{where} is a pickle, which can run any program; remove it")
                if not stem or (f".{extension}" not in SUFFIXES and extension not in (*TEXTS, "json", "cls")):
                    ignored[f".{extension}"] += 1
                    continue
                key = str(name.with_name(stem))
                if extension in samples.setdefault(key, {}):
                    raise InputError(f"{where} is there twice; keep one")
                if f".{extension}" not in SUFFIXES and member.size > MAX_TEXT:
                    raise InputError(f"{where} has {member.size:,} bytes; at most {MAX_TEXT:,} are read")
                samples[key][extension] = member
            end = tar.offset
        with path.open("rb") as file:  # tarfile takes a damaged header for the end of a tar
            file.seek(end)
            if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise InputError(f"{path}: damaged or cut short at byte {end} of {path.stat().st_size}; restore it")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not a readable plain tar: {error}; restore it") from None
    return samples


def _caption(path: Path, key: str, parts: Parts) -> dict[str, Any]:
    """`text`, `label` if there is one, and the columns of the sample's JSON."""

    def text(part: str) -> str:
        try:
            return Place(path, parts[part].offset_data, parts[part].size).read().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: {key}.{part} is not UTF-8 text: {error}") from None

    try:
        columns = json.loads(text("json")) if "json" in parts else {}
        json.dumps([key, columns], ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {key!r}: its name or JSON is damaged: {error}") from None
    if not isinstance(columns, dict):
        raise InputError(f"{path}: {key}.json holds {type(columns).__name__}, expected an object")
    columns.pop("file_name", None)
    captions = [*(text(part) for part in TEXTS if part in parts), *(columns.pop(n) for n in ("text", "caption") if n in columns)]
    label = columns.pop("label", None)
    label = text("cls") if "cls" in parts else label
    if not captions and label is None:
        raise InputError(f"{path}: sample {key!r} has no caption; add {key}.txt")
    if captions and not isinstance(captions[0], str):
        raise InputError(f"{path}: sample {key!r} has the caption {captions[0]!r}, which is no text")
    return {"text": captions[0] if captions else str(label), **({} if label is None else {"label": str(label)}), **columns}

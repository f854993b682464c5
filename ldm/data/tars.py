"""Read a folder of WebDataset tars as a collection of captioned images."""

import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from ldm.base.errors import InputError
from ldm.data.captions import EXTENSIONS, MAX_TEXT, caption_of
from ldm.data.conventions import Convention
from ldm.data.folders import Collection, Place, counted, left_behind, unread, walk
from ldm.data.images import SUFFIXES, UNREAD

PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}  # suffixes that loaders are known to unpickle

Parts = dict[str, tarfile.TarInfo]  # the files of a sample by extension


def read_tars(folder: Path, convention: Convention = "auto") -> Collection:
    """The images of every `*.tar` below `folder` (README.md); `file_name` is `TAR/KEY.SUFFIX`. Raises `InputError`."""
    if convention in ("tables", "folder names"):
        raise InputError(f"{folder}: data.captions is {convention}, and captions of tars are in their samples; set it to auto")
    rows: list[dict[str, Any]] = []
    places: dict[str, Place] = {}
    refused, passed, ignored = dict[str, str](), dict[str, str](), Counter[str]()
    for name, reason in walk(folder, passed):
        path = folder / name
        if path.suffix.lower() != ".tar":
            ignored[path.suffix or name] += 1
            continue
        if reason:
            raise InputError(f"{path}: {reason}")
        for key, parts in _samples(path, ignored).items():
            images = [part for part in parts if f".{part}" in SUFFIXES]
            others = [part for part in parts if part not in images and _is_image(part)]
            if len(images) > 1:
                raise InputError(f"{path}: sample {key!r} has {len(images)} images, {' and '.join(images)}; keep one")
            if images:
                caption = caption_of(_texts(path, parts), f"{path}/{key}", convention)
                rows.append({"file_name": f"{name}/{key}.{images[0]}", **caption})
                places[rows[-1]["file_name"]] = Place(path, parts[images[0]].offset_data, parts[images[0]].size)
                ignored.update(f".{part}" for part in others)
            elif others:
                refused |= {f"{name}/{key}.{part}": _why_not(part) for part in others}
            else:
                ignored[f"(samples without an image in {name})"] += 1
    if not rows:
        reasons = counted(refused.values()) or ", ".join(sorted(SUFFIXES))
        raise InputError(f"{folder}: its tars hold no images that are read; {reasons}")
    table = pd.DataFrame(rows).sort_values("file_name", ignore_index=True)
    if "label" in table and table.label.isna().any():
        raise InputError(f"{folder}: {table.file_name[table.label.isna()].iloc[0]!r} has no label, as other samples do")
    origins = ["none" if convention == "none" else "file"] * len(table)
    ignored.update(passed.values())
    return Collection(table, origins, [places[name] for name in table.file_name], refused, dict(sorted(ignored.items())))


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in SUFFIXES | UNREAD


def _why_not(extension: str) -> str:
    if "." in extension:
        return f"its name has several dots, so that its extension is .{extension} to WebDataset; rename it"
    return unread(f".{extension}")


def _texts(path: Path, parts: Parts) -> dict[str, bytes]:
    """The bytes of a sample's texts by extension."""
    return {part: Place(path, parts[part].offset_data, parts[part].size).read() for part in EXTENSIONS if part in parts}


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
                if what := left_behind(member.name):
                    ignored[what] += 1
                    continue
                if not _is_image(extension) and extension not in EXTENSIONS:
                    ignored[f".{extension}"] += 1
                    continue
                key = str(name.with_name(stem))
                if extension in samples.setdefault(key, {}):
                    raise InputError(f"{where} is there twice; keep one")
                if extension in EXTENSIONS and member.size > MAX_TEXT:
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

"""Batches: the dated folders that ingest makes in the collection, each a table of captions and its images.

Deleting an image is enough: who reads the collection passes over its row, and `forget` takes the row out. A batch appears
and goes by one rename, and so does each version of its table, so a kill leaves the old or the new.
"""

import contextlib
import csv
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from ldm.base import clock
from ldm.base.errors import InputError, disk_full
from ldm.base.files import canonical_json, file_hash, locked
from ldm.base.paths import INGEST_LOCK
from ldm.config import load_settings
from ldm.data.caption_columns import FURTHER, captions_in
from ldm.data.conventions import BATCH_TABLE, batch_date
from ldm.data.images import SUFFIXES, UNREAD
from ldm.data.tables import normal, read_table
from ldm.versioning.repository import open_repository

PARTIAL = ".ingest.partial"  # in the collection; DVC (.dvcignore) and `read_folder` ignore it
ORIGINALS = ".ingest.json.partial"  # in a batch whose originals may still be in the inbox: their hashes by name; no DVC file


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix, of a format that is read or not."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES | UNREAD


@contextlib.contextmanager
def changing(root: Path) -> Iterator[None]:
    """Let one process at a time change the batches: a second one waits. An `OSError` becomes an `InputError`."""
    lock = root / INGEST_LOCK
    try:
        lock.parent.mkdir(exist_ok=True)
        with locked(lock):
            yield
    except OSError as error:
        failed = InputError(f"{error.filename or root}: {error.strerror}; mend that and try again")
        raise disk_full(error, root) or failed from None


def newest(collection: Path) -> date | None:
    """The day of the newest batch."""
    names = [path.name for path in collection.iterdir() if path.is_dir()] if collection.is_dir() else []
    return max(filter(None, map(batch_date, names)), default=None)


def free_name(root: Path, collection: Path) -> Path:
    """The folder of the next batch: today's date in UTC, with a number from the day's second on.

    The checkout and all worktrees of scheduled runs share the lock's file, which has the names of the day: what two of them take
    in on one day is merged, and must not have one name.
    """
    day, record = f"{clock.now():%Y-%m-%d}", root / INGEST_LOCK
    given = [name for name in record.read_text(encoding="utf-8").split() if name.startswith(day)]
    names = itertools.chain([day], (f"{day}-{number}" for number in itertools.count(2)))
    path = next(path for path in map(collection.joinpath, names) if not path.exists() and path.name not in given)
    record.write_text("\n".join([*given, path.name]), encoding="utf-8")
    return path


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write the captions of a batch so that `read_table` reads the same: further captions of an image as `caption_2`, …"""
    captions = captions_in(table)
    table = table.drop(columns=FURTHER, errors="ignore")
    for number in range(1, max(map(len, captions), default=0)):
        table[f"caption_{number + 1}"] = [texts[number] if number < len(texts) else "" for texts in captions]
    # Quote everything: csv leaves a lone carriage return bare, which readers take for the end of a row.
    table.to_csv(path, index=False, quoting=csv.QUOTE_ALL, errors="backslashreplace")
    sync(path)


def write_originals(partial: Path, inbox: Path, files: dict[str, str]) -> None:
    """List what may leave the inbox once the batch is in place: sha256 by name."""
    (partial / ORIGINALS).write_text(canonical_json({"inbox": str(inbox), "files": files}), encoding="utf-8")
    sync(partial / ORIGINALS)


def sync(path: Path) -> None:
    """Flush to the disk: originals are removed next, and after a power cut their copies must not be empty."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def unfinished(collection: Path) -> list[Path]:
    """The batches whose originals may still be in the inbox, as their ingest was killed; half-written ones are removed."""
    shutil.rmtree(collection / PARTIAL, ignore_errors=True)
    return sorted(originals.parent for originals in collection.glob(f"*/{ORIGINALS}"))


def clear(batch: Path) -> None:
    """Remove from the inbox the files of the batch's list that have not changed, then the list.

    Where an image is not in the batch, nothing is removed but the list: a checkout has undone the batch before it was committed.
    """
    record = json.loads((batch / ORIGINALS).read_text(encoding="utf-8"))
    files: dict[str, str] = record["files"]
    images = {name: digest for name, digest in files.items() if is_image(name)}
    if all((batch / name).is_file() and file_hash(batch / name) == digest for name, digest in images.items()):
        for name, digest in files.items():
            path = Path(record["inbox"], name)
            with contextlib.suppress(OSError):  # gone, or not ours to remove: then the next ingest lists it as known
                if file_hash(path) == digest:
                    path.unlink()
    (batch / ORIGINALS).unlink()
    with contextlib.suppress(OSError):  # it has files
        batch.rmdir()


def forget(root: Path) -> list[str]:
    """Take the rows of deleted images out of the batches of `data.path`, and batches whose images are all gone.

    Returns the file names that the rows had. `version` then tells DVC. Raises `InputError` for a batch's table that is damaged,
    and if images are missing that DVC's cache lacks: these were never fetched, which is no deletion.
    """
    root = root.resolve()
    collection = (root / load_settings(root).data.path).resolve()
    if not (collection.is_relative_to(root) and collection.with_name(f"{collection.name}.dvc").is_file()):
        return []  # ingest has made nothing there, or it would be versioned
    with changing(root):
        unfinished(collection)
        if found := deleted(collection):
            with open_repository(root) as repo:
                for out in repo.index.outs:
                    if Path(out.fs_path) == collection:
                        check_complete(out, collection.relative_to(root).as_posix())
        return take_out(collection, found)


def check_complete(out: Any, name: str) -> None:
    """`InputError` if a file of the collection, a DVC out, is neither here nor in DVC's cache, so that it was never fetched."""
    tree, folder = out.get_obj(), Path(out.fs_path)
    if tree is None or not all(folder.joinpath(*key).exists() or out.cache.exists(file.value) for key, _, file in tree):
        raise InputError(f"data.path {name}: not all of it is here; `dvc pull`, or `dvc add {name}` if this is all")


def deleted(collection: Path) -> dict[Path, tuple[pd.DataFrame, list[bool]]]:
    """The batches that lack images: the table of each, and whether the image of each row is gone."""
    found = {}
    for path in sorted(collection.glob(f"*/{BATCH_TABLE}")):
        if batch_date(path.parent.name):
            table, names = read_table(path), [file.relative_to(path.parent).as_posix() for file in path.parent.rglob("*")]
            here = {*names, *map(normal, names)}
            gone = [here.isdisjoint({name, normal(name), normal(name.replace("\\", "/"))}) for name in table.file_name]
            if any(gone):
                found[path.parent] = table, gone
    return found


def take_out(collection: Path, found: dict[Path, tuple[pd.DataFrame, list[bool]]]) -> list[str]:
    """Remove what `deleted` found; returns the images' file names in the collection."""
    partial, names = collection / PARTIAL, list[str]()
    for batch, (table, gone) in found.items():
        names += [f"{batch.name}/{name}" for name in table.file_name[gone]]
        if all(gone) and not any(is_image(path.name) for path in batch.rglob("*")):
            os.rename(batch, partial)
        else:
            partial.mkdir()
            write_table(partial / BATCH_TABLE, table.loc[[not row for row in gone]])
            os.replace(partial / BATCH_TABLE, batch / BATCH_TABLE)
        shutil.rmtree(partial)
    return names

"""Ingest: move new images from an inbox into a dated batch of the collection, and version the collection with DVC.

An image is decoded as the `shard` stage does it before it is taken. What is not taken stays in the inbox, where `NOT_INGESTED`
says why; nothing that lies there stops the rest. A kill loses and doubles nothing: images are copied to a hidden folder, which
one rename makes the batch, and `dvc add` versions it. Only then may the originals leave the inbox: the batch's list of them, with
their hashes, tells which, also the next call.
"""

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ldm.base.errors import InputError, check_space
from ldm.base.files import content_hash, file_hash
from ldm.collection import batches
from ldm.collection.batches import PARTIAL
from ldm.collection.inbox import Inbox, Row, read_inbox, remaining, shown, waiting, without_needed, write_list
from ldm.config import Data, load_settings
from ldm.data.captions import NOT_INGESTED
from ldm.data.conventions import BATCH_TABLE, Convention
from ldm.data.folders import Place, read_folder, walk
from ldm.data.images import Preprocessing, UnreadableImage
from ldm.data.parallel import IMAGES_PER_WORKER, default_workers, mapped
from ldm.versioning.repository import held, open_repository

SETTLE = 10.0  # seconds without a change after which a file counts as complete
LISTED = 3  # names in a line of the report
REASONS = 10  # lines of the report about files that stay
ADVICE = "set data.path in params.yaml to a folder for your own images, e.g. data/raw/mine"

# Why an image stays, beside what `inbox` and decoding say:
KNOWN = "already in the collection"
LABELLED = "with a label, and the collection's images have none; drop the label"
UNLABELLED = "without a label, which other images have"


@dataclass(frozen=True)
class Ingested:
    inbox: Path
    batch: str | None  # the new folder, relative to the project; None if nothing was new
    moved: tuple[str, ...]  # names of the images in it
    left: dict[str, str]  # file name -> reason: what stays in the inbox
    news: dict[str, str]  # of `left`, what the last ingest did not say
    forgotten: tuple[str, ...]  # file names of deleted images, whose rows were taken out of their batches
    pointer: str | None  # the collection's .dvc file, relative to the project, if somebody has to commit it
    newest: date | None  # day of the newest batch

    def lines(self) -> list[str]:
        """The report, for people."""
        first = f"{len(self.moved)} images moved to {self.batch}" if self.batch else f"nothing moved from {self.inbox}"
        lines = [f"{first}; {len(self.left)} files stay, {NOT_INGESTED} there says why" if self.left else first]
        by_reason = defaultdict[str, list[str]](list)
        for name, reason in self.news.items():
            by_reason[reason].append(name)
        most = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
        lines += [f"{len(names)} left, {reason}: {_some(names)}" for reason, names in most[:REASONS]]
        lines += [f"{len(most) - REASONS} more reasons: {self.inbox / NOT_INGESTED}"] if len(most) > REASONS else []
        lines += [f"{len(self.forgotten)} deleted, their captions too: {_some(self.forgotten)}"] if self.forgotten else []
        lines += [f"versioned by {self.pointer}: commit that to git"] if self.pointer else []
        return [shown(f"ingest: {line}") for line in lines]


class _Bytes(NamedTuple):
    """Of an image file."""

    sha256: str
    size: int


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:LISTED], "…"] if len(names) > LISTED else names)


def ingest(root: Path, inbox: Path, *, settle: float = SETTLE, versioned: Callable[[str], object] | None = None) -> Ingested:
    """Move new images from `inbox` to `data.path/YYYY-MM-DD` (UTC; `-2`, `-3`, … if that exists); `dvc add` the collection.

    An image is new if it lies directly in `inbox`, has a caption there, can be decoded under the settings of `data`, equals no
    image of the collection and none before it in `inbox`, and neither it nor its caption has changed for `settle` seconds.
    Rows of images that were deleted from a batch are taken out (`batches.forget`). `versioned` gets the collection's .dvc file,
    relative to the project, before originals leave the inbox: a caller commits it.
    Raises `InputError` for a collection that takes no batches, a full disk, and if `dvc add` fails.
    """
    root, inbox, data = root.resolve(), inbox.resolve(), load_settings(root).data
    if not (inbox.is_dir() and os.access(inbox, os.R_OK | os.W_OK | os.X_OK)):
        raise InputError(f"{inbox}: no folder that this user may read and write")
    if data.captions == "folder names":
        raise InputError("data.captions is folder names, and a batch has its captions in a table; set it to auto")
    batch = None
    with batches.changing(root):
        with open_repository(root) as repo:
            collection = _collection(root, inbox, data.path, repo)
            done = batches.unfinished(collection)
            forgotten = batches.take_out(collection, batches.deleted(collection))
            found = read_inbox(inbox, settle, data.captions)
            try:
                if taken := _take(found, inbox, collection, data, Path(repo.cache.local.path), waiting(settle)):
                    with held(repo, collection):  # a running stage would record the batch as read though it has not seen it
                        batch = batches.free_name(root, collection)
                        os.rename(collection / PARTIAL, batch)
                    batches.sync(collection)
                    done.append(batch)
            finally:
                shutil.rmtree(collection / PARTIAL, ignore_errors=True)
        made = any(walk(collection)) or collection.with_name(f"{collection.name}.dvc").is_file()  # the latter: all was deleted
        pointer = version(root, collection) if made and collection.is_dir() else None
        if pointer and versioned:
            versioned(pointer)
            pointer = None
        for one in done:
            batches.clear(one)
        left = remaining(inbox, found.left)
        news, newest = write_list(inbox, left), batches.newest(collection)
    name = batch.relative_to(root).as_posix() if batch else None
    return Ingested(inbox, name, taken, left, news, tuple(forgotten), pointer, newest)


def _collection(root: Path, inbox: Path, name: str, repo: Any) -> Path:
    """The folder `data.path`. It must be inside the project, made by no stage, versioned on its own, and complete here."""
    folder = (root / name).resolve()
    if folder == root or not folder.is_relative_to(root):
        raise InputError(f"data.path {name}: not a folder inside the project; {ADVICE}")
    if inbox.is_relative_to(folder):
        raise InputError(f"{inbox}: lies in the collection data.path {name}; the inbox must be another folder")
    for out in repo.index.outs:
        path, stage = Path(out.fs_path), out.stage
        if path == folder and not stage.cmd:
            batches.check_complete(out, name)  # else `dvc add` would drop the rest from the collection
        elif path.is_relative_to(folder) or folder.is_relative_to(path):
            by = f"stage {stage.name} writes" if stage.cmd else f"{stage.path_in_repo} versions"
            raise InputError(f"data.path {name}: {by} {path.relative_to(root)}; {ADVICE}")
    pointer = folder.with_name(folder.name + ".dvc")
    above = [f"{parent}/" for parent in pointer.parents if parent != root and parent.is_relative_to(root)]
    if any(map(repo.scm.is_ignored, [str(pointer), *above])):  # DVC looks for no .dvc file there
        raise InputError(f"data.path {name}: git ignores {pointer.relative_to(root)}, so it would not be versioned; {ADVICE}")
    return folder


def _take(found: Inbox, inbox: Path, collection: Path, data: Data, store: Path, changed: str) -> tuple[str, ...]:
    """Write the new images to `PARTIAL` as a complete batch and return their names; the others go to `found.left`."""
    sizes, labelled = _survey(collection, data.captions)
    left, partial = found.left, collection / PARTIAL
    rows = found.rows if labelled is None else _alike(found.rows, labelled, left)
    new, copies = _hashed(inbox, list(rows), sizes, left)
    recipe = Preprocessing(**data.model_dump(include={field.name for field in fields(Preprocessing)} - {"shapes"}))

    def check(name: str) -> None:
        blob = _unchanged(inbox / name, new[name].sha256, changed)
        recipe.read(blob, min_side=data.min_side, max_pixels=data.max_pixels)

    with mapped(check, list(new), _workers(len(new))) as results:
        left |= {name: str(error) for name, error in zip(new, results, strict=True) if error}
    good = {name: rows[name] for name in new if name not in left}
    if labelled is None:  # decided by images that can be read
        good = _alike(good, any("label" in row for row in good.values()), left)
    _check_space(inbox, collection, store, sum(new[name].size for name in good))
    originals = dict[str, str]()
    for name in good:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(_unchanged(inbox / name, new[name].sha256, changed))
        except UnreadableImage as error:
            left[name] = str(error)
        else:
            batches.sync(partial / name)
            originals[name] = new[name].sha256
    left |= {name: left.get(first, KNOWN) for name, first in copies.items()}
    if originals:
        batches.write_table(partial / BATCH_TABLE, _table([good[name] for name in originals]))
        captions = {file: digest for name in originals for file, digest in found.captions[name].items()}
        batches.write_originals(partial, inbox, without_needed(inbox, captions | originals))
        batches.sync(partial)
    return tuple(originals)


def _unchanged(path: Path, sha256: str, changed: str) -> bytes:
    """The bytes of an image, which are those that were hashed before; raises `UnreadableImage`."""
    blob = Place(path).read()
    if content_hash(blob) != sha256:
        raise UnreadableImage(changed)
    return blob


def _table(rows: list[Row]) -> pd.DataFrame:
    table = pd.DataFrame(rows, dtype=object)
    return table[["file_name", "text", *table.columns.difference(["file_name", "text"], sort=False)]]


def _survey(collection: Path, captions: Convention) -> tuple[dict[int, list[Path]], bool | None]:
    """The collection's images by size in bytes, and whether they have labels (None: no images); `InputError` if no batch fits."""
    images = defaultdict[int, list[Path]](list)
    for name, refusal in walk(collection):
        if name.lower().endswith(".tar"):
            raise InputError(f"{collection / name}: a folder of tars takes no images; {ADVICE}")
        if batches.is_image(name) and not refusal:
            images[(collection / name).stat().st_size].append(collection / name)
    if not images:
        return images, None
    found = read_folder(collection, captions)
    if "folder name" in found.origins:
        reason = "its captions are the names of its folders, and a dated folder is no class"
        raise InputError(f"{collection}: {reason}; write a metadata.csv (file_name,text) there first")
    return images, "label" in found.table


def _alike(rows: dict[str, Row], labelled: bool, left: dict[str, str]) -> dict[str, Row]:
    """The rows that have a label, or those that have none; the others go to `left`."""
    left |= {name: LABELLED if "label" in row else UNLABELLED for name, row in rows.items() if ("label" in row) != labelled}
    return {name: row for name, row in rows.items() if ("label" in row) == labelled}


def _hashed(
    inbox: Path, names: list[str], sizes: dict[int, list[Path]], left: dict[str, str]
) -> tuple[dict[str, _Bytes], dict[str, str]]:
    """The images that are new, and for each copy of one of these its name; the others go to `left`."""

    def measured(name: str) -> _Bytes:
        blob = Place(inbox / name).read()
        return _Bytes(content_hash(blob), len(blob))

    known_hash, first, new, copies = cache(file_hash), dict[str, str](), dict[str, _Bytes](), dict[str, str]()
    with mapped(measured, names, _workers(len(names))) as results:
        for name, result in zip(names, results, strict=True):
            if isinstance(result, UnreadableImage):
                left[name] = str(result)
            elif result.sha256 in first:
                copies[name] = first[result.sha256]
            elif any(known_hash(path) == result.sha256 for path in sizes.get(result.size, ())):
                left[name] = KNOWN
            else:
                new[name], first[result.sha256] = result, name
    return new, copies


def _workers(images: int) -> int:
    return min(default_workers(), images // IMAGES_PER_WORKER)


def _check_space(inbox: Path, collection: Path, store: Path, needed: int) -> None:
    """Raise `InputError` if the batch, or its copies in DVC's cache once the originals are gone, would not fit on a disk."""
    disks = [next(path for path in (at, *at.parents) if path.is_dir()).stat().st_dev for at in (inbox, collection, store)]
    check_space(collection, needed * (2 if disks[0] != disks[1] == disks[2] else 1), "new images")
    check_space(store, needed, "new images in DVC's cache")


def version(root: Path, collection: Path) -> str:
    """`dvc add` the collection; returns the name of its .dvc file, relative to the project."""
    name = collection.relative_to(root).as_posix()
    # Without relinking: for that DVC removes files, which a kill would leave out of the collection.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "add", "--no-relink", name]
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise InputError(f"{name}: `dvc add` failed ({reason}); every image is safe there, run ingest again")
    return f"{name}.dvc"

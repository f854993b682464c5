"""Ingest: move new images from an inbox into a dated batch of the collection, and version the collection with DVC.

A kill loses and doubles nothing: images are copied to a hidden folder, which one rename makes the batch. Its list of the
originals with their hashes tells, also the next call, what may leave the inbox. `dvc add` always comes last.
"""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from ldm.base.errors import InputError
from ldm.base.files import canonical_json, content_hash, file_hash, locked
from ldm.config import load_settings
from ldm.data.captions import EXTENSIONS, beside, caption_of, check_tables, is_table, normal, read_table
from ldm.data.conventions import Convention
from ldm.data.folders import read_folder, walk
from ldm.data.images import SUFFIXES, UNREAD
from ldm.versioning.repository import held, open_repository

SETTLE = 10.0  # seconds without a change after which a file counts as complete
PARTIAL = ".ingest.partial"  # in the collection; DVC (.dvcignore) and `read_folder` ignore it
ORIGINALS = ".ingest.json"  # in a batch whose originals may still be in the inbox: their hashes by name
LISTED = 3  # names in a line of the report
ADVICE = "set data.path in params.yaml to a folder for your own images, e.g. data/raw/mine"

# Why a file stays in the inbox:
KNOWN = "already in the collection"
WAITING = f"changed in the last {SETTLE:.0f} s, so perhaps still being written"
TABLE = "metadata.csv"  # of a batch
UNCAPTIONED = "without a caption (a row of the table, or a .txt beside it)"
UNLABELLED = "without a label, which other images have"
UNREADABLE = "not readable for this user"
UNNAMED = "with a name that is not UTF-8"
UNREAD_FORMAT = "of a format that is not read; convert them to JPEG or PNG"
NO_IMAGE = "no images"
NO_FILE = "folders or links, which are not looked into"

Row = dict[Any, Any]  # of a caption table: `file_name`, `text`, further columns


@dataclass(frozen=True)
class Ingested:
    inbox: Path
    batch: str | None  # the new folder, relative to the project; None if nothing was new
    moved: tuple[str, ...]  # names of the images in it
    left: dict[str, list[str]]  # reason -> names of files that stay in the inbox
    pointer: str | None  # the collection's .dvc file, relative to the project; None if there is no collection yet

    def lines(self) -> list[str]:
        """The report, for people."""
        lines = [f"{len(self.moved)} images moved to {self.batch}" if self.batch else f"nothing moved from {self.inbox}"]
        for reason, names in sorted(self.left.items()):
            listed = ", ".join([*names[:LISTED], "…"] if len(names) > LISTED else names)
            lines.append(f"{len(names)} left, {reason}: {listed.encode(errors='backslashreplace').decode()}")
        lines += [f"versioned by {self.pointer}: commit that to git"] if self.pointer else []
        return [f"ingest: {line}" for line in lines]


def ingest(root: Path, inbox: Path, *, settle: float = SETTLE) -> Ingested:
    """Move new images from `inbox` to `data.path/YYYY-MM-DD` (UTC; `-2`, `-3`, … if that exists); `dvc add` the collection.

    An image is new if it lies directly in `inbox`, has a caption there, equals no image of the collection and none before it in
    `inbox`, and neither it nor its caption has changed for `settle` seconds. Raises `InputError` for a collection that takes no
    batches, a damaged table, labels that do not match the collection's, and if `dvc add` fails.
    """
    root, inbox = root.resolve(), inbox.resolve()
    if not (inbox.is_dir() and os.access(inbox, os.R_OK | os.W_OK | os.X_OK)):
        raise InputError(f"{inbox}: no folder that this user may read and write")
    if (captions := load_settings(root).data.captions) == "folder names":
        raise InputError("data.captions is folder names, and a batch has its captions in a table; set it to auto")
    (root / ".ldm").mkdir(exist_ok=True)
    left, batch = defaultdict[str, list[str]](list), None
    with locked(root / ".ldm/ingest.lock"):  # a second ingest waits
        try:
            with open_repository(root) as repo:
                collection = _collection(root, inbox, repo)
                shutil.rmtree(collection / PARTIAL, ignore_errors=True)
                for originals in sorted(collection.glob(f"*/{ORIGINALS}")):
                    _clear(originals)
                if taken := _copy(inbox, collection, settle, captions, left):
                    with held(repo, collection):  # a running stage would record the batch as read though it has not seen it
                        batch = _free_name(collection)
                        os.rename(collection / PARTIAL, batch)
                    _sync(collection)
                    _clear(batch / ORIGINALS)
        except OSError as error:
            raise InputError(f"{error.filename or inbox}: {error.strerror}; mend that and run ingest again") from None
        pointer = _version(root, collection) if any(walk(collection)) else None
    return Ingested(inbox, batch.relative_to(root).as_posix() if batch else None, taken, dict(left), pointer)


def _collection(root: Path, inbox: Path, repo: Any) -> Path:
    """The folder `data.path`. It must be inside the project, made by no stage, versioned on its own, and complete here."""
    name = load_settings(root).data.path
    folder = (root / name).resolve()
    if folder == root or not folder.is_relative_to(root):
        raise InputError(f"data.path {name}: not a folder inside the project; {ADVICE}")
    if inbox.is_relative_to(folder):
        raise InputError(f"{inbox}: lies in the collection data.path {name}; the inbox must be another folder")
    for out in repo.index.outs:
        path, stage = Path(out.fs_path), out.stage
        if path == folder and not stage.cmd:
            # A file that is neither here nor in DVC's cache was never fetched: `dvc add` would drop it from the collection.
            tree = out.get_obj()
            if tree is None or not all(folder.joinpath(*key).exists() or out.cache.exists(file.value) for key, _, file in tree):
                raise InputError(f"data.path {name}: not all of it is here; `dvc pull`, or `dvc add {name}` if this is all")
        elif path.is_relative_to(folder) or folder.is_relative_to(path):
            by = f"stage {stage.name} writes" if stage.cmd else f"{stage.path_in_repo} versions"
            raise InputError(f"data.path {name}: {by} {path.relative_to(root)}; {ADVICE}")
    pointer = folder.with_name(folder.name + ".dvc")
    above = [f"{parent}/" for parent in pointer.parents if parent != root and parent.is_relative_to(root)]
    if any(map(repo.scm.is_ignored, [str(pointer), *above])):  # DVC looks for no .dvc file there
        raise InputError(f"data.path {name}: git ignores {pointer.relative_to(root)}, so it would not be versioned; {ADVICE}")
    return folder


def _copy(inbox: Path, collection: Path, settle: float, captions: Convention, left: dict[str, list[str]]) -> tuple[str, ...]:
    """Write the new images to `PARTIAL` as a complete batch; without new images there is no such folder. Returns their names."""
    known, labelled = _survey(collection, captions)
    rows, sidecars = _ready(inbox, settle, captions, left)
    with_label = next((name for name, row in rows.items() if "label" in row), None)
    if with_label and labelled is False:
        raise InputError(f"{with_label}: has a label, and the images of {collection} have none; drop the inbox's column label")
    known_hash = cache(file_hash)
    partial, taken = collection / PARTIAL, dict[str, str]()  # sha256 -> name
    for name, row in rows.items():
        if "label" not in row and (labelled or with_label):
            left[UNLABELLED].append(name)
            continue
        try:
            digest, size = file_hash(inbox / name), (inbox / name).stat().st_size
        except FileNotFoundError:
            continue
        except OSError:
            left[UNREADABLE].append(name)
            continue
        if digest in taken or any(known_hash(path) == digest for path in known[size]):
            left[KNOWN].append(name)
            continue
        partial.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inbox / name, partial / name)
        if file_hash(partial / name) == digest:
            taken[digest] = name
        else:
            (partial / name).unlink()
            left[WAITING].append(name)
    if taken:
        table = pd.DataFrame([rows[name] for name in taken.values()])
        table = table[["file_name", "text", *table.columns.difference(["file_name", "text"], sort=False)]]
        # Quote everything: csv leaves a lone carriage return bare, which readers take for the end of a row.
        table.to_csv(partial / TABLE, index=False, quoting=csv.QUOTE_ALL, errors="backslashreplace")
        originals = {name: digest for digest, name in taken.items()}
        stay = [path.name for path in inbox.iterdir() if _is_image(path.name) and path.name not in originals]
        needed = {file for files in beside(stay, os.listdir(inbox)).values() for file in files.values()}
        read = [item for name in originals.keys() & sidecars for item in sidecars[name].items()]
        originals |= {name: digest for name, digest in read if name not in needed}
        (partial / ORIGINALS).write_text(canonical_json({"inbox": str(inbox), "files": originals}), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
    return tuple(taken.values())


def _survey(collection: Path, captions: Convention) -> tuple[dict[int, list[Path]], bool | None]:
    """The collection's images by size in bytes, and whether they have labels (None: no images); `InputError` if no batch fits."""
    images = defaultdict[int, list[Path]](list)
    for name, refusal in walk(collection):
        if name.lower().endswith(".tar"):
            raise InputError(f"{collection / name}: a folder of tars takes no images; {ADVICE}")
        if _is_image(name) and not refusal:
            images[(collection / name).stat().st_size].append(collection / name)
    if not images:
        return images, None
    found = read_folder(collection, captions)
    if "folder name" in found.origins:
        reason = "its captions are the names of its folders, and a dated folder is no class"
        raise InputError(f"{collection}: {reason}; write a metadata.csv (file_name,text) there first")
    return images, "label" in found.table


def _ready(
    inbox: Path, settle: float, captions: Convention, left: dict[str, list[str]]
) -> tuple[dict[str, Row], dict[str, dict[str, str]]]:
    """Images that are complete and have a caption: rows of the batch's table, and sha256 of the files beside each, by name."""
    ages, now = dict[str, float](), time.time()
    for path in sorted(inbox.glob("[!.]*")):
        if path.is_symlink() or not path.is_file():
            left[NO_FILE].append(path.name)
        else:
            ages[path.name] = abs(now - path.stat().st_mtime)  # far in the future: another machine's clock, not a writer
    tables = [name for name in ages if is_table(name)]
    listed, rows, sidecars = dict[str, Row](), dict[str, Row](), dict[str, dict[str, str]]()
    if tables and all(ages[name] >= settle for name in tables):
        check_tables(inbox, tables)
        for row in read_table(inbox / tables[0]).to_dict("records"):  # also of images that have left
            earlier = listed.setdefault(normal(row["file_name"]), row)
            if earlier["text"] != row["text"] and (inbox / row["file_name"]).exists():
                raise InputError(f"{inbox / tables[0]}: {row['file_name']!r} has two captions; keep one")
    images = [name for name in ages if _is_image(name)]
    files = beside(images, ages.keys() - tables)
    others = ages.keys() - {*images, *tables}
    for name in sorted(name for name in others if not name.lower().endswith(EXTENSIONS)):
        left[UNREAD_FORMAT if PurePosixPath(name).suffix.lower() in UNREAD else NO_IMAGE].append(name)
    for name in images:
        texts = files.get(name, {})
        if not _is_text(name):
            left[UNNAMED].append(name)
        elif any(ages[file] < settle for file in (name, *texts.values(), *tables)):
            left[WAITING].append(name)
        else:
            found = {"text": ""} if captions == "none" else listed.get(normal(name))
            if found is None:
                with suppress(OSError, InputError):
                    blobs = {extension: (inbox / file).read_bytes() for extension, file in texts.items()}
                    caption = caption_of(blobs, name, captions)
                    found = {key: caption[key] for key in ("text", "label") if key in caption}
                    taken = [part for part in blobs if part != "json" or caption.keys() <= found.keys()]  # else it holds more
                    sidecars[name] = {texts[part]: content_hash(blobs[part]) for part in taken}
            if found and _is_text(found["text"]):
                rows[name] = found | {"file_name": name}
            else:
                left[UNCAPTIONED].append(name)
    return rows, sidecars


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _is_text(value: str) -> bool:
    """Whether a caption table can hold a string."""
    with suppress(UnicodeEncodeError):
        return b"\0" not in value.encode()
    return False


def _free_name(collection: Path) -> Path:
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    names = itertools.chain([day], (f"{day}-{number}" for number in itertools.count(2)))
    return next(path for path in map(collection.joinpath, names) if not path.exists())


def _clear(originals: Path) -> None:
    """Remove the files on the list that have not changed from the inbox, then the list."""
    record = json.loads(originals.read_text(encoding="utf-8"))
    for name, digest in record["files"].items():
        path = Path(record["inbox"], name)
        with suppress(FileNotFoundError):
            if file_hash(path) == digest:
                path.unlink()
    originals.unlink()


def _sync(path: Path) -> None:
    """Flush to the disk: originals are removed next, and after a power cut their copies must not be empty."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _version(root: Path, collection: Path) -> str:
    """`dvc add` the collection; returns the name of its .dvc file."""
    name = collection.relative_to(root).as_posix()
    # Without relinking: for that DVC removes files, which a kill would leave out of the collection.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "add", "--no-relink", name]
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise InputError(f"{name}: `dvc add` failed ({reason}); every image is safe there, run ingest again")
    return f"{name}.dvc"

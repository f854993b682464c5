"""A watched folder: what people and programs drop there becomes a dated batch of the collection, versioned by DVC.

A kill at any moment loses and doubles nothing. Images are copied into a hidden folder, which becomes the batch by one rename;
with it comes a list of the originals, and only what is on that list, and still has its hash, leaves the inbox. The next
call finishes what a killed one has begun. `dvc add` comes last, always.
"""

import csv
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from ldm.base.errors import InputError
from ldm.base.hashing import canonical_json, content_hash, file_hash
from ldm.config import load_settings
from ldm.data.folders import CAPTION_TABLES, read_table
from ldm.data.images import SUFFIXES
from ldm.versioning.repository import held, open_repository

SETTLE = 10.0  # seconds without a change after which a file counts as complete
PARTIAL = ".ingest.partial"  # in the collection; ignored by DVC (.dvcignore) and, as all hidden files, by `read_folder`
ORIGINALS = ".ingest.json"  # in a batch whose originals may still be in the inbox: their hashes by name
SHOWN = 3  # names in a line of the report
OWN = "set data.path in params.yaml to a folder of one's own, e.g. data/raw/mine"

KNOWN = "already in the collection"
WAITING = f"changed in the last {SETTLE:.0f} s, so perhaps still being written"
UNCAPTIONED = "without a caption (a row of the table, or a .txt in UTF-8)"
UNLABELLED = "without a label, which other images have"
UNREADABLE = "not readable for this user"
UNNAMED = "with a name that is not UTF-8"
NO_IMAGE = "no images"
NO_FILE = "folders or links, which are not looked into"

Row = dict[str, Any]  # of a caption table: `file_name`, `text`, further columns
Left = dict[str, list[str]]  # why it stays -> file names


@dataclass(frozen=True)
class _Image:
    """An image of the inbox that is complete."""

    name: str
    row: Row
    sidecar: str | None  # sha256 of the .txt beside it, where that gave the caption


@dataclass(frozen=True)
class Ingested:
    """What became of the files of an inbox."""

    inbox: Path
    batch: str | None  # the new folder, relative to the project; None where nothing was new
    moved: tuple[str, ...]  # names of the images in it
    left: Left
    pointer: str | None  # the .dvc file, relative to the project; None while there is no collection

    def lines(self) -> list[str]:
        """The report, for people."""
        lines = [f"{len(self.moved)} images moved to {self.batch}" if self.batch else f"nothing moved from {self.inbox}"]
        for reason, names in sorted(self.left.items()):
            shown = ", ".join(name.encode(errors="backslashreplace").decode() for name in names[:SHOWN])
            lines.append(f"{len(names)} left, {reason}: {shown}{', …' if len(names) > SHOWN else ''}")
        if self.pointer:
            lines.append(f"versioned by {self.pointer}: commit that to git")
        return [f"ingest: {line}" for line in lines]


def ingest(root: Path, inbox: Path, *, settle: float = SETTLE) -> Ingested:
    """Move what is new in `inbox` to `data.path/YYYY-MM-DD` (UTC; `-2`, `-3`, … where that exists); `dvc add` the collection.

    New is an image, directly in `inbox`, that has a caption (a row of its `metadata.csv` or `metadata.jsonl`, or a `.txt` beside
    it), no file of equal bytes in the collection, and no change for `settle` seconds, neither of it nor of its caption. The
    batch gets its own `metadata.csv`; the inbox keeps its table. Equal images count once, the first by name.

    Raises `InputError` for a collection that cannot take batches, a damaged table and labels that do not match the collection's.
    """
    root, inbox = root.resolve(), inbox.resolve()
    if not (inbox.is_dir() and os.access(inbox, os.R_OK | os.W_OK | os.X_OK)):
        raise InputError(f"{inbox}: no folder that this user may read and write; ingest takes images out of such a one")
    (root / ".ldm").mkdir(exist_ok=True)
    left: Left = defaultdict(list)
    with (root / ".ldm/ingest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed; a second ingest waits
        try:
            with open_repository(root) as repo:
                collection = _collection(root, inbox, repo)
                shutil.rmtree(collection / PARTIAL, ignore_errors=True)
                for originals in sorted(collection.glob(f"*/{ORIGINALS}")):
                    _clear(originals)
                images, tables = _survey(collection)
                ready = _labelled(_ready(inbox, settle, left), collection, images, tables, left)
                batch, taken = None, _copy(ready, inbox, collection / PARTIAL, images, left)
                if taken:
                    with held(repo, collection):  # a stage that runs would record the batch as read though it has not seen it
                        batch = _free_name(collection)
                        os.rename(collection / PARTIAL, batch)
                    _sync(collection)
                    _clear(batch / ORIGINALS)
        except OSError as error:
            raise InputError(f"{error.filename or inbox}: {error.strerror}; mend that and run ingest again") from None
        pointer = _version(root, collection) if collection.is_dir() and any(_files(collection)) else None
    moved = tuple(image.name for image in taken)
    return Ingested(inbox, batch.relative_to(root).as_posix() if batch else None, moved, dict(left), pointer)


def _collection(root: Path, inbox: Path, repo: Any) -> Path:
    """The folder `data.path`: inside the project, made by no stage, versioned by itself, and all of it here."""
    name = load_settings(root).data.path
    folder = (root / name).resolve()
    if folder == root or not folder.is_relative_to(root):
        raise InputError(f"data.path {name}: not a folder inside the project; {OWN}")
    if inbox.is_relative_to(folder):
        raise InputError(f"{inbox}: lies in the collection data.path {name}; the inbox must be another folder")
    pointer = folder.with_name(folder.name + ".dvc")
    for out in repo.index.outs:
        path, stage = Path(out.fs_path), out.stage
        if path == folder and not stage.cmd:
            _refuse_incomplete(name, folder, out)
        elif path.is_relative_to(folder) or folder.is_relative_to(path):
            by = f"stage {stage.name} writes" if stage.cmd else f"{stage.path_in_repo} versions"
            raise InputError(f"data.path {name}: {by} {path.relative_to(root)}; {OWN}")
    above = [f"{parent}/" for parent in pointer.parents if parent != root and parent.is_relative_to(root)]
    if any(map(repo.scm.is_ignored, [str(pointer), *above])):  # DVC does not even look for it there
        raise InputError(f"data.path {name}: git ignores {pointer.relative_to(root)}, so it would not be versioned; {OWN}")
    return folder


def _refuse_incomplete(name: str, folder: Path, out: Any) -> None:
    """What is neither here nor in DVC's cache was not removed but never fetched: `dvc add` would drop it from the collection."""
    tree = out.get_obj()
    here = tree is not None and all(
        folder.joinpath(*key).exists() or out.cache.exists(identity.value) for key, _, identity in tree
    )
    if not here:
        raise InputError(f"data.path {name}: not all of it is here; `dvc pull`, or `dvc add {name}` where what is here is all")


def _survey(collection: Path) -> tuple[dict[int, list[str]], list[str]]:
    """Images of the collection by their size in bytes, and its caption tables; `InputError` where a batch would not fit in."""
    images, tables, texts = defaultdict(list), [], set()
    for entry in _files(collection):
        stem, suffix = os.path.splitext(entry.path)
        if entry.name in CAPTION_TABLES:
            tables.append(entry.path)
        elif suffix == ".txt":
            texts.add(stem)
        elif suffix == ".tar":
            raise InputError(f"{entry.path}: a folder of tars takes no images; {OWN}")
        elif suffix.lower() in SUFFIXES:
            images[entry.stat().st_size].append(entry.path)
    stems = (os.path.splitext(path)[0] for paths in images.values() for path in paths)
    if images and not tables and not any(stem in texts for stem in stems):
        raise InputError(
            f"{collection}: its captions are the names of its folders, and a dated folder is no class; "
            "write a metadata.csv (file_name,text) there first"
        )
    return images, tables


def _files(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Every file below that is not hidden."""
    if not os.path.isdir(folder):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            elif entry.is_file():
                yield entry


def _ready(inbox: Path, settle: float, left: Left) -> list[_Image]:
    """Images that are complete and have a caption, by name; why others are not goes to `left`."""
    now, files, recent = time.time(), set(), set()
    for entry in sorted(os.scandir(inbox), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if not entry.is_file(follow_symlinks=False):
            left[NO_FILE].append(entry.name)
            continue
        files.add(entry.name)
        if abs(now - entry.stat().st_mtime) < settle:  # a time in the future is another machine's clock, not a writer
            recent.add(entry.name)
    tables = files & set(CAPTION_TABLES)
    captions = {} if tables & recent else _captions(inbox, sorted(tables))
    ready = []
    for name in sorted(files - tables):
        sidecar = _sidecar(name)
        if not _is_image(name):
            if not name.endswith(".txt"):
                left[NO_IMAGE].append(name)
        elif not _is_text(name):
            left[UNNAMED].append(name)
        elif recent & {name, sidecar, *tables}:
            left[WAITING].append(name)
        else:
            image = _captioned(inbox, name, captions.get(_normal(name)), sidecar in files)
            if image and _is_text(image.row["text"]):
                ready.append(image)
            else:
                left[UNCAPTIONED].append(name)
    return ready


def _captioned(inbox: Path, name: str, row: Row | None, beside: bool) -> _Image | None:
    """As in a collection, the table comes before the .txt."""
    if row is not None:
        return _Image(name, row | {"file_name": name}, None)
    if beside:
        with suppress(OSError, UnicodeDecodeError):
            blob = (inbox / _sidecar(name)).read_bytes()
            return _Image(name, {"file_name": name, "text": blob.decode().strip()}, content_hash(blob))
    return None


def _captions(inbox: Path, tables: list[str]) -> dict[str, Row]:
    """Rows of the inbox's table by name; those of images that left long ago are among them."""
    if len(tables) > 1:
        raise InputError(f"{inbox / tables[1]}: there is a {tables[0]} beside it; keep one of the two")
    captions: dict[str, Row] = {}
    for row in (row for name in tables for row in read_table(inbox / name).to_dict("records")):
        columns = {str(column): value for column, value in row.items()}
        earlier = captions.setdefault(_normal(columns["file_name"]), columns)
        if earlier["text"] != columns["text"] and (inbox / columns["file_name"]).exists():
            raise InputError(f"{inbox / tables[0]}: {columns['file_name']!r} has two captions; keep one")
    return captions


def _normal(name: str) -> str:
    """Without "./", and in one of Unicode's forms (macOS decomposes letters)."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name)))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _is_text(value: str) -> bool:
    """Whether a table of captions can hold it."""
    with suppress(UnicodeEncodeError):
        return b"\0" not in value.encode()
    return False


def _sidecar(name: str) -> str:
    return PurePosixPath(name).with_suffix(".txt").name


def _labelled(ready: list[_Image], collection: Path, images: dict[int, list[str]], tables: list[str], left: Left) -> list[_Image]:
    """All of a collection's images have labels, or none has; so it must be with the batch."""
    labelled = any("label" in image.row for image in ready)
    if not ready or not (labelled or tables):
        return ready
    wanted = any("label" in read_table(Path(table)) for table in tables[:1]) if images else labelled
    if labelled and not wanted:
        first = next(image.name for image in ready if "label" in image.row)
        raise InputError(f"{first}: has a label, and the images of {collection} have none; drop the inbox's column label")
    for image in ready:
        if wanted and "label" not in image.row:
            left[UNLABELLED].append(image.name)
    return [image for image in ready if not wanted or "label" in image.row]


def _copy(ready: list[_Image], inbox: Path, partial: Path, known: dict[int, list[str]], left: Left) -> list[_Image]:
    """Write what is new to `partial`, as it is to stand in the collection; nothing, where nothing is."""
    known_hash = cache(lambda path: file_hash(Path(path)))
    taken: dict[str, _Image] = {}  # by sha256
    for image in ready:
        source = inbox / image.name
        try:
            digest, size = file_hash(source), source.stat().st_size
        except FileNotFoundError:
            continue
        except OSError:
            left[UNREADABLE].append(image.name)
            continue
        if digest in taken or any(known_hash(path) == digest for path in known.get(size, [])):
            left[KNOWN].append(image.name)
            continue
        partial.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial / image.name)
        _sync(partial / image.name)
        if file_hash(partial / image.name) == digest:
            taken[digest] = image
        else:
            (partial / image.name).unlink()
            left[WAITING].append(image.name)
    if taken:
        _complete(taken, inbox, partial)
    return list(taken.values())


def _complete(taken: dict[str, _Image], inbox: Path, partial: Path) -> None:
    """Captions, and the list of what then may leave the inbox."""
    table = pd.DataFrame([image.row for image in taken.values()])
    table = table[["file_name", "text", *(column for column in table if column not in ("file_name", "text"))]]
    # all quoted: csv leaves a lone carriage return bare, which readers take for the end of a row
    table.to_csv(partial / CAPTION_TABLES[0], index=False, quoting=csv.QUOTE_ALL, errors="backslashreplace")
    originals = {image.name: digest for digest, image in taken.items()}
    needed = {_sidecar(name) for name in os.listdir(inbox) if _is_image(name) and name not in originals}
    sidecars = {_sidecar(image.name): image.sidecar for image in taken.values() if image.sidecar}
    originals |= {name: digest for name, digest in sidecars.items() if name not in needed}
    (partial / ORIGINALS).write_text(canonical_json({"inbox": str(inbox), "files": originals}), encoding="utf-8")
    for path in (partial / CAPTION_TABLES[0], partial / ORIGINALS, partial):
        _sync(path)


def _free_name(collection: Path) -> Path:
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    names = itertools.chain([day], (f"{day}-{number}" for number in itertools.count(2)))
    return next(collection / name for name in names if not (collection / name).exists())


def _clear(originals: Path) -> None:
    """Remove from the inbox what is on the list and still is what was copied; then the list."""
    record = json.loads(originals.read_text(encoding="utf-8"))
    for name, digest in record["files"].items():
        path = Path(record["inbox"], name)
        with suppress(FileNotFoundError):
            if file_hash(path) == digest:
                path.unlink()
    originals.unlink()


def _sync(path: Path) -> None:
    """To the disk: originals are removed next, and a power cut must not find their copies empty."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _version(root: Path, collection: Path) -> str:
    """`dvc add`; returns the file that then stands for the collection in git."""
    name = collection.relative_to(root).as_posix()
    # without relinking, for which DVC removes files that a kill would then leave out of the collection
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "add", "--no-relink", name]
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise InputError(f"{name}: `dvc add` failed ({reason}); every image is safe there, run ingest again")
    return f"{name}.dvc"

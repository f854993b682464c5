"""The inbox of ingest: which of its images are complete and captioned, and why the other files stay."""

import contextlib
import csv
import io
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.base.errors import InputError
from ldm.base.files import content_hash
from ldm.collection.batches import is_image
from ldm.data.caption_columns import FURTHER, all_captions, is_for_captions, merged
from ldm.data.captions import EXTENSIONS, NOT_INGESTED, TEXTS, beside, caption_of
from ldm.data.conventions import Convention
from ldm.data.folders import Place, left_behind, unread
from ldm.data.images import UNREAD, UnreadableImage
from ldm.data.tables import MAX_TEXT, check_tables, is_table, normal, read_table

# Why a file stays, beside what decoding an image and reading a caption say:
UNCAPTIONED = "without a caption (a row of the table, or a .txt beside it)"
UNWRITABLE = f"a caption or column that no table can hold: NUL, over {MAX_TEXT:,} characters, or two columns of one name"
UNNAMED = "its name is not UTF-8; rename it"
NO_IMAGE = "no image"
NO_FILE = "a folder or a link; only files are moved"
UNUSED = "a caption of no image here"

Row = dict[str, Any]  # of a caption table: `file_name`, `text`, further columns


@dataclass(frozen=True)
class Inbox:
    """What was found, by file name."""

    rows: dict[str, Row]  # of the images that are complete and captioned
    captions: dict[str, dict[str, str]]  # sha256 of the files beside each image that its caption was read from
    left: dict[str, str]  # why a file stays


def waiting(settle: float) -> str:
    """Why a file stays that has changed in the last `settle` seconds."""
    return f"changed in the last {settle:g} s, so perhaps still being written"


def read_inbox(inbox: Path, settle: float, convention: Convention) -> Inbox:
    """Look at the files that lie directly in `inbox`; those hidden and of systems are passed over. Raises `OSError` only."""
    ages, left = _ages(inbox)
    unsettled = {name for name, age in ages.items() if age < settle}
    tables = {name for name in ages if is_table(name)}
    listed, trouble = dict[str, list[Row]](), None
    if tables and not tables & unsettled:
        try:
            listed = _listed(inbox, tables)
        except InputError as error:
            trouble = str(error).replace(f"{inbox}/", "")
            left |= dict.fromkeys(tables, trouble)
    by_stem, rows, captions = _by_stem(ages.keys() - tables), dict[str, Row](), dict[str, dict[str, str]]()
    for name in sorted(ages.keys() - tables):
        files = by_stem.get(_stem(name), [])
        if not is_image(name):
            if _extension(name) not in EXTENSIONS:
                left[name] = NO_IMAGE
            elif name not in unsettled:
                left[name] = UNUSED  # unless `remaining` finds an image of its name
        elif (suffix := PurePosixPath(name).suffix.lower()) in UNREAD:
            left[name] = unread(suffix)
        elif not _is_text(name):
            left[name] = UNNAMED
        elif not unsettled.isdisjoint({name, *files, *tables}):
            left[name] = waiting(settle)
        else:
            try:
                rows[name], captions[name] = _described(inbox, name, listed.get(normal(name), []), files, convention)
            except InputError as error:
                reason = str(error).replace(f"{inbox}/", "")
                left[name] = trouble if trouble and reason == UNCAPTIONED else reason
    return Inbox(rows, captions, left)


def _ages(inbox: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds since each file changed, and why others stay."""
    ages, left, now = dict[str, float](), dict[str, str](), time.time()
    for name in sorted(os.listdir(inbox)):
        path = inbox / name
        if left_behind(name) or name == NOT_INGESTED:
            continue
        try:
            if path.is_symlink() or not path.is_file():
                left[name] = NO_FILE
            else:
                ages[name] = abs(now - path.stat().st_mtime)  # far in the future: another machine's clock, not a writer
        except OSError as error:
            left[name] = error.strerror or type(error).__name__
    return ages, left


def _listed(inbox: Path, tables: Iterable[str]) -> dict[str, list[Row]]:
    """The rows of the table, also of images that have left, by normal name."""
    check_tables(inbox, list(tables))
    listed = defaultdict[str, list[Row]](list)
    for name in tables:
        for row in read_table(inbox / name).to_dict("records"):
            listed[normal(row["file_name"])].append({str(column): value for column, value in row.items()})
    return listed


def _described(inbox: Path, name: str, listed: list[Row], files: list[str], convention: Convention) -> tuple[Row, dict[str, str]]:
    """The row of an image in the batch's table, and sha256 of the files that it was read from; raises `InputError`."""
    read = dict[str, str]()
    if convention == "none":
        row: Row = {"text": ""}
    elif listed and not (convention == "text files" and any(_extension(file) in TEXTS for file in files)):
        row = merged(listed, name)
    elif texts := beside([name], files).get(name):
        try:
            blobs = {extension: _start(inbox / file) for extension, file in texts.items()}
        except OSError as error:
            raise InputError(f"its caption cannot be read: {error.strerror}") from None
        found = caption_of(blobs, name.rpartition(".")[0], convention)
        row = {key: found[key] for key in ("text", FURTHER, "label") if key in found}
        if not str(row.get("label", "")).strip():
            row.pop("label", None)  # tables hold no blank labels
        # a JSON that says more than the row stays
        said_all = found.keys() <= {"text", FURTHER, "label"}
        read = {texts[part]: content_hash(blobs[part]) for part in blobs if part != "json" or said_all}
    else:
        raise InputError(UNCAPTIONED)
    return _writable(row | {"file_name": name}), read


def _start(path: Path) -> bytes:
    """A text that is too long is not read whole."""
    with path.open("rb") as file:
        return file.read(MAX_TEXT + 1)


def _writable(row: Row) -> Row:
    """A row whose table can be read again, without columns that have no name; raises `InputError`."""
    named = [(name, value) for column, value in row.items() if (name := column.strip())]
    renamed = [column for column in row if column != column.strip() and is_for_captions(column.strip())]
    texts = [text for name, value in named if name != FURTHER for text in (name, str(value))] + all_captions(row)
    if renamed or len(dict(named)) < len(named) or not all(_is_text(text) and len(text) <= MAX_TEXT for text in texts):
        raise InputError(UNWRITABLE)
    return dict(named)


def _is_text(value: str) -> bool:
    """Whether a caption table can hold a string."""
    with contextlib.suppress(UnicodeEncodeError):
        return b"\0" not in value.encode()
    return False


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower()[1:]


def _stem(name: str) -> str:
    return normal(name.rpartition(".")[0])


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """The captions in files of their own, by what images of theirs are called."""
    found = defaultdict[str, list[str]](list)
    for name in names:
        if _extension(name) in EXTENSIONS:
            found[_stem(name)].append(name)
    return found


def without_needed(inbox: Path, originals: dict[str, str]) -> dict[str, str]:
    """The files of a batch that may leave: all but captions of images that stay."""
    staying = {_stem(name) for name in os.listdir(inbox) if is_image(name) and name not in originals}
    return {name: digest for name, digest in originals.items() if is_image(name) or _stem(name) not in staying}


def remaining(inbox: Path, left: dict[str, str]) -> dict[str, str]:
    """What of `left` is still there; a caption whose image stays is named by the image."""
    here = set(os.listdir(inbox))
    stems = {_stem(name) for name in here if is_image(name)}
    return {name: why for name, why in left.items() if name in here and not (why == UNUSED and _stem(name) in stems)}


def write_list(inbox: Path, left: dict[str, str]) -> dict[str, str]:
    """Write `NOT_INGESTED` whole, or remove it if nothing is left; returns the files that it did not name with this reason."""
    path, text, before = inbox / NOT_INGESTED, io.StringIO(), b""
    rows = {name: (shown(name), shown(reason)) for name, reason in sorted(left.items())}
    csv.writer(text, lineterminator="\n").writerows([("file_name", "reason"), *rows.values()])
    with contextlib.suppress(UnreadableImage):
        before = Place(path).read()
    try:
        told = set(map(tuple, csv.reader(io.StringIO(before.decode(), newline=""))))
    except (ValueError, csv.Error):  # somebody else has written there
        told = set()
    new = {name: left[name] for name, row in rows.items() if row not in told}
    partial = inbox / f".{NOT_INGESTED}.partial"  # hidden: of one name, so that kills leave one at most
    try:
        if not left and path.is_file():
            path.unlink()
        elif left and text.getvalue().encode() != before:
            partial.write_text(text.getvalue(), encoding="utf-8")
            os.replace(partial, path)
    except OSError as error:  # no reason to stop: the images are in the collection
        new[NOT_INGESTED] = f"cannot be written: {error.strerror}"
    return new


def shown(text: str) -> str:
    """With bytes of a name that are not UTF-8 as escapes."""
    return text.encode(errors="backslashreplace").decode()

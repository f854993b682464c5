"""Read a folder of captioned images: which images there are and what their captions say."""

import io
import json
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd

from ldm.base.errors import InputError
from ldm.data.images import SUFFIXES, UNREAD, UnreadableImage

MAX_BYTES = 2**30  # of an image file
CAPTION_TABLES = ("metadata.csv", "metadata.jsonl")
PROMPTS = "prompts.csv"
SYSTEM = {"@eaDir", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}  # folders
# files of a cache that are named by their content: DVC's, and the Hugging Face hub's
CONTENT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$|/blobs/([0-9a-f]{40}|[0-9a-f]{64})$")
LINKED_FOLDER = "a symbolic link to a folder; move the folder itself here"


@dataclass(frozen=True)
class Place:
    """Where the bytes of an image are: a file, or `size` bytes at `offset` of a file."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Raises `UnreadableImage` for what is no regular file, is larger than `MAX_BYTES` or cannot be read."""
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for ever.
            with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UnreadableImage("not a regular file")
                size = status.st_size if self.size is None else self.size
                if size > MAX_BYTES:
                    raise UnreadableImage(f"{size:,} bytes; at most {MAX_BYTES:,} are read")
                file.seek(self.offset)
                return file.read(size)
        except OSError as error:
            raise UnreadableImage(error.strerror or type(error).__name__) from None  # without the path, which differs elsewhere


@dataclass(frozen=True)
class Collection:
    """Captioned images: a row of `table` (`file_name`, `text`, further columns) and a place each."""

    table: pd.DataFrame
    places: list[Place]
    refused: dict[str, str] = field(default_factory=dict)  # file name -> reason: images that are not opened
    ignored: dict[str, int] = field(default_factory=dict)  # suffix -> number of files that are no images


def read_folder(folder: Path) -> Collection:
    """The captioned images in `folder` and below, sorted by `file_name` (POSIX path relative to `folder`).

    README.md has the conventions for captions. Hidden files are ignored; files that must not be opened are refused.
    Raises `InputError` for a folder that is missing or empty, and for captions without an image or images without a caption.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set data.path in params.yaml to a folder of captioned images")
    found, tables, others = [], [], {}  # others: name -> why it must not be opened, or ""
    refused: dict[str, str] = {}
    for name, reason in walk(folder):
        path = PurePosixPath(name)
        if path.suffix.lower() in UNREAD:
            refused[name] = reason or f"{path.suffix} is not read; convert it to JPEG or PNG"
        elif path.suffix.lower() in SUFFIXES and not reason:
            found.append(name)
        elif path.suffix.lower() in SUFFIXES or reason == LINKED_FOLDER:
            refused[name] = reason
        elif path.name not in CAPTION_TABLES and name != PROMPTS:
            others[name] = reason
        elif reason:
            raise InputError(f"{folder / name}: {reason}")
        elif name != PROMPTS:
            tables.append(name)
    if not found:
        reasons = "; ".join(f"{count} refused: {reason}" for reason, count in Counter(refused.values()).most_common())
        what = reasons or f"put captioned images there ({', '.join(sorted(SUFFIXES))})"
        raise InputError(f"{folder}: holds no images that are read; {what}")
    table = _captions(folder, found, tables, {name for name, reason in others.items() if not reason}, refused)
    ignored = Counter(PurePosixPath(name).suffix or name for name in sorted(others.keys() - set(map(sidecar_of, found))))
    return Collection(table, [Place(folder / name) for name in table.file_name], refused, dict(sorted(ignored.items())))


def walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file below a folder, if there is one, that is not hidden: its relative path, and why not to open it (or "")."""
    root = folder.resolve()

    def cannot(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it away")

    for here, folders, files in os.walk(folder, onerror=cannot) if folder.is_dir() else ():
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SYSTEM)
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        for path in sorted(Path(here, name) for name in (*files, *links) if not name.startswith(".")):
            relative, reason = path.relative_to(folder).as_posix(), ""
            try:
                relative.encode()
                if path.is_symlink() and path.is_dir():
                    reason = LINKED_FOLDER
                elif path.is_symlink() and not (
                    (target := path.resolve(strict=True)).is_relative_to(root) or CONTENT.search(target.as_posix())
                ):
                    reason = "a symbolic link that leaves the folder; move the file itself here"
                elif not path.is_file():
                    reason = "not a regular file"
            except UnicodeEncodeError:
                reason = "its name is not UTF-8; rename it"
            except (OSError, RuntimeError):  # the latter: links that lead to each other
                reason = "a symbolic link that leads nowhere; restore its target or remove it"
            yield relative.encode(errors="backslashreplace").decode(), reason


def _captions(folder: Path, found: list[str], tables: list[str], files: set[str], refused: dict[str, str]) -> pd.DataFrame:
    """Captions of all images found, sorted by file name: from the nearest table, else from sidecars, else from folders' names."""
    check_tables(folder, tables)
    uncaptioned, parts = set(found), []
    for name in sorted(tables, key=lambda name: -name.count("/")):  # the deepest first
        prefix = name.removesuffix(PurePosixPath(name).name)
        below = {image.removeprefix(prefix) for image in uncaptioned if image.startswith(prefix)}
        part = _from_table(folder / name, below, {image.removeprefix(prefix) for image in refused})
        part["file_name"] = prefix + part.file_name
        uncaptioned -= set(part.file_name)
        parts.append(part)
    rest = pd.DataFrame({"file_name": sorted(uncaptioned)})
    if parts or any(sidecar_of(name) in files for name in rest.file_name):
        parts.append(rest.assign(text=[_sidecar(folder, name, files) for name in rest.file_name]))
    elif all("/" in name for name in rest.file_name):
        classes = [name.rsplit("/", 2)[-2] for name in rest.file_name]
        parts.append(rest.assign(text=classes, label=classes))
    else:
        advice = "add metadata.csv (file_name,text), a .txt file beside each image, or a subfolder for each class"
        raise InputError(f"{folder}: {len(found)} images but no captions; {advice}")
    table = pd.concat([part for part in parts if len(part)], ignore_index=True).sort_values("file_name", ignore_index=True)
    if "label" in table and table.label.isna().any():
        first = table.file_name[table.label.isna()].iloc[0]
        raise InputError(f"{folder / first}: has no label, as other images here do; give every image one, or drop the column")
    return table


def _sidecar(folder: Path, image: str, files: set[str]) -> str:
    path = folder / sidecar_of(image)
    if sidecar_of(image) not in files:
        raise InputError(f"{folder / image}: has no caption file {path.name} beside it, as other images here do")
    try:
        return decode_caption(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text: {error}") from None


def check_tables(folder: Path, tables: list[str]) -> None:
    """Raise `InputError` if two of the caption tables, relative to `folder`, are in one folder."""
    for name in tables:
        if name.endswith(CAPTION_TABLES[1]) and name.removesuffix(CAPTION_TABLES[1]) + CAPTION_TABLES[0] in tables:
            raise InputError(f"{folder / name}: there is a {CAPTION_TABLES[0]} beside it; keep one of the two")


def read_table(path: Path) -> pd.DataFrame:
    """A `metadata.csv` or `.jsonl`: strings `file_name` and `text`, labels as text, further columns; raises `InputError`."""
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            # Not pandas.read_json, which reads 3 beside a null as 3.0 and may read a caption as a date.
            table = pd.DataFrame([json.loads(line) for line in lines if line.strip()], dtype=object)
            table.to_json(force_ascii=False).encode()  # half of a surrogate pair is no character
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        advice = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{path}: not readable as a table: {error}{advice}") from None
    for column in ("file_name", "text"):
        if column not in table:
            found = ", ".join(map(str, table.columns)) or "none"
            raise InputError(f"{path}: column {column!r} is missing; found {found}; the first row must name the columns")
    if path.suffix == ".csv" and len(table) and not isinstance(table.index, pd.RangeIndex):
        raise InputError(f"{path}: its rows have more fields than its header; put captions that hold commas in double quotes")
    for number, row in enumerate(zip(table.file_name, table.text, strict=True), start=1):
        if not all(isinstance(value, str) for value in row):
            raise InputError(f"{path}: row {number}: file_name and text must be strings, found {row[0]!r} and {row[1]!r}")
    if "label" in table:
        missing = table.label.isna() | (table.label.astype(str).str.strip() == "")
        if missing.any():
            raise InputError(f"{path}: row {int(missing.argmax()) + 1} has no label; give every image one, or drop the column")
        table["label"] = table.label.astype(str)
    return table


def _from_table(path: Path, found: set[str], refused: set[str]) -> pd.DataFrame:
    """The rows of a table: one for each image in `found`, and none for others, except those that were refused."""
    table = read_table(path)
    forms = {normal(name): name for name in found}
    table["file_name"] = [n if n in found else forms.get(normal(n), str(PurePosixPath(n))) for n in table.file_name]
    if table.file_name.duplicated().any():
        twice = table.file_name[table.file_name.duplicated()].iloc[0]
        raise InputError(f"{path}: {twice!r} has more than one row; keep one caption an image")
    table = table[~table.file_name.isin(refused)]
    if missing := sorted(set(table.file_name) - found):
        raise InputError(f"{path}: names {len(missing)} images that are absent, as {missing[0]!r}; add them or remove the rows")
    if missing := sorted(found - set(table.file_name)):
        raise InputError(f"{path}: has no row for {len(missing)} images, as {missing[0]!r}; add rows or remove the images")
    return table


def normal(name: str) -> str:
    """A file name without "./" and with composed letters: macOS decomposes them, tables rarely do."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name)))


def sidecar_of(name: str) -> str:
    """The name of the `.txt` file beside an image."""
    return PurePosixPath(name).with_suffix(".txt").as_posix()


def decode_caption(blob: bytes) -> str:
    """The caption in a text file; raises `UnicodeDecodeError` if it is not UTF-8."""
    return io.StringIO(blob.decode("utf-8-sig"), newline=None).read().strip()  # Notepad begins files with a mark

"""Read a folder of captioned images: which images there are and what their captions say."""

import json
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd

from ldm.data.images import SUFFIXES, UnreadableImage
from ldm.errors import InputError

MAX_BYTES = 2**30  # of an image file
CAPTION_TABLES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Place:
    """Where the bytes of an image are: a whole file, or `size` bytes at `offset` of one."""

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
            raise UnreadableImage(error.strerror or type(error).__name__) from None  # without the path, which is this machine's


@dataclass(frozen=True)
class Collection:
    """Captioned images: `table` has a row each (`file_name`, `text`, further columns), `places` says where they are."""

    table: pd.DataFrame
    places: list[Place]
    refused: dict[str, str] = field(default_factory=dict)  # file name -> reason: images that are not even opened
    ignored: dict[str, int] = field(default_factory=dict)  # suffix -> how many files that are no images


def read_folder(folder: Path) -> Collection:
    """The captioned images of `folder` and all folders in it, sorted by `file_name` (POSIX path relative to `folder`).

    Captions follow the conventions people already have: a `metadata.csv` or `metadata.jsonl` (`file_name,text` and
    any further columns, such as `label`) stands for all images of its folder and below; a `.txt` file beside each
    image; or, where there is neither anywhere, subfolders named after a class, whose name then is caption and label.

    Hidden files are ignored; symbolic links that leave the folder, links to folders and names that are not UTF-8 are refused.
    Raises `InputError` for a folder that is missing or empty, and for captions that name missing images or miss some.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set data.path in params.yaml to a folder of captioned images")
    found: list[str] = []
    tables: list[str] = []
    refused: dict[str, str] = {}
    others: list[str] = []
    for name, reason in _walk(folder):
        if reason:
            refused[name] = reason
        elif PurePosixPath(name).suffix.lower() in SUFFIXES:
            found.append(name)
        elif PurePosixPath(name).name in CAPTION_TABLES:
            tables.append(name)
        else:
            others.append(name)
    found.sort()
    if not found:
        raise InputError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))}); put captioned images there")
    table = _captions(folder, found, tables, refused)
    sidecars = {str(PurePosixPath(name).with_suffix(".txt")) for name in found}
    ignored = Counter(PurePosixPath(name).suffix or name for name in others if name not in sidecars and name != "prompts.csv")
    return Collection(table, [Place(folder / name) for name in table.file_name], refused, dict(sorted(ignored.items())))


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file that is not hidden, relative to `folder`, with the reason why it is refused or an empty string."""
    root = folder.resolve()
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted([*files, *(f for f in folders if os.path.islink(os.path.join(here, f)))]):
            path = Path(here, name)
            relative = path.relative_to(folder).as_posix()
            if name.startswith("."):
                continue
            try:
                relative.encode()
            except UnicodeEncodeError:
                yield relative.encode(errors="backslashreplace").decode(), "its name is not UTF-8; rename it"
                continue
            if not path.is_symlink():
                yield relative, ""
            elif path.is_dir():
                yield relative, "a symbolic link to a folder; move the folder itself here"
            else:
                inside = path.resolve().is_relative_to(root)
                yield relative, "" if inside else "a symbolic link that leaves the folder; move the file itself here"


def _captions(folder: Path, found: list[str], tables: list[str], refused: dict[str, str]) -> pd.DataFrame:
    """Captions of all images found, sorted by file name: from tables first, then from sidecars, else from class folders."""
    uncaptioned, parts = set(found), []
    for name in sorted(tables, key=lambda name: -name.count("/")):  # the nearest table stands for an image
        base = PurePosixPath(name).parent
        if base.joinpath(CAPTION_TABLES[0]).as_posix() in tables and name.endswith(CAPTION_TABLES[1]):
            raise InputError(f"{folder / name}: there is a {CAPTION_TABLES[0]} beside it; keep one of the two")
        prefix = "" if base == PurePosixPath(".") else f"{base}/"
        below = {image.removeprefix(prefix) for image in uncaptioned if image.startswith(prefix)}
        skipped = {image.removeprefix(prefix) for image in refused}
        part = _from_table(folder / name, below, skipped)
        part["file_name"] = prefix + part.file_name
        uncaptioned -= set(part.file_name)
        parts.append(part)
    names = sorted(uncaptioned)
    if names and (parts or any((folder / name).with_suffix(".txt").is_file() for name in names)):
        parts.append(_from_sidecars(folder, names))
    elif names and all("/" in name for name in names):
        classes = [name.rsplit("/", 2)[-2] for name in names]
        parts.append(pd.DataFrame({"file_name": names, "text": classes, "label": classes}))
    elif names:
        raise InputError(
            f"{folder}: {len(found)} images but no captions; add metadata.csv with columns file_name,text, "
            "or a .txt file beside each image, or one subfolder per class"
        )
    table = pd.concat(parts, ignore_index=True).sort_values("file_name", ignore_index=True)
    if "label" in table and table.label.isna().any():
        first = table.file_name[table.label.isna()].iloc[0]
        raise InputError(f"{folder / first}: has no label, as other images here do; give every image one, or drop the column")
    return table


def read_table(path: Path) -> pd.DataFrame:
    """A `metadata.csv` or `metadata.jsonl`: strings `file_name` and `text`, labels as text, other columns; else `InputError`."""
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            lines = path.read_text(encoding="utf-8").split("\n")
            # Not pandas.read_json, to which 3 beside a null is 3.0 and a date-like caption may be a date.
            table = pd.DataFrame([json.loads(line) for line in lines if line.strip()], dtype=object)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not readable as a table: {error}") from None
    for column in ("file_name", "text"):
        if column not in table:
            raise InputError(f"{path}: column {column!r} is missing; found {', '.join(map(str, table.columns)) or 'none'}")
    if path.suffix == ".csv" and len(table) and not isinstance(table.index, pd.RangeIndex):
        raise InputError(f"{path}: its rows have more fields than its header; put captions that hold commas in double quotes")
    for number, row in enumerate(zip(table.file_name, table.text, strict=True), start=1):
        if not all(isinstance(value, str) for value in row):
            raise InputError(f"{path}: row {number}: file_name and text must be strings, found {row[0]!r} and {row[1]!r}")
    if "label" in table:
        table["label"] = _labels(path, table.label)
    return table


def _from_table(path: Path, found: set[str], refused: set[str]) -> pd.DataFrame:
    """The rows of a table, which must be those of the images `found`, but for images that were refused."""
    table = read_table(path)
    table["file_name"] = _as_stored(table.file_name, found)
    duplicated = table.file_name[table.file_name.duplicated()]
    if len(duplicated):
        raise InputError(f"{path}: {duplicated.iloc[0]!r} has more than one row; keep one caption an image")
    table = table[~table.file_name.isin(refused)]
    missing = sorted(set(table.file_name) - found)
    if missing:
        raise InputError(
            f"{path}: names {len(missing)} images that are not in {path.parent}, the first {missing[0]!r}; "
            "add them or remove their rows"
        )
    uncaptioned = sorted(found - set(table.file_name))
    if uncaptioned:
        raise InputError(
            f"{path}: has no row for {len(uncaptioned)} images in {path.parent}, the first {uncaptioned[0]!r}; "
            "caption them or move them away"
        )
    return table


def _as_stored(names: pd.Series, found: set[str]) -> list[str]:
    """Names as the file system has them: without "./", and in its Unicode form (macOS decomposes letters)."""
    forms = {unicodedata.normalize("NFC", name): name for name in found}
    plain = [name if name in found else str(PurePosixPath(name)) for name in names]
    return [name if name in found else forms.get(unicodedata.normalize("NFC", name), name) for name in plain]


def _labels(path: Path, labels: pd.Series) -> pd.Series:
    """Labels as text; a label here and none there is a mistake."""
    missing = labels.isna() | (labels.astype(str).str.strip() == "")
    if missing.any():
        raise InputError(f"{path}: row {int(missing.argmax()) + 1} has no label; give every image one, or drop the column")
    return labels.astype(str)


def _from_sidecars(folder: Path, found: list[str]) -> pd.DataFrame:
    captions = []
    for name in found:
        sidecar = (folder / name).with_suffix(".txt")
        try:
            captions.append(sidecar.read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            raise InputError(f"{folder / name}: has no caption file {sidecar.name} beside it, as other images here do") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{sidecar}: not UTF-8 text: {error}") from None
    return pd.DataFrame({"file_name": found, "text": captions})

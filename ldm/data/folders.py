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

from ldm.base.errors import InputError
from ldm.data.images import SUFFIXES, UNREAD, UnreadableImage

MAX_BYTES = 2**30  # of an image file
CAPTION_TABLES = ("metadata.csv", "metadata.jsonl")
PROMPTS = "prompts.csv"
LINKED_FOLDER = "a symbolic link to a folder; move the folder itself here"


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
    others: list[tuple[str, str]] = []
    for name, reason in walk(folder):
        path = PurePosixPath(name)
        if path.suffix.lower() in UNREAD:
            refused[name] = reason or f"{path.suffix} is not read; convert it to JPEG or PNG"
        elif path.suffix.lower() in SUFFIXES:
            found.append(name) if not reason else refused.update({name: reason})
        elif reason == LINKED_FOLDER:
            refused[name] = reason
        elif path.name in CAPTION_TABLES or name == PROMPTS:
            if reason:
                raise InputError(f"{folder / name}: {reason}")
            tables += [name] * (name != PROMPTS)
        else:
            others += [(name, reason)]
    found.sort()
    if not found:
        raise InputError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))}); put captioned images there")
    texts = {name for name, reason in others if name.endswith(".txt") and not reason}
    table = _captions(folder, found, tables, texts, refused)
    sidecars = {_sidecar(name) for name in found}
    ignored = Counter(PurePosixPath(name).suffix or name for name, _ in others if name not in sidecars)
    return Collection(table, [Place(folder / name) for name in table.file_name], refused, dict(sorted(ignored.items())))


def walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file that is not hidden, relative to `folder`, with the reason why it must not be opened or an empty string."""
    root = folder.resolve()

    def cannot(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it away")

    for here, folders, files in os.walk(folder, onerror=cannot):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted([*files, *(f for f in folders if os.path.islink(os.path.join(here, f)))]):
            if not name.startswith("."):
                relative = Path(here, name).relative_to(folder).as_posix()
                yield relative.encode(errors="backslashreplace").decode(), _refusal(Path(here, name), relative, root)


def _refusal(path: Path, relative: str, root: Path) -> str:
    try:
        relative.encode()
        if path.is_symlink() and path.is_dir():
            return LINKED_FOLDER
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
            return "a symbolic link that leaves the folder; move the file itself here"
        return "" if path.is_file() else "not a regular file"
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    except (OSError, RuntimeError):  # the latter: links that lead to each other
        return "a symbolic link that leads nowhere; restore its target or remove it"


def _captions(folder: Path, found: list[str], tables: list[str], texts: set[str], refused: dict[str, str]) -> pd.DataFrame:
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
    if names and (parts or any(_sidecar(name) in texts for name in names)):
        parts.append(_from_sidecars(folder, names, texts))
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
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            # Not pandas.read_json, to which 3 beside a null is 3.0 and a date-like caption may be a date.
            table = pd.DataFrame([json.loads(line) for line in lines if line.strip()], dtype=object)
            table.to_json(force_ascii=False).encode()  # half of a surrogate pair is no character
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        advice = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{path}: not readable as a table: {error}{advice}") from None
    for column in ("file_name", "text"):
        if column not in table:
            raise InputError(
                f"{path}: column {column!r} is missing; found {', '.join(map(str, table.columns)) or 'none'}: "
                "its first row must be file_name,text, separated by commas"
            )
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


def _sidecar(name: str) -> str:
    return PurePosixPath(name).with_suffix(".txt").as_posix()


def _from_sidecars(folder: Path, found: list[str], texts: set[str]) -> pd.DataFrame:
    captions = []
    for name in found:
        sidecar = folder / _sidecar(name)
        if _sidecar(name) not in texts:
            raise InputError(f"{folder / name}: has no caption file {sidecar.name} beside it, as other images here do")
        try:
            captions.append(sidecar.read_text(encoding="utf-8-sig").strip())  # Notepad begins files with a mark
        except UnicodeDecodeError as error:
            raise InputError(f"{sidecar}: not UTF-8 text: {error}") from None
        except OSError as error:
            raise InputError(f"{sidecar}: cannot be read: {error.strerror}") from None
    return pd.DataFrame({"file_name": found, "text": captions})

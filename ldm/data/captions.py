"""Captions of images, from tables, files beside the images or the names of folders. README.md has the conventions."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from ldm.base.errors import InputError
from ldm.data.conventions import BATCH_TABLE, Convention, batch_date

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # in upper or lower case
TEXTS = ("txt", "caption")  # extensions of a caption alone
EXTENSIONS = (*TEXTS, "json", "cls")  # of files that belong to the image of their name
PROMPTS = "prompts.csv"
NOT_INGESTED = "NOT_INGESTED.csv"  # in an inbox: the files that stay there, and why
ORIGINS = {
    "table": "tables",
    "file": "files of their own",
    "folder name": "folders' names",
    "none": "nowhere (data.captions: none)",
}
ORIGIN = "\0origin"  # a column, while captions are collected
MAX_TEXT = 2**20  # bytes of a caption or of an image's JSON
# What looks like captions, by its suffix, unless it is about the collection:
TEXTUAL = {".txt", ".caption", ".captions", ".cap", ".tags", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xlsx",
           ".xls", ".ods", ".xml", ".yaml", ".yml"}  # fmt: skip
ABOUT = re.compile(
    r"(read.?me|licen[sc]e|copying|notice|changelog|citation|requirements|dataset_infos?|classes|not_ingested)([\W_].*)?", re.I
)
NAMED = re.compile(r"metadata|caption|annotation|label|prompt|tags|text|description", re.I)
ADVICE = "a metadata.csv (file_name,text), a .txt file beside each image, or a subfolder for each class"


class Captions(NamedTuple):
    """A row of `table` for each image, by file name: `file_name`, `text`, maybe `label`, the further columns of tables."""

    table: pd.DataFrame
    origins: list[str]  # of each caption: table, file, folder name or none
    files: set[str]  # that were read
    deleted: int = 0  # rows of batches whose images are gone


def is_table(name: str) -> bool:
    return PurePosixPath(name).name.lower() in TABLES


def normal(name: str) -> str:
    """A file name without "./" and with composed letters: macOS decomposes them, tables rarely do."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name)))


def read_captions(
    folder: Path, images: list[str], others: Mapping[str, str], left_out: Collection[str], convention: Convention = "auto"
) -> Captions:
    """The captions of `images`, which are relative to `folder`, as are all names here.

    `others` are files that are no images, with the reason why one must not be opened, or ""; `left_out` images that are refused
    or passed over, whose captions may be there.
    Raises `InputError` for an image without a caption, a caption without an image (but in a batch, where deleting an image is
    enough), and for what looks like captions and is not used, unless `convention` says which count: "tables" or "text files"
    first, the rest from the other; or neither.
    """
    files = {name for name, reason in others.items() if not reason}
    if convention in ("folder names", "none"):
        found, tables, parts, rest, deleted = dict[str, dict[str, str]](), list[str](), list[pd.DataFrame](), sorted(images), 0
    else:
        tables = [name for name in others if is_table(name)]
        if unreadable := next((name for name in tables if others[name]), None):
            raise InputError(f"{folder / unreadable}: {others[unreadable]}")
        check_tables(folder, tables)
        found = beside(images, files)
        if convention == "text files":  # then tables have the rest; otherwise it is the other way round
            found = {name: of for name, of in found.items() if not of.keys().isdisjoint(TEXTS)}
        first = found if convention == "text files" else {}
        unread = [name for name in images if name not in first]
        parts, rest, deleted = _from_tables(folder, unread, tables, others, {*left_out, *first})
        rest = sorted({*rest, *first})
        found = {name: found[name] for name in rest if name in found}
    used = {*tables, *(file for of in found.values() for file in of.values())}
    invented = bool(rest) and not found and not tables and convention not in ("tables", "text files")
    if convention == "auto":
        _check_unused(folder, files - used, images, left_out, invented=invented)
    if invented:
        parts.append(_without_files(folder, rest, convention))
    elif rest:
        rows = [_from_files(folder, name, found.get(name), convention) for name in rest]
        parts.append(pd.DataFrame(rows, dtype=object).assign(**{ORIGIN: "file"}))
    table = pd.concat([part for part in parts if len(part)], ignore_index=True).sort_values("file_name", ignore_index=True)
    if "label" in table and table.label.isna().any():
        unlabelled = table.file_name[table.label.isna()].iloc[0]
        raise InputError(
            f"{folder / unlabelled}: has no label, as other images here do; give every image one, or drop the column"
        )
    return Captions(table, table.pop(ORIGIN).tolist(), used, deleted)


def check_tables(folder: Path, tables: list[str]) -> None:
    """Raise `InputError` if two of the caption tables, relative to `folder`, are in one folder."""
    by_place: dict[str, str] = {}
    for name in sorted(tables):
        if (other := by_place.setdefault(str(PurePosixPath(name).parent), name)) != name:
            raise InputError(f"{folder / name}: there is a {PurePosixPath(other).name} beside it; keep one of the two")


def read_table(path: Path) -> pd.DataFrame:
    """A table of captions: strings `file_name` and `text`, labels as text, further columns; raises `InputError`."""
    rows, places = list[dict[str, Any]](), list[str]()
    try:
        for where, row in _rows(path):
            row = _described(row)
            if "text" not in row and "caption" in row:
                row["text"] = row.pop("caption")
            for column in ("file_name", "text"):
                if column not in row:
                    found = ", ".join(map(str, row)) or "none"
                    raise InputError(f"{path}: {where}: column {column!r} is missing; found {found}")
            if not (isinstance(row["file_name"], str) and isinstance(row["text"], str)):
                what = f"{row['file_name']!r} and {row['text']!r}"
                raise InputError(f"{path}: {where}: file_name and text must be strings, found {what}")
            rows.append(row)
            places.append(where)
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        advice = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{path}: not readable as a table: {error}{advice}") from None
    table = pd.DataFrame(rows, columns=None if rows else ["file_name", "text"], dtype=object)
    if "label" in table:
        missing = table.label.isna() | (table.label.astype(str).str.strip() == "")
        if missing.any():
            raise InputError(f"{path}: {places[int(missing.argmax())]} has no label; give every image one, or drop the column")
        table["label"] = table.label.astype(str)
    return table


def beside(
    images: Collection[str], files: Collection[str], extensions: Collection[str] = EXTENSIONS
) -> dict[str, dict[str, str]]:
    """For each image that has any, the files of its name beside it, by extension in lower case; `InputError` for two of one."""
    by_stem: dict[str, dict[str, str]] = {}
    for name in sorted(files):
        stem, _, extension = name.rpartition(".")
        if extension.lower() in extensions:
            other = by_stem.setdefault(normal(stem), {}).setdefault(extension.lower(), name)
            if other != name:
                raise InputError(f"{name}: there is {other} beside it; keep one of the two")
    stems = {name: normal(name.rpartition(".")[0]) for name in images}
    return {name: by_stem[stem] for name, stem in stems.items() if stem in by_stem}


def caption_of(blobs: Mapping[str, bytes], where: str, convention: Convention = "auto") -> dict[str, Any]:
    """`text`, maybe `label`, and the further keys of the JSON, of the files of one image by extension; raises `InputError`."""
    texts = {part: decode(blob, f"{where}.{part}") for part, blob in blobs.items()}
    columns = _object(texts["json"], where) if "json" in texts else {}
    columns.pop("file_name", None)
    given: dict[str, Any] = {f".{part}": texts[part] for part in TEXTS if part in texts}
    in_json = {f"{key} of .json": columns.pop(key, None) for key in ("text", "caption")}
    label = texts.get("cls", columns.pop("label", None))
    if convention == "none":
        return {"text": "", **columns}
    if convention != "text files" or not given:
        given |= {name: _plain(text) if isinstance(text, str) else text for name, text in in_json.items() if text is not None}
    if not given and label is None:
        name = PurePosixPath(where).name
        raise InputError(f"{where}: has no caption; add {name}.txt, or say in data.captions where captions come from")
    (source, text), *rest = given.items() or [("label", str(label))]
    if not isinstance(text, str):
        raise InputError(f"{where}: has the caption {text!r}, which is no text")
    other = next((name for name, value in rest if value != text), None)
    if other and convention != "text files":
        advice = "keep one, or set data.captions: text files to use the text"
        raise InputError(f"{where}: {source} and {other} differ; {advice}")
    return {"text": text, **({} if label is None else {"label": str(label)}), **columns}


def decode(blob: bytes, where: str) -> str:
    """Text in UTF-8, or in UTF-16 with a mark at its start as Notepad writes it, with plain newlines; raises `InputError`."""
    if len(blob) > MAX_TEXT:
        raise InputError(f"{where}: has {len(blob):,} bytes; at most {MAX_TEXT:,} are read")
    try:
        text = blob.decode(_encoding(blob))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error}); save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{where}: holds NUL characters, as UTF-16 without a mark does; save it as UTF-8")
    return _plain(text)


def _plain(text: str) -> str:
    """With plain newlines, and without blanks around it."""
    return io.StringIO(text, newline=None).read().strip()


def _encoding(start: bytes) -> str:
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, each with its place in the file."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        try:
            rows = parquet.read_table(path).to_pylist()
        except Exception as error:  # a damaged file raises anything: OverflowError, NotImplementedError, …
            raise ValueError(" ".join(str(error).split())) from None
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", json.loads(json.dumps(row, default=_as_text))
        return
    with path.open("rb") as file:
        start = file.read(2**12)
    if b"\0" in start and _encoding(start) == "utf-8-sig":
        raise ValueError("it holds NUL characters, as UTF-16 without a mark does")
    with path.open(encoding=_encoding(start), newline="" if path.suffix.lower() == ".csv" else None) as text:
        yield from _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text)


def _as_text(value: Any) -> str:
    """Dates and decimals of a parquet table as text; bytes may be pixels."""
    if isinstance(value, bytes):
        raise ValueError("a column holds bytes; leave it out")
    return str(value)


def _csv_rows(file: io.TextIOBase) -> Iterator[tuple[str, dict[str, Any]]]:
    first = file.readline()
    file.seek(0)
    # spreadsheets of many languages write semicolons
    separator = next((mark for mark in ",;\t" if "file_name" in (name.strip(' "\r\n') for name in first.split(mark))), ",")
    csv.field_size_limit(MAX_TEXT)
    reader = csv.reader(file, delimiter=separator, strict=True)
    header = [name.strip() for name in next(reader, [])]
    while header and not header[-1]:  # spreadsheets write empty columns, too
        header.pop()
    if len(set(header)) < len(header) or "file_name" not in header or not {"text", "caption"} & set(header):
        found = ", ".join(header) or "nothing"
        raise ValueError(f"its first row must name the columns, file_name and text among them, each once; found {found}")
    try:
        for fields in filter(None, reader):
            if not any(fields[len(header) :]):
                del fields[len(header) :]
            if len(fields) != len(header):
                found = f"line {reader.line_num} has {len(fields)} fields, the first row {len(header)}"
                many = len(fields) > len(header)
                advice = "put captions that hold commas in double quotes" if many else "give every image its caption"
                raise ValueError(f"{found}: {advice}")
            yield f"line {reader.line_num}", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        advice = "" if "limit" in str(error) else '; within a quoted caption, write "" for a quote'
        raise ValueError(f"line {reader.line_num}: {error}{advice}") from None


def _json_rows(file: io.TextIOBase) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no character
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON ({error}): write one object a line, without commas between") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} holds {type(row).__name__}: write one object a line")
            yield f"line {number}", row


def _object(text: str, where: str) -> dict[str, Any]:
    """The JSON of one image."""
    try:
        columns = json.loads(text)
        json.dumps([where, columns], ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its name or JSON is damaged: {error}") from None
    if not isinstance(columns, dict):
        raise InputError(f"{where}.json holds {type(columns).__name__}, expected an object")
    return _described(columns)


def _described(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of an image without its EXIF, which has places and names."""
    return {str(key): value for key, value in columns.items() if str(key).lower() != "exif"}


def _from_tables(
    folder: Path, images: list[str], tables: list[str], others: Collection[str], left_out: Collection[str]
) -> tuple[list[pd.DataFrame], list[str], int]:
    """The rows of each table, for the images of its folder and below that no deeper table has; the images without a table; and
    how many rows of batches are passed over, as their images were deleted."""
    by_folder = {name.removesuffix(PurePosixPath(name).name): name for name in tables}
    below, rest, parts = {name: set[str]() for name in tables}, list[str](), list[pd.DataFrame]()
    for image in images:
        nearest = next((folder for folder in _prefixes(image) if folder in by_folder), None)
        if nearest is None:
            rest.append(image)
        else:
            below[by_folder[nearest]].add(image.removeprefix(nearest))
    known, without, deleted = set(images), set(map(normal, left_out)), 0
    for prefix, name in sorted(by_folder.items()):
        part, mine = read_table(folder / name), below[name]
        forms = {normal(image): image for image in mine}
        names = [n if n in mine or normal(n) in forms else n.replace("\\", "/") for n in part.file_name]  # as Windows writes them
        part["file_name"] = [n if n in mine else forms.get(normal(n), normal(n)) for n in names]
        if part.file_name.duplicated().any():
            twice = part.file_name[part.file_name.duplicated()].iloc[0]
            raise InputError(f"{folder / name}: {twice!r} has more than one row; keep one caption an image")
        part = part.loc[[normal(prefix + image) not in without for image in part.file_name]].assign(**{ORIGIN: "table"})
        if name == prefix + BATCH_TABLE and batch_date(prefix.removesuffix("/")):
            here = [prefix + image in known or prefix + image in others for image in part.file_name]
            part, deleted = part.loc[here], deleted + here.count(False)
        if missing := sorted(set(part.file_name) - mine):
            first, what = prefix + missing[0], "that are absent; add them or remove the rows"
            if near := next((image for image in mine if image.lower() == missing[0].lower()), None):
                what = f"that are absent, though {near!r} is there: names differ by upper and lower case, too"
            what = "that a table in a subfolder has too; keep one row of each" if first in known else what
            what = "that are there and are no images that are read; remove the rows" if first in others else what
            raise InputError(f"{folder / name}: names {len(missing)} images, as {missing[0]!r}, {what}")
        if missing := sorted(mine - set(part.file_name)):
            found = f"has no row for {len(missing)} images, as {missing[0]!r}"
            raise InputError(f"{folder / name}: {found}; add rows or remove the images")
        part["file_name"] = [prefix + image for image in part.file_name]
        parts.append(part)
    return parts, sorted(rest), deleted


def _prefixes(image: str) -> Iterator[str]:
    """The folders of a name, the nearest first: "a/b/" and "a/" and "" of "a/b/c.png"."""
    while "/" in image:
        image = image.rpartition("/")[0]
        yield f"{image}/"
    yield ""


def _from_files(folder: Path, image: str, files: Mapping[str, str] | None, convention: Convention) -> dict[str, Any]:
    """The caption, and the label if there is one, in the files beside an image."""
    stem = image.rpartition(".")[0]
    if not files:
        name = PurePosixPath(stem).name
        raise InputError(f"{folder / image}: has no caption: no table is for it, and no {name}.txt is beside it")
    try:
        blobs = {extension: (folder / name).read_bytes() for extension, name in files.items()}
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; make it readable") from None
    found = caption_of(blobs, str(folder / stem), convention)
    return {"file_name": image, **{key: found[key] for key in ("text", "label") if key in found}}


def _without_files(folder: Path, images: list[str], convention: Convention) -> pd.DataFrame:
    """Captions from the folders' names, which are labels too; or empty ones."""
    table = pd.DataFrame({"file_name": images})
    if convention == "none":
        return table.assign(text="", **{ORIGIN: "none"})
    if top := next((name for name in images if "/" not in name), None):
        if convention == "auto" and any("/" in name for name in images):
            why = "is in no subfolder, whose name would be its caption, as for other images here"
            raise InputError(f"{folder / top}: {why}; move it away, or add {ADVICE}")
        if convention == "auto":
            raise InputError(f"{folder}: {len(images)} images but no captions; add {ADVICE}, or set data.captions: none")
        raise InputError(f"{folder / top}: is in no subfolder, whose name would be its caption; data.captions is {convention}")
    classes = [name.rsplit("/", 2)[-2] for name in images]
    return table.assign(text=classes, label=classes, **{ORIGIN: "folder name"})


def _check_unused(folder: Path, unused: set[str], images: list[str], left_out: Collection[str], *, invented: bool) -> None:
    """Raise `InputError` for files that look like captions; if captions are `invented` from folders' names, for any text."""
    owned, others = ({normal(form) for name in of for form in (name, name.rpartition(".")[0])} for of in (images, left_out))

    def looks(name: str) -> bool:
        path = PurePosixPath(name)
        if name == PROMPTS or path.suffix.lower() not in TEXTUAL or ABOUT.fullmatch(path.stem):
            return False
        stem = normal(name.rpartition(".")[0])
        return stem in owned or (stem not in others and (invented or bool(NAMED.search(path.stem))))

    if found := sorted(filter(looks, unused)):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        way = "folder names" if invented else "tables, or text files"
        what = f"looks like captions and is not used{more}: captions come from {ADVICE}"
        raise InputError(f"{folder / found[0]}: {what}; to leave it out, move it away or set data.captions: {way}, or none")

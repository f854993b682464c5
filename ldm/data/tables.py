"""Tables of captions: CSV, JSON lines or parquet. README.md has the conventions."""

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from ldm.base.errors import InputError
from ldm.data.caption_columns import MAIN, is_for_captions, merged, take_captions, to_columns

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # in upper or lower case
MAX_TEXT = 2**20  # bytes of a caption or of an image's JSON


def is_table(name: str) -> bool:
    return PurePosixPath(name).name.lower() in TABLES


def normal(name: str) -> str:
    """A file name without "./" and with composed letters: macOS decomposes them, tables rarely do."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name)))


def check_tables(folder: Path, tables: list[str]) -> None:
    """Raise `InputError` if two of the caption tables, relative to `folder`, are in one folder."""
    by_place: dict[str, str] = {}
    for name in sorted(tables):
        if (other := by_place.setdefault(str(PurePosixPath(name).parent), name)) != name:
            raise InputError(f"{folder / name}: there is a {PurePosixPath(other).name} beside it; keep one of the two")


def read_table(path: Path) -> pd.DataFrame:
    """A table of captions: strings `file_name` and `text`, maybe `captions`, labels as text, further columns.

    Raises `InputError`. Several rows of one image are not merged (`merge_rows`).
    """
    rows, places = list[dict[str, Any]](), list[str]()
    try:
        for where, row in _rows(path):
            rows.append(_read_row(described(row), f"{path}: {where}"))
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


def _read_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    for column, there in (("file_name", "file_name" in row), ("text", any(map(is_for_captions, row)))):
        if not there:
            raise InputError(f"{where}: column {column!r} is missing; found {', '.join(row) or 'none'}")
    name = row["file_name"]
    if not isinstance(name, str):
        raise InputError(f"{where}: file_name is {name!r}; it must be a string")
    main = next((column for column in MAIN if column in row), None)  # beside a text, a caption is a further column
    first, further = take_captions(row, [main] if main else [], f"{where}: {name!r}")
    captions = [*(first[main] if main else []), *further]
    if not captions:
        raise InputError(f"{where}: {name!r} has no caption; write one, an empty one if it has none")
    return row | to_columns(captions)


def merge_rows(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table with one row for each image, where that has all captions of the image's rows; `InputError` if labels differ."""
    if not table.file_name.duplicated().any():
        return table
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        rows.setdefault(row["file_name"], []).append({str(column): value for column, value in row.items()})
    return pd.DataFrame([merged(same, f"{where}: {name!r}") for name, same in rows.items()], dtype=object)


def plain(text: str) -> str:
    """With plain newlines, and without blanks around it."""
    return io.StringIO(text, newline=None).read().strip()


def encoding(start: bytes) -> str:
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def described(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of an image without its EXIF, which has places and names."""
    return {str(key): value for key, value in columns.items() if str(key).lower() != "exif"}


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
    if b"\0" in start and encoding(start) == "utf-8-sig":
        raise ValueError("it holds NUL characters, as UTF-16 without a mark does")
    with path.open(encoding=encoding(start), newline="" if path.suffix.lower() == ".csv" else None) as text:
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
    if len(set(header)) < len(header) or "file_name" not in header or not any(map(is_for_captions, header)):
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

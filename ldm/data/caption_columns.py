"""Several captions of one image: the columns that hold them, in a table, in an image's JSON and in a sample."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ldm.base.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

MAIN = ("text", "caption")  # columns of a caption, or of a list of them
FURTHER = "captions"  # the column of all captions of an image that has several
NUMBERED = re.compile(r"(?:text|caption)_(\d+)", re.ASCII)  # columns of one caption each
SHOWN = 60  # characters of what is no caption


def all_captions(row: Mapping[Any, Any]) -> list[str]:
    """Every caption of an image, `text` first, from a row of a caption table or the `meta` of a sample with its `text`."""
    several = row.get(FURTHER)  # NaN in a table whose other rows have several
    return several if isinstance(several, list) else [row["text"]]


def captions_in(table: "DataFrame") -> list[list[str]]:
    """`all_captions` of every row of a caption table."""
    return [all_captions(row) for row in table.filter(["text", FURTHER]).to_dict("records")]


def to_columns(captions: Iterable[str]) -> dict[str, Any]:
    """`text`, and `captions` if there are several: each once, and no empty one beside others."""
    distinct = list(dict.fromkeys(captions))
    distinct = list(filter(str.strip, distinct)) or distinct[:1]
    return {"text": distinct[0], **({FURTHER: distinct} if len(distinct) > 1 else {})}


def is_for_captions(column: str) -> bool:
    return column in (*MAIN, FURTHER) or NUMBERED.fullmatch(column) is not None


def take_captions(columns: dict[str, Any], main: Iterable[str], where: str) -> tuple[dict[str, list[str]], list[str]]:
    """Remove the captions from the columns of an image: those of each column in `main`; those of `captions` and of the numbered
    columns, by their numbers, as one list. Raises `InputError` for what is no text and for an empty list.
    """
    numbered = sorted((int(found[1]), column) for column in columns if (found := NUMBERED.fullmatch(column)))
    names = [FURTHER, *(column for _, column in numbered)]
    first = {column: _texts(columns.pop(column), column, where) for column in main if column in columns}
    further = [text for column in names if column in columns for text in _texts(columns.pop(column), column, where)]
    return first, further


def _texts(value: Any, column: str, where: str) -> list[str]:
    if is_missing(value):
        return []
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: {column} is {repr(value)[:SHOWN]}; a caption is a string, several are a list of strings")
    return texts


def is_missing(value: Any) -> bool:
    return value is None or value != value  # NaN, as in a table whose other rows have a value


def merged(rows: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """One row of several for one image, with all their captions. Of a further column, the first value counts.

    Raises `InputError` if their labels differ.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows if not is_missing(row.get("label"))))
    if len(labels) > 1:
        raise InputError(f"{where}: has the labels {labels[0]!r} and {labels[1]!r} in rows of one image; keep one label")
    first: dict[str, Any] = {}
    for row in rows:
        first |= {column: value for column, value in row.items() if is_missing(first.get(column))}
    first.pop(FURTHER, None)
    return first | to_columns(text for row in rows for text in all_captions(row))

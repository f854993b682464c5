"""Captions of images, from tables, files beside the images or the names of folders. README.md has the conventions."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from ldm.base.errors import InputError
from ldm.data.caption_columns import FURTHER, MAIN, is_for_captions, take_captions, to_columns
from ldm.data.conventions import BATCH_TABLE, Convention, batch_date
from ldm.data.tables import MAX_TEXT, check_tables, described, encoding, is_table, merge_rows, normal, plain, read_table

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
# What looks like captions, by its suffix, unless it is about the collection:
TEXTUAL = {".txt", ".caption", ".captions", ".cap", ".tags", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xlsx",
           ".xls", ".ods", ".xml", ".yaml", ".yml"}  # fmt: skip
ABOUT = re.compile(
    r"(read.?me|licen[sc]e|copying|notice|changelog|citation|requirements|dataset_infos?|classes|not_ingested)([\W_].*)?", re.I
)
NAMED = re.compile(r"metadata|caption|annotation|label|prompt|tags|text|description", re.I)
ADVICE = "a metadata.csv (file_name,text), a .txt file beside each image, or a subfolder for each class"


class Captions(NamedTuple):
    """A row of `table` for each image, by file name: `file_name`, `text`, maybe `label`, the further columns of tables.

    `text` is the first caption; `captions` is a list of all where there are several, and NaN elsewhere.
    """

    table: pd.DataFrame
    origins: list[str]  # of the captions of each image: table, file, folder name or none
    files: set[str]  # that were read
    deleted: int = 0  # rows of batches whose images are gone


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
    """`text`, maybe `captions` and `label`, and the further keys of the JSON, of the files of one image by extension.

    Raises `InputError`. Of several places that say one caption each, all must say the same; lists of captions are added to it.
    """
    texts = {part: decode(blob, f"{where}.{part}") for part, blob in blobs.items()}
    columns = _object(texts["json"], where) if "json" in texts else {}
    columns.pop("file_name", None)
    label = texts.get("cls", columns.pop("label", None))
    given = {f".{part}": [texts[part]] for part in TEXTS if part in texts}
    further = list[str]()
    if convention == "text files" and given:
        given = dict([next(iter(given.items()))])
    elif convention != "none":
        in_json, further = take_captions(columns, MAIN, f"{where}.json")
        given |= {f"{column} of .json": list(map(plain, found)) for column, found in in_json.items() if found}
    columns = {column: value for column, value in columns.items() if not is_for_captions(column)}
    if convention == "none":
        return {"text": "", **columns}
    _check_agreement(given, where)
    captions = [*chain(*given.values()), *map(plain, further)]
    if not captions and label is None:
        name = PurePosixPath(where).name
        raise InputError(f"{where}: has no caption; add {name}.txt, or say in data.captions where captions come from")
    return to_columns(captions or [str(label)]) | ({} if label is None else {"label": str(label)}) | columns


def _check_agreement(given: Mapping[str, list[str]], where: str) -> None:
    single = {source: texts[0] for source, texts in given.items() if len(texts) == 1}
    differ = [source for source, text in single.items() if text != next(iter(single.values()))]
    if differ:
        advice = "keep one, or set data.captions: text files to use the text"
        raise InputError(f"{where}: {next(iter(single))} and {differ[0]} differ; {advice}")


def decode(blob: bytes, where: str) -> str:
    """Text in UTF-8, or in UTF-16 with a mark at its start as Notepad writes it, with plain newlines; raises `InputError`."""
    if len(blob) > MAX_TEXT:
        raise InputError(f"{where}: has {len(blob):,} bytes; at most {MAX_TEXT:,} are read")
    try:
        text = blob.decode(encoding(blob))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error}); save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{where}: holds NUL characters, as UTF-16 without a mark does; save it as UTF-8")
    return plain(text)


def _object(text: str, where: str) -> dict[str, Any]:
    """The JSON of one image."""
    try:
        columns = json.loads(text)
        json.dumps([where, columns], ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its name or JSON is damaged: {error}") from None
    if not isinstance(columns, dict):
        raise InputError(f"{where}.json holds {type(columns).__name__}, expected an object")
    return described(columns)


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
        part = merge_rows(part, str(folder / name))
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
    return {"file_name": image, **{key: found[key] for key in ("text", FURTHER, "label") if key in found}}


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

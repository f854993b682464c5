"""Several captions of one image are all kept, wherever they are written, up to the reader of shards and through ingest."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from image_folders import OPTIONS, make_folder, numbered
from PIL import Image

from ldm.base.errors import InputError
from ldm.data import open_shards, write_shards
from ldm.data.caption_columns import all_captions, captions_in
from ldm.data.folders import read_folder
from ldm.data.inspect import inspect
from ldm.data.reader import SPLITS

COUNT = 40
NAMES = numbered(COUNT)


def several(number: int) -> list[str]:
    """One, two or three captions, with what tables have to quote."""
    return [f"{number}: one", f'{number}, "two"\nof two lines', f"{number}; drei – ä"][: 1 + number % 3]


EXPECTED = {name: several(number) for number, name in enumerate(NAMES)}


def as_table(folder: Path, rows: list[dict[str, Any]], name: str = "metadata.jsonl") -> None:
    table = pd.DataFrame(rows, dtype=object)
    if name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif name.endswith(".csv"):
        table.to_csv(folder / name, index=False)
    else:
        table.to_parquet(folder / name)


def lists_in(column: str, name: str = "metadata.jsonl") -> Callable[[Path], None]:
    return lambda folder: as_table(folder, [{"file_name": image, column: texts} for image, texts in EXPECTED.items()], name)


def text_and(rest: Callable[[list[str]], dict[str, Any]], name: str) -> Callable[[Path], None]:
    """The first caption as `text`, the others in further columns."""
    rows = [{"file_name": image, "text": texts[0], **rest(texts[1:])} for image, texts in EXPECTED.items()]
    return lambda folder: as_table(folder, rows, name)


def columns_from(first: int, prefix: str = "caption") -> Callable[[list[str]], dict[str, str]]:
    return lambda texts: {f"{prefix}_{first + place}": text for place, text in enumerate(texts)}


def numbered_alone(name: str) -> Callable[[Path], None]:
    """In the order of numbers, not of columns or letters."""
    rows = []
    for image, texts in EXPECTED.items():
        row = {f"caption_{8 + place}": text for place, text in enumerate(texts)}
        rows.append({"file_name": image} | {column: row.get(column) for column in ("caption_10", "caption_9", "caption_8")})
    return lambda folder: as_table(folder, rows, name)


def repeated(folder: Path) -> None:
    rows = [{"file_name": image, "text": text, "label": "x", "n": 1} for image, texts in EXPECTED.items() for text in texts]
    as_table(folder, sorted(rows, key=lambda row: row["text"].rpartition(":")[2]) + rows[:1], "metadata.csv")  # apart


def beside(content: Callable[[list[str]], Any], text: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for image, texts in EXPECTED.items():
            (folder / image).with_suffix(".json").write_text(json.dumps(content(texts)))
            if text:
                (folder / image).with_suffix(".txt").write_text(texts[0])

    return make


def in_tar(content: Callable[[list[str]], Any], text: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        beside(content, text)(folder)
        with tarfile.open(folder / "0.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                if path.suffix != ".tar":
                    tar.add(path, path.name)
                    path.unlink()

    return make


SOURCES: dict[str, Callable[[Path], None]] = {
    **{f"a list in {column} of JSON lines": lists_in(column) for column in ("text", "caption", "captions")},
    "a list of parquet": lists_in("text", "metadata.parquet"),
    "captions beside text": text_and(lambda rest: {"captions": rest} if rest else {}, "metadata.jsonl"),
    "numbered beside text, CSV": text_and(columns_from(2), "metadata.csv"),
    "numbered beside text, JSON lines": text_and(columns_from(1, "text"), "metadata.jsonl"),
    "numbered, CSV": numbered_alone("metadata.csv"),
    "numbered, JSON lines": numbered_alone("metadata.jsonl"),
    "numbered, parquet": numbered_alone("metadata.parquet"),
    "repeated rows": repeated,
    "a list in JSON beside": beside(lambda texts: {"caption": texts}),
    "numbered in JSON beside": beside(lambda texts: {"text": texts[0], **columns_from(1)(texts[1:])}),
    ".txt and captions of JSON": beside(lambda texts: {"captions": texts}, text=True),
    "a list in a tar": in_tar(lambda texts: {"text": texts}),
    ".txt and captions of JSON in a tar": in_tar(lambda texts: {"captions": texts, "n": 1}, text=True),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    make_folder(tmp_path / "source", NAMES)
    (tmp_path / "source/metadata.csv").unlink()
    return tmp_path / "source"


@pytest.mark.parametrize("source", SOURCES)
def test_all_captions_reach_the_reader(source: str, images: Path, tmp_path: Path) -> None:
    SOURCES[source](images)
    given = list[str]()
    index = write_shards(images, tmp_path / "shards", **OPTIONS, check_captions=given.extend)
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        reader = open_shards(tmp_path / "shards", split)
        rows = reader.captions.to_dict("records")
        for i in range(len(reader)):
            sample = reader[i]
            name = sample.meta["file_name"].removeprefix("0.tar/")
            found[name] = all_captions({"text": sample.text} | sample.meta)
            assert all_captions(rows[i]) == found[name] and sample.text == rows[i]["text"] == found[name][0]
            assert ("captions" in sample.meta) == (len(found[name]) > 1)
            assert not [column for column in sample.meta if column.startswith(("caption_", "text_"))]
        assert captions_in(reader.captions) == [all_captions(row) for row in rows]
        assert captions_in(reader.captions_of(range(1, len(reader), 3))) == captions_in(reader.captions)[1::3]
    assert found == EXPECTED
    every = [text for texts in EXPECTED.values() for text in texts]
    assert sorted(given) == sorted(every)
    captions = index["captions"]
    assert (captions["distinct"], captions["several"], captions["empty"]) == (len(every), sum(n % 3 > 0 for n in range(COUNT)), 0)
    lengths = [*map(len, every)]
    characters = f"{min(lengths)} to {max(lengths)}, median {np.median(lengths):.0f} characters"
    for folder in (images, tmp_path / "shards"):
        said = dict(inspect(folder).summary())["captions"]
        assert f"{len(every)} distinct, 0 empty; {captions['several']} images have several; {characters}" in said


def one(folder: Path, files: dict[str, Any]) -> list[str]:
    """All captions of `a.png` beside these files."""
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    row = read_folder(folder).table.iloc[0]
    return all_captions(row)


ROW = {"file_name": "a.png"}
KEPT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a list of one": ({"metadata.jsonl": ROW | {"text": ["x"]}}, ["x"]),
    "the same twice": ({"metadata.jsonl": ROW | {"text": ["x", "y", "x"], "caption_1": "y"}}, ["x", "y"]),
    "empty ones beside others": ({"metadata.csv": 'file_name,text,caption_1,caption_2\na.png,,"  ",y\n'}, ["y"]),
    "empty ones alone": ({"metadata.csv": "file_name,text_1,text_2\na.png,,\n"}, [""]),
    "caption beside text is another column": ({"metadata.jsonl": ROW | {"text": "x", "caption": 7}}, ["x"]),
    "null beside a list": ({"metadata.jsonl": ROW | {"text": None, "captions": ["x", "y"]}}, ["x", "y"]),
    "one string, and lists": ({"a.txt": "x", "a.json": {"text": ["y", "z"], "caption": "x"}}, ["x", "y", "z"]),
    "blanks around those of JSON": ({"a.json": {"text": [" x", "y\r\nz "]}}, ["x", "y\nz"]),
    "lines of .txt": ({"a.txt": "x\ny"}, ["x\ny"]),
    "names of one form": ({"metadata.csv": "file_name,text\na.png,x\n./a.png,y\n"}, ["x", "y"]),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_which_captions_an_image_has(case: str, tmp_path: Path) -> None:
    files, expected = KEPT[case]
    assert one(tmp_path, files) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an empty list": ({"metadata.jsonl": ROW | {"text": []}}, r"metadata\.jsonl: line 1: 'a\.png': text is \[\]; a caption is a"),
    "a list with a number": ({"metadata.jsonl": ROW | {"captions": ["x", 3]}}, r"line 1: 'a\.png': captions is \['x', 3\]; a"),
    "a list with null": ({"metadata.jsonl": ROW | {"caption": ["x", None]}}, r"line 1: 'a\.png': caption is \['x', None\]; a"),
    "a numbered number": ({"metadata.jsonl": ROW | {"text": "x", "text_1": 3}}, r"line 1: 'a\.png': text_1 is 3; a caption is"),
    "a list of lists": ({"metadata.jsonl": ROW | {"text": [["x"]]}}, r"text is \[\['x'\]\]; a caption is a string, several are"),
    "an empty list in JSON": ({"a.json": {"captions": []}}, r"a\.json: captions is \[\]; a caption is a string, several are a"),
    "an object in JSON": ({"a.json": {"text": {"en": "x"}}}, r"a\.json: text is {'en': 'x'}; a caption is a string, several"),
    "strings that differ": ({"a.txt": "x", "a.json": {"text": "y", "captions": ["x"]}}, r"a: \.txt and text of \.json differ"),
    "labels that differ": (
        {"metadata.csv": "file_name,text,label\na.png,x,cat\na.png,y,dog\n"},
        r"metadata\.csv: 'a\.png': has the labels 'cat' and 'dog' in rows of one image; keep one label",
    ),
    "no caption but null": ({"metadata.jsonl": ROW | {"text_1": None}}, r"line 1: 'a\.png' has no caption; write one, an empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_caption_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    files, says = REFUSED[case]
    with pytest.raises(InputError, match=says) as error:
        one(tmp_path, files)
    assert "\n" not in str(error.value)


def test_of_repeated_rows_the_first_value_of_a_further_column_counts(tmp_path: Path) -> None:
    rows = [{"text": "x", "n": None}, {"text": "y", "n": 3, "m": "first"}, {"text": "z", "n": 4, "m": "later"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(ROW | row) for row in rows))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert read_folder(tmp_path).table.to_dict("records") == [
        {"file_name": "a.png", "text": "x", "captions": ["x", "y", "z"], "n": 3, "m": "first"}
    ]


@pytest.mark.parametrize("convention", ["text files", "none"])
def test_captions_that_are_not_meant_are_left_out(convention: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.json").write_text(json.dumps({"captions": 5, "text_2": "y"}))
    table = read_folder(tmp_path, convention).table
    assert captions_in(table) == [["x"] if convention == "text files" else [""]] and "captions" not in table

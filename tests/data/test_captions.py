"""Captions are never lost, invented or cut in silence: every convention, what looks like one, and every encoding."""

import io
import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from ldm.base.errors import InputError
from ldm.data.folders import read_folder
from ldm.data.inspect import inspect
from ldm.data.shards import read_collection

TABLE = "file_name,text\na.png,one\nb.png,two\n"
ROWS = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"}]
CAPTIONS = {"cat/a.png": "one", "cat/b.png": "two"}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)

Files = dict[str, str | bytes]


def put(folder: Path, files: Files) -> Path:
    """Two images in the folder `cat`, and further files."""
    for number, name in enumerate(("a.png", "b.png")):
        (folder / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / "cat" / name)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def beside(suffix: str, *texts: str, encoding: str = "utf-8") -> Files:
    return {f"cat/{name}{suffix}": text.encode(encoding) for name, text in zip("ab", texts, strict=True)}


def table_of_parquet(**columns: list[Any]) -> bytes:
    blob = io.BytesIO()
    pd.DataFrame(ROWS).assign(**columns).to_parquet(blob)
    return blob.getvalue()


def png() -> bytes:
    blob = io.BytesIO()
    Image.new("RGB", (4, 4)).save(blob, "PNG")
    return blob.getvalue()


PNG = png()


# what is read

READ: dict[str, tuple[Files, str]] = {
    "table": ({"cat/metadata.csv": TABLE}, "table"),
    "table in capitals": ({"cat/Metadata.CSV": TABLE}, "table"),
    "table by Excel in German": ({"cat/metadata.csv": TABLE.replace(",", ";")}, "table"),
    "table with tabs": ({"cat/metadata.csv": TABLE.replace(",", "\t")}, "table"),
    "table with a mark": ({"cat/metadata.csv": TABLE.encode("utf-8-sig")}, "table"),
    "table in UTF-16": ({"cat/metadata.csv": TABLE.encode("utf-16")}, "table"),
    "table with spaces in its head": ({"cat/metadata.csv": TABLE.replace("e,t", "e, t")}, "table"),
    "table of Windows": ({"metadata.csv": "file_name,text\r\ncat\\a.png,one\r\n.\\cat\\b.png,two\r\n"}, "table"),
    "table with empty columns": ({"cat/metadata.csv": TABLE.replace("\n", ",,\n")}, "table"),
    "table with blank lines": ({"cat/metadata.csv": TABLE.replace("\n", "\n\n")}, "table"),
    "table that says caption": ({"cat/metadata.csv": TABLE.replace("text", "caption")}, "table"),
    "table of JSON lines": ({"cat/metadata.jsonl": LINES}, "table"),
    "JSON lines of Windows": ({"cat/metadata.jsonl": LINES.replace("\n", "\r\n").encode("utf-8-sig")}, "table"),
    "JSON lines in UTF-16": ({"cat/METADATA.JSONL": LINES.encode("utf-16")}, "table"),
    ".txt": (beside(".txt", "one", "two"), "file"),
    ".TXT": (beside(".TXT", "one", "two"), "file"),
    ".caption": (beside(".caption", "one", "two"), "file"),
    ".json": (beside(".json", '{"caption": "one", "n": 1}', '{"text": "two"}'), "file"),
    ".txt and .json that agree": (beside(".txt", "one", "two") | beside(".json", '{"caption": "one"}', '{"score": 1}'), "file"),
    ".json with blanks and newlines": (beside(".txt", "one ", "two\n") | beside(".json", '{"text": " one\\r\\n"}', "{}"), "file"),
    ".json of which the caption is null": (beside(".txt", "one", "two") | beside(".json", '{"caption": null}', "{}"), "file"),
    "classes beside .txt": (beside(".txt", "one", "two") | {"classes.txt": "cat", "README_en.txt": "x"}, "file"),
    "one .txt and one .caption": ({"cat/a.txt": "one", "cat/b.caption": "two"}, "file"),
    "Notepad's mark and newlines": (beside(".txt", "one\r\n", "two\r\n", encoding="utf-8-sig"), "file"),
    "UTF-16 with a mark": (beside(".txt", "one", "two", encoding="utf-16"), "file"),
    ".txt, and notes about the collection": (beside(".txt", "one", "two") | {"README.txt": "x", "list.csv": "x"}, "file"),
    ".txt, and one of an image that was deleted": (beside(".txt", "one", "two") | {"cat/c.txt": "three"}, "file"),
    ".txt, also of an image that is refused": (beside(".txt", "one", "two") | {"cat/c.heic": "x", "cat/c.txt": "three"}, "file"),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_is_unambiguous_is_read(case: str, tmp_path: Path) -> None:
    files, origin = READ[case]
    found = read_folder(put(tmp_path, files))
    assert dict(zip(found.table.file_name, found.table.text, strict=True)) == CAPTIONS
    assert found.origins == [origin, origin]


def test_a_table_of_parquet_keeps_further_columns(tmp_path: Path) -> None:
    days, costs = [date(2026, 1, 2), date(2026, 3, 4)], [Decimal("1.50"), None]
    put(tmp_path, {"cat/metadata.parquet": table_of_parquet(width=[3, 4], day=days, cost=costs, exif=["48 N", "11 E"])})
    rows = read_folder(tmp_path).table.to_dict("records")
    assert rows[0] == {"file_name": "cat/a.png", "text": "one", "width": 3, "day": "2026-01-02", "cost": "1.50"}  # no EXIF
    assert json.dumps(rows[1])


def test_folders_names_are_captions_where_nothing_else_is(tmp_path: Path) -> None:
    found = read_folder(
        put(tmp_path, {"README.md": "x", "LICENSE.txt": "x", "dataset_info.json": "{}", "prompts.csv": "text,label\n"})
    )
    assert found.table.text.tolist() == found.table.label.tolist() == ["cat", "cat"] and found.origins == ["folder name"] * 2


# what stops

STOPS: dict[str, tuple[Files, str]] = {
    "captions.json": ({"cat/captions.json": "{}"}, r"cat/captions\.json: looks like captions .* data\.captions: folder names"),
    "captions.txt": ({"captions.txt": "a.png one"}, r"captions\.txt: looks like captions"),
    "metadata.json": ({"cat/metadata.json": json.dumps(ROWS)}, r"metadata\.json: looks like captions"),
    "metadata.xlsx": ({"metadata.xlsx": b"PK"}, r"metadata\.xlsx: looks like captions"),
    "labels.csv": ({"labels.csv": "a,b"}, r"labels\.csv: looks like captions"),
    "a.png.txt": ({"cat/a.png.txt": "one", "cat/b.png.txt": "two"}, r"a\.png\.txt: looks .* \(and 1 more\)"),
    "a.tags": ({"cat/a.tags": "one"}, r"a\.tags: looks like captions"),
    "any text where captions would be invented": ({"cat/1.txt": "one"}, r"1\.txt: looks like captions"),
    "a table, and a .txt of an image": ({"cat/metadata.csv": TABLE, "cat/a.txt": "x"}, r"a\.txt: looks .*captions: tables"),
    "a table, and captions.jsonl": ({"cat/metadata.csv": TABLE, "captions.jsonl": ""}, r"captions\.jsonl: looks like captions"),
    ".txt here and nothing there": ({"cat/a.txt": "one"}, r"b\.png: has no caption: no table is for it, and no b\.txt"),
    ".json without a caption": (beside(".json", '{"n": 1}', '{"n": 2}'), r"cat/a: has no caption; add a\.txt"),
    ".txt and .json that differ": ({"cat/a.txt": "one", "cat/a.json": '{"text": "1"}'}, r"\.txt and text of \.json differ"),
    ".txt and .caption that differ": (beside(".txt", "one", "two") | {"cat/a.caption": "1"}, r"\.txt and \.caption differ"),
    ".txt and .TXT": (beside(".txt", "one", "two") | {"cat/a.TXT": "1"}, r"cat/a\.txt: there is cat/a\.TXT beside it"),
    "a.png.txt, and images in no folder": ({"cat/a.png.txt": "one", "top.png": PNG}, r"a\.png\.txt: looks like captions"),
    "a table of bytes": ({"cat/metadata.parquet": table_of_parquet(raw=[b"x", b"y"])}, "a column holds bytes"),
    "two tables": ({"cat/metadata.csv": TABLE, "cat/metadata.jsonl": LINES}, r"there is a metadata\.csv beside it"),
    "two tables by case": ({"cat/metadata.csv": TABLE, "cat/Metadata.csv": TABLE}, r"metadata\.csv: there is a Metadata\.csv"),
    "UTF-16 without a mark": (beside(".txt", "one", "two", encoding="utf-16-le"), r"a\.txt: holds NUL"),
    "a table in UTF-16 without a mark": ({"cat/metadata.csv": TABLE.encode("utf-16-le")}, "holds NUL"),
    "Latin-1": (beside(".txt", "ü", "é", encoding="latin-1"), r"a\.txt: not UTF-8 text"),
    "a table in Latin-1": ({"cat/metadata.csv": TABLE.replace("one", "é").encode("latin-1")}, "save it as UTF-8"),
    "a row without a comma": ({"cat/metadata.csv": TABLE + "c.png\n"}, "line 4 has 1 fields, .*: give every image"),
    "backslashes before quotes": ({"cat/metadata.csv": TABLE + 'c.png,"a \\"red\\" cat"\n'}, 'line 4: .* write "" for a quote'),
    "an open quote": ({"cat/metadata.csv": TABLE + 'c.png,"a red cat\n'}, "line 4: unexpected end of data"),
    "columns of other names": ({"cat/metadata.csv": "Dateiname;Text\na.png;x\n"}, "must name the columns, file_name and text"),
    "a name in other letters": ({"cat/metadata.csv": TABLE.replace("a.png", "A.PNG")}, "though 'a.png' is there"),
    "a column twice": ({"cat/metadata.csv": "file_name,text,text\na.png,1,2\n"}, "each once; found file_name, text, text"),
    "commas between JSON lines": ({"cat/metadata.jsonl": LINES.replace("\n", ",\n")}, "line 1 is no JSON .* without commas"),
    "a JSON array": ({"cat/metadata.jsonl": json.dumps(ROWS)}, "line 1 holds list: write one object a line"),
    "a row for an image of another table": (
        {"metadata.csv": "file_name,text\ncat/a.png,x\n", "cat/metadata.csv": TABLE}, "'cat/a.png', that a table in a subfolder"
    ),
    "a row for what is no image": ({"metadata.csv": "file_name,text\ncat/c.mp4,x\n", "cat/c.mp4": "x"}, "are no images"),
    "an image's file that is a table": ({"cat/metadata.parquet": b"no parquet"}, r"metadata\.parquet: not readable as a table"),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_what_is_ambiguous_or_damaged_stops_with_one_line(case: str, tmp_path: Path) -> None:
    files, says = STOPS[case]
    with pytest.raises(InputError, match=says) as error:
        read_folder(put(tmp_path, files))
    assert str(tmp_path) in str(error.value) or case == ".txt and .TXT"
    assert "\n" not in str(error.value)


# `data.captions`: what is meant

EVERYTHING: Files = {
    "cat/metadata.csv": TABLE,
    **beside(".txt", "1", "2"),
    **beside(".json", '{"text": "A"}', "{}"),
    "captions.json": "",
}
MEANT: dict[str, tuple[list[str], str]] = {
    "tables": (["one", "two"], "table"), "text files": (["1", "2"], "file"),
    "folder names": (["cat", "cat"], "folder name"), "none": (["", ""], "none"),
}  # fmt: skip


@pytest.mark.parametrize("convention", MEANT)
def test_a_convention_that_is_named_is_the_one_used(convention: Any, tmp_path: Path) -> None:
    put(tmp_path, EVERYTHING)
    with pytest.raises(InputError, match="looks like captions"):
        read_folder(tmp_path)
    found = read_folder(tmp_path, convention)
    texts, origin = MEANT[convention]
    assert found.table.text.tolist() == texts and found.origins == [origin, origin]
    assert ("label" in found.table) == (convention == "folder names")
    counted = inspect(tmp_path, captions=convention)
    assert counted.origins == {origin: 2} and counted.images.text.tolist() == texts


@pytest.mark.parametrize("convention", ["tables", "text files", "folder names"])
def test_a_convention_that_is_named_holds_for_every_image(convention: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(put(tmp_path, {}) / "top.png")
    with pytest.raises(InputError, match=r"a\.png: has no caption: no table|top\.png: is in no subfolder"):
        read_folder(tmp_path, convention)


@pytest.mark.parametrize("convention", ["tables", "text files"])
def test_tables_and_text_files_may_stand_side_by_side(convention: Any, tmp_path: Path) -> None:
    """As in a collection with text files after its first ingest, whose batches have tables."""
    put(tmp_path, beside(".txt", "one", "two") | {"2026-01-01/metadata.csv": "file_name,text\nc.png,three\n"})
    (tmp_path / "2026-01-01/c.png").write_bytes(PNG)
    (tmp_path / "sample_prompts.txt").write_text("of another tool")
    with pytest.raises(InputError, match=r"sample_prompts\.txt: looks like captions"):
        read_folder(tmp_path)
    found = read_folder(tmp_path, convention)
    assert found.table.text.tolist() == ["three", "one", "two"] and found.origins == ["table", "file", "file"]


def test_of_two_texts_the_first_kind_counts_if_text_files_are_meant(tmp_path: Path) -> None:
    put(tmp_path, beside(".txt", "1girl, red hair", "tags") | beside(".caption", "a girl", "x") | beside(".cls", "p", "q"))
    found = read_folder(tmp_path, "text files")
    assert found.table.text.tolist() == ["1girl, red hair", "tags"] and found.table.label.tolist() == ["p", "q"]


def test_a_stray_picture_beside_classes_is_named(tmp_path: Path) -> None:
    (put(tmp_path, {}) / "cover.png").write_bytes(PNG)
    with pytest.raises(InputError, match=r"cover\.png: is in no subfolder, .* as for other images here; move it away"):
        read_folder(tmp_path)


def test_without_captions_a_folder_needs_none(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"1 images but no captions; add .* or set data\.captions: none"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, "none").table.to_dict("records") == [{"file_name": "a.png", "text": ""}]


# what systems leave, and where nothing is read

LEFT = (
    "cat/@eaDir/a.png", "__MACOSX/cat/._a.png", "cat/._a.png", "cat/Thumbs.db", "#recycle/a.png", ".thumbnails/a.jpg",
    "$RECYCLE.BIN/a.png", "cat/desktop.ini", "@Recycle/a.gif", "System Volume Information/a.png", "cat/Icon\r",
)  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_systems_leave_is_passed_over_and_counted(name: str, tmp_path: Path) -> None:
    found = read_folder(put(tmp_path, {name: b"x"}))
    assert len(found.table) == 2 and not found.refused
    what = next((part for part in name.split("/") if part[0] in "@_#$SIT" or part == "desktop.ini"), "hidden")
    assert found.ignored == {what: 1}


NOTHING = {
    "HEIC": (
        {f"{n}.heic": b"x" for n in range(24)},
        r"holds no images that are read; 24 refused: \.heic is not read; convert it",
    ),
    "a zip": ({"pictures.zip": b"PK"}, r"holds no images that are read; 1 passed over: \.zip"),
    "thumbnails alone": ({"@eaDir/a.png": b"x"}, r"1 passed over: @eaDir"),
    "nothing": ({".keep": b""}, r"put captioned images there"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_where_nothing_is_read_the_reasons_are_counted(case: str, tmp_path: Path) -> None:
    files, says = NOTHING[case]
    for name, blob in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(blob)
    with pytest.raises(InputError, match=says):
        read_collection(tmp_path)


def test_links_out_of_the_folder_alone_are_counted_too(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", {})
    (tmp_path / "mine").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "mine" / name).symlink_to(tmp_path / "elsewhere/cat" / name)
    with pytest.raises(InputError, match="2 refused: a symbolic link that leaves the folder"):
        read_folder(tmp_path / "mine")


@pytest.mark.parametrize("store", [".dvc/cache/files/md5", "of DVC 2/cache", "hub/blobs"])
def test_links_into_a_cache_by_content_are_files(store: str, tmp_path: Path) -> None:
    """DVC's with `cache.type symlink`, and the Hugging Face hub's."""
    mine = put(tmp_path / "mine", {"cat/metadata.csv": TABLE})
    for number, path in enumerate(sorted((mine / "cat").iterdir())):
        name = f"{number}" * 40 if store.endswith("blobs") else f"ab/{number}" + "0" * 29
        (tmp_path / store / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / store / name)
        path.symlink_to(tmp_path / store / name)
    found = read_folder(mine)
    assert dict(zip(found.table.file_name, found.table.text, strict=True)) == CAPTIONS and not found.refused

"""Folders of captioned images: conventions, complaints, links and names."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from ldm.base.errors import InputError
from ldm.data.folders import MAX_BYTES, Place, read_folder
from ldm.data.images import UnreadableImage


def put(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name)


# which images there are and what their captions say


def test_metadata_csv_keeps_further_columns_and_sorts_by_file_name(tmp_path: Path) -> None:
    put(tmp_path, "b c.png", "a.JPG", "sub/ü.webp")
    (tmp_path / "metadata.csv").write_text('file_name,text,label\nsub/ü.webp,"one, two",01\na.JPG,NA,NA\nb c.png,"new\nline",x\n')
    table = read_folder(tmp_path).table
    assert table.to_dict("records") == [
        {"file_name": "a.JPG", "text": "NA", "label": "NA"},
        {"file_name": "b c.png", "text": "new\nline", "label": "x"},
        {"file_name": "sub/ü.webp", "text": "one, two", "label": "01"},
    ]


def test_metadata_jsonl_keeps_types_but_makes_labels_text(tmp_path: Path) -> None:
    """`prompts.csv` and class folders have text labels, and 3 is not "3"."""
    put(tmp_path, "a.png", "b.png")
    first, second = {"file_name": "b.png", "text": "2020"}, {"file_name": "a.png", "text": "x\u2028y"}
    rows = [first | {"label": 3, "n": 3}, second | {"label": 1, "n": 1}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_folder(tmp_path).table.to_dict("records") == [row | {"label": str(row["label"])} for row in rows[::-1]]


def test_metadata_jsonl_keeps_numbers_beside_nulls_and_absences(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    rows = [{"file_name": "a.png", "text": "x", "n": 3}, {"file_name": "b.png", "text": "y", "n": None}]
    rows.append({"file_name": "c.png", "text": "z"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    n = read_folder(tmp_path).table.n.tolist()
    assert n[:2] == [3, None] and type(n[0]) is int and n[2] != n[2]


@pytest.mark.parametrize("row", ['{"file_name": "a.png", "text": "x"}', '{"file_name": "a.png", "text": "x", "label": ""}'])
def test_a_label_here_and_none_there_is_refused(row: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "y", "label": 3}\n' + row + "\n")
    with pytest.raises(InputError, match=r"metadata\.jsonl: line 2 has no label"):
        read_folder(tmp_path)


def test_sidecars_and_class_folders(tmp_path: Path) -> None:
    put(tmp_path / "sidecars", "one.png", "deep/two.png")
    (tmp_path / "sidecars/one.txt").write_text(" the first\n")
    (tmp_path / "sidecars/deep/two.txt").write_text("the second")
    assert read_folder(tmp_path / "sidecars").table.text.tolist() == ["the second", "the first"]
    put(tmp_path / "classes", "cat/1.png", "batch/dog/2.png")
    table = read_folder(tmp_path / "classes").table
    assert table.text.tolist() == table.label.tolist() == ["dog", "cat"]


def test_a_folder_with_an_images_suffix_is_no_image(tmp_path: Path) -> None:
    put(tmp_path, "album.png/1.png")
    assert read_folder(tmp_path).table.file_name.tolist() == ["album.png/1.png"]


def table_of(text: str, name: str = "metadata.csv") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        put(folder, "a.png", "b.png")
        (folder / name).write_text(text)

    return make


def sidecar_missing(folder: Path) -> None:
    put(folder, "a.png", "b.png")
    (folder / "a.txt").write_text("x")


def sidecar_latin1(folder: Path) -> None:
    put(folder, "a.png")
    (folder / "a.txt").write_bytes("ü".encode("latin-1"))


COMPLAINTS = {
    "missing folder": (lambda folder: folder.rmdir(), ["no such folder", "data.path"]),
    "no images": (lambda folder: (folder / "a.txt").write_text("x"), ["holds no images", ".png"]),
    "no captions": (lambda folder: put(folder, "a.png", "b/c.png"), ["a.png: is in no subfolder", "metadata.csv"]),
    "no text column": (
        table_of("file_name,words\na.png,x\nb.png,y\n"),
        ["metadata.csv", "file_name and text", "file_name, words"],
    ),
    "image not there": (table_of("file_name,text\na.png,x\nb.png,y\nc.png,z\n"), ["metadata.csv", "names 1 images", "'c.png'"]),
    "image without row": (table_of("file_name,text\na.png,x\n"), ["metadata.csv", "no row for 1 images", "'b.png'"]),
    "two labels": (
        table_of("file_name,text,label\na.png,x,1\nb.png,y,1\na.png,z,2\n"),
        ["metadata.csv", "'a.png'", "the labels '1' and '2' in rows of one image"],
    ),
    "unquoted commas": (
        table_of("file_name,text\na.png,x,y\nb.png,x,z\n"),
        ["metadata.csv", "line 2 has 3 fields", "double quotes"],
    ),
    "one unquoted comma": (table_of("file_name,text\na.png,x\nb.png,x,z\n"), ["metadata.csv", "not readable", "line 3"]),
    "empty csv": (table_of(""), ["metadata.csv", "not readable"]),
    "header alone": (table_of("file_name,text\n"), ["metadata.csv", "no row for 2 images", "'a.png'"]),
    "no JSON": (table_of("nonsense\n", "metadata.jsonl"), ["metadata.jsonl", "not readable"]),
    "lists, not objects": (table_of("[1, 2]\n", "metadata.jsonl"), ["metadata.jsonl", "line 1 holds list", "one object a line"]),
    "half a character": (
        table_of('{"file_name": "a.png", "text": "\\ud800"}\n', "metadata.jsonl"),
        ["metadata.jsonl", "not readable"],
    ),
    "null caption": (
        table_of('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": null}\n', "metadata.jsonl"),
        ["metadata.jsonl", "line 2", "'b.png' has no caption"],
    ),
    "number as caption": (
        table_of('{"file_name": "a.png", "text": 1}\n{"file_name": "b.png", "text": 2}\n', "metadata.jsonl"),
        ["metadata.jsonl", "line 1", "'a.png': text is 1; a caption is a string"],
    ),
    "sidecar missing": (sidecar_missing, ["b.png", "no b.txt is beside it"]),
    "sidecar not UTF-8": (sidecar_latin1, ["a.txt", "UTF-8"]),
}


@pytest.mark.parametrize("case", COMPLAINTS)
def test_bad_folders_are_named_with_what_to_do(case: str, tmp_path: Path) -> None:
    make, expected = COMPLAINTS[case]
    folder = tmp_path / "photos"
    folder.mkdir()
    make(folder)
    with pytest.raises(InputError) as error:
        read_folder(folder)
    message = str(error.value)
    assert str(folder) in message
    for words in expected:
        assert words in message


def test_the_nearest_table_stands_for_an_image_and_sidecars_for_the_rest(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "monday/a.png", "monday/deep/b.png", "tuesday/c.png", "wednesday/d.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,root a\ntuesday/c.png,root c\nwednesday/d.png,root d\n")
    (tmp_path / "monday/metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "monday a", "n": 1}\n{"file_name": "./deep/b.png", "text": "monday b", "n": 2}\n'
    )
    table = read_folder(tmp_path).table.set_index("file_name")
    assert table.text.to_dict() == {
        "a.png": "root a", "monday/a.png": "monday a", "monday/deep/b.png": "monday b", "tuesday/c.png": "root c",
        "wednesday/d.png": "root d",
    }  # fmt: skip
    assert table.n["monday/deep/b.png"] == 2 and table.n.isna().sum() == 3
    (tmp_path / "metadata.csv").unlink()
    for name in ("a", "tuesday/c", "wednesday/d"):
        (tmp_path / f"{name}.txt").write_text(f"sidecar {name}")
    assert read_folder(tmp_path).table.set_index("file_name").text["tuesday/c.png"] == "sidecar tuesday/c"


def test_a_parquet_table_whose_decoder_raises_anything_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    columns = {"file_name": pa.array(["a.png"]), "text": pa.array(["x"]), "day": pa.array([10**8], pa.int32()).view(pa.date32())}
    parquet.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    with pytest.raises(OverflowError):
        parquet.read_table(tmp_path / "metadata.parquet").to_pylist()
    with pytest.raises(InputError, match=r"metadata\.parquet: not readable as a table: date value out of range"):
        read_folder(tmp_path)


def test_a_table_without_rows_is_no_obstacle_where_there_are_no_images(tmp_path: Path) -> None:
    put(tmp_path, "monday/a.png")
    (tmp_path / "monday/metadata.csv").write_text("file_name,text\na.png,x\n")
    (tmp_path / "tuesday").mkdir()
    (tmp_path / "tuesday/metadata.csv").write_text("file_name,text\n")
    assert read_folder(tmp_path).table.file_name.tolist() == ["monday/a.png"]


@pytest.mark.parametrize("convention", ["auto", "tables", "text files", "none"])
def test_rows_of_images_that_were_deleted_from_a_batch_are_passed_over_and_counted(convention: Any, tmp_path: Path) -> None:
    put(tmp_path, "2025-01-31/a.png", "2025-01-31-2/b.png")
    (tmp_path / "2025-01-31/metadata.csv").write_text("file_name,text,label\na.png,x,1\ngone.png,y,2\ngone too.png,z,3\n")
    (tmp_path / "2025-01-31-2/metadata.csv").write_text("file_name,text,label\n./gone.png,y,2\nb.png,x,1\n")
    found = read_folder(tmp_path, convention)
    assert found.table.file_name.tolist() == ["2025-01-31-2/b.png", "2025-01-31/a.png"]
    if convention == "none":  # tables are not read
        assert found.ignored == {".csv": 2}
    else:
        assert found.ignored == {"rows of deleted images": 3} and found.table.text.tolist() == ["x", "x"]


def test_two_tables_in_one_folder_are_refused(tmp_path: Path) -> None:
    table_of("file_name,text\na.png,x\nb.png,y\n")(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match=r"metadata\.jsonl: there is a metadata\.csv beside it"):
        read_folder(tmp_path)


def test_a_label_in_one_batch_and_none_in_another_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "one/a.png", "two/b.png")
    (tmp_path / "one/metadata.csv").write_text("file_name,text,label\na.png,x,1\n")
    (tmp_path / "two/metadata.csv").write_text("file_name,text\nb.png,y\n")
    with pytest.raises(InputError, match=r"two/b\.png: has no label"):
        read_folder(tmp_path)


NAMES = [
    "a b.png",
    "new\nline.png",
    "tab\t.png",
    'quote".png',
    "comma,.png",
    "ü\u0308 ñ 日本 🙂.png",
    "%20#?.png",
    "-dash.png",
    "é.png",
]


@pytest.mark.parametrize("form", ["csv", "jsonl", "txt"])
def test_any_name_is_read(form: str, tmp_path: Path) -> None:
    import pandas as pd

    put(tmp_path, *NAMES)
    table = pd.DataFrame({"file_name": NAMES, "text": [f"of {name}" for name in NAMES]})
    if form == "csv":
        table.to_csv(tmp_path / "metadata.csv", index=False)
    elif form == "jsonl":
        table.to_json(tmp_path / "metadata.jsonl", orient="records", lines=True)
    else:
        for name in NAMES:
            (tmp_path / name).with_suffix(".txt").write_text(f"of {name}")
    found = read_folder(tmp_path)
    assert sorted(found.table.file_name) == sorted(NAMES)
    assert (found.table.text == "of " + found.table.file_name).all()
    assert [place.read() for place in found.places] == [(tmp_path / name).read_bytes() for name in found.table.file_name]


def test_names_match_in_either_unicode_form(tmp_path: Path) -> None:
    """macOS decomposes letters in file names, tables rarely do."""
    put(tmp_path, "cafe\u0301.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncaf\u00e9.png,x\n")
    assert read_folder(tmp_path).table.file_name.tolist() == ["cafe\u0301.png"]


def test_links_that_leave_and_names_that_are_no_text_are_refused_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    put(folder, "a.png", "sub/b.png")
    put(tmp_path, "outside/secret.png")
    (folder / "inside.png").symlink_to("sub/b.png")
    (folder / "leaves.png").symlink_to(tmp_path / "outside/secret.png")
    (folder / "dots.png").symlink_to("../outside/secret.png")
    (folder / "nowhere.png").symlink_to("/nonexistent/x.png")
    (folder / "photo.HEIC").write_bytes(b"x")
    (folder / "paper.pdf").symlink_to("/nonexistent/x.pdf")  # no image: no reason to stop a run
    (folder / "album").symlink_to(tmp_path / "outside")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write((folder / "a.png").read_bytes())
    (folder / "metadata.csv").write_text("file_name,text\na.png,x\nsub/b.png,y\ninside.png,z\nleaves.png,w\nphoto.HEIC,v\n")
    found = read_folder(folder)
    assert found.table.file_name.tolist() == ["a.png", "inside.png", "sub/b.png"]
    reasons = {name: reason.split(";")[0] for name, reason in found.refused.items()}
    leaves = "a symbolic link that leaves the folder"
    assert reasons == {
        "leaves.png": leaves, "dots.png": leaves, "nowhere.png": "a symbolic link that leads nowhere",
        "album": "a symbolic link to a folder", "photo.HEIC": ".heic is not read",
        "\\udcff.png": "its name is not UTF-8",
    }  # fmt: skip


def test_what_is_no_image_or_hidden_is_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.png", ".hidden.png", ".cache/b.png")
    for name in ("a.txt", "notes.txt", "clip.mp4", "README", "prompts.csv", ".DS_Store"):
        (tmp_path / name).write_text("x")
    found = read_folder(tmp_path)
    assert found.table.file_name.tolist() == ["a.png"]
    assert found.ignored == {".mp4": 1, ".txt": 1, "README": 1, "hidden": 3}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["metadata.csv", "a.txt", "prompts.csv"])
@pytest.mark.parametrize("kind", ["pipe", "link that leaves", "link to itself"])
def test_captions_come_from_regular_files_of_the_folder(kind: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    put(folder, "a.png", "b.png")
    (folder / "b.txt").write_text("b")
    (tmp_path / "secret").write_text("file_name,text\na.png,SECRET\nb.png,SECRET\n")
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(tmp_path / "secret" if kind == "link that leaves" else name)
    with pytest.raises(InputError, match=r"a symbolic link|not a regular file|a\.png: has no caption: "):
        read_folder(folder)


def test_only_regular_files_of_bearable_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # to open it for reading would wait for a writer
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file
    for name, reason in (
        ("pipe.png", "not a regular file"),
        ("folder", "directory|regular"),
        ("huge.png", "at most"),
        ("gone", "No such"),
    ):
        with pytest.raises(UnreadableImage, match=reason) as error:
            Place(tmp_path / name).read()
        assert str(tmp_path) not in str(error.value)

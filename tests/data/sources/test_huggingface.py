"""What the package `datasets` opens, on a disk, as a folder of captioned images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_sets import COMMIT, NAMES, PICTURE, STRING, SUFFIXES, TEXT, contents, encoded, rows, save, table_of
from datasets import List, Value
from pydantic import ValidationError

from ldm.base.errors import InputError
from ldm.data import open_shards, write_shards
from ldm.data.sources.huggingface import HuggingFace


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for this test alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home/datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "home/datasets/downloads")
    datasets.disable_progress_bars()


COLUMNS = {
    "image": PICTURE,
    "caption": List(STRING),
    "kind": NAMES,
    "file_name": STRING,  # a name that metadata.jsonl needs for itself
    "width": Value("int32"),
    "score": Value("float64"),
    "is_drawn": Value("bool"),
    "boxes": List(Value("float32")),
    "taken": Value("timestamp[s]"),
}


def photos(count: int, first: int) -> list[dict[str, Any]]:
    def image(i: int) -> dict[str, Any] | None:
        blob = b"" if i == first + 8 else b"no image" if i == first + 9 else encoded(i, list(SUFFIXES)[i % len(SUFFIXES)])
        return None if i == first + 7 else {"bytes": blob, "path": f"{i}.tif"}

    return [
        {
            "image": image(i),
            "caption": [f"photo {i}, “schön”\n\u2028", "second caption"],
            "kind": i % 2,
            "file_name": f"DSC{i}.tif",
            "width": None if i == first else 2 * i,
            "score": [0.1, float("nan"), float("inf")][i % 3],
            "is_drawn": i % 2 == 0,
            "boxes": [1.0],
            "taken": i,
        }
        for i in range(first, first + count)
    ]


def test_a_data_set_keeps_bytes_captions_labels_and_scalars(tmp_path):
    splits = {"train": photos(60, 0), "test": photos(20, 100)}
    save(tmp_path / "project/my/photos", COLUMNS, **splits)
    out = tmp_path / "project/data/raw/source"
    assert HuggingFace(dataset="my/photos").write(tmp_path / "project", out) == 80
    written = table_of(out)
    for (split, number), line in zip([("test", i) for i in range(20)] + [("train", i) for i in range(60)], written, strict=True):
        row = splits[split][number]
        blob = row["image"]["bytes"] if row["image"] else b""
        kind = list(SUFFIXES)[int(row["file_name"][3:-4]) % len(SUFFIXES)] if blob not in (b"", b"no image") else "PNG"
        assert line == {
            "file_name": f"{split}/{number:08d}.{SUFFIXES[kind]}",
            "text": row["caption"],
            "label": ("cat", "dog")[row["kind"]],
            "source_file_name": row["file_name"],
            "width": row["width"],
            "score": row["score"] if row["score"] == 0.1 else None,
            "is_drawn": row["is_drawn"],
        }
        assert (out / line["file_name"]).read_bytes() == blob
    assert len(contents(out)) == len(written) + 1

    options: dict[str, Any] = {
        "image_size": 8,
        "channels": 3,
        "resize_filter": "lanczos",
        "shard_size": 50,
        "max_bad_fraction": 0.1,
    }
    index = write_shards(out, tmp_path / "shards", val_fraction=0.3, test_fraction=0.3, **options)
    assert index["found"] == 80
    counts = {split: stop - start for split, (start, stop) in index["splits"].items()}
    assert sum(counts.values()) == 80 - 6  # no image, an empty file and none that anyone knows, in both splits
    captions = open_shards(tmp_path / "shards", "train").captions
    assert set(captions.text) <= {line["text"][0] for line in written} and captions.captions.str[1].eq("second caption").all()
    assert set(captions.label) == {"cat", "dog"}


def test_an_image_folder(tmp_path):
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("elk", "owl") for i in range(2)]
    files = {name: encoded(i) for i, name in enumerate(names)}
    for name, blob in files.items():
        (tmp_path / "zoo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "zoo" / name).write_bytes(blob)
    assert HuggingFace(dataset=str(tmp_path / "zoo")).write(tmp_path, tmp_path / "out") == 8
    written = table_of(tmp_path / "out")
    assert [line["text"] for line in written] == [line["label"] for line in written] == ["elk", "elk", "owl", "owl"] * 2
    assert [(tmp_path / "out" / line["file_name"]).read_bytes() for line in written] == [files[n] for n in sorted(names)]
    (tmp_path / "zoo/train/owl/0.png").write_bytes(encoded(99))  # the cache of `datasets` must not answer for the folder
    (tmp_path / "zoo/train/owl/2.png").write_bytes(encoded(100))
    assert HuggingFace(dataset="zoo").write(tmp_path, tmp_path / "out") == 9
    assert encoded(99) in contents(tmp_path / "out").values()


def test_a_local_data_set_may_name_its_files(tmp_path):
    save(tmp_path / "named", {"image": PICTURE, "text": STRING}, train=rows(2, image=lambda i: {"path": f"{i}.jpg"}, text=str))
    for i in range(2):
        (tmp_path / f"named/{i}.jpg").write_bytes(encoded(i, "JPEG"))
    HuggingFace(dataset="named").write(tmp_path, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {"train/00000000.jpg", "train/00000001.jpg", "metadata.jsonl"}
    assert (tmp_path / "out/train/00000001.jpg").read_bytes() == encoded(1, "JPEG")


def test_two_runs_in_different_places_write_the_same_bytes(tmp_path, monkeypatch):
    save(tmp_path / "here/photos", COLUMNS, train=photos(12, 0), test=photos(12, 100))
    shutil.copytree(tmp_path / "here/photos", tmp_path / "there/deeper/copy")
    HuggingFace(dataset="photos").write(tmp_path / "here", tmp_path / "here/out")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
    HuggingFace(dataset="deeper/copy").write(tmp_path / "there", tmp_path / "there/out")
    assert contents(tmp_path / "here/out") == contents(tmp_path / "there/out")


CHOICES = {
    "text before caption": ({"caption": STRING, "text": STRING}, {"text": "text 0", "caption": "caption 0"}),
    "the only column of strings": ({"title": STRING, "size": Value("int8")}, {"text": "title 0", "size": 0}),
    "names of the only classes": (
        {"a": STRING, "b": STRING, "kind": NAMES},
        {"text": "cat", "label": "cat", "a": "a 0", "b": "b 0"},
    ),
    "two columns of classes": ({"text": STRING, "k": NAMES, "l": NAMES}, {"text": "text 0", "k": "cat", "l": "cat"}),
    "a label that is no class": ({"text": STRING, "label": Value("int8")}, {"text": "text 0", "label": 0}),
    "numbered captions": (
        {"caption_0": STRING, "caption_1": STRING, "kind": NAMES},
        {"caption_0": "caption_0 0", "caption_1": "caption_1 0", "label": "cat"},
    ),
    "captions beside text": ({"captions": STRING, "text": STRING}, {"text": "text 0", "captions": "captions 0"}),
    "a number of captions": ({"captions": Value("int8"), "title": STRING}, {"text": "title 0", "source_captions": 0}),
    "text that is no string": ({"text": Value("int8"), "caption": STRING}, {"text": "caption 0", "source_text": 0}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_which_columns_are_read(case, tmp_path):
    features, expected = CHOICES[case]
    values = {n: (lambda i, n=n: f"{n} {i}") if f == STRING else (lambda i: i) for n, f in features.items()}
    save(tmp_path / "it", {"image": PICTURE, **features}, train=rows(2, **values))
    HuggingFace(dataset="it").write(tmp_path, tmp_path / "out")
    assert table_of(tmp_path / "out")[0] == {"file_name": "train/00000000.png", **expected}


REFUSED: dict[str, tuple[str, dict[str, Any] | None, dict[str, Callable[[int], Any]], list[str]]] = {
    "a name alone": ("me/tiny", None, {}, ["me/tiny'", "no such folder", "NAME@COMMIT", "40 hex", "which data"]),
    "a branch": ("me/tiny@main", None, {}, ["NAME@COMMIT", "or a branch, would not say which data"]),
    "a short commit": ("me/tiny@0123456", None, {}, ["40 hex digits of a commit"]),
    "no such folder": ("not/here/at/all", None, {}, ["not/here/at/all", "no such folder"]),
    "an empty folder": ("empty", None, {}, ["empty", "EmptyDatasetError"]),
    "no network": (f"me/tiny@{COMMIT}", None, {}, ["me/tiny", "ConnectionError", "Couldn't reach"]),
    "a damaged file": ("damaged", None, {}, ["damaged", "Parquet magic bytes"]),
    "files that differ": ("unlike", None, {}, ["unlike", "column names don't match"]),
    "an unknown configuration": ("it:large", TEXT, {"text": str}, ["'large' not found", "default"]),
    "no image column": ("it", {"image": STRING, "n": Value("int8")}, {"image": str, "n": int},
                        ["expected one column of images, found 0", "image (string), n (int8)"]),
    "two image columns": ("it", {**TEXT, "mask": PICTURE}, {"text": str, "mask": lambda i: None},
                          ["found 2", "image (Image), text (string), mask (Image)"]),
    "two for captions": ("it", {"image": PICTURE, "a": STRING, "b": List(STRING)}, {"a": str, "b": lambda i: []},
                         ["which column holds the captions?", "a (string), b (list of string)"]),
    "no captions": ("it", {"image": PICTURE, "n": Value("int8")}, {"n": int}, ["captions?", "n (int8)"]),
    "two columns of classes": ("it", {"image": PICTURE, "k": NAMES, "l": NAMES}, {"k": lambda i: 0, "l": lambda i: 0},
                               ["captions?", "k (ClassLabel), l (ClassLabel)"]),
    "a row without caption": ("it", TEXT, {"text": lambda i: None if i == 2 else "x"},
                              ["split train, row 2: column 'text' is empty", "every image needs its text"]),
    "a row with a list of none": ("it", {"image": PICTURE, "caption": List(STRING)}, {"caption": lambda i: ["x"][i:]},
                                  ["split train, row 1: column 'caption' is empty"]),
    "a hidden class": ("it", {**TEXT, "kind": NAMES}, {"text": str, "kind": lambda i: -1 if i == 1 else 0},
                       ["split train, row 1: column 'kind' is empty", "needs its label"]),
    "a file that is gone": ("it", TEXT, {"text": str, "image": lambda i: {"path": f"gone/{i}.png"}},
                            ["split train, row 0", "gone/0.png", "No such file"]),
    "a file elsewhere on the net": ("it", TEXT, {"text": str, "image": lambda i: {"path": "https://example.org/a.png"}},
                                    ["split train, row 0", "https:/example.org/a.png", "cannot be read"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case, tmp_path, monkeypatch):
    dataset, features, columns, words = REFUSED[case]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for folder, names in {"empty": [], "damaged": ["train.parquet"], "unlike": ["train/0.jsonl", "train/1.jsonl"]}.items():
        (tmp_path / folder / "train").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).write_text(json.dumps({f"column of {name}": 1}))
    if features is not None:
        save(tmp_path / "it", features, train=rows(3, **columns))
    (tmp_path / "raw/source").mkdir(parents=True)
    (tmp_path / "raw/source/before.txt").write_text("as it was")
    with pytest.raises(InputError) as refusal:
        HuggingFace(dataset=dataset).write(tmp_path, tmp_path / "raw/source")
    message = str(refusal.value)
    assert message.startswith(f"data.source.dataset '{dataset}'") and "\n" not in message
    assert [word for word in words if word not in message] == [], message
    assert contents(tmp_path / "raw") == {"source/before.txt": b"as it was"} and len(list((tmp_path / "raw").iterdir())) == 1


def test_a_data_set_has_a_name():
    with pytest.raises(ValidationError, match="dataset"):
        HuggingFace(dataset="")
    with pytest.raises(ValidationError, match="dataset"):
        HuggingFace()
